"""One child process that times a network: start, ask, bury. Knows the protocol, not the schedule.

The child is `latency_agent.py`; this file starts it, exchanges JSON lines with it under a time
limit, and turns a death or a silence into a RuntimeFailure that says why. Children never stay
behind: `running` ends them on every way out, and a child whose parent was killed sees the end of
its standard input.

Where the child runs is a Target: here, or what `profile/` makes of a board and of an emulator.
Whatever starts the child there is a process here with the child's pipes, so nothing else changes.
"""

from __future__ import annotations

import json
import os
import selectors
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Protocol

from ..errors import MeasurementError, RuntimeFailure

AGENT = Path(__file__).with_name("latency_agent.py")
# What the agent needs beside it; all of it is standard library and Python 3.9.
BOARD_FILES = (
    "latency_agent.py",
    "condition.py",
    "machine.py",
    "resources.py",
    "throttling.py",
)

ANSWER_SECONDS = 300.0  # longest silence; a warm-up is 10 runs, whatever they take
EXIT_SECONDS = 5.0  # from closing its output to being gone
LAST_LINES = 12  # of standard error, in the message about a death
LAST_BYTES = 8192

SIGNALS = {
    "SIGILL": "illegal instruction: this {runtime} wheel needs CPU features the machine lacks; "
    "install another release of it",
    "SIGKILL": "killed from outside, most often because memory ran out; free some or time a "
    "smaller network",
    "SIGSEGV": "invalid memory access inside {runtime}; install another release of it",
    "SIGBUS": "invalid memory access, or a model file that shrank or a disk that failed",
    "SIGABRT": "{runtime} gave up",
}


@dataclass(frozen=True)
class Placed:
    """A file or folder as the agent finds it. `sha256` of a copy: the agent holds it against it."""

    path: str
    sha256: str | None = None


class Target(Protocol):
    """A machine on which the agent can run.

    Attributes:
        name: of the device.
        greeting: a line that comes before the agent's first; what precedes it is thrown away,
            for the login of a board may print. Empty: there is none.
        live: processes that serve it now; whoever gives up ends them.
    """

    name: str
    greeting: bytes
    live: list[subprocess.Popen[bytes]]

    def command(self) -> list[str]:
        """Starts one agent, its pipes being those of this process."""

    def place(self, path: Path) -> Placed:
        """Where the agent finds this file or folder; brings it there if need be."""

    def explain(self, code: int, words: str, *, runtime: str) -> str:
        """Why the agent ended: its exit code and last words on standard error."""


class Here:
    """This machine."""

    name = "local"
    greeting = b""

    def __init__(self) -> None:
        self.live: list[subprocess.Popen[bytes]] = []

    def command(self) -> list[str]:
        # -P: the agent's folder must not shadow the modules that it imports
        return [sys.executable, "-P", str(AGENT)]

    def place(self, path: Path) -> Placed:
        return Placed(str(path))

    def explain(self, code: int, words: str, *, runtime: str) -> str:  # noqa: ARG002
        return explain_exit(code, runtime=runtime)


