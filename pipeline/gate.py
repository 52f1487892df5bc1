"""judge(report, policy) → Verdict: three-valued, paired, fail-closed. Pure; no torch.

Accuracy: both models saw the same n samples, so only the pairs on which they differ count. With b
lost (reference right, candidate wrong) and c gained, drop = (b - c)/n; its one-sided upper bound is
Tango's score bound for a paired difference (Tango, Statistics in Medicine 17:891, 1998, eq. 8–10).

    PASS          the upper bound is within the limit
    FAIL          the drop itself exceeds the limit
    INCONCLUSIVE  neither: the verdict names the n that would decide

A measurement that is missing or NaN is INVALID, never passed.
"""

from __future__ import annotations

import hashlib
import json
import math
from statistics import NormalDist

from .recipe import GateSpec
from .report import Check, Outcome, PairRecord, Report, Role, Verdict

EXIT_CODES: dict[Outcome, int] = {"pass": 0, "fail": 1, "inconclusive": 3, "invalid": 4}
PRECEDENCE: tuple[Outcome, ...] = ("fail", "invalid", "inconclusive", "pass")
POWER = 0.80  # of the n that a verdict asks for (profiling.md's table uses the same)


def judge(report: Report, policy: GateSpec) -> Verdict:
    """Every check of `policy` on `report`, and what they say together."""
    checks = [_parity(report), *_budget(report)]
    if policy.max_drop_points is not None:
        checks.append(
            _drop(
                "max_drop_points",
                report,
                policy.max_drop_points,
                policy.confidence,
                reference=report.reference,
            )
        )
    if policy.max_quantization_drop_points is not None:
        checks.append(
            _drop(
                "max_quantization_drop_points",
                report,
                policy.max_quantization_drop_points,
                policy.confidence,
                reference=_float_role(report),
            )
        )
    if policy.min_speedup is not None:
        checks.append(_speedup(report, policy.min_speedup))
    if policy.min_int8_share is not None:
        checks.append(_int8_share(report, policy.min_int8_share))
    outcome = next(o for o in PRECEDENCE if any(check.outcome == o for check in checks))
    return Verdict(
        outcome=outcome,
        exit_code=EXIT_CODES[outcome],
        checks=tuple(checks),
        policy_sha256=policy_sha256(policy),
    )


def _float_role(report: Report) -> Role:
    """The float model that int8 was made from: in torch, or the file that was given."""
    return "float" if report.reference == "float" else "student"


def unmeasured(report: Report, policy: GateSpec) -> list[str]:
    """Limits of `policy` that nothing in `report` can answer, each with what to do."""
    problems = []
    is_quantized = report.recipe.get("quantize") is not None
    for limit in ("max_quantization_drop_points", "min_int8_share"):
        if getattr(policy, limit) is not None and not is_quantized:
            problems.append(
                f"{limit}: this run quantized nothing; remove the limit, or run again with a "
                "`quantize:` section"
            )
    if policy.min_speedup is not None and report.speedup is None:
        problems.append(
            "min_speedup: this run measured no latency; remove the limit, or run again with a "
            "`profile:` section"
        )
    return problems


