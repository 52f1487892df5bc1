"""What a stage is: a plain function from artifacts, its spec and a context to measurements.

A stage writes its files into `context.scratch` and returns JSON-able measurements; the workspace
turns both into an `Artifact` with one rename. What a stage may read (spec, input artifacts, seed,
threads, device) is what its key hashes, see `workspace.py`.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

# Below scratch: what only an unfinished stage needs (checkpoints, partial shards). It survives a
# kill, so that the stage can go on, and is dropped when the stage is committed.
RESUME_FOLDER = "resume"


class Events(Protocol):
    """Where a stage says how far it is. The console implements it; tests pass `Silent()`."""

    def started(self, stage: str) -> None:
        """The stage begins; progress, notes and records that follow are its own."""

    def finished(self, stage: str, *, seconds: float, recalled: bool) -> None:
        """The stage is done, in `seconds`, or was recalled (`seconds` are then of that time)."""

    def progress(self, done: float, total: float, note: str = "") -> None:
        """`done` of `total` units of the running stage; `note` is a short live figure."""

    def note(self, text: str) -> None:
        """A sentence the user should read; it is kept in the report."""

    def record(self, kind: str, **fields: Any) -> None:
        """A machine-readable line (an epoch, a loss) for --log-json."""


class Noting:
    """Events that also keep their notes, in order and once each."""

    def __init__(self, events: Events) -> None:
        self._events = events
        self.notes: list[str] = []

    def started(self, stage: str) -> None:
        self._events.started(stage)

    def finished(self, stage: str, *, seconds: float, recalled: bool) -> None:
        self._events.finished(stage, seconds=seconds, recalled=recalled)

    def progress(self, done: float, total: float, note: str = "") -> None:
        self._events.progress(done, total, note)

    def note(self, text: str) -> None:
        if text not in self.notes:
            self.notes.append(text)
            self._events.note(text)

    def record(self, kind: str, **fields: Any) -> None:
        self._events.record(kind, **fields)


class Silent:
    """Events that go nowhere, for callers that want only the result."""

    def started(self, stage: str) -> None:
        pass

    def finished(self, stage: str, *, seconds: float, recalled: bool) -> None:
        pass

    def progress(self, done: float, total: float, note: str = "") -> None:
        pass

    def note(self, text: str) -> None:
        pass

    def record(self, kind: str, **fields: Any) -> None:
        pass


@dataclass(frozen=True)
class World:
    """This process among those that do a stage together. The first leads: it alone writes."""

    rank: int = 0
    size: int = 1
    local_size: int = 1  # of them on this machine

    @property
    def leads(self) -> bool:
        return self.rank == 0


ALONE = World()


def launched() -> World:
    """This process among those that `torchrun` started, by what it set; alone without it."""
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1 or "RANK" not in os.environ:
        return ALONE
    local_size = int(os.environ.get("LOCAL_WORLD_SIZE", size))
    return World(rank=int(os.environ["RANK"]), size=size, local_size=local_size)


@dataclass(frozen=True)
class Context:
    """All that a stage may read besides its spec and its input artifacts."""

    seed: int
    threads: int
    device: str  # "cpu" or "cuda", already resolved
    scratch: Path
    events: Events
    world: World = ALONE

    @property
    def resume(self) -> Path:
        """Folder for what only an unfinished stage needs. Created on first use."""
        folder = self.scratch / RESUME_FOLDER
        folder.mkdir(parents=True, exist_ok=True)
        return folder


@dataclass(frozen=True)
class Artifact:
    """A committed stage: its folder, the hash of everything in it, and what it measured."""

    stage: str
    path: Path
    sha256: str
    measurements: Mapping[str, Any]
    notes: tuple[str, ...]
    recalled: bool
    seconds: float
