"""`compress verify MODEL.onnx --reference …` as a command: references of every kind, exit codes."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from edgestill.pipeline.cli import entry
from onnx import numpy_helper
from PIL import Image
from sklearn.datasets import load_digits

Command = Callable[..., tuple[int, str, str]]

RECIPE = """\
data:
  train: {{path: digits}}
  test: {{fraction: 0.4}}
  preprocess: {{channels: gray, max_value: 16, mean: [{mean}], std: [{std}]}}
student: {{model: {student}, args: {{width: 2}}, weights: {weights}}}
"""


@pytest.fixture
def verify(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Command:
    """`verify(*arguments)` in this process: exit code, standard output, standard error."""
    monkeypatch.setattr("edgestill.pipeline.cli.signal.signal", lambda *_: None)

    def call(*arguments: object) -> tuple[int, str, str]:
        code = entry(["verify", *map(str, arguments)])
        said = capsys.readouterr()
        return code, said.out, said.err

    return call


@pytest.fixture
def model(small_run: Path, tmp_path: Path) -> Path:
    """A copy of the run's int8 model."""
    return Path(shutil.copy(small_run / "model.onnx", tmp_path / "model.onnx"))


def test_a_run_is_a_reference_from_torch_down(
    verify: Command, small_run: Path, model: Path
) -> None:
    arguments = ("--reference", small_run, "--data", "digits", "--max-drop", 5)
    code, out, err = verify(model, *arguments, "--json")

    assert code == 0, out + err
    record = json.loads(out)
    names = [one["rung"] for one in record["rungs"]]
    assert names[:4] == ["signature", "preprocessing", "classes", "torch float32"]
    assert {"int8 accuracy", "saturation", "task", "labels"} <= set(names)
    assert record["exit_code"] == 0
    assert record["task"]["n"] == 1797


def test_labels_that_changed_since_the_run_are_stale(
    verify: Command, small_run: Path, model: Path, tmp_path: Path
) -> None:
    digits = load_digits()
    for index, (pixels, label) in enumerate(zip(digits.images, digits.target, strict=True)):
        wrong = (label + 1) % 10 if index % 10 == 0 else label
        folder = tmp_path / "images" / str(wrong)
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{index}.png")

    code, out, _ = verify(model, "--reference", small_run, "--data", tmp_path / "images")

    assert code == 1
    assert "FAIL  labels" in out
    assert "samples had another label in the run" in out


def scaled(source: Path, target: Path, *, ending: str, by: float) -> Path:
    """A copy of an ONNX file with one initializer multiplied."""
    model = onnx.load(source)
    tensor = next(one for one in model.graph.initializer if one.name.endswith(ending))
    values = numpy_helper.to_array(tensor) * np.float32(by)
    tensor.CopyFrom(numpy_helper.from_array(values, tensor.name))
    onnx.save(model, target)
    return target


def test_the_network_a_recipe_names_is_exported_and_is_a_reference(
    verify: Command, small_run: Path, tmp_path: Path
) -> None:
    about = json.loads((small_run / "student.json").read_text())
    mean, std = about["preprocess"]["mean"][0], about["preprocess"]["std"][0]
    weights, recipe = small_run / "student.safetensors", tmp_path / "recipe.yaml"
    recipe.write_text(
        RECIPE.format(mean=mean, std=std, student=about["reference"], weights=weights)
    )
    broken = scaled(
        small_run / "model.fp32.onnx", tmp_path / "broken.onnx", ending="fc.weight", by=1.5
    )

    code, out, err = verify(broken, "--reference", recipe, "--data", "digits")

    assert code == 1, err
    assert "PASS  torch float32 ↔ torch float64" in out
    assert "PASS  exported, optimizations on" in out
    assert "the difference enters at: final float" in out
    assert "first tensor that leaves tolerance: fc (Gemm " in out
    assert "fc.weight: all of its channels × 1.5" in out


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--reference", "{run}"), "give --data TEST"),
        (("--reference", "nowhere", "--data", "digits"), "expected a reference that exists"),
        (("--reference", "{run}", "--data", "nowhere"), "no such file or folder"),
        (("--reference", "{run}", "--data", "digits", "--targets", "mips"), "expected some of arm"),
        (("--json",), "give --reference"),
        (("--write-golden", "g"), "give --data TEST"),
        (("--reference", "{run}/recipe.yaml", "--data", "digits"), "names no trained network"),
    ],
)
def test_what_the_command_line_lacks_is_said(
    verify: Command, small_run: Path, model: Path, options: tuple[str, ...], said: str
) -> None:
    code, _, err = verify(model, *(one.format(run=small_run) for one in options))

    assert code == 2
    assert said in err


def test_golden_answers_are_written_where_all_holds_and_nowhere_else(
    verify: Command, small_run: Path, model: Path, tmp_path: Path
) -> None:
    arguments = ("--reference", small_run / "model.fp32.onnx", "--data", "digits")
    good, bad = tmp_path / "good", tmp_path / "bad"
    broken = scaled(model, tmp_path / "broken.onnx", ending="weight_scale", by=3)

    held, *_ = verify(model, *arguments, "--max-drop", 5, "--write-golden", good)
    failed, *_ = verify(broken, *arguments, "--write-golden", bad)
    replayed, out, _ = verify(model, "--reference", good)

    assert (held, failed, replayed) == (0, 1, 0)
    assert (good / "golden.json").is_file()
    assert not bad.exists()
    assert "bit-equal" in out
