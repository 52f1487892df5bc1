"""The learning rate of a step, as a pure function of the step: resuming needs no scheduler state.

Sources: cosine annealing without restarts, Loshchilov & Hutter 2017; linear warm-up, Goyal et al.
2017; one-cycle, Smith & Topin 2018, with the constants of `torch.optim.lr_scheduler.OneCycleLR`
(rise over 30 % of the run from 1/25 of the peak, end at 1/10,000 of the start). Momentum is left
constant by all of them.
"""

from __future__ import annotations

import math

from ..training_spec import TrainSpec

SGD_LR_PER_256 = 0.1  # the linear scaling rule's anchor, Goyal et al. 2017
ADAMW_LR = 1e-3  # the optimiser's own default

_RISE = 0.3
_START = 1 / 25
_END = _START / 1e4


def peak_lr(spec: TrainSpec) -> float:
    """The recipe's lr, or the default of its optimiser."""
    if spec.lr is not None:
        return spec.lr
    return SGD_LR_PER_256 * spec.batch_size / 256 if spec.optimizer == "sgd" else ADAMW_LR


def lr_factor(spec: TrainSpec, *, step: int, steps_per_epoch: int) -> float:
    """Fraction of the peak learning rate at `step` (0-based, of epochs · steps_per_epoch).

    cosine, constant: linear warm-up over `warmup_epochs`, at most half of the run; the first step
    already has one part of it. cosine then falls to 0, which would be reached one step after the
    last. one-cycle has its own rise, and `warmup_epochs` does not apply.
    """
    total = spec.epochs * steps_per_epoch
    if spec.schedule == "one-cycle":
        return _one_cycle(step, total)
    warm = round(min(spec.warmup_epochs, spec.epochs / 2) * steps_per_epoch)
    if step < warm:
        return (step + 1) / warm
    if spec.schedule == "constant":
        return 1.0
    return 0.5 * (1 + math.cos(math.pi * (step - warm) / (total - warm)))


def _one_cycle(step: int, total: int) -> float:
    top = max(_RISE * total - 1, 0.0)
    last = max(total - 1, 1)
    if step <= top:
        return _cosine(_START, 1.0, step / top if top else 1.0)
    return _cosine(1.0, _END, (step - top) / (last - top))


def _cosine(start: float, end: float, part: float) -> float:
    return end + (start - end) * 0.5 * (1 + math.cos(math.pi * part))
