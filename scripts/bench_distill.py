"""Measure distillation and write benchmarks/distillation.md. Every figure is of a run made here.

    python scripts/bench_distill.py --work DIR [--part speed resnet20 mobilenetv2]
                                    [--images 10000] [--epochs 12]
                                    [--row "no teacher" ...] [--seeds 3]

`speed`: images/s of our trainer, of the usual distillation loop and of plain supervised PyTorch,
in turns. `resnet20`, `mobilenetv2`: every method on CIFAR-10 under one schedule, from one teacher.
DIR keeps the runs, so that a stopped benchmark goes on where it was. Data: $EDGESTILL_DATA, see
README. `--images` takes that many training images (the first rows of the file), all by default.
`--row` takes those rows alone, and leaves the others in DIR as they were. `--seeds`: of the rows
without a teacher and with the default; the best of the others has three, each other row one.
"""

from __future__ import annotations

import argparse
import datetime
import functools
import json
import math
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import torch
from edgestill.models.store import load_network
from edgestill.pipeline import flow, learning, steps
from edgestill.pipeline.data.dataset import open_data
from edgestill.pipeline.measure.accuracy import accuracy, logits_of_module
from edgestill.pipeline.measure.machine import available_threads, describe_machine
from edgestill.pipeline.recipe import Recipe
from edgestill.pipeline.stage import Silent
from edgestill.pipeline.work import begin
from edgestill.pipeline.workspace import locked
from scipy import stats

ROOT = Path(__file__).resolve().parent.parent
DATA = Path(os.environ.get("EDGESTILL_DATA", ROOT / "../shared/data")).resolve()

IMAGENET = {"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}
AUGMENT = {"crop": "pad", "pad": 4, "flip": True}
FINE_TUNED = {"epochs": 2, "lr": 0.01, "warmup_epochs": 0.5, "augment": AUGMENT}
TEACHER = {
    "model": "resnet56",
    "weights": str(DATA / "checkpoints/resnet56-4bfd9763.th"),
    "train": FINE_TUNED,
}
SECOND = {
    "model": "resnet20",
    "weights": str(DATA / "checkpoints/resnet20-12fca82f.th"),
    "train": FINE_TUNED,
}
STUDENTS: dict[str, dict[str, Any]] = {
    "resnet20": {"model": "resnet20"},
    "mobilenetv2": {"model": "mobilenetv2", "args": {"width": 0.5}},
}
HARD = {"name": "hard", "weight": 0.1}
KD = {"name": "kd", "weight": 0.9, "temperature": 4}
ONE = {"name": "hard", "weight": 1.0}
VIEWS = 4
TENTH = "10 % of the labels"
DEFAULT = "default: KD, standardized"
CIFAR_IMAGES = 50_000

# label → what differs from the schedule. The default strategy is `{}`; no teacher is None.
METHODS: dict[str, dict[str, Any] | None] = {
    "no teacher": None,
    DEFAULT: {},
    "KD": {"objectives": [KD, HARD]},
    "DKD": {"objectives": [{"name": "dkd"}, ONE]},
    "DIST": {"objectives": [{"name": "dist"}, ONE]},
    "FitNet": {"objectives": [{"name": "hint"}, ONE]},
    "AT": {"objectives": [{"name": "attention"}, ONE]},
    "ReviewKD": {"objectives": [{"name": "reviewkd"}, ONE]},
    "RKD": {"objectives": [{"name": "rkd"}, ONE]},
    "quality: KD, standardized + ReviewKD": {"strategy": "quality"},
    "KD + AT, balanced": {"objectives": [KD, HARD, {"name": "attention", "weight": 0.5}],
                          "balance": True},
    "CTKD": {"objectives": [{"name": "kd", "temperature": "curriculum"}, HARD]},
    "two teachers, mean": {"objectives": [KD, HARD], "combine": "mean"},
    "two teachers, confidence": {"objectives": [KD, HARD], "combine": "confidence"},
    "born-again, 2 generations": {"generations": 2, "objectives": [KD, HARD]},
    "average of itself": {"target": "ema"},
    "BYOT": {"target": "exits"},
    "DML, 2 peers": {"target": "peers"},
    "teacher trained jointly": {"target": "joint"},
    "10 % of the labels, no teacher": None,
    "10 % of the labels, default": {},
    "10 % of the labels + the rest unlabelled": {},
}  # fmt: skip
MAIN_ROWS = ("no teacher", DEFAULT)
SEEDS = 3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--part", nargs="+", choices=["speed", *STUDENTS], default=None)
    parser.add_argument("--images", type=int, default=None)
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--row", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--seeds", type=int, default=SEEDS)
    given = parser.parse_args()
    work = given.work.resolve()
    work.mkdir(parents=True, exist_ok=True)
    store = work / "results.json"
    results = json.loads(store.read_text()) if store.exists() else {}
    for part in given.part or ["speed", *STUDENTS]:
        print(f"== {part}", flush=True)
        stamp = {"date": datetime.date.today().isoformat(), "machine": describe_machine()}
        if part == "speed":
            results[part] = speed() | stamp
            store.write_text(json.dumps(results, indent=1))
            continue
        schedule = {"epochs": given.epochs, "images": given.images}
        kept = results.get(part, {})
        rows = kept["rows"] if kept and schedule.items() <= kept.items() else {}
        for row in [*given.row, None]:
            name = row or best(rows)
            seeds = given.seeds if name in MAIN_ROWS else SEEDS if row is None else 1
            rows[name] = method(name, part, work, seeds=seeds, **schedule)
            ordered = {name: rows[name] for name in METHODS if name in rows}
            results[part] = {"rows": ordered} | schedule | stamp | {"threads": available_threads()}
            store.write_text(json.dumps(results, indent=1))
    target = ROOT / "benchmarks" / "distillation.md"
    target.write_text(to_markdown(results))
    print(target)


