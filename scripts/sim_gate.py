"""Simulate the gate and write benchmarks/gate.md: how often each check errs.

    python scripts/sim_gate.py --report DIR [--draws N]

A check may pass a model that is exactly on its limit in at most 5 % of the test sets it could have
met (confidence 0.95), and should pass a model without a loss in 80 % of those that have the n that
an inconclusive verdict asks for. Both are counted over N drawn test sets (a tenth of it, where a
check draws 10,000 resamples of its own). DIR/report.json is of a real run: the launches of its
latency rows are what latencies are drawn from, launches first, then the runs of each.
"""

from __future__ import annotations

import argparse
import datetime
import json
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from edgestill.pipeline.gates import bootstrap
from edgestill.pipeline.gates.calibration import error_increase, likelihood_increase
from edgestill.pipeline.gates.classes import holm
from edgestill.pipeline.gates.drop import JUDGES, Pair
from edgestill.pipeline.gates.latency import LEAST_LAUNCHES
from edgestill.pipeline.gates.metrics import metric_drop
from edgestill.pipeline.gates.samples import Answers, Samples
from edgestill.pipeline.measure.latency_stats import ratio_interval, tail_bound, tail_of_launch
from edgestill.pipeline.measure.machine import describe_machine
from edgestill.pipeline.measure.paired import (
    drop_upper_bound,
    mcnemar_worse_p,
    ratio_lower_bound,
    ratio_upper_bound,
    share_lower_bound,
    share_upper_bound,
)

ROOT = Path(__file__).resolve().parent.parent
CONFIDENCE = 0.95


@dataclass(frozen=True)
class Row:
    """Of one check in one situation. `passed` of `draws` test sets; `at_limit`: a model on its
    limit, so that passing is an error; otherwise one without a loss."""

    check: str
    situation: str
    n: int
    at_limit: bool
    passed: int
    draws: int

    @property
    def rate(self) -> float:
        return self.passed / self.draws

    @property
    def deviation(self) -> float:
        """Standard deviation of the rate: how far chance moves it."""
        return math.sqrt(max(self.rate * (1 - self.rate), 1 / self.draws) / self.draws)


# situation → n, limit, flips (fraction of samples answered otherwise), accuracy of the reference
SITUATIONS = {
    "digits-like": (719, 0.03, 0.02, 0.97),
    "SST-2-like": (1821, 0.02, 0.04, 0.88),
    "CIFAR-10-like": (10_000, 0.01, 0.135, 0.90),
}


def drops(draws: int) -> list[Row]:
    """max_drop_points, Tango's score."""
    rows = []
    for name, (n, limit, flips, _) in SITUATIONS.items():
        flips = max(flips, limit)
        passes = _passes_drop(_flips(n, flips, limit, draws), n, limit)
        rows.append(Row("max_drop_points", name, n, True, passes, draws))
        n = _needed("max_drop_points", 100 * limit, flips=flips, accuracy=0.9)
        passes = _passes_drop(_flips(n, flips, 0.0, draws), n, limit)
        rows.append(Row("max_drop_points", name, n, False, passes, draws))
    return rows


def _flips(n: int, flips: float, drop: float, draws: int) -> tuple[Any, Any]:
    """Counts of lost and gained, of `draws` test sets each."""
    cells = [(flips + drop) / 2, (flips - drop) / 2, 1 - flips]
    lost, gained, _ = np.random.default_rng(0).multinomial(n, cells, size=draws).T
    return lost, gained


def _passes_drop(counts: tuple[Any, Any], n: int, limit: float) -> int:
    return int((drop_upper_bound(*counts, n=n, confidence=CONFIDENCE) <= limit).sum())


def _needed(check: str, limit: float, *, flips: float, accuracy: float) -> int:
    """What the check asks for where it has seen no loss on too few samples."""
    for n in (50, 200, 800, 2000):
        half = round(n * flips / 2)
        pair = Pair("", "", n, half, half, round(n * accuracy) - half)
        needed = JUDGES[check](check, pair, limit, confidence=CONFIDENCE).needed_n
        if needed is not None and half and needed > 2 * n:
            asked = int(needed)
    return asked


def ratios(draws: int) -> list[Row]:
    """min_retention and max_error_growth, Nam and Blackwelder's score."""
    rows = []
    for name, (n, _, flips, accuracy) in SITUATIONS.items():
        for check, limit in (("min_retention", 0.985), ("max_error_growth", 0.1)):
            growth = (1 - limit) * accuracy if check == "min_retention" else limit * (1 - accuracy)
            flips = max(flips, growth)
            passes = _passes_ratio(check, n, limit, flips, growth, accuracy, draws)
            rows.append(Row(check, name, n, True, passes, draws))
            asked = _needed(check, limit, flips=flips, accuracy=accuracy)
            passes = _passes_ratio(check, asked, limit, flips, 0.0, accuracy, draws)
            rows.append(Row(check, name, asked, False, passes, draws))
    return rows


