"""Logits and scores, on nets whose answers are known by hand."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from edgestill.exporters.to_onnx import export_onnx
from edgestill.pipeline.data.dataset import SampleSet
from edgestill.pipeline.errors import MeasurementError
from edgestill.pipeline.measure.accuracy import (
    accuracy,
    confusion,
    logits_of_module,
    logits_of_onnx,
    per_class_accuracy,
    score,
)
from edgestill.pipeline.recipe import PreprocessSpec
from torch import nn

LOGITS = np.array([[2.0, 0.0, 0.0], [0.0, 3.0, 1.0], [5.0, 0.0, 5.0], [0.0, 1.0, 9.0]], np.float32)
LABELS = np.array([0, 2, 2, 2])
PREPROCESS = PreprocessSpec(mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25))


def image_set(count: int = 7) -> SampleSet:
    generator = np.random.default_rng(0)
    return SampleSet(
        contents=generator.integers(0, 256, (count, 4, 4, 3), dtype=np.uint8),
        labels=np.arange(count) % 3,
        ids=np.arange(count),
        hashes=np.array([f"{i:032x}" for i in range(count)]),
        names=None,
    )


def net() -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(
            nn.Conv2d(3, 4, 3),
            nn.BatchNorm2d(4),
            nn.Dropout(0.5),
            nn.Flatten(),
            nn.Linear(16, 3),
        )


def test_scores_are_worked_out_by_hand() -> None:
    found = score(LOGITS, LABELS)

    first = np.exp(2) / (np.exp(2) + 2)
    assert found.prediction.tolist() == [0, 1, 0, 2]  # of equal logits the first
    assert found.correct.tolist() == [True, False, False, True]
    assert found.p_label[0] == pytest.approx(first)
    assert found.top1_probability[0] == pytest.approx(first)
    assert found.margin[0] == pytest.approx(first - 1 / (np.exp(2) + 2))
    assert found.margin[2] == 0
    assert found.prediction.dtype == np.int64


def test_accuracy_per_class_and_confusion_count_the_same_answers() -> None:
    assert accuracy(LOGITS, LABELS) == 0.5
    assert per_class_accuracy(LOGITS, LABELS, class_names=("a", "b", "c")) == {
        "a": {"n": 1, "accuracy": 1.0},
        "b": {"n": 0, "accuracy": None},
        "c": {"n": 3, "accuracy": pytest.approx(1 / 3)},
    }
    assert confusion(LOGITS, LABELS).tolist() == [[1, 0, 0], [0, 0, 0], [1, 1, 1]]


def test_extreme_logits_give_finite_probabilities() -> None:
    found = score(np.array([[1e30, -1e30]], np.float32), np.array([1]))

    assert found.p_label.tolist() == [0.0]
    assert found.top1_probability.tolist() == [1.0]


def test_logits_do_not_depend_on_the_batch_size_and_modes_are_put_back() -> None:
    module = net()
    module[1].eval()  # type: ignore[index]
    modes = [part.training for part in module.modules()]

    whole = logits_of_module(module, image_set(), PREPROCESS, device="cpu")
    parts = logits_of_module(module, image_set(), PREPROCESS, device="cpu", batch_size=2)

    # convolutions of another batch size may sum in another order
    np.testing.assert_allclose(whole, parts, atol=1e-5)
    assert whole.shape == (7, 3)
    assert [part.training for part in module.modules()] == modes


def test_measuring_leaves_weights_and_buffers_as_they_are() -> None:
    module = net()
    before = {name: value.clone() for name, value in module.state_dict().items()}

    logits_of_module(module, image_set(), PREPROCESS, device="cpu")

    assert all(torch.equal(before[name], value) for name, value in module.state_dict().items())


def test_torch_and_onnxruntime_see_the_same_images(tmp_path: Path) -> None:
    module = net().eval()
    path = tmp_path / "net.onnx"
    export_onnx(module, torch.zeros(2, 3, 4, 4), path, batch="dynamic")

    onnx = logits_of_onnx(path, image_set(), PREPROCESS, threads=1, batch_size=3)

    torchs = logits_of_module(module, image_set(), PREPROCESS, device="cpu")
    np.testing.assert_allclose(onnx, torchs, atol=1e-5)


def test_a_net_that_gives_nan_is_named() -> None:
    module = net()
    with torch.no_grad():
        module[4].bias[1] = float("nan")  # type: ignore[index,operator]

    with pytest.raises(MeasurementError, match=r"the teacher: .* NaN or infinity for 7 of 7"):
        logits_of_module(module, image_set(), PREPROCESS, device="cpu", name="the teacher")


def test_an_empty_set_measures_nothing() -> None:
    with pytest.raises(MeasurementError, match="empty set"):
        logits_of_module(net(), image_set(0), PREPROCESS, device="cpu")
    with pytest.raises(MeasurementError, match="got none"):
        accuracy(np.zeros((0, 3), np.float32), np.zeros(0, np.int64))


def test_labels_outside_the_classes_are_refused() -> None:
    with pytest.raises(ValueError, match=r"labels in 0\.\.2, got 0\.\.3"):
        accuracy(LOGITS, np.array([0, 1, 2, 3]))


def test_a_program_of_one_batch_size_is_run_at_it_and_the_last_batch_filled_up() -> None:
    module, seen = net().eval(), []
    module.register_forward_hook(lambda m, args, output: seen.append(len(args[0])))

    fixed = logits_of_module(module, image_set(), PREPROCESS, device="cpu", fixed_batch=3)

    assert seen == [3, 3, 3]
    free = logits_of_module(module, image_set(), PREPROCESS, device="cpu")
    np.testing.assert_allclose(fixed, free, atol=1e-5)
