"""The schedule of a measurement: which network runs when, in which process.

A launch is one fresh process a network, all alive at once, one running at a time, in turns
A B C · C B A · A B C (the next launch starts with C B A), so that heat, clock changes and other
people's load fall on all alike. An idle child sleeps on its standard input; before it answers a
block it waits until its threads have stopped spinning, so it takes nothing from the one that runs.
Settings (threads, spinning, affinity) are measured one after the other in the same processes, each
with a freshly loaded network.

Answers are held against the expected ones before and after the timed runs: a fast wrong answer is
an error. `latency_agent.py` does the timing, `agent_process.py` looks after the children.
"""

from __future__ import annotations

import base64
import itertools
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from ..errors import MeasurementError
from ..stage import Events
from .agent_process import Child, Here, Placed, Target, running

Inputs = npt.NDArray[Any] | Mapping[str, npt.NDArray[Any]]

BLOCKS = 3  # a network, launch and setting
BLOCK_SECONDS = 1.0
BLOCK_LEAST_RUNS = 5  # whatever they take
WARM_SECONDS = 1.0  # warming ends here even if not steady; most networks need a tenth
SUSTAINED_BLOCK_SECONDS = 5.0  # long, for the network rests between two of them
KEPT_SECONDS = 60.0  # of a sustained load: the runs of its first and of its last minute


@dataclass(frozen=True)
class Row:
    """A network to time. `path`: an .onnx file, or a folder written by `save_network`.

    `expected`: logits of the inputs, (N, C), or None. They are compared before and after the timed
    runs, so that a fast wrong answer is an error. `tolerance` is a share of the largest
    |expected|: a few int8 steps, and far from what another network would answer.
    """

    name: str
    kind: Literal["onnx", "torch"]
    path: Path
    expected: npt.NDArray[np.float32] | None = None
    tolerance: float = 0.05


@dataclass(frozen=True)
class Setting:
    """How a network is run. None: as the runtime and the system do it by themselves."""

    threads: int
    spinning: bool | None = None
    affinity: tuple[int, ...] | None = None


@dataclass(frozen=True)
class Plan:
    """How much is measured.

    Attributes:
        launches: fresh processes a row.
        runs: timed inferences a row, launch and setting; a cap, for a block ends after
            BLOCK_SECONDS.
        rate_hz: runs begin so often, with sleep in between; None: back to back.
        sustained_s: blocks follow each other so long; None: there are BLOCKS of them.
        watched: the machine's condition is asked around each launch, and each network is loaded
            with its file out of the page cache first and then again.
    """

    launches: int
    runs: int
    settings: tuple[Setting, ...]
    rate_hz: float | None = None
    sustained_s: float | None = None
    watched: bool = False


@dataclass
class Sample:
    """One row, one setting, one launch.

    Attributes:
        opened: the agent's answer to `open`; cold: of the load before it, with a cold file.
        reference: logits, (N, C), that its answers are held against: the expected ones, or its own
            first ones. answered: its own first ones.
        blocks: (seconds since the measurement began, median ns) of each.
    """

    row: Row
    setting: Setting
    opened: dict[str, Any]
    reference: npt.NDArray[np.float32]
    answered: npt.NDArray[np.float32]
    cold: dict[str, Any] | None = None
    steady: bool = False
    durations_ns: list[int] = field(default_factory=list)
    blocks: list[tuple[float, float]] = field(default_factory=list)
    runs: int = 0  # more than durations_ns of a sustained load
    cpu_seconds: float = 0.0
    peak_rss_bytes: int = 0


@dataclass(frozen=True)
class Taken:
    """samples, in the order taken; conditions: (before, after), each a list of what the children of
    a launch say, one pair a launch, where the plan watches."""

    samples: list[Sample]
    conditions: list[tuple[list[dict[str, Any]], list[dict[str, Any]]]]


