"""Texts of every kind of file: what is read, which columns, what labels mean, what is refused."""

from __future__ import annotations

import csv
import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pyarrow.csv
import pytest
from edgestill.pipeline.data.source import NO_LABEL, Source
from edgestill.pipeline.data.text_readers import (
    Columns,
    open_texts,
    open_unlabelled_texts,
    text_files,
)
from edgestill.pipeline.errors import DataError

Write = Callable[[str, str | bytes], Path]

SST2 = "a stirring , funny film\t1\nso dull\t0\nsimply good\t1\nno laughs\t0\n"
BANKING = (
    'text,category\nWhere is it?,card\n"It says ""pending"",\nwhy?",payment\nMy card?,card\n'
    "I paid,payment\n"
)
AUTO = Columns()


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def make(name: str, content: str | bytes) -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return path

    return make


def texts(source: Source) -> list[tuple[str, ...]]:
    found = [text for text in source.contents() if isinstance(text, tuple)]
    assert len(found) == len(source.names) == len(source.labels)
    return found


def named(source: Source) -> list[str | None]:
    """The label of each sample by its name."""
    return [None if at == NO_LABEL else source.class_names[at] for at in source.labels]


def json_lines(*rows: Any) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def refused(path: Path, columns: Columns = AUTO, *, labelled: bool = True, **more: str) -> str:
    with pytest.raises(DataError) as caught:
        (open_texts if labelled else open_unlabelled_texts)(path, columns, **more)
    return str(caught.value)


# What is read


def test_sst2s_form_is_read_without_a_header_or_columns_named(write: Write) -> None:
    source = open_texts(write("train.tsv", SST2), AUTO)

    assert texts(source)[0] == ("a stirring , funny film",)
    assert source.labels.tolist() == [1, 0, 1, 0]
    assert source.class_names == ("0", "1")
    assert source.numbered
    assert source.names[:2] == ["train.tsv:1", "train.tsv:2"]
    assert source.ignored == 0


def test_banking77s_form_is_read_with_its_header_quotes_and_line_breaks(write: Write) -> None:
    source = open_texts(write("train.csv", BANKING), AUTO)

    assert texts(source)[1] == ('It says "pending",\nwhy?',)
    assert named(source) == ["card", "payment", "card", "payment"]
    assert source.class_names == ("card", "payment")
    assert not source.numbered
    assert source.names == ["train.csv:2", "train.csv:3", "train.csv:5", "train.csv:6"]


def test_the_stream_can_be_started_twice(write: Write) -> None:
    source = open_texts(write("train.tsv", SST2), AUTO)

    assert texts(source) == texts(source)


def test_the_same_rows_mean_the_same_in_every_kind_of_file(
    write: Write, tmp_path: Path, make: SimpleNamespace
) -> None:
    rows = [("good", 1), ("bad", 0), ("fine", 1), ("ugly", 0)]
    files = [
        write("a.csv", "text,label\n" + "".join(f"{t},{y}\n" for t, y in rows)),
        write("a.tsv", "".join(f"{t}\t{y}\n" for t, y in rows)),
        write("a.jsonl", json_lines(*({"text": t, "label": y} for t, y in rows))),
        write("b.jsonl", json_lines(*({"label": str(y), "text": t} for t, y in rows))),
        make.parquet(tmp_path / "a.parquet", {"text": [t for t, _ in rows],
                                              "label": [y for _, y in rows]}),
        make.parquet(tmp_path / "b.parquet", {"text": [t for t, _ in rows],
                                              "label": [bool(y) for _, y in rows]}),
    ]  # fmt: skip
    sources = [open_texts(file, AUTO) for file in files]

    for source in sources:
        assert texts(source) == [("good",), ("bad",), ("fine",), ("ugly",)]
        assert source.labels.tolist() == [1, 0, 1, 0]
        assert (source.class_names, source.numbered) == (("0", "1"), True)
    assert sources[-1].names[1] == "b.parquet row 1"


