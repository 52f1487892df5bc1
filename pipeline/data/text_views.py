"""Texts for training: batches of tokens, cut to the longest of the batch.

A text has no views but itself: there is no augmentation that keeps a sentence's meaning and can be
replayed, so every view number gives the same tokens.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from ...exporters.feeds import MASK
from .augment import ViewBatch
from .dataset import SampleSet


class TextViews:
    """The texts of one set on one device; `batch` is pure. See `augment.Views`, of images.

    Attributes:
        lengths: int64 (N,), tokens of each text, on the CPU; what batches are bucketed by.
    """

    def __init__(self, split: SampleSet, device: str) -> None:
        self._device = torch.device(device)
        tokens = np.asarray(split.contents)
        self.lengths = torch.from_numpy(tokens[:, MASK].sum(axis=1, dtype=np.int64))
        self._stored = split.contents
        self._resident = (
            None
            if isinstance(split.contents, np.memmap)
            else torch.from_numpy(np.ascontiguousarray(tokens)).to(self._device)
        )
        self._labels = torch.from_numpy(np.array(split.labels, np.int64)).to(self._device)

    def __len__(self) -> int:
        return len(self._labels)

    def batch(self, indices: Tensor, view: int) -> ViewBatch:  # noqa: ARG002  # as of images
        """Some texts, ready for the network: int64 (B, K, S), S the longest of them."""
        longest = max(1, int(self.lengths[indices.cpu()].max()))
        indices = indices.to(self._device)
        if self._resident is not None:
            tokens = self._resident.index_select(0, indices)[..., :longest]
        else:
            rows = np.asarray(self._stored).take(indices.cpu().numpy(), axis=0)[..., :longest]
            tokens = torch.from_numpy(np.ascontiguousarray(rows)).to(self._device)
        return ViewBatch(tokens.long(), self._labels[indices], None, None)
