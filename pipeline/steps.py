"""The stages as `flow.py` calls them: each names what it reads, so that it is recalled exactly
when nothing it reads has changed, and hands its work to the capability that does it.
"""

from __future__ import annotations

import datetime
import hashlib
import importlib.metadata
import json
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml

from .. import __version__
from ..exporters.sessions import open_session, run_batches
from ..models.source import open_network
from ..models.weights import load_weights, read_state
from . import release
from .data.dataset import Data, open_data
from .data.preprocess import to_input
from .data.stage import prepare_data as prepare
from .data.stage import source_fingerprint
from .distill.labels import store_labels as store
from .distill.student import train_student as train
from .distill.teacher import prepare_teacher as teach
from .errors import RecipeError
from .export import export_float
from .gate import provable_drop
from .measure.latency import Row, speedup
from .measure.latency import measure_latency as measure
from .measure.machine import available_threads, cpu_capability, describe_machine
from .quantize.ptq import quantize_static
from .recipe import NetworkSpec, Recipe
from .report import LatencyRecord, Report, Role, SpeedupRecord, StageRecord, to_markdown
from .stage import Artifact, Events, Noting
from .verify.evidence import gather
from .workspace import Workspace, file_sha256, tree_sha256

PACKAGE = Path(__file__).resolve().parent.parent
SOURCES = ("models", "exporters", "pipeline")  # the root also holds tests, and perhaps a .venv
# Releases that change a stage's bytes; the rest of the environment is in the report.
PINNED = ("torch", "onnx", "onnxruntime", "onnxscript", "onnxsim", "numpy", "pillow")
LATENCY_INPUTS = 8  # real images in rotation, so that no branch or cache learns one by heart


@dataclass
class Work:
    """A recipe under way: its workspace, and what was committed so far, in order."""

    recipe: Recipe
    workspace: Workspace
    done: list[Artifact] = field(default_factory=list)
    # "teacher"/"student" → hash of its weights file and of the user's own modules
    origins: dict[str, str] = field(default_factory=dict)
    data_fingerprint: str = ""
    notes: list[str] = field(default_factory=list)  # the flow's own; stages keep theirs


@dataclass(frozen=True)
class Models:
    """The artifacts that are compared: `deployed` is `floating` where nothing is quantized."""

    teacher: Artifact | None
    student: Artifact
    floating: Artifact
    deployed: Artifact
    teacher_onnx: Artifact | None

    @property
    def is_quantized(self) -> bool:
        return self.deployed is not self.floating

    @property
    def reference(self) -> Role:
        return "student" if self.teacher is None else "teacher"

    @property
    def deployed_role(self) -> Role:
        return "int8" if self.is_quantized else "float"


def begin(recipe: Recipe, root: Path, *, events: Events, fresh: bool) -> Work:
    """Open the workspace on the machine as it is."""
    compute = recipe.compute
    device = compute.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    elif device == "cuda" and not torch.cuda.is_available():
        raise RecipeError("compute.device: cuda is asked for, and torch sees no CUDA device here")
    threads = compute.threads or available_threads()
    if threads > available_threads():
        raise RecipeError(
            f"compute.threads: {threads} asked for, this process may use {available_threads()}"
        )
    workspace = Workspace(
        root,
        seed=recipe.seed,
        threads=threads,
        device=device,
        events=events,
        identity={
            "source": [tree_sha256(PACKAGE / part, pattern="*.py") for part in SOURCES],
            "versions": {name: importlib.metadata.version(name) for name in PINNED},
            "cpu": cpu_capability(),
        },
    )
    if fresh:
        workspace.forget()
    return Work(recipe, workspace)


def prepare_data(work: Work) -> Artifact:
    spec = work.recipe.data
    work.data_fingerprint = source_fingerprint(spec)
    return _run(
        work,
        "data",
        lambda context: prepare(spec, context=context),
        reads={"spec": _without_paths(spec.model_dump(mode="json")), "data": work.data_fingerprint},
    )


