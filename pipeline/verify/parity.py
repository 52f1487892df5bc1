"""The parity ladder: from torch in float64 down to the file that ships, rung by rung.

    torch float64 → torch float32 → exported (optimizations off) → exported (on)
    → final float → int8 (off) → int8 (on), and the shipped files at batch 1, 2 and 7

(of a file that was given: from exported, optimizations off, down.)

Each rung is held against the one above it, so a failure names the step that caused it, and its
agreement with the root is in its note. Float rungs must stay within max(10·floor, 1e-4 +
1e-3·|ref|), floor being what float32 itself is off from float64 (reference/profiling.md). int8
differs from float by design, so there only what must hold is judged: finite values, and the same
answers with onnxruntime's optimizations off and on. Whether int8 is accurate enough is the gate's
question, on the whole test set. What cannot be compared has failed; nothing is skipped.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ...exporters.compare import (
    ATOL,
    RTOL,
    Agreement,
    allowed_error,
    compare,
    float_floor,
)
from ...exporters.graph import batch_size, read_model
from ...exporters.sessions import open_session, run_batches

if TYPE_CHECKING:
    from torch import nn

Array = np.ndarray[Any, Any]
Rung = dict[str, Any]

BATCH_SIZE = 32
ODD_BATCHES = (1, 2, 7)  # one, the exporter's example, and one that divides nothing
REAL_SAMPLES = 64  # fewer say too little (reference/toolkits.md §D)
# Fused int8 kernels round once where the unfused graph rounds twice, so logits differ by up to 4
# steps and a near tie may turn over: answers are judged, not values. Public CIFAR ResNets turn
# over 0.3 to 0.4 % of 3,000 images; so 2 % is a fault, and of few samples two may turn by chance
# (3 of 66 would at that rate happen once in 400). A tie closer than what int8 itself costs is no
# answer to keep: nets with flat logits would fail on nothing but those.
INT8_AGREEMENT, INT8_CHANCE_FLIPS = 0.98, 2

FLOAT64, FLOAT32 = "torch float64", "torch float32"
EXPORTED_OFF, EXPORTED_ON = "exported, optimizations off", "exported, optimizations on"
FINAL = "final float"
INT8_OFF, INT8_ON = "int8, optimizations off", "int8, optimizations on"
REFERENCE_INT8 = "reference int8, optimizations off"


def climb_ladder(
    module: nn.Module | None,
    *,
    exported: Path,
    final_float: Path | None,
    int8: Path | None,
    inputs: Array,
    threads: int,
) -> list[Rung]:
    """All rungs, from the top.

    Args:
        module: the float network, float32 parameters, on the CPU. For a .pt2 program its module;
            where that cannot run in float64, float32 is the root and the first rung says so. None:
            there is only the file `exported`, which is then the root.
        exported, final_float, int8: ONNX files; without `int8` its rungs are absent. Without
            `final_float`, `exported` is what int8 was made from.
        inputs: ≥ 64 real prepared samples. float32, (N, C, H, W): all zeros and all ones are
            added to them. int64, (N, K, S), texts of mixed lengths: batches of several are padded,
            single ones are not, so the last rungs show that padding changes no answer.

    Returns:
        Records of rung, reference, n, max_abs, tolerance (allowed at the element that comes
        closest to it; None where values are not judged), sqnr_db (None where nothing differs),
        cosine, top1_agreement, passed, note. Figures are None where nothing could be compared.

    Raises:
        ExportError, ModelError, RuntimeFailure: a network or file that does not run at all.
    """
    if len(inputs) == 0:
        return [_failed(FLOAT32, FLOAT64, "no real samples were given")]
    real = len(inputs)
    if inputs.dtype.kind == "f":
        inputs = np.concatenate([inputs, np.zeros_like(inputs[:1]), np.ones_like(inputs[:1])])
    fixed = batch_size(read_model(int8 or final_float or exported))
    size = batch_size(read_model(exported)) or fixed or BATCH_SIZE

    def logits(path: Path, *, optimize: bool) -> Array:
        return run_batches(open_session(path, threads=threads, optimize=optimize), inputs, size)

    steps = [(EXPORTED_ON, exported, True)]
    steps += [] if final_float is None else [(FINAL, final_float, True)]
    if module is None:
        root_name, root, floor = EXPORTED_OFF, logits(exported, optimize=False), 0.0
        above_name, above = root_name, root
        rungs = [_root_rung(EXPORTED_OFF, root, "the file as it was given")]
    else:
        root_name, root, above, floor, first = _torch_root(module, inputs, size)
        above_name, rungs = FLOAT32, [first]
        steps = [(EXPORTED_OFF, exported, False), *steps]
    if real < REAL_SAMPLES:
        rungs[0]["note"] += f"; only {real} real samples"
    for name, path, optimize in steps:
        found = logits(path, optimize=optimize)
        rungs.append(_float_rung(name, above_name, above, found, floor))
        _note_root(rungs[-1], root_name, root, found)
        above_name, above = name, found
    noise = 0.0
    if int8 is not None:
        off, on = logits(int8, optimize=False), logits(int8, optimize=True)
        noise = int8_noise(above, off)
        rungs += _int8_rungs(off, on, above=(above_name, above), root=(root_name, root))
    if fixed is None:
        rungs += _batch_rungs(final_float, int8, inputs, floor=floor, noise=noise, threads=threads)
    return rungs


def _int8_rungs(
    off: Array, on: Array, *, above: tuple[str, Array], root: tuple[str, Array]
) -> list[Rung]:
    """int8 against the last float file, and with onnxruntime's optimizations against without."""
    noise = int8_noise(above[1], off)
    rungs = [
        _against_float(INT8_OFF, *above, off),
        same_answers(INT8_ON, INT8_OFF, off, on, noise=noise),
    ]
    for rung, found in zip(rungs, (off, on), strict=True):
        _note_root(rung, *root, found)
    return rungs


