"""What the deployed file is: its size, what it asks of a runtime, what of it runs in int8, and
whether it computes what the network does. Counted, not estimated, but for the agreement of CPUs."""

from __future__ import annotations

import math

from ..measure.paired import share_lower_bound
from ..policy import GateSpec
from ..report import Check, Outcome, Report
from .common import by_lower_bound, exact, invalid, percent
from .evidence import Evidence


def parity(report: Report) -> Check:
    """Every rung of the ladder, whatever the policy says."""
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


def budget(report: Report) -> list[Check]:
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


def checks(evidence: Evidence, policy: GateSpec) -> list[Check]:
    report, found = evidence.report, []
    if policy.max_bytes is not None:
        size = None if report.file is None else report.file.bytes
        found.append(
            exact("max_bytes", size, limit=policy.max_bytes, unit="bytes", what="the deployed file")
        )
    if policy.max_multiply_adds is not None:
        counts = [one.multiply_adds for one in report.models if one.role == report.deployed]
        found.append(
            exact(
                "max_multiply_adds",
                counts[0] if counts else None,
                limit=policy.max_multiply_adds,
                unit="multiply-adds",
                what="the number of multiply-adds",
            )
        )
    if policy.max_opset is not None:
        opset = None if report.file is None else report.file.opset
        found.append(
            exact("max_opset", opset, limit=policy.max_opset, unit="opset", what="the opset")
        )
    if policy.allowed_ops is not None:
        found.append(_allowed_ops(report, policy.allowed_ops))
    if policy.min_int8_share is not None:
        found.append(_int8_share(report, policy.min_int8_share))
    if policy.min_cpu_agreement is not None:
        found.append(_agreement(report, policy.min_cpu_agreement, policy.confidence))
    return found


def int8_share(report: Report) -> float:
    """Of the file that is judged; counted in the graph that onnxruntime ran here."""
    return report.candidates[report.selection.index].int8_share


def _allowed_ops(report: Report, allowed: tuple[str, ...]) -> Check:
    name = "allowed_ops"
    if report.file is None:
        return invalid(name, "operators were not recorded; run again", limit=0.0, unit="operators")
    known = {op if ":" in op else f"ai.onnx:{op}" for op in allowed}
    others = {op: count for op, count in report.file.ops.items() if op not in known}
    text = (
        f"all {len(report.file.ops)} operators of the file are allowed"
        if not others
        else "not allowed: " + ", ".join(f"{op} ({count}×)" for op, count in others.items())
    )
    return Check(
        name=name,
        outcome="fail" if others else "pass",
        value=float(len(others)),
        bound=None,
        limit=0.0,
        unit="operators",
        text=text,
    )


def _int8_share(report: Report, limit: float) -> Check:
    share = int8_share(report)
    if not math.isfinite(share):
        text = "the share of int8 was not measured"
        return invalid("min_int8_share", text, limit=limit, unit="of multiply-adds")
    return Check(
        name="min_int8_share",
        outcome="pass" if share >= limit else "fail",
        value=share,
        bound=None,
        limit=limit,
        unit="of multiply-adds",
        text=f"{100 * share:.1f} % of the multiply-adds run in int8 kernels, floor "
        f"{100 * limit:g} %",
    )


def _agreement(report: Report, limit: float, confidence: float) -> Check:
    """The CPU that agrees least decides."""
    name, unit = "min_cpu_agreement", "of samples"
    rows = report.agreements
    if not rows or any(row.n < 1 or not 0 <= row.same_class <= row.n for row in rows):
        text = "no other CPU has run the deployed file"
        return invalid(name, text, limit=limit, unit=unit)
    bounds = [share_lower_bound(row.same_class, n=row.n, confidence=confidence) for row in rows]
    bound, row = min(zip(bounds, rows, strict=True), key=lambda pair: pair[0])
    value = row.same_class / row.n
    return Check(
        name=name,
        outcome=by_lower_bound(value, bound, limit),
        value=value,
        bound=bound,
        limit=limit,
        unit=unit,
        confidence=confidence,
        n=row.n,
        text=f"{row.cpu} puts {row.same_class} of n = {row.n} samples into the same class, the "
        f"least of {len(rows)} CPUs; {percent(confidence)} lower bound {100 * bound:.2f} %, floor "
        f"{100 * limit:g} %",
    )
