"""judge(evidence, policy) → Verdict: three-valued, paired, fail-closed. Pure; no torch.

    PASS          the confidence bound is within the limit
    FAIL          the estimate itself is beyond it
    INCONCLUSIVE  neither: the check names the n that would decide
    INVALID       nothing was measured, or what was proves nothing (NaN, throttled, other samples)

A check that is not met may be waived, and limits on latency skipped, where the policy says so; both
are shown. What each check computes, and after which source, is in its file of `gates/`.
"""

from __future__ import annotations

import datetime
import hashlib
import json
from collections.abc import Iterator
from pathlib import Path

from .. import __version__
from .errors import RecipeError
from .gates import baseline, calibration, classes, drop, files, latency, metrics, slices
from .gates.evidence import Evidence
from .gates.waivers import apply_waivers, refuse_expired
from .policy import GateSpec
from .report import LOCAL, Check, Outcome, Report, Verdict
from .workspace import file_sha256

EXIT_CODES: dict[Outcome, int] = {"pass": 0, "fail": 1, "inconclusive": 3, "invalid": 4}
PRECEDENCE: tuple[Outcome, ...] = ("fail", "invalid", "inconclusive")


def judge(evidence: Evidence, policy: GateSpec) -> Verdict:
    """Every check of `policy` on `evidence`, and what they say together.

    Raises:
        RecipeError: a waiver has expired or is of no check; a file that the policy names is missing
            or does not fit the samples.
        ModelError: a metric of the user's own fails.
    """
    report = evidence.report
    found = [
        files.parity(report),
        *files.budget(report),
        *drop.checks(evidence, policy),
        *metrics.checks(evidence, policy),
        *classes.checks(evidence, policy),
        *calibration.checks(evidence, policy),
        *slices.checks(evidence, policy),
        *latency.checks(evidence, policy),
        *files.checks(evidence, policy),
        *baseline.checks(evidence, policy),
    ]
    checks = apply_waivers(found, policy.waivers, today=evidence.today)
    outcomes = {check.outcome for check in checks}
    outcome: Outcome = next((one for one in PRECEDENCE if one in outcomes), "pass")
    warned = outcome == "inconclusive" and policy.inconclusive == "warn"
    old = evidence.baseline
    return Verdict(
        outcome=outcome,
        exit_code=0 if warned else EXIT_CODES[outcome],
        checks=tuple(checks),
        confidence=policy.confidence,
        notes=tuple(_notes(checks, is_warned=warned, has_baseline=old is not None)),
        tool_version=__version__,
        model_sha256=report.model_sha256,
        data_sha256=report.data_sha256,
        recipe_sha256=hashlib.sha256(report.recipe_yaml.encode()).hexdigest(),
        policy_sha256=policy_sha256(policy),
        baseline_model_sha256=None if old is None else old.report.model_sha256,
        files_sha256={path.name: file_sha256(path) for path in _files(policy)},
    )


def check_policy(policy: GateSpec, *, today: datetime.date) -> None:
    """What is wrong with a policy whatever is measured, said before hours are spent on it.

    Raises:
        RecipeError: a waiver has expired; a file that it names is missing or has no such column.
        ModelError: a file of the user's own has no such metric.
    """
    refuse_expired(policy.waivers, today=today)
    for metric in policy.metrics:
        if metrics.metric_file(metric) is not None:
            metrics.open_metric(metric.metric)
    for part in policy.slices:
        slices.read_column(Path(part.file), part.column)


def unmeasured(evidence: Evidence, policy: GateSpec) -> list[str]:
    """Limits of `policy` that nothing in `evidence` can answer, each with what to do."""
    report = evidence.report
    return [
        *_without_int8(report, policy),
        *_without_latency(report, policy),
        *_without_record(evidence, policy),
    ]


def policy_sha256(policy: GateSpec) -> str:
    """Of what the policy says; a path in it counts as the content of its file."""
    said = policy.model_dump(mode="json")
    for one, spec in zip(said["metrics"], policy.metrics, strict=True):
        if (path := metrics.metric_file(spec)) is not None:
            one["metric"] = f"{_content(path)}:{spec.metric.rpartition(':')[2]}"
    for one, part in zip(said["slices"], policy.slices, strict=True):
        one["file"] = _content(Path(part.file))
    return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()


def _files(policy: GateSpec) -> Iterator[Path]:
    """What the policy names beside its limits."""
    yield from (path for one in policy.metrics if (path := metrics.metric_file(one)) is not None)
    yield from (Path(one.file) for one in policy.slices)


def _content(path: Path) -> str:
    try:
        return file_sha256(path)
    except OSError as error:
        raise RecipeError(f"{path}: cannot be read: {error.strerror}; check the path") from None


def _notes(checks: list[Check], *, is_warned: bool, has_baseline: bool) -> Iterator[str]:
    """What nobody may overlook who sees that the exit code is 0."""
    if is_warned:
        names = ", ".join(check.name for check in checks if check.outcome == "inconclusive")
        yield (
            f"WARNING: INCONCLUSIVE, nothing was proven of {names}; the exit code is 0 because the "
            "policy says `inconclusive: warn`"
        )
    for check in checks:
        if check.waiver is not None:
            yield (
                f"WAIVED: {check.name} is {check.waiver.outcome.upper()}, let through by "
                f"{check.waiver.owner} until {check.waiver.expires}: {check.waiver.reason}"
            )
    skipped = [check.name for check in checks if check.outcome == "skipped"]
    if skipped:
        yield f"SKIPPED by policy (`latency: not-here`): {', '.join(skipped)}"
    if has_baseline:
        yield baseline.LATENCY


def _without_int8(report: Report, policy: GateSpec) -> Iterator[str]:
    if report.recipe.get("quantize") is not None:
        return
    for limit in ("max_quantization_drop_points", "min_int8_share"):
        if getattr(policy, limit) is not None:
            yield (
                f"{limit}: this run quantized nothing; remove the limit, or run again with a "
                "`quantize:` section"
            )


def _without_latency(report: Report, policy: GateSpec) -> Iterator[str]:
    if policy.latency == "not-here":
        return
    measured = sorted({row.device for row in report.latency})
    for device, limit, _ in latency.limits(policy):
        if (device or LOCAL) in measured:
            continue
        if device is not None:
            yield (
                f"devices.{device}.{limit}: nothing was measured on {device!r}; measured on: "
                f"{', '.join(measured) or 'no device'}"
            )
        else:
            yield (
                f"{limit}: this run measured no latency; remove the limit, run again with a "
                "`profile:` section, or say `latency: not-here`"
            )


def _without_record(evidence: Evidence, policy: GateSpec) -> Iterator[str]:
    if policy.min_cpu_agreement is not None and not evidence.report.agreements:
        yield (
            "min_cpu_agreement: no other CPU has run the deployed file; remove the limit, or run "
            "again with a device of devices.yaml in `profile.devices`"
        )
    if policy.baseline is not None and evidence.baseline is None:
        yield (
            "baseline: there is no earlier release to compare with; give its folder, "
            "compress gate DIR --baseline OLD_DIR, or remove the section"
        )
