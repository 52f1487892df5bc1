"""The flow for a float .onnx that somebody else exported: data → float → int8 → choice → verify →
latency → gate. Runs where torch is not installed.
"""

from __future__ import annotations

from pathlib import Path

from . import candidates, elsewhere, release, steps
from .delivery import deliver
from .recipe import Recipe
from .report import Report
from .stage import Events, Silent
from .work import begin
from .workspace import locked


def run(
    recipe: Recipe, folder: Path, *, events: Events | None = None, fresh: bool = False
) -> Report:
    """As `flow.run`, for a recipe whose `student.model` is an .onnx file."""
    with locked(folder) as root:
        release.withdraw(folder)
        work = begin(recipe, root, events=events or Silent(), fresh=fresh)
        elsewhere.check_devices(work)
        data = steps.prepare_data(work)
        steps.say_what_can_be_proven(work, data)
        floating = steps.take_float(work, data)
        tried = candidates.of_file(work, data, floating)
        return deliver(work, data, tried, folder)
