"""A board without Python: `onnxruntime_perf_test`, onnxruntime's own program, times the model.

It makes its own inputs (noise; free axes become 1) and does not show answers, so nothing says that
they are right; one call is one launch. Options: onnxruntime/test/perftest/README.md. Its default
optimisation level is not the library's, so 99 (all) is asked for.
"""

from __future__ import annotations

import re
import shlex
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ..errors import RuntimeFailure
from .record import DeviceProfile, FindingRecord, PerfTestRecord
from .ssh import Board, remote_word

SECONDS = 600.0  # one launch
CHANGED = 97  # exit status of the copy's check
FIGURES = {
    "p50_s": r"P50 Latency: ([\d.e+-]+) s",
    "p90_s": r"P90 Latency: ([\d.e+-]+) s",
    "load_s": r"Session creation time cost: ([\d.e+-]+) s",
}
PEAK = r"Peak working set size: ?(\d+)"
UNSEEN = (
    "measured by onnxruntime_perf_test: inputs are its own noise, answers were not seen, and the "
    "board's condition was not either"
)


@dataclass(frozen=True)
class Launch:
    """What one call printed."""

    p50_s: float
    p90_s: float
    load_s: float
    peak_bytes: int | None


def parse(output: str) -> Launch:
    """Raises: RuntimeFailure: a figure is missing."""
    found = {}
    for name, pattern in FIGURES.items():
        match = re.search(pattern, output)
        if match is None or not float(match[1]) > 0:
            raise RuntimeFailure(
                f"onnxruntime_perf_test: expected {pattern!r} in what it prints, got "
                f"{output.strip()[-300:]!r}; is perf_test: in devices.yaml that program?"
            )
        found[name] = float(match[1])
    peak = re.search(PEAK, output)
    return Launch(**found, peak_bytes=int(peak[1]) if peak else None)


def measure(board: Board, copied: tuple[str, str], *, amount: tuple[int, int]) -> DeviceProfile:
    """Times the copied model, one thread.

    Args:
        copied: its path on the board, and its sha256. amount: launches, and runs of each.
    """
    launches, runs = amount
    program = board.device.perf_test
    assert program is not None
    path, sha256 = (shlex.quote(word) for word in copied)
    check = f's=$(sha256sum {path} || shasum -a 256 {path}); [ "${{s%% *}}" = {sha256} ]'
    command = board.sh(
        f"{check} || exit {CHANGED}; {remote_word(program)} -I -m times -r {runs} -s -x 1 -y 1 "
        f"-o 99 -e cpu {path}; exit $?"
    )
    found = [parse(_call(board, command)) for _ in range(launches)]
    return DeviceProfile(
        name=board.name,
        kind="ssh",
        perf_test=_record(found, runs),
        validity="noisy",
        findings=(FindingRecord(code="UNSEEN", severity="noisy", text=UNSEEN),),
    )


def _record(found: Sequence[Launch], runs: int) -> PerfTestRecord:
    medians = [1e3 * one.p50_s for one in found]
    peaks = [one.peak_bytes for one in found if one.peak_bytes]
    return PerfTestRecord(
        threads=1,
        launches=len(found),
        runs=runs,
        p50_ms=float(np.exp(np.log(medians).mean())),
        launch_p50_ms=(min(medians), max(medians)),
        p90_ms=1e3 * max(one.p90_s for one in found),
        load_ms=1e3 * float(np.median([one.load_s for one in found])),
        peak_rss_bytes=max(peaks, default=None),
    )


def _call(board: Board, command: list[str]) -> str:
    try:
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=SECONDS,
            check=False,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        raise RuntimeFailure(
            f"device {board.name}: onnxruntime_perf_test was not done after {SECONDS:g} s"
        ) from None
    if done.returncode == CHANGED:
        raise RuntimeFailure(
            f"device {board.name}: the copy of the model is not what was sent; measure again"
        )
    if done.returncode:
        program = board.device.perf_test or ""
        why = board.explain(done.returncode, done.stderr, runtime="onnxruntime", python=program)
        raise RuntimeFailure(f"device {board.name}: {why}\n  {done.stderr.strip()[-300:]}")
    return done.stdout
