"""A recipe for texts: what it means where it is silent, and what it may not say."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from edgestill.pipeline.errors import ModelError, RecipeError
from edgestill.pipeline.recipe_file import load_recipe

TEXT = """\
task: text-classification
data:
  train: {path: train.csv}
  test: {path: test.csv}
teacher: {model: "hf:teacher", head: new, train: {}}
student: {model: "hf:teacher", head: new, keep_layers: [0, 2]}
quantize: {}
"""


@pytest.fixture
def recipe(tmp_path: Path) -> Any:
    (tmp_path / "teacher").mkdir()
    (tmp_path / "teacher" / "config.json").write_text('{"model_type": "bert"}')
    (tmp_path / "teacher" / "model.safetensors").write_bytes(b"")
    (tmp_path / "recipe.yaml").write_text(TEXT)

    def load(*overrides: str) -> Any:
        return load_recipe(str(tmp_path / "recipe.yaml"), overrides=overrides)

    return load


def test_texts_are_tokenized_as_the_teacher_does(recipe: Any, tmp_path: Path) -> None:
    assert recipe().data.tokenize.tokenizer == f"hf:{tmp_path / 'teacher'}"


def test_encoders_are_trained_as_the_literature_trains_them(recipe: Any) -> None:
    loaded = recipe()

    assert (loaded.teacher.train.optimizer, loaded.teacher.train.lr) == ("adamw", 5e-5)
    assert (loaded.distill.optimizer, loaded.distill.lr, loaded.distill.views) == ("adamw", 1e-4, 1)
    assert loaded.quantize.qat is None


def test_what_the_recipe_says_stands(recipe: Any) -> None:
    loaded = recipe("distill.lr=0.01", "teacher.train.optimizer=sgd")

    assert loaded.distill.lr == 0.01
    assert loaded.teacher.train.optimizer == "sgd"


def test_fixed_sequence_pads_every_text_to_the_maximum(recipe: Any) -> None:
    assert recipe("export.sequence=fixed").data.tokenize.pad == "max_length"


def test_network_without_some_of_its_layers_is_not_trained(recipe: Any) -> None:
    loaded = recipe()

    assert not loaded.student.is_trained
    assert loaded.student.weight_files


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("data.preprocess={resize: 32}", "data.preprocess"),
        ("distill.augment={flip: true}", "augment"),
        ("distill.views=4", "distill.views"),
        ("distill.objectives=[{name: hint}, {name: hard}]", "hint"),
        ("distill.target=exits", "exits"),
        ("quantize.mode=qat", "quantize.mode"),
        ("student.model=net.onnx", "hf: folder"),
        ("data.tokenize.pad=max_length", "export.sequence"),
        ("task=image-classification", "text encoders"),
    ],
)
def test_what_texts_cannot_have_is_said_with_its_key(recipe: Any, override: str, said: str) -> None:
    with pytest.raises(RecipeError, match=said):
        recipe(override)


def test_folder_in_a_python_package_is_found_without_importing_it(recipe: Any) -> None:
    with pytest.raises(ModelError, match="numpy/no_such_folder: no such folder"):
        recipe("teacher.model=hf:package:numpy/no_such_folder")


def test_package_that_is_not_installed_is_named_with_the_way_to_install_it(recipe: Any) -> None:
    with pytest.raises(RecipeError, match="pip install no-such-package"):
        recipe("teacher.model=hf:package:no_such_package/model")
