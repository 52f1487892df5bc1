"""A float graph → static int8 in QDQ form, written by onnxruntime.quantization.

Activations uint8, weights int8 symmetric per channel, biases int32. The targets decide whether
weights use 8 bits or 7 (`encoding_for`). Operators without an int8 kernel stay float, and so do the
Mul and Add that a BatchNormalization became: one scale for all channels would lose them. Text
encoders have a policy of their own: their products with weights become int8, and nothing between
them; their word embeddings are int8 by weight (`embedding.py`). Ranges come from calibration
(`calibrate.py`) or from training; either way this is the one writer, and what it wrote is held
against what it was given (`int8_check.py`).

Does not choose calibration samples and does not measure accuracy.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np
import onnx
from onnx import ModelProto, TensorProto
from onnxruntime.quantization import QuantType
from onnxruntime.quantization.calibrate import CalibrationMethod, TensorsData
from onnxruntime.quantization.qdq_quantizer import QDQQuantizer

from ..pipeline.errors import ExportError
from .bias import correct_bias as with_corrected_bias
from .calibrate import Calibrator, Range, Samples, activations, ranges_of
from .embedding import quantize_embeddings
from .feeds import is_text
from .float_guard import guard
from .graph import (
    WEIGHTED_OPS,
    arrays,
    consumers,
    drop_unused_initializers,
    is_quantized,
    producers,
    sort_nodes,
)
from .int8_check import (
    ABSORBED_OPS,
    check_int8,
    check_ranges,
    clip_bounds,
    refuse_ranges,
)
from .quiet import quiet
from .rewrites import name_nodes
from .stamp import strip
from .text_policy import (
    TEXT_OP_REASON,
    TEXT_OP_TYPES,
    activation_products,
    free_float_nodes,
    has_layer_norm,
    own_biases,
)

Array = np.ndarray[Any, Any]
Target = Literal["arm", "x86", "x86-vnni"]

OLDEST_OPSET = 13  # the first whose QuantizeLinear and DequantizeLinear have an axis
# Fused by onnxruntime's CPU provider between Q and DQ (qdq_selector_action_transformer.cc); the
# shape-only ones pass int8 through. Mul, Sigmoid, Softmax and normalisations stay float.
QUANTIZED_OP_TYPES = (
    "Conv", "Gemm", "MatMul", "Relu", "Clip", "Add", "Concat", "GlobalAveragePool", "AveragePool",
    "MaxPool", "Reshape", "Flatten", "Transpose", "Squeeze", "Unsqueeze", "Slice", "Split",
)  # fmt: skip
OP_REASON = (
    "the file is one for all targets, so its operators are those with an int8 kernel on every one "
    "of them; residual Adds are among them, so that a block runs in int8 from end to end. "
    "Mul, Sigmoid, Softmax and normalisations stay float: one scale for all channels loses more "
    "than their share of the time is worth"
)


@dataclass(frozen=True)
class Encoding:
    """How numbers become integers, and which operators do.

    reduce_range: weights use 7 of 8 bits (-64…64). op_types: operators that become int8.
    float_outputs: they leave in float, and products of two activations stay float. embeddings:
    word embeddings become int8 rows.
    """

    activation_type: Literal["uint8"]
    weight_type: Literal["int8"]
    reduce_range: bool
    per_channel: bool
    reason: str
    op_types: tuple[str, ...] = QUANTIZED_OP_TYPES
    op_reason: str = OP_REASON
    float_outputs: bool = False
    embeddings: bool = False


@dataclass(frozen=True)
class Quantized:
    """The int8 graph and what was counted in it.

    not_written: activations whose range is not in the file, by name, with the reason.
    """

    model: ModelProto
    counts: dict[str, int]
    not_written: dict[str, str] = field(default_factory=dict)


def encoding_for(targets: tuple[Target, ...], *, model: ModelProto | None = None) -> Encoding:
    """The encoding whose integer results are the same on every target.

    The graph decides which operators become int8: those of a text encoder, where its inputs are
    tokens and it has LayerNormalization (or what that is made of); without a graph, or of any
    other, those of images.

    U8S8 has fast kernels on all of them: VNNI and dotprod multiply it directly, ARM without dotprod
    widens it. x86 without VNNI multiplies with VPMADDUBSW, whose int16 sums saturate
    (255·127 + 255·127 > 32,767); weights of at most 64 cannot: 255·64·2 = 32,640.

    One kernel is not the same everywhere: QLinearAdd, of residual Adds, rounds ties to even in
    float32 on x86 and away from zero in 22-bit fixed point on ARM (mlas/lib/qladd.cpp), so a net
    with residual Adds may differ by one step in a few activations of ten thousand.
    """
    if not targets:
        raise ExportError("quantize.targets: empty; name at least one of arm, x86, x86-vnni")
    reduced = "x86" in targets
    reason = f"8-bit weights: {' and '.join(sorted(set(targets)))} multiply u8 by s8 exactly"
    if reduced:
        reason = (
            "7-bit weights: x86 without VNNI saturates on 8-bit ones, and every target must "
            "compute the same"
        )
    encoding = Encoding("uint8", "int8", reduce_range=reduced, per_channel=True, reason=reason)
    if model is None or not is_text(model):
        return encoding
    if not has_layer_norm(model):
        return replace(encoding, embeddings=True)
    return replace(
        encoding, embeddings=True, float_outputs=True, op_types=TEXT_OP_TYPES,
        op_reason=TEXT_OP_REASON,
    )  # fmt: skip


def int8_nodes(model: ModelProto, encoding: Encoding) -> list[str]:
    """Names of the nodes that `quantize` may make int8, in graph order; all have names."""
    kept = _never_int8(model, encoding)
    return [
        node.name
        for node in model.graph.node
        if node.op_type in encoding.op_types and node.name not in kept
    ]


def quantize(
    model: ModelProto,
    samples: Samples,
    *,
    encoding: Encoding,
    calibrator: Calibrator = "minmax",
    threads: int,
    keep_float: Collection[str] = (),
    ranges: Mapping[str, Range] | None = None,
    correct_bias: bool = False,
) -> Quantized:
    """Calibrates on the samples and writes Q and DQ; the same arguments give the same bytes.

    Args:
        model: float, its BatchNormalization folded (see simplify.py), opset ≥ 13.
        samples: float32, (N, C, H, W), or int64 tokens, (N, K, S), real, from the training set;
            read in steps, so that memory does not grow with N. May be empty where `ranges` are
            given and `correct_bias` is not.
        keep_float: names of nodes of `model` that stay float.
        ranges: of activations, by tensor name; no calibration then. Each one lands in the file or
            in `not_written`. A tensor before a Relu or Clip needs none.
        correct_bias: see bias.py.

    Raises:
        ExportError: quantized already, opset too old, BatchNormalization left, nothing to quantize,
            unknown names, missing or unusable ranges, or what `ranges_of` refuses.
        IntegrityError: the result is not what int8 must look like.
    """
    refuse_unfit(model)
    floating = onnx.shape_inference.infer_shapes(model)
    name_nodes(floating)
    refuse_unknown(floating, keep_float)
    if encoding.float_outputs:
        own_biases(floating)
    given = ranges
    if given is None:
        given = ranges_of(floating, samples, calibrator=calibrator, threads=threads)
    refuse_ranges(floating, given)
    kept = {*keep_float, *_never_int8(floating, encoding)}
    result = _write(floating, given, encoding, kept)
    not_written = check_ranges(
        floating, result, given, kept=kept, op_types=encoding.op_types,
        float_outputs=encoding.float_outputs,
    )  # fmt: skip
    tables: list[str] = []
    if encoding.embeddings:
        result, tables = quantize_embeddings(result)
        _sort_initializers(result)
    never = activation_products(floating) if encoding.float_outputs else []
    counts = check_int8(floating, result, keep_float={*keep_float, *never}, embeddings=tables)
    if correct_bias:
        result = with_corrected_bias(floating, result, samples, threads=threads)
    return Quantized(result, counts, not_written)


def refuse_unfit(model: ModelProto) -> None:
    """Raises ExportError unless this is a float graph that int8 can be made of."""
    if is_quantized(model):
        raise ExportError(
            "the model is quantized already (it has QuantizeLinear or DequantizeLinear nodes); "
            "give the float ONNX it was made from"
        )
    opset = next((o.version for o in model.opset_import if o.domain in ("", "ai.onnx")), 0)
    if opset < OLDEST_OPSET:
        raise ExportError(
            f"the model is written in opset {opset}; expected {OLDEST_OPSET} or newer, the first "
            "with a scale per channel. Export it again with opset_version=18, or convert it with "
            "onnx.version_converter.convert_version(model, 18)"
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
    broken = [name for name, value in arrays(model).items() if not _is_finite(value)]
    if broken:
        raise ExportError(
            f"the weights {', '.join(broken[:3])} are not finite, so they have no scale; look for "
            "NaN or infinity in the checkpoint"
        )


def _is_finite(value: Array) -> bool:
    """A Clip may have an infinite bound; it is a scalar."""
    return value.ndim == 0 or value.dtype.kind != "f" or bool(np.isfinite(value).all())


def refuse_unknown(model: ModelProto, keep_float: Collection[str]) -> None:
    """Raises ExportError for names of nodes that the graph has not."""
    unknown = sorted(set(keep_float) - {node.name for node in model.graph.node})
    if unknown:
        raise ExportError(
            f"keep_float: the graph has no node named {', '.join(unknown[:3])}; names are those of "
            "the float ONNX (e.g. in netron)"
        )


def _never_int8(model: ModelProto, encoding: Encoding) -> set[str]:
    """Names of nodes that stay float under this encoding, though their operator is one of it."""
    never = {*_constant_adds(model), *_inexact_clips(model)}
    return {*never, *activation_products(model)} if encoding.float_outputs else never


def _constant_adds(model: ModelProto) -> list[str]:
    """Adds of a constant: a folded BatchNormalization, for which one scale would be coarse."""
    constants = arrays(model)
    return [
        node.name
        for node in model.graph.node
        if node.op_type == "Add" and any(name in constants for name in node.input)
    ]


def _inexact_clips(model: ModelProto) -> list[str]:
    """Clips that no uint8 range can stand for: zero is outside, or a bound is not constant.

    onnxruntime.quantization would delete them all the same.
    """
    constants = arrays(model)
    inexact = []
    for node in model.graph.node:
        bounds = clip_bounds(node, constants) if node.op_type in ABSORBED_OPS else (0.0, 0.0)
        if bounds is None or not bounds[0] <= 0.0 <= bounds[1]:
            inexact.append(node.name)
    return inexact


def _write(
    model: ModelProto, ranges: Mapping[str, Range], encoding: Encoding, kept: Collection[str]
) -> ModelProto:
    # onnxruntime asks for a range of everything; what must not be without one is checked afterwards
    known = {name: ranges.get(name, (0.0, 0.0)) for name in activations(model)}
    data = {
        name: (np.array(low, np.float32), np.array(high, np.float32))
        for name, (low, high) in known.items()
    }
    logits = _logits(model)  # before the quantizer changes the graph in place
    with quiet():
        quantizer = QDQQuantizer(
            model,
            encoding.per_channel,
            encoding.reduce_range,
            QuantType.QInt8,
            QuantType.QUInt8,
            TensorsData(CalibrationMethod.MinMax, data),
            [],
            sorted(kept),
            list(encoding.op_types),
            _extra_options(encoding),
        )
        quantizer.quantize_model()
        result: ModelProto = quantizer.model.model
    if encoding.float_outputs:
        free_float_nodes(result, kept, encoding.op_types)
    guard(result, kept)
    _free_logits(result, logits)
    drop_unused_initializers(result)
    _sort_initializers(result)
    sort_nodes(result)  # onnxruntime appends Q and DQ at the end
    del result.graph.value_info[:]  # some describe values that are gone; who runs it needs none
    return strip(result)


def _extra_options(encoding: Encoding) -> dict[str, Any]:
    options: dict[str, Any] = {"WeightSymmetric": True, "ActivationSymmetric": False}
    if encoding.float_outputs:
        options["OpTypesToExcludeOutputQuantization"] = list(encoding.op_types)
    return options


def _logits(model: ModelProto) -> set[str]:
    """Graph outputs that a Conv, Gemm or MatMul writes; a Relu before one lives in its Q."""
    writers = producers(model)
    outputs = {value.name for value in model.graph.output} & writers.keys()
    return {name for name in outputs if writers[name].op_type in WEIGHTED_OPS}


def _free_logits(model: ModelProto, names: set[str]) -> None:
    """Takes the Q and DQ off the graph outputs `names`, in place: logits leave in float.

    Eight bits for all logits would put ties into the ranking. A Gemm without Q after it fuses to
    QGemm with a float output, so nothing is lost in speed.
    """
    writers, readers = producers(model), consumers(model)
    for name in sorted(names):
        dequantize = writers.get(name)
        if dequantize is None or dequantize.op_type != "DequantizeLinear":
            continue
        quantize_node = writers.get(dequantize.input[0])
        if quantize_node is None or quantize_node.op_type != "QuantizeLinear":
            continue
        source = writers.get(quantize_node.input[0])
        shared = len(readers[quantize_node.input[0]]) > 1 or len(readers[dequantize.input[0]]) > 1
        if source is None or source.op_type not in WEIGHTED_OPS or shared:
            continue
        source.output[0] = name
        model.graph.node.remove(quantize_node)
        model.graph.node.remove(dequantize)


def _sort_initializers(model: ModelProto) -> None:
    """By name: onnxruntime's order follows its internal dictionaries, which may change."""
    ordered = sorted(model.graph.initializer, key=lambda tensor: tensor.name)
    copies = [TensorProto.FromString(tensor.SerializeToString()) for tensor in ordered]
    del model.graph.initializer[:]
    model.graph.initializer.extend(copies)
