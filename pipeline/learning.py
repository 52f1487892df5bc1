"""The stages that learn: teachers, their soft labels, the student and what it is compared with.

As in `steps.py`, each names what it reads, so that it is recalled exactly when nothing it reads
has changed, and hands its work to `distill/`.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import nn

from ..models.hf_text import check_vocabulary
from ..models.plan import is_within
from .data.dataset import Data
from .distill.label_store import network_sha256
from .distill.labels import store_labels as store
from .distill.networks import open_given
from .distill.student import JOINT_TEACHER, Lessons, check_lessons
from .distill.student import train_student as train
from .distill.taps import find_taps
from .distill.teacher import prepare_teacher as teach
from .errors import RecipeError
from .prune.stage import check_prunable
from .prune.trace import Groups
from .recipe import NetworkSpec, Recipe, TeacherSpec, Tokenization
from .stage import Artifact
from .strategy import Plan, choose
from .train.schedule import peak_lr
from .training_spec import TAUGHT, DistillSpec, RelationsSpec, TrainSpec
from .work import Work, memory_budget, network_reads, numbered, open_sets, run_stage
from .workspace import file_sha256, tree_sha256


def check_before_training(work: Work, data: Artifact) -> None:
    """Everything that can be known to fail later is said now."""
    opened = open_sets(work, data)
    teachers = {numbered("teacher", i): spec for i, spec in enumerate(work.recipe.teachers)}
    modules = {}
    for name, spec in {**teachers, "student": work.recipe.student}.items():
        modules[name], work.origins[name] = _check_network(spec, opened, where=name)
    student = modules.pop("student")
    if work.recipe.distill is not None:
        by = list(modules.values()) or [student]  # its own former generation
        check_lessons(_plan(work), student, by, input_shape=opened.input_shape)
    if work.recipe.prune is not None:
        groups, blocks = check_prunable(student, work.recipe.prune, opened)
        if work.recipe.teachers and work.recipe.distill is not None:
            check_recovery(_plan(work), student, groups, blocks)


def check_recovery(plan: Plan, student: nn.Module, groups: Groups, blocks: Sequence[str]) -> None:
    """What is left after pruning can be taught by the same objectives.

    Raises:
        RecipeError: one compares a layer that may leave, or splits widths that will not divide.
    """
    for term in plan.features:
        where = f"distill.objectives.{term.name}"  # type: ignore[attr-defined]
        for tap in find_taps(student, term.student, where=where) if term.student else ():
            inside = next((one for one in blocks if tap != one and is_within(tap, one)), None)
            if inside is not None:
                raise RecipeError(
                    f"{where}.student: {tap} is inside {inside}, which pruning may remove; list it "
                    "under prune.protect too, or set prune.blocks: false"
                )
        widths = [w for group in groups.free if (w := group.head_width)]
        heads = term.heads if isinstance(term, RelationsSpec) else None
        if heads is not None and any(width % heads for width in widths):
            raise RecipeError(
                f"{where}.heads: {heads} relation heads do not divide what pruning may leave of "
                f"heads that are {min(widths)} wide; leave `heads` out, or list the attention "
                "under prune.protect"
            )


def prepare_teachers(work: Work, data: Artifact) -> list[Artifact]:
    """Each teacher of the recipe, trained or given; none where it is trained with the student."""
    if _joint(work.recipe) is not None:
        return []
    return [
        _prepare_teacher(work, data, numbered("teacher", index), spec)
        for index, spec in enumerate(work.recipe.teachers)
    ]


def _prepare_teacher(work: Work, data: Artifact, name: str, spec: TeacherSpec) -> Artifact:
    return run_stage(
        work,
        name,
        lambda context: teach(
            spec, data.path, context=context, memory_budget_bytes=memory_budget(work)
        ),
        reads=network_reads(work, name, spec, data),
        together=True,
    )


def store_labels(
    work: Work, data: Artifact, teachers: Sequence[Artifact], *, generation: int
) -> list[Artifact]:
    """The soft labels of each teacher, where the student learns from stored ones."""
    if not teachers or _plan(work).target != "stored":
        return []
    name = "labels" if generation == 1 else f"labels-generation-{generation}"
    return _labels(work, data, teachers, _distill(work), name=name)


def _labels(
    work: Work, data: Artifact, teachers: Sequence[Artifact], spec: DistillSpec, *, name: str
) -> list[Artifact]:
    return [
        _store_labels(work, data, numbered(name, index), teacher, spec)
        for index, teacher in enumerate(teachers)
    ]


def _store_labels(
    work: Work, data: Artifact, name: str, teacher: Artifact, spec: DistillSpec
) -> Artifact:
    return run_stage(
        work,
        name,
        lambda context: store(
            spec, teacher.path, data.path, context=context, memory_budget_bytes=memory_budget(work)
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
        plan = _plan(work)
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
    return run_stage(
        work,
        "student" if is_last else f"generation-{generation}",
        lambda context: train(
            spec, lessons, data.path, context=context, memory_budget_bytes=memory_budget(work)
        ),
        reads=network_reads(work, "student", spec, data)
        | {
            "distill": None if lessons is None else _distill_reads(lessons.spec),
            "labels": [one.sha256 for one in labels],
            "teachers": [one.sha256 for one in teachers],
            "joint": work.origins.get("teacher") if _joint(work.recipe) else None,
            "generation": generation,
        },
        together=True,
    )


def recover(
    work: Work,
    data: Artifact,
    teachers: Sequence[Artifact],
    dense: Artifact,
    cut: Path,
    *,
    name: str,
) -> Artifact:
    """The network in `cut`, of which channels or blocks were taken, taught again.

    Its teachers are the recipe's, by the recipe's objectives; where there are none, or the student
    taught itself, it is what it was before it was cut.
    """
    taught = work.recipe.distill is not None and _plan(work).target in TAUGHT
    by = list(teachers) if teachers and taught else [dense]
    spec = _recovery(work.recipe, alone=by == [dense])
    plan = choose(spec, is_text=work.recipe.is_text)
    labels = []
    if plan.target == "stored":
        stem = "labels" if by != [dense] else "labels-dense"
        labels = _labels(work, data, by, spec, name=stem)
    lessons = Lessons(
        spec, plan, stores=tuple(one.path for one in labels), teachers=tuple(one.path for one in by)
    )
    student = work.recipe.student
    return run_stage(
        work,
        name,
        lambda context: train(
            student, lessons, data.path, context=context, start=cut,
            memory_budget_bytes=memory_budget(work),
        ),
        reads=network_reads(work, "student", student, data)
        | {
            "distill": _distill_reads(spec),
            "labels": [one.sha256 for one in labels],
            "teachers": [one.sha256 for one in by],
            "cut": tree_sha256(cut),
        },
        together=True,
    )  # fmt: skip


def _distill_reads(spec: DistillSpec) -> dict[str, Any]:
    """What a student reads of it: a network beside it, for comparison, changes nothing in it."""
    return spec.model_dump(mode="json", exclude={"baseline"})


def _recovery(recipe: Recipe, *, alone: bool) -> DistillSpec:
    """The schedule of before, shorter and gentler. `alone`: with the default objectives."""
    assert recipe.prune is not None
    before = recipe.distill or recipe.student.train or TrainSpec()
    fields = {name: getattr(before, name) for name in TrainSpec.model_fields}
    if isinstance(before, DistillSpec):
        own = set() if not alone else {"strategy", "objectives", "target", "combine", "generations"}
        more = set(DistillSpec.model_fields) - set(TrainSpec.model_fields) - own
        fields |= {name: getattr(before, name) for name in more}
    wish = recipe.prune.recover
    fields |= {"epochs": wish.epochs, "lr": wish.lr or peak_lr(before) / 5, "generations": 1}
    return DistillSpec.model_validate(fields)


def train_baseline(work: Work, data: Artifact) -> Artifact | None:
    """The same student under the same schedule without a teacher, where the recipe asks for it."""
    distill = work.recipe.distill
    if distill is None or not distill.baseline:
        return None
    spec = work.recipe.student.model_copy(update={"train": _without_teacher(distill)})
    return run_stage(
        work,
        "baseline",
        lambda context: train(
            spec, None, data.path, context=context, memory_budget_bytes=memory_budget(work)
        ),
        reads=network_reads(work, "student", spec, data),
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


def _check_network(spec: NetworkSpec, data: Data, *, where: str) -> tuple[nn.Module, str]:
    """Build it, load its weights, run it once; with the hash of all it is made of."""
    network, _ = open_given(spec, data, seed=0, where=where)
    if isinstance(data.preprocess, Tokenization):
        check_vocabulary(network.module, data.preprocess.vocabulary, where=where)
    digest = hashlib.sha256()
    for path in spec.weight_files:
        digest.update(file_sha256(path).encode())
    for source in network.sources:
        digest.update(f"{source.name} {file_sha256(source)}\n".encode())
    return network.module, digest.hexdigest()


def _plan(work: Work) -> Plan:
    return choose(_distill(work), is_text=work.recipe.is_text)


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
