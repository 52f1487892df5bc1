"""Hugging Face folders: read as people have them, joined by name, refused with advice."""

from __future__ import annotations

import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from edgestill.models.hf import load
from edgestill.models.hf_folder import HfFolder, find_folder
from edgestill.models.source import Network, open_network
from edgestill.pipeline import flow
from edgestill.pipeline.data.preprocess import canvas_size, to_canvas, to_input
from edgestill.pipeline.errors import ModelError, RecipeError, WeightsError
from edgestill.pipeline.recipe import PreprocessSpec, Recipe
from edgestill.pipeline.recipe_file import load_recipe
from edgestill.pipeline.work import without_paths
from PIL import Image

DIGITS = tuple("0123456789")
NAMES = ("cat", "dog", "eel", "fox")
SHAPE = (3, 8, 8)
AUTO = transformers.AutoModelForImageClassification
SMALL = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
         "intermediate_size": 32, "image_size": 8, "patch_size": 4}  # fmt: skip
SHORT = {"epochs": 5, "optimizer": "adamw", "lr": 0.01, "batch_size": 64}


def vit(**options: Any) -> transformers.ViTConfig:
    return transformers.ViTConfig(**(SMALL | options))


def named(names: tuple[str, ...] = NAMES) -> dict[str, Any]:
    return {"id2label": dict(enumerate(names)), "label2id": {n: i for i, n in enumerate(names)}}


def saved(folder: Path, config: Any) -> HfFolder:
    """A folder with weights."""
    torch.manual_seed(0)
    config.architectures = config.architectures or []
    AUTO.from_config(config).save_pretrained(folder)
    return found(folder)


def found(folder: Path) -> HfFolder:
    result = find_folder(f"hf:{folder}")
    assert result is not None
    return result


def opened(folder: HfFolder, *, classes: int = 4, shape: tuple[int, int, int] = SHAPE,
           **args: Any) -> Network:  # fmt: skip
    return open_network(f"hf:{folder.path}", args=args, classes=classes, input_shape=shape, seed=1)


def own_logits(folder: HfFolder, inputs: torch.Tensor) -> torch.Tensor:
    """What transformers answers by itself."""
    with torch.no_grad():
        logits: torch.Tensor = AUTO.from_pretrained(folder.path).eval()(pixel_values=inputs).logits
    return logits


@pytest.fixture
def inputs() -> torch.Tensor:
    return torch.randn(5, *SHAPE, generator=torch.Generator().manual_seed(3))


# networks and their weights


@pytest.mark.parametrize(
    "config",
    [
        vit(**named()),
        transformers.ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], **named()),
        transformers.ConvNextConfig(
            patch_size=1, hidden_sizes=[8, 8, 8, 8], depths=[1] * 4, **named()
        ),
        transformers.MobileNetV2Config(depth_multiplier=0.35, image_size=8, **named()),
        transformers.DeiTConfig(**SMALL, **named()),
    ],
    ids=lambda config: config.model_type,
)
@pytest.mark.parametrize("names", [NAMES, ("fox", "cat", "eel", "dog")])
def test_a_folder_answers_as_it_does_in_transformers_joined_by_name(
    config: Any, names: tuple[str, ...], inputs: torch.Tensor, tmp_path: Path
) -> None:
    folder = saved(tmp_path, config)
    network = opened(folder)

    load(network.module, folder, head="keep", class_names=names, where="teacher")

    order = [NAMES.index(name) for name in names]
    with torch.no_grad():
        answers = network.module.eval()(inputs)
    torch.testing.assert_close(answers, own_logits(folder, inputs)[:, order])
    assert network.sources == (tmp_path / "config.json",)


def test_both_heads_of_a_distilled_deit_are_reordered(inputs: torch.Tensor, tmp_path: Path) -> None:
    config = transformers.DeiTConfig(**SMALL, **named())
    torch.manual_seed(0)
    transformers.DeiTForImageClassificationWithTeacher(config).save_pretrained(tmp_path)
    folder = found(tmp_path)
    network = opened(folder)
    state = set(network.module.state_dict())
    if not any("distillation" in name for name in state):
        pytest.skip("this transformers opens it with one head")
    load(network.module, folder, head="keep", class_names=NAMES[::-1], where="teacher")
    with torch.no_grad():
        answers = network.module.eval()(inputs)
    torch.testing.assert_close(answers, own_logits(folder, inputs).flip(1))


