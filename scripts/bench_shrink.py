"""Measure pruning and int8 and write benchmarks/shrink.md. Every figure is of a run made here.

    python scripts/bench_shrink.py --work DIR [--part prune int8] [--net resnet20 resnet56 …]
                                   [--images N] [--epochs E]

`prune`: ResNet-56 and MobileNetV2 cut to half their multiply-adds, on CIFAR-10. `int8`: the same
nets and ResNet-20 by calibration alone. Latencies are of one thread, batch 1.
DIR keeps the runs, so that a stopped benchmark goes on where it was. Data: $EDGESTILL_DATA, see
README. `--images` takes that many training images, all by default. `--net` measures those alone,
and leaves the others in DIR as they were.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
from edgestill.pipeline.data.dataset import open_data
from edgestill.pipeline.flow import run
from edgestill.pipeline.measure.accuracy import accuracy, logits_of_onnx
from edgestill.pipeline.measure.machine import available_threads, describe_machine
from edgestill.pipeline.recipe import Recipe
from edgestill.pipeline.report import Report
from edgestill.pipeline.stage import Silent

ROOT = Path(__file__).resolve().parent.parent
DATA = Path(os.environ.get("EDGESTILL_DATA", ROOT / "../shared/data")).resolve()

IMAGENET = {"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}
AUGMENT = {"crop": "pad", "pad": 4, "flip": True}
FINE_TUNED = {"epochs": 2, "lr": 0.01, "warmup_epochs": 0.5, "augment": AUGMENT}
FROM_SCRATCH = {"epochs": 16, "lr": 0.2, "augment": AUGMENT}
NETS: dict[str, dict[str, Any]] = {
    "resnet20": {
        "model": "resnet20",
        "weights": str(DATA / "checkpoints/resnet20-12fca82f.th"),
        "train": FINE_TUNED,
    },
    "resnet56": {
        "model": "resnet56",
        "weights": str(DATA / "checkpoints/resnet56-4bfd9763.th"),
        "train": FINE_TUNED,
    },
    "mobilenetv2": {"model": "mobilenetv2", "args": {"width": 0.5}, "train": FROM_SCRATCH},
}
WIDE = {"max_drop_points": 20}  # so that the smaller file is tested, whatever it loses
PRUNED = ("resnet56", "mobilenetv2")  # by `prune`, where nothing is chosen


@dataclass(frozen=True)
class Wish:
    """What the command line asks for."""

    work: Path
    images: int | None
    epochs: int
    nets: tuple[str, ...] = tuple(NETS)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--part", nargs="+", choices=list(PARTS), default=list(PARTS))
    parser.add_argument("--images", type=int, default=None)
    parser.add_argument("--epochs", type=int, default=12, help="of recovery")
    parser.add_argument("--net", nargs="+", choices=NETS, default=list(NETS))
    given = parser.parse_args()
    wish = Wish(given.work.resolve(), given.images, given.epochs, tuple(given.net))
    wish.work.mkdir(parents=True, exist_ok=True)
    store = wish.work / "results.json"
    results = json.loads(store.read_text()) if store.exists() else {}
    for part in given.part:
        print(f"== {part}", flush=True)
        schedule = {"images": given.images, "epochs": given.epochs}
        kept = results.get(part, {})
        rows = kept["rows"] if kept and schedule.items() <= kept.items() else {}
        rows |= PARTS[part](wish)
        results[part] = {
            "rows": {name: rows[name] for name in NETS if name in rows},
            **schedule,
            "date": datetime.date.today().isoformat(),
            "machine": describe_machine(),
        }
        store.write_text(json.dumps(results, indent=1))
    target = ROOT / "benchmarks" / "shrink.md"
    target.write_text(to_markdown(results))
    print(target)


def prune(wish: Wish) -> dict[str, Any]:
    """Half of the multiply-adds, float."""
    recover = {"epochs": wish.epochs, "lr": 0.05}
    sections = {"prune": {"macs": 0.5, "recover": recover}, "gate": WIDE}
    return {name: pruned(name, sections, wish) for name in PRUNED if name in wish.nets}


def pruned(name: str, sections: dict[str, Any], wish: Wish) -> dict[str, Any]:
    """What the run says, and every candidate's accuracy on test: the choice rests on validation,
    which the public weights have seen."""
    found = described(made(name, sections, wish))
    stages = wish.work / name / ".edgestill" / "stages"
    data = open_data(_newest(stages / "data"), memory_budget_bytes=2**31)
    for row in found["candidates"]:
        mark = row["name"].removeprefix("float").strip()
        path = _newest(stages / f"export{mark and '-' + mark}") / "model.onnx"
        logits = logits_of_onnx(path, data.test, data.preprocess, threads=available_threads())
        row["test_accuracy"] = 100 * accuracy(logits, data.test.labels)
    return found


def _newest(stage: Path) -> Path:
    return max(stage.iterdir(), key=lambda path: path.stat().st_mtime)


def int8(wish: Wish) -> dict[str, Any]:
    """Calibration alone, for every CPU."""
    quantize = {"targets": ["arm", "x86"], "fallback": False, "qat": None, **WIDE}
    sections = {"quantize": quantize, "gate": WIDE}
    return {name: described(made(name, sections, wish)) for name in wish.nets}


PARTS: dict[str, Callable[[Wish], dict[str, Any]]] = {"prune": prune, "int8": int8}


def made(name: str, sections: dict[str, Any], wish: Wish) -> Report:
    """The main job with these sections, in a folder of this net's own: training is shared."""
    report = run(recipe_of(name, sections, wish), wish.work / name, events=Silent())
    assert report is not None
    return report


