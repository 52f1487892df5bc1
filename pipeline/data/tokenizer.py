"""A tokenizer.json → tokens of texts: int32 (N, K, S), padded on the right.

Runs on the `tokenizers` library alone, with the tokenizer's own post-processor. `transformers` is
imported only to convert a folder that has the older files (vocab.txt, sentencepiece) and no
tokenizer.json. Nothing is downloaded and no remote code is run.

Cutting is done here and equals the library's own truncation, "longest_first" on the right: for a
pair the library makes every combination of what it cuts off, and two texts of 100,000 characters
end the process for want of memory.
"""

from __future__ import annotations

import importlib
import itertools
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from ...models.hf_folder import PREFIX as HF
from ..errors import ModelError

if TYPE_CHECKING:
    from tokenizers import Encoding, Tokenizer

TOKENIZER = "tokenizer.json"
MOST = 512  # tokens: the positions of BERT and its kin, and what a phone can be asked to read
KEPT_WHOLE = (995, 1000)  # of the texts, at the default length
MULTIPLE = 8  # tokens: kernels work on vectors, and lengths near each other share a figure
# What older tokenizers are saved as; transformers converts them.
OLDER = (
    "vocab.txt", "vocab.json", "spiece.model", "sentencepiece.bpe.model", "spm.model",
    "tokenizer.model",
)  # fmt: skip
MASK_TOKENS = ("[MASK]", "<mask>")  # of BERT, of RoBERTa
_ABSURD = 10**6  # transformers writes 1e30 where it knows no longest text
_TEXTS_AT_ONCE, _CHARACTERS_AT_ONCE = 1024, 2**20  # an encoding takes some 100 bytes a token
# what transformers raises on a folder that it cannot use
_FAILURES = (OSError, ValueError, RuntimeError, KeyError, TypeError, ImportError, AttributeError)


@dataclass(frozen=True, eq=False)
class Tokens:
    """Tokens of N texts.

    Attributes:
        contents: int32 (N, K, S), S the longest that was kept; K rows as `TextTokenizer.rows`.
        lengths: int64 (N,), tokens before cutting, special ones counted.
        truncated: how many texts were cut.
    """

    contents: npt.NDArray[np.int32]
    lengths: npt.NDArray[np.int64]
    truncated: int


@dataclass(frozen=True, eq=False)
class TextTokenizer:
    """What turns texts into numbers.

    Attributes:
        where: it came from, for messages.
        document: the tokenizer.json that ships: neither truncation nor padding is set in it.
        size: ids are below it.
        pad_id: of the padding token.
        longest: tokens that it is made for; None: it does not say.
        paired: a sample is two texts, and `rows` has token_type_ids.
        vocabulary_txt: one token a line in the order of ids, as BERT's vocab.txt; None where the
            model is not WordPiece.
    """

    where: str
    document: str
    size: int
    pad_id: int
    longest: int | None
    paired: bool
    vocabulary_txt: str | None
    library: Tokenizer

    @property
    def rows(self) -> tuple[str, ...]:
        """Names of the network's inputs, in the order of `Tokens.contents`."""
        return ("input_ids", "attention_mask") + (("token_type_ids",) if self.paired else ())

    @property
    def mask_id(self) -> int | None:
        """Of the token that stands for a hidden piece; None: it has none."""
        ids = (self.library.token_to_id(token) for token in MASK_TOKENS)
        return next((one for one in ids if one is not None), None)

    @property
    def special_ids(self) -> tuple[int, ...]:
        """Of the tokens that frame every text, ascending."""
        empty = self.library.encode("", "" if self.paired else None)
        return tuple(sorted(set(empty.ids)))

    def encode(self, texts: Iterable[tuple[str, ...]], *, max_length: int | None = None) -> Tokens:
        """Tokenize, cut at `max_length` keeping the special tokens, pad to the longest.

        Args:
            texts: (text,) each, or (text, pair) if `paired`. Read once, in chunks.
            max_length: tokens, special ones counted; None: at the most that `choose_length` gives,
                so that one endless text does not decide the size of the array.

        Raises:
            ModelError: `max_length` leaves no room for text beside the special tokens.
        """
        limit = self._limit(max_length)
        lengths, kept = [], []
        ids: list[npt.NDArray[np.int32]] = []
        types: list[npt.NDArray[np.int32]] = []
        for chunk in _chunks(texts):
            encodings = self.library.encode_batch_fast([self._input(text) for text in chunk])
            places = [_kept(encoding, limit) for encoding in encodings]
            lengths += [len(encoding) for encoding in encodings]
            kept += [len(some) for some in places]
            ids.append(_flat([encoding.ids for encoding in encodings], places))
            if self.paired:
                types.append(_flat([encoding.type_ids for encoding in encodings], places))
        own = np.array(kept, np.int64)
        size = max(1, int(own.max(initial=1)))
        real = np.arange(size) < own[:, None]
        contents = np.zeros((len(own), len(self.rows), size), np.int32)
        contents[:, 0] = self.pad_id
        contents[:, 1] = real
        for row, values in ((0, ids), (2, types)):
            if values:
                contents[:, row][real] = np.concatenate(values)
        before = np.array(lengths, np.int64)
        return Tokens(contents, before, int((before > own).sum()))

    def whole(self, texts: Iterable[tuple[str, ...]]) -> Iterator[list[int]]:
        """Ids of each text, special ones too, uncut and without padding."""
        for chunk in _chunks(texts):
            encodings = self.library.encode_batch_fast([self._input(text) for text in chunk])
            yield from (encoding.ids for encoding in encodings)

    def _limit(self, max_length: int | None) -> int:
        special = self.library.num_special_tokens_to_add(self.paired)
        limit = _most(self.longest) if max_length is None else max_length
        if limit <= special:
            raise ModelError(
                f"{self.where}: {limit} tokens are kept of a text, and {special} of them are "
                f"special ones; set data.tokenize.max_length to at least {special + 1}"
            )
        return limit

    def _input(self, text: tuple[str, ...]) -> str | tuple[str, str]:
        assert len(text) == 1 + self.paired, "texts are paired as the tokenizer is"
        return (text[0], text[1]) if self.paired else text[0]


