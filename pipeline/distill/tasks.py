"""What a classifier is trained on: true labels, or the answers of a target beside them.

Joins data (views), targets and objectives into the `Task` that `train/loop.py` runs. Here the
target is stored logits or live teachers; a student that teaches itself, or learns with others, is
in `self_taught.py`. The objectives are the same for all of them (`terms.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..data.augment import ViewBatch
from ..data.dataset import Data, SampleSet, with_unlabelled
from ..data.views import lengths_of, open_views
from ..measure.accuracy import accuracy, logits_of_module
from ..stage import Context
from ..strategy import Plan
from ..train.task import Task
from ..training_spec import DistillSpec, RkdSpec, TrainSpec
from .balance import Balance
from .joints import join
from .label_store import LabelStore
from .learner import Learner
from .objectives import ensemble
from .taps import Tapped
from .terms import (
    Scene,
    factors_of,
    hard_term,
    teacher_weights,
    temperature_part,
    terms_of,
)

Array = np.ndarray[Any, Any]
Terms = dict[str, Tensor]
BALANCE = "balance"


@dataclass(frozen=True)
class Lesson:
    """A batch, the view's number, and the stored logits (K, N, C) if the target has any."""

    batch: ViewBatch
    epoch: int
    stored: Tensor | None = None


@dataclass(frozen=True)
class Course:
    """A learner and its task, ready for `fit`; how many unlabelled images are in it."""

    learner: nn.Module
    task: Task[Any]
    unlabelled: int = 0


def supervised(data: Data, spec: TrainSpec, *, context: Context) -> Task[ViewBatch]:
    """Cross-entropy with the true labels; every epoch sees a view of its own."""
    views = open_views(data.train, data.preprocess, spec.augment, context=context)

    def terms(module: nn.Module, batch: ViewBatch) -> Mapping[str, Tensor]:
        return {"hard": hard_term(module(batch.inputs), batch, smoothing=spec.label_smoothing)}

    return Task(
        samples=len(data.train.labels),
        load=lambda indices, epoch: views.batch(indices, view=epoch),
        terms=terms,
        weights={"hard": 1.0},
        validate=_validation(data, lambda module: module, None, context=context),
        lengths=lengths_of(views),
    )


def taught(
    student: nn.Module,
    data: Data,
    plan: Plan,
    spec: DistillSpec,
    *,
    stores: Sequence[LabelStore] = (),
    teachers: Sequence[nn.Module] = (),
    context: Context,
) -> Course:
    """Learn from one teacher or several: from what they have stored, or with them beside.

    Args:
        stores: of `target: stored`; views repeat after K.
        teachers: of `target: live`: on the device, in eval mode; they run without gradient.
    Raises:
        RecipeError: layers that cannot be joined.
    """
    joints = join(plan.features, student, teachers, input_shape=data.input_shape)
    parts = {**joints.parts, **temperature_part(plan.objectives)}
    learner = Learner(student, taps=joints.student_paths, parts=parts)
    watched = [Tapped(net, p) for net, p in zip(teachers, joints.teacher_paths, strict=False)]
    images = with_unlabelled(data)
    views = open_views(images, data.preprocess, spec.augment, context=context)
    rows = _rows(images, spec, stores)
    repeat = min((store.views for store in stores), default=spec.epochs)

    def load(indices: Tensor, epoch: int) -> Lesson:
        chosen, view = rows[indices], epoch % repeat
        logits = [store.rows(chosen, view=view) for store in stores]
        stored = torch.stack(logits).to(context.device) if logits else None
        return Lesson(views.batch(chosen, view=view), epoch, stored)

    def terms(module: nn.Module, lesson: Lesson) -> Terms:
        assert isinstance(module, Learner)
        logits, features = module.see(lesson.batch.inputs)
        targets, shown = lesson.stored, []
        if targets is None:
            with torch.no_grad():
                answers = [net(lesson.batch.inputs) for net in watched]
            targets = torch.stack([answer.float() for answer, _ in answers])
            shown = [maps for _, maps in answers]
        picked = joints.pick(features, shown)
        scene = Scene(spec, lesson.batch, lesson.epoch, logits, targets, picked, parts_of(module))
        return terms_of(plan.objectives, scene)

    task = learner_task(
        learner,
        data,
        plan,
        spec,
        samples=len(rows),
        load=load,
        lengths=lengths_of(views, rows),
        terms=terms,
        reference=_reference(data, spec, stores, teachers, context=context),
        context=context,
    )
    used = int((images.labels[rows.numpy()] < 0).sum())
    return Course(learner, task, unlabelled=used)


