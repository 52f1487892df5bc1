"""A verdict together with what it is about: all that the views of this folder show. No torch."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from ..report import Check, CheckOutcome, Report, Verdict

# What a reader must see first.
SEVERITY: tuple[CheckOutcome, ...] = (
    "fail",
    "invalid",
    "inconclusive",
    "waived",
    "skipped",
    "pass",
)


@dataclass(frozen=True)
class Bound:
    """A published folder as it was read. `manifest_sha256` covers every file in it.

    `vouched` says how the manifest itself was checked; empty: its own word was taken.
    """

    folder: str
    report: Report
    manifest_sha256: str
    vouched: tuple[str, ...] = ()


@dataclass(frozen=True)
class Judgement:
    """`policy` is what people call it: a file's name, or the recipe's own gate."""

    verdict: Verdict
    release: Bound
    baseline: Bound | None
    policy: str

    @property
    def by_severity(self) -> list[Check]:
        return sorted(self.verdict.checks, key=lambda check: SEVERITY.index(check.outcome))


@dataclass(frozen=True)
class Refusal:
    """Nothing could be judged: why, and the exit code that says so."""

    folder: str
    reason: str
    exit_code: int


def to_document(judgement: Judgement) -> dict[str, Any]:
    """The verdict as JSON: what every other view is made from."""
    release, baseline = judgement.release, judgement.baseline
    return judgement.verdict.model_dump(mode="json") | {
        "policy": judgement.policy,
        "manifest_sha256": release.manifest_sha256,
        "manifest_vouched_by": list(release.vouched),
        "baseline_manifest_sha256": None if baseline is None else baseline.manifest_sha256,
        "baseline_manifest_vouched_by": [] if baseline is None else list(baseline.vouched),
    }


def one_line(text: str) -> str:
    """Names of classes and reasons come from files: a line break in one must not start a line."""
    return " ".join(text.split())


def headline(judgement: Judgement) -> str:
    """The verdict in a line."""
    verdict = judgement.verdict
    by_outcome = dict.fromkeys(SEVERITY, 0)
    for check in verdict.checks:
        by_outcome[check.outcome] += 1
    counts = ", ".join(f"{count} {outcome}" for outcome, count in by_outcome.items() if count)
    return f"{verdict.outcome.upper()} (exit {verdict.exit_code}): {counts}"


def number(value: float | None) -> str:
    """As short as the digits that matter."""
    if value is None:
        return "–"
    is_whole = math.isfinite(value) and value == int(value) and abs(value) < 1e15
    return f"{int(value):,}" if is_whole else f"{value:.4g}"
