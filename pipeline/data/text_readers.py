"""Where texts come from: .csv, .tsv, .jsonl or .parquet, a file or a folder of files of one kind.

Texts without labels come from the same, whose labels are then ignored, or from .txt, one a line.
How each kind is parsed is in text_tables.py. Here columns are chosen and labels joined; texts stay
as they are written. A row without a text (empty, null or only spaces; of a pair, either one) is
passed over and counted. What labels mean is in text_labels.py.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from ..errors import DataError
from .parquet import shards
from .source import NO_LABEL, Source, listing
from .text_labels import to_labels
from .text_tables import ABSENT, Table, Unread, read_table

SUFFIXES = (".csv", ".tsv", ".jsonl", ".parquet")
UNLABELLED_SUFFIXES = (*SUFFIXES, ".txt")
# Names in use on the Hub, in order of preference.
TEXT_NAMES = (
    "text", "sentence", "content", "review", "question", "utterance", "query", "comment", "tweet",
    "message", "document", "body", "review_text", "description", "headline", "title",
)  # fmt: skip
LABEL_NAMES = (
    "label", "labels", "category", "class", "target", "intent", "sentiment", "emotion", "topic",
    "stars", "rating", "y", "cls",
)  # fmt: skip
_LONGEST_LABEL = 64  # characters; Banking77's longest has 48
_SPLIT = re.compile(r"(train|training|dev|val|valid|validation|eval|test)(?![a-z])", re.IGNORECASE)
_NUMBER = re.compile(r"[-+]?[0-9.]+")


@dataclass(frozen=True)
class Columns:
    """What the recipe says of columns: each by name, or by position from 0.

    Attributes:
        text, label: None: found by itself. pair: a second text; None: there is none.
        header: of csv and tsv; None: decided by looking (`_looks_like_header`).
    """

    text: str | int | None = None
    label: str | int | None = None
    pair: str | int | None = None
    header: bool | None = None


def open_texts(path: Path, columns: Columns, *, encoding: str = "utf-8") -> Source:
    """A labelled set. Its stream yields (text,), or (text, pair) where `columns.pair` is given.

    Raises:
        DataError: missing, empty, not in a form that is understood, or without labels.
    """
    tables, ignored = _tables(path, columns, encoding)
    if tables[0].file.suffix.lower() == ".txt":
        raise DataError(
            f"{tables[0].file}: a .txt holds texts without labels; give a "
            f"{', '.join(SUFFIXES)} file with a column of labels"
        )
    chosen = _choose(tables[0], columns, labelled=True)
    texts, names, values = _rows(path, tables, chosen)
    where = f"{path} {_called(tables[0], chosen['label'])}"
    labels, class_names, numbered = to_labels(
        values, _declared(tables, chosen["label"]), where=where
    )
    return Source(
        where=str(path),
        labels=labels,
        class_names=class_names,
        numbered=numbered,
        names=names,
        contents=lambda: iter(texts),
        ignored=ignored + sum(len(table.places) for table in tables) - len(texts),
    )


def open_unlabelled_texts(path: Path, columns: Columns, *, encoding: str = "utf-8") -> Source:
    """As `open_texts`, but of the texts alone: labels are neither needed nor looked at.

    Raises:
        DataError: missing, empty, or not in a form that is understood.
    """
    columns = replace(columns, label=None)
    tables, ignored = _tables(path, columns, encoding)
    if tables[0].file.suffix.lower() == ".txt":
        if columns.pair is not None:
            raise DataError(
                f"{path}: a .txt has one text a line, and data.pair asks for two; give a "
                f"{', '.join(SUFFIXES)} file"
            )
        chosen = {"text": 0}
    else:
        chosen = _choose(tables[0], columns, labelled=False)
    texts, names, _ = _rows(path, tables, chosen)
    return Source(
        where=str(path),
        labels=np.full(len(texts), NO_LABEL, np.int64),
        class_names=(),
        numbered=False,
        names=names,
        contents=lambda: iter(texts),
        ignored=ignored + sum(len(table.places) for table in tables) - len(texts),
        labelled=False,
    )


def text_files(path: Path) -> list[Path]:
    """The files of one set: the file itself, or those of one kind in the folder, by name.

    Raises:
        DataError: no such file, none of a kind that is read, of several kinds, or of several sets.
    """
    kinds = ", ".join(SUFFIXES)
    if path.is_file():
        if path.suffix.lower() not in UNLABELLED_SUFFIXES:
            hint = "; write a JSON array's objects one a line" if path.suffix == ".json" else ""
            raise DataError(
                f"{path}: expected a {kinds} file, or a .txt of texts without labels, got a "
                f"{path.suffix or 'file without suffix'}{hint}"
            )
        return [path]
    if not path.is_dir():
        raise DataError(f"{path}: there is no such file or folder; give a {kinds} file")
    files = [file for file in _entries(path) if file.suffix.lower() in UNLABELLED_SUFFIXES]
    if not files:
        raise DataError(
            f"{path}: holds no {kinds} (nor .txt) file; what lies in its sub-folders is not read"
        )
    of_kind = {file.suffix.lower(): file.name for file in files}
    if len(of_kind) > 1:
        raise DataError(
            f"{path}: holds files of several kinds ({listing(of_kind.values())}); give the one "
            "that is meant as the path"
        )
    splits = {match[1].lower(): f for f in files if (match := _SPLIT.match(f.name))}
    if len(splits) > 1:
        raise DataError(
            f"{path}: the files {listing(file.name for file in splits.values())} look like "
            f"several sets; give each by itself, e.g. data.train.path: {splits.popitem()[1]}"
        )
    if ".parquet" in of_kind:
        shards(path)  # which knows how Hugging Face names the shards of several sets
    return files


def _entries(folder: Path) -> list[Path]:
    try:
        found = sorted(folder.iterdir())
    except OSError as error:
        raise DataError(f"{folder}: cannot be read: {error.strerror}") from None
    return [entry for entry in found if entry.is_file() and not entry.name.startswith(".")]


def _tables(path: Path, columns: Columns, encoding: str) -> tuple[list[Table], int]:
    """The files of a set, with names of their columns where they have any; and files not read."""
    files = text_files(path)
    tables = [_with_header(read_table(file, encoding=encoding), columns) for file in files]
    first = tables[0]
    for table in tables[1:]:
        fits = len(table.columns) == len(first.columns) and table.names == first.names
        if first.file.suffix.lower() != ".jsonl" and not fits:
            raise DataError(
                f"{table.file}: its columns ({_columns(table)}) are not those of "
                f"{first.file.name} ({_columns(first)}); a folder holds the files of one set"
            )
    others = sum(entry.is_file() for entry in path.iterdir()) - len(files) if path.is_dir() else 0
    return tables, others


def _with_header(table: Table, columns: Columns) -> Table:
    if table.names is not None or table.file.suffix.lower() == ".txt":
        return table
    header = columns.header
    if header is None:
        by_name = any(isinstance(c, str) for c in (columns.text, columns.label, columns.pair))
        header = by_name or _looks_like_header(table, columns)
    if not header:
        return table
    names = tuple(cells[0].strip() for cells in table.columns)
    if len(table.places) == 1:
        raise DataError(
            f"{table.file}: holds a header ({listing(names)}) and no row below it; if it is a row, "
            "set `data.header: false`"
        )
    return replace(
        table, names=names, columns=[cells[1:] for cells in table.columns], places=table.places[1:]
    )


def _looks_like_header(table: Table, columns: Columns) -> bool:
    """Is the first row of a csv or tsv the names of its columns?

    Yes, if one of its cells is a usual name of a column and stands nowhere below; or if its cell
    in the column of labels is no number and stands nowhere below, where labels repeat. The column
    of labels is the one given by position, or of two the one that `_is_of_labels`.
    """
    usual = {*TEXT_NAMES, *LABEL_NAMES}
    if any(c[0].strip().lower() in usual and c[0] not in c[1:] for c in table.columns):
        return True
    at = columns.label
    if at is None and len(table.columns) == 2:
        at = _label_of_two([cells[1:] for cells in table.columns])
    if not isinstance(at, int) or not 0 <= at < len(table.columns):
        return False
    first, *below = table.columns[at]
    is_name = bool(first.strip()) and not _NUMBER.fullmatch(first.strip())
    return is_name and first not in below and _is_of_labels(below)


def _label_of_two(columns: list[list[Any]]) -> int | None:
    """Which of two columns has labels; where both repeat, one has half the other's values."""
    fitting = [at for at, cells in enumerate(columns) if _is_of_labels(cells)]
    if len(fitting) == 2:
        distinct = [len(set(map(str, cells))) for cells in columns]
        fitting = [at for at in fitting if 2 * distinct[at] <= distinct[1 - at]]
    return fitting[0] if len(fitting) == 1 else None


