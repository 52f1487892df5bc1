"""A board over the system's OpenSSH. Nothing is installed there, and nothing stays behind.

One connection carries everything (ControlMaster). Its first channel runs `KEEPER`, a few lines of
POSIX sh: it takes the board's lock, makes a private folder, and reads its input until that ends,
which the end of the connection does, however it came about; then the folder goes. Agents are
further channels, and end with their input as they do here (`latency_agent.py`). So a board is clean
after a Ctrl-C, a killed process on either side, or a cut cable, as soon as its sshd sees that.

Hosts are verified (StrictHostKeyChecking), nobody is asked for a password (BatchMode), and aliases,
keys and ProxyJump are those of ~/.ssh/config. What is copied is held against its sha256 by the
agent before it is loaded.
"""

from __future__ import annotations

import io
import os
import selectors
import shlex
import shutil
import subprocess
import tarfile
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Literal

from ..errors import RuntimeFailure
from ..measure.agent_process import AGENT, BOARD_FILES, Placed
from ..workspace import file_sha256
from .devices import SshDevice
from .failures import SSH_FAILED, explain_death, explain_ssh

OPTIONS = {
    "BatchMode": "yes",
    "StrictHostKeyChecking": "yes",
    "ConnectTimeout": "10",
    "ServerAliveInterval": "5",  # a cut cable is noticed after three of them
    "ServerAliveCountMax": "3",
    "ControlPersist": "no",
    "ClearAllForwardings": "yes",
    "ForwardAgent": "no",
    "PermitLocalCommand": "no",
    "RemoteCommand": "none",
    "RequestTTY": "no",
    "LogLevel": "ERROR",
}
READY, BUSY, REFUSED = "edgestill-ready", "edgestill-busy", "edgestill-refused"
GREETING = b"edgestill-agent"
READY_SECONDS = 45.0  # a slow board behind a jump host
PUSH_SECONDS = 600.0
GONE_SECONDS = 10.0  # for the folder to be removed

# The lock says who holds it (pid and its start time, so that a pid used again is told apart) and
# which folder is his: whoever finds it stale removes both. set -C creates a file with O_EXCL.
KEEPER = r"""
umask 077
user=$(id -u)
lock=${TMPDIR:-/tmp}/edgestill-$user.lock
folder= held=
pause() { sleep 0.1 2>/dev/null || sleep 1; }
born() {
  stat=$(cat "/proc/$1/stat" 2>/dev/null) || return 1
  set -- ${stat##*) }
  echo "${20}"
}
alive() {
  if [ -r /proc/self/stat ]; then [ "$(born "$1")" = "$2" ]; else kill -0 "$1" 2>/dev/null; fi
}
remove() {
  for try in 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 19 20; do
    rm -rf "$1" 2>/dev/null
    [ -e "$1" ] || return 0
    pause
  done
}
leave() {
  trap '' HUP INT TERM
  [ -n "$folder" ] && remove "$folder"
  [ -n "$held" ] && rm -f "$lock"
}
trap leave EXIT
trap 'exit 1' HUP INT TERM
trap '' PIPE
me="$$ $(born $$)"
tries=0
until (set -C; echo "$me" > "$lock") 2>/dev/null; do
  tries=$((tries + 1))
  other=$(cat "$lock" 2>/dev/null)
  if [ -n "$other" ]; then
    pid=${other%% *} rest=${other#* }
    if alive "$pid" "${rest%% *}"; then echo "edgestill-busy $pid"; exit 0; fi
    old=${rest#* }
    if mv "$lock" "$lock.$$" 2>/dev/null; then
      if [ "$(cat "$lock.$$")" = "$other" ]; then
        case "$old" in /*/edgestill.??????) remove "$old" ;; esac
      else
        ln "$lock.$$" "$lock" 2>/dev/null
      fi
      rm -f "$lock.$$"
    fi
  elif [ $tries -gt 20 ]; then
    [ -e "$lock" ] || { echo "edgestill-refused $lock cannot be written"; exit 0; }
    rm -f "$lock" 2>/dev/null || { echo "edgestill-refused $lock is not this user's"; exit 0; }
  fi
  [ $tries -gt 40 ] && { echo "edgestill-refused $lock cannot be taken"; exit 0; }
  pause
done
held=1
folder=$(mktemp -d "${TMPDIR:-/tmp}/edgestill.XXXXXX") ||
  { folder=; echo "edgestill-refused no folder can be made in ${TMPDIR:-/tmp}"; exit 0; }
echo "$me $folder" > "$lock"
echo "edgestill-ready $folder"
while read -r line; do :; done
"""


