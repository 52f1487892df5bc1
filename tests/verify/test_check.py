"""`verify_file`: a faithful file passes, and a file broken on purpose fails at the right rung."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from edgestill.exporters.graph import read_model
from edgestill.exporters.int8 import encoding_for, quantize
from edgestill.exporters.rewrites import normalise
from edgestill.exporters.stamp import stamp, write_model
from edgestill.exporters.to_onnx import export_onnx
from edgestill.pipeline.data.inputs import describe
from edgestill.pipeline.errors import (
    DataError,
    ExportError,
    MeasurementError,
    OutputError,
    UsageError,
)
from edgestill.pipeline.recipe import PreprocessSpec
from edgestill.pipeline.verify.check import Wish, verify_file
from edgestill.pipeline.verify.record import Verification, as_text
from edgestill.pipeline.verify.samples import Set
from onnx import helper, numpy_helper
from PIL import Image
from torch import nn

SIZE, CLASSES = 10, ("dots", "flat", "rows", "stripes")  # rows lie, stripes stand
HOW = PreprocessSpec(crop=(SIZE, SIZE), mean=(0.5, 0.45, 0.4), std=(0.25, 0.25, 0.25))


class Net(nn.Module):
    """Three convolutions, so that there is an inside."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, padding=1)
        self.second = nn.Conv2d(8, 12, 3, padding=1)
        self.third = nn.Conv2d(12, 16, 3, padding=1, stride=2)
        self.head = nn.Linear(16 * 25, len(CLASSES))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.first(x))
        x = torch.relu(self.second(x))
        return self.head(torch.relu(self.third(x)).flatten(1))


def pictures(count: int, *, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """uint8 (N, SIZE, SIZE, 3) and labels: noise with a pattern that a turn would change."""
    rng = np.random.default_rng(seed)
    labels = np.arange(count) % len(CLASSES)
    across = np.arange(SIZE) // 2 % 2 * 60
    patterns = {
        "dots": across[:, None] * across[None] / 60,
        "flat": np.full((SIZE, SIZE), 30),
        "rows": np.repeat(across[:, None], SIZE, 1),
        "stripes": np.repeat(across[None], SIZE, 0),
    }
    pixels = np.stack([patterns[CLASSES[label]] for label in labels])[..., None]
    noise = rng.integers(0, 110, (count, SIZE, SIZE, 3))
    return np.clip(60 + pixels + noise, 0, 255).astype(np.uint8), labels


def write_folder(root: Path, pixels: np.ndarray, labels: np.ndarray) -> Path:
    for index, (picture, label) in enumerate(zip(pixels, labels, strict=True)):
        folder = root / CLASSES[label]
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(picture).save(folder / f"{index:03}.png")
    return root


def inputs_of(pixels: np.ndarray) -> np.ndarray:
    scaled = (pixels.astype(np.float32) / 255 - np.float32(HOW.mean)) / np.float32(HOW.std)
    return np.ascontiguousarray(scaled.transpose(0, 3, 1, 2))


def trained() -> Net:
    torch.manual_seed(0)
    net, (pixels, labels) = Net(), pictures(256, seed=1)
    inputs, wanted = torch.from_numpy(inputs_of(pixels)), torch.from_numpy(labels)
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.01)
    for _ in range(25):
        optimizer.zero_grad()
        nn.functional.cross_entropy(net(inputs), wanted).backward()
        optimizer.step()
    return net.eval()


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """A trained net as float.onnx and int8.onnx, and a folder of test images."""
    folder = tmp_path_factory.mktemp("made")
    net, (pixels, labels) = trained(), pictures(96, seed=2)
    export_onnx(net, torch.zeros(2, 3, SIZE, SIZE), folder / "raw.onnx", batch="dynamic")
    graph = normalise(read_model(folder / "raw.onnx"))
    metadata = describe(CLASSES, HOW)
    write_model(stamp(graph, min_runtime="1.17", metadata=metadata), folder / "float.onnx")
    found = quantize(graph, inputs_of(pixels[:32]), encoding=encoding_for(("arm", "x86")),
                     calibrator="minmax", threads=1)  # fmt: skip
    int8 = stamp(found.model, min_runtime="1.17", metadata=metadata)
    write_model(int8, folder / "int8.onnx")
    return SimpleNamespace(
        net=net,
        floating=folder / "float.onnx",
        int8=folder / "int8.onnx",
        data=write_folder(folder / "test", pixels, labels),
        inputs=inputs_of(pixels),
    )