def speed() -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, "-P", str(ROOT / "scripts" / "bench_distill_loop.py")],
        check=True, capture_output=True, text=True,
    )  # fmt: skip
    return dict(json.loads(done.stdout))


def method(
    name: str, student: str, work: Path, *, seeds: int, images: int | None, epochs: int
) -> list[dict[str, Any]]:
    """One record a seed."""
    # with the rest unlabelled, the data stage itself hides nine labels of ten
    is_tenth = name.startswith(TENTH) and not name.endswith("unlabelled")
    train = subset(work, (images or CIFAR_IMAGES) // 10 if is_tenth else images)
    found = []
    for seed in range(seeds):
        recipe = recipe_of(name, student, train, epochs=epochs, seed=seed)
        found.append(one(recipe, work / "run"))
        print(f"{student} | {name} | seed {seed} | {found[-1]}", flush=True)
    return found


def recipe_of(name: str, student: str, train: Path, *, epochs: int, seed: int) -> Recipe:
    data: dict[str, Any] = {
        "train": {"path": str(train)},
        "test": {"path": str(DATA / "cifar10-jpeg/test.parquet")},
        "validation": 0.05,
        "calibration": 64,
        "preprocess": IMAGENET,
    }
    if name.endswith("unlabelled"):
        data["unlabelled"] = {"fraction": 0.9}
    schedule = {"epochs": epochs, "lr": 0.2, "select": "final", "augment": AUGMENT}
    method = METHODS[name]
    recipe: dict[str, Any] = {"seed": seed, "data": data, "student": STUDENTS[student]}
    if method is None:
        recipe["student"] = recipe["student"] | {"train": schedule}
    else:
        recipe["distill"] = schedule | {"views": VIEWS} | method
        if method.get("target") in (None, "joint"):
            recipe["teacher"] = TEACHER
        if method.get("target") == "joint":
            recipe["teacher"] = {"model": "resnet56"}
        if "combine" in method:
            recipe["teacher"] = [TEACHER, SECOND]
    return Recipe.model_validate(recipe)


def one(recipe: Recipe, folder: Path) -> dict[str, Any]:
    """Train by the stages of the main job, then test the final weights once."""
    with locked(folder) as root:
        work = begin(recipe, root, events=Silent(), fresh=False)
        data = steps.prepare_data(work)
        learning.check_before_training(work, data)
        teachers = learning.prepare_teachers(work, data)
        student = flow.learn(work, data, teachers)
    opened = open_data(data.path, memory_budget_bytes=2**31)
    training = student.measurements["training"]
    speed = statistics.median(epoch["samples_per_second"] for epoch in training["history"])
    unlabelled = student.measurements.get("unlabelled")
    seen = len(opened.train.labels) + (unlabelled["used"] if unlabelled else 0)
    return {
        "accuracy": tested(student.path, data.path),
        "teachers": [tested(teacher.path, data.path) for teacher in teachers],
        "agreement": training["history"][-1].get("agreement"),
        "samples_per_second": speed,
        "precision": training["precision"]["name"],
        "epoch_seconds": seen / speed,
        "why": student.measurements.get("distillation", {}).get("why", "labels alone"),
        "train_images": len(opened.train.labels),
        "unlabelled": unlabelled,
        "n": len(opened.test.labels),
    }


@functools.cache  # one teacher is in many rows
def tested(folder: Path, data: Path) -> float:
    """Accuracy on test, %."""
    opened = open_data(data, memory_budget_bytes=2**31)
    torch.set_num_threads(available_threads())
    module = load_network(folder).network.module
    logits = logits_of_module(module, opened.test, opened.preprocess, device="cpu", name="network")
    return 100 * accuracy(logits, opened.test.labels)


def subset(work: Path, images: int | None) -> Path:
    """The first rows of the training file, which is in random order."""
    whole = DATA / "cifar10-jpeg/train.parquet"
    if images is None:
        return whole
    path = work / f"train-{images}.parquet"
    if not path.exists():
        pq.write_table(pq.read_table(whole).slice(0, images), path)
    return path


def to_markdown(results: dict[str, Any]) -> str:
    lines = ["# Distillation", "", "Made by `scripts/bench_distill.py`.", ""]
    for part, result in results.items():
        lines += render_speed(result) if part == "speed" else render_methods(part, result)
        machine = result["machine"]
        versions = ", ".join(f"{k} {v}" for k, v in machine["versions"].items() if v)
        lines += ["", f"{result['date']}, {machine['cpu_model']}, {versions}.", ""]
    return "\n".join(lines).rstrip() + "\n"


def render_speed(result: dict[str, Any]) -> list[str]:
    ours = statistics.median(result["samples_per_second"]["ours"])
    rows = []
    for name, values in result["samples_per_second"].items():
        middle = statistics.median(values)
        rows.append(
            f"| {result['what'][name]} | {middle:.0f} | {min(values):.0f}–{max(values):.0f} "
            f"| {len(values)} | {ours / middle:.2f} |"
        )
    head = ["| loop | images/s, median | range | n | ours is × as fast |", "| --- " * 5 + "|"]
    return ["## Speed", "", result["about"], "", *head, *rows]


def render_methods(student: str, result: dict[str, Any]) -> list[str]:
    rows = result["rows"]
    first = rows[DEFAULT][0]
    lines = [
        f"## {student}, CIFAR-10, {result['epochs']} epochs of {first['train_images']:,} images",
        "",
        f"Teacher: public ResNet-56, fine-tuned 2 epochs on these images, "
        f"{first['teachers'][0]:.2f} % on test. Final-epoch weights, n = {first['n']:,} test "
        "images, one schedule for all rows. The teacher's public weights have seen all 50,000 "
        f"training images. Threads: {result['threads']}. The rows with 10 % of the labels have a "
        "teacher fine-tuned on those alone, and are held against their own row without a teacher.",
        "",
        "| method | test accuracy, % (seeds) | gain (95 % interval) "
        "| agreement with the teacher, % | epoch, s | precision | objectives |",
        "| --- " * 7 + "|",
    ]
    for name, seeds in rows.items():
        found = accuracies(seeds)
        spread = f" ({min(found):.2f}–{max(found):.2f}, n = {len(found)})" if len(found) > 1 else ""
        agreement, gain = seeds[0]["agreement"], ""
        if name != compared(name):
            low, high = gain_interval(seeds, rows[compared(name)], rows["no teacher"])
            gain = f"{mean(seeds) - mean(rows[compared(name)]):+.2f} ({low:+.1f} to {high:+.1f})"
        lines.append(
            f"| {name} | {mean(seeds):.2f}{spread} | {gain} "
            f"| {'' if agreement is None else format(100 * agreement, '.1f')} "
            f"| {statistics.median(row['epoch_seconds'] for row in seeds):.1f} "
            f"| {seeds[0]['precision']} | {seeds[0]['why'].partition(':')[0]} |"
        )
    return [*lines, "", *judged(rows)]


def best(rows: dict[str, list[dict[str, Any]]]) -> str:
    """Of the rows with all labels that are not main rows; by their first seed."""
    others = [name for name in rows if name not in MAIN_ROWS and not name.startswith(TENTH)]
    return max(others or rows, key=lambda name: float(rows[name][0]["accuracy"]))


def compared(name: str) -> str:
    """The row without a teacher that saw the same labels."""
    return f"{TENTH}, no teacher" if name.startswith(TENTH) else "no teacher"


def mean(seeds: list[dict[str, Any]]) -> float:
    return statistics.mean(accuracies(seeds))


def judged(rows: dict[str, list[dict[str, Any]]]) -> list[str]:
    """Which methods gained more than chance gives, and which did not."""
    groups: dict[str, list[str]] = {"more": [], "within": [], "less": []}
    for name, seeds in rows.items():
        if name != compared(name):
            low, high = gain_interval(seeds, rows[compared(name)], rows["no teacher"])
            groups["more" if low > 0 else "less" if high < 0 else "within"].append(name)
    said = {
        "more": "Better than no teacher",
        "within": "Neither, as far as these seeds can tell",
        "less": "Worse than no teacher",
    }
    found = accuracies(rows["no teacher"])
    how = (
        "By the 95 % interval of the gain: Welch's t over seeds where a row has several, else with "
        f"the spread of the seeds without a teacher: range {max(found) - min(found):.2f} points, "
        f"standard deviation {statistics.stdev(found):.2f}."
    )
    return [how, *(f"{said[key]}: {', '.join(names) or 'none'}." for key, names in groups.items())]


def gain_interval(
    seeds: list[dict[str, Any]], without: list[dict[str, Any]], spread_of: list[dict[str, Any]]
) -> tuple[float, float]:
    """95 % interval of the gain in points. A row of one seed is taken to vary as `spread_of`."""
    ours, theirs = accuracies(seeds), accuracies(without)
    if min(len(ours), len(theirs)) > 1:
        interval = stats.ttest_ind(ours, theirs, equal_var=False).confidence_interval(0.95)
        return float(interval.low), float(interval.high)
    others = accuracies(spread_of)
    error = statistics.stdev(others) * math.sqrt(1 / len(ours) + 1 / len(theirs))
    half = float(stats.t.ppf(0.975, len(others) - 1)) * error
    gain = statistics.mean(ours) - statistics.mean(theirs)
    return gain - half, gain + half


def accuracies(seeds: list[dict[str, Any]]) -> list[float]:
    return [row["accuracy"] for row in seeds]


if __name__ == "__main__":
    begun = time.perf_counter()
    main()
    print(f"{time.perf_counter() - begun:.0f} s")
