"""What `compress init` writes a recipe with: paths, values and a limit the test set can decide."""

from __future__ import annotations

import os
from pathlib import Path

import yaml

from ..models.hf_folder import PREFIX as HF
from .measure.paired import provable_drop
from .recipe_file import PACKAGE, absolute

LIMITS = (1.0, 1.5, 2.0, 3.0, 5.0)  # points; the first that the test set can decide is proposed
USUAL_FLIPS = 0.04  # share of answers that int8 usually changes on nets of a few classes


def proposed_limit(n_test: int, *, flips: float = USUAL_FLIPS) -> float:
    """Points of drop: the first of LIMITS that this many test samples can decide where that share
    of the answers differs."""
    provable = 100 * provable_drop(n_test, flips=flips, confidence=0.95)
    return next((limit for limit in LIMITS if limit >= provable), LIMITS[-1])


def relative(path: Path, base: Path) -> str:
    """A path as a recipe in `base` writes it."""
    if str(path) == "digits":
        return "digits"
    return os.path.relpath(path.expanduser().resolve(), base)


def relative_model(model: str, base: Path) -> str:
    """The reference of a network, given beside the working directory, as a recipe in `base` writes
    it."""
    found = absolute(model, Path.cwd(), is_model=True)
    if found == model or model.startswith(HF + PACKAGE):
        return model
    if found.startswith(HF):
        return HF + os.path.relpath(found.removeprefix(HF), base)
    return os.path.relpath(found, base)


def scalar(value: object) -> str:
    """A value as YAML on one line."""
    text = yaml.safe_dump(value, default_flow_style=True, width=1000, allow_unicode=True)
    return text.removesuffix("...\n").strip()
