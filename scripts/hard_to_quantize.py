"""A narrow net in the manner of MobileNetV3, for benchmarks: what int8 by calibration finds hard.

Hard-swish lets activations be negative and large, squeeze-and-excitation scales channels apart,
and layers of few channels have nothing to average errors with.
"""

from __future__ import annotations

from torch import Tensor, nn

# expansion, channels, stride
BLOCKS = ((3, 16, 1), (4, 24, 2), (4, 24, 1), (4, 40, 2), (4, 40, 1), (4, 64, 1))


def narrow(classes: int, in_channels: int) -> nn.Module:
    layers: list[nn.Module] = [conv(in_channels, 16, kernel=3, stride=2), nn.Hardswish()]
    channels = 16
    for expansion, outputs, stride in BLOCKS:
        layers.append(Block(channels, outputs, expansion=expansion, stride=stride))
        channels = outputs
    layers += [conv(channels, 256), nn.Hardswish(), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    return nn.Sequential(*layers, nn.Linear(256, classes))


def conv(
    inputs: int, outputs: int, *, kernel: int = 1, stride: int = 1, groups: int = 1
) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False),
        nn.BatchNorm2d(outputs),
    )


class Block(nn.Module):
    """Widen, depthwise, squeeze and excite, narrow; residual where shapes agree."""

    def __init__(self, inputs: int, outputs: int, *, expansion: int, stride: int) -> None:
        super().__init__()
        hidden = inputs * expansion
        self.before = nn.Sequential(
            conv(inputs, hidden), nn.Hardswish(),
            conv(hidden, hidden, kernel=3, stride=stride, groups=hidden), nn.Hardswish(),
        )  # fmt: skip
        self.excite = nn.Sequential(
            nn.AdaptiveAvgPool2d(1), nn.Conv2d(hidden, hidden // 4, 1), nn.ReLU(),
            nn.Conv2d(hidden // 4, hidden, 1), nn.Hardsigmoid(),
        )  # fmt: skip
        self.after = conv(hidden, outputs)
        self.is_residual = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.before(x)
        y = self.after(y * self.excite(y))
        return x + y if self.is_residual else y
