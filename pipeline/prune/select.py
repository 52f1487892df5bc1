"""Which units stay, and which candidates are kept: choices by numbers alone, no network runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from .cut import Side
from .trace import Group

NOISE = 0.02  # candidates that are this close in p50 are equally fast


def kept_units(
    groups: Sequence[Group],
    scores: Mapping[str, Tensor],
    *,
    share_cut: float,
    round_to: int,
    least: Mapping[str, int] | None = None,
) -> dict[str, Tensor]:
    """The units that stay when the least important `share_cut` of all groups' units should go.

    A group keeps more where its channel count has to be a multiple of `round_to`, and never less
    than one such multiple. Of equal scores a group's later unit goes first, and all groups lose an
    equal share.

    Args:
        scores: group name → (U,); groups without scores are left whole.
        least: group name → units that it keeps at least.
        share_cut: in [0, 1]; at 1 every group keeps the least it may.

    Returns: group name → int64 indices of units, ascending; only of groups that lose some.
    """
    leaving = _leaving(scores, share_cut)
    kept = {}
    for group in groups:
        if group.name not in scores:
            continue
        own = scores[group.name]
        wanted = max(group.units - leaving[group.name], (least or {}).get(group.name, 1))
        stays = allowed_count(group, wanted, round_to=round_to)
        if stays < group.units:
            best = own.argsort(descending=True, stable=True)[:stays]
            kept[group.name] = best.sort().values
    return kept


def _leaving(scores: Mapping[str, Tensor], share_cut: float) -> dict[str, int]:
    """Group name → how many of its units are among the least important `share_cut` of all."""
    if not scores:
        return {}
    ranks = [own.argsort(stable=True).argsort() / len(own) for own in scores.values()]
    order = np.lexsort((torch.cat(ranks).numpy(), torch.cat(list(scores.values())).numpy()))
    owner = np.repeat(np.arange(len(scores)), [len(own) for own in scores.values()])
    gone = owner[order[: round(share_cut * len(order))]]
    return dict(zip(scores, np.bincount(gone, minlength=len(scores)).tolist(), strict=True))


def allowed_count(group: Group, wanted: int, *, round_to: int) -> int:
    """The fewest units ≥ `wanted` and ≥ 1 that leave a rounded channel count, or all of them.

    Channels are those that the group's own first layer puts out and that belong to the group;
    heads are not rounded.
    """
    side: Side = "heads"
    channels = 1
    for (_, side), index in group.places.items():
        if side != "in":
            channels = index.shape[1]
            break
    multiple = 1 if side == "heads" else round_to
    for units in range(max(1, wanted), group.units):
        if units * channels % multiple == 0:
            return units
    return group.units


def choose(measured: Sequence[tuple[float, float]], count: int) -> list[int]:
    """Which candidates are worth their recovery, the most promising first.

    Accuracy after the cut, with BatchNorm statistics taken anew and no training, stands for what
    recovery will bring. On resnet56 at 0.50, 0.47, 0.47 and 0.37 of its multiply-adds, one epoch
    of distillation on 20,000 CIFAR-10 images took four mixes from 66, 50, 48 and 41 % to 85, 83,
    80 and 83 % (n = 5,000, one seed): the best stays the best, the order of the others is loose.
    So the most accurate comes first, and the rest are taken evenly along the front of speed and
    accuracy, short of its fast end, which recovers least.

    Args:
        measured: (p50 in ms, accuracy in [0, 1]) of each candidate, at least one.
        count: how many at most, ≥ 1.

    Returns: indices; of equal candidates the first in the table.
    """
    front: list[int] = []
    for index in sorted(range(len(measured)), key=lambda index: -measured[index][1]):
        if not front or measured[index][0] < (1 - NOISE) * measured[front[-1]][0]:
            front.append(index)
    if len(front) <= count:
        return front
    return [front[step * (len(front) - 1) // count] for step in range(count)]
