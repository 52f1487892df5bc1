"""How far two sets of logits are apart: error, SQNR, cosine, top-1 agreement. NumPy only.

Does not decide what is good enough for int8; `pipeline/verify/parity.py` does. A comparison over
nothing, over different shapes or with NaN says so instead of returning a good-looking number.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]

# A float graph must stay within atol + rtol·|ref|, or within 10 times what float32 itself is off
# from float64 on the same samples (reference/profiling.md, "verify").
ATOL, RTOL, FLOOR_FACTOR = 1e-4, 1e-3, 10.0


@dataclass(frozen=True)
class Agreement:
    """`candidate` against `reference`, both (N, C).

    problem: None, or why nothing can be said: no samples, different shapes, not finite. The
        figures are then None.
    sqnr_db: 10·log10(Σ ref² / Σ (ref - cand)²); None where there is no error at all.
    cosine: of the two flattened arrays.
    top1_agreement: fraction of rows with the same argmax.
    """

    n: int
    problem: str | None
    max_abs: float | None = None
    sqnr_db: float | None = None
    cosine: float | None = None
    top1_agreement: float | None = None


def compare(reference: Array, candidate: Array) -> Agreement:
    """Compares logits row by row, in float64."""
    n = min(len(reference), len(candidate))
    if reference.shape != candidate.shape:
        return Agreement(n, f"expected shape {reference.shape}, got {candidate.shape}")
    if reference.size == 0:
        return Agreement(n, "nothing was compared")
    for name, values in (("reference", reference), ("candidate", candidate)):
        if not np.isfinite(values).all():
            return Agreement(n, f"NaN or infinity in the {name}")
    ref, cand = reference.astype(np.float64), candidate.astype(np.float64)
    error = float(np.square(ref - cand).sum())
    signal = float(np.square(ref).sum())
    lengths = float(np.sqrt(signal) * np.linalg.norm(cand))
    return Agreement(
        n=n,
        problem=None,
        max_abs=float(np.abs(ref - cand).max()),
        sqnr_db=10 * float(np.log10(signal / error)) if error and signal else None,
        cosine=float((ref * cand).sum()) / lengths if lengths else None,
        top1_agreement=float((ref.argmax(1) == cand.argmax(1)).mean()),
    )


def float_floor(float64: Array, float32: Array) -> float:
    """Largest absolute difference that float32 arithmetic alone makes; 0 where unmeasurable.

    Capped at 1e-3 of the largest logit: a net less stable than that must not widen its own
    tolerance.
    """
    agreement = compare(float64, float32)
    if agreement.max_abs is None:
        return 0.0
    return min(agreement.max_abs, ATOL + RTOL * float(np.abs(float64).max()))


def allowed_error(reference: Array, floor: float) -> Array:
    """Largest error allowed at each element: max(10·floor, 1e-4 + 1e-3·|ref|)."""
    return np.maximum(FLOOR_FACTOR * floor, ATOL + RTOL * np.abs(reference.astype(np.float64)))


def agrees(reference: Array, candidate: Array, *, floor: float) -> tuple[bool, str]:
    """Whether a float rewrite kept the outputs, and in words what was measured."""
    agreement = compare(reference, candidate)
    if agreement.problem is not None:
        return False, agreement.problem
    allowed = allowed_error(reference, floor)
    difference = np.abs(reference.astype(np.float64) - candidate)
    worst = int((difference / allowed).argmax())
    said = (
        f"largest difference {agreement.max_abs:.2e} on {agreement.n} real samples, "
        f"{allowed.flat[worst]:.2e} allowed at the worst"
    )
    return bool((difference <= allowed).all()), said
