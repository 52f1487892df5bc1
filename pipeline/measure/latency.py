"""How fast each network is, measured side by side so that the figures can be compared.

Says when which network runs and what the figures mean; `latency_agent.py` does the timing in child
processes, `agent_process.py` looks after those, `latency_stats.py` condenses.

The schedule. A launch is one fresh process a network, all alive at once, one running at a time, in
turns A B C · C B A · A B C (the next launch starts with C B A), so that heat, clock changes and
other people's load fall on all alike. An idle child sleeps on its standard input; before it
answers a block it waits until its threads have stopped spinning, so it takes nothing from the one
that runs. Thread counts are measured one after the other in the same processes, each with a
freshly loaded network.

The price. `runs` is a cap: a block ends after BLOCK_SECONDS, so a network slower than
BLOCKS · BLOCK_SECONDS / runs gets fewer, and `n` says how many. Worst case, per network, launch and
thread count: WARM_SECONDS + BLOCKS · BLOCK_SECONDS + 1 s for a network of 60 ms; beyond 200 ms
each of them is about 40 runs. Five toy networks, two of them in torch, take 11 to 18 s for
3 launches of 200 runs at two thread counts on 2 cores, most of it spent importing torch.

Torch rows show what the network costs before export.
"""

from __future__ import annotations

import base64
import itertools
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from ..errors import MeasurementError
from ..stage import Events
from .agent_process import Child, running
from .latency_stats import ratio_of, summarize
from .machine import available_threads

LEAST_INPUTS = 8  # rotated; one input for ever would flatter caches and branch prediction
BLOCKS = 3  # a network, launch and thread count
BLOCK_SECONDS = 1.0
BLOCK_LEAST_RUNS = 5  # whatever they take
WARM_SECONDS = 1.0  # warming ends here even if not steady; most networks need a tenth


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


@dataclass
class _Sample:
    """One row, one thread count, one launch."""

    row: Row
    threads: int
    opened: dict[str, Any]  # the agent's answer to `open`
    reference: npt.NDArray[np.float32]  # logits that its answers are held against
    steady: bool = False
    durations_ns: list[int] = field(default_factory=list)
    cpu_seconds: float = 0.0
    peak_rss_bytes: int = 0


def measure_latency(
    rows: Sequence[Row],
    inputs: npt.NDArray[Any],
    *,
    launches: int,
    runs: int,
    threads: tuple[int, ...],
    events: Events,
) -> list[dict[str, Any]]:
    """Times every row at every thread count, in turns.

    Args:
        rows: networks, their names unique.
        inputs: at least 8 real prepared inputs, float32 (N, C, H, W) or int64 (N, K, S).
        launches: fresh processes a row, at least 2: intervals come from their spread.
        runs: timed inferences a row, launch and thread count; a cap, see the module's docstring.
        threads: thread counts; a repeated one is measured once.

    Returns: a JSON-able dict per thread count and row, in that order:
        name, runs_in ("onnxruntime" or "torch"), threads;
        p50_ms, p50_ci95_ms ([low, high]), min_ms, mad_ms, cv;
        p90_ms, p95_ms, p99_ms (upper bounds at 99 % confidence, None where n is too small);
        launch_p50_ms ([lowest, highest] launch median), n (of all launches), launches;
        load_ms, first_ms (medians over launches; the first thread count's are a fresh process's);
        cpu_ms (CPU time of one inference: all threads, spinning included);
        peak_rss_bytes (whole process, largest launch); raw_ns (a list a launch).

        Times are of one call with one image, or with the batch that the graphs fix (noted).

    Events: `latency_settings` (runtime, version, session options) once a row and thread count,
    `latency_block` for each timed block, a note for a warm-up that did not settle.

    Raises:
        MeasurementError: too few inputs, more threads than CPUs, unlike fixed batches, logits
            that are not finite or not the expected ones, a duration that is not positive.
        RuntimeFailure: a child that died or hung.
    """
    counts = tuple(dict.fromkeys(threads))
    _check_request(rows, inputs, launches=launches, runs=runs, counts=counts)
    total = launches * len(counts) * BLOCKS * len(rows)
    done = itertools.count(1)

    def tick(note: str) -> None:
        events.progress(next(done), total, note)

    samples: list[_Sample] = []
    with _stored(inputs) as stored:
        for launch in range(launches):
            about = f"launch {launch + 1} of {launches}"
            who = [(f"latency of {row.name} ({row.path}), {about}", row.kind) for row in rows]
            with running(who) as children:
                for count in counts:
                    opened = _open_all(children, rows, inputs=stored, threads=count)
                    _take_turns(
                        children, opened, launch=launch, runs=runs, events=events, tick=tick
                    )
                    _close_all(children, opened)
                    samples += opened
    groups = [
        [s for s in samples if s.row is row and s.threads == count]
        for count in counts
        for row in rows
    ]
    for group in groups:
        _tell(group, events)
    return [_result(group) for group in groups]


