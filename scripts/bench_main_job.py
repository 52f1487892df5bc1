"""Measure the main job and write benchmarks/main_job.md. Every figure comes from a run made here.

    python scripts/bench_main_job.py --work DIR [--part start digits loop cifar cifar-alone flowers]

DIR keeps the runs, so that a stopped benchmark goes on where it was (finished stages are recalled;
the seconds shown are those of the run that did the work). Data: $EDGESTILL_DATA, see README.
Parts that were measured before and are not asked for again are taken from DIR/results.json.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
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
from edgestill.pipeline.training_spec import TrainSpec

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
    """The shipped recipe."""
    run = run_compress(["run", "cifar10", "-o", str(work / "cifar10")], accept=(0, 1, 3))
    return {"runs": {"distilled": run}, "distilled": brief(work / "cifar10")}


def cifar_alone(work: Path) -> dict[str, Any]:
    """The same student without a teacher under the same schedule."""
    shipped = load_recipe("cifar10").model_dump(mode="json")
    schedule = {name: shipped["distill"][name] for name in TrainSpec.model_fields}
    student = {**shipped["student"], "train": schedule}
    alone = {**shipped, "teacher": None, "distill": None, "student": student}
    alone["gate"] = {"max_drop_points": 1.0}
    recipe = work / "cifar10-alone.yaml"
    recipe.write_text(yaml.safe_dump(alone))
    run = run_compress(["run", str(recipe), "-o", str(work / "cifar10-alone")], accept=(0, 1, 3))
    return {"runs": {"alone": run}, "alone": brief(work / "cifar10-alone")}


def flowers(work: Path) -> dict[str, Any]:
    """Trained nets of one's own at 128 and 224 px, and a teacher and student on the same photos."""
    photos = work / "flowers"
    if not photos.is_dir():
        split_photos(DATA / "flowers", photos)
    result: dict[str, Any] = {"runs": {}}
    for name, net, size, epochs in OWN_NETS:
        weights, recipe = work / f"{name}.pth", work / f"{name}.yaml"
        if not weights.exists():
            script = str(ROOT / "scripts" / "train_plain.py")
            command = [sys.executable, "-P", script, net, str(photos / "train"), str(weights)]
            sizes = ["--size", str(size), "--epochs", str(epochs)]
            subprocess.run([*command, *sizes], check=True)
        recipe.unlink(missing_ok=True)
        found = ["--model", net, "--weights", str(weights), "--size", str(size)]
        sets = ["--data", str(photos / "train"), "--test", str(photos / "test")]
        run_compress(["init", *found, *sets, "-o", str(recipe)])
        result["runs"][name] = run_compress(["run", str(recipe), "-o", str(work / name)], (0, 1, 3))
        result[name] = brief(work / name)
    recipe = work / "flowers-distilled.yaml"
    recipe.write_text(FLOWERS_RECIPE)
    result["runs"]["distilled"] = run_compress(
        ["run", str(recipe), "-o", str(work / "flowers-distilled")], (0, 1, 3)
    )
    result["distilled"] = brief(work / "flowers-distilled")
    return result


# name, net, input size, epochs of plain training: enough for a net that answers well above chance
OWN_NETS = (("own-128", "resnet18", 128, 2), ("own-224", "resnet18", 224, 2))
FLOWERS_RECIPE = """\
# photographs in one folder without a split; a ResNet-18 trained here teaches MobileNetV2-0.35
data:
  train: {path: flowers/all}
  test: {fraction: 0.2}
  preprocess: {resize: 128, crop: 128}
teacher:
  model: resnet18
  train: {epochs: 3, batch_size: 64, optimizer: adamw, lr: 0.001,
          augment: {crop: resized, flip: true}}
student:
  model: mobilenetv2
  args: {width: 0.35}
distill: {epochs: 6, batch_size: 64, optimizer: adamw, lr: 0.003, views: 3,
          augment: {crop: resized, flip: true}}
quantize: {}
gate: {max_drop_points: 5}
"""