def test_names_are_joined_whatever_their_case(tmp_path: Path) -> None:
    folder = saved(tmp_path, vit(**named(("Cat", "DOG", "eel", "Fox"))))

    load(opened(folder).module, folder, head="keep", class_names=NAMES, where="teacher")


def test_other_classes_are_an_error_that_lists_both(tmp_path: Path) -> None:
    folder = saved(tmp_path, vit(**named()))
    names = ("cat", "dog", "eel", "gnu")

    with pytest.raises(WeightsError, match=r"(?s)data: .*gnu.*folder: .*fox.*`head: new`"):
        load(opened(folder).module, folder, head="keep", class_names=names, where="teacher")


def test_a_new_head_keeps_the_body(tmp_path: Path) -> None:
    folder = saved(tmp_path, vit(**named()))
    network = opened(folder, classes=3)
    fresh = network.module.state_dict()["network.classifier.weight"].clone()

    report = load(network.module, folder, head="new", class_names=("a", "b", "c"), where="student")

    after, before = network.module.state_dict(), AUTO.from_pretrained(tmp_path).state_dict()
    body = [name for name in before if not name.startswith("classifier")]
    assert len(body) > 10
    assert all(torch.equal(after[f"network.{name}"], before[name]) for name in body)
    assert torch.equal(after["network.classifier.weight"], fresh)
    assert report.fresh == ("network.classifier.weight", "network.classifier.bias")


def test_a_headless_encoder_gets_a_head_only_where_it_is_asked_for(tmp_path: Path) -> None:
    torch.manual_seed(0)
    encoder = transformers.ViTModel(vit(), add_pooling_layer=False)
    encoder.save_pretrained(tmp_path)
    folder = found(tmp_path)

    network = opened(folder)
    load(network.module, folder, head="new", class_names=NAMES, where="teacher")

    before, after = encoder.state_dict(), network.module.state_dict()
    assert all(torch.equal(after[f"network.vit.{n}"], t) for n, t in before.items())
    two = NAMES[:2]  # the folder's configuration has transformers' default of two
    with pytest.raises(WeightsError, match=r"classifier.*no classifier of its own: set `head: new"):
        load(
            opened(folder, classes=2).module, folder, head="keep", class_names=two, where="teacher"
        )


def test_torch_files_and_shards_are_read(inputs: torch.Tensor, tmp_path: Path) -> None:
    torch.manual_seed(0)
    whole = AUTO.from_config(vit(**named()))
    whole.save_pretrained(tmp_path / "shards", max_shard_size="10KB")
    folder = found(tmp_path / "shards")
    assert len(folder.weights) > 1
    torch_folder = tmp_path / "torch"
    torch_folder.mkdir()
    shutil.copy(tmp_path / "shards/config.json", torch_folder)
    torch.save(whole.state_dict(), torch_folder / "pytorch_model.bin")

    for one in (folder, found(torch_folder)):
        network = opened(one)
        load(network.module, one, head="keep", class_names=NAMES, where="teacher")
        with torch.no_grad():
            torch.testing.assert_close(
                network.module.eval()(inputs), whole.eval()(pixel_values=inputs).logits
            )


def test_half_precision_weights_become_float32(tmp_path: Path) -> None:
    AUTO.from_config(vit(**named())).half().save_pretrained(tmp_path)
    folder = found(tmp_path)
    network = opened(folder)
    load(network.module, folder, head="keep", class_names=NAMES, where="teacher")
    assert {p.dtype for p in network.module.parameters()} == {torch.float32}


def test_options_of_the_configuration_are_arguments(tmp_path: Path) -> None:
    vit(**named()).save_pretrained(tmp_path)
    network = opened(found(tmp_path), hidden_dropout_prob=0.25)
    dropouts = [m.p for m in network.module.modules() if isinstance(m, torch.nn.Dropout)]
    assert 0.25 in dropouts
    with pytest.raises(ModelError, match=r"no option 'hidden_dropout'; near: hidden_dropout_prob"):
        opened(found(tmp_path), hidden_dropout=0.25)


def test_opening_leaves_the_generators_as_they_were(tmp_path: Path) -> None:
    folder = saved(tmp_path, vit(**named()))
    torch.manual_seed(5)
    before = torch.get_rng_state()
    network = opened(folder)
    load(network.module, folder, head="new", class_names=NAMES, where="teacher")
    assert torch.equal(torch.get_rng_state(), before)
    again = opened(folder).module.state_dict()
    assert all(torch.equal(t, again[n]) for n, t in opened(folder).module.state_dict().items())


# refused


