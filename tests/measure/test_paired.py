"""Bounds of paired comparisons, held by closed forms, a numerical likelihood and simulation."""

from __future__ import annotations

import math

import numpy as np
import pytest
from edgestill.pipeline.measure.paired import (
    drop_upper_bound,
    mcnemar_mid_p,
    mcnemar_worse_p,
    needed_for_share,
    needed_samples,
    provable_drop,
    ratio_lower_bound,
    ratio_score,
    ratio_upper_bound,
    share_lower_bound,
    share_upper_bound,
)

Z95 = 1.6448536269514722


@pytest.mark.parametrize("n", [10, 100, 719, 10_000])
def test_the_bound_of_identical_answers_is_the_closed_form(n: int) -> None:
    # with b = c = 0 the score equation is nδ/(1-δ) = z², so δ = z²/(n + z²)
    expected = Z95**2 / (n + Z95**2)

    assert drop_upper_bound(0, 0, n=n, confidence=0.95) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize(("lost", "gained", "n"), [(1, 0, 44), (5, 2, 600), (30, 20, 719)])
def test_the_bound_solves_the_score_equation_with_a_numerical_mle(
    lost: int, gained: int, n: int
) -> None:
    # independent of the closed form: maximise the multinomial likelihood under
    # P(lost) = P(gained) + δ by search, and put it into (drop - δ) / sqrt(var / n)
    from scipy.optimize import minimize_scalar

    delta = drop_upper_bound(lost, gained, n=n, confidence=0.95)

    def minus_log_likelihood(q: float) -> float:
        rest = 1 - 2 * q - delta
        return -(
            lost * math.log(q + delta)
            + (gained * math.log(q) if gained else 0.0)
            + (n - lost - gained) * math.log(rest)
        )

    q = minimize_scalar(
        minus_log_likelihood, bounds=(1e-12, (1 - delta) / 2 - 1e-9), method="bounded",
        options={"xatol": 1e-12},
    ).x  # fmt: skip
    variance = (2 * q + delta - delta**2) / n

    assert ((lost - gained) / n - delta) / math.sqrt(variance) == pytest.approx(-Z95, abs=2e-3)


@pytest.mark.parametrize(("p_lost", "p_gained"), [(0.03, 0.02), (0.01, 0.0), (0.08, 0.08)])
def test_the_bound_errs_about_as_often_as_it_says(p_lost: float, p_gained: float) -> None:
    rng = np.random.default_rng(1)
    n, runs = 700, 4000
    lost, gained, _ = rng.multinomial(n, [p_lost, p_gained, 1 - p_lost - p_gained], size=runs).T

    below = drop_upper_bound(lost, gained, n=n, confidence=0.95) < p_lost - p_gained

    # 5 % nominal; four standard errors of 4000 runs are 1.4 points
    assert np.mean(below) < 0.05 + 0.014


def test_the_bound_is_never_below_the_drop_itself() -> None:
    for lost, gained, n in [(5, 0, 5), (0, 5, 5), (3, 1, 4), (1, 1, 2), (0, 0, 1)]:
        bound = drop_upper_bound(lost, gained, n=n, confidence=0.95)
        assert (lost - gained) / n <= bound <= 1


def test_more_flips_prove_less() -> None:
    few, many = (provable_drop(1000, flips=f, confidence=0.95) for f in (0.02, 0.10))

    assert few < many


@pytest.mark.parametrize("theta", [0.95, 1.2])
def test_the_ratio_s_score_is_that_of_a_numerical_mle(theta: float) -> None:
    # independent of the multiplier: maximise the likelihood of the four cells, the share of both
    # given by the restriction both + gained = θ (both + lost)
    from scipy.optimize import minimize

    lost, gained, both, n = 30, 25, 300, 719

    def minus_log_likelihood(cells: tuple[float, float]) -> float:
        p_lost, p_gained = cells
        p_both = (theta * p_lost - p_gained) / (1 - theta)
        rest = 1 - p_lost - p_gained - p_both
        if min(p_lost, p_gained, p_both, rest) <= 0:
            return math.inf
        counts = np.array([lost, gained, both, n - lost - gained - both])
        return -float(counts @ np.log([p_lost, p_gained, p_both, rest]))

    grid = np.linspace(0.005, 0.2, 60)
    start = min(((x, y) for x in grid for y in grid), key=minus_log_likelihood)
    p_lost, p_gained = minimize(
        minus_log_likelihood, start, method="Nelder-Mead", options={"xatol": 1e-10, "fatol": 1e-10}
    ).x
    expected = (gained + both - theta * (lost + both)) / math.sqrt(n * theta * (p_lost + p_gained))

    counts = (np.array(float(one)) for one in (lost, gained, both))
    assert ratio_score(np.array(theta), *counts, n=n) == pytest.approx(expected, rel=1e-5)


def test_without_flips_the_ratio_s_bounds_are_closed_forms() -> None:
    # the score at θ is sqrt((1 - θ) a / θ) below 1, and -sqrt((θ - 1) a) above
    low = ratio_lower_bound(0, 0, 600, n=719, confidence=0.95)
    high = ratio_upper_bound(0, 0, 60, n=719, confidence=0.95)

    assert low == pytest.approx(600 / (600 + Z95**2), rel=1e-6)
    assert high == pytest.approx(1 + Z95**2 / 60, rel=1e-6)


