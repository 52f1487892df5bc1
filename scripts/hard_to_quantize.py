"""A narrow depthwise-separable net, for benchmarks, and what makes it hard to quantize.

`spread` gives the channels behind each depthwise layer scales of their own without changing what
the net computes, ReLU(k·x) being k·ReLU(x): the state in which Nagel et al. 2019 found MobileNets.
One scale of uint8 for all channels then leaves the small ones a few steps.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

# channels, stride
BLOCKS = ((24, 1), (32, 2), (32, 1), (64, 2), (64, 1), (96, 1))


def narrow(classes: int, in_channels: int) -> nn.Module:
    layers: list[nn.Module] = [conv(in_channels, 16, kernel=3, stride=2), nn.ReLU()]
    channels = 16
    for outputs, stride in BLOCKS:
        layers.append(Separable(channels, outputs, stride=stride))
        channels = outputs
    layers += [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, classes)]
    return nn.Sequential(*layers)


def conv(
    inputs: int, outputs: int, *, kernel: int = 1, stride: int = 1, groups: int = 1
) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False),
        nn.BatchNorm2d(outputs),
    )


class Separable(nn.Module):
    """Widen fourfold, depthwise, narrow; residual where shapes agree."""

    def __init__(self, inputs: int, outputs: int, *, stride: int) -> None:
        super().__init__()
        hidden = 4 * inputs
        self.widen = conv(inputs, hidden)
        self.depth = conv(hidden, hidden, kernel=3, stride=stride, groups=hidden)
        self.narrow = conv(hidden, outputs)
        self.is_residual = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.narrow(self.depth(self.widen(x).relu()).relu())
        return x + y if self.is_residual else y


@torch.no_grad()
def spread(net: nn.Module, *, decades: float) -> None:
    """In place, from torch's global generator."""
    for block in net.modules():
        # user code is loaded under a name of its own, so its class is not the one above
        if type(block).__name__ == Separable.__name__:
            _, norm = block.depth
            pointwise, _ = block.narrow
            scales = torch.logspace(-decades / 2, decades / 2, norm.num_features)
            scales = scales[torch.randperm(len(scales))]
            norm.weight.mul_(scales)
            norm.bias.mul_(scales)
            pointwise.weight.div_(scales[None, :, None, None])
