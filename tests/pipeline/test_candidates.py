"""What was asked for and does not go on is said."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from edgestill.pipeline import candidates, steps
from edgestill.pipeline.candidates import unmet_wishes
from edgestill.pipeline.recipe import Recipe
from edgestill.pipeline.record import Candidate
from edgestill.pipeline.stage import Artifact

RECIPE = {
    "data": {"train": {"path": "digits"}, "test": {"fraction": 0.4}},
    "student": {"model": "plain_cnn_small", "train": {"epochs": 1}},
}
WISHES = {"prune": {"macs": 0.5}, "quantize": {}}


def artifact(name: str) -> Artifact:
    return Artifact(name, Path(name), name, {}, (), recalled=False, seconds=0.0)


DENSE, PRUNED = artifact("student"), artifact("pruned-1")
FLOAT, INT8 = artifact("export"), artifact("int8")
LAST = Candidate("float", DENSE, FLOAT, FLOAT)


@pytest.mark.parametrize(
    ("chosen", "words"),
    [
        (Candidate("int8 pruned-1", PRUNED, FLOAT, INT8), []),
        (Candidate("float pruned-1", PRUNED, FLOAT, FLOAT), ["not int8"]),
        (Candidate("int8", DENSE, FLOAT, INT8), ["nothing pruned"]),
        (LAST, ["nothing pruned", "not int8"]),
    ],
)
def test_each_wish_that_is_not_met_has_its_warning(chosen: Candidate, words: list[str]) -> None:
    said = unmet_wishes(Recipe.model_validate(RECIPE | WISHES), chosen, dense=LAST)

    assert len(said) == len(words)
    assert all(word in text for word, text in zip(words, said, strict=True))


def test_what_was_not_asked_for_is_not_missed() -> None:
    assert unmet_wishes(Recipe.model_validate(RECIPE), LAST, dense=LAST) == []


def int8_of(
    drops: dict[str, float],
    monkeypatch: pytest.MonkeyPatch,
    *,
    is_text: bool = False,
    **spec: object,
) -> list[str]:
    """Names of the int8 candidates, where each stage's file loses this many points of 1,000 images.

    A stage that is not in `drops` has nothing to do.
    """
    recipe = Recipe.model_validate(RECIPE | {"quantize": spec})

    def stage(name: str):
        def run(*_: object, **__: object) -> Artifact | None:
            if name not in drops:
                return None
            lost = round(drops[name] * 10)
            return replace(
                artifact(name),
                measurements={"validation": {"n": 1000, "lost": lost, "gained": 0}},
            )

        return run

    for name in ("quantize", "quantize_dynamic", "quantize_equalized", "fall_back", "train_qat"):
        monkeypatch.setattr(steps, name, stage(name))
    if is_text:
        recipe = recipe.model_copy(update={"task": "text-classification"})
    made = candidates._int8(SimpleNamespace(recipe=recipe), artifact("data"), FLOAT, mark="")
    return [name for name, _ in made]


INT8_NAMES = ["int8", "int8 equalized", "int8 with float layers", "int8 by QAT"]
LOSSES = ["quantize", "quantize_equalized", "fall_back", "train_qat"]


@pytest.mark.parametrize("holds", range(4))
def test_the_next_remedy_is_tried_only_where_the_one_before_was_not_enough(
    holds: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    drops = {name: 0.1 if index == holds else 9.0 for index, name in enumerate(LOSSES)}

    assert int8_of(drops, monkeypatch) == INT8_NAMES[: holds + 1]


def test_a_graph_without_pairs_goes_on_to_float_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    drops = {"quantize": 9.0, "fall_back": 0.0}
    assert int8_of(drops, monkeypatch) == ["int8", "int8 with float layers"]


def test_remedies_that_are_switched_off_are_not_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    drops = dict.fromkeys(LOSSES, 9.0)
    assert int8_of(drops, monkeypatch, fallback=False) == ["int8", "int8 by QAT"]
    assert int8_of(drops, monkeypatch, qat=None) == INT8_NAMES[:3]
    assert int8_of(dict.fromkeys(LOSSES, 0.0), monkeypatch, mode="qat") == ["int8", "int8 by QAT"]


@pytest.mark.parametrize("holds", ["quantize", "quantize_dynamic"])
def test_texts_have_both_kinds_of_int8_and_one_that_holds_is_enough(
    holds: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    drops = {"quantize": 9.0, "quantize_dynamic": 9.0, "fall_back": 0.0} | {holds: 0.0}
    assert int8_of(drops, monkeypatch, is_text=True) == ["int8", "int8 dynamic"]


def test_texts_of_which_neither_holds_go_on_to_float_layers(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    drops = {"quantize": 9.0, "quantize_dynamic": 9.0, "fall_back": 0.0}
    made = int8_of(drops, monkeypatch, is_text=True, qat=None)
    assert made == ["int8", "int8 dynamic", "int8 with float layers"]
