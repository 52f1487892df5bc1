"""A labelled set before anything is decoded or tokenized: what every reader returns."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

# An encoded file, where it lies, decoded pixels (H, W), or None for a row without an image;
# or a text, or two that belong together.
Encoded = bytes | Path | npt.NDArray[np.uint8] | tuple[str, ...] | None

NO_LABEL = -1


@dataclass(frozen=True, eq=False)
class Source:
    """Contents come as a stream, in the order of `labels` and `names`; labels are already known.

    Attributes:
        where: the set as the user wrote it, for messages.
        labels: int64 (N,), index into `class_names`, or NO_LABEL where the data holds none.
        class_names: a name a label.
        numbered: the names are only the numbers themselves, "0" to "C-1".
        names: (N,) of each sample, relative to the set: the same wherever the set lies.
        contents: starts the stream anew.
        max_value: pixel value that means white.
        ignored: files or rows that were passed over: hidden, no images, without a text.
        labelled: false where no sample needs a label; then all are NO_LABEL and no class is named.
    """

    where: str
    labels: npt.NDArray[np.int64]
    class_names: tuple[str, ...]
    numbered: bool
    names: list[str]
    contents: Callable[[], Iterator[Encoded]]
    max_value: float = 255.0
    ignored: int = 0
    labelled: bool = True

    def __len__(self) -> int:
        return len(self.names)


def listing(names: Iterable[object], *, limit: int = 20) -> str:
    """`a, b, c … (77 in all)`: names for a message."""
    words = [str(name) for name in names]
    shown = ", ".join(words[:limit])
    return shown if len(words) <= limit else f"{shown}, … ({len(words)} in all)"
