"""What a model is fed with while it is timed: arrays by input name, N samples each."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, helper

from ...exporters.feeds import feed
from ...exporters.graph import external_locations, read_model
from ..errors import DataError, ExportError, UsageError

Array = npt.NDArray[Any]

NOISE_SAMPLES = 16  # enough that caches and branch prediction do not learn one by heart
LEAST = 8  # as measure/latency.py
TOKENS = 128  # of a text of noise, where neither graph nor metadata say how long one may be
TOKEN_IDS = 100  # below them every vocabulary has tokens
MASKS = ("mask",)


@dataclass(frozen=True)
class Fed:
    """expected: the model's own answers to these inputs, where somebody kept them."""

    arrays: dict[str, Array]
    source: Literal["golden", "data", "file", "noise"]
    path: Path | None = None
    expected: npt.NDArray[np.float32] | None = None

    @property
    def n(self) -> int:
        return len(next(iter(self.arrays.values())))


@dataclass(frozen=True)
class Entry:
    """One input of a graph; None: a free axis. The first axis is the batch."""

    name: str
    dtype: np.dtype[Any]
    shape: tuple[int | None, ...]


@dataclass(frozen=True)
class Signature:
    """What profiling needs to know of a file."""

    entries: tuple[Entry, ...]
    domains: tuple[str, ...]  # of its operators
    ir_version: int
    opset: int
    files: tuple[str, ...]  # weights that lie beside it
    max_length: int | None = None  # tokens that its texts have at most, where its metadata say so


def signature_of(path: Path) -> Signature:
    """Raises: ExportError: no ONNX file, or inputs that are no tensors with a batch axis."""
    model = read_model(path)
    bare = onnx.load(path, load_external_data=False)
    stored = {tensor.name for tensor in model.graph.initializer}
    values = [value for value in model.graph.input if value.name not in stored]
    entries = []
    for value in values:
        tensor = value.type.tensor_type
        kind = TensorProto.DataType.Name(tensor.elem_type) if tensor.elem_type else "no tensor"
        if not tensor.elem_type or not tensor.HasField("shape") or not tensor.shape.dim:
            raise ExportError(
                f"{path}: input {value.name!r}: expected a tensor whose first axis is the batch, "
                f"got {kind}; export it with a batch axis"
            )
        shape = tuple(dim.dim_value or None for dim in tensor.shape.dim)
        dtype = np.dtype(helper.tensor_dtype_to_np_dtype(tensor.elem_type))
        entries.append(Entry(value.name, dtype, shape))
    if not entries:
        raise ExportError(f"{path}: has no input: there is nothing to time")
    opset = next((o.version for o in model.opset_import if o.domain in ("", "ai.onnx")), 0)
    domains = tuple(sorted({node.domain for node in model.graph.node}))
    return Signature(
        tuple(entries),
        domains,
        model.ir_version,
        opset,
        tuple(sorted(set(external_locations(bare)))),
        _max_length(model),
    )


def _max_length(model: onnx.ModelProto) -> int | None:
    """What a file of our own says of its texts."""
    said = {entry.key: entry.value for entry in model.metadata_props}
    try:
        found = json.loads(said.get("edgestill.preprocess", "{}")).get("max_length")
    except (ValueError, AttributeError):
        return None  # somebody else's, in a form of their own
    return found if isinstance(found, int) and found > 0 else None


def from_file(path: Path, signature: Signature) -> Fed:
    """Of an .npy (the one input, or packed tokens (N, K, S)) or an .npz with an array an input.

    Raises:
        DataError: it cannot be read. UsageError: it does not fit the model.
    """
    try:
        loaded = np.load(path, allow_pickle=False)
        if isinstance(loaded, np.ndarray):
            arrays = from_samples(loaded, signature)
        else:
            arrays = {name: loaded[name] for name in loaded.files}
    except FileNotFoundError:
        raise DataError(f"{path}: not found; check --inputs") from None
    except (OSError, ValueError, EOFError) as error:
        raise DataError(
            f"{path}: expected an .npy or .npz of plain arrays: {error}; save it with numpy.save"
        ) from error
    return checked(Fed(arrays, "file", path), signature)


