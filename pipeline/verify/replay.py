"""Replays a golden bundle: the same inputs, and whether the same answers come. Stands alone:
stdlib, numpy, onnxruntime, Python >= 3.9, so that a board runs it from the bundle itself:

    python replay.py MODEL.onnx [FOLDER]      exit code 0: the same, 1: not, 2: cannot be run,
                                              6: the bundle is not what its golden.json says

The bundle's folder (written by `golden.py`):

    golden.json     schema, hashes of every file, the model, runtime, CPU, threads, batch, tolerance
    inputs.npz      an array for each of the model's inputs, N samples each
    outputs.npy     the first output, float32 (N, C)
    labels.json     class names, in the order of the outputs
    texts.jsonl     of texts: what the tokens were made of
    replay.py       this file

The same file on the same onnxruntime and CPU must give the same bits. Elsewhere float may be off by
atol + rtol·|ref| or ten times its floor; int8 answers may turn over for near ties, and for two per
cent of the rest, as in the parity ladder. A file that differs from the bundle's is held against it
in the same way.
"""

from __future__ import annotations

import hashlib
import json
import platform
import sys
from pathlib import Path
from typing import Any

import numpy as np

SCHEMA = "edgestill-golden/1"
GOLDEN, INPUTS, OUTPUTS = "golden.json", "inputs.npz", "outputs.npy"
ATOL, RTOL, FLOOR_FACTOR = 1e-4, 1e-3, 10.0  # as exporters/compare.py
INT8_AGREEMENT, INT8_CHANCE_FLIPS = 0.98, 2  # as parity.py
# Operators whose presence makes a file int8; their names stand in it as plain bytes.
DECIDES_BITS = ("onnxruntime", "arch", "system", "cpu")
INT8_OPS = (b"QuantizeLinear", b"DequantizeLinear", b"MatMulInteger", b"ConvInteger", b"QLinear")


class Tampered(Exception):
    """The bundle is not what its golden.json says."""


class Unusable(Exception):
    """The model or the bundle cannot be read or run."""


def replay(model: Path, folder: Path, *, threads: int | None = None) -> dict[str, Any]:
    """Runs the model on the bundle's inputs.

    Args:
        threads: None: as many as the bundle was made with.

    Returns:
        rungs (as `report.RungRecord`), golden (golden.json), model_sha256, environment.

    Raises:
        Tampered: a hash differs or a file is missing. Unusable: what cannot be read or run.
    """
    golden = read_bundle(folder)
    inputs, expected = _arrays(folder)
    content = _content(model)
    sha256 = hashlib.sha256(content).hexdigest()
    session = open_model(model, threads or golden["threads"])
    rungs = [_rung("bundle", "golden.json", True, "every file has its hash", n=len(expected))]
    problem = _signature(session, inputs)
    rungs.append(_rung("signature", "inputs.npz", problem is None, problem or ""))
    if problem is None:
        outputs = run_all(session, inputs, golden["batch"])
        same_file = sha256 == golden["model"]["sha256"]
        here = environment()
        there = golden["environment"]
        same_machine = same_file and all(here[key] == there.get(key) for key in DECIDES_BITS)
        is_int8 = any(op in content for op in INT8_OPS)
        rungs.append(
            _judge(expected, outputs, golden, is_int8=is_int8, same_machine=same_machine,
                   same_file=same_file)
        )  # fmt: skip
    return {"rungs": rungs, "golden": golden, "model_sha256": sha256, "environment": environment()}


def read_bundle(folder: Path) -> dict[str, Any]:
    """golden.json, after every file was held against its hash.

    Raises:
        Tampered, Unusable: see `replay`.
    """
    try:
        golden: dict[str, Any] = json.loads((folder / GOLDEN).read_text(encoding="utf-8"))
        files, schema = dict(golden["files"]), golden["schema_version"]
        assert {INPUTS, OUTPUTS} <= set(files)
        own = golden.pop("golden_sha256")
    except OSError as error:
        raise Unusable(f"{folder / GOLDEN}: cannot be read: {error.strerror}") from None
    except (ValueError, KeyError, TypeError, AssertionError):
        raise Tampered(f"{folder / GOLDEN}: is no golden.json; write the bundle again") from None
    if schema != SCHEMA:
        raise Unusable(f"{folder / GOLDEN}: expected {SCHEMA}, got {schema}; write it again")
    if canonical_sha256(golden) != own:
        raise Tampered(f"{folder / GOLDEN}: was changed since it was written; write it again")
    for name, expected in sorted(files.items()):
        path = folder / name
        if Path(name).name != name or not path.is_file():
            raise Tampered(f"{path}: is in {GOLDEN} but not in the folder; write the bundle again")
        got = hashlib.sha256(path.read_bytes()).hexdigest()
        if got != expected:
            raise Tampered(
                f"{path}: changed since the bundle was written: sha256 {got[:12]}…, {GOLDEN} says "
                f"{expected[:12]}…; write it again"
            )
    return golden


