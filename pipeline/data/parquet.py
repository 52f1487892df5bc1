"""Images in parquet, with or without labels, as Hugging Face `datasets` writes them, or nearly so.

Images are a struct {bytes, path} (bytes are used, path is not followed) or a plain binary column;
labels are integers or strings. Class names come from the `ClassLabel` in the schema's metadata,
else from the string values in sorted order, else they are the numbers themselves.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from ..errors import DataError
from .source import NO_LABEL, Encoded, Source, listing

# Names in use on the Hub, in order of preference; CIFAR-100 has fine_label beside coarse_label.
IMAGE_NAMES = ("image", "img", "images", "picture", "pixels", "jpg", "png")
LABEL_NAMES = ("label", "labels", "fine_label", "class", "target", "category", "y", "cls")
ROWS_AT_ONCE = 256  # bounds what is in memory: a row is an encoded image
_SHARD = re.compile(r"^(?P<split>.+?)-\d{5}-of-\d{5}")


def open_parquet(path: Path, *, image: str | None, label: str | None) -> Source:
    """A .parquet file or a folder of shards, read in order of name.

    Args:
        image: column of images; None: found by name, else by type if only one fits.
        label: column of labels; likewise.

    Raises:
        DataError: not parquet, no rows, no such columns, or shards that differ.
    """
    files = shards(path)
    schemas = [_schema(file) for file in files]
    columns = (
        _image_column(schemas[0], image, where=files[0]),
        _label_column(schemas[0], label, where=files[0]),
    )
    _check_shards(files, schemas, columns)
    declared = declared_names(schemas[0], columns[1])
    values = [_read_labels(file, columns[1]) for file in files]
    names = _row_names(files, [len(part) for part in values])
    if not names:
        raise DataError(f"{path}: holds no rows; expected at least one image of each class")
    labels, class_names, numbered = _to_labels(values, declared, where=f"{path} {columns[1]}")
    return Source(
        where=str(path),
        labels=labels,
        class_names=class_names,
        numbered=numbered,
        names=names,
        contents=lambda: _read_all(files, columns[0]),
    )


def open_unlabelled_parquet(path: Path, *, image: str | None) -> Source:
    """As `open_parquet`, but of the images alone: a column of labels is neither needed nor read.

    Raises:
        DataError: not parquet, no rows, no column of images, or shards that differ.
    """
    files = shards(path)
    schemas = [_schema(file) for file in files]
    column = _image_column(schemas[0], image, where=files[0])
    _check_shards(files, schemas, (column,))
    names = _row_names(files, [_row_count(file) for file in files])
    if not names:
        raise DataError(
            f"{path}: holds no rows; expected at least one image; give another set, or leave "
            "`data.unlabelled` out"
        )
    return Source(
        where=str(path),
        labels=np.full(len(names), NO_LABEL, np.int64),
        class_names=(),
        numbered=False,
        names=names,
        contents=lambda: _read_all(files, column),
        labelled=False,
    )


def shards(path: Path) -> list[Path]:
    """The files of one set, in order of name."""
    if path.is_file():
        return [path]
    files = sorted(
        file for file in path.glob("*.parquet") if file.is_file() and not file.name.startswith(".")
    )
    splits = {match["split"] for file in files if (match := _SHARD.match(file.name))}
    if len(splits) > 1:
        raise DataError(
            f"{path}: holds the shards of {len(splits)} sets ({listing(sorted(splits))}); give "
            "each a folder of its own, or its single file as the path"
        )
    return files


def _schema(file: Path) -> pa.Schema:
    with readable(file):
        return pq.read_schema(file)


@contextmanager
def readable(file: Path) -> Iterator[None]:
    try:
        yield
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError, OSError) as error:
        reason = str(error).splitlines()[0]
        raise DataError(f"{file}: cannot be read as parquet: {reason}") from None


def _image_column(schema: pa.Schema, asked: str | None, *, where: Path) -> str:
    images = [name for name in _own_names(schema) if _is_image(schema.field(name).type)]
    return _choose("image", asked, IMAGE_NAMES, (images,), schema=schema, where=where)


def _label_column(schema: pa.Schema, asked: str | None, *, where: Path) -> str:
    names = _own_names(schema)
    declared = [name for name in names if declared_names(schema, name) is not None]
    whole = [name for name in names if _is_integer(schema.field(name).type)]
    words = [name for name in names if _is_text(schema.field(name).type)]
    fitting = (declared, whole, words)
    return _choose("label", asked, LABEL_NAMES, fitting, schema=schema, where=where)


def _own_names(schema: pa.Schema) -> list[str]:
    return [name for name in schema.names if not name.startswith("__")]  # pandas' index columns


def _check_shards(files: list[Path], schemas: list[pa.Schema], columns: tuple[str, ...]) -> None:
    """The columns read have one type, and their classes the same names, in every file."""
    first = schemas[0]
    for file, schema in zip(files[1:], schemas[1:], strict=True):
        same = all(
            name in schema.names
            and schema.field(name).type == first.field(name).type
            and declared_names(schema, name) == declared_names(first, name)
            for name in columns
        )
        if not same:
            raise DataError(
                f"{file}: columns {listing(columns)} or their class names differ from those of "
                f"{files[0].name}; a folder must hold the shards of one set"
            )


def _row_names(files: list[Path], counts: list[int]) -> list[str]:
    return [
        f"{file.name} row {row}"
        for file, count in zip(files, counts, strict=True)
        for row in range(count)
    ]


def _row_count(file: Path) -> int:
    with readable(file):
        return int(pq.read_metadata(file).num_rows)


def _choose(
    role: str,
    asked: str | None,
    usual: tuple[str, ...],
    fitting: tuple[list[str], ...],
    *,
    schema: pa.Schema,
    where: Path,
) -> str:
    """The column asked for, else the first of a usual name, else the only one of a fitting type."""
    have = "; its columns are " + listing([f"{f.name} ({_type_name(f.type)})" for f in schema])
    possible = {name for names in fitting for name in names}
    if asked is not None:
        if asked not in schema.names:
            raise DataError(f"{where}: there is no column {asked!r}{have}")
        if asked not in possible:
            raise DataError(f"{where}: the {role} column {asked!r} has a type not read here{have}")
        return asked
    lower = {name.lower(): name for name in sorted(possible, reverse=True)}
    for name in usual:
        if name in lower:
            return lower[name]
    for names in fitting:
        if len(names) == 1:
            return names[0]
    found = "none fits" if not possible else f"{listing(sorted(possible))} all fit"
    raise DataError(f"{where}: which column is the {role}? {found}{have}; set `{role}:`")


def _is_image(kind: pa.DataType) -> bool:
    if pa.types.is_struct(kind):
        return kind.get_field_index("bytes") >= 0 and _is_binary(kind.field("bytes").type)
    return _is_binary(kind)


def _is_binary(kind: pa.DataType) -> bool:
    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind))


def _is_integer(kind: pa.DataType) -> bool:
    if pa.types.is_dictionary(kind):
        return _is_integer(kind.value_type)
    return bool(pa.types.is_integer(kind) or pa.types.is_boolean(kind))


def _is_text(kind: pa.DataType) -> bool:
    if pa.types.is_dictionary(kind):
        return _is_text(kind.value_type)
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind))


def _type_name(kind: pa.DataType) -> str:
    text = str(kind)
    return text if len(text) <= 60 else f"{text[:57]}…"


def declared_names(schema: pa.Schema, column: str) -> tuple[str, ...] | None:
    """Names of a `ClassLabel` in Hugging Face's schema metadata; None if there is none."""
    text = (schema.metadata or {}).get(b"huggingface")
    if text is None:
        return None
    try:
        feature: Any = json.loads(text)["info"]["features"][column]
        names = feature["names"] if feature["_type"] == "ClassLabel" else None
    except (ValueError, LookupError, TypeError):
        return None  # other features carry no names
    if isinstance(names, dict):  # {"0": "cat", …}, as dataset cards write it
        names = [names[str(index)] for index in range(len(names)) if str(index) in names]
    return tuple(str(name) for name in names) if isinstance(names, list) and names else None