def damaged(folder: Path, what: str) -> None:
    """A ViT folder with one thing wrong."""
    saved(folder, vit(**named()))
    config = folder / "config.json"
    content = json.loads(config.read_text())
    changes: dict[str, dict[str, Any]] = {
        "text": {"model_type": "bert", "architectures": ["BertForSequenceClassification"]},
        "multi-label": {"problem_type": "multi_label_classification"},
        "regression": {"problem_type": "regression"},
        "remote": {"model_type": "mine", "auto_map": {"AutoConfig": "code.Config"}},
    }
    if what in changes:
        config.write_text(json.dumps(content | changes[what]))
    elif what == "json":
        config.write_text("{")
    elif what == "list":
        config.write_text("[]")
    elif what == "no config":
        config.unlink()
    elif what == "cut":
        whole = (folder / "model.safetensors").read_bytes()
        (folder / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    elif what == "no weights":
        (folder / "model.safetensors").unlink()
    else:
        raise AssertionError(what)


def used(path: Path) -> None:
    folder = found(path)
    load(opened(folder).module, folder, head="keep", class_names=NAMES, where="teacher")


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("text", r"no image classifier can be built of its bert model"),
        ("multi-label", r"multi_label_classification \(several classes an image\)"),
        ("regression", r"regression \(a number an image\)"),
        ("remote", r"remote code is not run"),
        ("json", r"config.json: cannot be read as JSON"),
        ("list", r"expected a JSON object, got list"),
        ("no config", r"holds no config.json"),
        ("cut", r"its weights cannot be read"),
    ],
)
def test_what_cannot_be_used_is_named(what: str, message: str, tmp_path: Path) -> None:
    damaged(tmp_path, what)

    with pytest.raises((ModelError, WeightsError), match=message):
        used(tmp_path)


def test_pickled_code_is_not_run(tmp_path: Path) -> None:
    class Bomb:
        def __reduce__(self) -> Any:
            return os.mkdir, (str(tmp_path / "made"),)

    vit(**named()).save_pretrained(tmp_path)
    torch.save({"classifier.weight": Bomb()}, tmp_path / "pytorch_model.bin")
    folder = found(tmp_path)

    with pytest.raises(WeightsError, match="which is not run"):
        load(opened(folder).module, folder, head="keep", class_names=NAMES, where="teacher")
    assert not (tmp_path / "made").exists()


@pytest.mark.parametrize("shape", [(3, 12, 12), (1, 8, 8)])
def test_images_that_do_not_fit_are_said_with_both_sizes(
    shape: tuple[int, int, int], tmp_path: Path
) -> None:
    folder = saved(tmp_path, vit(**named()))
    with pytest.raises(ModelError, match=r"cannot take an input .*data.preprocess"):
        opened(folder, shape=shape)


def test_no_such_folder(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"no such folder.*nothing is downloaded"):
        find_folder(f"hf:{tmp_path}/google/vit")


def test_without_transformers_the_extra_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    vit(**named()).save_pretrained(tmp_path)
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ModelError, match=r"pip install 'edgestill\[hf\]'"):
        opened(found(tmp_path))


# preprocessing

PROCESSORS = [
    ("ViT", {}),
    ("ViT", {"size": {"height": 24, "width": 32}, "do_normalize": False}),
    ("ConvNext", {"size": {"shortest_edge": 28}}),
    ("ConvNext", {"size": {"shortest_edge": 384}}),
    ("DeiT", {"size": {"height": 40, "width": 40}, "crop_size": {"height": 32, "width": 32}}),
    ("MobileNetV2", {"size": {"shortest_edge": 36}, "crop_size": {"height": 32, "width": 32}}),
    ("MobileViT", {"size": {"shortest_edge": 36}, "crop_size": {"height": 32, "width": 32}}),
    ("Levit", {"size": {"shortest_edge": 28}, "crop_size": {"height": 28, "width": 28}}),
    ("CLIP", {"size": {"shortest_edge": 36}, "crop_size": {"height": 32, "width": 32}}),
    ("Siglip", {"size": {"height": 24, "width": 24}}),
    ("MobileNetV1", {"size": {"shortest_edge": 36}, "crop_size": {"height": 32, "width": 32}}),
    ("Bit", {"size": {"shortest_edge": 32}, "crop_size": {"height": 30, "width": 30}}),
]


