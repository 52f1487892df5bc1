"""What an ONNX graph holds and costs: parameters, multiply-adds, bytes, operators.

Read from the graph itself, so that float, int8 and foreign files are counted alike. Not a latency
estimate: multiply-adds of a depthwise Conv cost far more time than those of a dense one.

Multiply-adds are of one sample: an image of the size that the graph fixes, or a text. Where a graph
takes texts of any length, it is one of 128 tokens, the length that encoders are compared at, and a
power of two below where the graph takes no 128; `tokens` says which it was.
"""

from __future__ import annotations

import tempfile
from collections import Counter
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import ModelProto, NodeProto, TensorProto, helper

from ..pipeline.errors import MeasurementError
from .feeds import entry_of, is_text
from .graph import (
    PRODUCT_OPS,
    all_nodes,
    attribute,
    batch_size,
    consumers,
    producers,
    read_model,
)
from .sessions import CANNOT_LOAD, DIED, one_line, open_session
from .stamp import write_model

TOKENS = 128  # of a text, where the graph leaves the length free

# What an array of these element types can hold as learnt numbers.
_PARAMETER_TYPES = frozenset(
    {TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16, TensorProto.DOUBLE,
     TensorProto.INT8, TensorProto.UINT8, TensorProto.INT32}
)  # fmt: skip


def audit(model: ModelProto) -> dict[str, Any]:
    """All of this file's figures, JSON-able. `tokens` is there for texts alone."""
    shapes, batch, tokens = _sizes(model)
    return {
        "opset": opset_of(model),
        "ir": model.ir_version,
        "parameters": count_parameters(model),
        "multiply_adds": sum(count for _, count in _by_node(model, shapes, batch)),
        "initializer_bytes": initializer_bytes(model),
        "ops": op_counts(model),
        **({} if tokens is None else {"tokens": tokens}),
    }


def count_parameters(model: ModelProto) -> int:
    """Learnt numbers: elements of the initializers that enter the arithmetic.

    Float ones with at least one axis (a Clip's bounds have none), and integer ones read by a
    DequantizeLinear, a MatMulInteger or a Gather. Scales, zero points, shapes and axes are not
    parameters. A tensor read twice counts once.
    """
    stored = {tensor.name: tensor for tensor in model.graph.initializer}
    names: set[str] = set()
    scales = _scales(model, stored)
    for node in model.graph.node:
        if node.op_type in ("QuantizeLinear", "DequantizeLinear"):
            names.add(node.input[0])
        elif node.op_type == "MatMulInteger":
            names.update(node.input[:2])
        else:
            names.update(
                name
                for name in node.input
                if name in stored
                and name not in scales
                and stored[name].data_type in _PARAMETER_TYPES
                and stored[name].data_type != TensorProto.INT32
            )
    return sum(
        prod(stored[name].dims)
        for name in names
        if name in stored and stored[name].dims and stored[name].data_type in _PARAMETER_TYPES
    )


def _scales(model: ModelProto, stored: dict[str, TensorProto]) -> set[str]:
    """Of dynamic int8, what multiplies the scale of an activation; of int8 embeddings, the column
    that is looked up by the same indices as the rows."""
    writers, readers = producers(model), consumers(model)
    found = set()
    for node in model.graph.node:
        around = [writers[name].op_type for name in node.input if name in writers]
        if node.op_type == "Mul" and around == ["DynamicQuantizeLinear"]:
            found |= set(node.input) & stored.keys()
        if node.op_type == "Gather" and list(stored.get(node.input[0], TensorProto()).dims)[1:] == [
            1
        ]:
            beside = [n for n in readers[node.input[1]] if n.op_type == "Gather" and n != node]
            if any(n.input[0] in stored and stored[n.input[0]].data_type == TensorProto.INT8
                   for n in beside):  # fmt: skip
                found.add(node.input[0])
    return found


