"""Batches of like lengths: less padding, and still every sample once, in a random order."""

from __future__ import annotations

import pytest
import torch
from edgestill.pipeline.train.batches import batch_sizes, bucketed, epoch_order

SAMPLES, BATCH = 1000, 16


def ordered(epoch: int = 0, seed: int = 0, samples: int = SAMPLES) -> torch.Tensor:
    order = epoch_order(samples, seed=seed, epoch=epoch)
    return bucketed(order, lengths(samples), batch_sizes(samples, BATCH), seed=seed, epoch=epoch)


def lengths(samples: int = SAMPLES) -> torch.Tensor:
    return torch.randint(3, 60, (samples,), generator=torch.Generator().manual_seed(1))


def padded(order: torch.Tensor) -> int:
    """Tokens that are computed, padding included."""
    parts = torch.split(lengths(len(order))[order], batch_sizes(len(order), BATCH))
    return sum(int(part.max()) * len(part) for part in parts)


@pytest.mark.parametrize("samples", [5, 16, 17, 161, SAMPLES])
def test_every_sample_comes_once(samples: int) -> None:
    assert sorted(ordered(samples=samples).tolist()) == list(range(samples))


def test_little_is_padding() -> None:
    own = int(lengths().sum())

    assert padded(ordered()) < 1.1 * own
    assert padded(epoch_order(SAMPLES, seed=0, epoch=0)) > 1.5 * own


def test_batches_do_not_come_sorted() -> None:
    longest = [int(lengths()[part].max()) for part in torch.split(ordered(), BATCH)]

    assert longest != sorted(longest)
    assert longest != sorted(longest, reverse=True)


def test_order_is_a_function_of_seed_and_epoch() -> None:
    assert torch.equal(ordered(epoch=2), ordered(epoch=2))
    assert not torch.equal(ordered(epoch=2), ordered(epoch=3))
    assert not torch.equal(ordered(seed=0), ordered(seed=1))
