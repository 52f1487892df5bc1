"""Opening and running onnxruntime sessions, the same way everywhere. CPU only.

One inter-op thread, a stated number of intra-op threads, spinning as onnxruntime has it by
default, its own log kept off the terminal. Not for timing: latency is measured by
`pipeline/measure/latency_agent.py` in a process of its own.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
from onnxruntime.capi import onnxruntime_pybind11_state as ort_state

from ..pipeline.errors import ExportError, RuntimeFailure
from .feeds import Entry, entry_of, feed, fitted
from .graph import read_model

Array = np.ndarray[Any, Any]

SILENT = 4  # fatal only: what goes wrong comes back as an exception
# onnxruntime's exceptions share no base class of their own.
CANNOT_LOAD = (
    ort_state.Fail,
    ort_state.InvalidGraph,
    ort_state.InvalidProtobuf,
    ort_state.InvalidArgument,
    ort_state.NotImplemented,
    ort_state.NoModel,
    ort_state.NoSuchFile,
)
DIED = (ort_state.RuntimeException, ort_state.EngineError, ort_state.EPFail, RuntimeError)


def open_session(path: Path, *, threads: int, optimize: bool = True) -> ort.InferenceSession:
    """A CPU session.

    Args:
        threads: intra-op threads, ≥ 1; inter-op is always 1.
        optimize: ORT_ENABLE_ALL, or every graph optimisation off.

    Raises:
        ExportError: the file is missing, broken, needs an operator or opset that this onnxruntime
            has not, or keeps weights outside its folder.
        RuntimeFailure: onnxruntime itself failed.
    """
    read_model(path)  # onnxruntime would follow external weights out of the folder
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = SILENT
    options.graph_optimization_level = (
        ort.GraphOptimizationLevel.ORT_ENABLE_ALL
        if optimize
        else ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    )
    try:
        return ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except CANNOT_LOAD as error:
        raise ExportError(
            f"{path}: onnxruntime {ort.__version__} cannot load it: {one_line(error)}; export it "
            "for an older runtime (export.min_runtime) or update onnxruntime"
        ) from error
    except DIED as error:
        raise RuntimeFailure(
            f"{path}: onnxruntime {ort.__version__} failed while opening it: {one_line(error)}"
        ) from error


def run_batches(session: ort.InferenceSession, inputs: Array, batch_size: int) -> Array:
    """Logits of all samples.

    Args:
        inputs: float32, (N, C, H, W), or int64 tokens, (N, K, S); N may be 0. Texts of a batch are
            cut to the longest of them, where the graph's length is free.
        batch_size: samples a call, ≥ 1. A session with a fixed batch uses its own size, and the
            last batch is filled up by repeating its last sample.

    Returns:
        (N, classes), the session's first output.

    Raises:
        ExportError: the shapes do not fit the session's inputs.
        RuntimeFailure: onnxruntime failed while running.
    """
    entry = entry_of(session)
    size = entry.batch or batch_size
    outputs = [
        _run(session, entry, inputs[start : start + size]) for start in range(0, len(inputs), size)
    ]
    if not outputs:
        classes = session.get_outputs()[0].shape[1:]
        return np.zeros((0, *(d if isinstance(d, int) else 0 for d in classes)), np.float32)
    return np.concatenate(outputs)


def pad_batch(batch: Array, size: int) -> Array:
    """`batch` with its last sample repeated until it holds `size` samples."""
    missing = size - len(batch)
    return np.concatenate([batch, np.repeat(batch[-1:], missing, axis=0)]) if missing else batch


def one_line(error: BaseException, limit: int = 300) -> str:
    """The error's message on one line, cut at `limit` characters."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= limit else text[: limit - 1] + "…"


def _run(session: ort.InferenceSession, entry: Entry, batch: Array) -> Array:
    count = len(batch)
    full = fitted(pad_batch(batch, entry.batch) if entry.batch else batch, entry)
    fed = feed(full, entry.names)
    try:
        logits: Array = session.run(None, fed)[0]
    except ort_state.InvalidArgument as error:
        first = session.get_inputs()[0]
        got = fed[first.name]
        hint = (
            "the preprocessing's size and channels"
            if got.dtype.kind == "f"
            else "data.tokenize.max_length and that the tokenizer is the network's"
        )
        raise ExportError(
            f"input {first.name!r}: expected {first.shape}, got {got.shape} {got.dtype}: "
            f"{one_line(error)}; check {hint}"
        ) from error
    except (*CANNOT_LOAD, *DIED) as error:
        raise RuntimeFailure(
            f"onnxruntime {ort.__version__} failed on a batch of {len(full)}: {one_line(error)}"
        ) from error
    return logits[:count]
