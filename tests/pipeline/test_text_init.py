"""`compress init` for texts: a recipe that loads, and what it says of the data and the encoder."""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType

import pytest
from edgestill.pipeline.cli import entry
from edgestill.pipeline.recipe_file import load_recipe

pytest.importorskip("transformers")


@pytest.fixture
def place(tmp_path: Path, texts: ModuleType, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two sets, a headless encoder; the working directory."""
    rows = texts.sentences(120, seed=1)
    texts.write_csv(tmp_path / "train.csv", rows[:80])
    texts.write_csv(tmp_path / "test.csv", rows[80:])
    texts.write_folder(tmp_path / "encoder")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def init(*arguments: str) -> int:
    return entry(["init", "--model", "hf:encoder", "--data", "train.csv", *arguments])


def claim(folder: Path, **changes: object) -> None:
    """Change what the folder says of itself."""
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_a_headless_encoder_teaches_half_of_its_layers(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    claim(place / "encoder", architectures=["BertModel"])

    assert init() == 0

    recipe = load_recipe("recipe.yaml")
    (teacher,) = recipe.teachers
    assert teacher.head == "new"
    assert recipe.student.keep_layers is not None
    assert recipe.student.keep_layers[-1] == 2  # of three
    assert recipe.is_text
    said = capsys.readouterr().out
    assert "80 texts in 2 classes (bad, good;" in said
    assert "max_length" in said


def test_an_encoder_that_classifies_goes_on_as_it_is(place: Path) -> None:
    names = {"0": "good", "1": "bad"}
    claim(place / "encoder", architectures=["BertForSequenceClassification"], id2label=names)

    assert init("--test", "test.csv", "-o", "sub.yaml") == 0

    recipe = load_recipe("sub.yaml")
    assert recipe.teachers == ()
    assert recipe.student.is_trained
    assert recipe.data.labels is None


def test_classes_without_names_are_asked_for(place: Path) -> None:
    claim(
        place / "encoder", architectures=["BertForSequenceClassification"], id2label={},
        num_labels=2,
    )  # fmt: skip

    assert init() == 0

    assert load_recipe("recipe.yaml").data.labels == ("bad", "good")
    assert "check it" in Path("recipe.yaml").read_text()


def test_a_network_that_reads_no_texts_is_named(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert entry(["init", "--model", "resnet20", "--data", str(place / "train.csv")]) == 2
    assert "hf:DIR" in capsys.readouterr().err
    assert init("--size", "32") == 2
    assert "--size are of images" in capsys.readouterr().err
