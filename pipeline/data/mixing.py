"""Which images are mixed with which, fixed for a whole set and view, so that it can be replayed.

For each view the set is ordered by a keyed draw and everyone is mixed with the next in that order:
a partner of one's own, never oneself, and the same one in whatever batch the sample comes. Mixup
(Zhang et al. 2018) blends the normalised inputs, x = λ·x_i + (1 - λ)·x_j with λ ~ Beta(α, α);
cutmix (Yun et al. 2019) pastes a rectangle of area 1 - λ and then takes λ from the area left after
clipping at the border. Labels are mixed by the same λ, which is the caller's part.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..recipe import PreprocessSpec
from ..training_spec import AugmentSpec
from .counter import uniform
from .preprocess import to_input_tensor

_ORDER, _LAMBDA, _BOX = range(16, 19)  # purposes of draws, apart from augment.py's


@dataclass(frozen=True, eq=False)
class MixPlan:
    """The partner of every sample for one view.

    Attributes:
        partner: int64 (N,), index into the set.
        lam: float32 (N,), the share of the sample itself.
        boxes: int64 (N, 4) of top, left, bottom, right in pixels of the view (cutmix), or None.
    """

    partner: Tensor
    lam: Tensor
    boxes: Tensor | None

    def mix(
        self, images: Tensor, partners: Tensor, *, indices: Tensor, spec: PreprocessSpec
    ) -> Tensor:
        """Rendered images and their partners' (uint8 (B, h, w, C)) → inputs (B, C, h, w)."""
        if self.boxes is None:
            lam = self.lam[indices].view(-1, 1, 1, 1)
            own, other = to_input_tensor(images, spec), to_input_tensor(partners, spec)
            return own.mul_(lam).add_(other.mul_(1 - lam))
        top, left, bottom, right = self.boxes[indices].unbind(1)
        inside = rectangle(top, left, bottom, right, size=(images.shape[1], images.shape[2]))
        return to_input_tensor(torch.where(inside[..., None], partners, images), spec)


def mix_plan(
    ids: Tensor, *, view: int, seed: int, spec: AugmentSpec, crop: tuple[int, int]
) -> MixPlan | None:
    """Partners, shares and boxes of a whole set for one view; None if nothing is mixed.

    Args:
        ids: int64 (N,) of the whole set, in its order.
        crop: (h, w) of the views.
    """
    alpha = spec.mixup or spec.cutmix
    if not alpha:
        return None
    order = uniform(ids, 1, seed=seed, view=view, purpose=_ORDER)[0].argsort(stable=True)
    partner = torch.empty_like(order)
    partner[order] = order.roll(-1)
    share = _beta(uniform(ids, 1, seed=seed, view=view, purpose=_LAMBDA)[0], alpha)
    if not spec.cutmix:
        return MixPlan(partner, share.to(torch.float32), None)
    height, width = crop
    y, x = uniform(ids, 2, seed=seed, view=view, purpose=_BOX)
    cut = (1 - share).sqrt()
    centre_y, centre_x = (y * height).to(torch.int64), (x * width).to(torch.int64)
    half_h, half_w = (cut * height / 2).to(torch.int64), (cut * width / 2).to(torch.int64)
    top, bottom = (centre_y - half_h).clamp(min=0), (centre_y + half_h).clamp(max=height)
    left, right = (centre_x - half_w).clamp(min=0), (centre_x + half_w).clamp(max=width)
    kept = 1 - ((bottom - top) * (right - left)).to(torch.float64) / (height * width)
    return MixPlan(partner, kept.to(torch.float32), torch.stack([top, left, bottom, right], 1))


def rectangle(
    top: Tensor, left: Tensor, bottom: Tensor, right: Tensor, *, size: tuple[int, int]
) -> Tensor:
    """bool (N, h, w): true inside [top, bottom) × [left, right), int64 (N,) each."""
    down = torch.arange(size[0], device=top.device)
    across = torch.arange(size[1], device=top.device)
    rows = (down >= top[:, None]) & (down < bottom[:, None])
    columns = (across >= left[:, None]) & (across < right[:, None])
    return rows[:, :, None] & columns[:, None, :]


def _beta(u: Tensor, alpha: float) -> Tensor:
    """Quantiles of Beta(alpha, alpha): float64 like `u`."""
    from scipy.special import betaincinv

    quantiles = betaincinv(alpha, alpha, u.cpu().numpy())
    return torch.from_numpy(quantiles).to(u.device)
