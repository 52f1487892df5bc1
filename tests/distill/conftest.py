"""A prepared data folder of 60 small images in three classes, and a network to learn them."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
from edgestill.pipeline.data.stage import prepare_data
from edgestill.pipeline.recipe import DataSpec
from edgestill.pipeline.stage import Context, Silent
from PIL import Image

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
def prepared(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """`.data`: the folder of the data stage; `.factory`: FILE.py:make."""
    root = tmp_path_factory.mktemp("distill")
    generator = np.random.default_rng(0)
    for label, colour in enumerate(("red", "green", "blue")):
        (root / "images" / colour).mkdir(parents=True)
        for index in range(30):
            pixels = generator.integers(0, 120, (8, 8, 3), dtype=np.uint8)
            pixels[..., label] += 90
            Image.fromarray(pixels).save(root / "images" / colour / f"{index}.png")
    (root / "net.py").write_text(FACTORY)
    scratch = root / "data"
    scratch.mkdir()
    spec = DataSpec.model_validate(
        {
            "train": {"path": str(root / "images")},
            "test": {"fraction": 0.2},
            "validation": 0.3,
            "calibration": 8,
            "preprocess": {"mean": [0.3, 0.3, 0.3], "std": [0.2, 0.2, 0.2]},
        }
    )
    prepare_data(spec, context=Context(0, 1, "cpu", scratch, Silent()))
    return SimpleNamespace(data=scratch, factory=f"{root / 'net.py'}:make", root=root)
