"""Both models over the whole set: right answers, the paired drop, and what the flips are worth.

A flip is benign where the reference itself hardly decides: its margin (best logit minus second) is
within the noise. Noise of float is what its tolerance allows; of int8, the error that rounding
makes of a difference of two logits, √2 times its root mean square, and never more than a tenth of
the logits' own spread, so that a broken net does not excuse itself.
"""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ...exporters.compare import agrees, allowed_error, compare
from ...exporters.sessions import open_session, run_batches
from ..errors import IntegrityError, MeasurementError, WeightsError
from ..measure.accuracy import confusion
from ..measure.doubts import check_class_order
from ..measure.paired import drop_upper_bound
from ..report import RungRecord
from .parity import same_answers
from .record import FlipRecord, TaskRecord, rung
from .samples import TestSet

Array = np.ndarray[Any, Any]

CONFIDENCE = 0.95
CLEAR_FLIPS = 100  # listed in the record
BATCH, BATCH_BYTES = 64, 8 * 2**20  # images a call, fewer where they are large
NOISE_SHARE = 0.1  # of the logits' spread: 20 dB, what int8 must reach (reference/profiling.md)
COLUMN_CORRELATION = 0.95  # of an output with the one that answers in its place
ELSEWHERE_SAMPLES = 1000  # that other CPUs answer: a text takes a fifth of a second under qemu
LEAST_FOR_CHANCE = 20  # samples, below which nothing is said of guessing
REFERENCE, MODEL = "reference", "model"
OFF = ", optimizations off"

Runs = Mapping[str, tuple[Path, bool]]


