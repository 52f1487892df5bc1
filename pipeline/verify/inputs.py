"""How the inputs of a file are made, and the set that it is verified on, opened in that way."""

from __future__ import annotations

import dataclasses
import hashlib
from pathlib import Path

from ..data.inputs import Preparation
from ..data.tokenizer import open_tokenizer
from ..errors import UsageError
from ..recipe import PreprocessSpec, Tokenization
from ..report import RungRecord
from .facts import Facts
from .record import rung
from .samples import Set, TestSet, open_images, open_text_set

TOKENIZER = "tokenizer.json"
MOST = 512  # tokens, where neither the file nor the command line nor the tokenizer says


def open_set(
    facts: Facts, data: Set, *, how: Preparation | None, class_names: tuple[str, ...],
    scratch: Path, threads: int, tokenizer: Path | None = None,
) -> TestSet:  # fmt: skip
    """The set, as images or as texts.

    Args:
        how: said by the command line or the reference; None: the file's own metadata.
        tokenizer: of the reference, where none is given and none lies beside the file.

    Raises:
        UsageError: nobody says how inputs are prepared. DataError: the set cannot be used.
    """
    if facts.is_text:
        data = dataclasses.replace(data, tokenizer=_tokenizer(facts, data, tokenizer))
        how = how or facts.how or _tokenization(facts, data)
    said = how or facts.how
    if said is None:
        raise UsageError(
            f"{facts.path}: it does not say how its images were prepared, and that is not guessed: "
            "give --mean and --std of its training, e.g. --mean 0.485,0.456,0.406 --std "
            "0.229,0.224,0.225, with --resize and --crop if images have other sizes"
        )
    if isinstance(said, PreprocessSpec) == facts.is_text:
        raise UsageError(
            f"{facts.path}: reads {'texts' if facts.is_text else 'images'}; give data and a "
            "reference of the same task"
        )
    if isinstance(said, PreprocessSpec):
        return open_images(data, said, class_names=class_names, scratch=scratch, threads=threads)
    return open_text_set(data, said, class_names=class_names)


def tokenizer_rung(test: TestSet) -> RungRecord:
    """Whether texts were tokenized with the tokenizer that the file was made with."""
    assert isinstance(test.how, Tokenization)
    expected, got = test.how.tokenizer_sha256, test.tokenizer_sha256
    same = expected == got
    note = "" if same else f"sha256 {got[:12]}…, the metadata says {expected[:12]}…"
    return rung("tokenizer", "metadata", passed=same, note=note)


def _tokenizer(facts: Facts, data: Set, reference: Path | None) -> Path:
    beside = facts.path.parent / TOKENIZER
    found = data.tokenizer or (beside if beside.is_file() else reference)
    if found is None:
        raise UsageError(
            f"{facts.path}: reads texts, and no {TOKENIZER} lies beside it; give --tokenizer, that "
            "file or its folder"
        )
    return found


def _tokenization(facts: Facts, data: Set) -> Tokenization:
    """Of somebody else's file: as long as the command line, or else the tokenizer, says."""
    paired = len(facts.inputs) == 3
    tokenizer = open_tokenizer(str(data.tokenizer), paired=paired)
    shape = facts.input_shape
    fixed = shape[1] if shape is not None and len(shape) == 2 else None
    return Tokenization(
        tokenizer_sha256=hashlib.sha256(tokenizer.document.encode()).hexdigest(),
        vocabulary=tokenizer.size,
        pad_id=tokenizer.pad_id,
        max_length=data.max_length or fixed or tokenizer.longest or MOST,
        pad="longest" if fixed is None else "max_length",
        rows=facts.inputs,
    )
