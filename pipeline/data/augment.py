"""Replayable augmentation: a view is a function of (sample id, view number, seed), nothing else.

Teacher and student, an interrupted run and its continuation, one process and eight all see the
same pixels, so soft labels can be stored once and used for every student (Beyer et al. 2022: a
good teacher is patient and consistent). Everything but the float part works on uint8, vectorised
over the batch. On one device views are equal bit by bit; `resized` crops may differ by one grey
level between CPU and CUDA.

* crop `pad`: reflect padding and a random window (He et al. 2016); `resized`: a random rectangle
  of the given area and aspect 3/4 to 4/3, bilinear (Szegedy et al. 2015), without antialiasing
* flip: left-right, with probability 1/2
* erase: a rectangle of 2 to 33 % of the image, aspect 0.3 to 3.3 (Zhong et al. 2020), filled with
  the mean colour of the view itself
* mixup (Zhang et al. 2018) and cutmix (Yun et al. 2019): mixing.py

Raise AUGMENT_VERSION whenever a view's pixels change: stored labels carry it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import affine_grid, grid_sample

from ..errors import DataError
from ..recipe import PreprocessSpec
from ..training_spec import AugmentSpec
from .counter import uniform
from .dataset import SampleSet
from .mixing import MixPlan, mix_plan, rectangle
from .preprocess import input_size, to_input_tensor

__all__ = ["AUGMENT_VERSION", "MixPlan", "ViewBatch", "Views", "mix_plan", "render"]

AUGMENT_VERSION = 1

_CROP, _FLIP, _ERASE = range(3)  # purposes of draws; mixing.py has its own from 16 on
_ASPECT = (3 / 4, 4 / 3)
_ERASED_AREA = (0.02, 0.33)
_ERASED_ASPECT = (0.3, 3.3)


@dataclass(frozen=True, eq=False)
class ViewBatch:
    """What a training step takes.

    Attributes:
        inputs: float32 (B, C, h, w), channels_last.
        labels: int64 (B,).
        partner_labels: int64 (B,) of the images mixed in, or None.
        lam: float32 (B,), the share of the image itself, or None.
    """

    inputs: Tensor
    labels: Tensor
    partner_labels: Tensor | None
    lam: Tensor | None


class Views:
    """Augmented views of one set on one device. Holds the images; `batch` is pure."""

    def __init__(
        self,
        split: SampleSet,
        preprocess: PreprocessSpec,
        augment: AugmentSpec,
        seed: int,
        device: str,
    ) -> None:
        self._preprocess = preprocess
        self._augment = augment
        self._seed = seed
        self._device = torch.device(device)
        height, width = split.contents.shape[1:3]
        self._crop = input_size(preprocess, (height, width))
        self._stored = split.contents
        self._resident = (
            None
            if isinstance(split.contents, np.memmap)
            else torch.from_numpy(np.ascontiguousarray(split.contents)).to(self._device)
        )
        self._labels = torch.from_numpy(np.array(split.labels, np.int64)).to(self._device)
        self._ids = torch.from_numpy(np.array(split.ids, np.int64)).to(self._device)
        self._plan: tuple[int, MixPlan | None] | None = None

    def __len__(self) -> int:
        return len(self._labels)

    def batch(self, indices: Tensor, view: int) -> ViewBatch:
        """View number `view` of some samples, ready for the network.

        Args:
            indices: int64 (B,) into the set, any device.
            view: ≥ 0; the same number gives the same pixels.
        """
        indices = indices.to(self._device)
        images = self._rendered(indices, view)
        labels = self._labels[indices]
        plan = self._mix_plan(view)
        if plan is None:
            return ViewBatch(to_input_tensor(images, self._preprocess), labels, None, None)
        partner, lam = plan.partner[indices], plan.lam[indices]
        partners = self._rendered(partner, view)
        inputs = plan.mix(images, partners, indices=indices, spec=self._preprocess)
        return ViewBatch(inputs, labels, self._labels[partner], lam)

    def _rendered(self, indices: Tensor, view: int) -> Tensor:
        return render(
            self._gather(indices),
            self._ids[indices],
            view=view,
            seed=self._seed,
            spec=self._augment,
            crop=self._crop,
        )

    def _gather(self, indices: Tensor) -> Tensor:
        if self._resident is not None:
            return self._resident.index_select(0, indices)
        rows = np.asarray(self._stored).take(indices.cpu().numpy(), axis=0)
        return torch.from_numpy(rows).to(self._device)

    def _mix_plan(self, view: int) -> MixPlan | None:
        """One plan is kept: batches of a view come one after the other."""
        if self._plan is None or self._plan[0] != view:
            plan = mix_plan(
                self._ids, view=view, seed=self._seed, spec=self._augment, crop=self._crop
            )
            self._plan = view, plan
        return self._plan[1]


def render(
    images: Tensor, ids: Tensor, *, view: int, seed: int, spec: AugmentSpec, crop: tuple[int, int]
) -> Tensor:
    """One view of each image, before mixing.

    Args:
        images: uint8 (N, H, W, C), canvases.
        ids: int64 (N,), what the draws of each image are keyed by.
        crop: (h, w) of the views.

    Returns:
        uint8 (N, h, w, C).

    Raises:
        DataError: more reflect padding than the image has pixels to reflect.
    """
    draw = _Draw(ids, seed, view)
    flip = draw(1, _FLIP)[0] < 0.5 if spec.flip else None
    if spec.crop == "resized":
        views = _resized_crop(images, draw(4, _CROP), crop=crop, spec=spec, flip=flip)
    else:
        views = _window(images, draw, crop=crop, spec=spec, flip=flip)
    return _erased(views, draw(5, _ERASE), spec.erase) if spec.erase > 0 else views


@dataclass(frozen=True)
class _Draw:
    ids: Tensor
    seed: int
    view: int

    def __call__(self, streams: int, purpose: int) -> Tensor:
        return uniform(self.ids, streams, seed=self.seed, view=self.view, purpose=purpose)


def _window(
    images: Tensor, draw: _Draw, *, crop: tuple[int, int], spec: AugmentSpec, flip: Tensor | None
) -> Tensor:
    """h × w pixels of each image: the middle, or anywhere in the reflect-padded canvas."""
    count, height, width, channels = images.shape
    if spec.crop == "pad":
        pad = max(1, min(crop) // 8) if spec.pad is None else spec.pad
        if pad >= min(height, width):
            raise DataError(
                f"augment.pad: {pad} pixels cannot be reflected from images of "
                f"{height}×{width}; use at most {min(height, width) - 1}"
            )
        u = draw(2, _CROP)
        room = torch.tensor(
            [[height + 2 * pad - crop[0] + 1], [width + 2 * pad - crop[1] + 1]],
            dtype=torch.float64,
            device=images.device,
        )
        top, left = (u * room).to(torch.int64) - pad
    else:
        ones = torch.ones(count, dtype=torch.int64, device=images.device)
        top, left = ones * ((height - crop[0]) // 2), ones * ((width - crop[1]) // 2)
    down = torch.arange(crop[0], device=images.device)
    across = torch.arange(crop[1], device=images.device).expand(count, -1)
    if flip is not None:
        across = torch.where(flip[:, None], across.flip(1), across)
    rows = _reflected(top[:, None] + down, height)
    columns = _reflected(left[:, None] + across, width)
    # one flat gather of whole pixels is four times faster than indexing three axes
    first = torch.arange(count, device=images.device)[:, None] * height
    pixels = (((first + rows) * width)[:, :, None] + columns[:, None, :]).reshape(-1)
    gathered = images.reshape(-1, channels).index_select(0, pixels)
    return gathered.view(count, crop[0], crop[1], channels)


def _reflected(position: Tensor, length: int) -> Tensor:
    """Mirrored at the first and last pixel, which are not repeated."""
    return (length - 1) - ((length - 1) - position.abs()).abs()


def _resized_crop(
    images: Tensor, u: Tensor, *, crop: tuple[int, int], spec: AugmentSpec, flip: Tensor | None
) -> Tensor:
    """A random rectangle of each image, sampled bilinearly; u: (4, N)."""
    count, height, width, channels = images.shape
    area = height * width * (spec.scale[0] + (spec.scale[1] - spec.scale[0]) * u[0])
    aspect = torch.exp(math.log(_ASPECT[0]) + math.log(_ASPECT[1] / _ASPECT[0]) * u[1])
    # a rectangle that does not fit is cut to the image rather than drawn again
    part_w = (area * aspect).sqrt().clamp(1, width)
    part_h = (area / aspect).sqrt().clamp(1, height)
    centre_x = part_w / 2 + (width - part_w) * u[2]
    centre_y = part_h / 2 + (height - part_h) * u[3]
    sign = 1.0 if flip is None else 1.0 - 2.0 * flip.to(torch.float64)
    theta = torch.zeros(count, 2, 3, dtype=torch.float64, device=images.device)
    theta[:, 0, 0] = sign * part_w / width
    theta[:, 0, 2] = 2 * centre_x / width - 1
    theta[:, 1, 1] = part_h / height
    theta[:, 1, 2] = 2 * centre_y / height - 1
    grid = affine_grid(theta.to(torch.float32), [count, channels, *crop], align_corners=False)
    planes = images.permute(0, 3, 1, 2).to(torch.float32)
    sampled = grid_sample(planes, grid, mode="bilinear", padding_mode="border", align_corners=False)
    return sampled.round_().clamp_(0, 255).to(torch.uint8).permute(0, 2, 3, 1).contiguous()


def _erased(views: Tensor, u: Tensor, probability: float) -> Tensor:
    """With a rectangle of the view's own mean colour; u: (5, N)."""
    _, height, width, _ = views.shape
    area = height * width * (_ERASED_AREA[0] + (_ERASED_AREA[1] - _ERASED_AREA[0]) * u[1])
    aspect = torch.exp(
        math.log(_ERASED_ASPECT[0]) + math.log(_ERASED_ASPECT[1] / _ERASED_ASPECT[0]) * u[2]
    )
    part_h = (area / aspect).sqrt().clamp(1, height).to(torch.int64)
    part_w = (area * aspect).sqrt().clamp(1, width).to(torch.int64)
    top = (u[3] * (height - part_h + 1)).to(torch.int64)
    left = (u[4] * (width - part_w + 1)).to(torch.int64)
    inside = rectangle(top, left, top + part_h, left + part_w, size=(height, width))
    inside &= (u[0] < probability)[:, None, None]
    colour = (views.sum((1, 2), dtype=torch.int64) // (height * width)).to(torch.uint8)
    return torch.where(inside[..., None], colour[:, None, None, :], views)
