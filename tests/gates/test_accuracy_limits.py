"""Limits on what the deployed file gets wrong: by count, by class, by part, by confidence."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from edgestill.pipeline.errors import ModelError, RecipeError
from edgestill.pipeline.gate import check_policy, judge
from edgestill.pipeline.gates.bootstrap import (
    LEAST_RESAMPLES,
    RESAMPLES,
    bca,
    resamples,
    upper_bound,
)
from edgestill.pipeline.gates.calibration import calibration_error
from edgestill.pipeline.gates.classes import holm
from edgestill.pipeline.gates.evidence import Evidence
from edgestill.pipeline.policy import GateSpec


def only(evidence: Evidence, **limits: Any) -> Any:
    """The one check of a policy with one limit."""
    policy = GateSpec.model_validate({"max_drop_points": None, **limits})
    [check] = [one for one in judge(evidence, policy).checks if one.name != "parity"]
    return check


@pytest.mark.parametrize(
    ("counts", "expected"),
    [
        ((2, 2, 2000), "pass"),  # bound 0.24 points
        ((60, 10, 2000), "fail"),  # drop 2.5
        ((12, 2, 2000), "pass"),  # drop 0.5, bound 0.84
        ((15, 2, 1000), "fail"),  # drop 1.3
        ((5, 2, 600), "inconclusive"),  # drop 0.5, bound above 1
    ],
)
def test_a_drop_is_judged_by_its_bound_and_itself(
    case: SimpleNamespace, counts: tuple[int, int, int], expected: str
) -> None:
    check = only(case.evidence(*counts), max_drop_points=1.0)

    assert check.outcome == expected
    assert check.n == counts[2]
    assert "McNemar's mid-p" in check.text


def test_inconclusive_names_an_n_that_would_decide(case: SimpleNamespace) -> None:
    check = only(case.evidence(5, 2, 600), max_drop_points=1.0)

    assert check.needed_n > 600
    assert str(check.needed_n) in check.text
    scale = check.needed_n / 600
    grown = case.evidence(round(5 * scale), round(2 * scale), check.needed_n)
    assert only(grown, max_drop_points=1.0).outcome == "pass"


def test_a_limit_that_this_n_cannot_prove_is_said_to_be_so(case: SimpleNamespace) -> None:
    check = only(case.evidence(0, 0, 100), max_drop_points=1.0)

    assert check.outcome == "inconclusive"
    assert "n = 100 proves at best 2.63 points" in check.text


@pytest.mark.parametrize(
    "limits", [{"max_drop_points": 0}, {"max_negative_flips": 0}, {"max_error_growth": 0}]
)
def test_a_limit_that_no_n_can_prove_is_said_to_be_so(
    case: SimpleNamespace, limits: dict[str, Any]
) -> None:
    check = only(case.evidence(0, 0, 5000, wrong=100), **limits)

    assert check.outcome == "inconclusive"
    assert check.needed_n is None
    assert "no number of samples proves that nothing at all is lost" in check.text


def test_quantization_drop_is_judged_against_the_float_student(case: SimpleNamespace) -> None:
    found = case.evidence(400, 0, 5000, student=(400, 0))

    assert only(found, max_quantization_drop_points=0.5).outcome == "fail"
    assert only(case.evidence(400, 0, 5000), max_quantization_drop_points=0.5).outcome == "pass"


def test_of_a_given_file_the_float_file_is_what_int8_must_not_fall_behind(
    case: SimpleNamespace,
) -> None:
    found = case.evidence(400, 0, 5000, reference="float")
    found.samples.answers["float"] = found.samples.answers["teacher"]

    assert only(found, max_quantization_drop_points=0.5).outcome == "fail"


@pytest.mark.parametrize(
    ("limits", "counts", "expected"),
    [
        ({"min_retention": 0.99}, (5, 5, 5000), "pass"),
        ({"min_retention": 0.99}, (27, 5, 3000), "inconclusive"),  # 99.1 %, bound 98.7 %
        ({"min_retention": 0.99}, (100, 5, 5000), "fail"),
        ({"max_error_growth": 0.1}, (5, 5, 5000), "pass"),
        ({"max_error_growth": 0.1}, (60, 10, 5000), "inconclusive"),
        ({"max_error_growth": 0.1}, (160, 40, 5000), "fail"),
        ({"max_negative_flips": 0.01}, (30, 0, 5000), "pass"),
        ({"max_negative_flips": 0.01}, (45, 45, 5000), "inconclusive"),
        ({"max_negative_flips": 0.01}, (60, 60, 5000), "fail"),  # though accuracy is the same
    ],
)
def test_ratios_and_flips_are_judged_by_their_bound_and_themselves(
    case: SimpleNamespace, limits: dict[str, Any], counts: tuple[int, int, int], expected: str
) -> None:
    check = only(case.evidence(*counts, wrong=500), **limits)

    assert check.outcome == expected
    assert (check.needed_n is not None) == (expected == "inconclusive")


def test_a_ratio_s_needed_n_would_decide(case: SimpleNamespace) -> None:
    for limits in (
        {"min_retention": 0.99},
        {"max_error_growth": 0.09},
        {"max_negative_flips": 0.025},
    ):
        check = only(case.evidence(20, 15, 1000, wrong=150), **limits)
        scale = check.needed_n / 1000
        counts = (round(20 * scale), round(15 * scale), check.needed_n)
        grown = case.evidence(*counts, wrong=round(150 * scale))

        assert check.outcome == "inconclusive", limits
        assert only(grown, **limits).outcome == "pass", limits


def test_the_errors_of_a_reference_that_makes_none_cannot_grow_by_a_share(
    case: SimpleNamespace,
) -> None:
    assert only(case.evidence(0, 0, 5000), max_error_growth=0.5).outcome == "inconclusive"
    assert only(case.evidence(1, 0, 5000), max_error_growth=0.5).outcome == "fail"


def test_a_model_that_was_not_measured_is_invalid(case: SimpleNamespace) -> None:
    found = case.evidence(reference="dense")
    for limits in (
        {"max_drop_points": 1}, {"min_retention": 0.9}, {"max_class_drop_points": 1},
        {"max_ece_increase": 0.1}, {"metrics": [{"metric": "macro_f1", "max_drop_points": 1}]},
    ):  # fmt: skip
        assert only(found, **limits).outcome == "invalid", limits


def test_a_model_is_not_judged_against_itself(case: SimpleNamespace) -> None:
    assert only(case.evidence(reference="int8"), max_drop_points=1).outcome == "invalid"


# --- metrics --------------------------------------------------------------------------------------


def spread(case: SimpleNamespace, n: int = 600, classes: int = 4, seed: int = 0) -> Any:
    """A test set with unbalanced classes, and two models that err here and there."""
    rng = np.random.default_rng(seed)
    labels = rng.choice(classes, n, p=np.arange(1, classes + 1) / (classes * (classes + 1) / 2))
    wrong = rng.integers(0, classes, n)
    before = np.where(rng.random(n) < 0.85, labels, wrong)
    after = np.where(rng.random(n) < 0.93, before, wrong)
    models = {"teacher": case.answers(labels, before), "int8": case.answers(labels, after)}
    return Evidence(case.report(), case.samples(labels, models, classes=classes), None, case.today)


@pytest.mark.parametrize("metric", ["macro_f1", "mean_per_class"])
def test_a_built_in_metric_is_scikit_learn_s(case: SimpleNamespace, metric: str) -> None:
    from sklearn.metrics import balanced_accuracy_score, f1_score

    found = spread(case)
    labels, models = found.samples.labels, found.samples.answers
    formulas = {
        "macro_f1": lambda y, p: f1_score(y, p, average="macro"),
        "mean_per_class": balanced_accuracy_score,
    }
    values = [formulas[metric](labels, models[r].prediction) for r in ("teacher", "int8")]

    check = only(found, metrics=[{"metric": metric, "max_drop_points": 50}])

    assert check.value == pytest.approx(100 * (values[0] - values[1]))


def test_the_bootstrap_s_bound_is_scipy_s() -> None:
    from scipy.stats import bootstrap

    values = np.random.default_rng(0).exponential(size=80)  # skewed: acceleration counts
    theirs = bootstrap(
        (values,), np.mean, n_resamples=4000, method="BCa", confidence_level=0.90,
        rng=np.random.default_rng(1),
    ).confidence_interval.high  # fmt: skip

    ours = upper_bound(
        np.stack([values, np.ones(80)], axis=1),
        lambda sums: sums[:, 0] / sums[:, 1],
        counts=np.ones(80, np.int64),
        confidence=0.95,
    )

    assert ours.value == pytest.approx(values.mean())
    # 4000 draws place a 95 % quantile to about 3 % of the mean's deviation
    assert ours.bound == pytest.approx(theirs, abs=0.10 * values.std() / np.sqrt(80))


def test_samples_of_one_kind_are_drawn_as_each_of_them_would_be() -> None:
    rng = np.random.default_rng(0)
    kinds = np.array([[1.0, 1.0], [0.0, 1.0], [-1.0, 1.0]])
    counts = np.array([30, 400, 10])
    each = kinds[rng.permutation(np.repeat(np.arange(3), counts))]

    def mean(sums: Any) -> Any:
        return sums[:, 0] / sums[:, 1]

    together = upper_bound(kinds, mean, counts=counts, confidence=0.95)
    apart = upper_bound(each, mean, counts=np.ones(440, np.int64), confidence=0.95)

    assert together.value == pytest.approx(apart.value)
    assert together.bound == pytest.approx(apart.bound, abs=1 / 440)  # one sample


def test_a_metric_of_models_that_never_differ_is_not_proven_beyond_the_drop(
    case: SimpleNamespace,
) -> None:
    # every draw gives 0, and a bootstrap alone would prove anything from three samples
    metric = {"metric": "macro_f1", "max_drop_points": 1}

    assert only(case.evidence(0, 0, 100), metrics=[metric]).outcome == "inconclusive"
    assert only(case.evidence(0, 0, 1000), metrics=[metric]).outcome == "pass"


def test_top5_counts_ranks(case: SimpleNamespace) -> None:
    labels, before, after = case.counted(40, 0, 2000)
    ranks = {"teacher": 4, "int8": 5}
    models = {
        role: case.answers(labels, p, rank=np.where(p == labels, 0, ranks[role]))
        for role, p in (("teacher", before), ("int8", after))
    }
    found = Evidence(case.report(), case.samples(labels, models), None, case.today)
    near = {**models, "int8": case.answers(labels, after, rank=np.where(after == labels, 0, 4))}
    same = Evidence(case.report(), case.samples(labels, near), None, case.today)
    metrics = [{"metric": "top5", "max_drop_points": 1}]

    assert only(found, metrics=metrics).value == pytest.approx(2.0)
    assert only(same, metrics=metrics).value == 0.0


def test_top5_of_five_classes_says_nothing(case: SimpleNamespace) -> None:
    check = only(spread(case), metrics=[{"metric": "top5", "max_drop_points": 1}])

    assert check.outcome == "invalid"


def own_metric(tmp_path: Path, body: str) -> dict[str, Any]:
    (tmp_path / "mine.py").write_text(f"import numpy as np\ndef cost(labels, predictions):\n{body}")
    return {"metrics": [{"metric": f"{tmp_path / 'mine.py'}:cost", "max_drop_points": 2}]}


def test_a_metric_of_one_s_own_is_called_on_the_samples(
    case: SimpleNamespace, tmp_path: Path
) -> None:
    limits = own_metric(tmp_path, "    return (labels == predictions).mean()\n")
    found = case.evidence(10, 4, 1000)

    verdict = judge(found, GateSpec.model_validate({"max_drop_points": None, **limits}))

    check = verdict.checks[1]
    assert check.name == "metrics.mine.py:cost"
    assert check.outcome == "pass"
    assert check.value == pytest.approx(0.6)
    # the accuracy again: 0.6 + 1.645 · sqrt(14 / 1000²) points, and a bootstrap is near it
    assert check.bound == pytest.approx(1.2, abs=0.2)
    assert list(verdict.files_sha256) == ["mine.py"]


def test_a_metric_that_is_nan_is_invalid(case: SimpleNamespace, tmp_path: Path) -> None:
    limits = own_metric(tmp_path, "    return float('nan')\n")

    assert only(case.evidence(), **limits).outcome == "invalid"


@pytest.mark.parametrize(
    ("body", "message"),
    [("    return 87.3\n", "expected a fraction"), ("    return 'good'\n", "expected a fraction"),
     ("    return labels[0] / none\n", "mine.py:3 in cost: NameError")],
)  # fmt: skip
def test_a_metric_that_fails_is_named_with_what_it_gave(
    case: SimpleNamespace, tmp_path: Path, body: str, message: str
) -> None:
    with pytest.raises((RecipeError, ModelError), match=message):
        only(case.evidence(), **own_metric(tmp_path, body))


def test_files_that_a_policy_names_are_looked_for_before_anything_is_trained(
    case: SimpleNamespace, tmp_path: Path
) -> None:
    policy = GateSpec.model_validate(own_metric(tmp_path, "    return 1.0\n"))
    check_policy(policy, today=case.today)
    (tmp_path / "mine.py").unlink()

    with pytest.raises(RecipeError, match=r"mine\.py: no such file"):
        check_policy(policy, today=case.today)


def test_very_many_samples_are_drawn_less_often() -> None:
    assert resamples(10_000) == RESAMPLES
    assert resamples(10**6) == LEAST_RESAMPLES


def test_a_draw_without_a_value_has_no_bound() -> None:
    found = bca(0.1, np.array([0.1, np.nan]), np.array([0.1, 0.1]), confidence=0.95)

    assert np.isnan(found.bound)


# --- classes --------------------------------------------------------------------------------------


def by_class(case: SimpleNamespace, lost: dict[int, int], per_class: int = 100) -> Evidence:
    """Ten classes, of which some lose samples."""
    labels = np.repeat(np.arange(10), per_class)
    after = labels.copy()
    for label, count in lost.items():
        after[label * per_class : label * per_class + count] = (label + 1) % 10
    models = {"teacher": case.answers(labels, labels), "int8": case.answers(labels, after)}
    return Evidence(case.report(), case.samples(labels, models), None, case.today)


@pytest.mark.parametrize(
    ("lost", "expected"),
    [
        ({}, "pass"),
        ({3: 20}, "fail"),
        ({3: 4}, "pass"),  # significant or not: within 5 points
        ({3: 6}, "pass"),  # beyond them, p = 1/128, and of ten classes 10/128
        ({3: 8}, "fail"),  # 10/512
    ],
)
def test_a_class_fails_that_is_beyond_the_limit_and_significantly_so(
    case: SimpleNamespace, lost: dict[int, int], expected: str
) -> None:
    check = only(by_class(case, lost), max_class_drop_points=5)

    assert check.outcome == expected
    assert len(check.parts) == 10
    if lost:
        assert check.parts[0].name == "class3"
        assert "class3" in check.text


def test_small_classes_are_not_judged_and_counted(case: SimpleNamespace) -> None:
    labels = np.concatenate([np.zeros(200, int), np.ones(29, int)])
    after = np.zeros(229, int)  # the small class is lost as a whole
    models = {"teacher": case.answers(labels, labels), "int8": case.answers(labels, after)}
    found = Evidence(case.report(), case.samples(labels, models, classes=2), None, case.today)

    check = only(found, max_class_drop_points=5)

    assert check.outcome == "pass"
    assert "1 classes of fewer than 30 samples are not judged" in check.text


def test_where_no_class_has_enough_samples_nothing_is_passed(case: SimpleNamespace) -> None:
    assert only(by_class(case, {}, per_class=20), max_class_drop_points=5).outcome == "invalid"


def test_holm_s_correction_is_that_of_a_hand_worked_table() -> None:
    # sorted 0.01 0.02 0.04: times 3, 2, 1 and never below the one before
    assert holm([0.04, 0.01, 0.02]) == pytest.approx([0.04, 0.03, 0.04])
    assert holm([0.6, 0.9]) == [1.0, 1.0]


# --- calibration ----------------------------------------------------------------------------------


def test_the_calibration_error_is_that_of_hand_worked_bins() -> None:
    # 30 samples, two a bin: confidence 0.8 throughout, right in the first 15 samples' order
    probability = np.linspace(0.5, 0.79, 30)
    correct = np.arange(30) % 2 == 0  # one of two right in every bin: accuracy 0.5

    bins = probability.reshape(15, 2).mean(axis=1)
    assert calibration_error(probability, correct) == pytest.approx(np.abs(0.5 - bins).mean())


def test_samples_of_equal_probability_share_a_bin_in_any_order() -> None:
    rng = np.random.default_rng(0)
    probability = rng.choice([0.7, 0.9, 1.0], 300)
    correct = rng.random(300) < 0.8
    order = rng.permutation(300)

    assert calibration_error(probability, correct) == pytest.approx(
        calibration_error(probability[order], correct[order])
    )


def confident(case: SimpleNamespace, shift: float, n: int = 3000) -> Evidence:
    """A calibrated reference, and a candidate that is surer by `shift` of the same answers."""
    rng = np.random.default_rng(0)
    labels = np.zeros(n, int)
    sure = rng.uniform(0.6, 0.9, n)
    prediction = np.where(rng.random(n) < sure, 0, 1)
    models = {}
    for role, more in (("teacher", 0.0), ("int8", shift)):
        top = np.minimum(sure + more, 1.0)
        models[role] = case.answers(
            labels, prediction, top1_probability=top,
            p_label=np.where(prediction == labels, top, 1 - top),
        )  # fmt: skip
    return Evidence(case.report(), case.samples(labels, models, classes=2), None, case.today)


@pytest.mark.parametrize(("shift", "expected"), [(0.0, "pass"), (0.1, "fail")])
def test_a_model_that_is_too_sure_of_itself_fails(
    case: SimpleNamespace, shift: float, expected: str
) -> None:
    check = only(confident(case, shift), max_ece_increase=0.03)

    assert check.outcome == expected
    # the calibrated one has an error too, by chance: of 200 samples a bin, about 0.03
    assert check.value == pytest.approx(shift, abs=0.04)
    assert check.value <= check.bound


def test_likelihood_is_the_mean_of_the_logarithms(case: SimpleNamespace) -> None:
    found = confident(case, 0.05)
    logs = [-np.log(found.samples.answers[role].p_label) for role in ("teacher", "int8")]
    difference = logs[1] - logs[0]

    check = only(found, max_nll_increase=0.5)

    assert check.value == pytest.approx(difference.mean())
    # of a mean the bootstrap is near the normal bound
    normal = difference.mean() + 1.645 * difference.std() / np.sqrt(len(difference))
    assert check.bound == pytest.approx(normal, abs=0.003)


def test_a_label_that_is_impossible_to_the_model_has_a_finite_likelihood(
    case: SimpleNamespace,
) -> None:
    found = confident(case, 0.0)
    found.samples.answers["int8"].p_label[:5] = 0.0

    check = only(found, max_nll_increase=0.5)

    assert np.isfinite(check.value)


# --- slices ---------------------------------------------------------------------------------------


def parts(tmp_path: Path, rows: list[tuple[str, str]], name: str = "parts.csv") -> dict[str, Any]:
    text = "other,id,region\n" + "".join(f"x,{one},{value}\n" for one, value in rows)
    (tmp_path / name).write_text(text)
    return {"slices": [{"column": "region", "file": str(tmp_path / name), "max_drop_points": 2}]}


def test_every_value_of_a_column_is_judged_by_itself(case: SimpleNamespace, tmp_path: Path) -> None:
    found = case.evidence(100, 0, 4000)  # the first hundred samples are lost
    rows = [(f"{i:08x}", "north" if i < 1000 else "south") for i in reversed(range(4000))]
    policy = GateSpec.model_validate({"max_drop_points": 3, **parts(tmp_path, rows)})

    outcomes = {check.name: (check.outcome, check.n) for check in judge(found, policy).checks}

    assert outcomes["max_drop_points"] == ("pass", 4000)  # 2.5 points in all
    assert outcomes["slices.region=north"] == ("fail", 1000)  # all of them here
    assert outcomes["slices.region=south"] == ("pass", 3000)


def test_a_parquet_of_numbers_is_read_as_text(case: SimpleNamespace, tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    ids = [f"{i:08x}" for i in range(500)]
    pq.write_table(pa.table({"id": ids, "year": [2024] * 500}), tmp_path / "p.parquet")
    part = {"column": "year", "file": str(tmp_path / "p.parquet"), "max_drop_points": 5}

    assert only(case.evidence(n=500), slices=[part]).name == "slices.year=2024"


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([(f"{i:08x}", "a") for i in range(499)], "has no `region` for 1 of 500 test samples"),
        ([(f"{i:08x}", "a") for i in range(500)] + [("00000001", "b")], "00000001 is there twice"),
        ([(f"{i:08x}", "" if i == 7 else "a") for i in range(500)], "row 8 has an empty"),
        ([(f"{i:08x}", str(i)) for i in range(500)], "has 500 values"),
    ],
)
def test_samples_that_do_not_join_are_refused(
    case: SimpleNamespace, tmp_path: Path, rows: list[tuple[str, str]], message: str
) -> None:
    with pytest.raises(RecipeError, match=message):
        only(case.evidence(n=500), **parts(tmp_path, rows))


@pytest.mark.parametrize(
    ("name", "content"),
    [("none.csv", None), ("p.txt", "id,region\n"), ("p.csv", "id,zone\na,b\n"),
     ("p.parquet", "no parquet")],
)  # fmt: skip
def test_a_file_that_is_no_table_of_parts_is_refused(
    case: SimpleNamespace, tmp_path: Path, name: str, content: str | None
) -> None:
    if content is not None:
        (tmp_path / name).write_text(content)
    part = {"column": "region", "file": str(tmp_path / name), "max_drop_points": 5}

    with pytest.raises(RecipeError, match=r"expected a \.csv or \.parquet with the columns"):
        only(case.evidence(n=500), slices=[part])
