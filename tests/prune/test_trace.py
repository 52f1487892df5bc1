"""What is found to depend on what is right: cut networks compute what silenced ones do."""

from __future__ import annotations

import copy
from types import ModuleType
from typing import Any

import pytest
import torch
from edgestill.exporters.reference import evaluating
from edgestill.models import zoo
from edgestill.pipeline.errors import ModelError, RecipeError
from edgestill.pipeline.prune.cut import cut
from edgestill.pipeline.prune.example import noise
from edgestill.pipeline.prune.protect import find_protected
from edgestill.pipeline.prune.trace import Group, find_groups, kept_places, lost_places
from torch import Tensor, nn

IMAGE = (3, 8, 8)
# the smallest of each family and whatever differs in kind; 32 pixels, as their stems expect
ZOO: dict[str, dict[str, Any]] = {
    "resnet8": {},
    "resnet14": {"width": 0.5},
    "resnet32": {"width": 0.25},
    "resnet18": {"width": 0.25, "stem": "small"},
    "resnet50": {"width": 0.125, "stem": "small"},
    "mobilenetv2": {"width": 0.25, "stem": "small"},
    "plain_cnn_small": {},
    "plain_cnn_large": {"width": 0.25},
}


def pictures(shape: tuple[int, ...] = IMAGE) -> Tensor:
    return torch.randn(4, *shape, generator=torch.Generator().manual_seed(7))


def run(network: nn.Module, images: Tensor) -> Tensor:
    with torch.no_grad(), evaluating(network):
        logits: Tensor = network(images)
    return logits


def zeroed(network: nn.Module, groups: tuple[Group, ...], kept: dict[str, Tensor]) -> nn.Module:
    """The dense network with what writes the lost channels at zero: filters, biases, γ and β.

    Zero then stays zero through ReLU, ReLU6 and every mean, so this is exact where no other
    activation follows.
    """
    silent = copy.deepcopy(network)
    with torch.no_grad():
        for (path, side), index in lost_places(groups, kept).items():
            part = silent.get_submodule(path)
            if side == "out":
                for parameter in part.parameters():
                    parameter[index] = 0
    return silent


def halves(groups: tuple[Group, ...]) -> dict[str, Tensor]:
    return {group.name: torch.arange(1, group.units, 2) for group in groups}


@pytest.mark.parametrize("name", ZOO)
def test_pruned_zoo_net_equals_dense_net_with_those_channels_zeroed(
    nets: ModuleType, name: str
) -> None:
    torch.manual_seed(1)
    channels = 1 if name.startswith("plain") else 3
    shape = (channels, 32, 32) if channels == 3 else (1, 8, 8)
    network = nets.settle(zoo.build(name, ZOO[name], classes=5, in_channels=channels))
    groups = find_groups(network, noise(shape)).free
    kept = halves(groups)
    smaller = copy.deepcopy(network)

    cut(smaller, kept_places(network, groups, kept))

    expected = run(zeroed(network, groups, kept), pictures(shape))
    before, after = (sum(p.numel() for p in n.parameters()) for n in (network, smaller))
    assert len(groups) >= 3
    assert after < 0.6 * before
    # float32 sums in another order: 1e-4 of the largest logit; a wrong channel moves it by 10 %
    torch.testing.assert_close(
        run(smaller, pictures(shape)), expected, rtol=0, atol=1e-4 * float(expected.abs().max())
    )
    assert not torch.allclose(expected, run(network, pictures(shape)), rtol=0.01)


def test_option_a_residual_widths_leave_together_in_all_stages() -> None:
    network = zoo.build("resnet8", {}, classes=4, in_channels=3)

    groups = find_groups(network, noise((3, 32, 32)))

    width = next(group for group in groups.free if group.name == "conv1")
    unit = {place: index[3].tolist() for place, index in width.places.items()}
    # channel 3 of stage one is padded to 8 + 3 in stage two and 16 + 8 + 3 in stage three
    assert unit["conv1", "out"] == [3]
    assert unit["layer2.0.conv2", "out"] == [11]
    assert unit["layer3.0.bn2", "out"] == [27]
    assert unit["linear", "in"] == [27]
    # the padded channels have a fixed number in the shortcut, so they stay
    reasons = {layer: p.why for p in groups.protected for layer in p.layers}
    assert "size of tensor" in reasons["layer2.0.conv2"]


def test_logits_are_never_cut(nets: ModuleType) -> None:
    for network in (nets.Concatenating(), nets.Gated(), nets.Transformer()):
        groups = find_groups(nets.settle(network), noise(IMAGE))

        assert not any(("out", "out") in group.places for group in groups.free)
        assert any(p.layers == ("out",) and "logits" in p.why for p in groups.protected)


def test_flattened_pixels_belong_to_their_channel(nets: ModuleType) -> None:
    groups = {g.name: g for g in find_groups(nets.settle(nets.Concatenating()), noise(IMAGE)).free}

    # 4 × 4 pixels after pooling; `right` stands behind the 16 channels of `left`
    assert groups["left"].places["hidden", "in"][2].tolist() == list(range(32, 48))
    assert groups["right"].places["hidden", "in"][0].tolist() == list(range(256, 272))
    assert groups["right"].places["norm", "out"][:, 0].tolist() == list(range(16, 40))


