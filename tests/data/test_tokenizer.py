"""The tokenizer: tokens against the library's and transformers', cutting, what ships."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from edgestill.pipeline.data.golden import HARD
from edgestill.pipeline.data.tokenizer import (
    TextTokenizer,
    Tokens,
    choose_length,
    open_tokenizer,
    read_tokenizer,
)
from edgestill.pipeline.errors import ModelError
from hypothesis import given, settings
from hypothesis import strategies as st

tokenizers = pytest.importorskip("tokenizers", reason="comes with edgestill[hf]")

WORDS = (
    "[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "the", "film", "is", "good", "##ness", "bad",
    "un", "##like", "##ly", "a", "e", "##e", "!", ",", ".", "你", "好", "😀", "cafe",
)  # fmt: skip
ID = {word: number for number, word in enumerate(WORDS)}
PAIRED = "[CLS] $A [SEP] $B:1 [SEP]:1"
Make = Callable[..., Path]


def library(
    words: Sequence[str] = WORDS, *, pair: str = PAIRED, special: Sequence[str] = WORDS[:5]
) -> Any:
    """A tokenizer like BERT's, of these words."""
    vocabulary = {word: number for number, word in enumerate(words)}
    made = tokenizers.Tokenizer(tokenizers.models.WordPiece(vocabulary, unk_token="[UNK]"))
    made.normalizer = tokenizers.normalizers.BertNormalizer(lowercase=True)
    made.pre_tokenizer = tokenizers.pre_tokenizers.BertPreTokenizer()
    made.add_special_tokens([word for word in special if word in vocabulary])
    made.post_processor = tokenizers.processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair=pair,
        special_tokens=[("[CLS]", vocabulary["[CLS]"]), ("[SEP]", vocabulary["[SEP]"])],
    )
    return made


@pytest.fixture
def make(tmp_path: Path) -> Make:
    """make(library, config=…) writes a Hugging Face folder."""

    def write(made: Any, **files: object) -> Path:
        folder = tmp_path / "folder"
        folder.mkdir(exist_ok=True)
        (folder / "tokenizer.json").write_text(made.to_str(), encoding="utf-8")
        for name, content in files.items():
            (folder / f"{name}.json").write_text(json.dumps(content))
        return folder

    return write


@pytest.fixture(scope="module")
def single() -> TextTokenizer:
    return read_tokenizer(library().to_str())


@pytest.fixture(scope="module")
def double() -> TextTokenizer:
    return read_tokenizer(library().to_str(), paired=True)


def refused(reference: object, **options: Any) -> str:
    with pytest.raises(ModelError) as caught:
        open_tokenizer(str(reference), **options)
    return str(caught.value)


def of_library(made: Any, texts: Sequence[tuple[str, ...]], max_length: int) -> list[list[int]]:
    """Ids by the library's own truncation."""
    made.no_padding()
    made.enable_truncation(max_length, strategy="longest_first", direction="right")
    return [made.encode(*text).ids for text in texts]


def ids(tokens: Tokens) -> list[list[int]]:
    return [row[: mask.sum()].tolist() for row, mask in tokens.contents[:, :2]]


# Tokens


def test_a_text_worked_by_hand(single: TextTokenizer) -> None:
    tokens = single.encode([("The film is GOODNESS!",), ("Café",)])

    assert tokens.contents.dtype == np.int32
    assert tokens.contents[:, 0].tolist() == [
        [ID[word] for word in ("[CLS]", "the", "film", "is", "good", "##ness", "!", "[SEP]")],
        [ID["[CLS]"], ID["cafe"], ID["[SEP]"], *[ID["[PAD]"]] * 5],
    ]
    assert tokens.contents[:, 1].tolist() == [[1] * 8, [1, 1, 1, 0, 0, 0, 0, 0]]
    assert tokens.lengths.dtype == np.int64
    assert tokens.lengths.tolist() == [8, 3]
    assert tokens.truncated == 0
    assert single.rows == ("input_ids", "attention_mask")


def test_a_pair_has_token_types(double: TextTokenizer) -> None:
    tokens = double.encode([("good film", "bad"), ("a", "a")])

    assert double.rows == ("input_ids", "attention_mask", "token_type_ids")
    assert tokens.contents[0].tolist() == [
        [ID[word] for word in ("[CLS]", "good", "film", "[SEP]", "bad", "[SEP]")],
        [1, 1, 1, 1, 1, 1],
        [0, 0, 0, 0, 1, 1],
    ]
    assert tokens.contents[1].tolist() == [
        [ID["[CLS]"], ID["a"], ID["[SEP]"], ID["a"], ID["[SEP]"], ID["[PAD]"]],
        [1, 1, 1, 1, 1, 0],
        [0, 0, 0, 1, 1, 0],
    ]


