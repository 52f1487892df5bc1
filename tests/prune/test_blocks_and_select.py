"""Which blocks may leave and in what order, which units stay, and what a network costs."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

import onnx
import pytest
import torch
from edgestill.exporters.audit import multiply_adds
from edgestill.models import zoo
from edgestill.pipeline.prune.blocks import find_blocks, removal_order, without
from edgestill.pipeline.prune.cost import count_multiply_adds
from edgestill.pipeline.prune.example import noise
from edgestill.pipeline.prune.search import recalibrate
from edgestill.pipeline.prune.select import allowed_count, choose, kept_units
from edgestill.pipeline.prune.timing import export_for_timing
from edgestill.pipeline.prune.trace import Group
from torch import nn

IMAGE = (3, 8, 8)


def group(units: int, name: str = "a", channels: int = 1) -> Group:
    index = torch.arange(units * channels).view(units, channels)
    return Group(name, {(name, "out"): index, ("reader", "in"): index})


@pytest.mark.parametrize(
    ("name", "args", "expected"),
    [
        ("resnet14", {}, ["layer1.0", "layer1.1", "layer2.1", "layer3.1"]),
        ("resnet18", {"width": 0.25, "stem": "small"},
         ["layer1.0", "layer1.1", "layer2.1", "layer3.1", "layer4.1"]),
        ("mobilenetv2", {"width": 0.5, "stem": "small"},
         [f"features.{n}" for n in (3, 5, 6, 8, 9, 10, 12, 13, 15, 16)]),
        ("plain_cnn_small", {}, []),
    ],
)  # fmt: skip
def test_blocks_are_those_with_a_way_around_them(
    name: str, args: dict[str, object], expected: list[str]
) -> None:
    channels = 1 if name.startswith("plain") else 3
    network = zoo.build(name, args, classes=4, in_channels=channels).eval()

    assert list(find_blocks(network, noise((channels, 32, 32)))) == expected


def test_user_blocks_are_found_whole(nets: ModuleType) -> None:
    # the gate inside passes its input on too, but is a part of the block
    assert find_blocks(nets.settle(nets.Gated()), noise(IMAGE)) == ("block",)
    assert find_blocks(nets.settle(nets.Transformer()), noise(IMAGE)) == ("layers.0", "layers.1")
    assert find_blocks(nets.settle(nets.Concatenating()), noise(IMAGE)) == ()


@pytest.mark.parametrize("protect", [["layer1.0.conv1"], ["layer1.0"], ["layer1"]])
def test_protected_blocks_stay_with_what_is_inside_them(protect: list[str]) -> None:
    network = zoo.build("resnet14", {"width": 0.25}, classes=4, in_channels=3).eval()

    assert "layer1.0" not in find_blocks(network, noise((3, 16, 16)), protect=protect)
    assert ("layer1.1" in find_blocks(network, noise((3, 16, 16)), protect=protect)) == (
        protect != ["layer1"]
    )


def test_least_harmful_block_leaves_first_and_harm_is_that_of_all_that_left() -> None:
    torch.manual_seed(0)
    network = zoo.build("resnet14", {"width": 0.5}, classes=4, in_channels=3).eval()
    with torch.no_grad():
        network.get_parameter("layer2.1.bn2.weight").mul_(1e-3)  # hardly adds anything
    images = torch.randn(32, 3, 16, 16)
    blocks = find_blocks(network, noise((3, 16, 16)))

    order = list(removal_order(network, blocks, images, at_most=3))

    with torch.no_grad():
        dense = network(images).log_softmax(1)
        left = without(network, [r.path for r in order])(images).log_softmax(1)
    by_hand = (dense.exp() * (dense - left)).sum(1).mean()
    assert order[0].path == "layer2.1"
    assert len({r.path for r in order}) == 3
    assert order[2].harm == pytest.approx(float(by_hand), rel=1e-3)


def test_block_without_which_the_net_does_not_run_is_not_offered(nets: ModuleType) -> None:
    class Asking(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = nets.Gated()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            assert hasattr(self.net.block, "gate")
            logits: torch.Tensor = self.net(x)
            return logits

    network = Asking().eval()
    blocks = find_blocks(network, noise(IMAGE))

    assert blocks == ("net.block",)
    assert not list(removal_order(network, blocks, torch.randn(4, *IMAGE), at_most=1))


def test_lowest_scores_leave_across_groups_and_counts_are_rounded_up() -> None:
    scores = {
        "a": torch.arange(32, dtype=torch.float64),  # 20 of the 26 lowest are here
        "b": torch.arange(14, 30, dtype=torch.float64),
    }

    kept = kept_units([group(32, "a"), group(16, "b")], scores, share_cut=26 / 48, round_to=8)

    # the 26 lowest are below 20: 12 of a and 10 of b stay, rounded up to 16 and 16
    assert kept["a"].tolist() == list(range(16, 32))
    assert "b" not in kept


def test_all_may_leave_but_one_multiple_and_what_is_asked_to_stay() -> None:
    scores = {"a": torch.arange(32.0).double(), "b": torch.arange(32.0).double()}
    groups = [group(32, "a"), group(32, "b")]

    kept = kept_units(groups, scores, share_cut=1.0, round_to=8, least={"b": 17})

    assert kept["a"].tolist() == list(range(24, 32))
    assert len(kept["b"]) == 24


@pytest.mark.parametrize(
    ("units", "channels", "wanted", "count"),
    [(6, 1, 1, 6), (8, 1, 1, 8), (20, 1, 9, 16), (20, 1, 17, 20), (8, 4, 3, 4), (9, 3, 2, 8)],
)
def test_channel_count_is_a_multiple_of_eight_or_whole(
    units: int, channels: int, wanted: int, count: int
) -> None:
    assert allowed_count(group(units, channels=channels), wanted, round_to=8) == count


def test_heads_are_not_rounded() -> None:
    heads = Group("a", {("a", "heads"): torch.arange(4)[:, None]})

    assert allowed_count(heads, 3, round_to=8) == 3
    assert allowed_count(heads, 0, round_to=8) == 1


def test_most_accurate_is_chosen_first_then_evenly_along_the_front() -> None:
    # the third is slower and worse than the second; the fourth is faster only within noise
    measured = [(9.0, 0.7), (5.0, 0.6), (6.0, 0.5), (4.95, 0.4), (4.0, 0.3), (3.0, 0.2), (2.0, 0.1)]

    assert choose(measured, 1) == [0]
    assert choose(measured, 2) == [0, 4]
    assert choose(measured, 4) == [0, 1, 4, 5]
    assert choose(measured, 5) == [0, 1, 4, 5, 6]
    assert choose([(1.0, 0.5), (1.0, 0.5)], 5) == [0]


@pytest.mark.parametrize("name", ["Gated", "Transformer"])
def test_multiply_adds_agree_with_the_exported_file(
    nets: ModuleType, name: str, tmp_path: Path
) -> None:
    network = getattr(nets, name)().eval()

    export_for_timing(network, noise(IMAGE).numpy(), tmp_path / "a.onnx")

    assert count_multiply_adds(network, noise(IMAGE)) == multiply_adds(
        onnx.load(tmp_path / "a.onnx")
    )


def test_recalibrated_statistics_are_means_over_batches_and_nothing_else_changes() -> None:
    network = nn.Sequential(nn.BatchNorm2d(2, momentum=0.1), nn.Dropout(0.5)).eval()
    network[0].num_batches_tracked.fill_(7)
    images = torch.randn(8, 2, 4, 4) * 3 + 1

    recalibrate(network, images, batch_size=4)

    first, second = images[:4], images[4:]
    mean = (first.mean((0, 2, 3)) + second.mean((0, 2, 3))) / 2
    variance = (first.var((0, 2, 3)) + second.var((0, 2, 3))) / 2
    torch.testing.assert_close(network[0].running_mean, mean)
    torch.testing.assert_close(network[0].running_var, variance)
    assert (network[0].momentum, int(network[0].num_batches_tracked)) == (0.1, 7)
    assert not any(part.training for part in network.modules())
