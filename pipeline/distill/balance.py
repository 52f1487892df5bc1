"""Keeps the sizes of the loss terms in the ratio of their weights, without hand tuning.

Terms differ by orders of magnitude (an attention map's distance is about 1e-4, a cross-entropy 1),
which is why published weights run from 0.1 to 1000 and do not travel between networks. With
`balance: true` each term is scaled so that its running mean is as large as the first term's; its
weight in the recipe then is its share. The scale follows slowly and carries no gradient.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

DECAY = 0.99  # a memory of a hundred steps
LARGEST = 1e4  # a term that is (almost) learnt is not blown up without end


class Balance(nn.Module):
    """Running means of the terms, as a buffer: a checkpoint keeps them."""

    means: Tensor

    def __init__(self, names: Sequence[str]) -> None:
        super().__init__()
        self.names = tuple(names)
        self.register_buffer("means", torch.zeros(len(self.names)))

    def forward(self, terms: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Take in a step's terms; name → scale, 1 for the first name."""
        values = torch.stack([terms[name].detach().float() for name in self.names])
        started = self.means.sum() > 0
        self.means.copy_(torch.where(started, DECAY * self.means + (1 - DECAY) * values, values))
        first = self.means[0]
        scales = first / torch.maximum(self.means, (first / LARGEST).clamp_min(1e-12))
        # a first term of 0 (no label in the batch yet) is no measure: leave the weights as they are
        scales = torch.where(first > 0, scales, torch.ones_like(scales))
        return dict(zip(self.names, scales.unbind(), strict=True))
