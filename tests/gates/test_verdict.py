"""judge: what the checks say together, what a verdict records, and what cannot be judged."""

from __future__ import annotations

import hashlib
import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from edgestill.pipeline.gate import judge, policy_sha256, unmeasured
from edgestill.pipeline.policy import GateSpec
from edgestill.pipeline.recipe_file import load_policy
from pydantic import ValidationError


def check(verdict: Any, name: str) -> Any:
    return next(one for one in verdict.checks if one.name == name)


@pytest.mark.parametrize(
    ("rungs", "counts", "code"),
    [
        ([False], (5, 2, 600), 1),  # fail over inconclusive
        ([], (0, 0, 600), 4),  # a ladder that was not climbed is invalid
        ([], (60, 0, 600), 1),  # fail over invalid
        ([], (5, 2, 600), 4),  # invalid over inconclusive
        ([True], (5, 2, 600), 3),
        ([True], (0, 0, 600), 0),
    ],
)
def test_exit_codes_follow_the_precedence(
    case: SimpleNamespace, rungs: list[bool], counts: tuple[int, int, int], code: int
) -> None:
    found = case.evidence(*counts, parity=tuple(case.rung(passed) for passed in rungs))

    assert judge(found, GateSpec(max_drop_points=1.0)).exit_code == code


@pytest.mark.parametrize(
    ("held", "refused", "expected"),
    [(True, False, "pass"), (False, False, "pass"), (False, True, "fail")],
)
def test_nothing_ships_that_validation_has_shown_to_be_beyond_the_budget(
    case: SimpleNamespace, held: bool, refused: bool, expected: str
) -> None:
    chosen = case.selection(held=held, refused=refused)

    verdict = judge(case.evidence(selection=chosen), GateSpec())

    assert verdict.outcome == expected
    assert ("budget" in [one.name for one in verdict.checks]) != held


def test_inconclusive_may_be_let_through_but_is_never_called_a_pass(case: SimpleNamespace) -> None:
    verdict = judge(case.evidence(5, 2, 600), GateSpec(inconclusive="warn"))

    assert (verdict.outcome, verdict.exit_code) == ("inconclusive", 0)
    assert verdict.notes[0].startswith("WARNING: INCONCLUSIVE")


def test_warn_lets_through_nothing_but_inconclusive(case: SimpleNamespace) -> None:
    policy = GateSpec(inconclusive="warn")

    assert judge(case.evidence(100, 0, 600), policy).exit_code == 1
    assert judge(case.evidence(5, 2, 600, parity=()), policy).exit_code == 4


def test_a_verdict_says_what_it_is_about(case: SimpleNamespace) -> None:
    recipe = {"seed": 0, "quantize": {}}
    policy = GateSpec(confidence=0.9)

    verdict = judge(case.evidence(recipe=recipe), policy)

    written = yaml.safe_dump(recipe, sort_keys=False, allow_unicode=True)
    assert verdict.recipe_sha256 == hashlib.sha256(written.encode()).hexdigest()
    assert (verdict.model_sha256, verdict.data_sha256) == ("m", "d")
    assert verdict.confidence == 0.9
    assert verdict.policy_sha256 == policy_sha256(policy)
    assert verdict.policy_sha256 != policy_sha256(GateSpec())


def test_a_policy_s_hash_is_of_what_its_files_hold_not_of_where_they_are(tmp_path: Any) -> None:
    hashes = []
    for name, text in [("a", "id,x\n0,1\n"), ("b", "id,x\n0,1\n"), ("c", "id,x\n0,2\n")]:
        (tmp_path / f"{name}.csv").write_text(text)
        part = {"column": "x", "file": str(tmp_path / f"{name}.csv"), "max_drop_points": 1}
        hashes.append(policy_sha256(GateSpec(slices=[part])))

    assert hashes[0] == hashes[1] != hashes[2]


