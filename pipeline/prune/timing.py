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

from ...exporters.sessions import open_session
from ...exporters.to_onnx import export_onnx

Array = np.ndarray[Any, Any]

ROUNDS = 10
RUN_SECONDS = 0.05  # of one file in one turn
WARM_SECONDS = 0.1
LEAST_RUNS = 3


def export_for_timing(network: nn.Module, input_shape: Sequence[int], path: Path) -> None:
    """The float ONNX file of batch 1 (C, H, W), as torch writes it; onnxruntime folds it itself.

    Raises: ExportError: the network cannot be exported.
    """
    export_onnx(network, torch.zeros(2, *input_shape), path, batch=1)


def time_in_turns(paths: Sequence[Path], images: Array) -> list[float]:
    """p50 in ms of each file.

    Args:
        images: float32 (N, C, H, W), N ≥ 1, given one by one in rotation.
    """
    calls = []
    for path in paths:
        session = open_session(path, threads=1)
        calls.append((session, session.get_inputs()[0].name))
    feeds = [np.ascontiguousarray(images[at : at + 1]) for at in range(len(images))]
    durations: list[list[float]] = [[] for _ in calls]
    for session, name in calls:
        _run(session, name, feeds, WARM_SECONDS)
    for turn in range(ROUNDS):
        order = range(len(calls)) if turn % 2 == 0 else reversed(range(len(calls)))
        for index in order:
            durations[index] += _run(*calls[index], feeds, RUN_SECONDS)
    return [median(times) * 1e3 for times in durations]


def _run(session: Any, name: str, feeds: Sequence[Array], seconds: float) -> list[float]:
    """Durations in s of as many calls as fit; the first, with cold caches, is not counted."""
    session.run(None, {name: feeds[0]})
    times: list[float] = []
    end = time.perf_counter() + seconds
    while len(times) < LEAST_RUNS or time.perf_counter() < end:
        feed = {name: feeds[len(times) % len(feeds)]}
        start = time.perf_counter()
        session.run(None, feed)
        times.append(time.perf_counter() - start)
    return times