@pytest.mark.parametrize(("kind", "options"), PROCESSORS)
@pytest.mark.parametrize("size", [(60, 80), (75, 50)])
def test_preprocessing_is_what_transformers_does(
    kind: str, options: dict[str, Any], size: tuple[int, int], tmp_path: Path
) -> None:
    processor = getattr(transformers, f"{kind}ImageProcessorPil")(**options)
    vit().save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    pixels = np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8)
    image = Image.fromarray(pixels).resize(size[::-1])

    said = found(tmp_path).preprocess()

    spec = PreprocessSpec.model_validate(said)
    ours = to_input(to_canvas(image, spec, canvas_size(spec, None))[None], spec)
    theirs = processor(image, return_tensors="np")["pixel_values"]
    assert ours.shape == theirs.shape
    np.testing.assert_allclose(ours, theirs, atol=2e-6)


def test_older_files_are_read_too(tmp_path: Path) -> None:
    vit().save_pretrained(tmp_path)
    old = {"do_normalize": True, "do_resize": True, "feature_extractor_type": "ViTFeatureExtractor",
           "image_mean": [0.5] * 3, "image_std": [0.5] * 3, "resample": 2, "size": 224}  # fmt: skip
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(old))
    assert found(tmp_path).preprocess() == {
        "antialias": True, "resize": [224, 224], "interpolation": "bilinear", "max_value": 255.0,
        "mean": [0.5] * 3, "std": [0.5] * 3,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"image_processor_type": "EfficientNetImageProcessor"}, "processor EfficientNet"),
        ({}, "of no name"),
        ({"image_processor_type": "ViTImageProcessor", "size": 8, "resample": 1}, "filter 1"),
        ({"image_processor_type": "ViTImageProcessor"}, "resize without a size"),
        ({"image_processor_type": "ViTImageProcessor", "size": {"longest_edge": 9}}, "size"),
        ({"image_processor_type": "ViTImageProcessor", "size": 8}, "without image_mean"),
    ],
)
def test_preprocessing_that_is_not_known_is_not_guessed(
    content: dict[str, Any], message: str, tmp_path: Path
) -> None:
    vit().save_pretrained(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(content))
    with pytest.raises(ModelError, match=rf"{message}.*write `data.preprocess`"):
        found(tmp_path).preprocess()


# in a recipe

PROCESSOR = {"image_processor_type": "ViTImageProcessor", "do_resize": False,
             "image_mean": [0.3], "image_std": [0.37]}  # fmt: skip


def digits_folder(folder: Path, *, names: tuple[str, ...] = DIGITS, trained: bool) -> Path:
    config = transformers.ResNetConfig(
        num_channels=1, embedding_size=16, hidden_sizes=[16, 32], depths=[1, 1],
        layer_type="basic", **named(names),
    )  # fmt: skip
    if trained:
        saved(folder, config)
        (folder / "preprocessor_config.json").write_text(json.dumps(PROCESSOR))
    else:
        config.save_pretrained(folder)
    return folder


def recipe_text(**sections: Any) -> str:
    usual: dict[str, Any] = {
        "data": {"train": {"path": "digits"}, "test": {"fraction": 0.4}, "calibration": 64},
        "profile": None,
        "gate": {"max_drop_points": 95},
        "compute": {"threads": 1},
    }
    return json.dumps(usual | sections)  # JSON is YAML


def loaded(folder: Path, **sections: Any) -> Recipe:
    path = folder / "recipe.yaml"
    path.write_text(recipe_text(**sections))
    return load_recipe(str(path))


def test_a_trained_folder_goes_straight_to_int8_and_the_gate(tmp_path: Path) -> None:
    digits_folder(tmp_path / "net", trained=True)
    recipe = loaded(tmp_path, student={"model": "hf:net"}, quantize={})
    assert recipe.student.is_trained
    assert recipe.data.preprocess is not None
    assert recipe.data.preprocess.channels == "gray"

    report = flow.run(recipe, tmp_path / "out")

    assert report is not None
    assert {stage.name for stage in report.stages} >= {"data", "student", "export", "int8"}
    assert report.verdict is not None
    assert report.verdict.outcome == "pass"
    torch_row = next(m for m in report.models if m.role == "student")
    assert torch_row.accuracy == pytest.approx(0.1, abs=0.12)  # its weights are random
    assert (tmp_path / "out/model.onnx").exists()


def test_a_folder_without_weights_is_trained_and_another_teaches_a_zoo_net(tmp_path: Path) -> None:
    digits_folder(tmp_path / "teacher", names=DIGITS[::-1], trained=True)
    digits_folder(tmp_path / "student", trained=False)
    recipe = loaded(
        tmp_path,
        teacher={"model": "hf:teacher", "train": SHORT},
        student={"model": "hf:student"},
        distill=SHORT | {"views": 1},
    )
    assert recipe.teachers[0].is_trained
    assert not recipe.student.is_trained

    report = flow.run(recipe, tmp_path / "out")

    assert report is not None
    rows = {model.role: model for model in report.models}
    assert rows["teacher"].accuracy > 0.5