def multiply_adds(model: ModelProto) -> int:
    """Multiply-accumulates of Conv, Gemm and MatMul for one sample, by shape inference; of texts,
    by running it once.

    Conv: outputs · (C_in / groups) · kernel area. Gemm and MatMul: outputs · inner size. A
    multiply and its add count once; biases, pooling and elementwise operators do not count.

    Raises:
        MeasurementError: a shape cannot be inferred.
    """
    shapes, batch, _ = _sizes(model)
    return sum(count for _, count in _by_node(model, shapes, batch))


def node_multiply_adds(model: ModelProto) -> dict[str, int]:
    """The same by the name of the node; names must be there and differ.

    Raises:
        MeasurementError: a shape cannot be inferred.
    """
    shapes, batch, _ = _sizes(model)
    return {node.name: count for node, count in _by_node(model, shapes, batch)}


def _by_node(
    model: ModelProto, shapes: dict[str, tuple[int, ...]], batch: int
) -> list[tuple[NodeProto, int]]:
    return [
        (node, _node_multiply_adds(node, shapes) // batch)
        for node in model.graph.node
        if node.op_type in PRODUCT_OPS
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


def opset_of(model: ModelProto) -> int:
    """Version of ONNX's own operators that the file is written in; 0: it uses none."""
    return next((o.version for o in model.opset_import if o.domain in ("", "ai.onnx")), 0)


def requirements(path: Path) -> dict[str, Any]:
    """What the file asks of the runtime that loads it: `bytes`, `opset` and `ops`, all JSON-able.

    `ops` counts the nodes of every graph and function in it by `domain:operator`, sorted; ONNX's
    own domain is `ai.onnx`. Raises: ExportError, it cannot be read.
    """
    model = read_model(path)
    ops = Counter(f"{node.domain or 'ai.onnx'}:{node.op_type}" for node in all_nodes(model))
    return {
        "bytes": path.stat().st_size,
        "opset": opset_of(model),
        "ops": dict(sorted(ops.items())),
    }


def _sizes(model: ModelProto) -> tuple[dict[str, tuple[int, ...]], int, int | None]:
    """Shapes, the batch they are of, and the tokens of a text; None of images."""
    batch = batch_size(model) or 1
    if not is_text(model):
        return _shapes(model, batch), batch, None
    shapes, tokens = _run_shapes(model, batch)
    return shapes, batch, tokens


def _run_shapes(model: ModelProto, batch: int) -> tuple[dict[str, tuple[int, ...]], int]:
    """Shapes of what products read and write, and the tokens they are of: the graph is run.

    Sizes are computed from the tokens' own inside the graph, which shape inference does not follow.
    """
    products = [node for node in model.graph.node if node.op_type in PRODUCT_OPS]
    stored = {tensor.name: tuple(tensor.dims) for tensor in model.graph.initializer}
    names = [name for node in products for name in (*node.input[:2], node.output[0])]
    wanted = [name for name in dict.fromkeys(names) if name not in stored]
    watched = ModelProto()
    watched.CopyFrom(model)
    del watched.graph.output[:]
    for index, name in enumerate(wanted):
        size = f"Shape#{index}"
        watched.graph.node.append(helper.make_node("Shape", [name], [size]))
        watched.graph.output.append(helper.make_tensor_value_info(size, TensorProto.INT64, None))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "shapes.onnx")
        write_model(watched, path)
        session = open_session(path, threads=1, optimize=False)
    entry = entry_of(session)
    tokens = entry.sequence or TOKENS
    while True:
        row = np.ones((batch, tokens), np.int64)
        fed = {name: row * (place == 1) for place, name in enumerate(entry.names)}
        try:
            sizes = session.run(None, fed)
            break
        except (*CANNOT_LOAD, *DIED) as error:
            if tokens == 1 or entry.sequence:
                raise MeasurementError(
                    f"multiply-adds: it does not run on {tokens} tokens: {one_line(error)}; export "
                    "it again"
                ) from error
            tokens //= 2  # it has fewer positions
    found = {name: tuple(int(n) for n in size) for name, size in zip(wanted, sizes, strict=True)}
    return {**stored, **found}, tokens


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
