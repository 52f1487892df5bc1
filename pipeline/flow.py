"""THE flow: data → teacher → soft labels → student → export → int8 → verify → latency → gate.

Reads like the sentence that describes the product, and owns the order: the recipe's sections are
wishes, not steps. What each stage reads (and so when it is recalled) is in `steps.py`.
"""

from __future__ import annotations

from pathlib import Path

from . import release, steps
from .gate import judge
from .recipe import Recipe
from .report import Report
from .stage import Events, Silent
from .workspace import locked


def run(
    recipe: Recipe, folder: Path, *, events: Events | None = None, fresh: bool = False
) -> Report:
    """Make the deployable file that `recipe` wishes for, prove it, and publish it in `folder`.

    Args:
        recipe: what the user wants.
        folder: output folder; its `.edgestill` holds the stages done so far.
        events: where progress is said; None: nowhere.
        fresh: forget stored stages and begin anew.

    Returns:
        The report with its verdict. `folder/model.onnx` exists if and only if it passed.

    Raises:
        EdgestillError: see `errors.py`; whatever was committed stays for the next run.
    """
    with locked(folder) as root:
        release.withdraw(folder)
        work = steps.begin(recipe, root, events=events or Silent(), fresh=fresh)

        data = steps.prepare_data(work)
        steps.check_before_training(work, data)

        teacher = steps.prepare_teacher(work, data) if recipe.teacher else None
        labels = steps.store_labels(work, data, teacher) if teacher else None
        student = steps.train_student(work, data, teacher, labels)

        floating = steps.export_student(work, data, student)
        deployed = steps.quantize(work, data, floating) if recipe.quantize else floating

        reference = steps.export_teacher(work, data, teacher) if teacher else None
        models = steps.Models(teacher, student, floating, deployed, reference)
        evidence = steps.verify(work, data, models)
        latency = steps.measure_latency(work, data, models) if recipe.profile else None

        report = steps.write_report(work, data, models, evidence, latency)
        report = report.model_copy(update={"verdict": judge(report, recipe.gate)})
        steps.publish(folder, models, evidence, report)
    return report