def climb_int8(reference: Path, int8: Path, *, inputs: Array, threads: int) -> list[Rung]:
    """As `climb_ladder`, of two int8 files: answers are judged, for their encodings may differ.

    Raises:
        ExportError, RuntimeFailure: a file that does not run at all.
    """

    def logits(path: Path, *, optimize: bool) -> Array:
        return run_batches(open_session(path, threads=threads, optimize=optimize), inputs, size)

    size = batch_size(read_model(int8)) or BATCH_SIZE
    root = logits(reference, optimize=False)
    off, on = logits(int8, optimize=False), logits(int8, optimize=True)
    return [
        _root_rung(REFERENCE_INT8, root, "the int8 file that was given"),
        same_answers(INT8_OFF, REFERENCE_INT8, root, off, noise=0.0),
        same_answers(INT8_ON, INT8_OFF, off, on, noise=0.0),
    ]


def _torch_root(
    module: nn.Module, inputs: Array, size: int
) -> tuple[str, Array, Array, float, Rung]:
    """Name and logits of the root, logits in float32, float32's own error, and the first rung."""
    from ...exporters.reference import logits_float32, logits_float64

    double, reason = logits_float64(module, inputs, batch_size=size)
    single = logits_float32(module, inputs, batch_size=size)
    first = _first_rung(double, single, reason)
    if not len(double):
        return FLOAT32, single, single, 0.0, first
    return FLOAT64, double, single, float_floor(double, single), first


def _first_rung(double: Array, single: Array, reason: str) -> Rung:
    """float32 against float64: the floor itself, so it is judged by the fixed tolerance alone."""
    if not len(double):
        return _root_rung(FLOAT32, single, reason)
    agreement = compare(double, single)
    tolerance = ATOL + RTOL * float(np.abs(double).max())
    return _rung(
        FLOAT32, FLOAT64, agreement, tolerance=tolerance,
        passed=agreement.max_abs is not None and agreement.max_abs <= tolerance,
        note="float32's own error; ten times it is allowed below",
    )  # fmt: skip


def _root_rung(name: str, logits: Array, why: str) -> Rung:
    agreement = compare(logits, logits)
    return _rung(name, "itself", agreement, tolerance=None, passed=True, note=f"the root: {why}")


