"""A float ONNX graph as a torch network that can be trained, and back.

Initializers become parameters (weights and biases of Conv, Gemm and MatMul) or constants; nodes run
in graph order, each by one function of `torch_ops.OPS`. Equal to onnxruntime but for rounding. The
graph is the one that ships: its BatchNormalization is folded already (exporters/simplify.py), so
training sees the same weights and the same statistics as the file, and there is no second graph to
keep in step. Knows no quantization; `fake_quant.py` puts it in through `run`.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from onnx import AttributeProto, ModelProto, NodeProto, helper, numpy_helper
from torch import Tensor, nn

from ...exporters.graph import WEIGHTED_OPS, arrays, producers
from ...exporters.rewrites import constants_as_initializers, name_nodes
from ..errors import ExportError
from .torch_ops import IGNORED, OPS, Op

OLDEST_OPSET = 13  # before it Softmax flattened its input
Place = tuple[str, int]  # node name, position among its inputs
Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Step:
    """A node, ready to run. last: values that no later node reads."""

    name: str
    op: Op
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    attributes: Mapping[str, Any]
    last: tuple[str, ...]


class GraphModule(nn.Module):
    """The graph's function: inputs in the graph's order → its output, or a tuple of several.

    Raises:
        ExportError: an operator, an attribute or an opset that has no function here.
    """

    def __init__(self, model: ModelProto) -> None:
        super().__init__()
        self._model = constants_as_initializers(model)
        name_nodes(self._model)
        _check_opset(self._model)
        graph = self._model.graph
        stored = arrays(self._model)
        trained = trainable(self._model)
        self._outputs = [value.name for value in graph.output]
        self._inputs = [value.name for value in graph.input if value.name not in stored]
        self.weights = nn.ParameterDict()
        self.constants = nn.Module()  # float tensors that are not trained, as buffers
        self._fixed: dict[str, Tensor] = {}  # whole numbers and scalars: they stay on the CPU
        for name, array in stored.items():
            tensor = torch.from_numpy(np.array(array))
            if name in trained:
                self.weights[_key(name)] = nn.Parameter(tensor)
            elif tensor.is_floating_point() and tensor.ndim:
                self.constants.register_buffer(_key(name), tensor)
            else:
                self._fixed[name] = tensor
        self._names = list(stored)
        self._steps = list(_steps(self._model))

    def forward(self, *inputs: Tensor) -> Tensor | tuple[Tensor, ...]:
        return self.run(*inputs)

    def run(
        self,
        *inputs: Tensor,
        through: Callable[[str, Tensor], Tensor] | None = None,
        instead: Mapping[Place, Tensor] | None = None,
        absorbed: Collection[str] = (),
    ) -> Tensor | tuple[Tensor, ...]:
        """`forward`, with a hand in it.

        Args:
            through: what each graph input and each node's output goes through, by its name.
            instead: tensors for single inputs of nodes, in place of the graph's own.
            absorbed: names of nodes whose first input passes as it is.
        """
        values = {name: self.tensor(name) for name in self._names}
        for name, tensor in zip(self._inputs, inputs, strict=True):
            values[name] = tensor if through is None else through(name, tensor)
        replaced = instead or {}
        for step in self._steps:
            given = [
                replaced[step.name, position]
                if (step.name, position) in replaced
                else (values[name] if name else None)
                for position, name in enumerate(step.inputs)
            ]
            found = given[0] if step.name in absorbed else step.op(*given, **step.attributes)
            results = found if isinstance(found, tuple) else (found,)
            for name, result in zip(step.outputs, results, strict=False):
                assert result is not None
                values[name] = result if through is None else through(name, result)
            for name in step.last:
                values.pop(name, None)
        outputs = tuple(values[name] for name in self._outputs)
        return outputs[0] if len(outputs) == 1 else outputs

    def tensor(self, name: str) -> Tensor:
        """The parameter or constant that holds the initializer `name`."""
        if name in self._fixed:
            return self._fixed[name]
        key = _key(name)
        if key in self.weights:
            weight: Tensor = self.weights[key]
            return weight
        constant: Tensor = self.constants.get_buffer(key)
        return constant

    def to_model(self) -> ModelProto:
        """The float graph with the parameters as they are now; names and nodes are the given ones.

        Constant nodes have become initializers, and nodes without a name have one.
        """
        model = ModelProto()
        model.CopyFrom(self._model)
        for stored in model.graph.initializer:
            if _key(stored.name) in self.weights:
                array = self.weights[_key(stored.name)].detach().cpu().contiguous().numpy()
                stored.CopyFrom(numpy_helper.from_array(array, stored.name))
        return model


def trainable(model: ModelProto) -> set[str]:
    """Float initializers that are a weight or a bias of a Conv, Gemm or MatMul.

    The bias of a MatMul is the Add of a constant that alone reads it.
    """
    stored = {name for name, array in arrays(model).items() if array.dtype == np.float32}
    writers = producers(model)
    found: set[str] = set()
    for node in model.graph.node:
        if node.op_type == "MatMul":
            found |= set(node.input)
        elif node.op_type in WEIGHTED_OPS:
            found |= set(node.input[1:3])
        elif node.op_type == "Add" and any(
            name in writers and writers[name].op_type == "MatMul" for name in node.input
        ):
            found |= set(node.input)
    return found & stored


def _key(name: str) -> str:
    """Names of modules and parameters may hold no dot, and must not be those of methods."""
    return "onnx:" + name.replace("%", "%25").replace(".", "%2E")


def _check_opset(model: ModelProto) -> None:
    opset = next((o.version for o in model.opset_import if o.domain in ("", "ai.onnx")), 0)
    if opset < OLDEST_OPSET:
        raise ExportError(
            f"quantize.qat: the graph has opset {opset}, expected {OLDEST_OPSET} or newer; export "
            "it again, or leave out QAT (quantize.qat: null)"
        )


def _steps(model: ModelProto) -> Iterator[Step]:
    final = {value.name for value in model.graph.output}
    last_reader = {name: i for i, node in enumerate(model.graph.node) for name in node.input}
    for index, node in enumerate(model.graph.node):
        op = OPS.get(node.op_type) if node.domain in ("", "ai.onnx") else None
        attributes = _attributes(node)
        problem = "" if op is None else _refusal(op, node, attributes)
        if op is None or problem:
            raise ExportError(
                f"quantize.qat: node {node.name!r}: {node.op_type}{problem} cannot be trained; "
                "leave out QAT (quantize.qat: null, or quantize.mode: ptq), or write the network "
                "without it"
            )
        yield Step(
            name=node.name,
            op=op,
            inputs=tuple(node.input),
            outputs=tuple(node.output),
            attributes=attributes,
            last=tuple(name for name in {*node.input} - final - {""} if last_reader[name] == index),
        )


def _attributes(node: NodeProto) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for entry in node.attribute:
        value = helper.get_attribute_value(entry)
        if entry.type == AttributeProto.STRING:
            value = value.decode()
        elif entry.type == AttributeProto.TENSOR:
            value = torch.from_numpy(np.array(numpy_helper.to_array(value)))
        if entry.name not in IGNORED.get(node.op_type, ()):
            found[entry.name] = value
    return found


def _refusal(op: Op, node: NodeProto, attributes: Mapping[str, Any]) -> str:
    """What of the node its function does not know, or nothing."""
    try:
        known = set(inspect.signature(op).parameters)
    except ValueError:  # a function of torch's own: an operator without attributes
        known = set()
    unknown = sorted(set(attributes) - known)
    if unknown:
        return f" with {', '.join(unknown)}"
    return (
        " with a second output"
        if len([n for n in node.output[1:] if n]) and not _many(node)
        else ""
    )


def _many(node: NodeProto) -> bool:
    return node.op_type == "Split"
