"""Limits on speed and memory: intervals, states, devices, and what is skipped."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from edgestill.pipeline.gate import judge
from edgestill.pipeline.gates.latency import state
from edgestill.pipeline.measure.latency_stats import tail_bound, tail_of_launch
from edgestill.pipeline.policy import GateSpec


def only(evidence: Any, **limits: Any) -> Any:
    policy = GateSpec.model_validate({"max_drop_points": None, **limits})
    [check] = [one for one in judge(evidence, policy).checks if one.name != "parity"]
    return check


@pytest.mark.parametrize(
    ("limit", "expected"), [(1.9, "pass"), (2.2, "fail"), (2.0, "inconclusive")]
)
def test_speed_up_is_judged_by_its_interval(
    case: SimpleNamespace, limit: float, expected: str
) -> None:
    assert only(case.evidence(**case.timed(2.0)), min_speedup=limit).outcome == expected


def test_few_launches_prove_no_speed_up_but_may_refute_one(case: SimpleNamespace) -> None:
    found = case.evidence(**case.timed(2.0, launches=4))

    assert only(found, min_speedup=1.5).outcome == "inconclusive"
    assert only(found, min_speedup=9).outcome == "fail"


def test_more_confidence_proves_less(case: SimpleNamespace) -> None:
    found = case.evidence(**case.timed(2.0, spread=0.02))

    bounds = [only(found, min_speedup=1.5, confidence=c).bound for c in (0.8, 0.95, 0.99)]

    assert bounds == sorted(bounds, reverse=True)
    assert len(set(bounds)) == 3


@pytest.mark.parametrize(
    ("limit", "expected"), [(1.5, "pass"), (0.9, "fail"), (1.03, "inconclusive")]
)
def test_a_budget_is_judged_by_the_upper_bound_of_the_90th_percentile(
    case: SimpleNamespace, limit: float, expected: str
) -> None:
    check = only(case.evidence(**case.timed(spread=0.02)), max_p90_ms=limit)

    assert check.outcome == expected
    assert check.value < check.bound


def test_a_percentile_needs_64_runs_and_two_launches() -> None:
    assert tail_of_launch([[1] * 31, [1] * 32], 0.90, confidence=0.95) is None
    assert tail_of_launch([[1] * 100], 0.90, confidence=0.95) is None
    assert tail_of_launch([[1] * 32, [1] * 32], 0.90, confidence=0.95) == (1.0, 1.0)


def test_a_percentile_s_bound_is_never_below_that_of_all_runs() -> None:
    launches = np.random.default_rng(0).exponential(size=(6, 50)) + 1
    runs = tail_bound(np.sort(launches.ravel()), 0.90, confidence=0.95)

    found = tail_of_launch(launches, 0.90, confidence=0.95)

    assert runs is not None
    assert found is not None
    assert found[1] >= runs


def test_a_percentile_s_bound_errs_no_more_often_than_it_says() -> None:
    # launches differ more than their runs do, so that a bound of runs alone errs in every third
    rng = np.random.default_rng(1)
    trials, truth = 600, np.exp(0.05 * 1.2815515655)
    below = runs_alone = 0
    for _ in range(trials):
        launches = np.exp(rng.normal(0, 0.1, (5, 1)) + rng.normal(0, 0.05, (5, 40)))
        found = tail_of_launch(launches, 0.90, confidence=0.95)
        pooled = tail_bound(np.sort(launches.ravel()), 0.90, confidence=0.95)
        assert found is not None
        assert pooled is not None
        below += found[1] < truth
        runs_alone += pooled < truth

    assert below / trials < 0.05 + 4 * np.sqrt(0.05 * 0.95 / trials)
    assert below < runs_alone


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, "valid"),
        ({"doubts": ("unsettled",)}, "noisy"),
        ({"cv": 0.03}, "noisy"),
        ({"doubts": ("throttled",)}, "throttled"),
        ({"doubts": ("unsettled", "undervolted")}, "throttled"),
        ({"measured_on": "proxy"}, "invalid"),
        ({"measured_on": "emulated"}, "invalid"),
        ({"n": 7}, "invalid"),
        ({"p50_ms": float("nan")}, "invalid"),
        ({"cv": float("nan")}, "invalid"),
    ],
)
def test_what_a_latency_is_worth(
    case: SimpleNamespace, changes: dict[str, Any], expected: str
) -> None:
    row = case.latency([[1_000_000, 1_010_000]] * 3)

    assert state(row.model_copy(update=changes)) == expected


@pytest.mark.parametrize(
    "changes",
    [{"doubts": ("throttled",)}, {"measured_on": "proxy"}, {"measured_on": "emulated"}, {"n": 7}],
)
@pytest.mark.parametrize("limits", [{"min_speedup": 1}, {"max_p90_ms": 100},
                                    {"max_peak_rss_bytes": 10**12}])  # fmt: skip
def test_a_latency_that_proves_nothing_never_passes(
    case: SimpleNamespace, limits: dict[str, Any], changes: dict[str, Any]
) -> None:
    assert only(case.evidence(**case.timed(**changes)), **limits).outcome == "invalid"


def test_a_throttled_reference_is_no_reference(case: SimpleNamespace) -> None:
    fields = case.timed()
    slow = fields["latency"][0].model_copy(update={"doubts": ("throttled",)})

    found = case.evidence(latency=(slow, fields["latency"][1]), speedup=fields["speedup"])

    assert only(found, min_speedup=1).outcome == "invalid"


def test_noise_is_said_and_judged(case: SimpleNamespace) -> None:
    check = only(case.evidence(**case.timed(spread=0.1)), min_speedup=1.5)

    assert check.outcome == "pass"
    assert "noisy" in check.text


@pytest.mark.parametrize("limits", [{"min_speedup": 1}, {"max_p90_ms": 100},
                                    {"max_peak_rss_bytes": 10**12}])  # fmt: skip
def test_a_latency_that_was_not_measured_is_invalid(
    case: SimpleNamespace, limits: dict[str, Any]
) -> None:
    assert only(case.evidence(), **limits).outcome == "invalid"


def test_networks_of_different_launches_were_not_measured_in_turns(case: SimpleNamespace) -> None:
    fields = case.timed()
    fewer = case.timed(launches=4)["latency"][0]

    found = case.evidence(latency=(fewer, fields["latency"][1]), speedup=fields["speedup"])

    assert only(found, min_speedup=1).outcome == "invalid"


def test_where_latency_is_not_judged_the_verdict_says_so(case: SimpleNamespace) -> None:
    policy = GateSpec(min_speedup=99, latency="not-here", devices={"local": {"max_p90_ms": 0.001}})

    verdict = judge(case.evidence(**case.timed()), policy)

    skipped = {check.name for check in verdict.checks if check.outcome == "skipped"}
    assert verdict.outcome == "pass"
    assert skipped == {"min_speedup", "devices.local.max_p90_ms"}
    assert any("SKIPPED by policy" in note for note in verdict.notes)


def test_each_device_is_judged_by_its_own_latencies(case: SimpleNamespace) -> None:
    fields = case.timed()
    slow = [row.model_copy(update={"device": "pi5", "raw_ns": [[10 * ns for ns in launch]
            for launch in row.raw_ns]}) for row in fields["latency"]]  # fmt: skip
    found = case.evidence(latency=(*fields["latency"], *slow), speedup=fields["speedup"])
    policy = GateSpec(devices={"local": {"max_p90_ms": 2}, "pi5": {"max_p90_ms": 2}})

    outcomes = {check.name: check.outcome for check in judge(found, policy).checks}

    assert outcomes["devices.local.max_p90_ms"] == "pass"
    assert outcomes["devices.pi5.max_p90_ms"] == "fail"


def test_a_text_s_first_length_counts(case: SimpleNamespace) -> None:
    rows = [case.latency([[base * 1000] * 40] * 5, sequence=length)
            for base, length in ((1000, 32), (9000, 128))]  # fmt: skip

    assert only(case.evidence(latency=tuple(rows)), max_p90_ms=1.5).outcome == "pass"


def test_memory_is_counted(case: SimpleNamespace) -> None:
    found = case.evidence(**case.timed())

    assert only(found, max_peak_rss_bytes=50_000_000).outcome == "pass"
    assert only(found, max_peak_rss_bytes=49_999_999).outcome == "fail"
