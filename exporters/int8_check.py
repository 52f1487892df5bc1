"""Holds a written int8 graph against what it was made from and what was asked of it.

`check_int8`            every weight int8, every bias int32 at the scale of its products, the bytes
`check_ranges`          every activation range landed, or why it could not

onnxruntime.quantization ignores a range without a word where it fuses a Relu or passes integers on,
deletes a Relu whatever the zero point after it, and raises weight scales where an int32 bias would
overflow. Nothing of that may pass unnoticed.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import numpy as np
from onnx import ModelProto, NodeProto, TensorProto
from onnxruntime.quantization.quant_utils import add_quant_suffix

from ..pipeline.errors import ExportError, IntegrityError
from .audit import initializer_bytes
from .calibrate import LEVELS, Range, activations, scale_and_zero_point
from .embedding import embedding_bytes
from .graph import WEIGHTED_OPS, arrays, consumers, producers

Array = np.ndarray[Any, Any]

# Int8 file against its estimate: names are not counted, so only rounding is left over.
BYTES_SLACK = 1.02
BIAS_SCALE_TOLERANCE = 1e-5  # of two float32 roundings
ABSORBED_OPS = frozenset({"Relu", "Clip"})
# Quantized only if their input is, and then with its scale: they move integers.
PASSING_OPS = frozenset(
    {"Reshape", "Flatten", "Transpose", "Squeeze", "Unsqueeze", "Slice", "Split", "MaxPool",
     "AveragePool"}
)  # fmt: skip


def check_int8(
    floating: ModelProto,
    quantized: ModelProto,
    *,
    keep_float: Collection[str] = (),
    embeddings: Collection[str] = (),
) -> dict[str, int]:
    """Holds the int8 graph against the float one; returns what was counted.

    Every constant weight of a Conv, Gemm or MatMul with ≥ 2 axes is stored as int8 and their
    biases as int32; the bytes are those of the float graph less three quarters of these weights,
    plus scales and zero points.

    Args:
        keep_float: names of the nodes that stay float, and of no others.
        embeddings: names of the float graph's tables that became int8 rows.

    Raises:
        IntegrityError: a weight was left float, nothing was quantized, a bias is clipped or has
            another scale than its products, or the bytes do not fit.
    """
    stored = {tensor.name: tensor for tensor in quantized.graph.initializer}
    writers = producers(quantized)
    weights, biases, channels, left = 0, 0, 0, []
    for node in quantized.graph.node:
        if node.op_type not in WEIGHTED_OPS or node.name in keep_float:
            continue
        weight = _behind_dq(node.input[1], writers, stored)
        if weight is not None and len(weight.dims) >= 2:
            if weight.data_type != TensorProto.INT8:
                left.append(node.name)
                continue
            weights += 1
            channels += _scale_count(node.input[1], writers, stored)
        bias = _behind_dq(node.input[2], writers, stored) if len(node.input) > 2 else None
        biases += bias is not None and bias.data_type == TensorProto.INT32
    wanted = [n for n in floating.graph.node if n.op_type in WEIGHTED_OPS]
    if left or (not weights and any(n.name not in keep_float for n in wanted)):
        what = f"{', '.join(left[:5])} kept float weights" if left else "no weight became int8"
        raise IntegrityError(
            f"int8: {what}; expected int8 for every Conv, Gemm and MatMul. Leave out `quantize:` "
            "to ship the float model, or report this graph"
        )
    _check_biases(quantized)
    ops = [node.op_type for node in quantized.graph.node]
    counts = {
        "quantize_linear": ops.count("QuantizeLinear"),
        "dequantize_linear": ops.count("DequantizeLinear"),
        "int8_weights": weights,
        "int32_biases": biases,
        "float_initializer_bytes": sum(initializer_bytes(floating).values()),
        "int8_initializer_bytes": sum(initializer_bytes(quantized).values()),
    }
    if embeddings:
        counts["int8_embeddings"] = len(embeddings)
    if not counts["quantize_linear"]:
        raise IntegrityError("int8: no value is quantized; expected at least one. Ship the float")
    before, after = embedding_bytes(floating, list(embeddings))
    _check_bytes(floating, counts, channels, keep_float, saved=before - after)
    return counts


def refuse_ranges(floating: ModelProto, ranges: Mapping[str, Range]) -> None:
    """Raises ExportError at a name that is no activation, or a range that is no range."""
    names = activations(floating)
    for name, (low, high) in ranges.items():
        if name not in names or not (np.isfinite([low, high]).all() and low <= high):
            raise ExportError(
                f"ranges: {name!r} has ({low}, {high}); expected an activation of the float graph "
                "and finite low ≤ high"
            )


def check_ranges(
    floating: ModelProto,
    quantized: ModelProto,
    ranges: Mapping[str, Range],
    *,
    kept: Collection[str],
    op_types: Collection[str],
    float_outputs: bool = False,
) -> dict[str, str]:
    """Holds scale and zero point of every written activation against its range, bit by bit.

    Args:
        floating: with inferred shapes.
        kept: names of the nodes that stay float.
        op_types: that become int8 elsewhere.
        float_outputs: what they write is not quantized.

    Returns:
        The ranges that are not in the file, by tensor name, each with the reason.

    Raises:
        ExportError: a quantized tensor without a range, or a range over values that a deleted Relu
            or Clip would have cut.
        IntegrityError: a range that should have landed and did not.
    """
    names = activations(floating)
    written, providers = _written(quantized, names)
    reasons = {}
    for name in names:
        if name not in written:
            if name in ranges:
                reasons[name] = _why_absent(
                    name, floating, quantized, kept, op_types, float_outputs=float_outputs
                )
        elif providers[name] != name:
            if name in ranges and scale_and_zero_point(*ranges[name]) != written[name]:
                reasons[name] = f"has the scale of {providers[name]}: integers are passed on"
        elif name not in ranges:
            raise ExportError(f"ranges: none for {name!r}, which is quantized; give it one")
        elif scale_and_zero_point(*ranges[name]) != written[name]:
            raise IntegrityError(
                f"int8: {name!r} has scale and zero point {written[name]}; expected "
                f"{scale_and_zero_point(*ranges[name])} of its range {ranges[name]}"
            )
    _check_absorbed(floating, quantized, written, kept)
    return reasons


def clip_bounds(node: NodeProto, constants: Mapping[str, Array]) -> Range | None:
    """(low, high) of a Relu or Clip; None if a bound is not constant."""
    if node.op_type == "Relu":
        return 0.0, float("inf")
    bounds = [-float("inf"), float("inf")]
    for place, name in enumerate(node.input[1:3]):
        if name and name not in constants:
            return None
        if name:
            bounds[place] = float(constants[name])
    return bounds[0], bounds[1]


def _written(
    quantized: ModelProto, names: Collection[str]
) -> tuple[dict[str, tuple[np.float32, np.uint8]], dict[str, str]]:
    """By tensor: scale and zero point of its QuantizeLinear; and whose scale it is."""
    constants = arrays(quantized)
    tensors = {add_quant_suffix(name): name for name in names}
    written, providers = {}, {}
    for node in quantized.graph.node:
        if node.op_type == "QuantizeLinear":
            name = tensors[node.name]
            scale, zero_point = constants[node.input[1]], constants[node.input[2]]
            written[name] = (np.float32(scale), np.uint8(zero_point))
            providers[name] = node.input[1].removesuffix("_scale")
    return written, providers


def _why_absent(
    name: str, floating: ModelProto, quantized: ModelProto, kept: Collection[str],
    op_types: Collection[str], *, float_outputs: bool,
) -> str:  # fmt: skip
    readers = consumers(floating).get(name, [])
    writer = producers(floating).get(name)
    left = {node.name for node in quantized.graph.node}
    if len(readers) == 1 and readers[0].op_type in ABSORBED_OPS and readers[0].name not in left:
        return f"quantized after {readers[0].name}, which is part of its kernel"
    if name in {value.name for value in floating.graph.output}:
        return "a graph output: it leaves in float"
    quantizing = [
        node
        for node in (*readers, *([writer] if writer is not None and not float_outputs else []))
        if node.op_type in op_types
        and node.op_type not in ABSORBED_OPS | PASSING_OPS
        and node.name not in kept
    ]
    if quantizing:
        raise IntegrityError(
            f"int8: the range of {name!r} did not reach the file, though "
            f"{quantizing[0].op_type} {quantizing[0].name} is int8; report this graph"
        )
    return "only float nodes write and read it"


def _check_absorbed(
    floating: ModelProto, quantized: ModelProto,
    written: Mapping[str, tuple[np.float32, np.uint8]], kept: Collection[str],
) -> None:  # fmt: skip
    """A deleted Relu or Clip lives on in the saturation of the QuantizeLinear after it."""
    constants, readers = arrays(floating), consumers(floating)
    left = {node.name for node in quantized.graph.node}
    for node in floating.graph.node:
        if node.op_type not in ABSORBED_OPS or node.name in left or node.name in kept:
            continue
        name = node.output[0]
        while name not in written and len(readers.get(name, [])) == 1:  # a chain of them
            name = readers[name][0].output[0]
        bounds = clip_bounds(node, constants)
        if name not in written or bounds is None:
            raise IntegrityError(f"int8: {node.name} was deleted and nothing cuts in its place")
        scale, zero_point = float(written[name][0]), int(written[name][1])
        low, high = -scale * zero_point, scale * (LEVELS - 1 - zero_point)
        if low < bounds[0] - scale / 2 or high > bounds[1] + scale / 2:
            raise ExportError(
                f"ranges: {name!r} is quantized over {low:.4g}…{high:.4g}, which takes the place "
                f"of {node.name} with {bounds[0]:g}…{bounds[1]:g}; give a range inside of that"
            )


def _check_biases(quantized: ModelProto) -> None:
    """Integer kernels add the bias to the sums of products: its scale must be theirs."""
    constants, writers = arrays(quantized), producers(quantized)
    for node in quantized.graph.node:
        if node.op_type not in WEIGHTED_OPS or len(node.input) < 3:
            continue
        parts = [writers.get(name) for name in node.input[:3]]
        if any(part is None or part.op_type != "DequantizeLinear" for part in parts):
            continue
        scales = [constants[part.input[1]].astype(np.float64) for part in parts if part is not None]
        if not np.allclose(scales[2], scales[0] * scales[1], rtol=BIAS_SCALE_TOLERANCE, atol=0):
            raise IntegrityError(
                f"int8: the bias of {node.name} has not the scale of input times weight; report "
                "this graph"
            )
        assert parts[2] is not None
        bias = constants[parts[2].input[0]].astype(np.int64)
        if (np.abs(bias) >= np.iinfo(np.int32).max).any():
            raise IntegrityError(
                f"int8: the bias of {node.name} is clipped to 32 bits; its weights are too small "
                "beside it. Keep this node float (quantize.keep_float)"
            )


def _behind_dq(
    name: str, writers: dict[str, NodeProto], stored: dict[str, TensorProto]
) -> TensorProto | None:
    """The stored tensor that feeds `name`, directly or through DequantizeLinear."""
    writer = writers.get(name)
    if writer is not None and writer.op_type == "DequantizeLinear":
        name = writer.input[0]
    return stored.get(name)


def _scale_count(name: str, writers: dict[str, NodeProto], stored: dict[str, TensorProto]) -> int:
    return int(np.prod(stored[writers[name].input[1]].dims, dtype=np.int64))


def _check_bytes(
    floating: ModelProto, counts: dict[str, int], channels: int, keep_float: Collection[str],
    *, saved: int,
) -> None:  # fmt: skip
    """Per output channel: scale 4, zero point 1, bias scale 4, bias zero point 4, and 4 for a bias
    that the float net had not; per activation: scale 4, zero point 1 (counted at each Q and DQ).
    saved: by word embeddings.
    """
    constants = arrays(floating)
    weight_names = {
        node.input[1]
        for node in floating.graph.node
        if node.op_type in WEIGHTED_OPS
        and node.name not in keep_float
        and node.input[1] in constants
        and constants[node.input[1]].ndim >= 2
    }
    weight_bytes = sum(constants[name].nbytes for name in weight_names)
    nodes = counts["quantize_linear"] + counts["dequantize_linear"]
    left = counts["float_initializer_bytes"] - 0.75 * weight_bytes - saved
    expected = left + 17 * channels + 5 * nodes
    if counts["int8_initializer_bytes"] > BYTES_SLACK * expected:
        raise IntegrityError(
            f"int8: {counts['int8_initializer_bytes']:,} bytes of initializers, expected at most "
            f"{expected:,.0f} (float: {counts['float_initializer_bytes']:,}); a weight is stored "
            "twice or as float. Leave out `quantize:` to ship the float model, or report this graph"
        )