def check(made: SimpleNamespace, model: Path, **wish: Any) -> Verification:
    wanted = Wish(reference=made.floating, data=Set(made.data))
    return verify_file(model, replace(wanted, **wish))


def failed(found: Verification) -> list[str]:
    return [one.rung for one in found.failed]


def changed(source: Path, target: Path, change: Callable[[onnx.ModelProto], None]) -> Path:
    """A copy of an ONNX file with the graph changed in place."""
    model = onnx.load(source)
    change(model)
    onnx.save(model, target)
    return target


def weight(name: str, change: Callable[[np.ndarray], Any]) -> Callable[[onnx.ModelProto], None]:
    """Changes one initializer: a function that writes into the array, or returns another."""

    def apply(model: onnx.ModelProto) -> None:
        tensor = next(one for one in model.graph.initializer if one.name == name)
        value = numpy_helper.to_array(tensor).copy()
        result = change(value)
        value = value if result is None else result
        tensor.CopyFrom(numpy_helper.from_array(value, name))

    return apply


def conv(model: onnx.ModelProto, number: int) -> onnx.NodeProto:
    return [node for node in model.graph.node if node.op_type == "Conv"][number]


def metadata(name: str, old: str, new: str) -> Callable[[onnx.ModelProto], None]:
    def apply(model: onnx.ModelProto) -> None:
        entry = next(one for one in model.metadata_props if one.key == name)
        assert old in entry.value
        entry.value = entry.value.replace(old, new)

    return apply


@pytest.mark.parametrize("name", ["floating", "int8"])
def test_a_faithful_file_holds_on_every_rung(made: SimpleNamespace, name: str) -> None:
    found = check(made, getattr(made, name))

    assert failed(found) == []
    assert found.exit_code == 0
    assert found.divergence is None
    assert found.task is not None
    assert found.task.n == 96


def test_classes_in_another_order_are_named_before_any_number(
    made: SimpleNamespace, tmp_path: Path
) -> None:
    change = metadata("edgestill.class_names", '"dots", "flat"', '"flat", "dots"')
    found = check(made, changed(made.floating, tmp_path / "m.onnx", change))

    assert failed(found) == ["classes"]
    assert "output 0 is 'flat'" in found.failed[0].note


def test_outputs_in_another_order_are_recognised_by_what_they_answer(
    made: SimpleNamespace, tmp_path: Path
) -> None:
    def swap(values: np.ndarray) -> np.ndarray:
        return values[[2, 1, 0, 3]]

    def both(model: onnx.ModelProto) -> None:
        weight("head.weight", swap)(model)
        weight("head.bias", swap)(model)

    found = check(made, changed(made.floating, tmp_path / "m.onnx", both))

    assert {"final float", "classes", "task"} <= set(failed(found))
    (order,) = [one for one in found.failed if one.rung == "classes"]
    assert "output 2 gives what output 0 should" in order.note


def test_another_mean_in_the_metadata_is_named(made: SimpleNamespace, tmp_path: Path) -> None:
    change = metadata("edgestill.preprocess", '"mean": [0.5, ', '"mean": [0.1, ')
    found = check(made, changed(made.floating, tmp_path / "m.onnx", change))

    assert failed(found) == ["preprocessing"]
    assert "mean is [0.1, " in found.failed[0].note


