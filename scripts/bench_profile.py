"""How exact `compress profile` is, what it says of two recipes' files, and what other CPUs answer:
benchmarks/profile.md.

    python scripts/bench_profile.py --work DIR [--part agent why cpus] [--launches 8]
                                    [--run cifar10=DIR sst2=DIR] [--board NAME] [--sysroot DIR]

`agent`: a network of about 0.3 ms is timed by the agent and by a loop of this script's own that
shares no code with it, each in a fresh process of its own, in turns A B B A. So what the agent
adds to an inference, and whether its medians are right, shows on the same machine at the same time.
Beside it: how long `--quick` takes, and from a connection to a board (of devices.yaml in the
working folder) to the first inference there. `why`: `compress profile --why` of teacher, float and
int8 of finished runs. `cpus`: `compress verify --device` of their int8 files on emulated CPUs, and
of the same float files made int8 with 8-bit weights, which is not for a CPU without VNNI. DIR keeps
what was measured.
"""

from __future__ import annotations

import argparse
import datetime
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import onnx
from edgestill.exporters.feeds import is_tokens
from edgestill.exporters.graph import read_model
from edgestill.exporters.int8 import encoding_for, quantize
from edgestill.exporters.stamp import write_model
from edgestill.pipeline.cli import entry
from edgestill.pipeline.data.dataset import open_data
from edgestill.pipeline.data.inputs import repeated_to, to_input
from edgestill.pipeline.measure.agent_process import running
from edgestill.pipeline.measure.answers import answers_of
from edgestill.pipeline.measure.latency_stats import ratio_of
from edgestill.pipeline.measure.machine import available_threads, describe_machine
from edgestill.pipeline.measure.turns import block_order, stored
from edgestill.pipeline.profile.devices import device_named
from edgestill.pipeline.profile.inputs import noise, signature_of
from edgestill.pipeline.profile.transport import opened
from edgestill.pipeline.quantize.result import Prepared
from edgestill.pipeline.stage import Silent
from onnx import TensorProto, helper, numpy_helper

ROOT = Path(__file__).resolve().parent.parent
WIDTH, LAYERS = 512, 12  # 0.3 ms on the machine of the page
RUNS, BLOCKS = 200, 4
INPUTS, TOKENS = 32, 32
CPUS = {"a72": "pi4", "a76": "pi5", "avx2": "avx2"}
CARELESS = "8-bit weights"