def speedup(reference_row: Mapping[str, Any], candidate_row: Mapping[str, Any]) -> dict[str, Any]:
    """How many times faster the candidate is than the reference: two dicts of `measure_latency`.

    Returns: {"ratio": reference p50 / candidate p50, "ci95": [low, high]}; bootstrap paired by
    launch. Raises: MeasurementError for rows that were not measured alike.
    """
    for key in ("threads", "launches"):
        if reference_row[key] != candidate_row[key]:
            raise MeasurementError(
                f"speed-up of {candidate_row['name']} over {reference_row['name']}: {key} is "
                f"{candidate_row[key]} against {reference_row[key]}; measure both together"
            )
    return ratio_of(reference_row["raw_ns"], candidate_row["raw_ns"])


def block_order(count: int, turn: int) -> list[int]:
    """Who goes when, by index: forward in even turns, backward in odd ones (ABBA)."""
    order = list(range(count))
    return order if turn % 2 == 0 else order[::-1]


def _check_request(
    rows: Sequence[Row],
    inputs: npt.NDArray[Any],
    *,
    launches: int,
    runs: int,
    counts: tuple[int, ...],
) -> None:
    assert rows, "nothing to measure"
    assert len({row.name for row in rows}) == len(rows), "row names must be unique"
    assert launches >= 2, "one launch has no spread"
    assert runs >= BLOCKS, "fewer runs than blocks"
    assert min(counts, default=0) >= 1, "no thread count"
    assert (str(inputs.dtype), inputs.ndim) in (("float32", 4), ("int64", 3)), "images, or tokens"
    if len(inputs) < LEAST_INPUTS:
        raise MeasurementError(
            f"latency: expected at least {LEAST_INPUTS} inputs to rotate, got {len(inputs)}; "
            f"give a larger test set"
        )
    if not np.isfinite(inputs).all():
        raise MeasurementError("latency: the inputs hold NaN or infinity; check data.preprocess")
    for row in rows:
        if row.expected is not None and len(row.expected) != len(inputs):
            raise MeasurementError(
                f"latency of {row.name}: {len(row.expected)} expected logits for "
                f"{len(inputs)} inputs"
            )
    if max(counts) > available_threads():
        raise MeasurementError(
            f"latency: {max(counts)} threads asked for, but this process may use "
            f"{available_threads()} CPUs (affinity and cgroup quota); lower compute.threads"
        )


@contextmanager
def _stored(inputs: npt.NDArray[Any]) -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="edgestill-latency-") as folder:
        path = Path(folder) / "inputs.npy"
        np.save(path, np.ascontiguousarray(inputs), allow_pickle=False)
        yield path


def _open_all(
    children: Sequence[Child], rows: Sequence[Row], *, inputs: Path, threads: int
) -> list[_Sample]:
    """Loads every network, one after the other; ONNX first, for its file may fix the batch."""
    samples: dict[int, _Sample] = {}
    batch = 1
    for index in sorted(range(len(rows)), key=lambda index: rows[index].kind == "torch"):
        child, row = children[index], rows[index]
        opened = child.ask(
            "open", path=str(row.path), inputs=str(inputs), threads=threads, batch=batch
        )
        if samples and opened["batch"] != batch:
            raise MeasurementError(
                f"{child.who}: its graph takes batches of {opened['batch']}, the others of "
                f"{batch}; export all of them with the same export.batch"
            )
        batch = opened["batch"]
        logits = _logits(child)
        reference = logits if row.expected is None else row.expected
        _check_logits(child, row, logits, reference)
        samples[index] = _Sample(row, threads, {**child.facts, **opened}, reference)
    return [samples[index] for index in range(len(rows))]


