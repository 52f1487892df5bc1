"""A tokenizer with fewer pieces: those that texts use, and a list that keeps any text readable.

Kept are the special and added tokens, every piece of the texts, single characters (a word that is
not in the texts is spelt by them): all of ASCII and Latin, everything that is no letter, and the
letters of scripts that the texts have; bytes, where the tokenizer falls back on them. Ids are
renumbered densely in their old order.

The texts keep their tokens, piece by piece. WordPiece takes the longest piece that matches, and
what was the longest is there still. Unigram takes the best path, which is there still, at the old
scores. BPE makes a piece by merges, and what a kept piece is made of is kept too. A word that
WordPiece could not read may be readable with fewer pieces; then all pieces that match in it stay.
None of this is trusted: every text is tokenized by both, and a difference is an error.
"""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from ..errors import ModelError
from .tokenizer import TextTokenizer, read_tokenizer

MODELS = ("WordPiece", "BPE", "Unigram")
WORD_STARTS = "▁Ġ"  # a space before a word, to sentencepiece and to byte-level BPE
# Latin with its extensions A and B; the 256 characters of byte-level BPE lie below it too
LATIN_ENDS = 0x250

Text = tuple[str, ...]


@dataclass(frozen=True, eq=False)
class Trimmed:
    """A tokenizer and where its ids come from.

    Attributes:
        kept_ids: int64 (V,), ascending: the old id of each new one.
    """

    tokenizer: TextTokenizer
    kept_ids: npt.NDArray[np.int64]


def trim_vocabulary(tokenizer: TextTokenizer, texts: Sequence[Text]) -> Trimmed:
    """The tokenizer without the pieces that neither these texts nor their alphabet need.

    Raises:
        ModelError: it is no WordPiece, BPE or Unigram, or a text has other tokens afterwards.
    """
    document = json.loads(tokenizer.document)
    kind = document["model"]["type"]
    if kind not in MODELS:
        raise ModelError(
            f"{tokenizer.where}: data.tokenize.trim: a {kind} tokenizer cannot be trimmed, only "
            f"{', '.join(MODELS)}; leave `trim` out"
        )
    kept = {tokenizer.pad_id, *_fixed_ids(document)}
    for ids in tokenizer.whole(texts):
        kept.update(ids)
    vocabulary = tokenizer.library.get_vocab(with_added_tokens=True)
    kept |= _alphabet(document["model"], vocabulary, _scripts(texts))
    trimmed = _rewritten(tokenizer, document, vocabulary, kept)
    differing = _differing(tokenizer, trimmed, texts)
    if differing:
        kept |= _matching(tokenizer, document["model"], vocabulary, differing)
        trimmed = _rewritten(tokenizer, document, vocabulary, kept)
        differing = _differing(tokenizer, trimmed, differing)
    if differing:
        raise ModelError(
            f"{tokenizer.where}: data.tokenize.trim: {len(differing)} texts have other tokens with "
            f"fewer pieces, such as {differing[0][0]!r:.80}; leave `trim` out"
        )
    return trimmed


def same_tokens(
    tokenizer: TextTokenizer, trimmed: Trimmed, texts: Iterable[Text]
) -> npt.NDArray[np.bool_]:
    """(N,): both tokenizers cut the whole text into the same pieces."""
    texts = list(texts)
    old, new = tokenizer.whole(texts), trimmed.tokenizer.whole(texts)
    kept = trimmed.kept_ids.tolist()
    pairs = zip(old, new, strict=True)
    return np.array([before == [kept[id_] for id_ in after] for before, after in pairs], np.bool_)


def _differing(tokenizer: TextTokenizer, trimmed: Trimmed, texts: Sequence[Text]) -> list[Text]:
    same = same_tokens(tokenizer, trimmed, texts)
    return [text for text, is_same in zip(texts, same, strict=True) if not is_same]


# what stays


def _fixed_ids(document: dict[str, Any]) -> Iterator[int]:
    """Ids that the tokenizer names itself: added and special tokens, the unknown one, bytes."""
    model = document["model"]
    yield from (token["id"] for token in document["added_tokens"])
    for part in _processors(document["post_processor"]):
        for template in (part.get("special_tokens") or {}).values():
            yield from template["ids"]
        yield from (part[name][1] for name in ("sep", "cls") if name in part)
    if model["type"] != "Unigram":
        if model["unk_token"] in model["vocab"]:
            yield model["vocab"][model["unk_token"]]
    else:
        if model["unk_id"] is not None:
            yield model["unk_id"]
        # what is unknown is scored by the lowest score of all
        scores = [score for _, score in model["vocab"]]
        yield scores.index(min(scores))
    if model.get("byte_fallback"):
        pieces = _pieces(model)
        yield from (pieces[b] for b in (f"<0x{n:02X}>" for n in range(256)) if b in pieces)


def _processors(part: dict[str, Any] | None) -> Iterator[dict[str, Any]]:
    if part is None:
        return
    yield part
    for inner in part.get("processors", ()):
        yield from _processors(inner)


def _pieces(model: dict[str, Any]) -> dict[str, int]:
    """The model's pieces with their ids, without added tokens."""
    if model["type"] == "Unigram":
        return {piece: id_ for id_, (piece, _) in enumerate(model["vocab"])}
    pieces: dict[str, int] = model["vocab"]
    return pieces


def _scripts(texts: Iterable[Text]) -> set[str]:
    characters = {character for text in texts for one in text for character in one}
    # a full-width letter is looked up as a plain one
    forms = {one for character in characters for one in unicodedata.normalize("NFKD", character)}
    return {_script(character) for character in characters | forms}


