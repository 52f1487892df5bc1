"""Drops of parts of the test set: a column of the user's own says which sample is in which part.

Every value of the column is a check of its own, judged as the whole is. All of them must pass, so
none is corrected for their number; a part of few samples is inconclusive and names the n it needs.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import RecipeError
from ..policy import GateSpec, SliceSpec
from ..report import Check
from .common import invalid
from .drop import drop_check, pair_of
from .evidence import Evidence

MOST = 100  # values of a column; more are a number or a name, not parts
ID = "id"


def checks(evidence: Evidence, policy: GateSpec) -> list[Check]:
    return [check for spec in policy.slices for check in _checks(evidence, spec, policy.confidence)]


def _checks(evidence: Evidence, spec: SliceSpec, confidence: float) -> list[Check]:
    report, samples = evidence.report, evidence.samples
    roles = report.reference, report.deployed
    if not set(roles) <= set(samples.answers) or roles[0] == roles[1]:
        text = f"{roles[0]} and {roles[1]} are not two models of samples.parquet"
        name = f"slices.{spec.column}"
        return [invalid(name, text, limit=spec.max_drop_points, unit="points")]
    part_of = read_column(Path(spec.file), spec.column)
    missing = [one for one in samples.ids if one not in part_of]
    if missing:
        raise RecipeError(
            f"slices: {spec.file}: has no `{spec.column}` for {len(missing)} of {samples.n} test "
            f"samples, e.g. id {missing[0]}; a row for each id of samples.parquet is needed"
        )
    parts = np.array([part_of[one] for one in samples.ids], dtype=object)
    values = sorted(set(parts))
    if len(values) > MOST:
        raise RecipeError(
            f"slices: {spec.file}: `{spec.column}` has {len(values)} values, at most {MOST} are "
            "parts; group them first"
        )
    before, after = (samples.answers[role].correct for role in roles)
    return [
        drop_check(
            f"slices.{spec.column}={value}",
            pair_of(before[own], after[own], before=roles[0], after=roles[1]),
            spec.max_drop_points,
            confidence=confidence,
        )
        for value in values
        if (own := parts == value).any()
    ]


def read_column(path: Path, column: str) -> Mapping[str, str]:
    """id → value of `column`, both as text.

    Raises:
        RecipeError: no such file or column, an id twice or an empty cell.
    """
    import pyarrow as pa

    try:
        table = _read(path, column)
    except (OSError, pa.ArrowException, ValueError) as error:
        said = str(error).splitlines()[0]
        raise RecipeError(
            f"slices: {path}: expected a .csv or .parquet with the columns `{ID}` and "
            f"`{column}`: {said}"
        ) from None
    ids, values = table[ID].to_pylist(), table[column].to_pylist()
    empty = [i for i, pair in enumerate(zip(ids, values, strict=True)) if None in pair]
    if empty:
        raise RecipeError(f"slices: {path}: row {empty[0] + 1} has an empty `{ID}` or `{column}`")
    found = {str(one): str(value) for one, value in zip(ids, values, strict=True)}
    if len(found) < len(ids):
        twice = next(one for one in found if [str(i) for i in ids].count(one) > 1)
        raise RecipeError(f"slices: {path}: id {twice} is there twice; keep one row of it")
    return found


def _read(path: Path, column: str) -> Any:
    if path.suffix == ".parquet":
        import pyarrow.parquet as pq

        return pq.read_table(path, columns=[ID, column])
    if path.suffix != ".csv":
        raise ValueError(f"{path.suffix or 'no ending'} is neither")
    import pyarrow as pa
    from pyarrow import csv

    kinds = {ID: pa.string(), column: pa.string()}
    options = csv.ConvertOptions(
        include_columns=[ID, column], column_types=kinds, null_values=[""],
        strings_can_be_null=True,
    )  # fmt: skip
    return csv.read_csv(path, convert_options=options)
