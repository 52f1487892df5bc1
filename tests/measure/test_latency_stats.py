"""Intervals are held by their simulated coverage, tails by the table they come from."""

from __future__ import annotations

import numpy as np
import pytest
from edgestill.pipeline.measure.latency_stats import (
    RESAMPLES,
    log_p50,
    ratio_of,
    summarize,
    tail_bound,
)


def test_summary_of_hand_worked_numbers() -> None:
    # medians 2 and 8 ms: their geometric mean is 4
    summary = summarize([[1_000_000, 2_000_000, 3_000_000], [8_000_000, 8_000_000, 8_000_000]])

    assert summary["p50_ms"] == pytest.approx(4.0)
    assert summary["min_ms"] == 1.0
    assert summary["launch_p50_ms"] == [2.0, 8.0]
    assert summary["n"] == 6
    assert summary["launches"] == 2
    # pooled 1 2 3 8 8 8: median 5.5, distances 4.5 3.5 2.5 2.5 2.5 2.5
    assert summary["mad_ms"] == pytest.approx(2.5)
    assert summary["cv"] == pytest.approx(np.std([1, 2, 3, 8, 8, 8]) / 5)
    assert summary["p90_ms"] is None
    low, high = summary["p50_ci95_ms"]
    assert low < 4.0 < high


@pytest.mark.parametrize(("share", "least"), [(0.90, 64), (0.95, 130), (0.99, 662)])
def test_a_tail_needs_its_least_number_of_runs_and_is_then_the_maximum(
    share: float, least: int
) -> None:
    values = np.arange(least, dtype=np.float64)

    assert tail_bound(values[:-1], share) is None
    assert tail_bound(values, share) == least - 1


def test_a_tail_bound_holds_in_99_of_100_experiments() -> None:
    rng = np.random.default_rng(0)
    uniform = np.sort(rng.uniform(size=(2000, 400)), axis=1)

    bounds = np.array([tail_bound(row, 0.90) for row in uniform])

    # 2,000 experiments at 99 %: 1,962 is four standard errors below 1,980
    assert np.count_nonzero(bounds >= 0.90) >= 1962
    assert np.median(bounds) < 0.96  # and it is a bound, not just the maximum


@pytest.mark.parametrize("length", [5, 6, 41])
def test_drawn_medians_are_distributed_like_medians_of_resampled_runs(length: int) -> None:
    values = np.random.default_rng(3).exponential(size=length) + 1
    resampled = np.random.default_rng(4).choice(values, size=(RESAMPLES, length))
    plain = np.log(np.median(resampled, axis=1))

    drawn = log_p50([values])

    # both are RESAMPLES draws; an even n averages two runs in one and takes one in the other
    assert drawn.mean() == pytest.approx(plain.mean(), abs=0.02)
    assert drawn.std() == pytest.approx(plain.std(), rel=0.05 if length % 2 else 0.35)


@pytest.mark.parametrize("launches", [3, 5, 10])
def test_the_interval_of_a_speedup_covers_the_true_ratio(launches: int) -> None:
    rng = np.random.default_rng(launches)
    trials, truth = 200, 2.0

    covered = 0
    for _ in range(trials):
        shared = rng.normal(0, 0.10, size=(launches, 1))  # the machine's mood: drops out
        sides = [
            base
            * np.exp(shared + rng.normal(0, 0.03, (launches, 1)))
            * np.exp(np.abs(rng.normal(0, 0.03, (launches, 31))))
            for base in (2e6, 1e6)
        ]
        low, high = ratio_of(*(side.astype(np.int64).tolist() for side in sides))["ci95"]
        covered += low <= truth <= high

    # four standard errors of 200 trials below 95 %
    assert covered / trials >= 0.95 - 4 * np.sqrt(0.95 * 0.05 / trials)


def test_pairing_removes_what_both_share() -> None:
    mood = [1.0, 1.5, 0.8, 2.0, 1.2]
    reference = [[int(2e6 * m)] * 9 for m in mood]
    candidate = [[int(1e6 * m)] * 9 for m in mood]

    found = ratio_of(reference, candidate)

    assert found["ratio"] == pytest.approx(2.0)
    assert found["ci95"] == pytest.approx([2.0, 2.0])


def test_the_ratio_is_the_quotient_of_the_printed_medians() -> None:
    rng = np.random.default_rng(5)
    reference, candidate = (rng.integers(1e6, 3e6, size=(4, 20)).tolist() for _ in range(2))

    ratio = ratio_of(reference, candidate)["ratio"]

    assert ratio == pytest.approx(summarize(reference)["p50_ms"] / summarize(candidate)["p50_ms"])


def test_launches_of_different_lengths_are_resampled_within_themselves() -> None:
    draws = np.exp(log_p50([np.full(3, 1.0), np.full(50, 4.0)]))

    # two picks of {1, 4}: geometric means 1, 2, 4 and nothing else
    assert set(np.round(draws, 9)) == {1.0, 2.0, 4.0}


def test_the_same_latencies_give_the_same_interval() -> None:
    raw = np.random.default_rng(6).integers(1e6, 2e6, size=(3, 30)).tolist()

    assert summarize(raw) == summarize(raw)
