"""The student stage: given, trained from labels alone, fine-tuned, or distilled.

From stored labels the student learns without ever meeting a teacher: their headers must say that
they belong to exactly this data, these views and these teachers. Every other target is at work
beside it; a live teacher must be the same, bit for bit, when the student is done.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ...models.source import Network
from ...models.store import load_network
from ..data.dataset import Data, open_data
from ..errors import IntegrityError, ModelError
from ..measure.accuracy import run_module
from ..measure.doubts import check_class_order, note_doubts
from ..recipe import NetworkSpec, StudentSpec
from ..stage import Context
from ..strategy import Plan
from ..train.average import tensors_of
from ..train.checkpoint import digest
from ..train.loop import fit
from ..train.reproducible import derive_seed, reproducible
from ..train.task import FitResult
from ..training_spec import DistillSpec
from .joints import join
from .label_store import LabelStore, describe, network_sha256, open_labels
from .learner import Learner
from .networks import (
    build,
    describe_network,
    measure_validation,
    save,
    training_record,
)
from .self_taught import among_peers, averaged, beside_teacher, exit_stages, with_exits
from .tasks import Course, supervised, taught

JOINT_TEACHER = "teacher"  # folder of the teacher that was trained together with the student


@dataclass(frozen=True)
class Lessons:
    """What a student is distilled by.

    Attributes:
        stores, teachers: folders of the labels and teacher stages, one for each teacher.
        joint: the teacher to train together with it (`target: joint`).
        generation: ≥ 1, of a born-again student; it starts from weights of its own.
    """

    spec: DistillSpec
    plan: Plan
    stores: tuple[Path, ...] = ()
    teachers: tuple[Path, ...] = ()
    joint: NetworkSpec | None = None
    generation: int = 1


def check_lessons(
    plan: Plan,
    student: nn.Module,
    teachers: Sequence[nn.Module],
    *,
    input_shape: tuple[int, ...],
) -> None:
    """What can be known of a plan before hours of training: that its layers exist and fit.

    Raises:
        RecipeError, ModelError: they do not.
    """
    with torch.random.fork_rng(devices=[]):
        join(plan.features, student, teachers, input_shape=input_shape)
    if plan.target == "exits":
        exit_stages(student, input_shape)


def train_student(
    spec: StudentSpec,
    lessons: Lessons | None,
    data_artifact: Path,
    *,
    context: Context,
    memory_budget_bytes: int,
    start: Path | None = None,
) -> dict[str, Any]:
    """The student stage. Leaves the network in `context.scratch`.

    With `lessons` it is distilled; otherwise trained from labels if `spec.train` is set; otherwise
    it is only measured.

    Args:
        start: folder of a stored network that learns on, e.g. one that was cut; None: the recipe's.

    Raises:
        IntegrityError: stored labels are missing or stale.
        RecipeError: layers that cannot be joined.
        WeightsError: weights that do not fit, or given ones in another class order.
        MeasurementError: a loss or its logits are not finite.
    """
    data = open_data(data_artifact, memory_budget_bytes=memory_budget_bytes)
    more: dict[str, Any] = {}
    generation = 1 if lessons is None else lessons.generation
    with reproducible(threads=context.threads, device=context.device):
        if start is None:
            network, report = build(
                spec, data, context=context, where="student", generation=generation
            )
        else:
            network, report = load_network(start).network, None
        training = None
        if lessons is not None:
            training, more = _distil(network, spec, lessons, data=data, context=context)
        elif spec.train is not None:
            task = supervised(data, spec.train, context=context)
            training = fit(network.module, task, spec.train, context=context)
        if not context.world.leads:
            return {}
        found, counts = measure_validation(network, data, context=context, where="student")
    given = training is None
    if given:
        check_class_order(counts, data.class_names)
    note_doubts(found, data, seen=spec.is_trained, context=context, where="student")
    measurements = {
        **describe_network(network, spec, report),
        "how": "given" if given else "trained" if lessons is None else "distilled",
        "validation": {**found, "possibly_seen": spec.is_trained},
        "training": None if training is None else training_record(training),
        **more,
    }
    save(network, data, context=context)
    return measurements


def _distil(
    network: Network, spec: StudentSpec, lessons: Lessons, *, data: Data, context: Context
) -> tuple[FitResult, dict[str, Any]]:
    """Train the student by its lessons; what the report should say of them."""
    plan = lessons.plan
    context.events.note(f"distillation: {plan.why}")
    teachers = [_live(path, context) for path in lessons.teachers if plan.target == "live"]
    before = [digest(tensors_of(teacher)) for teacher in teachers]
    joint = None
    if lessons.joint is not None:
        joint, _ = build(lessons.joint, data, context=context, where="teacher")
        joint.module.to(context.device)
    network.module.to(context.device)
    torch.manual_seed(derive_seed(context.seed, "parts", lessons.generation))
    course = _course(network.module, spec, lessons, teachers, joint, data=data, context=context)
    identity = "/".join(network_sha256(path) for path in lessons.teachers)
    result = fit(course.learner, course.task, lessons.spec, context=context, identity=identity)
    assert isinstance(course.learner, Learner)
    course.learner.close()
    if [digest(tensors_of(teacher)) for teacher in teachers] != before:
        raise ModelError(
            "teacher: expected it to stay as it is while it teaches, and its weights or buffers "
            "have changed in eval mode"
        )
    more: dict[str, Any] = {"distillation": {"why": plan.why, "target": plan.target}}
    if data.unlabelled is not None:
        there = len(data.unlabelled)
        more["unlabelled"] = {"used": course.unlabelled, "given": there}
        context.events.note(f"{course.unlabelled} of {there} unlabelled samples were learnt from")
    if joint is not None and context.world.leads:
        more["teacher"] = _keep_joint(joint, lessons, data=data, context=context)
    return result, more


def _course(
    student: nn.Module,
    spec: StudentSpec,
    lessons: Lessons,
    teachers: Sequence[nn.Module],
    joint: Network | None,
    *,
    data: Data,
    context: Context,
) -> Course:
    plan, distill = lessons.plan, lessons.spec
    if plan.target == "ema":
        return averaged(student, data, plan, distill, context=context)
    if plan.target == "exits":
        return with_exits(student, data, plan, distill, context=context)
    if plan.target == "peers":
        peers = [
            build(spec, data, context=context, where=f"peer-{number}")[0].module.to(context.device)
            for number in range(1, distill.peers)
        ]
        return among_peers(student, peers, data, plan, distill, context=context)
    if joint is not None:
        return beside_teacher(student, joint.module, data, plan, distill, context=context)
    stores = _stores(lessons, data, seed=context.seed)
    return taught(student, data, plan, distill, stores=stores, teachers=teachers, context=context)


def _stores(lessons: Lessons, data: Data, *, seed: int) -> list[LabelStore]:
    if lessons.plan.target != "stored":
        return []
    if not lessons.stores:
        raise IntegrityError(
            "student: expected the teacher's stored labels to distil from, got none; run with "
            "--fresh to label again"
        )
    return [
        open_labels(
            store,
            expected=describe(lessons.spec, data, seed=seed, teacher=network_sha256(teacher)),
        )
        for store, teacher in zip(lessons.stores, lessons.teachers, strict=True)
    ]


def _live(folder: Path, context: Context) -> nn.Module:
    """A teacher that only answers: on the device, in eval mode, without gradients."""
    network = load_network(folder).network
    module = network.module.to(context.device).requires_grad_(False)
    for part in module.modules():  # not eval(), which captured programs refuse
        part.training = False
    fixed = network.fixed_batch
    return module if fixed is None else _InBatches(module, fixed)


class _InBatches(nn.Module):
    """A program that was captured with one batch size, for batches of any."""

    def __init__(self, module: nn.Module, size: int) -> None:
        super().__init__()
        self.module, self.size = module, size
        self.training = False

    def forward(self, inputs: Tensor) -> Tensor:
        return run_module(self.module, inputs, fixed_batch=self.size)


def _keep_joint(
    network: Network, lessons: Lessons, *, data: Data, context: Context
) -> Mapping[str, Any]:
    assert lessons.joint is not None
    found, _ = measure_validation(network, data, context=context, where="teacher")
    save(network, data, context=context, folder=JOINT_TEACHER)
    return {**describe_network(network, lessons.joint, None), "validation": found}
