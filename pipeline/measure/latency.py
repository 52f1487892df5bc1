"""How fast each network is, measured side by side so that the figures can be compared.

Says what is asked for and what the figures mean; `turns.py` has the schedule, `latency_agent.py`
does the timing in child processes, `latency_stats.py` condenses.

The price. `runs` is a cap: a block ends after BLOCK_SECONDS, so a network slower than
BLOCKS · BLOCK_SECONDS / runs gets fewer, and `n` says how many. Worst case, per network, launch and
thread count: WARM_SECONDS + BLOCKS · BLOCK_SECONDS + 1 s for a network of 60 ms; beyond 200 ms
each of them is about 40 runs. Five toy networks, two of them in torch, take 11 to 18 s for
3 launches of 200 runs at two thread counts on 2 cores, most of it spent importing torch.

Torch rows show what the network costs before export.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any

import numpy as np
import numpy.typing as npt

from ..errors import MeasurementError
from ..stage import Events
from .latency_stats import ratio_of, summarize
from .machine import available_threads
from .throttling import Slowed, read_throttling, slowed_between
from .turns import BLOCKS, WARM_SECONDS, Plan, Row, Sample, Setting, take

LEAST_INPUTS = 8  # rotated; one input for ever would flatter caches and branch prediction


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
        peak_rss_bytes (whole process, largest launch); raw_ns (a list a launch);
        doubts ("unsettled": a launch that warming did not steady; "throttled", "undervolted").

        Times are of one call with one image, or with the batch that the graphs fix (noted).

    Events: `latency_settings` (runtime, version, session options) once a row and thread count,
    `latency_block` for each timed block, a note for a warm-up that did not settle or a machine that
    slowed down.

    Raises:
        MeasurementError: too few inputs, more threads than CPUs, unlike fixed batches, logits
            that are not finite or not the expected ones, a duration that is not positive.
        RuntimeFailure: a child that died or hung.
    """
    counts = tuple(dict.fromkeys(threads))
    _check_request(rows, inputs, launches=launches, runs=runs, counts=counts)
    settings = tuple(Setting(count) for count in counts)
    before = read_throttling()
    taken = take(rows, inputs, Plan(launches, runs, settings), events=events)
    groups = [
        [s for s in taken.samples if s.row is row and s.setting == setting]
        for setting in settings
        for row in rows
    ]
    slowed = slowed_between(before, read_throttling())
    for group in groups:
        _tell(group, events)
    if slowed:
        events.note(
            f"WARNING: latency: this machine was {' and '.join(slowed)} meanwhile: its times prove "
            "nothing; cool or power it, and run again"
        )
    return [figures(group, slowed=slowed) for group in groups]


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


def _tell(samples: Sequence[Sample], events: Events) -> None:
    """How one row was measured at one thread count: what the figures do not say."""
    first, facts = samples[0], samples[0].opened
    told = ("runtime", "runtime_version", "batch", "settings")
    events.record(
        "latency_settings",
        row=first.row.name,
        threads=first.setting.threads,
        **{key: facts[key] for key in told},
    )
    about = f"latency of {first.row.name}, {first.setting.threads} threads"
    restless = sum(not sample.steady for sample in samples)
    if restless:
        events.note(
            f"{about}: in {restless} of {len(samples)} launches it had not settled within 2 % "
            f"after {WARM_SECONDS:g} s of warming; it is slow, or the machine busy"
        )
    if facts["batch"] != 1:
        events.note(f"{about}: of a batch of {facts['batch']}, which the ONNX files fix")


def figures(samples: Sequence[Sample], *, slowed: Sequence[Slowed]) -> dict[str, Any]:
    """One row at one thread count, over all launches."""
    first = samples[0]
    raw_ns = [sample.durations_ns for sample in samples]
    summary = summarize(raw_ns)
    return {
        "name": first.row.name,
        "runs_in": first.opened["runtime"],
        "threads": first.setting.threads,
        **summary,
        "load_ms": median(sample.opened["load_ns"] for sample in samples) / 1e6,
        "first_ms": median(sample.opened["first_ns"] for sample in samples) / 1e6,
        "cpu_ms": sum(sample.cpu_seconds for sample in samples) * 1e3 / summary["n"],
        "peak_rss_bytes": max(sample.peak_rss_bytes for sample in samples),
        "doubts": [*slowed, *(["unsettled"] if not all(s.steady for s in samples) else [])],
        "raw_ns": raw_ns,
    }
