"""The graph that onnxruntime runs instead of the given one, with each node's share of the time.

Asked for at ORT_ENABLE_ALL on this machine: operators of onnxruntime's own, blocked and
channels-last layouts. It is for reading; it does not run on another CPU. Shares come from
onnxruntime's profiler, whose overhead falls on every node alike; they are no latency.
"""

from __future__ import annotations

import json
import re
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import onnx
import onnxruntime as ort
from onnx import ModelProto, NodeProto, TensorProto

from ..pipeline.errors import ExportError, MeasurementError, RuntimeFailure
from .feeds import as_input, entry_of, feed, fitted
from .graph import attribute
from .sessions import CANNOT_LOAD, DIED, SILENT, one_line, pad_batch
from .stamp import write_model

Array = np.ndarray[Any, Any]

# Kernels that multiply 8-bit integers (onnxruntime/docs/ContribOperators.md and ONNX's own).
INT8_MULTIPLY = frozenset(
    {"QLinearConv", "QLinearMatMul", "QGemm", "MatMulIntegerToFloat", "MatMulInteger",
     "ConvInteger", "DynamicQuantizeMatMul"}
)  # fmt: skip
CONVERSIONS = frozenset({"QuantizeLinear", "DequantizeLinear", "DynamicQuantizeLinear"})
WRITES_FLOAT = frozenset({"DequantizeLinear", "MatMulIntegerToFloat", "DynamicQuantizeMatMul"})
EIGHT_BITS = frozenset({TensorProto.UINT8, TensorProto.INT8})
WARM_UP, RUNS, SECONDS = 2, 10, 1.0  # the first runs page in weights; then at most 10 within 1 s


class Kernel(NamedTuple):
    """A node that runs. kind: "int8" computes on or moves 8-bit values, "conversion" is Q or DQ.
    time_share: of all nodes, 0…1; None where nothing was profiled."""

    node: NodeProto
    kind: Literal["int8", "conversion", "float"]
    time_share: float | None


class Optimized(NamedTuple):
    """The graph that runs, its nodes in order, and how many profiled runs the shares are from."""

    model: ModelProto
    kernels: list[Kernel]
    runs: int


class Trace(NamedTuple):
    """The graph that runs, the profiler's events (a Chrome trace; none without runs), and how many
    runs count."""

    model: ModelProto
    events: list[dict[str, Any]]
    runs: int


def optimize(model: ModelProto, inputs: Array | None, *, threads: int, where: str) -> Optimized:
    """Opens the graph and, with inputs, runs it a dozen times at most.

    Args:
        inputs: float32, (N ≥ 1, C, H, W), or int64 tokens, (N ≥ 1, K, S); fed one at a time, or as
            many as the graph fixes.
        where: named first in every error.

    Raises:
        ExportError: it cannot be opened or fed, or has other inputs.
        MeasurementError: no inputs.
        RuntimeFailure: onnxruntime failed.
    """

    def run(session: ort.InferenceSession) -> int:
        assert inputs is not None
        return _run(session, inputs, where)

    traced = trace(model, None if inputs is None else run, threads=threads, where=where)
    durations = node_microseconds(traced.events) if traced.events else {}
    return Optimized(traced.model, kernels_of(traced.model, durations), traced.runs)


