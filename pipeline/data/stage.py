"""The data stage: the sets of a recipe, read once, checked, split, and stored at one size.

Images become canvases (`images.py`), texts become tokens (`texts.py`); all else is the same for
both. What it refuses: sets that name different classes, the same sample in two sets (unless
`allow_overlap`), a class without samples, and samples that cannot be read (unless `on_corrupt:
skip`). What it only reports: samples of a set under two labels, classes absent from test, and
unlabelled samples that are dropped because they are known already.
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
from ..recipe import DataSpec, SourceSpec, UnlabelledSpec
from ..stage import Context
from .classes import absent_classes, settle_classes
from .dataset import PARTS, UNLABELLED, write_contents, write_header, write_rows
from .images import read_images, with_statistics
from .ingest import Ingested
from .inputs import Preparation
from .parts import Part, count_overlap, divide, drop_known, positions_of
from .preprocess import Size
from .readers import fingerprint, open_source
from .source import Source, listing
from .split import calibration_indices
from .texts import open_text_source, read_texts, text_fingerprint, tokenizer_sha256

_LISTED = 100  # corrupt images named in the report


def prepare_data(spec: DataSpec, *, context: Context) -> dict[str, Any]:
    """The data stage: leaves what `dataset.open_data` opens in `context.scratch`.

    Returns:
        counts by part and class, what was skipped, overlaps, native sizes or lengths, a digest of
        the contents in order, and seconds.

    Raises:
        DataError: the sets cannot be used; see the module.
    """
    start = time.monotonic()
    sources = {part: _open(source, spec) for part, source in _given(spec).items()}
    class_names, sources = settle_classes(sources, spec.labels)
    how: Preparation
    if spec.tokenize is None:
        ingested, preprocess = read_images(spec, sources, context=context)
        about = {"canvas": list(ingested["train"].contents.shape[1:3])}
    else:
        ingested, how, about = read_texts(spec, sources, class_names=class_names, context=context)
    decoded = time.monotonic()

    parts = divide(spec, ingested, class_names, seed=context.seed)
    absent = _check_classes(parts, class_names, context)
    dropped = _drop_known(parts, context) if UNLABELLED in parts else {}
    overlap = count_overlap(parts, allowed=spec.allow_overlap)
    train = parts["train"]
    if spec.tokenize is None:
        how = with_statistics(preprocess, train)
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
        **about,
        "contents_digest": _digest(parts),
    }
    _write(context.scratch, parts)
    for decoded_file in context.resume.glob("*.decoded.npy"):
        decoded_file.unlink()
    write_header(
        context.scratch,
        class_names=class_names,
        preprocess=how,
        calibration=calibration,
        stats=stats,
    )
    seconds = {"decode": decoded - start, "total": time.monotonic() - start}
    return {**stats, "preprocess": how.model_dump(mode="json"), "seconds": seconds}


def source_fingerprint(spec: DataSpec) -> str:
    """sha256 of the contents of every set the recipe names, wherever they lie.

    Raises:
        DataError: a set is missing or cannot be read.
    """
    if spec.tokenize is None:
        found = {part: fingerprint(source) for part, source in _given(spec).items()}
    else:
        found = {part: text_fingerprint(source) for part, source in _given(spec).items()}
        found["tokenizer"] = tokenizer_sha256(spec)
    lines = [f"{part}\0{digest}\n" for part, digest in found.items()]
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def _open(source: SourceSpec | UnlabelledSpec, spec: DataSpec) -> Source:
    return open_source(source) if spec.tokenize is None else open_text_source(source, spec)


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


def _check_classes(
    parts: Mapping[str, Part], class_names: tuple[str, ...], context: Context
) -> dict[str, list[str]]:
    """Every class is in train; from a test or validation set of its own some may be absent."""
    absent = {part: absent_classes(parts[part].labels, class_names) for part in PARTS}
    if absent["train"]:
        raise DataError(
            f"{parts['train'].of.source.where}: no usable training sample is left of the classes "
            f"{listing(absent['train'])}; add some, or take the classes out"
        )
    for part, names in absent.items():
        if names:
            context.events.note(
                f"{part}: holds no sample of {len(names)} classes ({listing(names, limit=5)}); "
                "nothing is measured on them"
            )
    return {part: names for part, names in absent.items() if names}


def _drop_known(parts: dict[str, Part], context: Context) -> dict[str, dict[str, int]]:
    """Leaves only new images in the unlabelled part; how many were dropped, for the statistics."""
    train = parts["train"]
    parts[UNLABELLED], dropped = drop_known(parts[UNLABELLED], train)
    text = (
        f"{UNLABELLED}: {len(parts[UNLABELLED])} samples are learnt from without labels, beside "
        f"{len(train)} with labels"
    )
    if any(dropped.values()):
        text += (
            f"; {sum(dropped.values())} were dropped ({dropped['in_train']} are training samples, "
            f"{dropped['repeated']} repeat another)"
        )
    context.events.note(text)
    return {"unlabelled_dropped": dropped}


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
        "samples_with_two_labels_in_train": noisy,
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
        pieces = [(parts[name].of.contents, parts[name].rows) for name in together]
        write_contents(folder, part, pieces)
    for part in _held(parts):
        write_rows(
            folder,
            part,
            labels=parts[part].labels,
            digests=parts[part].digests,
            names=parts[part].names,
        )
