"""Upper bounds of what has no formula: the bias-corrected and accelerated bootstrap of samples.

Efron, Journal of the American Statistical Association 82:171, 1987 (BCa). Samples are drawn with
replacement, each with the answers of all models: the pairing stays. A quantity is a function of
sums over samples, so a draw is a vector of counts and thousands of them are one matrix product;
scipy.stats.bootstrap calls the statistic on every drawn data set instead. Seeded: the same samples
give the same bound.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]

RESAMPLES = 10_000
LEAST_RESAMPLES = 1_000  # of so many samples that 10,000 would take minutes
DRAWN = 200_000_000  # samples drawn in all, a few seconds
CHUNK = 2_000_000  # numbers held at once


@dataclass(frozen=True)
class Estimate:
    """What was seen, and its one-sided upper bound. NaN: it has no value, or not in every draw."""

    value: float
    bound: float


def upper_bound(
    sums_of: Any, statistic: Callable[[Array], Array], *, counts: Array, confidence: float
) -> Estimate:
    """Bound of `statistic(sums)` over samples.

    Args:
        sums_of: (M, K) scipy.sparse or ndarray: a row for each kind of sample.
        statistic: sums (R, K) → (R,).
        counts: int (M,), how many samples are of each kind.
        confidence: in [0.5, 1).
    """
    total = np.atleast_2d(counts @ sums_of).astype(np.float64)
    value = float(statistic(total)[0])
    draws = np.concatenate([statistic(np.asarray(drawn @ sums_of)) for drawn in _draws(counts)])
    without = [
        statistic(total - _dense(sums_of[start:stop]))
        for start, stop in _spans(len(counts), total.shape[1])
    ]
    return bca(value, draws, np.concatenate(without), weights=counts, confidence=confidence)


def bca(
    value: float, draws: Array, without: Array, *, confidence: float, weights: Array | None = None
) -> Estimate:
    """Efron's bound from bootstrap draws (R,) and jackknife values (M,).

    Args:
        weights: (M,), how many samples a jackknife value stands for; None: one each.
    """
    if not (math.isfinite(value) and np.isfinite(draws).all() and np.isfinite(without).all()):
        return Estimate(value, math.nan)
    weights = np.ones(len(without)) if weights is None else weights
    normal = NormalDist()
    # a draw that equals the estimate stands half on either side: metrics of counts often tie
    below = float((draws < value).mean() + (draws == value).mean() / 2)
    edge = 1 / (len(draws) + 1)
    bias = normal.inv_cdf(min(max(below, edge), 1 - edge))
    distance = np.average(without, weights=weights) - without
    spread = float((weights * distance**2).sum())
    skew = float((weights * distance**3).sum())
    acceleration = skew / (6 * spread**1.5) if spread > 0 else 0.0
    z = bias + normal.inv_cdf(confidence)
    slope = 1 - acceleration * z
    level = normal.cdf(bias + z / slope) if slope > 0 else 1.0
    return Estimate(value, max(value, float(np.quantile(draws, level))))


def resamples(n: int) -> int:
    """Draws of n samples: fewer where there are very many, so that it takes seconds."""
    return max(LEAST_RESAMPLES, min(RESAMPLES, DRAWN // max(n, 1)))


def _draws(counts: Array) -> Iterator[Array]:
    """How often each kind is drawn, a few draws at a time: float64 (R, M)."""
    generator = np.random.default_rng(0)
    kinds, n = len(counts), int(counts.sum())
    left, size = resamples(n), max(1, CHUNK // kinds)
    while left:
        rows = min(size, left)
        if kinds == n:  # every sample is a kind of its own: count the drawn indices
            drawn = np.stack(
                [np.bincount(generator.integers(0, n, n, np.int32), minlength=n)
                 for _ in range(rows)]
            )  # fmt: skip
        else:
            drawn = generator.multinomial(n, counts / n, size=rows)
        yield drawn.astype(np.float64)
        left -= rows


def _spans(rows: int, columns: int) -> Iterator[tuple[int, int]]:
    step = max(1, CHUNK // max(columns, 1))
    yield from ((start, min(start + step, rows)) for start in range(0, rows, step))


def _dense(block: Any) -> Array:
    dense: Array = block.toarray() if hasattr(block, "toarray") else np.asarray(block)
    return dense
