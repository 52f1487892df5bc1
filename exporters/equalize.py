"""Cross-layer equalization: the same function, with weights that fit one scale a tensor better.

Nagel et al. 2019, "Data-Free Quantization Through Weight Equalization and Bias Correction", §4.1:
f(s·x) = s·f(x) for s > 0, so output channel c of a Conv may be divided by s_c where the Conv that
reads it multiplies by s_c. s_c = √(r1_c / r2_c), with r the largest absolute weight of channel c on
either side, gives both the range √(r1_c · r2_c). Pairs share layers, so they are taken in turns
until nothing moves.

Between the two Convs may stand what keeps channels apart and is positively homogeneous: Relu,
LeakyRelu, pooling. ReLU6 is not (its 6 would become 6 / s_c, another one for each channel, and a
Min with a constant has no int8 kernel), so pairs across it are left; so are pairs whose middle
tensor somebody else reads, and weights that two nodes share.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from onnx import ModelProto, NodeProto, numpy_helper

from .graph import arrays, attribute, consumers

Array = np.ndarray[Any, Any]

HOMOGENEOUS = frozenset(
    {"Relu", "LeakyRelu", "MaxPool", "AveragePool", "GlobalAveragePool", "Identity"}
)
MOST_SWEEPS = 1000
CONVERGED = 1e-3  # largest |log s| of a sweep: no range moves by more than 0.1 %


@dataclass(frozen=True)
class Pair:
    """Two Convs, the second of which alone reads what the first writes."""

    first: NodeProto
    second: NodeProto


def equalize(model: ModelProto) -> ModelProto:
    """A copy whose Conv pairs are equalized; outputs are equal but for float rounding.

    Args:
        model: float, its BatchNormalization folded (see simplify.py).
    """
    result = ModelProto()
    result.CopyFrom(model)
    pairs = pairs_of(result)
    stored = {tensor.name: tensor for tensor in result.graph.initializer}
    changed = {name for pair in pairs for node in (pair.first, pair.second) for name in node.input}
    values = {
        name: numpy_helper.to_array(stored[name]).astype(np.float64)
        for name in sorted(changed & stored.keys())
    }
    for _ in range(MOST_SWEEPS if pairs else 0):
        moved = max(_equalize_pair(pair, values) for pair in pairs)
        if moved < CONVERGED:
            break
    for name, value in values.items():
        stored[name].CopyFrom(numpy_helper.from_array(value.astype(np.float32), name))
    return result


def pairs_of(model: ModelProto) -> list[Pair]:
    """Pairs that may be equalized, in graph order."""
    constants = arrays(model)
    readers = consumers(model)
    outputs = {value.name for value in model.graph.output}
    pairs = []
    for node in model.graph.node:
        if not _is_scalable(node, constants, readers):
            continue
        name = node.output[0]
        while name not in outputs and len(readers.get(name, [])) == 1:
            reader = readers[name][0]
            if reader.op_type in HOMOGENEOUS or _is_relu(reader, constants):
                name = reader.output[0]
                continue
            if reader.input[0] == name and _is_scalable(reader, constants, readers):
                pairs.append(Pair(node, reader))
            break
    return pairs


def output_range(weight: Array) -> Array:
    """Largest absolute weight of each output channel. weight: (O, I / groups, kH, kW) → (O,)."""
    largest: Array = np.abs(weight).reshape(len(weight), -1).max(axis=1)
    return largest


def input_range(weight: Array, groups: int) -> Array:
    """Largest absolute weight that reads each input channel: (O, I / groups, kH, kW) → (I,)."""
    grouped = np.abs(weight).reshape(groups, len(weight) // groups, weight.shape[1], -1)
    largest: Array = grouped.max(axis=(1, 3)).reshape(-1)
    return largest


def scale_input(weight: Array, factors: Array, groups: int) -> Array:
    """weight (O, I / groups, …), with input channel c multiplied by factors[c], (I,)."""
    per_output = np.repeat(factors.reshape(groups, -1), len(weight) // groups, axis=0)
    scaled: Array = weight * per_output.reshape(*per_output.shape, *[1] * (weight.ndim - 2))
    return scaled


def _equalize_pair(pair: Pair, values: dict[str, Array]) -> float:
    """In place; the largest |log s|. A channel without weights on either side stays as it is."""
    first, second = pair.first.input[1], pair.second.input[1]
    groups = int(attribute(pair.second, "group", 1))
    before, after = output_range(values[first]), input_range(values[second], groups)
    alive = (before > 0) & (after > 0)
    factors = np.ones_like(before)
    factors[alive] = np.sqrt(before[alive] / after[alive])
    values[first] = values[first] / factors.reshape(-1, *[1] * (values[first].ndim - 1))
    if _has_bias(pair.first):
        values[pair.first.input[2]] = values[pair.first.input[2]] / factors
    values[second] = scale_input(values[second], factors, groups)
    return float(np.abs(np.log(factors)).max())


def _is_scalable(
    node: NodeProto, constants: dict[str, Array], readers: dict[str, list[NodeProto]]
) -> bool:
    """A Conv whose weights and bias are constants of its own."""
    if node.op_type != "Conv":
        return False
    names = [node.input[1], *([node.input[2]] if _has_bias(node) else [])]
    return all(name in constants and len(readers[name]) == 1 for name in names)


def _is_relu(node: NodeProto, constants: dict[str, Array]) -> bool:
    """Clip from 0 to infinity."""
    if node.op_type != "Clip" or len(node.input) < 2:
        return False
    low = constants.get(node.input[1])
    if low is None or float(low) != 0.0:
        return False
    if len(node.input) < 3 or not node.input[2]:
        return True
    high = constants.get(node.input[2])
    return high is not None and float(high) >= float(np.finfo(np.float32).max)


def _has_bias(node: NodeProto) -> bool:
    return len(node.input) > 2 and bool(node.input[2])
