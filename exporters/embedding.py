"""Word embeddings by weight alone: int8 rows, each with a float32 scale of its own.

In a small text encoder the table of word embeddings is half of the file and none of its arithmetic:
rows are looked up. x ≈ scale · q, q in -127…127, scale = max|row| / 127, so an element is off by
at most half a scale of its own row. Written in standard operators (opset 13): Gather of the int8
rows → Cast → Mul by the gathered scales. Tables of fewer rows (positions, types) stay float.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

from .graph import arrays, attribute, consumers, drop_unused_initializers

Array = np.ndarray[Any, Any]

LEAST_ROWS = 1024  # below, a table saves less than a megabyte; positions (512) are of this kind
LARGEST = 127  # symmetric int8 leaves -128 unused


def quantize_embeddings(model: ModelProto) -> tuple[ModelProto, list[str]]:
    """A copy whose word embeddings are int8 rows, and the names of the tables that were replaced.

    A table is a constant (V ≥ 1024, D) float32 that nothing reads but Gather along its rows: one
    that a product reads too (tied to an output layer) stays.
    """
    result = ModelProto()
    result.CopyFrom(model)
    constants, readers = arrays(result), consumers(result)
    tables = [name for name, value in constants.items() if _is_table(value, readers.get(name, []))]
    for name in tables:
        rows, scales = int8_rows(constants[name])
        for node in readers[name]:
            _look_up(result, node, name)
        result.graph.initializer.extend(
            [
                numpy_helper.from_array(rows, f"{name}_int8"),
                numpy_helper.from_array(scales, f"{name}_row_scale"),
            ]
        )
    drop_unused_initializers(result)
    return result, tables


def int8_rows(table: Array) -> tuple[Array, Array]:
    """table (V, D) float32 → int8 (V, D) and scales (V, 1) float32, table ≈ scales · rows.

    |table - scales · rows| ≤ scales / 2, of each row its own; a row of zeros has scale 1.
    """
    largest = np.abs(table).max(axis=1, keepdims=True).astype(np.float64)
    scales = np.where(largest > 0, largest / LARGEST, 1.0).astype(np.float32)
    scales = np.maximum(scales, np.finfo(np.float32).tiny)  # a row below it becomes zeros
    rows = np.clip(np.round(table / scales.astype(np.float64)), -LARGEST, LARGEST)
    return rows.astype(np.int8), scales


def embedding_bytes(model: ModelProto, tables: list[str]) -> tuple[int, int]:
    """Bytes of these tables as float32, and as int8 with their scales. model: the float graph."""
    shapes = [tensor.dims for tensor in model.graph.initializer if tensor.name in tables]
    before = sum(4 * rows * width for rows, width in shapes)
    return before, sum(rows * width + 4 * rows for rows, width in shapes)


def _is_table(value: Array, readers: list[NodeProto]) -> bool:
    return (
        value.ndim == 2
        and value.dtype == np.float32
        and len(value) >= LEAST_ROWS
        and bool(readers)
        and all(n.op_type == "Gather" and attribute(n, "axis", 0) == 0 for n in readers)
    )


def _look_up(model: ModelProto, node: NodeProto, table: str) -> None:
    """In place of the Gather `node`: rows, cast, times scales. Its output keeps its name."""
    indices, output = node.input[1], node.output[0]
    rows, cast, scale = f"{output}_rows", f"{output}_cast", f"{output}_scale"
    made = [
        helper.make_node("Gather", [f"{table}_int8", indices], [rows], name=rows, axis=0),
        helper.make_node("Cast", [rows], [cast], name=cast, to=TensorProto.FLOAT),
        helper.make_node("Gather", [f"{table}_row_scale", indices], [scale], name=scale, axis=0),
        helper.make_node("Mul", [cast, scale], [output], name=node.name),
    ]
    place = next(i for i, other in enumerate(model.graph.node) if other.output[:1] == [output])
    after = [NodeProto.FromString(n.SerializeToString()) for n in model.graph.node[place + 1 :]]
    del model.graph.node[place:]
    model.graph.node.extend([*made, *after])