def _float_rung(name: str, above: str, reference: Array, found: Array, floor: float) -> Rung:
    agreement = compare(reference, found)
    if agreement.problem is not None:
        return _rung(name, above, agreement, tolerance=None, passed=False)
    allowed = allowed_error(reference, floor)
    difference = np.abs(reference.astype(np.float64) - found)
    worst = int((difference / allowed).argmax())
    return _rung(
        name, above, agreement, tolerance=float(allowed.flat[worst]),
        passed=bool((difference <= allowed).all()),
    )  # fmt: skip


def _against_float(name: str, above: str, reference: Array, found: Array) -> Rung:
    """int8 differs from float by design: it must be comparable and finite."""
    note = "must be finite; accuracy is the gate's question"
    return _rung(name, above, compare(reference, found), tolerance=None, passed=True, note=note)


def same_answers(name: str, above: str, reference: Array, found: Array, *, noise: float) -> Rung:
    """The same int8 file run another way: the answers must be the same but for near ties.

    noise: what int8 costs one logit, root mean square. A pair of logits is a near tie when they
        are closer than √2·noise, the error of their difference.
    """
    agreement = compare(reference, found)
    passed, note = False, ""
    if agreement.problem is None:
        rows = np.arange(len(reference))
        margin = reference.max(1) - reference[rows, found.argmax(1)]
        differ, clear = int((margin > 0).sum()), int((margin > np.sqrt(2) * noise).sum())
        allowed = max(INT8_CHANCE_FLIPS, int(agreement.n * (1 - INT8_AGREEMENT)))
        passed = clear <= allowed
        note = f"{differ} answers differ, {clear} of them by more than int8's noise; {allowed} may"
    return _rung(name, above, agreement, tolerance=None, passed=passed, note=note)


def int8_noise(floating: Array, int8: Array) -> float:
    """Root mean square of int8's own error; 0 where it cannot be told, which excuses nothing."""
    if compare(floating, int8).problem is not None:
        return 0.0
    return float(np.sqrt(np.mean(np.square(floating.astype(np.float64) - int8))))


def _batch_rungs(
    final_float: Path | None,
    int8: Path | None,
    inputs: Array,
    *,
    floor: float,
    noise: float,
    threads: int,
) -> Iterator[Rung]:
    """The same samples one at a time, in twos and in sevens: a batch baked in shows here.

    noise: int8's own, by which answers of dynamic int8 may depend on their company.
    """
    for kind, path in (("final float", final_float), ("int8", int8)):
        if path is None:
            continue
        session = open_session(path, threads=threads)
        single, *others = (run_batches(session, inputs, size) for size in ODD_BATCHES)
        above = f"{kind}, batch {ODD_BATCHES[0]}"
        for size, found in zip(ODD_BATCHES[1:], others, strict=True):
            name = f"{kind}, batch {size}"
            if kind == "int8":
                yield same_answers(name, above, single, found, noise=noise)
            else:
                yield _float_rung(name, above, single, found, floor)


def _rung(
    name: str,
    reference: str,
    agreement: Agreement,
    *,
    tolerance: float | None,
    passed: bool,
    note: str = "",
) -> Rung:
    """A record. What cannot be compared has failed, whatever `passed` says."""
    if agreement.problem is not None:
        passed, note = False, agreement.problem
    return {
        "rung": name,
        "reference": reference,
        "n": agreement.n,
        "max_abs": agreement.max_abs,
        "tolerance": tolerance,
        "sqnr_db": agreement.sqnr_db,
        "cosine": agreement.cosine,
        "top1_agreement": agreement.top1_agreement,
        "passed": passed,
        "note": note,
    }


def _failed(name: str, reference: str, why: str) -> Rung:
    return _rung(name, reference, Agreement(0, why), tolerance=None, passed=False)


def _note_root(rung: Rung, name: str, root: Array, found: Array) -> None:
    """Adds the agreement with the root, so that small losses a rung cannot add up unseen."""
    agreement = compare(root, found).top1_agreement
    if agreement is not None:
        said = f"top-1 agreement with {name}: {agreement:.4f}"
        rung["note"] = f"{rung['note']}; {said}" if rung["note"] else said
