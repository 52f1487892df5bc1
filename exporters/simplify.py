"""Folding what the exporter left: onnxsim and our own rewrites, kept only if the outputs agree.

Works on float graphs: onnxsim folds quantized weights back into floats (onnxsim#216), so
quantization comes last. onnxsim has crashed on valid graphs (onnxsim#136, #187, #231, #360), so it
runs in a process of its own with a time limit, and a death by signal becomes a reason in the
report, not the end of the run.
"""

from __future__ import annotations

import signal
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import ModelProto

from ..pipeline.errors import ExportError, RuntimeFailure
from .compare import agrees
from .graph import is_quantized
from .rewrites import normalise
from .sessions import open_session, run_batches
from .stamp import strip, write_model
from .text_rewrites import normalise_text

Array = np.ndarray[Any, Any]

TIMEOUT_SECONDS = 300  # onnxsim takes seconds on nets of this size; one that hangs is given up
BATCH_SIZE = 32
# The child sees only two paths. `-P` keeps the working folder off its import path.
_CHILD = (
    "import sys, onnx, onnxsim; model, _ = onnxsim.simplify(onnx.load(sys.argv[1])); "
    "onnx.save(model, sys.argv[2])"
)


@dataclass(frozen=True)
class Simplified:
    """The graph that goes on.

    simplified: whether onnxsim's result is in it.
    reason: what was measured when it is; why not, when it is not.
    """

    model: ModelProto
    simplified: bool
    reason: str


def simplify(
    model: ModelProto, samples: Array, *, floor: float, threads: int, enabled: bool = True
) -> Simplified:
    """The smallest graph whose outputs agree with the given one on real samples.

    Tried in this order: onnxsim and then our rewrites; our rewrites alone; the graph as it is. Of
    texts, the rewrites that need torch's own shapes come before onnxsim.

    Args:
        samples: float32, (N, C, H, W), or int64 tokens, (N, K, S), real and preprocessed; N ≥ 1.
        floor: largest error of float32 itself on them, see compare.float_floor; sets the tolerance.
        enabled: False leaves onnxsim out; BatchNormalization is folded all the same.

    Raises:
        ExportError: the given graph is quantized already, or does not run.
    """
    if is_quantized(model):
        raise ExportError("the graph is quantized already; simplify the float graph before int8")
    reference = _outputs(model, samples, threads=threads)
    given, model = model, normalise_text(model)
    reasons = ["switched off (export.simplify)"]
    if enabled:
        folded, reason = run_onnxsim(model)
        if folded is not None:
            candidate = normalise(folded)
            kept, reason = _keeps(candidate, reference, samples, floor=floor, threads=threads)
            if kept:
                return Simplified(strip(candidate), True, reason)
            reason = f"its outputs differ: {reason}"
        reasons = [f"onnxsim not used: {reason}"]
    candidate = normalise(model)
    kept, reason = _keeps(candidate, reference, samples, floor=floor, threads=threads)
    if kept:
        return Simplified(strip(candidate), False, reasons[0])
    return Simplified(
        strip(given), False, f"{reasons[0]}; own folding not used: its outputs differ: {reason}"
    )


def run_onnxsim(
    model: ModelProto, *, command: tuple[str, ...] | None = None, timeout: float = TIMEOUT_SECONDS
) -> tuple[ModelProto | None, str]:
    """onnxsim in a child process: its graph, or None and why there is none.

    Args:
        command: what to run instead, with the two paths appended; tests pass one that dies.
    """
    with tempfile.TemporaryDirectory() as folder:
        source, target = Path(folder, "in.onnx"), Path(folder, "out.onnx")
        write_model(model, source)
        argv = [*(command or (sys.executable, "-P", "-c", _CHILD)), str(source), str(target)]
        try:
            done = subprocess.run(
                argv, capture_output=True, text=True, timeout=timeout, check=False, cwd=folder
            )
        except subprocess.TimeoutExpired:
            return None, f"it took longer than {timeout:g} s"
        if done.returncode != 0:
            return None, _death(done.returncode, done.stderr)
        try:
            result = onnx.load(target)
            onnx.checker.check_model(result, full_check=True)
        except (OSError, ValueError, onnx.checker.ValidationError,
                onnx.shape_inference.InferenceError) as error:  # fmt: skip
            return None, f"it wrote an invalid graph: {' '.join(str(error).split())[:200]}"
        return result, ""


def batchnorms(model: ModelProto) -> list[str]:
    """Names of the BatchNormalization nodes that are left."""
    return [node.name for node in model.graph.node if node.op_type == "BatchNormalization"]


def _death(code: int, stderr: str) -> str:
    if code < 0:
        try:
            name = signal.Signals(-code).name
        except ValueError:
            name = f"signal {-code}"
        return f"it crashed ({name})"
    last = next((line for line in reversed(stderr.splitlines()) if line.strip()), "no message")
    return f"it failed: {last.strip()[:200]}"


def _keeps(
    candidate: ModelProto, reference: Array, samples: Array, *, floor: float, threads: int
) -> tuple[bool, str]:
    try:
        outputs = _outputs(candidate, samples, threads=threads)
    except (ExportError, RuntimeFailure) as error:
        return False, str(error)
    return agrees(reference, outputs, floor=floor)


def _outputs(model: ModelProto, samples: Array, *, threads: int) -> Array:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "model.onnx")
        write_model(model, path)
        return run_batches(open_session(path, threads=threads), samples, BATCH_SIZE)
