"""Files of texts → tables of cells, as they stand in the file; nothing is chosen or converted yet.

* .csv: RFC 4180, with commas; line breaks and doubled quotes inside quotes
* .tsv: one row a line and quotes are only characters, unless the file is what a quoting writer
  writes (`_is_quoted`)
* .jsonl: one object a line
* .parquet: the columns of strings, numbers and dictionaries
* .txt: one text a line

A byte order mark is passed over. Lines end with \\n or \\r\\n; in .csv with \\r too.
"""

from __future__ import annotations

import codecs
import csv
import io
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import pyarrow as pa
import pyarrow.parquet as pq

from ..errors import DataError
from .parquet import declared_names, readable
from .source import listing

ABSENT = object()  # a JSON object without the key
_WRAPPED = re.compile(r'"(?:[^"]|"")*+"')
_FIELD = re.compile(r'(?:"(?:[^"]|"")*+"|[^"\t\n]*+)(\t|\r?\n|\Z)')
_Rows = list[tuple[int, list[str]]]  # (line where it starts, its fields)


@dataclass(frozen=True, eq=False)
class Unread:
    """A cell of a type that is neither text nor a label."""

    kind: str


@dataclass(frozen=True, eq=False)
class Table:
    """Cells of one file, by column.

    Attributes:
        names: of the columns; None where the first row may hold them (csv, tsv), or there are none.
        columns: each (N,), str, int, float, bool, None, ABSENT or whatever JSON holds.
        places: (N,), "train.tsv:12" or "train.parquet row 12".
        class_names: of the columns that declare them (Hugging Face's ClassLabel).
    """

    file: Path
    names: tuple[str, ...] | None
    columns: list[list[Any]]
    places: list[str]
    class_names: dict[str, tuple[str, ...]] = field(default_factory=dict)


def read_table(file: Path, *, encoding: str) -> Table:
    """All of one file; its suffix says how it is read.

    Raises:
        DataError: it cannot be read, decoded or parsed, or holds no row.
    """
    kind = file.suffix.lower()
    if kind == ".parquet":
        return _read_parquet(file)
    text = _decoded(file, encoding)
    if kind == ".jsonl":
        return _read_json_lines(file, text)
    if kind == ".txt":
        rows = [(number, [line]) for number, line in enumerate(_lines(text.removesuffix("\n")), 1)]
    elif kind == ".csv":
        rows = _quoted_rows(file, text, ",")
    elif _is_quoted(text):
        rows = _quoted_rows(file, text, "\t")
    else:
        rows = [(number, line.split("\t")) for number, line in enumerate(_lines(text), 1) if line]
    return _by_column(file, rows)


def _decoded(file: Path, encoding: str) -> str:
    try:
        codec = codecs.lookup(encoding).name
        content = file.read_bytes()
        # "utf-8-sig" is UTF-8 with or without a byte order mark
        text = content.decode("utf-8-sig" if codec == "utf-8" else codec)
    except LookupError:
        raise DataError(
            f"data.encoding: there is no text encoding {encoding!r}; usual ones are utf-8, "
            "latin-1, cp1252, utf-16"
        ) from None
    except OSError as error:
        raise DataError(f"{file}: cannot be read: {error.strerror}") from None
    except UnicodeError as error:
        _undecodable(file, content, codec, error)
    if (at := text.find("\0")) >= 0:
        raise DataError(
            f"{file}:{text.count(chr(10), 0, at) + 1}: holds a NUL byte, so it is no {codec} text; "
            "set `data.encoding` (utf-16 looks like this), or take the byte out"
        )
    return text


def _undecodable(file: Path, content: bytes, codec: str, error: UnicodeError) -> NoReturn:
    if not isinstance(error, UnicodeDecodeError):
        raise DataError(f"{file}: is not {codec}: {error}; set `data.encoding`") from None
    at = error.start
    # utf-8-sig counts from behind the mark
    at += 3 if codec == "utf-8" and content.startswith(codecs.BOM_UTF8) else 0
    before = content[:at]
    what = f"{file}:{before.count(10) + 1}: is not {codec}: byte {at} is 0x{content[at]:02x}"
    if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        raise DataError(f"{what}; it begins as UTF-16 does: set `data.encoding: utf-16`") from None
    if codec == "utf-8" and not before.isascii():
        raise DataError(
            f"{what}, after other characters that are; the file mixes encodings, as when parts of "
            "different origin are joined: convert that part to UTF-8"
        ) from None
    raise DataError(
        f"{what}; convert the file to UTF-8, or set `data.encoding`, e.g. cp1252 or latin-1"
    ) from None


def _lines(text: str) -> list[str]:
    return [line.removesuffix("\r") for line in text.split("\n")]


def _quoted_rows(file: Path, text: str, delimiter: str) -> _Rows:
    rows: _Rows = []
    start = 1
    with _fields_up_to(len(text) + 1):
        reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
        try:
            for row in reader:
                if row:
                    rows.append((start, row))
                start = reader.line_num + 1
        except csv.Error as error:
            raise DataError(
                f"{file}:{start}: the row that begins here cannot be read: {error}; a quote inside "
                'quotes is written twice (""), and every quote is closed'
            ) from None
    return rows