def check_before_training(work: Work, data: Artifact) -> None:
    """Everything that can be known to fail later is said now; so is what the test set can prove."""
    opened = _open(work, data)
    for name, spec in (("teacher", work.recipe.teacher), ("student", work.recipe.student)):
        if spec is not None:
            work.origins[name] = _check_network(spec, opened, where=name)
    gate, n = work.recipe.gate, len(opened.test.labels)
    if gate.max_drop_points is not None:
        perfect, usual = (
            100 * provable_drop(n, flips=flips, confidence=gate.confidence) for flips in (0.0, 0.04)
        )
        text = (
            f"{n} test samples can prove a drop of at most {perfect:.2f} points for a model that "
            f"answers as its reference does, {usual:.2f} where 4 % of the answers differ "
            f"(limit {gate.max_drop_points:g}, confidence {gate.confidence:g})"
        )
        if perfect > gate.max_drop_points:
            text += ": too few samples for this limit, so the gate cannot pass"
        work.notes.append(text)
        work.workspace.events.note(text)


def prepare_teacher(work: Work, data: Artifact) -> Artifact:
    spec = work.recipe.teacher
    assert spec is not None
    return _run(
        work,
        "teacher",
        lambda context: teach(spec, data.path, context=context, memory_budget_bytes=_budget(work)),
        reads=_network_reads(work, "teacher", spec, data),
    )


def store_labels(work: Work, data: Artifact, teacher: Artifact) -> Artifact:
    spec = work.recipe.distill
    assert spec is not None
    return _run(
        work,
        "labels",
        lambda context: store(
            spec, teacher.path, data.path, context=context, memory_budget_bytes=_budget(work)
        ),
        reads={
            "views": spec.views,
            "precision": spec.precision,
            "augment": spec.augment.model_dump(mode="json"),
            "inputs": [data.sha256, teacher.sha256],
        },
    )


def train_student(
    work: Work, data: Artifact, teacher: Artifact | None, labels: Artifact | None
) -> Artifact:
    spec, distill = work.recipe.student, work.recipe.distill
    return _run(
        work,
        "student",
        lambda context: train(
            spec,
            distill,
            data.path,
            None if labels is None else labels.path,
            None if teacher is None else teacher.path,
            context=context,
            memory_budget_bytes=_budget(work),
        ),
        reads=_network_reads(work, "student", spec, data)
        | {
            "distill": None if distill is None else distill.model_dump(mode="json"),
            "labels": None if labels is None else labels.sha256,
        },
    )


def export_student(work: Work, data: Artifact, student: Artifact) -> Artifact:
    return _export(work, "export", student, data)


def export_teacher(work: Work, data: Artifact, teacher: Artifact) -> Artifact | None:
    """The teacher's float ONNX: what speed-up and size are measured against."""
    return _export(work, "export-teacher", teacher, data) if work.recipe.profile else None


