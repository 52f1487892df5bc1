"""The stages as `flow.py` calls them: each names what it reads, so that it is recalled exactly
when nothing it reads has changed, and hands its work to the capability that does it. Those that
learn are in `learning.py`; what the report makes of all is in `record.py`.
"""

from __future__ import annotations

import hashlib
import json
import time
from pathlib import Path
from typing import Any

from ..exporters.sessions import open_session, run_batches
from .data.preprocess import to_input
from .data.stage import prepare_data as prepare
from .data.stage import source_fingerprint
from .export import export_float
from .measure.latency import Row, speedup
from .measure.latency import measure_latency as measure
from .quantize.ptq import quantize_static
from .record import Latency, Models, baseline_note
from .report import LatencyRecord, SpeedupRecord
from .stage import Artifact, Noting
from .verify.evidence import gather
from .work import Work, memory_budget, open_sets, run_stage, without_paths

LATENCY_INPUTS = 8  # real images in rotation, so that no branch or cache learns one by heart


def prepare_data(work: Work) -> Artifact:
    spec = work.recipe.data
    work.data_fingerprint = source_fingerprint(spec)
    return run_stage(
        work,
        "data",
        lambda context: prepare(spec, context=context),
        reads={"spec": without_paths(spec.model_dump(mode="json")), "data": work.data_fingerprint},
    )


def export_student(work: Work, data: Artifact, student: Artifact) -> Artifact:
    return _export(work, "export", student, data)


def export_teacher(work: Work, data: Artifact, teacher: Artifact) -> Artifact | None:
    """The teacher's float ONNX: what speed-up and size are measured against."""
    return _export(work, "export-teacher", teacher, data) if work.recipe.profile else None


def quantize(work: Work, data: Artifact, floating: Artifact) -> Artifact:
    spec, export = work.recipe.quantize, work.recipe.export
    assert spec is not None
    return run_stage(
        work,
        "int8",
        lambda context: quantize_static(
            floating.path, data.path, spec, context=context, export=export
        ),
        reads={
            "spec": spec.model_dump(mode="json"),
            "export": export.model_dump(mode="json"),
            "inputs": [data.sha256, floating.sha256],
        },
    )


def verify(work: Work, data: Artifact, models: Models) -> Artifact:
    """Parity rung by rung, and every model once over the whole test set."""
    artifacts = (
        models.teacher, models.student, models.floating, models.deployed, models.baseline
    )  # fmt: skip
    evidence = run_stage(
        work,
        "verify",
        lambda context: gather(
            data.path,
            teacher=None if models.teacher is None else models.teacher.path,
            student=models.student.path,
            floating=models.floating.path,
            int8=models.deployed.path if models.is_quantized else None,
            baseline=None if models.baseline is None else models.baseline.path,
            reference=models.reference,
            context=context,
            memory_budget_bytes=memory_budget(work),
        ),
        reads={"inputs": [data.sha256, *(a and a.sha256 for a in artifacts)]},
    )
    gained = baseline_note(dict(evidence.measurements))
    if gained is not None:
        work.notes.append(gained)
        work.workspace.events.note(gained)
    return evidence


def measure_latency(work: Work, data: Artifact, models: Models) -> Latency:
    """Every model in turns, always fresh: a time that is gated is never recalled."""
    spec, events = work.recipe.profile, Noting(work.workspace.events)
    assert spec is not None
    events.started("latency")
    begun = time.monotonic()
    opened = open_sets(work, data)
    some = opened.calibration[:LATENCY_INPUTS]
    inputs = to_input(opened.train.images[some], opened.preprocess)
    onnx = {"float": models.floating} | ({"int8": models.deployed} if models.is_quantized else {})
    torch_nets = {"student": models.student}
    if models.teacher is not None and models.teacher_onnx is not None:
        onnx = {"teacher-onnx": models.teacher_onnx} | onnx
        torch_nets |= {"teacher": models.teacher}
    rows = [
        Row(name, "onnx", path := artifact.path / "model.onnx", _answers(path, inputs))
        for name, artifact in onnx.items()
    ]
    rows += [Row(name, "torch", artifact.path) for name, artifact in torch_nets.items()]
    measured = measure(
        rows,
        inputs,
        launches=spec.launches,
        runs=spec.runs,
        threads=tuple(sorted({1, work.workspace.threads})),
        events=events,
    )
    records = tuple(LatencyRecord.model_validate(row) for row in measured)
    reference = "float" if models.teacher_onnx is None else "teacher-onnx"
    deployed = models.deployed_role
    at_one = {row["name"]: row for row in measured if row["threads"] == 1}
    ratio = speedup(at_one[reference], at_one[deployed])
    if models.is_quantized and at_one["int8"]["p50_ms"] >= at_one["float"]["p50_ms"]:
        events.note(
            f"int8 is not faster than the float model here ({at_one['int8']['p50_ms']:.3f} against "
            f"{at_one['float']['p50_ms']:.3f} ms, one thread): it saves bytes, not time"
        )
    work.notes += events.notes
    events.finished("latency", seconds=time.monotonic() - begun, recalled=False)
    return Latency(records, SpeedupRecord(reference=reference, candidate=deployed, **ratio))


def _answers(path: Path, inputs: Any) -> Any:
    """What the model answers untimed: a fast wrong answer is no result."""
    return run_batches(open_session(path, threads=1), inputs, len(inputs))


def _export(work: Work, name: str, network: Artifact, data: Artifact) -> Artifact:
    spec = work.recipe.export
    metadata = {"edgestill.recipe_sha256": recipe_sha256(work)}
    return run_stage(
        work,
        name,
        lambda context: export_float(
            network.path, data.path, spec, context=context, metadata=metadata
        ),
        reads={
            "spec": spec.model_dump(mode="json"),
            "metadata": metadata,
            "inputs": [data.sha256, network.sha256],
        },
    )


def recipe_sha256(work: Work) -> str:
    """Of the sections up to export, with every path replaced by the hash of what it names."""
    sections = work.recipe.model_dump(
        mode="json",
        include={"task", "seed", "data", "teacher", "student", "distill", "quantize", "export"},
    )
    document = {
        **without_paths(sections),
        "data_sha256": work.data_fingerprint,
        "origins": work.origins,
    }
    return hashlib.sha256(json.dumps(document, sort_keys=True).encode()).hexdigest()
