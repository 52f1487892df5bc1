"""What makes an accuracy on validation say less than it seems to, or shows a mix-up. No torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.optimize import linear_sum_assignment

from ..data.dataset import Data
from ..errors import WeightsError
from ..stage import Context

Array = np.ndarray[Any, Any]

# When another class order is called the cause of a low accuracy: it must explain most of what the
# network gets wrong, and not be a lucky matching of few samples to many classes.
ORDER_GAIN = 0.20
ORDER_ACCURACY = 0.50
ORDER_SHARE = 0.60  # of the reordered accuracy; an accuracy above it is no mix-up
ORDER_SAMPLES_PER_CLASS = 5
SHOWN = 12  # moved classes named in the message


def note_doubts(
    found: dict[str, Any], data: Data, *, seen: bool, context: Context, where: str
) -> None:
    """Tell the user what makes this accuracy say less than it seems to."""
    n, percent = found["n"], 100 * found["accuracy"]
    if seen:
        context.events.note(
            f"{where}: {percent:.1f} % on {n} validation samples, which its given weights have "
            "possibly seen in their training"
        )
    # the share of the commonest class, and two standard errors of a guess that good
    chance = float(np.bincount(data.validation.labels).max()) / n
    if found["accuracy"] <= chance + 2 * (chance * (1 - chance) / n) ** 0.5:
        context.events.note(
            f"WARNING: {where}: {percent:.1f} % on {n} validation samples is what guessing gives "
            f"({100 * chance:.1f} %): it has learnt nothing that shows; look at the labels, the "
            "preprocessing and the learning rate"
        )


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
