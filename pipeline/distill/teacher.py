"""The teacher stage: take given weights, train, or fine-tune; then find out whether it can teach.

A teacher with the wrong class order, broken weights or an accuracy below what the recipe demands
makes a student that is wrong in the same way, after hours. So it is measured on validation first.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..data.dataset import open_data
from ..errors import WeightsError
from ..measure.doubts import check_class_order, note_doubts
from ..recipe import TeacherSpec
from ..stage import Context
from ..train.loop import fit
from ..train.reproducible import reproducible
from .networks import (
    build,
    describe_network,
    measure_validation,
    save,
    training_record,
)
from .tasks import supervised


def prepare_teacher(
    spec: TeacherSpec, data_artifact: Path, *, context: Context, memory_budget_bytes: int
) -> dict[str, Any]:
    """The teacher stage. Leaves the network in `context.scratch`.

    Raises:
        WeightsError: validation accuracy below `min_accuracy`, or another class order.
        MeasurementError: its logits, or a loss while it is trained, are not finite.
        ModelError: it cannot be built or run.
    """
    data = open_data(data_artifact, memory_budget_bytes=memory_budget_bytes)
    with reproducible(threads=context.threads, device=context.device):
        network, report = build(spec, data, context=context, where="teacher")
        training = None
        if spec.train is not None:
            task = supervised(data, spec.train, context=context)
            training = fit(network.module, task, spec.train, context=context)
        if not context.world.leads:
            return {}
        found, counts = measure_validation(network, data, context=context, where="teacher")
    if training is None:
        check_class_order(counts, data.class_names)
    if spec.min_accuracy is not None and found["accuracy"] < spec.min_accuracy:
        raise WeightsError(
            f"teacher: expected at least {100 * spec.min_accuracy:.1f} % on validation "
            f"(teacher.min_accuracy), got {100 * found['accuracy']:.1f} % of {found['n']} samples; "
            "check preprocess and class order, train it longer, or lower min_accuracy"
        )
    note_doubts(found, data, seen=spec.is_trained, context=context, where="teacher")
    measurements = {
        **describe_network(network, spec, report),
        "validation": {**found, "possibly_seen": spec.is_trained},
        "training": None if training is None else training_record(training),
    }
    save(network, data, context=context)
    return measurements