def _passes_ratio(
    check: str, n: int, limit: float, flips: float, drop: float, accuracy: float, draws: int
) -> int:
    lose, gain = (flips + drop) / 2, (flips - drop) / 2
    cells = [lose, gain, accuracy - lose, 1 - accuracy - gain]
    if min(cells) < 0:  # more gained than the reference had wrong
        lose, gain = drop + (1 - accuracy) / 2, (1 - accuracy) / 2
        cells = [lose, gain, accuracy - lose, 1 - accuracy - gain]
    lost, gained, both, wrong = np.random.default_rng(1).multinomial(n, cells, size=draws).T
    if check == "min_retention":
        bound = ratio_lower_bound(lost, gained, both, n=n, confidence=CONFIDENCE)
        return int((bound >= limit).sum())
    bound = ratio_upper_bound(gained, lost, wrong, n=n, confidence=CONFIDENCE)
    return int((bound - 1 <= limit).sum())


def shares(draws: int) -> list[Row]:
    """max_negative_flips and min_cpu_agreement, Clopper and Pearson."""
    rows, rng = [], np.random.default_rng(2)
    for name, (n, limit, _, _) in SITUATIONS.items():
        upper = _table(lambda k, n=n: share_upper_bound(k, n=n, confidence=CONFIDENCE), n)
        lower = _table(lambda k, n=n: share_lower_bound(k, n=n, confidence=CONFIDENCE), n)
        passed = int((upper[rng.binomial(n, limit, draws)] <= limit).sum())
        rows.append(Row("max_negative_flips", name, n, True, passed, draws))
        passed = int((lower[rng.binomial(n, 1 - limit, draws)] >= 1 - limit).sum())
        rows.append(Row("min_cpu_agreement", name, n, True, passed, draws))
        seen = limit / 4
        pair = Pair("", "", 400, round(400 * seen), 0, 380)
        asked = (
            JUDGES["max_negative_flips"](
                "max_negative_flips", pair, limit, confidence=CONFIDENCE
            ).needed_n
            or 400
        )
        bounds = _table(lambda k, n=asked: share_upper_bound(k, n=n, confidence=CONFIDENCE), asked)
        rate = pair.lost / pair.n
        passed = int((bounds[rng.binomial(asked, rate, draws)] <= limit).sum())
        situation = f"{name}, {100 * rate:g} % flip, {100 * limit:g} % may"
        rows.append(Row("max_negative_flips", situation, asked, False, passed, draws))
    return rows


def _table(bound: Callable[[int], float], n: int) -> Any:
    return np.array([bound(count) for count in range(n + 1)])


def metrics(draws: int) -> list[Row]:
    """Macro F1 and mean accuracy a class, by bootstrap, of ten classes of unlike size."""
    rows = []
    for name in ("macro_f1", "mean_per_class"):
        for lose, gain in ((0.03, 0.01), (0.008, 0.0)):
            whole = _answers(np.random.default_rng(3), 400_000, lose=lose, gain=gain)
            truth = _drop_of(name, whole)
            rng, passed = np.random.default_rng(4), 0
            for _ in range(draws):
                samples = _answers(rng, 1500, lose=lose, gain=gain)
                found = metric_drop(
                    name, samples, before="before", after="after", confidence=CONFIDENCE
                )
                passed += found.bound <= truth
            situation = f"{100 * (lose + gain):g} % flips, falls by {100 * truth:.2f} points"
            rows.append(Row(f"metrics.{name}", situation, 1500, True, passed, draws))
    return rows


def _answers(rng: Any, n: int, *, lose: float, gain: float, classes: int = 10) -> Samples:
    share = np.arange(1, classes + 1) / (classes * (classes + 1) / 2)
    labels = rng.choice(classes, n, p=share)
    other = (labels + rng.integers(1, classes, n)) % classes
    right = rng.random(n) < 0.9
    luck = rng.random(n)
    kept = np.where(right, luck >= lose / 0.9, luck < gain / 0.1)
    models = {}
    for role, one in (("before", right), ("after", kept)):
        prediction = np.where(one, labels, other)
        rank = np.where(one, 0, 1)
        models[role] = Answers(prediction, rank, rank * 0.0, rank * 0.0, rank * 0.0)
    names = tuple(str(label) for label in range(classes))
    return Samples(np.arange(n).astype(object), labels, names, models)


