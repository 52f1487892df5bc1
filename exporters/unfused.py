"""Why a node of a QDQ graph stays float: the rules by which onnxruntime's CPU provider fuses.

Read from onnxruntime's qdq_selectors.cc and qdq_selector_action_transformer.cc (1.32): an int8
kernel replaces DequantizeLinear → node → QuantizeLinear when every tensor is 8 bits wide, the types
fit, and nobody else reads the float value. The portable graph is judged, so a reason is what the
author of the file can change. Says nothing about whether a node does run in int8; `engagement.py`
looks.
"""

from __future__ import annotations

from dataclasses import dataclass

import onnx
from onnx import ModelProto, NodeProto, TensorProto

from .graph import WEIGHTED_OPS, attribute, consumers, producers

# Operators of the registry: those that get a QLinear kernel, and those whose Q and DQ are dropped.
FUSABLE = frozenset(
    {"Conv", "Gemm", "MatMul", "Add", "Mul", "AveragePool", "GlobalAveragePool", "LeakyRelu",
     "Sigmoid", "Softmax", "Concat", "Split", "Where", "ArgMax", "Reshape", "Transpose", "Gather",
     "Slice", "MaxPool", "Resize", "Squeeze", "Unsqueeze", "Flatten", "Expand"}
)  # fmt: skip
# Fuse without a QuantizeLinear after them: QGemm and MatMulIntegerToFloat write floats.
FREE_OUTPUT = frozenset({"Gemm", "MatMul"})
ABSORBED = frozenset({"Relu", "Clip"})
EIGHT_BITS = frozenset({TensorProto.UINT8, TensorProto.INT8})


@dataclass(frozen=True)
class View:
    """What the rules look at, found once."""

    writers: dict[str, NodeProto]
    readers: dict[str, list[NodeProto]]
    stored: dict[str, TensorProto]
    outputs: frozenset[str]

    @classmethod
    def of(cls, model: ModelProto) -> View:
        return cls(
            producers(model),
            consumers(model),
            {tensor.name: tensor for tensor in model.graph.initializer},
            frozenset(value.name for value in model.graph.output),
        )

    def is_dequantized(self, name: str) -> bool:
        writer = self.writers.get(name)
        return writer is not None and writer.op_type == "DequantizeLinear"


def why_float(node: NodeProto, view: View) -> str:
    """The first rule that keeps this node float, in words.

    Args:
        node: of the portable graph, or one that fusion made and that has no 8-bit kernel.
    """
    if node.op_type in ABSORBED:
        return (
            f"{node.op_type} is not absorbed: only a Conv, Gemm or Add before it would take it in, "
            "and only if the range of QuantizeLinear ends where it clips"
        )
    if node.op_type not in FUSABLE:
        return f"onnxruntime has no int8 kernel for {node.op_type}"
    return (
        _about_inputs(node, view)
        or _about_types(node, view)
        or _about_output(node, view)
        or _about_attributes(node)
        or "onnxruntime did not fuse it, though it meets the rules known here"
    )


def _about_inputs(node: NodeProto, view: View) -> str | None:
    around = [view.writers[name] for name in node.input if name in view.writers]
    kinds = {n.op_type for n in (*around, *_readers(node, view))}
    if not kinds & {"DequantizeLinear", "QuantizeLinear"}:
        return "kept float: no DequantizeLinear before it and no QuantizeLinear after it"
    if node.op_type in WEIGHTED_OPS and node.input[1] in view.stored:
        return "its weight is kept float"
    for place, name in enumerate(node.input[:2]):
        if not name or (
            place == 1 and node.op_type not in ("Conv", "Gemm", "MatMul", "Add", "Mul")
        ):
            continue
        if view.is_dequantized(name):
            continue
        writer = view.writers.get(name)
        if name in view.stored:
            return f"its constant {name} is kept float"
        source = f"written by {writer.op_type} in float" if writer is not None else "a graph input"
        return f"its input {name} is {source}, without DequantizeLinear before it"
    return None


def _about_types(node: NodeProto, view: View) -> str | None:
    inputs = [
        _zero_point_type(view.writers[name], view)
        for name in node.input[:2]
        if view.is_dequantized(name)
    ]
    outputs = [
        _zero_point_type(reader, view)
        for reader in _readers(node, view)
        if reader.op_type == "QuantizeLinear"
    ]
    wide = [_name(kind) for kind in (*inputs, *outputs) if kind not in EIGHT_BITS]
    if wide:
        return f"its Q or DQ is {wide[0]}; int8 kernels need 8 bits"
    if inputs and outputs and inputs[0] != outputs[0]:
        return (
            f"its input is {_name(inputs[0])} and its output {_name(outputs[0])}; they must agree"
        )
    if inputs[:2] == [TensorProto.INT8, TensorProto.UINT8]:
        return "its input is int8 and its weight uint8, for which there is no kernel"
    if node.op_type in ("Conv", "Gemm") and len(node.input) > 2 and node.input[2]:
        if not view.is_dequantized(node.input[2]):
            return "its bias is float; int8 kernels need int32 behind DequantizeLinear"
        stored = view.stored.get(view.writers[node.input[2]].input[0])
        if stored is not None and stored.data_type != TensorProto.INT32:
            return f"its bias is {_name(stored.data_type)}; int8 kernels need int32"
    return None


def _about_output(node: NodeProto, view: View) -> str | None:
    kinds = {reader.op_type for reader in _readers(node, view)}
    if node.op_type in FREE_OUTPUT and len(kinds) > 1 and "QuantizeLinear" in kinds:
        named = ", ".join(sorted(kinds - {"QuantizeLinear"}))
        return f"its output goes on in int8 and, to {named}, in float; a kernel writes one of them"
    if node.op_type in FREE_OUTPUT:
        return None
    if any(name in view.outputs for name in node.output):
        return "its output is a graph output, without QuantizeLinear after it"
    readers = _readers(node, view)
    others = sorted({reader.op_type for reader in readers if reader.op_type != "QuantizeLinear"})
    if others:
        return f"its output goes on in float to {', '.join(others)}"
    if len(readers) > len([name for name in node.output if name]):
        return f"its output is quantized {len(readers)} times, which fits no single int8 kernel"
    return None


def _about_attributes(node: NodeProto) -> str | None:
    if node.op_type == "Gemm" and attribute(node, "beta", 1.0) != 1.0:
        return f"its beta is {attribute(node, 'beta', 1.0):g}; QGemm has only 1"
    return None


def _readers(node: NodeProto, view: View) -> list[NodeProto]:
    return [reader for name in node.output for reader in view.readers.get(name, ())]


def _zero_point_type(node: NodeProto, view: View) -> int:
    """Element type that a Q writes or a DQ reads. Without a zero point it is uint8, or the
    stored tensor's own."""
    named = node.input[2] if len(node.input) > 2 else ""
    if named in view.stored:
        return int(view.stored[named].data_type)
    if node.input[0] in view.stored:
        return int(view.stored[node.input[0]].data_type)
    return int(TensorProto.UINT8)


def _name(kind: int) -> str:
    return str(onnx.helper.tensor_dtype_to_np_dtype(kind))