def _script(character: str) -> str:
    """As its name begins: GREEK, CJK, HANGUL."""
    return unicodedata.name(character, "").partition(" ")[0]


def _alphabet(
    model: dict[str, Any], vocabulary: dict[str, int], scripts: Collection[str]
) -> set[int]:
    """Ids of single characters, at the start of a word and inside it."""
    return {
        id_
        for piece, id_ in vocabulary.items()
        if len(bare := _bare(piece, model)) <= 1
        and all(_is_basic(character) or _script(character) in scripts for character in bare)
    }


def _bare(piece: str, model: dict[str, Any]) -> str:
    """The piece without the marks of its place in a word."""
    bare = piece.removeprefix(model.get("continuing_subword_prefix") or "")
    bare = bare.removesuffix(model.get("end_of_word_suffix") or "")
    return bare[1:] if len(bare) > 1 and bare[0] in WORD_STARTS else bare


def _is_basic(character: str) -> bool:
    return ord(character) < LATIN_ENDS or not unicodedata.category(character).startswith("L")


def _matching(
    tokenizer: TextTokenizer,
    model: dict[str, Any],
    vocabulary: dict[str, int],
    texts: Iterable[Text],
) -> set[int]:
    """Ids of all pieces that occur anywhere in the words of these texts."""
    library = tokenizer.library
    normalizer, splitter = library.normalizer, library.pre_tokenizer
    prefix = model.get("continuing_subword_prefix") or ""
    suffix = model.get("end_of_word_suffix") or ""
    longest = max(map(len, vocabulary))
    found = set()
    for one in {one for text in texts for one in text}:
        normal = one if normalizer is None else normalizer.normalize_str(one)
        words = [normal] if splitter is None else [w for w, _ in splitter.pre_tokenize_str(normal)]
        for word in set(words):
            for start in range(len(word)):
                for end in range(start + 1, min(len(word), start + longest) + 1):
                    inner = word[start:end]
                    forms = (inner, prefix + inner, inner + suffix, prefix + inner + suffix)
                    found |= {vocabulary[form] for form in forms if form in vocabulary}
    return found


# the smaller tokenizer


def _rewritten(
    tokenizer: TextTokenizer,
    document: dict[str, Any],
    vocabulary: dict[str, int],
    kept: Collection[int],
) -> Trimmed:
    model = document["model"]
    if model["type"] == "BPE":
        kept = _with_what_makes_them(model, kept)
    kept_ids = sorted(set(kept) & set(vocabulary.values()))
    new = {old: place for place, old in enumerate(kept_ids)}
    smaller = {
        **document,
        "model": {**model, **_smaller_model(model, new)},
        "added_tokens": [{**t, "id": new[t["id"]]} for t in document["added_tokens"]],
        "post_processor": _renumbered(document["post_processor"], new),
    }
    made = read_tokenizer(
        json.dumps(smaller, ensure_ascii=False),
        where=tokenizer.where,
        paired=tokenizer.paired,
        pad_id=new[tokenizer.pad_id],
        longest=tokenizer.longest,
    )
    expected = {piece: new[id_] for piece, id_ in vocabulary.items() if id_ in new}
    if made.library.get_vocab(with_added_tokens=True) != expected:
        raise ModelError(
            f"{tokenizer.where}: data.tokenize.trim: its added tokens lie among its pieces, and "
            "their ids cannot be renumbered; leave `trim` out"
        )
    return Trimmed(made, np.array(kept_ids, np.int64))


def _with_what_makes_them(model: dict[str, Any], kept: Iterable[int]) -> set[int]:
    """BPE: also the parts that a piece can be merged from, and theirs."""
    makers: dict[str, list[tuple[str, str]]] = {}
    for left, right in model["merges"]:
        makers.setdefault(_merged(model, left, right), []).append((left, right))
    pieces = {id_: piece for piece, id_ in model["vocab"].items()}
    found = set(kept)
    to_do = [pieces[id_] for id_ in found if id_ in pieces]
    while to_do:
        parts = {part for pair in makers.get(to_do.pop(), ()) for part in pair}
        more = [part for part in parts if model["vocab"][part] not in found]
        found |= {model["vocab"][part] for part in more}
        to_do += more
    return found


def _merged(model: dict[str, Any], left: str, right: str) -> str:
    return left + right.removeprefix(model["continuing_subword_prefix"] or "")


def _smaller_model(model: dict[str, Any], new: dict[int, int]) -> dict[str, Any]:
    """What of the model changes."""
    if model["type"] == "Unigram":
        unknown = model["unk_id"]
        return {
            "vocab": [entry for id_, entry in enumerate(model["vocab"]) if id_ in new],
            "unk_id": None if unknown is None else new[unknown],
        }
    vocab = {piece: new[id_] for piece, id_ in model["vocab"].items() if id_ in new}
    if model["type"] == "WordPiece":
        return {"vocab": vocab}
    merges = [
        [left, right]
        for left, right in model["merges"]
        if {left, right, _merged(model, left, right)} <= vocab.keys()
    ]
    return {"vocab": vocab, "merges": merges}


def _renumbered(part: dict[str, Any] | None, new: dict[int, int]) -> dict[str, Any] | None:
    """A post-processor with the new ids of its special tokens."""
    if part is None:
        return None
    changed = dict(part)
    if "processors" in part:
        changed["processors"] = [_renumbered(inner, new) for inner in part["processors"]]
    if part.get("special_tokens"):
        changed["special_tokens"] = {
            name: {**template, "ids": [new[id_] for id_ in template["ids"]]}
            for name, template in part["special_tokens"].items()
        }
    for name in ("sep", "cls"):
        if name in part:
            changed[name] = [part[name][0], new[part[name][1]]]
    return changed
