"""A small network, and a real sshd on the loopback with keys and configuration of its own."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import pytest
from edgestill.pipeline.profile.devices import SshDevice
from onnx import TensorProto, helper, numpy_helper

PIXELS, CLASSES = (1, 4, 4), 3


@pytest.fixture
def inputs() -> dict[str, np.ndarray]:
    return {"input": np.random.default_rng(0).normal(size=(16, *PIXELS)).astype(np.float32)}


@pytest.fixture
def save_linear(tmp_path: Path) -> Callable[..., Path]:
    """logits = flatten(x) @ w, with w of a seed."""

    def save(name: str = "linear.onnx", *, seed: int = 1, opset: int = 18) -> Path:
        weight = np.random.default_rng(seed).normal(size=(16, CLASSES)).astype(np.float32)
        floats = TensorProto.FLOAT
        graph = helper.make_graph(
            [
                helper.make_node("Flatten", ["input"], ["flat"]),
                helper.make_node("MatMul", ["flat", "w"], ["logits"]),
            ],
            "linear",
            [helper.make_tensor_value_info("input", floats, ["N", *PIXELS])],
            [helper.make_tensor_value_info("logits", floats, ["N", CLASSES])],
            [numpy_helper.from_array(weight, "w")],
        )
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)])
        model.ir_version = 8
        path = tmp_path / name
        onnx.save(model, path)
        return path

    return save


@dataclass(frozen=True)
class Loopback:
    """A running sshd. `temporary` is TMPDIR of who logs in; `config` is for `ssh -F`."""

    folder: Path
    config: Path
    temporary: Path
    daemon: subprocess.Popen[bytes]

    def device(self, **fields: object) -> SshDevice:
        return SshDevice.model_validate(
            {
                "kind": "ssh",
                "host": "board",
                "python": sys.executable,
                "ssh_config": self.config,
                **fields,
            }
        )

    def left_behind(self, *, within_s: float = 5.0) -> list[str]:
        """What is still in the board's temporary folder, once it had time to go."""
        deadline = time.monotonic() + within_s
        while (left := os.listdir(self.temporary)) and time.monotonic() < deadline:
            time.sleep(0.02)
        return left


@pytest.fixture(scope="session")
def loopback(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Loopback]:
    sshd = shutil.which("sshd") or shutil.which("sshd", path="/usr/sbin")
    if sshd is None or shutil.which("ssh") is None:
        pytest.skip("needs OpenSSH's sshd and ssh")
    folder = tmp_path_factory.mktemp("sshd")
    temporary = folder / "board tmp"
    temporary.mkdir()
    for name in ("host", "user"):
        _generate_key(folder / name)
    port = _free_port()
    (folder / "sshd_config").write_text(
        f"ListenAddress 127.0.0.1\nPort {port}\nHostKey {folder}/host\nPidFile none\n"
        f"AuthorizedKeysFile {folder}/user.pub\nStrictModes no\nUsePAM no\n"
        f'PasswordAuthentication no\nMaxStartups 100\nSetEnv "TMPDIR={temporary}"\n'
        'ForceCommand echo "Welcome to {the board}"; eval "$SSH_ORIGINAL_COMMAND"\n'
    )
    (folder / "known_hosts").write_text(f"[127.0.0.1]:{port} {(folder / 'host.pub').read_text()}")
    config = folder / "config"
    config.write_text(
        f"Host board\n HostName 127.0.0.1\n Port {port}\n IdentityFile {folder}/user\n"
        f" IdentitiesOnly yes\n UserKnownHostsFile {folder}/known_hosts\n"
        " GlobalKnownHostsFile /dev/null\n"
    )
    if os.getuid() == 0:
        Path("/run/sshd").mkdir(exist_ok=True)  # where sshd locks itself in
    with (folder / "log").open("wb") as log:
        daemon = subprocess.Popen([sshd, "-D", "-e", "-f", folder / "sshd_config"], stderr=log)
    try:
        _wait_until_listening(port, daemon, folder / "log")
        yield Loopback(folder, config, temporary, daemon)
    finally:
        daemon.terminate()
        daemon.wait()


def _generate_key(path: Path) -> None:
    subprocess.run(
        ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", path], check=True, capture_output=True
    )


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def _wait_until_listening(port: int, daemon: subprocess.Popen[bytes], log: Path) -> None:
    for _ in range(200):
        if daemon.poll() is not None:
            pytest.skip(f"sshd does not start here: {log.read_text()[-300:]}")
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
        except OSError:
            time.sleep(0.02)
        else:
            return
    pytest.skip("sshd does not listen")
