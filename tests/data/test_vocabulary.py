"""Trimmed vocabularies: the same tokens where it counts, rows to match, what is refused."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from edgestill.pipeline.data.dataset import KEPT_IDS
from edgestill.pipeline.data.stage import source_fingerprint
from edgestill.pipeline.data.tokenizer import TextTokenizer, read_tokenizer
from edgestill.pipeline.data.vocabulary import Trimmed, same_tokens, trim_vocabulary
from edgestill.pipeline.errors import ModelError, RecipeError
from edgestill.pipeline.recipe import DataSpec
from edgestill.pipeline.recipe_file import load_recipe

tokenizers = pytest.importorskip("tokenizers", reason="comes with edgestill[hf]")
from tokenizers import models, normalizers, pre_tokenizers, processors, trainers  # noqa: E402

SYLLABLES = ("ba", "ne", "ti", "lor", "mu", "sha", "ver", "kin", "os", "ed")
UNUSED = "жщ語話한글"  # of the vocabulary, and of no text
SPECIAL = {
    "wordpiece": ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"),
    "bpe": ("<s>", "<pad>", "</s>", "<unk>"),
    "unigram": ("<s>", "<pad>", "</s>", "<unk>"),
}
KINDS = tuple(SPECIAL)
by_kind = pytest.mark.parametrize("kind", KINDS)


def language(count: int, *, seed: int) -> list[tuple[str]]:
    """Texts of invented words: frequent ones, and ever new ones."""
    draw = random.Random(seed)

    def word() -> str:
        own = random.Random(draw.randint(0, 400))
        return "".join(own.choice(SYLLABLES) for _ in range(own.randint(1, 4)))

    return [(" ".join(word() for _ in range(draw.randint(2, 9))) + "!",) for _ in range(count)]


WORLD = language(600, seed=0)
TRAIN = language(40, seed=1)


def trained(kind: str) -> Any:
    """A tokenizer of WORLD as its kind is usually set up."""
    special = list(SPECIAL[kind])
    usual: dict[str, Any] = {"special_tokens": special, "show_progress": False}
    trainer: Any
    if kind == "wordpiece":
        made = tokenizers.Tokenizer(models.WordPiece(unk_token="[UNK]"))
        made.normalizer = normalizers.BertNormalizer(lowercase=True)
        made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        trainer = trainers.WordPieceTrainer(vocab_size=400, **usual)
    elif kind == "bpe":
        made = tokenizers.Tokenizer(models.BPE())
        made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(vocab_size=600, initial_alphabet=alphabet, **usual)
    else:
        made = tokenizers.Tokenizer(models.Unigram())
        made.pre_tokenizer = pre_tokenizers.Metaspace()
        trainer = trainers.UnigramTrainer(vocab_size=300, unk_token="<unk>", **usual)
    lines = [text for (text,) in WORLD]
    made.train_from_iterator([*lines, *UNUSED, *"Aaé0157.,?*"], trainer)
    first, last = (2, 3) if kind == "wordpiece" else (0, 2)
    start, end = (special[first], first), (special[last], last)
    if kind == "wordpiece":
        made.post_processor = processors.TemplateProcessing(
            single=f"{start[0]} $A {end[0]}",
            pair=f"{start[0]} $A {end[0]} $B:1 {end[0]}:1",
            special_tokens=[start, end],
        )
    elif kind == "bpe":
        made.post_processor = processors.RobertaProcessing(end, start)
    else:
        made.post_processor = processors.BertProcessing(end, start)
    return made


@pytest.fixture(scope="module")
def whole() -> dict[str, TextTokenizer]:
    return {kind: read_tokenizer(trained(kind).to_str()) for kind in KINDS}


@pytest.fixture(scope="module")
def small(whole: dict[str, TextTokenizer]) -> dict[str, Trimmed]:
    return {kind: trim_vocabulary(tokenizer, TRAIN) for kind, tokenizer in whole.items()}


def pieces(tokenizer: TextTokenizer, text: str) -> list[str]:
    tokens: list[str] = tokenizer.library.encode(text).tokens
    return tokens


def model_of(tokenizer: TextTokenizer) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(tokenizer.document)["model"]
    return found


def vocabulary(tokenizer: TextTokenizer) -> dict[str, int]:
    found: dict[str, int] = tokenizer.library.get_vocab()
    return found


# The tokenizer


@by_kind
def test_training_texts_have_the_same_pieces(
    whole: dict[str, TextTokenizer], small: dict[str, Trimmed], kind: str
) -> None:
    before, after = whole[kind], small[kind].tokenizer

    assert after.size < 0.85 * before.size
    assert model_of(after)["type"] == model_of(before)["type"]
    for (text,) in TRAIN:
        assert pieces(after, text) == pieces(before, text)


@by_kind
def test_new_ids_are_dense_in_the_old_order_and_name_the_same_pieces(
    whole: dict[str, TextTokenizer], small: dict[str, Trimmed], kind: str
) -> None:
    before, (after, kept) = whole[kind], (small[kind].tokenizer, small[kind].kept_ids)

    assert kept.dtype == np.int64
    assert (np.diff(kept) > 0).all()
    assert len(kept) == after.size == len(vocabulary(after))
    for new, old in enumerate(kept.tolist()):
        assert after.library.id_to_token(new) == before.library.id_to_token(old)


@by_kind
def test_special_tokens_are_all_there_and_stand_around_a_text(
    whole: dict[str, TextTokenizer], small: dict[str, Trimmed], kind: str
) -> None:
    before, after = whole[kind], small[kind].tokenizer
    places = vocabulary(after)

    assert [places[token] for token in SPECIAL[kind]] == list(range(len(SPECIAL[kind])))
    assert after.pad_id == places[before.library.id_to_token(before.pad_id)]
    ids = after.library.encode("ba").ids
    assert [after.library.id_to_token(ids[at]) for at in (0, -1)] == [
        pieces(before, "ba")[at] for at in (0, -1)
    ]
    assert after.library.encode(SPECIAL[kind][1]).tokens[1] == SPECIAL[kind][1]


@by_kind
def test_a_text_of_kept_pieces_has_its_old_tokens(
    whole: dict[str, TextTokenizer], small: dict[str, Trimmed], kind: str
) -> None:
    other = language(400, seed=2)
    kept = set(small[kind].kept_ids.tolist())
    of_kept = np.array([kept.issuperset(ids) for ids in whole[kind].whole(other)])
    same = same_tokens(whole[kind], small[kind], other)

    assert 20 < of_kept.sum() < 380
    assert np.array_equal(same, of_kept)


@by_kind
def test_other_words_fall_into_smaller_pieces_and_none_becomes_unknown(
    whole: dict[str, TextTokenizer], small: dict[str, Trimmed], kind: str
) -> None:
    other = language(400, seed=2)
    lengths = [
        [len(ids) for ids in one.whole(other)] for one in (whole[kind], small[kind].tokenizer)
    ]

    assert sum(lengths[1]) > sum(lengths[0])
    for (text,) in other:
        assert not {"[UNK]", "<unk>"} & set(pieces(small[kind].tokenizer, text))


@by_kind
def test_any_text_keeps_ascii_digits_and_latin_and_loses_scripts_it_never_had(
    small: dict[str, Trimmed], kind: str
) -> None:
    tokenizer = small[kind].tokenizer
    lost = pieces(tokenizer, "語")
    for text in ("A", "0 1 5 7", "é", "?", "*"):
        assert not {"[UNK]", "<unk>"} & set(pieces(tokenizer, text)), text

    if kind == "bpe":
        assert len(lost) == 2 + 3  # its bytes
        assert set(pre_tokenizers.ByteLevel.alphabet()) <= vocabulary(tokenizer).keys()
    else:
        assert {"[UNK]", "<unk>"} & {tokenizer.library.id_to_token(i) for i in
                                     tokenizer.library.encode("語").ids}  # fmt: skip


def test_letters_of_a_script_that_a_text_has_stay_all(whole: dict[str, TextTokenizer]) -> None:
    tokenizer = trim_vocabulary(whole["wordpiece"], [("ж",), ("語",)]).tokenizer

    assert {"ж", "щ", "語", "話"} <= vocabulary(tokenizer).keys()
    assert not {"한", "글"} & vocabulary(tokenizer).keys()
    assert pieces(tokenizer, "щ") == ["[CLS]", "щ", "[SEP]"]


def test_bpe_keeps_what_kept_pieces_are_merged_from_and_no_other_merge() -> None:
    letters = {letter: place for place, letter in enumerate(["<pad>", *"lowerst"])}
    merged = ("lo", "low", "er", "lower", "st", "lowst", "we")
    merges = [("l", "o"), ("lo", "w"), ("e", "r"), ("low", "er"), ("s", "t"), ("low", "st"),
              ("w", "e")]  # fmt: skip
    vocab = letters | {piece: len(letters) + place for place, piece in enumerate(merged)}
    before = read_tokenizer(tokenizers.Tokenizer(models.BPE(vocab, merges)).to_str())

    def left(*texts: str) -> list[list[str]]:
        trimmed = trim_vocabulary(before, [(text,) for text in texts])
        found: list[list[str]] = model_of(trimmed.tokenizer)["merges"]
        return found

    assert left("lower") == [["l", "o"], ["lo", "w"], ["e", "r"], ["low", "er"]]
    assert left("low") == [["l", "o"], ["lo", "w"]]
    assert left("st") == [["s", "t"]]
    assert left("w") == []


def wordpiece(*words: str) -> TextTokenizer:
    vocab = {word: place for place, word in enumerate(("[PAD]", "[UNK]", *words))}
    made = tokenizers.Tokenizer(models.WordPiece(vocab, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    return read_tokenizer(made.to_str())


def test_a_word_that_was_unknown_stays_unknown_in_a_training_text() -> None:
    # greedy: "abc", and no piece begins with ##d; without "abc" it would be a ##b ##cd ##e
    before = wordpiece("a", "x", "##b", "##e", "##cd", "abc", "unused")
    texts = [("abcde",), ("xcd",)]
    trimmed = trim_vocabulary(before, texts)

    assert pieces(before, "abcde") == ["[UNK]"]
    assert pieces(trimmed.tokenizer, "abcde") == ["[UNK]"]
    assert "unused" not in vocabulary(trimmed.tokenizer)


def test_unigram_keeps_its_lowest_score_which_scores_the_unknown() -> None:
    scores = [
        ("<pad>", 0.0),
        ("<unk>", 0.0),
        ("a", -1.0),
        ("cd", -9.0),
        ("ba", -2.0),
        ("bab", -3.0),
    ]
    made = tokenizers.Tokenizer(models.Unigram(scores, unk_id=1, byte_fallback=False))
    trimmed = trim_vocabulary(read_tokenizer(made.to_str()), [("ba",)])

    assert model_of(trimmed.tokenizer)["vocab"] == [
        [piece, score] for piece, score in scores if piece != "bab"
    ]
    assert model_of(trimmed.tokenizer)["unk_id"] == 1


PROCESSORS: dict[str, Callable[[int, int], Any]] = {
    "template": lambda start, end: processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", start), ("</s>", end)]
    ),
    "bert": lambda start, end: processors.BertProcessing(("</s>", end), ("<s>", start)),
    "roberta": lambda start, end: processors.RobertaProcessing(("</s>", end), ("<s>", start)),
    "sequence": lambda start, end: processors.Sequence(
        [processors.ByteLevel(), processors.BertProcessing(("</s>", end), ("<s>", start))]
    ),
}


@pytest.mark.parametrize("kind", PROCESSORS)
def test_special_tokens_behind_the_words_move_and_still_stand_around_a_text(kind: str) -> None:
    words = ("good", "unused", "bad", "[PAD]", "[UNK]", "<s>", "never", "</s>")
    vocab = {word: place for place, word in enumerate(words)}
    made = tokenizers.Tokenizer(models.WordPiece(vocab, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    made.post_processor = PROCESSORS[kind](vocab["<s>"], vocab["</s>"])
    trimmed = trim_vocabulary(read_tokenizer(made.to_str()), [("good bad",)])

    assert trimmed.kept_ids.tolist() == [0, 2, 3, 4, 5, 7]
    assert trimmed.tokenizer.pad_id == 2
    assert trimmed.tokenizer.library.encode("good bad ☃").ids == [4, 0, 1, 3, 5]


def test_paired_texts_and_special_tokens_behind_the_model_are_kept() -> None:
    made = trained("wordpiece")
    made.add_special_tokens(["[EXTRA]"])
    before = read_tokenizer(made.to_str(), paired=True)
    texts = [(one[0], two[0]) for one, two in zip(TRAIN, reversed(TRAIN), strict=True)]
    trimmed = trim_vocabulary(before, texts)

    assert same_tokens(before, trimmed, texts).all()
    assert trimmed.tokenizer.paired
    assert vocabulary(trimmed.tokenizer)["[EXTRA]"] == trimmed.tokenizer.size - 1
    assert trimmed.tokenizer.vocabulary_txt is not None
    assert len(trimmed.tokenizer.vocabulary_txt.splitlines()) == trimmed.tokenizer.size


@by_kind
def test_bytes_depend_on_the_texts_alone(
    whole: dict[str, TextTokenizer], small: dict[str, Trimmed], kind: str, tmp_path: Path
) -> None:
    again = trim_vocabulary(whole[kind], TRAIN[::-1]).tokenizer.document
    (tmp_path / "tokenizer.json").write_text(whole[kind].document, encoding="utf-8")
    (tmp_path / "texts.json").write_text(json.dumps(TRAIN))
    code = """
