"""Which number format the forward and backward pass run in, and why.

bf16 means autocast: matrix products and convolutions in bfloat16, weights, normalisation
statistics, losses and the optimiser in float32. It pays only where the processor multiplies
bfloat16 in hardware; elsewhere it is emulated and slower than float32, so `auto` takes it only
there, and on a CPU lets a long run measure whether it pays for its network (`trial.py`). float16
is never used: its range needs loss scaling, which bfloat16 does not.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from ..stage import Context
from .distributed import shared
from .trial import fastest

CPU_INFO = Path("/proc/cpuinfo")

# How Linux spells "multiplies bfloat16 in hardware", best first.
_CPU_FLAGS = {"amx_bf16": "AMX", "avx512_bf16": "AVX-512 BF16", "bf16": "ARM BF16"}


@dataclass(frozen=True)
class Precision:
    """The chosen format and one sentence on why."""

    name: Literal["fp32", "bf16"]
    reason: str

    def autocast(self, device: str) -> AbstractContextManager[None]:
        """The context in which forward passes run."""
        enabled = self.name == "bf16"
        return torch.autocast(device_type=device, dtype=torch.bfloat16, enabled=enabled)


def choose_precision(wish: Literal["auto", "fp32", "bf16"], *, device: str) -> Precision:
    """fp32 or bf16 for `device` ("cpu" or "cuda"). An explicit wish is always followed."""
    if wish != "auto":
        return Precision(wish, "asked for by the recipe")
    if device == "cuda":
        if torch.cuda.is_bf16_supported(including_emulation=False):
            return Precision("bf16", "this GPU multiplies bfloat16 in hardware")
        return Precision("fp32", "this GPU has no bfloat16 units")
    unit = bf16_unit(CPU_INFO.read_text(encoding="utf-8") if CPU_INFO.is_file() else "")
    if unit is None:
        return Precision("fp32", "this CPU reports no bfloat16 units")
    return Precision("bf16", f"this CPU multiplies bfloat16 in hardware ({unit})")


def measured_precision(
    wish: Literal["auto", "fp32", "bf16"],
    work: Callable[[Precision], object],
    *,
    name: str,
    calls: int,
    context: Context,
) -> Precision:
    """As `choose_precision`, but where a CPU's bf16 is only a guess and the run long, measured.

    Args:
        work: one unit of the work in a precision (a training step, a batch to label), without
            lasting effects; it will be done `calls` times.
        name: of the choice, see `trial.fastest`.
    """
    guess: Precision = shared(choose_precision(wish, device=context.device), world=context.world)
    if wish != "auto" or context.device != "cpu" or guess.name == "fp32":
        return guess
    other = Precision("fp32", "")
    measured = fastest(
        name,
        {"bf16": lambda: work(guess), "fp32": lambda: work(other)},
        calls=calls,
        context=context,
    )
    chosen, seconds = shared(measured, world=context.world)
    if seconds is None:
        return guess
    ratio = seconds["fp32"] / seconds["bf16"]
    return Precision(
        "bf16" if chosen == "bf16" else "fp32",
        f"measured on this network: bf16 is {ratio:.2f}× as fast as fp32 here",
    )


def bf16_unit(cpu_info: str) -> str | None:
    """Name of the bfloat16 unit that a /proc/cpuinfo text reports, or None.

    x86 lists its features under `flags`, ARM under `Features`.
    """
    for line in cpu_info.splitlines():
        key, _, value = line.partition(":")
        if key.strip().lower() in ("flags", "features"):
            flags = set(value.split())
            return next((name for flag, name in _CPU_FLAGS.items() if flag in flags), None)
    return None
