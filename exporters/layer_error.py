"""What each layer of an int8 graph loses by itself: int8 and float on identical inputs.

Every value that the int8 graph quantizes is given to it as the float graph computes it, so no error
comes from a layer above. What comes out of a layer is then rounding of its own weights and input
(and what equalization or training has changed): some 20 to 50 dB. A layer, or one of its channels,
far below that computes something else.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
from onnx import ModelProto, NodeProto, TensorProto, helper

from .compare import compare
from .graph import WEIGHTED_OPS, arrays, attribute, producers
from .tensors import CONVERSIONS, feeds_of, layer_of, stored_names, taps

Array = np.ndarray[Any, Any]

# Half of the signal: rounding to 4 bits would do better (6 dB a bit). A channel is its own layer.
LAYER_DB, CHANNEL_DB = 10.0, 3.0
QUIET_CHANNEL = 0.01  # of the mean energy: below it a channel is rounding and little else
STEPS = 2.0  # of the output's own quantization: an error below is rounding at any SQNR
GIVEN = "_as_float"


def layer_errors(
    floating: ModelProto, quantized: ModelProto, inputs: Array, *, threads: int
) -> list[dict[str, Any]]:
    """Every value that both graphs compute and that int8 has a part in, in graph order.

    Args:
        inputs: a few samples, float32 (N, C, H, W) or int64 (N, K, S).

    Returns:
        For each: tensor, op, node, layer, max_abs, sqnr_db (None: no error), worst_channel and its
        channel_sqnr_db (None: no axis of channels), dead (output channels whose weights are all 0,
        though rounding would not have made them so), suspect (below the limits above, dead
        channels, or not finite), problem.

    Raises:
        ExportError, RuntimeFailure: a graph cannot be opened or run.
    """
    fed, rows = feeds_of(floating, inputs, threads=threads)
    cut_graph, given = _given_floats(floating, quantized)
    names = list(_common(floating, quantized))
    if not names:
        return []
    wanted = list(dict.fromkeys([*(name for name in given if name not in fed), *names]))
    values = taps(floating, wanted, fed, threads=threads) | fed
    taken = {f"{name}{GIVEN}": values[name] for name in given}
    found = taps(cut_graph, names, fed | taken, threads=threads)
    writers, stored = producers(quantized), stored_names(quantized)
    dead = _dead_channels(floating, quantized)
    grids = _grids(quantized)
    return [
        _describe(writers[name], stored, values[name][:rows], found[name][:rows],
                  name=name, grid=grids.get(name), dead=dead.get(writers[name].name, ()))
        for name in names
        if values[name].dtype.kind == "f" and values[name].shape == found[name].shape
    ]  # fmt: skip


def _given_floats(floating: ModelProto, quantized: ModelProto) -> tuple[ModelProto, list[str]]:
    """The int8 graph with an input of its own before each quantizing node, and those values."""
    known = set(producers(floating)) | {value.name for value in floating.graph.input}
    model = ModelProto()
    model.CopyFrom(quantized)
    given: list[str] = []
    for node in model.graph.node:
        name = node.input[0] if node.input else ""
        if node.op_type in ("QuantizeLinear", "DynamicQuantizeLinear") and name in known:
            node.input[0] = f"{name}{GIVEN}"
            given.append(str(name))
    given = list(dict.fromkeys(given))
    model.graph.input.extend(
        helper.make_tensor_value_info(f"{name}{GIVEN}", TensorProto.FLOAT, None) for name in given
    )
    return model, given


def _common(floating: ModelProto, quantized: ModelProto) -> Iterator[str]:
    """Values that both graphs compute, in the int8 graph's order."""
    known = producers(floating)
    for node in quantized.graph.node:
        if node.op_type not in CONVERSIONS:
            yield from (name for name in node.output if name in known)


class _Grid(NamedTuple):
    """What a value is rounded to: step, zero point, least and greatest integer."""

    step: float
    zero: int
    low: int
    high: int

    def round(self, values: Array) -> Array:
        """As QuantizeLinear and DequantizeLinear do; a deleted Relu lives on in the cut."""
        whole = np.rint(values.astype(np.float64) / self.step) + self.zero
        rounded: Array = (np.clip(whole, self.low, self.high) - self.zero) * self.step
        return rounded


