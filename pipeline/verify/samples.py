"""What a file is verified on: a set that the command line names, as inputs and labels.

Images are prepared, and texts tokenized, as the file says of itself; classes are joined by name.
Nothing is split and nothing is left out: an image that cannot be read is an error.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from ..data.dataset import SampleSet, ids_of, spread
from ..data.ingest import Ingested, ingest, take_census
from ..data.inputs import Preparation, to_input
from ..data.look import source_at
from ..data.preprocess import canvas_size, input_size
from ..data.readers import open_source
from ..data.source import NO_LABEL, Source, listing
from ..data.text_readers import Columns, open_texts, open_unlabelled_texts
from ..data.texts import text_digest
from ..data.tokenizer import open_tokenizer
from ..errors import DataError
from ..recipe import PreprocessSpec, Tokenization, UnlabelledSpec

Array = np.ndarray[Any, Any]


@dataclass(frozen=True, eq=False)
class TestSet:
    """N samples and how they become inputs.

    Attributes:
        labelled: `samples.labels` say something; else all are -1.
        class_names: what labels index; empty where neither the file nor the set has names.
        texts, tokenizer_sha256: (text,) or (text, pair) of each sample, and what made tokens of
            them; empty for images.
    """

    __test__ = False  # no test class of pytest's

    samples: SampleSet
    how: Preparation
    labelled: bool
    class_names: tuple[str, ...]
    texts: tuple[tuple[str, ...], ...] = ()
    tokenizer_sha256: str = ""

    def inputs(self, rows: Array | slice) -> Array:
        """float32 (n, C, h, w) or int64 (n, K, S) of these rows."""
        return to_input(self.samples.contents[rows], self.how)

    def spread(self, count: int) -> Array:
        """Rows of up to `count` samples, evenly over the set."""
        return spread(len(self.samples), count)


@dataclass(frozen=True)
class Set:
    """What the command line says of the data; all but `path` and `labelled` is of texts."""

    path: Path
    labelled: bool = True
    tokenizer: Path | None = None
    max_length: int | None = None  # tokens; None: as the file says
    columns: Columns = field(default_factory=Columns)


def open_images(
    wish: Set, spec: PreprocessSpec, *, class_names: tuple[str, ...], scratch: Path, threads: int
) -> TestSet:
    """A set of images, decoded into `scratch`.

    Raises:
        DataError: missing, empty, corrupt, without labels, or of other classes.
    """
    named = source_at(wish.path)
    source = open_source(named if wish.labelled else UnlabelledSpec(path=named.path))
    source = _settled(source, class_names)
    native = None
    if spec.resize is None:
        sizes = take_census(source, threads=threads).sizes
        native = next(iter(sizes)) if len(sizes) == 1 else None
    canvas = canvas_size(spec, native)
    found = ingest(
        source, spec, canvas=canvas, path=scratch / "decoded.npy", threads=threads,
        skip_corrupt=False, progress=lambda _: None,
    )  # fmt: skip
    spec = spec.model_copy(update={"crop": input_size(spec, canvas)})
    return _test_set(found, spec, wish, class_names)


def open_text_set(wish: Set, how: Tokenization, *, class_names: tuple[str, ...]) -> TestSet:
    """A set of texts, tokenized and cut as `how` says.

    Raises:
        DataError: as `open_images`. ModelError: no tokenizer.
    """
    assert wish.tokenizer is not None, "texts are read with a tokenizer"
    reader = open_texts if wish.labelled else open_unlabelled_texts
    source = _settled(reader(wish.path, wish.columns), class_names)
    texts = tuple(text for text in source.contents() if isinstance(text, tuple))
    if wish.labelled and (source.labels == NO_LABEL).any():
        where = source.names[int(np.flatnonzero(source.labels == NO_LABEL)[0])]
        raise DataError(f"{where}: has no label; add it, or take the row out of the test set")
    if not texts:
        raise DataError(f"{source.where}: holds no text; give a set with texts")
    tokenizer = open_tokenizer(str(wish.tokenizer), paired="token_type_ids" in how.rows)
    tokens = tokenizer.encode(texts, max_length=how.max_length)
    digests = np.frombuffer(b"".join(map(text_digest, texts)), np.uint8).reshape(len(texts), 16)
    found = Ingested(
        source, tokens.contents, np.arange(len(texts)), source.labels, digests, source.names,
        sizes=Counter(), corrupt=[],
    )  # fmt: skip
    digest = hashlib.sha256(tokenizer.document.encode()).hexdigest()
    test = _test_set(found, how, wish, class_names)
    return replace(test, texts=texts, tokenizer_sha256=digest)


def _settled(source: Source, class_names: tuple[str, ...]) -> Source:
    """Labels that index the file's class names; without names the set's own are taken."""
    if not source.labelled or not class_names:
        return source
    unknown = [name for name in source.class_names if name not in class_names]
    if len(source.class_names) > len(class_names) or (unknown and not source.numbered):
        raise DataError(
            f"{source.where}: names the classes {listing(source.class_names, limit=8)}, and the "
            f"model knows {listing(class_names, limit=8)}; give the model's own test set, or name "
            "its classes as the model does"
        )
    if unknown:  # the numbers 0 to C-1: places among the model's classes
        return replace(source, class_names=class_names)
    order = np.array([class_names.index(name) for name in source.class_names], np.int64)
    known = source.labels != NO_LABEL
    labels = np.where(known, order[np.where(known, source.labels, 0)], NO_LABEL)
    return replace(source, labels=labels, class_names=class_names)


def _test_set(
    found: Ingested, how: Preparation, wish: Set, class_names: tuple[str, ...]
) -> TestSet:
    text = found.digests.tobytes().hex()
    samples = SampleSet(
        contents=found.contents,
        labels=found.labels,
        ids=ids_of(found.digests),
        hashes=np.array([text[at : at + 32] for at in range(0, len(text), 32)]),
        names=found.names,
    )
    own = found.source.class_names if wish.labelled else ()
    return TestSet(samples, how, wish.labelled, class_names or own)
