"""ResNets for 32 × 32 images (He et al. 2015, §4.2): three stages of 16, 32 and 64 channels.

Depth 6n + 2, shortcut option A: where the shape changes, the input is strided and padded with zero
channels, so no shortcut has a parameter. Parameter names are those of
akamaster/pytorch_resnet_cifar10, whose published weights load as they are.

Ends of resolution stages: `layer1` (stride 1), `layer2` (2), `layer3` (4); classifier: `linear`.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from .layers import divisible


def resnet8(classes: int, in_channels: int, *, width: float = 1.0) -> nn.Module:
    """0.08 M parameters, 12 M multiply-adds at 32 × 32. `width` scales every stage's channels."""
    return CifarResNet(1, classes, in_channels=in_channels, width=width)


def resnet14(classes: int, in_channels: int, *, width: float = 1.0) -> nn.Module:
    """0.17 M parameters, 27 M multiply-adds at 32 × 32."""
    return CifarResNet(2, classes, in_channels=in_channels, width=width)


def resnet20(classes: int, in_channels: int, *, width: float = 1.0) -> nn.Module:
    """0.27 M parameters, 41 M multiply-adds at 32 × 32."""
    return CifarResNet(3, classes, in_channels=in_channels, width=width)


def resnet32(classes: int, in_channels: int, *, width: float = 1.0) -> nn.Module:
    """0.46 M parameters."""
    return CifarResNet(5, classes, in_channels=in_channels, width=width)


def resnet44(classes: int, in_channels: int, *, width: float = 1.0) -> nn.Module:
    """0.66 M parameters."""
    return CifarResNet(7, classes, in_channels=in_channels, width=width)


def resnet56(classes: int, in_channels: int, *, width: float = 1.0) -> nn.Module:
    """0.85 M parameters, 127 M multiply-adds at 32 × 32."""
    return CifarResNet(9, classes, in_channels=in_channels, width=width)


def resnet110(classes: int, in_channels: int, *, width: float = 1.0) -> nn.Module:
    """1.7 M parameters."""
    return CifarResNet(18, classes, in_channels=in_channels, width=width)


class CifarResNet(nn.Module):
    """`blocks` basic blocks in each of three stages; (N, in_channels, H, W) → (N, classes)."""

    def __init__(self, blocks: int, classes: int, *, in_channels: int, width: float) -> None:
        super().__init__()
        # multiples of 4: 16 · 0.25 is the narrowest net that is still asked for
        first, second, third = (divisible(c * width, 4) for c in (16, 32, 64))
        self.conv1 = nn.Conv2d(in_channels, first, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(first)
        self.relu = nn.ReLU(inplace=True)
        self.layer1 = _stage(first, first, blocks, stride=1)
        self.layer2 = _stage(first, second, blocks, stride=2)
        self.layer3 = _stage(second, third, blocks, stride=2)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.linear = nn.Linear(third, classes)
        for part in self.modules():
            if isinstance(part, nn.Conv2d | nn.Linear):
                nn.init.kaiming_normal_(part.weight)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        logits: Tensor = self.linear(self.pool(x).flatten(1))
        return logits


class BasicBlock(nn.Module):
    """Two 3 × 3 convolutions around a shortcut without parameters."""

    def __init__(self, inputs: int, outputs: int, *, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.relu = nn.ReLU(inplace=True)
        self.stride = stride
        self.added = outputs - inputs  # zero channels, half of them before and half after

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        result: Tensor = self.relu(y + self._shortcut(x))
        return result

    def _shortcut(self, x: Tensor) -> Tensor:
        if self.stride > 1:
            x = x[:, :, :: self.stride, :: self.stride]
        if self.added:
            before = self.added // 2
            x = F.pad(x, (0, 0, 0, 0, before, self.added - before))
        return x


def _stage(inputs: int, outputs: int, blocks: int, *, stride: int) -> nn.Sequential:
    first = BasicBlock(inputs, outputs, stride=stride)
    return nn.Sequential(
        first, *(BasicBlock(outputs, outputs, stride=1) for _ in range(blocks - 1))
    )
