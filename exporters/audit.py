"""What an ONNX graph holds and costs: parameters, multiply-adds, bytes, operators.

Read from the graph itself, so that float, int8 and foreign files are counted alike. Not a latency
estimate: multiply-adds of a depthwise Conv cost far more time than those of a dense one.
"""

from __future__ import annotations

from collections import Counter
from math import prod
from typing import Any

import onnx
from onnx import ModelProto, NodeProto, TensorProto

from ..pipeline.errors import MeasurementError
from .graph import WEIGHTED_OPS, attribute, batch_size, producers

# What an array of these element types can hold as learnt numbers.
_PARAMETER_TYPES = frozenset(
    {TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16, TensorProto.DOUBLE,
     TensorProto.INT8, TensorProto.UINT8, TensorProto.INT32}
)  # fmt: skip


def audit(model: ModelProto) -> dict[str, Any]:
    """All of this file's figures, JSON-able."""
    return {
        "opset": next((o.version for o in model.opset_import if o.domain in ("", "ai.onnx")), 0),
        "ir": model.ir_version,
        "parameters": count_parameters(model),
        "multiply_adds": multiply_adds(model),
        "initializer_bytes": initializer_bytes(model),
        "ops": op_counts(model),
    }


def count_parameters(model: ModelProto) -> int:
    """Learnt numbers: elements of the initializers that enter the arithmetic.

    Float ones with at least one axis (a Clip's bounds have none), and integer ones read by a
    DequantizeLinear. Scales, zero points, shapes and axes are not parameters. A tensor read twice
    counts once.
    """
    stored = {tensor.name: tensor for tensor in model.graph.initializer}
    names: set[str] = set()
    for node in model.graph.node:
        if node.op_type in ("QuantizeLinear", "DequantizeLinear"):
            names.add(node.input[0])
        else:
            names.update(
                name
                for name in node.input
                if name in stored
                and stored[name].data_type in _PARAMETER_TYPES
                and stored[name].data_type != TensorProto.INT32
            )
    return sum(
        prod(stored[name].dims)
        for name in names
        if name in stored and stored[name].dims and stored[name].data_type in _PARAMETER_TYPES
    )


def multiply_adds(model: ModelProto) -> int:
    """Multiply-accumulates of Conv, Gemm and MatMul for one sample, by shape inference.

    Conv: outputs · (C_in / groups) · kernel area. Gemm and MatMul: outputs · inner size. A
    multiply and its add count once; biases, pooling and elementwise operators do not count.

    Raises:
        MeasurementError: a shape cannot be inferred.
    """
    return sum(count for _, count in _by_node(model))


def node_multiply_adds(model: ModelProto) -> dict[str, int]:
    """The same by the name of the node; names must be there and differ.

    Raises:
        MeasurementError: a shape cannot be inferred.
    """
    return {node.name: count for node, count in _by_node(model)}


def _by_node(model: ModelProto) -> list[tuple[NodeProto, int]]:
    batch = batch_size(model) or 1
    shapes = _shapes(model, batch)
    return [
        (node, _node_multiply_adds(node, shapes) // batch)
        for node in model.graph.node
        if node.op_type in WEIGHTED_OPS
    ]


def initializer_bytes(model: ModelProto) -> dict[str, int]:
    """Bytes of the stored tensors by element type ("float32", "int8", …), sorted by name."""
    sizes: Counter[str] = Counter()
    for tensor in model.graph.initializer:
        dtype = onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type)
        sizes[str(dtype)] += prod(tensor.dims) * dtype.itemsize
    return dict(sorted(sizes.items()))


def op_counts(model: ModelProto) -> dict[str, int]:
    """Nodes of the main graph by operator, sorted by name."""
    return dict(sorted(Counter(node.op_type for node in model.graph.node).items()))


def _shapes(model: ModelProto, batch: int) -> dict[str, tuple[int, ...]]:
    """Static shape of every value with the first axis of each input set to `batch`."""
    copy = ModelProto()
    copy.CopyFrom(model)
    del copy.graph.value_info[:]
    for info in copy.graph.input:
        dims = info.type.tensor_type.shape.dim
        if dims and not dims[0].dim_value:
            dims[0].dim_value = batch
    for info in copy.graph.output:
        info.type.tensor_type.ClearField("shape")
    try:
        inferred = onnx.shape_inference.infer_shapes(copy, strict_mode=True, data_prop=True)
    except onnx.shape_inference.InferenceError as error:
        raise MeasurementError(
            f"multiply-adds: shapes cannot be inferred: {' '.join(str(error).split())[:300]}"
        ) from error
    graph = inferred.graph
    shapes = {tensor.name: tuple(tensor.dims) for tensor in graph.initializer}
    for value in (*graph.value_info, *graph.input, *graph.output):
        dims = value.type.tensor_type.shape.dim
        if all(dim.HasField("dim_value") for dim in dims):
            shapes[value.name] = tuple(dim.dim_value for dim in dims)
    for name, node in producers(model).items():
        if node.op_type == "DequantizeLinear" and node.input[0] in shapes:
            shapes.setdefault(name, shapes[node.input[0]])
    return shapes


def _node_multiply_adds(node: NodeProto, shapes: dict[str, tuple[int, ...]]) -> int:
    missing = [name for name in (*node.input[:2], node.output[0]) if name not in shapes]
    if missing:
        raise MeasurementError(
            f"multiply-adds: {node.op_type} {node.name!r} has no static shape for {missing[0]!r}; "
            "export with a fixed image size"
        )
    outputs = prod(shapes[node.output[0]])
    if node.op_type == "Conv":
        return outputs * prod(shapes[node.input[1]][1:])  # (C_out, C_in / groups, kH, kW)
    inner = shapes[node.input[0]]
    if node.op_type == "Gemm" and attribute(node, "transA", 0):
        return outputs * inner[0]
    return outputs * inner[-1]
