"""Published runs made up in milliseconds: every file that `compress gate` reads, all of one run.

The model is not a network (the gate never loads it), and latencies are drawn, not measured.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from edgestill.pipeline import release
from edgestill.pipeline.markdown import to_markdown
from edgestill.pipeline.measure.latency_stats import ratio_of, summarize
from edgestill.pipeline.measure.paired import drop_upper_bound
from edgestill.pipeline.recipe import Recipe
from edgestill.pipeline.report import Check, Report, Verdict

CLASSES = ("cat", "dog", "owl")
ROLES = ("teacher", "student", "float", "int8")


def make_release(
    folder: Path,
    *,
    n: int = 1000,
    lost: int = 3,
    gained: int = 2,
    seed: int = 0,
    outcome: str = "pass",
    gate: dict[str, Any] | None = None,
    test_set: int = 0,
) -> Path:
    """A finished run of `n` test samples, of which int8 loses and gains so many against teacher."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    model = b"onnx" + rng.bytes(2000)
    answers = _answers(n, lost=lost, gained=gained)
    labels = np.arange(n) % len(CLASSES)
    samples = _samples_bytes(folder, labels, answers, test_set=test_set)
    recipe = _recipe(seed, gate or {"max_drop_points": 3.0})
    report = Report.model_validate(
        _report(recipe, model, labels, answers, rng) | {"verdict": _verdict(outcome)}
    )
    sources = folder.with_name(f"{folder.name}-sources")
    sources.mkdir(exist_ok=True)
    (sources / "model").write_bytes(model)
    (sources / "float").write_bytes(b"float" + model)
    (sources / "samples").write_bytes(samples)
    release.publish(
        folder,
        model=sources / "model",
        passed=outcome == "pass",
        formats={},
        files={
            "model.fp32.onnx": sources / "float",
            "recipe.yaml": report.recipe_yaml,
            "samples.parquet": sources / "samples",
            "report.json": report.model_dump_json(indent=1) + "\n",
            "report.md": to_markdown(report),
            "training.jsonl": '{"stage": "student", "epoch": 1}\n',
        },
    )
    return folder


def edit_report(folder: Path, **changes: Any) -> dict[str, Any]:
    """Top-level keys of report.json replaced, its manifest entry not."""
    path = folder / "report.json"
    document: dict[str, Any] = json.loads(path.read_text()) | changes
    path.write_text(json.dumps(document))
    return document


def renew_manifest(folder: Path) -> None:
    """What somebody does who can write the folder: hash everything anew."""
    path = folder / "manifest.json"
    names = json.loads(path.read_text())["sha256"]
    hashes = {name: sha256(folder / name) for name in names if (folder / name).exists()}
    document = {"schema_version": "edgestill-manifest/1", "sha256": hashes}
    path.write_text(json.dumps(document, indent=2) + "\n")


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _answers(n: int, *, lost: int, gained: int) -> dict[str, np.ndarray]:
    """Right or wrong, by role. The teacher is wrong on the last tenth."""
    teacher = np.arange(n) < n - max(n // 10, gained)
    int8 = teacher.copy()
    int8[:lost] = False
    int8[n - gained :] = True
    return {"teacher": teacher, "student": teacher, "float": teacher, "int8": int8}


def _samples_bytes(
    folder: Path, labels: np.ndarray, answers: dict[str, np.ndarray], *, test_set: int
) -> bytes:
    ids = [hashlib.sha256(f"{test_set}/{i}".encode()).hexdigest() for i in range(len(labels))]
    columns: dict[str, Any] = {"id": ids, "label": labels.astype(np.int32)}
    for role, right in answers.items():
        rank = np.where(right, 0, 1).astype(np.int32)
        columns[f"{role}_prediction"] = ((labels + rank) % len(CLASSES)).astype(np.int32)
        columns[f"{role}_rank"] = rank
        columns[f"{role}_p_label"] = np.where(right, 0.9, 0.05).astype(np.float32)
        columns[f"{role}_top1_probability"] = np.full(len(labels), 0.9, np.float32)
        columns[f"{role}_margin"] = np.full(len(labels), 0.8, np.float32)
    table = pa.table(columns).replace_schema_metadata({"class_names": "\n".join(CLASSES)})
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink)
    content: bytes = sink.getvalue().to_pybytes()
    return content