def test_what_is_cut_keeps_its_special_tokens_and_is_counted(single: TextTokenizer) -> None:
    tokens = single.encode([("the film is good",), ("bad",)], max_length=4)

    assert ids(tokens) == [
        [ID[word] for word in ("[CLS]", "the", "film", "[SEP]")],
        [ID[word] for word in ("[CLS]", "bad", "[SEP]")],
    ]
    assert tokens.lengths.tolist() == [6, 3]
    assert tokens.truncated == 1


def test_the_width_is_that_of_the_longest_text_kept(single: TextTokenizer) -> None:
    texts = [("a",), ("a e",)]

    assert single.encode(texts, max_length=64).contents.shape == (2, 2, 4)
    assert single.encode(texts, max_length=3).contents.shape == (2, 2, 3)
    assert single.encode([]).contents.shape == (0, 2, 1)


words = st.lists(st.sampled_from([*WORDS, "unlikely", "x"]), max_size=12).map(" ".join)


@settings(max_examples=150, deadline=None)
@given(st.lists(words, min_size=1, max_size=4), st.integers(3, 16))
def test_cutting_equals_the_librarys_own(texts: list[str], limit: int) -> None:
    made = library()
    rows = [(text,) for text in texts]

    expected = of_library(made, rows, limit)

    assert ids(read_tokenizer(made.to_str()).encode(rows, max_length=limit)) == expected


@settings(max_examples=150, deadline=None)
@given(st.lists(st.tuples(words, words), min_size=1, max_size=4), st.integers(5, 20))
@pytest.mark.parametrize("pair", [PAIRED, "[CLS] $A [SEP] [SEP] $B [SEP]", "$B:1 [SEP] $A [CLS]"])
def test_cutting_a_pair_equals_the_librarys_own(
    pair: str, texts: list[tuple[str, str]], limit: int
) -> None:
    made = library(pair=pair)

    expected = of_library(made, texts, limit)

    tokens = read_tokenizer(made.to_str(), paired=True).encode(texts, max_length=limit)
    assert ids(tokens) == expected


def test_two_endless_texts_are_cut_without_all_combinations(double: TextTokenizer) -> None:
    tokens = double.encode([("good " * 20_000, "bad " * 20_000)], max_length=8)

    assert tokens.contents[0, 0].tolist() == [
        ID[word] for word in ("[CLS]", "good", "good", "[SEP]", "bad", "bad", "bad", "[SEP]")
    ]
    assert tokens.lengths.tolist() == [40_003]


def test_an_endless_text_does_not_decide_the_width(single: TextTokenizer) -> None:
    tokens = single.encode([("good " * 20_000,), ("bad",)])

    assert tokens.contents.shape == (2, 2, 512)
    assert tokens.lengths.tolist() == [20_002, 3]
    assert tokens.truncated == 1


def test_many_texts_are_read_once_in_chunks_and_stay_in_order(single: TextTokenizer) -> None:
    texts = [(" ".join(["good"] * (number % 7)),) for number in range(3000)]

    tokens = single.encode(iter(texts))

    assert tokens.lengths.tolist() == [number % 7 + 2 for number in range(3000)]
    assert (tokens.contents[:, 1].sum(1) == tokens.lengths).all()


@pytest.mark.parametrize("limit", [0, 1, 2])
def test_a_length_without_room_for_a_token_is_refused(single: TextTokenizer, limit: int) -> None:
    with pytest.raises(ModelError, match=r"max_length to at least 3"):
        single.encode([("a",)], max_length=limit)


# What is opened and what ships


def test_what_tokenizer_json_says_of_cutting_and_padding_counts_for_nothing(make: Make) -> None:
    plain, set_up = library(), library()
    set_up.enable_truncation(3, direction="left")
    set_up.enable_padding(direction="left", pad_id=1, pad_token="[UNK]", length=9)
    texts = [("the film is good",), ("a",)]

    expected, found = (open_tokenizer(str(make(made)), paired=False) for made in (plain, set_up))

    assert found.document == expected.document
    assert json.loads(found.document)["truncation"] is None
    assert json.loads(found.document)["padding"] is None
    assert ids(found.encode(texts)) == ids(expected.encode(texts))
    assert found.encode(texts).contents[1, 1].tolist() == [1, 1, 1, 0, 0, 0]