def _is_of_labels(cells: list[Any]) -> bool:
    """Few distinct short values: each stands twice on average."""
    values = [str(cell) for cell in cells if isinstance(cell, str | int) and str(cell).strip()]
    short = all(len(value) <= _LONGEST_LABEL for value in values)
    return bool(values) and short and 2 * len(set(values)) <= len(values)


def _choose(table: Table, columns: Columns, *, labelled: bool) -> dict[str, int]:
    """Position of "text" and, where there are any, of "pair" and "label"."""
    asked = {"text": columns.text, "pair": columns.pair, "label": columns.label}
    chosen = {role: _find(table, which, role) for role, which in asked.items() if which is not None}
    for role, usual in (("text", TEXT_NAMES), ("label", LABEL_NAMES)):
        if role not in chosen:
            chosen |= _by_usual_name(table, role, usual, taken=chosen.values())
    free = [at for at in range(len(table.columns)) if at not in chosen.values()]
    if not {"text", "label"} & chosen.keys() and len(free) == 2:
        at = _label_of_two([table.columns[one] for one in free])
        if at is not None:
            chosen |= {"label": free[at], "text": free[1 - at]}
    for role in ("text", "label") if labelled else ("text",):
        if role not in chosen and len(free) == 1:
            chosen[role] = free.pop()  # no other is left
        elif role not in chosen:
            _unknown(table, role)
    if len(set(chosen.values())) < len(chosen):
        said = ", ".join(f"{role}: {_called(table, at)}" for role, at in chosen.items())
        raise DataError(f"{table.file}: one column cannot have two parts ({said})")
    return chosen if labelled else {r: at for r, at in chosen.items() if r != "label"}


