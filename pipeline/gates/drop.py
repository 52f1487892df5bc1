"""What the deployed file gets wrong, against the reference, sample by sample.

    max_drop_points                 accuracy lost, in points: (lost - gained)/n
    max_quantization_drop_points    … against the float model
    min_retention                   accuracy / the reference's
    max_error_growth                error rate / the reference's, less 1
    max_negative_flips              right in the reference, wrong here: lost/n

Each passes when its one-sided bound (`measure/paired.py`) is within the limit, fails when the
estimate itself is beyond it, and is inconclusive in between.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..measure.paired import (
    drop_score,
    drop_upper_bound,
    mcnemar_mid_p,
    needed_for_share,
    needed_samples,
    provable_drop,
    ratio_lower_bound,
    ratio_score,
    ratio_upper_bound,
    share_upper_bound,
)
from ..policy import GateSpec
from ..report import Check
from .common import by_lower_bound, by_upper_bound, finite, float_role, invalid, percent
from .evidence import Evidence

Array = NDArray[Any]


@dataclass(frozen=True)
class Pair:
    """Two models on the same n samples. `before` and `after` are what messages call them."""

    before: str
    after: str
    n: int
    lost: int
    gained: int
    both: int  # right in both

    @property
    def drop(self) -> float:
        return (self.lost - self.gained) / self.n

    @property
    def mid_p(self) -> float:
        return mcnemar_mid_p(self.lost, self.gained)


def pair_of(right_before: Array, right_after: Array, *, before: str, after: str) -> Pair:
    """Counts of two bool arrays (N,), N ≥ 1."""
    return Pair(
        before=before,
        after=after,
        n=len(right_before),
        lost=int((right_before & ~right_after).sum()),
        gained=int((~right_before & right_after).sum()),
        both=int((right_before & right_after).sum()),
    )


def checks(evidence: Evidence, policy: GateSpec) -> list[Check]:
    """Those of the limits above that the policy sets."""
    report, found = evidence.report, []
    against = {
        "max_drop_points": report.reference,
        "max_quantization_drop_points": float_role(report),
        "min_retention": report.reference,
        "max_error_growth": report.reference,
        "max_negative_flips": report.reference,
    }
    for name, reference in against.items():
        limit = getattr(policy, name)
        if limit is None:
            continue
        pair = pair_of_roles(evidence, reference, report.deployed)
        if pair is None:
            text = f"{reference} and {report.deployed} are not two models of samples.parquet"
            found.append(invalid(name, text, limit=limit, unit=UNITS[name]))
        else:
            found.append(JUDGES[name](name, pair, limit, confidence=policy.confidence))
    return found


def pair_of_roles(evidence: Evidence, reference: str, deployed: str) -> Pair | None:
    """None: one of them was not measured, or they are one model."""
    answers = evidence.samples.answers
    if reference == deployed or not {reference, deployed} <= set(answers):
        return None
    return pair_of(
        answers[reference].correct, answers[deployed].correct, before=reference, after=deployed
    )


def drop_check(name: str, pair: Pair, limit: float, *, confidence: float) -> Check:
    """limit: in points."""
    bound = float(drop_upper_bound(pair.lost, pair.gained, n=pair.n, confidence=confidence))
    outcome = by_upper_bound(pair.drop, bound, limit / 100)
    moved = "gains" if pair.drop < 0 else "loses"
    text = (
        f"{pair.after} {moved} {100 * abs(pair.drop):.2f} points against {pair.before} on n = "
        f"{pair.n} ({pair.lost} lost, {pair.gained} gained, McNemar's mid-p {pair.mid_p:.2g}); "
        f"{percent(confidence)} upper bound {100 * bound:.2f}, limit {limit:g}"
    )
    needed = None
    if outcome == "inconclusive":
        needed = needed_for_drop(pair, limit=limit / 100, confidence=confidence)
        text += _what_decides(needed, at_limit=pair.drop >= limit / 100, limit=limit)
        best = 100 * provable_drop(pair.n, flips=0.0, confidence=confidence)
        if best > limit > 0:
            text += (
                f"; n = {pair.n} proves at best {best:.2f} points, even of a model that answers as "
                f"{pair.before} does"
            )
    return Check(
        name=name,
        outcome=outcome,
        value=100 * pair.drop,
        bound=100 * bound,
        limit=limit,
        unit="points",
        confidence=confidence,
        n=pair.n,
        needed_n=needed,
        p_value=pair.mid_p,
        text=text,
    )


def needed_for_drop(pair: Pair, *, limit: float, confidence: float) -> int | None:
    """n that decides, more than the pair has; None: no n can. limit: a fraction."""
    counts = np.array(float(pair.lost)), np.array(float(pair.gained))
    needed = needed_samples(
        limit - pair.drop,
        variance=(pair.lost + pair.gained) / pair.n - pair.drop**2,
        score=float(drop_score(np.array(limit), *counts, n=pair.n)),
        n=pair.n,
        confidence=confidence,
    )
    return _more_than(pair.n, needed)


def _retention(name: str, pair: Pair, limit: float, *, confidence: float) -> Check:
    before, after = pair.lost + pair.both, pair.gained + pair.both
    if not before:
        return invalid(name, f"{pair.before} is right on no sample", limit=limit, unit=UNITS[name])
    value = after / before
    bound = float(
        ratio_lower_bound(pair.lost, pair.gained, pair.both, n=pair.n, confidence=confidence)
    )
    outcome = by_lower_bound(value, bound, limit)
    text = (
        f"{pair.after} keeps {100 * value:.2f} % of the accuracy of {pair.before} on n = {pair.n} "
        f"({after} right against {before}, McNemar's mid-p {pair.mid_p:.2g}); "
        f"{percent(confidence)} lower bound {100 * bound:.2f} %, limit {100 * limit:g} %"
    )
    needed = None
    if outcome == "inconclusive":
        needed = _needed_for_ratio(pair, theta=limit, both=pair.both, confidence=confidence)
        text += _what_decides(needed, at_limit=value <= limit, limit=limit)
    return _ratio_check(
        name, pair, bound, outcome=outcome, value=value, limit=limit, confidence=confidence,
        needed_n=needed, text=text,
    )  # fmt: skip


def _growth(name: str, pair: Pair, limit: float, *, confidence: float) -> Check:
    wrong = pair.n - pair.lost - pair.gained - pair.both  # in both
    before, after = wrong + pair.gained, wrong + pair.lost
    shares = f"{after} errors against {before} of {pair.before} on n = {pair.n}"
    if not before:
        # any error is infinite growth; none is none, but of an error rate that nobody has seen
        text = (
            f"{pair.after} makes {shares}, which makes none: growth has no measure; set "
            "max_drop_points instead"
        )
        return _ratio_check(
            name, pair, None, outcome="fail" if after else "inconclusive", value=None, limit=limit,
            confidence=confidence, text=text,
        )  # fmt: skip
    value = after / before - 1
    bound = float(ratio_upper_bound(pair.gained, pair.lost, wrong, n=pair.n, confidence=confidence))
    outcome = by_upper_bound(value, bound - 1, limit)
    text = (
        f"{pair.after} makes {shares}, {100 * value:+.1f} % (McNemar's mid-p {pair.mid_p:.2g}); "
        f"{percent(confidence)} upper bound {100 * (bound - 1):+.1f} %, limit {100 * limit:+g} %"
    )
    needed = None
    if outcome == "inconclusive":
        needed = _needed_for_ratio(pair, theta=1 + limit, both=wrong, confidence=confidence)
        text += _what_decides(needed, at_limit=value >= limit, limit=limit)
    return _ratio_check(
        name, pair, bound - 1, outcome=outcome, value=value, limit=limit, confidence=confidence,
        needed_n=needed, text=text,
    )  # fmt: skip


def _ratio_check(name: str, pair: Pair, bound: float | None, **fields: Any) -> Check:
    return Check(
        name=name,
        bound=None if bound is None else finite(bound),
        unit=UNITS[name],
        n=pair.n,
        p_value=pair.mid_p,
        **fields,
    )


def _needed_for_ratio(pair: Pair, *, theta: float, both: int, confidence: float) -> int | None:
    """As `needed_for_drop`, of (share after) - theta · (share before), which is 0 at the limit.

    Args:
        theta: below 1 for accuracies, from 1 on for error rates.
        both: samples that count in both models, right or wrong ones.
    """
    only = (pair.lost, pair.gained) if theta < 1 else (pair.gained, pair.lost)
    before, after = only[0] + both, only[1] + both
    gap = (after - theta * before) / pair.n * (1 if theta < 1 else -1)
    second = (theta**2 * only[0] + only[1] + (1 - theta) ** 2 * both) / pair.n
    counts = (np.array(float(one)) for one in (*only, both))
    needed = needed_samples(
        gap,
        variance=max(second - gap**2, 0.0),
        score=float(ratio_score(np.array(theta), *counts, n=pair.n)),
        n=pair.n,
        confidence=confidence,
    )
    return _more_than(pair.n, needed)


def flips_check(name: str, pair: Pair, limit: float, *, confidence: float) -> Check:
    """limit: a fraction of the samples."""
    value = pair.lost / pair.n
    bound = share_upper_bound(pair.lost, n=pair.n, confidence=confidence)
    outcome = by_upper_bound(value, bound, limit)
    text = (
        f"{pair.lost} of n = {pair.n} samples that {pair.before} has right are wrong in "
        f"{pair.after}, {100 * value:.2f} %; {percent(confidence)} upper bound {100 * bound:.2f} %,"
        f" limit {100 * limit:g} %"
    )
    needed = None
    if outcome == "inconclusive":
        needed = _more_than(pair.n, needed_for_share(value, limit=limit, confidence=confidence))
        text += _what_decides(needed, at_limit=value >= limit, limit=limit)
    return Check(
        name=name,
        outcome=outcome,
        value=value,
        bound=bound,
        limit=limit,
        unit="of samples",
        confidence=confidence,
        n=pair.n,
        needed_n=needed,
        text=text,
    )


def _more_than(n: int, needed: int | None) -> int | None:
    return None if needed is None else max(needed, n + 1)


def _what_decides(needed: int | None, *, at_limit: bool, limit: float) -> str:
    if needed is not None:
        return f"; about {needed} test samples would decide"
    if at_limit and limit > 0:
        return "; no number of samples decides what equals its limit"
    return "; no number of samples proves that nothing at all is lost: set a wider limit"


UNITS = {
    "max_drop_points": "points",
    "max_quantization_drop_points": "points",
    "min_retention": "of the reference's accuracy",
    "max_error_growth": "of the reference's errors",
    "max_negative_flips": "of samples",
}
JUDGES = {
    "max_drop_points": drop_check,
    "max_quantization_drop_points": drop_check,
    "min_retention": _retention,
    "max_error_growth": _growth,
    "max_negative_flips": flips_check,
}
