"""Logits of any model on any set, and what they are worth. Deterministic.

Every model sees the same numbers: samples go through `data.inputs.to_input`, in the set's own
order, whether torch or onnxruntime computes. Nothing here selects, judges or compares models, and
torch is imported only where a torch network is measured.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ...exporters.sessions import open_session, run_batches
from ..data.dataset import SampleSet
from ..data.inputs import Preparation, to_input
from ..errors import MeasurementError

if TYPE_CHECKING:
    from torch import Tensor, dtype, nn

Array = np.ndarray[Any, Any]

# Most bytes of an onnxruntime batch's input: what lies between its layers is up to 50 times as much
_BATCH_BYTES = 8 * 2**20


@dataclass(frozen=True)
class Scores:
    """What a model says of each sample; every field is (N,). Probabilities are softmax."""

    prediction: Array  # int64, the class with the largest logit; of equal ones the first
    p_label: Array  # float32, probability of the true class
    top1_probability: Array  # float32
    margin: Array  # float32, top-1 minus top-2 probability
    rank: Array  # int64, classes before the label; of equal logits the first class is before
    correct: Array  # bool


def logits_of_module(
    module: nn.Module,
    samples: SampleSet,
    how: Preparation,
    *,
    device: str,
    batch_size: int = 256,
    dtype: dtype | None = None,
    fixed_batch: int | None = None,
    name: str = "the network",
) -> Array:
    """Logits of a torch network in eval mode, (N, C) float32. Its modes are put back.

    The network is moved to `device` and stays there.

    Args:
        dtype: torch.bfloat16 for autocast; None: float32.
        fixed_batch: the only batch that a .pt2 program runs with (`Network.fixed_batch`).
        name: what an error calls the network.
    Raises:
        MeasurementError: no samples, or a logit is NaN or infinite.
    """
    import torch

    from ...exporters.reference import evaluating

    module.to(device)
    autocast = torch.autocast(device, dtype=torch.bfloat16, enabled=dtype == torch.bfloat16)
    parts = []
    with evaluating(module), torch.inference_mode(), autocast:
        for start in range(0, len(samples.labels), batch_size):
            inputs = to_input(samples.contents[start : start + batch_size], how)
            batch = torch.from_numpy(inputs).to(device)
            if batch.ndim == 4:
                batch = batch.contiguous(memory_format=torch.channels_last)
            logits = run_module(module, batch, fixed_batch=fixed_batch)
            parts.append(logits.float().cpu().numpy())
    return _checked(parts, name)


def logits_of_onnx(
    path: Path,
    samples: SampleSet,
    how: Preparation,
    *,
    threads: int,
    batch_size: int = 64,
    name: str | None = None,
) -> Array:
    """Logits of an ONNX file in onnxruntime, (N, C) float32.

    Texts go one by one, as on a device: without padding, and without the company on which the
    answers of dynamic int8 depend.

    Args:
        name: what an error calls the model; None: its path.
    Raises:
        MeasurementError: no samples, or a logit is NaN or infinite.
        ExportError, RuntimeFailure: the file cannot be loaded or run.
    """
    session = open_session(path, threads=threads)
    first = session.get_inputs()[0].shape[0]
    one = to_input(samples.contents[:1], how)
    size = first if isinstance(first, int) else _batch(one, batch_size if one.ndim == 4 else 1)
    parts = [
        run_batches(session, to_input(samples.contents[at : at + size], how), size)
        for at in range(0, len(samples.labels), size)
    ]
    return _checked(parts, name or str(path))


def _batch(one: Array, most: int) -> int:
    """Samples a call: fewer where they are large. one: the input of a single sample."""
    return max(1, min(most, _BATCH_BYTES // max(1, one.nbytes)))


def score(logits: Array, labels: Array) -> Scores:
    """Prediction, probabilities and margin of every sample.

    Args:
        logits: (N, C), C ≥ 2, finite. labels: int class indices, (N,).
    """
    _check_labels(logits, labels)
    shifted = logits.astype(np.float64) - logits.max(axis=1, keepdims=True)
    exponents = np.exp(shifted)
    probabilities = exponents / exponents.sum(axis=1, keepdims=True)
    top = -np.partition(-probabilities, 1, axis=1)[:, :2]
    prediction = logits.argmax(axis=1).astype(np.int64)
    return Scores(
        prediction=prediction,
        p_label=probabilities[np.arange(len(labels)), labels].astype(np.float32),
        top1_probability=top[:, 0].astype(np.float32),
        margin=(top[:, 0] - top[:, 1]).astype(np.float32),
        rank=_ranks(logits, labels),
        correct=prediction == labels,
    )


def _ranks(logits: Array, labels: Array) -> Array:
    """As `argmax` orders them, so that rank 0 is the prediction: int64, (N,)."""
    own = logits[np.arange(len(labels)), labels][:, None]
    is_before = np.arange(logits.shape[1]) < labels[:, None]
    before: Array = ((logits > own) | ((logits == own) & is_before)).sum(axis=1)
    return before


def accuracy(logits: Array, labels: Array) -> float:
    """Fraction of samples whose largest logit is the label's, in [0, 1].

    Raises:
        MeasurementError: there are no samples.
    """
    _check_labels(logits, labels)
    return float((logits.argmax(axis=1) == labels).mean())


def per_class_accuracy(
    logits: Array, labels: Array, *, class_names: Sequence[str]
) -> dict[str, dict[str, Any]]:
    """Class name → {"n": samples, "accuracy": fraction, None without samples}."""
    _check_labels(logits, labels)
    correct = logits.argmax(axis=1) == labels
    result = {}
    for index, name in enumerate(class_names):
        own = correct[labels == index]
        result[name] = {"n": len(own), "accuracy": float(own.mean()) if len(own) else None}
    return result


def confusion(logits: Array, labels: Array) -> Array:
    """Counts, int64 (C, C): row the label, column the prediction."""
    _check_labels(logits, labels)
    classes = logits.shape[1]
    flat = labels.astype(np.int64) * classes + logits.argmax(axis=1)
    return np.bincount(flat, minlength=classes**2).reshape(classes, classes)


def run_module(module: nn.Module, inputs: Tensor, *, fixed_batch: int | None) -> Tensor:
    """`module(inputs)`; for a program captured with one batch size in batches of that size.

    The last of them is filled up by repeating its last sample.
    """
    if fixed_batch is None:
        logits: Tensor = module(inputs)
        return logits
    import torch

    parts = []
    for part in torch.split(inputs, fixed_batch):
        missing = fixed_batch - len(part)
        full = torch.cat([part, part[-1:].expand(missing, *part.shape[1:])])
        parts.append(module(full)[: len(part)])
    return torch.cat(parts)


def _checked(parts: list[Array], name: str) -> Array:
    if not parts:
        raise MeasurementError(f"{name}: expected samples to measure on, got an empty set")
    logits = np.concatenate(parts).astype(np.float32, copy=False)
    bad = int((~np.isfinite(logits)).any(axis=1).sum())
    if bad:
        raise MeasurementError(
            f"{name}: expected finite logits, got NaN or infinity for {bad} of {len(logits)} "
            "samples; look at its weights and at the preprocessing's mean and std"
        )
    return logits


def _check_labels(logits: Array, labels: Array) -> None:
    if len(labels) == 0:
        raise MeasurementError("accuracy: expected samples, got none")
    if logits.ndim != 2 or logits.shape[1] < 2 or len(logits) != len(labels):
        raise ValueError(
            f"expected logits (N, C), C ≥ 2, and labels (N,); got {logits.shape}, {labels.shape}"
        )
    if labels.min() < 0 or labels.max() >= logits.shape[1]:
        raise ValueError(
            f"expected labels in 0..{logits.shape[1] - 1}, got {labels.min()}..{labels.max()}"
        )
