"""Graph rewrites of our own, each exact in real arithmetic: same function, other operators.

    fold_batchnorm   BatchNormalization → into the Conv or Gemm before it, else Mul + Add
    pool_means       ReduceMean over H and W → GlobalAveragePool, which has an int8 kernel

torch's exporter folds a BatchNormalization into the Conv before it and leaves the others (after an
Add, in pre-activation nets); int8 kernels exist for neither kind nor for ReduceMean. All functions
take a ModelProto and return a new one; the caller compares outputs on real samples.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
from onnx import ModelProto, NodeProto, helper, numpy_helper

from .graph import arrays, attribute, consumers, drop_unused_initializers, producers

Array = np.ndarray[Any, Any]


def normalise(model: ModelProto) -> ModelProto:
    """All rewrites, on a graph whose constants are initializers and whose nodes have names."""
    result = onnx.shape_inference.infer_shapes(constants_as_initializers(model))
    result = pool_means(fold_batchnorm(result))
    drop_unused_initializers(result)
    name_nodes(result)
    del result.graph.value_info[:]  # some describe values that are gone
    return onnx.shape_inference.infer_shapes(result)


def constants_as_initializers(model: ModelProto) -> ModelProto:
    """Constant nodes with a tensor become initializers: the quantizer looks for weights there."""
    result = copied(model)
    kept = []
    for node in result.graph.node:
        value = attribute(node, "value", None) if node.op_type == "Constant" else None
        if value is None:
            kept.append(node)
            continue
        tensor = result.graph.initializer.add()
        tensor.CopyFrom(value)
        tensor.name = node.output[0]
    set_nodes(result, kept)
    return result


def fold_batchnorm(model: ModelProto) -> ModelProto:
    """y = (x - mean) / √(var + ε) · scale + bias, as k·x + c with constants per channel.

    Folded into the Conv or Gemm that alone feeds it, where that has constant weights; otherwise
    written as Mul and Add. A node whose statistics are not constants is left, and so is one in
    training mode: both would be another function.
    """
    result = copied(model)
    constants = arrays(result)
    writers, readers = producers(result), consumers(result)
    outputs = {value.name for value in result.graph.output}
    nodes: list[NodeProto] = []
    for node in result.graph.node:
        if node.op_type != "BatchNormalization" or not _is_constant(node, constants):
            nodes.append(node)
            continue
        scale, shift = _scale_and_shift(node, constants)
        source = writers.get(node.input[0])
        alone = len(readers[node.input[0]]) == 1 and node.input[0] not in outputs
        if source is not None and alone and _can_absorb(source, constants):
            # in place: the node is already in `nodes`, because graphs are sorted
            _absorb(result, source, scale, shift)
            source.output[0] = node.output[0]
            writers[node.output[0]] = source
            constants = arrays(result)
        else:
            nodes += _as_mul_add(result, node, scale, shift)
    set_nodes(result, nodes)
    return result


def pool_means(model: ModelProto) -> ModelProto:
    """ReduceMean over the last two of four axes → GlobalAveragePool, Flatten if it drops them."""
    result = copied(model)
    constants = arrays(result)
    nodes: list[NodeProto] = []
    for node in result.graph.node:
        if not _is_spatial_mean(node, constants) or _rank(result, node.input[0]) != 4:
            nodes.append(node)
            continue
        output = node.output[0]
        if attribute(node, "keepdims", 1):
            nodes.append(in_place_of("GlobalAveragePool", [node.input[0]], output, node))
        else:
            pooled = f"{output}_pooled"
            nodes.append(in_place_of("GlobalAveragePool", [node.input[0]], pooled, node))
            nodes.append(in_place_of("Flatten", [pooled], output, node, axis=1))
    set_nodes(result, nodes)
    return result


def name_nodes(model: ModelProto) -> None:
    """Gives, in place, every node a name of its own: the quantizer selects nodes by name."""
    seen: set[str] = set()
    for index, node in enumerate(model.graph.node):
        if not node.name or node.name in seen:
            node.name = f"{node.op_type}_{index}"
        while node.name in seen:
            node.name += "_"
        seen.add(node.name)


def _is_constant(node: NodeProto, constants: dict[str, Array]) -> bool:
    statistics = list(node.input[1:5])
    return (
        all(name in constants for name in statistics)
        and not attribute(node, "training_mode", 0)
        and len([name for name in node.output if name]) == 1
    )


def _scale_and_shift(node: NodeProto, constants: dict[str, Array]) -> tuple[Array, Array]:
    """k and c of y = k·x + c, (C,) each, computed in float64."""
    scale, bias, mean, variance = (constants[name].astype(np.float64) for name in node.input[1:5])
    factor = scale / np.sqrt(variance + attribute(node, "epsilon", 1e-5))
    return factor, bias - mean * factor


def _can_absorb(source: NodeProto, constants: dict[str, Array]) -> bool:
    if source.op_type == "Gemm" and (
        attribute(source, "alpha", 1.0) != 1.0 or attribute(source, "beta", 1.0) != 1.0
    ):
        return False
    return source.op_type in ("Conv", "Gemm") and all(
        name in constants for name in source.input[1:] if name
    )


def _absorb(model: ModelProto, source: NodeProto, scale: Array, shift: Array) -> None:
    """W' = k·W and b' = k·b + c; new initializers, because others may read the old ones."""
    constants = arrays(model)
    weight = constants[source.input[1]]
    axis = 0 if source.op_type == "Conv" or attribute(source, "transB", 0) else 1
    along = [1] * weight.ndim
    along[axis] = -1
    bias = constants[source.input[2]] if len(source.input) > 2 and source.input[2] else 0.0
    stem = source.output[0]
    folded = {
        f"{stem}_folded_weight": weight * scale.reshape(along),
        f"{stem}_folded_bias": np.broadcast_to(bias, scale.shape) * scale + shift,
    }
    _add_initializers(model, folded)
    del source.input[1:]
    source.input.extend(folded)


def _as_mul_add(model: ModelProto, node: NodeProto, scale: Array, shift: Array) -> list[NodeProto]:
    """x (N, C, H, W): constants of (C, 1, 1) broadcast. A 2-D x (N, C) takes (C,)."""
    output = node.output[0]
    rank = _rank(model, node.input[0]) or 4
    shape = (-1,) + (1,) * (rank - 2)
    factor, offset, product = f"{output}_scale", f"{output}_shift", f"{output}_scaled"
    _add_initializers(model, {factor: scale.reshape(shape), offset: shift.reshape(shape)})
    return [
        in_place_of("Mul", [node.input[0], factor], product, node),
        in_place_of("Add", [product, offset], output, node),
    ]


def _rank(model: ModelProto, name: str) -> int | None:
    """Rank of a value as recorded in the graph, or None."""
    for value in (*model.graph.value_info, *model.graph.input):
        if value.name == name and value.type.tensor_type.HasField("shape"):
            return len(value.type.tensor_type.shape.dim)
    return None


def _is_spatial_mean(node: NodeProto, constants: dict[str, Array]) -> bool:
    """Axes are an input since opset 18, an attribute before."""
    if node.op_type != "ReduceMean":
        return False
    axes = attribute(node, "axes", None)
    if axes is None and len(node.input) > 1:
        axes = constants.get(node.input[1])
    return axes is not None and sorted(int(a) % 4 for a in np.ravel(axes)) == [2, 3]


def in_place_of(
    op: str, inputs: list[str], output: str, origin: NodeProto, **attributes: Any
) -> NodeProto:
    """A node named after the one that it replaces."""
    return helper.make_node(op, inputs, [output], name=f"{origin.name}_{op}", **attributes)


def _add_initializers(model: ModelProto, values: dict[str, Array]) -> None:
    model.graph.initializer.extend(
        numpy_helper.from_array(np.ascontiguousarray(value, dtype=np.float32), name)
        for name, value in values.items()
    )


def copied(model: ModelProto) -> ModelProto:
    """The graph again, to be changed in place."""
    result = ModelProto()
    result.CopyFrom(model)
    return result


def set_nodes(model: ModelProto, nodes: list[NodeProto]) -> None:
    """Puts these nodes, in this order, in place of the main graph's."""
    copies = [NodeProto.FromString(node.SerializeToString()) for node in nodes]
    del model.graph.node[:]
    model.graph.node.extend(copies)
