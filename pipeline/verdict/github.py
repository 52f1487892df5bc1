"""The verdict where GitHub shows it: annotations, the job summary, and the step's outputs.

Formats: "Workflow commands for GitHub Actions" in GitHub's documentation; the escapes are those of
@actions/core (`command.ts`). A step shows ten annotations of a kind, so there are never more in
all, the worst first. A job summary above 1 MiB is dropped whole.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Mapping
from pathlib import Path

from ..errors import OutputError
from ..report import Check
from .judgement import Judgement, Refusal, headline

MOST_ANNOTATIONS = 10
LONGEST_MESSAGE = 4000  # characters; what a page shows of one
SUMMARY_BYTES = 1 << 20  # of one step, all that was appended together


def to_annotations(judgement: Judgement) -> list[str]:
    """Workflow commands, at most ten, the worst first; a check that passed has none."""
    passed = judgement.verdict.exit_code == 0
    found = [
        (_level(check, passed=passed), f"{check.outcome}: {check.name}", check.text)
        for check in judgement.by_severity
        if check.outcome != "pass"
    ]
    if not judgement.release.vouched:
        found.append(("notice", "gate: not bound", UNBOUND))
    if len(found) > MOST_ANNOTATIONS:
        kept, rest = found[: MOST_ANNOTATIONS - 1], found[MOST_ANNOTATIONS - 1 :]
        text = f"{len(rest)} more are in the job summary; the verdict is {headline(judgement)}"
        found = [*kept, (rest[0][0], "gate: and more", text)]
    return [_command(*one) for one in found]


UNBOUND = (
    "no --manifest-sha256 and no --signature was given: files changed by accident are detected, a "
    "folder whose manifest was made anew is not"
)


def refused_annotation(refusal: Refusal) -> str:
    return _command("error", f"gate: nothing judged (exit {refusal.exit_code})", refusal.reason)


def summary_room() -> int:
    """Bytes that the job summary of this step still takes."""
    path = os.environ.get("GITHUB_STEP_SUMMARY")
    used = Path(path).stat().st_size if path and Path(path).exists() else 0
    return max(SUMMARY_BYTES - used - 2, 0)


def append_summary(text: str) -> None:
    """Add Markdown to the job summary; nothing where no step asks for one.

    Raises:
        OutputError: the file that GITHUB_STEP_SUMMARY names cannot be written.
    """
    _append("GITHUB_STEP_SUMMARY", f"\n{text}\n")


def append_outputs(values: Mapping[str, str]) -> None:
    """Add outputs of the step. The delimiter is random: no value can end its own block early.

    Raises:
        OutputError: the file that GITHUB_OUTPUT names cannot be written.
    """
    marks = {name: f"end_{secrets.token_hex(16)}" for name in values}
    blocks = [f"{name}<<{marks[name]}\n{value}\n{marks[name]}\n" for name, value in values.items()]
    _append("GITHUB_OUTPUT", "".join(blocks))


def _append(variable: str, text: str) -> None:
    path = os.environ.get(variable)
    if not path:
        return
    try:
        with open(path, "a", encoding="utf-8") as handle:
            handle.write(text)
    except OSError as error:
        raise OutputError(f"{variable}: {path}: cannot be written: {error.strerror}") from None


def _level(check: Check, *, passed: bool) -> str:
    if check.outcome in ("fail", "invalid") or (check.outcome == "inconclusive" and not passed):
        return "error"
    return "notice" if check.outcome == "skipped" else "warning"


def _command(level: str, title: str, message: str) -> str:
    name = _escape(title).replace(":", "%3A").replace(",", "%2C")
    return f"::{level} title={name}::{_escape(message[:LONGEST_MESSAGE])}"


def _escape(text: str) -> str:
    return text.replace("%", "%25").replace("\r", "%0D").replace("\n", "%0A")
