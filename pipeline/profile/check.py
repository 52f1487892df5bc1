"""`compress devices check NAME`: what a device is, what it would run with, what will go wrong."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...exporters.stamp import IR_BY_RUNTIME, OPSET_BY_RUNTIME
from ..errors import RuntimeFailure
from . import pitfalls
from .devices import EmulatedDevice, LocalDevice, SshDevice
from .inputs import Signature, signature_of
from .kernels import int8_kernels
from .pitfalls import Finding
from .ssh import Board
from .transport import libraries, measured_on, opened, survey

COPIES_IN_MEMORY = 3  # of a file: itself, the graph, weights packed for the kernels


@dataclass(frozen=True)
class Checked:
    """lines: what it is, for a person. exit_code: 5 where a measurement would fail."""

    lines: tuple[str, ...]
    findings: tuple[Finding, ...]
    exit_code: int


def check(
    name: str, device: LocalDevice | SshDevice | EmulatedDevice, *, model: Path | None, threads: int
) -> Checked:
    """Connects, asks, imports onnxruntime there, and leaves nothing behind.

    Raises:
        RuntimeFailure: it cannot be reached, or has no Python. ExportError: no ONNX file.
    """
    signature = None if model is None else signature_of(model)
    with opened(name, device) as machine:
        if isinstance(machine, Board) and machine.device.perf_test is not None:
            return _without_python(machine)
        facts = survey(machine)
        lines = _described(facts)
        try:
            versions, words = libraries(machine)
        except RuntimeFailure as error:
            return Checked(tuple(lines), (Finding("ISA", "invalid", str(error)),), 5)
        lines.append(f"onnxruntime   {versions['onnxruntime']}, numpy {versions['numpy']}")
        findings = [
            *pitfalls.deadly_wheel(facts["machine"], versions["onnxruntime"]),
            *pitfalls.unknown_cpu(words),
            *pitfalls.governor(facts["condition"]),
            *pitfalls.slowed_down(facts["condition"], facts["condition"]),
            *pitfalls.under_pressure(facts["condition"]),
            *pitfalls.unlike_cores(facts["clusters"], None),
            *pitfalls.too_many_threads(facts["machine"], threads),
            *pitfalls.stand_in(measured_on(machine)),
        ]
        if model is not None and signature is not None:
            findings += of_model(signature, versions["onnxruntime"])
            findings += pitfalls.little_memory(
                facts["condition"]["memory_available_bytes"],
                COPIES_IN_MEMORY * model.stat().st_size,
            )
    failing = any(one.severity == "invalid" for one in findings)
    return Checked(tuple(lines), tuple(dict.fromkeys(findings)), 5 if failing else 0)


def of_model(signature: Signature, runtime: str) -> list[Finding]:
    """NEWER, OPTFILE: what is in the file's own header."""
    found = pitfalls.baked_layout(signature.domains)
    release = tuple(int(part) for part in runtime.split(".")[:2])
    known = [  # a release newer than the tables may read more
        (what, value, next((top for since, top in table if release >= since), 0))
        for what, value, table in (
            ("IR version", signature.ir_version, IR_BY_RUNTIME),
            ("opset", signature.opset, OPSET_BY_RUNTIME),
        )
        if release <= table[0][0]
    ]
    for what, value, top in known:
        if value > top:
            text = (
                f"the model has {what} {value}, onnxruntime {runtime} reads up to {top}: update "
                "it, or export again with an older export.min_runtime"
            )
            found.append(Finding("NEWER", "invalid", text))
    return found


def _described(facts: dict[str, Any]) -> list[str]:
    machine, now = facts["machine"], facts["condition"]
    clusters = "; ".join(
        f"{len(one['cpus'])} × {one['part'] or 'alike'}"
        + (f" up to {one['max_mhz']:.0f} MHz" if one["max_mhz"] else "")
        for one in facts["clusters"]
    )
    frequencies = [mhz for mhz in now["frequency_mhz"] if mhz]
    quota = machine["cgroup_cpus"]
    temperature = now["temperature_c"]
    flags = now["power_flags"]
    return [
        f"machine       {machine['board'] or machine['platform']}",
        f"CPU           {machine['cpu_model'] or 'unknown'}, {machine['arch']}; {clusters}",
        f"features      {' '.join(machine['features']) or 'none known'}",
        f"int8 kernels  {int8_kernels(machine['arch'], machine['features'])}",
        f"usable CPUs   {machine['available_threads']}"
        + (f" (cgroup quota {quota:g})" if quota is not None else ""),
        f"governor      {', '.join(now['governors']) or 'unknown'}"
        + (f", now {max(frequencies):.0f} MHz" if frequencies else ""),
        f"temperature   {'unknown' if temperature is None else f'{temperature:.0f} °C'}, "
        f"power flags {'unknown' if flags is None else hex(flags)}",
        f"memory        {(now['memory_available_bytes'] or 0) / 1e6:.0f} MB free of "
        f"{(machine['memory_bytes'] or 0) / 1e6:.0f} MB",
        f"Python        {machine['python']} ({facts['python']}), "
        f"{machine['libc'] or 'libc unknown'}",
    ]


def _without_python(board: Board) -> Checked:
    note = "measured through onnxruntime_perf_test: its CPU, condition and answers are not seen"
    line = f"program       {board.device.perf_test}"
    return Checked((line,), (Finding("UNSEEN", "note", note),), 0)
