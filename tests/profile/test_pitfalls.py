"""Each thing that spoils a latency is seen in a made-up machine, and not where it is not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from edgestill.pipeline.measure import condition, throttling
from edgestill.pipeline.profile import pitfalls
from edgestill.pipeline.profile.kernels import int8_kernels

CALM: dict[str, Any] = {
    "throttle_count": 0,
    "power_flags": 0,
    "frequency_mhz": [1500.0, 1500.0],
    "governors": ["performance"],
    "temperature_c": 50.0,
    "trip_c": 80.0,
    "load_average_1": 0.1,
    "cpu_pressure_10": 0.0,
    "busy_s": 100.0,
    "own_s": 1.0,
    "swapped_pages": 7,
    "memory_available_bytes": 10**9,
    "at_s": 10.0,
}
PI_4 = {"arch": "aarch64", "features": ["asimd"], "available_threads": 4, "cgroup_cpus": None}


def after(**changes: Any) -> dict[str, Any]:
    return {**CALM, "at_s": 20.0, "busy_s": 110.0, "own_s": 11.0, **changes}


def codes(found: list[pitfalls.Finding]) -> list[tuple[str, str]]:
    return [(one.code, one.severity) for one in found]


@pytest.mark.parametrize(
    ("late", "expected"),
    [
        ({}, []),
        ({"throttle_count": 1}, [("THROTTLE", "throttled")]),
        ({"power_flags": 1 << 2}, [("THROTTLE", "throttled")]),
        ({"power_flags": 1 << 19}, [("THROTTLE", "throttled")]),
        ({"power_flags": 1 << 16}, [("UNDERVOLT", "throttled")]),
        ({"power_flags": 1 << 1}, [("UNDERVOLT", "throttled")]),
        ({"power_flags": 1 << 17}, [("UNDERVOLT", "throttled")]),
        ({"power_flags": None}, []),
        ({"temperature_c": 76.0}, [("THROTTLE", "throttled")]),
        ({"temperature_c": None, "trip_c": None}, []),
    ],
)
def test_heat_and_low_power_slow_a_device_down(
    late: dict[str, Any], expected: list[tuple[str, str]]
) -> None:
    assert codes(pitfalls.slowed_down(CALM, after(**late))) == expected


def test_flags_from_before_the_measurement_are_not_its_own() -> None:
    flags = {"power_flags": 0xF0000}

    assert pitfalls.slowed_down({**CALM, **flags}, after(**flags)) == []


def test_a_clock_that_falls_is_throttling_and_one_that_rises_is_not() -> None:
    slow = after(frequency_mhz=[600.0, 600.0])

    assert codes(pitfalls.slower_clock(CALM, slow)) == [("THROTTLE", "throttled")]
    assert pitfalls.slower_clock(slow, CALM) == []
    assert pitfalls.slower_clock(CALM, after(frequency_mhz=[None, None])) == []


def test_others_that_compute_are_noise_and_its_own_time_is_not() -> None:
    launches = [([CALM], [after()])]
    disturbed = [([CALM], [after(busy_s=115.0)])]
    swapped = [([CALM], [after(swapped_pages=9)])]

    assert pitfalls.busy(launches) == []
    assert codes(pitfalls.busy(disturbed)) == [("BG", "noisy")]
    assert codes(pitfalls.busy(swapped)) == [("BG", "noisy")]
    assert pitfalls.busy([([{**CALM, "busy_s": None}], [after()])]) == []


def test_two_networks_that_take_turns_are_both_its_own() -> None:
    before, later = [CALM, CALM], [after(busy_s=120.0), after(busy_s=120.0)]

    assert pitfalls.busy([(before, later)]) == []


@pytest.mark.parametrize(
    ("call", "code", "severity"),
    [
        (lambda bad: pitfalls.governor({"governors": ["ondemand" if bad else "performance"]}),
         "GOV", "note"),
        (lambda bad: pitfalls.under_pressure({"cpu_pressure_10": 30.0 if bad else None}),
         "BG", "noisy"),
        (lambda bad: pitfalls.unlike_cores(
            [{"cpus": [4], "max_mhz": 2e3}, {"cpus": [0], "max_mhz": None}][: 1 + bad], None),
         "BIGLITTLE", "note"),
        (lambda bad: pitfalls.too_many_threads(PI_4, 5 if bad else 4), "CGROUP", "invalid"),
        (lambda bad: pitfalls.spread("m", 0.03 if bad else 0.02), "NOISE", "noisy"),
        (lambda bad: pitfalls.coarse_clock("m", p50_ms=0.001, clock_ns=100.0 if bad else 1.0),
         "CLOCK", "invalid"),
        (lambda bad: pitfalls.spinning("m", cpu_ms=4.0 if bad else 2.0, p50_ms=1.0, threads=4),
         "SPIN", "note"),
        (lambda bad: pitfalls.idle_gap("m", ratio=1.5 if bad else 1.0, rate_hz=30.0),
         "IDLEGAP", "note"),
        (lambda bad: pitfalls.slow_disk("m", cold_ms=90.0 if bad else 9.0, warm_ms=9.0),
         "DISK", "note"),
        (lambda bad: pitfalls.little_memory(10**6, 10**6 if bad else 10**3), "OOM", "note"),
        (lambda bad: pitfalls.unknown_cpu("Error in cpuinfo: failed" if bad else ""),
         "CPUDETECT", "note"),
        (lambda bad: pitfalls.deadly_wheel(PI_4, "1.21.0" if bad else "1.22.0"), "ISA", "invalid"),
        (lambda bad: pitfalls.baked_layout(["", "com.microsoft.nchwc"][: 1 + bad]),
         "OPTFILE", "invalid"),
        (lambda bad: pitfalls.stand_in("emulated" if bad else "target"), "PROXY", "note"),
    ],
)  # fmt: skip
def test_a_pitfall_is_found_where_it_is_and_nowhere_else(
    call: Any, code: str, severity: str
) -> None:
    assert codes(call(True)) == [(code, severity)]
    assert call(False) == []


def test_the_worst_finding_says_what_a_measurement_is_worth() -> None:
    def of(*severities: Any) -> str:
        return pitfalls.worst([pitfalls.Finding("X", one, "") for one in severities])

    assert of() == of("note") == "valid"
    assert of("note", "noisy") == "noisy"
    assert of("noisy", "throttled") == "throttled"
    assert of("throttled", "invalid") == "invalid"


def test_a_machine_s_condition_is_read_from_its_files(tmp_path: Path) -> None:
    files = {
        "proc/loadavg": "0.52 0.4 0.3 1/100 7\n",
        "proc/pressure/cpu": "some avg10=12.50 avg60=1.0 avg300=0.1 total=5\n",
        "proc/stat": "cpu 100 0 50 900 30 0 0 0 0 0\n",
        "proc/vmstat": "pswpin 3\npswpout 4\n",
        "proc/meminfo": "MemAvailable:   2048 kB\n",
        "proc/cpuinfo": "processor: 0\nCPU part: 0xd03\n\nprocessor: 4\nCPU part: 0xd0b\n",
        "sys/class/thermal/thermal_zone0/temp": "61000\n",
        "sys/class/thermal/thermal_zone0/trip_point_0_type": "passive\n",
        "sys/class/thermal/thermal_zone0/trip_point_0_temp": "80000\n",
        throttling.FLAGS: "50005\n",
    }
    for cpu, mhz in ((0, 1500), (4, 2400)):
        folder = f"sys/devices/system/cpu/cpu{cpu}/cpufreq"
        files[f"{folder}/scaling_cur_freq"] = "600000\n"
        files[f"{folder}/cpuinfo_max_freq"] = f"{mhz}000\n"
        files[f"{folder}/scaling_governor"] = "ondemand\n"
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)

    found = condition.condition(tmp_path)

    assert found["load_average_1"] == 0.52
    assert found["cpu_pressure_10"] == 12.5
    assert found["busy_s"] == pytest.approx(150 / 100)  # ticks of 10 ms
    assert found["swapped_pages"] == 7
    assert found["memory_available_bytes"] == 2 * 2**20
    assert (found["temperature_c"], found["trip_c"]) == (61.0, 80.0)
    assert found["power_flags"] == 0x50005
    assert found["frequency_mhz"] == [600.0, 600.0]
    assert found["governors"] == ["ondemand"]
    assert [(one["cpus"], one["max_mhz"]) for one in condition.clusters(tmp_path)] == [
        ([4], 2400.0),
        ([0], 1500.0),
    ]


def test_an_empty_machine_says_nothing_and_does_not_fail(tmp_path: Path) -> None:
    found = condition.condition(tmp_path)

    for key in ("power_flags", "temperature_c", "cpu_pressure_10", "busy_s", "swapped_pages"):
        assert found[key] is None, key
    assert pitfalls.slowed_down(found, found) == []
    assert pitfalls.busy([([found], [found])]) == []


def test_the_firmware_s_words_are_read() -> None:
    assert condition.parse_flags("throttled=0x50005\n") == 0x50005
    assert condition.parse_flags("50005") == 0x50005
    assert condition.parse_flags("") is None
    assert condition.parse_flags("VCHI initialization failed") is None


def test_int8_kernels_follow_the_cpu() -> None:
    assert "without dotprod" in int8_kernels("aarch64", ["asimd"])
    assert int8_kernels("aarch64", ["asimd", "asimddp"]).startswith("dotprod")
    assert int8_kernels("aarch64", ["asimd", "asimddp", "i8mm"]).startswith("i8mm")
    assert "saturate" in int8_kernels("x86_64", ["avx2"])
    assert "exact" in int8_kernels("x86_64", ["avx2", "avx_vnni"])
    assert int8_kernels("riscv64", []) == "generic"
