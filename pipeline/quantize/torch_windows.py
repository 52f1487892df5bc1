"""Convolution and pooling of ONNX in torch: windows that slide over one to three spatial axes.

torch pads evenly, ONNX each side by itself: where the sides differ the input is padded first.
Pads are ONNX's: the begins of all axes, then their ends.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

_CONV = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
_MAX_POOL = {1: F.max_pool1d, 2: F.max_pool2d, 3: F.max_pool3d}
_AVERAGE_POOL: dict[int, Callable[..., Tensor]] = {
    1: F.avg_pool1d, 2: F.avg_pool2d, 3: F.avg_pool3d,
}  # fmt: skip


def conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    auto_pad: str = "NOTSET",
    dilations: Sequence[int] = (),
    group: int = 1,
    kernel_shape: Sequence[int] = (),
    pads: Sequence[int] = (),
    strides: Sequence[int] = (),
) -> Tensor:
    """(N, C, …) with one to three spatial axes; padded with zeros."""
    axes = x.ndim - 2
    kernel = list(kernel_shape) or list(weight.shape[2:])
    strides, dilations = list(strides) or [1] * axes, list(dilations) or [1] * axes
    around = _pads(x, auto_pad, pads, kernel=kernel, strides=strides, dilations=dilations)
    if around[:axes] != around[axes:]:
        x, around = _pad_around(x, around, value=0.0), [0] * 2 * axes
    return _CONV[axes](x, weight, bias, strides, around[:axes], dilations, group)


def max_pool(
    x: Tensor,
    *,
    kernel_shape: Sequence[int],
    auto_pad: str = "NOTSET",
    ceil_mode: int = 0,
    dilations: Sequence[int] = (),
    pads: Sequence[int] = (),
    strides: Sequence[int] = (),
) -> Tensor:
    """Padding never wins."""
    axes, kernel = x.ndim - 2, list(kernel_shape)
    strides, dilations = list(strides) or [1] * axes, list(dilations) or [1] * axes
    around = _pads(x, auto_pad, pads, kernel=kernel, strides=strides, dilations=dilations)
    # torch pads evenly, by at most half the window
    if around[:axes] != around[axes:] or any(
        2 * a > k for a, k in zip(around, kernel, strict=False)
    ):
        x, around = _pad_around(x, around, value=-math.inf), [0] * 2 * axes
    pooled: Tensor = _MAX_POOL[axes](
        x, kernel, strides, around[:axes], dilations, ceil_mode=bool(ceil_mode)
    )
    return pooled


def average_pool(
    x: Tensor,
    *,
    kernel_shape: Sequence[int],
    auto_pad: str = "NOTSET",
    ceil_mode: int = 0,
    count_include_pad: int = 0,
    pads: Sequence[int] = (),
    strides: Sequence[int] = (),
) -> Tensor:
    """Mean over each window; padding counts only with `count_include_pad`."""
    axes, kernel = x.ndim - 2, list(kernel_shape)
    strides = list(strides) or [1] * axes
    around = _pads(x, auto_pad, pads, kernel=kernel, strides=strides, dilations=[1] * axes)
    pool = partial(
        _AVERAGE_POOL[axes], kernel_size=kernel, stride=strides, ceil_mode=bool(ceil_mode)
    )
    even = all(
        b == e and 2 * b <= k for b, e, k in zip(around, around[axes:], kernel, strict=False)
    )
    if even:
        return pool(x, padding=around[:axes], count_include_pad=bool(count_include_pad))
    padded = pool(_pad_around(x, around, value=0.0))
    if count_include_pad:
        return padded
    return padded / pool(_pad_around(torch.ones_like(x), around, value=0.0))


def _pad_around(x: Tensor, around: Sequence[int], *, value: float) -> Tensor:
    """The spatial axes, by their begins and then their ends."""
    axes = x.ndim - 2
    flat = [around[i + side] for i in range(axes - 1, -1, -1) for side in (0, axes)]
    return F.pad(x, flat, value=value)


def _pads(
    x: Tensor,
    auto_pad: str,
    pads: Sequence[int],
    *,
    kernel: Sequence[int],
    strides: Sequence[int],
    dilations: Sequence[int],
) -> list[int]:
    """Begins, then ends. SAME_UPPER puts an odd pixel at the end, SAME_LOWER at the begin."""
    if auto_pad in ("NOTSET", "VALID"):
        return list(pads) if pads and auto_pad == "NOTSET" else [0] * 2 * len(kernel)
    begins, ends = [], []
    for size, k, stride, dilation in zip(x.shape[2:], kernel, strides, dilations, strict=True):
        total = max((-(-size // stride) - 1) * stride + (k - 1) * dilation + 1 - size, 0)
        small, large = total // 2, total - total // 2
        begins.append(small if auto_pad == "SAME_UPPER" else large)
        ends.append(large if auto_pad == "SAME_UPPER" else small)
    return begins + ends
