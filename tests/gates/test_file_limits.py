"""Limits on the file itself and against the last release; waivers."""

from __future__ import annotations

import datetime
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
from edgestill.pipeline.errors import RecipeError
from edgestill.pipeline.gate import judge
from edgestill.pipeline.gates.samples import Samples
from edgestill.pipeline.policy import GateSpec
from edgestill.pipeline.report import AgreementRecord, FileRecord


def only(evidence: Any, **limits: Any) -> Any:
    policy = GateSpec.model_validate({"max_drop_points": None, **limits})
    [check] = [one for one in judge(evidence, policy).checks if one.name != "parity"]
    return check


@pytest.mark.parametrize(
    ("limits", "expected"),
    [
        ({"max_bytes": 1000}, "pass"),
        ({"max_bytes": 999}, "fail"),
        ({"max_multiply_adds": 1_000_000}, "pass"),
        ({"max_multiply_adds": 999_999}, "fail"),
        ({"max_opset": 18}, "pass"),
        ({"max_opset": 17}, "fail"),
        ({"allowed_ops": ["Conv", "Relu", "Add"]}, "pass"),
        ({"allowed_ops": ["ai.onnx:Conv", "Relu"]}, "pass"),
        ({"allowed_ops": ["Conv", "com.microsoft:Relu"]}, "fail"),
        ({"min_int8_share": 0.95}, "pass"),
    ],
)
def test_what_is_counted_passes_up_to_its_limit(
    case: SimpleNamespace, limits: dict[str, Any], expected: str
) -> None:
    assert only(case.evidence(), **limits).outcome == expected


@pytest.mark.parametrize(
    ("share", "expected"), [(0.95, "pass"), (0.85, "fail"), (float("nan"), "invalid")]
)
def test_a_floor_of_int8_is_held(case: SimpleNamespace, share: float, expected: str) -> None:
    found = case.evidence(candidates=(case.candidate(share),))

    assert only(found, min_int8_share=0.9).outcome == expected


@pytest.mark.parametrize(
    "limits", [{"max_bytes": 10**9}, {"max_opset": 99}, {"allowed_ops": ["Conv"]},
               {"max_multiply_adds": 10**12}, {"min_cpu_agreement": 0.5},
               {"baseline": {"max_drop_points": 50}}],
)  # fmt: skip
def test_what_was_not_recorded_is_invalid(case: SimpleNamespace, limits: dict[str, Any]) -> None:
    assert only(case.evidence(file=None, models=()), **limits).outcome == "invalid"


@pytest.mark.parametrize(
    ("same", "expected"), [((999, 995), "pass"), ((999, 985), "inconclusive"), ((999, 960), "fail")]
)
def test_the_cpu_that_agrees_least_decides(
    case: SimpleNamespace, same: tuple[int, int], expected: str
) -> None:
    rows = tuple(
        AgreementRecord(cpu=f"cpu{number}", n=1000, same_class=count)
        for number, count in enumerate(same)
    )

    check = only(case.evidence(agreements=rows), min_cpu_agreement=0.98)

    assert check.outcome == expected
    assert "cpu1" in check.text


# --- against the last release ---------------------------------------------------------------------


def against(
    case: SimpleNamespace, lost: int, gained: int, limits: dict[str, Any], **old: Any
) -> Any:
    """The check of one limit on a release that lost and gained against the last one."""
    last = case.evidence(0, 0, 2000, **old)
    labels, before, after = case.counted(lost, gained, 2000)
    last.samples.answers["int8"] = case.answers(labels, before)
    new = case.evidence(0, 0, 2000, baseline=last)
    new.samples.answers["int8"] = case.answers(labels, after)
    return only(new, baseline=limits)


@pytest.mark.parametrize(
    ("counts", "limits", "expected"),
    [
        ((5, 5), {"max_drop_points": 1}, "pass"),
        ((60, 5), {"max_drop_points": 1}, "fail"),
        ((60, 60), {"max_drop_points": 1}, "pass"),
        ((60, 60), {"max_negative_flips": 0.01}, "fail"),
    ],
)
def test_a_release_is_compared_with_the_last_sample_by_sample(
    case: SimpleNamespace, counts: tuple[int, int], limits: dict[str, Any], expected: str
) -> None:
    assert against(case, *counts, limits).outcome == expected


def test_samples_are_paired_by_id_whatever_their_order(case: SimpleNamespace) -> None:
    last = case.evidence(30, 0, 2000)
    order = list(range(2000))[::-1]
    turned = Samples(
        last.samples.ids[order], last.samples.labels[order], last.samples.class_names,
        {role: type(one)(*(getattr(one, f)[order] for f in vars(one)))
         for role, one in last.samples.answers.items()},
    )  # fmt: skip
    new = case.evidence(30, 0, 2000, baseline=replace(last, samples=turned))

    assert only(new, baseline={"max_negative_flips": 0.01}).value == 0.0


