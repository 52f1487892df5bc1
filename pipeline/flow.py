"""THE flow: data → teachers → soft labels → student → pruned → export → int8 → choice → verify →
latency → gate.

Reads like the sentence that describes the product, and owns the order: the recipe's sections are
wishes, not steps. Its end, from the choice on, is in `delivery.py`: a float file that somebody else
exported (`file_flow.py`) is proven in the same way. What each stage reads, and so when it is
recalled, is in `learning.py`, `steps.py` and `candidates.py`.
"""

from __future__ import annotations

from pathlib import Path

from . import candidates, elsewhere, learning, release, steps
from .delivery import deliver
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
        elsewhere.check_devices(work)

        data = steps.prepare_data(work)
        learning.check_before_training(work, data)
        steps.say_what_can_be_proven(work, data)

        teachers = learning.prepare_teachers(work, data)
        student = learn(work, data, teachers)
        pruned = prune(work, data, teachers, student) if recipe.prune else []
        baseline = learning.train_baseline(work, data)
        teacher = learning.reference_teacher(work, teachers, student)
        if not world.leads:
            return None  # the others have trained their share
        work = alone(work)

        tried = candidates.make(work, data, [*pruned, student])
        reference = steps.export_teacher(work, data, teacher) if teacher else None
        return deliver(
            work, data, tried, folder, teacher=teacher, teacher_onnx=reference, baseline=baseline
        )


def learn(work: Work, data: Artifact, teachers: list[Artifact]) -> Artifact:
    """The student; where it is born again, each generation is taught by the one before."""
    generations = work.recipe.distill.generations if work.recipe.distill else 1
    for generation in range(1, generations + 1):
        labels = learning.store_labels(work, data, teachers, generation=generation)
        student = learning.train_student(work, data, teachers, labels, generation=generation)
        teachers = [student]
    return student


def prune(work: Work, data: Artifact, teachers: list[Artifact], dense: Artifact) -> list[Artifact]:
    """Smaller networks: cut step by step, and what a step leaves is taught again."""
    spec = work.recipe.prune
    assert spec is not None
    network = dense
    for step in range(1, spec.steps):
        best, *_ = steps.prune(work, data, network, dense, step=step)
        network = learning.recover(work, data, teachers, dense, best, name=f"recovered-{step}")
    cut = steps.prune(work, data, network, dense, step=spec.steps)
    return [
        learning.recover(work, data, teachers, dense, one, name=f"pruned-{number}")
        for number, one in enumerate(cut, start=1)
    ]
