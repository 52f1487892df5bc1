"""Whether calibration samples are such as the network sees: what their statistics give away.

Says it in a sentence; whether that is a note or an error is for the caller. Ranges: `calibrate.py`.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from ..pipeline.errors import ExportError
from .calibrate import STEP, Samples, steps

Array = np.ndarray[Any, Any]

# Normalised inputs have mean 0 and deviation 1 over the training set; single images reach ±2.6.
FAR_MEAN, SMALL_DEVIATION, LARGE_DEVIATION = 1.5, 0.1, 5.0


def channel_statistics(samples: Samples) -> tuple[Array, Array]:
    """Mean and standard deviation of each input channel, (C,) float64 each; read in steps.

    Raises:
        ExportError: no samples.
    """
    count, total, squares = 0, 0.0, 0.0
    for batch in steps(samples, STEP):
        values = np.moveaxis(batch.astype(np.float64), 1, 0).reshape(batch.shape[1], -1)
        count += values.shape[1]
        total = total + values.sum(axis=1)
        squares = squares + np.square(values).sum(axis=1)
    if count == 0:
        raise ExportError("no calibration samples; set data.calibration to 64 or more")
    mean = np.asarray(total / count)
    return mean, np.sqrt(np.maximum(squares / count - mean**2, 0.0))


def doubt_about_samples(mean: Array, deviation: Array) -> str | None:
    """A sentence if normalised samples are far from the training set, which has mean 0 and
    deviation 1; else None.

    Args:
        mean, deviation: (C,), of the samples after preprocessing that subtracts the training
            set's mean and divides by its deviation. Of other preprocessing nothing can be said.
    """
    measured = (
        f"(mean {', '.join(f'{m:.2f}' for m in mean)}; deviation "
        f"{', '.join(f'{d:.2f}' for d in deviation)}; expected about 0 and 1)"
    )
    if (deviation > LARGE_DEVIATION).any() or (np.abs(mean) > 2 * LARGE_DEVIATION).any():
        return (
            f"the calibration samples are much larger than normalised images {measured}: are they "
            "scaled twice, or pixels of 0…255 where preprocess.mean and std are for 0…1?"
        )
    if (deviation < SMALL_DEVIATION).all():
        return (
            f"the calibration samples hardly vary {measured}: are they blank, or divided by 255 "
            "twice?"
        )
    if (np.abs(mean) > FAR_MEAN).all():
        return (
            f"the calibration samples are far from the training set {measured}: are they images of "
            "another kind, or nearly all black or white?"
        )
    return None
