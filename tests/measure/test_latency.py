"""The schedule, and what happens when a child misbehaves. Durations are never asserted."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from edgestill.pipeline.errors import MeasurementError, RuntimeFailure
from edgestill.pipeline.measure import agent_process
from edgestill.pipeline.measure.agent_process import AGENT, Child, explain_exit, running
from edgestill.pipeline.measure.latency import measure_latency, speedup
from edgestill.pipeline.measure.turns import BLOCKS, Row, block_order
from edgestill.pipeline.stage import Silent

Save = Callable[..., Path]


class Recorder(Silent):
    def __init__(self) -> None:
        self.blocks: list[dict[str, Any]] = []
        self.settings: list[dict[str, Any]] = []
        self.progressed: list[tuple[float, float]] = []
        self.live: list[str] = []

    def progress(self, done: float, total: float, note: str = "") -> None:
        self.progressed.append((done, total))
        self.live.append(note)

    def record(self, kind: str, **fields: Any) -> None:
        {"latency_block": self.blocks, "latency_settings": self.settings}[kind].append(fields)


def measure(rows: list[Row], inputs: np.ndarray, events: Silent | None = None) -> list[dict]:
    return measure_latency(
        rows, inputs, launches=2, runs=20, threads=(1, 1), events=events or Silent()
    )


@pytest.fixture
def agent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Puts a script in the agent's place; `run_agent()` in it goes on as the real one."""

    def install(script: str) -> None:
        path = tmp_path / "agent.py"
        real = f"import runpy\ndef run_agent(): runpy.run_path({str(AGENT)!r}, run_name='__main__')"
        path.write_text(f"{real}\n{script}\n")
        monkeypatch.setattr(agent_process, "AGENT", path)

    return install


# --- figures --------------------------------------------------------------------------------------


def test_every_row_gets_its_figures_in_fresh_processes_taking_turns(
    save_linear: Save, inputs: np.ndarray, expected: np.ndarray
) -> None:
    rows = [Row(name, "onnx", save_linear(f"{name}.onnx"), expected) for name in "ABC"]
    events = Recorder()

    measured = measure(rows, inputs, events)

    assert [row["name"] for row in measured] == ["A", "B", "C"]
    for row in measured:
        assert row["threads"] == 1
        assert row["runs_in"] == "onnxruntime"
        assert row["launches"] == 2
        assert [len(launch) for launch in row["raw_ns"]] == [20, 20]
        assert row["n"] == 40
        low, high = row["p50_ci95_ms"]
        assert low <= row["p50_ms"] <= high
        assert row["p90_ms"] is None  # 40 < 64 runs
        assert row["peak_rss_bytes"] > 2**20
    assert json.loads(json.dumps(measured)) == measured
    turns = "".join(block["row"] for block in events.blocks)
    assert turns == "ABCCBAABC" + "CBAABCCBA"
    assert [block["runs"] for block in events.blocks[:9]] == [7, 7, 7, 7, 7, 7, 6, 6, 6]
    assert [s["settings"]["optimization"] for s in events.settings] == ["all"] * 3
    total = 2 * BLOCKS * len(rows)
    assert events.progressed == [(done, total) for done in range(1, total + 1)]
    assert events.live[0].startswith("A ")


def test_order_is_reversed_every_other_turn() -> None:
    assert [block_order(3, turn) for turn in range(3)] == [[0, 1, 2], [2, 1, 0], [0, 1, 2]]


def test_figures_are_what_the_report_holds(save_linear: Save, inputs: np.ndarray) -> None:
    from edgestill.pipeline.report import LatencyRecord, SpeedupRecord

    rows = [Row(name, "onnx", save_linear(f"{name}.onnx")) for name in "AB"]

    first, second = measure(rows, inputs)

    assert LatencyRecord.model_validate(first).name == "A"
    record = SpeedupRecord(reference="A", candidate="B", **speedup(first, second))
    assert record.ratio == pytest.approx(first["p50_ms"] / second["p50_ms"])


def test_speedup_refuses_rows_measured_differently(save_linear: Save, inputs: np.ndarray) -> None:
    (row,) = measure([Row("A", "onnx", save_linear())], inputs)

    with pytest.raises(MeasurementError, match="threads is 2 against 1"):
        speedup(row, {**row, "threads": 2})


def test_a_fixed_batch_is_used_by_all_and_unlike_ones_are_refused(
    save_linear: Save, inputs: np.ndarray, expected: np.ndarray
) -> None:
    notes: list[str] = []

    class Notes(Silent):
        def note(self, text: str) -> None:
            notes.append(text)

    fixed = Row("four", "onnx", save_linear("four.onnx", batch=4), expected)
    other = Row("two", "onnx", save_linear("two.onnx", batch=2), expected)

    measure([fixed, Row("any", "onnx", save_linear(), expected)], inputs, Notes())

    assert sum("batch of 4" in note for note in notes) == 2
    with pytest.raises(MeasurementError, match=r"two.*batches of 2, the others of 4"):
        measure([fixed, other], inputs)