def take(
    rows: Sequence[Row],
    inputs: Inputs,
    plan: Plan,
    *,
    events: Events,
    target: Target | None = None,
) -> Taken:
    """Runs the plan on `target`, or here.

    Args:
        rows: networks, their names unique.
        inputs: an array for the one input, packed tokens, or an array for each input; N samples.

    Events: `latency_block` for each timed block, progress.

    Raises:
        MeasurementError: unlike fixed batches, logits that are not finite or not the expected
            ones, a duration that is not positive.
        RuntimeFailure: a child that died or hung.
    """
    where = Here() if target is None else target
    clock = _Clock(plan, rows=len(rows), events=events)
    taken = Taken([], [])
    with stored(inputs) as local:
        placed = [where.place(local), *(where.place(row.path) for row in rows)]
        for launch in range(plan.launches):
            about = f"launch {launch + 1} of {plan.launches}"
            on = "" if where.name == "local" else f" on {where.name}"
            who = [(f"latency of {row.name} ({row.path}){on}, {about}", row.kind) for row in rows]
            with running(who, where) as children:
                before = [child.ask("condition") for child in children] if plan.watched else []
                turned = plan.watched and launch % 2 == 1
                for at, setting in enumerate(plan.settings[::-1] if turned else plan.settings):
                    cold = plan.watched and at == 0
                    opened = _open_all(children, rows, placed, setting=setting, cold=cold)
                    _take_turns(children, opened, plan, launch=launch, clock=clock)
                    _close_all(children, opened)
                    taken.samples.extend(opened)
                if plan.watched:
                    after = [child.ask("condition") for child in children]
                    taken.conditions.append((before, after))
    return taken


def block_order(count: int, turn: int) -> list[int]:
    """Who goes when, by index: forward in even turns, backward in odd ones (ABBA)."""
    order = list(range(count))
    return order if turn % 2 == 0 else order[::-1]


@contextmanager
def stored(inputs: Inputs) -> Iterator[Path]:
    """The inputs as a file that the agent reads."""
    with tempfile.TemporaryDirectory(prefix="edgestill-latency-") as folder:
        path = Path(folder) / "inputs.npy"
        if isinstance(inputs, np.ndarray):
            np.save(path, np.ascontiguousarray(inputs), allow_pickle=False)
        else:
            path = path.with_suffix(".npz")
            arrays: dict[str, Any] = {n: np.ascontiguousarray(one) for n, one in inputs.items()}
            np.savez(path, allow_pickle=False, **arrays)
        yield path


class _Clock:
    """Tells how far the plan is."""

    def __init__(self, plan: Plan, *, rows: int, events: Events) -> None:
        self.begin, self.events = time.monotonic(), events
        self.total = plan.launches * len(plan.settings) * BLOCKS * rows
        self.sustained_s = plan.sustained_s
        self.done = itertools.count(1)

    def now(self) -> float:
        return time.monotonic() - self.begin

    def tick(self, note: str) -> None:
        if self.sustained_s is None:
            self.events.progress(next(self.done), self.total, note)
        else:
            self.events.progress(min(self.now(), self.sustained_s), self.sustained_s, note)


def _open_all(
    children: Sequence[Child],
    rows: Sequence[Row],
    placed: Sequence[Placed],
    *,
    setting: Setting,
    cold: bool,
) -> list[Sample]:
    """Loads every network, one after the other; ONNX first, for its file may fix the batch."""
    samples: dict[int, Sample] = {}
    batch = 1
    inputs, *files = placed
    for index in sorted(range(len(rows)), key=lambda index: rows[index].kind == "torch"):
        child, row, file = children[index], rows[index], files[index]
        fields = {
            "path": file.path,
            "inputs": inputs.path,
            "threads": setting.threads,
            "batch": batch,
            "spinning": setting.spinning,
            "affinity": setting.affinity,
        }
        digests = {one.path: one.sha256 for one in (inputs, file) if one.sha256 is not None}
        first = None
        if cold:
            first = child.ask("open", **fields, sha256=digests, cold=True)
            child.ask("close")
        opened = child.ask("open", **fields, sha256=digests)
        if samples and opened["batch"] != batch:
            raise MeasurementError(
                f"{child.who}: its graph takes batches of {opened['batch']}, the others of "
                f"{batch}; export all of them with the same export.batch"
            )
        batch = opened["batch"]
        logits = logits_of(child)
        reference = logits if row.expected is None else row.expected
        _check_logits(child, row, logits, reference)
        facts = {**child.facts, **opened}
        samples[index] = Sample(row, setting, facts, reference, logits, cold=first)
    return [samples[index] for index in range(len(rows))]


