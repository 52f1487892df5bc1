"""How much a unit matters: numbers to rank the units of all groups by. Nothing is cut here.

Every measure gives each weight a non-negative share first; a unit's score sums the shares of its
weights in a layer and takes the mean over the group's layers.

    l2      w²; scores are divided by the group's mean, so that groups compare (group magnitude of
            DepGraph, Fang et al. 2023, §3.3, with its mean normalisation)
    taylor  |w · ∂loss/∂w|, mean over batches: the first-order change of the loss when w is zeroed
            (Molchanov et al. 2019, eq. 8, with |·| for the square)
    bn      |γ| of BatchNorms (network slimming, Liu et al. 2017)
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...exporters.reference import evaluating
from ..errors import RecipeError
from ..train.reproducible import own_attention
from .cut import slices
from .trace import Group

Measure = Literal["l2", "taylor", "bn"]
Shares = Mapping[str, Tensor]  # name of a parameter → its shares, of its shape


def l2_shares(network: nn.Module) -> dict[str, Tensor]:
    """w² of every weight; biases do not count."""
    return {
        name: parameter.detach().square()
        for name, parameter in network.named_parameters()
        if name.endswith("weight")
    }


def taylor_shares(
    network: nn.Module, batches: Iterable[tuple[Tensor, Tensor]]
) -> dict[str, Tensor]:
    """|w · ∂loss/∂w| of every parameter, mean over the batches; loss is the cross-entropy.

    Args:
        network: in eval mode while it is asked; it is left as it is.
        batches: inputs (N, C, H, W) or tokens (N, K, S), and labels int64 (N,).
    """
    copied = copy.deepcopy(network).requires_grad_(True)
    named = dict(copied.named_parameters())
    total = {name: torch.zeros_like(parameter) for name, parameter in named.items()}
    count = 0
    with evaluating(copied), own_attention():
        for inputs, labels in batches:
            loss = F.cross_entropy(copied(inputs), labels)
            gradients = torch.autograd.grad(loss, list(named.values()), allow_unused=True)
            for (name, parameter), gradient in zip(named.items(), gradients, strict=True):
                if gradient is not None:
                    total[name] += (parameter.detach() * gradient).abs()
            count += 1
    assert count, "no batches to take gradients on"
    return {name: share / count for name, share in total.items()}


def bn_shares(network: nn.Module) -> dict[str, Tensor]:
    """|γ| of every BatchNorm that has one, and nothing of other layers."""
    return {
        f"{path}.weight": part.weight.detach().abs()
        for path, part in network.named_modules()
        if isinstance(part, nn.BatchNorm1d | nn.BatchNorm2d) and part.weight is not None
    }


def group_scores(network: nn.Module, group: Group, shares: Shares) -> Tensor | None:
    """Score of each unit, (U,): shares summed in a layer, mean over layers that have any.

    Returns: None where no layer of the group has shares.
    """
    layers: dict[tuple[str, str], Tensor] = {}
    for (path, side), index in group.places.items():
        part = network.get_submodule(path)
        for name, _ in part.named_parameters():
            share = shares.get(f"{path}.{name}")
            sliced = None if share is None else slices(part, name, share, side=side)
            if sliced is not None:
                per_channel = sliced.flatten(1).sum(1) if sliced.ndim > 1 else sliced
                score = per_channel[index].sum(1)
                layers[path, side] = layers.get((path, side), torch.zeros(())) + score
    return torch.stack(list(layers.values())).mean(0) if layers else None


def score_all(
    network: nn.Module, groups: Sequence[Group], measure: Measure, shares: Shares
) -> dict[str, Tensor]:
    """Group name → score of each unit, float64 (U,). Groups without shares are left out.

    Raises:
        RecipeError: `bn`, and no group that may be cut has a BatchNorm.
    """
    found: dict[str, Tensor] = {}
    for group in groups:
        scores = group_scores(network, group, shares)
        if scores is None:
            continue
        scores = scores.double()
        if measure == "l2":
            scores = scores / scores.mean().clamp_min(torch.finfo(torch.float64).tiny)
        found[group.name] = scores
    if not found and groups:
        raise RecipeError(
            f"prune.importance: bn, but no channels of {type(network).__name__} that may be cut "
            "have a BatchNorm; use l2 or taylor"
        )
    return found
