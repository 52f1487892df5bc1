"""The stages and the flow that joins them. Importing this loads neither torch nor onnxruntime."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .flow import run as run
    from .recipe_file import load_recipe as load_recipe

__all__ = ["load_recipe", "run"]


def __getattr__(name: str) -> Any:
    if name == "run":
        from .flow import run

        return run
    if name == "load_recipe":
        from .recipe_file import load_recipe

        return load_recipe
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
