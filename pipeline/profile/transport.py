"""From a device's name to a machine that answers, and what it says of itself."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal, Protocol

from ..errors import RuntimeFailure
from ..measure.agent_process import Target
from .devices import EmulatedDevice, LocalDevice, SshDevice
from .local import Emulated, HereWithPython, measuring_here
from .ssh import connected

SURVEY_SECONDS = 300.0  # importing onnxruntime under qemu, or from a cold SD card
# The files lie flat in a folder; as a package of any name they find each other.
SURVEY = (
    "import sys, types, importlib, json; p = types.ModuleType('measure'); p.__path__ = "
    "[sys.argv[1]]; sys.modules['measure'] = p; "
    "print(json.dumps(importlib.import_module('measure.condition').survey()))"
)
TRIAL = "import numpy, onnxruntime; print(numpy.__version__, onnxruntime.__version__)"


class Machine(Target, Protocol):
    """A target that runs a line of Python too."""

    kind: Literal["local", "ssh", "emulated"]

    def run_python(self, code: str, *arguments: str) -> list[str]:
        """The command for it."""

    def folder(self) -> str:
        """Where the agent's files lie."""


@contextmanager
def opened(name: str, device: LocalDevice | SshDevice | EmulatedDevice) -> Iterator[Machine]:
    """The machine, for us alone until the end.

    Raises:
        RuntimeFailure: it cannot be reached. UsageError: a sysroot that is none. OutputError:
            another measurement runs here.
    """
    if isinstance(device, SshDevice):
        with connected(name, device) as board:
            yield board
        return
    with measuring_here():
        if isinstance(device, EmulatedDevice):
            yield Emulated(name, device)
        else:
            here = HereWithPython()
            here.name = name
            yield here


def measured_on(machine: Machine) -> Literal["target", "emulated"]:
    return "emulated" if machine.kind == "emulated" else "target"


def survey(machine: Machine) -> dict[str, Any]:
    """What `condition.survey` says there.

    Raises:
        RuntimeFailure: no Python 3.9, or the connection broke.
    """
    done = _run(machine, SURVEY, machine.folder())
    if done.returncode:
        raise _failure(machine, done, "python")
    try:
        found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    except (ValueError, IndexError):
        raise RuntimeFailure(
            f"device {machine.name}: expected a description of itself, got {done.stdout[:200]!r}; "
            "does python: in devices.yaml name a Python?"
        ) from None
    return found


def libraries(machine: Machine) -> tuple[dict[str, str], str]:
    """Versions of numpy and onnxruntime there, imported, and what they said on standard error.

    Raises:
        RuntimeFailure: one is missing, or dies on that CPU.
    """
    done = _run(machine, TRIAL)
    if done.returncode:
        raise _failure(machine, done, "onnxruntime")
    versions = done.stdout.split()[-2:]
    return dict(zip(("numpy", "onnxruntime"), versions, strict=True)), done.stderr


def _run(machine: Machine, code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(
            machine.run_python(code, *arguments),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=SURVEY_SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise RuntimeFailure(
            f"device {machine.name}: its Python said nothing for {SURVEY_SECONDS:g} s"
        ) from None


def _failure(
    machine: Machine, done: subprocess.CompletedProcess[str], runtime: str
) -> RuntimeFailure:
    why = machine.explain(done.returncode, done.stderr, runtime=runtime)
    words = [line for line in done.stderr.splitlines() if line.strip()][-4:]
    return RuntimeFailure(
        f"device {machine.name}: {why}" + "".join(f"\n  {line}" for line in words)
    )
