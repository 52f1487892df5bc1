"""Sums of the loss terms, kept on the device: a step adds to them and never waits for them."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from ..errors import MeasurementError

_NEVER = 2**62


class Meter:
    """Sample-weighted sums of named loss terms over an epoch, and where one first broke."""

    def __init__(self, names: tuple[str, ...], *, device: str) -> None:
        self.names = names
        self._sums = torch.zeros(len(names), dtype=torch.float64, device=device)
        self._broken_at = torch.full((len(names),), _NEVER, dtype=torch.int64, device=device)
        self._samples = 0

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
        steps = self._broken_at.tolist()
        first = min(steps)
        if first != _NEVER:
            broken = [name for name, step in zip(self.names, steps, strict=True) if step == first]
            raise MeasurementError(
                f"training: expected a finite loss, got NaN or infinity in {', '.join(broken)} in "
                f"epoch {epoch + 1} (step {first + 1}); {advice}"
            )

    def means(self) -> dict[str, float]:
        """Name → mean over the samples so far. Waits for the device."""
        values = (self._sums / self._samples).tolist()
        return dict(zip(self.names, values, strict=True))
