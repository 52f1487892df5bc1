"""Losses on what a text encoder computes for its tokens, as pure functions. No weights, no I/O.

Everything is (N, S, D), a row a token, beside a mask (N, S) that is 1 at real tokens and 0 at
padding. Padding has no part in a value: its states are neither compared nor attended to, so a text
is worth the same in any batch. No gradient reaches the teacher; all is float32, under autocast too.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def hidden_states(student: Sequence[Tensor], teacher: Sequence[Tensor], *, mask: Tensor) -> Tensor:
    """Σ over layers of the mean squared error of a token's states (Jiao et al. 2020, TinyBERT,
    §3.1): a mean over D, over the real tokens of a text, over texts.

    Args:
        student: (N, S, D) a layer, after its projection. teacher: of the same shapes.
        mask: (N, S). A text without a real token makes the loss NaN.
    Returns:
        scalar ≥ 0.
    Raises:
        ValueError: not as many layers on both sides, none, or shapes that differ.
    """
    _check("hidden_states", student, teacher, mask)
    losses = []
    for mine, theirs in zip(student, teacher, strict=True):
        if mine.shape != theirs.shape:
            raise ValueError(
                f"hidden_states: expected states of one shape, got {tuple(mine.shape)} and "
                f"{tuple(theirs.shape)}"
            )
        off = (mine.float() - theirs.detach().float()).square().mean(2)
        losses.append(_mean_over_texts(off, mask))
    return torch.stack(losses).sum()


def relations(
    student: Sequence[Tensor], teacher: Sequence[Tensor], *, mask: Tensor, heads: int
) -> Tensor:
    """Σ over the projections of KL(teacher ‖ student) of how tokens relate (Wang et al. 2021,
    MiniLMv2, §3.1), each with weight 1.

    The projections are queries, keys and values. With x one of them, (S, D), split into A relation
    heads x_a of width D / A, the relation is softmax(x_a · x_aᵀ / √(D / A)) over the real tokens, a
    row a token. KL is summed over a row; the mean is over heads, over the real tokens of a text,
    over texts. D may differ between student and teacher, A may not.

    Args:
        student, teacher: (N, S, D) a projection. mask: (N, S); a text without a real token makes
            the loss NaN. heads: A, which divides every D.
    Returns:
        scalar ≥ 0.
    Raises:
        ValueError: not as many projections on both sides, none, another N or S, or a width that
            `heads` does not divide.
    """
    _check("relations", student, teacher, mask)
    wrong = [each.shape[2] for each in (*student, *teacher) if each.shape[2] % heads]
    if wrong:
        raise ValueError(f"relations: expected widths that {heads} heads divide, got {wrong}")
    losses = []
    for mine, theirs in zip(student, teacher, strict=True):
        log_q = _log_relation(mine, mask, heads)
        log_p = _log_relation(theirs.detach(), mask, heads)
        divergence = (log_p.exp() * (log_p - log_q)).sum(3).mean(1)
        losses.append(_mean_over_texts(divergence, mask))
    return torch.stack(losses).sum()


def _log_relation(states: Tensor, mask: Tensor, heads: int) -> Tensor:
    """(N, S, D) → (N, A, S, S) float32: the log of how each token relates to the real ones."""
    count, length, width = states.shape
    split = states.float().view(count, length, heads, width // heads).transpose(1, 2)
    # autocast would compute the products in bfloat16
    with torch.autocast(states.device.type, enabled=False):
        scores = split @ split.transpose(2, 3) / (width // heads) ** 0.5
    # not -inf, which padding would turn into inf - inf; its probability is 0 all the same
    lowest = torch.finfo(torch.float32).min
    return F.log_softmax(scores.masked_fill(~mask.bool()[:, None, None, :], lowest), dim=3)


def _mean_over_texts(values: Tensor, mask: Tensor) -> Tensor:
    """(N, S) → the mean over texts of the mean over a text's real tokens."""
    real = mask.bool()
    return (values.masked_fill(~real, 0.0).sum(1) / real.sum(1)).mean()


def _check(name: str, student: Sequence[Tensor], teacher: Sequence[Tensor], mask: Tensor) -> None:
    if not student or len(student) != len(teacher):
        raise ValueError(
            f"{name}: expected as many tensors of the student as of the teacher, at least one; got "
            f"{len(student)} and {len(teacher)}"
        )
    wrong = [each for each in (*student, *teacher) if each.shape[:-1] != mask.shape]
    if wrong or mask.ndim != 2 or mask.numel() == 0:
        got = " and ".join(str(tuple(each.shape)) for each in (*wrong[:1], mask))
        raise ValueError(f"{name}: expected (N, S, D) with a mask (N, S), N and S > 0; got {got}")
