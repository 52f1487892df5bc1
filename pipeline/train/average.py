"""Exponential moving average of a network's weights and buffers.

    shadow ← d·shadow + (1 - d)·live,   d = min(decay, (1 + step) / (10 + step))

The rising d is TensorFlow's `ExponentialMovingAverage(num_updates=…)`: without it the random
initial weights would still weigh 0.999^1000 = 37 % after a thousand steps. Buffers are averaged
too, for BatchNorm's statistics must belong to the weights that ship with them; integer buffers
(counters) are copied.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn


def tensors_of(module: nn.Module) -> dict[str, Tensor]:
    """Name → live tensor of everything that is saved with the network. Detached, not copied."""
    return {k: v.detach() for k, v in module.state_dict().items() if isinstance(v, Tensor)}


def copy_of(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same tensors, in memory of their own."""
    return {name: tensor.clone() for name, tensor in state.items()}


@torch.no_grad()
def assign(target: Mapping[str, Tensor], source: Mapping[str, Tensor]) -> None:
    """Copy `source` into the tensors of `target`, in place. The names must be the same."""
    assert target.keys() == source.keys()
    for name, tensor in target.items():
        tensor.copy_(source[name])


class Average:
    """The averaged twin of one network's state."""

    def __init__(self, module: nn.Module, *, decay: float) -> None:
        self.decay = decay
        self.live = tensors_of(module)
        self.shadow = copy_of(self.live)

    @torch.no_grad()
    def update(self, *, step: int) -> None:
        """Take in the live state after optimiser step number `step` (0-based)."""
        weight = 1 - min(self.decay, (1 + step) / (10 + step))
        smooth = [name for name, tensor in self.live.items() if tensor.is_floating_point()]
        shadows, lives = [self.shadow[n] for n in smooth], [self.live[n] for n in smooth]
        torch._foreach_lerp_(shadows, lives, weight)
        for name in self.live.keys() - set(smooth):
            self.shadow[name].copy_(self.live[name])

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Let the network compute with the average; its own state is put back, bit for bit."""
        kept = copy_of(self.live)
        assign(self.live, self.shadow)
        try:
            yield
        finally:
            assign(self.live, kept)
