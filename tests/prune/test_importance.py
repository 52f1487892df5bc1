"""Each measure against its formula, worked by hand on a net of two channels."""

from __future__ import annotations

from types import ModuleType

import pytest
import torch
import torch.nn.functional as F
from edgestill.pipeline.errors import RecipeError
from edgestill.pipeline.prune.example import noise
from edgestill.pipeline.prune.importance import (
    bn_shares,
    group_scores,
    l2_shares,
    score_all,
    taylor_shares,
)
from edgestill.pipeline.prune.trace import Group, find_groups
from torch import nn


def two_channels() -> tuple[nn.Module, Group]:
    """1 × 1 convolution → BatchNorm → Linear over 1 × 1 pixel; the group is its two channels."""
    network = nn.Sequential(
        nn.Conv2d(1, 2, 1), nn.BatchNorm2d(2), nn.Flatten(), nn.Linear(2, 3)
    ).eval()
    with torch.no_grad():
        network[0].weight.copy_(torch.tensor([1.0, -2.0]).view(2, 1, 1, 1))
        network[0].bias.copy_(torch.tensor([0.5, 0.25]))
        network[1].weight.copy_(torch.tensor([3.0, -0.5]))
        network[3].weight.copy_(torch.tensor([[1.0, 0.0], [2.0, 1.0], [0.0, -1.0]]))
    index = torch.tensor([[0], [1]])
    places = {("0", "out"): index, ("1", "out"): index, ("3", "in"): index}
    return network, Group("0", places)


def test_l2_is_the_mean_over_layers_of_squares_divided_by_the_groups_mean() -> None:
    network, group = two_channels()

    scores = score_all(network, [group], "l2", l2_shares(network))["0"]

    # channel 0: (1² + 3² + (1² + 2²)) / 3 = 5; channel 1: (2² + 0.5² + (1² + 1²)) / 3 = 6.25 / 3
    expected = torch.tensor([5.0, 6.25 / 3], dtype=torch.float64)
    torch.testing.assert_close(scores, expected / expected.mean())


def test_bn_is_the_absolute_scale() -> None:
    network, group = two_channels()

    scores = score_all(network, [group], "bn", bn_shares(network))["0"]

    assert scores.tolist() == [3.0, 0.5]


def test_bn_without_any_batchnorm_says_what_to_use() -> None:
    network, group = two_channels()

    with pytest.raises(RecipeError, match="use l2 or taylor"):
        score_all(network, [group], "bn", {})


def test_taylor_is_the_mean_of_weight_times_gradient_over_batches() -> None:
    network, group = two_channels()
    batches = [(torch.tensor([[[[v]]], [[[v + 1]]]]), torch.tensor([0, 2])) for v in (0.3, -1.0)]

    scores = score_all(network, [group], "taylor", taylor_shares(network, batches))["0"]

    total = torch.zeros(2, dtype=torch.float64)
    for images, labels in batches:
        network.zero_grad()
        F.cross_entropy(network(images), labels).backward()
        conv, norm, linear = network[0], network[1], network[3]
        own = [
            (conv.weight * conv.weight.grad).abs().flatten() + (conv.bias * conv.bias.grad).abs(),
            (norm.weight * norm.weight.grad).abs() + (norm.bias * norm.bias.grad).abs(),
            (linear.weight * linear.weight.grad).abs().sum(0),
        ]
        total += torch.stack(own).detach().double().mean(0)
    torch.testing.assert_close(scores, total / 2, rtol=1e-5, atol=0)


def test_heads_count_their_own_projections() -> None:
    attention = nn.MultiheadAttention(4, 2, bias=False)
    with torch.no_grad():
        attention.in_proj_weight.zero_()
        attention.in_proj_weight[2:4] = 1  # queries of head 1
        attention.in_proj_weight[4] = 2  # the first key row of head 0
        attention.out_proj.weight.zero_()
        attention.out_proj.weight[:, 3] = 3  # head 1
    group = Group("a", {("a", "heads"): torch.tensor([[0], [1]])})
    network = nn.ModuleDict({"a": attention})

    scores = group_scores(network, group, l2_shares(network))

    assert scores is not None
    assert scores.tolist() == [4 * 2**2, 2 * 4 * 1 + 4 * 3**2]


def test_every_group_of_every_kind_of_net_gets_a_score_for_each_unit(nets: ModuleType) -> None:
    for made in (nets.Concatenating(), nets.Gated(), nets.Transformer()):
        network = nets.settle(made)
        groups = find_groups(network, noise((3, 8, 8))).free
        batch = (torch.randn(4, 3, 8, 8), torch.tensor([0, 1, 2, 0]))

        for measure, shares in (
            ("l2", l2_shares(network)), ("taylor", taylor_shares(network, [batch])),
        ):  # fmt: skip
            scores = score_all(network, groups, measure, shares)

            assert {name: len(own) for name, own in scores.items()} == {
                group.name: group.units for group in groups
            }
            # a unit behind a ReLU that is off for these images has no gradient
            assert all(float(own.min()) >= 0 and float(own.max()) > 0 for own in scores.values())
