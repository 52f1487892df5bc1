"""`compress gate` and `compress report`: a published run judged again, or printed. Parse and print.

Everything that is asked for beside the terminal's lines (Markdown, JUnit, GitHub) is written too
where nothing could be judged: a file of yesterday must not stand for a verdict of today.
"""

from __future__ import annotations

import datetime
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from .errors import EdgestillError, UsageError

if TYPE_CHECKING:
    from .rejudge import Question
    from .verdict.judgement import Judgement, Refusal

FILE = click.Path(path_type=Path)
GATE_OPTIONS = (
    click.option(
        "--policy",
        type=FILE,
        help="YAML of limits; replaces the recipe's gate, never merges with it.",
    ),
    click.option("--baseline", type=FILE, metavar="DIR", help="The last release's folder."),
    click.option(
        "--inconclusive",
        type=click.Choice(["fail", "warn"]),
        help="warn: exit 0 though nothing was proven; replaces the policy's own word.",
    ),
    click.option(
        "--manifest-sha256",
        metavar="HEX",
        help="What manifest.json must be, as `compress run` printed it: detects edits.",
    ),
    click.option("--baseline-manifest-sha256", metavar="HEX", help="Likewise of --baseline."),
    click.option(
        "--signature",
        type=FILE,
        help="OpenSSF model signature over manifest.json; needs --public-key and edgestill[sign].",
    ),
    click.option("--public-key", type=FILE, help="PEM; whose signature it must be."),
    click.option("--json", "as_json", is_flag=True, help="Print the verdict as JSON."),
    click.option("--markdown", type=FILE, help="Write a summary for a pull request."),
    click.option("--junit", type=FILE, help="Write JUnit XML, a test case a check."),
    click.option(
        "--github",
        is_flag=True,
        help="Annotations on stderr; job summary and outputs where GitHub's variables say.",
    ),
    click.option(
        "--explain", metavar="CHECK", help="Print how one check came out, and what changes it."
    ),
)


def _gate_options(command: Callable[..., int]) -> Callable[..., int]:
    for option in reversed(GATE_OPTIONS):
        command = option(command)
    return command


@click.command()
@click.argument("folder", type=FILE)
@_gate_options
def gate(
    folder: Path,
    as_json: bool,
    markdown: Path | None,
    junit: Path | None,
    github: bool,
    explain: str | None,
    **asked: Any,
) -> int:
    """Judge the run in FOLDER again; the exit code is the verdict. Renames nothing."""
    from .rejudge import answer
    from .verdict.judgement import Refusal

    if as_json and explain is not None:
        raise UsageError("--json and --explain both print the answer; give one of them")
    views = Views(markdown, junit, github)
    views.make_room(folder, asked["baseline"], policy=asked["policy"])
    try:
        judgement = answer(_question(folder, **asked), today=datetime.date.today())
        text = _printed(judgement, as_json=as_json, explain=explain)
    except EdgestillError as error:
        views.write_refusal(Refusal(str(folder), str(error), error.exit_code))
        raise
    views.write(judgement)
    click.echo(text)
    return judgement.verdict.exit_code


@click.command()
@click.argument("folder", type=FILE)
@click.option("--json", "as_json", is_flag=True, help="Print report.json instead of Markdown.")
def report(folder: Path, as_json: bool) -> int:
    """Print the report of the run in FOLDER, after checking it against its manifest."""
    from .markdown import to_markdown
    from .release import MANIFEST, REPORT, read_release

    found = read_release(folder)
    if as_json:
        click.echo((folder / REPORT).read_text("utf-8"), nl=False)
    else:
        click.echo(to_markdown(found.report), nl=False)
        click.echo(f"\n{MANIFEST} sha256 `{found.manifest.sha256}`")
    return 0


