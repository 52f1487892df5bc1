"""Images of a recipe's sets → canvases of one size, stored in one file a set."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from ..errors import DataError
from ..recipe import DataSpec, PreprocessSpec
from ..stage import Context
from .dataset import UNLABELLED
from .ingest import Ingested, ingest, take_census
from .parts import Part
from .preprocess import Size, canvas_size, centre_crop, input_size
from .source import Source

# One grey level of 8 bits: a channel that varies less carries nothing, and 0 would divide by it.
STD_FLOOR = 0.0039
_ROWS_AT_ONCE = 1024


def read_images(
    spec: DataSpec, sources: Mapping[str, Source], *, context: Context
) -> tuple[dict[str, Ingested], PreprocessSpec]:
    """All sets, decoded into `context.resume`; the preprocessing with its crop settled.

    Raises:
        DataError: images of several sizes and no crop, or what `ingest` refuses.
    """
    preprocess, canvas = _plan(spec.preprocess, sources, threads=context.threads)
    return _ingest_all(spec, sources, preprocess, canvas=canvas, context=context), preprocess


def _plan(
    spec: PreprocessSpec | None, sources: Mapping[str, Source], *, threads: int
) -> tuple[PreprocessSpec, Size]:
    """Preprocessing with its crop settled, and the canvas's size; headers are read if needed."""
    if spec is not None and spec.resize is not None:
        canvas = canvas_size(spec, None)
        return spec.model_copy(update={"crop": input_size(spec, canvas)}), canvas
    census = {part: take_census(source, threads=threads) for part, source in sources.items()}
    sizes = sum((found.sizes for found in census.values()), Counter[Size]())
    if not sizes:
        raise DataError(f"{sources['train'].where}: none of its images can be read")
    if spec is None:
        # what the network takes is settled by the sets that say what it is for
        grey = all(found.grey for part, found in census.items() if part != UNLABELLED)
        spec = PreprocessSpec(
            channels="gray" if grey else "rgb",
            max_value=sources["train"].max_value,
        )
    if len(sizes) > 1 and spec.crop is None:
        raise DataError(_sizes_differ(sizes, sources))
    native = next(iter(sizes)) if len(sizes) == 1 else None
    canvas = canvas_size(spec, native)
    return spec.model_copy(update={"crop": input_size(spec, canvas)}), canvas


def _sizes_differ(sizes: Counter[Size], sources: Mapping[str, Source]) -> str:
    small, large = min(sizes), max(sizes)
    shorter = sorted(min(size) for size in sizes.elements())
    median = shorter[len(shorter) // 2]
    # networks halve their input up to five times
    side = max(8, median // 32 * 32 if median >= 32 else median // 8 * 8)
    where = ", ".join(dict.fromkeys(source.where for source in sources.values()))
    return (
        f"{where}: the images differ in size, from {small[0]}×{small[1]} to {large[0]}×{large[1]} "
        f"(height × width; {len(sizes)} sizes, median shorter side {median}); say what the "
        f"network sees, e.g. `data.preprocess: {{resize: {side}, crop: {side}}}`"
    )


def _ingest_all(
    spec: DataSpec,
    sources: Mapping[str, Source],
    preprocess: PreprocessSpec,
    *,
    canvas: Size,
    context: Context,
) -> dict[str, Ingested]:
    total = sum(len(source) for source in sources.values())
    done = 0
    found = {}
    for part, source in sources.items():
        before = done

        def progress(count: int, before: int = before, part: str = part) -> None:
            context.events.progress(before + count, total, f"decoding {part}")

        found[part] = ingest(
            source,
            preprocess,
            canvas=canvas,
            path=_decoded_file(context, part),
            threads=context.threads,
            skip_corrupt=spec.on_corrupt == "skip",
            progress=progress,
        )
        done += len(source)
        if corrupt := found[part].corrupt:
            context.events.note(
                f"{part}: {len(corrupt)} of {len(source)} images were left out as unusable, the "
                f"first because: {corrupt[0]}"
            )
    return found


def _decoded_file(context: Context, part: str) -> Path:
    return context.resume / f"{part}.decoded.npy"


def with_statistics(preprocess: PreprocessSpec, train: Part) -> PreprocessSpec:
    """mean and std of the training images as the network sees them, where they are not given.

    From exact counts of every pixel value, to 4 decimals, so they are the same on every machine.
    """
    if preprocess.mean is not None and preprocess.std is not None:
        return preprocess
    canvas = train.of.contents.shape[1:3]
    channels, crop = preprocess.channel_count, input_size(preprocess, (canvas[0], canvas[1]))
    counts = np.zeros((channels, 256), np.int64)
    rows = train.rows
    for start in range(0, len(rows), _ROWS_AT_ONCE):
        images = centre_crop(train.of.contents[rows[start : start + _ROWS_AT_ONCE]], crop)
        for channel in range(channels):
            counts[channel] += np.bincount(images[..., channel].ravel(), minlength=256)
    values = np.arange(256) / preprocess.max_value
    share = counts / counts.sum(1, keepdims=True)
    mean = share @ values
    std = np.sqrt(np.maximum(share @ values**2 - mean**2, 0))
    found = {
        "mean": tuple(round(float(value), 4) for value in mean),
        "std": tuple(max(round(float(value), 4), STD_FLOOR) for value in std),
    }
    given = {name: getattr(preprocess, name) for name in found}
    update = {name: found[name] if given[name] is None else given[name] for name in found}
    return preprocess.model_copy(update=update)