class Board:
    """A board that is connected and locked, with a private folder. Implements `Target`."""

    kind: Literal["local", "ssh", "emulated"] = "ssh"
    greeting = GREETING

    def __init__(self, name: str, device: SshDevice, ssh: list[str]) -> None:
        self.name, self.device = name, device
        self.live: list[subprocess.Popen[bytes]] = []
        self._ssh = ssh
        self._folder = ""
        self._placed: dict[Path, Placed] = {}

    def command(self) -> list[str]:
        # the shell stays, for a signal is lost on the way where ssh's own child dies of one
        agent = f"{remote_word(self.device.python)} -B {AGENT.name}; exit $?"
        return self.sh(f"{self._inside()} echo {GREETING.decode()}; {agent}")

    def run_python(self, code: str, *arguments: str) -> list[str]:
        words = " ".join(shlex.quote(word) for word in ("-B", "-c", code, *arguments))
        return self.sh(f"{self._inside()} {remote_word(self.device.python)} {words}; exit $?")

    def sh(self, script: str) -> list[str]:
        """Runs it in the board's sh, whatever the user's own shell is."""
        return [*self._ssh, "-o", "ControlMaster=no", "--", self.device.host, _as_sh(script)]

    def folder(self) -> str:
        return self._folder

    def place(self, path: Path) -> Placed:
        """Copied once, under the name of its hash."""
        if path not in self._placed:
            sha256 = file_sha256(path)
            name = f"{sha256[:16]}{path.suffix}"
            self._push({name: path})
            self._placed[path] = Placed(f"{self._folder}/{name}", sha256)
        return self._placed[path]

    def explain(self, code: int, words: str, *, runtime: str, python: str | None = None) -> str:
        """`python`: the program, where it is another one than the device's Python."""
        if code == SSH_FAILED:
            return explain_ssh(words, host=self.device.host)
        return explain_death(
            code, words, runtime=runtime, device=self.name, python=python or self.device.python
        )

    def settle(self, folder: str) -> None:
        """The folder is there: what every measurement needs goes into it."""
        self._folder = folder
        self._push({name: AGENT.with_name(name) for name in BOARD_FILES})

    def _inside(self) -> str:
        """Libraries leave files in TMPDIR (onnxruntime 1.32 does: `.ses`); ours goes at the end."""
        folder = shlex.quote(self._folder)
        return f"cd {folder} || exit 1; TMPDIR={folder}; export TMPDIR;"

    def _push(self, files: dict[str, Path]) -> None:
        """Raises: RuntimeFailure: they did not arrive."""
        command = self.sh(f"umask 077; tar -xf - -C {shlex.quote(self._folder)}; exit $?")
        with tempfile.TemporaryFile() as stderr:
            process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=stderr
            )
            self.live.append(process)
            try:
                assert process.stdin is not None
                with suppress(BrokenPipeError), process.stdin as pipe:
                    _write_tar(pipe, files)
                code = process.wait(PUSH_SECONDS)
            except subprocess.TimeoutExpired:
                raise RuntimeFailure(
                    f"device {self.name}: {', '.join(files)} did not arrive within "
                    f"{PUSH_SECONDS:g} s; is the connection that slow?"
                ) from None
            finally:
                self.live.remove(process)
                process.kill()
                process.wait()
            stderr.seek(0)
            words = stderr.read().decode("utf-8", "replace")
        if code:
            raise RuntimeFailure(
                f"device {self.name}: copying failed: {self.explain(code, words, runtime='tar')}"
                f"{_indented(words)}"
            )


