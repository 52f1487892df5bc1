"""From a decoded image to the network's input; `inputs.py` is what the stages call.

    grey or RGB, 8 bits → `channels` → `resize` → centre `crop` → x / max_value → (x - mean) / std

What is stored is the *canvas*: the resized image, centre-cropped as little as gives all images one
size. Its margin over the crop is even on each axis, so that cropping the canvas gives exactly the
pixels that cropping the resized image would have given. The float part is three IEEE operations in
float32, in this order, in NumPy and torch alike: their results are equal bit by bit.

A shorter-side resize rounds the longer side down, a centre crop starts at floor((side - crop) / 2).
`antialias: true` is Pillow's `resize` (the filter widens as the image shrinks); false samples the
same filter at single points, as `interpolate(antialias=False)` does in torch.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from ..errors import DataError
from ..recipe import PreprocessSpec

if TYPE_CHECKING:
    from torch import Tensor

Pixels = npt.NDArray[np.uint8]
Size = tuple[int, int]  # (H, W)

_FILTERS = {
    "nearest": Image.Resampling.NEAREST,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
}


def input_size(spec: PreprocessSpec, canvas: Size) -> Size:
    """(h, w) that the network sees."""
    if spec.crop is not None:
        return spec.crop
    if isinstance(spec.resize, int):
        return spec.resize, spec.resize
    return spec.resize or canvas


def canvas_size(spec: PreprocessSpec, native: Size | None) -> Size:
    """(H, W) stored per image: the most that all images have, in step with the crop.

    Args:
        native: (H, W) of the images if they all have the same, else None.

    Raises:
        DataError: the crop is larger than what it is cut from, or nothing fixes the size.
    """
    if isinstance(spec.resize, int):
        resized: Size | None = (spec.resize, spec.resize)
    else:
        resized = spec.resize or native
    if resized is None:
        if spec.crop is None:
            raise DataError(
                "data.preprocess: the images differ in size; give a `resize`, a `crop`, or both"
            )
        return spec.crop
    crop = input_size(spec, resized)
    if crop[0] > resized[0] or crop[1] > resized[1]:
        raise DataError(
            f"data.preprocess: crop {crop[0]}×{crop[1]} is larger than the {resized[0]}×"
            f"{resized[1]} (height × width) that is left after `resize`; crop less or resize more"
        )
    height, width = (side - (side - part) % 2 for side, part in zip(resized, crop, strict=True))
    return height, width


def to_canvas(image: Image.Image | Pixels, spec: PreprocessSpec, canvas: Size) -> Pixels:
    """The stored pixels of one image.

    Args:
        image: `L` or `RGB`, or uint8 (H, W) or (H, W, 3).

    Returns:
        uint8 (H, W, C) of the canvas's size.

    Raises:
        DataError: the image is smaller than the canvas; the message lacks the image's name.
    """
    picture = image if isinstance(image, Image.Image) else Image.fromarray(image)
    picture = _resized(picture.convert("L" if spec.channels == "gray" else "RGB"), spec)
    height, width = canvas
    if picture.height < height or picture.width < width:
        raise DataError(
            f"{picture.width}×{picture.height} is smaller than {width}×{height} (width × height); "
            "set `data.preprocess.resize` to enlarge small images"
        )
    left, top = (picture.width - width) // 2, (picture.height - height) // 2
    pixels = np.asarray(picture)[top : top + height, left : left + width]
    pixels = pixels.reshape(height, width, -1)
    return pixels[..., ::-1] if spec.channels == "bgr" else pixels


def centre_crop(images: Pixels, crop: Size) -> Pixels:
    """The middle h × w of uint8 (N, H, W, C), as a view."""
    top, left = ((side - part) // 2 for side, part in zip(images.shape[1:3], crop, strict=True))
    return images[:, top : top + crop[0], left : left + crop[1]]


def to_input(images: Pixels, spec: PreprocessSpec) -> npt.NDArray[np.float32]:
    """What every model is evaluated on: centre crop and normalisation.

    Args:
        images: uint8 (N, H, W, C), canvases.
        spec: with mean and std filled in.

    Returns:
        float32 (N, C, h, w), contiguous.
    """
    cropped = np.asarray(centre_crop(images, input_size(spec, images.shape[1:3])))
    count, height, width, channels = cropped.shape
    # constants as long as an image: broadcasting over an inner axis of 3 is several times slower
    mean, std = (np.tile(values, height * width) for values in _statistics(spec))
    flat = cropped.reshape(count, -1).astype(np.float32)
    flat /= np.float32(spec.max_value)
    flat -= mean
    flat /= std
    planes = flat.reshape(count, height, width, channels).transpose(0, 3, 1, 2)
    return np.ascontiguousarray(planes)


def to_input_tensor(images: Tensor, spec: PreprocessSpec) -> Tensor:
    """`to_input` in torch, for images already cropped; equal to it bit by bit on the CPU.

    Args:
        images: uint8 (N, h, w, C), any device.

    Returns:
        float32 (N, C, h, w) in channels_last memory.
    """
    import torch  # only training needs it

    count, height, width, channels = images.shape
    mean, std = (
        torch.from_numpy(values).to(images.device).repeat(height * width)
        for values in _statistics(spec)
    )
    flat = images.reshape(count, -1).to(torch.float32)
    flat.div_(spec.max_value).sub_(mean).div_(std)
    planes = flat.view(count, height, width, channels).permute(0, 3, 1, 2)
    return planes.contiguous(memory_format=torch.channels_last)


def preprocess_metadata(spec: PreprocessSpec) -> dict[str, Any]:
    """Everything needed to prepare an image with Pillow and NumPy alone, JSON-able.

    `steps` says it in words; the other keys hold the same for a program.
    """
    return {
        "steps": _steps(spec),
        **spec.model_dump(mode="json"),
        "exif_orientation": "applied",
        "transparency": "on white",
        "layout": "NCHW",
        "dtype": "float32",
    }


def metadata_entries(class_names: Sequence[str], preparation: Mapping[str, Any]) -> dict[str, str]:
    """Class names and preparation of an input, as entries of a file's metadata."""
    return {
        "edgestill.class_names": json.dumps(list(class_names), ensure_ascii=False),
        "edgestill.preprocess": json.dumps(preparation, sort_keys=True, ensure_ascii=False),
    }


