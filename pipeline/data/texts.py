"""Texts of a recipe's sets → tokens of one length, and the tokenizer that made them.

All sets are tokenized with the tokenizer that ships; what is longer than `max_length` is cut and
counted. Without a `max_length` the training texts decide it. With `trim` the tokenizer that ships
has only the pieces of what is learnt from and of validation (`vocabulary.py`), never those of test.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ..errors import DataError
from ..recipe import DataSpec, SourceSpec, Tokenization, UnlabelledSpec
from ..stage import Context
from ..workspace import file_sha256, write_atomically
from .dataset import KEPT_IDS
from .golden import COUNT, write_golden_texts
from .ingest import Ingested
from .parts import divide
from .source import NO_LABEL, Source
from .split import keyed_order
from .text_readers import Columns, open_texts, open_unlabelled_texts, text_files
from .tokenizer import TextTokenizer, Tokens, choose_length, open_tokenizer
from .vocabulary import same_tokens, trim_vocabulary

TOKENIZER, VOCABULARY = "tokenizer.json", "vocab.txt"
_PERCENTILES = (50, 95, 99, 100)


def open_text_source(spec: SourceSpec | UnlabelledSpec, data: DataSpec) -> Source:
    """One set, read whole: texts are small beside what is computed of them.

    Raises:
        DataError: missing, empty, or not in a form that is understood.
    """
    label = spec.label if isinstance(spec, SourceSpec) and spec.label is not None else data.label
    columns = Columns(text=data.text, label=label, pair=data.pair, header=data.header)
    reader = open_texts if isinstance(spec, SourceSpec) else open_unlabelled_texts
    return reader(_existing(spec.path), columns, encoding=data.encoding)


def text_fingerprint(spec: SourceSpec | UnlabelledSpec) -> str:
    """sha256 of everything `open_text_source` would read, wherever it lies."""
    files = text_files(_existing(spec.path))
    names = [file.name if len(files) > 1 else f"-{file.suffix}" for file in files]
    lines = [f"{name}\0{file_sha256(file)}\n" for name, file in zip(names, files, strict=True)]
    return hashlib.sha256("".join(lines).encode(errors="surrogateescape")).hexdigest()


def tokenizer_sha256(spec: DataSpec) -> str:
    """sha256 of the tokenizer that a recipe names, and of the texts it is trimmed by."""
    digest = _sha256(_tokenizer(spec).document)
    wish = spec.tokenize
    if wish is None or wish.keep is None:
        return digest
    return _sha256(digest + file_sha256(_existing(wish.keep)))


def read_texts(
    spec: DataSpec,
    sources: Mapping[str, Source],
    *,
    class_names: tuple[str, ...],
    context: Context,
) -> tuple[dict[str, Ingested], Tokenization, dict[str, Any]]:
    """All sets as tokens of one length; how they were made; lengths and cuts for the report.

    Leaves the tokenizer, the ids kept of a trimmed one and the golden texts in `context.scratch`.

    Raises:
        DataError: a text without a label, unless `on_corrupt: skip`. ModelError: no tokenizer.
    """
    assert spec.tokenize is not None, "the recipe gives texts a tokenizer"
    tokenizer, wish = _tokenizer(spec), spec.tokenize.max_length
    if wish is not None and tokenizer.longest is not None and wish > tokenizer.longest:
        raise DataError(
            f"data.tokenize.max_length: {wish} is asked for, and {tokenizer.where} is made for at "
            f"most {tokenizer.longest} tokens"
        )
    texts = {part: _texts(source) for part, source in sources.items()}
    trimming: dict[str, Any] = {}
    if spec.tokenize.trim:
        by_part = _divided(spec, sources, texts, class_names, seed=context.seed)
        tokenizer, trimming = _trimmed(tokenizer, by_part, spec, context)
    whole = {part: tokenizer.encode(some, max_length=wish) for part, some in texts.items()}
    length = wish or choose_length(whole["train"].lengths, longest=tokenizer.longest)
    tokens = {
        part: tokenizer.encode(texts[part], max_length=length)
        if one.contents.shape[2] > length
        else one
        for part, one in whole.items()
    }
    _note_cuts(tokens, length, context)
    size = max(one.contents.shape[2] for one in tokens.values())
    size = length if spec.tokenize.pad == "max_length" else size
    ingested = {
        part: _ingested(sources[part], texts[part], _padded(one, size, tokenizer).contents, spec)
        for part, one in tokens.items()
    }
    for part, one in ingested.items():
        if one.corrupt:
            context.events.note(
                f"{part}: {len(one.corrupt)} of {len(texts[part])} texts were left out, the first "
                f"because: {one.corrupt[0]}"
            )
    write_atomically(context.scratch / TOKENIZER, tokenizer.document.encode())
    if tokenizer.vocabulary_txt is not None:
        write_atomically(context.scratch / VOCABULARY, tokenizer.vocabulary_txt.encode())
    order = keyed_order(ingested["train"].digests, seed=context.seed, purpose="golden")
    some = [texts["train"][ingested["train"].rows[at]] for at in order[:COUNT]]
    write_golden_texts(context.scratch, tokenizer, some, max_length=length)
    made = Tokenization(
        tokenizer_sha256=_sha256(tokenizer.document),
        vocabulary=tokenizer.size,
        pad_id=tokenizer.pad_id,
        max_length=length,
        pad=spec.tokenize.pad,
        rows=tokenizer.rows,
        mask_id=tokenizer.mask_id,
        special_ids=tokenizer.special_ids,
    )
    lengths = {part: _lengths(one) for part, one in tokens.items()}
    return ingested, made, {"lengths": lengths, **trimming}


def text_digest(text: tuple[str, ...]) -> bytes:
    """16 bytes: BLAKE2b of the text, or of both; spaces around it do not count."""
    digest = hashlib.blake2b(digest_size=16)
    for one in text:
        digest.update(one.strip().encode(errors="surrogatepass") + b"\0")
    return digest.digest()


def _tokenizer(spec: DataSpec) -> TextTokenizer:
    assert spec.tokenize is not None, "the recipe gives texts a tokenizer"
    assert spec.tokenize.tokenizer is not None
    return open_tokenizer(spec.tokenize.tokenizer, paired=spec.pair is not None)


def _existing(path: str) -> Path:
    if not Path(path).exists():
        raise DataError(
            f"{path}: there is no such file or folder; give a .csv, .tsv, .jsonl or .parquet file "
            "(relative paths start at the recipe's own folder)"
        )
    return Path(path)


def _texts(source: Source) -> list[tuple[str, ...]]:
    return [text for text in source.contents() if isinstance(text, tuple)]


def _divided(
    spec: DataSpec,
    sources: Mapping[str, Source],
    texts: Mapping[str, list[tuple[str, ...]]],
    class_names: tuple[str, ...],
    *,
    seed: int,
) -> dict[str, list[tuple[str, ...]]]:
    """The usable texts of each part, as the data stage divides them later: before their tokens are
    known, as a test set taken out of train must not choose pieces."""
    none = np.empty((0, 0), np.int32)
    ingested = {part: _ingested(of, texts[part], none, spec) for part, of in sources.items()}
    whose = {id(of): part for part, of in ingested.items()}
    return {
        part: [texts[whose[id(chosen.of)]][row] for row in chosen.rows]
        for part, chosen in divide(spec, ingested, class_names, seed=seed).items()
    }


def _trimmed(
    tokenizer: TextTokenizer,
    texts: Mapping[str, list[tuple[str, ...]]],
    spec: DataSpec,
    context: Context,
) -> tuple[TextTokenizer, dict[str, Any]]:
    """The tokenizer with the pieces of all parts but test, and what that has changed."""
    assert spec.tokenize is not None
    more = [] if spec.tokenize.keep is None else _lines(Path(spec.tokenize.keep), tokenizer)
    learnt = [text for part, some in texts.items() if part != "test" for text in some]
    trimmed = trim_vocabulary(tokenizer, [*learnt, *more])
    np.save(context.scratch / KEPT_IDS, trimmed.kept_ids)
    before, after = len(tokenizer.library.get_vocab()), len(trimmed.kept_ids)
    same = same_tokens(tokenizer, trimmed, texts["test"])
    others, count = int((~same).sum()), len(same)
    context.events.note(
        f"vocabulary: {before} pieces were trimmed to {after}, for teacher and student alike; the "
        f"{len(learnt)} texts that are no test texts have the same tokens as before, and {others} "
        f"of {count} test texts ({others / count:.1%}) others, of smaller pieces; "
        "what that costs is in the teacher's accuracy too, so the drop against it does not show it"
    )
    found = {"before": before, "after": after, "test_texts": count, "test_texts_changed": others}
    return trimmed.tokenizer, {"vocabulary": found}


def _lines(path: Path, tokenizer: TextTokenizer) -> list[tuple[str, ...]]:
    """A text a line; of paired texts each counts as a first one."""
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, ValueError) as error:
        raise DataError(
            f"data.tokenize.keep: {path}: cannot be read: {error}; give a file in UTF-8 with a "
            "text a line"
        ) from error
    return [(line, "") if tokenizer.paired else (line,) for line in lines if line.strip()]


def _padded(tokens: Tokens, size: int, tokenizer: TextTokenizer) -> Tokens:
    count, rows, length = tokens.contents.shape
    if length == size:
        return tokens
    contents = np.zeros((count, rows, size), np.int32)
    contents[:, 0] = tokenizer.pad_id
    contents[..., :length] = tokens.contents
    return Tokens(contents, tokens.lengths, tokens.truncated)


def _ingested(
    source: Source,
    texts: list[tuple[str, ...]],
    contents: npt.NDArray[np.int32],
    spec: DataSpec,
) -> Ingested:
    """Every text that may be used: with a label, where it needs one."""
    usable = (source.labels != NO_LABEL) | (not source.labelled)
    rows = np.flatnonzero(usable)
    missing = [
        f"{source.names[row]}: has no label (it is empty or negative)"
        for row in np.flatnonzero(~usable)
    ]
    if missing and spec.on_corrupt == "error":
        raise DataError(f"{missing[0]}\n(`data.on_corrupt: skip` leaves such texts out)")
    if not len(rows):
        raise DataError(f"{source.where}: none of its {len(texts)} texts can be used")
    digests = b"".join(text_digest(texts[row]) for row in rows)
    return Ingested(
        source=source,
        contents=contents,
        rows=rows,
        labels=source.labels[rows],
        digests=np.frombuffer(digests, np.uint8).reshape(len(rows), 16),
        names=[source.names[row] for row in rows],
        sizes=Counter(),
        corrupt=missing,
    )


def _note_cuts(tokens: Mapping[str, Tokens], length: int, context: Context) -> None:
    for part, one in tokens.items():
        if one.truncated:
            context.events.note(
                f"{part}: {one.truncated} of {len(one.lengths)} texts are longer than {length} "
                "tokens and were cut (`data.tokenize.max_length`)"
            )


def _lengths(tokens: Tokens) -> dict[str, Any]:
    found = np.percentile(tokens.lengths, _PERCENTILES)
    return {
        "texts": len(tokens.lengths),
        "truncated": tokens.truncated,
        **{f"p{p}": int(value) for p, value in zip(_PERCENTILES, found, strict=True)},
    }


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
