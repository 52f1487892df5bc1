"""What was asked for and does not go on is said."""

from __future__ import annotations

from pathlib import Path

import pytest
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
