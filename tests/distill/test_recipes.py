"""The shipped examples: every way of distilling has one, and every one runs from images to verdict.

Each is run with its schedule cut to two epochs, in one output folder, so that the stages they have
in common (images, teacher) are made once.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import get_args

import pytest
from edgestill.pipeline import flow
from edgestill.pipeline.distill.terms import TERMS
from edgestill.pipeline.recipe import DataSpec, Recipe
from edgestill.pipeline.recipe_file import SHIPPED, load_recipe, shipped_recipes
from edgestill.pipeline.strategy import Plan, choose
from edgestill.pipeline.training_spec import DistillSpec, Target, TokenSpec

EXAMPLES = [name for name in shipped_recipes() if name.startswith("digits-")]
SHORT = ("compute.threads=1", "distill.epochs=2", "distill.views=2", "gate.max_drop_points=95")
OF_TEXTS = {kind.model_fields["name"].default for kind in TokenSpec.__subclasses__()}
CHOICES = ["balance", "baseline", "strategy", "combine", "generations", "confidence_floor"]


def lessons() -> Iterator[tuple[Recipe, DistillSpec, Plan]]:
    for name in EXAMPLES:
        recipe = load_recipe(name)
        assert recipe.distill is not None
        yield recipe, recipe.distill, choose(recipe.distill)


def missing(names: set[str], plans: list[Plan]) -> set[str]:
    """Objectives in `names` that no plan has."""
    return names - {term.name for plan in plans for term in plan.objectives}


def test_every_objective_has_an_example() -> None:
    plans = [plan for _, _, plan in lessons()]

    assert len(plans) >= 20
    assert set(TERMS) > OF_TEXTS
    assert missing(set(TERMS) - OF_TEXTS, plans) == set()


def test_objectives_of_texts_are_run_elsewhere() -> None:
    tests = Path(__file__).with_name("test_text_objectives.py").read_text(encoding="utf-8")

    assert OF_TEXTS
    assert all(f'"objectives": [{{"name": "{name}"}}' in tests for name in OF_TEXTS)


def test_an_objective_without_an_example_would_be_found() -> None:
    asked = {*TERMS, "next"} - OF_TEXTS

    assert missing(asked, [plan for _, _, plan in lessons()]) == {"next"}


def test_every_target_has_an_example() -> None:
    assert {plan.target for _, _, plan in lessons()} == set(get_args(Target))


@pytest.mark.parametrize("option", CHOICES)
def test_every_choice_of_distillation_has_an_example(option: str) -> None:
    default = DistillSpec.model_fields[option].default

    assert any(getattr(spec, option) != default for _, spec, _ in lessons())


def test_every_modifier_of_an_objective_has_an_example() -> None:
    terms = [term for _, _, plan in lessons() for term in plan.objectives]
    soft = [term for term in terms if hasattr(term, "temperature")]

    assert any(term.standardize for term in soft)
    assert any(term.temperature == "curriculum" for term in soft)
    assert any(term.warmup_epochs for term in terms)
    assert any(term.fade != "none" for term in terms)
    assert any(spec.augment.mixup for _, spec, _ in lessons())
    assert any(recipe.data.unlabelled is not None for recipe, _, _ in lessons())


@pytest.mark.parametrize("name", EXAMPLES)
def test_every_example_says_in_two_to_four_lines_what_it_is(name: str) -> None:
    lines = (SHIPPED / f"{name}.yaml").read_text(encoding="utf-8").splitlines()
    comment = [line for line in lines if line.startswith("# ")]

    assert lines[: len(comment)] == comment
    assert 2 <= len(comment) <= 4
    assert all(len(line) <= 100 for line in lines)


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("examples")


def shortened(name: str) -> Recipe:
    """The example with two epochs for everybody."""
    wish = load_recipe(name)
    assert isinstance(wish.data, DataSpec)
    several = isinstance(wish.teacher, tuple)
    keys = [
        f"teacher.{index}.train.epochs" if several else "teacher.train.epochs"
        for index, teacher in enumerate(wish.teachers)
        if teacher.train is not None
    ]
    return load_recipe(name, overrides=[*SHORT, *(f"{key}=2" for key in keys)])


def expected_terms(plan: Plan) -> set[str]:
    """What is logged: a target that learns too has terms of its own."""
    names = {term.name for term in plan.objectives}
    more: dict[str, set[str]] = {
        "exits": {f"exit1.{name}" for name in names},
        "peers": names | {f"peer1.{name}" for name in names},
        "joint": names | {"teacher.hard"},
    }
    if plan.target == "exits":  # the network itself has nobody above it
        return {"hard"} | more["exits"]
    return more.get(plan.target, names)


@pytest.mark.parametrize("name", EXAMPLES)
def test_an_example_runs_and_learns_from_what_it_names(name: str, out: Path) -> None:
    recipe = shortened(name)
    assert recipe.distill is not None

    report = flow.run(recipe, out)

    assert report is not None
    (student,) = [stage for stage in report.stages if stage.name == "student"]
    history = student.measurements["training"]["history"]
    assert [set(entry["terms"]) for entry in history] == 2 * [
        expected_terms(choose(recipe.distill))
    ]
    assert report.verdict is not None
    assert report.verdict.outcome == "pass"
    published = {"model.onnx", "report.json", "report.md", "recipe.yaml", "student.safetensors"}
    assert published <= {path.name for path in out.iterdir()}
