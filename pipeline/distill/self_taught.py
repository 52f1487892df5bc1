"""Students without a trained teacher: taught by their own average, by their deepest exit, by peers,
or by a teacher that learns at the same time.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from ..data.dataset import Data
from ..errors import RecipeError
from ..stage import Context
from ..strategy import Plan
from ..training_spec import DistillSpec
from .exits import Exit
from .learner import Learner
from .taps import Tapped, feature_shapes, stage_ends
from .tasks import Course, Lesson, Terms, learner_task, parts_of
from .terms import Scene, hard_term, temperature_part, terms_of


def averaged(
    student: nn.Module, data: Data, plan: Plan, spec: DistillSpec, *, context: Context
) -> Course:
    """Learn from the exponential moving average of oneself (Tarvainen & Valpola 2017)."""
    parts = temperature_part(plan.objectives)
    learner = Learner(student, parts=parts, frozen=copy.deepcopy(student))

    def terms(module: nn.Module, lesson: Lesson) -> Terms:
        assert isinstance(module, Learner)
        assert module.frozen is not None
        logits, _ = module.see(lesson.batch.inputs)
        with torch.no_grad():
            target = module.frozen(lesson.batch.inputs).float()
        scene = Scene(spec, lesson.batch, lesson.epoch, logits, target[None], {}, parts_of(module))
        return terms_of(plan.objectives, scene)

    @torch.no_grad()
    def follow(module: nn.Module, step: int) -> None:
        assert isinstance(module, Learner)
        assert module.frozen is not None
        weight = 1 - min(spec.target_decay, (1 + step) / (10 + step))
        live = module.network.state_dict()
        for name, shadow in module.frozen.state_dict().items():
            if shadow.is_floating_point():
                shadow.lerp_(live[name], weight)
            else:
                shadow.copy_(live[name])

    task = learner_task(learner, data, plan, spec, terms=terms, after_step=follow, context=context)
    return Course(learner, task)


def with_exits(
    student: nn.Module, data: Data, plan: Plan, spec: DistillSpec, *, context: Context
) -> Course:
    """The deepest exit teaches exits at the shallower stages (BYOT); they are dropped at the end.

    Terms: `hard` of the network itself; `exit1.hard`, `exit1.kd`, … of its exits, shallow → deep.
    """
    *shallow, deepest = exit_stages(student, data.input_shape)
    tapped = Tapped(student, (*shallow, deepest))
    shapes = feature_shapes(tapped, data.input_shape)
    tapped.close()
    exits = [Exit(shape, shapes[-1], len(data.class_names)) for shape in shapes[:-1]]
    parts = {"exits": nn.ModuleList(exits), **temperature_part(plan.objectives)}
    learner = Learner(student, taps=shallow, parts=parts)
    names = [f"exit{number + 1}." for number in range(len(exits))]

    def terms(module: nn.Module, lesson: Lesson) -> Terms:
        assert isinstance(module, Learner)
        logits, features = module.see(lesson.batch.inputs)
        found = {"hard": hard_term(logits, lesson.batch, smoothing=spec.label_smoothing)}
        heads: Any = module.parts["exits"]
        target = logits.detach().float()[None]
        for name, head, feature in zip(names, heads, features, strict=True):
            own = Scene(
                spec, lesson.batch, lesson.epoch, head(feature), target, {}, parts_of(module)
            )
            found |= prefixed(name, terms_of(plan.objectives, own))
        return found

    task = learner_task(
        learner, data, plan, spec, terms=terms, groups=names, alone=("",), context=context
    )
    return Course(learner, task)


def exit_stages(student: nn.Module, input_shape: tuple[int, ...]) -> tuple[str, ...]:
    """The stages that get an exit, and the last, which teaches them.

    Raises:
        RecipeError: the network has only one.
    """
    stages = stage_ends(student, input_shape)
    if len(stages) < 2:
        raise RecipeError(
            f"distill.target: exits needs a network of several resolution stages; "
            f"{type(student).__name__} has only {stages[0]}"
        )
    return stages


def among_peers(
    student: nn.Module,
    peers: Sequence[nn.Module],
    data: Data,
    plan: Plan,
    spec: DistillSpec,
    *,
    context: Context,
) -> Course:
    """Students that learn together, each from the labels and all others (DML, Zhang et al. 2018).

    Each peer's target is the mixture of the others. Terms: `hard`, `kd` of the student that ships,
    `peer1.hard`, … of the others.
    """
    learner = Learner(student, parts=temperature_part(plan.objectives), peers=peers)
    names = ["", *(f"peer{number + 1}." for number in range(len(peers)))]

    def terms(module: nn.Module, lesson: Lesson) -> Terms:
        assert isinstance(module, Learner)
        nets = [module.student, *module.peers]
        answers = [net(lesson.batch.inputs) for net in nets]
        detached = torch.stack([answer.detach().float() for answer in answers])
        found: Terms = {}
        for index, (name, logits) in enumerate(zip(names, answers, strict=True)):
            others = torch.cat([detached[:index], detached[index + 1 :]])
            scene = Scene(spec, lesson.batch, lesson.epoch, logits, others, {}, parts_of(module))
            found |= prefixed(name, terms_of(plan.objectives, scene))
        return found

    task = learner_task(learner, data, plan, spec, terms=terms, groups=names, context=context)
    return Course(learner, task)


def beside_teacher(
    student: nn.Module,
    teacher: nn.Module,
    data: Data,
    plan: Plan,
    spec: DistillSpec,
    *,
    context: Context,
) -> Course:
    """Teacher and student trained together, end to end: the teacher learns from the labels, the
    student from them and from what the teacher answers at that moment. Term `teacher.hard` is the
    teacher's.
    """
    learner = Learner(student, parts=temperature_part(plan.objectives), peers=[teacher])

    def terms(module: nn.Module, lesson: Lesson) -> Terms:
        assert isinstance(module, Learner)
        logits, _ = module.see(lesson.batch.inputs)
        answer = module.peers[0](lesson.batch.inputs)
        target = answer.detach().float()[None]
        scene = Scene(spec, lesson.batch, lesson.epoch, logits, target, {}, parts_of(module))
        hard = hard_term(answer, lesson.batch, smoothing=spec.label_smoothing)
        return {**terms_of(plan.objectives, scene), "teacher.hard": hard}

    task = learner_task(
        learner, data, plan, spec, terms=terms, groups=[""], alone=("teacher.",), context=context
    )
    return Course(learner, task)


def prefixed(prefix: str, terms: Terms) -> Terms:
    return {f"{prefix}{name}": value for name, value in terms.items()}
