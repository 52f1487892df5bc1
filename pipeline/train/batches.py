"""The batches of an epoch: how many samples each has, in which order, and how few are too few."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..errors import DataError, RecipeError
from .reproducible import derive_seed

_WINDOW = 50  # batches that are sorted by length together
BATCH_NORM = (nn.modules.batchnorm._BatchNorm,)


def batch_sizes(samples: int, batch_size: int, *, least: int = 2) -> list[int]:
    """Sizes of an epoch's batches. The last may be smaller; below `least` it joins the one before.

    A batch of one sample has no variance for BatchNorm to normalise by.
    """
    if samples < 1:
        raise DataError("train: expected at least one sample, got an empty set; check data.train")
    sizes = [batch_size] * (samples // batch_size)
    rest = samples % batch_size
    if rest < least and sizes:
        sizes[-1] += rest
    elif rest:
        sizes.append(rest)
    return sizes


def epoch_order(samples: int, *, seed: int, epoch: int) -> Tensor:
    """The order of the samples in an epoch: a permutation given by (seed, epoch) alone."""
    generator = torch.Generator().manual_seed(derive_seed(seed, "order", epoch))
    return torch.randperm(samples, generator=generator)


def bucketed(
    order: Tensor, lengths: Tensor, batches: list[int], *, seed: int, epoch: int
) -> Tensor:
    """The order with samples of like lengths in a batch, so that little of one is padding.

    Windows of 50 batches are sorted by length, then batches of equal size change places: what is
    in a batch, and when it comes, stays random. A function of (order, lengths, seed, epoch).
    """
    window = _WINDOW * batches[0]
    pieces = [part[lengths[part].argsort(stable=True)] for part in torch.split(order, window)]
    parts = list(torch.split(torch.cat(pieces), batches))
    full = [index for index, part in enumerate(parts) if len(part) == batches[0]]
    generator = torch.Generator().manual_seed(derive_seed(seed, "buckets", epoch))
    moved = torch.randperm(len(full), generator=generator).tolist()
    shuffled = {index: parts[full[to]] for index, to in zip(full, moved, strict=True)}
    return torch.cat([shuffled.get(index, part) for index, part in enumerate(parts)])


def norm_of(module: nn.Module) -> nn.Module | None:
    return next((part for part in module.modules() if isinstance(part, BATCH_NORM)), None)


def check_batches(
    batches: list[int], norm: nn.Module | None, *, least: int, processes: int
) -> None:
    if processes > 1 and batches[0] < least * processes:
        raise RecipeError(
            f"batch_size: expected at least {least * processes} samples, {least} for each of "
            f"{processes} processes, got batches of {batches[0]}; raise batch_size or start fewer "
            "processes"
        )
    if min(batches) < least:
        who = "an objective compares samples and"
        if norm is not None:
            who = f"the network has {type(norm).__name__}, which"
        raise RecipeError(
            f"batch_size: {who} needs at least {least} samples a batch to learn from, got batches "
            f"of {min(batches)} ({sum(batches)} samples); raise batch_size"
        )
