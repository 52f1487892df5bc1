"""The agent alone, spoken to over its pipes as the driver (or ssh) would."""

from __future__ import annotations

import ast
import base64
import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from edgestill.pipeline.measure.agent_process import AGENT, BOARD_FILES

Ask = Callable[..., dict[str, Any]]


@pytest.fixture
def agent() -> Iterator[subprocess.Popen[bytes]]:
    command = [sys.executable, "-P", str(AGENT)]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL) as process:
        yield process
        process.kill()


@pytest.fixture
def ask(agent: subprocess.Popen[bytes]) -> Ask:
    def send(do: str, **fields: Any) -> dict[str, Any]:
        agent.stdin.write(json.dumps({"do": do, **fields}).encode() + b"\n")
        agent.stdin.flush()
        return json.loads(agent.stdout.readline())

    return send


@pytest.fixture
def stored(inputs: np.ndarray, tmp_path: Path) -> str:
    np.save(tmp_path / "inputs.npy", inputs)
    return str(tmp_path / "inputs.npy")


def test_a_network_is_opened_checked_warmed_timed_and_closed(
    ask: Ask, save_linear: Callable[..., Path], stored: str, expected: np.ndarray
) -> None:
    started = ask("start", kind="onnx")
    opened = ask("open", path=str(save_linear()), inputs=stored, threads=1)
    outputs = ask("outputs")
    warmed = ask("warm", seconds=0.2)
    ran = ask("run", runs=12, least=5, seconds=10)
    first = ask("outputs", batches=1)
    closed = ask("close")

    raw = base64.b64decode(outputs["logits"])
    logits = np.frombuffer(raw, dtype="<f4").reshape(outputs["shape"])
    assert started["runtime"] == "onnxruntime"
    assert opened["batch"] == 1
    assert opened["input_shape"] == [None, 1, 2, 2]
    assert opened["load_ns"] > 0
    assert opened["first_ns"] > 0
    assert opened["settings"]["intra_threads"] == 1
    assert opened["settings"]["inter_threads"] == 1
    # one float32 dot product of four terms, in another order
    np.testing.assert_allclose(logits, expected, rtol=1e-5, atol=1e-6)
    assert outputs["sha256"] == hashlib.sha256(raw).hexdigest()
    assert first["shape"] == [1, 3]
    assert warmed["runs"] >= 10
    assert len(ran["durations_ns"]) == 12
    assert all(isinstance(ns, int) and ns > 0 for ns in ran["durations_ns"])
    assert ran["cpu_seconds"] >= 0
    assert ran["peak_rss_bytes"] > 2**20
    assert ran["quiet"]
    assert closed == {"did": "close"}


def test_a_block_ends_with_its_time_but_not_before_its_least_runs(
    ask: Ask, save_linear: Callable[..., Path], stored: str
) -> None:
    ask("start", kind="onnx")
    ask("open", path=str(save_linear()), inputs=stored, threads=1)

    ran = ask("run", runs=1000, least=5, seconds=0)

    assert len(ran["durations_ns"]) == 5


def test_a_batch_that_the_graph_fixes_is_used_and_its_last_one_filled_up(
    ask: Ask, save_linear: Callable[..., Path], stored: str, expected: np.ndarray
) -> None:
    ask("start", kind="onnx")
    opened = ask("open", path=str(save_linear(batch=3)), inputs=stored, threads=1)
    outputs = ask("outputs")

    logits = np.frombuffer(base64.b64decode(outputs["logits"]), dtype="<f4")
    assert opened["batch"] == 3
    assert outputs["shape"] == list(expected.shape)
    np.testing.assert_allclose(logits.reshape(expected.shape), expected, rtol=1e-5, atol=1e-6)


def test_it_ends_with_its_standard_input_and_ignores_ctrl_c(
    agent: subprocess.Popen[bytes], ask: Ask
) -> None:
    ask("start", kind="onnx")
    agent.send_signal(signal.SIGINT)
    ask("close")
    agent.stdin.close()

    assert agent.wait(timeout=10) == 0


def test_it_ends_with_its_standard_input_even_in_the_middle_of_a_hang(
    agent: subprocess.Popen[bytes], ask: Ask, save_linear: Callable[..., Path], stored: str
) -> None:
    ask("start", kind="onnx")
    ask("open", path=str(save_linear()), inputs=stored, threads=1)
    forever = {"do": "run", "runs": 10**12, "least": 10**12, "seconds": 0}
    agent.stdin.write(json.dumps(forever).encode() + b"\n")
    agent.stdin.flush()
    time.sleep(0.1)
    assert agent.poll() is None
    agent.stdin.close()

    assert agent.wait(timeout=10) == 0


