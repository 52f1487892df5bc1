"""What this machine is: the fingerprint that every timing is reported with.

Standard library only, reads /proc, /sys and sysctl, runs without root, on Linux (containers
included) and macOS. What cannot be found out is None, never a guess. It measures nothing.
"""

from __future__ import annotations

import math
import os
import platform
import subprocess
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

ROOT = Path("/")

LIBRARIES = ("torch", "onnx", "onnxruntime", "onnxscript", "onnxsim", "numpy", "scipy", "pillow",
             "transformers")  # fmt: skip

# What changes which kernels run, and so both the speed and the last bits of a result. Names are
# those of /proc/cpuinfo.
FEATURES = (
    *("avx", "avx2", "fma", "f16c", "avx512f", "avx512bw", "avx512vl", "avx512_vnni"),
    *("avx512_bf16", "avx512_fp16", "avx_vnni", "avx_vnni_int8", "amx_tile", "amx_int8"),
    *("amx_bf16", "asimd", "asimdhp", "asimddp", "i8mm", "bf16", "sve", "sve2", "sme"),
)

VNNI = {"avx512_vnni", "avx_vnni", "avx_vnni_int8"}

# macOS names for the same things (sysctl keys on ARM, words of machdep.cpu.*features on Intel)
_DARWIN_ARM = {
    "asimd": "hw.optional.AdvSIMD",
    "asimdhp": "hw.optional.arm.FEAT_FP16",
    "asimddp": "hw.optional.arm.FEAT_DotProd",
    "i8mm": "hw.optional.arm.FEAT_I8MM",
    "bf16": "hw.optional.arm.FEAT_BF16",
    "sme": "hw.optional.arm.FEAT_SME",
}
_DARWIN_INTEL = {"avx1.0": "avx", "avx512vnni": "avx512_vnni"}

# MIDR implementer and part → core, for the boards this project meets (Linux arch/arm64 cputype.h)
_ARM_CORES = {
    ("0x41", "0xd03"): "Cortex-A53",
    ("0x41", "0xd05"): "Cortex-A55",
    ("0x41", "0xd07"): "Cortex-A57",
    ("0x41", "0xd08"): "Cortex-A72",
    ("0x41", "0xd09"): "Cortex-A73",
    ("0x41", "0xd0a"): "Cortex-A75",
    ("0x41", "0xd0b"): "Cortex-A76",
    ("0x41", "0xd0c"): "Neoverse-N1",
    ("0x41", "0xd40"): "Neoverse-V1",
    ("0x41", "0xd41"): "Cortex-A78",
    ("0x41", "0xd44"): "Cortex-X1",
    ("0x41", "0xd49"): "Neoverse-N2",
    ("0x41", "0xd4f"): "Neoverse-V2",
}


def describe_machine() -> dict[str, Any]:
    """Everything about this machine that a latency depends on, JSON-able.

    Frequencies are in MHz, memory in bytes, `cgroup_cpus` in CPUs (1.5 = three halves of one);
    `features` are the SIMD extensions in `FEATURES` that this CPU has.
    """
    blocks = _cpu_blocks()
    return {
        "cpu_model": _cpu_model(blocks),
        "board": _text("proc/device-tree/model"),
        "arch": platform.machine(),
        "logical_cpus": os.cpu_count(),
        "physical_cores": _physical_cores(blocks),
        "affinity": _affinity(),
        "available_threads": available_threads(),
        "cgroup_cpus": _cgroup_cpus(),
        "features": list(_features(blocks)),
        "governor": _text("sys/devices/system/cpu/cpu0/cpufreq/scaling_governor"),
        "frequency_mhz": _frequency_mhz(blocks),
        "memory_bytes": _memory_bytes(),
        "virtualization": _virtualization(blocks),
        "load_average": _load_average(),
        "kernel": f"{platform.system()} {platform.release()}",
        "platform": platform.platform(),
        "libc": " ".join(platform.libc_ver()).strip() or None,
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in LIBRARIES},
    }


