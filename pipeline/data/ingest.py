"""A source's images → one array of canvases on disk, decoded by a pool of threads.

Streamed: what is in memory is a few chunks, whatever the size of the set. Results are taken in the
order of the source, so that the bytes written, the first error reported and the list of corrupt
images do not depend on which thread was faster.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
from collections import Counter, deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
from PIL import Image

from ..errors import DataError
from ..recipe import PreprocessSpec
from .decode import decode_in_thread, probe_in_thread, quiet
from .preprocess import Size, to_canvas
from .source import NO_LABEL, Encoded, Source

CHUNK = 64  # images a task: large enough that handing it over costs nothing

_T = TypeVar("_T")
_Item = tuple[Encoded, str, bool]  # image, its name for messages, has it the label it needs


@dataclass(frozen=True, eq=False)
class Ingested:
    """The usable samples of a source.

    Attributes:
        contents: uint8 (M, H, W, C) memmap, or int32 (M, K, S) tokens; only `rows` of it hold a
            sample.
        rows: int64 (N,), ascending.
        labels, digests, names: of the rows, (N,), uint8 (N, 16), (N,).
        sizes: how many images had each (H, W), upright.
        corrupt: the others, with the reason.
    """

    source: Source
    contents: npt.NDArray[Any]
    rows: npt.NDArray[np.int64]
    labels: npt.NDArray[np.int64]
    digests: npt.NDArray[np.uint8]
    names: list[str]
    sizes: Counter[Size]
    corrupt: list[str]


@dataclass(frozen=True, eq=False)
class Census:
    """Sizes (H, W) of a source's images, and whether all are grey."""

    sizes: Counter[Size]
    grey: bool


def ingest(
    source: Source,
    preprocess: PreprocessSpec,
    *,
    canvas: Size,
    path: Path,
    threads: int,
    skip_corrupt: bool,
    progress: Callable[[int], None],
) -> Ingested:
    """Decode, hash and bring to the canvas every image of `source`.

    The content hash is BLAKE2b-128 of the upright full-size RGB pixels and their shape, so that a
    losslessly re-encoded copy has the same.

    Args:
        path: of the .npy file to write.
        progress: called with the number of images done.

    Raises:
        DataError: the first image that cannot be used, unless `skip_corrupt`; or none can.
    """
    count = len(source)
    images = np.lib.format.open_memmap(
        path, mode="w+", dtype=np.uint8, shape=(count, *canvas, preprocess.channel_count)
    )
    digests = np.zeros((count, 16), np.uint8)
    usable = np.zeros(count, bool)
    sizes: Counter[Size] = Counter()
    corrupt: list[str] = []

    work = functools.partial(_bring, preprocess=preprocess, canvas=canvas)
    for row, result in enumerate(_in_order(source, work, threads=threads)):
        if isinstance(result, DataError):
            if not skip_corrupt:
                raise DataError(f"{result}\n(`data.on_corrupt: skip` leaves such images out)")
            corrupt.append(str(result))
        else:
            images[row], digest, size = result
            digests[row] = np.frombuffer(digest, np.uint8)
            usable[row] = True
            sizes[size] += 1
        if row % CHUNK == CHUNK - 1:
            progress(row + 1)
    progress(count)
    rows = np.flatnonzero(usable)
    if not len(rows):
        raise DataError(
            f"{source.where}: none of its {count} images can be used, the first because: "
            f"{corrupt[0]}"
        )
    return Ingested(
        source=source,
        contents=images,
        rows=rows,
        labels=source.labels[rows],
        digests=digests[rows],
        names=[source.names[row] for row in rows],
        sizes=sizes,
        corrupt=corrupt,
    )


def take_census(source: Source, *, threads: int) -> Census:
    """Sizes and colours from the images' headers; images that cannot be read do not count."""
    sizes: Counter[Size] = Counter()
    grey = True

    def work(item: _Item) -> tuple[Size, bool]:
        image, name, _ = item
        if isinstance(image, np.ndarray):
            return (image.shape[0], image.shape[1]), image.ndim == 2
        return probe_in_thread(_content(image, name), where=name)

    for result in _in_order(source, work, threads=threads):
        if not isinstance(result, DataError):
            sizes[result[0]] += 1
            grey = grey and result[1]
    return Census(sizes, grey)


def content_digest(image: Image.Image) -> bytes:
    """16 bytes: BLAKE2b of the RGB pixels and their shape."""
    rgb = image.convert("RGB")
    digest = hashlib.blake2b(f"{rgb.height}x{rgb.width}".encode(), digest_size=16)
    digest.update(rgb.tobytes())
    return digest.digest()


def _in_order(
    source: Source, work: Callable[[_Item], _T], *, threads: int
) -> Iterator[_T | DataError]:
    """`work` on every image, in order; a DataError is a result. A bounded number is under way."""

    def work_on(chunk: list[_Item]) -> list[_T | DataError]:
        return [_attempt(work, item) for item in chunk]

    labelled = ((source.labels != NO_LABEL) | (not source.labelled)).tolist()
    items = zip(source.contents(), source.names, labelled, strict=True)
    with quiet(), ThreadPoolExecutor(threads) as pool:
        waiting: deque[Future[list[_T | DataError]]] = deque()
        try:
            while chunk := list(itertools.islice(items, CHUNK)):
                waiting.append(pool.submit(work_on, chunk))
                if len(waiting) > 2 * threads:
                    yield from waiting.popleft().result()
            while waiting:
                yield from waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()


def _attempt(work: Callable[[_Item], _T], item: _Item) -> _T | DataError:
    try:
        return work(item)
    except DataError as error:
        return error


def _bring(
    item: _Item, *, preprocess: PreprocessSpec, canvas: Size
) -> tuple[npt.NDArray[np.uint8], bytes, Size]:
    """(canvas, content hash, (H, W) before)."""
    picture = _decoded(item)
    try:
        pixels = to_canvas(picture, preprocess, canvas)
    except DataError as error:
        raise DataError(f"{item[1]}: {error}") from None
    return pixels, content_digest(picture), (picture.height, picture.width)


def _decoded(item: _Item) -> Image.Image:
    image, name, labelled = item
    if not labelled:
        raise DataError(f"{name}: has no label (it is null or negative)")
    if isinstance(image, np.ndarray):
        return Image.fromarray(image)
    return decode_in_thread(_content(image, name), where=name)


def _content(image: Any, name: str) -> bytes:
    if image is None:
        raise DataError(f"{name}: has no image (its bytes are null)")
    if isinstance(image, Path):
        try:
            return image.read_bytes()
        except OSError as error:
            raise DataError(f"{name}: cannot be read: {error.strerror}") from None
    assert isinstance(image, bytes)
    return image
