"""The data stage: the sets of a recipe, read once, checked, split, and stored at one size.

What it refuses: sets that name different classes, the same image in two sets (unless
`allow_overlap`), a class without images, and images that cannot be read (unless `on_corrupt:
skip`). What it only reports: images of a set under two labels, classes absent from test, and
unlabelled images that are dropped because they are known already.
"""

from __future__ import annotations

import hashlib
import time
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import DataError
from ..recipe import DataSpec, PreprocessSpec, SourceSpec, UnlabelledSpec
from ..stage import Context
from .classes import absent_classes, settle_classes
from .dataset import PARTS, UNLABELLED, write_header, write_images, write_rows
from .ingest import Ingested, ingest, take_census
from .parts import Part, count_overlap, divide, drop_known, positions_of
from .preprocess import Size, canvas_size, centre_crop, input_size
from .readers import fingerprint, open_source
from .source import Source, listing
from .split import calibration_indices

# One grey level of 8 bits: a channel that varies less carries nothing, and 0 would divide by it.
STD_FLOOR = 0.0039
_ROWS_AT_ONCE = 1024
_LISTED = 100  # corrupt images named in the report


def prepare_data(spec: DataSpec, *, context: Context) -> dict[str, Any]:
    """The data stage: leaves what `dataset.open_data` opens in `context.scratch`.

    Returns:
        counts by part and class, what was skipped, overlaps, native sizes, a digest of the images
        in order, and seconds.

    Raises:
        DataError: the sets cannot be used; see the module.
    """
    start = time.monotonic()
    sources = {part: open_source(source) for part, source in _given(spec).items()}
    class_names, sources = settle_classes(sources, spec.labels)
    preprocess, canvas = _plan(spec.preprocess, sources, threads=context.threads)
    ingested = _ingest_all(spec, sources, preprocess, canvas=canvas, context=context)
    decoded = time.monotonic()

    parts = divide(spec, ingested, class_names, seed=context.seed)
    absent = _check_classes(parts, class_names, context)
    dropped = _drop_known(parts, context) if UNLABELLED in parts else {}
    overlap = count_overlap(parts, allowed=spec.allow_overlap)
    preprocess = _with_statistics(preprocess, parts["train"], canvas)
    train = parts["train"]
    calibration = calibration_indices(
        train.digests, train.labels, spec.calibration, seed=context.seed
    )
    stats = {
        **_counts(parts, class_names),
        "calibration": len(calibration),
        "class_names": list(class_names),
        "absent_classes": absent,
        "overlap": overlap,
        **dropped,
        **_quality(train, ingested),
        "canvas": list(canvas),
        "images_digest": _digest(parts),
    }
    _write(context.scratch, parts)
    for part in ingested:
        _decoded_file(context, part).unlink()
    write_header(
        context.scratch,
        class_names=class_names,
        preprocess=preprocess,
        calibration=calibration,
        stats=stats,
    )
    seconds = {"decode": decoded - start, "total": time.monotonic() - start}
    return {**stats, "preprocess": preprocess.model_dump(mode="json"), "seconds": seconds}


def source_fingerprint(spec: DataSpec) -> str:
    """sha256 of the contents of every set the recipe names, wherever they lie.

    Raises:
        DataError: a set is missing or cannot be read.
    """
    lines = [f"{part}\0{fingerprint(source)}\n" for part, source in _given(spec).items()]
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def _given(spec: DataSpec) -> dict[str, SourceSpec | UnlabelledSpec]:
    wanted = {
        "train": spec.train,
        "validation": spec.validation,
        "test": spec.test,
        UNLABELLED: spec.unlabelled,
    }
    return {
        part: source
        for part, source in wanted.items()
        if isinstance(source, SourceSpec | UnlabelledSpec)
    }


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


def _check_classes(
    parts: Mapping[str, Part], class_names: tuple[str, ...], context: Context
) -> dict[str, list[str]]:
    """Every class is in train; from a test or validation set of its own some may be absent."""
    absent = {part: absent_classes(parts[part].labels, class_names) for part in PARTS}
    if absent["train"]:
        raise DataError(
            f"{parts['train'].of.source.where}: no usable training image is left of the classes "
            f"{listing(absent['train'])}; add some, or take the classes out"
        )
    for part, names in absent.items():
        if names:
            context.events.note(
                f"{part}: holds no image of {len(names)} classes ({listing(names, limit=5)}); "
                "nothing is measured on them"
            )
    return {part: names for part, names in absent.items() if names}


