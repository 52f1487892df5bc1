"""The verdict as Markdown, JUnit, GitHub annotations and words: whole, safe, and never too long."""

from __future__ import annotations

import datetime
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from edgestill.pipeline.errors import UsageError
from edgestill.pipeline.release import read_release
from edgestill.pipeline.report import Check, PartRecord, Verdict, WaiverRecord
from edgestill.pipeline.verdict import explain, github, junit, summary
from edgestill.pipeline.verdict.judgement import Bound, Judgement, Refusal, to_document
from lxml import etree

SCHEMA = etree.XMLSchema(etree.parse(Path(__file__).with_name("junit.xsd")))
NASTY = 'a|b <script>\n::error::x %0A `c` & "d" \x00\x1b]8;;\x07 \ud7ff ] ]]> ::notice::,:'
WAIVER = WaiverRecord(
    outcome="fail", reason="old phones", owner="ann", expires=datetime.date(2030, 1, 1)
)


def check(name: str, outcome: str = "pass", **changes: Any) -> Check:
    fields = {"value": 0.1, "bound": 0.5, "limit": 1.0, "unit": "points", "confidence": 0.95,
              "n": 1000, "text": f"{name} is so"}  # fmt: skip
    return Check(name=name, outcome=outcome, **{**fields, **changes})


