"""The measured choice: when it is made, what noise decides, that a resumed run repeats it."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from edgestill.pipeline.stage import Context, Silent
from edgestill.pipeline.train.precision import Precision, measured_precision
from edgestill.pipeline.train.trial import fastest

CALLS = 10**6  # so many that a trial pays whatever a call takes


def context_in(folder: Path, *, device: str = "cpu") -> Context:
    return Context(seed=0, threads=1, device=device, scratch=folder, events=Silent())


def lasting(seconds: float) -> Callable[[], None]:
    return lambda: time.sleep(seconds)


def unexpected() -> None:
    raise AssertionError("expected no trial")


def test_a_clearly_faster_candidate_is_chosen(tmp_path: Path) -> None:
    candidates = {"slow": lasting(0.02), "fast": lasting(0.002)}

    chosen, seconds = fastest("step", candidates, calls=CALLS, context=context_in(tmp_path))

    assert chosen == "fast"
    assert seconds is not None
    assert seconds["slow"] > seconds["fast"]


def test_within_noise_the_first_in_table_order_is_taken(tmp_path: Path) -> None:
    candidates = {"first": lasting(0.0204), "second": lasting(0.02)}

    chosen, _ = fastest("step", candidates, calls=CALLS, context=context_in(tmp_path))

    assert chosen == "first"


def test_a_short_run_takes_the_first_unmeasured(tmp_path: Path) -> None:
    candidates = {"first": lasting(0.0), "second": unexpected}

    assert fastest("step", candidates, calls=1, context=context_in(tmp_path)) == ("first", None)


def test_a_resumed_stage_repeats_the_choice_whatever_it_would_measure_now(tmp_path: Path) -> None:
    before = fastest(
        "step",
        {"slow": lasting(0.02), "fast": lasting(0.0)},
        calls=CALLS,
        context=context_in(tmp_path),
    )

    after = fastest(
        "step",
        {"slow": unexpected, "fast": unexpected},
        calls=CALLS,
        context=context_in(tmp_path),
    )

    assert after == before


def test_two_choices_of_a_stage_are_kept_apart(tmp_path: Path) -> None:
    fastest("one", {"a": lasting(0.0)}, calls=1, context=context_in(tmp_path))
    fastest("two", {"b": lasting(0.0)}, calls=1, context=context_in(tmp_path))

    stored = {p.name: json.loads(p.read_text())["chosen"] for p in tmp_path.rglob("*.json")}

    assert stored == {"choice-one.json": "a", "choice-two.json": "b"}


def test_bf16_that_is_slower_for_this_network_is_not_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "edgestill.pipeline.train.precision.choose_precision",
        lambda wish, device: Precision("bf16", "a unit"),
    )

    def work(precision: Precision) -> None:
        time.sleep(0.01 if precision.name == "bf16" else 0.001)

    chosen = measured_precision(
        "auto", work, name="step", calls=CALLS, context=context_in(tmp_path)
    )

    assert chosen.name == "fp32"
    assert "measured on this network" in chosen.reason


@pytest.mark.parametrize(("wish", "device"), [("bf16", "cpu"), ("fp32", "cpu"), ("auto", "cuda")])
def test_nothing_is_measured_where_nothing_is_open(
    wish: str, device: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "edgestill.pipeline.train.precision.choose_precision",
        lambda wish, device: Precision("bf16" if wish == "auto" else wish, "given"),
    )

    chosen = measured_precision(
        wish,  # type: ignore[arg-type]
        lambda _: unexpected(),
        name="step",
        calls=CALLS,
        context=context_in(tmp_path, device=device),
    )

    assert chosen.reason == "given"