def _find(table: Table, which: str | int, role: str) -> int:
    here = f"{table.file}: data.{role}:"
    if isinstance(which, int):
        if not 0 <= which < len(table.columns):
            raise DataError(
                f"{here} there is no column {which}, counted from 0; its columns are "
                f"{_columns(table)}"
            )
        return which
    if table.names is None:
        raise DataError(
            f"{here} the column {which!r} is asked for by name, and data.header is false; give "
            "its position, from 0"
        )
    if table.names.count(which) == 1:
        return table.names.index(which)
    near = difflib.get_close_matches(which, table.names, n=1)
    raise DataError(
        f"{here} there {'are several columns' if which in table.names else 'is no column'} "
        f"{which!r}; its columns are {_columns(table)}"
        + (f"; did you mean {near[0]!r}?" if near and near[0] != which else "")
    )


def _by_usual_name(
    table: Table, role: str, usual: tuple[str, ...], *, taken: Iterable[int]
) -> dict[str, int]:
    names = [name.lower() for name in table.names or ()]
    places = [names.index(name) for name in usual if name in names]
    free = [at for at in places if at not in taken]
    return {role: free[0]} if free else {}


def _unknown(table: Table, role: str) -> NoReturn:
    hint = ""
    if len(table.columns) == 1 and any(";" in str(cell) for cell in table.columns[0][:1]):
        hint = "; if semicolons stand between its columns, write the file with commas"
    raise DataError(
        f"{table.file}: which column is the {role}? Its columns are {_columns(table)}; set "
        f"`data.{role}` to a name, or to a position from 0{hint}"
    )