def _recipe(seed: int, gate: dict[str, Any]) -> dict[str, Any]:
    recipe = Recipe.model_validate(
        {
            "seed": seed,
            "data": {"train": {"path": "digits"}, "test": {"fraction": 0.4}},
            "teacher": {"model": "plain_cnn_small", "train": {"epochs": 1}},
            "student": {"model": "plain_cnn_small"},
            "quantize": {},
            "gate": gate,
        }
    )
    return recipe.model_dump(mode="json")


def _report(
    recipe: dict[str, Any],
    model: bytes,
    labels: np.ndarray,
    answers: dict[str, np.ndarray],
    rng: np.random.Generator,
) -> dict[str, Any]:
    n, digest = len(labels), hashlib.sha256(model).hexdigest()
    raw = {
        "teacher-onnx": [_nanoseconds(rng, 300_000) for _ in range(5)],
        "int8": [_nanoseconds(rng, 100_000) for _ in range(5)],
    }
    pairs = [("teacher", "int8"), ("teacher", "student"), ("student", "int8")]
    return {
        "tool_version": "0.1.0",
        "created_utc": "2026-01-01T00:00:00+00:00",
        "recipe": recipe,
        "reference": "teacher",
        "deployed": "int8",
        "model_sha256": digest,
        "data_sha256": hashlib.sha256(b"data").hexdigest(),
        "environment": {"cpu_model": "made up", "versions": {"numpy": np.__version__}},
        "stages": [],
        "notes": [],
        "candidates": [
            {"name": "int8", "n": 100, "correct": 90, "quantization_drop_points": 0.1,
             "bytes": len(model), "multiply_adds": 1_000_000, "int8_share": 0.99, "p50_ms": 0.1}
        ],
        "selection": {"index": 0, "held": True, "refused": False, "why": "int8 is the fastest"},
        "models": [_model(role, right, labels) for role, right in answers.items()],
        "pairs": [_pair(answers, *roles, n=n) for roles in pairs],
        "parity": [
            {"rung": "int8", "reference": "float", "n": 64, "max_abs": 0.1, "tolerance": 1.0,
             "sqnr_db": 40.0, "cosine": 1.0, "top1_agreement": 1.0, "passed": True}
        ],
        "latency": [_latency(name, launches) for name, launches in raw.items()],
        "speedup": {"reference": "teacher-onnx", "candidate": "int8"} | ratio_of(*raw.values()),
        "file": {"bytes": len(model), "opset": 17, "ops": {"ai.onnx:Conv": 3}},
    }  # fmt: skip


def _model(role: str, right: np.ndarray, labels: np.ndarray) -> dict[str, Any]:
    per_class = {
        name: (int(right[labels == index].sum()), int((labels == index).sum()))
        for index, name in enumerate(CLASSES)
    }
    runs_in = "onnxruntime" if role in ("float", "int8") else "torch"
    counts = {"n": len(labels), "correct": int(right.sum()), "per_class": per_class}
    return {"role": role, "runs_in": runs_in, **counts}


def _pair(
    answers: dict[str, np.ndarray], reference: str, candidate: str, *, n: int
) -> dict[str, Any]:
    before, after = answers[reference], answers[candidate]
    lost, gained = int((before & ~after).sum()), int((~before & after).sum())
    bound = float(drop_upper_bound(lost, gained, n=n, confidence=0.95))
    names = {"reference": reference, "candidate": candidate}
    return {**names, "n": n, "lost": lost, "gained": gained, "upper_bound_95": bound}


def _nanoseconds(rng: np.random.Generator, centre: float) -> list[int]:
    return [int(value) for value in centre * rng.lognormal(0, 0.02, size=40)]


def _latency(name: str, launches: list[list[int]]) -> dict[str, Any]:
    rest = {"load_ms": 1.0, "first_ms": 1.0, "cpu_ms": 1.0, "peak_rss_bytes": 50_000_000}
    head = {"name": name, "runs_in": "onnxruntime", "threads": 1, "raw_ns": launches}
    return {**head, **summarize(launches), **rest}


def _verdict(outcome: str) -> Verdict:
    check = Check(name="parity", outcome=outcome, value=0, bound=None, limit=0, unit="rungs",
                  text="made up")  # fmt: skip
    return Verdict(outcome=outcome, exit_code=0, checks=(check,), confidence=0.95,
                   tool_version="0.1.0", model_sha256="", data_sha256="", recipe_sha256="",
                   policy_sha256="")  # fmt: skip
