"""The record of a run, put together from what its stages found, and its publication."""

from __future__ import annotations

import datetime
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .. import __version__
from . import release
from .markdown import to_markdown
from .measure.machine import describe_machine
from .recipe import Recipe
from .report import (
    AgreementRecord,
    CandidateRecord,
    FileRecord,
    LatencyRecord,
    Report,
    Role,
    RungRecord,
    SelectionRecord,
    SpeedupRecord,
    StageRecord,
)
from .stage import Artifact
from .workspace import file_sha256


@dataclass(frozen=True)
class Candidate:
    """A file that could ship. `deployed` is `floating` itself where it is float.

    `student` is the network in torch, None where a float file was given.
    """

    name: str
    student: Artifact | None
    floating: Artifact
    deployed: Artifact

    @property
    def trained(self) -> Artifact:
        """What was measured on validation before int8."""
        return self.student or self.floating

    @property
    def is_quantized(self) -> bool:
        return self.deployed is not self.floating


@dataclass(frozen=True)
class Chosen:
    """The candidate that goes on, and what the table said of all of them."""

    candidate: Candidate
    dense: Candidate  # the float file of the network that nothing was cut from
    table: Artifact


@dataclass(frozen=True)
class Models:
    """The artifacts that are compared: `deployed` is `floating` where nothing is quantized.

    `dense` is the student before it was cut, where what is deployed was. `baseline` is the same
    student trained without a teacher, where the recipe asks for it. `table` is that of all
    candidates.
    """

    teacher: Artifact | None
    student: Artifact | None
    floating: Artifact
    deployed: Artifact
    teacher_onnx: Artifact | None
    dense: Artifact | None
    dense_onnx: Artifact | None
    baseline: Artifact | None
    table: Artifact

    @property
    def is_quantized(self) -> bool:
        return self.deployed is not self.floating

    @property
    def reference(self) -> Role:
        if self.teacher is not None:
            return "teacher"
        if self.dense is not None:
            return "dense"
        return "float" if self.student is None else "student"

    @property
    def reference_onnx(self) -> tuple[str, Artifact]:
        """What speed-up counts from, by the name of its latency."""
        if self.teacher is not None and self.teacher_onnx is not None:
            return "teacher-onnx", self.teacher_onnx
        if self.dense_onnx is not None:
            return "dense-onnx", self.dense_onnx
        return "float", self.floating

    @property
    def deployed_role(self) -> Role:
        return "int8" if self.is_quantized else "float"


def models(
    chosen: Chosen,
    *,
    teacher: Artifact | None,
    teacher_onnx: Artifact | None,
    baseline: Artifact | None,
) -> Models:
    """What is compared now that a candidate was chosen."""
    one, dense = chosen.candidate, chosen.dense
    is_cut = one.student is not dense.student
    return Models(
        teacher=teacher,
        student=one.student,
        floating=one.floating,
        deployed=one.deployed,
        teacher_onnx=teacher_onnx,
        dense=dense.student if is_cut else None,
        dense_onnx=dense.floating if is_cut else None,
        baseline=baseline,
        table=chosen.table,
    )


@dataclass(frozen=True)
class Latency:
    rows: tuple[LatencyRecord, ...]
    speedup: SpeedupRecord


@dataclass
class Elsewhere:
    """What the other machines said: a rung, an agreement and facts each, and two latencies of those
    that answer as this one does."""

    rungs: list[RungRecord] = field(default_factory=list)
    agreements: list[AgreementRecord] = field(default_factory=list)
    latency: list[LatencyRecord] = field(default_factory=list)
    environment: dict[str, Any] = field(default_factory=dict)  # by device