def policy_sha256(policy: GateSpec) -> str:
    text = json.dumps(policy.model_dump(mode="json"), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def drop_upper_bound(lost: int, gained: int, *, n: int, confidence: float) -> float:
    """One-sided upper bound of the paired drop (lost - gained)/n by Tango's score.

    The bound is the δ at which the score statistic of H0 "drop = δ" reaches -z(confidence).

    Args:
        lost, gained: discordant pairs, each ≥ 0, together ≤ n.
        n: pairs, ≥ 1.
        confidence: one-sided, in [0.5, 1).

    Returns:
        A fraction in [-1, 1].
    """
    from scipy.optimize import brentq

    drop = (lost - gained) / n
    z = NormalDist().inv_cdf(confidence)
    if drop >= 1 or z == 0:
        return drop
    almost_one = math.nextafter(1.0, 0.0)
    if _score(almost_one, lost, gained, n) > -z:
        return 1.0
    return float(brentq(lambda d: _score(d, lost, gained, n) + z, drop, almost_one, xtol=1e-12))


def _score(delta: float, lost: int, gained: int, n: int) -> float:
    """Tango's z of H0: drop = delta, with the nuisance P(gained) at its constrained MLE."""
    a = 2 * n
    b = -lost - gained + (2 * n - lost + gained) * delta
    c = -gained * delta * (1 - delta)
    p_gained = (math.sqrt(max(b * b - 4 * a * c, 0.0)) - b) / (2 * a)
    variance = n * (2 * p_gained + delta * (1 - delta))
    distance = lost - gained - n * delta
    if variance <= 0:
        return 0.0 if distance == 0 else math.copysign(math.inf, distance)
    return distance / math.sqrt(variance)


def provable_drop(n: int, *, flips: float, confidence: float) -> float:
    """Smallest limit (fraction) that n samples can prove for a candidate with no true drop.

    Args:
        flips: fraction of samples on which reference and candidate are expected to differ.
    """
    half = round(flips * n / 2)
    return drop_upper_bound(half, half, n=n, confidence=confidence)


def needed_samples(pair: PairRecord, *, limit: float, confidence: float) -> int | None:
    """n that decides with 80 % power if drop and flip rate stay as they are; None: no n can."""
    gap = limit - pair.drop
    if gap <= 0 or limit <= 0:
        return None
    normal = NormalDist()
    z = normal.inv_cdf(confidence)
    flips = (pair.lost + pair.gained) / pair.n
    by_flips = (z + normal.inv_cdf(POWER)) ** 2 * (flips - pair.drop**2) / gap**2
    without_flips = z * z * (1 - limit) / limit  # what even a perfect candidate needs
    return math.ceil(max(by_flips, without_flips, 1))


def _drop(
    name: str, report: Report, limit_points: float, confidence: float, *, reference: Role
) -> Check:
    pair = report.pair(reference, report.deployed)
    shared = {"name": name, "limit": limit_points, "unit": "points", "confidence": confidence}
    if pair is None or pair.n == 0:
        return Check(
            **shared,
            outcome="invalid",
            value=None,
            bound=None,
            text=f"{reference} and {report.deployed} share no test sample",
        )
    limit = limit_points / 100
    bound = drop_upper_bound(pair.lost, pair.gained, n=pair.n, confidence=confidence)
    seen = (
        f"{report.deployed} loses {100 * pair.drop:.2f} points against {reference} on n = {pair.n} "
        f"({pair.lost} lost, {pair.gained} gained); "
        f"{100 * confidence:g} % upper bound {100 * bound:.2f}, limit {limit_points:g}"
    )
    needed = None
    if bound <= limit:
        outcome: Outcome = "pass"
    elif pair.drop > limit:
        outcome = "fail"
    else:
        outcome = "inconclusive"
        needed = needed_samples(pair, limit=limit, confidence=confidence)
        seen += (
            "; no number of samples decides a drop that equals its limit"
            if needed is None
            else f"; about {max(needed, pair.n + 1)} test samples would decide"
        )
    return Check(
        **shared,
        outcome=outcome,
        value=100 * pair.drop,
        bound=100 * bound,
        needed_n=None if needed is None else max(needed, pair.n + 1),
        text=seen,
    )


def _speedup(report: Report, limit: float) -> Check:
    speedup = report.speedup
    if speedup is None or not all(map(math.isfinite, (speedup.ratio, *speedup.ci95))):
        return Check(
            name="min_speedup",
            outcome="invalid",
            value=None,
            bound=None,
            limit=limit,
            unit="×",
            text="no usable latency was measured",
        )
    low, high = speedup.ci95
    outcome: Outcome = "pass" if low >= limit else "fail" if high < limit else "inconclusive"
    text = (
        f"{speedup.candidate} is {speedup.ratio:.2f}× as fast as {speedup.reference} "
        f"(95 % interval {low:.2f} to {high:.2f}), limit {limit:g}"
    )
    if outcome == "inconclusive":
        text += "; more launches (`profile.launches`) would narrow the interval"
    return Check(
        name="min_speedup",
        outcome=outcome,
        value=speedup.ratio,
        bound=low,
        limit=limit,
        unit="×",
        confidence=0.95,
        text=text,
    )


def _int8_share(report: Report, limit: float) -> Check:
    """Of the file that is judged; counted in the graph that onnxruntime ran here."""
    share = report.candidates[report.selection.index].int8_share
    return Check(
        name="min_int8_share",
        outcome="invalid" if not math.isfinite(share) else "pass" if share >= limit else "fail",
        value=share,
        bound=None,
        limit=limit,
        unit="of multiply-adds",
        text=f"{100 * share:.1f} % of the multiply-adds run in int8 kernels, floor "
        f"{100 * limit:g} %",
    )


def _budget(report: Report) -> list[Check]:
    """Nothing ships that validation has shown to be beyond the budget, whatever the test says."""
    if report.selection.held:
        return []
    return [
        Check(
            name="budget",
            outcome="fail" if report.selection.refused else "pass",
            value=None,
            bound=None,
            limit=None,
            unit="points",
            text=report.selection.why
            + ("" if report.selection.refused else ", which chance explains: the test set decides"),
        )
    ]


def _parity(report: Report) -> Check:
    failed = [rung for rung in report.parity if not rung.passed]
    if not report.parity:
        outcome: Outcome = "invalid"
        text = "no rung of the parity ladder was climbed"
    elif failed:
        outcome = "fail"
        first = failed[0]
        text = f"`{first.rung}` does not compute what `{first.reference}` does" + (
            f": {first.note}" if first.note else ""
        )
    else:
        outcome = "pass"
        text = f"{len(report.parity)} rungs from torch to the deployed file agree"
    return Check(
        name="parity",
        outcome=outcome,
        value=float(len(failed)),
        bound=None,
        limit=0.0,
        unit="rungs",
        text=text,
    )
