"""int8 files of one float file, ours beside others', and on other CPUs: benchmarks/int8_files.md.

    python scripts/bench_int8_files.py --work DIR [--part peers rescue cpus cost] [--images N]
                                       [--net NET …] [--nncf VENV/bin/python] [--sysroot DIR]

`peers`: ResNet-20 and MobileNetV2 on CIFAR-10 and ResNet-18 on 128 px photographs; each float file
made int8 by this project, by onnxruntime's defaults and by NNCF's (in a venv of its own, which has
nncf and onnx), then measured in turns in one run. `rescue`: a net that calibration alone does not
bring to int8 (`hard_to_quantize.py`): equalized, with layers back in float, and by QAT. `cpus`: the
files of `peers` on the emulated CPUs of `arm_sysroot`. `cost`: time and memory of making one.
DIR keeps the runs; networks are those of `bench_shrink.py` in the same DIR. Data: $EDGESTILL_DATA.
"""

from __future__ import annotations

import argparse
import datetime
import functools
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from bench_shrink import AUGMENT, DATA, ROOT, Wish, recipe_of
from edgestill.exporters.engagement import engagement
from edgestill.exporters.equalize import equalize
from edgestill.exporters.graph import read_model
from edgestill.exporters.int8 import encoding_for, quantize
from edgestill.exporters.stamp import write_model
from edgestill.exporters.to_onnx import export_onnx
from edgestill.models.store import load_network
from edgestill.models.zoo import build
from edgestill.pipeline import flow, learning, steps
from edgestill.pipeline.data.dataset import Data, open_data
from edgestill.pipeline.data.inputs import to_input
from edgestill.pipeline.measure.accuracy import logits_of_onnx
from edgestill.pipeline.measure.latency import measure_latency, speedup
from edgestill.pipeline.measure.machine import available_threads, describe_machine
from edgestill.pipeline.measure.turns import Row
from edgestill.pipeline.quantize.result import Prepared
from edgestill.pipeline.recipe import Recipe
from edgestill.pipeline.stage import Artifact, Silent
from edgestill.pipeline.work import Work, begin, model_of
from edgestill.pipeline.workspace import locked
from hard_to_quantize import spread
from int8_files_page import to_markdown
from onnxruntime.quantization import CalibrationDataReader, quantize_static
from onnxruntime.quantization.shape_inference import quant_pre_process
from safetensors.torch import save_file

PHOTOS = {
    "data": {
        "train": {"path": str(DATA / "flowers")},
        "test": {"fraction": 0.2},
        "calibration": 512,
        "preprocess": {"resize": 144, "crop": 128},
    },
    "student": {
        "model": "resnet18",
        "train": {"epochs": 4, "batch_size": 64, "optimizer": "adamw", "lr": 0.001,
                  "augment": {"crop": "resized", "flip": True}},
    },
    "quantize": {"targets": ["arm", "x86"]},
}  # fmt: skip
CIFAR_NETS = ("resnet20", "mobilenetv2")
PHOTO_NET = "resnet18 at 128 px"
PEERS = (*CIFAR_NETS, PHOTO_NET)
OURS, OURS_8BIT = "edgestill", "edgestill, targets: arm"
ORT, NNCF = "onnxruntime defaults", "NNCF defaults"
RETURNED, EQUALIZED = "int8 with float layers", "int8, equalize: true"
DECADES = 2.0
RESCUED = {"targets": ["arm", "x86"], "max_drop_points": 0.25, "qat": {"epochs": 6}}
HARD = {
    "model": str(ROOT / "scripts/hard_to_quantize.py:narrow"),
    "train": {"epochs": 8, "lr": 0.2, "augment": AUGMENT},
}
CPUS = ("pi4", "pi5", "avx2")
CPU_SAMPLES = 1000
COST_SAMPLES = 512


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--part", nargs="+", choices=list(PARTS), default=list(PARTS))
    parser.add_argument("--images", type=int, default=None)
    parser.add_argument("--nncf", type=Path, help="the Python that has nncf")
    parser.add_argument("--net", nargs="+", choices=PEERS, default=list(PEERS), help="of `peers`")
    parser.add_argument("--sysroot", type=Path, help="what scripts/arm_sysroot built")
    given = parser.parse_args()
    given.work = given.work.resolve()
    store = given.work / "int8_files.json"
    results = json.loads(store.read_text()) if store.exists() else {}
    given.kept = results.get("peers", {}).get("rows", {})
    for part in given.part:
        print(f"== {part}", flush=True)
        results[part] = {
            **PARTS[part](given),
            "date": datetime.date.today().isoformat(),
            "machine": describe_machine(),
        }
        store.write_text(json.dumps(results, indent=1))
    target = ROOT / "benchmarks" / "int8_files.md"
    target.write_text(to_markdown(results))
    print(target)


