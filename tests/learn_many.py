"""Run by test_torchrun.py, alone or under torchrun: the stages that learn, for several recipes.

What comes after them the first process does alone, so leaving it out saves most of the time.
"""

from __future__ import annotations

import sys
from pathlib import Path

from edgestill.pipeline import learning, steps
from edgestill.pipeline.flow import learn
from edgestill.pipeline.recipe_file import load_recipe
from edgestill.pipeline.stage import Silent
from edgestill.pipeline.train.distributed import gathered
from edgestill.pipeline.work import begin
from edgestill.pipeline.workspace import locked


def main(out: Path, recipes: list[Path]) -> None:
    with gathered() as world:
        for path in recipes:
            with locked(out / path.stem, world=world) as root:
                recipe = load_recipe(str(path))
                work = begin(recipe, root, events=Silent(), fresh=False, world=world)
                data = steps.prepare_data(work)
                learning.check_before_training(work, data)
                learn(work, data, learning.prepare_teachers(work, data))


if __name__ == "__main__":
    main(Path(sys.argv[1]), [Path(name) for name in sys.argv[2:]])
