"""Where images come from: `digits`, an image folder, or parquet. Nothing is decoded here.

* `digits`: scikit-learn's 1,797 bundled 8×8 images, raw values 0 to 16
* a folder with one sub-folder a class; deeper folders belong to their class
* a .parquet file, or a folder of shards (parquet.py)

Images without labels come from the same places; their folder may be flat or nested, as its
sub-folders mean nothing, and their parquet file needs no column of labels.

Classes are in the order of their names. Hidden files and files that are no images are passed over
and counted; an empty class is an error, because it is nearly always a slip in the preparation.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import NoReturn

import numpy as np

from ..errors import DataError
from ..recipe import SourceSpec, UnlabelledSpec
from .decode import SUFFIXES
from .parquet import open_parquet, open_unlabelled_parquet, shards
from .source import NO_LABEL, Encoded, Source, listing

DIGITS = "digits"
_SPLIT_NAMES = frozenset(("train", "training", "test", "val", "valid", "validation"))


def open_source(spec: SourceSpec | UnlabelledSpec) -> Source:
    """The set named by `spec`, listed and, unless it needs none, with its labels read.

    Raises:
        DataError: missing, empty, or not in a form that is understood.
    """
    if isinstance(spec, UnlabelledSpec):
        return _open_unlabelled(spec)
    if spec.path == DIGITS:
        return _open_digits()
    path = Path(spec.path)
    if _holds_parquet(path):
        return open_parquet(path, image=spec.image, label=spec.label)
    return _open_folder(path)


def fingerprint(spec: SourceSpec | UnlabelledSpec) -> str:
    """sha256 of everything `open_source` would read, wherever it lies.

    Parquet: over names and bytes of the shards; an image folder: over the sorted (relative path,
    size, sha256 of the bytes); digits: scikit-learn's version.
    """
    if spec.path == DIGITS:
        import sklearn  # a second to import, and needed for this set alone

        return hashlib.sha256(f"digits {sklearn.__version__}".encode()).hexdigest()
    path = Path(spec.path)
    if _holds_parquet(path):
        files, base = shards(path), path if path.is_dir() else path.parent
    elif isinstance(spec, UnlabelledSpec):
        files, base = _list_unlabelled(path)[0], path
    else:
        classes, _ = _list_folder(path)
        files, base = [file for of_class in classes.values() for file in of_class], path
    with ThreadPoolExecutor() as pool:
        digests = list(pool.map(_file_digest, files))
    # a class is named by its folder, a single file's own name says nothing
    names = [f.relative_to(base).as_posix() for f in files] if path.is_dir() else ["-"]
    lines = sorted(f"{name}\0{digest}\n" for name, digest in zip(names, digests, strict=True))
    return hashlib.sha256("".join(lines).encode(errors="surrogateescape")).hexdigest()


def _holds_parquet(path: Path) -> bool:
    if not path.exists():
        raise DataError(
            f"{path}: there is no such file or folder; give an image folder, a .parquet file "
            f"or `{DIGITS}` (relative paths start at the recipe's own folder)"
        )
    if path.is_file():
        if path.suffix != ".parquet":
            raise DataError(
                f"{path}: expected an image folder or a .parquet file, got a "
                f"{path.suffix or 'file without suffix'}"
            )
        return True
    return any(
        entry.name.endswith(".parquet") and not entry.name.startswith(".") and entry.is_file()
        for entry in _entries(path)
    )


def _open_digits() -> Source:
    from sklearn.datasets import load_digits

    bunch = load_digits()
    pixels = bunch.images.astype(np.uint8)
    return Source(
        where=DIGITS,
        labels=bunch.target.astype(np.int64),
        class_names=tuple(str(name) for name in bunch.target_names),
        numbered=False,
        names=[f"digits {index}" for index in range(len(pixels))],
        contents=lambda: iter(pixels),
        max_value=16.0,
    )


def _open_unlabelled(spec: UnlabelledSpec) -> Source:
    if spec.path == DIGITS:
        digits = _open_digits()
        labels = np.full_like(digits.labels, NO_LABEL)
        return replace(digits, labels=labels, class_names=(), labelled=False)
    path = Path(spec.path)
    if _holds_parquet(path):
        return open_unlabelled_parquet(path, image=spec.image)
    files, ignored = _list_unlabelled(path)
    return Source(
        where=str(path),
        labels=np.full(len(files), NO_LABEL, np.int64),
        class_names=(),
        numbered=False,
        names=[file.relative_to(path).as_posix() for file in files],
        contents=lambda: iter(files),
        ignored=ignored,
        labelled=False,
    )


def _list_unlabelled(root: Path) -> tuple[list[Path], int]:
    """Images anywhere below `root`, in order of name, and the count of other files."""
    images, others = _list_images(root)
    if not images:
        raise DataError(
            f"{root}: expected images anywhere below this folder "
            f"({', '.join(sorted(SUFFIXES))}), got none and {others} other files; add images, "
            "give another folder or a .parquet file, or leave `data.unlabelled` out"
        )
    return images, others


def _open_folder(root: Path) -> Source:
    classes, ignored = _list_folder(root)
    class_names = tuple(classes)
    files = [file for name in class_names for file in classes[name]]
    counts = [len(classes[name]) for name in class_names]

    def images() -> Iterator[Encoded]:
        return iter(files)

    return Source(
        where=str(root),
        labels=np.repeat(np.arange(len(counts), dtype=np.int64), counts),
        class_names=class_names,
        numbered=False,
        names=[file.relative_to(root).as_posix() for file in files],
        contents=images,
        ignored=ignored,
    )


def _list_folder(root: Path) -> tuple[dict[str, list[Path]], int]:
    """Images of each class, both in order of name, and the count of other files."""
    entries = _entries(root)
    folders = sorted(e.name for e in entries if e.is_dir() and not e.name.startswith("."))
    ignored = sum(not entry.is_dir() for entry in entries)
    if not folders:
        raise DataError(
            f"{root}: expected one sub-folder a class, got {ignored} files and no sub-folder; "
            "move the images of each class into a folder of its name"
        )
    if set(folders) <= _SPLIT_NAMES:
        raise DataError(
            f"{root}: the sub-folders {listing(folders)} look like splits, not classes; give "
            f"each as its own set, e.g. data.train.path: {root / folders[0]}"
        )
    classes: dict[str, list[Path]] = {}
    empty = []
    for name in folders:
        images, others = _list_images(root / name)
        ignored += others
        classes[name] = images
        if not images:
            empty.append(f"{name} ({others} other files)")
    if empty:
        raise DataError(
            f"{root}: no images in the class folders {listing(empty)}; add images "
            f"({', '.join(sorted(SUFFIXES))}) or remove the folders"
        )
    return classes, ignored


def _list_images(folder: Path) -> tuple[list[Path], int]:
    images, others = [], 0
    for place, inner, files in os.walk(folder, onerror=_unreadable):
        inner[:] = [name for name in inner if not name.startswith(".")]
        for name in files:
            if not name.startswith(".") and Path(name).suffix.lower() in SUFFIXES:
                images.append(Path(place, name))
            else:
                others += 1
    return sorted(images, key=lambda path: path.relative_to(folder).as_posix()), others


def _entries(folder: Path) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as entries:
            return list(entries)
    except OSError as error:
        _unreadable(error)


def _unreadable(error: OSError) -> NoReturn:
    raise DataError(f"{error.filename}: cannot be read: {error.strerror}") from None


def _file_digest(path: Path) -> str:
    try:
        with path.open("rb") as handle:
            digest = hashlib.file_digest(handle, "sha256").hexdigest()
            return f"{handle.tell()}\0{digest}"
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from None