def test_depthwise_and_gated_channels_are_one_unit_each(nets: ModuleType) -> None:
    groups = {g.name: g for g in find_groups(nets.settle(nets.Gated()), noise(IMAGE)).free}

    unit = {place: index[5].tolist() for place, index in groups["block.widen"].places.items()}
    assert unit == {
        ("block.widen", "out"): [5], ("block.depthwise", "out"): [5],
        ("block.depthwise", "in"): [5], ("block.gate.down", "in"): [5],
        ("block.gate.up", "out"): [5], ("block.narrow", "in"): [5],
    }  # fmt: skip


def test_grouped_convolution_and_group_norm_lose_whole_groups(nets: ModuleType) -> None:
    network = nets.settle(nets.Gated())
    groups = find_groups(network, noise(IMAGE)).free
    stem = next(group for group in groups if group.name == "stem")
    kept = {"stem": torch.tensor([0, 3])}

    smaller = copy.deepcopy(network)
    cut(smaller, kept_places(network, (stem,), kept))

    grouped, norm = smaller.get_submodule("grouped"), smaller.get_submodule("group_norm")
    assert stem.units == 4
    assert (grouped.groups, grouped.in_channels, grouped.out_channels) == (2, 8, 16)
    assert (norm.num_groups, norm.num_channels) == (2, 16)
    assert run(smaller, pictures()).shape == (4, 3)


@pytest.mark.parametrize("batch_first", [True, False])
def test_transformer_loses_heads_and_feed_forward_units(
    nets: ModuleType, batch_first: bool
) -> None:
    network = nets.settle(nets.Transformer(batch_first=batch_first))
    groups = find_groups(network, noise(IMAGE)).free
    names = {group.name: group.units for group in groups}

    smaller = copy.deepcopy(network)
    cut(smaller, kept_places(network, groups, halves(groups)))
    silent = copy.deepcopy(network)
    with torch.no_grad():
        for layer in silent.layers:
            layer.self_attn.out_proj.weight[:, 0:4] = 0  # heads 0 and 2, four columns each
            layer.self_attn.out_proj.weight[:, 8:12] = 0
            layer.linear2.weight[:, ::2] = 0

    assert names == {
        "layers.0.linear1": 32, "layers.1.linear1": 32,
        "layers.0.self_attn": 4, "layers.1.self_attn": 4,
    }  # fmt: skip
    assert smaller.layers[0].self_attn.in_proj_weight.shape == (3 * 2 * 4, 16)
    torch.testing.assert_close(
        run(smaller, pictures()), run(silent, pictures()), rtol=1e-4, atol=1e-5
    )


def test_own_attention_split_by_head_width_loses_heads(nets: ModuleType) -> None:
    (group,) = find_groups(nets.settle(nets.Attention(fixed_heads=False)), noise(IMAGE)).free

    assert group.units == 4
    assert group.places["q", "out"].tolist() == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11],
                                                 [12, 13, 14, 15]]  # fmt: skip
    assert set(group.places) == {("q", "out"), ("k", "out"), ("v", "out"), ("mix", "in")}


def test_own_attention_with_a_fixed_number_of_heads_is_protected_with_the_reason(
    nets: ModuleType,
) -> None:
    groups = find_groups(nets.settle(nets.Attention(fixed_heads=True)), noise(IMAGE))

    assert not groups.free
    assert any("computes something else" in p.why and "q" in p.layers for p in groups.protected)


def test_shared_weights_are_protected() -> None:
    network = nn.Sequential(
        nn.Flatten(), nn.Linear(192, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(),
        nn.Linear(16, 16), nn.Linear(16, 3),
    )  # fmt: skip
    network[5].weight = network[3].weight

    groups = find_groups(network, noise(IMAGE))

    assert any("shares its weight" in p.why for p in groups.protected)
    assert not any(path in ("3", "5") for g in groups.free for path, _ in g.places)


def test_protected_paths_keep_every_group_they_touch(nets: ModuleType) -> None:
    network = nets.settle(nets.Concatenating())

    groups = find_groups(network, noise(IMAGE), protect=find_protected(network, ["hid*"]))

    assert [group.name for group in groups.free] == ["stem"]
    assert sum("prune.protect names hidden" in p.why for p in groups.protected) == 3


def test_pattern_that_matches_nothing_names_what_is_near(nets: ModuleType) -> None:
    with pytest.raises(RecipeError, match=r"no module named 'hiden'.*near names: hidden"):
        find_protected(nets.Concatenating(), ["left", "hiden"])


def test_network_that_takes_one_batch_size_only_cannot_be_traced() -> None:
    class Fixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.out = nn.Linear(192, 3)

        def forward(self, x: Tensor) -> Tensor:
            logits: Tensor = self.out(x.reshape(2, 192))
            return logits

    with pytest.raises(ModelError, match=r"Fixed cannot be traced.*leave `prune` out"):
        find_groups(Fixed(), noise(IMAGE))


def test_tracing_leaves_the_network_as_it_was(nets: ModuleType) -> None:
    network = nets.Transformer().train()
    before = copy.deepcopy(network.state_dict())
    enabled = torch.backends.mha.get_fastpath_enabled()

    find_groups(network, noise(IMAGE))

    assert all(torch.equal(before[k], v) for k, v in network.state_dict().items())
    assert all(part.training for part in network.modules())
    assert torch.backends.mha.get_fastpath_enabled() == enabled
