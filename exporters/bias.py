"""Bias correction: rounding weights moves the mean of a layer's output; its bias moves it back.

After Nagel et al. 2019, §4.2, by measurement: for each int8 Conv and Gemm, in graph order, the mean
of (int8 - float) is taken for every output channel over calibration samples, and goes into the
int32 bias. Two things are settled here:

- Sequential. A layer is measured with all layers before it corrected, since their errors are part
  of its own; in one pass they would be corrected twice. So both graphs run once a layer, up to it.
- Only values that pass count: those inside the range of the QuantizeLinear after the layer, which
  is where its ReLU or ReLU6 lives. A layer whose outputs are mostly negative would otherwise be
  corrected for values that nobody reads (on a MobileNetV2 that cost 5 dB in the last layer).

Weights, scales and the number of nodes stay as they are.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
from onnx import ModelProto, NodeProto, TensorProto, numpy_helper

from ..pipeline.errors import ExportError
from .calibrate import LEVELS, STEP, Range, Samples, steps
from .feeds import entry_of, feed
from .graph import arrays, consumers, drop_unused_initializers, producers
from .sessions import open_session
from .stamp import write_model

Array = np.ndarray[Any, Any]

# A mean over these images and all their pixels; the cost is two partial runs a layer.
SAMPLES = 128
FEWEST_VALUES = 16  # that pass in a channel: the mean of fewer would move it by chance


def correct_bias(
    floating: ModelProto, quantized: ModelProto, samples: Samples, *, threads: int
) -> ModelProto:
    """A copy of `quantized` in which every int8 layer's passing output has the float layer's mean.

    The first SAMPLES samples are used, in steps. A layer without a bias has nothing to correct.

    Args:
        floating: the graph that `quantized` was made from; nodes are found by name.
        quantized: QDQ, biases int32 behind DequantizeLinear.

    Raises:
        ExportError: no samples.
    """
    if len(samples) == 0:
        raise ExportError(
            "bias correction: no calibration samples; set data.calibration to 64 or more"
        )
    result = ModelProto()
    result.CopyFrom(quantized)
    biases = int32_biases(result)
    originals = {node.name: node for node in floating.graph.node}
    some = samples[:SAMPLES]
    for node in [node for node in result.graph.node if node.name in biases]:
        excess = mean_errors(floating, result, originals[node.name], some, threads=threads)
        _shift(result, biases[node.name], excess)
    return result


def int32_biases(model: ModelProto) -> dict[str, NodeProto]:
    """By name of the Conv or Gemm: the DequantizeLinear of its stored int32 bias."""
    writers = producers(model)
    stored = {tensor.name: tensor.data_type for tensor in model.graph.initializer}
    found = {}
    for node in model.graph.node:
        if node.op_type not in ("Conv", "Gemm") or len(node.input) < 3:
            continue
        writer = writers.get(node.input[2])
        if writer is not None and stored.get(writer.input[0]) == TensorProto.INT32:
            found[node.name] = writer
    return found


def mean_errors(
    floating: ModelProto, quantized: ModelProto, node: NodeProto, samples: Samples, *, threads: int
) -> Array:
    """Mean of (int8 - float) of each channel of a layer's output, (C,) float64, over samples and
    positions whose float value passes; 0 where fewer than FEWEST_VALUES do.

    Args:
        node: the layer in `floating`; its output is (N, C, …), or (N · S, C) of texts. What lies
            beyond is not run.
    """
    name = next(n for n in quantized.graph.node if n.name == node.name).output[0]
    low, high = passing_range(quantized, name)
    reference = _session_up_to(floating, node.output[0], threads=threads)
    candidate = _session_up_to(quantized, name, threads=threads)
    entry = entry_of(reference)
    total: Any = 0.0
    count: Any = 0
    for batch in steps(samples, STEP, entry):
        (expected,) = reference.run(None, feed(batch, entry.names))
        (found,) = candidate.run(None, feed(batch, entry.names))
        passes = (expected >= low) & (expected <= high)
        others = (0, *range(2, expected.ndim))
        total = total + np.where(passes, found - expected, 0).sum(axis=others, dtype=np.float64)
        count = count + passes.sum(axis=others)
    means: Array = np.where(count >= FEWEST_VALUES, total / np.maximum(count, 1), 0.0)
    return means


def passing_range(model: ModelProto, name: str) -> Range:
    """What the QuantizeLinear that reads this tensor keeps; everything where none does."""
    constants = arrays(model)
    for node in consumers(model).get(name, []):
        if node.op_type == "QuantizeLinear":
            scale, zero_point = float(constants[node.input[1]]), int(constants[node.input[2]])
            return -scale * zero_point, scale * (LEVELS - 1 - zero_point)
    return -np.inf, np.inf


def _session_up_to(model: ModelProto, name: str, *, threads: int) -> ort.InferenceSession:
    """Only the nodes that `name` needs, with it as the output."""
    writers = producers(model)
    needed: set[str] = set()
    waiting = [name]
    while waiting:
        value = waiting.pop()
        if value in writers and value not in needed:
            needed.update(writers[value].output)
            waiting += writers[value].input
    result = ModelProto()
    result.CopyFrom(model)
    del result.graph.node[:]
    result.graph.node.extend(node for node in model.graph.node if needed & set(node.output))
    del result.graph.output[:]
    result.graph.output.append(onnx.helper.make_tensor_value_info(name, TensorProto.FLOAT, None))
    drop_unused_initializers(result)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "layer.onnx")
        write_model(result, path)
        return open_session(path, threads=threads)


def _shift(model: ModelProto, dequantize: NodeProto, excess: Array) -> None:
    """Takes the excess, (C,) in real units, off the stored int32 bias, in place."""
    stored = {tensor.name: tensor for tensor in model.graph.initializer}
    scale = numpy_helper.to_array(stored[dequantize.input[1]]).astype(np.float64)
    bias = numpy_helper.to_array(stored[dequantize.input[0]]).astype(np.float64)
    limits = np.iinfo(np.int32)
    moved = np.clip(bias - np.round(excess / scale), limits.min, limits.max).astype(np.int32)
    stored[dequantize.input[0]].CopyFrom(numpy_helper.from_array(moved, dequantize.input[0]))
