"""A look at a set before any stage: a few images of it, decoded, and what they have in common."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from PIL import Image

from ..errors import DataError
from ..recipe import PreprocessSpec, SourceSpec
from .decode import decode_in_thread, quiet
from .preprocess import canvas_size, centre_crop, input_size, to_canvas, to_input
from .readers import open_source
from .source import NO_LABEL, Source

Array = np.ndarray[Any, Any]

LOOKED_AT = 256  # images opened, spread over the set


@dataclass(frozen=True)
class Look:
    """What was found: a sample of the images, and the whole set's labels."""

    source: Source
    images: list[Image.Image]
    labels: list[int]

    @property
    def sizes(self) -> set[tuple[int, int]]:
        return {(image.height, image.width) for image in self.images}

    @property
    def usual_side(self) -> int:
        return int(median(min(size) for size in ((i.height, i.width) for i in self.images)))


def source_at(path: Path) -> SourceSpec:
    """The set that the command line names: `digits`, or a path."""
    return SourceSpec(path=str(path) if str(path) == "digits" else str(path.expanduser().resolve()))


def look_at(spec: SourceSpec, *, count: int = LOOKED_AT) -> Look:
    """Open up to `count` labelled images, spread over the set.

    Raises:
        DataError: none can be opened.
    """
    source = open_source(spec)
    stride = max(1, len(source.labels) // count)
    images, labels = [], []
    with quiet():
        for index, encoded in islice(enumerate(source.contents()), 0, None, stride):
            if source.labels[index] == NO_LABEL or encoded is None:
                continue
            assert not isinstance(encoded, tuple), "a look is at images"
            if isinstance(encoded, np.ndarray):
                images.append(Image.fromarray(encoded))
            else:
                content = encoded.read_bytes() if isinstance(encoded, Path) else encoded
                images.append(decode_in_thread(content, where=source.names[index]))
            labels.append(int(source.labels[index]))
    if not images:
        raise DataError(f"{spec.path}: no image of {len(source.labels)} could be looked at")
    return Look(source, images, labels)


def inputs_of(images: Sequence[Image.Image], spec: PreprocessSpec) -> Array:
    """What a network sees of these images, float32 (N, C, h, w)."""
    pixels = []
    for image in images:
        canvas = canvas_size(spec, (image.height, image.width))
        pixels.append(centre_crop(to_canvas(image, spec, canvas)[None], input_size(spec, canvas)))
    return to_input(np.concatenate(pixels), spec)
