"""Names that a user writes as patterns: modules of a network, nodes of a graph."""

from __future__ import annotations

import difflib
import fnmatch
from collections.abc import Sequence


def matching(pattern: str, names: Sequence[str]) -> list[str]:
    """Those that the pattern names, in order: fnmatch, case-sensitive; a star crosses dots."""
    return [name for name in names if fnmatch.fnmatchcase(name, pattern)]


def near(pattern: str, names: Sequence[str]) -> str:
    """What a message says of a pattern that matches nothing."""
    close = difflib.get_close_matches(pattern, names, n=3, cutoff=0.5)
    return f"near names: {', '.join(close)}" if close else f"it has {outermost(names)}"


def outermost(names: Sequence[str]) -> str:
    """The first names that lie in no other, for a message."""
    outer = [name for name in names if "." not in name]
    return ", ".join(outer[:12]) + (", …" if len(outer) > 12 else "") if outer else "none"