@dataclass(frozen=True)
class Child:
    """A running agent, and for whom it runs (`who` opens every message about it)."""

    target: Target
    process: subprocess.Popen[bytes]
    stderr: IO[bytes]
    who: str
    runtime: str
    facts: dict[str, Any]  # its answer to `start`: runtime, versions, pid
    pending: bytearray  # of an answer that has not ended yet

    def ask(self, do: str, **fields: Any) -> dict[str, Any]:
        """Sends one command and waits for its answer."""
        self.send(do, **fields)
        return self.receive(do)

    def send(self, do: str, **fields: Any) -> None:
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(json.dumps({"do": do, **fields}).encode() + b"\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            raise self._death(do) from None

    def receive(self, do: str) -> dict[str, Any]:
        """The answer to `do`.

        Raises: RuntimeFailure if the child died, fell silent for ANSWER_SECONDS or answered
        something else; MeasurementError if its threads went on computing after the answer.
        """
        line = self._line(do)
        try:
            answer = json.loads(line)
        except ValueError:
            answer = None
        if not isinstance(answer, dict) or answer.get("did") != do:
            raise RuntimeFailure(
                f"{self.who}: expected the answer to `{do}`, got {line[:200]!r}; "
                f"the measuring process and its driver are of different versions"
            )
        if answer.get("quiet") is False:
            raise MeasurementError(
                f"{self.who}: after `{do}` its threads kept the CPU busy for "
                f"{answer['quiet_seconds']:.0f} s, expected idle: the other networks' timings "
                f"would be wrong. Report the {self.runtime} version"
            )
        return answer

    def _line(self, do: str) -> bytes:
        deadline = time.monotonic() + ANSWER_SECONDS
        if do == "start" and self.target.greeting:
            while self._next_line(do, deadline) != self.target.greeting:
                pass
        return self._next_line(do, deadline)

    def _next_line(self, do: str, deadline: float) -> bytes:
        assert self.process.stdout is not None
        with selectors.DefaultSelector() as selector:
            selector.register(self.process.stdout, selectors.EVENT_READ)
            while b"\n" not in self.pending:
                if not selector.select(max(deadline - time.monotonic(), 0.0)):
                    raise RuntimeFailure(
                        f"{self.who}: no answer to `{do}` within {ANSWER_SECONDS:g} s; the "
                        f"measuring process hung and was ended{_quoted(self._words())}"
                    )
                piece = os.read(self.process.stdout.fileno(), 1 << 16)
                if not piece:
                    raise self._death(do)
                self.pending.extend(piece)
        line, _, rest = bytes(self.pending).partition(b"\n")
        self.pending[:] = rest
        return line

    def _death(self, do: str) -> RuntimeFailure:
        try:
            code = self.process.wait(EXIT_SECONDS)
        except subprocess.TimeoutExpired:
            return RuntimeFailure(f"{self.who}: closed its output during `{do}` yet runs on")
        words = self._words()
        why = self.target.explain(code, words, runtime=self.runtime)
        return RuntimeFailure(
            f"{self.who}: the measuring process died during `{do}` ({why}){_quoted(words)}"
        )

    def _words(self) -> str:
        # pread: the child writes through the same file position, which must not move
        descriptor = self.stderr.fileno()
        start = max(os.fstat(descriptor).st_size - LAST_BYTES, 0)
        return os.pread(descriptor, LAST_BYTES, start).decode("utf-8", "replace")


def _quoted(words: str) -> str:
    lines = words.splitlines()[-LAST_LINES:]
    return ". Its last words:" + "".join(f"\n  {line}" for line in lines) if lines else ""


def explain_exit(code: int, *, runtime: str) -> str:
    """What a child's exit status means: `SIGILL, illegal instruction: …` or `exit status 1`."""
    if code >= 0:
        return f"exit status {code}"
    try:
        name = signal.Signals(-code).name
    except ValueError:  # a real-time signal has a number only
        return f"signal {-code}"
    meaning = SIGNALS.get(name)
    return f"{name}, {meaning.format(runtime=runtime)}" if meaning else name


@contextmanager
def running(rows: Sequence[tuple[str, str]], target: Target | None = None) -> Iterator[list[Child]]:
    """One fresh child per (who, kind), runtimes imported, side by side; all ended on the way out.

    On `target`; None: here.

    Importing torch takes a second of CPU, so the children start together; what is timed later
    never runs together.
    """
    with ExitStack() as stack:
        where = Here() if target is None else target
        children = [stack.enter_context(_child(where, who, kind)) for who, kind in rows]
        for child, (_, kind) in zip(children, rows, strict=True):
            child.send("start", kind=kind)
        for child in children:
            child.facts.update(child.receive("start"))
        yield children


@contextmanager
def _child(target: Target, who: str, kind: str) -> Iterator[Child]:
    with tempfile.TemporaryFile() as stderr:
        process = subprocess.Popen(
            target.command(),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=stderr,
        )
        target.live.append(process)
        try:
            runtime = "torch" if kind == "torch" else "onnxruntime"
            yield Child(target, process, stderr, who, runtime, {}, bytearray())
        finally:
            target.live.remove(process)
            process.kill()  # it holds nothing worth a farewell
            process.wait()
            for pipe in (process.stdin, process.stdout):
                # closing flushes what a dead child did not read
                with suppress(BrokenPipeError):
                    if pipe is not None:
                        pipe.close()
