"""What every check needs: an outcome from a bound, and the same words for the same thing."""

from __future__ import annotations

import math
from typing import Any

from ..report import Check, Outcome, Report, Role


def by_upper_bound(value: float, bound: float, limit: float) -> Outcome:
    """Of something that may not exceed its limit; NaN is no measurement."""
    if math.isnan(value) or math.isnan(bound):
        return "invalid"
    return "pass" if bound <= limit else "fail" if value > limit else "inconclusive"


def by_lower_bound(value: float, bound: float, limit: float) -> Outcome:
    """Of something that may not fall below its limit."""
    return by_upper_bound(-value, -bound, -limit)


def invalid(name: str, text: str, *, limit: float | None, unit: str) -> Check:
    """A check without a measurement: never passed."""
    return Check(
        name=name, outcome="invalid", value=None, bound=None, limit=limit, unit=unit, text=text
    )


def exact(name: str, value: float | None, *, limit: float, unit: str, what: str) -> Check:
    """Of what is counted, not estimated: at most `limit`."""
    if value is None or not math.isfinite(value):
        return invalid(name, f"{what} was not recorded; run again", limit=limit, unit=unit)
    return Check(
        name=name,
        outcome="pass" if value <= limit else "fail",
        value=value,
        bound=None,
        limit=limit,
        unit=unit,
        text=f"{what} is {value:,g}, limit {limit:,g}" if unit != "bytes" else
        f"{what} is {value:,.0f} bytes, limit {limit:,.0f}",
    )  # fmt: skip


def finite(value: Any) -> float | None:
    """JSON has neither NaN nor infinity."""
    return float(value) if math.isfinite(value) else None


def percent(confidence: float) -> str:
    return f"{100 * confidence:g} %"


def float_role(report: Report) -> Role:
    """The float model that int8 was made from: in torch, or the file that was given."""
    return "float" if report.reference == "float" else "student"
