"""Two models on the same n samples: bounds for what the second lost. Pure; numpy and scipy.special.

Only the pairs on which the models differ count: b lost (reference right, candidate wrong), c gained
(the reverse). All bounds are one-sided, and all but the last are the value at which a score
statistic, whose nuisance parameters are at their maximum likelihood under the null hypothesis,
reaches the normal quantile of the confidence; simulated error rates are in benchmarks/gate.md.

- drop (b - c)/n: Tango, Statistics in Medicine 17:891, 1998, eq. 8–10.
- ratio of two accuracies, or of two error rates: Nam & Blackwelder, Statistics in Medicine 21:689,
  2002. Here the constrained likelihood is solved by its Lagrange multiplier.
- difference yes/no: McNemar's mid-p, Fagerland, Lydersen & Laake, BMC Medical Research Methodology
  13:91, 2013.
- a share k/n: Clopper & Pearson, Biometrika 26:404, 1934.

Counts may be arrays, then so are the results; that is how simulations draw thousands of tables.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from statistics import NormalDist
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

Array = NDArray[Any]

POWER = 0.82  # of the n that a verdict asks for: 80 % as usual, and what normal tables promise more
HALVINGS = 60  # of an interval: past a float's 53 bits
MOST_GROWTH = 1e9  # of an error rate, beyond which a bound counts as none


def drop_upper_bound(lost: ArrayLike, gained: ArrayLike, *, n: int, confidence: float) -> Any:
    """Upper bound of the paired drop (lost - gained)/n by Tango's score.

    The bound is the δ at which the score statistic of H0 "drop = δ" reaches -z(confidence).

    Args:
        lost, gained: discordant pairs, each ≥ 0, together ≤ n.
        n: pairs, ≥ 1.
        confidence: in [0.5, 1).

    Returns:
        A fraction in [-1, 1]; an array where the counts are arrays.
    """
    b, c = np.asarray(lost, np.float64), np.asarray(gained, np.float64)
    z = NormalDist().inv_cdf(confidence)
    drop = (b - c) / n
    if z == 0:
        return drop[()]
    low, high = drop + 0.0, np.full_like(drop, math.nextafter(1.0, 0.0))
    bound = _root(lambda delta: drop_score(delta, b, c, n=n) + z, low, high)
    return np.where(drop >= 1, 1.0, bound)[()]


def drop_score(delta: Array, lost: Array, gained: Array, *, n: int) -> Array:
    """Tango's z of H0: drop = delta, with the nuisance P(gained) at its constrained MLE."""
    a = 2 * n
    b = -lost - gained + (2 * n - lost + gained) * delta
    c = -gained * delta * (1 - delta)
    p_gained = (np.sqrt(np.maximum(b * b - 4 * a * c, 0.0)) - b) / (2 * a)
    variance = n * (2 * p_gained + delta * (1 - delta))
    return _standardized(lost - gained - n * delta, variance)


def ratio_lower_bound(
    lost: ArrayLike, gained: ArrayLike, both: ArrayLike, *, n: int, confidence: float
) -> Any:
    """Lower bound of candidate / reference, of two shares counted on the same n samples.

    Args:
        lost, gained, both: samples counted for the reference alone, the candidate alone, for both.

    Returns: ≥ 0; NaN where the reference's count is 0.
    """
    b, c, a = (np.asarray(one, np.float64) for one in (lost, gained, both))
    z = NormalDist().inv_cdf(confidence)
    ratio = _ratio(c + a, b + a)
    low = np.where(np.isfinite(ratio), 1e-12, np.nan)
    bound = _root(lambda theta: ratio_score(theta, b, c, a, n=n) - z, low, ratio)
    return np.where(ratio == 0, 0.0, bound)[()]


def ratio_upper_bound(
    lost: ArrayLike, gained: ArrayLike, both: ArrayLike, *, n: int, confidence: float
) -> Any:
    """Upper bound of candidate / reference, as `ratio_lower_bound`; inf beyond MOST_GROWTH."""
    b, c, a = (np.asarray(one, np.float64) for one in (lost, gained, both))
    z = NormalDist().inv_cdf(confidence)
    ratio = _ratio(c + a, b + a)

    def distance(log_theta: Array) -> Array:
        return ratio_score(np.exp(log_theta), b, c, a, n=n) + z

    with np.errstate(divide="ignore"):
        low = np.maximum(np.log(ratio), -50.0)  # a candidate without a count: from almost 0
    bound = np.exp(_root(distance, low, np.full_like(ratio, math.log(MOST_GROWTH))))
    return np.where(bound > 0.99 * MOST_GROWTH, np.inf, bound)[()]