def test_unnamed_classes_ask_for_data_labels(tmp_path: Path) -> None:
    names = tuple(f"LABEL_{number}" for number in range(10))
    digits_folder(tmp_path / "net", names=names, trained=True)
    with pytest.raises(
        RecipeError, match=r"data\.labels: the hf: folder calls its classes LABEL_0"
    ):
        loaded(tmp_path, student={"model": "hf:net"})
    data = {"train": {"path": "digits"}, "test": {"fraction": 0.4}, "labels": list(DIGITS)}
    assert loaded(tmp_path, student={"model": "hf:net"}, data=data).student.is_trained


def test_folders_that_disagree_on_preprocessing_are_an_error(tmp_path: Path) -> None:
    for name in ("a", "b"):
        digits_folder(tmp_path / name, trained=True)
    other = PROCESSOR | {"image_mean": [0.5]}
    (tmp_path / "b/preprocessor_config.json").write_text(json.dumps(other))
    sections: dict[str, Any] = {
        "teacher": {"model": "hf:a"}, "student": {"model": "hf:b"}, "distill": SHORT
    }  # fmt: skip
    with pytest.raises(RecipeError, match=r"have different preprocessing"):
        loaded(tmp_path, **sections)
    written = {"train": {"path": "digits"}, "test": {"fraction": 0.4},
               "preprocess": {"channels": "gray", "mean": [0.1], "std": [0.2]}}  # fmt: skip
    given = loaded(tmp_path, **sections, data=written).data.preprocess
    assert given is not None
    assert given.mean == (0.1,)


def test_a_folder_without_weights_says_its_preprocessing_unless_trained_ones_do(
    tmp_path: Path,
) -> None:
    digits_folder(tmp_path / "trained", trained=True)
    digits_folder(tmp_path / "bare", trained=False)
    other = PROCESSOR | {"image_mean": [0.5]}
    (tmp_path / "bare/preprocessor_config.json").write_text(json.dumps(other))
    train = {"train": {"epochs": 1}}

    alone = loaded(tmp_path, student={"model": "hf:bare"} | train).data.preprocess
    taught = loaded(
        tmp_path, teacher={"model": "hf:trained"}, student={"model": "hf:bare"}, distill=SHORT
    ).data.preprocess

    assert alone is not None
    assert alone.mean == (0.5,)
    assert taught is not None
    assert taught.mean == (0.3,)


@pytest.mark.parametrize(
    ("student", "message"),
    [
        ({"model": "hf:net", "weights": "w.pth"}, "weights: an hf: folder holds its own weights"),
        ({"model": "hf:net", "head": "new"}, "head: a new classifier must be trained"),
        ({"model": "hf:plain", "head": "new", "train": SHORT}, "none are given"),
        ({"model": "hf:plain"}, "nothing would be learnt"),
    ],
)
def test_sections_that_do_not_fit_together(
    student: dict[str, Any], message: str, tmp_path: Path
) -> None:
    digits_folder(tmp_path / "net", trained=True)
    digits_folder(tmp_path / "plain", trained=False)
    with pytest.raises(RecipeError, match=message):
        loaded(tmp_path, student=student)


def test_where_a_folder_lies_is_no_part_of_what_a_stage_reads() -> None:
    assert without_paths({"model": "hf:/a/b/net"}) == without_paths({"model": "hf:/c/net"})
    assert without_paths({"model": "hf:/a/net"}) != without_paths({"model": "hf:/a/ten"})
    assert without_paths("resnet20") == "resnet20"


def test_init_takes_preprocessing_from_the_folder(compress: Any, tmp_path: Path) -> None:
    digits_folder(tmp_path / "net", trained=True)

    done = compress(
        "init", "--model", "hf:net", "--data", "digits", "-o", "recipe.yaml", cwd=tmp_path
    )

    assert done.returncode == 0, done.stderr
    text = (tmp_path / "recipe.yaml").read_text()
    assert "model: hf:net" in text
    assert "mean: [0.3]" in text
    assert "train:" not in text.partition("student:")[2]
    assert load_recipe(str(tmp_path / "recipe.yaml")).student.model == f"hf:{tmp_path}/net"