@pytest.mark.parametrize("accuracy", [0.6, 0.93])
def test_the_ratio_s_lower_bound_errs_about_as_often_as_it_says(accuracy: float) -> None:
    rng = np.random.default_rng(2)
    n, runs, theta, flips = 700, 2000, 0.98, 0.03
    p_lost = (flips + (1 - theta) * accuracy) / 2
    p_gained = flips - p_lost
    cells = [p_lost, p_gained, accuracy - p_lost, 1 - accuracy - p_gained]
    lost, gained, both, _ = rng.multinomial(n, cells, size=runs).T

    # the bound is above θ where θ's own score is above z: one equation instead of sixty
    above = ratio_score(np.array(theta), lost, gained, both, n=n) > Z95

    assert np.mean(above) < 0.05 + 0.02  # four standard errors of 2000 runs


@pytest.mark.parametrize("error", [0.05, 0.3])
def test_the_ratio_s_upper_bound_errs_about_as_often_as_it_says(error: float) -> None:
    rng = np.random.default_rng(3)
    n, runs, growth = 1000, 2000, 0.2
    p_more = 0.01 + growth * error  # wrong in the candidate alone
    p_less = p_more - growth * error
    cells = [p_less, p_more, error - p_less, 1 - error - p_more]
    less, more, both, _ = rng.multinomial(n, cells, size=runs).T

    below = ratio_score(np.array(1 + growth), less, more, both, n=n) < -Z95

    assert np.mean(below) < 0.05 + 0.02


def test_the_ratio_s_bounds_are_where_the_score_is_the_quantile() -> None:
    counts = [np.array(float(one)) for one in (30, 20, 400)]
    low = ratio_lower_bound(30, 20, 400, n=719, confidence=0.95)
    high = ratio_upper_bound(30, 20, 400, n=719, confidence=0.95)

    assert ratio_score(low, *counts, n=719) == pytest.approx(Z95, abs=1e-6)
    assert ratio_score(high, *counts, n=719) == pytest.approx(-Z95, abs=1e-6)


def test_a_reference_without_a_count_has_no_ratio() -> None:
    assert math.isnan(ratio_lower_bound(0, 3, 0, n=100, confidence=0.95))
    assert math.isnan(ratio_upper_bound(0, 3, 0, n=100, confidence=0.95))


@pytest.mark.parametrize(("count", "n"), [(0, 100), (3, 100), (99, 100), (100, 100)])
def test_a_share_s_bounds_are_scipy_s_exact_ones(count: int, n: int) -> None:
    from scipy.stats import binomtest

    high = binomtest(count, n, alternative="less").proportion_ci(0.95).high
    low = binomtest(count, n, alternative="greater").proportion_ci(0.95).low

    assert share_upper_bound(count, n=n, confidence=0.95) == pytest.approx(high)
    assert share_lower_bound(count, n=n, confidence=0.95) == pytest.approx(low, abs=1e-12)


def test_mcnemar_s_mid_p_is_that_of_hand_worked_counts() -> None:
    # 2 of 3 differ for the worse: P(X = 0) + P(X = 1)/2 of Binomial(3, 1/2) is 1/8 + 3/16
    assert mcnemar_worse_p(2, 1) == pytest.approx(1 / 8 + 3 / 16)
    assert mcnemar_mid_p(2, 1) == pytest.approx(2 * (1 / 8 + 3 / 16))
    assert mcnemar_mid_p(1, 2) == mcnemar_mid_p(2, 1)
    assert mcnemar_mid_p(4, 4) == mcnemar_mid_p(0, 0) == 1.0


def test_needed_samples_follow_the_published_formula() -> None:
    # n = (z(95 %) + z(82 %))² · ψ / (δ - drop)², with ψ = 4 %, δ = 1 point: 6.554 · 400; a score
    # of n · gap / sqrt(n · ψ) has the same variance under the null hypothesis
    score = 1000 * 0.01 / math.sqrt(1000 * 0.04)
    needed = needed_samples(0.01, variance=0.04, score=score, n=1000, confidence=0.95)

    assert needed == pytest.approx(2622, rel=2e-3)


def test_no_samples_can_decide_a_gap_of_nothing() -> None:
    assert needed_samples(0.0, variance=0.01, score=0.0, n=100, confidence=0.95) is None


def test_a_share_s_needed_n_has_the_power_that_it_promises() -> None:
    from scipy.stats import binom

    n = needed_for_share(0.0025, limit=0.01, confidence=0.95)

    assert n is not None
    counts = np.arange(30)
    passes = np.array([share_upper_bound(int(k), n=n, confidence=0.95) <= 0.01 for k in counts])
    assert binom.pmf(counts[passes], n, 0.0025).sum() >= 0.80


def test_a_share_at_its_limit_is_decided_by_no_n() -> None:
    assert needed_for_share(0.01, limit=0.01, confidence=0.95) is None
    # without a single flip: 0.99^n ≤ 5 %
    assert needed_for_share(0.0, limit=0.01, confidence=0.95) == 299