def cpu_capability() -> str:
    """Short, stable name of what this CPU computes with: `x86_64/GenuineIntel/avx2+fma+…`.

    Two machines with the same string run the same kernels, so that stored results of one may
    serve on the other; model names and clock rates are left out on purpose.
    """
    blocks = _cpu_blocks()
    features = "+".join(sorted(_features(blocks))) or "none"
    return f"{platform.machine()}/{_cpu_vendor(blocks) or 'unknown'}/{features}"


def clips_int8() -> bool:
    """Whether sums of two products of uint8 and int8 saturate here: x86 without VNNI, which
    multiplies with VPMADDUBSW (exporters/int8.py)."""
    features = set(_features(_cpu_blocks()))
    return platform.machine() in ("x86_64", "AMD64") and not features & VNNI


def available_threads() -> int:
    """CPUs this process may really use: its affinity, cut to the cgroup's quota; at least 1."""
    affinity = _affinity()
    count = len(affinity) if affinity is not None else os.cpu_count() or 1
    quota = _cgroup_cpus()
    # half a CPU more does not carry another thread: it would stall the others at every join
    return count if quota is None else max(1, min(count, math.floor(quota)))


# --- the CPU --------------------------------------------------------------------------------------


def _cpu_blocks() -> list[dict[str, str]]:
    """/proc/cpuinfo, one dict a processor (ARM boards end with a dict about the board)."""
    blocks: list[dict[str, str]] = []
    for paragraph in (_text("proc/cpuinfo") or "").split("\n\n"):
        pairs = (line.partition(":") for line in paragraph.splitlines() if ":" in line)
        block = {key.strip().lower(): value.strip() for key, _, value in pairs}
        if block:
            blocks.append(block)
    return blocks


def _cpu_model(blocks: list[dict[str, str]]) -> str | None:
    for block in blocks:
        if "model name" in block:
            return block["model name"]
    cores = dict.fromkeys(
        _ARM_CORES.get(ids, "/".join(ids)) for ids in _arm_ids(blocks)
    )  # ordered, each kind once: big.LITTLE names both
    return " + ".join(cores) or _sysctl("machdep.cpu.brand_string")


def _cpu_vendor(blocks: list[dict[str, str]]) -> str | None:
    for block in blocks:
        if "vendor_id" in block:
            return block["vendor_id"]
    ids = dict.fromkeys("-".join(pair) for pair in _arm_ids(blocks))
    darwin = _sysctl("machdep.cpu.vendor") or _sysctl("machdep.cpu.brand_string")
    return ",".join(ids) or (darwin.replace(" ", "-") if darwin else None)


def _arm_ids(blocks: list[dict[str, str]]) -> Iterator[tuple[str, str]]:
    for block in blocks:
        if "cpu implementer" in block and "cpu part" in block:
            yield block["cpu implementer"].lower(), block["cpu part"].lower()


def _features(blocks: list[dict[str, str]]) -> tuple[str, ...]:
    """Of `FEATURES`, those that every core has: a thread may land on any of them."""
    sets = [
        set((block.get("flags") or block.get("features") or "").split())
        for block in blocks
        if "flags" in block or "features" in block
    ]
    words = set.intersection(*sets) if sets else _darwin_features()
    return tuple(name for name in FEATURES if name in words)


def _darwin_features() -> set[str]:
    if platform.system() != "Darwin":
        return set()
    arm = {name for name, key in _DARWIN_ARM.items() if _sysctl(key) == "1"}
    listed = " ".join(_sysctl(f"machdep.cpu.{key}") or "" for key in ("features", "leaf7_features"))
    return arm | {_DARWIN_INTEL.get(word, word) for word in listed.lower().split()}


def _physical_cores(blocks: list[dict[str, str]]) -> int | None:
    cores = {
        (block["physical id"], block["core id"])
        for block in blocks
        if "physical id" in block and "core id" in block
    }
    if not cores:
        siblings = ROOT.glob("sys/devices/system/cpu/cpu[0-9]*/topology/thread_siblings_list")
        cores = {("", text) for text in map(_read, siblings) if text}
    darwin = _sysctl("hw.physicalcpu")
    return len(cores) or (int(darwin) if darwin else None)


