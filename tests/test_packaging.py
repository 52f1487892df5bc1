"""What is installed is what is there."""

from __future__ import annotations

import importlib
import tomllib
from pathlib import Path

import edgestill
import pytest

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def test_the_package_list_names_every_folder_with_an_init() -> None:
    folders = {
        ".".join(("edgestill", *path.parent.relative_to(ROOT).parts))
        for part in ("models", "exporters", "pipeline")
        for path in (ROOT / part).rglob("__init__.py")
    }

    assert set(PROJECT["tool"]["setuptools"]["packages"]) == folders | {"edgestill"}


def test_the_version_is_written_once_in_effect() -> None:
    assert PROJECT["project"]["version"] == edgestill.__version__


def test_the_public_names_are_these() -> None:
    assert edgestill.__all__ == [
        "EdgestillError",
        "GateSpec",
        "Recipe",
        "Report",
        "judge",
        "load_recipe",
        "run",
    ]
    assert all(getattr(edgestill, name) is not None for name in edgestill.__all__)


def test_an_unknown_public_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="nonsense"):
        edgestill.nonsense  # noqa: B018


@pytest.mark.parametrize("command", ["compress", "edgestill"])
def test_the_console_scripts_resolve(command: str) -> None:
    module, _, name = PROJECT["project"]["scripts"][command].partition(":")

    assert callable(getattr(importlib.import_module(module), name))


def test_the_changelog_knows_this_version() -> None:
    assert f"## {edgestill.__version__}" in (ROOT / "CHANGELOG.md").read_text()