# Nothing of the agent: no closure, no rotation by index, no block protocol but "run" and numbers.
BARE = """
import sys, time
import numpy as np, onnxruntime as ort
options = ort.SessionOptions()
options.intra_op_num_threads = 1
session = ort.InferenceSession(sys.argv[1], options, providers=["CPUExecutionProvider"])
inputs = np.load(sys.argv[2])["input"]
feeds = [{"input": inputs[k : k + 1]} for k in range(len(inputs))]
for line in sys.stdin:
    for feed in feeds: session.run(None, feed)
    out = []
    for k in range(int(line)):
        feed = feeds[k % len(feeds)]
        a = time.perf_counter_ns(); session.run(None, feed); b = time.perf_counter_ns()
        out.append(b - a)
    print(*out, flush=True)
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--part", nargs="+", choices=list(PARTS), default=list(PARTS))
    parser.add_argument("--launches", type=int, default=8)
    parser.add_argument("--run", nargs="+", default=[], metavar="NAME=DIR")
    parser.add_argument("--board", metavar="NAME")
    parser.add_argument("--sysroot", type=Path, help="what scripts/arm_sysroot built")
    given = parser.parse_args()
    given.work = given.work.resolve()
    given.work.mkdir(parents=True, exist_ok=True)
    store = given.work / "profile.json"
    results = json.loads(store.read_text()) if store.exists() else {}
    for part in given.part:
        results[part] = {
            "found": PARTS[part](given),
            "date": datetime.date.today().isoformat(),
            "machine": describe_machine(),
        }
        store.write_text(json.dumps(results, indent=1))
    target = ROOT / "benchmarks" / "profile.md"
    target.write_text(to_markdown(results))
    print(target.read_text())


# how exact it is


def agent(given: argparse.Namespace) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as scratch:
        model = Path(scratch, "model.onnx")
        save_network(model)
        ours, bare = side_by_side(model, launches=given.launches)
        began = time.monotonic()
        entry(["profile", str(model), "--quick"])
        quick_s = time.monotonic() - began
        start_s = None if given.board is None else start_to_answer(model, given.board)
    return {"agent": ours, "bare": bare, "quick_s": quick_s, "start_s": start_s}


def save_network(path: Path) -> None:
    """LAYERS products with a square matrix."""
    rng = np.random.default_rng(0)
    nodes, stored_weights, last = [], [], "input"
    for layer in range(LAYERS):
        weight = rng.normal(size=(WIDTH, WIDTH)).astype(np.float32) / WIDTH**0.5
        stored_weights.append(numpy_helper.from_array(weight, f"w{layer}"))
        nodes.append(helper.make_node("MatMul", [last, f"w{layer}"], [f"x{layer}"]))
        nodes.append(helper.make_node("Relu", [f"x{layer}"], [f"y{layer}"]))
        last = f"y{layer}"
    values = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, ["N", WIDTH])
        for name in ("input", last)
    ]
    graph = helper.make_graph(nodes, "net", values[:1], values[1:], stored_weights)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8)
    onnx.save(model, path)


def side_by_side(model: Path, *, launches: int) -> tuple[list[list[int]], list[list[int]]]:
    """Nanoseconds of each launch by the agent and by the bare loop."""
    fed = noise(signature_of(model), path=model)
    found: tuple[list[list[int]], list[list[int]]] = ([], [])
    with stored(fed.arrays) as inputs:
        for launch in range(launches):
            command = [sys.executable, "-P", "-c", BARE, str(model), str(inputs)]
            loop = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
            )
            with loop, running([("the agent", "onnx")]) as (agent,):
                agent.ask("open", path=str(model), inputs=str(inputs), threads=1)
                agent.ask("warm", seconds=1.0)
                runs: tuple[list[int], list[int]] = ([], [])
                for block in range(BLOCKS):
                    for who in block_order(2, launch + block):
                        if who == 0:
                            answer = agent.ask("run", runs=RUNS, least=RUNS, seconds=0)
                            runs[0].extend(answer["durations_ns"])
                        else:
                            assert loop.stdin is not None
                            assert loop.stdout is not None
                            loop.stdin.write(f"{RUNS}\n")
                            loop.stdin.flush()
                            runs[1].extend(map(int, loop.stdout.readline().split()))
                loop.kill()
            found[0].append(runs[0])
            found[1].append(runs[1])
    return found


def start_to_answer(model: Path, name: str) -> float:
    """Seconds from nothing to the answers of that device: connection, copies, imports, load."""
    fed = noise(signature_of(model), path=model)
    began = time.monotonic()
    with opened(name, device_named(name, Path.cwd())) as machine:
        answers_of(model, fed.arrays, target=machine, events=Silent())
        return time.monotonic() - began


# why not faster


def why(given: argparse.Namespace) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, folder in runs(given).items():
        inputs = given.work / f"{name}.npy"
        np.save(inputs, real_inputs(folder))
        for role, path in files_of(folder).items():
            for threads in sorted({1, available_threads()}):
                command = ["profile", path, "--inputs", inputs, "--threads", threads, "--why"]
                record = json.loads(compress(*command, "--json").stdout)
                found.setdefault(name, {}).setdefault(role, {})[str(threads)] = record
    return found


def runs(given: argparse.Namespace) -> dict[str, Path]:
    if not given.run:
        raise SystemExit("--run: give NAME=DIR of finished runs, e.g. sst2=out/")
    return {
        name: Path(folder).resolve() for name, _, folder in (s.partition("=") for s in given.run)
    }


def files_of(run: Path) -> dict[str, Path]:
    """The teacher's float file, the student's, and what was deployed."""
    stages = run / ".edgestill" / "stages"
    return {
        "teacher": newest(stages / "export-teacher") / "model.onnx",
        "student, float": run / "model.fp32.onnx",
        "student, int8": newest(stages / "int8") / "model.onnx",
    }


def newest(stage: Path) -> Path:
    return max(stage.iterdir(), key=lambda path: path.stat().st_mtime)


def real_inputs(run: Path) -> Any:
    """Test samples as the run timed them."""
    data = open_data(newest(run / ".edgestill" / "stages" / "data"), memory_budget_bytes=2**31)
    inputs = to_input(data.test.contents[:INPUTS], data.preprocess)
    return repeated_to(inputs, TOKENS) if is_tokens(inputs) else inputs


def compress(*arguments: object, **more: Any) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-P", "-m", "edgestill", *map(str, arguments)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False, **more)
    if done.returncode not in (0, 1):  # 1: a rung failed
        raise SystemExit(f"{' '.join(command)}: exit {done.returncode}")
    return done


# what other CPUs answer


def cpus(given: argparse.Namespace) -> dict[str, Any]:
    if given.sysroot is None:
        raise SystemExit("--part cpus needs --sysroot, a folder that scripts/arm_sysroot built")
    sysroot = str(given.sysroot.resolve())
    devices = {
        name: {"kind": "emulated", "sysroot": sysroot, "cpu": cpu} for name, cpu in CPUS.items()
    }
    (given.work / "devices.yaml").write_text(json.dumps({"devices": devices}))
    found: dict[str, Any] = {}
    for name, folder in runs(given).items():
        recipe = json.loads((folder / "report.json").read_text())["recipe"]
        files = files_of(folder)
        shipped = {"shipped": files["student, int8"]}
        if not (folder / "tokenizer.json").exists():  # texts take their time under qemu
            shipped[CARELESS] = given.work / f"{name}-8-bit.onnx"
            save_careless(files["student, float"], folder, shipped[CARELESS])
        for title, path in shipped.items():
            done = compress(
                "verify", path, "--reference", folder, *test_set(recipe, folder), "--json",
                *(word for device in devices for word in ("--device", device)),
                cwd=given.work,
            )  # fmt: skip
            found.setdefault(name, {})[title] = json.loads(done.stdout)["rungs"]
    return found


def save_careless(source: Path, run: Path, target: Path) -> None:
    """With 8-bit weights, whose sums of products an x86 without VNNI clips."""
    data = open_data(newest(run / ".edgestill" / "stages" / "data"), memory_budget_bytes=2**31)
    model = read_model(source)
    encoding = encoding_for(("x86-vnni",), model=model)
    write_model(quantize(model, Prepared(data), encoding=encoding, threads=1).model, target)


def test_set(recipe: dict[str, Any], run: Path) -> list[str]:
    data = recipe["data"]
    words = ["--data", data["test"]["path"]]
    return [*words, "--tokenizer", str(run)] if (run / "tokenizer.json").exists() else words


PARTS: dict[str, Callable[[argparse.Namespace], dict[str, Any]]] = {
    "agent": agent,
    "why": why,
    "cpus": cpus,
}


# the page


def to_markdown(results: dict[str, Any]) -> str:
    parts = ["# `compress profile`: how exact, why not faster, and other CPUs",
             "Made by `scripts/bench_profile.py`."]  # fmt: skip
    for part, describe in DESCRIBED.items():
        if part in results:
            parts += [describe(results[part]["found"]), _machine(results[part])]
    return "\n\n".join(parts) + "\n"


def _machine(result: dict[str, Any]) -> str:
    machine = result["machine"]
    return (
        f"{result['date']}, {machine['cpu_model']}, {machine['logical_cpus']} CPUs, load average "
        f"{machine['load_average'][0]:.1f}, onnxruntime {machine['versions']['onnxruntime']}, "
        f"Python {machine['python']}."
    )


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _agent(found: dict[str, Any]) -> str:
    ours, bare = found["agent"], found["bare"]
    ratio = ratio_of(ours, bare)
    low, high = ratio["ci95"]
    medians = [median(ns for launch in side for ns in launch) / 1e6 for side in (ours, bare)]
    lowest = [min(ns for launch in side for ns in launch) / 1e6 for side in (ours, bare)]
    singles = sorted(median(a) / median(b) for a, b in zip(ours, bare, strict=True))
    board = found["start_s"]
    start = (
        "" if board is None else f" From nothing to the answers of a board over ssh: {board:.1f} s."
    )
    table = _table(
        ["", "agent", "a loop that shares no code with it"],
        [["median, ms", *(f"{one:.4f}" for one in medians)],
         ["fastest, ms", *(f"{one:.4f}" for one in lowest)]],
    )  # fmt: skip
    return (
        f"## How exact\n\nOne thread; {len(ours)} launches of {BLOCKS} blocks of {RUNS} runs each, "
        f"agent and bare loop in turns A B B A, each in its own process, warmed.\n\n{table}\n\n"
        f"Agent / loop, medians of launches: {ratio['ratio']:.4f} (95 %: {low:.4f}–{high:.4f}); "
        f"single launches {singles[0]:.3f} to {singles[-1]:.3f}. Fastest runs: "
        f"{lowest[0] / lowest[1]:.4f}. `compress profile --quick` takes {found['quick_s']:.1f} s "
        f"here.{start}"
    )


def _why(found: dict[str, Any]) -> str:
    table, reasons = [], []
    for name, by_role in found.items():
        for role, by_threads in by_role.items():
            for threads, record in by_threads.items():
                latency, told = record["devices"][0]["rows"][0]["latency"], record["why"]
                low, high = latency["p50_ci95_ms"]
                table.append([
                    name, role, threads, f"{latency['p50_ms']:.3f} ({low:.3f}–{high:.3f})",
                    record["devices"][0]["validity"], f"{told['bound_ms']:.3f}",
                    f"{100 * told['share_of_bound']:.0f} %",
                ])  # fmt: skip
            first = by_threads["1"]["why"]["advice"]
            said = " ".join(f"({at}) {one['text']}" for at, one in enumerate(first, start=1))
            reasons.append(f"- **{name}, {role}**: {said or 'nothing to change was found.'}")
    header = ["recipe", "file", "threads", "p50, ms", "state", "bound, ms", "share of bound"]
    text = (
        f"## Why not faster\n\n10 launches, batch 1, real inputs (of texts {TOKENS} tokens). The "
        "bound is what the file would take if every node ran at this machine's measured peak of "
        "int8 or float products, or of memory."
    )
    return f"{text}\n\n{_table(header, table)}\n\nOf one thread:\n\n" + "\n".join(reasons)


def _cpus(found: dict[str, Any]) -> str:
    table = []
    for name, by_file in found.items():
        for title, rungs in by_file.items():
            audit = next((one for one in rungs if one["rung"] == "saturation"), None)
            for rung in rungs:
                if rung["rung"].startswith("on "):
                    table.append([
                        name, title, rung["rung"].removeprefix("on "), f"{rung['n']:,}",
                        f"{100 * rung['top1_agreement']:.1f}", f"{rung['max_abs'] or 0:.3g}",
                        "holds" if rung["passed"] else "**fails**",
                        "" if audit is None else "ok" if audit["passed"] else "**found**",
                    ])  # fmt: skip
    header = ["recipe", "int8 file", "CPU", "samples", "same class as here, %",
              "largest difference of a logit", "verify", "saturation by the audit"]  # fmt: skip
    text = (
        "## What other CPUs answer\n\n`compress verify --device`: the real onnxruntime of each "
        "CPU, under qemu, against this machine. `"
        + CARELESS
        + "` is the same float file with 8-bit "
        "weights, which is not for a CPU without VNNI."
    )
    return f"{text}\n\n{_table(header, table)}"


DESCRIBED: dict[str, Callable[[dict[str, Any]], str]] = {
    "agent": _agent,
    "why": _why,
    "cpus": _cpus,
}


if __name__ == "__main__":
    main()