def test_a_folder_its_file_and_its_document_are_one_tokenizer(make: Make) -> None:
    folder = make(library(), tokenizer_config={"model_max_length": 64})
    opened = [
        open_tokenizer(reference)
        for reference in (f"hf:{folder}", str(folder), str(folder / "tokenizer.json"))
    ]
    opened.append(read_tokenizer(opened[0].document, longest=64))

    for one in opened:
        assert one.document == opened[0].document
        assert (one.size, one.pad_id, one.longest) == (len(WORDS), 0, 64)
        assert ids(one.encode([("good film",)])) == ids(opened[0].encode([("good film",)]))


def test_the_document_is_the_same_in_another_process(make: Make) -> None:
    made = library()
    made.add_tokens([f"added{number}" for number in range(40)])
    folder = make(made)
    code = (
        "import sys; from edgestill.pipeline.data.tokenizer import open_tokenizer; "
        "sys.stdout.write(open_tokenizer(sys.argv[1]).document)"
    )

    other = subprocess.run(
        [sys.executable, "-P", "-c", code, str(folder)], capture_output=True, text=True, check=True
    )

    assert other.stdout == open_tokenizer(str(folder)).document


def test_the_vocabulary_of_wordpiece_is_a_token_a_line_in_order_of_ids() -> None:
    made = library()
    made.add_tokens(["added"])

    assert read_tokenizer(made.to_str()).vocabulary_txt == "\n".join([*WORDS, "added", ""])


def test_another_model_has_no_vocabulary_txt() -> None:
    made = tokenizers.Tokenizer(tokenizers.models.BPE({"<pad>": 0, "a": 1, "b": 2, "ab": 3},
                                                      [("a", "b")]))  # fmt: skip
    opened = read_tokenizer(made.to_str())

    assert opened.vocabulary_txt is None
    assert ids(opened.encode([("aba",)])) == [[3, 1]]


@pytest.mark.parametrize(
    ("stated", "longest"),
    [(128, 128), (1000000000000000019884624838656, None), (1e30, None), (None, None), ("x", None)],
)
def test_the_longest_text_is_stated_or_unknown(
    make: Make, stated: object, longest: int | None
) -> None:
    folder = make(library(), tokenizer_config={"model_max_length": stated})

    assert open_tokenizer(str(folder)).longest == longest


@pytest.mark.parametrize(
    "files",
    [
        {"tokenizer_config": {"pad_token": "<blank>"}},
        {"tokenizer_config": {"pad_token": {"content": "<blank>", "lstrip": False}}},
        {"special_tokens_map": {"pad_token": "<blank>"}},
        {"special_tokens_map": {"pad_token": {"content": "<blank>"}}, "tokenizer_config": {}},
    ],
)
def test_a_padding_token_of_another_name_is_read_beside_the_file(
    make: Make, files: dict[str, Any]
) -> None:
    opened = open_tokenizer(str(make(library([*WORDS[1:], "<blank>"]), **files)))

    assert opened.pad_id == len(WORDS) - 1
    assert opened.encode([("a",), ("a e",)]).contents[0, 0, -1] == len(WORDS) - 1


def test_a_tokenizer_without_a_padding_token_is_refused(make: Make) -> None:
    message = refused(make(library(WORDS[1:])))

    assert "no padding token" in message
    assert "tokenizer_config.json" in message


@pytest.mark.parametrize("content", ["", "{}", "[]", '{"model": {"type": "Odd"}}', b"\xff\xfe\0"])
def test_a_file_that_is_no_tokenizer_is_refused(tmp_path: Path, content: str | bytes) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    message = refused(path)

    assert str(path) in message
    assert "not a tokenizer.json" in message or "cannot be read" in message


@pytest.mark.parametrize("content", ["{", "[]"])
def test_a_broken_configuration_beside_it_is_refused(make: Make, content: str) -> None:
    folder = make(library())
    (folder / "tokenizer_config.json").write_text(content)

    assert "tokenizer_config.json" in refused(folder)


def test_a_folder_without_a_tokenizer_is_refused(tmp_path: Path) -> None:
    assert "holds no tokenizer" in refused(f"hf:{tmp_path}")
    assert "there is no such" in refused(tmp_path / "none")


