"""A network to learn three classes of small images."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

FACTORY = """
from torch import nn


def make(classes, in_channels, width=4):
    return nn.Sequential(
        nn.Conv2d(in_channels, width, 3, padding=1, bias=False),
        nn.BatchNorm2d(width),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Dropout(0.1),
        nn.Linear(4 * width, classes),
    )
"""


@pytest.fixture(scope="session")
def prepared(
    coloured: SimpleNamespace, tmp_path_factory: pytest.TempPathFactory
) -> SimpleNamespace:
    """`.data`: the folder of the data stage; `.factory`: FILE.py:make."""
    root = tmp_path_factory.mktemp("distill")
    (root / "net.py").write_text(FACTORY)
    return SimpleNamespace(
        data=coloured.data, factory=f"{root / 'net.py'}:make", root=coloured.root
    )
