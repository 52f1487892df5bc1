"""Measure the main job and write benchmarks/main_job.md. Every figure comes from a run made here.

    python scripts/bench_main_job.py --work DIR [--part start digits loop cifar flowers]

DIR keeps the runs, so that a stopped benchmark goes on where it was (finished stages are recalled;
the seconds shown are those of the run that did the work). Data: $EDGESTILL_DATA, see README.
Parts that were measured before and are not asked for again are taken from DIR/results.json.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml
from edgestill.pipeline.measure.machine import describe_machine
from edgestill.pipeline.recipe_file import load_recipe

ROOT = Path(__file__).resolve().parent.parent
DATA = Path(os.environ.get("EDGESTILL_DATA", ROOT / "../shared/data")).resolve()
COMPRESS = [sys.executable, "-P", "-m", "edgestill"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--part", nargs="+", choices=list(PARTS), default=list(PARTS))
    arguments = parser.parse_args()
    work = arguments.work.resolve()
    work.mkdir(parents=True, exist_ok=True)
    store = work / "results.json"
    results = json.loads(store.read_text()) if store.exists() else {}
    for part in arguments.part:
        print(f"== {part}", flush=True)
        results[part] = PARTS[part](work) | {
            "date": datetime.date.today().isoformat(),
            "machine": describe_machine(),
        }
        store.write_text(json.dumps(results, indent=1))
    target = ROOT / "benchmarks" / "main_job.md"
    target.write_text(to_markdown(results))
    print(target)


def start(work: Path) -> dict[str, Any]:
    """How soon the command answers."""
    bad = work / "bad.yaml"
    bad.write_text("task: image-classification\nstudnet: {model: resnet20}\n")
    commands = {
        "compress --help": ([*COMPRESS, "--help"], 0),
        "compress run with an invalid recipe": ([*COMPRESS, "run", str(bad)], 2),
    }
    rows: dict[str, list[float]] = {name: [] for name in commands}
    for _ in range(11):  # in turns; the first round is warm-up
        for name, (command, code) in commands.items():
            begun = time.perf_counter()
            done = subprocess.run(command, capture_output=True)
            rows[name].append(time.perf_counter() - begun)
            assert done.returncode == code, done.stderr.decode()
    return {"seconds": {name: values[1:] for name, values in rows.items()}}


def digits(work: Path) -> dict[str, Any]:
    """The built-in recipe from nothing to a model, three times."""
    runs = [run_compress(["run", "-o", str(work / "digits"), "--fresh", "-q"]) for _ in range(3)]
    return {"runs": runs, "report": brief(work / "digits")}


def loop(_: Path) -> dict[str, Any]:
    """Training throughput against a bare loop, in turns in one process."""
    done = subprocess.run(
        [sys.executable, "-P", str(ROOT / "scripts" / "bench_train_loop.py")],
        check=True, capture_output=True, text=True,
    )  # fmt: skip
    return dict(json.loads(done.stdout))


def cifar(work: Path) -> dict[str, Any]:
    """The shipped recipe, and the same student without a teacher under the same schedule."""
    shipped = load_recipe("cifar10", overrides=[]).model_dump(mode="json")
    alone = {**shipped, "teacher": None, "distill": None, "gate": {"max_drop_points": 3.0}}
    schedule = dict(shipped["distill"])
    for key in ("strategy", "temperature", "soft_weight", "hard_weight", "views"):
        schedule.pop(key)
    alone["student"] = {**shipped["student"], "train": schedule}
    recipe = work / "cifar10-alone.yaml"
    recipe.write_text(yaml.safe_dump(alone))
    runs = {
        "distilled": run_compress(
            ["run", "cifar10", "-o", str(work / "cifar10")], accept=(0, 1, 3)
        ),
        "alone": run_compress(
            ["run", str(recipe), "-o", str(work / "cifar10-alone")], accept=(0, 1, 3)
        ),
    }
    return {
        "runs": runs,
        "distilled": brief(work / "cifar10"),
        "alone": brief(work / "cifar10-alone"),
    }


def run_compress(arguments: list[str], accept: tuple[int, ...] = (0,)) -> dict[str, Any]:
    """Run the command from a folder where relative data paths work; wall time and peak memory."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    begun = time.perf_counter()
    environment = os.environ | {"EDGESTILL_DATA": str(DATA)}
    process = subprocess.Popen([*COMPRESS, *arguments], env=environment)
    _, status, usage = os.wait4(process.pid, 0)
    code = os.waitstatus_to_exitcode(status)
    process.returncode = code
    assert code in accept, f"{arguments}: exit {code}"
    del before
    return {
        "exit_code": code,
        "seconds": time.perf_counter() - begun,
        "peak_rss_bytes": usage.ru_maxrss * 1024,
    }


