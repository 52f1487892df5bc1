"""Bias correction: rounding weights moves the mean of a layer's output; its bias moves it back.

Nagel et al. 2019, §4.2, by measurement: for each int8 Conv and Gemm, in graph order, the mean of
every output channel over calibration samples is taken in the float and in the int8 graph, and the
difference goes into the int32 bias. Sequential: a layer is measured with all layers before it
corrected, since their errors are part of its own; in one pass they would be corrected twice. So
the int8 graph runs once a layer, up to that layer, with int8 kernels.

Weights, scales and the number of nodes stay as they are.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import ModelProto, NodeProto, TensorProto, numpy_helper

from ..pipeline.errors import ExportError
from .calibrate import STEP, Samples, input_name, steps
from .graph import batch_size, drop_unused_initializers, producers
from .sessions import open_session
from .stamp import write_model

Array = np.ndarray[Any, Any]

# A mean over this many images and all their pixels; the cost is one partial run a layer.
SAMPLES = 128


def correct_bias(
    floating: ModelProto, quantized: ModelProto, samples: Samples, *, threads: int
) -> ModelProto:
    """A copy of `quantized` in which every int8 layer's output has the float layer's mean.

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
    if not biases:
        return result
    originals = {node.name: node for node in floating.graph.node}
    some = samples[:SAMPLES]
    layers = [node for node in result.graph.node if node.name in biases]
    expected = channel_means(
        floating, [originals[node.name].output[0] for node in layers], some, threads=threads
    )
    for node, mean in zip(layers, expected, strict=True):
        (found,) = channel_means(result, [node.output[0]], some, threads=threads)
        _shift(result, biases[node.name], found - mean)
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


def channel_means(
    model: ModelProto, names: list[str], samples: Samples, *, threads: int
) -> list[Array]:
    """Mean over samples and positions of each tensor, (C,) float64 each.

    Args:
        names: outputs of Conv, (N, C, …), or Gemm, (N, C). What lies beyond them is not run.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "means.onnx")
        write_model(_averaging(model, names), path)
        session = open_session(path, threads=threads)
    source, fixed = input_name(session), batch_size(model)
    sums: list[Any] = [0.0] * len(names)
    count = 0
    for batch in steps(samples, fixed or STEP, fixed=fixed is not None):
        count += len(batch)
        for index, means in enumerate(session.run(None, {source: batch})):
            sums[index] = sums[index] + means.sum(axis=0, dtype=np.float64).reshape(-1)
    return [np.asarray(total / count) for total in sums]


def _averaging(model: ModelProto, names: list[str]) -> ModelProto:
    """Only what `names` need; outputs their means over positions, so that little is held."""
    writers = producers(model)
    needed: set[str] = set()
    waiting = list(names)
    while waiting:
        name = waiting.pop()
        if name in writers and name not in needed:
            needed.update(writers[name].output)
            waiting += writers[name].input
    result = ModelProto()
    result.CopyFrom(model)
    del result.graph.node[:]
    result.graph.node.extend(node for node in model.graph.node if needed & set(node.output))
    del result.graph.output[:]
    for index, name in enumerate(names):
        output = name
        if writers[name].op_type == "Conv":
            output = f"mean#{index}"
            result.graph.node.append(
                onnx.helper.make_node("GlobalAveragePool", [name], [output], name=output)
            )
        result.graph.output.append(
            onnx.helper.make_tensor_value_info(output, TensorProto.FLOAT, None)
        )
    drop_unused_initializers(result)
    return result


def _shift(model: ModelProto, dequantize: NodeProto, excess: Array) -> None:
    """Takes the excess, (C,) in real units, off the stored int32 bias, in place."""
    stored = {tensor.name: tensor for tensor in model.graph.initializer}
    scale = numpy_helper.to_array(stored[dequantize.input[1]]).astype(np.float64)
    bias = numpy_helper.to_array(stored[dequantize.input[0]]).astype(np.float64)
    limits = np.iinfo(np.int32)
    moved = np.clip(bias - np.round(excess / scale), limits.min, limits.max).astype(np.int32)
    stored[dequantize.input[0]].CopyFrom(numpy_helper.from_array(moved, dequantize.input[0]))