def open_tokenizer(reference: str, *, paired: bool = False) -> TextTokenizer:
    """The tokenizer of `hf:DIR`, a folder, or a tokenizer.json with what lies beside it.

    Raises:
        ModelError: none there, not one, without a padding token, or a package is not installed.
    """
    path = Path(reference.removeprefix(HF)).expanduser()
    if not path.exists():
        raise ModelError(
            f"{reference}: there is no such file or folder; a tokenizer is a local folder with a "
            f"{TOKENIZER}, or that file; nothing is downloaded"
        )
    folder, file = (path, path / TOKENIZER) if path.is_dir() else (path.parent, path)
    if file.is_file():
        document = _read_text(file)
    else:
        document = _converted(folder, reference)
    config = _read_json(folder / "tokenizer_config.json")
    stated = (config, _read_json(folder / "special_tokens_map.json"))
    return _opened(
        document,
        where=reference,
        paired=paired,
        pad_tokens=[token for one in stated if (token := _content(one.get("pad_token")))],
        longest=_longest(config.get("model_max_length")),
    )


def read_tokenizer(
    document: str,
    *,
    where: str = TOKENIZER,
    paired: bool = False,
    pad_id: int | None = None,
    longest: int | None = None,
) -> TextTokenizer:
    """A tokenizer from `TextTokenizer.document`, which states neither of the last two.

    Args:
        pad_id: None: of "[PAD]" or "<pad>".

    Raises:
        ModelError: not a tokenizer, or without a padding token.
    """
    return _opened(document, where=where, paired=paired, pad_id=pad_id, longest=longest)


def is_tokenizer_folder(folder: Path) -> bool:
    """It holds a tokenizer, or one that transformers converts."""
    return any((folder / name).is_file() for name in (TOKENIZER, *OLDER))


