"""Small questions about a ModelProto that several exporters ask. Pure but for `read_model`.

Not an editing framework: a rewrite that needs more than these functions belongs in `rewrites.py`.
Terms follow the ONNX IR specification (onnx/docs/IR.md).
"""

from __future__ import annotations

import heapq
from collections.abc import Collection, Iterator
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

import numpy as np
import onnx
from google.protobuf.message import DecodeError  # type: ignore[import-untyped,unused-ignore]
from onnx import AttributeProto, GraphProto, ModelProto, NodeProto, TensorProto, numpy_helper

from ..models.paths import matching, near
from ..pipeline.errors import ExportError

# What marks a graph as quantized. DequantizeLinear alone is enough: weights may be stored int8.
QUANTIZED_OPS = frozenset(
    {"QuantizeLinear", "DequantizeLinear", "DynamicQuantizeLinear", "ConvInteger", "MatMulInteger",
     "QLinearConv", "QLinearMatMul", "QGemm", "DynamicQuantizeMatMul", "MatMulNBits"}
)  # fmt: skip
# Operators whose second input is a weight that int8 kernels exist for.
WEIGHTED_OPS = frozenset({"Conv", "Gemm", "MatMul"})
# All that multiply and add; MatMulInteger is a MatMul of dynamic int8 in the portable file.
PRODUCT_OPS = WEIGHTED_OPS | {"MatMulInteger"}


def read_model(path: Path) -> ModelProto:
    """The graph in `path`, weights included.

    Raises:
        ExportError: no such file, not an ONNX file, or weights kept outside the file's own folder.
    """
    try:
        model = onnx.load(path, load_external_data=False)
    except FileNotFoundError as error:
        raise ExportError(f"{path}: no such file; expected an ONNX model") from error
    except OSError as error:
        raise ExportError(
            f"{path}: cannot be read: {error.strerror}; expected an ONNX model"
        ) from error
    except (DecodeError, ValueError) as error:
        raise ExportError(
            f"{path}: not an ONNX file ({error}); export it again or check the path"
        ) from error
    if not model.graph.node and not model.graph.output:
        raise ExportError(f"{path}: not an ONNX file (no graph inside); check the path")
    refuse_escaping_data(model, path)
    if any(external_locations(model)):
        try:
            onnx.load_external_data_for_model(model, str(path.parent))
        except (OSError, ValueError, onnx.checker.ValidationError) as error:
            raise ExportError(
                f"{path}: its external weights cannot be read ({error}); keep them beside the "
                "file, or export with the weights inside"
            ) from error
    return model


def refuse_escaping_data(model: ModelProto, path: Path) -> None:
    """Raises ExportError when external weights are named by an absolute path or through `..`."""
    for location in external_locations(model):
        posix, windows = PurePosixPath(location), PureWindowsPath(location)
        if (
            posix.is_absolute()
            or windows.is_absolute()
            or windows.drive
            or ".." in posix.parts
            or ".." in windows.parts
        ):
            raise ExportError(
                f"{path}: its weights lie in {location!r}, and a model may only read files beside "
                "itself; export it again with the weights inside (external_data=False)"
            )


def external_locations(model: ModelProto) -> Iterator[str]:
    """Names of the files that hold tensors of this model, as they are written in it."""
    for tensor in all_tensors(model):
        if tensor.data_location == TensorProto.EXTERNAL:
            yield next((e.value for e in tensor.external_data if e.key == "location"), "")


def all_tensors(model: ModelProto) -> Iterator[TensorProto]:
    """Every stored tensor: initializers, dense parts of sparse ones, and attributes."""
    for graph in all_graphs(model):
        yield from graph.initializer
        for sparse in graph.sparse_initializer:
            yield from (sparse.values, sparse.indices)
    for node in all_nodes(model):
        for attribute in node.attribute:
            if attribute.type == AttributeProto.TENSOR:
                yield attribute.t
            yield from attribute.tensors


def all_graphs(model: ModelProto) -> Iterator[GraphProto]:
    """The main graph and every graph inside an attribute, at any depth."""
    yield model.graph
    for node in all_nodes(model):
        yield from _subgraphs(node)