def _grids(quantized: ModelProto) -> dict[str, _Grid]:
    """Value → its rounding, where it is quantized, by one scale."""
    constants = arrays(quantized)
    found = {}
    for node in quantized.graph.node:
        if node.op_type != "QuantizeLinear" or node.input[1] not in constants:
            continue
        scale = constants[node.input[1]]
        zero = constants.get(node.input[2]) if len(node.input) > 2 else None
        zero = np.zeros((), np.uint8) if zero is None else zero  # as ONNX defines it
        if scale.size == 1 and zero.dtype.kind in "iu":
            limits = np.iinfo(zero.dtype)
            found[str(node.input[0])] = _Grid(
                float(scale.ravel()[0]), int(zero.ravel()[0]), int(limits.min), int(limits.max)
            )
    return found


def _dead_channels(floating: ModelProto, quantized: ModelProto) -> dict[str, tuple[int, ...]]:
    """Node → its output channels that float has and int8 has not, of Conv, Gemm and MatMul."""
    weights, constants, writers = arrays(floating), arrays(quantized), producers(quantized)
    nodes = {node.name: node for node in floating.graph.node
             if node.name and node.op_type in WEIGHTED_OPS}  # fmt: skip
    found = {}
    for node in quantized.graph.node:
        twin = nodes.get(node.name)
        source = writers.get(node.input[1]) if node.op_type in WEIGHTED_OPS else None
        if twin is None or source is None or source.op_type != "DequantizeLinear":
            continue
        before, after = weights.get(twin.input[1]), constants.get(source.input[0])
        scale = constants.get(source.input[1])
        if before is None or after is None or scale is None or before.shape != after.shape:
            continue
        first = node.op_type == "Conv" or bool(attribute(node, "transB", 0))
        axes = tuple(
            axis for axis in range(before.ndim) if axis != (0 if first else before.ndim - 1)
        )
        gone = ~after.any(axis=axes) & (np.abs(before).max(axis=axes) >= scale.ravel())
        found[node.name] = tuple(np.flatnonzero(gone).tolist())
    return found


def _describe(
    node: NodeProto, stored: frozenset[str], reference: Array, found: Array, *, name: str,
    grid: _Grid | None, dead: tuple[int, ...],
) -> dict[str, Any]:  # fmt: skip
    step = grid.step if grid is not None else 0.0
    found = found if grid is None or not np.isfinite(found).all() else grid.round(found)
    flat = [one.reshape(len(one), -1) for one in (reference, found)]
    agreement = compare(*flat)
    channel, channel_db = _worst_channel(reference, found, step)
    low = agreement.sqnr_db is not None and agreement.sqnr_db < LAYER_DB
    quiet = agreement.max_abs is not None and agreement.max_abs <= STEPS * step
    return {
        "tensor": name,
        "op": node.op_type,
        "node": str(node.name or name),
        "layer": layer_of(node, stored),
        "max_abs": agreement.max_abs,
        "sqnr_db": agreement.sqnr_db,
        "worst_channel": channel,
        "channel_sqnr_db": channel_db,
        "dead": dead,
        "suspect": agreement.problem is not None
        or bool(dead)
        or (low and not quiet)
        or (channel_db is not None and channel_db <= CHANNEL_DB),
        "problem": agreement.problem,
    }


def _worst_channel(reference: Array, found: Array, step: float) -> tuple[int | None, float | None]:
    """Of (N, C, H, W) or (N, C), the channel that loses most, among those that say something."""
    if reference.ndim not in (2, 4) or reference.shape != found.shape:
        return None, None
    axes = (0,) if reference.ndim == 2 else (0, 2, 3)
    ref = reference.astype(np.float64)
    signal = np.square(ref).mean(axes)
    error = np.square(ref - found).mean(axes)
    told = (signal > QUIET_CHANNEL * signal.mean()) & (error > (STEPS * step) ** 2) & (error > 0)
    if not told.any():
        return None, None
    ratio = np.divide(signal, error, out=np.full_like(signal, np.inf), where=told)
    worst = int(ratio.argmin())
    return worst, 10 * float(np.log10(ratio[worst]))
