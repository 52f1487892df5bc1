"""Paths that the user names: what they match, and what a match protects."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from ...models.paths import matching, near
from ...models.plan import is_within
from ..errors import RecipeError


def find_protected(network: nn.Module, patterns: Sequence[str]) -> tuple[str, ...]:
    """Paths of the modules that the patterns name, in the modules' order.

    Args:
        patterns: full paths or globs over them (fnmatch, case-sensitive; a star crosses dots).
    Raises:
        RecipeError: patterns that match nothing, one a line, with near names.
    """
    names = [name for name, _ in network.named_modules(remove_duplicate=False) if name]
    problems = [
        f"prune.protect: no module named {pattern!r} in {type(network).__name__}; "
        f"{near(pattern, names)}"
        for pattern in patterns
        if not matching(pattern, names)
    ]
    if problems:
        raise RecipeError("\n".join(problems))
    found = {name for pattern in patterns for name in matching(pattern, names)}
    return tuple(name for name in names if name in found)


def is_protected(path: str, protected: Sequence[str]) -> bool:
    """Whether the module at `path` is protected, or inside one that is."""
    return any(is_within(path, block) for block in protected)
