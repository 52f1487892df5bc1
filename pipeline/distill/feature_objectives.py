"""Losses on feature maps as pure functions. No weights, no state, no I/O.

Maps are (N, C, H, W), embeddings (N, D). No gradient reaches the teacher; all is float32.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

_EPS = 1e-12
_SHORTEST = 1e-6  # a shorter difference of embeddings has no direction in float32
_LEVELS = (4, 2, 1)  # pooled sizes of the hierarchical loss, halving in weight


def hint(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean squared error over all elements (Romero et al. 2015, eq. 3, up to a constant).

    Args:
        student, teacher: of one shape; the student's after its projection.
    Raises:
        ValueError: shapes differ, or the batch is empty.
    """
    if student.shape != teacher.shape or student.numel() == 0:
        raise ValueError(
            f"hint: expected features of one shape, N > 0; got {tuple(student.shape)} and "
            f"{tuple(teacher.shape)}"
        )
    return F.mse_loss(student.float(), teacher.detach().float())


def attention(student: Sequence[Tensor], teacher: Sequence[Tensor]) -> Tensor:
    """Σ over stages of the mean squared difference of where they look (Zagoruyko & Komodakis 2017).

    A map's attention is mean_c F², flattened over H · W and scaled to length 1; the mean is over
    batch and positions, as in the authors' code. Of two sizes the larger is pooled to the smaller;
    channel counts need not agree.

    Args:
        student, teacher: maps (N, Ci, Hi, Wi), one a stage.
    Raises:
        ValueError: not as many maps or samples on both sides, or none.
    """
    _check_pairs("attention", student, teacher)
    parts = []
    for mine, theirs in zip(student, teacher, strict=True):
        mine, theirs = mine.float(), theirs.detach().float()
        size = (min(mine.shape[2], theirs.shape[2]), min(mine.shape[3], theirs.shape[3]))
        looks = [_attention_of(_pooled_to(feature, size)) for feature in (mine, theirs)]
        parts.append((looks[0] - looks[1]).square().mean())
    return torch.stack(parts).sum()


def _attention_of(feature: Tensor) -> Tensor:
    return F.normalize(feature.square().mean(1).flatten(1), dim=1)


def _pooled_to(feature: Tensor, size: tuple[int, int]) -> Tensor:
    return feature if tuple(feature.shape[2:]) == size else F.adaptive_avg_pool2d(feature, size)


def hierarchical(student: Sequence[Tensor], teacher: Sequence[Tensor]) -> Tensor:
    """ReviewKD's hierarchical context loss, summed over stages (Chen et al. 2021, §3.3).

    A stage's is Σ_l w_l · MSE at level l / Σ_l w_l: full size with weight 1, then pooled to 4, 2
    and 1 with 1/2, 1/4, 1/8; levels not smaller than the map are left out.

    Args:
        student: fused maps, of the teacher's shapes. teacher: maps (N, Ci, Hi, Wi).
    Raises:
        ValueError: not as many maps or samples on both sides, none, or shapes differ.
    """
    _check_pairs("hierarchical", student, teacher)
    parts = []
    for mine, theirs in zip(student, teacher, strict=True):
        loss, total, weight = hint(mine, theirs), 1.0, 1.0
        for level in _LEVELS:
            if level >= theirs.shape[2]:
                continue
            weight /= 2
            size = (level, level)
            coarse = F.adaptive_avg_pool2d(mine.float(), size)
            wanted = F.adaptive_avg_pool2d(theirs.detach().float(), size)
            loss = loss + weight * F.mse_loss(coarse, wanted)
            total += weight
        parts.append(loss / total)
    return torch.stack(parts).sum()


def rkd_distance(student: Tensor, teacher: Tensor) -> Tensor:
    """Smooth L1 between the pairwise distances in the batch, each side's divided by its mean
    (Park et al. 2019, eq. 5–7); the mean of the loss is over all N² pairs, as in the authors' code.

    Args:
        student, teacher: embeddings (N, D), N ≥ 2; D may differ.
    Raises:
        ValueError: fewer than 2 samples, or not as many on both sides.
    """
    _check_embeddings("rkd_distance", student, teacher, least=2)
    mine, theirs = (_distances(each) for each in (student.float(), teacher.detach().float()))
    return F.smooth_l1_loss(mine, theirs)


def rkd_angle(student: Tensor, teacher: Tensor) -> Tensor:
    """Smooth L1 between the cosines of the angles of all triples (Park et al. 2019, eq. 8–9).

    Args:
        student, teacher: embeddings (N, D), N ≥ 3; D may differ. Memory grows with N² · D + N³.
    Raises:
        ValueError: fewer than 3 samples, or not as many on both sides.
    """
    _check_embeddings("rkd_angle", student, teacher, least=3)
    mine, theirs = (_angles(each) for each in (student.float(), teacher.detach().float()))
    return F.smooth_l1_loss(mine, theirs)


def pooled(feature: Tensor) -> Tensor:
    """(N, C, H, W) → (N, C) by global average; (N, D) as it is."""
    return feature.mean((2, 3)) if feature.ndim == 4 else feature.flatten(1)


def _distances(embeddings: Tensor) -> Tensor:
    """(N, N) Euclidean distances over the mean of those between different samples."""
    # not from a Gram matrix: autocast would make it bfloat16, and even float32 cancels where
    # samples lie close together; the gradient at distance 0 is 0
    distances = torch.cdist(embeddings, embeddings, compute_mode="donot_use_mm_for_euclid_dist")
    mean = distances.sum() / (len(embeddings) * (len(embeddings) - 1))
    return distances / mean.clamp_min(_EPS)


def _angles(embeddings: Tensor) -> Tensor:
    """(N, N, N): the cosine at vertex i between j and k; 0 where one of them coincides with i."""
    towards = embeddings[None, :, :] - embeddings[:, None, :]
    length = torch.linalg.vector_norm(towards, dim=2, keepdim=True)
    # dividing a coincident pair by a tiny length would send its gradient to 1e12
    unit = towards / torch.where(length > _SHORTEST, length, 1.0)
    with torch.autocast(embeddings.device.type, enabled=False):
        return torch.bmm(unit, unit.transpose(1, 2))


def _check_pairs(name: str, student: Sequence[Tensor], teacher: Sequence[Tensor]) -> None:
    if not student or len(student) != len(teacher):
        raise ValueError(
            f"{name}: expected as many maps of the student as of the teacher, at least one; got "
            f"{len(student)} and {len(teacher)}"
        )
    samples = [[len(feature) for feature in side] for side in (student, teacher)]
    if samples[0] != samples[1] or 0 in samples[0]:
        raise ValueError(
            f"{name}: expected maps of the same N > 0 samples, got N of {samples[0]} and "
            f"{samples[1]}"
        )


def _check_embeddings(name: str, student: Tensor, teacher: Tensor, *, least: int) -> None:
    if len(student) < least or len(student) != len(teacher) or student.ndim != 2:
        raise ValueError(
            f"{name}: expected embeddings (N, D) of one N ≥ {least}, got {tuple(student.shape)} "
            f"and {tuple(teacher.shape)}"
        )
