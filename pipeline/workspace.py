"""Content-hashed stage results in `DIR/.edgestill`, with atomic commits, resume and a lock.

A stage's key is the hash of everything it may read: its name, spec, input artifacts, seed, thread
count, CPU capability, device, library versions, our own source text and the user's modules. So
nobody has to remember to raise a version, and a result is recalled exactly when running the stage
again would give the same bytes. Only successes are stored; a commit is fsync and one rename.

    DIR/.edgestill/lock                     held (flock) while a run lives; dies with its process
    DIR/.edgestill/stages/NAME/KEY/         committed: files + outcome.json
    DIR/.edgestill/scratch/NAME/KEY/        unfinished: survives a kill so the stage can go on
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .errors import OutputError
from .stage import ALONE, RESUME_FOLDER, Artifact, Context, Events, Noting, World

FOLDER = ".edgestill"
OUTCOME = "outcome.json"


@dataclass(frozen=True)
class Workspace:
    """An open, locked workspace. `identity` is what every key holds besides the stage's own."""

    root: Path
    seed: int
    threads: int
    device: str
    events: Events
    identity: Mapping[str, Any] = field(default_factory=dict)
    world: World = ALONE

    def run_stage(
        self,
        name: str,
        work: Callable[[Context], Mapping[str, Any]],
        *,
        reads: Mapping[str, Any],
        together: bool = False,
    ) -> Artifact:
        """The committed result of `work`, recalled if everything in `reads` is as before.

        Args:
            name: of the stage.
            work: writes files into `context.scratch`, returns JSON-able measurements.
            reads: specs, input artifacts' hashes, paths' hashes: all that `work` depends on.
            together: of several processes all do the work, not the leading one alone. Only what
                that one writes and returns counts.
        """
        key = self.key(name, reads)
        home = self.root / "stages" / name / key
        self.events.started(name)
        recalled = self._shared(_recall(home, name) if self.world.leads else None)
        if recalled is not None:
            self._check_seen(home)
            for note in recalled.notes:
                self.events.note(note)
            self.events.finished(name, seconds=recalled.seconds, recalled=True)
            return recalled
        scratch = self.root / "scratch" / name / key
        if self.world.leads:
            _drop_other_scratch(scratch)
            _keep_only_resumable(scratch)
        self._shared(None)  # nobody looks into scratch before it is ready
        self._check_seen(scratch)
        events = Noting(self.events)
        context = Context(self.seed, self.threads, self.device, scratch, events, self.world)
        start = time.monotonic()
        measurements = work(context) if together or self.world.leads else {}
        committed = None
        if self.world.leads:
            outcome = {"measurements": measurements, "notes": events.notes}
            committed = _commit(scratch, home, name, outcome, seconds=time.monotonic() - start)
        artifact = self._shared(committed)
        assert artifact is not None
        self.events.finished(name, seconds=artifact.seconds, recalled=False)
        return artifact

    def _shared(self, artifact: Artifact | None) -> Artifact | None:
        """The leading process's artifact, in all of them."""
        if self.world.size == 1:
            return artifact
        from .train.distributed import shared  # torch; a recipe's errors must not wait for it

        everybodys: Artifact | None = shared(artifact, world=self.world)
        return everybodys

    def _check_seen(self, path: Path) -> None:
        if not path.is_dir():
            raise OutputError(
                f"{self.root.parent}: process {self.world.rank} of {self.world.size} does not see "
                "what the first one wrote there; choose a folder that all machines share with -o"
            )

    def key(self, name: str, reads: Mapping[str, Any]) -> str:
        """sha256 of the canonical JSON of everything the stage may read."""
        everything = {
            "stage": name,
            "reads": reads,
            "seed": self.seed,
            "threads": self.threads,
            "device": self.device,
            "identity": self.identity,
            **({"processes": self.world.size} if self.world.size > 1 else {}),
        }
        text = json.dumps(everything, sort_keys=True, separators=(",", ":"), allow_nan=False)
        return hashlib.sha256(text.encode()).hexdigest()

    def forget(self) -> None:
        """Drop every stored and unfinished stage (`--fresh`)."""
        for part in ("stages", "scratch"):
            shutil.rmtree(self.root / part, ignore_errors=True)


