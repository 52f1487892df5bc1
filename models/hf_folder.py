"""What a local Hugging Face folder says of itself: task, classes, weights, preprocessing.

Reads its JSON files alone and runs nothing; `hf.py` builds the network. Knows no torch.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..pipeline.errors import ModelError

PREFIX = "hf:"
CONFIG = "config.json"
PROCESSOR = "preprocessor_config.json"

# Image processors whose files this project reads, and whether they crop where the file is silent.
_CROPS = {
    "ViT": False, "ConvNext": False, "Siglip": False, "DeiT": True, "Levit": True, "Bit": True,
    "CLIP": True, "MobileNetV1": True, "MobileNetV2": True, "MobileViT": True,
}  # fmt: skip
_SUFFIXES = ("Pil", "Fast", "ImageProcessor", "FeatureExtractor")
_FILTERS = {0: "nearest", 2: "bilinear", 3: "bicubic"}  # of Pillow
_STRETCHED_FROM = 384  # ConvNeXt at this size and above is not cropped
_LEVIT_MARGIN = 256 / 224


@dataclass(frozen=True)
class HfFolder:
    """A folder with a config.json that was read."""

    path: Path
    config: Mapping[str, Any]

    @property
    def labels(self) -> tuple[str, ...]:
        """Names of the classes in the order of the logits; LABEL_0, … where it names none."""
        names = self.config.get("id2label") or {}
        count = len(names) or int(self.config.get("num_labels") or 0)
        if not count and any("Classification" in n for n in self.config.get("architectures") or ()):
            count = 2  # save_pretrained writes neither where there are two without names
        return tuple(str(names.get(str(number), f"LABEL_{number}")) for number in range(count))

    @property
    def names_its_classes(self) -> bool:
        return any(name != f"LABEL_{number}" for number, name in enumerate(self.labels))

    @property
    def weights(self) -> tuple[Path, ...]:
        """Its weights files, all shards; empty: a folder that only describes a network."""
        for pattern in ("model*.safetensors", "pytorch_model*.bin"):
            found = tuple(sorted(self.path.glob(pattern)))
            if found:
                return found
        return ()

    def preprocess(self) -> dict[str, Any] | None:
        """The recipe's `data.preprocess` that its preprocessor_config.json means; None: no file.

        Raises:
            ModelError: the file cannot be read, or asks for something that is not offered here.
        """
        path = self.path / PROCESSOR
        if not path.exists():
            return None
        return _preprocess(_read(path), path, channels=int(self.config.get("num_channels", 3)))


def find_folder(reference: str) -> HfFolder | None:
    """The folder that `hf:DIR` names; None: the reference names something else.

    Raises:
        ModelError: there is no such folder, or it is not one of Hugging Face's.
    """
    if not reference.startswith(PREFIX):
        return None
    path = Path(reference.removeprefix(PREFIX)).expanduser()
    if not path.is_dir():
        raise ModelError(
            f"{reference}: no such folder; `hf:` takes a local folder, as save_pretrained writes "
            "it; nothing is downloaded"
        )
    if not (path / CONFIG).is_file():
        raise ModelError(
            f"{reference}: holds no {CONFIG}; give a folder that save_pretrained wrote"
        )
    return HfFolder(path, _read(path / CONFIG))


def _read(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"{path}: cannot be read as JSON: {error}; copy it again") from error
    if not isinstance(content, dict):
        raise ModelError(f"{path}: expected a JSON object, got {type(content).__name__}")
    return content


def _preprocess(given: Mapping[str, Any], path: Path, *, channels: int) -> dict[str, Any]:
    kind = _kind(given, path)
    found: dict[str, Any] = {"antialias": True}
    side = given.get("size")
    if given.get("do_resize", True):
        if side is None:
            raise _not_offered(path, "a resize without a size")
        found |= _resize(kind, side, given, path)
        found["interpolation"] = _interpolation(given, path)
    if kind != "ConvNext" and given.get("do_center_crop", _CROPS[kind]):
        found["crop"] = _pair(given.get("crop_size", side), path)
    scale = given.get("rescale_factor", 1 / 255) if given.get("do_rescale", True) else 1.0
    found["max_value"] = round(1 / scale, 6)
    if given.get("do_normalize", kind != "MobileViT"):
        if given.get("image_mean") is None or given.get("image_std") is None:
            raise _not_offered(path, "normalisation without image_mean and image_std")
        found["mean"], found["std"] = list(given["image_mean"]), list(given["image_std"])
    else:
        found["mean"], found["std"] = [0.0] * channels, [1.0] * channels
    if channels == 1:
        found["channels"] = "gray"
    elif given.get("do_flip_channel_order", kind == "MobileViT"):
        found["channels"] = "bgr"
    return found


def _kind(given: Mapping[str, Any], path: Path) -> str:
    name = str(given.get("image_processor_type") or given.get("feature_extractor_type") or "")
    kind = name
    for suffix in _SUFFIXES:
        kind = kind.removesuffix(suffix)
    if kind not in _CROPS:
        raise _not_offered(path, f"the image processor {name or 'of no name'}")
    return kind


def _not_offered(path: Path, what: str) -> ModelError:
    return ModelError(
        f"{path}: asks for {what}, which is not read here; write `data.preprocess` in the recipe"
    )


def _resize(kind: str, size: Any, given: Mapping[str, Any], path: Path) -> dict[str, Any]:
    shortest = size.get("shortest_edge") if isinstance(size, Mapping) else None
    if kind == "ConvNext":
        side = int(shortest if shortest is not None else _pair(size, path)[0])
        if side >= _STRETCHED_FROM:
            return {"resize": [side, side]}
        return {"resize": int(side / given.get("crop_pct", 0.875)), "crop": [side, side]}
    if shortest is None:
        return {"resize": _pair(size, path)}
    return {"resize": int(_LEVIT_MARGIN * shortest) if kind == "Levit" else int(shortest)}


def _pair(size: Any, path: Path) -> list[int]:
    """(height, width)."""
    if isinstance(size, int):
        return [size, size]
    if isinstance(size, Mapping) and {"height", "width"} <= size.keys():
        return [int(size["height"]), int(size["width"])]
    if isinstance(size, Mapping) and "shortest_edge" in size:
        return [int(size["shortest_edge"])] * 2
    raise _not_offered(path, f"the size {size!r}")


def _interpolation(given: Mapping[str, Any], path: Path) -> str:
    number = given.get("resample", 2)
    if number not in _FILTERS:
        raise _not_offered(path, f"Pillow's filter {number}")
    return _FILTERS[number]