@pytest.mark.parametrize("shift", [1000, 5000])
def test_other_test_sets_are_never_a_pass(case: SimpleNamespace, shift: int) -> None:
    last = case.evidence(0, 0, 2000)
    last.samples.ids[:] = [f"{number + shift:08x}" for number in range(2000)]

    check = only(case.evidence(0, 0, 3000, baseline=last), baseline={"max_drop_points": 50})

    assert check.outcome == "invalid"
    shared = max(0, 3000 - shift)
    assert f"n = 3000 here, 2000 in the baseline, {min(shared, 2000)} samples in both" in check.text


def test_other_labels_are_never_a_pass(case: SimpleNamespace) -> None:
    last = case.evidence(0, 0, 2000)
    last.samples.labels[:3] += 1

    check = only(case.evidence(0, 0, 2000, baseline=last), baseline={"max_drop_points": 50})

    assert check.outcome == "invalid"
    assert "labels differ on 3" in check.text


@pytest.mark.parametrize(
    ("limits", "expected"),
    [
        ({"max_bytes_growth": 0.25}, "pass"),
        ({"max_bytes_growth": 0.2}, "fail"),
        ({"max_int8_share_loss": 0.0}, "pass"),
        ({"new_ops": False}, "fail"),
    ],
)
def test_a_file_is_compared_with_the_last(
    case: SimpleNamespace, limits: dict[str, Any], expected: str
) -> None:
    old = FileRecord(bytes=800, opset=18, ops={"ai.onnx:Conv": 9})

    assert against(case, 0, 0, limits, file=old).outcome == expected


def test_a_loss_of_int8_is_held(case: SimpleNamespace) -> None:
    last = case.evidence()
    new = case.evidence(baseline=last, candidates=(case.candidate(0.8),))

    assert only(new, baseline={"max_int8_share_loss": 0.25}).outcome == "pass"
    assert only(new, baseline={"max_int8_share_loss": 0.1}).outcome == "fail"


def test_the_verdict_says_that_latencies_are_not_compared(case: SimpleNamespace) -> None:
    last = case.evidence(model_sha256="old")

    verdict = judge(case.evidence(baseline=last), GateSpec())

    assert verdict.baseline_model_sha256 == "old"
    assert any("latencies of this run and of the baseline are not compared" in note
               for note in verdict.notes)  # fmt: skip


# --- waivers --------------------------------------------------------------------------------------


def waived(**changes: Any) -> dict[str, Any]:
    fields = {"check": "max_drop_points", "reason": "customer knows", "owner": "mia",
              "expires": "2026-06-01"}  # fmt: skip
    return {"waivers": [{**fields, **changes}]}


@pytest.mark.parametrize("counts", [(60, 0, 2000), (5, 2, 600)])
def test_a_waived_check_counts_as_a_pass_and_is_shown(
    case: SimpleNamespace, counts: tuple[int, int, int]
) -> None:
    policy = GateSpec.model_validate({"max_drop_points": 1, **waived()})

    verdict = judge(case.evidence(*counts), policy)

    check = verdict.checks[1]
    assert (verdict.outcome, verdict.exit_code) == ("pass", 0)
    assert check.outcome == "waived"
    assert check.waiver is not None
    assert check.waiver.outcome in ("fail", "inconclusive")
    assert all(word in verdict.notes[0] for word in ("customer knows", "mia", "2026-06-01"))


def test_a_waiver_reaches_its_own_check_alone(case: SimpleNamespace) -> None:
    policy = GateSpec.model_validate({"max_drop_points": 1, **waived()})

    assert judge(case.evidence(60, 0, 2000, parity=()), policy).outcome == "invalid"


def test_a_check_that_passes_needs_no_waiver(case: SimpleNamespace) -> None:
    policy = GateSpec.model_validate({"max_drop_points": 1, **waived()})

    assert judge(case.evidence(), policy).checks[1].outcome == "pass"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"expires": "2026-05-31"}, "expired on 2026-05-31"),
        ({"check": "max_drop_point"}, "did you mean `max_drop_points`"),
        ({"check": "min_speedup"}, "no check of this policy is called 'min_speedup'"),
        ({"check": "integrity"}, "integrity cannot be waived"),
    ],
)
def test_a_waiver_that_does_not_hold_is_an_error_never_a_pass(
    case: SimpleNamespace, changes: dict[str, Any], message: str
) -> None:
    policy = GateSpec.model_validate({"max_drop_points": 1, **waived(**changes)})

    with pytest.raises(RecipeError, match=message):
        judge(case.evidence(), policy)


def test_a_waiver_holds_to_the_end_of_its_last_day(case: SimpleNamespace) -> None:
    policy = GateSpec.model_validate({"max_drop_points": 1, **waived()})
    found = case.evidence(60, 0, 2000)
    tomorrow = replace(found, today=case.today + datetime.timedelta(days=1))

    assert judge(found, policy).exit_code == 0
    with pytest.raises(RecipeError):
        judge(tomorrow, policy)