@pytest.mark.parametrize("name", ["a.csv", "a.tsv", "a.jsonl"])
def test_a_byte_order_mark_and_windows_line_ends_are_no_part_of_the_text(
    write: Write, name: str
) -> None:
    content = {
        "a.csv": "text,label\r\nä,x\r\nb,y\r\n",
        "a.tsv": "text\tlabel\r\nä\tx\r\nb\ty\r\n",
        "a.jsonl": '{"text": "ä", "label": "x"}\r\n{"text": "b", "label": "y"}\r\n',
    }[name]
    source = open_texts(write(name, b"\xef\xbb\xbf" + content.encode()), AUTO)

    assert texts(source) == [("ä",), ("b",)]
    assert named(source) == ["x", "y"]


@pytest.mark.parametrize("encoding", ["latin-1", "utf-16", "cp1252"])
def test_another_encoding_is_read_if_the_recipe_says_so(write: Write, encoding: str) -> None:
    path = write("a.csv", "text,label\nschön,x\nüber,y\n".encode(encoding))

    assert texts(open_texts(path, AUTO, encoding=encoding)) == [("schön",), ("über",)]


@pytest.mark.parametrize("kind", ["csv", "tsv", "jsonl", "txt"])
def test_a_text_of_200000_characters_passes_and_the_csv_limit_is_as_before(
    write: Write, kind: str
) -> None:
    long, before = "word " * 40_000 + "end", csv.field_size_limit()
    content = {
        "csv": f'text,label\n"{long}",x\nb,y\n',
        "tsv": f"text\tlabel\n{long}\tx\nb\ty\n",
        "jsonl": json_lines({"text": long, "label": "x"}, {"text": "b", "label": "y"}),
        "txt": f"{long}\nb\n",
    }[kind]
    reader = open_unlabelled_texts if kind == "txt" else open_texts

    assert texts(reader(write(f"a.{kind}", content), AUTO))[0] == (long,)
    assert csv.field_size_limit() == before


def test_rows_without_a_text_are_passed_over_and_counted(write: Write) -> None:
    rows = [{"text": t, "label": "xy"[n % 2]} for n, t in enumerate(["a", "", None, " \t", "b"])]
    path = write("a.jsonl", json_lines(*rows, {"text": "c", "label": "y"}))
    labelled, unlabelled = open_texts(path, AUTO), open_unlabelled_texts(path, AUTO)

    for source in (labelled, unlabelled):
        assert texts(source) == [("a",), ("b",), ("c",)]
        assert source.names == ["a.jsonl:1", "a.jsonl:5", "a.jsonl:6"]
        assert source.ignored == 3
    assert named(labelled) == ["x", "x", "y"]


def test_a_second_text_is_read_beside_the_first(write: Write) -> None:
    path = write("a.csv", "question,sentence,label\na?,A.,x\nb?,,x\nc?,C.,y\n")
    source = open_texts(path, Columns(pair="sentence"))

    assert texts(source) == [("a?", "A."), ("c?", "C.")]
    assert source.ignored == 1


def test_texts_stay_as_they_are_written(write: Write) -> None:
    path = write("a.jsonl", json_lines({"text": "  a\tb\n", "label": "x"}, {"text": "\u2028c\x07",
                                                                        "label": "y"}))  # fmt: skip
    assert texts(open_texts(path, AUTO)) == [("  a\tb\n",), ("\u2028c\x07",)]


def test_line_separators_of_unicode_do_not_end_a_line(write: Write) -> None:
    source = open_texts(write("a.tsv", "a\u2028b\x85c\x0bd\tx\ne\ty\n"), Columns(text=0, label=1))

    assert texts(source) == [("a\u2028b\x85c\x0bd",), ("e",)]


# Quotes in .tsv


@pytest.mark.parametrize(
    "text", ['"so good', 'so "good', 'a 5" screen', '"so good"', '"a" and "b"', '"', 'no "', '""a"']
)
def test_quotes_of_an_unquoted_tsv_belong_to_the_text(write: Write, text: str) -> None:
    source = open_texts(write("a.tsv", f"{text}\t1\nplain\t0\n"), Columns(text=0, label=1))

    assert texts(source)[0] == (text,)


@pytest.mark.parametrize("style", [csv.QUOTE_MINIMAL, csv.QUOTE_ALL, csv.QUOTE_NONNUMERIC])
@pytest.mark.parametrize("hard", ['says "no"', "a\ttab", "two\nlines", 'both\n"\t"'])
def test_a_tsv_of_a_quoting_writer_is_read_as_it_was_written(
    write: Write, tmp_path: Path, style: Any, hard: str
) -> None:
    rows = [(hard, 1), ("plain", 0), ("more", 1), ("words", 0)]
    with (tmp_path / "a.tsv").open("w", newline="") as handle:
        csv.writer(handle, delimiter="\t", quoting=style).writerows(rows)
    source = open_texts(tmp_path / "a.tsv", AUTO)

    assert texts(source) == [(text,) for text, _ in rows]
    assert source.labels.tolist() == [1, 0, 1, 0]


