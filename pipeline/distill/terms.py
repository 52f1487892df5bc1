"""From a plan's objectives to the loss terms of one step: what each compares, and with whom.

`SCENE` in, named scalars out. The formulas are in `objectives.py`, `feature_objectives.py` and
`text_objectives.py`; the trainable helpers (projections, fusion, temperature) in `parts.py`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ...exporters.feeds import MASK
from ..data.augment import ViewBatch
from ..training_spec import (
    AttentionSpec,
    DistillSpec,
    DistSpec,
    DkdSpec,
    HardSpec,
    HiddenSpec,
    HintSpec,
    KdSpec,
    Objective,
    RelationsSpec,
    ReviewSpec,
    RkdSpec,
    SoftSpec,
)
from .feature_objectives import attention, hierarchical, hint, pooled, rkd_angle, rkd_distance
from .objectives import (
    confidence_weights,
    dist,
    dkd,
    ensemble,
    hard_label,
    kd,
    standardize,
)
from .parts import CurriculumTemperature, curriculum_strength
from .text_objectives import hidden_states, relations

TEMPERATURE = "temperature"  # the part that CTKD learns


@dataclass(frozen=True)
class Scene:
    """One step as an objective sees it.

    Attributes:
        logits: the student's, (N, C).
        targets: the logits it is to follow, (K, N, C), one for each teacher.
        features: objective name → what the student's and the teacher's tapped layers put out.
        parts: trainable helpers, by objective name.
    """

    spec: DistillSpec
    batch: ViewBatch
    epoch: int
    logits: Tensor
    targets: Tensor
    features: Mapping[str, tuple[Sequence[Tensor], Sequence[Tensor]]]
    parts: Mapping[str, nn.Module]


def terms_of(objectives: Sequence[Objective], scene: Scene) -> dict[str, Tensor]:
    """Objective name → its value, a mean over the batch; unweighted."""
    return {term.name: TERMS[term.name](term, scene) for term in objectives}


def factors_of(
    objectives: Sequence[Objective], *, epochs: int
) -> Callable[[float], dict[str, float]]:
    """Time in epochs → by how much each term's weight is scaled then.

    A warm-up rises linearly from 0; a fade falls to 0 at the end of the run, linearly or by a half
    cosine.
    """

    def factors(time_epochs: float) -> dict[str, float]:
        done = min(1.0, time_epochs / epochs)
        falls = {"none": 1.0, "linear": 1.0 - done, "cosine": 0.5 * (1 + math.cos(math.pi * done))}
        found: dict[str, float] = {}
        for term in objectives:
            rise = min(1.0, time_epochs / term.warmup_epochs) if term.warmup_epochs else 1.0
            found[term.name] = rise * falls[term.fade]
        return found

    return factors


def hard_term(logits: Tensor, batch: ViewBatch, *, smoothing: float) -> Tensor:
    """Cross-entropy of a batch as it is: plain, or mixed."""
    return hard_label(
        logits,
        batch.labels,
        smoothing=smoothing,
        partner_labels=batch.partner_labels,
        lam=batch.lam,
    )


def _hard(_: HardSpec, scene: Scene) -> Tensor:
    return hard_term(scene.logits, scene.batch, smoothing=scene.spec.label_smoothing)


def _kd(term: KdSpec, scene: Scene) -> Tensor:
    student, target, temperature = _softened(term, scene)
    return kd(student, target, temperature=temperature)


def _dkd(term: DkdSpec, scene: Scene) -> Tensor:
    student, target, temperature = _softened(term, scene)
    labels = scene.batch.labels
    return dkd(student, target, labels, temperature=temperature, alpha=term.alpha, beta=term.beta)


def _dist(term: DistSpec, scene: Scene) -> Tensor:
    student, target, temperature = _softened(term, scene)
    return dist(student, target, temperature=temperature, beta=term.beta, gamma=term.gamma)


def _softened(term: SoftSpec, scene: Scene) -> tuple[Tensor, Tensor, float | Tensor]:
    """Student and target logits (N, C), standardized if asked for, and the temperature.

    Several teachers become the one target whose softmax at that temperature is their mixture.
    """
    temperature: float | Tensor
    if term.temperature == "curriculum":
        temperature = scene.parts[TEMPERATURE](curriculum_strength(scene.epoch))
    else:
        temperature = term.temperature
    student, targets = scene.logits, scene.targets
    if term.standardize:
        student = standardize(student)
        targets = torch.stack([standardize(target) for target in targets])
    if len(targets) == 1:
        return student, targets[0], temperature
    weights = _teacher_weights(scene)
    return student, ensemble(targets, weights, temperature=temperature), temperature


def _teacher_weights(scene: Scene) -> Tensor:
    """Of a batch as it is; a mixed image trusts as its two halves do, by their shares."""
    batch, combine = scene.batch, scene.spec.combine
    weights = teacher_weights(combine, scene.targets, batch.labels)
    if combine != "confidence" or batch.partner_labels is None or batch.lam is None:
        return weights
    others = teacher_weights(combine, scene.targets, batch.partner_labels)
    return torch.lerp(others, weights, batch.lam[:, None])


def teacher_weights(
    combine: Literal["mean", "confidence"] | tuple[float, ...], targets: Tensor, labels: Tensor
) -> Tensor:
    """Shares of the teachers whose logits are `targets` (K, N, C): (K,), or (N, K) where every
    sample asks whom it trusts."""
    if combine == "confidence":
        return confidence_weights(targets, labels)
    count = len(targets)
    shares = torch.ones(count) if combine == "mean" else torch.tensor(combine)
    return (shares / shares.sum()).to(targets.device)


def _hint(term: HintSpec, scene: Scene) -> Tensor:
    students, teachers = scene.features[term.name]
    projections: Any = scene.parts[term.name]
    pairs = zip(projections, students, teachers, strict=True)
    return sum_of(hint(*projection(mine, theirs)) for projection, mine, theirs in pairs)


def _attention(term: AttentionSpec, scene: Scene) -> Tensor:
    return attention(*scene.features[term.name])


def _review(term: ReviewSpec, scene: Scene) -> Tensor:
    students, teachers = scene.features[term.name]
    return hierarchical(scene.parts[term.name](students), teachers)


def _rkd(term: RkdSpec, scene: Scene) -> Tensor:
    (student,), (teacher,) = scene.features[term.name]
    mine, theirs = pooled(student), pooled(teacher)
    return term.distance * rkd_distance(mine, theirs) + term.angle * rkd_angle(mine, theirs)


def _hidden(term: HiddenSpec, scene: Scene) -> Tensor:
    students, teachers = scene.features[term.name]
    projected = scene.parts[term.name](students)
    return hidden_states(projected, teachers, mask=scene.batch.inputs[:, MASK])


def _relations(term: RelationsSpec, scene: Scene) -> Tensor:
    students, teachers = scene.features[term.name]
    part: Any = scene.parts[term.name]
    mask = scene.batch.inputs[:, MASK]
    return relations(students, teachers, mask=mask, heads=part.count)


def sum_of(values: Any) -> Tensor:
    return torch.stack(list(values)).sum()


def temperature_part(objectives: Sequence[Objective]) -> dict[str, nn.Module]:
    """The learned temperature, if an objective asks for it."""
    asked = any(isinstance(t, SoftSpec) and t.temperature == "curriculum" for t in objectives)
    return {TEMPERATURE: CurriculumTemperature()} if asked else {}


TERMS: dict[str, Callable[[Any, Scene], Tensor]] = {
    "hard": _hard,
    "kd": _kd,
    "dkd": _dkd,
    "dist": _dist,
    "hint": _hint,
    "attention": _attention,
    "reviewkd": _review,
    "rkd": _rkd,
    "hidden": _hidden,
    "relations": _relations,
}
