"""A published run, judged again: read once, bound to its files, held against a policy. No torch."""

from __future__ import annotations

import datetime
from dataclasses import dataclass
from pathlib import Path

from pydantic import ValidationError

from .. import __version__
from .errors import IntegrityError, RecipeError
from .gate import judge, unmeasured
from .gates.evidence import Evidence
from .gates.metrics import metric_file
from .policy import GateSpec
from .recipe_file import load_policy
from .release import Release, read_release
from .signature import Signed
from .verdict.judgement import Bound, Judgement

RECIPES_GATE = "the recipe's gate"


@dataclass(frozen=True)
class Question:
    """What is judged, by what, and what is known of it.

    `inconclusive` replaces the policy's own word. The hashes are those of the two manifests, 64
    hexadecimal digits; None: each manifest's own word is taken.
    """

    folder: Path
    policy: Path | None = None
    baseline: Path | None = None
    inconclusive: str | None = None
    manifest_sha256: str | None = None
    baseline_manifest_sha256: str | None = None
    signed: Signed | None = None


def answer(question: Question, *, today: datetime.date) -> Judgement:
    """The verdict on a published run, as if its own gate had been the policy.

    Raises:
        UsageError, RecipeError: the folder holds no run, or the policy cannot judge it.
        IntegrityError: files are not what their manifest says (`release.read_release`).
    """
    release = read_release(
        question.folder, manifest_sha256=question.manifest_sha256, signed=question.signed
    )
    last = None
    if question.baseline is not None:
        last = read_release(question.baseline, manifest_sha256=question.baseline_manifest_sha256)
    policy = _policy(release, question)
    before = None if last is None else _evidence(last, today=today)
    evidence = _evidence(release, baseline=before, today=today)
    if problems := unmeasured(evidence, policy):
        name = question.policy.name if question.policy else "gate"
        raise RecipeError("\n".join(f"{name}: {problem}" for problem in problems))
    return Judgement(
        verdict=judge(evidence, policy),
        release=_bound(release, given=question.manifest_sha256),
        baseline=None if last is None else _bound(last, given=question.baseline_manifest_sha256),
        policy=question.policy.name if question.policy else RECIPES_GATE,
    )


def _policy(release: Release, question: Question) -> GateSpec:
    policy = (
        _own_gate(release, question) if question.policy is None else load_policy(question.policy)
    )
    if question.inconclusive is None:
        return policy
    return policy.model_copy(update={"inconclusive": question.inconclusive})


def _own_gate(release: Release, question: Question) -> GateSpec:
    """The gate of the run's recipe. Code that it names is not run on the folder's own word."""
    try:
        policy = GateSpec.model_validate(release.report.recipe.get("gate"))
    except ValidationError as error:
        first = error.errors()[0]
        raise IntegrityError(
            f"{release.folder}: the recipe's gate is none that edgestill {__version__} knows: "
            f"{'.'.join(map(str, first['loc']))}: {first['msg']}; give --policy"
        ) from None
    own = [spec.metric for spec in policy.metrics if metric_file(spec) is not None]
    if own and question.manifest_sha256 is None and question.signed is None:
        raise RecipeError(
            f"{release.folder}: its recipe's gate would run {own[0]}, and nothing vouches for the "
            "folder; give --policy FILE, or --manifest-sha256"
        )
    return policy


def _evidence(
    release: Release, *, today: datetime.date, baseline: Evidence | None = None
) -> Evidence:
    return Evidence(release.report, release.samples, baseline=baseline, today=today)


def _bound(release: Release, *, given: str | None) -> Bound:
    vouched = [] if given is None else ["its sha256"]
    if release.signed is not None:
        vouched.append(f"a signature of {release.signed.public_key.name}")
    return Bound(
        folder=str(release.folder),
        report=release.report,
        manifest_sha256=release.manifest.sha256,
        vouched=tuple(vouched),
    )