def test_two_lone_quotes_in_an_unquoted_tsv_join_no_lines(write: Write) -> None:
    source = open_texts(write("a.tsv", '"begins\t1\nb\t0\nends"\t1\nd\t0\n'), AUTO)

    assert texts(source) == [('"begins',), ("b",), ('ends"',), ("d",)]


# Which columns


@pytest.mark.parametrize(
    ("first", "expected"),
    [
        ("text,category", 4),  # usual names
        ("tweet_text,airline_sentiment", 4),  # the label's name is no label
        ("a first,card", 5),  # a row as the others
        ("category,card", 5),  # a usual name alone decides, but not if it is a text's neighbour
    ],
)
def test_a_header_is_told_from_a_row(write: Write, first: str, expected: int) -> None:
    rows = "category,card\nb,card\nc,pay\nd,pay\n"

    assert len(open_texts(write("a.csv", f"{first}\n{rows}"), AUTO)) == expected


@pytest.mark.parametrize(("header", "count"), [(True, 7), (False, 8), (None, 8)])
def test_the_recipe_may_say_whether_there_is_a_header(
    write: Write, header: bool | None, count: int
) -> None:
    assert len(open_texts(write("a.tsv", SST2 * 2), Columns(header=header))) == count


def test_columns_by_name_mean_a_header(write: Write) -> None:
    source = open_texts(write("a.csv", "u,v\na,x\nb,y\n"), Columns(text="u", label="v"))

    assert texts(source) == [("a",), ("b",)]


@pytest.mark.parametrize("columns", [Columns(text=2, label=0), Columns(text="body", label="kind")])
def test_columns_by_name_and_by_position_agree(write: Write, columns: Columns) -> None:
    path = write("a.csv", "kind,title,body\nx,t,a\ny,t,b\nx,t,c\n")
    source = open_texts(path, columns)

    assert texts(source) == [("a",), ("b",), ("c",)]
    assert named(source) == ["x", "y", "x"]


def test_a_label_of_an_unusual_name_is_found_as_the_only_other_column(write: Write) -> None:
    source = open_texts(write("a.jsonl", json_lines({"text": "a", "mood": "x"},
                                                    {"text": "b", "mood": "y"})), AUTO)  # fmt: skip
    assert named(source) == ["x", "y"]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("id,one,two\n1,a,b\n2,c,d\n", ("text", "id", "one, two", "data.text")),
        ("text,one,two\na,b,c\nd,e,f\n", ("the label?", "text, one, two", "data.label")),
        ("a,b\nc,d\ne,f\n", ("text", "data.text")),  # both columns could be either
        ("text;label\na;1\nb;0\n", ("semicolons",)),
    ],
)
def test_columns_that_cannot_be_told_are_listed(
    write: Write, content: str, words: tuple[str, ...]
) -> None:
    message = refused(write("a.csv", content), Columns(header=not content.startswith("a,b")))

    assert all(word in message for word in words)


@pytest.mark.parametrize(
    ("columns", "words"),
    [
        (Columns(text="txt"), ("data.text", "'txt'", "text, label", "mean 'text'")),
        (Columns(label="labell"), ("data.label", "mean 'label'")),
        (Columns(text=2), ("no column 2", "text, label")),
        (Columns(text=-1), ("no column -1",)),
        (Columns(text="label", label="label"), ("one column", "text", "label")),
        (Columns(text="text", header=False), ("data.header is false", "position")),
    ],
)
def test_a_column_that_is_not_there_is_refused(
    write: Write, columns: Columns, words: tuple[str, ...]
) -> None:
    message = refused(write("a.csv", "text,label\na,x\nb,y\n"), columns)

    assert all(word in message for word in words)


# Labels