# the same float file, int8 by each


def peers(given: argparse.Namespace) -> dict[str, Any]:
    rows = dict(given.kept)
    for name in given.net:
        files, data = made(name, given)
        rows[name] = compared(files, data)
        print(json.dumps({name: rows[name]}, indent=1), flush=True)
    return {"rows": rows, "nncf": nncf_version(given.nncf)}


def made(name: str, given: argparse.Namespace) -> tuple[dict[str, Path], Data]:
    """The float file and the int8 ones, by who made them, and the data."""
    if name == PHOTO_NET:
        recipe = Recipe.model_validate(PHOTOS)
    else:
        wish = Wish(given.work, given.images, epochs=0)
        recipe = recipe_of(name, {"quantize": {"targets": ["arm", "x86"]}}, wish)
    folder = given.work / name.replace(" ", "-")
    with locked(folder) as root:
        work = begin(recipe, root, events=Silent(), fresh=False)
        artifact = steps.prepare_data(work)
        floating = steps.export_student(work, artifact, learnt(work, artifact), mark="")
        ours = steps.quantize(work, artifact, floating, mark="")
    source = model_of(floating)
    data = open_data(artifact.path, memory_budget_bytes=2**31)
    samples = Prepared(data)
    others = folder / "others"
    others.mkdir(exist_ok=True)
    np.save(others / "calibration.npy", samples[0 : len(samples)])
    files = {
        "float": source,
        OURS: model_of(ours),
        OURS_8BIT: others / "edgestill-arm.onnx",
        ORT: others / "onnxruntime.onnx",
        NNCF: others / "nncf.onnx",
    }
    exact = quantize(
        read_model(source), samples, encoding=encoding_for(("arm",)), threads=available_threads()
    )
    write_model(exact.model, files[OURS_8BIT])
    by_onnxruntime(source, others / "calibration.npy", files[ORT])
    if given.nncf:
        by_nncf(given.nncf, source, others / "calibration.npy", files[NNCF])
    return {who: path for who, path in files.items() if path.exists()}, data


class Reader(CalibrationDataReader):
    """The samples one by one, as onnxruntime's examples do."""

    def __init__(self, name: str, samples: np.ndarray[Any, Any]) -> None:
        self._name, self._left = name, iter(samples)

    def get_next(self) -> dict[str, Any] | None:
        sample = next(self._left, None)
        return None if sample is None else {self._name: sample[None]}


def by_onnxruntime(source: Path, samples: Path, target: Path) -> None:
    """As its documentation says: preprocess, then `quantize_static` with nothing chosen."""
    ready = target.with_suffix(".ready.onnx")
    quant_pre_process(str(source), str(ready))
    name = read_model(source).graph.input[0].name
    quantize_static(str(ready), str(target), Reader(name, np.load(samples)))


def by_nncf(python: Path, source: Path, samples: Path, target: Path) -> None:
    script = str(ROOT / "scripts" / "nncf_ptq.py")
    command = [str(python), script, str(source), str(samples), str(target)]
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    subprocess.run(command, check=True, env=environment)


@functools.cache
def nncf_version(python: Path | None) -> str:
    if python is None:
        return "not run"
    code = "import importlib.metadata as m; print(m.version('nncf'))"
    done = subprocess.run([str(python), "-c", code], check=True, capture_output=True, text=True)
    return done.stdout.strip()