@pytest.mark.parametrize("absent", ["tokenizers", "transformers"])
def test_an_absent_package_names_the_extra(
    make: Make, monkeypatch: pytest.MonkeyPatch, absent: str
) -> None:
    folder = make(library())
    if absent == "transformers":
        (folder / "tokenizer.json").unlink()
        (folder / "vocab.txt").write_text("[PAD]\n")
    monkeypatch.setitem(sys.modules, absent, None)
    message = refused(folder)

    assert f"needs {absent}" in message
    assert "edgestill[hf]" in message


def test_a_tokenizer_json_needs_no_transformers(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)

    assert open_tokenizer(str(make(library()))).size == len(WORDS)


def test_an_older_folder_is_converted(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    (tmp_path / "vocab.txt").write_text("".join(f"{word}\n" for word in WORDS), encoding="utf-8")
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    (tmp_path / "tokenizer_config.json").write_text(
        '{"tokenizer_class": "BertTokenizer", "do_lower_case": true, "model_max_length": 32}'
    )
    texts = [("The film is unlikely, GOOD!",), ("Café 你好 😀",)]
    opened = open_tokenizer(f"hf:{tmp_path}")

    assert ids(opened.encode(texts)) == ids(read_tokenizer(library().to_str()).encode(texts))
    assert (opened.longest, opened.pad_id) == (32, 0)


def test_an_older_folder_that_cannot_be_converted_is_refused(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    (tmp_path / "vocab.txt").write_text("[PAD]\n")

    assert "transformers cannot make one" in refused(tmp_path)


# The default length


@pytest.mark.parametrize(
    ("lengths", "longest", "expected"),
    [
        ([3], None, 8),
        ([8], None, 8),
        ([9], None, 16),
        ([10] * 995 + [400] * 5, None, 16),  # exactly 99.5 % are whole
        ([10] * 994 + [400] * 6, None, 400),
        ([10] * 199 + [400], None, 16),
        ([10] * 198 + [400] * 2, None, 400),
        ([5000], None, 512),
        ([5000], 128, 128),
        ([5000], 8192, 512),
        ([50], 50, 50),
    ],
)
def test_the_default_length_keeps_nearly_all_texts_whole(
    lengths: list[int], longest: int | None, expected: int
) -> None:
    assert choose_length(np.array(lengths), longest=longest) == expected


# Against transformers


@pytest.mark.parametrize("limit", [3, 8, 24, 512])
def test_real_and_hard_texts_have_transformers_tokens(
    shared_data: Path, minilm: Path, limit: int
) -> None:
    transformers = pytest.importorskip("transformers")
    lines = (shared_data / "sst2" / "dev.tsv").read_text(encoding="utf-8").splitlines()
    texts = [*(line.split("\t")[0] for line in lines), *HARD]
    theirs = transformers.AutoTokenizer.from_pretrained(minilm, local_files_only=True)

    tokens = open_tokenizer(f"hf:{minilm}").encode([(t,) for t in texts], max_length=limit)

    expected = theirs(texts, truncation=True, max_length=limit, padding=True, return_tensors="np")
    assert len(texts) > 900
    np.testing.assert_array_equal(tokens.contents[:, 0], expected["input_ids"])
    np.testing.assert_array_equal(tokens.contents[:, 1], expected["attention_mask"])


@pytest.mark.parametrize("limit", [4, 9, 24, 64])
def test_real_pairs_have_transformers_tokens(shared_data: Path, minilm: Path, limit: int) -> None:
    transformers = pytest.importorskip("transformers")
    lines = (shared_data / "sst2" / "dev.tsv").read_text(encoding="utf-8").splitlines()
    firsts = [line.split("\t")[0] for line in lines]
    seconds = [
        *HARD[:-3],
        *firsts[len(HARD) - 3 :][::-1],
    ]  # the endless ones make transformers slow
    theirs = transformers.AutoTokenizer.from_pretrained(minilm, local_files_only=True)
    opened = open_tokenizer(f"hf:{minilm}", paired=True)

    tokens = opened.encode(zip(firsts, seconds, strict=True), max_length=limit)

    expected = theirs(
        firsts, seconds, truncation=True, max_length=limit, padding=True, return_tensors="np"
    )
    for row, name in enumerate(opened.rows):
        np.testing.assert_array_equal(tokens.contents[:, row], expected[name])


def test_the_real_vocabulary_ships_as_it_came(minilm: Path) -> None:
    opened = open_tokenizer(f"hf:{minilm}")

    assert opened.vocabulary_txt == (minilm / "vocab.txt").read_text(encoding="utf-8")
    assert (opened.size, opened.pad_id, opened.longest) == (30522, 0, 512)
