"""The stages as `flow.py` calls them: each names what it reads, so that it is recalled exactly
when nothing it reads has changed, and hands its work to the capability that does it. What the
report makes of it is in `record.py`.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.metadata
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..exporters.sessions import open_session, run_batches
from ..models.source import open_network
from ..models.weights import load_weights, read_state
from .data.dataset import Data, open_data
from .data.preprocess import to_input
from .data.stage import prepare_data as prepare
from .data.stage import source_fingerprint
from .distill.label_store import network_sha256
from .distill.labels import store_labels as store
from .distill.strategy import Plan, choose
from .distill.student import JOINT_TEACHER, Lessons, check_lessons
from .distill.student import train_student as train
from .distill.teacher import prepare_teacher as teach
from .errors import RecipeError
from .export import export_float
from .gate import provable_drop
from .measure.latency import Row, speedup
from .measure.latency import measure_latency as measure
from .measure.machine import available_threads, cpu_capability
from .quantize.ptq import quantize_static
from .recipe import NetworkSpec, Recipe, TeacherSpec
from .record import Latency, Models, baseline_note
from .report import LatencyRecord, SpeedupRecord
from .stage import ALONE, Artifact, Events, Noting, World
from .training_spec import DistillSpec, TrainSpec
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
    # "teacher", "teacher-2", "student" → hash of its weights file and of the user's own modules
    origins: dict[str, str] = field(default_factory=dict)
    data_fingerprint: str = ""
    notes: list[str] = field(default_factory=list)  # the flow's own; stages keep theirs


def begin(recipe: Recipe, root: Path, *, events: Events, fresh: bool, world: World = ALONE) -> Work:
    """Open the workspace on the machine as it is."""
    compute = recipe.compute
    device = compute.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    elif device == "cuda" and not torch.cuda.is_available():
        raise RecipeError("compute.device: cuda is asked for, and torch sees no CUDA device here")
    threads = compute.threads or max(1, available_threads() // world.local_size)
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
        world=world,
        identity={
            "source": [tree_sha256(PACKAGE / part, pattern="*.py") for part in SOURCES],
            "versions": {name: importlib.metadata.version(name) for name in PINNED},
            "cpu": cpu_capability(),
        },
    )
    if fresh and world.leads:
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
    teachers = {_numbered("teacher", i): spec for i, spec in enumerate(work.recipe.teachers)}
    modules = {}
    for name, spec in {**teachers, "student": work.recipe.student}.items():
        modules[name], work.origins[name] = _check_network(spec, opened, where=name)
    if work.recipe.distill is not None:
        student = modules.pop("student")
        by = list(modules.values()) or [student]  # its own former generation
        check_lessons(_plan(work), student, by, input_shape=opened.input_shape)
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


def prepare_teachers(work: Work, data: Artifact) -> list[Artifact]:
    """Each teacher of the recipe, trained or given; none where it is trained with the student."""
    if _joint(work.recipe) is not None:
        return []
    return [
        _prepare_teacher(work, data, _numbered("teacher", index), spec)
        for index, spec in enumerate(work.recipe.teachers)
    ]


def _prepare_teacher(work: Work, data: Artifact, name: str, spec: TeacherSpec) -> Artifact:
    return _run(
        work,
        name,
        lambda context: teach(spec, data.path, context=context, memory_budget_bytes=_budget(work)),
        reads=_network_reads(work, name, spec, data),
        together=True,
    )


def store_labels(
    work: Work, data: Artifact, teachers: Sequence[Artifact], *, generation: int
) -> list[Artifact]:
    """The soft labels of each teacher, where the student learns from stored ones."""
    if not teachers or _plan(work).target != "stored":
        return []
    spec = _distill(work)
    name = "labels" if generation == 1 else f"labels-generation-{generation}"
    return [
        _store_labels(work, data, _numbered(name, index), teacher, spec)
        for index, teacher in enumerate(teachers)
    ]


def _store_labels(
    work: Work, data: Artifact, name: str, teacher: Artifact, spec: DistillSpec
) -> Artifact:
    return _run(
        work,
        name,
        lambda context: store(
            spec, teacher.path, data.path, context=context, memory_budget_bytes=_budget(work)
        ),
        reads={
            "views": spec.views,
            "precision": spec.precision,
            "augment": spec.augment.model_dump(mode="json"),
            "inputs": [data.sha256, teacher.sha256],
        },
        together=True,
    )


def train_student(
    work: Work,
    data: Artifact,
    teachers: Sequence[Artifact],
    labels: Sequence[Artifact],
    *,
    generation: int,
) -> Artifact:
    """The student, or the generation of it that comes next.

    The first generation of a recipe without a teacher learns from the labels alone.
    """
    spec, distill = work.recipe.student, work.recipe.distill
    is_last = distill is None or generation == distill.generations
    lessons = None
    if distill is not None:
        plan = choose(distill)
        if teachers or plan.target not in ("stored", "live"):
            lessons = Lessons(
                distill,
                plan,
                stores=tuple(one.path for one in labels),
                teachers=tuple(one.path for one in teachers),
                joint=_joint(work.recipe),
                generation=generation,
            )
        else:
            spec = spec.model_copy(update={"train": _without_teacher(distill)})
    return _run(
        work,
        "student" if is_last else f"generation-{generation}",
        lambda context: train(
            spec, lessons, data.path, context=context, memory_budget_bytes=_budget(work)
        ),
        reads=_network_reads(work, "student", spec, data)
        | {
            "distill": None if lessons is None else lessons.spec.model_dump(mode="json"),
            "labels": [one.sha256 for one in labels],
            "teachers": [one.sha256 for one in teachers],
            "joint": work.origins.get("teacher") if _joint(work.recipe) else None,
            "generation": generation,
        },
        together=True,
    )


def train_baseline(work: Work, data: Artifact) -> Artifact | None:
    """The same student under the same schedule without a teacher, where the recipe asks for it."""
    distill = work.recipe.distill
    if distill is None or not distill.baseline:
        return None
    spec = work.recipe.student.model_copy(update={"train": _without_teacher(distill)})
    return _run(
        work,
        "baseline",
        lambda context: train(
            spec, None, data.path, context=context, memory_budget_bytes=_budget(work)
        ),
        reads=_network_reads(work, "student", spec, data),
        together=True,
    )


def reference_teacher(
    work: Work, teachers: Sequence[Artifact], student: Artifact
) -> Artifact | None:
    """The teacher that the student is held against: the first, or the one trained beside it."""
    if _joint(work.recipe) is None:
        return teachers[0] if teachers else None
    folder = student.path / JOINT_TEACHER
    return dataclasses.replace(
        student, stage="teacher", path=folder, sha256=network_sha256(folder), notes=()
    )


def alone(work: Work) -> Work:
    """What comes after training, the first of several processes does by itself."""
    workspace = dataclasses.replace(work.workspace, world=ALONE)
    return dataclasses.replace(work, workspace=workspace)


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
    artifacts = (
        models.teacher, models.student, models.floating, models.deployed, models.baseline
    )  # fmt: skip
    evidence = _run(
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
            memory_budget_bytes=_budget(work),
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


def _run(
    work: Work, name: str, call: Any, *, reads: Mapping[str, Any], together: bool = False
) -> Artifact:
    artifact = work.workspace.run_stage(name, call, reads=reads, together=together)
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


def _check_network(spec: NetworkSpec, data: Data, *, where: str) -> tuple[nn.Module, str]:
    """Build it, load its weights, run it once; with the hash of all it is made of."""
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
    return network.module, digest.hexdigest()


def _plan(work: Work) -> Plan:
    return choose(_distill(work))


def _distill(work: Work) -> DistillSpec:
    assert work.recipe.distill is not None
    return work.recipe.distill


def _joint(recipe: Recipe) -> TeacherSpec | None:
    """The teacher that is trained together with the student, if the recipe asks for that."""
    is_joint = recipe.distill is not None and recipe.distill.target == "joint"
    return recipe.teachers[0] if is_joint else None


def _without_teacher(distill: DistillSpec) -> TrainSpec:
    """The schedule alone."""
    return TrainSpec.model_validate(
        {name: getattr(distill, name) for name in TrainSpec.model_fields}
    )


def _numbered(name: str, index: int) -> str:
    """teacher, teacher-2, teacher-3, …"""
    return name if index == 0 else f"{name}-{index + 1}"


def _open(work: Work, data: Artifact) -> Data:
    return open_data(data.path, memory_budget_bytes=_budget(work))


def _budget(work: Work) -> int:
    return int(work.recipe.compute.memory_budget_gib * 2**30)
