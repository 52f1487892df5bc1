"""Which candidate goes on: fastest of those that hold the budget, first of those that tie."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
from edgestill.pipeline.selection import Limits, select

LIMITS = Limits(
    drop_points=1.0, quantization_drop_points=0.5, reference_accuracy=0.9, confidence=0.95
)


def row(
    name: str, *, correct: int = 900, lost: float = 0.0, p50_ms: float = 1.0, n: int = 1000
) -> dict[str, Any]:
    rng = np.random.default_rng(len(name))
    raw = [(p50_ms * 1e6 * (1 + 0.002 * rng.standard_normal(50))).tolist() for _ in range(5)]
    return {
        "name": name,
        "n": n,
        "correct": correct,
        "quantization_drop_points": lost,
        "p50_ms": p50_ms,
        "raw_ns": raw,
    }


def test_the_fastest_of_those_that_hold_goes_on() -> None:
    rows = [row("slow", p50_ms=3.0), row("fast", p50_ms=1.0), row("middle", p50_ms=2.0)]

    choice = select(rows, LIMITS)

    assert (choice.index, choice.held, choice.refused) == (1, True, False)


def test_a_faster_one_that_loses_too_much_against_the_reference_does_not() -> None:
    rows = [row("wrong", correct=880, p50_ms=0.5), row("right", p50_ms=1.0)]

    assert select(rows, LIMITS).index == 1


def test_a_faster_one_that_loses_too_much_by_int8_does_not() -> None:
    rows = [row("int8", lost=0.8, p50_ms=0.5), row("float", p50_ms=1.0)]

    assert select(rows, LIMITS).index == 1


def test_of_times_that_noise_cannot_tell_apart_the_first_in_the_table_goes_on() -> None:
    rows = [row("first", p50_ms=1.01), row("second", p50_ms=1.0)]

    assert select(rows, LIMITS).index == 0
    assert select(rows[::-1], LIMITS).index == 0


def test_a_faster_one_that_is_not_so_in_every_launch_is_a_tie() -> None:
    first, second = row("first", p50_ms=1.5), row("second", p50_ms=1.0)
    assert select([first, second], LIMITS).index == 1

    second["raw_ns"][3] = [2e6] * 50  # in this launch it was the slower one

    assert select([first, second], LIMITS).index == 0


def test_one_sample_beyond_the_limit_is_excused_and_two_are_not() -> None:
    few = replace(LIMITS, drop_points=0.0, quantization_drop_points=None)

    assert select([row("one", correct=89, n=100)], few).held
    assert not select([row("two", correct=88, n=100)], few).held


def test_if_none_holds_the_nearest_goes_on_and_is_refused_only_where_chance_cannot_explain_it() -> (
    None
):
    near = [row("far", correct=850), row("near", correct=885)]
    far = [row("far", correct=700), row("less far", correct=800)]

    by_chance, shown = select(near, LIMITS), select(far, LIMITS)

    assert (by_chance.index, by_chance.held, by_chance.refused) == (1, False, False)
    assert (shown.index, shown.held, shown.refused) == (1, False, True)
    assert "none of 2 holds the budget" in shown.why


def test_a_single_candidate_needs_no_times() -> None:
    only = row("only") | {"p50_ms": None, "raw_ns": None}

    assert select([only], LIMITS).index == 0
