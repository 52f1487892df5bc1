"""Rewrites of what stands between the tokens and the first layer, each exact in real arithmetic.

    mask_by_unsqueeze   the attention mask read through a table of positions → two axes more
    one_type            the embedding of token types that are all the same → one row, added to that
                        of positions

`text_rewrites.py` calls them and rewrites the layers.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
from onnx import ModelProto, NodeProto, numpy_helper

from .graph import arrays, attribute, consumers, producers
from .rewrites import copied, in_place_of, set_nodes

Array = np.ndarray[Any, Any]
Dims = tuple[int | str, ...]

VIEWS = frozenset({"Unsqueeze", "Expand", "Slice", "Reshape", "Identity", "GatherElements"})


def mask_by_unsqueeze(model: ModelProto) -> ModelProto:
    """GatherND of a mask (N, S) by all pairs of (text, position) → Unsqueeze to (N, 1, 1, S).

    And a comparison that holds at every position, `Range from 0 ≥ 0`, leaves the And it is in,
    where sizes of 1 are spread later on.
    """
    result = copied(model)
    constants, writers = arrays(result), producers(result)
    nodes = []
    for node in result.graph.node:
        output = node.output[0]
        if node.op_type == "GatherND" and _reads_all(node, writers, constants, result):
            axes = stored(result, f"{output}_axes", np.array([1, 2], np.int64))
            nodes.append(in_place_of("Unsqueeze", [node.input[0], axes], output, node))
        elif node.op_type == "And" and (left := _without_truth(node, writers, constants)):
            nodes.append(in_place_of("Identity", [left], output, node))
            if left in writers:
                writers[output] = writers[left]
        else:
            nodes.append(node)
    set_nodes(result, nodes)
    return _without_identities(result)


def one_type(model: ModelProto) -> ModelProto:
    """Gather of a constant table by indices that are all one constant → that row, where an Add
    alone reads it and spreads it over all positions; and into another table that is added next."""
    result = copied(model)
    constants, writers, readers = arrays(result), producers(result), consumers(result)
    dims = dims_of(result)
    for node in result.graph.node:
        if node.op_type != "Gather" or attribute(node, "axis", 0) != 0:
            continue
        table, index = constants.get(node.input[0]), _uniform(node.input[1], writers, constants)
        following = readers.get(node.output[0], [])
        if table is None or table.ndim != 2 or index is None or len(following) != 1:
            continue
        (add,) = following
        others = [name for name in add.input if name != node.output[0]]
        if add.op_type != "Add" or len(others) != 1 or others[0] not in dims:
            continue
        if dims[others[0]] == dims.get(add.output[0]):
            row = stored(result, f"{node.output[0]}_row", table[int(index)])
            add.input[list(add.input).index(node.output[0])] = row
            _into_next_table(result, add, others[0], table[int(index)])
    return result


def _reads_all(
    node: NodeProto, writers: dict[str, NodeProto], constants: dict[str, Array], model: ModelProto
) -> bool:
    """Indices (N, 1, 1, S, 2) of (i, j), i over all texts and j over all positions."""
    indices = writers.get(node.input[1])
    if indices is None or indices.op_type != "Concat" or len(indices.input) != 2:
        return False
    source = node.input[0]
    while (writer := writers.get(source)) is not None and writer.op_type == "Cast":
        source = writer.input[0]
    if source not in {value.name for value in model.graph.input}:
        return False
    found = [_from_range(name, writers, constants) for name in indices.input]
    wanted = [(0, 5), (3, 5)]  # where the texts and the positions run, of (N, 1, 1, S, 1)
    return all(
        one is not None and one[1:] == place and _is_size(one[0], axis, writers)
        for axis, (one, place) in enumerate(zip(found, wanted, strict=True))
    )


def _from_range(
    name: str, writers: dict[str, NodeProto], constants: dict[str, Array]
) -> tuple[str, int, int] | None:
    """(limit of a Range from 0 by 1, its axis, rank), of a value that is views of one, or None."""
    views: list[Array] = []
    while (writer := writers.get(name)) is not None and writer.op_type in ("Unsqueeze", "Expand"):
        if writer.op_type == "Unsqueeze":
            views.insert(0, constants.get(writer.input[1], np.zeros(0, np.int64)).ravel())
        name = writer.input[0]
    if writer is None or writer.op_type != "Range":
        return None
    start, delta = (constants.get(writer.input[place]) for place in (0, 2))
    if start is None or delta is None or int(start) != 0 or int(delta) != 1:
        return None
    axis, rank = 0, 1
    for axes in views:
        rank += len(axes)
        new = {int(a) % rank for a in axes}
        axis = [place for place in range(rank) if place not in new][axis]
    return writer.input[1], axis, rank


def _is_size(name: str, axis: int, writers: dict[str, NodeProto]) -> bool:
    """It is the size of this axis of the tokens."""
    squeeze = writers.get(name)
    shape = writers.get(squeeze.input[0]) if squeeze is not None else None
    return (
        squeeze is not None
        and squeeze.op_type in ("Squeeze", "Reshape")
        and shape is not None
        and shape.op_type == "Shape"
        and shape.input[0] not in writers
        and attribute(shape, "start", 0) == axis
        and attribute(shape, "end", None) == axis + 1
    )


def _without_truth(
    node: NodeProto, writers: dict[str, NodeProto], constants: dict[str, Array]
) -> str | None:
    """The input of an And that is left when the other is true everywhere."""
    left, right = map(str, node.input)
    for truth, other in ((left, right), (right, left)):
        value = constants.get(truth)
        if value is not None and value.ndim == 0 and bool(value):
            return other
        writer = writers.get(truth)
        if writer is None or writer.op_type != "GreaterOrEqual":
            continue
        zero = constants.get(writer.input[1])
        holds = zero is not None and zero.ndim == 0 and int(zero) <= 0
        if holds and _from_range(writer.input[0], writers, constants):
            return other if _only_added(node, writers) else None
    return None


def _only_added(node: NodeProto, writers: dict[str, NodeProto]) -> bool:
    """Its value becomes, by Where, what is added to scores: sizes of 1 are spread there."""
    readers: dict[str, list[NodeProto]] = {}
    for writer in writers.values():
        for name in writer.input:
            readers.setdefault(name, []).append(writer)
    waiting = [node.output[0]]
    while waiting:
        for reader in readers.get(waiting.pop(), []):
            if reader.op_type in ("Where", "And", "Not", "Cast"):
                waiting.append(reader.output[0])
            elif reader.op_type != "Add":
                return False
    return True


def _into_next_table(model: ModelProto, add: NodeProto, other: str, row: Array) -> None:
    """other + row, and then rows of a constant table: the row goes into that table, in place."""
    constants, writers, readers = arrays(model), producers(model), consumers(model)
    following = readers.get(add.output[0], [])
    if len(following) != 1 or following[0].op_type != "Add":
        return
    (next_add,) = following
    looked_up = next((name for name in next_add.input if name != add.output[0]), "")
    gather = writers.get(looked_up)
    if gather is None or gather.op_type != "Gather" or attribute(gather, "axis", 0) != 0:
        return
    table = constants.get(gather.input[0])
    if table is None or table.ndim != 2 or len(readers[looked_up]) != 1:
        return
    gather.input[0] = stored(model, f"{looked_up}_with_type", table + row)
    next_add.input[list(next_add.input).index(add.output[0])] = other


def _uniform(name: str, writers: dict[str, NodeProto], constants: dict[str, Array]) -> int | None:
    """The one number that all of this value is, through views; None where it is not known."""
    while name not in constants:
        writer = writers.get(name)
        if writer is None or writer.op_type not in VIEWS:
            return None
        name = writer.input[0]
    values = constants[name]
    same = values.size and values.dtype.kind == "i" and bool((values == values.flat[0]).all())
    return int(values.flat[0]) if same else None


def dims_of(model: ModelProto) -> dict[str, Dims]:
    """Sizes of every value, free ones by their name; without those that have no name."""
    found: dict[str, Dims] = {}
    graph = onnx.shape_inference.infer_shapes(model).graph
    for value in (*graph.input, *graph.value_info, *graph.output):
        if value.type.tensor_type.HasField("shape"):
            sizes = [d.dim_param or d.dim_value for d in value.type.tensor_type.shape.dim]
            if all(sizes):
                found[value.name] = tuple(sizes)
    return found


def stored(model: ModelProto, name: str, value: Array) -> str:
    """Stores a constant, in place, once; its name."""
    if all(tensor.name != name for tensor in model.graph.initializer):
        model.graph.initializer.append(numpy_helper.from_array(np.ascontiguousarray(value), name))
    return name


def _without_identities(model: ModelProto) -> ModelProto:
    """Readers of an Identity read its source; outputs keep their names."""
    outputs = {value.name for value in model.graph.output}
    sources: dict[str, str] = {}
    kept = []
    for node in model.graph.node:
        for place, name in enumerate(node.input):
            node.input[place] = sources.get(name, name)
        if node.op_type == "Identity" and node.output[0] not in outputs:
            sources[node.output[0]] = node.input[0]
        else:
            kept.append(node)
    set_nodes(model, kept)
    return model
