"""The end of every flow: choice → verify → other formats → latency → other machines → report → gate
→ published.
"""

from __future__ import annotations

import datetime
from collections.abc import Sequence
from pathlib import Path

from . import candidates, elsewhere, record, release, steps, timing
from .gate import judge
from .gates.evidence import Evidence
from .gates.samples import read_samples
from .record import Candidate
from .report import Report
from .stage import Artifact
from .work import Work


def deliver(
    work: Work,
    data: Artifact,
    tried: Sequence[Candidate],
    folder: Path,
    *,
    teacher: Artifact | None = None,
    teacher_onnx: Artifact | None = None,
    baseline: Artifact | None = None,
) -> Report:
    """Choose one of the files that were made, prove it on the test set, publish what was found.

    Args:
        tried: candidates in table order.
        teacher: what the gate's drop counts from, if there is one.

    Returns:
        The report with its verdict. `folder/model.onnx` exists if and only if it passed.
    """
    chosen = candidates.choose(work, data, tried, reference=teacher)
    models = record.models(chosen, teacher=teacher, teacher_onnx=teacher_onnx, baseline=baseline)
    evidence = steps.verify(work, data, models)
    formats = steps.other_formats(work, data, models)
    latency = timing.measure_latency(work, data, models) if work.recipe.profile else None
    others = elsewhere.prove_elsewhere(work, data, models)

    report = record.write_report(
        work.recipe, data, models, evidence, latency, elsewhere=others, done=work.done,
        notes=work.notes,
    )  # fmt: skip
    grounds = Evidence(
        report=report,
        samples=read_samples(evidence.path / release.SAMPLES),
        baseline=None,
        today=datetime.date.today(),
    )
    report = report.model_copy(update={"verdict": judge(grounds, work.recipe.gate)})
    beside = steps.files_beside(work, data, models)
    record.publish(folder, models, evidence, report, beside=beside, formats=formats)
    return report
