"""One array in, one array an ONNX input out: what a session is fed with, for images and for texts.

Images are one array, float32 (N, C, H, W), and one input. Texts are packed tokens, int64 (N, K, S),
and K inputs (N, S), in the order of the rows: input_ids, attention_mask and, only where texts are
paired, token_type_ids. A batch of texts is cut to the longest of them before it is fed, so nothing
depends on how far a set was padded; a graph of a fixed length gets exactly that length.

Does not tokenize, and does not read files.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import onnxruntime as ort
from onnx import ModelProto, TensorProto

from ..pipeline.errors import ExportError

Array = np.ndarray[Any, Any]

MASK = 1  # row of the attention mask
INTEGERS = frozenset({TensorProto.INT64, TensorProto.INT32})


class Entry(NamedTuple):
    """What a session takes: names of its inputs, and the sizes that its graph fixes, else None.

    sequence: tokens a text; None for images too.
    """

    names: tuple[str, ...]
    batch: int | None
    sequence: int | None


def feed(inputs: Array, names: Sequence[str]) -> dict[str, Array]:
    """One name: the array itself. K names: the rows of packed tokens, (N, S) each, contiguous.

    Args:
        inputs: float32 (N, C, H, W), or int64 (N, K, S).

    Raises:
        ExportError: the inputs are not as many as the rows.
    """
    if len(names) == 1 and not is_tokens(inputs):
        return {names[0]: np.ascontiguousarray(inputs)}
    if not is_tokens(inputs) or inputs.shape[1] != len(names):
        came = f"tokens (N, {inputs.shape[1]}, S)" if is_tokens(inputs) else f"{inputs.dtype}"
        raise ExportError(
            f"the model has the inputs {', '.join(names) or '(none)'}; expected exactly one, the "
            "images, or one for each row of tokens (input_ids, attention_mask, for pairs "
            f"token_type_ids too), and got {came} {inputs.shape}. Export it with those inputs, or "
            "check data.pair"
        )
    return {name: np.ascontiguousarray(inputs[:, row]) for row, name in enumerate(names)}


def entry_of(session: ort.InferenceSession) -> Entry:
    """Names and fixed sizes of a session's inputs."""
    inputs = session.get_inputs()
    shape = inputs[0].shape if inputs else []
    is_text = bool(inputs) and inputs[0].type in ("tensor(int64)", "tensor(int32)")
    sizes = [size if isinstance(size, int) and size > 0 else None for size in shape]
    return Entry(
        tuple(str(value.name) for value in inputs),
        sizes[0] if sizes else None,
        sizes[1] if is_text and len(sizes) == 2 else None,
    )


def fitted(batch: Array, entry: Entry) -> Array:
    """The batch as the graph takes it: texts cut to the longest, or exactly as long as it fixes.

    Raises:
        ExportError: a text is longer than the graph.
    """
    if not is_tokens(batch):
        return batch
    size = longest(batch)
    if entry.sequence is None:
        return np.ascontiguousarray(batch[..., :size], dtype=np.int64)
    if size > entry.sequence:
        raise ExportError(
            f"the graph takes texts of {entry.sequence} tokens, got one of {size}; set "
            f"data.tokenize.max_length to {entry.sequence}, or export with a free length "
            "(export.sequence: dynamic)"
        )
    full = np.zeros((*batch.shape[:2], entry.sequence), np.int64)  # mask 0: any id will do
    kept = min(batch.shape[2], entry.sequence)
    full[..., :kept] = batch[..., :kept]
    return full


def longest(tokens: Array) -> int:
    """Tokens of the longest text up to its last unmasked one, at least 1. tokens: (N, K, S)."""
    used = np.flatnonzero(tokens[:, MASK].any(axis=0))
    return int(used[-1]) + 1 if len(used) else 1


def is_tokens(inputs: Array) -> bool:
    """Packed tokens, (N, K, S) of integers."""
    return inputs.dtype.kind in "iu" and inputs.ndim == 3


def as_input(batch: Array) -> Array:
    """Contiguous, in the type that networks take: int64 of integers, else float32."""
    return np.ascontiguousarray(batch, dtype=np.int64 if is_tokens(batch) else np.float32)


def is_text(model: ModelProto) -> bool:
    """Whether the graph takes tokens: every input is integer."""
    stored = {tensor.name for tensor in model.graph.initializer}
    kinds = [v.type.tensor_type.elem_type for v in model.graph.input if v.name not in stored]
    return bool(kinds) and all(kind in INTEGERS for kind in kinds)
