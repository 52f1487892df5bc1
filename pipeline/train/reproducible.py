"""Same seed, machine, versions and thread count: same bytes.

Every random choice has its own stream, derived from the recipe's seed and the purpose's name, so
that adding one choice never moves another. Kernels are deterministic on the CPU at a fixed thread
count; on CUDA cuDNN is told to be. Operators that have only a non-deterministic CUDA backward
(some interpolations and scatters) still run: refusing them would refuse ordinary networks.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch.backends import cudnn


def derive_seed(seed: int, *purpose: str | int) -> int:
    """A 63-bit seed for one purpose, e.g. `derive_seed(0, "shuffle", epoch)`."""
    text = "/".join(str(part) for part in (seed, *purpose))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


@contextmanager
def own_attention() -> Iterator[None]:
    """Inside, torch's transformer layers call their modules instead of one fused kernel."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


@contextmanager
def reproducible(*, threads: int, device: str) -> Iterator[None]:
    """Fixed thread count, deterministic cuDNN, and random states of one's own; all put back.

    torch's fused transformer layer is off: in evaluation alone it takes the place of the modules,
    and under bf16 autocast it fails (torch 2.13).
    """
    before = torch.get_num_threads(), cudnn.deterministic, cudnn.benchmark
    devices = [torch.cuda.current_device()] if device == "cuda" else []
    with torch.random.fork_rng(devices=devices), own_attention():
        torch.set_num_threads(threads)
        cudnn.deterministic, cudnn.benchmark = True, False
        try:
            yield
        finally:
            torch.set_num_threads(before[0])
            cudnn.deterministic, cudnn.benchmark = before[1:]