def _frequency_mhz(blocks: list[dict[str, str]]) -> dict[str, float | None]:
    """Of CPU 0: what it runs at now, and the limits it may move in."""
    folder = "sys/devices/system/cpu/cpu0/cpufreq"
    current = _number(f"{folder}/scaling_cur_freq")
    if current is None and blocks and "cpu mhz" in blocks[0]:
        current = float(blocks[0]["cpu mhz"]) * 1e3
    limits = {
        "now": current,
        "min": _number(f"{folder}/scaling_min_freq"),
        "max": _number(f"{folder}/scaling_max_freq"),
    }
    return {name: khz / 1e3 if khz is not None else None for name, khz in limits.items()}


# --- what the system grants -----------------------------------------------------------------------


def _affinity() -> list[int] | None:
    return sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None


def _cgroup_cpus() -> float | None:
    """The tightest CPU quota of this process's cgroup and those above it (v2, then v1)."""
    quotas: list[float] = []
    for line in (_text("proc/self/cgroup") or "").splitlines():
        _, controllers, path = line.split(":", 2)
        if not controllers:
            quotas += _quotas("sys/fs/cgroup", path, _quota_v2)
        elif "cpu" in controllers.split(","):
            for mount in (controllers, "cpu"):
                quotas += _quotas(f"sys/fs/cgroup/{mount}", path, _quota_v1)
    return min(quotas, default=None)


def _quotas(mount: str, path: str, read: Callable[[Path], float | None]) -> Iterator[float]:
    """Quotas from the leaf up to the mount. Inside a container the path may not be visible, but
    the mount then is the container's own group."""
    base = ROOT / mount
    leaf = base / path.lstrip("/")
    for folder in (leaf, *leaf.parents):
        quota = read(folder)
        if quota is not None:
            yield quota
        if folder == base:
            break


def _quota_v2(folder: Path) -> float | None:
    words = (_read(folder / "cpu.max") or "max").split()
    return None if words[0] == "max" else int(words[0]) / int(words[1])


def _quota_v1(folder: Path) -> float | None:
    quota, period = _read(folder / "cpu.cfs_quota_us"), _read(folder / "cpu.cfs_period_us")
    return int(quota) / int(period) if quota and period and int(quota) > 0 else None


def _memory_bytes() -> int | None:
    for line in (_text("proc/meminfo") or "").splitlines():
        if line.startswith("MemTotal:"):
            return int(line.split()[1]) * 1024
    darwin = _sysctl("hw.memsize")
    return int(darwin) if darwin else None


def _virtualization(blocks: list[dict[str, str]]) -> str | None:
    """What hides the real machine, as far as it shows; None is no proof of bare metal."""
    hints: list[str] = []
    if any("hypervisor" in block.get("flags", "").split() for block in blocks):
        product = _text("sys/class/dmi/id/product_name")
        hints.append(f"virtual machine ({product})" if product else "virtual machine")
    groups = _text("proc/1/cgroup") or ""
    if (
        (ROOT / ".dockerenv").exists()
        or (ROOT / "run/.containerenv").exists()
        or any(word in groups for word in ("docker", "kubepods", "containerd", "lxc"))
    ):
        hints.append("container")
    if _sysctl("kern.hv_vmm_present") == "1":
        hints.append("virtual machine")
    return ", ".join(hints) or None


def _load_average() -> list[float] | None:
    try:
        return [round(load, 2) for load in os.getloadavg()]
    except (AttributeError, OSError):
        return None


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


# --- reading --------------------------------------------------------------------------------------


def _text(path: str) -> str | None:
    return _read(ROOT / path)


def _number(path: str) -> float | None:
    text = _text(path)
    return float(text) if text and text.isdigit() else None


def _read(path: Path) -> str | None:
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    return text.strip(" \t\n\0") or None


def _sysctl(key: str) -> str | None:
    """One macOS value; None elsewhere and for keys this Mac lacks."""
    if platform.system() != "Darwin":
        return None
    try:
        done = subprocess.run(
            ["/usr/sbin/sysctl", "-n", key],
            capture_output=True,
            text=True,
            timeout=5,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None if done.returncode == 0 else None