def learner_task(
    learner: Learner,
    data: Data,
    plan: Plan,
    spec: DistillSpec,
    *,
    terms: Callable[[nn.Module, Lesson], Terms],
    context: Context,
    samples: int | None = None,
    load: Callable[[Tensor, int], Lesson] | None = None,
    lengths: Tensor | None = None,
    groups: Sequence[str] = ("",),
    alone: Sequence[str] = (),
    reference: Array | None = None,
    after_step: Callable[[nn.Module, int], None] | None = None,
) -> Task[Lesson]:
    """The task of a learner.

    Args:
        groups: prefixes of the networks that follow every objective.
        alone: prefixes of those that learn from the labels alone, with weight of `hard`.
        reference: the target's logits on validation, if it has any before training.
    """
    by_name = {term.name: term.weight for term in plan.objectives}
    weights = {f"{group}{name}": weight for group in groups for name, weight in by_name.items()}
    weights |= {f"{group}hard": by_name.get("hard", 1.0) for group in alone}
    single = factors_of(plan.objectives, epochs=spec.epochs)

    def factors(time_epochs: float) -> dict[str, float]:
        at = single(time_epochs)
        return {name: at.get(name.rpartition(".")[2], 1.0) for name in weights}

    if load is None:
        views = open_views(data.train, data.preprocess, spec.augment, context=context)

        lengths = lengths_of(views)

        def load(indices: Tensor, epoch: int) -> Lesson:
            return Lesson(views.batch(indices, view=epoch), epoch)

    if spec.balance:
        learner.parts[BALANCE] = Balance(list(weights))
    return Task(
        samples=len(data.train.labels) if samples is None else samples,
        load=load,
        terms=terms,
        weights=weights,
        validate=_validation(data, _network_of, reference, context=context),
        factors=factors,
        balance=_balance if spec.balance else None,
        after_step=after_step,
        networks=_networks_of,
        lengths=lengths,
        least=3 if any(isinstance(term, RkdSpec) for term in plan.objectives) else 1,  # a triple
    )


def _balance(module: nn.Module, terms: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    assert isinstance(module, Learner)
    scales: Mapping[str, Tensor] = module.parts[BALANCE](terms)
    return scales


def _networks_of(module: nn.Module) -> list[nn.Module]:
    assert isinstance(module, Learner)
    return [module.student, *module.peers]


def _network_of(module: nn.Module) -> nn.Module:
    assert isinstance(module, Learner)
    return module.network


def parts_of(module: Learner) -> Mapping[str, nn.Module]:
    return module.parts  # type: ignore[return-value]  # a ModuleDict is read as a mapping


def _rows(images: SampleSet, spec: DistillSpec, stores: Sequence[LabelStore]) -> Tensor:
    """Positions to learn from: all labelled images, and the unlabelled ones worth it.

    Worth it: the teachers' mean top-1 probability, over their views, reaches the floor.
    """
    everything = torch.arange(len(images.labels))
    if spec.confidence_floor is None or not stores:
        return everything
    confidence = np.zeros(len(images.labels))
    for store in stores:
        for number in range(store.views):
            logits = torch.from_numpy(np.array(store.view(number))).float()
            confidence += logits.softmax(1).amax(1).double().numpy()
    confidence /= sum(store.views for store in stores)
    return everything[
        torch.from_numpy((images.labels >= 0) | (confidence >= spec.confidence_floor))
    ]


def _reference(
    data: Data,
    spec: DistillSpec,
    stores: Sequence[LabelStore],
    teachers: Sequence[nn.Module],
    *,
    context: Context,
) -> Array:
    """The teachers' logits on validation, (N, C), mixed as the student is taught, to tell how far
    it agrees with them."""
    each = [np.array(store.validation) for store in stores] or [
        logits_of_module(
            net, data.validation, data.preprocess, device=context.device, name="the teacher"
        )
        for net in teachers
    ]
    targets = torch.from_numpy(np.stack(each)).float()
    labels = torch.from_numpy(np.array(data.validation.labels))
    weights = teacher_weights(spec.combine, targets, labels)
    mixed: Array = ensemble(targets, weights, temperature=1.0).numpy()
    return mixed


def _validation(
    data: Data,
    network_of: Callable[[nn.Module], nn.Module],
    reference: Array | None,
    *,
    context: Context,
) -> Callable[[nn.Module], dict[str, float]]:
    """Accuracy on validation; beside it, how often and how closely the student agrees with its
    teachers there: top-1, and KL(teacher ‖ student) at temperature 1."""

    def validate(module: nn.Module) -> dict[str, float]:
        logits = logits_of_module(
            network_of(module),
            data.validation,
            data.preprocess,
            device=context.device,
            name="the network in training",
        )
        found = {"accuracy": accuracy(logits, data.validation.labels)}
        if reference is not None:
            found["agreement"] = float((logits.argmax(1) == reference.argmax(1)).mean())
            log_p, log_q = (
                F.log_softmax(torch.from_numpy(array), dim=1) for array in (reference, logits)
            )
            found["kl"] = float((log_p.exp() * (log_p - log_q)).sum(1).mean())
        return found

    return validate
