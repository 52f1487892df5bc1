"""The recipe of `compress quantize MODEL.onnx --data …`: what the command line says, as a wish.

How images are prepared comes from the file itself, where this project wrote it, or from the
command line; it is not guessed. No torch.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .errors import UsageError
from .recipe import PreprocessSpec, Recipe
from .recipe_file import BUILT_IN_DATA, Document, complete

TEST_FRACTION = 0.2  # of a set that comes without a test set; `compress init` takes it too


@dataclass(frozen=True)
class Given:
    """What the command line says of the images. Numbers are in units of pixel / 255."""

    data: str
    test: str | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    resize: int | None = None
    crop: int | None = None


def recipe_for_file(
    model: Path, given: Given, *, targets: Sequence[str], overrides: Sequence[str] = ()
) -> Recipe:
    """A recipe that quantizes the float file `model` and judges it against itself.

    Raises:
        UsageError: nothing says how images are prepared.
        ExportError: the file cannot be read. RecipeError: an option or override is wrong.
    """
    document: dict[str, Any] = {
        "data": {
            "train": {"path": _absolute(given.data)},
            "test": {"path": _absolute(given.test)} if given.test else {"fraction": TEST_FRACTION},
            "preprocess": preprocess_of(model, given),
        },
        "student": {"model": str(model.expanduser().resolve())},
        "quantize": {"targets": list(targets)},
    }
    return complete(Document(model.name, document, {}), overrides=overrides)


def _absolute(path: str) -> str:
    return path if path in BUILT_IN_DATA else str(Path(path).expanduser().resolve())


def preprocess_of(model: Path, given: Given) -> dict[str, Any]:
    """The recipe's `data.preprocess` for this file: what it says of itself, and what is said of it.

    Raises:
        UsageError: mean and std stand nowhere. ExportError: the file cannot be read.
    """
    from ..exporters.graph import read_model  # onnx, only where it is needed

    found = {entry.key: entry.value for entry in read_model(model).metadata_props}
    known: dict[str, Any] = {}
    if "edgestill.preprocess" in found:
        stored = json.loads(found["edgestill.preprocess"])
        known = {key: stored[key] for key in PreprocessSpec.model_fields if key in stored}
    said = {"mean": given.mean, "std": given.std, "resize": given.resize, "crop": given.crop}
    known |= {key: value for key, value in said.items() if value is not None}
    if known.get("mean") is None or known.get("std") is None:
        raise UsageError(
            f"{model}: it does not say how its images were prepared, and that is not guessed: give "
            "--mean and --std of its training, e.g. --mean 0.485,0.456,0.406 --std "
            "0.229,0.224,0.225, with --resize and --crop if images have other sizes"
        )
    return known
