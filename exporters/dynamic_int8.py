"""A float graph → dynamic int8: weights stored as int8, the scale of activations found at run time.

Each MatMul and Gemm with a constant matrix becomes DynamicQuantizeLinear → MatMulInteger → Cast →
Mul (→ Add), in standard operators of opset 13 and older, which onnxruntime runs as one
DynamicQuantizeMatMul, or as MatMulIntegerToFloat where several layers read one activation. Weights
are int8, symmetric, one scale for each output; activations uint8, one scale for a whole batch, so
the answer to a text depends, within rounding, on what it is batched with. No calibration, and
nothing but these products and the word embeddings is rounded: the bound that static int8 is held
against. Convolutions stay float, as onnxruntime has no fast dynamic kernel for them.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import numpy as np
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

from ..pipeline.errors import ExportError, IntegrityError
from .audit import initializer_bytes
from .embedding import embedding_bytes, quantize_embeddings
from .graph import arrays, attribute, drop_unused_initializers, producers, sort_nodes
from .int8 import Encoding, Quantized, refuse_unfit, refuse_unknown
from .rewrites import name_nodes
from .stamp import strip

Array = np.ndarray[Any, Any]

FULL, REDUCED = 127, 64  # largest weight with 8 and with 7 bits
BYTES_SLACK = 1.02


def quantize_dynamically(
    model: ModelProto, *, encoding: Encoding, keep_float: Collection[str] = ()
) -> Quantized:
    """The same arguments give the same bytes. No samples are needed.

    Args:
        model: float, opset ≥ 13, simplified.
        encoding: whether weights use 7 bits, and whether word embeddings become int8.
        keep_float: names of nodes of `model` that stay float.

    Raises:
        ExportError: quantized already, opset too old, unknown names, or nothing to quantize.
        IntegrityError: the result is not what was asked for.
    """
    refuse_unfit(model)
    floating = ModelProto()
    floating.CopyFrom(model)
    name_nodes(floating)
    refuse_unknown(floating, keep_float)
    wanted = dynamic_nodes(floating, keep_float)
    if not wanted:
        raise ExportError(
            "dynamic int8: no MatMul or Gemm has a constant matrix and may become int8; leave out "
            "names from quantize.keep_float, or quantize statically"
        )
    result = _write(floating, wanted, largest=REDUCED if encoding.reduce_range else FULL)
    tables: list[str] = []
    if encoding.embeddings:
        result, tables = quantize_embeddings(result)
    sort_nodes(result)
    del result.graph.value_info[:]  # some describe values that are gone
    result = strip(result)
    return Quantized(result, _check(floating, result, wanted, tables))


def dynamic_nodes(model: ModelProto, keep_float: Collection[str] = ()) -> list[str]:
    """Names of the MatMul and Gemm that become int8, in graph order."""
    constants = arrays(model)
    return [
        node.name
        for node in model.graph.node
        if node.name not in keep_float
        and node.op_type in ("MatMul", "Gemm")
        and node.input[1] in constants
        and constants[node.input[1]].ndim == 2
        and constants[node.input[1]].dtype == np.float32
        and (node.op_type == "MatMul" or _is_plain(node))
    ]


def int8_columns(weight: Array, *, largest: int) -> tuple[Array, Array]:
    """weight (K, M) → int8 (K, M) in ±largest and scales (M,) float32, weight ≈ scales · int8."""
    ranges = np.abs(weight).max(axis=0).astype(np.float64)
    scales = np.where(ranges > 0, ranges / largest, 1.0).astype(np.float32)
    scales = np.maximum(scales, np.finfo(np.float32).tiny)
    values = np.clip(np.round(weight / scales.astype(np.float64)), -largest, largest)
    return values.astype(np.int8), scales


def _is_plain(node: NodeProto) -> bool:
    """x · W + b or x · Wᵀ + b, without factors of its own."""
    return (
        attribute(node, "alpha", 1.0) == 1.0
        and attribute(node, "beta", 1.0) == 1.0
        and not attribute(node, "transA", 0)
    )


def _write(model: ModelProto, wanted: list[str], *, largest: int) -> ModelProto:
    result = ModelProto()
    result.CopyFrom(model)
    constants = arrays(result)
    stored: dict[str, str] = {}  # weight and layout → name of its int8 form
    quantized: set[str] = set()  # activations that have a DynamicQuantizeLinear
    nodes: list[NodeProto] = []
    for node in result.graph.node:
        if node.name not in wanted:
            nodes.append(node)
            continue
        source, weight = node.input[0], node.input[1]
        transposed = bool(attribute(node, "transB", 0))
        key = f"{weight}_transposed" if transposed else weight
        if key not in stored:
            values = constants[weight].T if transposed else constants[weight]
            stored[key] = key
            columns, scales = int8_columns(values, largest=largest)
            result.graph.initializer.extend(
                [
                    numpy_helper.from_array(np.ascontiguousarray(columns), f"{key}_int8"),
                    numpy_helper.from_array(scales, f"{key}_scale"),
                ]
            )
        if source not in quantized:
            quantized.add(source)
            parts = [f"{source}_uint8", f"{source}_scale", f"{source}_zero_point"]
            name = f"{source}_DynamicQuantizeLinear"
            nodes.append(helper.make_node("DynamicQuantizeLinear", [source], parts, name=name))
        nodes += _product(node, key)
    del result.graph.node[:]
    result.graph.node.extend([NodeProto.FromString(n.SerializeToString()) for n in nodes])
    drop_unused_initializers(result)
    return result


def _product(node: NodeProto, weight: str) -> list[NodeProto]:
    """The nodes in place of a MatMul or Gemm; the last one writes what it wrote."""
    source, output = node.input[0], node.output[0]
    bias = node.input[2] if len(node.input) > 2 and node.input[2] else ""
    sums, cast, scale = f"{output}_int32", f"{output}_sums", f"{output}_scales"
    product = f"{output}_product" if bias else output
    made = [
        helper.make_node(
            "MatMulInteger",
            [f"{source}_uint8", f"{weight}_int8", f"{source}_zero_point"],
            [sums],
            name=node.name,
        ),
        helper.make_node("Cast", [sums], [cast], name=cast, to=TensorProto.FLOAT),
        helper.make_node("Mul", [f"{source}_scale", f"{weight}_scale"], [scale], name=scale),
        helper.make_node("Mul", [cast, scale], [product], name=f"{output}_rescaled"),
    ]
    if bias:
        made.append(helper.make_node("Add", [product, bias], [output], name=f"{output}_bias_added"))
    return made


def _check(
    floating: ModelProto, result: ModelProto, wanted: list[str], tables: list[str]
) -> dict[str, int]:
    """Every wanted product multiplies uint8 by int8, the bytes are theirs; what was counted."""
    stored = {tensor.name: tensor for tensor in result.graph.initializer}
    writers = producers(result)
    integer = {node.name: node for node in result.graph.node if node.op_type == "MatMulInteger"}
    left = [
        name
        for name in wanted
        if name not in integer
        or stored[integer[name].input[1]].data_type != TensorProto.INT8
        or writers[integer[name].input[0]].op_type != "DynamicQuantizeLinear"
    ]
    if left:
        raise IntegrityError(
            f"dynamic int8: {', '.join(left[:3])} did not become integer; report this graph"
        )
    constants = arrays(floating)
    weights = {n.input[1] for n in floating.graph.node if n.name in wanted}
    channels = sum(max(constants[name].shape) for name in weights)
    before, after = embedding_bytes(floating, tables)
    counts = {
        "dynamic_quantize_linear": sum(
            node.op_type == "DynamicQuantizeLinear" for node in result.graph.node
        ),
        "int8_weights": len(wanted),
        "int8_embeddings": len(tables),
        "float_initializer_bytes": sum(initializer_bytes(floating).values()),
        "int8_initializer_bytes": sum(initializer_bytes(result).values()),
    }
    saved = 0.75 * sum(constants[name].nbytes for name in weights) + before - after
    expected = counts["float_initializer_bytes"] - saved + 4 * channels
    if counts["int8_initializer_bytes"] > BYTES_SLACK * expected:
        raise IntegrityError(
            f"dynamic int8: {counts['int8_initializer_bytes']:,} bytes of initializers, expected "
            f"at most {expected:,.0f}; a weight is stored twice or as float. Report this graph"
        )
    return counts
