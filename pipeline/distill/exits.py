"""Exits of a network at its shallower stages, so that its deepest one can teach them (BYOT).

Zhang et al. 2019, "Be your own teacher": a bottleneck brings each stage's features to the depth and
size of the last, a classifier answers from there. Here the bottleneck is separable convolutions of
stride 2, as in the authors' published code; the paper's third term, an L2 distance of features
weighted by 1e-6, is left out: `hint` does that with a weight one can feel.
"""

from __future__ import annotations

import itertools
import math

from torch import Tensor, nn


class Exit(nn.Module):
    """Features (N, C, H, W) of a stage → logits (N, classes)."""

    def __init__(self, stage: tuple[int, ...], deepest: tuple[int, ...], classes: int) -> None:
        """Args: stage, deepest: shapes (C, H, W), found by a dry forward."""
        super().__init__()
        halvings = max(0, math.ceil(math.log2(max(1.0, stage[1] / deepest[1]))))
        widths = [
            round(stage[0] * (deepest[0] / stage[0]) ** (step / max(1, halvings)))
            for step in range(halvings + 1)
        ]
        widths[-1] = deepest[0]
        layers: list[nn.Module] = []
        for inputs, outputs in itertools.pairwise(widths):
            layers += _separable(inputs, outputs)
        if not layers and stage[0] != deepest[0]:
            layers += [nn.Conv2d(stage[0], deepest[0], 1, bias=False), nn.BatchNorm2d(deepest[0])]
        self.bottleneck = nn.Sequential(*layers)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Linear(deepest[0], classes)

    def forward(self, features: Tensor) -> Tensor:
        logits: Tensor = self.classifier(self.pool(self.bottleneck(features)).flatten(1))
        return logits


def _separable(inputs: int, outputs: int) -> list[nn.Module]:
    """3 × 3 depthwise of stride 2, 1 × 1 to the new width."""
    return [
        nn.Conv2d(inputs, inputs, 3, stride=2, padding=1, groups=inputs, bias=False),
        nn.BatchNorm2d(inputs),
        nn.ReLU(),
        nn.Conv2d(inputs, outputs, 1, bias=False),
        nn.BatchNorm2d(outputs),
        nn.ReLU(),
    ]
