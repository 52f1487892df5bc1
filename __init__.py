"""edgestill: make a small .onnx from a large teacher or a trained net, with proof.

    from edgestill import load_recipe, run
    report = run(load_recipe("digits"), Path("out"))

Importing this package loads neither torch nor onnxruntime.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = ["EdgestillError", "GateSpec", "Recipe", "Report", "judge", "load_recipe", "run"]

if TYPE_CHECKING:
    from .pipeline.errors import EdgestillError as EdgestillError
    from .pipeline.flow import run as run
    from .pipeline.gate import judge as judge
    from .pipeline.policy import GateSpec as GateSpec
    from .pipeline.recipe import Recipe as Recipe
    from .pipeline.recipe_file import load_recipe as load_recipe
    from .pipeline.report import Report as Report

_HOMES = {
    "EdgestillError": "errors",
    "GateSpec": "policy",
    "Recipe": "recipe",
    "Report": "report",
    "judge": "gate",
    "load_recipe": "recipe_file",
    "run": "flow",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"{__name__}.pipeline.{_HOMES[name]}"), name)
