"""Preprocessing equals its own description, redone with NumPy and Pillow alone."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
import torch
from edgestill.pipeline.data.preprocess import (
    canvas_size,
    centre_crop,
    input_size,
    preprocess_metadata,
    to_canvas,
    to_input,
    to_input_tensor,
)
from edgestill.pipeline.errors import DataError
from edgestill.pipeline.recipe import PreprocessSpec
from PIL import Image

STATISTICS = {
    "rgb": {"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]},
    "bgr": {"mean": [0.406, 0.456, 0.485], "std": [0.225, 0.224, 0.229]},
    "gray": {"mean": [0.45], "std": [0.22]},
}


def spec_of(**options: Any) -> PreprocessSpec:
    options |= STATISTICS[options.setdefault("channels", "rgb")]
    return PreprocessSpec.model_validate(options)


def photo(height: int, width: int) -> Image.Image:
    noise = np.random.default_rng(height * width).integers(0, 256, (height, width, 3), np.uint8)
    return Image.fromarray(noise)


def redone(image: Image.Image, metadata: dict[str, Any]) -> np.ndarray:
    """What a user writes who has only the metadata."""
    image = image.convert("L" if metadata["channels"] == "gray" else "RGB")
    if metadata["resize"] is not None:
        if isinstance(metadata["resize"], int):
            shorter = min(image.size)
            size = tuple(metadata["resize"] * side // shorter for side in image.size)
        else:
            size = tuple(reversed(metadata["resize"]))
        kernel = Image.Resampling[metadata["interpolation"].upper()]
        if size == image.size:
            pass
        elif metadata["antialias"]:
            image = image.resize(size, kernel)
        else:
            scale = (image.width / size[0], 0, 0, 0, image.height / size[1], 0)
            image = image.transform(size, Image.Transform.AFFINE, scale, kernel)
    height, width = metadata["crop"]
    left, top = (image.width - width) // 2, (image.height - height) // 2
    image = image.crop((left, top, left + width, top + height))
    x = np.asarray(image).reshape(height, width, -1).astype(np.float32)
    if metadata["channels"] == "bgr":
        x = x[:, :, ::-1]
    x = x / np.float32(metadata["max_value"])
    x = (x - np.array(metadata["mean"], np.float32)) / np.array(metadata["std"], np.float32)
    return x.transpose(2, 0, 1)


@pytest.mark.parametrize("channels", ["rgb", "bgr", "gray"])
@pytest.mark.parametrize("antialias", [True, False])
@pytest.mark.parametrize(
    "geometry",
    [
        {"resize": 20, "crop": 16},
        {"resize": 21, "crop": [16, 13]},
        {"resize": [18, 25], "crop": [15, 24]},
        {"resize": [18, 25], "crop": [18, 25], "interpolation": "nearest"},
        {"resize": 64, "crop": 64, "interpolation": "bicubic"},
        {"crop": [17, 30]},
    ],
)
def test_input_is_what_its_metadata_says(
    geometry: dict[str, Any], antialias: bool, channels: str
) -> None:
    spec = spec_of(**geometry, antialias=antialias, channels=channels)
    image = photo(33, 50)
    canvas = to_canvas(image, spec, canvas_size(spec, (33, 50)))
    metadata = json.loads(json.dumps(preprocess_metadata(spec)))
    assert np.array_equal(to_input(canvas[None], spec)[0], redone(image, metadata))
    assert all("\n" not in step for step in metadata["steps"])


def test_canvas_margin_is_even_so_that_two_crops_are_one() -> None:
    for resize in range(8, 16):
        for crop in range(5, 9):
            spec = spec_of(resize=resize, crop=crop)
            canvas = canvas_size(spec, None)
            assert [(side - crop) % 2 for side in canvas] == [0, 0]
            assert all(crop <= side <= resize for side in canvas)


@pytest.mark.parametrize("interpolation", ["bilinear", "nearest"])
def test_point_sampling_is_what_torch_does_without_antialias(interpolation: str) -> None:
    spec = spec_of(resize=[20, 24], antialias=False, interpolation=interpolation)
    image = photo(47, 61)
    ours = to_canvas(image, spec, (20, 24)).astype(np.float32)
    planes = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].float()
    mode = "nearest-exact" if interpolation == "nearest" else interpolation
    theirs = torch.nn.functional.interpolate(planes, (20, 24), mode=mode)
    assert np.abs(ours - theirs[0].permute(1, 2, 0).numpy()).max() <= 1  # rounding to 8 bits


def test_defaults_of_size_follow_the_resize() -> None:
    assert input_size(spec_of(resize=32), (32, 32)) == (32, 32)
    assert input_size(spec_of(resize=[20, 30]), (20, 30)) == (20, 30)
    assert input_size(spec_of(), (9, 7)) == (9, 7)
    assert input_size(spec_of(resize=36, crop=32), (36, 36)) == (32, 32)


def test_crop_larger_than_the_resize_is_an_error() -> None:
    with pytest.raises(DataError, match="crop 40×40 is larger than the 32×32"):
        canvas_size(spec_of(resize=32, crop=40), None)


def test_image_smaller_than_the_crop_is_an_error() -> None:
    with pytest.raises(DataError, match="9×30 is smaller than 16×16"):
        to_canvas(photo(30, 9), spec_of(crop=16), (16, 16))


def test_torch_twin_equals_numpy_bit_by_bit() -> None:
    images = np.random.default_rng(0).integers(0, 256, (5, 11, 10, 3), dtype=np.uint8)
    spec = spec_of(crop=[9, 8])
    twin = to_input_tensor(torch.from_numpy(centre_crop(images, (9, 8)).copy()), spec)
    assert twin.is_contiguous(memory_format=torch.channels_last)
    assert np.array_equal(twin.numpy(), to_input(images, spec))


def test_max_value_of_digits_maps_white_to_one() -> None:
    spec = PreprocessSpec(channels="gray", max_value=16, mean=(0.0,), std=(1.0,))
    canvas = to_canvas(np.array([[0, 8], [16, 4]], np.uint8), spec, (2, 2))
    assert to_input(canvas[None], spec).tolist() == [[[[0.0, 0.5], [1.0, 0.25]]]]