def split_photos(source: Path, target: Path) -> None:
    """`all` is the folder as it is; every fifth file of a class, by name, goes to `test`.

    Photographs that occur twice are left out of `train` and `test`: they would be in both.
    """
    seen = set()
    for folder in sorted(source.iterdir()):
        for part in ("all", "train", "test"):
            (target / part / folder.name).mkdir(parents=True)
        for index, file in enumerate(sorted(folder.iterdir())):
            content = file.read_bytes()
            (target / "all" / folder.name / file.name).write_bytes(content)
            if content not in seen:
                part = "test" if index % 5 == 0 else "train"
                (target / part / folder.name / file.name).write_bytes(content)
            seen.add(content)


def run_compress(arguments: list[str], accept: tuple[int, ...] = (0,)) -> dict[str, Any]:
    """Run the command from a folder where relative data paths work; wall time and peak memory."""
    begun = time.perf_counter()
    environment = os.environ | {"EDGESTILL_DATA": str(DATA)}
    process = subprocess.Popen([*COMPRESS, *arguments], env=environment)
    _, status, usage = os.wait4(process.pid, 0)
    code = os.waitstatus_to_exitcode(status)
    process.returncode = code
    assert code in accept, f"{arguments}: exit {code}"
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
    "cifar-alone": cifar_alone,
    "flowers": flowers,
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
        for name, v in result["samples_per_second"].items()
    ]
    table = ["| loop | images/s, median | range | n |", "| --- | --- | --- | --- |", *rows]
    return [*head, *table, "", f"ratio of medians {result['ratio']:.3f}"]


def render_cifar(result: dict[str, Any]) -> list[str]:
    title = "CIFAR-10 (`compress run cifar10`), distilled from the fine-tuned ResNet-56"
    return run_sections(result, {"distilled": title}, level="##")


def render_cifar_alone(result: dict[str, Any]) -> list[str]:
    title = "CIFAR-10, the same student and schedule without a teacher"
    return run_sections(result, {"alone": title}, level="##")


def render_flowers(result: dict[str, Any]) -> list[str]:
    titles = {
        "own-128": "ResNet-18 at 128 px, trained elsewhere, no teacher",
        "own-224": "ResNet-18 at 224 px, trained elsewhere, no teacher",
        "distilled": "ResNet-18 teacher trained here, MobileNetV2-0.35 student, 128 px",
    }
    return ["## Photographs of flowers", "", *run_sections(result, titles)]


def run_sections(
    result: dict[str, Any], titles: dict[str, str], *, level: str = "###"
) -> list[str]:
    lines = []
    for name, title in titles.items():
        if name not in result:
            continue
        run, report = result["runs"][name], result[name]
        lines += [f"{level} {title}", "", *model_table(report), ""]
        for check in report["verdict"]["checks"]:
            lines.append(f"- {check['outcome'].upper()} {check['name']}: {check['text']}")
        text = f"- exit {run['exit_code']}"
        if "peak_rss_bytes" in run:  # unknown where a finished run was taken over
            text += f"; peak memory {run['peak_rss_bytes'] / 2**30:.2f} GiB"
        lines += [text, ""]
    return lines


def model_table(report: dict[str, Any]) -> list[str]:
    latency = {row["name"]: row for row in report["latency"] if row["threads"] == 1}
    onnx = {"teacher": "teacher-onnx", "student": "", "float": "float", "int8": "int8"}
    rows = []
    for model in report["models"]:
        row = latency.get(onnx[model["role"]])
        p50 = size = ""
        if row is not None:
            low, high = row["launch_p50_ms"]
            p50 = f"{row['p50_ms']:.3f} ({low:.3f}–{high:.3f})"
            size = f"{model['onnx_bytes'] / 1e3:.1f}"
        macs = "" if model["multiply_adds"] is None else f"{model['multiply_adds'] / 1e6:.2f}"
        rows.append(
            f"| {model['role']} | {model['runs_in']} | {100 * model['correct'] / model['n']:.2f} "
            f"| {model['n']} | {macs} | {size} | {p50} |"
        )
    header = (
        "| model | runs in | test accuracy, % | n | M multiply-adds | ONNX, kB "
        "| p50, ms, 1 thread (launches) |"
    )
    return [header, "| --- " * 7 + "|", *rows]


RENDER: dict[str, Callable[[dict[str, Any]], list[str]]] = {
    "start": render_start,
    "digits": render_digits,
    "loop": render_loop,
    "cifar": render_cifar,
    "cifar-alone": render_cifar_alone,
    "flowers": render_flowers,
}


if __name__ == "__main__":
    main()