import json, sys
from edgestill.pipeline.data.tokenizer import read_tokenizer
from edgestill.pipeline.data.vocabulary import trim_vocabulary
texts = [tuple(text) for text in json.load(open("texts.json"))]
tokenizer = read_tokenizer(open("tokenizer.json", encoding="utf-8").read())
sys.stdout.buffer.write(trim_vocabulary(tokenizer, texts).tokenizer.document.encode())
"""
    done = subprocess.run(
        [sys.executable, "-P", "-c", code], cwd=tmp_path, capture_output=True, check=True,
        env={**os.environ, "PYTHONHASHSEED": "1", "OMP_NUM_THREADS": "1"},
    )  # fmt: skip

    assert again == small[kind].tokenizer.document
    assert done.stdout.decode() == small[kind].tokenizer.document


def test_another_model_is_one_message() -> None:
    made = tokenizers.Tokenizer(models.WordLevel({"[PAD]": 0, "[UNK]": 1, "a": 2}, "[UNK]"))

    with pytest.raises(
        ModelError, match=r"WordLevel tokenizer cannot be trimmed.*leave `trim` out"
    ):
        trim_vocabulary(read_tokenizer(made.to_str()), [("a",)])


# The data stage


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, texts: ModuleType) -> Path:
    """A network with more words than its texts have, and texts with one of their own each."""
    root = tmp_path_factory.mktemp("trim")
    rows = texts.sentences(120, seed=1)
    own = [(f"{text} zq{number:03}", label) for number, (text, label) in enumerate(rows)]
    texts.write_csv(root / "train.csv", own)
    (root / "keep.txt").write_text("zq900\n\nzq901\n")
    folder: Path = texts.write_folder(root / "net", vocab_size=500)
    document = json.loads((folder / "tokenizer.json").read_text())
    for number in (*range(len(own)), 900, 901, 902):
        vocab = document["model"]["vocab"]
        vocab[f"zq{number:03}"] = len(vocab)
    (folder / "tokenizer.json").write_text(json.dumps(document))
    return root


Prepare = Callable[..., Any]


@pytest.fixture
def trimmed(folder: Path, prepare: Prepare) -> Prepare:
    """trimmed(keep=…) runs the data stage; test and validation are parts of train.csv."""

    def run(**tokenize: Any) -> Any:
        wish = {"tokenizer": f"hf:{folder / 'net'}", "trim": True} | tokenize
        return prepare(
            train=folder / "train.csv", tokenize=wish,
            test={"fraction": 0.25}, validation={"fraction": 0.25},
        )  # fmt: skip

    return run


def words_of(prepared: Any, part: str) -> set[str]:
    """The words that a text of the part has alone."""
    rows = [name.rpartition(":")[2] for name in getattr(prepared.data, part).names]
    return {f"zq{int(row) - 2:03}" for row in rows}


def test_test_texts_choose_no_pieces_even_if_they_are_taken_out_of_train(trimmed: Prepare) -> None:
    prepared = trimmed()
    kept = set((prepared.folder / "vocab.txt").read_text().splitlines())

    assert [len(words_of(prepared, part)) for part in ("train", "validation", "test")] == [
        68, 22, 30
    ]  # fmt: skip
    assert words_of(prepared, "train") <= kept
    assert words_of(prepared, "validation") <= kept
    assert not words_of(prepared, "test") & kept
    assert "zq902" not in kept


def test_stage_stores_the_new_ids_and_says_what_has_changed(trimmed: Prepare) -> None:
    prepared = trimmed()
    before = trimmed(trim=False)
    data, stats = prepared.data, prepared.stats
    kept = np.array(data.kept_ids)

    assert np.array_equal(kept, np.load(prepared.folder / KEPT_IDS))
    assert data.preprocess.vocabulary == len(kept) == stats["vocabulary"]["after"]
    for part in ("train", "validation"):
        new, old = (getattr(one, part).contents for one in (data, before.data))
        length = old.shape[2]
        assert not new[..., length:].any()  # the test texts are longer now
        assert np.array_equal(kept[new[:, 0, :length]], old[:, 0])
        assert np.array_equal(new[:, 1, :length], old[:, 1])
    assert stats["vocabulary"] == {
        "before": 247, "after": 247 - 30 - 3, "test_texts": 30, "test_texts_changed": 30,
    }  # fmt: skip
    assert any("247 pieces were trimmed to 214" in note for note in prepared.notes)
    assert before.data.kept_ids is None
    assert "vocabulary" not in before.stats


def test_words_of_the_keep_file_stay_and_decide_whether_the_stage_runs_again(
    folder: Path, trimmed: Prepare, tmp_path: Path
) -> None:
    keep = tmp_path / "keep.txt"
    keep.write_text("zq900\n\nzq901\n")
    kept = set((trimmed(keep=str(keep)).folder / "vocab.txt").read_text().splitlines())
    spec = DataSpec.model_validate(
        {
            "train": {"path": str(folder / "train.csv")},
            "test": {"fraction": 0.25},
            "tokenize": {"tokenizer": f"hf:{folder / 'net'}", "trim": True, "keep": str(keep)},
        }
    )
    first = source_fingerprint(spec)
    keep.write_text("zq902\n")

    assert {"zq900", "zq901"} <= kept
    assert "zq902" not in kept
    assert source_fingerprint(spec) != first


def test_golden_texts_and_the_shipped_tokenizer_are_the_trimmed_ones(trimmed: Prepare) -> None:
    prepared = trimmed()
    tokenizer = tokenizers.Tokenizer.from_file(str(prepared.folder / "tokenizer.json"))
    rows = json.loads((prepared.folder / "golden.json").read_text())
    limit = prepared.data.preprocess.max_length

    assert len(rows) == 64
    tokenizer.enable_truncation(limit)
    for row in rows:
        assert tokenizer.encode(row["text"]).ids == row["input_ids"]


RECIPE = """\
task: text-classification
data:
  train: {path: train.csv}
  test: {fraction: 0.25}
  tokenize: TOKENIZE
