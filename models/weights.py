"""Checkpoints: read without running code, hold against the network, load.

A file is safetensors, or what torch.save wrote and `weights_only` reads. The state dict is the file
itself or, in this order, its entry `state_dict`, `model`, `model_state`, `model_state_dict`, `net`
or `module`. Averaged weights (`model_ema`, `ema_state_dict`, …) are never chosen on their own: who
wants them saves them alone. Prefixes left by DataParallel (`module.`) and torch.compile
(`_orig_mod.`) are taken off when every name has them.
"""

from __future__ import annotations

import argparse
import itertools
import pathlib
import pickle
import struct
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from ..pipeline.errors import ModelError, WeightsError
from . import zoo

WRAPPERS = ("state_dict", "model", "model_state", "model_state_dict", "net", "module")
PREFIXES = ("module.", "_orig_mod.")
COUNTER = "num_batches_tracked"  # of BatchNorm: only a cumulative average reads it
SHOWN = 8  # names listed of each kind of mismatch

_RESAVE = (
    "save its weights alone where it was made: torch.save(model.state_dict(), FILE), or "
    "safetensors.torch.save_file"
)


@dataclass(frozen=True)
class LoadReport:
    """What loading did."""

    tensors: int  # loaded
    fresh: tuple[str, ...]  # left as initialised: a new classifier
    dropped: tuple[str, ...]  # of the checkpoint: the former classifier
    cast_from: tuple[str, ...]  # dtypes that became the network's own


def read_state(path: Path) -> dict[str, Tensor]:
    """The state dict in `path`, on the CPU, in the file's dtypes.

    Raises:
        WeightsError: no such file, no checkpoint, a damaged one, one that holds code, or one
            without a state dict (its entries are listed).
    """
    if not path.is_file():
        raise WeightsError(f"{path}: no such file")
    with path.open("rb") as handle:
        head = handle.read(9)
    # a zip archive, or a pickle of protocol 2 to 5 (torch's format before 1.6)
    if head[:2] == b"PK" or (head[:1] == b"\x80" and head[1:2] in b"\x02\x03\x04\x05"):
        return _strip(_unwrap(_read_torch(path), path))
    # safetensors: eight bytes of length, then JSON
    if path.suffix == ".safetensors" or head[8:] == b"{":
        try:
            return _strip(safetensors.torch.load_file(path))
        except (safetensors.SafetensorError, OSError) as error:
            raise WeightsError(
                f"{path}: is damaged or no safetensors file ({error}); copy it again"
            ) from error
    raise WeightsError(
        f"{path}: is no checkpoint; expected safetensors or a torch.save file, got one that "
        f"begins with {head[:8]!r}"
    )


def load_weights(
    module: nn.Module, state: Mapping[str, Tensor], *, head: Literal["keep", "new"], where: str
) -> LoadReport:
    """Copy `state` into `module`; all of it or an error, nothing is skipped in silence.

    Args:
        head: "new" leaves the classifier, the last nn.Linear or 1 × 1 convolution, as initialised.
        where: named first in every error, e.g. "teacher".

    Raises:
        WeightsError: names missing, unexpected or of other shapes; a tensor that is not finite or
            no plain float tensor. The module is then as it was.
    """
    given, own = dict(state), _tensors(module.state_dict())
    dropped: list[str] = []
    if head == "new":
        classifier = _classifier(module)
        if classifier is None:
            raise WeightsError(
                f"{where}: head: new, but the network has no nn.Linear and no 1 × 1 convolution "
                "to replace; load the weights in your factory"
            )
        dropped = [f"{classifier}.{part}" for part in ("weight", "bias")]
        given = {name: tensor for name, tensor in given.items() if name not in dropped}
    missing = _missing(own, given, dropped)
    unexpected = [name for name in given if name not in own]
    shapes = [
        f"{name} (network {_shape(own[name])}, checkpoint {_shape(given[name])})"
        for name in given
        if name in own and own[name].shape != given[name].shape
    ]
    if missing or unexpected or shapes:
        raise WeightsError(_mismatch(module, state, (missing, unexpected, shapes), where))
    ready = {name: _cast(tensor, own[name], f"{where}: {name}") for name, tensor in given.items()}
    module.load_state_dict(ready, strict=False)
    cast = {str(t.dtype)[6:] for n, t in given.items() if t.dtype != own[n].dtype}
    return LoadReport(
        tensors=len(ready),
        fresh=tuple(name for name in dropped if name in own),
        dropped=tuple(name for name in dropped if name in state),
        cast_from=tuple(sorted(cast)),
    )