def _drop_known(parts: dict[str, Part], context: Context) -> dict[str, dict[str, int]]:
    """Leaves only new images in the unlabelled part; how many were dropped, for the statistics."""
    train = parts["train"]
    parts[UNLABELLED], dropped = drop_known(parts[UNLABELLED], train)
    text = (
        f"{UNLABELLED}: {len(parts[UNLABELLED])} images are learnt from without labels, beside "
        f"{len(train)} with labels"
    )
    if any(dropped.values()):
        text += (
            f"; {sum(dropped.values())} were dropped ({dropped['in_train']} are training images, "
            f"{dropped['repeated']} repeat another)"
        )
    context.events.note(text)
    return {"unlabelled_dropped": dropped}


def _with_statistics(preprocess: PreprocessSpec, train: Part, canvas: Size) -> PreprocessSpec:
    """mean and std of the training images as the network sees them, where they are not given.

    From exact counts of every pixel value, to 4 decimals, so they are the same on every machine.
    """
    if preprocess.mean is not None and preprocess.std is not None:
        return preprocess
    channels, crop = preprocess.channel_count, input_size(preprocess, canvas)
    counts = np.zeros((channels, 256), np.int64)
    rows = train.rows
    for start in range(0, len(rows), _ROWS_AT_ONCE):
        images = centre_crop(train.of.images[rows[start : start + _ROWS_AT_ONCE]], crop)
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


def _counts(parts: Mapping[str, Part], class_names: tuple[str, ...]) -> dict[str, Any]:
    by_class = {
        part: dict(
            zip(
                class_names,
                np.bincount(parts[part].labels, minlength=len(class_names)).tolist(),
                strict=True,
            )
        )
        for part in PARTS
    }
    return {"counts": {part: len(parts[part]) for part in _held(parts)}, "per_class": by_class}


def _quality(train: Part, ingested: Mapping[str, Ingested]) -> dict[str, Any]:
    """Twins and label noise inside train, skipped and ignored files, native sizes."""
    twins = [places for places in positions_of(train).values() if len(places) > 1]
    labels = train.labels
    noisy = sum(len({int(labels[place]) for place in places}) > 1 for places in twins)
    sizes = sum((found.sizes for found in ingested.values()), Counter[Size]())
    most = sorted(sizes.items(), key=lambda item: (-item[1], item[0]))
    return {
        "duplicates_in_train": sum(len(places) - 1 for places in twins),
        "images_with_two_labels_in_train": noisy,
        "corrupt": {part: len(found.corrupt) for part, found in ingested.items()},
        "corrupt_where": {
            part: found.corrupt[:_LISTED] for part, found in ingested.items() if found.corrupt
        },
        "ignored_files": {part: found.source.ignored for part, found in ingested.items()},
        "native_sizes": {
            "distinct": len(sizes),
            "most_frequent": [{"size": list(size), "count": count} for size, count in most[:5]],
        },
    }


def _digest(parts: Mapping[str, Part]) -> str:
    """sha256 of the contents and labels of all parts, in order."""
    digest = hashlib.sha256()
    for part in _held(parts):
        digest.update(part.encode())
        digest.update(parts[part].digests.tobytes())
        digest.update(parts[part].labels.astype("<i8").tobytes())
    return digest.hexdigest()


def _held(parts: Mapping[str, Part]) -> list[str]:
    """Names of the parts there are, always in this order."""
    return [part for part in (*PARTS, UNLABELLED) if part in parts]


def _write(folder: Path, parts: Mapping[str, Part]) -> None:
    for part in PARTS:
        together = (part, UNLABELLED) if part == "train" and UNLABELLED in parts else (part,)
        pieces = [(parts[name].of.images, parts[name].rows) for name in together]
        write_images(folder, part, pieces)
    for part in _held(parts):
        write_rows(
            folder,
            part,
            labels=parts[part].labels,
            digests=parts[part].digests,
            names=parts[part].names,
        )