teacher: {model: "hf:net", head: new, train: {}}
student: {model: STUDENT}
"""


@pytest.mark.parametrize(
    ("tokenize", "student", "said"),
    [
        ("{trim: true}", "net.py:build", "recipe.yaml:5 data.tokenize.trim: takes rows"),
        ("{keep: keep.txt}", "'hf:net', head: new", "recipe.yaml:5 data.tokenize.keep: names what"),
    ],
)
def test_a_wish_that_cannot_be_met_is_one_line(
    folder: Path, tokenize: str, student: str, said: str
) -> None:
    text = RECIPE.replace("TOKENIZE", tokenize).replace("STUDENT", student)
    (folder / "recipe.yaml").write_text(text)

    with pytest.raises(RecipeError) as caught:
        load_recipe(str(folder / "recipe.yaml"))

    assert said in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


def test_keep_is_a_path_beside_the_recipe(folder: Path) -> None:
    text = RECIPE.replace("TOKENIZE", "{trim: true, keep: keep.txt}").replace(
        "STUDENT", "'hf:net', head: new"
    )
    (folder / "recipe.yaml").write_text(text)

    loaded = load_recipe(str(folder / "recipe.yaml"))

    assert loaded.data.tokenize is not None
    assert loaded.data.tokenize.keep == str(folder / "keep.txt")


def test_networks_of_a_trimmed_stage_have_its_words_and_are_stored_with_them(
    folder: Path, trimmed: Prepare, tmp_path: Path
) -> None:
    pytest.importorskip("transformers")
    from edgestill.models.store import load_network
    from edgestill.pipeline.distill.networks import build, save
    from edgestill.pipeline.recipe import StudentSpec, TeacherSpec
    from edgestill.pipeline.stage import Context, Silent

    data = trimmed().data
    context = Context(0, 1, "cpu", tmp_path, Silent())
    model = {"model": f"hf:{folder / 'net'}"}
    cases = (
        TeacherSpec.model_validate(model | {"head": "new"}),
        StudentSpec.model_validate(model | {"head": "new", "keep_layers": [0, 2]}),
        StudentSpec.model_validate(
            model | {"init": "embeddings", "args": {"hidden_size": 16, "num_hidden_layers": 1}}
        ),
        StudentSpec.model_validate(model | {"init": "scratch", "args": {"num_hidden_layers": 1}}),
    )
    for place, spec in enumerate(cases):
        network, _ = build(spec, data, context=context, where="student")
        save(network, data, context=context, folder=f"net-{place}")
        again: Any = load_network(tmp_path / f"net-{place}").network.module

        words = again.network.get_input_embeddings()
        assert words.num_embeddings == len(data.kept_ids) == 214
        assert words.weight.equal(network.module.network.get_input_embeddings().weight)
