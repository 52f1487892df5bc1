"""A reference → a network that has run once on an input of the data's shape.

    resnet56              a name of the zoo
    /dir/net.py:factory   a user's own function or class; called with `args`, and with `classes` or
                          `num_classes`, `in_channels` and `input_shape` if it names them
    /dir/net.pt2          torch.export.save; cannot be trained
    hf:/dir               a local Hugging Face folder; called with `args` as its configuration

Weights come from `weights.py`, those of a Hugging Face folder from `hf.py`; here they are
initialised, from the given seed alone.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..pipeline.errors import ModelError
from . import zoo
from .hf_folder import CONFIG, HfFolder, find_folder
from .plan import Plan
from .program import open_program
from .user_code import UserFolder, blaming, call_factory, open_factory


@dataclass(frozen=True)
class Network:
    """A module and where it came from. The module is in eval mode, on the CPU."""

    module: nn.Module
    reference: str
    args: dict[str, Any]
    trainable: bool
    sources: tuple[Path, ...] = ()  # the user's own files it was built from, for hashing
    fixed_batch: int | None = None  # a .pt2 captured for one batch size runs with no other
    plan: Plan | None = None  # what pruning left of what the factory builds; None: all of it


def open_network(
    reference: str,
    *,
    args: Mapping[str, Any],
    classes: int,
    input_shape: tuple[int, int, int],
    seed: int,
) -> Network:
    """Build the network and run it once.

    Args:
        reference: zoo name, FILE.py:factory, FILE.pt2 or hf:DIR; paths are absolute.
        args: passed to the factory.
        classes: C that the logits (N, C) must have.
        input_shape: (C, H, W) of the data.
        seed: of the initial weights; torch's, NumPy's and Python's generators are left as found.

    Raises:
        ModelError: it cannot be found, built or run, or gives something else than logits.
    """
    shape = (input_shape[0], input_shape[1], input_shape[2])
    with _seeded(seed):
        if reference.endswith(".pt2"):
            return _open_program(reference, args, classes=classes, input_shape=shape)
        if ".py:" in reference or reference.endswith(".py"):
            return _open_user_code(reference, args, classes=classes, input_shape=shape)
        folder = find_folder(reference)
        if folder is not None:
            return _open_hf(folder, reference, args, classes=classes, input_shape=shape)
        module = zoo.build(reference, args, classes=classes, in_channels=shape[0])
        with _own_failure(reference, shape):
            output = _run(module, (2, *shape))
        _check_output(output, reference, batch=2, classes=classes, to_do="")
        return Network(module, reference, dict(args), trainable=True)


def _open_hf(
    folder: HfFolder,
    reference: str,
    args: Mapping[str, Any],
    *,
    classes: int,
    input_shape: tuple[int, int, int],
) -> Network:
    from .hf import build  # transformers is not needed elsewhere

    module = build(folder, args, classes=classes)
    with _own_failure(reference, input_shape):
        output = _run(module, (2, *input_shape))
    _check_output(output, reference, batch=2, classes=classes, to_do="")
    return Network(module, reference, dict(args), trainable=True, sources=(folder.path / CONFIG,))


def _open_program(
    reference: str, args: Mapping[str, Any], *, classes: int, input_shape: tuple[int, int, int]
) -> Network:
    if args:
        raise ModelError(f"{reference}: a .pt2 program takes no args, got {sorted(args)}")
    module, fixed_batch = open_program(Path(reference), input_shape=input_shape)
    batch = fixed_batch or 2
    with _own_failure(reference, input_shape):
        output = _run(module, (batch, *input_shape))
    to_do = "a captured program keeps its classes: export one for this data"
    _check_output(output, reference, batch=batch, classes=classes, to_do=to_do)
    return Network(module, reference, {}, trainable=False, fixed_batch=fixed_batch)


def _open_user_code(
    reference: str, args: Mapping[str, Any], *, classes: int, input_shape: tuple[int, int, int]
) -> Network:
    file, _, name = reference.rpartition(":") if ".py:" in reference else (reference, "", "")
    factory, world = open_factory(Path(file), name)
    offered = {"classes": classes, "num_classes": classes, "in_channels": input_shape[0],
               "input_shape": input_shape}  # fmt: skip
    with blaming(world, reference), world.entered():
        module = call_factory(factory, args, offered=offered, where=reference)
    _check_module(module, reference)
    with blaming(world, f"{reference}: on an input (2, {_dims(input_shape)})"), world.entered():
        output = _run(module, (2, *input_shape))
    to_do = (
        "let the factory take `classes`, or set its number of classes in `args`; for a trained "
        "net of another task give its `weights` with `head: new`"
    )
    _check_output(output, reference, batch=2, classes=classes, to_do=to_do)
    return Network(module, reference, dict(args), trainable=True, sources=_sources(world))


def _sources(world: UserFolder) -> tuple[Path, ...]:
    return tuple(sorted(world.sources))


def _check_module(module: object, reference: str) -> None:
    if isinstance(module, nn.Module):
        return
    got = "a class; return an instance of it" if isinstance(module, type) else f"{module!r:.80}"
    raise ModelError(f"{reference}: the factory must return a torch.nn.Module, got {got}")


def _run(module: nn.Module, shape: tuple[int, int, int, int]) -> object:
    """One forward in eval mode, on noise that the global generators know nothing of."""
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    module.eval()
    with torch.no_grad():
        output: object = module(noise)
    return output


def _check_output(output: object, reference: str, *, batch: int, classes: int, to_do: str) -> None:
    """Logits: a finite float tensor (batch, classes)."""
    if not isinstance(output, Tensor):
        kind = type(output).__name__
        inside = ", ".join(map(str, output)) if isinstance(output, Mapping) else ""
        raise ModelError(
            f"{reference}: expected the logits, a tensor (N, {classes}), and got a {kind}"
            + (f" with {inside}" if inside else "")
            + "; return the logits alone, from a wrapper module if need be"
        )
    if output.ndim != 2 or len(output) != batch:
        raise ModelError(
            f"{reference}: expected logits ({batch}, {classes}) for a batch of {batch}, got "
            f"{tuple(output.shape)}; return one row of logits for each image"
        )
    if output.shape[1] != classes:
        raise ModelError(
            f"{reference}: gives {output.shape[1]} classes and the data has {classes}; {to_do}"
        )
    if not output.is_floating_point():
        raise ModelError(
            f"{reference}: expected float logits, got {str(output.dtype)[6:]}; return the logits, "
            "not the predicted class"
        )
    if not bool(torch.isfinite(output).all()):
        raise ModelError(
            f"{reference}: gives NaN or infinite logits for ordinary input (mean 0, std 1); look "
            "at its initialisation or its stored weights"
        )


@contextmanager
def _own_failure(reference: str, input_shape: tuple[int, int, int]) -> Iterator[None]:
    """A network without user code that fails in its first run cannot take this input."""
    try:
        yield
    except (RuntimeError, ValueError, IndexError) as error:
        said = " ".join(str(error).split())[:300]
        raise ModelError(
            f"{reference}: cannot take an input ({_dims(input_shape)}): {said}; change "
            "data.preprocess or choose another network"
        ) from error


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """The CPU generators start at `seed` inside, and go on where they were afterwards."""
    python, numpy = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        np.random.seed(seed % 2**32)
        random.seed(seed)
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)


def _dims(shape: tuple[int, ...]) -> str:
    return ", ".join(map(str, shape))
