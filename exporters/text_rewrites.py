"""Graph rewrites of text encoders, each exact in real arithmetic: same function, fewer operators.

    flatten_tokens      hidden states as (N · S, D) from end to end, so that MatMul + Add is a Gemm,
                        whose int8 kernel adds the bias in int32
    fusable_gelu        x · (½ · (1 + erf)) → (x · (1 + erf)) · ½, one Gelu to onnxruntime

What comes before the first layer is in `text_inputs.py`.

Shapes are those that torch's exporter writes beside the values; where they are missing, or nodes
are others than the patterns know, the graph stays as it is. All functions take a ModelProto and
return a new one; the caller compares outputs on real samples.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
from onnx import ModelProto, NodeProto, helper

from .feeds import is_text
from .graph import (
    all_graphs,
    arrays,
    attribute,
    consumers,
    drop_unused_initializers,
    producers,
    sort_nodes,
)
from .rewrites import constants_as_initializers, copied, name_nodes, set_nodes
from .text_inputs import Dims, dims_of, mask_by_unsqueeze, one_type, stored

Array = np.ndarray[Any, Any]

# Each position by itself, along D only.
UNARY = frozenset(
    {"Erf", "Tanh", "Relu", "Sigmoid", "Gelu", "Softplus", "Sqrt", "Neg", "Exp", "Identity"}
)
BINARY = frozenset({"Add", "Sub", "Mul", "Div", "Pow"})


def normalise_text(model: ModelProto) -> ModelProto:
    """All rewrites, of a graph whose inputs are tokens; any other graph is returned as it is, and
    so is one with graphs inside (If, Loop), which read values by their names."""
    if not is_text(model) or len([*all_graphs(model)]) > 1:
        return model
    result = constants_as_initializers(model)
    name_nodes(result)
    for rewrite in (mask_by_unsqueeze, one_type, fusable_gelu, flatten_tokens):
        result = rewrite(result)
    _drop_dead(result)
    del result.graph.value_info[:]  # some describe values that are gone
    return onnx.shape_inference.infer_shapes(result)


def flatten_tokens(model: ModelProto) -> ModelProto:
    """Hidden states (N, S, D) → (N · S, D) wherever nodes treat positions one by one.

    A MatMul by a constant matrix becomes a Gemm, with the Add of its bias where it has one; without
    one too, or onnxruntime would make it one with the residual that is added next, in float.
    """
    result = copied(model)
    constants = arrays(result)
    dims = dims_of(result)
    writers = producers(result)
    region = _around_products(
        [node for node in result.graph.node if _is_tokenwise(node, constants, dims, result)]
    )
    flat: dict[str, str] = {}  # value (N, S, D) → its flat form
    nodes: list[NodeProto] = []
    for node in list(result.graph.node):
        if node.output[0] not in region:
            nodes.append(node)
            continue
        for place, name in enumerate(node.input):
            if name and name not in constants and name not in flat:
                nodes.append(_flattened(name, writers.get(name), dims, result))
                flat[name] = nodes[-1].output[0]
            if name in flat:
                node.input[place] = flat[name]
        flat[node.output[0]] = f"{node.output[0]}_flat"
        node.output[0] = flat[node.output[0]]
        if node.op_type == "LayerNormalization":
            _set_axis(node)
        nodes.append(node)
    _restore_readers(result, nodes, region, flat, dims)
    set_nodes(result, nodes)
    sort_nodes(result)
    return _as_gemms(result)


def fusable_gelu(model: ModelProto) -> ModelProto:
    """The order of the exact GELU's products that onnxruntime's fusion knows (gelu_fusion.cc)."""
    result = copied(model)
    constants, writers, readers = arrays(result), producers(result), consumers(result)
    for node in result.graph.node:
        half = next((i for i in node.input if _is_half(i, writers, constants)), None)
        if node.op_type != "Mul" or half is None or len(readers[half]) != 1:
            continue
        inner = writers[half]
        one_plus = next(name for name in inner.input if name not in constants)
        x = next(name for name in node.input if name != half)
        constant = next(name for name in inner.input if name in constants)
        inner.input[:] = [x, one_plus]
        node.input[:] = [half, constant]
    sort_nodes(result)
    return result


# flatten_tokens


def _around_products(nodes: list[NodeProto]) -> set[str]:
    """Outputs of those of these nodes that are joined, by each other, to a MatMul."""
    outputs = {node.output[0] for node in nodes}
    joined = {node.output[0] for node in nodes if node.op_type == "MatMul"}
    grown = True
    while grown:
        before = len(joined)
        for node in nodes:
            near = {*node.input, node.output[0]} & outputs
            if near & joined:
                joined |= near
        grown = len(joined) > before
    return joined


def _is_hidden(name: str, dims: dict[str, Dims], model: ModelProto) -> bool:
    """(N, S, D), with N and S those of the tokens."""
    sizes = dims.get(name, ())
    tokens = dims.get(model.graph.input[0].name, ())
    return len(sizes) == 3 and sizes[:2] == tokens and isinstance(sizes[2], int)


def _is_tokenwise(
    node: NodeProto, constants: dict[str, Array], dims: dict[str, Dims], model: ModelProto
) -> bool:
    if len(node.output) != 1 or not _is_hidden(node.output[0], dims, model):
        return False
    given = [name for name in node.input if name]
    hidden = [name for name in given if _is_hidden(name, dims, model)]
    fixed = [constants[name] for name in given if name in constants]
    if not hidden or len(hidden) + len(fixed) != len(given):
        return False
    if node.op_type == "MatMul":
        return node.input[0] in hidden and len(fixed) == 1 and fixed[0].ndim == 2
    if node.op_type == "LayerNormalization":
        return attribute(node, "axis", -1) in (-1, 2)
    if node.op_type in BINARY:
        return all(value.ndim <= 1 for value in fixed)
    return node.op_type in UNARY


def _flattened(
    name: str, writer: NodeProto | None, dims: dict[str, Dims], model: ModelProto
) -> NodeProto:
    """Reshape to (-1, D); of what is only a view anyway, from its source."""
    source = writer.input[0] if writer is not None and writer.op_type == "Reshape" else name
    width = dims[name][2]
    shape = stored(model, f"flat_{width}", np.array([-1, width], np.int64))
    return helper.make_node("Reshape", [source, shape], [f"{name}_flat"], name=f"{name}_flatten")


def _set_axis(node: NodeProto) -> None:
    for entry in node.attribute:
        if entry.name == "axis":
            entry.i = -1


def _restore_readers(
    model: ModelProto, nodes: list[NodeProto], region: set[str], flat: dict[str, str],
    dims: dict[str, Dims],
) -> None:  # fmt: skip
    """Who reads (N, S, D) still gets it; a Reshape to absolute sizes needs no more than the
    values."""
    constants, writers = arrays(model), producers(model)
    outputs = {value.name for value in model.graph.output}
    needed = set(outputs & region)
    for node in nodes:
        for place, name in enumerate(node.input):
            if name not in region:
                continue
            if node.op_type == "Reshape" and place == 0 and _is_absolute(node, writers, constants):
                node.input[0] = flat[name]
            else:
                needed.add(name)
    tokens = model.graph.input[0].name
    if needed:
        nodes.append(helper.make_node("Shape", [tokens], ["tokens_shape"], name="tokens_shape"))
    for name in sorted(needed):
        width = stored(model, f"width_{dims[name][2]}", np.array([dims[name][2]], np.int64))
        shape = f"{name}_shape"
        nodes += [
            helper.make_node("Concat", ["tokens_shape", width], [shape], name=shape, axis=0),
            helper.make_node("Reshape", [flat[name], shape], [name], name=f"{name}_unflatten"),
        ]


def _is_absolute(
    node: NodeProto, writers: dict[str, NodeProto], constants: dict[str, Array]
) -> bool:
    """Its target has no 0 that stands for the input's own size."""
    if attribute(node, "allowzero", 0):
        return True
    target = node.input[1]
    if target in constants:
        return bool((constants[target] != 0).all())
    writer = writers.get(target)
    parts = writer.input if writer is not None and writer.op_type == "Concat" else []
    return bool(parts) and all((constants[p] != 0).all() for p in parts if p in constants)