def from_samples(samples: Array, signature: Signature) -> dict[str, Array]:
    """One array as the model's inputs. Raises: UsageError."""
    names = [entry.name for entry in signature.entries]
    try:
        return dict(feed(samples, names)) if len(names) > 1 else {names[0]: samples}
    except ExportError as error:
        raise UsageError(f"--inputs: {error}") from error


def noise(signature: Signature, *, path: Path) -> Fed:
    """Standard normal numbers, or tokens that every vocabulary has, of the right shape.

    Raises:
        UsageError: the graph leaves an axis free that nobody can guess.
    """
    rng = np.random.default_rng(0)
    arrays: dict[str, Array] = {}
    texts = all(entry.dtype.kind in "iu" and len(entry.shape) == 2 for entry in signature.entries)
    tokens = min(TOKENS, signature.max_length or TOKENS)
    for entry in signature.entries:
        shape = [tokens if size is None and texts else size for size in entry.shape[1:]]
        if None in shape:
            free = entry.shape.index(None, 1)
            raise UsageError(
                f"{path}: axis {free} of input {entry.name!r} {_dims(entry.shape)} is free, and "
                "its size is not guessed: give --inputs FILE.npy of real samples, or --data"
            )
        size = (NOISE_SAMPLES, *(int(one or 1) for one in shape))
        if any(word in entry.name for word in MASKS):
            arrays[entry.name] = np.ones(size, entry.dtype)
        elif entry.dtype.kind in "iu":
            top = 2 if "type" in entry.name else TOKEN_IDS
            arrays[entry.name] = rng.integers(0, top, size).astype(entry.dtype)
        elif entry.dtype.kind == "b":
            arrays[entry.name] = rng.integers(0, 2, size).astype(bool)
        else:
            arrays[entry.name] = rng.normal(size=size).astype(entry.dtype)
    return Fed(arrays, "noise")


def checked(fed: Fed, signature: Signature) -> Fed:
    """Raises: UsageError: the arrays do not fit the model. DataError: NaN, or too few."""
    where = fed.path or "the inputs"
    wanted = {entry.name: entry for entry in signature.entries}
    if set(wanted) != set(fed.arrays):
        raise UsageError(
            f"{where}: expected an array for each of {', '.join(wanted)}, got "
            f"{', '.join(fed.arrays) or 'none'}"
        )
    counts = {len(one) if one.ndim else 0 for one in fed.arrays.values()}
    if len(counts) != 1 or min(counts) < LEAST:
        raise DataError(
            f"{where}: expected the same number of samples for every input, at least {LEAST} to "
            f"rotate, got {', '.join(map(str, sorted(counts)))}"
        )
    arrays = {name: _fitted(fed.arrays[name], entry, where) for name, entry in wanted.items()}
    return Fed(arrays, fed.source, fed.path, fed.expected)


def _fitted(array: Array, entry: Entry, where: object) -> Array:
    fits = array.ndim == len(entry.shape) and all(
        size is None or size == got
        for size, got in zip(entry.shape[1:], array.shape[1:], strict=True)
    )
    same_kind = array.dtype == entry.dtype or (
        array.dtype.kind in "iu" and entry.dtype.kind in "iu"
    )
    if not fits or not (same_kind or (array.dtype.kind == entry.dtype.kind == "f")):
        raise UsageError(
            f"{where}: {entry.name}: expected {entry.dtype} {_dims(entry.shape)}, got "
            f"{array.dtype} {array.shape}"
        )
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        raise DataError(f"{where}: {entry.name}: holds NaN or infinity")
    return array.astype(entry.dtype)


def _dims(shape: tuple[int | None, ...]) -> str:
    return f"({', '.join('N' if size is None else str(size) for size in shape)})"