def _columns(table: Table) -> str:
    if table.names is not None:
        return listing(table.names)
    shown = [f"{at}: {str(cells[0])[:30]!r} …" for at, cells in enumerate(table.columns)]
    return f"{listing(shown)} (without a header)"


def _called(table: Table, at: int) -> str:
    return f"column {at}" if table.names is None else repr(table.names[at])


def _rows(
    path: Path, tables: list[Table], chosen: dict[str, int]
) -> tuple[list[tuple[str, ...]], list[str], list[str | None]]:
    """Texts, where they stand, and labels, of every row that has a text."""
    texts, names, labels = [], [], []
    for table in tables:
        cells = {role: _same_column(tables[0], table, at) for role, at in chosen.items()}
        for row, place in enumerate(table.places):
            where = str(table.file.parent / place)
            found = [
                _text(cells[role][row], where, _called(tables[0], chosen[role]))
                for role in ("text", "pair")
                if role in chosen
            ]
            if all(found):
                texts.append(tuple(found))
                names.append(place)
                if "label" in chosen:
                    called = _called(tables[0], chosen["label"])
                    labels.append(_label(cells["label"][row], where, called))
    if not texts:
        count = sum(len(table.places) for table in tables)
        raise DataError(
            f"{path}: none of its {count} rows holds a text in {_called(tables[0], chosen['text'])}"
            "; set `data.text` to another column, or give another set"
        )
    return texts, names, labels


def _same_column(first: Table, table: Table, at: int) -> list[Any]:
    """JSON's keys have no order, so a second file's columns are found by name."""
    if first.names is None or table.names is None or table.names == first.names:
        return table.columns[at]
    name = first.names[at]
    if name not in table.names:
        return [ABSENT] * len(table.places)
    return table.columns[table.names.index(name)]


def _text(cell: Any, where: str, called: str) -> str:
    """The text as it is written, or "" where there is none."""
    if cell is None:
        return ""
    if not isinstance(cell, str):
        raise DataError(f"{where}: expected a text in {called}, got {_kind(cell)}")
    try:
        cell.encode()
    except UnicodeEncodeError:
        raise DataError(
            f"{where}: {called} holds half a surrogate pair (\\ud800 to \\udfff), which is no "
            "character; write the file again from whole text"
        ) from None
    return cell if cell.strip() else ""


def _label(cell: Any, where: str, called: str) -> str | None:
    if isinstance(cell, bool | int):
        return str(int(cell))
    if cell is not None and not isinstance(cell, str):
        raise DataError(
            f"{where}: expected a whole number or a name as the label in {called}, got "
            f"{_kind(cell)}"
        )
    return (cell or "").strip() or None


def _kind(cell: Any) -> str:
    if cell is ABSENT:
        return "a line without that key"
    if isinstance(cell, Unread):
        return f"a column of {cell.kind}"
    kinds = {bool: "true or false", dict: "an object", list: "a list"}
    return kinds.get(type(cell), f"the number {cell}")


def _declared(tables: list[Table], at: int) -> tuple[str, ...] | None:
    """Class names that the files themselves give to the labels."""
    found = [table.class_names.get((table.names or ())[at]) if table.names else None
             for table in tables]  # fmt: skip
    for table, names in zip(tables, found, strict=True):
        if names != found[0]:
            raise DataError(
                f"{table.file}: its class names are not those of {tables[0].file.name}; a folder "
                "holds the files of one set"
            )
    return found[0]
