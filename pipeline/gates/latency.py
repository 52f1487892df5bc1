"""How fast and how large in memory: batch 1, one thread, each device by itself.

    min_speedup         p50 of the reference's float ONNX / p50 of the deployed file: both taken in
                        turns in fresh processes of one run, an interval over these launches
    max_p90_ms          a budget, held against an upper bound of a launch's 90th percentile
    max_peak_rss_bytes  of the process that runs the deployed file

Both bounds are ends of the two-sided interval of the policy's confidence (`latency_stats.py`): a
few launches are not normal, and one-sided bounds of them would err too often.

A figure's state is valid, noisy (judged, and said), throttled or invalid (never passed). Another
machine's or an emulator's time is no time of the device. Latencies of different runs or devices are
never compared.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Literal

from ..measure.latency_stats import ratio_interval, tail_of_launch
from ..policy import DeviceSpec, GateSpec
from ..report import LOCAL, Check, LatencyRecord, Report
from .common import by_lower_bound, by_upper_bound, exact, invalid, percent
from .evidence import Evidence

LIMITS = ("min_speedup", "max_p90_ms", "max_peak_rss_bytes")
UNITS = {"min_speedup": "×", "max_p90_ms": "ms", "max_peak_rss_bytes": "bytes"}
NOISY_CV = 0.025  # above it trtexec warns of instability
LEAST_LAUNCHES = 5  # of a speed-up: intervals of 3 passed 8 % of what they should not (simulated)

State = Literal["valid", "noisy", "throttled", "invalid"]


def checks(evidence: Evidence, policy: GateSpec) -> list[Check]:
    found = []
    for device, limit, value in limits(policy):
        name = limit if device is None else f"devices.{device}.{limit}"
        if policy.latency == "not-here":
            found.append(_skipped(name, limit, value))
            continue
        rows = _rows(evidence.report, device or LOCAL)
        found.append(_check(name, limit, value, rows, evidence.report, policy.confidence))
    return found


def limits(policy: GateSpec) -> Iterator[tuple[str | None, str, float]]:
    """(device, name of the limit, limit), device None for the machine of the run itself."""
    sections: list[tuple[str | None, GateSpec | DeviceSpec]] = [(None, policy)]
    sections += policy.devices.items()
    for device, section in sections:
        for name in LIMITS:
            if getattr(section, name) is not None:
                yield device, name, getattr(section, name)


def state(row: LatencyRecord) -> State:
    """What this record is worth; `doubts` are those of whoever measured it."""
    runs = [ns for launch in row.raw_ns for ns in launch]
    figures = (row.p50_ms, row.cv, *row.p50_ci95_ms)
    is_whole = len(runs) == row.n > 0 and len(row.raw_ns) == row.launches and min(runs) > 0
    if not is_whole or not all(map(math.isfinite, figures)) or row.measured_on != "target":
        return "invalid"
    if {"throttled", "undervolted"} & set(row.doubts):
        return "throttled"
    return "noisy" if row.doubts or row.cv > NOISY_CV else "valid"


def _rows(report: Report, device: str) -> dict[str, LatencyRecord]:
    """By model: one thread; of texts, the length that counts is measured first."""
    found: dict[str, LatencyRecord] = {}
    for row in report.latency:
        if row.device == device and row.threads == 1:
            found.setdefault(row.name, row)
    return found


def _check(
    name: str,
    limit: str,
    value: float,
    rows: dict[str, LatencyRecord],
    report: Report,
    confidence: float,
) -> Check:
    own = rows.get(report.deployed)
    needed = [own]
    if limit == "min_speedup":
        needed = [None if report.speedup is None else rows.get(report.speedup.reference), own]
    if None in needed:
        return invalid(name, "no usable latency was measured", limit=value, unit=UNITS[limit])
    used = [row for row in needed if row is not None]
    for row in used:
        if (worth := state(row)) in ("throttled", "invalid"):
            return invalid(name, _why(row, worth), limit=value, unit=UNITS[limit])
    if limit == "min_speedup":
        check = _speedup(name, value, used[0], used[1], confidence=confidence)
    elif limit == "max_p90_ms":
        check = _p90(name, value, used[0], confidence=confidence)
    else:
        peak = used[0].peak_rss_bytes
        return exact(name, peak, limit=value, unit="bytes", what="peak resident memory")
    noisy = [row.name for row in used if state(row) == "noisy"]
    if not noisy or check.outcome == "invalid":
        return check
    spread = ", ".join(f"{row.name} {100 * row.cv:.1f} %" for row in used)
    text = f"{check.text}; noisy (spread of runs: {spread}), the bounds are wide accordingly"
    return check.model_copy(update={"text": text})


def _why(row: LatencyRecord, worth: State) -> str:
    if row.measured_on != "target":
        return (
            f"{row.name} on {row.device} was measured on "
            f"{'an emulator' if row.measured_on == 'emulated' else 'another machine'}, which says "
            "nothing of the device's speed; measure on the device"
        )
    if worth == "throttled":
        said = " and ".join(one for one in row.doubts if one != "unsettled")
        return f"{row.device} was {said} while {row.name} was measured; cool or power it, run again"
    return f"the record of {row.name} on {row.device} is incomplete or not finite; run again"


def _speedup(
    name: str, limit: float, before: LatencyRecord, after: LatencyRecord, *, confidence: float
) -> Check:
    if before.launches != after.launches or after.launches < 2:
        text = (
            f"{before.name} has {before.launches} launches, {after.name} {after.launches}: they "
            "were not measured in turns; run again"
        )
        return invalid(name, text, limit=limit, unit="×")
    ratio, (low, high) = ratio_interval(before.raw_ns, after.raw_ns, confidence=confidence)
    # not as soon as the ratio falls short: a slow launch or two is no proof of a slow file
    outcome = by_lower_bound(high, low, limit)
    text = (
        f"{after.name} is {ratio:.2f}× as fast as {before.name} on n = {after.launches} launches "
        f"in turns; {percent(confidence)} interval {low:.2f} to {high:.2f}, limit {limit:g}"
    )
    if outcome == "pass" and after.launches < LEAST_LAUNCHES:
        outcome = "inconclusive"
        text += f"; {LEAST_LAUNCHES} launches are the least that prove it (`profile.launches`)"
    elif outcome == "inconclusive":
        text += "; more launches (`profile.launches`) would narrow it"
    return Check(
        name=name,
        outcome=outcome,
        value=ratio,
        bound=low,
        limit=limit,
        unit="×",
        confidence=confidence,
        n=after.launches,
        text=text,
    )


def _p90(name: str, limit: float, row: LatencyRecord, *, confidence: float) -> Check:
    found = tail_of_launch(row.raw_ns, 0.90, confidence=confidence)
    if found is None:
        text = (
            f"{row.n} runs in {row.launches} launches of {row.name} say nothing of a 90th "
            "percentile; at least 64 runs in 2 launches do (`profile.runs`)"
        )
        return invalid(name, text, limit=limit, unit="ms")
    value, bound = (ns / 1e6 for ns in found)
    return Check(
        name=name,
        outcome=by_upper_bound(value, bound, limit),
        value=value,
        bound=bound,
        limit=limit,
        unit="ms",
        confidence=confidence,
        n=row.n,
        text=f"{row.name} takes {value:.3f} ms in nine of ten runs (n = {row.n} in {row.launches} "
        f"launches); {percent(confidence)} upper bound {bound:.3f}, limit {limit:g}",
    )


def _skipped(name: str, limit: str, value: float) -> Check:
    return Check(
        name=name,
        outcome="skipped",
        value=None,
        bound=None,
        limit=value,
        unit=UNITS[limit],
        text="not judged: the policy says `latency: not-here`",
    )