@pytest.mark.parametrize(
    ("labels", "class_names", "numbered", "indices"),
    [
        (["1", "0", "2"], ("0", "1", "2"), True, [1, 0, 2]),
        (["0", "2", "2"], ("0", "1", "2"), True, [0, 2, 2]),
        (["5", "1", "10"], ("1", "5", "10"), False, [1, 0, 2]),  # stars
        (["b", "a", "b"], ("a", "b"), False, [1, 0, 1]),
        (["1", "one", "0"], ("0", "1", "one"), False, [1, 2, 0]),
        ([" b ", "a", "b"], ("a", "b"), False, [1, 0, 1]),
        (["1", "", "0"], ("0", "1"), True, [1, NO_LABEL, 0]),
        (["1", "-1", "0"], ("0", "1"), True, [1, NO_LABEL, 0]),
        (["b", "", "a"], ("a", "b"), False, [1, NO_LABEL, 0]),
    ],
)
def test_whole_numbers_from_0_are_class_numbers_and_all_else_are_names(
    write: Write, labels: list[str], class_names: tuple[str, ...], numbered: bool,
    indices: list[int],
) -> None:  # fmt: skip
    rows = "".join(f"text {n},{label}\n" for n, label in enumerate(labels))
    source = open_texts(write("a.csv", f"text,label\n{rows}"), AUTO)

    assert source.class_names == class_names
    assert source.numbered == numbered
    assert source.labels.tolist() == indices


def test_parquet_gives_the_names_of_its_class_labels(tmp_path: Path, make: SimpleNamespace) -> None:
    features = {"label": {"_type": "ClassLabel", "names": ["neg", "pos"]}}
    columns = {"sentence": ["a", "b", "c"], "label": [1, 0, None], "idx": [0, 1, 2]}
    path = make.parquet(tmp_path / "a.parquet", columns, features=features)
    source = open_texts(path, AUTO)

    assert source.class_names == ("neg", "pos")
    assert not source.numbered
    assert source.labels.tolist() == [1, 0, NO_LABEL]


def test_parquet_dictionaries_are_read(tmp_path: Path, make: SimpleNamespace) -> None:
    labels = pa.array(["x", "y", "x"]).dictionary_encode()
    path = make.parquet(tmp_path / "a.parquet", {"label": labels, "text": ["a", None, "c"]})
    source = open_texts(path, AUTO)

    assert texts(source) == [("a",), ("c",)]
    assert source.names == ["a.parquet row 0", "a.parquet row 2"]


@pytest.mark.parametrize(
    ("labels", "words"),
    [
        (["", "", ""], ("every label is empty",)),
        (["-1", "-1", "-1"], ("negative",)),
        (["0", "5000", "5000"], ("0 to 5000",)),
        ([f"id {n}" for n in range(20)], ("no label stands twice", "20 rows")),
    ],
)
def test_labels_that_cannot_be_meant_are_refused(
    write: Write, labels: list[str], words: tuple[str, ...]
) -> None:
    rows = "".join(f"text {n},{label}\n" for n, label in enumerate(labels))
    message = refused(write("a.csv", f"text,label\n{rows}"))

    assert all(word in message for word in (*words, "'label'"))


def test_a_number_beyond_the_declared_names_is_refused(
    tmp_path: Path, make: SimpleNamespace
) -> None:
    features = {"label": {"_type": "ClassLabel", "names": ["neg", "pos"]}}
    path = make.parquet(
        tmp_path / "a.parquet", {"text": ["a", "b"], "label": [0, 2]}, features=features
    )

    assert "the label 2 has no name" in refused(path)


# Texts without labels


def test_unlabelled_texts_are_one_a_line_or_as_a_labelled_set_has_them(write: Write) -> None:
    lines = open_unlabelled_texts(write("a.txt", 'a "b", c\n\n  d\n'), AUTO)
    table = open_unlabelled_texts(write("b.csv", BANKING), Columns(label="not there"))
    plain = open_unlabelled_texts(write("c.tsv", SST2), Columns(label=1))

    assert texts(lines) == [('a "b", c',), ("  d",)]
    assert lines.names == ["a.txt:1", "a.txt:3"]
    assert lines.ignored == 1
    assert len(table) == len(plain) == 4
    for source in (lines, table, plain):
        assert set(source.labels.tolist()) == {NO_LABEL}
        assert source.class_names == ()
        assert not source.labelled


