"""The student stage: given, trained from labels alone, fine-tuned, or distilled.

A distilled student never meets the teacher: it learns from stored logits, whose header must say
that they belong to exactly this data, these views and this teacher.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn

from ..data.dataset import Data, open_data
from ..errors import IntegrityError
from ..recipe import DistillSpec, StudentSpec
from ..stage import Context
from ..train.loop import FitResult, fit
from ..train.reproducible import reproducible
from .label_store import LabelStore, describe, network_sha256, open_labels
from .networks import (
    build,
    describe_network,
    measure_validation,
    note_doubts,
    save,
    training_record,
)
from .tasks import distilled, supervised
from .teacher import check_class_order


def train_student(
    spec: StudentSpec,
    distill: DistillSpec | None,
    data_artifact: Path,
    labels_artifact: Path | None = None,
    teacher_artifact: Path | None = None,
    *,
    context: Context,
    memory_budget_bytes: int,
) -> dict[str, Any]:
    """The student stage. Leaves the network in `context.scratch`.

    With `distill` it learns from `labels_artifact`; otherwise from labels if `spec.train` is set;
    otherwise it is only measured.

    Args:
        teacher_artifact: if given, the stored labels must come from this very teacher.
    Raises:
        IntegrityError: the stored labels are missing or stale.
        WeightsError: weights that do not fit, or given ones in another class order.
        MeasurementError: a loss or its logits are not finite.
    """
    data = open_data(data_artifact, memory_budget_bytes=memory_budget_bytes)
    labels = None
    if distill is not None:
        labels = _labels(distill, data, labels_artifact, teacher_artifact, seed=context.seed)
    with reproducible(threads=context.threads, device=context.device):
        network, report = build(spec, data, context=context, where="student")
        training = _train(network.module, spec, distill, data=data, labels=labels, context=context)
        found, counts = measure_validation(network, data, context=context, where="student")
    given = training is None
    if given:
        check_class_order(counts, data.class_names)
    note_doubts(found, data, seen=spec.is_trained, context=context, where="student")
    measurements = {
        **describe_network(network, spec, report),
        "how": "given" if given else "distilled" if labels is not None else "trained",
        "validation": {**found, "possibly_seen": spec.is_trained},
        "training": None if training is None else training_record(training),
    }
    save(network, data, context=context)
    return measurements


def _train(
    module: nn.Module,
    spec: StudentSpec,
    distill: DistillSpec | None,
    *,
    data: Data,
    labels: LabelStore | None,
    context: Context,
) -> FitResult | None:
    if distill is not None and labels is not None:
        task = distilled(data, distill, labels, context=context)
        return fit(module, task, distill, context=context)
    if spec.train is not None:
        alone = supervised(data, spec.train, context=context)
        return fit(module, alone, spec.train, context=context)
    return None


def _labels(
    distill: DistillSpec,
    data: Data,
    folder: Path | None,
    teacher: Path | None,
    *,
    seed: int,
) -> LabelStore:
    if folder is None:
        raise IntegrityError(
            "student: expected the teacher's stored labels to distil from, got none; run with "
            "--fresh to label again"
        )
    sha256 = None if teacher is None else network_sha256(teacher)
    return open_labels(folder, expected=describe(distill, data, seed=seed, teacher=sha256))
