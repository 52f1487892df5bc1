"""Which of several candidates goes on: the fastest that holds the budget on validation. Pure.

A candidate holds the budget when its drop is within every limit; one sample more is excused, for
one sample shows nothing. Times that noise cannot tell apart are a tie, and then the first in the
table goes on. If none holds, the one that is least beyond its limits goes on to be judged on the
test set; where validation already shows that its drop is no accident, nothing will be shipped.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import NormalDist, median
from typing import Any

ROUNDING = 1e-9  # points; shares of n are not exact in binary
TIE = 1.02  # what two runs of one file differ by on a quiet machine


@dataclass(frozen=True)
class Limits:
    """Points of accuracy that may be lost on validation; None: no limit.

    reference_accuracy: of the model that `drop_points` counts from, a fraction.
    """

    drop_points: float | None
    quantization_drop_points: float | None
    reference_accuracy: float
    confidence: float


@dataclass(frozen=True)
class Choice:
    """index: of the candidate that goes on. held: whether it holds the budget.

    refused: validation shows, at the limits' confidence, that it does not.
    """

    index: int
    held: bool
    refused: bool
    why: str


def select(rows: Sequence[Mapping[str, Any]], limits: Limits) -> Choice:
    """The choice among candidates.

    Args:
        rows: name, n and correct of validation, quantization_drop_points (0 for float), raw_ns (a
            list a launch) or None where only one candidate was made.
    """
    beyond = [_beyond(row, limits) for row in rows]
    one_sample = [100 / row["n"] + ROUNDING for row in rows]
    held = [index for index, excess in enumerate(beyond) if excess <= one_sample[index]]
    if held:
        index = _fastest(rows, held)
        name, count = rows[index]["name"], f"{len(held)} of {len(rows)} that hold the budget"
        best = min(held, key=lambda one: rows[one]["p50_ms"] or 0.0)
        why = f"{name}: the fastest of {count}"
        if index != best:
            why = f"{name}: first of {count}; {rows[best]['name']} is not faster in every launch"
        return Choice(index, held=True, refused=False, why=why)
    index = min(range(len(rows)), key=lambda i: (beyond[i], i))
    row = rows[index]
    refused = beyond[index] > 100 * _margin(row, limits)
    why = (
        f"{row['name']}: none of {len(rows)} holds the budget on validation; it is the nearest, "
        f"{beyond[index]:.2f} points beyond (n = {row['n']})"
    )
    return Choice(index, held=False, refused=refused, why=why)


def _beyond(row: Mapping[str, Any], limits: Limits) -> float:
    """Points beyond the limit that is exceeded most; 0 where all are kept."""
    accuracy = row["correct"] / row["n"]
    excess = [0.0]
    if limits.drop_points is not None:
        excess.append(100 * (limits.reference_accuracy - accuracy) - limits.drop_points)
    if limits.quantization_drop_points is not None:
        excess.append(row["quantization_drop_points"] - limits.quantization_drop_points)
    return max(excess)


def _margin(row: Mapping[str, Any], limits: Limits) -> float:
    """What chance gives to a difference of two accuracies of n samples each, one-sided."""
    accuracy, before = row["correct"] / row["n"], limits.reference_accuracy
    variance = (accuracy * (1 - accuracy) + before * (1 - before)) / row["n"]
    return NormalDist().inv_cdf(limits.confidence) * math.sqrt(variance)


def _fastest(rows: Sequence[Mapping[str, Any]], held: Sequence[int]) -> int:
    if len(held) == 1:
        return held[0]
    best = min(held, key=lambda index: rows[index]["p50_ms"])
    for index in held:
        if index == best or _tied(rows[index], rows[best]):
            return index
    raise AssertionError("the fastest is among those that hold")


def _tied(row: Mapping[str, Any], best: Mapping[str, Any]) -> bool:
    """Unless the best is the faster one in every launch, in which both ran in turns."""
    launches = zip(row["raw_ns"], best["raw_ns"], strict=True)
    return bool(min(median(mine) / median(its) for mine, its in launches) <= TIE)