def compared(
    files: dict[str, Path], data: Data, *, inputs: np.ndarray[Any, Any] | None = None
) -> dict[str, Any]:
    """Accuracy on all of test, size, int8 share; latency in turns in one run.

    inputs: what is timed; None: the first test samples.
    """
    threads = available_threads()
    if inputs is None:
        inputs = to_input(data.test.contents[:32], data.preprocess)
    measured = measure_latency(
        [Row(who, "onnx", path) for who, path in files.items()],
        inputs, launches=5, runs=200, threads=(1,), events=Silent(),
    )  # fmt: skip
    found = {}
    for (who, path), row in zip(files.items(), measured, strict=True):
        logits = logits_of_onnx(path, data.test, data.preprocess, threads=threads)
        ratio = speedup(measured[0], row)
        found[who] = {
            "correct": int((logits.argmax(1) == data.test.labels).sum()),
            "n": len(data.test.labels),
            "bytes": path.stat().st_size,
            "int8_share": engagement(path, inputs[:8])["int8_multiply_adds_share"],
            "p50_ms": row["p50_ms"],
            "launch_p50_ms": row["launch_p50_ms"],
            "speedup": ratio["ratio"],
            "speedup_ci95": ratio["ci95"],
        }
    return found


# where calibration alone is not enough


def rescue(given: argparse.Namespace) -> dict[str, Any]:
    wish = Wish(given.work, given.images, epochs=0)
    folder, quantized = given.work / "rescue", {"quantize": RESCUED}
    weights = folder / "spread.safetensors"
    with locked(folder) as root:
        work = begin(recipe_of(None, {"student": HARD}, wish), root, events=Silent(), fresh=False)
        student = learnt(work, steps.prepare_data(work))
        module = load_network(student.path).network.module
        torch.manual_seed(0)
        spread(module, decades=DECADES)
        save_file(module.state_dict(), weights)

        sections = {"student": {"model": HARD["model"], "weights": str(weights)}, **quantized}
        # the accuracy of layers in float is judged on validation, which shows less of it than test
        sections |= {"gate": {"max_quantization_drop_points": 0.05}}
        work = begin(recipe_of(None, sections, wish), root, events=Silent(), fresh=False)
        artifact = steps.prepare_data(work)
        floating = steps.export_student(work, artifact, learnt(work, artifact), mark="")
        calibrated = steps.quantize(work, artifact, floating, mark="")
        returned = steps.fall_back(work, artifact, floating, mark="")
        trained = steps.train_qat(work, artifact, floating, calibrated, mark="")
    data = open_data(artifact.path, memory_budget_bytes=2**31)
    made = {"float": floating, "int8": calibrated, RETURNED: returned, "int8 by QAT": trained}
    files = {who: model_of(one) for who, one in made.items()}
    files[EQUALIZED] = folder / "equalized.onnx"
    source = equalize(read_model(files["float"]))
    found = quantize(
        source, Prepared(data), encoding=encoding_for(("arm", "x86")), threads=available_threads()
    )
    write_model(found.model, files[EQUALIZED])
    rows = compared(files, data)
    print(json.dumps(rows, indent=1), flush=True)
    kept = returned.measurements["kept_float"]
    return {"rows": {"hard_to_quantize.py": rows}, "kept_float": kept, "decades": DECADES}


def learnt(work: Work, data: Artifact) -> Artifact:
    learning.check_before_training(work, data)
    return flow.learn(work, data, [])


# the same files on other CPUs


def cpus(given: argparse.Namespace) -> dict[str, Any]:
    if given.sysroot is None:
        raise SystemExit("--part cpus needs --sysroot, a folder that scripts/arm_sysroot built")
    rows = {}
    for name in CIFAR_NETS:
        files, data = made(name, given)
        inputs = given.work / "cpus-inputs.npy"
        np.save(inputs, to_input(data.test.contents[:CPU_SAMPLES], data.preprocess))
        rows[name] = {
            who: {
                cpu: differences(answers("here", files[who], inputs, given.sysroot),
                                 answers(cpu, files[who], inputs, given.sysroot))
                for cpu in CPUS
            }
            for who in (OURS, OURS_8BIT, ORT)
        }  # fmt: skip
        print(json.dumps({name: rows[name]}, indent=1), flush=True)
    return {"rows": rows, "samples": CPU_SAMPLES}


