"""One ONNX file over an array of inputs. Stands alone: stdlib, numpy, onnxruntime, Python >= 3.9.

    python run_onnx.py MODEL.onnx INPUTS.npy LOGITS.npy [--batch 1] [--threads 1]

Runs here, on a board, or under `scripts/arm_sysroot`'s emulation, so that the same file's answers
can be compared over CPUs. Writes the first output, (N, …), as the model's own type, and prints one
JSON line: versions, machine, seconds, sha256 of the raw little-endian logits. Not for latency.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import platform
import time

import numpy as np
import onnxruntime as ort


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    for name in ("model", "inputs", "logits"):
        parser.add_argument(name)
    parser.add_argument("--batch", type=int, default=1, help="samples a call, where it is free")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--unoptimized", action="store_true", help="graph optimisations off")
    arguments = parser.parse_args()

    inputs = np.load(arguments.inputs, allow_pickle=False)
    session = open_session(
        arguments.model, threads=arguments.threads, optimize=not arguments.unoptimized
    )
    begin = time.perf_counter()
    logits = run(session, inputs, batch=arguments.batch)
    seconds = time.perf_counter() - begin
    np.save(arguments.logits, logits, allow_pickle=False)
    raw = np.ascontiguousarray(logits).astype(logits.dtype.newbyteorder("<")).tobytes()
    facts = {
        "machine": platform.machine(),
        "python": platform.python_version(),
        "numpy": np.__version__,
        "onnxruntime": ort.__version__,
        "samples": len(inputs),
        "shape": list(logits.shape),
        "seconds": round(seconds, 3),
        "sha256": hashlib.sha256(raw).hexdigest(),
    }
    print(json.dumps(facts))


def open_session(path: str, *, threads: int, optimize: bool) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3  # errors; an emulated CPU is unknown to its detection
    level = ort.GraphOptimizationLevel
    options.graph_optimization_level = level.ORT_ENABLE_ALL if optimize else level.ORT_DISABLE_ALL
    return ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def run(session: ort.InferenceSession, inputs: np.ndarray, *, batch: int) -> np.ndarray:
    """First output over all samples; a fixed batch is filled up with the last sample."""
    entries = session.get_inputs()
    entry = entries[0]
    fixed = entry.shape[0] if isinstance(entry.shape[0], int) else None
    size = fixed or batch
    outputs = []
    for start in range(0, len(inputs), size):
        part = inputs[start : start + size]
        missing = size - len(part) if fixed else 0
        fed = np.concatenate([part, np.repeat(part[-1:], missing, axis=0)]) if missing else part
        logits = session.run(None, feed(fed, [one.name for one in entries]))[0]
        outputs.append(logits[: len(part)])
    return np.concatenate(outputs)


def feed(batch: np.ndarray, names: list[str]) -> dict[str, np.ndarray]:
    """Images are the one input; of texts (N, K, S) each row is one, cut to the longest of them."""
    if len(names) == 1:
        return {names[0]: np.ascontiguousarray(batch)}
    length = int(batch[:, 1].sum(axis=1).max())
    return {n: np.ascontiguousarray(batch[:, row, :length]) for row, n in enumerate(names)}


if __name__ == "__main__":
    main()