def test_unlabelled_texts_need_no_column_of_labels(write: Write) -> None:
    assert texts(open_unlabelled_texts(write("a.csv", "review\nfine\n"), AUTO)) == [("fine",)]
    assert texts(open_unlabelled_texts(write("b.tsv", "fine\nbad\n"), AUTO)) == [
        ("fine",),
        ("bad",),
    ]


def test_a_txt_holds_neither_labels_nor_pairs(write: Write) -> None:
    path = write("a.txt", "a\nb\n")

    assert "without labels" in refused(path)
    assert "data.pair" in refused(path, Columns(pair="b"), labelled=False)


# Folders


def test_a_folder_is_read_in_order_of_name_and_other_files_are_counted(
    write: Write, tmp_path: Path
) -> None:
    write("set/b.csv", "text,label\nc,y\n")
    write("set/a.csv", "text,label\na,x\nb,y\n")
    write("set/README.md", "")
    write("set/.hidden.csv", "")
    source = open_texts(tmp_path / "set", AUTO)

    assert source.names == ["a.csv:2", "a.csv:3", "b.csv:2"]
    assert named(source) == ["x", "y", "y"]
    assert source.ignored == 2
    assert [file.name for file in text_files(tmp_path / "set")] == ["a.csv", "b.csv"]


def test_jsons_keys_have_no_order(write: Write, tmp_path: Path) -> None:
    write("set/a.jsonl", json_lines({"text": "a", "label": "x"}, {"label": "y", "text": "b"}))
    write("set/b.jsonl", json_lines({"id": 3, "label": "y", "text": "c"}))
    source = open_texts(tmp_path / "set", AUTO)

    assert texts(source) == [("a",), ("b",), ("c",)]
    assert named(source) == ["x", "y", "y"]


@pytest.mark.parametrize(
    ("files", "words"),
    [
        ({}, ("holds no .csv",)),
        ({"a.md": "", "in/b.csv": BANKING}, ("holds no .csv", "sub-folders")),
        ({"a.csv": BANKING, "b.tsv": SST2}, ("several kinds", "a.csv", "b.tsv")),
        ({"train.csv": BANKING, "test.csv": BANKING}, ("several sets", "train.csv", "test.csv")),
        ({"a.csv": BANKING, "b.csv": "text,other\na,b\n"}, ("b.csv", "text, other", "a.csv")),
        ({"a.tsv": SST2, "b.tsv": "u\tv\t1\n"}, ("b.tsv", "a.tsv")),
    ],
)
def test_a_folder_that_is_not_one_set_is_refused(
    write: Write, tmp_path: Path, files: dict[str, str], words: tuple[str, ...]
) -> None:
    (tmp_path / "set").mkdir()
    for name, content in files.items():
        write(f"set/{name}", content)
    message = refused(tmp_path / "set")

    assert all(word in message for word in words)


def test_shards_with_other_class_names_are_refused(tmp_path: Path, make: SimpleNamespace) -> None:
    for name, names in (("a", ["neg", "pos"]), ("b", ["pos", "neg"])):
        features = {"label": {"_type": "ClassLabel", "names": names}}
        make.parquet(tmp_path / f"{name}.parquet", {"text": ["u", "v"], "label": [0, 1]},
                     features=features)  # fmt: skip

    assert "b.parquet: its class names" in refused(tmp_path)