def _read_torch(path: Path) -> Any:
    # Metadata that training scripts leave beside the weights; plain data, no code.
    harmless: list[Any] = [
        argparse.Namespace,
        pathlib.PosixPath,
        np.dtype,
        *(type(np.dtype(kind)) for kind in ("float64", "float32", "int64", "int32", "bool")),
        (np.float64(0).__reduce__()[0], "numpy._core.multiarray.scalar"),
        (np.float64(0).__reduce__()[0], "numpy.core.multiarray.scalar"),
    ]
    try:
        with torch.serialization.safe_globals(harmless), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about formats; what cannot be read is an error below
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        if "GLOBAL" in str(error) or "REDUCE" in str(error) or "class" in str(error):
            raise WeightsError(
                f"{path}: holds pickled code ({_culprit(error)}), which is not run; {_RESAVE}"
            ) from error
        raise WeightsError(f"{path}: is no checkpoint or a damaged one; {_RESAVE}") from error
    except _DAMAGED as error:
        if "TorchScript" in str(error):
            raise WeightsError(f"{path}: is a TorchScript program; {_RESAVE}") from error
        raise WeightsError(
            f"{path}: is no checkpoint or a damaged one (was the copy complete?); {_RESAVE}"
        ) from error


# what readers of pickles and archives raise on bytes that are none
_DAMAGED = (RuntimeError, EOFError, ValueError, LookupError, AttributeError, TypeError,
            AssertionError, OSError, struct.error)  # fmt: skip


def _culprit(error: pickle.UnpicklingError) -> str:
    """The name that `weights_only` refused."""
    words = str(error).replace("`", " ").split()
    return next((n for word, n in itertools.pairwise(words) if word == "GLOBAL"), "an object")


def _unwrap(content: Any, path: Path) -> dict[str, Tensor]:
    if isinstance(content, Mapping):
        for key in WRAPPERS:
            if _is_state(content.get(key)):
                return _tensors(content[key])
        if _is_state(content):
            return _tensors(content)
        averaged = [k for k in content if "ema" in str(k).lower() and _is_state(content[k])]
        if averaged:
            raise WeightsError(
                f"{path}: holds only averaged weights ({', '.join(map(str, averaged))}); if you "
                "want them, save that entry alone"
            )
        keys = ", ".join(repr(k) for k in list(content)[:SHOWN]) or "nothing"
        raise WeightsError(
            f"{path}: no state dict in it; expected tensors by name, at the top or under one of "
            f"{', '.join(WRAPPERS)}, got {keys}; {_RESAVE}"
        )
    raise WeightsError(f"{path}: holds a {type(content).__name__}, no state dict; {_RESAVE}")


def _is_state(value: Any) -> bool:
    return isinstance(value, Mapping) and any(isinstance(t, Tensor) for t in value.values())


def _tensors(state: Mapping[Any, Any]) -> dict[str, Tensor]:
    return {str(name): t.detach() for name, t in state.items() if isinstance(t, Tensor)}


def _strip(state: dict[str, Tensor]) -> dict[str, Tensor]:
    # swa_utils.AveragedModel counts beside what it wraps
    names = [name for name in state if name != "n_averaged"]
    for prefix in PREFIXES:
        if names and all(name.startswith(prefix) for name in names):
            return _strip({name.removeprefix(prefix): state[name] for name in names})
    return state


def _classifier(module: nn.Module) -> str | None:
    """Path of the last nn.Linear or 1 × 1 convolution, in the order of the modules."""
    found = None
    for name, part in module.named_modules():
        is_point = isinstance(part, nn.Conv2d) and part.kernel_size == (1, 1)
        if is_point or isinstance(part, nn.Linear):
            found = name
    return found


def _missing(
    own: Mapping[str, Tensor], given: Mapping[str, Tensor], dropped: list[str]
) -> list[str]:
    """Names that no tensor was given for; a tied tensor is given under any of its names."""
    places = {name: (tensor.data_ptr(), tensor.shape) for name, tensor in own.items()}
    filled = {places[name] for name in given if name in own and own[name].numel()}
    optional = {n for n in own if n.rpartition(".")[2] == COUNTER} | {*dropped, *given}
    return [n for n in own if n not in optional and places[n] not in filled]