def test_a_mean_subtracted_once_more_inside_enters_at_the_first_layer(
    made: SimpleNamespace, tmp_path: Path
) -> None:
    def subtract(model: onnx.ModelProto) -> None:
        model.graph.initializer.append(numpy_helper.from_array(np.float32([0.4]), "mean"))
        conv(model, 0).input[0] = "shifted"
        model.graph.node.insert(0, helper.make_node("Sub", ["input", "mean"], ["shifted"], "Sub"))

    found = check(made, changed(made.floating, tmp_path / "m.onnx", subtract))

    assert failed(found)[0] == "final float"
    assert found.divergence is not None
    assert found.divergence.layer == "first"
    assert "it has Sub Sub in addition" in found.divergence.differences


def test_a_file_of_another_layout_is_refused_by_its_signature(
    made: SimpleNamespace, tmp_path: Path
) -> None:
    def channels_last(model: onnx.ModelProto) -> None:
        (given,) = model.graph.input
        dims = given.type.tensor_type.shape.dim
        dims[1].dim_value, dims[3].dim_value = SIZE, 3
        conv(model, 0).input[0] = "turned"
        turn = helper.make_node("Transpose", ["input"], ["turned"], perm=[0, 3, 1, 2])
        model.graph.node.insert(0, turn)

    found = check(made, changed(made.floating, tmp_path / "m.onnx", channels_last))

    assert failed(found) == ["signature"]
    assert "NHWC, expected NCHW" in found.failed[0].note
    assert len(found.rungs) == 1


def test_height_and_width_exchanged_inside_are_caught(
    made: SimpleNamespace, tmp_path: Path
) -> None:
    def turn(model: onnx.ModelProto) -> None:
        conv(model, 0).input[0] = "turned"
        node = helper.make_node("Transpose", ["input"], ["turned"], perm=[0, 1, 3, 2], name="turn")
        model.graph.node.insert(0, node)

    found = check(made, changed(made.floating, tmp_path / "m.onnx", turn))

    assert {"final float", "task"} <= set(failed(found))
    assert found.divergence is not None
    assert found.divergence.layer == "first"
    assert "it has Transpose turn in addition" in found.divergence.differences


def test_a_layer_of_another_scale_is_named(made: SimpleNamespace, tmp_path: Path) -> None:
    change = weight("second.weight", lambda values: values * np.float32(1.5))
    found = check(made, changed(made.floating, tmp_path / "m.onnx", change))

    assert failed(found)[0] == "final float"
    assert found.divergence is not None
    assert (found.divergence.op, found.divergence.layer) == ("Conv", "second")
    assert found.divergence.deployed
    assert "second.weight: all of its channels × 1.5" in found.divergence.differences


def test_an_int8_layer_of_another_scale_is_named(made: SimpleNamespace, tmp_path: Path) -> None:
    change = weight("second.weight_scale", lambda values: values * np.float32(1.5))
    found = check(made, changed(made.int8, tmp_path / "m.onnx", change))

    assert {"int8 accuracy", "int8 layers"} <= set(failed(found))
    assert found.divergence is not None
    assert found.divergence.layer == "second"
    assert [one.layer for one in found.layers if one.suspect] == ["second"]


def test_a_zeroed_channel_is_named(made: SimpleNamespace, tmp_path: Path) -> None:
    def zero(values: np.ndarray) -> None:
        values[5] = 0

    found = check(made, changed(made.floating, tmp_path / "m.onnx", weight("third.weight", zero)))

    assert failed(found)[0] == "final float"
    assert found.divergence is not None
    assert found.divergence.layer == "third"
    assert "third.weight: channel 5 is zero" in found.divergence.differences


def test_a_zeroed_channel_of_int8_is_named(made: SimpleNamespace, tmp_path: Path) -> None:
    def zero(values: np.ndarray) -> None:
        values[5] = 0

    change = weight("third.weight_quantized", zero)
    found = check(made, changed(made.int8, tmp_path / "m.onnx", change))

    assert "int8 layers" in failed(found)
    assert [(one.layer, one.dead) for one in found.layers if one.dead] == [("third", (5,))]