@dataclass(frozen=True)
class Views:
    """Where else the verdict goes."""

    markdown: Path | None
    junit: Path | None
    github: bool

    def make_room(self, *releases: Path | None, policy: Path | None) -> None:
        """Remove what an earlier gate left. Raises UsageError where a file cannot be written."""
        from .release import FILES

        wanted = {"--markdown": self.markdown, "--junit": self.junit}
        if self.markdown is not None and self.markdown == self.junit:
            raise UsageError(f"--markdown and --junit: both name {self.junit}; give two files")
        read = [home / name for home in releases if home for name in FILES]
        read += [] if policy is None else [policy]
        for option, path in wanted.items():
            if path is None:
                continue
            if not path.parent.is_dir():
                raise UsageError(f"{option} {path}: no such folder {path.parent}; make it first")
            if path.is_symlink() or (path.exists() and not path.is_file()):
                raise UsageError(f"{option} {path}: expected a file, got a folder, link or device")
            if path.resolve() in [one.resolve() for one in read]:
                raise UsageError(f"{option} {path}: the gate reads this file; name another")
        for path in filter(None, wanted.values()):
            path.unlink(missing_ok=True)

    def write(self, judgement: Judgement) -> None:
        from .verdict import github, junit, summary

        self._write(summary.to_summary(judgement), junit.to_junit(judgement))
        if self.github:
            room = min(github.summary_room(), summary.MAX_BYTES)
            text = summary.to_summary(judgement, at_most=room)
            self._show(github.to_annotations(judgement), text)
            self._output(judgement.verdict.outcome, judgement.verdict.exit_code)

    def write_refusal(self, refusal: Refusal) -> None:
        from .verdict import github, junit, summary

        text = summary.refused_summary(refusal)
        self._write(text, junit.refused_junit(refusal))
        if self.github:
            self._show([github.refused_annotation(refusal)], text)
            self._output("error", refusal.exit_code)

    def _write(self, summary: str, junit: bytes) -> None:
        from .workspace import write_atomically

        if self.markdown is not None:
            write_atomically(self.markdown, summary.encode())
        if self.junit is not None:
            write_atomically(self.junit, junit)

    def _show(self, annotations: Sequence[str], summary: str) -> None:
        from .verdict.github import append_summary

        for line in annotations:
            click.echo(line, err=True)  # read from there too; stdout is the verdict's
        append_summary(summary)

    def _output(self, outcome: str, exit_code: int) -> None:
        from .verdict.github import append_outputs

        append_outputs(
            {
                "outcome": outcome,
                "exit_code": str(exit_code),
                "markdown": "" if self.markdown is None else str(self.markdown),
                "junit": "" if self.junit is None else str(self.junit),
            }
        )


def _question(
    folder: Path, *, signature: Path | None, public_key: Path | None, **asked: Any
) -> Question:
    from .rejudge import Question
    from .signature import Signed

    if (signature is None) != (public_key is None):
        raise UsageError(
            "--signature and --public-key: one says nothing without the other; give both"
        )
    if asked["baseline"] is None and asked["baseline_manifest_sha256"] is not None:
        raise UsageError("--baseline-manifest-sha256: there is no --baseline that it could be of")
    signed = None
    if signature is not None and public_key is not None:
        signed = Signed(signature, public_key)
    return Question(folder, signed=signed, **asked)


def _printed(judgement: Judgement, *, as_json: bool, explain: str | None) -> str:
    from .verdict.explain import explain as in_words
    from .verdict.judgement import headline, one_line, to_document

    if as_json:
        return json.dumps(to_document(judgement), indent=1)
    if explain is not None:
        return in_words(judgement, explain)
    lines = [
        f"{check.outcome.upper():<12} {check.name}: {one_line(check.text)}"
        for check in judgement.verdict.checks
    ]
    lines += [f"note: {one_line(note)}" for note in judgement.verdict.notes]
    lines.append(f"confidence: {100 * judgement.verdict.confidence:g} %, one-sided")
    lines.append(f"manifest.json sha256: {judgement.release.manifest_sha256}")
    return "\n".join([*lines, f"verdict: {headline(judgement)}"])