@pytest.fixture(scope="module")
def bound(releases: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Bound:
    release = read_release(releases.make_release(tmp_path_factory.mktemp("views") / "out"))
    return Bound(str(release.folder), release.report, release.manifest.sha256, ("its sha256",))


@pytest.fixture(scope="module")
def judged(bound: Bound) -> Any:
    """`judged(*checks, exit_code=…)`: a judgement with these checks."""

    def make(*checks: Check, exit_code: int = 1, release: Bound = bound, **more: Any) -> Judgement:
        outcome = {0: "pass", 1: "fail", 3: "inconclusive", 4: "invalid"}[exit_code]
        verdict = Verdict(
            outcome=outcome, exit_code=exit_code, checks=checks, confidence=0.95,
            tool_version="0.1.0", model_sha256="1" * 64, data_sha256="2" * 64,
            recipe_sha256="3" * 64, policy_sha256="4" * 64, notes=more.pop("notes", ()),
        )  # fmt: skip
        return Judgement(verdict, release, more.pop("baseline", None), "release.yaml")

    return make


ALL = (
    check("max_drop_points", "fail", value=1.2, bound=1.8),
    check("min_speedup", "inconclusive", unit="×", value=2.1, bound=1.9, limit=2.0),
    check("parity", "invalid", value=None, bound=None, limit=None, n=None),
    check("max_bytes", "waived", waiver=WAIVER),
    check("max_p90_ms", "skipped", value=None, bound=None),
    check("min_int8_share"),
)


def suite(content: bytes) -> Any:
    document = etree.fromstring(content)
    assert SCHEMA.validate(document), SCHEMA.error_log
    return document[0]


def test_junit_follows_the_schema_and_has_a_case_for_each_check(judged: Any) -> None:
    found = suite(junit.to_junit(judged(*ALL)))

    cases = {case.get("name"): [part.tag for part in case] for case in found.iter("testcase")}
    assert cases == {
        "max_drop_points": ["failure"],
        "min_speedup": ["failure"],
        "parity": ["error"],
        "max_bytes": ["skipped"],
        "max_p90_ms": ["skipped"],
        "min_int8_share": [],
    }
    counts = [found.get(name) for name in ("tests", "failures", "errors", "skipped")]
    assert counts == ["6", "2", "1", "2"]


def test_the_junit_schema_refuses_what_it_should() -> None:
    bad = b'<testsuites name="x" tests="1" failures="0" errors="0"><testsuite/></testsuites>'

    assert not SCHEMA.validate(etree.fromstring(bad))


def test_an_inconclusive_check_that_the_policy_lets_through_is_skipped_in_junit(
    judged: Any,
) -> None:
    found = suite(junit.to_junit(judged(check("x", "inconclusive"), exit_code=0)))

    assert [part.tag for part in next(found.iter("testcase"))] == ["skipped"]


def test_a_refusal_is_an_error_in_junit() -> None:
    found = suite(junit.refused_junit(Refusal("out", NASTY, 6)))

    assert found.get("errors") == "1"
    assert next(found.iter("error")).get("type") == "exit 6"


def test_junit_holds_any_name_and_text(judged: Any) -> None:
    found = suite(junit.to_junit(judged(check(NASTY, "fail", text=NASTY))))

    assert "<script>" in next(found.iter("failure")).get("message")


def test_the_summary_shows_the_verdict_first_and_what_it_is_bound_to(
    judged: Any, bound: Bound
) -> None:
    text = summary.to_summary(judged(*ALL, notes=("look here",)))

    assert text.startswith("## edgestill gate: FAIL (exit 1): 1 fail, 1 invalid, 1 inconclusive")
    assert "| `max_drop_points` | **FAIL** | 1.2 | 1.8 | 1 points | 1,000 |" in text
    assert "- **FAIL** `max_drop_points`: max_drop_points is so" in text
    assert "a limit of 1.8 or more" in text
    assert "| `max_bytes` | fail | old phones | ann | 2030-01-01 |" in text
    assert "- look here" in text
    assert all(digit * 64 in text for digit in "1234")
    assert f"`{bound.manifest_sha256}` (checked by its sha256)" in text


def test_the_summary_says_where_the_manifest_was_taken_at_its_word(
    judged: Any, bound: Bound
) -> None:
    unbound = Bound(bound.folder, bound.report, bound.manifest_sha256)

    assert "taken at its word" in summary.to_summary(judged(*ALL, release=unbound))
    assert "taken at its word" not in summary.to_summary(judged(*ALL))


def test_the_summary_compares_with_the_last_release_but_not_its_latency(
    judged: Any, bound: Bound
) -> None:
    text = summary.to_summary(judged(*ALL, baseline=bound))

    assert "| accuracy | 89.90 % of 1000 | 89.90 % of 1000 |" in text
    assert "p50" not in text


def test_no_name_breaks_the_table_or_brings_a_tag(judged: Any) -> None:
    text = summary.to_summary(judged(check(NASTY, "fail", text=NASTY), check("b")))

    row = next(line for line in text.splitlines() if "script" in line)
    assert row.replace("\\|", "").count("|") == 7
    assert "<script" not in text
    assert not [line for line in text.splitlines() if line.lstrip().startswith("::")]


@pytest.mark.parametrize("limit", [900 * 1024, 20_000, 6_000, 10, 0])
def test_the_summary_fits_whatever_there_is_to_say(limit: int, judged: Any) -> None:
    checks = [check(f"slices.column=ü{i}", "fail", text="ü" * 3000) for i in range(3000)]

    text = summary.to_summary(judged(*checks, notes=["ü" * 9000] * 500), at_most=limit)

    assert len(text.encode()) <= limit
    if limit >= 6_000:
        assert "more lines are left out" in text
        assert "manifest" in text


def test_a_long_list_keeps_the_worst(judged: Any) -> None:
    checks = [*(check(f"fine{i}") for i in range(5000)), check("bad", "fail")]

    text = summary.to_summary(judged(*checks), at_most=20_000)

    first = next(line for line in text.splitlines() if line.startswith("| `"))
    assert first.startswith("| `bad` | **FAIL**")


def test_there_are_ten_annotations_at_most_and_the_worst_come_first(judged: Any) -> None:
    checks = [check(f"w{i}", "waived", waiver=WAIVER) for i in range(8)]
    checks += [check(f"e{i}", "fail") for i in range(8)]

    lines = github.to_annotations(judged(*checks))

    assert len(lines) == 10
    assert [line.split()[0] for line in lines] == ["::error"] * 8 + ["::warning"] * 2
    assert "7 more" in lines[-1]


def test_passed_checks_are_not_annotated_but_an_unbound_gate_is(judged: Any, bound: Bound) -> None:
    unbound = Bound(bound.folder, bound.report, bound.manifest_sha256)

    assert github.to_annotations(judged(check("a"), exit_code=0)) == []
    (line,) = github.to_annotations(judged(check("a"), exit_code=0, release=unbound))
    assert line.startswith("::notice title=gate%3A not bound::")


def test_inconclusive_is_an_error_where_it_fails_the_gate_and_a_warning_where_not(
    judged: Any,
) -> None:
    lines = [
        github.to_annotations(judged(check("a", "inconclusive"), exit_code=code))[0]
        for code in (3, 0)
    ]

    assert [line.split()[0] for line in lines] == ["::error", "::warning"]


def test_an_annotation_is_one_line_that_the_runner_reads_back(judged: Any) -> None:
    (line,) = github.to_annotations(judged(check("a:b,c", "fail", text="50 %\r\n::error::x")))

    assert line == "::error title=fail%3A a%3Ab%2Cc::50 %25%0D%0A::error::x"


@pytest.mark.parametrize("name", [one.name for one in ALL])
def test_every_check_is_explained(name: str, judged: Any) -> None:
    text = explain.explain(judged(*ALL), name)

    assert text.startswith(f"{name}: ")
    assert f"{name} is so" in text
    assert "Rule: " in text


def test_a_failed_drop_is_told_with_what_would_change_it(judged: Any) -> None:
    # of 1000 samples, 3 lost and 2 gained
    one = check("max_drop_points", "inconclusive", value=0.1, bound=0.55861, limit=0.3,
                needed_n=7777)  # fmt: skip

    text = explain.explain(judged(one), "max_drop_points")

    assert "about 7,777 samples" in text
    assert "at most 1 lost instead of 3, with 2 gained" in text
    assert "a limit of 0.5587 or more" in text
    assert "95 % confidence" in text


def test_the_most_that_may_be_lost_is_the_edge_of_the_bound(judged: Any) -> None:
    from edgestill.pipeline.measure.paired import drop_upper_bound

    one = check("max_drop_points", value=0.1, bound=0.5586, limit=1.0)
    (line,) = [x for x in explain.explain(judged(one), one.name).splitlines() if "up to" in x]
    most = int(line.split("up to ")[1].split()[0])

    within, beyond = (
        float(drop_upper_bound(lost, 2, n=1000, confidence=0.95)) for lost in (most, most + 1)
    )
    assert within <= 0.01 < beyond


def test_parts_and_waivers_are_told(judged: Any) -> None:
    part = PartRecord(name="cat", n=40, drop_points=7.5, p_value=0.001)
    one = check("max_class_drop_points", "waived", parts=(part,), waiver=WAIVER)

    text = explain.explain(judged(one), one.name)

    assert "cat: n = 40, drop +7.50 points" in text
    assert "ann answers for it until 2030-01-01: old phones" in text


def test_an_unknown_check_is_answered_with_the_names_there_are(judged: Any) -> None:
    with pytest.raises(UsageError, match=r"did you mean max_bytes\?.*min_int8_share"):
        explain.explain(judged(*ALL), "max_byte")


@pytest.mark.parametrize("name", ["max_drop_points", "slices.country=de.at", "metrics.macro_f1",
                                  "metrics.m.py:f", "devices.pi5.min_speedup",
                                  "baseline.max_drop_points", "baseline.new_ops"])  # fmt: skip
def test_names_of_groups_find_their_rule(name: str) -> None:
    assert explain.rule_of(name)


def test_every_limit_of_a_policy_has_a_rule() -> None:
    from edgestill.pipeline.policy import BaselineSpec, DeviceSpec, GateSpec

    how = {"confidence", "inconclusive", "waivers", "latency", "devices", "baseline"}
    names = set(GateSpec.model_fields) - how
    names |= {f"devices.x.{name}" for name in DeviceSpec.model_fields}
    names |= {f"baseline.{name}" for name in BaselineSpec.model_fields}

    assert [name for name in sorted(names) if not explain.rule_of(name)] == []


def test_the_document_has_every_field_of_the_verdict(judged: Any) -> None:
    judgement = judged(*ALL)

    assert judgement.verdict.model_dump(mode="json").items() <= to_document(judgement).items()


@pytest.mark.parametrize("name", ["baseline.new_ops", "allowed_ops"])
def test_of_operators_no_other_number_is_proposed(name: str, judged: Any) -> None:
    text = explain.explain(judged(check(name, "fail", value=2.0, limit=0.0)), name)

    assert "a file without these operators" in text
    assert "a limit of" not in text
