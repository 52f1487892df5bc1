"""Further metrics of the test set, each with a limit on what it may fall against the reference.

    top5             the label is among the five best: a share, judged as an accuracy is
    mean_per_class   accuracy of each class, mean over the classes that the test set has
    macro_f1         F1 of each class that is a label or an answer, mean over them
    FILE.py:function the user's own

All but the first are bounded by a bootstrap of the samples (`bootstrap.py`). Where few answers
differ, a bootstrap shows less than there may be, down to nothing at all; so the bound is never
nearer to the estimate than that of the accuracy (Tango's) is to the accuracy's drop.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import RecipeError
from ..measure.paired import drop_upper_bound
from ..policy import GateSpec, MetricSpec
from ..report import Check
from .bootstrap import Estimate, bca, upper_bound
from .common import by_upper_bound, finite, invalid, percent
from .drop import Pair, drop_check, pair_of, pair_of_roles
from .evidence import Evidence
from .samples import Answers, Samples

Array = NDArray[Any]

TOP = 5
OWN_RESAMPLES = 2_000  # of a user's function, whose every call is Python
OWN_GROUPS = 100  # of samples left out together: a jackknife of 10,000 calls says little more


def checks(evidence: Evidence, policy: GateSpec) -> list[Check]:
    return [_check(evidence, spec, policy.confidence) for spec in policy.metrics]


def metric_file(spec: MetricSpec) -> Path | None:
    """The user's file, None of a metric that is built in."""
    return Path(spec.metric.rpartition(":")[0]) if ".py:" in spec.metric else None


def open_metric(reference: str) -> tuple[Callable[..., Any], Any]:
    """The user's function of FILE.py:function, and the world it must be called in.

    Raises:
        RecipeError: no such file. ModelError: no such function in it, or an error in the file.
    """
    from ...models.user_code import open_factory

    file, _, name = reference.rpartition(":")
    if not Path(file).is_file():
        raise RecipeError(
            f"metrics: {file}: no such file; expected FILE.py:function, the file beside the policy"
        )
    return open_factory(Path(file), name)


def _check(evidence: Evidence, spec: MetricSpec, confidence: float) -> Check:
    report, samples = evidence.report, evidence.samples
    name = f"metrics.{title(spec)}"
    pair = pair_of_roles(evidence, report.reference, report.deployed)
    if pair is None:
        text = f"{report.reference} and {report.deployed} are not two models of samples.parquet"
        return invalid(name, text, limit=spec.max_drop_points, unit="points")
    if spec.metric == "top5":
        return _top5(name, samples, pair, spec.max_drop_points, confidence)
    found = metric_drop(
        spec.metric, samples, before=pair.before, after=pair.after, confidence=confidence
    )
    return Check(
        name=name,
        outcome=by_upper_bound(found.value, found.bound, spec.max_drop_points / 100),
        value=finite(100 * found.value),
        bound=finite(100 * found.bound),
        limit=spec.max_drop_points,
        unit="points",
        confidence=confidence,
        n=pair.n,
        p_value=pair.mid_p,
        text=f"{title(spec)} of {pair.after} is {100 * found.value:.2f} points below that of "
        f"{pair.before} on n = {pair.n}; {percent(confidence)} upper bound (bootstrap) "
        f"{100 * found.bound:.2f}, limit {spec.max_drop_points:g}",
    )


def title(spec: MetricSpec) -> str:
    """As checks are named: the user's own by file and function, without folders."""
    return Path(spec.metric).name


def metric_drop(
    metric: str, samples: Samples, *, before: str, after: str, confidence: float
) -> Estimate:
    """What `metric` falls by from one model to another, and its upper bound, as fractions.

    Args:
        metric: as a policy names it, but for top5.
        before, after: roles of the two models.

    Raises:
        RecipeError, ModelError: of a metric of the user's own.
    """
    first, second = samples.answers[before], samples.answers[after]
    if metric in BUILT_IN:
        found = _built_in(metric, samples, first, second, confidence)
    else:
        found = _own(metric, samples.labels, first, second, confidence)
    pair = pair_of(first.correct, second.correct, before=before, after=after)
    least = float(drop_upper_bound(pair.lost, pair.gained, n=pair.n, confidence=confidence))
    if math.isnan(found.bound):
        return found
    return Estimate(found.value, max(found.bound, found.value + least - pair.drop))


