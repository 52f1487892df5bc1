"""One thread, small nets of many kinds, and a data folder of 60 small images in three classes."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch
from edgestill.pipeline.data.stage import prepare_data
from edgestill.pipeline.recipe import DataSpec
from edgestill.pipeline.stage import Context, Silent
from PIL import Image


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def nets() -> ModuleType:
    """nets.py, which tests cannot import under `--import-mode=importlib`."""
    spec = importlib.util.spec_from_file_location(
        "pruned_nets", Path(__file__).with_name("nets.py")
    )
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """`.data`: the folder of the data stage, images of 8 × 8 in three classes."""
    root = tmp_path_factory.mktemp("prune")
    generator = np.random.default_rng(0)
    for label, colour in enumerate(("red", "green", "blue")):
        (root / "images" / colour).mkdir(parents=True)
        for index in range(30):
            pixels = generator.integers(0, 120, (8, 8, 3), dtype=np.uint8)
            pixels[..., label] += 90
            Image.fromarray(pixels).save(root / "images" / colour / f"{index}.png")
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
    return SimpleNamespace(data=scratch, root=root)
