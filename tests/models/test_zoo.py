"""The zoo's nets: sizes as published, names as in the published checkpoints, exportable."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from edgestill.exporters.to_onnx import export_onnx
from edgestill.models.store import count_parameters
from edgestill.models.zoo import ZOO, build, options
from edgestill.pipeline.errors import ModelError
from sklearn.datasets import load_digits
from torch import nn

# He et al. 2015 (table 6) and torchvision's model pages; option A has no shortcut parameters
PUBLISHED = {
    ("resnet8", 10): 75_290,  # 269,722 less 97,216 for a block in each stage
    ("resnet14", 10): 172_506,
    ("resnet20", 10): 269_722,
    ("resnet32", 10): 464_154,
    ("resnet44", 10): 658_586,
    ("resnet56", 10): 853_018,
    ("resnet110", 10): 1_727_962,
    ("resnet18", 1000): 11_689_512,
    ("resnet50", 1000): 25_557_032,
    ("mobilenetv2", 1000): 3_504_872,
}


def meta(name: str, classes: int = 10, in_channels: int = 3, **args: Any) -> nn.Module:
    with torch.device("meta"):
        return build(name, args, classes=classes, in_channels=in_channels)


@pytest.mark.parametrize(("name", "classes"), PUBLISHED)
def test_parameter_counts_are_the_published_ones(name: str, classes: int) -> None:
    assert count_parameters(meta(name, classes)) == PUBLISHED[name, classes]


@pytest.mark.parametrize(
    ("name", "entries"), [("resnet18", 122), ("resnet50", 320), ("mobilenetv2", 314)]
)
def test_state_dict_has_as_many_entries_as_torchvisions(name: str, entries: int) -> None:
    assert len(meta(name, 1000).state_dict()) == entries


@pytest.mark.parametrize(
    ("name", "shapes"),
    [
        ("resnet18", {"conv1.weight": (64, 3, 7, 7),
                      "layer2.0.downsample.0.weight": (128, 64, 1, 1),
                      "layer2.0.downsample.1.running_var": (128,), "layer4.1.bn2.bias": (512,),
                      "fc.weight": (1000, 512)}),
        ("resnet50", {"layer1.0.conv3.weight": (256, 64, 1, 1),
                      "layer1.0.downsample.0.weight": (256, 64, 1, 1),
                      "layer3.5.conv2.weight": (256, 256, 3, 3), "fc.weight": (1000, 2048)}),
        ("mobilenetv2", {"features.0.0.weight": (32, 3, 3, 3), "features.0.1.weight": (32,),
                         "features.1.conv.0.0.weight": (32, 1, 3, 3),
                         "features.1.conv.1.weight": (16, 32, 1, 1),
                         "features.1.conv.2.running_mean": (16,),
                         "features.2.conv.0.0.weight": (96, 16, 1, 1),
                         "features.2.conv.1.0.weight": (96, 1, 3, 3),
                         "features.2.conv.2.weight": (24, 96, 1, 1),
                         "features.2.conv.3.bias": (24,),
                         "features.18.0.weight": (1280, 320, 1, 1),
                         "classifier.1.weight": (1000, 1280)}),
    ],
)  # fmt: skip
def test_names_and_shapes_are_torchvisions(name: str, shapes: dict[str, tuple[int, ...]]) -> None:
    state = meta(name, 1000).state_dict()

    assert {key: tuple(state[key].shape) for key in shapes} == shapes


def test_mobilenet_width_rounds_as_torchvision_does() -> None:
    state = meta("mobilenetv2", 1000, width=0.35).state_dict()

    # _make_divisible(32 · 0.35) = 16, (16 · 0.35) = 8, (24 · 0.35) = 8, (320 · 0.35) = 112
    assert state["features.0.0.weight"].shape[0] == 16
    assert state["features.1.conv.1.weight"].shape[0] == 8
    assert state["features.2.conv.2.weight"].shape[0] == 8
    assert state["features.17.conv.2.weight"].shape[0] == 112
    assert state["features.18.0.weight"].shape[0] == 1280


@pytest.mark.parametrize("name", ZOO)
def test_width_scales_parameters_and_channels_stay_positive(name: str) -> None:
    counts = [count_parameters(meta(name, width=w)) for w in (0.05, 0.5, 1.0, 2.0)]

    assert counts == sorted(counts)
    assert counts[0] < counts[-1]


def test_zero_padded_shortcut_keeps_the_input_in_the_middle_channels() -> None:
    block = build("resnet20", {}, classes=10, in_channels=3).get_submodule("layer2.0")
    x = torch.randn(2, 16, 8, 8)

    y = block._shortcut(x)  # type: ignore[operator]

    assert torch.equal(y[:, 8:24], x[:, :, ::2, ::2])
    assert y[:, :8].abs().sum() == 0
    assert y[:, 24:].abs().sum() == 0


@pytest.mark.parametrize(
    ("name", "stage", "large", "small"),
    [("resnet18", "layer1", 8, 32), ("resnet18", "layer4", 1, 4),
     ("mobilenetv2", "features.3", 8, 32), ("mobilenetv2", "features.18", 1, 4)],
)  # fmt: skip
def test_small_stem_keeps_resolution(name: str, stage: str, large: int, small: int) -> None:
    for stem, size in (("large", large), ("small", small)):
        net = build(name, {"stem": stem, "width": 0.25}, classes=10, in_channels=3).eval()
        sizes: list[int] = []
        net.get_submodule(stage).register_forward_hook(lambda *a, s=sizes: s.append(a[2].shape[-1]))
        with torch.no_grad():
            net(torch.zeros(1, 3, 32, 32))
        assert sizes == [size]


@pytest.mark.parametrize("name", ZOO)
def test_gray_images_and_any_class_count_fit(name: str) -> None:
    net = build(name, {"width": 0.25}, classes=7, in_channels=1).eval()

    with torch.no_grad():
        assert net(torch.zeros(2, 1, 32, 32)).shape == (2, 7)


HEAD = {"ReduceMean", "Reshape", "Gemm"}


@pytest.mark.parametrize(
    ("name", "args", "operators"),
    [("resnet20", {"width": 0.5}, HEAD | {"Conv", "Relu", "Add", "Slice", "Pad"}),
     ("resnet18", {"stem": "small", "width": 0.125}, HEAD | {"Conv", "Relu", "Add"}),
     ("mobilenetv2", {"stem": "small", "width": 0.25}, HEAD | {"Conv", "Clip", "Add"}),
     ("plain_cnn_small", {}, HEAD | {"Conv", "Relu"})],
)  # fmt: skip
def test_exported_graph_is_plain_and_computes_the_same_at_other_batch_sizes(
    name: str, args: dict[str, Any], operators: set[str], tmp_path: Path
) -> None:
    torch.manual_seed(0)
    net = build(name, args, classes=10, in_channels=3)
    with torch.no_grad():
        for _ in range(3):  # statistics of ordinary size, so that the logits are too
            net.train()(torch.randn(8, 3, 16, 16))
    export_onnx(net.eval(), torch.zeros(2, 3, 16, 16), tmp_path / "net.onnx", batch="dynamic")
    x = np.random.default_rng(0).standard_normal((5, 3, 16, 16), dtype=np.float32)

    session = ort.InferenceSession(tmp_path / "net.onnx", providers=["CPUExecutionProvider"])
    (got,) = session.run(None, {"input": x})

    assert {node.op_type for node in onnx.load(tmp_path / "net.onnx").graph.node} == operators
    with torch.no_grad():
        expected = net(torch.from_numpy(x)).numpy()
    # other summation orders: 1e-4 of the largest logit is 20 times what was seen
    np.testing.assert_allclose(got, expected, atol=1e-4 * np.abs(expected).max(), rtol=0)


def test_small_plain_net_learns_digits_and_sizes_are_as_promised() -> None:
    torch.manual_seed(0)
    digits = load_digits()
    x = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 8 - 0.6
    y = torch.tensor(digits.target)
    order = torch.randperm(len(x))
    train, test = order[:1000], order[1000:]
    net = build("plain_cnn_small", {}, classes=10, in_channels=1)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9, nesterov=True)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 300)
    for step in range(300):  # 20 epochs of 15 batches
        batch = train[torch.randperm(1000)[:64]] if step else train[:64]
        optimizer.zero_grad()
        nn.functional.cross_entropy(net(x[batch]), y[batch]).backward()
        optimizer.step()
        schedule.step()

    with torch.no_grad():
        accuracy = (net.eval()(x[test]).argmax(1) == y[test]).float().mean().item()

    assert accuracy >= 0.97  # 98.2 to 98.9 % were seen after 30 epochs over three seeds
    assert count_parameters(net) <= 20_000
    assert count_parameters(meta("plain_cnn_large", in_channels=1)) >= 1_500_000


def test_unknown_name_lists_near_ones_and_the_zoo() -> None:
    with pytest.raises(ModelError, match=r"resnet65: no such network.*resnet56.*plain_cnn_large"):
        build("resnet65", {}, classes=10, in_channels=3)


@pytest.mark.parametrize(
    ("name", "args", "message"),
    [("resnet20", {"widht": 1}, r"no argument 'widht' \(did you mean width\?\).*width"),
     ("resnet20", {"stem": "small"}, "no argument 'stem'"),
     ("resnet18", {"stem": "tiny"}, "args.stem: expected large or small, got 'tiny'"),
     ("resnet18", {"width": 0}, "args.width: expected a number"),
     ("resnet18", {"width": "1"}, "args.width: expected a number"),
     ("resnet18", {"width": True}, "args.width: expected a number"),
     ("mobilenetv2", {"dropout": 1.0}, r"args.dropout: expected a number in \[0, 1\)")],
)  # fmt: skip
def test_wrong_argument_says_what_is_allowed(name: str, args: Any, message: str) -> None:
    with pytest.raises(ModelError, match=message):
        build(name, args, classes=10, in_channels=3)


@pytest.mark.parametrize("name", ZOO)
def test_every_entry_resolves_and_names_its_options(name: str) -> None:
    assert options(name)["width"] == 1.0
