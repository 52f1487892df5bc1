"""What `compress profile` costs and how exact it is: benchmarks/profile.md.

    python scripts/bench_profile.py [--launches 8] [--device NAME]

A network of about 0.3 ms is timed by the agent and by a loop of this script's own that shares no
code with it, each in a fresh process of its own, in turns A B B A. So what the agent adds to an
inference, and whether its medians are right, shows on the same machine at the same time. Beside it:
how long `--quick` takes, and from a connection to a board (--device, of devices.yaml) to the first
inference there.
"""

from __future__ import annotations

import argparse
import datetime
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

import numpy as np
import onnx
from edgestill.pipeline.cli import entry
from edgestill.pipeline.measure.agent_process import running
from edgestill.pipeline.measure.answers import answers_of
from edgestill.pipeline.measure.latency_stats import ratio_of
from edgestill.pipeline.measure.machine import describe_machine
from edgestill.pipeline.measure.turns import block_order, stored
from edgestill.pipeline.profile.devices import device_named
from edgestill.pipeline.profile.inputs import noise, signature_of
from edgestill.pipeline.profile.transport import opened
from edgestill.pipeline.stage import Silent
from onnx import TensorProto, helper, numpy_helper

ROOT = Path(__file__).resolve().parent.parent
WIDTH, LAYERS = 512, 12  # 0.3 ms on the machine of the page
RUNS, BLOCKS = 200, 4

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
    parser.add_argument("--launches", type=int, default=8)
    parser.add_argument("--device", metavar="NAME")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        model = Path(scratch, "model.onnx")
        save_network(model)
        agent, bare = side_by_side(model, launches=given.launches)
        began = time.monotonic()
        entry(["profile", str(model), "--quick"])
        quick_s = time.monotonic() - began
        start_s = None if given.device is None else start_to_answer(model, given.device)
    target = ROOT / "benchmarks" / "profile.md"
    target.write_text(to_markdown(agent, bare, quick_s=quick_s, start_s=start_s))
    print(target.read_text())


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


def to_markdown(
    agent: list[list[int]], bare: list[list[int]], *, quick_s: float, start_s: float | None
) -> str:
    machine = describe_machine()
    ratio = ratio_of(agent, bare)
    low, high = ratio["ci95"]
    medians = [median(ns for launch in side for ns in launch) / 1e6 for side in (agent, bare)]
    lowest = [min(ns for launch in side for ns in launch) / 1e6 for side in (agent, bare)]
    launch_ratios = sorted(median(a) / median(b) for a, b in zip(agent, bare, strict=True))
    about = (
        f"{machine['cpu_model']}, {machine['logical_cpus']} CPUs, load average "
        f"{machine['load_average'][0]:.1f}, onnxruntime {machine['versions']['onnxruntime']}, "
        f"Python {machine['python']}"
    )
    lines = [
        "# What `compress profile` costs, and how exact it is",
        "",
        f"Made by `scripts/bench_profile.py` on {datetime.date.today()}: {about}. One thread; "
        f"{len(agent)} launches of {BLOCKS} blocks of {RUNS} runs each, agent and bare loop in "
        "turns A B B A, each in its own process, warmed.",
        "",
        "| | agent | a loop that shares no code with it |",
        "| --- | --- | --- |",
        f"| median | {medians[0]:.4f} ms | {medians[1]:.4f} ms |",
        f"| fastest | {lowest[0]:.4f} ms | {lowest[1]:.4f} ms |",
        "",
        f"Agent / loop, medians of launches: {ratio['ratio']:.4f} (95 %: {low:.4f} – {high:.4f}); "
        f"single launches {launch_ratios[0]:.3f} to {launch_ratios[-1]:.3f}. Fastest runs: "
        f"{lowest[0] / lowest[1]:.4f}.",
        "",
        f"`compress profile --quick` on this machine: {quick_s:.1f} s.",
    ]
    if start_s is not None:
        lines += ["", f"From nothing to the answers of a board over ssh: {start_s:.1f} s."]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
