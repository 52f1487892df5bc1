"""A float graph → static int8 in QDQ form, written by onnxruntime.quantization.

Activations uint8, weights int8 symmetric per channel, biases int32. The targets decide whether
weights use 8 bits or 7 (`encoding_for`). Operators without an int8 kernel stay float, and so do the
Mul and Add that a BatchNormalization became: one scale for all channels would lose them. What comes
out is counted and held against what int8 must weigh; a graph that is half float is an error.

Does not choose calibration samples and does not measure accuracy.
"""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import onnx
from onnx import ModelProto, NodeProto, TensorProto
from onnxruntime.quantization import QuantType
from onnxruntime.quantization.calibrate import (
    MinMaxCalibrater,
    PercentileCalibrater,
    TensorsData,
)
from onnxruntime.quantization.qdq_quantizer import QDQQuantizer

from ..pipeline.errors import ExportError, IntegrityError
from .audit import initializer_bytes
from .graph import (
    WEIGHTED_OPS,
    arrays,
    batch_size,
    consumers,
    drop_unused_initializers,
    is_quantized,
    producers,
    sort_nodes,
)
from .quiet import quiet
from .rewrites import name_nodes
from .sessions import open_session, pad_batch
from .stamp import strip, write_model

Array = np.ndarray[Any, Any]
Target = Literal["arm", "x86", "x86-vnni"]
Calibrator = Literal["minmax", "percentile"]

# Samples a calibration step. Every activation of a step is in memory at once for `percentile`.
CALIBRATION_BATCH = 16
HISTOGRAM_BINS = 2048
PERCENTILE = 99.999  # onnxruntime's default
# Fused by onnxruntime's CPU provider between Q and DQ (qdq_selector_action_transformer.cc); the
# shape-only ones pass int8 through. Mul, Sigmoid, Softmax and normalisations stay float.
QUANTIZED_OP_TYPES = (
    "Conv", "Gemm", "MatMul", "Relu", "Clip", "Add", "Concat", "GlobalAveragePool", "AveragePool",
    "MaxPool", "Reshape", "Flatten", "Transpose", "Squeeze", "Unsqueeze", "Slice", "Split",
)  # fmt: skip
# Int8 file against its estimate: names are not counted, so only rounding is left over.
BYTES_SLACK = 1.02


class Samples(Protocol):
    """Calibration samples, (N, C, H, W) float32: an array, or what makes one slice at a time."""

    def __len__(self) -> int: ...

    def __getitem__(self, part: slice, /) -> Array: ...


@dataclass(frozen=True)
class Encoding:
    """How numbers become integers. `reduce_range`: weights use 7 of 8 bits (-64…64)."""

    activation_type: Literal["uint8"]
    weight_type: Literal["int8"]
    reduce_range: bool
    per_channel: bool
    reason: str


@dataclass(frozen=True)
class Quantized:
    """The int8 graph and what was counted in it."""

    model: ModelProto
    counts: dict[str, int]


def encoding_for(targets: tuple[Target, ...]) -> Encoding:
    """The encoding whose integer results are the same on every target.

    U8S8 has fast kernels on all of them. x86 without VNNI multiplies with VPMADDUBSW, whose int16
    sums saturate (255·127 + 255·127 > 32,767); weights of at most 64 cannot: 255·64·2 = 32,640.
    """
    if not targets:
        raise ExportError("quantize.targets: empty; name at least one of arm, x86, x86-vnni")
    if "x86" in targets:
        reason = (
            "7-bit weights: x86 without VNNI saturates on 8-bit ones, and every target must "
            "compute the same"
        )
        return Encoding("uint8", "int8", reduce_range=True, per_channel=True, reason=reason)
    reason = f"8-bit weights: {' and '.join(sorted(set(targets)))} multiply u8 by s8 exactly"
    return Encoding("uint8", "int8", reduce_range=False, per_channel=True, reason=reason)


