"""Published runs, made up."""

from __future__ import annotations

import importlib.util
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import pytest


@pytest.fixture(scope="session")
def releases() -> ModuleType:
    """releases.py, which tests cannot import under `--import-mode=importlib`."""
    path = Path(__file__).with_name("releases.py")
    spec = importlib.util.spec_from_file_location("made_up_releases", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def run_folder(releases: ModuleType, tmp_path: Path) -> Path:
    """The folder of a run that passes its own gate (drop ≤ 3 points)."""
    folder: Path = releases.make_release(tmp_path / "out")
    return folder


@pytest.fixture
def gate() -> Iterator[Callable[..., int]]:
    """`gate(folder, *options)` → exit code, in this process. A bug of ours is raised."""
    from edgestill.pipeline.cli import entry

    before = signal.getsignal(signal.SIGTERM)
    yield lambda *arguments: entry(["gate", *map(str, arguments)])
    signal.signal(signal.SIGTERM, before)