def trace(
    model: ModelProto,
    run: Callable[[ort.InferenceSession], int] | None,
    *,
    threads: int,
    where: str,
) -> Trace:
    """Opens the graph, runs it under onnxruntime's profiler, and reads what was optimized.

    Args:
        run: runs the session and says how many runs count, after WARM_UP that do not. None: the
            graph is only opened.
        where: named first in every error.

    Raises:
        ExportError: it cannot be opened or fed. RuntimeFailure: onnxruntime failed.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        source, target = folder / "model.onnx", folder / "optimized.onnx"
        write_model(model, source)
        options = ort.SessionOptions()
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
        options.log_severity_level = SILENT  # it warns that the optimized file is not portable
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_ALL
        options.optimized_model_filepath = str(target)
        options.enable_profiling = run is not None
        options.profile_file_prefix = str(folder / "profile")
        try:
            session = ort.InferenceSession(str(source), options, providers=["CPUExecutionProvider"])
            runs = 0 if run is None else run(session)
        except CANNOT_LOAD as error:
            raise ExportError(
                f"{where}: onnxruntime {ort.__version__} cannot open or feed it: "
                f"{one_line(error)}; export it again, or check the preprocessing's size and "
                "channels, or the tokenizer"
            ) from error
        except DIED as error:
            raise RuntimeFailure(
                f"{where}: onnxruntime {ort.__version__} failed: {one_line(error)}"
            ) from error
        events = [] if run is None else json.loads(Path(session.end_profiling()).read_text())
        return Trace(onnx.load(target), events, runs)


def _run(session: ort.InferenceSession, inputs: Array, where: str) -> int:
    """Runs that count, after WARM_UP that do not."""
    entry = entry_of(session)
    if not len(inputs):
        raise MeasurementError(f"{where}: no samples to profile with; expected one or more")
    size, runs, deadline = entry.batch or 1, 0, time.perf_counter() + SECONDS
    while runs < WARM_UP + 1 or (runs < WARM_UP + RUNS and time.perf_counter() < deadline):
        start = runs * size % len(inputs)
        batch = pad_batch(as_input(inputs[start : start + size]), size)
        session.run(None, feed(fitted(batch, entry), entry.names))
        runs += 1
    return runs - WARM_UP


def node_microseconds(events: list[dict[str, Any]]) -> dict[str, int]:
    """Of each node by its name, in the runs after the first WARM_UP; events: a Chrome trace."""
    starts = sorted(event["ts"] for event in events if event["name"] == "model_run")
    durations: Counter[str] = Counter()
    for event in events:
        name, end, _ = event["name"].partition("_kernel_time")
        if event["cat"] == "Node" and end and event["ts"] >= starts[WARM_UP]:
            durations[name] += event["dur"]
    return dict(durations)


def kernels_of(optimized: ModelProto, durations: dict[str, int]) -> list[Kernel]:
    """Every node with its kind and its share of `durations`, microseconds by name (none: no
    shares). Nodes of one name share their time evenly."""
    types = _types(optimized)
    names = Counter(timed_as(node) for node in optimized.graph.node)
    known = {node.name for node in optimized.graph.node if node.name}
    merged: Counter[str] = Counter()
    for name, microseconds in durations.items():
        # the profiler calls a node without a name by its operator and number
        merged[name if name in known else re.sub(r"_\d+$", "", name)] += microseconds
    total = sum(durations.values())
    return [
        Kernel(
            node,
            _kind(node, types),
            merged[timed_as(node)] / names[timed_as(node)] / total if total else None,
        )
        for node in optimized.graph.node
    ]


def timed_as(node: NodeProto) -> str:
    """What the profiler calls a node, less the number that it gives to one without a name."""
    return node.name or node.op_type


def _types(optimized: ModelProto) -> dict[str, int]:
    """Element type of every value; where the graph does not say it, what its node hands on."""
    graph = optimized.graph
    types = {tensor.name: tensor.data_type for tensor in graph.initializer}
    for value in (*graph.value_info, *graph.input, *graph.output):
        types[value.name] = value.type.tensor_type.elem_type
    for node in graph.node:
        if node.op_type == "QuantizeLinear" or node.op_type.startswith("QLinear"):
            kind: int = TensorProto.UINT8
        elif node.op_type in WRITES_FLOAT or _is_float_gemm(node):
            kind = TensorProto.FLOAT
        elif node.op_type in ("MatMulInteger", "ConvInteger"):
            kind = TensorProto.INT32
        elif node.op_type == "Cast":
            kind = attribute(node, "to", 0)
        else:
            kind = next((types[name] for name in node.input[:1] if name in types), 0)
        for name in node.output:
            types.setdefault(name, kind)
    return types


def _is_float_gemm(node: NodeProto) -> bool:
    """QGemm without the scale of its output, its eighth input (ContribOperators.md)."""
    return node.op_type == "QGemm" and not any(node.input[7:8])


def _kind(node: NodeProto, types: dict[str, int]) -> Literal["int8", "conversion", "float"]:
    if node.op_type in CONVERSIONS:
        return "conversion"
    moved = any(types.get(name) in EIGHT_BITS for name in (*node.input[:1], *node.output[:1]))
    return "int8" if moved or node.op_type in INT8_MULTIPLY else "float"
