"""THE flow: data → teachers → soft labels → student → export → int8 → verify → latency → gate.

Reads like the sentence that describes the product, and owns the order: the recipe's sections are
wishes, not steps. What each stage reads (and so when it is recalled) is in `steps.py` and
`learning.py`.
"""

from __future__ import annotations

from pathlib import Path

from . import learning, record, release, steps
from .gate import judge
from .recipe import Recipe
from .report import Report
from .stage import Artifact, Events, Silent
from .train.distributed import gathered
from .work import Work, alone, begin
from .workspace import locked


def run(
    recipe: Recipe, folder: Path, *, events: Events | None = None, fresh: bool = False
) -> Report | None:
    """Make the deployable file that `recipe` wishes for, prove it, and publish it in `folder`.

    Args:
        recipe: what the user wants.
        folder: output folder; its `.edgestill` holds the stages done so far.
        events: where progress is said; None: nowhere.
        fresh: forget stored stages and begin anew.

    Returns:
        The report with its verdict. `folder/model.onnx` exists if and only if it passed. None in
        the processes that `torchrun` started to help with training: the first one reports.

    Raises:
        EdgestillError: see `errors.py`; whatever was committed stays for the next run.
    """
    with gathered() as world, locked(folder, world=world) as root:
        if world.leads:
            release.withdraw(folder)
        work = begin(recipe, root, events=events or Silent(), fresh=fresh, world=world)

        data = steps.prepare_data(work)
        learning.check_before_training(work, data)

        teachers = learning.prepare_teachers(work, data)
        student = learn(work, data, teachers)
        baseline = learning.train_baseline(work, data)
        teacher = learning.reference_teacher(work, teachers, student)
        if not world.leads:
            return None  # the others have trained their share
        work = alone(work)

        floating = steps.export_student(work, data, student)
        deployed = steps.quantize(work, data, floating) if recipe.quantize else floating

        reference = steps.export_teacher(work, data, teacher) if teacher else None
        models = record.Models(teacher, student, floating, deployed, reference, baseline)
        evidence = steps.verify(work, data, models)
        latency = steps.measure_latency(work, data, models) if recipe.profile else None

        report = record.write_report(
            recipe, data, models, evidence, latency, done=work.done, notes=work.notes
        )
        report = report.model_copy(update={"verdict": judge(report, recipe.gate)})
        record.publish(folder, models, evidence, report)
    return report


def learn(work: Work, data: Artifact, teachers: list[Artifact]) -> Artifact:
    """The student; where it is born again, each generation is taught by the one before."""
    generations = work.recipe.distill.generations if work.recipe.distill else 1
    for generation in range(1, generations + 1):
        labels = learning.store_labels(work, data, teachers, generation=generation)
        student = learning.train_student(work, data, teachers, labels, generation=generation)
        teachers = [student]
    return student
