"""Whether the deployed file knows how sure it may be, as its reference does.

    max_nll_increase   mean of -log p(label), in nats: bounded by a bootstrap (`bootstrap.py`)
    max_ece_increase   expected calibration error: mean over samples of |accuracy - confidence| of
                       the bin that a sample's top-1 probability falls into (Naeini, Cooper &
                       Hauskrecht, AAAI 2015), 15 bins of equal mass (Nguyen & O'Connor, EMNLP 2015)

Both models are counted in the deployed file's bins. Samples of equal probability share one, so the
error does not depend on their order. p(label) counts as at least the smallest normal float32.

The error of a calibrated model is never seen as 0: chance opens a gap in every bin. Where the
reference's are such, a candidate's real ones hide behind them, and a bootstrap of the difference
repeats the mistake. So the bound goes bin by bin: the reference's gap g and the candidate's change
s of it each lie within their normal interval, and the largest |g + s| - |g| of those counts. Summed
over bins that is cautious: error rates are in benchmarks/gate.md.
"""

from __future__ import annotations

from collections.abc import Callable
from statistics import NormalDist
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..policy import GateSpec
from ..report import Check
from .bootstrap import Estimate, upper_bound
from .common import by_upper_bound, finite, invalid, percent
from .evidence import Evidence
from .samples import Answers

Array = NDArray[Any]

BINS = 15
LEAST = 10 * BINS  # samples; the normal interval of a bin needs some
LEAST_PROBABILITY = float(np.finfo(np.float32).tiny)


def checks(evidence: Evidence, policy: GateSpec) -> list[Check]:
    report, answers, found = evidence.report, evidence.samples.answers, []
    roles = report.reference, report.deployed
    for name, (what, unit, increase, of_one) in QUANTITIES.items():
        limit = getattr(policy, name)
        if limit is None:
            continue
        if not set(roles) <= set(answers) or roles[0] == roles[1]:
            text = f"{roles[0]} and {roles[1]} are not two models of samples.parquet"
            found.append(invalid(name, text, limit=limit, unit=unit))
            continue
        if evidence.samples.n < LEAST:
            text = f"n = {evidence.samples.n}: calibration needs {LEAST} test samples"
            found.append(invalid(name, text, limit=limit, unit=unit))
            continue
        before, after = (answers[role] for role in roles)
        estimate = increase(before, after, confidence=policy.confidence)
        deployed = of_one(after)
        found.append(
            Check(
                name=name,
                outcome=by_upper_bound(estimate.value, estimate.bound, limit),
                value=finite(estimate.value),
                bound=finite(estimate.bound),
                limit=limit,
                unit=unit,
                confidence=policy.confidence,
                n=evidence.samples.n,
                text=f"{what} is {deployed:.4f} against {deployed - estimate.value:.4f} of "
                f"{roles[0]} on n = {evidence.samples.n}, {estimate.value:+.4f}; "
                f"{percent(policy.confidence)} upper bound {estimate.bound:+.4f}, limit {limit:+g}",
            )
        )
    return found


def calibration_error(probability: Array, correct: Array) -> float:
    """ECE as above, of top-1 probabilities (N,) and whether each was right, bool (N,)."""
    bins = equal_mass_bins(probability)
    return float(np.abs(np.bincount(bins, correct - probability)).sum() / len(correct))


def equal_mass_bins(probability: Array) -> Array:
    """Bin of each sample, 0 to 14: int64, (N,)."""
    _, kind, counts = np.unique(probability, return_inverse=True, return_counts=True)
    middle = np.cumsum(counts) - counts / 2  # rank, in the middle of those of equal probability
    bins: Array = (middle[kind] * BINS / len(probability)).astype(np.int64)
    return bins


def error_increase(before: Answers, after: Answers, *, confidence: float) -> Estimate:
    """How much larger the calibration error of `after` is than that of `before`, and its bound."""
    bins = equal_mass_bins(after.top1_probability)
    n, counts = len(bins), np.bincount(bins, minlength=BINS)
    gap = before.correct - before.top1_probability
    change = after.correct - after.top1_probability - gap
    in_bin = np.maximum(counts, 1)
    gaps, changes = (np.bincount(bins, one, minlength=BINS) / in_bin for one in (gap, change))
    value = float((counts * (np.abs(gaps + changes) - np.abs(gaps))).sum() / n)

    # a bin whose samples are all right shows no variance, but its probabilities tell of one
    expected = before.top1_probability * (1 - before.top1_probability)
    scatter = np.bincount(bins, (gap - gaps[bins]) ** 2, minlength=BINS) / in_bin
    scatter = np.maximum(scatter, np.bincount(bins, expected, minlength=BINS) / in_bin)
    z = NormalDist().inv_cdf(confidence)
    of_gap = z * np.sqrt(scatter / in_bin)
    of_change = z * np.sqrt(np.mean((change - changes[bins]) ** 2) / in_bin)
    # monotone in g and convex in s: the largest is at a corner
    corners = [
        np.abs(gaps + i * of_gap + changes + j * of_change) - np.abs(gaps + i * of_gap)
        for i in (-1, 1)
        for j in (-1, 1)
    ]
    bound = float((counts * np.max(corners, axis=0)).sum() / n)
    return Estimate(value, max(value, bound))


def likelihood_increase(before: Answers, after: Answers, *, confidence: float) -> Estimate:
    """How much larger the mean of -log p(label) is in `after`, and its bound, in nats."""
    n, difference = len(before.p_label), likelihoods(after) - likelihoods(before)
    return upper_bound(
        np.stack([difference, np.ones(n)], axis=1),
        lambda sums: sums[:, 0] / sums[:, 1],
        counts=np.ones(n, np.int64),
        confidence=confidence,
    )


def likelihoods(answers: Answers) -> Array:
    """-log p(label) of each sample, (N,)."""
    nats: Array = -np.log(np.maximum(answers.p_label, LEAST_PROBABILITY))
    return nats


QUANTITIES: dict[str, tuple[str, str, Callable[..., Estimate], Callable[[Answers], float]]] = {
    "max_nll_increase": (
        "negative log likelihood",
        "nats",
        likelihood_increase,
        lambda answers: float(likelihoods(answers).mean()),
    ),
    "max_ece_increase": (
        "expected calibration error",
        "of probability",
        error_increase,
        lambda answers: calibration_error(answers.top1_probability, answers.correct),
    ),
}