def _take_turns(
    children: Sequence[Child],
    samples: Sequence[Sample],
    plan: Plan,
    *,
    launch: int,
    clock: _Clock,
) -> None:
    """Warms each, then runs the interleaved blocks."""
    for child, sample in zip(children, samples, strict=True):
        sample.steady = child.ask("warm", seconds=WARM_SECONDS)["steady"]
    begin = clock.now()
    for block in itertools.count():
        over = clock.now() - begin
        if block >= BLOCKS if plan.sustained_s is None else over >= plan.sustained_s:
            break
        for index in block_order(len(samples), launch + block):
            child, sample = children[index], samples[index]
            answer = child.ask("run", **_block(plan, block))
            durations = _positive(child, answer["durations_ns"])
            p50_ns = median(durations)
            is_kept = plan.sustained_s is None or not (
                KEPT_SECONDS <= over < plan.sustained_s - KEPT_SECONDS
            )
            sample.durations_ns += durations if is_kept else []
            sample.blocks.append((clock.now(), p50_ns))
            sample.runs += len(durations)
            sample.cpu_seconds += answer["cpu_seconds"]
            sample.peak_rss_bytes = max(sample.peak_rss_bytes, answer["peak_rss_bytes"])
            clock.events.record(
                "latency_block",
                launch=launch,
                threads=sample.setting.threads,
                block=block,
                row=sample.row.name,
                runs=len(durations),
                p50_ms=p50_ns / 1e6,
            )
            clock.tick(f"{sample.row.name} {p50_ns / 1e6:.3g} ms, {sample.setting.threads} threads")


def _block(plan: Plan, block: int) -> dict[str, Any]:
    """What one block is asked for."""
    pace = {} if plan.rate_hz is None else {"rate_hz": plan.rate_hz}
    if plan.sustained_s is not None:
        seconds = min(SUSTAINED_BLOCK_SECONDS, plan.sustained_s)
        return {"runs": 10**9, "least": BLOCK_LEAST_RUNS, "seconds": seconds, **pace}
    share = plan.runs // BLOCKS + (block < plan.runs % BLOCKS)
    # paced runs take their time: as many of them as make a median, whatever that is
    seconds = BLOCK_SECONDS if plan.rate_hz is None else max(BLOCK_SECONDS, 10 / plan.rate_hz)
    return {"runs": share, "least": min(BLOCK_LEAST_RUNS, share), "seconds": seconds, **pace}


def _close_all(children: Sequence[Child], samples: Sequence[Sample]) -> None:
    """Still the same answers after the timed runs? Then the networks may go."""
    for child, sample in zip(children, samples, strict=True):
        # one batch: all of them were checked at the start, and a slow network is slow here too
        logits = logits_of(child, batches=1)
        _check_logits(child, sample.row, logits, sample.reference[: len(logits)])
        child.ask("close")


def _positive(child: Child, durations: list[int]) -> list[int]:
    if not durations or min(durations) <= 0:
        raise MeasurementError(
            f"{child.who}: expected positive durations, got {min(durations, default='none')} ns; "
            f"this machine's clock is too coarse for so fast a network, or runs backwards"
        )
    return durations


def logits_of(
    child: Child, *, start: int = 0, batches: int | None = None
) -> npt.NDArray[np.float32]:
    """Its answers to `batches` batches of the inputs from `start` on, None: to all that follow."""
    answer = child.ask("outputs", start=start, batches=batches)
    raw = np.frombuffer(base64.b64decode(answer["logits"]), dtype="<f4")
    return raw.reshape(answer["shape"]).astype(np.float32)


def _check_logits(
    child: Child,
    row: Row,
    logits: npt.NDArray[np.float32],
    reference: npt.NDArray[np.float32],
) -> None:
    if not np.isfinite(logits).all():
        raise MeasurementError(
            f"{child.who}: its logits hold NaN or infinity; a broken network's speed proves nothing"
        )
    if logits.shape != reference.shape:
        raise MeasurementError(
            f"{child.who}: expected logits of shape {reference.shape}, got {logits.shape}"
        )
    error = float(np.abs(logits - reference).max())
    limit = row.tolerance * float(np.abs(reference).max())
    # written so that a NaN among the expected ones fails too
    if not error <= limit:
        raise MeasurementError(
            f"{child.who}: its logits are {error:.3g} away from the expected ones, at most "
            f"{limit:.3g} allowed: what was timed is not the network that was verified. Check "
            f"that the file belongs to this run, and run again with --fresh"
        )