def test_torch_rows_are_rebuilt_from_their_folder_and_held_against_the_expected_logits(
    agent: Callable[[str], None], inputs: np.ndarray, tmp_path: Path
) -> None:
    agent(
        """
import sys, types
def load_network(folder):
    import torch
    class Mean(torch.nn.Module):
        def forward(self, x):
            assert torch.is_inference_mode_enabled() and not self.training
            assert torch.get_num_threads() == 1
            return x.flatten(1).mean(1, keepdim=True)
    network = types.SimpleNamespace(module=Mean(), trainable=True)
    return types.SimpleNamespace(network=network)
stub = types.ModuleType("edgestill.models.store")
stub.load_network = load_network
sys.modules["edgestill.models.store"] = stub
run_agent()
"""
    )
    expected = inputs.reshape(len(inputs), -1).mean(1, keepdims=True)

    (row,) = measure([Row("mean", "torch", tmp_path / "mean", expected)], inputs)

    assert row["runs_in"] == "torch"
    assert row["n"] == 40


# --- measurements that prove nothing --------------------------------------------------------------


def test_a_fast_wrong_answer_is_an_error(
    save_linear: Save, inputs: np.ndarray, expected: np.ndarray
) -> None:
    wrong = Row("student", "onnx", save_linear(), np.roll(expected, 1, axis=1))

    with pytest.raises(MeasurementError, match=r"student.*away from the expected ones"):
        measure([wrong], inputs)


def test_an_answer_that_goes_wrong_during_the_timed_runs_is_an_error(
    agent: Callable[[str], None], inputs: np.ndarray, tmp_path: Path
) -> None:
    agent(
        """
import sys, types
import numpy as np
calls = 0
class Session:
    def __init__(self, *args, **kwargs): pass
    def get_inputs(self): return [types.SimpleNamespace(name="x", shape=["N", 1, 2, 2])]
    def get_outputs(self): return [types.SimpleNamespace(name="y")]
    def get_providers(self): return []
    def run(self, names, feed):
        global calls
        calls += 1
        return [feed["x"].reshape(1, -1) * (1 if calls < 12 else 2)]
class Level:
    ORT_SEQUENTIAL = ORT_ENABLE_ALL = 0
fake = types.ModuleType("onnxruntime")
fake.InferenceSession, fake.SessionOptions = Session, types.SimpleNamespace
fake.ExecutionMode = fake.GraphOptimizationLevel = Level
fake.__version__ = "0"
sys.modules["onnxruntime"] = fake
run_agent()
"""
    )

    with pytest.raises(MeasurementError, match="away from the expected ones"):
        measure([Row("drifting", "onnx", tmp_path)], inputs)


def test_logits_that_are_not_finite_are_an_error(save_linear: Save, inputs: np.ndarray) -> None:
    poisoned = save_linear(weight=np.full((4, 3), np.nan, np.float32))

    with pytest.raises(MeasurementError, match="NaN or infinity"):
        measure([Row("broken", "onnx", poisoned)], inputs)


def test_logits_of_another_shape_are_an_error(save_linear: Save, inputs: np.ndarray) -> None:
    with pytest.raises(MeasurementError, match=r"shape \(8, 5\), got \(8, 3\)"):
        measure([Row("A", "onnx", save_linear(), np.zeros((8, 5), np.float32))], inputs)


def test_expected_logits_that_are_nan_never_pass(save_linear: Save, inputs: np.ndarray) -> None:
    with pytest.raises(MeasurementError, match="away from the expected ones"):
        measure([Row("A", "onnx", save_linear(), np.full((8, 3), np.nan, np.float32))], inputs)


def test_too_few_inputs_are_an_error(save_linear: Save, inputs: np.ndarray) -> None:
    with pytest.raises(MeasurementError, match="at least 8 inputs to rotate, got 7"):
        measure([Row("A", "onnx", save_linear())], inputs[:7])


def test_more_threads_than_cpus_are_an_error(save_linear: Save, inputs: np.ndarray) -> None:
    with pytest.raises(MeasurementError, match="4096 threads asked for"):
        measure_latency(
            [Row("A", "onnx", save_linear())],
            inputs,
            launches=2,
            runs=20,
            threads=(4096,),
            events=Silent(),
        )


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ('"durations_ns": [5, 0]', "expected positive durations, got 0 ns"),
        ('"durations_ns": []', "expected positive durations, got none"),
        ('"durations_ns": [5], "quiet": False, "quiet_seconds": 10', "kept the CPU busy"),
    ],
)
def test_a_block_that_proves_nothing_is_an_error(
    agent: Callable[[str], None], inputs: np.ndarray, tmp_path: Path, answer: str, message: str
) -> None:
    agent(
        f"""
import json, sys
for line in sys.stdin:
    do = json.loads(line)["do"]
    answers = {{
        "open": {{"batch": 1}},
        "outputs": {{"shape": [1, 1], "logits": "AACAPw=="}},
        "warm": {{"steady": True}},
        "run": {{{answer}, "cpu_seconds": 0, "peak_rss_bytes": 0}},
    }}
    print(json.dumps({{"did": do, **answers.get(do, {{}})}}), flush=True)
"""
    )

    with pytest.raises(MeasurementError, match=message):
        measure([Row("A", "onnx", tmp_path)], inputs)


