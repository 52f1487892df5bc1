"""Pair sums of an int8 file that leave int16 on an x86 CPU without VNNI, counted on real samples.

There onnxruntime multiplies u8 by s8 with VPMADDUBSW, which adds two neighbouring products in a
saturating int16 and so clips what exceeds it; VNNI and ARM add in int32. Neighbours are the
elements 2j and 2j+1 along K. As read in onnxruntime's sources (1.22 to main; the same in every
kernel: QgemmU8X8KernelAvx2.S with PackedK = 4, ConvSymKernelAvx2.S, QgemmU8S8KernelAvx512Core.S,
their VPMADDWD step adds in int32):

    Gemm, MatMul   K is the inner axis; MatMulInteger, of dynamic int8, too
    Conv           K is (kernel position, channel of the group): the filter is reordered from OIHW
                   to HWIO (qlinearconv.cc, ReorderFilter), the image is channels-last, and padding
                   holds the zero point
    depthwise      one channel in and out a group: multiplied in 32 bits, nothing saturates

Activations are the uint8 values as the QDQ graph computes them without fusion; int8 kernels may
round some of them one step off, so counts are of this size and not to the last one. Weights of
int8 are judged; uint8 weights use kernels that do not saturate.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Sequence
from math import ceil
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

from ..pipeline.errors import ExportError, MeasurementError, RuntimeFailure
from .calibrate import Samples
from .feeds import as_input, entry_of, feed, fitted
from .graph import PRODUCT_OPS, attribute, producers
from .sessions import CANNOT_LOAD, DIED, one_line, open_session, pad_batch
from .stamp import write_model

Array = np.ndarray[Any, Any]

BATCH = 8  # samples whose activations are in memory at once
BLOCK = 1 << 22  # pair sums computed at once: 16 MB of int32
INT16 = (-32768, 32767)
LARGEST_ACTIVATION = 255
# 255·128 = 32,640 fits into int16 and 255·129 = 32,895 does not; products of opposite signs take
# from each other, and a single one is at most 255·128.
SAFE_WEIGHT_SUM = 128
DEPTHWISE = "depthwise kernels multiply in 32 bits"


class _Layer(NamedTuple):
    """A multiply-add node as the matrix product that runs.

    weights: int8, (groups, N of the group, K padded to even), K in the kernel's order.
    column: activations (batch, …) uint8, group, k → the values that meet weights[group, :, k],
        (batch, positions).
    """

    node: NodeProto
    source: str  # the uint8 tensor
    weights: Array
    column: Callable[[Array, int, int], Array]
    exempt: str | None


def saturating_pairs(model: ModelProto, samples: Samples, *, threads: int) -> list[dict[str, Any]]:
    """Every Conv, Gemm and MatMul with int8 weights, in graph order. JSON-able.

    Args:
        model: QDQ or dynamic int8, uint8 activations.
        samples: float32, (N ≥ 1, C, H, W), or int64 tokens, (N ≥ 1, K, S), real; read in steps of
            8, texts of free length one by one, so memory stays flat and padding is not counted.

    Returns:
        For each: node, op; pairs (N · K/2 of the weights), pairs_at_risk (of them, those that some
        input could saturate), largest_pair_sum (the bound of |sum| over all inputs); pair_sums
        (evaluated on the samples: pairs · positions · samples) and saturating (of them, those
        outside int16; exact integers); exempt (why nothing can saturate, or None).

    Raises:
        ExportError: no int8 weights, or activations that are not uint8.
        MeasurementError: no samples.
        RuntimeFailure: onnxruntime failed.
    """
    if not len(samples):
        raise MeasurementError("saturation: no samples; expected one or more of the training set")
    layers = _layers(model)
    counts = [0] * len(layers)
    positions = [0] * len(layers)
    for activations in _activations(model, [layer.source for layer in layers], samples, threads):
        for index, layer in enumerate(layers):
            values = activations[layer.source]
            positions[index] += layer.column(values, 0, 0).size
            counts[index] += 0 if layer.exempt else _count(layer, values)
    return [_describe(layer, counts[index], positions[index]) for index, layer in enumerate(layers)]


def total(layers: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """All layers in one row. `saturating_ppm`: per million pair sums."""
    sums = sum(layer["pair_sums"] for layer in layers)
    saturating = sum(layer["saturating"] for layer in layers)
    return {
        "layers": len(layers),
        "layers_at_risk": sum(layer["pairs_at_risk"] > 0 for layer in layers),
        "layers_saturating": sum(layer["saturating"] > 0 for layer in layers),
        "pairs_at_risk": sum(layer["pairs_at_risk"] for layer in layers),
        "pair_sums": sums,
        "saturating": saturating,
        "saturating_ppm": 1e6 * saturating / sums if sums else 0.0,
    }


def pairs_at_risk(weights: Array) -> Array:
    """Which neighbouring weights some uint8 input can saturate.

    Args:
        weights: int8, (…, K), K even.

    Returns:
        bool, (…, K / 2): both of one sign and |w₁| + |w₂| > 128.
    """
    first, second = weights[..., ::2].astype(np.int32), weights[..., 1::2].astype(np.int32)
    risky: Array = (first * second > 0) & (np.abs(first + second) > SAFE_WEIGHT_SUM)
    return risky


def _count(layer: _Layer, values: Array) -> int:
    """Pair sums outside int16, over the pairs that can be."""
    found = 0
    groups, _, pairs = (risky := pairs_at_risk(layer.weights)).shape
    for group in range(groups):
        for pair in np.flatnonzero(risky[group].any(axis=0)):
            rows = np.flatnonzero(risky[group, :, pair])
            weights = layer.weights[group, rows, 2 * pair : 2 * pair + 2].astype(np.int32)
            columns = [
                layer.column(values, group, k).ravel().astype(np.int32)
                for k in (2 * int(pair), 2 * int(pair) + 1)
            ]
            largest = np.abs(weights) @ np.array([column.max() for column in columns])
            weights = weights[largest > INT16[1]]  # what this batch cannot reach is not computed
            if len(weights):
                found += _outside(columns[0], columns[1], weights)
    assert pairs == layer.weights.shape[2] // 2
    return found


def _outside(first: Array, second: Array, weights: Array) -> int:
    """Args: first, second: int32, (P,). weights: int32, (R, 2). Memory: BLOCK sums."""
    step = max(1, BLOCK // len(weights))
    found = 0
    for start in range(0, len(first), step):
        part = slice(start, start + step)
        sums = np.outer(first[part], weights[:, 0]) + np.outer(second[part], weights[:, 1])
        found += int(np.count_nonzero((sums < INT16[0]) | (sums > INT16[1])))
    return found


def _describe(layer: _Layer, saturating: int, positions: int) -> dict[str, Any]:
    weights = layer.weights.astype(np.int64)
    positive = np.maximum(weights, 0)[..., ::2] + np.maximum(weights, 0)[..., 1::2]
    negative = np.minimum(weights, 0)[..., ::2] + np.minimum(weights, 0)[..., 1::2]
    largest = LARGEST_ACTIVATION * max(int(positive.max()), -int(negative.min()))
    pairs = weights.size // 2
    return {
        "node": layer.node.name or layer.node.output[0],
        "op": layer.node.op_type,
        "pairs": pairs,
        "pairs_at_risk": 0 if layer.exempt else int(pairs_at_risk(layer.weights).sum()),
        "largest_pair_sum": largest,
        "pair_sums": pairs * positions,
        "saturating": saturating,
        "exempt": layer.exempt,
    }


def _layers(model: ModelProto) -> list[_Layer]:
    writers = producers(model)
    stored = {tensor.name: tensor for tensor in model.graph.initializer}
    layers = []
    for node in model.graph.node:
        if node.op_type not in PRODUCT_OPS:
            continue
        activation, weight = (writers.get(name) for name in node.input[:2])
        if node.op_type == "MatMulInteger" and node.input[1] in stored:
            values = numpy_helper.to_array(stored[node.input[1]])
            if values.dtype == np.int8:
                layers.append(_product(node, node, values, stored))
            continue
        if weight is None or weight.op_type != "DequantizeLinear":
            continue
        tensor = stored.get(weight.input[0])
        if tensor is None or tensor.data_type != TensorProto.INT8:
            continue
        if activation is None or activation.op_type != "DequantizeLinear":
            continue  # the weight alone is int8: onnxruntime multiplies floats
        _refuse_signed(node, activation, stored)
        values = numpy_helper.to_array(tensor)
        build = _convolution if node.op_type == "Conv" else _product
        layers.append(build(node, activation, values, stored))
    if not layers:
        raise ExportError(
            "saturation: no Conv, Gemm or MatMul multiplies uint8 by int8 weights; expected a QDQ "
            "file, as `quantize` writes it"
        )
    return layers


def _refuse_signed(node: NodeProto, activation: NodeProto, stored: dict[str, TensorProto]) -> None:
    zero = stored.get(activation.input[2]) if len(activation.input) > 2 else None
    if zero is not None and zero.data_type != TensorProto.UINT8:
        raise ExportError(
            f"saturation: {node.name!r} reads {helper.tensor_dtype_to_np_dtype(zero.data_type)} "
            "activations; expected uint8, the encoding whose results are the same on every CPU"
        )


def _product(
    node: NodeProto, activation: NodeProto, weight: Array, _: dict[str, TensorProto]
) -> _Layer:
    """Gemm and MatMul. weight (K, N), or (N, K) with transB; activations (…, K)."""
    if weight.ndim != 2:
        raise ExportError(
            f"saturation: the weight of {node.name!r} has {weight.ndim} axes; expected 2"
        )
    rows = weight if attribute(node, "transB", 0) else weight.T
    axis = 0 if attribute(node, "transA", 0) else -1

    def column(values: Array, group: int, k: int) -> Array:
        assert group == 0
        if k >= rows.shape[1]:  # the zero that makes K even
            return np.zeros((1,), np.uint8)
        taken: Array = np.take(values, k, axis=axis)
        return taken

    return _Layer(node, activation.input[0], _even(rows[None]), column, None)


def _convolution(
    node: NodeProto, activation: NodeProto, weight: Array, stored: dict[str, TensorProto]
) -> _Layer:
    """weight (C_out, C_in / groups, kH, kW); activations (batch, C_in, H, W); any spatial rank."""
    groups = attribute(node, "group", 1)
    channels, kernel = weight.shape[1], weight.shape[2:]
    strides = attribute(node, "strides", [1] * len(kernel))
    dilations = attribute(node, "dilations", [1] * len(kernel))
    zero = stored.get(activation.input[2]) if len(activation.input) > 2 else None
    padding = int(numpy_helper.to_array(zero).ravel()[0]) if zero is not None else 0
    rows = np.moveaxis(weight, 1, -1).reshape(groups, len(weight) // groups, -1)

    def column(values: Array, group: int, k: int) -> Array:
        if k >= rows.shape[2]:
            return np.zeros((1,), np.uint8)
        position, channel = divmod(k, channels)
        offsets = np.unravel_index(position, kernel)
        pads = _pads(node, values.shape[2:], kernel, strides, dilations)
        plane = np.pad(values[:, group * channels + channel], ((0, 0), *pads),
                       constant_values=padding)  # fmt: skip
        window = []
        for axis, size in enumerate(plane.shape[1:]):
            reach = dilations[axis] * (kernel[axis] - 1)
            start = int(offsets[axis]) * dilations[axis]
            window.append(slice(start, start + size - reach, strides[axis]))
        taken: Array = plane[(slice(None), *window)]
        return taken

    depthwise = groups > 1 and channels == 1 and len(weight) == groups
    return _Layer(node, activation.input[0], _even(rows), column, DEPTHWISE if depthwise else None)


def _pads(
    node: NodeProto, size: Sequence[int], kernel: Sequence[int], strides: Sequence[int],
    dilations: Sequence[int],
) -> list[tuple[int, int]]:  # fmt: skip
    """(before, after) of each spatial axis, `auto_pad` resolved as ONNX defines it."""
    rule = attribute(node, "auto_pad", b"NOTSET").decode()
    rank = len(kernel)
    if rule in ("SAME_UPPER", "SAME_LOWER"):
        missing = [
            max(0, (ceil(n / s) - 1) * s + d * (k - 1) + 1 - n)
            for n, k, s, d in zip(size, kernel, strides, dilations, strict=True)
        ]
        less = [(total // 2, total - total // 2) for total in missing]
        return less if rule == "SAME_UPPER" else [(after, before) for before, after in less]
    pads = [0] * (2 * rank) if rule == "VALID" else attribute(node, "pads", [0] * (2 * rank))
    return [(pads[axis], pads[axis + rank]) for axis in range(rank)]


def _even(weights: Array) -> Array:
    """(groups, N, K) with a zero appended where K is odd, as the packing does."""
    return np.pad(weights, ((0, 0), (0, 0), (0, weights.shape[2] % 2)))


def _activations(
    model: ModelProto, names: Sequence[str], samples: Samples, threads: int
) -> Iterator[dict[str, Array]]:
    """The named uint8 tensors, a step of samples at a time."""
    watched = ModelProto()
    watched.CopyFrom(model)
    known = {value.name for value in model.graph.output}
    wanted = list(dict.fromkeys(names))
    watched.graph.output.extend(
        helper.make_tensor_value_info(name, TensorProto.UINT8, None)
        for name in wanted
        if name not in known
    )
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "watched.onnx")
        write_model(watched, path)
        session = open_session(path, threads=threads, optimize=False)
    entry = entry_of(session)
    size = entry.batch or (1 if entry.sequence is None and len(entry.names) > 1 else BATCH)
    for start in range(0, len(samples), size):
        batch = as_input(samples[start : start + size])
        count = len(batch)
        full = fitted(pad_batch(batch, size) if entry.batch else batch, entry)
        try:
            values = session.run(wanted, feed(full, entry.names))
        except (*CANNOT_LOAD, *DIED) as error:
            raise RuntimeFailure(f"saturation: onnxruntime failed: {one_line(error)}") from error
        # of texts (N · S, K); the samples that fill a fixed batch are left out
        yield {
            name: value[: len(value) * count // len(full)]
            for name, value in zip(wanted, values, strict=True)
        }
