"""Encoded bytes → one upright 8-bit image, grey (`L`) or `RGB`, by Pillow.

Decided here, once, for every reader:

* the EXIF orientation is applied; EXIF that cannot be read turns nothing
* transparency (alpha, palette or colour key) is laid on white
* CMYK and YCCK become RGB; Pillow's reader takes every CMYK JPEG as inverted, as Adobe writes them
* 16 bits a channel become 8 by dropping the low byte; 32-bit and float pixels are refused, because
  their range is not known
* of an animation the first frame counts

No colour management: an embedded profile is ignored, as all common training pipelines do. Data is
untrusted: only raster formats are opened (EPS would start Ghostscript) and a decompression bomb is
refused from its header.
"""

from __future__ import annotations

import functools
import io
import struct
import warnings
import zlib
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
from PIL import Image, UnidentifiedImageError

from ..errors import DataError

# Pillow's names, the most frequent first: it tries them in this order.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF", "JPEG2000")
_COMMON = (".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".gif", ".bmp", ".dib")
_RARE = (".tif", ".tiff", ".ppm", ".pgm", ".pbm", ".pnm", ".avif", ".jp2", ".j2k")
SUFFIXES = frozenset((*_COMMON, *_RARE))
# Pillow's own limit for a warning: a quarter gibibyte of RGB.
MAX_PIXELS = 1024 * 1024 * 1024 // 4 // 3

_ORIENTATION_TAG = 0x0112  # EXIF 2.3, table 4
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_TURNS_SIDES = (5, 6, 7, 8)
_GREY_MODES = ("1", "L", "LA", "La")

# What Pillow's readers raise on damaged input, found by mutating files of every format.
_BROKEN = (
    OSError,
    SyntaxError,
    ValueError,
    TypeError,
    LookupError,
    EOFError,
    ArithmeticError,
    AttributeError,
    RuntimeError,
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
)


def decode_image(data: bytes, *, where: str) -> Image.Image:
    """The upright image in mode `L` (grey input) or `RGB`.

    Args:
        data: the whole encoded file.
        where: file or row, for the message.

    Raises:
        DataError: not an image, damaged, truncated, too large, or pixels without a known range.
    """
    with quiet():
        return decode_in_thread(data, where=where)


def decode_in_thread(data: bytes, *, where: str) -> Image.Image:
    """`decode_image` for threads of a caller that holds `quiet()`: filters are process-wide."""
    image = _open(data, where)
    try:
        image.load()
        turn = _UPRIGHT.get(_orientation(image))
        plain = _to_grey_or_rgb(image)
    except _BROKEN as error:
        raise DataError(f"{where}: the image is damaged or truncated ({_say(error)})") from None
    if plain is None:
        raise DataError(
            f"{where}: pixels of mode {image.mode} (32-bit) have no known range; "
            "save the image with 8 or 16 bits a channel"
        )
    return plain if turn is None else plain.transpose(turn)


def probe_in_thread(data: bytes, *, where: str) -> tuple[tuple[int, int], bool]:
    """((H, W) once upright, is it grey) from the header, where the format's header holds them.

    Raises:
        DataError: as `decode_image`, as far as the header shows it.
    """
    image = _open(data, where)
    width, height = image.size
    # Pillow's TIFF reader turns the image itself, and its size already when it opens the file
    turned = image.format != "TIFF" and _orientation(image) in _TURNS_SIDES
    size = (width, height) if turned else (height, width)
    return size, image.mode in _GREY_MODES or _is_16_bit(image)


@contextmanager
def quiet() -> Iterator[None]:
    """Pillow's warnings are silenced: what matters in them is an error here."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        _formats()  # loads Pillow's plug-ins once, before any thread needs them
        yield


@functools.cache
def _formats() -> tuple[str, ...]:
    Image.init()
    return tuple(name for name in FORMATS if name in Image.OPEN)


def _open(data: bytes, where: str) -> Image.Image:
    if not data:
        raise DataError(f"{where}: expected an image, got an empty file")
    try:
        image = Image.open(io.BytesIO(data), formats=_formats())
    except UnidentifiedImageError:
        raise DataError(
            f"{where}: expected an image ({', '.join(FORMATS)}), got {len(data)} bytes starting "
            f"with {data[:8]!r}"
        ) from None
    except _BROKEN as error:
        raise DataError(f"{where}: the image is damaged or truncated ({_say(error)})") from None
    width, height = image.size
    if width * height > MAX_PIXELS:
        raise DataError(
            f"{where}: {width}×{height} pixels are more than the {MAX_PIXELS:,} allowed; "
            "shrink the image, or remove it if it is a decompression bomb"
        )
    return image


def _orientation(image: Image.Image) -> int:
    try:
        value = image.getexif().get(_ORIENTATION_TAG, 1)
    except _BROKEN:
        return 1
    return value if isinstance(value, int) else 1


def _is_16_bit(image: Image.Image) -> bool:
    # Pillow before 11 opens a 16-bit grey PNG as mode I
    return image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PNG")


def _to_grey_or_rgb(image: Image.Image) -> Image.Image | None:
    """None where 8 bits cannot be had without guessing the range."""
    if image.mode in ("L", "RGB") and "transparency" not in image.info:
        return image
    if _is_16_bit(image):
        high = np.asarray(image).astype(np.int64) >> 8
        return Image.fromarray(high.astype(np.uint8))
    if image.mode.startswith(("I", "F")):
        return None
    mode = "L" if image.mode in _GREY_MODES else "RGB"
    if image.mode in ("LA", "PA", "RGBA", "La", "RGBa") or "transparency" in image.info:
        layer = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer)
    return image.convert(mode)


def _say(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