# Bad files


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.csv", "text,label\na,x\nb,y,z\n", (":3: has 3 fields, and line 1 has 2", "quotes")),
        ("a.csv", "text,label\na,x\nb\n", (":3: has 1 fields",)),
        ("a.tsv", "a\t1\nb\tc\t0\n", (":2: has 3 fields, and line 1 has 2", "a tab")),
        ("a.csv", 'text,label\na,x\n"b,y\nc,x\n', (":3: the row that begins here", "closed")),
        ("a.csv", 'text,label\n"a"b,x\n', (":2: the row that begins here",)),
        ("a.csv", b"text,label\na,x\nsch\xf6n,y\n",
         (":3: is not utf-8: byte 18 is 0xf6", "data.encoding", "latin-1")),
        ("a.csv", b"\xef\xbb\xbftext,label\nsch\xf6n,y\n", (":2: is not utf-8: byte 17 is 0xf6",)),
        ("a.csv", "text,label\nschön,x\n".encode() + b"\xf6,y\n", (":3:", "mixes encodings")),
        ("a.csv", "text,label\na,x\n".encode("utf-16"), ("data.encoding: utf-16",)),
        ("a.csv", "text,label\na,x\n".encode("utf-16-le"), (":1: holds a NUL byte", "utf-16")),
        ("a.tsv", "a\t1\nb\0\t0\n", (":2: holds a NUL byte",)),
        ("a.csv", "", ("is empty",)),
        ("a.tsv", "\n\n", ("is empty",)),
        ("a.jsonl", "\n", ("is empty",)),
        ("a.csv", "text,label\n", ("a header (text, label) and no row", "data.header: false")),
        ("a.csv", "text,label\n,x\n ,y\n", ("none of its 2 rows holds a text", "data.text")),
        ("a.jsonl", '{"text": "a", "label": 1}\n{"text": \n', (":2:", "not JSON")),
        ("a.jsonl", '[{"text": "a"}', (":1:", "JSON array")),
        ("a.jsonl", "[" * 100_000, (":1:", "not JSON")),
        ("a.jsonl", "[1]\n", (":1:", "got a JSON list")),
        ("a.jsonl", '{"text": "a", "label": 1}\n{"label": 0}\n', (":2:", "'text'", "that key")),
        ("a.jsonl", '{"text": "a", "label": 1}\n{"text": "b"}\n', (":2:", "'label'", "that key")),
        ("a.jsonl", '{"text": 5, "label": 1}\n', (":1:", "expected a text", "number 5")),
        ("a.jsonl", '{"text": ["a"], "label": 1}\n', (":1:", "expected a text", "a list")),
        ("a.jsonl", '{"text": "a", "label": 0.5}\n', (":1:", "whole number", "number 0.5")),
        ("a.jsonl", '{"text": "a\\ud800", "label": 1}\n', (":1:", "surrogate")),
        ("a.json", "[]", ("got a .json", "one a line")),
        ("a.csv.gz", b"", ("got a .gz",)),
        ("a.parquet", b"PAR1", ("cannot be read as parquet",)),
    ],
)  # fmt: skip
def test_a_bad_file_is_one_error_with_its_place(
    write: Write, name: str, content: str | bytes, words: tuple[str, ...]
) -> None:
    path = write(name, content)
    message = refused(path)

    assert str(path) in message
    assert all(word in message for word in words), message


@pytest.mark.parametrize(
    ("columns", "words"),
    [
        ({"text": [1, 2], "label": [0, 1]}, ("row 0", "expected a text", "number 1")),
        ({"text": [["a"], ["b"]], "label": [0, 1]}, ("row 0", "a column of list")),
        ({"text": ["a", "b"], "label": [0.5, 1.0]}, ("row 0", "whole number")),
        ({"text": pa.array([], pa.string()), "label": pa.array([], pa.int64())}, ("no rows",)),
    ],
)
def test_parquet_of_other_types_is_refused(
    tmp_path: Path, make: SimpleNamespace, columns: dict[str, Any], words: tuple[str, ...]
) -> None:
    message = refused(make.parquet(tmp_path / "a.parquet", columns))

    assert all(word in message for word in (*words, "a.parquet"))


@pytest.mark.parametrize("encoding", ["no-such", "rot13"])
def test_an_unknown_encoding_is_refused(write: Write, encoding: str) -> None:
    assert "data.encoding" in refused(write("a.tsv", SST2), encoding=encoding)


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    assert "there is no such file" in refused(tmp_path / "none.csv")


# Real sets


def test_the_real_sst2_is_read_whole(shared_data: Path) -> None:
    path = shared_data / "sst2" / "train.tsv"
    source = open_texts(path, AUTO)
    lines = [line.split("\t") for line in path.read_text().splitlines()]

    assert texts(source) == [(text,) for text, _ in lines]
    assert source.labels.tolist() == [int(label) for _, label in lines]
    assert Counter(source.labels.tolist()) == {1: 3610, 0: 3310}


def test_the_real_banking77_is_read_as_pyarrow_reads_it(shared_data: Path) -> None:
    path = shared_data / "banking77" / "train.csv"
    source = open_texts(path, AUTO)
    options = pyarrow.csv.ParseOptions(newlines_in_values=True)
    table = pyarrow.csv.read_csv(path, parse_options=options)

    assert texts(source) == [(text,) for text in table["text"].to_pylist()]
    assert named(source) == table["category"].to_pylist()
    assert len(source.class_names) == 77