def canonical_sha256(document: dict[str, Any]) -> str:
    """Of the JSON with sorted keys and no spaces."""
    text = json.dumps(document, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()


def environment() -> dict[str, Any]:
    """What runs here: versions, CPU and what it can."""
    import onnxruntime

    return {
        "onnxruntime": onnxruntime.__version__,
        "numpy": np.__version__,
        "arch": platform.machine(),
        "system": platform.system(),
        "cpu": _cpu(),
    }


def _arrays(folder: Path) -> tuple[dict[str, Any], Any]:
    try:
        with np.load(folder / INPUTS, allow_pickle=False) as stored:
            inputs = {name: stored[name] for name in stored.files}
        return inputs, np.load(folder / OUTPUTS, allow_pickle=False)
    except (OSError, ValueError, KeyError, EOFError) as error:
        raise Unusable(f"{folder}: its arrays cannot be read: {error}; write it again") from None


def _content(model: Path) -> bytes:
    try:
        return model.read_bytes()
    except OSError as error:
        raise Unusable(f"{model}: cannot be read: {error.strerror}; check the path") from None


def open_model(model: Path, threads: int) -> Any:
    """A session as the replay runs it. Raises: Unusable."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 4
    try:
        return onnxruntime.InferenceSession(str(model), options, providers=["CPUExecutionProvider"])
    except _failures() as error:
        raise Unusable(
            f"{model}: onnxruntime {onnxruntime.__version__} cannot load it: {_line(error)}"
        ) from None


def _signature(session: Any, inputs: dict[str, Any]) -> str | None:
    """Why the bundle's inputs cannot be given to the model; None: they can."""
    wanted = {one.name: one for one in session.get_inputs()}
    if sorted(wanted) != sorted(inputs):
        return f"it takes {', '.join(sorted(wanted))}; the bundle has {', '.join(sorted(inputs))}"
    for name, one in wanted.items():
        shape, given = one.shape, inputs[name].shape
        fits = len(shape) == len(given) and all(
            not isinstance(size, int) or axis == 0 or size == given[axis]
            for axis, size in enumerate(shape)
        )
        kind = {"tensor(float)": "float32", "tensor(int64)": "int64"}.get(one.type, one.type)
        if not fits or kind != str(inputs[name].dtype):
            return f"{name}: it takes {shape} {kind}, the bundle has {given} {inputs[name].dtype}"
    return None


def run_all(session: Any, inputs: dict[str, Any], batch: int) -> Any:
    """The first output for all samples, `batch` at a time. Raises: Unusable."""
    first = session.get_inputs()[0].shape[0]
    size = first if isinstance(first, int) and first > 0 else batch
    count = len(next(iter(inputs.values())))
    mask = inputs.get("attention_mask")
    parts = []
    for start in range(0, count, size):
        rows = np.minimum(np.arange(start, start + size), count - 1)  # the last one fills it up
        part = {name: value[rows] for name, value in inputs.items()}
        if mask is not None and not isinstance(session.get_inputs()[0].shape[1], int):
            longest = max(1, int(np.flatnonzero(mask[rows].any(axis=0)).max(initial=0)) + 1)
            part = {name: np.ascontiguousarray(value[:, :longest]) for name, value in part.items()}
        try:
            parts.append(session.run(None, part)[0][: count - start])
        except _failures() as error:
            raise Unusable(f"onnxruntime failed on sample {start}: {_line(error)}") from None
    return np.concatenate(parts)


def _judge(
    expected: Any, found: Any, golden: dict[str, Any], *, is_int8: bool, same_machine: bool,
    same_file: bool,
) -> dict[str, Any]:  # fmt: skip
    name, where = "golden outputs", "outputs.npy"
    whose = "the bundle's own file" if same_file else "another file than the bundle's"
    if found.shape != expected.shape:
        return _rung(name, where, False, f"shape {found.shape}, expected {expected.shape}")
    if not np.isfinite(found).all():
        return _rung(name, where, False, "NaN or infinity comes out", n=len(found))
    difference = np.abs(expected.astype(np.float64) - found)
    figures = {
        "max_abs": float(difference.max()),
        "top1_agreement": float((expected.argmax(1) == found.argmax(1)).mean()),
        "sqnr_db": _decibels(expected, difference),
    }
    if np.array_equal(expected, found):
        return _rung(name, where, True, f"{whose}: bit-equal", n=len(found), **figures)
    if same_machine:
        note = f"{whose} on the same onnxruntime and CPU must be bit-equal, and is not"
        return _rung(name, where, False, note, n=len(found), **figures)
    if is_int8 or golden["model"]["int8"]:
        rows = np.arange(len(expected))
        margin = expected.max(1) - expected[rows, found.argmax(1)]
        clear = int((margin > np.sqrt(2) * golden["tolerance"]["noise"]).sum())
        allowed = max(INT8_CHANCE_FLIPS, int(len(found) * (1 - INT8_AGREEMENT)))
        note = f"{whose}: {clear} answers differ by more than int8's noise; {allowed} may"
        return _rung(name, where, clear <= allowed, note, n=len(found), **figures)
    floor = golden["tolerance"]["floor"]
    limit = np.maximum(FLOOR_FACTOR * floor, ATOL + RTOL * np.abs(expected.astype(np.float64)))
    worst = float(limit.flat[int((difference / limit).argmax())])
    passed = bool((difference <= limit).all())
    return _rung(name, where, passed, whose, n=len(found), tolerance=worst, **figures)


def _decibels(expected: Any, difference: Any) -> float | None:
    error = float(np.square(difference).sum())
    signal = float(np.square(expected.astype(np.float64)).sum())
    return 10 * float(np.log10(signal / error)) if error and signal else None


def _rung(
    name: str, reference: str, passed: bool, note: str, n: int = 0, **figures: Any
) -> dict[str, Any]:
    unknown = dict.fromkeys(("max_abs", "tolerance", "sqnr_db", "cosine", "top1_agreement"))
    return {"rung": name, "reference": reference, "n": n, "passed": passed, "note": note,
            **(unknown | figures)}  # fmt: skip


def _cpu() -> str:
    """Model and features, as Linux says them; elsewhere what Python knows."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return platform.processor()
    wanted = ("model name", "flags", "Features", "CPU part")
    found: dict[str, str] = {}
    for line in lines:
        key, _, value = line.partition(":")
        if key.strip() in wanted:
            found.setdefault(key.strip(), " ".join(sorted(value.split())))
    digest = hashlib.sha256(json.dumps(found, sort_keys=True).encode()).hexdigest()[:16]
    return f"{found.get('model name', found.get('CPU part', 'unknown'))} {digest}"


def _failures() -> tuple[type[Exception], ...]:
    """What onnxruntime raises; its exceptions share no base class of their own."""
    from onnxruntime.capi import onnxruntime_pybind11_state as state

    names = ("Fail", "InvalidGraph", "InvalidProtobuf", "InvalidArgument", "NotImplemented",
             "NoModel", "NoSuchFile", "RuntimeException", "EngineError", "EPFail")  # fmt: skip
    own = (getattr(state, name, None) for name in names)
    return (RuntimeError, *(one for one in own if one is not None))


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300]


def main(arguments: list[str]) -> int:
    """`replay.py MODEL.onnx [FOLDER]`; returns the exit code."""
    if not 1 <= len(arguments) <= 2:
        sys.stderr.write("usage: python replay.py MODEL.onnx [FOLDER]\n")
        return 2
    folder = Path(arguments[1]) if len(arguments) > 1 else Path(__file__).resolve().parent
    try:
        found = replay(Path(arguments[0]), folder)
    except (Tampered, Unusable) as error:
        sys.stderr.write(f"error: {error}\n")
        return 6 if isinstance(error, Tampered) else 2
    for one in found["rungs"]:
        passed = "PASS" if one["passed"] else "FAIL"
        sys.stdout.write(f"{passed}  {one['rung']}: {one['note']}\n")
    return 0 if all(one["passed"] for one in found["rungs"]) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
