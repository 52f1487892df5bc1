"""Where Q and DQ stand in an int8 graph, in the names of the float graph it was written from.

Read from the file that `exporters/int8.py` has written, so that training rounds exactly where the
file does: what the writer leaves in float stays float here too. Nodes are matched by their names.
Pure; knows no torch.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from onnx import ModelProto, NodeProto

from ...exporters.graph import arrays, attribute, producers
from ...exporters.int8_check import ABSORBED_OPS, clip_bounds
from ...exporters.rewrites import constants_as_initializers, name_nodes
from ..errors import ExportError
from .graph_module import Place

Array = np.ndarray[Any, Any]

LEVELS = 256  # of uint8
REDUCED, FULL = 64, 127  # largest absolute integer of a 7-bit and of an 8-bit weight
# A stored weight is its float weight to half a step; the rest is float32 rounding.
HALF_STEP = 0.5 + 1e-3
INF = float("inf")


@dataclass(frozen=True)
class Range:
    """Of activations that share one scale. bounds: of the deleted Relu or Clip in front of it."""

    low: float
    high: float
    bounds: tuple[float, float]


@dataclass(frozen=True)
class Weight:
    """An int8 weight. axis: of its output channels; None: one scale for all."""

    places: tuple[Place, ...]
    axis: int | None


@dataclass(frozen=True)
class Bias:
    """An int32 bias, with the products' scale: that of range `input` times that of `weight`."""

    place: Place
    name: str
    input: str
    weight: str


@dataclass(frozen=True)
class Layout:
    """What is quantized.

    Attributes:
        activations: tensor → key of its range, in graph order.
        ranges, weights: by key, and by name of the initializer.
        constants: values of other stored tensors that the file holds as integers.
        absorbed: names of nodes that the file leaves to the saturation of a QuantizeLinear.
        limit: largest absolute integer of a weight.
    """

    activations: dict[str, str] = field(default_factory=dict)
    ranges: dict[str, Range] = field(default_factory=dict)
    weights: dict[str, Weight] = field(default_factory=dict)
    biases: list[Bias] = field(default_factory=list)
    constants: dict[Place, Array] = field(default_factory=dict)
    absorbed: frozenset[str] = frozenset()
    limit: int = REDUCED


def read_layout(floating: ModelProto, quantized: ModelProto) -> Layout:
    """The layout of `quantized`.

    Raises:
        ExportError: it was not written from `floating`: a node is missing, or a weight is not the
            float weight rounded (as after equalization).
    """
    original = constants_as_initializers(floating)
    name_nodes(original)
    nodes = {node.name: node for node in original.graph.node}
    left = {node.name for node in quantized.graph.node}
    absorbed = frozenset(nodes) - left
    foreign = [name for name in absorbed if nodes[name].op_type not in ABSORBED_OPS]
    if foreign:
        raise _not_from_it(f"it has no node {min(foreign)!r}")
    layout = Layout(absorbed=absorbed, limit=_limit(quantized))
    _read_activations(layout, original, quantized)
    _read_constants(layout, nodes, quantized, arrays(original))
    return layout


def _not_from_it(what: str) -> ExportError:
    return ExportError(
        f"quantize.qat: the int8 graph was not written from this float graph: {what}; quantize "
        "this float graph first, without equalization"
    )


def _limit(quantized: ModelProto) -> int:
    """The largest weight of a channel reaches the limit, so one of them tells it."""
    stored = [array for array in arrays(quantized).values() if array.dtype == np.int8]
    largest = max((int(np.abs(a.astype(np.int64)).max(initial=0)) for a in stored), default=0)
    return FULL if largest > REDUCED else REDUCED


