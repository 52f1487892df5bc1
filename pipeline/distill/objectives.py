"""Losses as pure functions of logits and labels. No weights, no state, no I/O.

Each returns a scalar mean over the batch in float32, whatever precision the network ran in, and
sums over classes: dividing by C too would silently weaken T² and every weight by that factor
(the most common bug in published code).
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def kd(student: Tensor, teacher: Tensor, *, temperature: float) -> Tensor:
    """T² · KL(teacher ‖ student), summed over classes, mean over the batch.

    T² keeps the gradient's size independent of the temperature (Hinton et al. 2015, §2).

    Args:
        student, teacher: logits, (N, C). No gradient reaches the teacher.
        temperature: > 0; both logits are divided by it.
    Returns:
        scalar ≥ 0, float32.
    Raises:
        ValueError: shapes differ or are not (N, C), the batch is empty, or temperature ≤ 0.
    """
    if not temperature > 0:
        raise ValueError(f"kd: expected temperature > 0, got {temperature}")
    if student.shape != teacher.shape or student.ndim != 2 or student.shape[0] == 0:
        raise ValueError(
            "kd: expected student and teacher logits of one shape (N, C), N > 0; got "
            f"{tuple(student.shape)} and {tuple(teacher.shape)}"
        )
    log_student = F.log_softmax(student.float() / temperature, dim=1)
    log_teacher = F.log_softmax(teacher.detach().float() / temperature, dim=1)
    divergence = F.kl_div(log_student, log_teacher, reduction="sum", log_target=True)
    return divergence * (temperature**2 / student.shape[0])


def hard_label(
    logits: Tensor,
    labels: Tensor,
    *,
    smoothing: float = 0.0,
    partner_labels: Tensor | None = None,
    lam: Tensor | None = None,
) -> Tensor:
    """Cross-entropy with the true labels, mean over the batch.

    Smoothed targets are (1 - smoothing) · one-hot + smoothing / C (Szegedy et al. 2016, §7). For
    mixed images the loss is lam · CE(labels) + (1 - lam) · CE(partner_labels), a sample at a time
    (Zhang et al. 2018; Yun et al. 2019).

    Args:
        logits: (N, C). labels, partner_labels: int64 class indices, (N,). lam: share of the
            image that belongs to `labels`, in [0, 1], (N,); given exactly with partner_labels.
    Returns:
        scalar ≥ 0, float32.
    Raises:
        ValueError: shapes do not fit, the batch is empty, or only one of the mixed pair is given.
    """
    if logits.ndim != 2 or labels.shape != logits.shape[:1] or logits.shape[0] == 0:
        raise ValueError(
            "hard_label: expected logits (N, C) and labels (N,), N > 0; got "
            f"{tuple(logits.shape)} and {tuple(labels.shape)}"
        )
    logits = logits.float()
    if partner_labels is None and lam is None:
        return F.cross_entropy(logits, labels, label_smoothing=smoothing)
    if partner_labels is None or lam is None:
        raise ValueError("hard_label: expected partner_labels and lam together, got one of them")
    if partner_labels.shape != labels.shape or lam.shape != labels.shape:
        raise ValueError(
            f"hard_label: expected partner_labels and lam {tuple(labels.shape)}, got "
            f"{tuple(partner_labels.shape)} and {tuple(lam.shape)}"
        )
    own = F.cross_entropy(logits, labels, label_smoothing=smoothing, reduction="none")
    other = F.cross_entropy(logits, partner_labels, label_smoothing=smoothing, reduction="none")
    return (lam * own + (1 - lam) * other).mean()
