"""How a machine is at one moment, and what it has to run networks with. Reads /proc and /sys.

Standard library only, Python >= 3.9: it runs on a board beside the agent, and without the agent
where numpy or onnxruntime is missing. Without root. What cannot be found out is None. It judges
nothing: `profile/pitfalls.py` does, on the machine that asks.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from . import machine, throttling

CPUS = "sys/devices/system/cpu"


def condition(root: Path | None = None) -> dict[str, Any]:
    """What may differ between the begin and the end of a measurement.

    Args:
        root: of /proc and /sys.

    Returns: throttle_count (since boot, all cores), power_flags (bits of `vcgencmd get_throttled`,
        None where nobody keeps them), frequency_mhz and governors (of every CPU, by number),
        temperature_c and trip_c (hottest zone; lowest temperature at which the system slows down),
        load_average_1, cpu_pressure_10 (% of 10 s in which something waited for a CPU), busy_s and
        own_s (CPU seconds of everybody and of this process and its children, since boot),
        swapped_pages, memory_available_bytes, at_s (monotonic clock).
    """
    root = machine.ROOT if root is None else root
    cpus = _per_cpu(root)
    memory = _pairs(_read(root / "proc/meminfo"))
    pages = _pairs(_read(root / "proc/vmstat"))
    times = os.times()
    return {
        "throttle_count": _throttle_count(root),
        "power_flags": _power_flags(root),
        "frequency_mhz": [one["now_mhz"] for one in cpus],
        "governors": sorted({one["governor"] for one in cpus if one["governor"]}),
        **_heat(root),
        "load_average_1": _first_number(_read(root / "proc/loadavg")),
        "cpu_pressure_10": _pressure(_read(root / "proc/pressure/cpu")),
        "busy_s": _busy_seconds(_read(root / "proc/stat")),
        "own_s": times.user + times.system + times.children_user + times.children_system,
        "swapped_pages": pages.get("pswpin", 0) + pages.get("pswpout", 0) if pages else None,
        "memory_available_bytes": memory["MemAvailable"] * 1024
        if "MemAvailable" in memory
        else None,
        "at_s": time.monotonic(),
    }


def survey(root: Path | None = None) -> dict[str, Any]:
    """What this machine is and what a measurement on it would run with.

    Returns: machine (`machine.describe_machine`), condition, clusters (of cores that are alike),
        clock_ns (resolution of the clock), python (its path).
    """
    root = machine.ROOT if root is None else root
    return {
        "machine": machine.describe_machine(),
        "condition": condition(root),
        "clusters": clusters(root),
        "clock_ns": time.get_clock_info("perf_counter").resolution * 1e9,
        "python": sys.executable,
    }


def clusters(root: Path) -> list[dict[str, Any]]:
    """Cores that are alike together, the fastest first: a big.LITTLE chip has two or three."""
    found: dict[tuple[str, float], list[int]] = {}
    parts = _parts(_read(root / "proc/cpuinfo"))
    for one in _per_cpu(root):
        key = (parts.get(one["cpu"], ""), one["max_mhz"] or 0.0)
        found.setdefault(key, []).append(one["cpu"])
    ordered = sorted(found.items(), key=lambda item: -item[0][1])
    return [
        {"cpus": cpus, "part": part or None, "max_mhz": mhz or None}
        for (part, mhz), cpus in ordered
    ]


def _per_cpu(root: Path) -> list[dict[str, Any]]:
    folders = (root / CPUS).glob("cpu[0-9]*")
    found = []
    for number, folder in sorted((int(one.name[3:]), one) for one in folders):
        frequency = folder / "cpufreq"
        found.append(
            {
                "cpu": number,
                "now_mhz": _megahertz(frequency / "scaling_cur_freq"),
                "max_mhz": _megahertz(frequency / "cpuinfo_max_freq"),
                "governor": _read(frequency / "scaling_governor") or None,
            }
        )
    return found


def _parts(cpuinfo: str) -> dict[int, str]:
    """Processor → part of its MIDR; none on x86, where all cores of a chip have one."""
    found: dict[int, str] = {}
    number = -1
    for line in cpuinfo.splitlines():
        key, _, value = line.partition(":")
        if key.strip() == "processor" and value.strip().isdigit():
            number = int(value)
        elif key.strip() == "CPU part":
            found[number] = value.strip().lower()
    return found


def _throttle_count(root: Path) -> int:
    return sum(int(_read(path) or 0) for path in root.glob(throttling.COUNTS))


def _power_flags(root: Path) -> int | None:
    text = _read(root / throttling.FLAGS)
    if not text and root == Path("/") and shutil.which("vcgencmd"):
        text = _vcgencmd("vcgencmd")
    return parse_flags(text)


def parse_flags(text: str) -> int | None:
    """`throttled=0x50005`, as vcgencmd prints it, or `50005`, as sysfs does."""
    word = text.strip().rpartition("=")[2]
    try:
        return int(word, 16) if word else None
    except ValueError:
        return None


def _vcgencmd(program: str) -> str:
    try:
        done = subprocess.run(
            [program, "get_throttled"], capture_output=True, text=True, timeout=5, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout if done.returncode == 0 else ""


def _heat(root: Path) -> dict[str, Any]:
    zones = list(root.glob("sys/class/thermal/thermal_zone*"))
    temperatures = [_first_number(_read(zone / "temp")) for zone in zones]
    trips = [
        _first_number(_read(path.with_name(path.name.replace("_type", "_temp"))))
        for zone in zones
        for path in zone.glob("trip_point_*_type")
        if _read(path) in ("passive", "hot")  # active ones start a fan
    ]
    degrees = [value / 1e3 for value in temperatures if value is not None]
    slowing = [value / 1e3 for value in trips if value is not None and value > 0]
    return {"temperature_c": max(degrees, default=None), "trip_c": min(slowing, default=None)}


def _pressure(text: str) -> float | None:
    for word in text.splitlines()[0].split() if text else []:
        if word.startswith("avg10="):
            return float(word[6:])
    return None


def _busy_seconds(stat: str) -> float | None:
    """Of all CPUs: user, nice, system, irq, softirq and steal (proc(5)); guests are in user."""
    words = stat.split("\n", 1)[0].split()
    if len(words) < 9 or words[0] != "cpu":
        return None
    ticks = [int(word) for word in words[1:9]]
    busy = sum(ticks) - ticks[3] - ticks[4]  # idle, iowait
    return busy / os.sysconf("SC_CLK_TCK")


def _pairs(text: str) -> dict[str, int]:
    """`MemTotal:  2048 kB` and `pswpin 12`."""
    lines = (line.replace(":", " ").split() for line in text.splitlines())
    return {words[0]: int(words[1]) for words in lines if len(words) > 1 and words[1].isdigit()}


def _megahertz(path: Path) -> float | None:
    kilohertz = _first_number(_read(path))
    return None if kilohertz is None else kilohertz / 1e3


def _first_number(text: str) -> float | None:
    try:
        return float(text.split()[0])
    except (ValueError, IndexError):
        return None


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return ""
