"""Small nets of many kinds."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest


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
