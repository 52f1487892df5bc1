"""What becomes int8 in a text encoder, and what is done to keep the rest of it in float.

The products with weights, Gemm and MatMul, become int8; what is between them does not. Public int8
files of encoders lose their accuracy there: in residual sums and LayerNormalization a few channels
are tens of times larger than all others (Bondarenko et al. 2021, "Understanding and Overcoming the
Challenges of Efficient Transformer Quantization"), and one scale a tensor has to hold them.

`int8.py` writes by this; nothing here knows ranges.
"""

from __future__ import annotations

from collections.abc import Collection

from onnx import ModelProto

from .graph import all_nodes, arrays, consumers, producers

TEXT_OP_TYPES = ("Gemm", "MatMul")
TEXT_OP_REASON = (
    "a text encoder with LayerNormalization: its products with weights become int8, which are "
    "nearly all of its multiply-adds. Softmax, LayerNormalization, GELU, residual Adds and the "
    "products of two activations stay float: a few of their channels are far larger than all "
    "others, and one scale for all would lose the rest. Vision transformers keep the policy of "
    "images, under which they measured well"
)


def has_layer_norm(model: ModelProto) -> bool:
    """LayerNormalization, or (x - mean) / √(variance + ε) written out."""
    if any(node.op_type == "LayerNormalization" for node in all_nodes(model)):
        return True
    writers = producers(model)
    centred = {
        node.output[0]
        for node in model.graph.node
        if node.op_type == "Sub"
        and any(name in writers and writers[name].op_type == "ReduceMean" for name in node.input)
    }
    return any(node.op_type == "Div" and node.input[0] in centred for node in model.graph.node)


def activation_products(model: ModelProto) -> list[str]:
    """Gemm and MatMul without a constant matrix: of two activations, as in attention, or with a
    stack of matrices, for which there is no int8 kernel with a scale for each column."""
    constants = arrays(model)
    return [
        node.name
        for node in model.graph.node
        if node.op_type in TEXT_OP_TYPES
        and (node.input[1] not in constants or constants[node.input[1]].ndim != 2)
    ]


def own_biases(model: ModelProto) -> None:
    """Gives, in place, every Gemm a bias of its own: equal ones are stored once, and an int32 bias
    has the scale of its own layer, which a LayerNormalization with the same numbers has not."""
    stored = {tensor.name: tensor for tensor in model.graph.initializer}
    readers = consumers(model)
    for node in model.graph.node:
        if node.op_type != "Gemm" or len(node.input) < 3 or node.input[2] not in stored:
            continue
        if len(readers[node.input[2]]) > 1:
            own = model.graph.initializer.add()
            own.CopyFrom(stored[node.input[2]])
            own.name = node.input[2] = f"{node.output[0]}_own_bias"


def free_float_nodes(model: ModelProto, kept: Collection[str], op_types: Collection[str]) -> None:
    """Nodes that stay float read the float value, in place, not the rounded one beside it: a
    residual must not pass through 8 bits because a product reads it too."""
    writers = producers(model)
    for node in model.graph.node:
        if node.op_type in op_types and node.name not in kept:
            continue
        for place, name in enumerate(node.input):
            dequantize = writers.get(name)
            if dequantize is None or dequantize.op_type != "DequantizeLinear":
                continue
            source = writers.get(dequantize.input[0])
            if source is not None and source.op_type == "QuantizeLinear":
                node.input[place] = source.input[0]
    used = {name for node in model.graph.node for name in node.input}
    used |= {value.name for value in model.graph.output}
    unread = [n for n in model.graph.node if n.op_type == "DequantizeLinear"]
    for node in unread:
        if node.output[0] not in used:
            model.graph.node.remove(node)
