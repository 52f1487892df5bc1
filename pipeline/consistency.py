"""The files of a run agree with one another: report, samples, recipe, model and raw latencies.

Two files of different runs, or a number edited in one place, contradict the others even where the
manifest was made anew. What is stated in one place only cannot be held against anything.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import yaml

from .errors import IntegrityError
from .report import Report

if TYPE_CHECKING:
    from .release import Release

# Bootstrap ends from 10,000 resamples wander by about 1 % where numpy's random streams changed
# between the version that measured and the one that checks.
INTERVAL_TOLERANCE = 0.05
# libyaml where PyYAML was built with it: ten times as fast.
LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
EXACT = 1e-6  # relative; a float through JSON, logarithms summed in another order


def check_consistency(release: Release) -> None:
    """Raises IntegrityError that names the two places, and what each of them says."""
    for problem in _problems(release):
        raise IntegrityError(
            f"{release.folder}: {problem}; the files are not of one run: run again"
        )


def _problems(release: Release) -> Iterator[str]:
    yield from _roles(release.report)
    yield from _model(release)
    yield from _recipe(release)
    yield from _samples(release)
    yield from _latency(release.report)


def _model(release: Release) -> Iterator[str]:
    report, name = release.report, release.model.name
    if report.model_sha256 != release.manifest.files[name]:
        yield (
            f"report.json is of a model with sha256 {report.model_sha256[:12]}…, {name} has "
            f"{release.manifest.files[name][:12]}…"
        )
    size = release.model.stat().st_size
    stated = {report.candidates[report.selection.index].bytes} if report.candidates else set()
    stated |= set() if report.file is None else {report.file.bytes}
    if stated - {size}:
        yield f"{name} has {size:,} bytes, report.json says {max(stated - {size}):,}"
    verdict = report.verdict
    should_be = "model.onnx" if verdict and verdict.outcome == "pass" else "rejected.onnx"
    if name != should_be:
        said = verdict.outcome.upper() if verdict else "no verdict"
        yield f"report.json says {said}, which leaves {should_be}, but there is {name}"
    yield from _mobile(release, passed=should_be == "model.onnx")


def _mobile(release: Release, *, passed: bool) -> Iterator[str]:
    """model.ort is that of the report, and is there exactly where the model passed."""
    found = release.manifest.files.get("model.ort")
    made = [row.measurements for row in release.report.stages if row.name == "ort"]
    expected = made[-1]["sha256"] if made and passed else None
    if found != expected:
        yield (f"model.ort {_hash(found)}, and by report.json it {_hash(expected)}")


def _hash(digest: str | None) -> str:
    return "is not there" if digest is None else f"has sha256 {digest[:12]}…"


def _recipe(release: Release) -> Iterator[str]:
    text = (release.folder / "recipe.yaml").read_bytes()
    try:
        written = yaml.load(text, Loader=LOADER)
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        yield f"recipe.yaml cannot be read: {str(error).splitlines()[0]}"
        return
    if written != release.report.recipe:
        yield f"recipe.yaml and the recipe in report.json differ{_where(written, release.report)}"


def _where(written: Any, report: Report) -> str:
    if not isinstance(written, dict):
        return ""
    keys = [k for k in written | report.recipe if written.get(k) != report.recipe.get(k)]
    return f" in `{keys[0]}`" if keys else ""


def _roles(report: Report) -> Iterator[str]:
    measured = [model.role for model in report.models]
    pairs = [(pair.reference, pair.candidate) for pair in report.pairs]
    if len(set(measured)) < len(measured) or len(set(pairs)) < len(pairs):
        yield "report.json has a model or a pair twice"
    if (report.reference, report.deployed) not in pairs:
        yield f"report.json does not compare {report.deployed} with its reference"
    missing = {report.reference, report.deployed, *(r for pair in pairs for r in pair)}
    if missing - set(measured):
        yield f"report.json compares {', '.join(sorted(missing - set(measured)))}, not measured"
    if not 0 <= report.selection.index < len(report.candidates):
        yield "report.json says that a candidate went on which is not among its candidates"


def _samples(release: Release) -> Iterator[str]:
    """Counts that summarise the samples must be theirs."""
    report, samples = release.report, release.samples
    for model in report.models:
        if model.role not in samples.answers:
            yield f"samples.parquet has no answers of {model.role}"
            return
        right = samples.answers[model.role].correct
        found = (samples.n, int(right.sum()))
        if found != (model.n, model.correct):
            yield (
                f"samples.parquet gives {model.role} n, correct = {found}, report.json says "
                f"{(model.n, model.correct)}"
            )
        names = enumerate(samples.class_names)
        of_class = {name: samples.labels == index for index, name in names}
        counts = {name: (int(right[of].sum()), int(of.sum())) for name, of in of_class.items()}
        if counts != model.per_class:
            yield f"samples.parquet and report.json differ in the classes of {model.role}"
    for pair in report.pairs:
        before, after = (samples.answers[r].correct for r in (pair.reference, pair.candidate))
        counted = (samples.n, int((before & ~after).sum()), int((~before & after).sum()))
        if counted != (pair.n, pair.lost, pair.gained):
            yield (
                f"samples.parquet gives {pair.reference} against {pair.candidate} n, lost, gained "
                f"= {counted}, report.json says {(pair.n, pair.lost, pair.gained)}"
            )


def _latency(report: Report) -> Iterator[str]:
    """What was computed from the raw nanoseconds must follow from them."""
    from .measure.latency_stats import ratio_of

    for row in report.latency:
        if len(row.raw_ns) < 2 or not all(row.raw_ns):
            yield f"report.json has no raw latencies of {row.name}"
            return
        for key, found in _of_raw(row.raw_ns).items():
            if not _close(getattr(row, key), found, EXACT):
                yield (
                    f"the raw latencies of {row.name} give {key} = {found}, report.json says "
                    f"{getattr(row, key)}"
                )
    speedup = report.speedup
    if speedup is None:
        return
    told = (speedup.ratio, *speedup.ci95)
    for before in report.latency:
        for after in report.latency:
            same = (before.threads, before.sequence) == (after.threads, after.sequence)
            if same and (before.name, after.name) == (speedup.reference, speedup.candidate):
                again = ratio_of(before.raw_ns, after.raw_ns)
                limits = (EXACT, INTERVAL_TOLERANCE, INTERVAL_TOLERANCE)
                if all(map(_close, told, (again["ratio"], *again["ci95"]), limits)):
                    return
    yield f"no raw latencies give the speed-up of {speedup.ratio:.3f} that report.json states"


def _of_raw(launches: Sequence[Sequence[int]]) -> dict[str, float | None]:
    """The figures of `latency_stats.summarize` that a gate or a reader rests on; no bootstrap."""
    from .measure.latency_stats import TAILS, tail_bound

    arrays = [np.asarray(launch, dtype=np.float64) / 1e6 for launch in launches]
    pooled = np.sort(np.concatenate(arrays))
    return {
        "n": len(pooled),
        "launches": len(arrays),
        "p50_ms": float(np.exp(np.mean([np.log(np.median(array)) for array in arrays]))),
        "min_ms": float(pooled[0]),
        "cv": float(pooled.std() / pooled.mean()),
        **{name: tail_bound(pooled, share) for name, share in TAILS.items()},
    }


def _close(told: float | None, found: float | None, relative: float) -> bool:
    if told is None or found is None:
        return told is found
    return math.isclose(told, found, rel_tol=relative)
