"""`samples.parquet` as arrays: what every model answered to every test sample."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import IntegrityError

Array = NDArray[Any]

# Columns of one model, each named `{role}_{column}`.
COLUMNS = ("prediction", "rank", "p_label", "top1_probability", "margin")


@dataclass(frozen=True)
class Answers:
    """What one model says of each sample; every field is (N,). Probabilities are softmax."""

    prediction: Array  # int64 class index
    rank: Array  # int64, how many classes stand before the label; 0: it is the prediction
    p_label: Array  # float64, probability of the label
    top1_probability: Array  # float64
    margin: Array  # float64, top-1 minus top-2 probability

    @property
    def correct(self) -> Array:
        """bool, (N,)."""
        right: Array = self.rank == 0
        return right


@dataclass(frozen=True)
class Samples:
    """The test set: `ids` (N,) are unique strings, `labels` (N,) int64 class indices."""

    ids: Array
    labels: Array
    class_names: tuple[str, ...]
    answers: Mapping[str, Answers]  # by role

    @property
    def n(self) -> int:
        return len(self.labels)


def read_samples(path: Path) -> Samples:
    """The test samples of a run.

    Raises:
        IntegrityError: it cannot be read, holds no sample or the same one twice, a column is
            missing or of another type, a number is NaN or out of range.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        table = pq.read_table(path)
        ids = np.array(table["id"].to_pylist(), dtype=object)
        labels = _whole(table["label"])
        names = (table.schema.metadata or {}).get(b"class_names", b"").decode()
        suffix = f"_{COLUMNS[0]}"
        roles = [c.removesuffix(suffix) for c in table.column_names if c.endswith(suffix)]
        answers = {role: _answers(table, role) for role in roles}
    except (OSError, pa.ArrowException, KeyError, ValueError, UnicodeDecodeError) as error:
        raise IntegrityError(
            f"{path}: does not hold the samples of a run: {error}; run again"
        ) from None
    samples = Samples(ids, labels, tuple(names.split("\n")), answers)
    for problem in _problems(samples):
        raise IntegrityError(f"{path}: {problem}; run again")
    return samples


def _answers(table: Any, role: str) -> Answers:
    whole = (_whole(table[f"{role}_{name}"]) for name in COLUMNS[:2])
    real = (_real(table[f"{role}_{name}"]) for name in COLUMNS[2:])
    return Answers(*whole, *real)


def _whole(column: Any) -> Array:
    values: Array = column.to_numpy()
    if not np.issubdtype(values.dtype, np.integer):  # a null makes it float
        raise ValueError(f"expected whole numbers, got {values.dtype}")
    return values.astype(np.int64)


def _real(column: Any) -> Array:
    values: Array = column.to_numpy()
    if not np.issubdtype(values.dtype, np.floating):
        raise ValueError(f"expected real numbers, got {values.dtype}")
    return values.astype(np.float64)


def _problems(samples: Samples) -> list[str]:
    """What cannot be so, whoever wrote it."""
    ids, classes = samples.ids, len(samples.class_names)
    if not samples.n:
        return ["holds no sample"]
    if not all(isinstance(one, str) for one in ids):
        return ["an id is missing"]
    if not samples.answers:
        return ["holds no model's answers"]
    unique, counts = np.unique(ids.astype(str), return_counts=True)
    problems = [f"id {one[:12]}… is there twice" for one in unique[counts > 1][:1]]
    columns = {"label": samples.labels}
    for role, one in samples.answers.items():
        columns[f"{role}_prediction"], columns[f"{role}_rank"] = one.prediction, one.rank
        for name in COLUMNS[2:]:
            values = getattr(one, name)
            if not ((values >= 0) & (values <= 1.000001)).all():  # float32 may round above 1
                problems.append(f"{role}_{name} is NaN or no probability")
        if ((one.rank == 0) != (one.prediction == samples.labels)).any():
            problems.append(f"{role}_rank is 0 where {role}_prediction is another class")
    for name, values in columns.items():
        if values.min() < 0 or values.max() >= classes:
            problems.append(f"{name} names a class that is none of {classes}")
    return problems