def _read_activations(layout: Layout, original: ModelProto, quantized: ModelProto) -> None:
    constants, outputs = arrays(quantized), {value.name for value in quantized.graph.output}
    read_by = {node.input[0]: node for node in quantized.graph.node if node.op_type == _DQ}
    found: dict[str, tuple[float, float]] = {}
    for node in quantized.graph.node:
        if node.op_type != _Q:
            continue
        dequantized = read_by[node.output[0]].output[0]
        tensor = dequantized if dequantized in outputs else node.input[0]
        key = node.input[1]
        scale, zero = constants[key].astype(np.float32), constants[node.input[2]].astype(np.float32)
        layout.activations[tensor] = key
        found[key] = float(-zero * scale), float((np.float32(LEVELS - 1) - zero) * scale)
    bounds = dict.fromkeys(found, (-INF, INF))
    for tensor, (low, high) in _cut(layout, original):
        key = layout.activations[tensor]
        bounds[key] = max(low, bounds[key][0]), min(high, bounds[key][1])
    layout.ranges.update({key: Range(low, high, bounds[key]) for key, (low, high) in found.items()})


def _cut(layout: Layout, original: ModelProto) -> Iterator[tuple[str, tuple[float, float]]]:
    """Quantized tensors that stand for a deleted Relu or Clip, each with its bounds."""
    stored = arrays(original)
    after = {
        node.input[0]: node.output[0]
        for node in original.graph.node
        if node.name in layout.absorbed
    }
    for node in original.graph.node:
        if node.name not in layout.absorbed:
            continue
        tensor, bounds = node.output[0], clip_bounds(node, stored)
        while tensor not in layout.activations and tensor in after:  # a chain of them
            tensor = after[tensor]
        if tensor not in layout.activations or bounds is None:
            raise _not_from_it(f"{node.name!r} is gone and nothing saturates in its place")
        yield tensor, bounds


def _read_constants(
    layout: Layout, nodes: dict[str, NodeProto], quantized: ModelProto, stored: dict[str, Array]
) -> None:
    constants, writers = arrays(quantized), producers(quantized)
    for node in quantized.graph.node:
        if node.name not in nodes:
            continue
        original = nodes[node.name]
        for position, name in enumerate(node.input):
            source = writers.get(name)
            if source is None or source.op_type != _DQ or source.input[0] not in constants:
                continue
            if position >= len(original.input):  # a bias that only the int8 graph has
                continue
            own, place = original.input[position], (node.name, position)
            values = constants[source.input[0]]
            if values.dtype == np.int8:
                _check_weight(own, stored[own], source, constants)
                places = layout.weights[own].places if own in layout.weights else ()
                layout.weights[own] = Weight((*places, place), _axis(source, constants))
            elif values.dtype == np.int32:
                given = layout.activations[writers[writers[node.input[0]].input[0]].input[0]]
                layout.biases.append(Bias(place, own, given, original.input[1]))
            else:
                layout.constants[place] = _dequantized(source, constants)


def _check_weight(name: str, weight: Array, source: NodeProto, constants: dict[str, Array]) -> None:
    error = np.abs(_dequantized(source, constants) - weight)
    if not (error <= HALF_STEP * _along(source, 1, constants, weight.ndim)).all():
        raise _not_from_it(f"its weight {name!r} is not the float weight rounded")


def _axis(source: NodeProto, constants: dict[str, Array]) -> int | None:
    return attribute(source, "axis", 1) if constants[source.input[1]].ndim else None


def _dequantized(source: NodeProto, constants: dict[str, Array]) -> Array:
    values = constants[source.input[0]]
    scale, zero = (_along(source, i, constants, values.ndim) for i in (1, 2))
    result: Array = (values.astype(np.float32) - zero.astype(np.float32)) * scale
    return result


def _along(source: NodeProto, position: int, constants: dict[str, Array], rank: int) -> Array:
    """Scale or zero point of a DequantizeLinear in a shape that broadcasts with its input."""
    values, axis = constants[source.input[position]], _axis(source, constants)
    if axis is None:
        return values
    return values.reshape([-1 if a == axis % rank else 1 for a in range(rank)])


_Q, _DQ = "QuantizeLinear", "DequantizeLinear"