@contextmanager
def connected(name: str, device: SshDevice) -> Iterator[Board]:
    """The board, locked and with a folder of its own until the end.

    Raises:
        RuntimeFailure: it cannot be reached, somebody measures on it, or it has no room.
    """
    if shutil.which("ssh") is None:
        raise RuntimeFailure(f"device {name}: this machine has no `ssh`; install OpenSSH's client")
    with tempfile.TemporaryDirectory(prefix="es-") as private:  # short: a socket's path is limited
        ssh = _ssh(device, socket=f"{private}/s")
        board = Board(name, device, ssh)
        with tempfile.TemporaryFile() as stderr:
            keeper = subprocess.Popen(
                [*ssh, "-o", "ControlMaster=yes", "--", device.host, _as_sh(KEEPER)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=stderr,
            )
            board.live.append(keeper)
            try:
                board.settle(_wait_until_ready(board, keeper, stderr))
                yield board
            finally:
                _let_go(keeper)


def remote_word(text: str) -> str:
    """A path as one word of the board's shell; a leading ~ is its home."""
    if text.startswith("~/"):
        return f'"$HOME"/{shlex.quote(text[2:])}'
    return shlex.quote(text)


def _ssh(device: SshDevice, *, socket: str) -> list[str]:
    """What every call begins with. Options given here come before those of any file."""
    words = ["ssh", "-T"]
    if device.ssh_config is not None:
        words += ["-F", str(device.ssh_config)]
    if device.port is not None:
        words += ["-p", str(device.port)]
    for name, value in OPTIONS.items():
        words += ["-o", f"{name}={value}"]
    return [*words, "-o", f"ControlPath={socket}"]


def _as_sh(script: str) -> str:
    return f"exec sh -c {shlex.quote(script)}"


def _wait_until_ready(board: Board, keeper: subprocess.Popen[bytes], stderr: IO[bytes]) -> str:
    """The folder on the board. What its login prints before is passed over."""
    deadline = time.monotonic() + READY_SECONDS
    for line in _lines(keeper, deadline):
        word, _, rest = line.partition(" ")
        if word == READY:
            return rest
        if word == BUSY:
            raise RuntimeFailure(
                f"device {board.name}: somebody measures on it (process {rest} there), and two "
                "would disturb each other; wait, or end that process if its connection is lost"
            )
        if word == REFUSED:
            raise RuntimeFailure(f"device {board.name}: {rest}; is its disk full or read-only?")
    code = keeper.poll() if keeper.stdout is not None else None
    if code is None and time.monotonic() >= deadline:
        raise RuntimeFailure(
            f"device {board.name}: `ssh {board.device.host}` said nothing for {READY_SECONDS:g} s; "
            "try it by hand"
        )
    keeper.wait(GONE_SECONDS)
    stderr.seek(0)
    words = stderr.read().decode("utf-8", "replace")
    why = explain_ssh(words, host=board.device.host)
    raise RuntimeFailure(f"device {board.name}: {why}{_indented(words)}")


def _lines(process: subprocess.Popen[bytes], deadline: float) -> Iterator[str]:
    assert process.stdout is not None
    pending = b""
    with selectors.DefaultSelector() as selector:
        selector.register(process.stdout, selectors.EVENT_READ)
        while selector.select(max(deadline - time.monotonic(), 0.0)):
            piece = os.read(process.stdout.fileno(), 4096)
            if not piece:
                return
            *lines, pending = (pending + piece).split(b"\n")
            yield from (line.decode("utf-8", "replace").strip() for line in lines)


def _let_go(keeper: subprocess.Popen[bytes]) -> None:
    """Ends the keeper's input, which makes it tidy up, and waits for that."""
    assert keeper.stdin is not None
    assert keeper.stdout is not None
    with suppress(BrokenPipeError):
        keeper.stdin.close()
    try:
        keeper.wait(GONE_SECONDS)
    except subprocess.TimeoutExpired:
        keeper.kill()
        keeper.wait()
    keeper.stdout.close()


def _write_tar(pipe: IO[bytes], files: dict[str, Path]) -> None:
    """Plain files that belong to whoever unpacks them."""
    with tarfile.open(fileobj=pipe, mode="w|", format=tarfile.USTAR_FORMAT) as archive:
        for name, path in files.items():
            entry = tarfile.TarInfo(name)
            content = path.read_bytes()
            entry.size, entry.mode, entry.mtime = len(content), 0o600, int(time.time())
            entry.uid, entry.gid = os.getuid(), os.getgid()
            archive.addfile(entry, io.BytesIO(content))


def _indented(words: str) -> str:
    lines = [line for line in words.splitlines() if line.strip()][-6:]
    return "".join(f"\n  {line}" for line in lines)