def test_a_failure_is_a_traceback_and_an_exit_status_not_an_abort(tmp_path: Path) -> None:
    commands = [
        {"do": "start", "kind": "onnx"},
        {"do": "open", "path": str(tmp_path / "missing.onnx"), "inputs": "none", "threads": 1},
    ]
    process = subprocess.Popen(
        [sys.executable, "-P", str(AGENT)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    # its input stays open: only so is the exit the failure's own
    process.stdin.write(b"".join(json.dumps(c).encode() + b"\n" for c in commands))
    process.stdin.flush()
    status = process.wait(timeout=30)
    _, errors = process.communicate()

    assert status == 1
    assert b"Traceback" in errors


def test_what_libraries_print_never_reaches_the_protocol(tmp_path: Path) -> None:
    noisy = tmp_path / "onnxruntime.py"
    noisy.write_text("import os\nprint('hello')\nos.system('echo there')\n__version__ = '0'\n")
    answers, errors = _converse([{"do": "start", "kind": "onnx"}], path=tmp_path)

    assert [answer["did"] for answer in answers] == ["start"]
    assert b"hello" in errors
    assert b"there" in errors


def test_paced_runs_begin_at_their_rate_and_sleep_in_between(
    ask: Ask, save_linear: Callable[..., Path], stored: str
) -> None:
    ask("start", kind="onnx")
    ask("open", path=str(save_linear()), inputs=stored, threads=1)

    begin = time.monotonic()
    ran = ask("run", runs=6, least=1, seconds=10, rate_hz=50)
    seconds = time.monotonic() - begin
    short = ask("run", runs=10**6, least=2, seconds=0.1, rate_hz=50)

    assert len(ran["durations_ns"]) == 6
    assert seconds >= 5 / 50  # five pauses of 20 ms
    assert 2 <= len(short["durations_ns"]) <= 6  # begun within 0.1 s


def test_named_arrays_spinning_and_affinity_are_taken(
    ask: Ask, save_linear: Callable[..., Path], inputs: np.ndarray, expected: np.ndarray,
    tmp_path: Path,
) -> None:  # fmt: skip
    np.savez(tmp_path / "named.npz", input=inputs)
    cpu = min(os.sched_getaffinity(0))
    pid = ask("start", kind="onnx")["pid"]
    opened = ask(
        "open", path=str(save_linear()), inputs=str(tmp_path / "named.npz"), threads=1,
        cold=True, spinning=False, affinity=[cpu],
    )  # fmt: skip
    placed = os.sched_getaffinity(pid)
    outputs = ask("outputs")
    ask("close")
    ask("open", path=str(save_linear()), inputs=str(tmp_path / "named.npz"), threads=1)

    logits = np.frombuffer(base64.b64decode(outputs["logits"]), dtype="<f4")
    assert opened["settings"]["spinning"] == "off"
    assert placed == {cpu}
    assert os.sched_getaffinity(pid) == os.sched_getaffinity(0)  # given back
    np.testing.assert_allclose(logits.reshape(expected.shape), expected, rtol=1e-5, atol=1e-6)


def test_it_says_how_the_machine_is(ask: Ask) -> None:
    ask("start", kind="onnx")

    first, second = ask("condition"), ask("condition")

    assert second["at_s"] >= first["at_s"]
    assert second["own_s"] >= first["own_s"] > 0


@pytest.mark.parametrize("name", BOARD_FILES)
def test_a_board_s_files_are_python_3_9_and_import_only_what_it_has(name: str) -> None:
    tree = ast.parse(AGENT.with_name(name).read_text(), feature_version=(3, 9))

    imported, siblings, future = set(), set(), False
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            imported |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level:
            siblings |= {f"{alias.name}.py" for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            future = future or node.module == "__future__"
            imported.add((node.module or "").partition(".")[0])
    assert imported
    assert imported - set(sys.stdlib_module_names) == ({"numpy"} if name == AGENT.name else set())
    assert siblings <= set(BOARD_FILES)
    # X | None in an annotation runs on 3.9 only where it is not evaluated
    assert future or name == AGENT.name


def _converse(commands: list[dict[str, Any]], *, path: Path) -> tuple[list[dict[str, Any]], bytes]:
    process = subprocess.Popen(
        [sys.executable, "-P", str(AGENT)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": str(path)},
    )
    answers = []
    for command in commands:
        process.stdin.write(json.dumps(command).encode() + b"\n")
        process.stdin.flush()
        answers.append(json.loads(process.stdout.readline()))
    _, errors = process.communicate(timeout=30)
    return answers, errors
