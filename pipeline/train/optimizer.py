"""The optimiser of a training run.

Weight decay acts on kernels and matrices (two or more dimensions) alone: pulling biases and the
scales of normalisation towards zero costs accuracy (He et al. 2019, "Bag of tricks", §3.1).
SGD is Nesterov's, as in the ResNet and distillation literature; AdamW is Loshchilov & Hutter's.
"""

from __future__ import annotations

import torch
from torch import nn

from ..errors import ModelError
from ..training_spec import TrainSpec
from .schedule import peak_lr


def build_optimizer(module: nn.Module, spec: TrainSpec) -> torch.optim.Optimizer:
    """One fused optimiser over the trainable parameters, in two groups: decayed and not.

    Raises:
        ModelError: nothing in the network can be trained.
    """
    trainable = [p for p in module.parameters() if p.requires_grad]
    if not trainable:
        raise ModelError(
            f"{type(module).__name__}: expected parameters to train, got none that requires a "
            "gradient; unfreeze some, or leave out `train` and `distill` to use it as it is"
        )
    groups = [
        {"params": [p for p in trainable if p.ndim >= 2], "weight_decay": spec.weight_decay},
        {"params": [p for p in trainable if p.ndim < 2], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    lr = peak_lr(spec)
    if spec.optimizer == "adamw":
        return torch.optim.AdamW(groups, lr=lr, fused=True)
    nesterov = spec.momentum > 0
    return torch.optim.SGD(groups, lr=lr, momentum=spec.momentum, nesterov=nesterov, fused=True)


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Give every group the learning rate of the coming step."""
    for group in optimizer.param_groups:
        group["lr"] = lr