def recipe_of(name: str | None, sections: dict[str, Any], wish: Wish) -> Recipe:
    """name: a net of NETS; None: `sections` has the student."""
    return Recipe.model_validate(
        {
            "data": {
                "train": {"path": str(subset(wish))},
                "test": {"path": str(DATA / "cifar10-jpeg/test.parquet")},
                "validation": 0.1,
                "calibration": 512,
                "preprocess": IMAGENET,
            },
            **({"student": NETS[name]} if name else {}),
            **sections,
        }
    )


def described(report: Report) -> dict[str, Any]:
    """What the table needs of a run."""
    p50 = {row.name: row.p50_ms for row in report.latency if row.threads == 1}
    ranges = {row.name: row.launch_p50_ms for row in report.latency if row.threads == 1}
    assert report.verdict is not None
    return {
        "models": [
            {"role": m.role, "accuracy": 100 * m.accuracy, "n": m.n, "bytes": m.onnx_bytes,
             "multiply_adds": m.multiply_adds}
            for m in report.models
        ],
        "reference": report.reference,
        "deployed": report.deployed,
        "p50_ms": p50,
        "launch_p50_ms": ranges,
        "speedup": None if report.speedup is None else report.speedup.model_dump(),
        "candidates": [one.model_dump() for one in report.candidates],
        "selection": report.selection.model_dump(),
        "seconds": {stage.name: stage.seconds for stage in report.stages},
        "verdict": report.verdict.outcome,
        "checks": [check.text for check in report.verdict.checks],
    }  # fmt: skip


def subset(wish: Wish) -> Path:
    """The first rows of the training file, which is in random order."""
    whole = DATA / "cifar10-jpeg/train.parquet"
    if wish.images is None:
        return whole
    path = wish.work / f"train-{wish.images}.parquet"
    if not path.exists():
        pq.write_table(pq.read_table(whole).slice(0, wish.images), path)
    return path


def to_markdown(results: dict[str, Any]) -> str:
    lines = ["# Pruning and int8", "", "Made by `scripts/bench_shrink.py`.", ""]
    titles = {
        "prune": "Pruned to half the multiply-adds, with recovery",
        "int8": "int8 by calibration alone",
    }
    for part, result in results.items():
        machine = result["machine"]
        images = "all" if result["images"] is None else f"{result['images']:,}"
        lines += [f"## {titles[part]}", "", f"CIFAR-10 (JPEG), {images} training images.", ""]
        for name, row in result["rows"].items():
            lines += [f"### {name}", "", *table(row), ""]
        versions = ", ".join(f"{k} {v}" for k, v in machine["versions"].items() if v)
        lines += [f"{result['date']}, {machine['cpu_model']}, {versions}.", ""]
    return "\n".join(lines).rstrip() + "\n"


def table(row: dict[str, Any]) -> list[str]:
    """The test set's models, then the candidates that were tried."""
    files = {"teacher": "teacher-onnx", "dense": "dense-onnx", "float": "float", "int8": "int8"}
    lines = [
        "| model | test accuracy, % | n | M multiply-adds | ONNX, kB | p50, ms (launches) |",
        "| --- " * 6 + "|",
    ]
    for model in row["models"]:
        p50 = row["p50_ms"].get(files.get(model["role"], ""))
        shown = ""
        if p50 is not None:
            low, high = row["launch_p50_ms"][files[model["role"]]]
            shown = f"{p50:.3f} ({low:.3f}–{high:.3f})"
        lines.append(
            f"| {model['role']} | {model['accuracy']:.2f} | {model['n']:,} "
            f"| {(model['multiply_adds'] or 0) / 1e6:.1f} "
            f"| {(model['bytes'] or 0) / 1e3:.0f} | {shown} |"
        )
    if row["speedup"] is not None:
        s = row["speedup"]
        lines += ["", f"`{s['candidate']}` is {s['ratio']:.2f}× as fast as `{s['reference']}` "
                  f"(95 % interval {s['ci95'][0]:.2f} to {s['ci95'][1]:.2f})."]  # fmt: skip
    lines += [
        "",
        "| candidate | validation, % | test, % | p50, ms | kB | M multiply-adds | int8 share |",
        "| --- " * 7 + "|",
    ]
    for index, one in enumerate(row["candidates"]):
        mark = " (went on)" if index == row["selection"]["index"] else ""
        tested = f"{one['test_accuracy']:.2f}" if "test_accuracy" in one else ""
        lines.append(
            f"| {one['name']}{mark} | {100 * one['correct'] / one['n']:.2f} | {tested} "
            f"| {one['p50_ms'] or 0:.3f} | {one['bytes'] / 1e3:.0f} "
            f"| {one['multiply_adds'] / 1e6:.1f} | {100 * one['int8_share']:.1f} % |"
        )
    return lines


if __name__ == "__main__":
    begun = time.perf_counter()
    main()
    print(f"{time.perf_counter() - begun:.0f} s")
