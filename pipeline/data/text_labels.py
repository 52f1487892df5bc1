"""Labels of texts, as they are written → indices of classes, the same for every kind of file.

Labels that are all whole numbers, the lowest 0, are class numbers. All others are names, in the
order of a parquet file's own ClassLabel, else sorted: 1 to 5 stars are the five names "1" to "5".
A row without a label, empty, null or negative, has NO_LABEL.
"""

from __future__ import annotations

import re

import numpy as np
import numpy.typing as npt

from ..errors import DataError
from .source import NO_LABEL, listing

_ROWS_TO_DOUBT = 20  # from here on, labels that never repeat are no labels
_WHOLE = re.compile(r"0|-?[1-9][0-9]{0,17}")  # what int64 holds; longer ones are names


def to_labels(
    values: list[str | None], declared: tuple[str, ...] | None, *, where: str
) -> tuple[npt.NDArray[np.int64], tuple[str, ...], bool]:
    """int64 labels (N,), class names, and whether the names are only the numbers from 0.

    Args:
        values: without spaces around them; None: none is given.
        declared: names in the order of the numbers, where the file states them.

    Raises:
        DataError: no label at all, a number or name that `declared` lacks, numbers with large
            gaps, or as many labels as rows.
    """
    present = {value for value in values if value is not None}
    if whole := all(_WHOLE.fullmatch(value) for value in present):
        present = {value for value in present if not value.startswith("-")}
    if not present:
        raise DataError(
            f"{where}: every label is empty or negative, as in a test set published without "
            "labels; give a labelled set, or set `data.label` to another column"
        )
    if len(values) >= _ROWS_TO_DOUBT and len(present) == len(values):
        raise DataError(f"{where}: no label stands twice in {len(values)} rows; is this the label?")
    numbered = whole and declared is None and "0" in present
    if numbered or (whole and declared is not None):
        highest = max(map(int, present))
        names = declared or _numbers(len(present), highest, where)
        if highest >= len(names):
            raise DataError(
                f"{where}: the label {highest} has no name; the file names {len(names)} classes: "
                f"{listing(names)}"
            )
        index = {str(number): number for number in range(len(names))}
    else:
        names = declared or tuple(sorted(present, key=int if whole else None))
        index = {name: number for number, name in enumerate(names)}
        if unknown := sorted(present - index.keys()):
            raise DataError(f"{where}: {listing(unknown)} are not among its class names")
    labels = [NO_LABEL if value is None else index.get(value, NO_LABEL) for value in values]
    return np.array(labels, np.int64), names, numbered


def _numbers(distinct: int, highest: int, where: str) -> tuple[str, ...]:
    """Numbers without names must count from 0: a gap is a class nobody has seen."""
    if highest >= 2 * distinct + 10:
        raise DataError(
            f"{where}: {distinct} distinct labels reach from 0 to {highest}; expected class "
            "numbers from 0 (or names); is this the column of labels?"
        )
    return tuple(map(str, range(highest + 1)))
