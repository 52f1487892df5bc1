"""What raw latencies say: medians, tails and intervals. Pure; runs nothing, reads no clock.

`launches` everywhere is one array of nanoseconds per fresh process: runs inside a process are alike
(same memory layout, same clock state), so certainty comes from the number of launches, not of
runs (Kalibera & Jones 2013, "Rigorous benchmarking in reasonable time").

- p50: geometric mean over launches of each launch's median. So the quotient of two printed p50s
  is the printed speed-up.
- intervals: hierarchical bootstrap, launches then runs, of the log of that; paired by launch for a
  speed-up. The percentile interval of 3 to 10 launches is too short (76 % and 88 % instead of 95 %
  for 3 and 10 launches, simulated), so it is widened about the estimate by
  sqrt(L / (L-1)) · t(0.975, L-1) / z(0.975): the factor that makes it Student's interval when
  launches are normal (the correction in Hesterberg 2015, "What teachers should know about the
  bootstrap", §4.4). Simulated coverage is then 94 to 100 %.
- p90, p95, p99: distribution-free upper bounds from order statistics at 99 % confidence, as in
  MLPerf LoadGen's early stopping; None below 64, 130 and 662 runs. Runs count as independent
  here, which those of one launch are not quite.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]

RESAMPLES = 10_000
TAILS = {"p90_ms": 0.90, "p95_ms": 0.95, "p99_ms": 0.99}
TAIL_CONFIDENCE = 0.99  # LoadGen's c


def summarize(launches: Sequence[Sequence[int]]) -> dict[str, Any]:
    """p50 with its interval, extremes, tails and spread of one network's raw nanoseconds.

    Returns: times in ms (JSON keys as in `latency.measure_latency`). `mad_ms` is the median
    absolute deviation, not scaled; `cv` the standard deviation over the mean, of all runs;
    `launch_p50_ms` the smallest and largest launch median.
    """
    arrays = [np.asarray(launch, dtype=np.float64) / 1e6 for launch in launches]
    pooled = np.sort(np.concatenate(arrays))
    medians = np.array([np.median(array) for array in arrays])
    return {
        "p50_ms": float(np.exp(np.log(medians).mean())),
        "p50_ci95_ms": _interval(log_p50(arrays), len(arrays), np.log(medians).mean()),
        "min_ms": float(pooled[0]),
        **{name: tail_bound(pooled, share) for name, share in TAILS.items()},
        "mad_ms": float(np.median(np.abs(pooled - np.median(pooled)))),
        "cv": float(pooled.std() / pooled.mean()),
        "launch_p50_ms": [float(medians.min()), float(medians.max())],
        "n": len(pooled),
        "launches": len(arrays),
    }


def ratio_of(
    reference: Sequence[Sequence[int]], candidate: Sequence[Sequence[int]]
) -> dict[str, Any]:
    """reference p50 / candidate p50 (above 1: the candidate is faster), paired by launch.

    Returns {"ratio", "ci95": [low, high]}.
    """
    ratio, interval = ratio_interval(reference, candidate, confidence=0.95)
    return {"ratio": ratio, "ci95": interval}


def ratio_interval(
    reference: Sequence[Sequence[int]],
    candidate: Sequence[Sequence[int]],
    *,
    confidence: float,
) -> tuple[float, list[float]]:
    """As `ratio_of`, with a two-sided interval of another confidence in (0, 1).

    A launch measures both in turns, so what slows the machine down during one launch slows both
    and drops out.
    """
    assert len(reference) == len(candidate), "pairing needs the same launches"
    pairs = [[np.asarray(launch, dtype=np.float64) for launch in s] for s in (reference, candidate)]
    logs = [np.log([np.median(launch) for launch in side]).mean() for side in pairs]
    centre = logs[0] - logs[1]
    # the same picks of launches for both sides (pairing), independent runs within them
    draws = log_p50(pairs[0], runs_seed=1) - log_p50(pairs[1], runs_seed=2)
    interval = _interval(draws, len(reference), centre, confidence=confidence)
    return float(np.exp(centre)), interval


def log_p50(launches: Sequence[Array], *, runs_seed: int = 1) -> Array:
    """Bootstrap draws of log p50, (RESAMPLES,): launches with replacement, then runs of each.

    The median of n runs drawn with replacement from n sorted ones is the run at rank
    floor(n · B), B the median of n uniform variates, Beta((n+1)/2, (n+1)/2): exact for odd n,
    and drawn without building RESAMPLES × n numbers. Picks of launches depend on the number of
    launches only, so two networks measured together are resampled together.
    """
    count = len(launches)
    lengths = np.array([len(launch) for launch in launches])
    table = np.full((count, int(lengths.max())), np.nan)
    for row, launch in zip(table, launches, strict=True):
        row[: len(launch)] = np.sort(launch)
    picks = np.random.default_rng(0).integers(0, count, size=(RESAMPLES, count))
    middle = (lengths[picks] + 1) / 2
    share = np.random.default_rng(runs_seed).beta(middle, middle)
    ranks = np.minimum((share * lengths[picks]).astype(np.int64), lengths[picks] - 1)
    draws: Array = np.log(table[picks, ranks]).mean(axis=1)
    return draws


def tail_bound(
    ordered: Array, share: float, *, confidence: float = TAIL_CONFIDENCE
) -> float | None:
    """Upper bound of the `share` quantile of ascending values, or None: too few of them.

    The t-th largest value, for the largest t with P(Binomial(n, 1 - share) <= t) <= 1 - c.
    """
    from scipy.special import bdtr  # 0.1 s; only where a latency is summarized

    over = np.arange(1, len(ordered) + 1)
    surpassed = bdtr(over, len(ordered), 1 - share) <= 1 - confidence
    count = int(np.count_nonzero(surpassed))  # the distribution rises: a prefix is True
    return float(ordered[-count]) if count else None


def tail_of_launch(
    launches: Sequence[Sequence[int]], share: float, *, confidence: float
) -> tuple[float, float] | None:
    """The `share` quantile of a launch's runs, and an upper bound of it, in the launches' unit.

    The quantile is the geometric mean over launches of each launch's own, as p50 is. The bound is
    the larger of two: `tail_bound` of all runs together, which alone would take runs of one launch
    for independent and be passed by a third of the networks that should not (benchmarks/gate.md);
    and Student's over the logarithms of the launches' quantiles, the upper end of the two-sided
    interval, for a few launches are not normal.

    Returns: None where fewer than 64 runs (of 0.90) or 2 launches say nothing of it.
    """
    from scipy.special import stdtrit

    arrays = [np.asarray(launch, dtype=np.float64) for launch in launches]
    pooled = np.sort(np.concatenate(arrays))
    if len(arrays) < 2 or tail_bound(pooled, share) is None:
        return None
    of_runs = tail_bound(pooled, share, confidence=confidence)
    logs = np.log([np.quantile(array, share) for array in arrays])
    spread = logs.std(ddof=1) / np.sqrt(len(logs))
    of_launches = np.exp(logs.mean() + stdtrit(len(logs) - 1, (1 + confidence) / 2) * spread)
    if of_runs is None:
        return None  # a higher confidence needs more
    return float(np.exp(logs.mean())), max(of_runs, float(of_launches))


def _interval(
    draws: Array, launches: int, centre: float, *, confidence: float = 0.95
) -> list[float]:
    assert launches >= 2, "how far launches differ is unknown from one"
    from scipy.special import ndtri, stdtrit

    side = (1 + confidence) / 2
    quantile = float(stdtrit(launches - 1, side))
    widen = np.sqrt(launches / (launches - 1)) * quantile / float(ndtri(side))
    low, high = np.quantile(draws, (1 - side, side))
    # an even number of runs: the estimate averages two of them and may leave the draws' range
    below, above = max(centre - low, 0.0), max(high - centre, 0.0)
    return [float(np.exp(centre - widen * below)), float(np.exp(centre + widen * above))]