def ratio_score(theta: Array, lost: Array, gained: Array, both: Array, *, n: int) -> Array:
    """Nam & Blackwelder's z of H0: share of the candidate = theta · share of the reference.

    The likelihood of the four cells under that is n / (n + λ g) times the counts, where g is a
    cell's part in the restriction: 1 - θ of both, 1 of gained, -θ of lost. λ is the root of the
    restriction, which falls in λ on (-n, n/θ); at an end, the cell without counts takes the rest.
    """

    def restriction(multiplier: Array) -> Array:
        with np.errstate(divide="ignore", invalid="ignore"):
            of_both = (1 - theta) * both / (n + multiplier * (1 - theta))
            of_gained = np.nan_to_num(gained / (n + multiplier), nan=0.0, posinf=np.inf)
            of_lost = theta * lost / (n - multiplier * theta)
            of_lost = np.nan_to_num(of_lost, nan=0.0, posinf=np.inf)
        return np.asarray(of_both + of_gained - of_lost)

    ends = np.full_like(theta * lost, -n), n / theta + 0.0 * lost
    multiplier = _root(restriction, *ends)
    with np.errstate(divide="ignore", invalid="ignore"):
        p_both = both / (n + multiplier * (1 - theta))
        p_gained = np.nan_to_num(gained / (n + multiplier), nan=0.0, posinf=0.0)
        p_lost = np.nan_to_num(lost / (n - multiplier * theta), nan=0.0, posinf=0.0)
    rest = (1 - theta) * p_both + p_gained - theta * p_lost
    p_lost = p_lost + np.maximum(rest, 0.0) / theta
    p_gained = p_gained + np.maximum(-rest, 0.0)
    distance = (gained + both) - theta * (lost + both)
    return _standardized(distance, n * theta * (p_lost + p_gained))


def share_upper_bound(count: int, *, n: int, confidence: float) -> float:
    """Clopper and Pearson's upper bound of a share of which `count` of n were seen."""
    from scipy.special import betaincinv

    return 1.0 if count >= n else float(betaincinv(count + 1, n - count, confidence))


def share_lower_bound(count: int, *, n: int, confidence: float) -> float:
    """Clopper and Pearson's lower bound."""
    return 1.0 - share_upper_bound(n - count, n=n, confidence=confidence)


def mcnemar_mid_p(lost: int, gained: int) -> float:
    """Two-sided mid-p of H0: both models are right equally often; 1 where they never differ."""
    fewer, total = min(lost, gained), lost + gained
    return min(1.0, 2 * _binomial_mid_p(fewer, total))


def mcnemar_worse_p(lost: int, gained: int) -> float:
    """One-sided mid-p of H0: the candidate is not worse."""
    return _binomial_mid_p(gained, lost + gained)


def _binomial_mid_p(count: int, total: int) -> float:
    """P(X < count) + P(X = count)/2 of X ~ Binomial(total, 1/2)."""
    from scipy.special import bdtr

    if total == 0:
        return 0.5
    up_to = float(bdtr(count, total, 0.5))
    below = float(bdtr(count - 1, total, 0.5)) if count else 0.0
    return (up_to + below) / 2


def provable_drop(n: int, *, flips: float, confidence: float) -> float:
    """Smallest limit (fraction) that n samples can prove for a candidate with no true drop.

    Args:
        flips: fraction of samples on which reference and candidate are expected to differ.
    """
    half = round(flips * n / 2)
    return float(drop_upper_bound(half, half, n=n, confidence=confidence))


def needed_samples(
    gap: float, *, variance: float, score: float, n: int, confidence: float
) -> int | None:
    """n that decides in 80 % of test sets if all stays as it was seen; None: no n can.

    (z(confidence) · σ₀ + z(power) · σ₁)² / gap², σ₀ under the null hypothesis as its score has it,
    σ₁ as seen. Without flips σ₁ is 0, and this is what even a perfect candidate needs.

    Args:
        gap: limit less what was seen, of one sample on average.
        variance: of one sample's part in it.
        score: of the limit, on n samples.
    """
    if gap <= 0 or score == 0:
        return None
    normal = NormalDist()
    at_limit = math.sqrt(n) * gap / abs(score)  # for score = n · gap / (sqrt(n) · σ₀)
    spread = normal.inv_cdf(confidence) * at_limit + normal.inv_cdf(POWER) * math.sqrt(variance)
    return math.ceil(max((spread / gap) ** 2, 1))


def needed_for_share(share: float, *, limit: float, confidence: float) -> int | None:
    """n at which 80 % of the samples with this share have their upper bound within the limit."""
    from scipy.special import bdtr, bdtrik

    if share >= limit:
        return None
    n = max(1, math.ceil(math.log1p(-confidence) / math.log1p(-limit))) if limit < 1 else 1
    while True:
        # the largest count whose bound is within the limit: P(X ≤ count | limit) ≤ 1 - confidence
        most = math.floor(float(bdtrik(1 - confidence, n, min(limit, 1 - 1e-12))))
        while most >= 0 and bdtr(most, n, limit) > 1 - confidence:
            most -= 1
        if most >= 0 and bdtr(most, n, share) >= POWER:
            return n
        n += max(1, n // 100)


def _ratio(count: Array, reference: Array) -> Array:
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(reference > 0, count / reference, np.nan)


def _standardized(distance: Array, variance: Array) -> Array:
    with np.errstate(divide="ignore", invalid="ignore"):
        score = distance / np.sqrt(np.maximum(variance, 0.0))
    standardized: Array = np.where(np.asarray(distance) == 0, 0.0, score)
    return standardized


def _root(falling: Callable[[Array], Array], low: Array, high: Array) -> Array:
    """Where a function that falls in its argument is 0, by halving; an end where it is 0 nowhere.

    scipy's brentq takes one equation at a time, and 0.3 s to import.
    """
    low, high = np.broadcast_arrays(low, high)
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        is_above = falling(middle) > 0
        low, high = np.where(is_above, middle, low), np.where(is_above, high, middle)
    return (low + high) / 2
