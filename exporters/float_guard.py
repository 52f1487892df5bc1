"""Keeps a layer float where onnxruntime would make it int8 by itself.

onnxruntime makes the weights of every Conv and Gemm int8, per tensor, that it finds between a
DequantizeLinear and a QuantizeLinear, with at most Relu and Clip on the way
(onnxruntime/core/optimizer/qdq_transformer/weight_bias_quantization.cc): the layer that was to stay
float would be rounded worse than before. A LeakyRelu of slope 1, which is the identity, is none of
these, and is fused into the layer (FusedConv, FusedGemm), so that it costs no time.
"""

from __future__ import annotations

from collections.abc import Collection

from onnx import ModelProto, NodeProto, helper

from .graph import consumers, producers

MADE_INT8 = frozenset({"Conv", "ConvTranspose", "Gemm"})
ON_THE_WAY = frozenset({"Relu", "Clip"})


def guard(model: ModelProto, names: Collection[str]) -> list[str]:
    """Put the identity behind the nodes of these names, in place, where they need it.

    Args:
        model: QDQ, its nodes in any order; they have to be sorted afterwards.

    Returns:
        Names of the nodes that needed it, in graph order.
    """
    writers, readers = producers(model), consumers(model)
    guarded = [
        node
        for node in model.graph.node
        if node.name in names and node.op_type in MADE_INT8 and _is_between(node, writers, readers)
    ]
    for node in guarded:
        result = node.output[0]
        node.output[0] = f"{result}_kept_float"
        identity = helper.make_node(
            "LeakyRelu", [node.output[0]], [result], name=f"{node.name}_kept_float", alpha=1.0
        )
        model.graph.node.append(identity)
    return [node.name for node in guarded]


def _is_between(
    node: NodeProto, writers: dict[str, NodeProto], readers: dict[str, list[NodeProto]]
) -> bool:
    source = writers.get(node.input[0])
    if source is None or source.op_type != "DequantizeLinear":
        return False
    reader = node
    while True:
        following = readers.get(reader.output[0], [])
        if len(following) != 1:
            return False
        reader = following[0]
        if reader.op_type == "QuantizeLinear":
            return True
        if reader.op_type not in ON_THE_WAY:
            return False
