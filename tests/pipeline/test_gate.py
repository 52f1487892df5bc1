"""The gate: statistics held by formula and simulation, verdicts by case."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from edgestill.pipeline.gate import (
    drop_upper_bound,
    judge,
    needed_samples,
    provable_drop,
    unmeasured,
)
from edgestill.pipeline.recipe import GateSpec
from edgestill.pipeline.report import (
    CandidateRecord,
    PairRecord,
    Report,
    RungRecord,
    SelectionRecord,
    SpeedupRecord,
)

Z95 = 1.6448536269514722


def pair(lost: int, gained: int, n: int, **names: Any) -> PairRecord:
    bound = drop_upper_bound(lost, gained, n=n, confidence=0.95)
    roles = {"reference": "teacher", "candidate": "int8"} | names
    return PairRecord(n=n, lost=lost, gained=gained, upper_bound_95=bound, **roles)


def rung(passed: bool = True) -> RungRecord:
    return RungRecord(rung="int8", reference="float", n=64, max_abs=0.0, tolerance=1.0,
                      sqnr_db=40.0, cosine=1.0, top1_agreement=1.0, passed=passed)  # fmt: skip


def candidate(int8_share: float = 1.0) -> CandidateRecord:
    return CandidateRecord(
        name="int8", n=100, correct=90, quantization_drop_points=0.0, bytes=1, multiply_adds=1,
        int8_share=int8_share, p50_ms=1.0,
    )  # fmt: skip


def selection(*, held: bool = True, refused: bool = False) -> SelectionRecord:
    return SelectionRecord(index=0, held=held, refused=refused, why="int8: it is so")


def report(*pairs: PairRecord, **changes: Any) -> Report:
    fields: dict[str, Any] = {
        "tool_version": "0", "created_utc": "", "recipe": {}, "reference": "teacher",
        "deployed": "int8", "model_sha256": "", "data_sha256": "", "environment": {},
        "stages": (), "notes": (), "models": (), "pairs": pairs, "parity": (rung(),),
        "latency": (), "speedup": None, "candidates": (candidate(),), "selection": selection(),
    }  # fmt: skip
    return Report(**{**fields, **changes})


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
    n, runs = 700, 1500
    draws = rng.multinomial(n, [p_lost, p_gained, 1 - p_lost - p_gained], size=runs)

    below = [
        drop_upper_bound(int(b), int(c), n=n, confidence=0.95) < p_lost - p_gained
        for b, c, _ in draws
    ]

    # 5 % nominal; four standard errors of 1500 runs are 2.3 points
    assert np.mean(below) < 0.05 + 0.023


def test_the_bound_is_never_below_the_drop_itself() -> None:
    for lost, gained, n in [(5, 0, 5), (0, 5, 5), (3, 1, 4), (1, 1, 2), (0, 0, 1)]:
        bound = drop_upper_bound(lost, gained, n=n, confidence=0.95)
        assert (lost - gained) / n <= bound <= 1


def test_more_flips_prove_less() -> None:
    few, many = (provable_drop(1000, flips=f, confidence=0.95) for f in (0.02, 0.10))

    assert few < many


def test_pass_fail_and_inconclusive_by_bound_and_drop() -> None:
    policy = GateSpec(max_drop_points=1.0)
    outcomes = {
        (2, 2, 2000): "pass",  # bound 0.24 points
        (60, 10, 2000): "fail",  # drop 2.5
        (12, 2, 2000): "pass",  # drop 0.5, bound 0.84
        (15, 2, 1000): "fail",  # drop 1.3
        (5, 2, 600): "inconclusive",  # drop 0.5, bound above 1
    }

    for (lost, gained, n), expected in outcomes.items():
        assert judge(report(pair(lost, gained, n)), policy).outcome == expected, (lost, gained, n)


def test_inconclusive_names_an_n_that_would_decide() -> None:
    small = pair(5, 2, 600)
    verdict = judge(report(small), GateSpec(max_drop_points=1.0))
    needed = verdict.checks[1].needed_n

    assert verdict.exit_code == 3
    assert needed is not None
    assert needed > 600
    scale = needed / 600
    grown = pair(round(5 * scale), round(2 * scale), needed)
    assert judge(report(grown), GateSpec(max_drop_points=1.0)).outcome == "pass"
    assert str(needed) in verdict.checks[1].text


def test_needed_samples_follow_the_published_formula() -> None:
    # n = 6.18 · ψ / (δ - drop)² for 80 % power: profiling.md's table, ψ = 4 %, δ = 1 → 2473
    even = pair(20, 20, 1000)

    assert needed_samples(even, limit=0.01, confidence=0.95) == pytest.approx(2473, rel=2e-3)


def test_no_samples_can_decide_a_drop_on_its_limit() -> None:
    assert needed_samples(pair(10, 0, 1000), limit=0.01, confidence=0.95) is None


@pytest.mark.parametrize(
    ("outcomes", "code"),
    [
        ({"parity": False, "pair": (5, 2, 600)}, 1),  # fail over inconclusive
        ({"parity": True, "pair": None}, 4),  # invalid
        ({"parity": False, "pair": None}, 1),  # fail over invalid
        ({"parity": True, "pair": (5, 2, 600)}, 3),
        ({"parity": True, "pair": (0, 0, 600)}, 0),
    ],
)
def test_exit_codes_follow_the_precedence(outcomes: dict[str, Any], code: int) -> None:
    pairs = () if outcomes["pair"] is None else (pair(*outcomes["pair"]),)
    found = report(*pairs, parity=(rung(outcomes["parity"]),))

    assert judge(found, GateSpec(max_drop_points=1.0)).exit_code == code


def test_a_ladder_that_was_not_climbed_is_invalid_not_passed() -> None:
    verdict = judge(report(pair(0, 0, 600), parity=()), GateSpec())

    assert verdict.outcome == "invalid"


@pytest.mark.parametrize(
    ("ci", "expected"),
    [((2.1, 2.4), "pass"), ((1.8, 1.95), "fail"), ((1.9, 2.1), "inconclusive"),
     ((math.nan, math.nan), "invalid")],
)  # fmt: skip
def test_speed_up_is_judged_by_its_interval(ci: tuple[float, float], expected: str) -> None:
    speedup = SpeedupRecord(reference="teacher-onnx", candidate="int8", ratio=2.0, ci95=ci)
    found = report(pair(0, 0, 5000), speedup=speedup)

    assert judge(found, GateSpec(min_speedup=2.0)).outcome == expected


def test_quantization_drop_is_judged_against_the_float_student() -> None:
    pairs = (pair(0, 0, 5000), pair(400, 0, 5000, reference="student"))

    verdict = judge(report(*pairs), GateSpec(max_quantization_drop_points=0.5))

    assert [check.outcome for check in verdict.checks] == ["pass", "pass", "fail"]


def test_of_a_given_file_the_float_file_is_what_int8_must_not_fall_behind() -> None:
    found = report(pair(400, 0, 5000, reference="float"), reference="float")

    verdict = judge(found, GateSpec(max_drop_points=None, max_quantization_drop_points=0.5))

    assert verdict.outcome == "fail"


@pytest.mark.parametrize(
    ("chosen", "expected"),
    [
        (selection(), "pass"),
        (selection(held=False), "pass"),  # chance explains it: the test set decides
        (selection(held=False, refused=True), "fail"),
    ],
)
def test_nothing_ships_that_validation_has_shown_to_be_beyond_the_budget(
    chosen: SelectionRecord, expected: str
) -> None:
    verdict = judge(report(pair(0, 0, 5000), selection=chosen), GateSpec())

    assert verdict.outcome == expected
    assert ("budget" in [check.name for check in verdict.checks]) != chosen.held


@pytest.mark.parametrize(
    ("share", "expected"), [(0.95, "pass"), (0.85, "fail"), (math.nan, "invalid")]
)
def test_a_floor_of_int8_is_held(share: float, expected: str) -> None:
    found = report(pair(0, 0, 5000), candidates=(candidate(share),))

    assert judge(found, GateSpec(min_int8_share=0.9)).outcome == expected


def test_limits_on_what_was_not_measured_are_named() -> None:
    policy = GateSpec(max_quantization_drop_points=0.5, min_speedup=2.0, min_int8_share=0.9)

    problems = unmeasured(report(pair(0, 0, 10), deployed="float"), policy)

    assert len(problems) == 3


def test_a_policy_that_judges_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="judges nothing"):
        GateSpec(max_drop_points=None)
