"""Texts for training: batches of tokens, cut to the longest of the batch, and replayable views.

A view is a function of (sample id, view number, seed), as of images (`augment.py`). A text has two
ways to be seen otherwise, both of them of Tang et al. 2019 ("Distilling Task-Specific Knowledge
from BERT into Simple Neural Networks", §3.2), who let a teacher label what comes out:

* span: the text is cut to a run of its pieces, of any length at any place (there: n-grams)
* mask: pieces are hidden behind the mask token

What frames a text (`[CLS]`, `[SEP]`) stays. Without either, every view is the text itself.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from ...exporters.feeds import MASK
from ..errors import RecipeError
from ..recipe import Tokenization
from ..training_spec import AugmentSpec
from .augment import ViewBatch
from .counter import uniform
from .dataset import SampleSet

_SPAN, _HIDE = range(32, 34)  # purposes of draws, apart from augment.py's and mixing.py's


class TextViews:
    """The texts of one set on one device; `batch` is pure. See `augment.Views`, of images.

    Attributes:
        lengths: int64 (N,), tokens of each text, on the CPU; what batches are bucketed by.

    Raises:
        RecipeError: `mask` is asked for, and the tokenizer has no mask token.
    """

    def __init__(
        self, split: SampleSet, how: Tokenization, augment: AugmentSpec, seed: int, device: str
    ) -> None:
        if augment.mask and how.mask_id is None:
            raise RecipeError(
                "augment.mask: the tokenizer has no mask token ([MASK] or <mask>); leave it out, "
                "`span` needs none"
            )
        self._how, self._augment, self._seed = how, augment, seed
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
        self._ids = torch.from_numpy(np.array(split.ids, np.int64)).to(self._device)

    def __len__(self) -> int:
        return len(self._labels)

    def batch(self, indices: Tensor, view: int) -> ViewBatch:
        """View number `view` of some texts: int64 (B, K, S), S the longest of them."""
        longest = max(1, int(self.lengths[indices.cpu()].max()))
        indices = indices.to(self._device)
        if self._resident is not None:
            tokens = self._resident.index_select(0, indices)[..., :longest]
        else:
            rows = np.asarray(self._stored).take(indices.cpu().numpy(), axis=0)[..., :longest]
            tokens = torch.from_numpy(np.ascontiguousarray(rows)).to(self._device)
        tokens, ids, labels = tokens.long(), self._ids[indices], self._labels[indices]
        if self._augment.span:
            tokens = self._cut(tokens, ids, view)
        if self._augment.mask:
            tokens = self._hidden(tokens, ids, view)
        return ViewBatch(tokens, labels, None, None)

    def _pieces(self, tokens: Tensor) -> Tensor:
        """Which places (B, S) hold pieces of the text itself."""
        special = torch.tensor(self._how.special_ids, device=tokens.device)
        return (tokens[:, MASK] == 1) & ~torch.isin(tokens[:, 0], special)

    def _cut(self, tokens: Tensor, ids: Tensor, view: int) -> Tensor:
        """Some of the texts (B, K, S) cut to a run of their pieces, which move to the left."""
        pieces = self._pieces(tokens)
        count = pieces.sum(1)
        which, length, start = uniform(ids, 3, seed=self._seed, view=view, purpose=_SPAN)
        kept = 1 + (length * count).long()
        first = (start * (count - kept + 1)).long()
        place = pieces.cumsum(1) - 1  # of each piece among its text's
        inside = (place >= first[:, None]) & (place < (first + kept)[:, None])
        is_cut = (which < self._augment.span) & (count > 0)
        stays = torch.where(is_cut[:, None], ~pieces | inside, True) & (tokens[:, MASK] == 1)
        order = torch.argsort((~stays).long(), dim=1, stable=True)
        moved = tokens.gather(2, order[:, None].expand_as(tokens))
        empty = ~stays.gather(1, order)
        moved = moved.masked_fill(empty[:, None], 0)
        moved[:, 0] = moved[:, 0].masked_fill(empty, self._how.pad_id)
        return moved[..., : max(1, int(stays.sum(1).max()))]

    def _hidden(self, tokens: Tensor, ids: Tensor, view: int) -> Tensor:
        """Some of the pieces of the texts (B, K, S) behind the mask token."""
        draws = uniform(ids, tokens.shape[2], seed=self._seed, view=view, purpose=_HIDE).T
        assert self._how.mask_id is not None, "checked at the beginning"
        hidden = self._pieces(tokens) & (draws < self._augment.mask)
        tokens[:, 0] = tokens[:, 0].masked_fill(hidden, self._how.mask_id)
        return tokens
