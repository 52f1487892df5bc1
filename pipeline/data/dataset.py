"""What the data stage leaves in its folder, and how the other stages open it.

    data.json                       class names, preparation (all filled in), statistics
    PART.contents.npy               uint8 (N, H, W, C), canvases, or int32 (N, K, S), tokens;
                                    PART: train, validation, test
    train.contents.npy              … and behind its own samples those of the unlabelled part, if
                                    there is one, so that both are one array without a copy
    PART.labels.npy                 int64 (N,)
    PART.hashes.npy                 uint8 (N, 16), content of the full-size image, or of the text
    PART.names.json                 where each sample came from
    calibration.npy                 int64, indices into train
    tokenizer.json, vocab.txt       of texts, the latter if the tokenizer has one
    kept_ids.npy                    of a trimmed tokenizer, int64: the old id of each new one
    golden.json                     of texts: some with their tokens, see golden.py

The unlabelled part has labels, hashes and names files too; every label in it is -1.
Equal inputs give equal bytes.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ..errors import IntegrityError
from ..recipe import PreprocessSpec, Tokenization
from ..workspace import write_atomically
from .inputs import Preparation, input_shape

FORMAT = 1
PARTS = ("train", "validation", "test")  # always there
UNLABELLED = "unlabelled"  # the fourth, there if the recipe asks for it
KEPT_IDS = "kept_ids.npy"
_ROWS_AT_ONCE = 1024  # bounds what is copied at a time

Array = npt.NDArray[Any]


@dataclass(frozen=True, eq=False)
class SampleSet:
    """N samples of one size.

    Attributes:
        contents: uint8 (N, H, W, C), images; or int32 (N, K, S), tokens of texts, see tokens.py.
            An array or a read-only memmap.
        labels: int64 (N,), or -1 where the sample has none to learn from.
        ids: int64 (N,): the first 8 bytes of the content hash, big-endian, signed.
        hashes: (N,) content hashes, 32 hexadecimal digits.
        names: (N,) where each sample came from, relative to its set; or None.
    """

    contents: Array
    labels: npt.NDArray[np.int64]
    ids: npt.NDArray[np.int64]
    hashes: Array
    names: Sequence[str] | None

    def __len__(self) -> int:
        return len(self.labels)


@dataclass(frozen=True, eq=False)
class Data:
    """The sets of a recipe, and what the networks must know about them.

    Attributes:
        calibration: int64 indices into train, in random order: any prefix is a fair sample.
        preprocess: with crop, mean and std filled in; of texts, how they were tokenized.
        input_shape: (C, h, w) of the network's input, or (K, S).
        stats: what the data stage reported, but for the times.
        unlabelled: samples to learn from without labels, or None; see `with_unlabelled`.
        joined_contents: those of train, then of unlabelled: (N + M, …), of which both sets hold a
            view; None if there are no unlabelled ones.
        folder: where the data stage has left all this.
        kept_ids: of a trimmed tokenizer: for each id the one that it had, which is the row of its
            embedding in an hf: folder; None: all are as they were.
    """

    train: SampleSet
    validation: SampleSet
    test: SampleSet
    calibration: npt.NDArray[np.int64]
    class_names: tuple[str, ...]
    preprocess: Preparation
    input_shape: tuple[int, ...]
    stats: dict[str, Any]
    unlabelled: SampleSet | None = None
    joined_contents: Array | None = None
    folder: Path | None = None
    kept_ids: tuple[int, ...] | None = None


def open_data(folder: Path, *, memory_budget_bytes: int) -> Data:
    """The sets in a data stage's folder; resident if all images fit the budget, else mapped.

    Raises:
        IntegrityError: a file is missing or not of this format.
    """
    path = folder / "data.json"
    try:
        about = json.loads(path.read_text(encoding="utf-8"))
        if about["format"] != FORMAT:
            raise IntegrityError(
                f"{path}: expected format {FORMAT}, got {about['format']}; run with --fresh"
            )
        size = sum((folder / f"{part}.contents.npy").stat().st_size for part in PARTS)
        mapped = size > memory_budget_bytes
        images = {part: _load(folder / f"{part}.contents.npy", mapped=mapped) for part in PARTS}
        counts, joined = about["stats"]["counts"], None
        if UNLABELLED in counts:
            joined, labelled = images["train"], counts["train"]
            images |= {"train": joined[:labelled], UNLABELLED: joined[labelled:]}
        sets = {part: _open_set(folder, part, of_part) for part, of_part in images.items()}
        calibration = _load(folder / "calibration.npy")
        preprocess = _preparation(about["preprocess"])
        class_names, stats = tuple(about["class_names"]), about["stats"]
        trimmed = "vocabulary" in stats
        kept_ids = tuple(_load(folder / KEPT_IDS).tolist()) if trimmed else None
    except (OSError, ValueError, KeyError, EOFError) as error:
        raise IntegrityError(
            f"{folder}: expected the files of the data stage, got: {error}; run with --fresh"
        ) from error
    train = sets["train"]
    return Data(
        train=train,
        validation=sets["validation"],
        test=sets["test"],
        calibration=calibration,
        class_names=class_names,
        preprocess=preprocess,
        input_shape=input_shape(train.contents, preprocess),
        stats=stats,
        unlabelled=sets.get(UNLABELLED),
        joined_contents=joined,
        folder=folder,
        kept_ids=kept_ids,
    )


def _preparation(stored: Mapping[str, Any]) -> Preparation:
    kind = Tokenization if "tokenizer_sha256" in stored else PreprocessSpec
    return kind.model_validate(stored)


def with_unlabelled(data: Data) -> SampleSet:
    """Train followed by unlabelled (labels -1): what a student can learn from.

    The images are one array, resident or memory-mapped as train's are, and nothing is copied: the
    data stage has stored them in one file. Indices into train are valid in it. Without an
    unlabelled part it is `data.train` itself.
    """
    train, more = data.train, data.unlabelled
    if more is None:
        return train
    assert data.joined_contents is not None
    named = train.names is not None and more.names is not None
    return SampleSet(
        contents=data.joined_contents,
        labels=np.concatenate([train.labels, more.labels]),
        ids=np.concatenate([train.ids, more.ids]),
        hashes=np.concatenate([train.hashes, more.hashes]),
        names=[*(train.names or ()), *(more.names or ())] if named else None,
    )


def ids_of(digests: Array) -> npt.NDArray[np.int64]:
    """uint8 (N, 16) content hashes → int64 (N,)."""
    head = np.ascontiguousarray(digests[:, :8]).view(">i8").ravel()
    return head.astype(np.int64)


def write_contents(folder: Path, part: str, pieces: Sequence[tuple[Array, Array]]) -> None:
    """`PART.contents.npy`.

    Args:
        pieces: (contents, rows), one behind the other: of (M, …) the rows (N,) are written, in
            that order.
    """
    stored = np.lib.format.open_memmap(
        folder / f"{part}.contents.npy",
        mode="w+",
        dtype=pieces[0][0].dtype,
        shape=(sum(len(rows) for _, rows in pieces), *pieces[0][0].shape[1:]),
    )
    at = 0
    for images, rows in pieces:
        for start in range(0, len(rows), _ROWS_AT_ONCE):
            some = rows[start : start + _ROWS_AT_ONCE]
            stored[at : at + len(some)] = images[some]
            at += len(some)
    stored.flush()


def write_rows(
    folder: Path, part: str, *, labels: Array, digests: Array, names: Sequence[str]
) -> None:
    """What is known of the images of one part, in their order: (N,), (N, 16), (N,)."""
    np.save(folder / f"{part}.labels.npy", np.asarray(labels, np.int64))
    np.save(folder / f"{part}.hashes.npy", np.asarray(digests, np.uint8))
    write_json(folder / f"{part}.names.json", list(names))


def write_header(
    folder: Path,
    *,
    class_names: Sequence[str],
    preprocess: Preparation,
    calibration: Array,
    stats: Mapping[str, Any],
) -> None:
    """`calibration.npy` and, last, `data.json`."""
    np.save(folder / "calibration.npy", np.asarray(calibration, np.int64))
    about = {
        "format": FORMAT,
        "class_names": list(class_names),
        "preprocess": preprocess.model_dump(mode="json"),
        "stats": stats,
    }
    write_json(folder / "data.json", about)


def write_json(path: Path, value: object) -> None:
    text = json.dumps(value, indent=1, sort_keys=True, allow_nan=False)
    write_atomically(path, text.encode())


def _open_set(folder: Path, part: str, images: Array) -> SampleSet:
    labels = _load(folder / f"{part}.labels.npy")
    digests = _load(folder / f"{part}.hashes.npy")
    names = json.loads((folder / f"{part}.names.json").read_text(encoding="utf-8"))
    if not len(images) == len(labels) == len(digests) == len(names):
        raise IntegrityError(f"{folder}: the files of {part} differ in length; run with --fresh")
    text = digests.tobytes().hex()
    return SampleSet(
        contents=images,
        labels=labels,
        ids=ids_of(digests),
        hashes=np.array([text[at : at + 32] for at in range(0, len(text), 32)]),
        names=names,
    )


def _load(path: Path, *, mapped: bool = False) -> Any:
    return np.load(path, mmap_mode="r" if mapped else None, allow_pickle=False)


def spread(n: int, count: int) -> npt.NDArray[np.int64]:
    """Rows of up to `count` of n samples, evenly over them."""
    return np.unique(np.linspace(0, n - 1, min(count, n)).round().astype(np.int64))
