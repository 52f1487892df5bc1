"""Small networks with every structure the exporters treat specially, exported once a session."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from edgestill.exporters.graph import read_model
from edgestill.exporters.to_onnx import export_onnx
from onnx import ModelProto
from torch import Tensor, nn


class SmallNet(nn.Module):
    """Conv-BN-ReLU, depthwise + ReLU6, a residual Add, and a BatchNorm that follows the Add."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.stem_bn = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.depth = nn.Conv2d(8, 8, 3, padding=1, groups=8, bias=False)
        self.depth_bn, self.relu6 = nn.BatchNorm2d(8), nn.ReLU6()
        self.point, self.point_bn = nn.Conv2d(8, 8, 1, bias=False), nn.BatchNorm2d(8)
        self.lonely_bn = nn.BatchNorm2d(8)
        self.down, self.head = nn.Conv2d(8, 16, 3, stride=2), nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.stem_bn(self.stem(x)))
        y = self.relu6(self.depth_bn(self.depth(x)))
        x = torch.relu(self.lonely_bn(x + self.point_bn(self.point(y))))
        return self.head(torch.relu(self.down(x)).mean((2, 3)))


def make_net(seed: int = 0) -> SmallNet:
    """With statistics in its BatchNorms and weights large enough that the logits differ."""
    torch.manual_seed(seed)
    net = SmallNet()
    nn.init.normal_(net.head.weight, std=2.0)
    with torch.no_grad():
        for _ in range(3):
            net(torch.from_numpy(images(16)))
    return net


def images(n: int, *, side: int = 16, seed: int = 1) -> np.ndarray:
    """Smooth coloured gradients with a bright square, float32 (n, 3, side, side), about ±2."""
    rng = np.random.default_rng(seed)
    axis = np.linspace(-1, 1, side, dtype=np.float32)
    slopes = rng.normal(size=(n, 3, 2)).astype(np.float32)
    picture = slopes[..., :1, None] * axis[:, None] + slopes[..., 1:, None] * axis
    for image, (row, column) in zip(picture, rng.integers(0, side - 4, (n, 2)), strict=True):
        image[:, row : row + 4, column : column + 4] += rng.normal(size=(3, 1, 1))
    return picture


@pytest.fixture(scope="session")
def net() -> SmallNet:
    return make_net()


@pytest.fixture(scope="session")
def samples() -> np.ndarray:
    return images(64)


@pytest.fixture(scope="session")
def exported(net, samples, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("exported") / "raw.onnx"
    export_onnx(net, torch.from_numpy(samples[:2]), path, batch="dynamic")
    return path


@pytest.fixture(scope="session")
def raw(exported) -> ModelProto:
    return read_model(exported)