@contextmanager
def locked(folder: Path, *, world: World = ALONE) -> Iterator[Path]:
    """Hold the lock of `folder/.edgestill`, created if need be; yields that folder.

    The lock belongs to the process, not to the file: one left by a dead process is free. Of
    several processes the leading one holds it for all.

    Raises:
        OutputError: another live process holds it, or the folder cannot be written.
    """
    root = folder / FOLDER
    if not world.leads:
        yield root
        return
    try:
        root.mkdir(parents=True, exist_ok=True)
        handle = open(root / "lock", "a+", encoding="utf-8")  # noqa: SIM115 (lives past this block)
    except (NotADirectoryError, FileExistsError):
        raise OutputError(f"{folder}: is not a folder; choose another with -o DIR") from None
    except OSError as error:
        raise OutputError(f"{folder}: cannot be written: {error.strerror}") from None
    with handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            handle.seek(0)
            owner = handle.read().strip() or "unknown"
            raise OutputError(
                f"{folder}: another run (process {owner}) is working here; wait for it, or choose "
                "another folder with -o DIR"
            ) from None
        handle.truncate(0)
        handle.write(str(os.getpid()))
        handle.flush()
        yield root


def file_sha256(path: Path) -> str:
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def tree_sha256(root: Path, *, pattern: str = "*", without: str = "") -> str:
    """Hash of the relative names and contents of the files below `root`, in name order."""
    digest = hashlib.sha256()
    for path in sorted(p for p in root.rglob(pattern) if p.is_file() and p.name != without):
        digest.update(f"{path.relative_to(root).as_posix()}\0{file_sha256(path)}\n".encode())
    return digest.hexdigest()


def write_atomically(path: Path, content: bytes) -> None:
    """Whole or not at all: a sibling temporary name, fsync, one rename."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as handle:
            handle.write(content)
            handle.flush()
            os.fsync(handle.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def copy_atomically(source: Path, target: Path) -> None:
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        shutil.copyfile(source, temporary)
        _fsync(temporary)
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)


def _recall(home: Path, name: str) -> Artifact | None:
    """The stored result, or None; a damaged one is removed, so that it is made again."""
    try:
        outcome = json.loads((home / OUTCOME).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (json.JSONDecodeError, UnicodeDecodeError):
        outcome = {}
    if not outcome or _content_hash(home) != outcome["sha256"]:
        shutil.rmtree(home)
        return None
    return _artifact(name, home, outcome, recalled=True)


def _commit(
    scratch: Path, home: Path, name: str, found: Mapping[str, Any], *, seconds: float
) -> Artifact:
    shutil.rmtree(scratch / RESUME_FOLDER, ignore_errors=True)
    outcome = {"sha256": _content_hash(scratch), "seconds": seconds, **found}
    text = json.dumps(outcome, indent=1, sort_keys=True, allow_nan=False)
    write_atomically(scratch / OUTCOME, text.encode())
    for path in scratch.rglob("*"):
        _fsync(path)
    home.parent.mkdir(parents=True, exist_ok=True)
    os.replace(scratch, home)
    _fsync(home.parent)
    # the round trip makes a fresh result look the same as a recalled one to whoever reads it
    return _artifact(name, home, json.loads(text), recalled=False)


def _artifact(name: str, home: Path, outcome: Mapping[str, Any], *, recalled: bool) -> Artifact:
    return Artifact(
        stage=name,
        path=home,
        sha256=outcome["sha256"],
        measurements=outcome["measurements"],
        notes=tuple(outcome["notes"]),
        recalled=recalled,
        seconds=outcome["seconds"],
    )


def _content_hash(folder: Path) -> str:
    """Of the stage's files; `outcome.json` holds times, which differ between equal runs."""
    return tree_sha256(folder, without=OUTCOME)


def _drop_other_scratch(keep: Path) -> None:
    """Unfinished work under another key can never be resumed once the inputs have changed."""
    if keep.parent.is_dir():
        for path in keep.parent.iterdir():
            if path != keep:
                shutil.rmtree(path, ignore_errors=True)


def _keep_only_resumable(scratch: Path) -> None:
    """Files of a killed attempt must not reach the commit; its resume folder is what it may use."""
    scratch.mkdir(parents=True, exist_ok=True)
    for path in scratch.iterdir():
        if path.name == RESUME_FOLDER:
            continue
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()


def _fsync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
