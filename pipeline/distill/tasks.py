"""What an image classifier is trained on: true labels, or a teacher's stored logits beside them.

Joins data (views), stored labels and objectives into the `Task` that `train/loop.py` runs.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from ..data.augment import ViewBatch, Views
from ..data.dataset import Data
from ..measure.accuracy import accuracy, logits_of_module
from ..recipe import AugmentSpec, DistillSpec, TrainSpec
from ..stage import Context
from ..train.loop import Task
from .label_store import LabelStore
from .objectives import hard_label, kd


def open_views(data: Data, augment: AugmentSpec, *, context: Context) -> Views:
    """The training set's replayable views; the teacher's labels and the student see the same."""
    return Views(data.train, data.preprocess, augment, context.seed, context.device)


def supervised(data: Data, spec: TrainSpec, *, context: Context) -> Task[ViewBatch]:
    """Cross-entropy with the true labels; every epoch sees a view of its own."""
    views = open_views(data, spec.augment, context=context)

    def terms(module: nn.Module, batch: ViewBatch) -> Mapping[str, Tensor]:
        return {"hard": _hard(module(batch.inputs), batch, spec)}

    return Task(
        samples=len(data.train.labels),
        load=lambda indices, epoch: views.batch(indices, view=epoch),
        terms=terms,
        weights={"hard": 1.0},
        validate=lambda module: _validation(module, data, context),
    )


def distilled(
    data: Data, spec: DistillSpec, labels: LabelStore, *, context: Context
) -> Task[tuple[ViewBatch, Tensor]]:
    """soft_weight · T²·KL(teacher ‖ student) + hard_weight · cross-entropy; views repeat after K.

    A term of weight 0 is neither computed nor logged.
    """
    views = open_views(data, spec.augment, context=context)
    wanted = {"soft": spec.soft_weight, "hard": spec.hard_weight}
    weights = {name: weight for name, weight in wanted.items() if weight > 0}

    def load(indices: Tensor, epoch: int) -> tuple[ViewBatch, Tensor]:
        view = epoch % labels.views
        teacher = labels.rows(indices, view=view).to(context.device)
        return views.batch(indices, view=view), teacher

    def terms(module: nn.Module, loaded: tuple[ViewBatch, Tensor]) -> Mapping[str, Tensor]:
        batch, teacher = loaded
        logits = module(batch.inputs)
        found = {}
        if "soft" in weights:
            found["soft"] = kd(logits, teacher, temperature=spec.temperature)
        if "hard" in weights:
            found["hard"] = _hard(logits, batch, spec)
        return found

    return Task(
        samples=len(data.train.labels),
        load=load,
        terms=terms,
        weights=weights,
        validate=lambda module: _validation(module, data, context),
    )


def _hard(logits: Tensor, batch: ViewBatch, spec: TrainSpec) -> Tensor:
    return hard_label(
        logits,
        batch.labels,
        smoothing=spec.label_smoothing,
        partner_labels=batch.partner_labels,
        lam=batch.lam,
    )


def _validation(module: nn.Module, data: Data, context: Context) -> float:
    logits: Any = logits_of_module(
        module,
        data.validation,
        data.preprocess,
        device=context.device,
        name="the network in training",
    )
    return accuracy(logits, data.validation.labels)