def quantize(work: Work, data: Artifact, floating: Artifact) -> Artifact:
    spec, export = work.recipe.quantize, work.recipe.export
    assert spec is not None
    return _run(
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
    artifacts = (models.teacher, models.student, models.floating, models.deployed)
    return _run(
        work,
        "verify",
        lambda context: gather(
            data.path,
            teacher=None if models.teacher is None else models.teacher.path,
            student=models.student.path,
            floating=models.floating.path,
            int8=models.deployed.path if models.is_quantized else None,
            reference=models.reference,
            context=context,
            memory_budget_bytes=_budget(work),
        ),
        reads={"inputs": [data.sha256, *(a and a.sha256 for a in artifacts)]},
    )


@dataclass(frozen=True)
class Latency:
    rows: tuple[LatencyRecord, ...]
    speedup: SpeedupRecord


def measure_latency(work: Work, data: Artifact, models: Models) -> Latency:
    """Every model in turns, always fresh: a time that is gated is never recalled."""
    spec, events = work.recipe.profile, Noting(work.workspace.events)
    assert spec is not None
    events.started("latency")
    begun = time.monotonic()
    opened = _open(work, data)
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


def write_report(
    work: Work, data: Artifact, models: Models, evidence: Artifact, latency: Latency | None
) -> Report:
    found = evidence.measurements
    return Report(
        tool_version=__version__,
        created_utc=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        recipe=work.recipe.model_dump(mode="json"),
        reference=models.reference,
        deployed=models.deployed_role,
        model_sha256=file_sha256(models.deployed.path / "model.onnx"),
        data_sha256=data.sha256,
        environment=describe_machine(),
        stages=tuple(_stage_record(artifact) for artifact in work.done),
        notes=tuple(dict.fromkeys([*work.notes, *(n for done in work.done for n in done.notes)])),
        models=[_with_sizes(row, models) for row in found["models"]],
        pairs=found["pairs"],
        parity=found["parity"],
        latency=() if latency is None else latency.rows,
        speedup=None if latency is None else latency.speedup,
    )


def publish(folder: Path, models: Models, evidence: Artifact, report: Report) -> Path:
    """Put everything where the user looks for it, the model last."""
    assert report.verdict is not None
    program = models.student.path / "program.pt2"
    net = (
        {"student.pt2": program}
        if program.exists()
        else {"student.safetensors": models.student.path / "model.safetensors"}
    )
    recipe = yaml.safe_dump(report.recipe, sort_keys=False, allow_unicode=True)
    return release.publish(
        folder,
        model=models.deployed.path / "model.onnx",
        passed=report.verdict.outcome == "pass",
        files={
            "model.fp32.onnx": models.floating.path / "model.onnx",
            **net,
            "recipe.yaml": recipe,
            release.SAMPLES: evidence.path / release.SAMPLES,
            release.REPORT: report.model_dump_json(indent=1) + "\n",
            "report.md": to_markdown(report),
        },
    )


def _run(work: Work, name: str, call: Any, *, reads: Mapping[str, Any]) -> Artifact:
    artifact = work.workspace.run_stage(name, call, reads=reads)
    work.done.append(artifact)
    return artifact


def _export(work: Work, name: str, network: Artifact, data: Artifact) -> Artifact:
    spec = work.recipe.export
    metadata = {"edgestill.recipe_sha256": recipe_sha256(work)}
    return _run(
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
        **_without_paths(sections),
        "data_sha256": work.data_fingerprint,
        "origins": work.origins,
    }
    return hashlib.sha256(json.dumps(document, sort_keys=True).encode()).hexdigest()


def _without_paths(value: Any) -> Any:
    """The same tree without absolute paths: where a file lies does not change what is in it."""
    if isinstance(value, dict):
        return {key: _without_paths(inner) for key, inner in value.items()}
    if isinstance(value, str) and Path(value.partition(".py:")[0]).is_absolute():
        return Path(value).name
    return value


def _network_reads(work: Work, name: str, spec: NetworkSpec, data: Artifact) -> dict[str, Any]:
    return {
        "spec": _without_paths(spec.model_dump(mode="json")),
        "origin": work.origins[name],
        "inputs": [data.sha256],
    }


def _check_network(spec: NetworkSpec, data: Data, *, where: str) -> str:
    """Build it, load its weights, run it once; returns the hash of all it is made of."""
    network = open_network(
        spec.model,
        args=spec.args,
        classes=len(data.class_names),
        input_shape=data.input_shape,
        seed=0,
    )
    digest = hashlib.sha256()
    if spec.weights is not None:
        path = Path(spec.weights)
        load_weights(network.module, read_state(path), head=spec.head, where=where)
        digest.update(file_sha256(path).encode())
    for source in network.sources:
        digest.update(f"{source.name} {file_sha256(source)}\n".encode())
    if spec.is_program:
        digest.update(file_sha256(Path(spec.model)).encode())
    return digest.hexdigest()


def _open(work: Work, data: Artifact) -> Data:
    return open_data(data.path, memory_budget_bytes=_budget(work))


def _budget(work: Work) -> int:
    return int(work.recipe.compute.memory_budget_gib * 2**30)


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