def write_report(
    recipe: Recipe,
    data: Artifact,
    models: Models,
    evidence: Artifact,
    latency: Latency | None,
    *,
    elsewhere: Elsewhere,
    done: Sequence[Artifact],
    notes: Sequence[str],
) -> Report:
    """The record of a run.

    Args:
        done: the committed stages, in order.
        notes: what the flow itself noted; each stage keeps its own.
    """
    found = evidence.measurements
    return Report(
        tool_version=__version__,
        created_utc=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        recipe=recipe.model_dump(mode="json"),
        reference=models.reference,
        deployed=models.deployed_role,
        model_sha256=file_sha256(models.deployed.path / "model.onnx"),
        data_sha256=data.sha256,
        environment={**describe_machine(), "devices": elsewhere.environment},
        stages=tuple(_stage_record(artifact) for artifact in done),
        notes=tuple(dict.fromkeys([*notes, *(note for one in done for note in one.notes)])),
        candidates=[
            CandidateRecord.model_validate(row) for row in models.table.measurements["rows"]
        ],
        selection=SelectionRecord.model_validate(models.table.measurements["selection"]),
        models=[_with_sizes(row, models) for row in found["models"]],
        pairs=found["pairs"],
        parity=(*found["parity"], *elsewhere.rungs),
        latency=(*(() if latency is None else latency.rows), *elsewhere.latency),
        speedup=None if latency is None else latency.speedup,
        file=_file_record(models.deployed.path / "model.onnx"),
        agreements=tuple(elsewhere.agreements),
    )


def _file_record(path: Path) -> FileRecord:
    from ..exporters.audit import requirements  # onnx, which `record` needs nowhere else

    return FileRecord.model_validate(requirements(path))


def publish(
    folder: Path,
    models: Models,
    evidence: Artifact,
    report: Report,
    *,
    beside: Mapping[str, Path | str],
    formats: Mapping[str, Path],
) -> Path:
    """Put everything where the user looks for it, the model last.

    Args:
        beside: further files that the model is used with.
        formats: the model in further formats; published only if it passed.
    """
    assert report.verdict is not None
    return release.publish(
        folder,
        model=models.deployed.path / "model.onnx",
        passed=report.verdict.outcome == "pass",
        formats=formats,
        files={
            "model.fp32.onnx": models.floating.path / "model.onnx",
            **_network_files(models.student),
            "recipe.yaml": report.recipe_yaml,
            release.SAMPLES: evidence.path / release.SAMPLES,
            release.REPORT: report.model_dump_json(indent=1) + "\n",
            "report.md": to_markdown(report),
            release.TRAINING: _training_lines(report),
            **beside,
        },
    )


def _network_files(student: Artifact | None) -> dict[str, Path | str]:
    """The trained network itself, if there is one: weights and what they belong to."""
    if student is None:
        return {}
    program = student.path / "program.pt2"
    if program.exists():
        return {"student.pt2": program}
    return {
        "student.safetensors": student.path / "model.safetensors",
        "student.json": student.path / "network.json",
    }


def baseline_note(found: dict[str, Any]) -> str | None:
    """What distillation has gained over the same student without a teacher, on the test set."""
    correct = {row["role"]: row["correct"] for row in found["models"]}
    if "baseline" not in correct:
        return None
    n = found["models"][0]["n"]
    taught = correct.get("dense", correct["student"])  # before it was cut, as the baseline is
    gain = 100 * (taught - correct["baseline"]) / n
    if gain <= 0:
        return (
            f"WARNING: distillation gained nothing: the student has {gain:+.2f} points against the "
            f"same student without a teacher (n = {n}); look at the teacher, the weights of the "
            "objectives and the schedule"
        )
    return (
        f"distillation gained {gain:+.2f} points over the same student without a teacher (n = {n})"
    )


def _training_lines(report: Report) -> str:
    """Every epoch of every training run, one JSON object a line."""
    lines = []
    for stage in report.stages:
        for entry in (stage.measurements.get("training") or {}).get("history", ()):
            lines.append(json.dumps({"stage": stage.name, **entry}))
    return "".join(f"{line}\n" for line in lines)


def _stage_record(artifact: Artifact) -> StageRecord:
    return StageRecord(
        name=artifact.stage,
        recalled=artifact.recalled,
        seconds=artifact.seconds,
        sha256=artifact.sha256,
        measurements=dict(artifact.measurements),
    )


def _with_sizes(row: dict[str, Any], models: Models) -> dict[str, Any]:
    """Parameters, multiply-adds and bytes come from the ONNX file of the same network."""
    owner = {
        "teacher": models.teacher_onnx,
        "dense": models.dense_onnx,
        "baseline": None,
        "student": models.floating,
        "float": models.floating,
        "int8": models.deployed,
    }[row["role"]]
    if owner is None:
        return row
    sizes = owner.measurements
    return row | {
        "parameters": sizes["parameters"],
        "multiply_adds": sizes["multiply_adds"],
        "onnx_bytes": sizes["bytes"],
    }