# --- children that die ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("number", "message"),
    [
        (signal.SIGILL, "SIGILL, illegal instruction: this onnxruntime wheel needs CPU features"),
        (signal.SIGKILL, "SIGKILL, killed from outside, most often because memory ran out"),
        (signal.SIGSEGV, "SIGSEGV, invalid memory access inside onnxruntime"),
    ],
)
def test_a_signal_is_explained_with_the_last_words(
    agent: Callable[[str], None], inputs: np.ndarray, tmp_path: Path, number: int, message: str
) -> None:
    agent(
        f"""
import os, resource, sys
resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
sys.stdin.readline()
sys.stderr.write("about to die\\n")
sys.stderr.flush()
os.kill(os.getpid(), {int(number)})
"""
    )

    with pytest.raises(RuntimeFailure) as caught:
        measure([Row("student", "onnx", tmp_path / "x.onnx")], inputs)

    text = str(caught.value)
    assert "latency of student" in text
    assert "launch 1 of 2" in text
    assert message in text
    assert text.endswith("Its last words:\n  about to die")


def test_a_model_that_cannot_be_loaded_ends_with_the_runtimes_own_words(
    inputs: np.ndarray, tmp_path: Path
) -> None:
    broken = tmp_path / "broken.onnx"
    broken.write_bytes(b"not a model")

    with pytest.raises(RuntimeFailure, match=r"died during `open` \(exit status 1\)[^!]*broken"):
        measure([Row("A", "onnx", broken)], inputs)


def test_a_hang_ends_with_a_time_limit(
    agent: Callable[[str], None],
    inputs: np.ndarray,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    agent("import time\ntime.sleep(600)")
    monkeypatch.setattr(agent_process, "ANSWER_SECONDS", 0.2)

    with pytest.raises(RuntimeFailure, match=r"no answer to `start` within 0\.2 s"):
        measure([Row("A", "onnx", tmp_path)], inputs)


def test_an_answer_out_of_turn_is_an_error(
    agent: Callable[[str], None], inputs: np.ndarray, tmp_path: Path
) -> None:
    agent("import sys\nsys.stdin.readline()\nprint('hello', flush=True)\nsys.stdin.readline()")

    with pytest.raises(RuntimeFailure, match="expected the answer to `start`, got b'hello'"):
        measure([Row("A", "onnx", tmp_path)], inputs)


def test_exit_statuses_and_unnamed_signals_are_told_apart() -> None:
    assert explain_exit(3, runtime="torch") == "exit status 3"
    assert explain_exit(-signal.SIGTERM, runtime="torch") == "SIGTERM"
    assert "this torch wheel" in explain_exit(-signal.SIGILL, runtime="torch")
    assert explain_exit(-99, runtime="torch") == "signal 99"


def test_no_child_is_left_behind_when_the_measurement_is_interrupted() -> None:
    started: list[Child] = []

    def be_interrupted() -> None:
        with running([("A", "onnx"), ("B", "onnx")]) as children:
            started.extend(children)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        be_interrupted()

    assert [child.process.returncode for child in started] == [-signal.SIGKILL] * 2


def test_children_end_when_their_parent_is_killed(tmp_path: Path) -> None:
    script = tmp_path / "parent.py"
    script.write_text(
        "import time\n"
        "from edgestill.pipeline.measure.agent_process import running\n"
        "with running([('A', 'onnx'), ('B', 'onnx')]) as children:\n"
        "    print(*(child.facts['pid'] for child in children), flush=True)\n"
        "    time.sleep(600)\n"
    )
    command = [sys.executable, "-P", str(script)]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as parent:
        children = [int(word) for word in parent.stdout.readline().split()]
        assert len(children) == 2
        assert all(map(_is_alive, children))
        parent.kill()

    deadline = time.monotonic() + 10
    while any(map(_is_alive, children)) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not any(map(_is_alive, children))


def _is_alive(pid: int) -> bool:
    """Running: not gone, and not a zombie that nobody has collected yet."""
    try:
        os.kill(pid, 0)
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except ProcessLookupError:
        return False
    except FileNotFoundError:  # gone between the two, or a system without /proc
        return not Path("/proc/self/stat").exists()