def _as_gemms(model: ModelProto) -> ModelProto:
    """MatMul of flat tokens by a constant → Gemm, with the Add of a constant (D,) that alone reads
    it."""
    constants, readers = arrays(model), consumers(model)
    outputs = {value.name for value in model.graph.output}
    dropped: set[str] = set()
    for node in model.graph.node:
        if node.op_type != "MatMul" or not node.output[0].endswith("_flat"):
            continue
        node.op_type = "Gemm"
        following = readers.get(node.output[0], [])
        if len(following) != 1 or following[0].op_type != "Add" or node.output[0] in outputs:
            continue
        (add,) = following
        bias = next((name for name in add.input if name in constants), "")
        width = constants[node.input[1]].shape[1]
        if bias and constants[bias].shape == (width,):
            # torch stores equal biases once; an int8 bias has the scale of its own layer
            own = stored(model, f"{add.output[0]}_bias", constants[bias])
            node.input.append(own)
            dropped.add(add.name)
            node.output[0] = add.output[0]
    set_nodes(model, [node for node in model.graph.node if node.name not in dropped])
    sort_nodes(model)
    return model


def _is_half(name: str, writers: dict[str, NodeProto], constants: dict[str, Array]) -> bool:
    """½ · (1 + erf(…))."""
    node = writers.get(name)
    if node is None or node.op_type != "Mul":
        return False
    scalars = [constants[i] for i in node.input if i in constants]
    sums = [writers[i] for i in node.input if i in writers]
    if len(scalars) != 1 or scalars[0].size != 1 or float(scalars[0].ravel()[0]) != 0.5:
        return False
    return (
        len(sums) == 1
        and sums[0].op_type == "Add"
        and any(i in writers and writers[i].op_type == "Erf" for i in sums[0].input)
        and any(i in constants and (constants[i] == 1).all() for i in sums[0].input)
    )


# graphs


def _drop_dead(model: ModelProto) -> None:
    """Removes, in place, nodes whose values nobody reads."""
    while True:
        used = {name for node in model.graph.node for name in node.input}
        used |= {value.name for value in model.graph.output}
        kept = [node for node in model.graph.node if used & set(node.output)]
        if len(kept) == len(model.graph.node):
            break
        set_nodes(model, kept)
    drop_unused_initializers(model)