def answers(runs: Runs, test: TestSet, *, threads: int) -> dict[str, Array]:
    """Logits (N, C) of every run on the whole set, NaN where they are NaN.

    Each input is prepared once for all of them. Texts go one by one, as on a device.

    Args:
        runs: name → ONNX file, and whether onnxruntime optimises it.

    Raises:
        MeasurementError: an empty set. ExportError, RuntimeFailure: a file does not run.
    """
    n = len(test.samples)
    if not n:
        raise MeasurementError("the test set is empty; give one with samples")
    sessions = {
        name: open_session(path, threads=1, optimize=on) for name, (path, on) in runs.items()
    }
    one = test.inputs(slice(0, 1))
    size = max(1, min(BATCH, BATCH_BYTES // max(1, one.nbytes))) if one.ndim == 4 else 1

    def batch(start: int) -> list[Array]:
        inputs = test.inputs(slice(start, start + size))
        return [run_batches(session, inputs, size) for session in sessions.values()]

    # batches side by side: one small batch keeps a second thread busier with waiting than working
    with ThreadPoolExecutor(threads) as pool:
        parts = list(pool.map(batch, range(0, n, size)))
    return dict(zip(runs, map(np.concatenate, zip(*parts, strict=True)), strict=True))


def task_parity(
    reference: Array, model: Array, test: TestSet, *, is_int8: bool, limit_points: float
) -> tuple[TaskRecord, RungRecord]:
    """What both answer, and whether the model keeps the reference's task.

    Args:
        reference, model: logits, (N, C).

    Raises:
        MeasurementError: the reference gives NaN: nothing can be held against it.
    """
    if not np.isfinite(reference).all():
        raise MeasurementError(
            "the reference gives NaN or infinity on the test set; look at its weights and at mean "
            "and std"
        )
    finite = np.asarray(np.isfinite(model).all(axis=1))
    predicted = reference.argmax(1), np.where(finite, np.nan_to_num(model).argmax(1), -1)
    margins = _margins(reference), _margins(np.nan_to_num(model))
    flipped = predicted[0] != predicted[1]
    benign = flipped & finite & (margins[0] <= _noise(reference, model, is_int8=is_int8))
    clear = np.flatnonzero(flipped & ~benign)
    clear = clear[np.argsort(-margins[0][clear], kind="stable")]
    names = test.class_names
    shown = [_flip(int(row), test, predicted, margins, finite, names) for row in clear]
    record = TaskRecord(
        n=len(reference),
        **_counts(predicted, test),
        limit_points=limit_points,
        flips=int(flipped.sum()),
        benign=int(benign.sum()),
        clear=tuple(shown[:CLEAR_FLIPS]),
    )
    return record, _task_rung(record, len(clear), int((~finite).sum()), is_int8=is_int8)


def same_file_rung(
    name: str, above: str, before: Array, after: Array, *, floor: float, noise: float | None
) -> RungRecord:
    """One file run in two ways: with optimizations and without, or on two CPUs.

    Args:
        above: what `before` is called.
        noise: of int8, by which answers may differ; None: float.
    """
    if noise is not None:
        return RungRecord(**same_answers(name, above, before, after, noise=noise))
    passed, note = agrees(before, after, floor=floor)
    same = compare(before, after).top1_agreement
    return rung(name, above, passed=passed, note=note, n=len(after), top1_agreement=same)


def elsewhere_rung(device: str, here: Array, there: Array, *, noise: float | None) -> RungRecord:
    """One file on another CPU, against what it answers on this one.

    Args:
        noise: as `same_file_rung`; capped as a flip's, for a file that is broken here has much.
    """
    if noise is not None:
        noise = min(noise, NOISE_SHARE * _spread(here))
    return same_file_rung(f"on {device}", "on this machine", here, there, floor=0.0, noise=noise)


def order_rung(reference: Array, model: Array) -> RungRecord | None:
    """Failed where the model's outputs are the reference's in another order; else None."""
    if not (np.isfinite(reference).all() and np.isfinite(model).all()) or len(model) < 3:
        return None
    centred = [one - one.mean(1, keepdims=True) for one in (reference, model)]
    unit = [one / np.maximum(np.linalg.norm(one, axis=0), 1e-12) for one in centred]
    alike = unit[0].T @ unit[1]  # (C, C): rows the reference's outputs
    best, own = alike.argmax(1), np.arange(len(alike))
    moved = own[best != own]
    if not len(moved) or len(set(best.tolist())) < len(best):
        return None
    if (alike[moved, best[moved]] < COLUMN_CORRELATION).any():
        return None
    said = ", ".join(f"output {best[at]} gives what output {at} should" for at in moved[:6])
    return rung("classes", "the reference's outputs", passed=False, n=len(model), note=said)


def labels_rung(reference: Array, test: TestSet, recorded: Path | None) -> RungRecord:
    """Whether the labels are those that the reference was trained for.

    Args:
        recorded: samples.parquet of a run: the same content had this label then.

    Raises:
        IntegrityError: that file cannot be read.
    """
    labels, n = test.samples.labels, len(test.samples)
    if recorded is not None:
        known = _recorded(recorded)
        pairs = [(known[h], int(own)) for h, own in zip(test.samples.hashes, labels, strict=True)
                 if h in known]  # fmt: skip
        changed = sum(before != now for before, now in pairs)
        if changed:
            said = f"{changed} of {len(pairs)} samples had another label in the run"
            return rung("labels", str(recorded), passed=False, n=len(pairs), note=said)
    try:
        check_class_order(confusion(reference, labels), test.class_names or _numbers(reference))
    except WeightsError as error:
        return rung("labels", "the reference's answers", passed=False, n=n, note=str(error))
    right = float((reference.argmax(1) == labels).mean())
    chance = float(np.bincount(labels).max()) / n
    guesses = right <= chance + 2 * (chance * (1 - chance) / n) ** 0.5
    said = f"the reference is right on {right:.1%}, guessing on {chance:.1%}"
    if n < LEAST_FOR_CHANCE or not guesses:
        return rung("labels", "the reference's answers", passed=True, n=n, note=said)
    said += ": labels or preprocessing are not those that it was trained with"
    return rung("labels", "the reference's answers", passed=False, n=n, note=said)


def _numbers(logits: Array) -> tuple[str, ...]:
    return tuple(str(index) for index in range(logits.shape[1]))


def _recorded(path: Path) -> dict[str, int]:
    try:
        table = pq.read_table(path, columns=["id", "label"])
    except (pa.ArrowException, OSError) as error:
        raise IntegrityError(f"{path}: cannot be read: {error}; run again") from error
    return dict(zip(table["id"].to_pylist(), table["label"].to_pylist(), strict=True))


def _margins(logits: Array) -> Array:
    two = np.partition(logits.astype(np.float64), -2, axis=1)[:, -2:]
    margin: Array = two[:, 1] - two[:, 0]
    return margin


def _noise(reference: Array, model: Array, *, is_int8: bool) -> Array | float:
    if not is_int8:
        widest: Array = 2 * allowed_error(reference, 0.0).max(axis=1)
        return widest
    finite = np.isfinite(model).all(axis=1)
    error = _rms(reference[finite].astype(np.float64) - model[finite])
    return float(np.sqrt(2) * min(error, NOISE_SHARE * _spread(reference)))


def _spread(logits: Array) -> float:
    return _rms(logits - logits.mean(axis=1, keepdims=True))


def _rms(values: Array) -> float:
    return float(np.sqrt(np.mean(np.square(values)))) if values.size else 0.0


def _counts(predicted: tuple[Array, Array], test: TestSet) -> dict[str, Any]:
    if not test.labelled:
        names = ("reference_correct", "candidate_correct", "lost", "gained", "upper_bound_95")
        return dict.fromkeys(names)
    before, after = (one == test.samples.labels for one in predicted)
    lost, gained = int((before & ~after).sum()), int((~before & after).sum())
    bound = float(drop_upper_bound(lost, gained, n=len(before), confidence=CONFIDENCE))
    return {
        "reference_correct": int(before.sum()),
        "candidate_correct": int(after.sum()),
        "lost": lost,
        "gained": gained,
        "upper_bound_95": bound,
    }


def _flip(
    row: int, test: TestSet, predicted: tuple[Array, Array], margins: tuple[Array, Array],
    finite: Array, names: tuple[str, ...],
) -> FlipRecord:  # fmt: skip
    def called(index: int) -> str:
        return "nothing finite" if index < 0 else names[index] if names else str(index)

    samples = test.samples
    return FlipRecord(
        id=str(samples.hashes[row]),
        name=str(samples.names[row]) if samples.names is not None else str(row),
        label=called(int(samples.labels[row])) if test.labelled else None,
        reference=called(int(predicted[0][row])),
        candidate=called(int(predicted[1][row])),
        reference_margin=float(margins[0][row]),
        candidate_margin=float(margins[1][row]) if finite[row] else None,
    )


def _task_rung(task: TaskRecord, clear: int, nan: int, *, is_int8: bool) -> RungRecord:
    agreement = 1 - task.flips / task.n
    if nan:
        note = f"NaN or infinity for {nan} of {task.n} samples"
        return rung("task", REFERENCE, passed=False, n=task.n, note=note)
    drop = task.drop_points
    if drop is None or task.upper_bound_95 is None:
        passed, note = is_int8 or not clear, f"no labels; {clear} clear flips"
    else:
        right = task.reference_correct or 0, task.candidate_correct or 0
        passed = drop <= task.limit_points and (is_int8 or not clear)
        note = (
            f"accuracy {right[0] / task.n:.2%} → {right[1] / task.n:.2%}, drop {drop:.2f} points "
            f"({task.lost} lost, {task.gained} gained), 95 % upper bound "
            f"{100 * task.upper_bound_95:.2f}, limit {task.limit_points:g}; {clear} clear flips"
        )
        if passed and 100 * task.upper_bound_95 > task.limit_points:
            note += "; too few samples to prove that limit"
    return rung("task", REFERENCE, passed=passed, n=task.n, note=note, top1_agreement=agreement)