def _cast(tensor: Tensor, own: Tensor, where: str) -> Tensor:
    if tensor.is_quantized or tensor.layout != torch.strided:
        raise WeightsError(f"{where}: is quantized or sparse; give the float checkpoint")
    if own.is_floating_point() != tensor.is_floating_point():
        raise WeightsError(
            f"{where}: expected {str(own.dtype)[6:]}, got {str(tensor.dtype)[6:]}; give the float "
            "checkpoint"
        )
    result = tensor.to(own.dtype)
    if result.is_floating_point() and not bool(torch.isfinite(result).all()):
        bad = int((~torch.isfinite(result)).sum())
        raise WeightsError(
            f"{where}: {bad} of {result.numel()} values are NaN or infinite; the training that "
            "wrote this checkpoint diverged, take an earlier one"
        )
    return result


def _mismatch(
    module: nn.Module,
    state: Mapping[str, Tensor],
    problems: tuple[list[str], list[str], list[str]],
    where: str,
) -> str:
    kinds = ("missing in the checkpoint", "unknown to the network", "of another shape")
    lines = [f"{where}: the weights do not fit the network"]
    for kind, names in zip(kinds, problems, strict=True):
        if names:
            more = f", … ({len(names) - SHOWN} more)" if len(names) > SHOWN else ""
            lines.append(f"  {len(names)} {kind}: {', '.join(names[:SHOWN])}{more}")
    return "\n".join([*lines, f"  {_advice(module, state, problems)}"])


def _advice(
    module: nn.Module,
    state: Mapping[str, Tensor],
    problems: tuple[list[str], list[str], list[str]],
) -> str:
    missing, unexpected, shapes = problems
    classifier = f"{_classifier(module)}."
    if not missing and not unexpected and all(line.startswith(classifier) for line in shapes):
        classes = state[f"{classifier}weight"].shape[0]
        return (
            f"only the classifier differs: it was trained for {classes} classes; if your task is "
            "another one, set `head: new` and add a `train` section"
        )
    fitting = list(_fitting(state))
    if fitting:
        return f"these weights fit: {' or '.join(fitting)}"
    return "check `model` and `args` against the net that the checkpoint was trained with"


def _fitting(state: Mapping[str, Tensor]) -> Iterator[str]:
    """Zoo nets that have exactly these names and shapes, with the arguments they need.

    Built on the meta device: nothing is allocated or initialised.
    """
    wanted = {n: t.shape for n, t in state.items() if n.rpartition(".")[2] != COUNTER}
    last = [wanted[f"{name}.bias"] for name in _CLASSIFIERS if f"{name}.bias" in wanted]
    first = [
        wanted[f"{name}.weight"] for name in _FIRST if len(wanted.get(f"{name}.weight", "")) == 4
    ]
    if not last or not first:
        return
    classes, in_channels = last[0][0], first[0][1]
    for name in zoo.ZOO:
        for number, args in enumerate(_candidates(name)):
            try:
                with torch.device("meta"):
                    net = zoo.build(name, args, classes=classes, in_channels=in_channels)
            except (ModelError, RuntimeError):  # no such net of this many channels or classes
                break
            own = {n: t.shape for n, t in net.state_dict().items() if not n.endswith(COUNTER)}
            if number == 0 and own.keys() != wanted.keys():
                break  # names do not depend on the arguments
            if own == wanted:
                shown = ", ".join(f"{key}: {value}" for key, value in args.items())
                yield name + (f" with args {{{shown}}}" if args else "")
                break


# the classifiers and first convolutions of the zoo's nets
_CLASSIFIERS = ("linear", "fc", "classifier.1")
_FIRST = ("conv1", "features.0.0", "layer1.0")


def _candidates(name: str) -> Iterator[dict[str, Any]]:
    stems: list[dict[str, Any]] = [{}]
    if name.startswith("resnet") and "stem" in zoo.options(name):
        stems.append({"stem": "small"})
    for width in (1.0, 0.5, 0.25, 0.75, 2.0):
        for stem in stems:
            yield stem | ({} if width == 1.0 else {"width": width})


def _shape(tensor: Tensor) -> str:
    return str(tuple(tensor.shape))
