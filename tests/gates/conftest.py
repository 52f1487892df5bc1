"""Made-up evidence: counts of right and wrong answers, and a report around them."""

from __future__ import annotations

import datetime
from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from edgestill.pipeline.gates.evidence import Evidence
from edgestill.pipeline.gates.samples import Answers, Samples
from edgestill.pipeline.report import (
    CandidateRecord,
    FileRecord,
    LatencyRecord,
    ModelRecord,
    Report,
    RungRecord,
    SelectionRecord,
    SpeedupRecord,
)

CLASSES = 10
TODAY = datetime.date(2026, 6, 1)


def rung(passed: bool = True) -> RungRecord:
    return RungRecord(rung="int8", reference="float", n=64, max_abs=0.0, tolerance=1.0,
                      sqnr_db=40.0, cosine=1.0, top1_agreement=1.0, passed=passed)  # fmt: skip


def candidate(int8_share: float = 1.0) -> CandidateRecord:
    return CandidateRecord(
        name="int8", n=100, correct=90, quantization_drop_points=0.0, bytes=1, multiply_adds=1,
        int8_share=int8_share, p50_ms=1.0,
    )  # fmt: skip


def selection(*, held: bool = True, refused: bool = False) -> SelectionRecord:
    return SelectionRecord(index=0, held=held, refused=refused, why="int8: it is so")


def report(**changes: Any) -> Report:
    fields: dict[str, Any] = {
        "tool_version": "0", "created_utc": "", "recipe": {"quantize": {}}, "reference": "teacher",
        "deployed": "int8", "model_sha256": "m", "data_sha256": "d", "environment": {},
        "stages": (), "notes": (), "pairs": (), "parity": (rung(),),
        "latency": (), "speedup": None, "candidates": (candidate(),), "selection": selection(),
        "models": (ModelRecord(role="int8", runs_in="onnxruntime", n=1, correct=1, per_class={},
                               multiply_adds=1_000_000),),
        "file": FileRecord(bytes=1000, opset=18, ops={"ai.onnx:Conv": 2, "ai.onnx:Relu": 1}),
    }  # fmt: skip
    return Report(**{**fields, **changes})


def answers(labels: Any, prediction: Any, **columns: Any) -> Answers:
    """Answers whose other columns follow from the predictions, where they are not given."""
    right = prediction == labels
    given = {
        "rank": np.where(right, 0, 1),
        "p_label": np.where(right, 0.9, 0.05),
        "top1_probability": np.full(len(labels), 0.9),
        "margin": np.full(len(labels), 0.8),
    }
    return Answers(prediction=prediction, **{**given, **columns})


def samples(labels: Any, models: Mapping[str, Answers], *, classes: int = CLASSES) -> Samples:
    ids = np.array([f"{number:08x}" for number in range(len(labels))], dtype=object)
    names = tuple(f"class{number}" for number in range(classes))
    return Samples(ids, np.asarray(labels), names, models)


def counted(lost: int, gained: int, n: int, *, wrong: int = 0) -> tuple[Any, Any, Any]:
    """Labels, the reference's and the candidate's predictions, `wrong` of them wrong in both."""
    labels = np.arange(n) % CLASSES
    other = (labels + 1) % CLASSES
    place = np.arange(n)
    before = np.where((place >= lost) & (place < lost + gained + wrong), other, labels)
    after = np.where(
        (place < lost) | ((place >= lost + gained) & (place < lost + gained + wrong)), other, labels
    )
    return labels, before, after


def evidence(
    lost: int = 0,
    gained: int = 0,
    n: int = 5000,
    *,
    wrong: int = 0,
    student: tuple[int, int] | None = None,
    baseline: Evidence | None = None,
    **changes: Any,
) -> Evidence:
    """student: (lost, gained) of int8 against it; None: it answers as int8 does."""
    labels, before, after = counted(lost, gained, n, wrong=wrong)
    models = {"teacher": answers(labels, before), "int8": answers(labels, after)}
    models["student"] = models["int8"]
    if student is not None:
        right = models["int8"].correct
        loses = np.flatnonzero(~right)[: student[0]]
        gains = np.flatnonzero(right)[: student[1]]
        prediction = after.copy()
        prediction[loses], prediction[gains] = labels[loses], (labels[gains] + 1) % CLASSES
        models["student"] = answers(labels, prediction)
    return Evidence(report(**changes), samples(labels, models), baseline=baseline, today=TODAY)


def latency(
    launches: Any, name: str = "int8", *, device: str = "local", **changes: Any
) -> LatencyRecord:
    """launches: nanoseconds, a list for each launch."""
    raw = [[int(ns) for ns in launch] for launch in launches]
    pooled = np.concatenate([np.asarray(one) for one in raw]) / 1e6
    middle = float(np.median(pooled))
    fields: dict[str, Any] = {
        "name": name, "device": device, "runs_in": "onnxruntime", "threads": 1, "n": len(pooled),
        "launches": len(raw), "p50_ms": middle, "p50_ci95_ms": (middle, middle),
        "launch_p50_ms": (middle, middle), "min_ms": float(pooled.min()), "p90_ms": None,
        "p95_ms": None, "p99_ms": None, "mad_ms": 0.0, "cv": float(pooled.std() / pooled.mean()),
        "load_ms": 1.0, "first_ms": 1.0, "cpu_ms": 1.0, "peak_rss_bytes": 50_000_000,
        "raw_ns": raw,
    }  # fmt: skip
    return LatencyRecord(**{**fields, **changes})


def timed(ratio: float = 2.0, *, spread: float = 0.01, launches: int = 5, **changes: Any) -> Any:
    """Fields of a report: teacher-onnx and int8 of 1 ms, its p50 `ratio` times as large."""
    rng = np.random.default_rng(0)
    rows = [
        latency(base * 1e6 * np.exp(rng.normal(0, spread, (launches, 40))), name, **changes)
        for name, base in (("teacher-onnx", ratio), ("int8", 1.0))
    ]
    speedup = SpeedupRecord(
        reference="teacher-onnx", candidate="int8", ratio=ratio, ci95=(ratio, ratio)
    )
    return {"latency": tuple(rows), "speedup": speedup}


@pytest.fixture(scope="session")
def case() -> SimpleNamespace:
    """The functions above, which tests cannot import under `--import-mode=importlib`."""
    functions = (
        rung, candidate, selection, report, answers, samples, counted, evidence, latency, timed
    )  # fmt: skip
    return SimpleNamespace(**{one.__name__: one for one in functions}, today=TODAY)
