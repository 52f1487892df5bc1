"""Which label means which class, the same in every set.

The meaning of a label is its name. Sets whose names are the same in another order are mapped by
name; sets that name different classes are an error, because no number computed over them would
mean anything.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np

from ..errors import DataError
from .source import NO_LABEL, Source, listing


def settle_classes(
    sources: Mapping[str, Source], labels: tuple[str, ...] | None
) -> tuple[tuple[str, ...], dict[str, Source]]:
    """The class names, and the sources with labels that index them.

    Args:
        sources: by part; holds "train", whose classes count. Sets without labels stay as they are.
        labels: `data.labels` of the recipe: names for numbers, or the order for names.

    Raises:
        DataError: names differ between the sets, fewer than two classes, or a class of which the
            training set has no sample.
    """
    train = sources["train"]
    class_names = train.class_names if labels is None else labels
    if len(set(class_names)) < len(class_names):
        raise DataError(f"data.labels: a name appears twice in {listing(class_names)}")
    settled = {
        part: _renumbered(source, class_names, part=part, given=labels is not None, train=train)
        if source.labelled
        else source
        for part, source in sources.items()
    }
    if len(class_names) < 2:
        raise DataError(
            f"{train.where}: holds one class only ({class_names[0]}); a classifier needs at "
            "least two"
        )
    absent = absent_classes(settled["train"].labels, class_names)
    if absent:
        raise DataError(
            f"{train.where}: no training sample of the classes {listing(absent)}; add some, or "
            "take the classes out of the set's names"
        )
    return class_names, settled


def absent_classes(labels: np.ndarray, class_names: tuple[str, ...]) -> list[str]:
    """Names of the classes without a single label."""
    present = np.bincount(labels[labels != NO_LABEL], minlength=len(class_names)) > 0
    return [name for name, there in zip(class_names, present, strict=True) if not there]


def _renumbered(
    source: Source, class_names: tuple[str, ...], *, part: str, given: bool, train: Source
) -> Source:
    if source.numbered and (given or train.numbered):
        if len(source.class_names) > len(class_names):
            raise DataError(
                f"{source.where}: {part} has the label {len(source.class_names) - 1}, but there "
                f"are {len(class_names)} classes: {listing(class_names)}; correct the labels or "
                "`data.labels`"
            )
        return replace(source, class_names=class_names)
    if set(source.class_names) != set(class_names):
        raise DataError(_difference(source, class_names, part=part, given=given))
    index = {name: number for number, name in enumerate(class_names)}
    order = np.array([index[name] for name in source.class_names], np.int64)
    known = source.labels != NO_LABEL
    labels = np.where(known, order[np.where(known, source.labels, 0)], NO_LABEL)
    return replace(source, labels=labels, class_names=class_names)


def _difference(source: Source, class_names: tuple[str, ...], *, part: str, given: bool) -> str:
    expected = "data.labels" if given else "train"
    missing = [name for name in class_names if name not in source.class_names]
    extra = [name for name in source.class_names if name not in class_names]
    return (
        f"{source.where}: {part} and {expected} name different classes.\n"
        f"  {expected}: {listing(class_names)}\n"
        f"  {part}: {listing(source.class_names)}\n"
        f"  only in {expected}: {listing(missing) or 'none'}; "
        f"only in {part}: {listing(extra) or 'none'}\n"
        "Rename or remove classes until both agree, or name them in `data.labels`"
        + (" if the labels are numbers" if source.numbered else "")
    )
