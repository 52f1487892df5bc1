"""A reference → a network that has run once on an input of the data's shape.

    resnet56              a name of the zoo
    /dir/net.py:factory   a user's own function or class; called with `args`, and with `classes` or
                          `num_classes`, `in_channels` and `input_shape` if it names them
    /dir/net.pt2          torch.export.save; cannot be trained
    hf:/dir               a local Hugging Face folder; called with `args` as its configuration

The data are images (C, H, W), or texts (K, S): K rows of S tokens (`hf_text.ROWS`), padded on the
right. A network of texts is a folder or a user's own.

Weights come from `weights.py`, those of a Hugging Face folder from `hf.py`; here they are
initialised, from the given seed alone.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
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

MASK = 1  # row of the attention mask among a text's tokens


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
    input_shape: tuple[int, ...],
    seed: int,
    keep_layers: Sequence[int] | None = None,
    kept_ids: Sequence[int] | None = None,
) -> Network:
    """Build the network and run it once.

    Args:
        reference: zoo name, FILE.py:factory, FILE.pt2 or hf:DIR; paths are absolute.
        args: passed to the factory.
        classes: C that the logits (N, C) must have.
        input_shape: (C, H, W) of images, or (K, S) of texts.
        seed: of the initial weights; torch's, NumPy's and Python's generators are left as found.
        keep_layers: of a folder of texts: it has these of its encoder layers, from 0; None: all.
            In the result's `args` they are a depth.
        kept_ids: of a folder of texts: its word embeddings have these rows, ascending; None: all.
            In the result's `args` they are a number of words, with the ids of special ones.

    Raises:
        ModelError: it cannot be found, built or run, gives something else than logits, or its
            answer to a text depends on the padding behind it.
    """
    assert len(input_shape) in (2, 3), input_shape
    folder = find_folder(reference)
    is_text = len(input_shape) == 2
    if keep_layers is not None and (folder is None or not is_text):
        raise ModelError(
            f"{reference}: keep_layers names layers of a text encoder in an hf: folder; leave it "
            "out"
        )
    with _seeded(seed):
        if folder is not None:
            if keep_layers is not None or kept_ids is not None:
                from .hf import kept_args

                args = kept_args(folder, args, keep_layers, kept_ids=kept_ids)
            return _open_hf(folder, reference, args, classes=classes, input_shape=input_shape)
        if ".py:" in reference or reference.endswith(".py"):
            return _open_user_code(reference, args, classes=classes, input_shape=input_shape)
        if is_text:
            raise ModelError(
                f"{reference}: is no network of texts, and the data are texts; give hf:DIR or "
                "FILE.py:factory"
            )
        if reference.endswith(".pt2"):
            return _open_program(reference, args, classes=classes, input_shape=input_shape)
        return _open_zoo(reference, args, classes=classes, input_shape=input_shape)


def _open_zoo(
    reference: str, args: Mapping[str, Any], *, classes: int, input_shape: tuple[int, ...]
) -> Network:
    module = zoo.build(reference, args, classes=classes, in_channels=input_shape[0])
    with _own_failure(reference, input_shape):
        output = _run(module, _example(input_shape))
    _check_output(output, reference, batch=2, classes=classes, to_do="")
    return Network(module, reference, dict(args), trainable=True)


def _open_hf(
    folder: HfFolder,
    reference: str,
    args: Mapping[str, Any],
    *,
    classes: int,
    input_shape: tuple[int, ...],
) -> Network:
    from .hf import build  # transformers is not needed elsewhere
    from .hf_text import TextClassifier, pad_id

    module = build(folder, args, classes=classes, input_shape=input_shape)
    pad = pad_id(module.network) if isinstance(module, TextClassifier) else 0
    example = _example(input_shape, pad=pad)
    with _own_failure(reference, input_shape):
        output = _run(module, example)
    _check_output(output, reference, batch=2, classes=classes, to_do="")
    _check_padding(module, example, output, reference)
    return Network(module, reference, dict(args), trainable=True, sources=(folder.path / CONFIG,))


def _open_program(
    reference: str, args: Mapping[str, Any], *, classes: int, input_shape: tuple[int, ...]
) -> Network:
    if args:
        raise ModelError(f"{reference}: a .pt2 program takes no args, got {sorted(args)}")
    channels, height, width = input_shape
    module, fixed_batch = open_program(Path(reference), input_shape=(channels, height, width))
    batch = fixed_batch or 2
    with _own_failure(reference, input_shape):
        output = _run(module, _example(input_shape, batch=batch))
    to_do = "a captured program keeps its classes: export one for this data"
    _check_output(output, reference, batch=batch, classes=classes, to_do=to_do)
    return Network(module, reference, {}, trainable=False, fixed_batch=fixed_batch)


def _open_user_code(
    reference: str, args: Mapping[str, Any], *, classes: int, input_shape: tuple[int, ...]
) -> Network:
    file, _, name = reference.rpartition(":") if ".py:" in reference else (reference, "", "")
    factory, world = open_factory(Path(file), name)
    offered = {"classes": classes, "num_classes": classes, "input_shape": input_shape}
    if len(input_shape) == 3:
        offered["in_channels"] = input_shape[0]
    with blaming(world, reference), world.entered():
        module = call_factory(factory, args, offered=offered, where=reference)
    _check_module(module, reference)
    example = _example(input_shape)
    with blaming(world, f"{reference}: on an input (2, {_dims(input_shape)})"), world.entered():
        output = _run(module, example)
    to_do = (
        "let the factory take `classes`, or set its number of classes in `args`; for a trained "
        "net of another task give its `weights` with `head: new`"
    )
    _check_output(output, reference, batch=2, classes=classes, to_do=to_do)
    with blaming(world, f"{reference}: on a shorter input"), world.entered():
        _check_padding(module, example, output, reference)
    return Network(module, reference, dict(args), trainable=True, sources=_sources(world))


def _sources(world: UserFolder) -> tuple[Path, ...]:
    return tuple(sorted(world.sources))


def _check_module(module: object, reference: str) -> None:
    if isinstance(module, nn.Module):
        return
    got = "a class; return an instance of it" if isinstance(module, type) else f"{module!r:.80}"
    raise ModelError(f"{reference}: the factory must return a torch.nn.Module, got {got}")


def _example(input_shape: tuple[int, ...], *, batch: int = 2, pad: int = 0) -> Tensor:
    """An input for the first run: noise of images, which the global generators know nothing of, or
    texts of one small id, the last of them padded behind its first half."""
    if len(input_shape) == 3:
        return torch.randn(batch, *input_shape, generator=torch.Generator().manual_seed(0))
    tokens = torch.zeros(batch, *input_shape, dtype=torch.int64)
    tokens[:, 0] = 2 if pad == 1 else 1
    tokens[:, MASK] = 1
    length = _half(input_shape)
    tokens[-1, 0, length:], tokens[-1, MASK, length:] = pad, 0
    return tokens


def _half(input_shape: Sequence[int]) -> int:
    """Tokens of the text that is padded."""
    return (input_shape[-1] + 1) // 2


def _run(module: nn.Module, inputs: Tensor) -> object:
    """One forward in eval mode."""
    module.eval()
    with torch.no_grad():
        output: object = module(inputs)
    return output


def _check_padding(module: nn.Module, tokens: Tensor, output: object, reference: str) -> None:
    """The last text is answered alike without its padding: a text is padded to the longest of its
    batch, so that its answer would otherwise depend on its neighbours."""
    if tokens.ndim != 3:
        return
    shorter = _run(module, tokens[..., : _half(tokens.shape)])
    assert isinstance(output, Tensor)
    # far above the rounding of sums in another order, far below what reading a pad does
    if isinstance(shorter, Tensor) and torch.allclose(
        shorter[-1], output[-1], rtol=1e-3, atol=1e-3 * float(output.abs().max())
    ):
        return
    raise ModelError(
        f"{reference}: its answer to a text changes with the padding behind it; use the attention "
        "mask (row 1 of the tokens; 0: padding), or choose an encoder that does"
    )


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
            f"{tuple(output.shape)}; return one row of logits for each sample"
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
            f"{reference}: gives NaN or infinite logits for an ordinary input; look at its "
            "initialisation or its stored weights"
        )


@contextmanager
def _own_failure(reference: str, input_shape: tuple[int, ...]) -> Iterator[None]:
    """A network without user code that fails in its first run cannot take this input."""
    try:
        yield
    except (RuntimeError, ValueError, IndexError) as error:
        said = " ".join(str(error).split())[:300]
        section = "tokenize" if len(input_shape) == 2 else "preprocess"
        raise ModelError(
            f"{reference}: cannot take an input ({_dims(input_shape)}): {said}; change "
            f"data.{section} or choose another network"
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
