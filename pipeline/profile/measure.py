"""One device measured: what it is, how fast the model runs there, and what that is worth.

The schedule and the timing are `measure/turns.py`'s, on a machine that `transport.py` opened. A
device whose answers are not the reference's has no figures: a fast wrong answer is no result.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from ..errors import MeasurementError, UsageError
from ..measure.latency import figures
from ..measure.latency_stats import ratio_of
from ..measure.throttling import Slowed
from ..measure.turns import KEPT_SECONDS, Plan, Row, Sample, Setting, Taken, take
from ..report import LatencyRecord
from ..stage import Events
from . import pitfalls
from .figures import agreement, drift_percent_per_minute, outliers
from .inputs import Fed, Signature
from .kernels import int8_kernels
from .pitfalls import Finding
from .record import (
    AnswersRecord,
    DeviceProfile,
    FindingRecord,
    PaceRecord,
    ProfileRow,
    SustainedRecord,
)
from .transport import Machine, libraries, measured_on, survey

MODEL, BASELINE = "model", "baseline"
EMULATED_LAUNCHES, EMULATED_RUNS = 2, 15  # its times mean nothing; answers and crashes do
PACED_LAUNCHES = 2
PACED_RUNS = 60

Mode = Literal["quick", "default", "strict"]
# launches, runs a launch, rest before it begins. strict: MLPerf Mobile's 1,024 samples and cooldown
AMOUNT: dict[Mode, tuple[int, int, float]] = {
    "quick": (3, 150, 0.0),
    "default": (10, 200, 0.0),
    "strict": (10, 1024, 60.0),
}


@dataclass(frozen=True)
class Wish:
    """What is asked of every device.

    threads: None: one thread, 2, 4, … up to all CPUs (a sweep). spinning: what is tried; None: as
    the runtime ships it. affinity: None: free; "clusters": each kind of core, and free.
    expected: answers to the inputs, (N, …), and whose they are.
    """

    model: Path
    signature: Signature
    fed: Fed
    mode: Mode = "default"
    threads: tuple[int, ...] | None = (1,)
    spinning: tuple[bool | None, ...] = (None,)
    affinity: tuple[int, ...] | Literal["clusters"] | None = None
    baseline: Path | None = None
    rate_hz: float | None = None
    sustained_s: float | None = None


def profile_on(
    machine: Machine, wish: Wish, *, reference: npt.NDArray[np.float32] | None, events: Events
) -> DeviceProfile:
    """Measures on a machine that is open.

    Args:
        reference: answers of this machine, where no golden ones are there.

    Raises:
        RuntimeFailure: the device fails. MeasurementError: what proves nothing.
    """
    facts = survey(machine)
    versions, words = libraries(machine)
    is_latency = measured_on(machine) == "target"  # an emulator's time is none, noisy or not
    findings = _before(facts, versions, words, wish)
    findings += _condition(facts["condition"]) if is_latency else []
    settings = settings_for(wish, facts)
    _refuse(machine, [*findings, *_of_settings(settings, facts)])
    findings += pitfalls.unlike_cores(facts["clusters"], settings[0].affinity)
    rows = [Row(MODEL, "onnx", wish.model)]
    if wish.baseline is not None:
        rows.append(Row(BASELINE, "onnx", wish.baseline))
    plan = _plan(wish.mode, settings, emulated=machine.kind == "emulated")
    time.sleep(AMOUNT[wish.mode][2])
    taken = take(rows, wish.fed.arrays, plan, events=events, target=machine)
    first, last = taken.conditions[0][0][0], taken.conditions[-1][1][0]
    findings += _during(taken, first, last) if is_latency else []
    answers = _answers(taken.samples[0], wish.fed, reference)
    is_wrong = answers is not None and not answers.agree
    records: list[ProfileRow] = []
    if answers is not None and is_wrong:
        findings.append(_wrong(answers))  # and no figures: a wrong answer's speed is none
    else:
        slowed = _slowed(findings)
        records = [_row(group, machine, slowed) for group in _groups(taken, rows, settings)]
        records = _with_speedups(records)
        records[0] = _with_modes(records[0], machine, wish, settings[0], events=events)
    findings += _after(records, facts, first) if is_latency else []
    findings += pitfalls.stand_in(measured_on(machine))
    validity = pitfalls.worst(findings)
    features = facts["machine"]["features"]
    return DeviceProfile(
        name=machine.name,
        kind=machine.kind,
        measured_on=measured_on(machine),
        int8_kernels=int8_kernels(facts["machine"]["arch"], features),
        environment={**facts, "libraries": versions},
        before=first,
        after=last,
        rows=tuple(records),
        answers=answers,
        validity=validity,
        findings=_unique(findings),
        exit_code=4 if validity in ("invalid", "throttled") else 0,
    )


def settings_for(wish: Wish, facts: Mapping[str, Any]) -> list[Setting]:
    """Every combination that was asked for, on a machine with these facts.

    Raises:
        UsageError: CPUs that it has not, or that it may not use.
    """
    usable = facts["machine"]["affinity"]
    if usable and isinstance(wish.affinity, tuple) and not set(wish.affinity) <= set(usable):
        raise UsageError(
            f"--affinity: expected some of the CPUs {', '.join(map(str, usable))}, got "
            f"{', '.join(map(str, wish.affinity))}"
        )
    available = facts["machine"]["available_threads"]
    threads = wish.threads or tuple(_powers_of_two(available))
    places: list[tuple[int, ...] | None] = [None]
    if wish.affinity == "clusters":
        places += [tuple(one["cpus"]) for one in facts["clusters"]]
    elif wish.affinity is not None:
        places = [wish.affinity]
    return [
        Setting(count, spinning, place)
        for count in dict.fromkeys(threads)
        for spinning in wish.spinning
        for place in places
        if place is None or wish.affinity != "clusters" or count <= len(place)
    ]


def _of_settings(settings: Sequence[Setting], facts: Mapping[str, Any]) -> list[Finding]:
    found: list[Finding] = []
    for setting in settings:
        cpus = facts["machine"]["available_threads"]
        usable = min(cpus, len(setting.affinity)) if setting.affinity else cpus
        machine = {**facts["machine"], "available_threads": usable}
        found += pitfalls.too_many_threads(machine, setting.threads)
    return found


def _refuse(machine: Machine, findings: Sequence[Finding]) -> None:
    """Raises: MeasurementError: what is known before makes it worthless."""
    reasons = [one.text for one in findings if one.severity == "invalid"]
    if reasons:
        raise MeasurementError(f"device {machine.name}: {'; '.join(reasons)}")


def _with_modes(
    record: ProfileRow, machine: Machine, wish: Wish, setting: Setting, *, events: Events
) -> ProfileRow:
    """The paced and the sustained load of the first setting, where they are asked for."""
    paced = _paced(machine, wish, setting, events=events) if wish.rate_hz else None
    sustained = _sustained(machine, wish, setting, events=events) if wish.sustained_s else None
    return record.model_copy(update={"paced": paced, "sustained": sustained})


def _plan(mode: Mode, settings: Sequence[Setting], *, emulated: bool) -> Plan:
    launches, runs, _ = AMOUNT[mode]
    if emulated:
        launches, runs = EMULATED_LAUNCHES, EMULATED_RUNS
    return Plan(launches, runs, tuple(settings), watched=True)


def _before(
    facts: Mapping[str, Any], versions: Mapping[str, str], words: str, wish: Wish
) -> list[Finding]:
    available = facts["condition"]["memory_available_bytes"]
    return [
        *pitfalls.deadly_wheel(facts["machine"], versions["onnxruntime"]),
        *pitfalls.baked_layout(wish.signature.domains),
        *pitfalls.unknown_cpu(words),
        *pitfalls.little_memory(available, 3 * wish.model.stat().st_size),
    ]


def _condition(now: Mapping[str, Any]) -> list[Finding]:
    return [*pitfalls.governor(now), *pitfalls.under_pressure(now)]


def _during(taken: Taken, first: Mapping[str, Any], last: Mapping[str, Any]) -> list[Finding]:
    return [
        *pitfalls.slowed_down(first, last),
        *pitfalls.slower_clock(first, last),
        *pitfalls.busy(taken.conditions),
    ]


def _after(
    records: Sequence[ProfileRow], facts: Mapping[str, Any], first: Mapping[str, Any]
) -> list[Finding]:
    found = []
    for record in records:
        row = record.latency
        name = f"{row.name}, {row.threads} threads" if row.threads > 1 else row.name
        found += pitfalls.spread(name, row.cv)
        found += pitfalls.coarse_clock(name, p50_ms=row.p50_ms, clock_ns=facts["clock_ns"])
        if record.spinning is not False:
            found += pitfalls.spinning(
                name, cpu_ms=row.cpu_ms, p50_ms=row.p50_ms, threads=row.threads
            )
        if record.cold_load_ms is not None:
            found += pitfalls.slow_disk(name, cold_ms=record.cold_load_ms, warm_ms=row.load_ms)
        if record.paced is not None:
            found += pitfalls.idle_gap(name, ratio=record.paced.ratio, rate_hz=record.paced.rate_hz)
    needed = max((record.latency.peak_rss_bytes for record in records), default=0)
    return found + pitfalls.little_memory(first["memory_available_bytes"], needed)


def _answers(
    sample: Sample, fed: Fed, reference: npt.NDArray[np.float32] | None
) -> AnswersRecord | None:
    expected = fed.expected if fed.expected is not None else reference
    if expected is None:
        return None
    same, difference, agree = agreement(expected, sample.answered)
    return AnswersRecord(
        reference="golden" if fed.expected is not None else "this machine",
        n=len(expected),
        same_class=same,
        max_abs=difference,
        agree=agree,
    )


def _wrong(answers: AnswersRecord) -> Finding:
    same = "" if answers.same_class is None else f"{answers.same_class} of {answers.n} alike, "
    text = (
        f"its answers are not those of {answers.reference} ({same}largest difference "
        f"{answers.max_abs:.3g}): a wrong answer's speed is no result; see `compress verify`"
    )
    return Finding("WRONG", "invalid", text)


def _slowed(findings: Sequence[Finding]) -> list[Slowed]:
    codes = {one.code for one in findings if one.severity == "throttled"}
    found: list[Slowed] = []
    found += ["throttled"] if "THROTTLE" in codes else []
    found += ["undervolted"] if "UNDERVOLT" in codes else []
    return found


def _groups(taken: Taken, rows: Sequence[Row], settings: Sequence[Setting]) -> list[list[Sample]]:
    return [
        [one for one in taken.samples if one.row is row and one.setting == setting]
        for setting in settings
        for row in rows
    ]


def _row(samples: Sequence[Sample], machine: Machine, slowed: Sequence[Slowed]) -> ProfileRow:
    first = samples[0]
    latency = LatencyRecord.model_validate(
        {
            **figures(samples, slowed=slowed),
            "device": machine.name,
            "measured_on": measured_on(machine),
        }
    )
    cold = [sample.cold for sample in samples if sample.cold is not None]
    mild, severe = outliers(latency.raw_ns)
    return ProfileRow(
        latency=latency,
        spinning=first.setting.spinning,
        affinity=first.setting.affinity,
        cold_load_ms=median(one["load_ns"] for one in cold) / 1e6 if cold else None,
        cold_first_ms=median(one["first_ns"] for one in cold) / 1e6 if cold else None,
        drift_percent_per_minute=drift_percent_per_minute(samples),
        mild_outliers=mild,
        severe_outliers=severe,
    )


def _with_speedups(records: Sequence[ProfileRow]) -> list[ProfileRow]:
    """Of the model over the baseline of the same setting, which took turns with it."""
    found = []
    for record in records:
        same = [
            one
            for one in records
            if one.latency.name == BASELINE
            and (one.latency.threads, one.spinning, one.affinity)
            == (record.latency.threads, record.spinning, record.affinity)
        ]
        if record.latency.name == MODEL and same:
            ratio = ratio_of(same[0].latency.raw_ns, record.latency.raw_ns)
            speedup = (ratio["ratio"], *ratio["ci95"])
            record = record.model_copy(update={"speedup": speedup})
        found.append(record)
    return found


def _paced(machine: Machine, wish: Wish, setting: Setting, *, events: Events) -> PaceRecord:
    """Back to back and paced blocks in the same processes would warm each other: two plans."""
    rows = [Row(MODEL, "onnx", wish.model)]
    medians, n = [], 0
    for rate in (None, wish.rate_hz):
        plan = Plan(PACED_LAUNCHES, PACED_RUNS, (setting,), rate_hz=rate)
        taken = take(rows, wish.fed.arrays, plan, events=events, target=machine)
        medians.append(median(ns for one in taken.samples for ns in one.durations_ns))
        n = sum(one.runs for one in taken.samples)
    assert wish.rate_hz is not None
    return PaceRecord(
        rate_hz=wish.rate_hz, p50_ms=medians[1] / 1e6, n=n, ratio=medians[1] / medians[0]
    )


def _sustained(
    machine: Machine, wish: Wish, setting: Setting, *, events: Events
) -> SustainedRecord:
    plan = Plan(1, PACED_RUNS, (setting,), sustained_s=wish.sustained_s)
    rows = [Row(MODEL, "onnx", wish.model)]
    (sample,) = take(rows, wish.fed.arrays, plan, events=events, target=machine).samples
    begin, end = sample.blocks[0][0], sample.blocks[-1][0]
    window = min(KEPT_SECONDS, (end - begin) / 2)  # a load shorter than two minutes: its halves
    early = median(ns for at, ns in sample.blocks if at <= begin + window)
    late = median(ns for at, ns in sample.blocks if at >= end - window)
    return SustainedRecord(
        seconds=end,
        n=sample.runs,
        first_p50_ms=early / 1e6,
        last_p50_ms=late / 1e6,
        ratio=late / early,
    )


def _powers_of_two(most: int) -> list[int]:
    return sorted({most, *(1 << power for power in range(most.bit_length()) if 1 << power <= most)})


def _unique(findings: Sequence[Finding]) -> tuple[FindingRecord, ...]:
    return tuple(
        FindingRecord(code=one.code, severity=one.severity, text=one.text)
        for one in dict.fromkeys(findings)
    )