def _take_turns(
    children: Sequence[Child],
    samples: Sequence[_Sample],
    *,
    launch: int,
    runs: int,
    events: Events,
    tick: Callable[[str], None],
) -> None:
    """Warms each, then runs the interleaved blocks; `tick` hears of each with a live figure."""
    for child, sample in zip(children, samples, strict=True):
        sample.steady = child.ask("warm", seconds=WARM_SECONDS)["steady"]
    for block in range(BLOCKS):
        share = runs // BLOCKS + (block < runs % BLOCKS)
        for index in block_order(len(samples), launch + block):
            child, sample = children[index], samples[index]
            answer = child.ask(
                "run", runs=share, least=min(BLOCK_LEAST_RUNS, share), seconds=BLOCK_SECONDS
            )
            durations = _positive(child, answer["durations_ns"])
            sample.durations_ns += durations
            sample.cpu_seconds += answer["cpu_seconds"]
            sample.peak_rss_bytes = max(sample.peak_rss_bytes, answer["peak_rss_bytes"])
            p50_ms = median(durations) / 1e6
            events.record(
                "latency_block",
                launch=launch,
                threads=sample.threads,
                block=block,
                row=sample.row.name,
                runs=len(durations),
                p50_ms=p50_ms,
            )
            tick(f"{sample.row.name} {p50_ms:.3g} ms, {sample.threads} threads")


def _close_all(children: Sequence[Child], samples: Sequence[_Sample]) -> None:
    """Still the same answers after the timed runs? Then the networks may go."""
    for child, sample in zip(children, samples, strict=True):
        # one batch: all of them were checked at the start, and a slow network is slow here too
        logits = _logits(child, batches=1)
        _check_logits(child, sample.row, logits, sample.reference[: len(logits)])
        child.ask("close")


def _positive(child: Child, durations: list[int]) -> list[int]:
    if not durations or min(durations) <= 0:
        raise MeasurementError(
            f"{child.who}: expected positive durations, got {min(durations, default='none')} ns; "
            f"this machine's clock is too coarse for so fast a network, or runs backwards"
        )
    return durations


def _logits(child: Child, *, batches: int | None = None) -> npt.NDArray[np.float32]:
    """Its answers to the first `batches` batches of the inputs, None: to all."""
    answer = child.ask("outputs", batches=batches)
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


def _tell(samples: Sequence[_Sample], events: Events) -> None:
    """How one row was measured at one thread count: what the figures do not say."""
    first, facts = samples[0], samples[0].opened
    told = ("runtime", "runtime_version", "batch", "settings")
    events.record(
        "latency_settings",
        row=first.row.name,
        threads=first.threads,
        **{key: facts[key] for key in told},
    )
    about = f"latency of {first.row.name}, {first.threads} threads"
    restless = sum(not sample.steady for sample in samples)
    if restless:
        events.note(
            f"{about}: in {restless} of {len(samples)} launches it had not settled within 2 % "
            f"after {WARM_SECONDS:g} s of warming; it is slow, or the machine busy"
        )
    if facts["batch"] != 1:
        events.note(f"{about}: of a batch of {facts['batch']}, which the ONNX files fix")


def _result(samples: Sequence[_Sample]) -> dict[str, Any]:
    """One row at one thread count, over all launches."""
    first = samples[0]
    raw_ns = [sample.durations_ns for sample in samples]
    summary = summarize(raw_ns)
    return {
        "name": first.row.name,
        "runs_in": first.opened["runtime"],
        "threads": first.threads,
        **summary,
        "load_ms": median(sample.opened["load_ns"] for sample in samples) / 1e6,
        "first_ms": median(sample.opened["first_ns"] for sample in samples) / 1e6,
        "cpu_ms": sum(sample.cpu_seconds for sample in samples) * 1e3 / summary["n"],
        "peak_rss_bytes": max(sample.peak_rss_bytes for sample in samples),
        "raw_ns": raw_ns,
    }