def test_a_relu_that_is_gone_is_named(made: SimpleNamespace, tmp_path: Path) -> None:
    def drop(model: onnx.ModelProto) -> None:
        relu = [node for node in model.graph.node if node.op_type == "Relu"][1]
        conv(model, 2).input[0] = relu.input[0]
        model.graph.node.remove(relu)

    found = check(made, changed(made.floating, tmp_path / "m.onnx", drop))

    assert failed(found)[0] == "final float"
    assert found.divergence is not None
    assert found.divergence.layer == "third"
    assert any("it lacks Relu" in said for said in found.divergence.differences)


def test_other_padding_is_named(made: SimpleNamespace, tmp_path: Path) -> None:
    def pad(model: onnx.ModelProto) -> None:
        pads = next(one for one in conv(model, 1).attribute if one.name == "pads")
        pads.ints[:] = [2, 2, 0, 0]

    found = check(made, changed(made.floating, tmp_path / "m.onnx", pad))

    assert failed(found)[0] == "final float"
    assert found.divergence is not None
    assert found.divergence.layer == "second"
    said = "pads is [2, 2, 0, 0], in the reference [1, 1, 1, 1]"
    assert said in found.divergence.differences


def test_a_nan_weight_is_named(made: SimpleNamespace, tmp_path: Path) -> None:
    def poison(values: np.ndarray) -> None:
        values[3, 0, 0, 0] = np.nan

    change = weight("second.weight", poison)
    found = check(made, changed(made.floating, tmp_path / "m.onnx", change))

    assert failed(found)[0] == "final float"
    assert found.exit_code == 1
    assert found.divergence is not None
    assert found.divergence.layer == "second"
    assert any("second.weight holds NaN" in said for said in found.divergence.differences)


def test_labels_of_another_order_are_stale(made: SimpleNamespace, tmp_path: Path) -> None:
    for old, new in zip(CLASSES, (*CLASSES[1:], CLASSES[0]), strict=True):
        (tmp_path / "stale").mkdir(exist_ok=True)
        (tmp_path / "stale" / new).symlink_to(made.data / old)

    found = check(made, made.floating, data=Set(tmp_path / "stale"))

    assert failed(found) == ["labels"]
    assert "in another order" in found.failed[0].note


def test_labels_that_the_reference_only_guesses_are_stale(
    made: SimpleNamespace, tmp_path: Path
) -> None:
    pixels, labels = pictures(96, seed=4)
    drawn = np.random.default_rng(0).permutation(labels)
    data = write_folder(tmp_path / "drawn", pixels, drawn)

    found = check(made, made.floating, data=Set(data))

    assert failed(found) == ["labels"]
    assert "guessing on 25.0%" in found.failed[0].note


def test_weights_that_saturate_without_vnni_are_caught(
    made: SimpleNamespace, tmp_path: Path
) -> None:
    full = quantize(
        normalise(read_model(made.floating)), made.inputs[:32],
        encoding=encoding_for(("x86-vnni",)), calibrator="minmax", threads=1,
    )  # fmt: skip
    write_model(full.model, tmp_path / "full.onnx")

    everywhere = check(made, tmp_path / "full.onnx")
    elsewhere = check(made, tmp_path / "full.onnx", targets=("x86-vnni",))

    assert failed(everywhere) == ["saturation"]
    assert "node_conv2d_1 " in everywhere.failed[0].note
    assert failed(elsewhere) == []


def test_the_terminal_says_where_it_enters(made: SimpleNamespace, tmp_path: Path) -> None:
    change = weight("second.weight", lambda values: values * np.float32(1.5))
    text = as_text(check(made, changed(made.floating, tmp_path / "m.onnx", change)))

    assert "the difference enters at: final float" in text
    assert "first tensor that leaves tolerance: second (Conv " in text
    assert text.splitlines()[-1].startswith("FAIL: ")


