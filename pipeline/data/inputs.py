"""From what is stored of a sample to the network's input, for images and for texts alike.

Images: uint8 canvases → float32 (N, C, h, w), by `preprocess.py`. Texts: int32 tokens (N, K, S),
the rows being those of `Tokenization.rows` → int64, cut to the longest text of the batch. Every
stage goes through this one definition.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from ...exporters.feeds import MASK, longest
from ..recipe import PreprocessSpec, Tokenization
from . import preprocess

if TYPE_CHECKING:
    from torch import Tensor

Array = npt.NDArray[Any]
Preparation = PreprocessSpec | Tokenization


def to_input(contents: Array, how: Preparation) -> Array:
    """What every model is evaluated on.

    Args:
        contents: uint8 (N, H, W, C), canvases; or int32 (N, K, S), tokens.
        how: with all that the data stage fills in.

    Returns:
        float32 (N, C, h, w), or int64 (N, K, S') with S' the longest of these texts, or S where
        the graph is fixed; contiguous.
    """
    if isinstance(how, PreprocessSpec):
        return preprocess.to_input(contents, how)
    size = contents.shape[2] if how.pad == "max_length" else longest(contents)
    return np.ascontiguousarray(contents[..., :size], dtype=np.int64)


def to_input_tensor(contents: Tensor, how: Preparation) -> Tensor:
    """`to_input` in torch, on any device; images are cropped already."""
    if isinstance(how, PreprocessSpec):
        return preprocess.to_input_tensor(contents, how)
    return contents.long()


def repeated_to(tokens: Array, length: int) -> Array:
    """Each text's own tokens, over and over, until it has exactly `length`, without padding.

    For timing alone: as long as asked, with real tokens throughout. tokens: int64 (N, K, S).
    """
    own = tokens[:, MASK].sum(axis=1)
    places = [np.arange(length) % max(1, int(count)) for count in own]
    return np.stack([text[:, at] for text, at in zip(tokens, places, strict=True)])


def input_shape(contents: Array, how: Preparation) -> tuple[int, ...]:
    """(C, h, w), or (K, S), of the network's input."""
    if isinstance(how, PreprocessSpec):
        height, width = preprocess.input_size(how, (contents.shape[1], contents.shape[2]))
        return how.channel_count, height, width
    return contents.shape[1], how.max_length


def input_metadata(how: Preparation) -> dict[str, Any]:
    """Everything needed to prepare an input without us, JSON-able."""
    if isinstance(how, PreprocessSpec):
        return preprocess.preprocess_metadata(how)
    return {
        "steps": [
            "tokenize with the tokenizer.json beside the model, special tokens added",
            f"cut to {how.max_length} tokens, the closing special token kept",
            f"pad on the right with {how.pad_id}, mask 0, to "
            + ("that length" if how.pad == "max_length" else "the longest text of the batch"),
        ],
        **how.model_dump(mode="json", exclude={"mask_id", "special_ids"}),
        "layout": "NS",
        "dtype": "int64",
    }


def describe(class_names: Sequence[str], how: Preparation) -> dict[str, str]:
    """What someone needs to run a file without us, as JSON for its metadata."""
    return preprocess.metadata_entries(class_names, input_metadata(how))