def quantize(
    model: ModelProto,
    samples: Samples,
    *,
    encoding: Encoding,
    calibrator: Calibrator,
    threads: int,
) -> Quantized:
    """Calibrates on the samples and writes Q and DQ; the same arguments give the same bytes.

    Args:
        model: float, its BatchNormalization folded (see simplify.py).
        samples: float32, (N, C, H, W), real, from the training set; sliced in steps of 16, so that
            memory does not grow with N.

    Raises:
        ExportError: quantized already, BatchNormalization left, nothing to quantize, no samples,
            or activations that are not finite.
        IntegrityError: the result is not what int8 must look like.
    """
    _refuse_unfit(model, samples)
    floating = onnx.shape_inference.infer_shapes(model)
    name_nodes(floating)
    with quiet(), tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "float.onnx")
        write_model(floating, path)
        ranges = calibrate(path, samples, calibrator=calibrator, threads=threads)
        _check_ranges(ranges)
        quantizer = QDQQuantizer(
            onnx.load(path),
            encoding.per_channel,
            encoding.reduce_range,
            QuantType.QInt8,
            QuantType.QUInt8,
            ranges,
            [],
            _kept_float(floating),
            list(QUANTIZED_OP_TYPES),
            {"WeightSymmetric": True, "ActivationSymmetric": False},
        )
        quantizer.quantize_model()
        result: ModelProto = quantizer.model.model
    _free_logits(result)
    drop_unused_initializers(result)
    _sort_initializers(result)
    sort_nodes(result)  # onnxruntime appends Q and DQ at the end
    del result.graph.value_info[:]  # some describe values that are gone
    result = strip(onnx.shape_inference.infer_shapes(result))
    return Quantized(result, check_int8(floating, result))


def calibrate(path: Path, samples: Samples, *, calibrator: Calibrator, threads: int) -> TensorsData:
    """Range of every float activation, from real samples.

    `percentile` keeps the values of one step at a time and merges histograms; left to itself
    onnxruntime keeps those of all samples (onnxruntime#10503, #21979).
    """
    augmented = path.with_name("augmented.onnx")
    shared = {"augmented_model_path": str(augmented)}
    if calibrator == "minmax":
        collector = MinMaxCalibrater(path, **shared)
    else:
        collector = PercentileCalibrater(
            path, num_bins=HISTOGRAM_BINS, percentile=PERCENTILE, **shared
        )
    collector.augment_graph()
    collector.infer_session = open_session(augmented, threads=threads, optimize=False)
    name = collector.infer_session.get_inputs()[0].name
    fixed = batch_size(onnx.load(path))
    size = fixed or CALIBRATION_BATCH
    for start in range(0, len(samples), size):
        batch = np.ascontiguousarray(samples[start : start + size], dtype=np.float32)
        # a repeated sample changes no range
        collector.collect_data(_Once({name: pad_batch(batch, size) if fixed else batch}))
    return collector.compute_data()


def check_int8(floating: ModelProto, quantized: ModelProto) -> dict[str, int]:
    """Holds the int8 graph against the float one; returns what was counted.

    Every constant weight of a Conv, Gemm or MatMul with ≥ 2 axes is stored as int8 and their
    biases as int32; the bytes are those of the float graph less three quarters of these weights,
    plus scales and zero points.

    Raises:
        IntegrityError: a weight was left float, nothing was quantized, or the bytes do not fit.
    """
    stored = {tensor.name: tensor for tensor in quantized.graph.initializer}
    writers = producers(quantized)
    weights, biases, channels, left = 0, 0, 0, []
    for node in quantized.graph.node:
        if node.op_type not in WEIGHTED_OPS:
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
    if left or not weights:
        what = f"{', '.join(left[:5])} kept float weights" if left else "no weight became int8"
        raise IntegrityError(
            f"int8: {what}; expected int8 for every Conv, Gemm and MatMul. Leave out `quantize:` "
            "to ship the float model, or report this graph"
        )
    ops = [node.op_type for node in quantized.graph.node]
    counts = {
        "quantize_linear": ops.count("QuantizeLinear"),
        "dequantize_linear": ops.count("DequantizeLinear"),
        "int8_weights": weights,
        "int32_biases": biases,
        "float_initializer_bytes": sum(initializer_bytes(floating).values()),
        "int8_initializer_bytes": sum(initializer_bytes(quantized).values()),
    }
    _check_bytes(floating, counts, channels)
    return counts


