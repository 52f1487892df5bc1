"""This machine, alone and under qemu: one measurement at a time."""

from __future__ import annotations

import fcntl
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

from ..errors import OutputError, UsageError
from ..measure import agent_process
from ..measure.agent_process import Here, Placed
from .devices import EmulatedDevice
from .failures import explain_death


@contextmanager
def measuring_here() -> Iterator[None]:
    """A lock: two measurements at once would disturb each other. It dies with its process.

    Raises:
        OutputError: another one is running.
    """
    folder = os.environ.get("XDG_RUNTIME_DIR") or tempfile.gettempdir()
    path = Path(folder, f"edgestill-{os.getuid()}-here.lock")
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise OutputError(
                f"{path}: another measurement runs on this machine, and two would disturb each "
                "other; wait for it"
            ) from None
        yield
    finally:
        os.close(descriptor)


class HereWithPython(Here):
    """This machine, of which other questions are asked too."""

    kind: Literal["local", "ssh", "emulated"] = "local"

    def run_python(self, code: str, *arguments: str) -> list[str]:
        return [sys.executable, "-P", "-c", code, *arguments]

    def folder(self) -> str:
        return str(agent_process.AGENT.parent)


class Emulated:
    """A CPU that this machine has not, under qemu. Its files are this machine's."""

    kind: Literal["local", "ssh", "emulated"] = "emulated"
    greeting = b""

    def __init__(self, name: str, device: EmulatedDevice) -> None:
        """Raises: UsageError: the sysroot is none."""
        runner = device.sysroot / "run"
        if not os.access(runner, os.X_OK):
            raise UsageError(
                f"device {name}: {device.sysroot} has no program `run`; build it with "
                "scripts/arm_sysroot DIR, and write DIR into devices.yaml"
            )
        self.name = name
        self.live: list[subprocess.Popen[bytes]] = []
        self._start = [str(runner), device.cpu]

    def command(self) -> list[str]:
        return [*self._start, str(agent_process.AGENT.resolve())]

    def run_python(self, code: str, *arguments: str) -> list[str]:
        return [*self._start, "-c", code, *arguments]

    def folder(self) -> str:
        return str(agent_process.AGENT.parent.resolve())

    def place(self, path: Path) -> Placed:
        return Placed(str(path.resolve()))

    def explain(self, code: int, words: str, *, runtime: str) -> str:
        return explain_death(
            code, words, runtime=runtime, device=self.name, python="the sysroot's Python"
        )
