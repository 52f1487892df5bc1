"""The README says what is so: its commands run, its recipe is a recipe, its codes are the codes."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from edgestill.exporters.to_onnx import export_onnx
from edgestill.models.source import open_network
from edgestill.pipeline import errors
from edgestill.pipeline.recipe import Recipe
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    found = re.findall(r"^```(\w*)\n(.*?)^```$", README, flags=re.DOTALL | re.MULTILINE)
    return [text for name, text in found if name == language]


def in_order(language: str, **marks: str) -> list[str]:
    """The blocks of a language, the last of which with its mark is found for each of `marks`."""
    found = [next(b for b in reversed(blocks(language)) if mark in b) for mark in marks.values()]
    assert sorted(found) == sorted(blocks(language)), "a block that no test runs"
    return found


def commands() -> list[str]:
    lines = [line.split("#")[0].strip() for block in blocks("sh") for line in block.splitlines()]
    return [line for line in lines if line]


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory, small_run: Path) -> Path:
    """A folder as the README's reader has it: photos/, w.pth, release.yaml and a finished out/."""
    import shutil

    folder = tmp_path_factory.mktemp("readme")
    rng = np.random.default_rng(0)
    for level, name in enumerate(("daisy", "rose", "tulip")):
        (folder / "photos" / name).mkdir(parents=True)
        for index in range(12):
            pixels = rng.integers(80 * level, 80 * level + 60, (32, 32, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / "photos" / name / f"{index}.png")
    net = open_network("resnet18", args={}, classes=3, input_shape=(3, 32, 32), seed=0)
    torch.save(net.module.state_dict(), folder / "w.pth")
    small = open_network("resnet8", args={}, classes=3, input_shape=(3, 32, 32), seed=0)
    export_onnx(small.module, torch.zeros(2, 3, 32, 32), folder / "net.onnx", batch="dynamic")
    (folder / "release.yaml").write_text("max_drop_points: 50\n")
    shutil.copytree(small_run, folder / "out")
    return folder


def test_there_are_commands_to_run() -> None:
    assert len(commands()) == 15


def test_every_compress_command_runs(workplace: Path) -> None:
    ran = []
    for line in commands():
        words = shlex.split(line)
        if words[0] == "compress":
            words = [sys.executable, "-P", "-m", "edgestill", *words[1:]]
        elif words[:3] == ["python", "-m", "edgestill"]:
            words = [sys.executable, "-P", *words[1:]]
        else:
            continue
        done = subprocess.run(words, cwd=workplace, capture_output=True, text=True)
        # an untrained net on seven test images: the verdict may be any, but it is a verdict
        assert done.returncode in (0, 1, 3), f"{line}\n{done.stdout}{done.stderr}"
        ran.append(line)

    assert len(ran) == 13


@pytest.mark.parametrize("script", ["scripts/demo", "scripts/test"])
def test_the_two_scripts_are_there_and_ci_runs_the_suite(script: str) -> None:
    # the demo itself runs in scripts/wheel_check, the suite is this one
    assert script in commands()
    assert (ROOT / script).stat().st_mode & 0o111
    subprocess.run(["bash", "-n", str(ROOT / script)], check=True)
    assert "scripts/test" in (ROOT / ".ci" / "run").read_text()


def test_the_python_snippet_runs_beside_a_finished_run(workplace: Path) -> None:
    snippet, _ = in_order("python", images="steps", texts="Tokenizer")

    done = subprocess.run(
        [sys.executable, "-c", snippet], cwd=workplace, capture_output=True, text=True
    )

    assert done.returncode == 0, done.stderr
    assert "'9'" in done.stdout


def test_the_recipe_shown_is_a_recipe() -> None:
    whole, smaller, _ = in_order(
        "yaml", images="image-classification", smaller="prune:", texts="text-classification"
    )

    recipe = Recipe.model_validate(yaml.safe_load(whole) | yaml.safe_load(smaller))

    assert recipe.teacher is not None
    assert recipe.prune is not None


def test_the_recipe_for_texts_is_a_recipe(tmp_path: Path, texts: ModuleType) -> None:
    pytest.importorskip("transformers")
    *_, shown = in_order(
        "yaml", images="image-classification", smaller="prune:", texts="text-classification"
    )
    folder = texts.write_folder(tmp_path / "teacher")

    recipe = Recipe.model_validate(yaml.safe_load(shown.replace("hf:DIR", f"hf:{folder}")))

    assert recipe.is_text
    assert recipe.student.keep_layers == (0, 2, 5)


def test_the_exit_codes_shown_are_those_of_the_errors() -> None:
    shown = {int(code) for code in re.findall(r"^\| (\d+) \|", README, flags=re.MULTILINE)}
    raised = {
        value.exit_code
        for value in vars(errors).values()
        if isinstance(value, type) and issubclass(value, errors.EdgestillError)
    }

    assert shown == raised | {0, 1, 3}


def test_every_folder_in_the_tree_exists_and_every_folder_is_in_it() -> None:
    tree = next(block for block in blocks("") if block.startswith("pipeline/"))
    top = set(re.findall(r"^(\w+)/", tree, flags=re.MULTILINE))
    inner = set(re.findall(r"^  (\w+)/", tree, flags=re.MULTILINE))

    assert all((ROOT / name).is_dir() for name in top)
    real = {p.name for p in (ROOT / "pipeline").iterdir() if p.is_dir() and p.name[0] not in "._"}
    assert inner == real


def test_the_names_of_networks_and_recipes_are_real(compress: Any) -> None:
    from edgestill.models.zoo import ZOO
    from edgestill.pipeline.recipe_file import shipped_recipes

    assert all(f"`{name}`" in README for name in shipped_recipes())
    assert all(
        name in README for name in ZOO if not re.fullmatch(r"resnet(14|20|32|44|56|110)", name)
    )