@contextmanager
def _fields_up_to(characters: int) -> Iterator[None]:
    """The csv module's limit, 131,072 at first, holds for the whole process."""
    before = csv.field_size_limit(characters)
    try:
        yield
    finally:
        csv.field_size_limit(before)


def _is_quoted(text: str) -> bool:
    """Is a .tsv what a quoting writer writes, so that quotes around a field are not of the text?

    Such a writer leaves no quote in a bare field, doubles those inside, and wraps a field only
    where it must, or a whole column. Where every line has as many tabs, all that is held line by
    line; `"so good"` alone in a file stays as it is. Else quotes must hold the tabs and line breaks
    that are too many.
    """
    if '"' not in text:
        return False
    rows = [line.split("\t") for line in _lines(text) if line]
    if len({len(row) for row in rows}) > 1:
        return _is_all_fields(text)
    fields = [cell for row in rows for cell in row if '"' in cell]
    if not all(_WRAPPED.fullmatch(cell) for cell in fields):
        return False
    columns = zip(*rows, strict=True)
    return any('""' in cell[1:-1] for cell in fields) or any(
        all('"' in cell for cell in column) for column in columns
    )


def _is_all_fields(text: str) -> bool:
    at = 0
    while at < len(text):
        found = _FIELD.match(text, at)
        if found is None:
            return False
        at = found.end()
    return True


def _by_column(file: Path, rows: _Rows) -> Table:
    if not rows:
        raise DataError(f"{file}: is empty; expected one text a row")
    first, width = rows[0][0], len(rows[0][1])
    for line, row in rows:
        if len(row) != width:
            comma = file.suffix.lower() == ".csv"
            inside = "a comma" if comma else "a tab"
            raise DataError(
                f"{file}:{line}: has {len(row)} fields, and line {first} has {width}; {inside} "
                f"inside a text must be {'in quotes' if comma else 'taken out'}"
            )
    places = [f"{file.name}:{line}" for line, _ in rows]
    return Table(file, None, [list(cells) for cells in zip(*(r for _, r in rows), strict=True)],
                 places)  # fmt: skip


def _read_json_lines(file: Path, text: str) -> Table:
    objects: list[dict[str, Any]] = []
    places = []
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            objects.append(_json_object(line, f"{file}:{number}"))
            places.append(f"{file.name}:{number}")
    if not objects:
        raise DataError(f"{file}: is empty; expected one JSON object a line")
    names = tuple(dict.fromkeys(key for one in objects for key in one))
    columns = [[one.get(name, ABSENT) for one in objects] for name in names]
    return Table(file, names, columns, places)


def _json_object(line: str, where: str) -> dict[str, Any]:
    expected = 'expected one JSON object a line, e.g. {"text": "…", "label": "…"}'
    try:
        content = json.loads(line)
    except (ValueError, RecursionError) as error:
        hint = ""
        if where.endswith(":1") and line.lstrip().startswith("["):
            hint = "; it seems to be one JSON array: write its objects one a line"
        raise DataError(f"{where}: {expected}; this is not JSON: {error}{hint}") from None
    if not isinstance(content, dict):
        raise DataError(f"{where}: {expected}, got a JSON {type(content).__name__}")
    return content


def _read_parquet(file: Path) -> Table:
    with readable(file):
        schema = pq.read_schema(file)
        names = [name for name in schema.names if not name.startswith("__")]  # pandas' index
        if len(set(names)) < len(names):
            raise DataError(f"{file}: two columns have one name: {listing(names)}; rename one")
        read = [name for name in names if _is_read(schema.field(name).type)]
        table = pq.read_table(file, columns=read)
    count = pq.read_metadata(file).num_rows
    if not count:
        raise DataError(f"{file}: holds no rows; expected at least one text")
    declared = {name: declared_names(schema, name) for name in read}
    return Table(
        file,
        tuple(names),
        [
            _cells(file, table[name], name)
            if name in read
            else [Unread(str(schema.field(name).type))] * count
            for name in names
        ],
        [f"{file.name} row {row}" for row in range(count)],
        {name: given for name, given in declared.items() if given is not None},
    )


def _is_read(kind: pa.DataType) -> bool:
    if pa.types.is_dictionary(kind):
        return _is_read(kind.value_type)
    fitting = ("is_string", "is_large_string", "is_integer", "is_boolean", "is_floating", "is_null")
    return any(getattr(pa.types, name)(kind) for name in fitting)


def _cells(file: Path, column: pa.ChunkedArray, name: str) -> list[Any]:
    try:
        values: list[Any] = column.to_pylist()
    except UnicodeDecodeError as error:
        raise DataError(
            f"{file}: the column {name!r} holds text that is not UTF-8 ({error.reason}); write the "
            "file again from decoded text"
        ) from None
    return values
