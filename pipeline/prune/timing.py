"""How fast many candidates are, in a few seconds: what a search can afford, not what is reported.

All files live in this process, one thread each, batch 1, and run in turns A B C · C B A, so that
other load falls on all alike. `measure/latency.py` measures what the report says: in processes of
their own, with launches and intervals.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from torch import nn

from ...exporters.feeds import entry_of, feed
from ...exporters.sessions import open_session
from ...exporters.to_onnx import export_onnx

Array = np.ndarray[Any, Any]

ROUNDS = 10
RUN_SECONDS = 0.05  # of one file in one turn
WARM_SECONDS = 0.1
LEAST_RUNS = 3


def export_for_timing(network: nn.Module, inputs: Array, path: Path) -> None:
    """The float ONNX file of batch 1, as torch writes it; onnxruntime folds it itself.

    Args:
        inputs: those it is timed on, (N ≥ 1, C, H, W) or (N ≥ 1, K, S); texts have this length.
    Raises:
        ExportError: the network cannot be exported.
    """
    example = torch.from_numpy(inputs[:1].repeat(2, axis=0))
    export_onnx(network, example, path, batch=1, sequence=inputs.shape[-1])


def time_in_turns(paths: Sequence[Path], inputs: Array) -> list[float]:
    """p50 in ms of each file.

    Args:
        inputs: float32 (N, C, H, W) or int64 (N, K, S), N ≥ 1, given one by one in rotation.
    """
    calls = []
    for path in paths:
        session = open_session(path, threads=1)
        names = entry_of(session).names
        calls.append((session, [feed(inputs[at : at + 1], names) for at in range(len(inputs))]))
    durations: list[list[float]] = [[] for _ in calls]
    for session, feeds in calls:
        _run(session, feeds, WARM_SECONDS)
    for turn in range(ROUNDS):
        order = range(len(calls)) if turn % 2 == 0 else reversed(range(len(calls)))
        for index in order:
            durations[index] += _run(*calls[index], RUN_SECONDS)
    return [median(times) * 1e3 for times in durations]


def _run(session: Any, feeds: Sequence[dict[str, Array]], seconds: float) -> list[float]:
    """Durations in s of as many calls as fit; the first, with cold caches, is not counted."""
    session.run(None, feeds[0])
    times: list[float] = []
    end = time.perf_counter() + seconds
    while len(times) < LEAST_RUNS or time.perf_counter() < end:
        given = feeds[len(times) % len(feeds)]
        start = time.perf_counter()
        session.run(None, given)
        times.append(time.perf_counter() - start)
    return times
