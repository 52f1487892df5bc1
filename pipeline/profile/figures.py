"""What raw answers and durations say, beyond `measure/latency_stats.py`. Pure."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from ..measure.turns import Sample

AGREEMENT, CHANCE_FLIPS = 0.98, 2  # of classes, as verify's parity of int8
CLOSE = 0.05  # of other outputs: a share of the largest, as measure/turns.py
DRIFT_SECONDS = 10.0  # of a shorter measurement a slope per minute would be noise


def agreement(
    expected: npt.NDArray[np.float32], found: npt.NDArray[np.float32]
) -> tuple[int | None, float, bool]:
    """(samples in the same class, largest difference, whether that is the same network).

    Outputs (N, C) agree where all but 2 samples or 2 % have the same class; others where they
    differ by at most 5 % of the largest.
    """
    if expected.shape != found.shape or not np.isfinite(found).all():
        return (0 if expected.ndim == 2 else None), float("inf"), False
    difference = float(np.abs(expected - found).max(initial=0.0))
    if expected.ndim != 2 or expected.shape[1] < 2:
        return None, difference, difference <= CLOSE * float(np.abs(expected).max(initial=0.0))
    same = int((expected.argmax(1) == found.argmax(1)).sum())
    allowed = max(CHANCE_FLIPS, int(len(found) * (1 - AGREEMENT)))
    return same, difference, len(found) - same <= allowed


def drift_percent_per_minute(samples: Sequence[Sample]) -> float | None:
    """Slope of the logarithm of the blocks' medians over time; least squares. None: too short."""
    blocks = [block for sample in samples for block in sample.blocks]
    minutes = np.array([at for at, _ in blocks]) / 60
    if len(blocks) < 4 or np.ptp(minutes) * 60 < DRIFT_SECONDS:
        return None
    slope = np.polyfit(minutes, np.log([ns for _, ns in blocks]), 1)[0]
    return 100 * float(np.expm1(slope))


def outliers(launches: Sequence[Sequence[int]]) -> tuple[int, int]:
    """(mild, severe): beyond 1.5 and 3 interquartile ranges of the launch's quartiles (Tukey)."""
    mild = severe = 0
    for launch in launches:
        low, high = np.quantile(launch, (0.25, 0.75))
        distance = np.maximum(low - np.asarray(launch), np.asarray(launch) - high)
        far = int((distance > 3 * (high - low)).sum())
        severe += far
        mild += int((distance > 1.5 * (high - low)).sum()) - far
    return mild, severe