def _drop_of(name: str, samples: Samples) -> float:
    """Independent of the gate's own formula: scikit-learn's."""
    from sklearn.metrics import balanced_accuracy_score, f1_score

    def score(role: str) -> float:
        predictions = samples.answers[role].prediction
        if name == "macro_f1":
            return float(f1_score(samples.labels, predictions, average="macro"))
        return float(balanced_accuracy_score(samples.labels, predictions))

    return score("before") - score("after")


def calibration(draws: int) -> list[Row]:
    """NLL by bootstrap, ECE bin by bin: a candidate surer of itself by a shift and by chance."""
    rows = []
    for n, shift, flips in ((1500, 0.04, 0.02), (1500, 0.01, 0.01)):
        whole = _confidences(np.random.default_rng(5), 1_000_000, shift=shift, flips=flips)
        truths = (
            error_increase(*whole, confidence=CONFIDENCE).value,
            float((_nats(whole[1]) - _nats(whole[0])).mean()),
        )
        rng, passed = np.random.default_rng(6), [0, 0]
        for _ in range(draws):
            pair = _confidences(rng, n, shift=shift, flips=flips)
            bounds = (
                error_increase(*pair, confidence=CONFIDENCE).bound,
                likelihood_increase(*pair, confidence=CONFIDENCE).bound,
            )
            passed = [
                count + (bound <= t) for count, bound, t in zip(passed, bounds, truths, strict=True)
            ]
        names = ("max_ece_increase", "max_nll_increase")
        for check, count, truth in zip(names, passed, truths, strict=True):
            situation = f"surer by {shift:g}, {100 * flips:g} % flips, grows by {truth:.4f}"
            rows.append(Row(check, situation, n, True, int(count), draws))
    return rows


def _confidences(rng: Any, n: int, *, shift: float, flips: float) -> tuple[Answers, Answers]:
    """A calibrated model of two classes, and one surer of its answers."""
    sure = rng.uniform(0.55, 0.93, n)
    right = rng.random(n) < sure
    models = []
    for top, correct in (
        (sure, right),
        (
            np.clip(sure + shift + rng.normal(0, 0.02, n), 0.501, 0.999),
            right ^ (rng.random(n) < flips),
        ),
    ):
        rank = np.where(correct, 0, 1)
        models.append(Answers(rank, rank, np.where(correct, top, 1 - top), top, top))
    return models[0], models[1]


def _nats(answers: Answers) -> Any:
    return -np.log(answers.p_label)


def classes(draws: int) -> list[Row]:
    """max_class_drop_points: how often a model that loses nothing anywhere is failed (the check has
    no bound: it finds damage, and passes what chance explains)."""
    rng, rows = np.random.default_rng(7), []
    for count, n, flips in ((10, 1000, 0.10), (77, 40, 0.05)):
        failed = 0
        for _ in range(draws):
            lost, gained, _ = rng.multinomial(n, [flips / 2, flips / 2, 1 - flips], size=count).T
            p_values = holm(
                [mcnemar_worse_p(int(b), int(c)) for b, c in zip(lost, gained, strict=True)]
            )
            # at the strictest limit, every class that loses anything is beyond it
            failed += bool(((np.array(p_values) <= 1 - CONFIDENCE) & (lost > gained)).any())
        situation = f"{count} classes of {n}, {100 * flips:g} % flips, FAILED without a loss"
        rows.append(Row("max_class_drop_points", situation, n * count, True, failed, draws))
    return rows


