"""What a person, a log file or a machine sees while the stages run. No torch.

On a terminal: one live line for the running stage with the time left. Elsewhere: plain lines, at
most one every few seconds. `--log-json`: one JSON object a line. `-q`: nothing but the end.
"""

from __future__ import annotations

import json
import time
from types import TracebackType
from typing import Any, Self

from rich.console import Console as RichConsole
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeRemainingColumn
from rich.table import Table

from .markdown import summary_rows
from .report import Report

PLAIN_INTERVAL_S = 10.0  # a log reader wants a sign of life, not a flood


class Console:
    """Implements `stage.Events`. `notes` keeps every note for the report."""

    def __init__(self, *, quiet: bool = False, log_json: bool = False) -> None:
        self.notes: list[str] = []
        self._quiet = quiet
        self._json = log_json
        self._out = RichConsole(highlight=False, soft_wrap=True)
        self._live: Progress | None = None
        self._stage = ""
        self._since = 0.0
        self._last_line = 0.0
        self._last_note = ""  # what the running stage said last stays behind it when it is done

    def __enter__(self) -> Self:
        if self._out.is_terminal and not self._quiet and not self._json:
            self._live = Progress(
                SpinnerColumn(),
                TextColumn("{task.description:<16}"),
                BarColumn(),
                TextColumn("{task.fields[note]}"),
                TimeRemainingColumn(compact=True),
                console=self._out,
                transient=True,
            )
            self._live.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None

    def started(self, stage: str) -> None:
        self._stage, self._since = stage, time.monotonic()
        self._last_line, self._last_note = self._since, ""
        self.record("stage-started")
        if self._live is not None:
            for task in self._live.task_ids:
                self._live.remove_task(task)
            self._live.add_task(stage, total=None, note="")

    def finished(self, stage: str, *, seconds: float, recalled: bool) -> None:
        self.record("stage-finished", recalled=recalled, seconds=seconds)
        took = "recalled" if recalled else f"{seconds:.1f} s"
        self._say(f"  {stage:<16} {took:>9}{self._last_note}")

    def progress(self, done: float, total: float, note: str = "") -> None:
        self._last_note = f"  {note}" if note else self._last_note
        if self._live is not None:
            for task in self._live.task_ids:
                self._live.update(task, completed=done, total=total, note=note)
            return
        now = time.monotonic()
        if now - self._last_line >= PLAIN_INTERVAL_S and 0 < done < total:
            self._last_line = now
            left = (now - self._since) * (total - done) / done
            share = f"{100 * done / total:3.0f} %"
            self._say(f"  {self._stage:<16} {share:>9}  {note}  ({left:.0f} s left)")

    def note(self, text: str) -> None:
        if text not in self.notes:
            self.notes.append(text)
            self.record("note", text=text)
            self._say(f"  note: {text}")

    def record(self, kind: str, **fields: Any) -> None:
        if self._json:
            line = {"time": round(time.time(), 3), "kind": kind, "stage": self._stage, **fields}
            self._out.print(json.dumps(line, default=str), markup=False)

    def say(self, text: str) -> None:
        """A line for the person in front, outside any stage."""
        self.record("message", text=text)
        self._say(text)

    def verdict(self, report: Report, *, where: str, manifest_sha256: str) -> None:
        """The one table a person understands, then the verdict, and what vouches for the files."""
        if self._json:
            hashed = {"manifest_sha256": manifest_sha256}
            self.record("verdict", model=where, **hashed, **_verdict_fields(report))
            return
        outcome = "" if report.verdict is None else report.verdict.outcome.upper()
        if self._quiet:
            self._out.print(f"{outcome} {where}", markup=False)
            return
        self._out.print()
        self._out.print(_table(report))
        if report.verdict is not None:
            for check in report.verdict.checks:
                self._out.print(
                    f"{check.outcome.upper():<12} {check.name}: {check.text}", markup=False
                )
        self._out.print(f"\n{outcome}: {where}", markup=False)
        self._out.print(f"manifest.json sha256: {manifest_sha256}", markup=False, soft_wrap=True)

    def _say(self, text: str) -> None:
        if not self._quiet and not self._json:
            self._out.print(text, markup=False)


def _verdict_fields(report: Report) -> dict[str, Any]:
    verdict = report.verdict
    return {} if verdict is None else verdict.model_dump(mode="json")


def _table(report: Report) -> Table:
    n = report.models[0].n
    table = Table(
        title=f"test set, n = {n}; p50 at batch 1, one thread",
        title_justify="left",
        box=None,
        pad_edge=False,
    )
    table.add_column("model", no_wrap=True)
    for name in ("accuracy", "drop, points", "95 % bound", "ONNX file", "p50"):
        table.add_column(name, justify="right", no_wrap=True)
    for row in summary_rows(report):
        table.add_row(*row.values())
    return table
