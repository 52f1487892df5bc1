"""Losses as pure functions of logits and labels. No weights, no state, no I/O.

Each returns a scalar mean over the batch in float32, whatever precision the network ran in, and
sums over classes: dividing by C too would silently weaken T² and every weight by that factor
(the most common bug in published code).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

Temperature = float | Tensor  # a tensor is a learned one (CTKD): 0-dim, > 0, not looked at
UNLABELLED = -1  # label of an image that has none; any label below 0 is read as this
_EPS_STD = 1e-7  # of the published code of logit standardization
_LEAST_SHARE = 1e-6  # keeps 0 / 0 away where no label is known


def kd(student: Tensor, teacher: Tensor, *, temperature: Temperature) -> Tensor:
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
    _check("kd", student, teacher, temperature)
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
    """Cross-entropy with the true labels, mean over the images that have one (label ≥ 0).

    Smoothed targets are (1 - smoothing) · one-hot + smoothing / C (Szegedy et al. 2016, §7). For
    mixed images the loss is lam · CE(labels) + (1 - lam) · CE(partner_labels), a sample at a time
    (Zhang et al. 2018; Yun et al. 2019). A label < 0 is unknown: its share carries no loss and is
    left out of the mean; a batch without any known label gives 0 and a gradient of 0.

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
        return _mean_over_labelled(logits, labels, smoothing)
    if partner_labels is None or lam is None:
        raise ValueError("hard_label: expected partner_labels and lam together, got one of them")
    if partner_labels.shape != labels.shape or lam.shape != labels.shape:
        raise ValueError(
            f"hard_label: expected partner_labels and lam {tuple(labels.shape)}, got "
            f"{tuple(partner_labels.shape)} and {tuple(lam.shape)}"
        )
    own, other = (
        F.cross_entropy(
            logits,
            each.clamp_min(UNLABELLED),
            label_smoothing=smoothing,
            reduction="none",
            ignore_index=UNLABELLED,
        )
        for each in (labels, partner_labels)
    )
    knows_own, knows_other = labels >= 0, partner_labels >= 0
    known = torch.where(knows_own, lam, 0.0) + torch.where(knows_other, 1 - lam, 0.0)
    known = torch.where(knows_own & knows_other, 1.0, known)  # lam + (1 - lam) may round
    return (lam * own + (1 - lam) * other).mean() / known.mean().clamp_min(_LEAST_SHARE)


def _mean_over_labelled(logits: Tensor, labels: Tensor, smoothing: float) -> Tensor:
    """Cross-entropy, mean over the rows that have a label; 0 where there is none."""
    some = (labels >= 0).any()
    # a mean over no row is 0 / 0, in its gradient too: then take any class, and drop the result
    labels = torch.where(some, labels.clamp_min(UNLABELLED), 0)
    loss = F.cross_entropy(logits, labels, label_smoothing=smoothing, ignore_index=UNLABELLED)
    return torch.where(some, loss, 0.0)


def dkd(
    student: Tensor,
    teacher: Tensor,
    labels: Tensor,
    *,
    temperature: Temperature,
    alpha: float,
    beta: float,
) -> Tensor:
    """alpha · T²·KL(target against rest) + beta · T²·KL(among the rest), mean over the batch.

    KD is alpha = 1 and beta = 1 - p_teacher(target), a sample at a time; freeing beta lets the
    teacher's view of the wrong classes count where it is sure of the right one (Zhao et al. 2022,
    eq. 7).

    Args:
        student, teacher: logits, (N, C). labels: int64 in 0..C-1, (N,).
    Returns:
        scalar ≥ 0, float32.
    Raises:
        ValueError: as `kd`, or labels are not (N,).
    """
    _check("dkd", student, teacher, temperature)
    if labels.shape != student.shape[:1]:
        raise ValueError(f"dkd: expected labels ({len(student)},), got {tuple(labels.shape)}")
    is_target = F.one_hot(labels, student.shape[1]).bool()
    target_student, rest_student = _split(student.float() / temperature, is_target)
    target_teacher, rest_teacher = _split(teacher.detach().float() / temperature, is_target)
    binary = F.kl_div(target_student, target_teacher, reduction="sum", log_target=True)
    # a class that is left out has probability 0 on both sides, and adds exactly nothing
    gap = (rest_teacher - rest_student).masked_fill(is_target, 0.0)
    among_rest = (rest_teacher.exp() * gap).sum()
    return (alpha * binary + beta * among_rest) * (temperature**2 / student.shape[0])