def _resized(image: Image.Image, spec: PreprocessSpec) -> Image.Image:
    if spec.resize is None:
        return image
    if isinstance(spec.resize, int):
        side = spec.resize
        shorter = min(image.size)
        width, height = (side * length // shorter for length in image.size)
    else:
        height, width = spec.resize
    if (width, height) == image.size:
        return image
    kernel = _FILTERS[spec.interpolation]
    if spec.antialias:
        return image.resize((width, height), kernel)
    # output pixel centre (x + ½) · scale is where the filter is evaluated
    scale = (image.width / width, 0, 0, 0, image.height / height, 0)
    return image.transform((width, height), Image.Transform.AFFINE, scale, resample=kernel)


def _statistics(spec: PreprocessSpec) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
    assert spec.mean is not None, "the data stage fills mean"
    assert spec.std is not None, "the data stage fills std"
    return np.array(spec.mean, np.float32), np.array(spec.std, np.float32)


def _steps(spec: PreprocessSpec) -> list[str]:
    mode = "L" if spec.channels == "gray" else "RGB"
    steps = [
        "decode to 8 bits a channel, apply the EXIF orientation, lay transparency on white "
        f"(of 16 bits keep the high byte), convert to Pillow mode {mode}"
    ]
    kernel = spec.interpolation.upper()
    if isinstance(spec.resize, int):
        target = f"shorter side {spec.resize}, longer side {spec.resize} * longer // shorter"
    elif spec.resize is not None:
        target = f"height {spec.resize[0]}, width {spec.resize[1]}"
    if spec.resize is not None:
        how = (
            f"Image.resize(size, Resampling.{kernel})"
            if spec.antialias
            else "Image.transform(size, Transform.AFFINE, (width_in / width_out, 0, 0, 0, "
            f"height_in / height_out, 0), Resampling.{kernel})"
        )
        steps.append(f"unless it has that size already, resize to {target}: {how}")
    if spec.crop is not None:
        steps.append(
            f"crop the centre, height {spec.crop[0]}, width {spec.crop[1]}, starting at "
            "(side - crop) // 2"
        )
    if spec.channels == "bgr":
        steps.append("reverse the channels to BGR")
    mean, std = list(spec.mean or ()), list(spec.std or ())
    steps.append(f"float32: (x / {spec.max_value:g} - {mean}) / {std}, channel by channel")
    steps.append("transpose to (channels, height, width)")
    return steps