def _top5(name: str, samples: Samples, pair: Pair, limit: float, confidence: float) -> Check:
    if len(samples.class_names) <= TOP:
        text = f"top5 of {len(samples.class_names)} classes is always 1: remove the limit"
        return invalid(name, text, limit=limit, unit="points")
    near = [samples.answers[role].rank < TOP for role in (pair.before, pair.after)]
    top = pair_of(*near, before=pair.before, after=pair.after)
    return drop_check(name, top, limit, confidence=confidence)


def _built_in(
    name: str, samples: Samples, before: Answers, after: Answers, confidence: float
) -> Estimate:
    """Samples of the same label and answers are one kind: their number is all that counts."""
    answers = np.stack([samples.labels, before.prediction, after.prediction], axis=1)
    kinds, counts = np.unique(answers, axis=0, return_counts=True)
    tallies = _tallies(kinds, len(samples.class_names))

    def drop(sums: Array) -> Array:
        seen, right0, right1, said0, said1 = np.split(sums, 5, axis=1)
        return BUILT_IN[name](seen, right0, said0) - BUILT_IN[name](seen, right1, said1)

    return upper_bound(tallies, drop, counts=counts, confidence=confidence)


def _tallies(kinds: Array, classes: int) -> Any:
    """(M, 5 C) of each kind: label; right before, right after; answer before, answer after."""
    from scipy.sparse import csr_matrix

    label, first, second = kinds.T
    rows = np.arange(len(kinds))
    entries = [
        (rows, label),
        (rows[first == label], classes + label[first == label]),
        (rows[second == label], 2 * classes + label[second == label]),
        (rows, 3 * classes + first),
        (rows, 4 * classes + second),
    ]
    row = np.concatenate([one for one, _ in entries])
    column = np.concatenate([one for _, one in entries])
    return csr_matrix((np.ones(len(row)), (row, column)), shape=(len(kinds), 5 * classes))


def _mean_per_class(seen: Array, right: Array, _said: Array) -> Array:
    """(R,) of counts (R, C)."""
    return _mean_of_ratios(right, seen)


def _macro_f1(seen: Array, right: Array, said: Array) -> Array:
    return _mean_of_ratios(2 * right, seen + said)


def _mean_of_ratios(part: Array, whole: Array) -> Array:
    """Mean over the classes whose whole is not 0; NaN where there is none."""
    with np.errstate(divide="ignore", invalid="ignore"):
        ratios = np.where(whole > 0, part / whole, 0.0)
        mean: Array = ratios.sum(axis=1) / (whole > 0).sum(axis=1)
    return mean


BUILT_IN: dict[str, Callable[[Array, Array, Array], Array]] = {
    "mean_per_class": _mean_per_class,
    "macro_f1": _macro_f1,
}


def _own(
    reference: str, labels: Array, before: Answers, after: Answers, confidence: float
) -> Estimate:
    """A user's function, called on drawn samples: BCa with groups left out."""
    from ...models.user_code import blaming

    function, world = open_metric(reference)
    n = len(labels)
    generator = np.random.default_rng(0)
    groups = np.arange(n) * min(OWN_GROUPS, n) // n
    groups = generator.permutation(groups)  # the test set may be sorted by class

    def drop(rows: Array) -> float:
        return _number(function(labels[rows], before.prediction[rows]), reference) - _number(
            function(labels[rows], after.prediction[rows]), reference
        )

    with blaming(world, f"metric {reference}"), world.entered():
        value = drop(np.arange(n))
        draws = np.array([drop(generator.integers(0, n, n)) for _ in range(OWN_RESAMPLES)])
        without = np.array([drop(np.flatnonzero(groups != one)) for one in range(groups.max() + 1)])
    return bca(value, draws, without, confidence=confidence)


def _number(value: Any, reference: str) -> float:
    """One call's result as a float; NaN is let through and makes the check invalid."""
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = math.inf
    if not (math.isnan(number) or -1 <= number <= 1):
        raise RecipeError(
            f"metric {reference}: expected a fraction between -1 and 1 (a drop is counted in "
            f"points, hundredths of it), got {value!r}"
        )
    return number
