"""What makes a latency say less than it seems to, or nothing. Pure: dicts of `condition.py` in,
findings out. Codes are those that a record keeps.

A finding is `invalid` (no result), `throttled` (the device was slowed down: no result either),
`noisy` (a result with a wide interval) or `note` (true, and should be known).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from ..measure.throttling import SINCE_BOOT, Throttling, slowed_between

Severity = Literal["invalid", "throttled", "noisy", "note"]
Facts = Mapping[str, Any]

CAPPED = 1 << 1  # of vcgencmd get_throttled: the firmware caps the clock, for lack of power
TRIP_MARGIN_C = 5.0  # below the temperature at which the system slows down
CLOCK_LOSS = 0.95  # of the first frequency
NOISY_CV = 0.025  # above it trtexec warns of instability
BUSY_CPUS = 0.15  # of one CPU, used by others
PRESSURE = 10.0  # % of 10 s in which somebody waited for a CPU, that is not the network itself
CLOCK_STEPS = 100  # of the clock, in one inference
SPIN_SHARE = 0.9  # of all threads' time
IDLE_GAP = 1.2  # paced over back to back
SLOW_DISK = 3.0  # cold load over warm
MEMORY_SHARE = 0.8
DOTPROD = "asimddp"
# releases whose aarch64 wheels die of SIGILL on cores without dotprod (onnxruntime#24512)
DIES_WITHOUT_DOTPROD = ("1.21.0",)
BAKED_DOMAIN = "com.microsoft.nchwc"


@dataclass(frozen=True)
class Finding:
    code: str
    severity: Severity
    text: str


def worst(findings: Sequence[Finding]) -> Literal["valid", "noisy", "throttled", "invalid"]:
    """What a measurement with these findings is worth."""
    severities = {one.severity for one in findings}
    for one in ("invalid", "throttled", "noisy"):
        if one in severities:
            return one
    return "valid"


def slowed_down(before: Facts, after: Facts) -> list[Finding]:
    """THROTTLE, UNDERVOLT: heat or a weak power supply, by what the machine itself says."""
    moments = [
        Throttling(one["throttle_count"], one["power_flags"] or 0) for one in (before, after)
    ]
    words = slowed_between(*moments)
    found = []
    if "undervolted" in words:
        found.append(_slow("UNDERVOLT", "its voltage was too low: give it a stronger power supply"))
    if "throttled" in words:
        found.append(_slow("THROTTLE", "it slowed down because of heat or power: cool it, wait"))
    fresh = (moments[1].flags & ~moments[0].flags) >> SINCE_BOOT
    if (moments[0].flags | moments[1].flags | fresh) & CAPPED:
        found.append(_slow("UNDERVOLT", "its firmware capped the clock: check the power supply"))
    heat, trip = after["temperature_c"], after["trip_c"]
    if heat is not None and trip is not None and heat >= trip - TRIP_MARGIN_C:
        text = f"at the end it had {heat:.0f} °C and slows down at {trip:.0f} °C: cool it"
        found.append(_slow("THROTTLE", text))
    return found


def slower_clock(before: Facts, after: Facts) -> list[Finding]:
    """THROTTLE: the clock fell while it was measured."""
    moments = [[mhz for mhz in one["frequency_mhz"] if mhz] for one in (before, after)]
    if not all(moments) or max(moments[1]) >= CLOCK_LOSS * max(moments[0]):
        return []
    text = f"its clock fell from {max(moments[0]):.0f} to {max(moments[1]):.0f} MHz"
    return [_slow("THROTTLE", text)]


def governor(condition: Facts) -> list[Finding]:
    """GOV: a governor that changes the clock while we look."""
    moving = [one for one in condition["governors"] if one != "performance"]
    if not moving:
        return []
    text = f"the governor is {', '.join(moving)}: the clock follows the load; compare in one run"
    return [Finding("GOV", "note", text)]


def unlike_cores(clusters: Sequence[Facts], affinity: Sequence[int] | None) -> list[Finding]:
    """BIGLITTLE: threads may land on slow cores."""
    if len(clusters) < 2 or affinity:
        return []
    kinds = "; ".join(
        f"CPU {_numbers(one['cpus'])} up to {one['max_mhz'] or 0:.0f} MHz" for one in clusters
    )
    fast = _numbers(clusters[0]["cpus"])
    text = f"its cores are unlike ({kinds}): try --affinity {fast}, or --affinity clusters"
    return [Finding("BIGLITTLE", "note", text)]


def too_many_threads(machine: Facts, threads: int) -> list[Finding]:
    """CGROUP: more threads than CPUs that this process may use."""
    if threads <= machine["available_threads"]:
        return []
    quota = machine["cgroup_cpus"]
    why = f"cgroup quota of {quota:g} CPUs" if quota is not None else "affinity"
    text = (
        f"{threads} threads on {machine['available_threads']} CPUs ({why}): they would wait for "
        "one another; lower --threads"
    )
    return [Finding("CGROUP", "invalid", text)]


def busy(launches: Sequence[tuple[Sequence[Facts], Sequence[Facts]]]) -> list[Finding]:
    """BG: somebody else computed, or memory was swapped, during a launch."""
    others, swapped, seconds = 0.0, 0, 0.0
    for before, after in launches:
        if before[0]["busy_s"] is None or after[0]["busy_s"] is None:
            continue
        own = sum(late["own_s"] - early["own_s"] for early, late in zip(before, after, strict=True))
        others += max(0.0, after[0]["busy_s"] - before[0]["busy_s"] - own)
        seconds += after[-1]["at_s"] - before[0]["at_s"]
        swapped += (after[0]["swapped_pages"] or 0) - (before[0]["swapped_pages"] or 0)
    found = []
    if seconds and others / seconds > BUSY_CPUS:
        text = f"others used {others / seconds:.1f} CPUs meanwhile: end them and measure again"
        found.append(Finding("BG", "noisy", text))
    if swapped > 0:
        text = f"{swapped} pages were swapped meanwhile: free some memory"
        found.append(Finding("BG", "noisy", text))
    return found


def under_pressure(before: Facts) -> list[Finding]:
    """BG: before it began somebody waited for a CPU already."""
    pressure = before["cpu_pressure_10"]
    if pressure is None or pressure <= PRESSURE:
        return []
    text = f"it was busy before: something waited for a CPU in {pressure:.0f} % of the time"
    return [Finding("BG", "noisy", text)]


def spread(name: str, cv: float) -> list[Finding]:
    """NOISE: runs that differ."""
    if cv <= NOISY_CV:
        return []
    return [
        Finding("NOISE", "noisy", f"{name}: runs differ by {100 * cv:.1f} % (CV); 2.5 % is calm")
    ]


def coarse_clock(name: str, *, p50_ms: float, clock_ns: float) -> list[Finding]:
    """CLOCK: an inference of too few steps of the clock."""
    if p50_ms * 1e6 >= CLOCK_STEPS * clock_ns:
        return []
    text = (
        f"{name}: {p50_ms:.3g} ms is less than {CLOCK_STEPS} steps of its clock ({clock_ns:g} ns)"
    )
    return [Finding("CLOCK", "invalid", text)]


def spinning(name: str, *, cpu_ms: float, p50_ms: float, threads: int) -> list[Finding]:
    """SPIN: threads that wait by computing."""
    if threads < 2 or cpu_ms < SPIN_SHARE * threads * p50_ms:
        return []
    text = (
        f"{name}: an inference takes {cpu_ms:.3g} ms of CPU time on {threads} threads: some of it "
        "is spinning; compare with --spinning off"
    )
    return [Finding("SPIN", "note", text)]


def idle_gap(name: str, *, ratio: float, rate_hz: float) -> list[Finding]:
    """IDLEGAP: an application that pauses is slower than a loop."""
    if ratio < IDLE_GAP:
        return []
    text = (
        f"{name}: {ratio:.2f} × slower at {rate_hz:g} Hz than back to back: caches and clock cool"
    )
    return [Finding("IDLEGAP", "note", text)]


def slow_disk(name: str, *, cold_ms: float, warm_ms: float) -> list[Finding]:
    """DISK: the first start after a boot."""
    if cold_ms < SLOW_DISK * warm_ms:
        return []
    text = f"{name}: loads in {cold_ms:.0f} ms from a cold disk, in {warm_ms:.0f} ms from memory"
    return [Finding("DISK", "note", text)]


def little_memory(available_bytes: int | None, needed_bytes: int) -> list[Finding]:
    """OOM: what the process takes is most of what there is."""
    if available_bytes is None or needed_bytes <= MEMORY_SHARE * available_bytes:
        return []
    text = f"takes {needed_bytes / 1e6:.0f} MB of {available_bytes / 1e6:.0f} MB that are free"
    return [Finding("OOM", "note", text)]


def unknown_cpu(words: str) -> list[Finding]:
    """CPUDETECT: onnxruntime did not recognise the CPU (onnxruntime#10038)."""
    lines = [line for line in words.splitlines() if "cpuinfo" in line.lower()]
    if not lines:
        return []
    text = (
        f"onnxruntime did not recognise the CPU: kernels may be generic ({lines[0].strip()[:120]})"
    )
    return [Finding("CPUDETECT", "note", text)]


def deadly_wheel(machine: Facts, version: str) -> list[Finding]:
    """ISA: a release that is known to die on this kind of core."""
    arm = machine["arch"] in ("aarch64", "arm64")
    if not arm or DOTPROD in machine["features"] or version not in DIES_WITHOUT_DOTPROD:
        return []
    text = f"onnxruntime {version} dies of SIGILL on cores without dotprod: install another release"
    return [Finding("ISA", "invalid", text)]


def baked_layout(domains: Sequence[str]) -> list[Finding]:
    """OPTFILE: a graph that was optimised for another CPU."""
    if BAKED_DOMAIN not in domains:
        return []
    text = f"has operators of {BAKED_DOMAIN}: optimised for one CPU; give the portable file"
    return [Finding("OPTFILE", "invalid", text)]


def stand_in(measured_on: str) -> list[Finding]:
    """PROXY: an emulator's time."""
    if measured_on == "target":
        return []
    return [Finding("PROXY", "note", "emulated, not latency: its numbers and crashes are real")]


def _slow(code: str, text: str) -> Finding:
    return Finding(code, "throttled", text)


def _numbers(cpus: Sequence[int]) -> str:
    return ",".join(map(str, cpus))
