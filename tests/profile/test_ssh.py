"""A board over OpenSSH, on the loopback: what goes wrong, and what stays behind."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from edgestill.pipeline.errors import RuntimeFailure
from edgestill.pipeline.measure.answers import answers_of
from edgestill.pipeline.measure.turns import Plan, Row, Setting, take
from edgestill.pipeline.profile import ssh
from edgestill.pipeline.profile.ssh import connected
from edgestill.pipeline.profile.transport import libraries, survey
from edgestill.pipeline.stage import Silent

Save = Callable[..., Path]


def board_processes(folder: Path, *, within_s: float = 5.0) -> list[int]:
    """Agents that still run, by their working folder, once they had time to see the end."""
    deadline = time.monotonic() + within_s
    while (found := _running_in(folder)) and time.monotonic() < deadline:
        time.sleep(0.02)
    return found


def _running_in(folder: Path) -> list[int]:
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if os.readlink(entry / "cwd").startswith(str(folder)):
                found.append(int(entry.name))
    return found


def script(folder: Path, name: str, text: str) -> str:
    path = folder / name
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return str(path)


def test_a_board_that_greets_at_login_answers_as_this_machine_does_and_is_left_clean(
    loopback, save_linear: Save, inputs: dict[str, np.ndarray]
) -> None:
    model = save_linear()
    weight = np.random.default_rng(1).normal(size=(16, 3)).astype(np.float32)
    expected = inputs["input"].reshape(16, -1) @ weight

    with connected("pi", loopback.device()) as board:
        mode = os.stat(board.folder()).st_mode & 0o777
        facts, (versions, _) = survey(board), libraries(board)
        answers = answers_of(model, inputs, target=board, events=Silent())
        plan = Plan(2, 12, (Setting(1, spinning=False),), watched=True)
        taken = take([Row("A", "onnx", model)], inputs, plan, events=Silent(), target=board)

    assert mode == 0o700
    assert facts["machine"]["arch"] == os.uname().machine
    assert versions["onnxruntime"]
    np.testing.assert_allclose(answers, expected, rtol=1e-5, atol=1e-5)
    assert [len(one.durations_ns) for one in taken.samples] == [12, 12]
    assert len(taken.conditions) == 2
    assert loopback.left_behind() == []


FAILING = {
    "echo no >&2; exit 127": "has no program .*python: install Python 3.9",
    "kill -ILL $$": "SIGILL, illegal instruction: this onnxruntime wheel needs CPU features",
    "kill -KILL $$": "SIGKILL, killed from outside, most often because memory ran out",
    "echo \"ModuleNotFoundError: No module named 'onnxruntime'\" >&2; exit 1": (
        "has no onnxruntime: `.*python -m pip install numpy onnxruntime` there"
    ),
    "echo 'python: cannot execute binary file: Exec format error' >&2; exit 126": (
        "is for another kind of CPU"
    ),
}


def test_a_python_that_fails_is_explained(loopback, tmp_path: Path) -> None:
    python = tmp_path / "python"

    with connected("pi", loopback.device(python=str(python))) as board:
        for text, message in FAILING.items():
            script(tmp_path, "python", text)
            with pytest.raises(RuntimeFailure, match=message):
                libraries(board)


def test_an_unknown_host_key_is_refused(loopback, tmp_path: Path) -> None:
    config = tmp_path / "config"
    config.write_text(
        loopback.config.read_text().replace(f"{loopback.folder}/known_hosts", "/dev/null")
    )

    with (
        pytest.raises(RuntimeFailure, match="its host key is not known here: log in once by hand"),
        connected("pi", loopback.device(ssh_config=config)),
    ):
        pass


def test_nobody_is_asked_for_a_password(loopback, tmp_path: Path) -> None:
    config = tmp_path / "config"
    config.write_text(loopback.config.read_text().replace("/user\n", "/host\n"))

    with (
        pytest.raises(RuntimeFailure, match="does not let this user in without a password"),
        connected("pi", loopback.device(ssh_config=config)),
    ):
        pass


def test_a_host_that_is_not_there_is_named(loopback) -> None:
    with (
        pytest.raises(RuntimeFailure, match="device pi: it does not answer"),
        connected("pi", loopback.device(port=1)),
    ):
        pass


def test_one_measurement_at_a_time_and_the_lock_goes_with_it(loopback) -> None:
    message = r"somebody measures on it .process [0-9]+ there"
    with (
        connected("pi", loopback.device()),
        pytest.raises(RuntimeFailure, match=message),
        connected("again", loopback.device()),
    ):
        pass
    with connected("pi", loopback.device()) as board:
        assert board.folder()


def test_what_a_killed_keeper_left_is_removed_by_the_next(loopback) -> None:
    with connected("pi", loopback.device()) as board:
        left = board.folder()
        (keeper,) = [
            int(entry.name)
            for entry in Path("/proc").glob("[0-9]*")
            if b"edgestill-ready" in _command_line(entry)
            and b"ssh\0" not in _command_line(entry)
            and os.fsencode(f"TMPDIR={loopback.temporary}") in _environment(entry)  # of this board
        ]
        os.kill(keeper, signal.SIGKILL)
        assert os.path.exists(left)

    with connected("pi", loopback.device()):
        assert not os.path.exists(left)


def test_a_copy_that_changed_on_its_way_is_not_loaded(
    loopback, save_linear: Save, inputs: dict[str, np.ndarray]
) -> None:
    model = save_linear()
    plan = Plan(1, 12, (Setting(1),))
    with connected("pi", loopback.device()) as board:
        copy = Path(board.place(model).path)
        copy.write_bytes(copy.read_bytes() + b"\n")
        with pytest.raises(RuntimeFailure, match=r"what was sent has .*: it was cut or changed"):
            take([Row("A", "onnx", model)], inputs, plan, events=Silent(), target=board)


def test_a_full_disk_is_an_error_and_leaves_nothing(loopback, tmp_path: Path) -> None:
    large = tmp_path / "large.onnx"
    large.write_bytes(bytes(4_000_000))
    words = "tar: 1.onnx: Wrote only 512 of 10240 bytes: No space left on device"

    with connected("pi", loopback.device()) as board:
        why = board.explain(2, words, runtime="tar")
        board.sh = lambda text: ["sh", "-c", f"ulimit -f 1; {text}"]
        with pytest.raises(RuntimeFailure, match="device pi: copying failed"):
            board.place(large)

    assert "pi has no room for the model" in why
    assert loopback.left_behind() == []


def test_a_connection_cut_at_any_moment_is_no_result_and_leaves_nothing(
    loopback, save_linear: Save, inputs: dict[str, np.ndarray]
) -> None:
    rng, tries = random.Random(0), 50
    endless = Plan(10**6, 30, (Setting(1),))
    row = Row("A", "onnx", save_linear())
    for number in range(tries):  # spread over logging in, copying, starting and measuring
        after_s = 2.0 * (number + rng.random()) / tries
        cut = _Cut(loopback.daemon.pid, after_s=after_s)
        with pytest.raises(RuntimeFailure), cut, connected("pi", loopback.device()) as board:
            take([row], inputs, endless, events=Silent(), target=board)
        assert loopback.left_behind() == []
        assert board_processes(loopback.temporary) == []


def test_a_killed_driver_leaves_nothing_on_the_board(loopback, tmp_path: Path) -> None:
    code = (
        "import sys, time, pathlib\n"
        "from edgestill.pipeline.profile.devices import SshDevice\n"
        "from edgestill.pipeline.profile.ssh import connected\n"
        "device = SshDevice(kind='ssh', host='board', ssh_config=pathlib.Path(sys.argv[1]))\n"
        "with connected('pi', device):\n"
        "    print('ready', flush=True)\n"
        "    time.sleep(60)\n"
    )
    with subprocess.Popen(
        [sys.executable, "-P", "-c", code, str(loopback.config)], stdout=subprocess.PIPE
    ) as driver:
        assert driver.stdout is not None
        assert driver.stdout.readline() == b"ready\n"
        assert os.listdir(loopback.temporary)
        driver.kill()

    assert loopback.left_behind() == []


def test_every_login_is_verified_and_silent() -> None:
    assert ssh.OPTIONS["StrictHostKeyChecking"] == "yes"
    assert ssh.OPTIONS["BatchMode"] == "yes"
    assert ssh.remote_word("~/a b/python; rm x") == "\"$HOME\"/'a b/python; rm x'"


class _Cut:
    """Kills, after some time, every process of sshd that serves a connection."""

    def __init__(self, daemon: int, *, after_s: float) -> None:
        self.timer = threading.Timer(after_s, self.cut)
        self.daemon, self.done = daemon, threading.Event()

    def __enter__(self) -> None:
        self.timer.start()

    def __exit__(self, *_: object) -> None:
        self.timer.cancel()
        self.timer.join()

    def cut(self) -> None:
        deadline = time.monotonic() + 20
        while time.monotonic() < deadline:
            sessions = list(_children(self.daemon))
            for process in [*sessions, *(one for s in sessions for one in _children(s))]:
                if b"sshd" in _command_line(Path("/proc", str(process))):
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(process, signal.SIGKILL)
            if sessions:
                return
            time.sleep(0.005)


def _children(parent: int) -> Iterator[int]:
    for task in Path(f"/proc/{parent}/task").glob("*/children"):
        with contextlib.suppress(OSError):
            yield from map(int, task.read_text().split())


def _command_line(entry: Path) -> bytes:
    return _read(entry / "cmdline")


def _environment(entry: Path) -> bytes:
    return _read(entry / "environ")


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError:
        return b""