def _split(scaled: Tensor, is_target: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probabilities (N, 2) of target and rest; (N, C) among the rest, -inf at the target."""
    log_p = F.log_softmax(scaled, dim=1)
    rest = log_p.masked_fill(is_target, -torch.inf)
    log_rest = torch.logsumexp(rest, dim=1)
    log_target = (log_p * is_target).sum(1)
    return torch.stack([log_target, log_rest], dim=1), rest - log_rest[:, None]


def dist(
    student: Tensor, teacher: Tensor, *, temperature: Temperature, beta: float, gamma: float
) -> Tensor:
    """T² · [beta · mean over rows of (1 - ρ) + gamma · mean over columns of (1 - ρ)], ρ being
    Pearson's correlation of the probabilities at T: rows are samples, columns classes.

    Correlation asks for the order and the spacing of the classes, not for their exact values, so a
    much stronger teacher does not overwhelm the student (Huang et al. 2022, eq. 8–10).

    Args:
        student, teacher: logits, (N, C).
    Returns:
        scalar ≥ 0, float32.
    Raises:
        ValueError: as `kd`.
    """
    _check("dist", student, teacher, temperature)
    mine = (student.float() / temperature).softmax(1)
    theirs = (teacher.detach().float() / temperature).softmax(1)
    between = (1 - _pearson(mine, theirs)).mean()
    within = (1 - _pearson(mine.T, theirs.T)).mean()
    return (beta * between + gamma * within) * temperature**2


def _pearson(a: Tensor, b: Tensor) -> Tensor:
    """Correlation of each row of a with that of b, (rows,); 0 where a row is constant."""
    a, b = a - a.mean(1, keepdim=True), b - b.mean(1, keepdim=True)
    return F.cosine_similarity(a, b, dim=1, eps=1e-8)


def standardize(logits: Tensor) -> Tensor:
    """Each row to mean 0 and standard deviation 1 (unbiased): (N, C) → (N, C) float32.

    A modifier of every objective over logits: the student is asked for the teacher's shape, not
    for its scale (Sun et al. 2024, eq. 9).
    """
    logits = logits.float()
    spread = logits.std(dim=1, keepdim=True)
    return (logits - logits.mean(dim=1, keepdim=True)) / (spread + _EPS_STD)


def ensemble(logits: Tensor, weights: Tensor, *, temperature: Temperature) -> Tensor:
    """Logits whose softmax at T is the weighted mean of the teachers' softmaxes at T.

    T · logsumexp_k(log w_k + log_softmax(z_k / T)). Following the mixture has the gradient of
    following every teacher with its weight, whichever objective is used.

    Args:
        logits: (K, N, C). weights: (K,), or (N, K) where every sample has its own; ≥ 0, normalised
            here.
    Returns:
        (N, C) float32.
    Raises:
        ValueError: shapes do not fit or temperature ≤ 0.
    """
    _check("ensemble", logits[0], logits[0], temperature)
    count, samples = logits.shape[:2]
    if weights.shape not in ((count,), (samples, count)):
        raise ValueError(
            f"ensemble: expected weights ({count},) or ({samples}, {count}), got "
            f"{tuple(weights.shape)}"
        )
    shares = weights.float().expand(samples, count)
    log_shares = (shares / shares.sum(1, keepdim=True)).log()
    log_p = F.log_softmax(logits.float() / temperature, dim=2)
    return temperature * torch.logsumexp(log_p + log_shares.T[:, :, None], dim=0)


def confidence_weights(logits: Tensor, labels: Tensor) -> Tensor:
    """How far each sample trusts each teacher: w_k = (1 - softmax_k(CE_k)) / (K - 1).

    Zhang et al. 2022 (CA-MKD, eq. 3). A sample without a label (< 0) trusts all alike.

    Args:
        logits: (K, N, C). labels: int64, (N,).
    Returns:
        (N, K) float32, rows sum to 1.
    """
    count, samples, classes = logits.shape
    if count == 1:
        return torch.ones(samples, 1, device=logits.device)
    known = labels.clamp_min(0).repeat(count)
    losses = F.cross_entropy(
        logits.detach().float().reshape(-1, classes), known, reduction="none"
    ).view(count, samples)
    weights = (1 - losses.softmax(0)) / (count - 1)
    return torch.where(labels[:, None] < 0, 1.0 / count, weights.T)


def _check(name: str, student: Tensor, teacher: Tensor, temperature: Temperature) -> None:
    if not isinstance(temperature, Tensor) and not temperature > 0:
        raise ValueError(f"{name}: expected temperature > 0, got {temperature}")
    if student.shape != teacher.shape or student.ndim != 2 or student.shape[0] == 0:
        raise ValueError(
            f"{name}: expected student and teacher logits of one shape (N, C), N > 0; got "
            f"{tuple(student.shape)} and {tuple(teacher.shape)}"
        )