def answers(cpu: str, model: Path, inputs: Path, sysroot: Path) -> np.ndarray[Any, Any]:
    logits = inputs.with_name(f"cpus-{cpu}.npy")
    python = [sys.executable] if cpu == "here" else [str(sysroot / "run"), cpu]
    script = str(ROOT / "scripts" / "run_onnx.py")
    command = [*python, script, str(model), str(inputs), str(logits)]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return np.asarray(np.load(logits))


def differences(here: np.ndarray[Any, Any], there: np.ndarray[Any, Any]) -> dict[str, Any]:
    differ = (here != there).any(axis=1)
    return {
        "n": len(here),
        "differ": int(differ.sum()),
        "same_class": int((here.argmax(1) == there.argmax(1)).sum()),
        "largest": float(np.abs(here - there).max()),
        "scale": float(np.abs(here).max()),
    }


# what it costs


def cost(given: argparse.Namespace) -> dict[str, Any]:
    """`compress quantize` of MobileNetV2-1.0 at 224 px, and one audit. Weights are random."""
    model, out = given.work / "mobilenetv2-224.onnx", given.work / "cost"
    torch.manual_seed(0)
    net = build("mobilenetv2", {}, classes=5, in_channels=3).eval()
    export_onnx(net, torch.zeros(2, 3, 224, 224), model, batch="dynamic")
    command = [
        *(sys.executable, "-P", "-m", "edgestill", "quantize", str(model)),
        *("--data", str(DATA / "flowers"), "--mean", "0.485,0.456,0.406"),
        *("--std", "0.229,0.224,0.225", "--resize", "256", "--crop", "224"),
        *("--set", f"data.calibration={COST_SAMPLES}", "--set", "quantize.fallback=false"),
        *("--set", "gate.max_drop_points=100", "--set", "quantize.max_drop_points=100"),
        *("-o", str(out), "--fresh"),
    ]
    begun = time.perf_counter()
    process = subprocess.Popen(command)
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - begun
    code = os.waitstatus_to_exitcode(status)
    report = json.loads((out / "report.json").read_text())
    stages = {stage["name"]: stage for stage in report["stages"]}
    audits = {}
    for name in ("rejected.onnx", "model.onnx"):
        if (out / name).exists():
            begun = time.perf_counter()
            engagement(out / name)
            audits[name] = time.perf_counter() - begun
    return {
        "exit": code,
        "samples": COST_SAMPLES,
        "seconds": seconds,
        "peak_rss_bytes": usage.ru_maxrss * 1024,
        "int8_seconds": stages["int8"]["seconds"],
        "int8_peak_rss_bytes": _peak_of_int8(out),
        "audit_seconds": audits,
        "threads": available_threads(),
    }


def _peak_of_int8(out: Path) -> int:
    """The int8 stage of that run once more, in a process that does nothing else."""
    code = """
import sys, tempfile
from pathlib import Path
from edgestill.pipeline.quantize.ptq import quantize_static
from edgestill.pipeline.recipe_file import load_recipe
from edgestill.pipeline.stage import Context, Silent
out = Path(sys.argv[1])
recipe = load_recipe(str(out / "recipe.yaml"))
(floating,), (data,) = ((out / ".edgestill/stages" / s).glob("*") for s in ("float", "data"))
with tempfile.TemporaryDirectory() as scratch:
    quantize_static(
        floating, data, recipe.quantize, context=Context(0, 1, "cpu", Path(scratch), Silent()),
        export=recipe.export,
        memory_budget_bytes=int(recipe.compute.memory_budget_gib * 2**30),
    )
"""
    process = subprocess.Popen([sys.executable, "-P", "-c", code, str(out)])
    _, status, usage = os.wait4(process.pid, 0)
    assert os.waitstatus_to_exitcode(status) == 0, "the stage failed"
    return usage.ru_maxrss * 1024


PARTS: dict[str, Callable[[argparse.Namespace], dict[str, Any]]] = {
    "peers": peers,
    "rescue": rescue,
    "cpus": cpus,
    "cost": cost,
}


if __name__ == "__main__":
    main()