def test_limits_on_what_was_not_measured_are_named(case: SimpleNamespace) -> None:
    policy = GateSpec(
        max_quantization_drop_points=0.5, min_int8_share=0.9, min_speedup=2.0, max_p90_ms=1.0,
        devices={"pi5": {"max_p90_ms": 20}}, min_cpu_agreement=0.99, baseline={"new_ops": False},
    )  # fmt: skip

    problems = unmeasured(case.evidence(recipe={}), policy)

    assert [problem.partition(":")[0] for problem in problems] == [
        "max_quantization_drop_points", "min_int8_share", "min_speedup", "max_p90_ms",
        "devices.pi5.max_p90_ms", "min_cpu_agreement", "baseline",
    ]  # fmt: skip


def test_a_device_that_was_measured_needs_no_other(case: SimpleNamespace) -> None:
    policy = GateSpec(devices={"pi5": {"max_p90_ms": 20}})
    found = case.evidence(**case.timed(device="pi5"))

    assert unmeasured(found, policy) == []
    assert check(judge(found, policy), "devices.pi5.max_p90_ms").outcome == "pass"


def test_every_limit_of_a_policy_has_its_check(case: SimpleNamespace, tmp_path: Any) -> None:
    (tmp_path / "parts.csv").write_text(
        "id,part\n" + "".join(f"{number:08x},{number % 2}\n" for number in range(5000))
    )
    part = {"column": "part", "file": str(tmp_path / "parts.csv"), "max_drop_points": 1}
    limits: dict[str, Any] = {
        "max_drop_points": 1, "max_quantization_drop_points": 1, "min_retention": 0.99,
        "max_error_growth": 0.1, "max_negative_flips": 0.01, "max_class_drop_points": 5,
        "metrics": [{"metric": "macro_f1", "max_drop_points": 1}], "max_nll_increase": 0.1,
        "max_ece_increase": 0.1, "slices": [part], "min_speedup": 1.5, "max_p90_ms": 2,
        "max_peak_rss_bytes": 10**9, "max_bytes": 10**6, "max_multiply_adds": 10**9,
        "max_opset": 18, "allowed_ops": ["Conv", "Relu"], "min_int8_share": 0.5,
        "min_cpu_agreement": 0.9, "devices": {"local": {"min_speedup": 1}},
        "baseline": {"max_drop_points": 1},
    }  # fmt: skip
    how = {"confidence", "inconclusive", "waivers", "latency"}
    assert set(limits) == set(GateSpec.model_fields) - how, "a limit that this test leaves out"
    found = case.evidence(wrong=50, baseline=case.evidence(), **case.timed())

    names = [one.name for one in judge(found, GateSpec.model_validate(limits)).checks]

    assert all(any(name.startswith(limit) for name in names) for limit in limits)


def test_a_ratio_takes_the_place_of_the_drop_that_is_built_in() -> None:
    assert GateSpec(min_retention=0.99).max_drop_points is None
    assert GateSpec(max_error_growth=0.1).max_drop_points is None
    assert GateSpec(min_retention=0.99, max_drop_points=2).max_drop_points == 2
    assert GateSpec(min_speedup=2).max_drop_points == 1.0
    again = GateSpec.model_validate(GateSpec(min_retention=0.99).model_dump(mode="json"))
    assert again == GateSpec(min_retention=0.99)