class _Once:
    """onnxruntime's data reader protocol over a single step."""

    def __init__(self, feed: dict[str, Array]) -> None:
        self._feed: dict[str, Array] | None = feed

    def get_next(self) -> dict[str, Array] | None:
        feed, self._feed = self._feed, None
        return feed


def _refuse_unfit(model: ModelProto, samples: Samples) -> None:
    if is_quantized(model):
        raise ExportError(
            "the model is quantized already (it has QuantizeLinear or DequantizeLinear nodes); "
            "give the float ONNX it was made from"
        )
    left = [node.name for node in model.graph.node if node.op_type == "BatchNormalization"]
    if left:
        raise ExportError(
            f"BatchNormalization is left ({', '.join(left[:3])}) and would run between int8 "
            "layers as float; simplify the float graph first (export.simplify: true)"
        )
    if not any(node.op_type in WEIGHTED_OPS for node in model.graph.node):
        raise ExportError(
            "the graph has no Conv, Gemm or MatMul, so int8 would change nothing; leave out "
            "`quantize:`"
        )
    if len(samples) == 0:
        raise ExportError("no calibration samples; set data.calibration to 64 or more")


def _check_ranges(ranges: TensorsData) -> None:
    for name, data in ranges.items():
        if not np.isfinite(data.range_value).all():
            raise ExportError(
                f"calibration: the values of {name!r} are not finite, so they have no range; look "
                "for NaN or infinity in the weights and the samples"
            )


def _kept_float(model: ModelProto) -> list[str]:
    """Adds of a constant: a folded BatchNormalization, for which one scale would be coarse."""
    constants = arrays(model)
    return [
        node.name
        for node in model.graph.node
        if node.op_type == "Add" and any(name in constants for name in node.input)
    ]


def _free_logits(model: ModelProto) -> None:
    """Takes the Q and DQ off each graph output, in place: logits leave in float.

    Eight bits for all logits would put ties into the ranking. A Gemm without Q after it fuses to
    QGemm with a float output, so nothing is lost in speed.
    """
    writers, readers = producers(model), consumers(model)
    for output in model.graph.output:
        dequantize = writers.get(output.name)
        if dequantize is None or dequantize.op_type != "DequantizeLinear":
            continue
        quantize_node = writers.get(dequantize.input[0])
        if quantize_node is None or quantize_node.op_type != "QuantizeLinear":
            continue
        source = writers.get(quantize_node.input[0])
        shared = len(readers[quantize_node.input[0]]) > 1 or len(readers[dequantize.input[0]]) > 1
        if source is None or source.op_type not in WEIGHTED_OPS or shared:
            continue
        source.output[0] = output.name
        model.graph.node.remove(quantize_node)
        model.graph.node.remove(dequantize)


def _sort_initializers(model: ModelProto) -> None:
    """By name: onnxruntime's order follows its internal dictionaries, which may change."""
    ordered = sorted(model.graph.initializer, key=lambda tensor: tensor.name)
    copies = [TensorProto.FromString(tensor.SerializeToString()) for tensor in ordered]
    del model.graph.initializer[:]
    model.graph.initializer.extend(copies)


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


def _check_bytes(floating: ModelProto, counts: dict[str, int], channels: int) -> None:
    """Per output channel: scale 4, zero point 1, bias scale 4, bias zero point 4, and 4 for a bias
    that the float net had not; per activation: scale 4, zero point 1 (counted at each Q and DQ).
    """
    constants = arrays(floating)
    weight_names = {
        node.input[1]
        for node in floating.graph.node
        if node.op_type in WEIGHTED_OPS
        and node.input[1] in constants
        and constants[node.input[1]].ndim >= 2
    }
    weight_bytes = sum(constants[name].nbytes for name in weight_names)
    nodes = counts["quantize_linear"] + counts["dequantize_linear"]
    expected = counts["float_initializer_bytes"] - 0.75 * weight_bytes + 17 * channels + 5 * nodes
    if counts["int8_initializer_bytes"] > BYTES_SLACK * expected:
        raise IntegrityError(
            f"int8: {counts['int8_initializer_bytes']:,} bytes of initializers, expected at most "
            f"{expected:,.0f} (float: {counts['float_initializer_bytes']:,}); a weight is stored "
            "twice or as float. Leave out `quantize:` to ship the float model, or report this graph"
        )