def brief(folder: Path) -> dict[str, Any]:
    """What the tables need of a report."""
    report = json.loads((folder / "report.json").read_text())
    for row in report["latency"]:
        del row["raw_ns"]
    kept = ("models", "pairs", "latency", "speedup", "verdict", "parity", "notes", "reference")
    stages = {s["name"]: s["seconds"] for s in report["stages"]}
    return {key: report[key] for key in kept} | {"stages": stages, "recipe": report["recipe"]}


PARTS: dict[str, Callable[[Path], dict[str, Any]]] = {
    "start": start,
    "digits": digits,
    "loop": loop,
    "cifar": cifar,
}


def to_markdown(results: dict[str, Any]) -> str:
    lines = ["# The main job", "", "Made by `scripts/bench_main_job.py`.", ""]
    for part in PARTS:
        if part in results:
            machine = results[part]["machine"]
            versions = ", ".join(f"{k} {v}" for k, v in machine["versions"].items() if v)
            lines += [*RENDER[part](results[part]), ""]
            lines += [f"{results[part]['date']}, {machine['cpu_model']}, {versions}.", ""]
    return "\n".join(lines).rstrip() + "\n"


def render_start(result: dict[str, Any]) -> list[str]:
    rows = [
        f"| `{name}` | {statistics.median(v):.3f} | {min(v):.3f}–{max(v):.3f} | {len(v)} |"
        for name, v in result["seconds"].items()
    ]
    return [
        "## Answering",
        "",
        "| command | median, s | range | n |",
        "| --- | --- | --- | --- |",
        *rows,
    ]


def render_digits(result: dict[str, Any]) -> list[str]:
    seconds = [run["seconds"] for run in result["runs"]]
    peak = max(run["peak_rss_bytes"] for run in result["runs"])
    return [
        "## Built-in recipe (digits), from nothing to a model",
        "",
        f"median {statistics.median(seconds):.1f} s of {len(seconds)} runs "
        f"({min(seconds):.1f}–{max(seconds):.1f}), peak memory {peak / 2**30:.2f} GiB",
        "",
        *model_table(result["report"]),
    ]


def render_loop(result: dict[str, Any]) -> list[str]:
    head = ["## Student training against a bare loop", "", result["what"], ""]
    rows = [
        f"| {name} | {statistics.median(v):.0f} | {min(v):.0f}–{max(v):.0f} | {len(v)} |"
        for name, v in result["images_per_second"].items()
    ]
    table = ["| loop | images/s, median | range | n |", "| --- | --- | --- | --- |", *rows]
    return [*head, *table, "", f"ratio of medians {result['ratio']:.3f}"]


def render_cifar(result: dict[str, Any]) -> list[str]:
    lines = ["## CIFAR-10 (`compress run cifar10`)", ""]
    for name in ("distilled", "alone"):
        run, report = result["runs"][name], result[name]
        stages = ", ".join(f"{stage} {seconds:.0f}" for stage, seconds in report["stages"].items())
        title = "Distilled" if name == "distilled" else "The same student and schedule, no teacher"
        lines += [f"### {title}", "", *model_table(report), ""]
        lines += [
            f"- {c['outcome'].upper()} {c['name']}: {c['text']}"
            for c in report["verdict"]["checks"]
        ]
        lines += [
            f"- peak memory {run['peak_rss_bytes'] / 2**30:.2f} GiB; seconds by stage: {stages}",
            "",
        ]
    return lines


def model_table(report: dict[str, Any]) -> list[str]:
    latency = {row["name"]: row for row in report["latency"] if row["threads"] == 1}
    onnx = {"teacher": "teacher-onnx", "student": None, "float": "float", "int8": "int8"}
    rows = []
    for model in report["models"]:
        row = latency.get(onnx[model["role"]] or "")
        p50 = (
            ""
            if row is None
            else f"{row['p50_ms']:.3f} ({row['launch_p50_ms'][0]:.3f}–{row['launch_p50_ms'][1]:.3f})"
        )
        size = (
            "" if model["onnx_bytes"] is None or row is None else f"{model['onnx_bytes'] / 1e3:.1f}"
        )
        macs = "" if model["multiply_adds"] is None else f"{model['multiply_adds'] / 1e6:.2f}"
        rows.append(
            f"| {model['role']} | {model['runs_in']} | {100 * model['correct'] / model['n']:.2f} "
            f"| {model['n']} | {macs} | {size} | {p50} |"
        )
    header = "| model | runs in | test accuracy, % | n | M multiply-adds | ONNX, kB | p50, ms, 1 thread (launches) |"
    return [header, "| --- " * 7 + "|", *rows]


RENDER: dict[str, Callable[[dict[str, Any]], list[str]]] = {
    "start": render_start,
    "digits": render_digits,
    "loop": render_loop,
    "cifar": render_cifar,
}


if __name__ == "__main__":
    main()
