"""The verdict as Markdown for a pull request: what was judged, what failed, what would change it.

Always fits: a job summary above 1 MiB is dropped whole by GitHub, so lists are cut, the worst is
kept, and what was left out is said. JSON has all of it.
"""

from __future__ import annotations

from collections.abc import Sequence

from ..markdown import human_bytes
from ..report import Check, Report
from .explain import what_would_change
from .judgement import Bound, Judgement, Refusal, headline, number, one_line

MAX_BYTES = 900 * 1024
LONGEST_CELL = 400  # characters
LONGEST_TEXT = 4000
WAYS_OF_BINDING = "its sha256, or a signature over it"


def to_summary(judgement: Judgement, *, at_most: int = MAX_BYTES) -> str:
    """Markdown of at most `at_most` bytes in UTF-8."""
    top = _top(judgement)
    ends = [_section("Bound to", _bound_rows(judgement))]
    room = at_most - _size([top, *ends])
    parts = [top]
    for title, rows in (
        ("Checks", _check_rows(judgement.by_severity)),
        ("What is not met, and what would change it", _unmet(judgement)),
        ("Waived", _waived_rows(judgement.by_severity)),
        ("Skipped by policy", _skipped(judgement)),
        ("Against the last release", _baseline_rows(judgement)),
        ("Notes", [f"- {_text(note)}" for note in judgement.verdict.notes]),
    ):
        # each takes half of what is left, so that a long list leaves room for those below it
        part = _fitted(title, rows, room=room // 2)
        room -= _size([part])
        parts.append(part)
    whole = "\n\n".join(part for part in [*parts, *ends] if part) + "\n"
    return whole if len(whole.encode()) <= at_most else _cut(top, at_most)


def refused_summary(refusal: Refusal) -> str:
    """Nothing was judged: why."""
    return (
        f"## edgestill gate: nothing judged (exit {refusal.exit_code})\n\n"
        f"`{_cell(refusal.folder)}`\n\n"
        + "\n".join(f"    {line[:LONGEST_TEXT]}" for line in refusal.reason.splitlines()[:50])
        + "\n"
    )


def _top(judgement: Judgement) -> str:
    report, verdict = judgement.release.report, judgement.verdict
    return (
        f"## edgestill gate: {headline(judgement)}\n\n"
        f"`{report.deployed}` against `{report.reference}` by {_text(judgement.policy)}, every "
        f"bound at {100 * verdict.confidence:g} % confidence, one-sided."
    )


def _check_rows(checks: Sequence[Check]) -> list[str]:
    rows = [
        [
            f"`{_cell(check.name)}`",
            _outcome(check),
            number(check.value),
            number(check.bound),
            f"{number(check.limit)} {_cell(check.unit)}" if check.limit is not None else "–",
            number(check.n),
        ]
        for check in checks
    ]
    return _table(("check", "outcome", "value", "bound", "limit", "n"), rows)


def _outcome(check: Check) -> str:
    return check.outcome if check.outcome == "pass" else f"**{check.outcome.upper()}**"


def _unmet(judgement: Judgement) -> list[str]:
    found = []
    for check in judgement.by_severity:
        if check.outcome in ("fail", "invalid", "inconclusive"):
            found.append(
                f"- **{check.outcome.upper()}** `{_cell(check.name)}`: {_text(check.text)}"
            )
            found += [
                f"  - {_text(line)}" for line in what_would_change(check, judgement.release.report)
            ]
    return found


def _waived_rows(checks: Sequence[Check]) -> list[str]:
    rows = [
        [
            f"`{_cell(check.name)}`",
            check.waiver.outcome,
            _cell(check.waiver.reason),
            _cell(check.waiver.owner),
            str(check.waiver.expires),
        ]
        for check in checks
        if check.waiver is not None
    ]
    return _table(("check", "found", "reason", "owner", "until"), rows)


def _skipped(judgement: Judgement) -> list[str]:
    return [
        f"- `{_cell(check.name)}`: {_text(check.text)}"
        for check in judgement.verdict.checks
        if check.outcome == "skipped"
    ]


def _baseline_rows(judgement: Judgement) -> list[str]:
    """Accuracies are of each run's own test set: what is judged pairs them by sample."""
    if judgement.baseline is None:
        return []
    new, old = judgement.release.report, judgement.baseline.report
    rows = [
        [name, before, after]
        for (name, before), (_, after) in zip(_facts(old), _facts(new), strict=True)
    ]
    return _table(("", "last release", "this one"), rows)


def _facts(report: Report) -> list[tuple[str, str]]:
    """What of a deployed file can be compared between runs: no latency."""
    model = report.model(report.deployed)
    chosen = report.candidates[report.selection.index]
    return [
        ("accuracy", f"{100 * model.accuracy:.2f} % of {model.n}"),
        ("file", human_bytes(chosen.bytes)),
        ("multiply-adds", number(chosen.multiply_adds)),
        ("of them int8", f"{100 * chosen.int8_share:.1f} %"),
        ("opset", "–" if report.file is None else str(report.file.opset)),
        ("model sha256", f"`{_cell(report.model_sha256)}`"),
        ("made", f"{_cell(report.created_utc)} by edgestill {_cell(report.tool_version)}"),
    ]


def _bound_rows(judgement: Judgement) -> list[str]:
    verdict = judgement.verdict
    rows = [
        ["model", f"`{_cell(verdict.model_sha256)}`"],
        ["test and training data", f"`{_cell(verdict.data_sha256)}`"],
        ["recipe", f"`{_cell(verdict.recipe_sha256)}`"],
        [f"policy ({_cell(judgement.policy)})", f"`{_cell(verdict.policy_sha256)}`"],
        ["manifest", _manifest(judgement.release)],
    ]
    if judgement.baseline is not None:
        rows.append(["manifest of the last release", _manifest(judgement.baseline)])
    rows += [
        [_cell(name), f"`{digest}`"] for name, digest in list(verdict.files_sha256.items())[:20]
    ]
    rows.append(["judged by", f"edgestill {_cell(verdict.tool_version)}"])
    return _table(("", "sha256"), rows)


def _manifest(bound: Bound) -> str:
    how = ", ".join(bound.vouched)
    trust = f"checked by {_cell(how)}" if how else f"**taken at its word**: give {WAYS_OF_BINDING}"
    return f"`{bound.manifest_sha256}` ({trust})"


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    if not rows:
        return []
    lines = ["| " + " | ".join(cells) + " |" for cells in (header, *rows)]
    return [lines[0], "|" + " --- |" * len(header), *lines[1:]]


def _section(title: str, lines: Sequence[str]) -> str:
    return "\n".join([f"### {title}", "", *lines]) if lines else ""


def _fitted(title: str, lines: Sequence[str], *, room: int) -> str:
    """The section, without the lines at its end for which there is no room."""
    if not lines:
        return ""
    reserve = 200  # bytes: the title and the note
    kept, used = 0, reserve
    for line in lines:
        used += len(line.encode()) + 1
        if used > room:
            break
        kept += 1
    if kept == len(lines):
        return _section(title, lines)
    left_out = f"… {len(lines) - kept:,} more lines are left out here; `--json` has them all."
    return _section(title, [*lines[:kept], "", left_out])


def _size(parts: Sequence[str]) -> int:
    return sum(len(part.encode()) + 2 for part in parts)


def _cut(text: str, at_most: int) -> str:
    return text.encode()[: max(at_most, 0)].decode(errors="ignore")


def _cell(text: str) -> str:
    """Of a table: on one line, without what would end the cell or start a tag."""
    short = _shortened(one_line(text), LONGEST_CELL)
    return _plain(short).replace("|", "\\|")


def _text(text: str) -> str:
    return _plain(_shortened(one_line(text), LONGEST_TEXT))


def _plain(text: str) -> str:
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def _shortened(text: str, longest: int) -> str:
    return text if len(text) <= longest else f"{text[:longest]}…"
