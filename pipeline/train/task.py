"""What is given to the training loop, and what it gives back."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from torch import Tensor, nn

from .precision import Precision

Batch = TypeVar("Batch")


@dataclass(frozen=True)
class Task(Generic[Batch]):
    """What is learnt, and from what.

    `load` gives the batch of sample positions (B,) for an epoch, on the device. `terms` computes
    each loss term as a mean over the batch; its names are exactly those of `weights`, and the loss
    is Σ weights[name] · factor[name] · terms[name], the factor being 1 unless `factors` gives
    another one at that time (in epochs), times what `balance` makes of the terms. `validate` gives
    "accuracy" in [0, 1], and what else is to be logged, of the network in eval mode and float32,
    which is what ships, whatever precision training runs in.
    """

    samples: int
    load: Callable[[Tensor, int], Batch]
    terms: Callable[[nn.Module, Batch], Mapping[str, Tensor]]
    weights: Mapping[str, float]
    validate: Callable[[nn.Module], Mapping[str, float]]
    factors: Callable[[float], Mapping[str, float]] | None = None
    balance: Callable[[nn.Module, Mapping[str, Tensor]], Mapping[str, Tensor]] | None = None
    after_step: Callable[[nn.Module, int], None] | None = None
    networks: Callable[[nn.Module], list[nn.Module]] = lambda module: [module]  # may be compiled
    least: int = 1  # samples that the terms need in a batch
    lengths: Tensor | None = None  # (samples,) tokens of each; batches are of like lengths then


@dataclass(frozen=True)
class FitResult:
    """What a training run did. The network itself was trained in place."""

    history: list[dict[str, Any]]  # one entry an epoch: terms, accuracy, lr, samples/s
    selected_epoch: int  # 1-based
    selected_accuracy: float  # on validation, of the weights that the module now holds
    final_accuracy: float
    epochs: int  # that were run, at most spec.epochs
    steps: int
    samples_per_second: float  # median over the epochs, data included, validation not
    precision: Precision
    compiled: bool
    resumed_epoch: int  # epochs taken over from a checkpoint; 0: none
    stopped_early: bool
