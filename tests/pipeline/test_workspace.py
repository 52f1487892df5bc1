"""The workspace: recalled exactly when nothing it reads has changed, and never half-written."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from edgestill.pipeline.errors import OutputError
from edgestill.pipeline.stage import Context, Silent
from edgestill.pipeline.workspace import Workspace, locked, write_atomically


def open_at(root: Path, **changes: Any) -> Workspace:
    fields: dict[str, Any] = {"seed": 0, "threads": 1, "device": "cpu", "events": Silent()}
    return Workspace(root, **{**fields, **changes})


class Work:
    """A stage that counts how often it really ran."""

    def __init__(self) -> None:
        self.runs = 0

    def __call__(self, context: Context) -> Mapping[str, Any]:
        self.runs += 1
        (context.scratch / "weights.bin").write_bytes(b"abc")
        context.events.note("a note")
        return {"accuracy": 0.5}


def test_an_equal_stage_is_recalled_with_its_measurements_and_notes(tmp_path: Path) -> None:
    work = Work()
    first = open_at(tmp_path).run_stage("s", work, reads={"a": 1})
    second = open_at(tmp_path).run_stage("s", work, reads={"a": 1})

    assert work.runs == 1
    assert (first.recalled, second.recalled) == (False, True)
    assert second.measurements == first.measurements == {"accuracy": 0.5}
    assert second.notes == ("a note",)
    assert second.sha256 == first.sha256


@pytest.mark.parametrize(
    ("changes", "reads"),
    [
        ({"seed": 1}, {"a": 1}),
        ({"threads": 2}, {"a": 1}),
        ({"device": "cuda"}, {"a": 1}),
        ({"identity": {"source": "x"}}, {"a": 1}),
        ({}, {"a": 2}),
    ],
)
def test_anything_that_a_stage_reads_makes_it_run_again(
    tmp_path: Path, changes: dict[str, Any], reads: dict[str, Any]
) -> None:
    work = Work()
    open_at(tmp_path).run_stage("s", work, reads={"a": 1})
    open_at(tmp_path, **changes).run_stage("s", work, reads=reads)

    assert work.runs == 2


def test_a_damaged_result_is_made_again(tmp_path: Path) -> None:
    work = Work()
    first = open_at(tmp_path).run_stage("s", work, reads={})
    (first.path / "weights.bin").write_bytes(b"abX")

    second = open_at(tmp_path).run_stage("s", work, reads={})

    assert work.runs == 2
    assert (second.path / "weights.bin").read_bytes() == b"abc"


def test_a_failed_stage_is_not_stored_and_its_resume_folder_survives(tmp_path: Path) -> None:
    def fails(context: Context) -> dict[str, Any]:
        (context.resume / "checkpoint").write_text("half")
        (context.scratch / "partial.bin").write_text("junk")
        raise ValueError("stop")

    def finishes(context: Context) -> dict[str, Any]:
        return {
            "seen": (context.resume / "checkpoint").read_text(),
            "clean": not (context.scratch / "partial.bin").exists(),
        }

    workspace = open_at(tmp_path)
    with pytest.raises(ValueError, match="stop"):
        workspace.run_stage("s", fails, reads={})
    done = workspace.run_stage("s", finishes, reads={})

    assert done.measurements == {"seen": "half", "clean": True}
    assert [path.name for path in done.path.iterdir()] == ["outcome.json"]


def test_measurements_must_be_finite(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="Out of range"):
        open_at(tmp_path).run_stage("s", lambda _: {"loss": float("nan")}, reads={})


def test_a_second_run_in_the_same_folder_is_refused(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path\n"
        "from edgestill.pipeline.workspace import locked\n"
        "with locked(Path(sys.argv[1])):\n"
        "    print('held', flush=True); sys.stdin.read()\n"
    )
    holder = subprocess.Popen(
        [sys.executable, "-P", "-c", code, str(tmp_path)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert holder.stdin is not None
    assert holder.stdout is not None
    assert holder.stdout.readline().strip() == "held"

    with pytest.raises(OutputError, match=f"process {holder.pid}"), locked(tmp_path):
        pass

    holder.kill()
    holder.wait()
    holder.stdin.close()
    holder.stdout.close()
    with locked(tmp_path) as root:  # the lock of a dead process is free
        assert root.is_dir()


def test_a_folder_that_is_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("")

    with pytest.raises(OutputError, match="is not a folder"), locked(tmp_path / "out"):
        pass


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)

    with pytest.raises(OutputError, match="cannot be written"), locked(tmp_path / "out"):
        pass


def test_a_failed_write_leaves_the_old_content(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "report.json"
    write_atomically(target, b"old")
    monkeypatch.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(OSError(28, "No space left")))

    with pytest.raises(OSError, match="No space"):
        write_atomically(target, b"new")

    assert target.read_bytes() == b"old"
    assert [path.name for path in tmp_path.iterdir()] == ["report.json"]
