"""Machines are described from small made-up /proc and /sys trees."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from edgestill.pipeline.measure import machine

X86 = """\
processor\t: 0
vendor_id\t: GenuineIntel
model name\t: Xeon Toy
physical id\t: 0
core id\t: {core}
cpu MHz\t: 2600.5
flags\t: fpu avx avx2 avx512_vnni amx_int8 hypervisor
"""

PI_4 = """\
processor\t: {cpu}
Features\t: fp asimd evtstrm crc32 cpuid
CPU implementer\t: 0x41
CPU part\t: 0xd08
"""

LITTLE = PI_4.replace("0xd08", "0xd03")
BIG = PI_4.replace("0xd08", "0xd0b").replace("cpuid", "cpuid asimddp")


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(machine, "ROOT", tmp_path)
    monkeypatch.setattr(machine.platform, "system", lambda: "Linux")
    return tmp_path


def write(root: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


def test_this_machine_is_described_in_json() -> None:
    described = machine.describe_machine()

    assert json.loads(json.dumps(described)) == described
    assert described["arch"]
    assert described["python"] == ".".join(map(str, sys.version_info[:3]))
    assert described["versions"]["numpy"]
    assert set(described["versions"]) == set(machine.LIBRARIES)
    assert 1 <= described["available_threads"] <= os.cpu_count()


def test_an_empty_machine_has_nones_and_still_a_thread(root: Path) -> None:
    described = machine.describe_machine()

    for key in ("cpu_model", "physical_cores", "governor", "memory_bytes", "cgroup_cpus"):
        assert described[key] is None, key
    assert described["features"] == []
    assert machine.available_threads() >= 1
    assert machine.cpu_capability().endswith("/unknown/none")


def test_an_x86_virtual_machine(root: Path) -> None:
    write(
        root,
        {
            "proc/cpuinfo": "\n".join(X86.format(core=core) for core in (0, 0, 1, 1)),
            "proc/meminfo": "MemTotal:  2048 kB\n",
            "sys/class/dmi/id/product_name": "Standard PC\n",
            "sys/devices/system/cpu/cpu0/cpufreq/scaling_governor": "ondemand\n",
            ".dockerenv": "",
        },
    )

    described = machine.describe_machine()

    assert described["cpu_model"] == "Xeon Toy"
    assert described["features"] == ["avx", "avx2", "avx512_vnni", "amx_int8"]
    assert described["physical_cores"] == 2
    assert described["frequency_mhz"] == {"now": 2600.5, "min": None, "max": None}
    assert described["governor"] == "ondemand"
    assert described["memory_bytes"] == 2 * 2**20
    assert described["virtualization"] == "virtual machine (Standard PC), container"
    assert machine.cpu_capability().endswith("/GenuineIntel/amx_int8+avx+avx2+avx512_vnni")


def test_a_board_is_named_by_its_core_and_model(root: Path) -> None:
    siblings = {
        f"sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list": f"{cpu}\n"
        for cpu in range(4)
    }
    folder = "sys/devices/system/cpu/cpu0/cpufreq"
    write(
        root,
        {
            "proc/cpuinfo": "\n".join(PI_4.format(cpu=cpu) for cpu in range(4)),
            "proc/device-tree/model": "Raspberry Pi 4 Model B\0",
            f"{folder}/scaling_cur_freq": "600000\n",
            f"{folder}/scaling_max_freq": "1500000\n",
            **siblings,
        },
    )

    described = machine.describe_machine()

    assert described["cpu_model"] == "Cortex-A72"
    assert described["board"] == "Raspberry Pi 4 Model B"
    assert described["physical_cores"] == 4
    assert described["features"] == ["asimd"]
    assert described["frequency_mhz"] == {"now": 600.0, "min": None, "max": 1500.0}
    assert machine.cpu_capability().endswith("/0x41-0xd08/asimd")


def test_features_are_those_of_every_core(root: Path) -> None:
    write(root, {"proc/cpuinfo": LITTLE.format(cpu=0) + "\n" + BIG.format(cpu=1)})

    described = machine.describe_machine()

    assert described["cpu_model"] == "Cortex-A53 + Cortex-A76"
    assert described["features"] == ["asimd"]


@pytest.mark.parametrize(
    ("files", "cpus"),
    [
        ({}, None),
        ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "max 100000\n"}, None),
        ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "150000 100000\n"}, 1.5),
        (  # the parent's is tighter than the leaf's
            {
                "proc/self/cgroup": "0::/pod/app\n",
                "sys/fs/cgroup/pod/app/cpu.max": "400000 100000\n",
                "sys/fs/cgroup/pod/cpu.max": "200000 100000\n",
            },
            2.0,
        ),
        (  # in a container the path of the host is not mounted
            {
                "proc/self/cgroup": "0::/host/path\n",
                "sys/fs/cgroup/cpu.max": "300000 100000\n",
            },
            3.0,
        ),
        (
            {
                "proc/self/cgroup": "4:cpu,cpuacct:/a\n",
                "sys/fs/cgroup/cpu,cpuacct/a/cpu.cfs_quota_us": "50000\n",
                "sys/fs/cgroup/cpu,cpuacct/a/cpu.cfs_period_us": "100000\n",
            },
            0.5,
        ),
        (
            {
                "proc/self/cgroup": "1:cpu:/\n",
                "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "-1\n",
                "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000\n",
            },
            None,
        ),
    ],
)
def test_cgroup_quota(root: Path, files: dict[str, str], cpus: float | None) -> None:
    write(root, files)

    assert machine.describe_machine()["cgroup_cpus"] == cpus


@pytest.mark.parametrize(("quota", "threads"), [(50_000, 1), (250_000, 2), (900_000, 4)])
def test_threads_are_the_affinity_cut_to_whole_cpus_of_the_quota(
    root: Path, monkeypatch: pytest.MonkeyPatch, quota: int, threads: int
) -> None:
    monkeypatch.setattr(machine, "_affinity", lambda: [0, 1, 2, 3])
    write(
        root,
        {"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": f"{quota} 100000\n"},
    )

    assert machine.available_threads() == threads


def test_the_capability_is_the_same_every_time() -> None:
    assert machine.cpu_capability() == machine.cpu_capability()


def test_measuring_code_is_light_to_import() -> None:
    heavy = "{'torch', 'onnx', 'onnxruntime', 'scipy'}"
    code = (
        "import sys, edgestill.pipeline.measure, edgestill.pipeline.measure.machine, "
        f"edgestill.pipeline.measure.latency; sys.exit(str({heavy} & set(sys.modules)) != 'set()')"
    )

    assert subprocess.run([sys.executable, "-P", "-c", code], check=False).returncode == 0
