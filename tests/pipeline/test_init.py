"""`compress init` writes a recipe, says what it found, and guesses nothing silently."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from edgestill.pipeline.cli import entry
from edgestill.pipeline.recipe_file import load_recipe
from PIL import Image
from torch import nn


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Two classes of ten 12×16 images: the one dark, the other bright."""
    rng = np.random.default_rng(0)
    for level, name in ((0, "dark"), (180, "light")):
        (tmp_path / "photos" / name).mkdir(parents=True)
        for index in range(10):
            pixels = rng.integers(level, level + 60, (12, 16, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "photos" / name / f"{index}.png")
    return tmp_path / "photos"


def test_a_net_without_weights_gets_a_recipe_that_trains(photos: Path, tmp_path: Path) -> None:
    out = tmp_path / "recipe.yaml"

    assert entry(["init", "--model", "resnet20", "--data", str(photos), "-o", str(out)]) == 0

    recipe = load_recipe(str(out))
    assert recipe.student.train is not None
    assert recipe.data.train.path == str(photos)
    assert recipe.quantize is not None
    assert "20 images in 2 classes (10 to 10 a class)" in out.read_text()


def test_given_weights_get_the_preprocessing_they_answer_best_under(
    photos: Path, tmp_path: Path
) -> None:
    # a net that says "light" when the mean of its input exceeds 0.4, so [0, 1] suits it alone:
    # under ImageNet's mean and std "dark" is negative too, but so is what [-1, 1] makes of 0.35
    (tmp_path / "net.py").write_text(
        "from torch import nn\n"
        "class Bright(nn.Module):\n"
        "    def __init__(self):\n"
        "        super().__init__()\n"
        "        self.scale = nn.Linear(1, 2)\n"
        "    def forward(self, x):\n"
        "        return self.scale(x.mean((1, 2, 3)).unsqueeze(1))\n"
        "def build():\n"
        "    return Bright()\n"
    )
    scale = nn.Linear(1, 2)
    with torch.no_grad():
        scale.weight.copy_(torch.tensor([[-1.0], [1.0]]))
        scale.bias.copy_(torch.tensor([0.4, -0.4]))
    state = {f"scale.{name}": value for name, value in scale.state_dict().items()}
    torch.save(state, tmp_path / "w.pth")
    out = tmp_path / "recipe.yaml"
    net = f"{tmp_path}/net.py:build"

    code = entry(["init", "--model", net, "--weights", str(tmp_path / "w.pth"),
                  "--data", str(photos), "-o", str(out)])  # fmt: skip

    recipe = load_recipe(str(out))
    assert code == 0
    assert recipe.student.weights == str(tmp_path / "w.pth")
    assert recipe.student.model == net
    assert recipe.data.preprocess is not None
    assert recipe.data.preprocess.std is not None
    assert "[0, 1], RGB 100.0 %" in out.read_text()
    assert "check that it is what the net was trained with" in " ".join(out.read_text().split())


def test_an_existing_file_is_not_overwritten(
    photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "recipe.yaml"
    out.write_text("mine")

    assert entry(["init", "--model", "resnet20", "--data", str(photos), "-o", str(out)]) == 2
    assert out.read_text() == "mine"
    assert "exists already" in capsys.readouterr().err


def test_the_proposed_limit_is_one_the_test_set_can_decide(photos: Path, tmp_path: Path) -> None:
    out = tmp_path / "recipe.yaml"

    entry(["init", "--model", "plain_cnn_small", "--data", "digits", "-o", str(out)])

    # 359 test samples with 4 % flips prove 1.8 points
    assert load_recipe(str(out)).gate.max_drop_points == 2.0
