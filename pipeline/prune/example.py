"""What a network is traced, proven and counted on: two inputs, as its first run has seen them.

Images are noise, of which only the shape matters. Texts are tokens of train, since not every id is
a word: each repeated until it fills the length, and the second padded behind its half, so that a
cut which lets padding through would show.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from ...exporters.feeds import MASK
from ..data.dataset import Data
from ..data.inputs import repeated_to
from ..recipe import Tokenization

# sizes tried for the tracing of nets that take any: sides of images, tokens of texts
_SMALLER = {4: (32, 64, 128), 3: (8, 32, 128)}


def example_of(data: Data) -> Tensor:
    """Two inputs of the full size: float32 (2, C, H, W), or int64 (2, K, S) with S the maximum."""
    if not isinstance(data.preprocess, Tokenization):
        return noise(data.input_shape)
    some = np.resize(data.calibration, 2) if len(data.calibration) else np.zeros(2, np.int64)
    length = data.input_shape[-1]
    tokens = repeated_to(data.train.contents[some].astype(np.int64), length)
    half = (length + 1) // 2
    tokens[1, 0, half:], tokens[1, MASK, half:] = data.preprocess.pad_id, 0
    return torch.from_numpy(tokens)


def noise(input_shape: Sequence[int]) -> Tensor:
    """Two standard normal images (2, C, H, W), the same ones every time."""
    return torch.randn(2, *input_shape, generator=torch.Generator().manual_seed(0))


def smaller(example: Tensor) -> Iterator[Tensor]:
    """The example cut to square images, or to texts, of less than its size, the smallest first."""
    for size in _SMALLER[example.ndim]:
        if example.ndim == 4 and size < min(example.shape[2:]):
            yield example[..., :size, :size].contiguous()
        if example.ndim == 3 and size < example.shape[-1]:
            yield example[..., :size].contiguous()


def fast(batch: Tensor) -> Tensor:
    """The batch in the memory layout that convolutions are fastest on; texts as they are."""
    return batch.contiguous(memory_format=torch.channels_last) if batch.ndim == 4 else batch
