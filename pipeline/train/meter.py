"""Sums of the loss terms, kept on the device: a step adds to them and never waits for them."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from ..errors import MeasurementError
from ..stage import World
from .distributed import least_over, sum_over

LOSS = "loss"  # what the terms add up to, metered beside them
_NEVER = 2**62


class Meter:
    """Sample-weighted sums of named loss terms over an epoch, and where one first broke.

    Every process adds its own part; `check` and `means` are of all of them, and called by all.
    """

    def __init__(self, names: tuple[str, ...], *, device: str, world: World) -> None:
        self.names = names
        self._world = world
        self._sums = torch.zeros(len(names), dtype=torch.float64, device=device)
        self._broken_at = torch.full((len(names),), _NEVER, dtype=torch.int64, device=device)
        self._samples = torch.zeros((), dtype=torch.float64, device=device)

    def add(self, terms: Mapping[str, Tensor], *, samples: int, step: int) -> None:
        """Take in a step's terms, each a mean over `samples`."""
        values = torch.stack([terms[name].detach() for name in self.names])
        self._sums += values * samples
        self._broken_at.clamp_max_(torch.where(values.isfinite(), _NEVER, step))
        self._samples += samples

    def check(self, *, epoch: int, advice: str) -> None:
        """Wait for the device and look.

        Raises:
            MeasurementError: a term was NaN or infinite; names those that broke first.
        """
        steps = least_over(self._broken_at.clone(), world=self._world).tolist()
        first = min(steps)
        if first != _NEVER:
            broken = [name for name, step in zip(self.names, steps, strict=True) if step == first]
            terms = [name for name in broken if name != LOSS] or broken  # the sum breaks with any
            raise MeasurementError(
                f"training: expected a finite loss, got NaN or infinity in {', '.join(terms)} in "
                f"epoch {epoch + 1} (step {first + 1}); {advice}"
            )

    def means(self) -> dict[str, float]:
        """Name → mean over the samples so far. Waits for the device."""
        totals = torch.cat([self._sums, self._samples[None]])
        *sums, samples = sum_over(totals, world=self._world).tolist()
        values = [total / samples for total in sums]
        return dict(zip(self.names, values, strict=True))