def choose_length(lengths: npt.NDArray[np.int64], *, longest: int | None) -> int:
    """Smallest multiple of 8 that keeps 99.5 % of the texts whole; at most 512 and `longest`.

    Args:
        lengths: (N,), N > 0, tokens of each text; longest: that the tokenizer is made for.
    """
    assert len(lengths), "a length is chosen by texts"
    part, whole = KEPT_WHOLE
    place = -(-part * len(lengths) // whole) - 1  # in whole numbers: 0.995 has no exact float
    enough = int(np.sort(lengths)[place])
    return min(max(MULTIPLE, -(-enough // MULTIPLE) * MULTIPLE), _most(longest))


def _most(longest: int | None) -> int:
    return MOST if longest is None else min(MOST, longest)


def _chunks(texts: Iterable[tuple[str, ...]]) -> Iterator[list[tuple[str, ...]]]:
    chunk: list[tuple[str, ...]] = []
    characters = 0
    for text in texts:
        chunk.append(text)
        characters += sum(map(len, text))
        if len(chunk) == _TEXTS_AT_ONCE or characters >= _CHARACTERS_AT_ONCE:
            yield chunk
            chunk, characters = [], 0
    if chunk:
        yield chunk


def _kept(encoding: Encoding, limit: int) -> Sequence[int]:
    """Places of the tokens that stay, in order: the special ones, and the first of each text."""
    if len(encoding) <= limit:
        return range(len(encoding))
    sequences = encoding.sequence_ids  # None for special tokens
    own = sequences.count(0), sequences.count(1)
    room = limit - (len(sequences) - sum(own))
    # as `longest_first` of tokenizers: the longer text gives way until both are equal
    short = min(*own, room // 2)
    long = room - short
    left = [short, long] if own[0] <= own[1] else [long, short]
    places = []
    for place, sequence in enumerate(sequences):
        if sequence is not None:
            left[sequence] -= 1
        if sequence is None or left[sequence] >= 0:
            places.append(place)
    return places


def _flat(values: list[list[int]], places: list[Sequence[int]]) -> npt.NDArray[np.int32]:
    chosen = (
        value if len(some) == len(value) else [value[place] for place in some]
        for value, some in zip(values, places, strict=True)
    )
    return np.fromiter(itertools.chain.from_iterable(chosen), np.int32)


def _opened(
    document: str,
    *,
    where: str,
    paired: bool,
    longest: int | None,
    pad_tokens: Iterable[str] = (),
    pad_id: int | None = None,
) -> TextTokenizer:
    library: Tokenizer = _parsed(document, where)
    padding = library.padding or {}
    library.no_truncation()
    library.no_padding()
    document = library.to_str()
    vocabulary = library.get_vocab(with_added_tokens=True)
    if not vocabulary:
        raise ModelError(f"{where}: its vocabulary is empty; give the one of the network")
    if pad_id is None:
        tried = [*pad_tokens, padding.get("pad_token"), "[PAD]", "<pad>"]
        pad_id = next((vocabulary[token] for token in tried if token in vocabulary), None)
    if pad_id is None:
        raise ModelError(
            f"{where}: has no padding token; name one of its tokens as pad_token in "
            "tokenizer_config.json, beside it"
        )
    return TextTokenizer(
        where=where,
        document=document,
        size=max(vocabulary.values()) + 1,
        pad_id=pad_id,
        longest=longest,
        paired=paired,
        vocabulary_txt=_vocabulary_txt(document, vocabulary),
        library=library,
    )


def _parsed(document: str, where: str) -> Tokenizer:
    tokenizers = _package("tokenizers", where)
    try:
        # from_str, which says the same, raises a bare Exception
        parsed: Tokenizer = tokenizers.Tokenizer.from_buffer(document.encode())
    except ValueError as error:
        raise ModelError(
            f"{where}: is not a tokenizer.json that tokenizers {tokenizers.__version__} reads: "
            f"{' '.join(str(error).split())[:200]}; save it again with save_pretrained"
        ) from error
    return parsed


def _vocabulary_txt(document: str, vocabulary: dict[str, int]) -> str | None:
    if json.loads(document)["model"].get("type") != "WordPiece":
        return None
    tokens = sorted(vocabulary, key=vocabulary.__getitem__)
    in_lines = [vocabulary[token] for token in tokens] == list(range(len(tokens)))
    if not in_lines or any("\n" in token for token in tokens):
        return None  # a line's number would not be its token's id
    return "".join(f"{token}\n" for token in tokens)


def _converted(folder: Path, where: str) -> str:
    """tokenizer.json of a folder with an older tokenizer, by transformers."""
    if not any((folder / name).is_file() for name in OLDER):
        raise ModelError(
            f"{where}: holds no tokenizer: no {TOKENIZER}, nor {', '.join(OLDER)}; copy the "
            "teacher's files there, or set data.tokenize.tokenizer"
        )
    transformers = _package("transformers", where)
    try:
        slow = transformers.AutoTokenizer.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False
        )
        document: str = slow.backend_tokenizer.to_str()
    except _FAILURES as error:
        raise ModelError(
            f"{where}: has no {TOKENIZER}, and transformers cannot make one of its older files: "
            f"{' '.join(str(error).split())[:200]}; copy the {TOKENIZER}, or the folder's "
            "config.json and tokenizer_config.json, beside them"
        ) from error
    return document


def _package(name: str, where: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ModelError(f"{where}: needs {name}: pip install 'edgestill[hf]' ({error})") from error


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise ModelError(f"{path}: cannot be read: {error}; copy it again") from error


def _read_json(path: Path) -> dict[str, Any]:
    if not path.exists():
        return {}
    try:
        content = json.loads(_read_text(path))
    except ValueError as error:
        raise ModelError(f"{path}: cannot be read as JSON: {error}; copy it again") from error
    if not isinstance(content, dict):
        raise ModelError(f"{path}: expected a JSON object, got {type(content).__name__}")
    return content


def _content(token: object) -> str | None:
    """A special token's text, which is written bare or as an object."""
    text = token.get("content") if isinstance(token, dict) else token
    return text if isinstance(text, str) else None


def _longest(stated: object) -> int | None:
    if isinstance(stated, int | float) and 0 < stated < _ABSURD:
        return int(stated)
    return None
