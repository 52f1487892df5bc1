"""What the zoo's nets share: channel rounding and weight initialisation. No layers of its own."""

from __future__ import annotations

from torch import nn


def divisible(channels: float, divisor: int = 8) -> int:
    """The multiple of `divisor` nearest to `channels`, at least one, never 10 % too few.

    Source: the rounding of MobileNet (Sandler et al. 2018, their reference code), so that widths
    agree with published checkpoints.
    """
    rounded = max(divisor, int(channels + divisor / 2) // divisor * divisor)
    return rounded + divisor if rounded < 0.9 * channels else rounded


def init_kaiming(module: nn.Module) -> None:
    """Convolutions by He et al. 2015 (fan out, gain of ReLU); BatchNorm is the identity."""
    for part in module.modules():
        if isinstance(part, nn.Conv2d):
            nn.init.kaiming_normal_(part.weight, mode="fan_out", nonlinearity="relu")
            if part.bias is not None:
                nn.init.zeros_(part.bias)
        elif isinstance(part, nn.BatchNorm2d):
            nn.init.ones_(part.weight)
            nn.init.zeros_(part.bias)