def latencies(draws: int, launches: dict[str, Sequence[Sequence[int]]]) -> list[Row]:
    """min_speedup and max_p90_ms on launches drawn from those of a real run."""
    names = list(launches)
    pools = {name: [np.asarray(one, float) for one in launches[name]] for name in names}
    logs = {n: np.log([np.median(one) for one in pool]).mean() for n, pool in pools.items()}
    ratio = math.exp(logs[names[0]] - logs[names[-1]])
    rows, rng, many = [], np.random.default_rng(8), len(pools[names[0]])
    for count in (LEAST_LAUNCHES, 2 * LEAST_LAUNCHES):
        passed, faster, tails, of_runs = 0, 0, dict.fromkeys(names, 0), dict.fromkeys(names, 0)
        for _ in range(draws):
            picks = rng.integers(0, many, count)
            drawn = {n: [_again(rng, pool[k]) for k in picks] for n, pool in pools.items()}
            first, last = drawn[names[0]], drawn[names[-1]]
            _, (low, _) = ratio_interval(first, last, confidence=CONFIDENCE)
            passed += low >= ratio
            faster += low >= 0.5 * ratio
            for name in names:
                truth = math.exp(np.log([np.quantile(one, 0.9) for one in pools[name]]).mean())
                found = tail_of_launch(drawn[name], 0.90, confidence=CONFIDENCE)
                tails[name] += found is not None and found[1] <= truth
                runs = tail_bound(np.sort(np.concatenate(drawn[name])), 0.90, confidence=CONFIDENCE)
                of_runs[name] += runs is not None and runs <= truth
        said = f"{names[-1]} over {names[0]}, {count} launches"
        rows.append(Row("min_speedup", said, count, True, passed, draws))
        twice = f"{said}, twice as fast as it must be"
        rows.append(Row("min_speedup", twice, count, False, faster, draws))
        for name in names:
            said = f"{name}, {count} launches"
            rows.append(Row("max_p90_ms", said, count, True, tails[name], draws))
            alone = f"{said} (not the check: its bound of runs alone)"
            rows.append(Row("max_p90_ms", alone, count, True, of_runs[name], draws))
    return rows


def _again(rng: Any, runs: Any) -> Any:
    return runs[rng.integers(0, len(runs), len(runs))]


def read_launches(folder: Path) -> tuple[dict[str, Sequence[Sequence[int]]], dict[str, Any]]:
    """Raw nanoseconds of the reference's and the deployed file, one thread; and the machine."""
    report = json.loads((folder / "report.json").read_text())
    wanted = (report["speedup"]["reference"], report["speedup"]["candidate"])
    rows = {
        row["name"]: row["raw_ns"] for row in reversed(report["latency"]) if row["threads"] == 1
    }
    return {name: rows[name] for name in wanted}, report["environment"]


def simulate(draws: int, launches: dict[str, Sequence[Sequence[int]]] | None = None) -> list[Row]:
    """Every check's rows. launches: of a real run; None: latencies are left out."""
    few = max(1, draws // 10)
    rows = [*drops(draws), *ratios(draws), *shares(draws), *metrics(few), *calibration(few)]
    rows += classes(few)
    return rows if launches is None else [*rows, *latencies(few, launches)]


def to_markdown(rows: Sequence[Row], measured: dict[str, Any], launches: int) -> str:
    lines = [
        "# How often the gate errs",
        "",
        "Made by `scripts/sim_gate.py`: each row is one check on drawn test sets, at confidence "
        "0.95. ± is two standard deviations of the simulation itself.",
        "",
    ]
    for at_limit, title, said in (
        (True, "A model exactly on its limit", "may pass in 5 % (of classes: may fail in 5 %)"),
        (False, "A model without a loss, on the n that the gate asks for", "should pass in 80 %"),
    ):
        lines += [f"## {title}", "", f"It {said}.", ""]
        lines += ["| check | situation | n | drawn | passed |", "| --- " * 5 + "|"]
        lines += [
            f"| `{row.check}` | {row.situation} | {row.n:,} | {row.draws:,} "
            f"| {100 * row.rate:.1f} ± {200 * row.deviation:.1f} % |"
            for row in rows
            if row.at_limit == at_limit
        ]
        lines.append("")
    machine = describe_machine()
    lines += [
        f"Latencies are drawn from {launches} launches on {measured['cpu_model']}; their n is of "
        "launches. The bootstraps of metrics and likelihoods draw "
        f"{bootstrap.RESAMPLES:,} resamples here.",
        "",
        f"{datetime.date.today().isoformat()}, {machine['cpu_model']}, numpy "
        f"{machine['versions']['numpy']}, scipy {machine['versions']['scipy']}.",
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--report", type=Path, required=True, help="folder of a run with launches")
    parser.add_argument("--draws", type=int, default=4000)
    given = parser.parse_args()
    launches, measured = read_launches(given.report)
    bootstrap.RESAMPLES = 1_000  # a tenth of the gate's, whose quantiles wander less
    rows = simulate(given.draws, launches)
    for row in rows:
        print(f"{row.check:<24} {100 * row.rate:6.2f} ± {200 * row.deviation:.2f} %  "
              f"{'on its limit' if row.at_limit else 'without a loss'}, n = {row.n}, "
              f"{row.situation}")  # fmt: skip
    target = ROOT / "benchmarks" / "gate.md"
    target.write_text(to_markdown(rows, measured, len(next(iter(launches.values())))))
    print(target)


if __name__ == "__main__":
    begun = time.perf_counter()
    main()
    print(f"{time.perf_counter() - begun:.0f} s")
