"""MobileNetV2 (Sandler et al. 2018, table 2) with torchvision's parameter names and width rule.

`stem: small` is for images of about 32 pixels: the first convolution and the second stage keep
their stride at 1, so 32 × 32 ends at 4 × 4 instead of 1 × 1.

Ends of resolution stages: `features.1` (stride 2), `features.3` (4), `features.6` (8),
`features.13` (16), `features.17` (32); with the small stem 1, 1, 2, 4, 8. The last 1 × 1
convolution is `features.18`; classifier: `classifier.1`.
"""

from __future__ import annotations

from typing import Literal

from torch import Tensor, nn

from .layers import divisible, init_kaiming

Stem = Literal["large", "small"]

# expansion, channels, blocks, stride of the first block (table 2 of the paper)
STAGES = (
    (1, 16, 1, 1),
    (6, 24, 2, 2),
    (6, 32, 3, 2),
    (6, 64, 4, 2),
    (6, 96, 3, 1),
    (6, 160, 3, 2),
    (6, 320, 1, 1),
)


def mobilenetv2(
    classes: int,
    in_channels: int,
    *,
    width: float = 1.0,
    stem: Stem = "large",
    dropout: float = 0.2,
) -> nn.Module:
    """3.5 M parameters with 1,000 classes. `dropout` acts before the classifier."""
    return MobileNetV2(classes, in_channels=in_channels, width=width, stem=stem, dropout=dropout)


class MobileNetV2(nn.Module):
    """(N, in_channels, H, W) → (N, classes)."""

    def __init__(
        self, classes: int, *, in_channels: int, width: float, stem: Stem, dropout: float
    ) -> None:
        super().__init__()
        channels = divisible(32 * width)
        last = divisible(1280 * max(1.0, width))  # the paper never narrows it
        layers: list[nn.Module] = [
            _conv_norm(in_channels, channels, stride=1 if stem == "small" else 2)
        ]
        for number, (expansion, base, blocks, stride) in enumerate(STAGES):
            first = 1 if stem == "small" and number == 1 else stride
            for block in range(blocks):
                outputs = divisible(base * width)
                step = first if block == 0 else 1
                layers.append(InvertedResidual(channels, outputs, stride=step, expansion=expansion))
                channels = outputs
        layers.append(_conv_norm(channels, last, kernel=1))
        self.features = nn.Sequential(*layers)
        self.pool = nn.AdaptiveAvgPool2d(1)
        linear = nn.Linear(last, classes)
        self.classifier = nn.Sequential(nn.Dropout(dropout), linear)
        init_kaiming(self)
        nn.init.normal_(linear.weight, std=0.01)
        nn.init.zeros_(linear.bias)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.classifier(self.pool(self.features(x)).flatten(1))
        return logits


class InvertedResidual(nn.Module):
    """Widen 1 × 1, depthwise 3 × 3, narrow 1 × 1 without activation; residual if shapes agree."""

    def __init__(self, inputs: int, outputs: int, *, stride: int, expansion: int) -> None:
        super().__init__()
        hidden = inputs * expansion
        widen = [] if expansion == 1 else [_conv_norm(inputs, hidden, kernel=1)]
        self.conv = nn.Sequential(
            *widen,
            _conv_norm(hidden, hidden, stride=stride, groups=hidden),
            nn.Conv2d(hidden, outputs, 1, bias=False),
            nn.BatchNorm2d(outputs),
        )
        self.is_residual = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.conv(x)
        return x + y if self.is_residual else y


def _conv_norm(
    inputs: int, outputs: int, *, kernel: int = 3, stride: int = 1, groups: int = 1
) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(
            inputs, outputs, kernel, stride=stride, padding=kernel // 2, groups=groups, bias=False
        ),
        nn.BatchNorm2d(outputs),
        nn.ReLU6(inplace=True),
    )
