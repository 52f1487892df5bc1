"""Every way an image can be encoded gives one upright 8-bit image, or a DataError naming it."""

from __future__ import annotations

import io
import struct
import zlib
from typing import Any

import numpy as np
import pytest
from edgestill.pipeline.data.decode import (
    MAX_PIXELS,
    decode_image,
    probe_in_thread,
    quiet,
)
from edgestill.pipeline.errors import DataError
from PIL import Image

PIXELS = np.random.default_rng(0).integers(0, 256, (6, 9, 3), dtype=np.uint8)


def encode(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def decode(data: bytes) -> np.ndarray:
    return np.asarray(decode_image(data, where="here.png"))


def flat(colour: Any, mode: str) -> Image.Image:
    return Image.new(mode, (16, 16), colour)


@pytest.mark.parametrize("kind", ["PNG", "BMP", "TIFF", "PPM"])
def test_lossless_formats_give_their_pixels_back(kind: str) -> None:
    assert np.array_equal(decode(encode(Image.fromarray(PIXELS), kind)), PIXELS)


def test_grey_stays_grey() -> None:
    for mode, expected in (("L", PIXELS[..., 0]), ("LA", PIXELS[..., 0])):
        image = Image.fromarray(PIXELS[..., 0]).convert(mode)
        assert np.array_equal(decode(encode(image)), expected)


def test_one_bit_becomes_black_and_white() -> None:
    bits = PIXELS[..., 0] > 127
    assert np.array_equal(decode(encode(Image.fromarray(bits))), bits * np.uint8(255))


def test_sixteen_bits_keep_the_high_byte() -> None:
    deep = np.array([[0, 255, 256, 0x1234, 0xFFFF]], np.uint16)
    assert decode(encode(Image.fromarray(deep))).tolist() == [[0, 0, 1, 0x12, 0xFF]]


@pytest.mark.parametrize("dtype", [np.int32, np.float32])
def test_pixels_without_a_known_range_are_refused(dtype: type) -> None:
    with pytest.raises(DataError, match=r"here\.png: pixels of mode [IF] .* no known range"):
        decode(encode(Image.fromarray(np.ones((4, 4), dtype)), "TIFF"))


def test_alpha_is_laid_on_white() -> None:
    clear, half = flat((10, 20, 30, 0), "RGBA"), flat((0, 0, 0, 51), "RGBA")
    assert (decode(encode(clear)) == 255).all()
    assert (decode(encode(half)) == 204).all()  # 255 · (1 - 51/255)
    assert (decode(encode(flat((0, 51), "LA"))) == 204).all()


def test_transparent_palette_entry_is_laid_on_white() -> None:
    image = flat(0, "P")
    image.putpalette([200, 0, 0, 0, 0, 200])
    image.paste(1, (0, 0, 8, 16))
    found = decode(encode(image, transparency=0))
    assert found[0, 0].tolist() == [0, 0, 200]
    assert found[0, 15].tolist() == [255, 255, 255]


def test_palette_with_an_alpha_per_entry_leaks_no_warning() -> None:
    image = flat(0, "P")
    image.putpalette([0, 0, 0])
    assert (decode(encode(image, transparency=bytes([51]))) == 204).all()


def test_colour_key_is_laid_on_white() -> None:
    assert (decode(encode(flat((1, 2, 3), "RGB"), transparency=(1, 2, 3))) == 255).all()


def test_adobe_cmyk_jpeg_has_its_true_colours() -> None:
    red = encode(flat((0, 255, 255, 0), "CMYK"), "JPEG", quality=95)
    assert b"Adobe" in red
    assert np.abs(decode(red).astype(int) - [255, 0, 0]).max() <= 3


def test_cmyk_jpeg_that_lost_its_adobe_marker_has_the_same_colours() -> None:
    red = encode(flat((0, 255, 255, 0), "CMYK"), "JPEG", quality=95)
    at = red.index(b"\xff\xee")
    bare = red[:at] + red[at + 2 + struct.unpack(">H", red[at + 2 : at + 4])[0] :]
    assert np.array_equal(decode(bare), decode(red))


def test_cmyk_tiff_is_not_inverted() -> None:
    assert decode(encode(flat((0, 255, 255, 0), "CMYK"), "TIFF"))[0, 0].tolist() == [255, 0, 0]


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied_and_known_from_the_header(orientation: int, kind: str) -> None:
    upright = np.zeros((16, 32, 3), np.uint8)
    upright[:8, :16] = 255  # top left
    undo: dict[int, Any] = {
        1: lambda a: a,
        2: lambda a: a[:, ::-1],
        3: lambda a: a[::-1, ::-1],
        4: lambda a: a[::-1],
        5: lambda a: a.transpose(1, 0, 2),
        6: lambda a: np.rot90(a, 1),
        7: lambda a: a[::-1, ::-1].transpose(1, 0, 2),
        8: lambda a: np.rot90(a, -1),
    }
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = Image.fromarray(np.ascontiguousarray(undo[orientation](upright)))
    data = encode(stored, kind, exif=exif)
    assert np.abs(decode(data).astype(int) - upright).max() <= 8  # JPEG
    with quiet():
        assert probe_in_thread(data, where="x") == ((16, 32), False)


def test_first_frame_of_an_animation_counts() -> None:
    frames = [flat(level, "L") for level in (40, 200)]
    data = encode(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert (decode(data) == 40).all()


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("part", [0.5, 0.9])
def test_truncated_file_is_an_error_naming_it(kind: str, part: float) -> None:
    noise = np.random.default_rng(1).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    data = encode(Image.fromarray(noise), kind)
    with pytest.raises(DataError, match=r"here\.png: .*(damaged or truncated|expected an image)"):
        decode(data[: int(len(data) * part)])


@pytest.mark.parametrize("data", [b"", b"GIF8", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9"])
def test_what_is_no_raster_image_is_an_error_naming_it(data: bytes) -> None:
    with pytest.raises(DataError, match=r"here\.png: expected an image"):
        decode(data)


def message_of(data: bytes) -> str | None:
    """Of the DataError, or None if there is an image; any other error is raised."""
    try:
        assert decode_image(data, where="x").mode in ("L", "RGB")
    except DataError as error:
        return str(error)
    return None


def test_flipped_bytes_never_escape_as_another_error() -> None:
    generator = np.random.default_rng(2)
    image, messages = Image.fromarray(PIXELS), []
    for data in (encode(image, kind) for kind in ("PNG", "JPEG", "GIF", "TIFF", "BMP", "WEBP")):
        for _ in range(60):
            damaged = bytearray(data)
            damaged[generator.integers(len(data))] = generator.integers(256)
            messages.append(message_of(bytes(damaged)))
    refused = [message for message in messages if message is not None]
    assert 0 < len(refused) < len(messages)
    assert all(message.startswith("x: ") for message in refused)


def test_decompression_bomb_is_refused_from_its_header() -> None:
    side = int(MAX_PIXELS**0.5) + 1

    def chunk(kind: bytes, body: bytes) -> bytes:
        return (
            struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        )

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0))
    bomb = b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(b"\0" * 1000))
    with pytest.raises(DataError, match=r"here\.png: .* pixels are more than"):
        decode(bomb)
