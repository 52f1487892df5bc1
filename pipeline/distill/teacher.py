"""The teacher stage: take given weights, train, or fine-tune; then find out whether it can teach.

A teacher with the wrong class order, broken weights or an accuracy below what the recipe demands
makes a student that is wrong in the same way, after hours. So it is measured on validation first.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from scipy.optimize import linear_sum_assignment

from ..data.dataset import open_data
from ..errors import WeightsError
from ..recipe import TeacherSpec
from ..stage import Context
from ..train.loop import fit
from ..train.reproducible import reproducible
from .networks import (
    build,
    describe_network,
    measure_validation,
    note_doubts,
    save,
    training_record,
)
from .tasks import supervised

Array = np.ndarray[Any, Any]

# When another class order is called the cause of a low accuracy: it must explain most of what the
# teacher gets wrong, and not be a lucky matching of few samples to many classes.
ORDER_GAIN = 0.20
ORDER_ACCURACY = 0.50
ORDER_SHARE = 0.60  # of the reordered accuracy; an accuracy above it is no mix-up
ORDER_SAMPLES_PER_CLASS = 5
SHOWN = 12  # moved classes named in the message


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
            f"(teacher.min_accuracy), got {100 * found['accuracy']:.1f} % of {found['n']} images; "
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


@dataclass(frozen=True)
class ClassOrder:
    """The assignment of outputs to classes that explains the predictions best."""

    output_of: tuple[int, ...]  # class → index of the output that answers for it
    accuracy: float  # as it is
    reordered_accuracy: float


def best_class_order(confusion: Array) -> ClassOrder:
    """Solve the assignment problem over confusion counts (C, C), rows labels, columns outputs."""
    rows, columns = linear_sum_assignment(confusion, maximize=True)
    total = confusion.sum()
    return ClassOrder(
        output_of=tuple(int(column) for column in columns),
        accuracy=float(np.trace(confusion) / total),
        reordered_accuracy=float(confusion[rows, columns].sum() / total),
    )


def check_class_order(confusion: Array, class_names: Sequence[str]) -> None:
    """Refuse a network whose outputs are another permutation of the classes.

    Raises:
        WeightsError: shows the permutation by name.
    """
    order = best_class_order(confusion)
    if (
        confusion.sum() < ORDER_SAMPLES_PER_CLASS * len(confusion)
        or order.reordered_accuracy < ORDER_ACCURACY
        or order.reordered_accuracy - order.accuracy < ORDER_GAIN
        or order.accuracy >= ORDER_SHARE * order.reordered_accuracy
    ):
        return
    moved = [
        f"output {output} (taken for {class_names[output]!r}) answers for {name!r}"
        for name, output in zip(class_names, order.output_of, strict=True)
        if class_names[output] != name
    ]
    more = f"; and {len(moved) - SHOWN} more" if len(moved) > SHOWN else ""
    by_output = {output: name for name, output in zip(class_names, order.output_of, strict=True)}
    wanted = ", ".join(by_output[output] for output in range(len(class_names)))
    raise WeightsError(
        f"class order: expected the outputs in the data's order ({', '.join(class_names)}), got "
        f"{100 * order.accuracy:.1f} % on validation, and {100 * order.reordered_accuracy:.1f} % "
        f"in another order: {'; '.join(moved[:SHOWN])}{more}. Write `data.labels: [{wanted}]`, "
        "or reorder the rows of the classifier's weight and bias"
    )