def all_nodes(model: ModelProto) -> Iterator[NodeProto]:
    """Every node: of the main graph, of the graphs inside attributes, of local functions."""
    waiting = [*model.graph.node, *(node for f in model.functions for node in f.node)]
    while waiting:
        node = waiting.pop(0)
        yield node
        waiting.extend(inner for graph in _subgraphs(node) for inner in graph.node)


def _subgraphs(node: NodeProto) -> Iterator[GraphProto]:
    for attribute in node.attribute:
        if attribute.type == AttributeProto.GRAPH:
            yield attribute.g
        yield from attribute.graphs


def attribute(node: NodeProto, name: str, default: Any) -> Any:
    """Value of the node's attribute, or `default`."""
    for candidate in node.attribute:
        if candidate.name == name:
            return onnx.helper.get_attribute_value(candidate)
    return default


def arrays(model: ModelProto) -> dict[str, np.ndarray[Any, Any]]:
    """Initializers of the main graph by name."""
    return {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}


def producers(model: ModelProto) -> dict[str, NodeProto]:
    """The node that writes each value of the main graph."""
    return {name: node for node in model.graph.node for name in node.output if name}


def consumers(model: ModelProto) -> dict[str, list[NodeProto]]:
    """The nodes of the main graph that read each value, in graph order."""
    readers: dict[str, list[NodeProto]] = {}
    for node in model.graph.node:
        for name in node.input:
            if name:
                readers.setdefault(name, []).append(node)
    return readers


def is_quantized(model: ModelProto) -> bool:
    return any(node.op_type in QUANTIZED_OPS for node in all_nodes(model))


def matching_nodes(model: ModelProto, patterns: Collection[str], *, where: str) -> frozenset[str]:
    """Names of the nodes that the patterns (exact or globs) name.

    Raises:
        ExportError: a pattern matches nothing; near names are said.
    """
    names = [node.name for node in model.graph.node]
    found: set[str] = set()
    for pattern in patterns:
        matched = matching(pattern, names)
        if not matched:
            raise ExportError(
                f"{where}: {pattern!r} matches no node of the float graph; {near(pattern, names)}"
            )
        found |= set(matched)
    return frozenset(found)


def batch_size(model: ModelProto) -> int | None:
    """The fixed first dimension of the first input, or None where it is free."""
    dim = model.graph.input[0].type.tensor_type.shape.dim
    return int(dim[0].dim_value) or None if dim else None


def sort_nodes(model: ModelProto) -> None:
    """Puts the main graph's nodes, in place, into an order where each comes after its inputs.

    The given order is kept wherever it may be, so the result depends on nothing else.
    """
    missing = {
        index: {name for name in node.input if name} | _captured(node)
        for index, node in enumerate(model.graph.node)
    }
    written = {name for node in model.graph.node for name in node.output}
    waiting: dict[str, list[int]] = {}
    for index, names in missing.items():
        names &= written
        for name in names:
            waiting.setdefault(name, []).append(index)
    ready = [index for index, names in missing.items() if not names]
    order: list[int] = []
    while ready:
        index = heapq.heappop(ready)
        order.append(index)
        for name in model.graph.node[index].output:
            for reader in waiting.get(name, ()):
                missing[reader].discard(name)
                if not missing[reader]:
                    heapq.heappush(ready, reader)
    if len(order) != len(model.graph.node):
        raise ExportError("the graph has a cycle; it was not written by a conforming exporter")
    nodes = [NodeProto.FromString(model.graph.node[i].SerializeToString()) for i in order]
    del model.graph.node[:]
    model.graph.node.extend(nodes)


def _captured(node: NodeProto) -> set[str]:
    """Values that the graphs inside a node's attributes may read from around them."""
    inner = [n for graph in _subgraphs(node) for n in graph.node]
    return {name for n in inner for name in n.input if name} | {
        name for n in inner for name in _captured(n)
    }


def drop_unused_initializers(model: ModelProto) -> None:
    """Removes, in place, initializers that no node reads and that are no graph output."""
    used = {name for node in all_nodes(model) for name in node.input}
    used.update(output.name for output in model.graph.output)
    kept = [tensor for tensor in model.graph.initializer if tensor.name in used]
    del model.graph.initializer[:]
    model.graph.initializer.extend(kept)