def test_flips_within_the_noise_are_benign_and_others_are_listed() -> None:
    from edgestill.pipeline.verify.task import task_parity

    reference = np.zeros((40, 2), np.float32)
    reference[:, 0] = 1.0
    reference[0, 0] = 1e-5  # a near tie
    model = reference.copy()
    model[:2] = model[:2, ::-1]
    samples = SimpleNamespace(
        labels=np.zeros(40, np.int64), hashes=np.array([f"{i:032x}" for i in range(40)]),
        names=[f"{i}.png" for i in range(40)],
    )  # fmt: skip
    test: Any = SimpleNamespace(samples=samples, labelled=True, class_names=("a", "b"))

    task, rung = task_parity(reference, model, test, is_int8=False, limit_points=10.0)

    assert (task.flips, task.benign, task.lost) == (2, 1, 2)
    assert [flip.name for flip in task.clear] == ["1.png"]
    assert not rung.passed  # a float file may flip nothing clear


def test_a_set_without_labels_is_held_by_answers_alone(made: SimpleNamespace) -> None:
    found = check(made, made.int8, data=Set(made.data, labelled=False))

    assert failed(found) == []
    assert found.task is not None
    assert found.task.lost is None


def refused(made: SimpleNamespace, model: Path, kind: type[Exception], **wish: Any) -> str:
    with pytest.raises(kind) as caught:
        check(made, model, **wish)
    return str(caught.value)


def test_what_cannot_be_used_is_refused_in_a_sentence(
    made: SimpleNamespace, tmp_path: Path
) -> None:
    junk = tmp_path / "junk.onnx"
    junk.write_bytes(b"not a model")
    assert "not an ONNX file" in refused(made, junk, ExportError)
    assert "expected a reference that exists" in refused(
        made, made.floating, UsageError, reference=tmp_path / "none.onnx"
    )
    assert "neither a finished run" in refused(made, made.floating, UsageError, reference=tmp_path)
    (tmp_path / "empty" / "a").mkdir(parents=True)
    assert "no images" in refused(made, made.floating, DataError, data=Set(tmp_path / "empty"))
    assert "is int8" in refused(made, made.floating, UsageError, reference=made.int8)


def test_a_corrupt_image_is_named(made: SimpleNamespace, tmp_path: Path) -> None:
    pixels, labels = pictures(8, seed=3)
    write_folder(tmp_path / "bad", pixels, labels)
    (tmp_path / "bad" / "flat" / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n broken")

    said = refused(made, made.floating, DataError, data=Set(tmp_path / "bad"))

    assert "broken.png" in said


def test_a_file_that_says_nothing_needs_its_mean(made: SimpleNamespace, tmp_path: Path) -> None:
    foreign = changed(made.floating, tmp_path / "f.onnx", lambda m: m.ClearField("metadata_props"))

    assert "--mean" in refused(made, foreign, UsageError, reference=foreign)
    assert failed(check(made, foreign, reference=foreign, how=HOW)) == []


def test_a_file_of_other_classes_is_another_task(made: SimpleNamespace, tmp_path: Path) -> None:
    def three(model: onnx.ModelProto) -> None:
        weight("head.weight", lambda values: values[:3])(model)
        weight("head.bias", lambda values: values[:3])(model)
        model.graph.output[0].type.tensor_type.shape.dim[1].dim_value = 3

    other = changed(made.floating, tmp_path / "m.onnx", three)

    assert "reference of the same task" in refused(made, other, UsageError)


def test_a_reference_that_gives_nan_proves_nothing(made: SimpleNamespace, tmp_path: Path) -> None:
    change = weight("head.bias", lambda values: values * np.float32("nan"))
    broken = changed(made.floating, tmp_path / "nan.onnx", change)

    assert "the reference gives NaN" in refused(
        made, made.floating, MeasurementError, reference=broken
    )


def test_a_fixed_batch_is_respected(made: SimpleNamespace, tmp_path: Path) -> None:
    export_onnx(made.net, torch.zeros(2, 3, SIZE, SIZE), tmp_path / "four.onnx", batch=4)

    found = check(made, tmp_path / "four.onnx")

    assert failed(found) == []
    assert "batch 4 is fixed" in [one.rung for one in found.rungs]


def test_a_folder_that_holds_something_is_refused_before_anything_is_computed(
    made: SimpleNamespace,
) -> None:
    assert "not empty" in refused(
        made, made.floating, OutputError, golden=made.data, reference=Path("nowhere")
    )