def _read_labels(file: Path, column: str) -> list[int | str | None]:
    with readable(file):
        values: list[int | str | None] = pq.read_table(file, columns=[column])[column].to_pylist()
    return values


def _to_labels(
    parts: list[list[int | str | None]], declared: tuple[str, ...] | None, *, where: str
) -> tuple[npt.NDArray[np.int64], tuple[str, ...], bool]:
    """(labels, class names, are the names only numbers)."""
    values = [value for part in parts for value in part]
    if all(value is None for value in values):
        raise DataError(f"{where}: every label is null; name another column with `label:`")
    words = sorted({value for value in values if isinstance(value, str)})
    if words:
        class_names = declared or tuple(words)
        unknown = sorted(set(words) - set(class_names))
        if unknown:
            raise DataError(f"{where}: the values {listing(unknown)} are not among its class names")
        index = {name: number for number, name in enumerate(class_names)}
        indices = [NO_LABEL if value is None else index[str(value)] for value in values]
        return np.array(indices, np.int64), class_names, False
    numbers = [NO_LABEL if value is None or int(value) < 0 else int(value) for value in values]
    labels = np.array(numbers, np.int64)
    highest = int(labels.max())
    if highest < 0:
        raise DataError(
            f"{where}: every label is negative, as in a test set published without labels; "
            "give a labelled set"
        )
    if declared is not None:
        if highest >= len(declared):
            raise DataError(
                f"{where}: the label {highest} has no name; the schema's metadata names "
                f"{len(declared)} classes: {listing(declared)}"
            )
        return labels, declared, False
    _check_dense(labels, where)
    return labels, tuple(str(number) for number in range(highest + 1)), True


def _check_dense(labels: npt.NDArray[np.int64], where: str) -> None:
    """Numbers without names must count from 0: a gap is a class nobody has seen."""
    present = np.unique(labels[labels >= 0])
    if len(present) and int(present[-1]) >= 2 * len(present) + 10:
        raise DataError(
            f"{where}: {len(present)} distinct labels reach from {present[0]} to {present[-1]}; "
            "expected class numbers from 0 (or strings); is this the label column?"
        )


def _read_all(files: list[Path], column: str) -> Iterator[Encoded]:
    for file in files:
        yield from _read_images(file, column)


def _read_images(file: Path, column: str) -> Iterator[Encoded]:
    with readable(file), pq.ParquetFile(file) as table:
        for batch in table.iter_batches(ROWS_AT_ONCE, columns=[column]):
            images = batch.column(0)
            if pa.types.is_struct(images.type):
                at = images.type.get_field_index("bytes")
                images = images.flatten()[at]  # a null struct has null bytes
            yield from images.to_pylist()