@pytest.mark.parametrize(
    ("policy", "message"),
    [
        ({"max_drop_points": None}, "judges nothing"),
        ({"max_drop_points": None, "confidence": 0.9, "latency": "not-here"}, "judges nothing"),
        ({"metrics": [{"metric": "f2", "max_drop_points": 1}]}, "no metric is called 'f2'"),
        ({"devices": {"pi5": {}}}, "no limit is set"),
        ({"baseline": {}}, "no limit is set"),
        ({"allowed_ops": []}, "at least 1 item"),
        ({"max_drop_points": float("nan")}, "max_drop_points"),
        ({"waivers": [{"check": "parity", "reason": "", "owner": "me", "expires": "2026-12-31"}]},
         "reason"),
        ({"waivers": [{"check": "parity", "reason": "x", "owner": "me", "expires": "soon"}]},
         "expires"),
        ({"metrics": [{"metric": "top5", "max_drop_points": 1}] * 2}, "named twice"),
    ],
)  # fmt: skip
def test_a_policy_that_makes_no_sense_is_refused(policy: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        GateSpec.model_validate(policy)


def test_paths_of_a_policy_start_at_its_own_folder(tmp_path: Any) -> None:
    (tmp_path / "release.yaml").write_text(
        "metrics: [{metric: mine.py:cost, max_drop_points: 1},\n"
        "          {metric: top5, max_drop_points: 1}]\n"
        "slices: [{column: region, file: parts.csv, max_drop_points: 1}]\n"
    )

    policy = load_policy(tmp_path / "release.yaml")

    assert policy.metrics[0].metric == str(tmp_path / "mine.py:cost")
    assert policy.metrics[1].metric == "top5"
    assert policy.slices[0].file == str(tmp_path / "parts.csv")


def test_an_unknown_limit_is_named_with_the_nearest_known_one(tmp_path: Any) -> None:
    from edgestill.pipeline.errors import RecipeError

    (tmp_path / "p.yaml").write_text(
        "max_drop_point: 1\nbaseline: {max_drop_pionts: 1}\nslices: [{colum: a}]\n"
    )

    with pytest.raises(RecipeError) as caught:
        load_policy(tmp_path / "p.yaml")

    said = str(caught.value)
    assert "p.yaml:1 max_drop_point: unknown key; did you mean `max_drop_points`?" in said
    assert "p.yaml:2 baseline.max_drop_pionts: unknown key; did you mean `max_drop_points`?" in said
    assert "did you mean `column`?" in said


def test_judging_needs_neither_torch_nor_onnx() -> None:
    code = (
        "import sys\n"
        "for name in ('torch', 'onnx', 'onnxruntime', 'transformers', 'scipy.stats'):\n"
        "    sys.modules[name] = None\n"
        "import numpy as np, datetime\n"
        "from edgestill.pipeline.gate import judge\n"
        "from edgestill.pipeline.policy import GateSpec\n"
        "from edgestill.pipeline.gates.evidence import Evidence\n"
        "from edgestill.pipeline.gates.samples import Answers, Samples\n"
        "from edgestill.pipeline.report import Report, SelectionRecord\n"
        "y = np.arange(400) % 4\n"
        "one = Answers(y, y * 0, np.full(400, .9), np.full(400, .9), np.full(400, .8))\n"
        "ids = np.array([str(i) for i in range(400)], dtype=object)\n"
        "samples = Samples(ids, y, tuple('abcd'), {'teacher': one, 'int8': one})\n"
        "report = Report(tool_version='', created_utc='', recipe={}, reference='teacher',\n"
        "    deployed='int8', model_sha256='', data_sha256='', environment={}, stages=(),\n"
        "    notes=(), candidates=(), models=(), pairs=(), parity=(), latency=(), speedup=None,\n"
        "    selection=SelectionRecord(index=0, held=True, refused=False, why=''))\n"
        "policy = GateSpec.model_validate({'min_retention': .9, 'max_error_growth': .5,\n"
        "    'max_negative_flips': .1, 'max_class_drop_points': 5, 'max_ece_increase': .1,\n"
        "    'max_nll_increase': 1, 'metrics': [{'metric': 'macro_f1', 'max_drop_points': 5}]})\n"
        "evidence = Evidence(report, samples, None, datetime.date(2026, 1, 1))\n"
        "print('JUDGED', len(judge(evidence, policy).checks))\n"
    )

    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True)

    assert "JUDGED 8" in done.stdout, done.stderr[-2000:]
