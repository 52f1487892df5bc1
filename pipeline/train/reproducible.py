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
def reproducible(*, threads: int, device: str) -> Iterator[None]:
    """Fixed thread count, deterministic cuDNN, and random states of one's own; all put back."""
    before = torch.get_num_threads(), cudnn.deterministic, cudnn.benchmark
    devices = [torch.cuda.current_device()] if device == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.set_num_threads(threads)
        cudnn.deterministic, cudnn.benchmark = True, False
        try:
            yield
        finally:
            torch.set_num_threads(before[0])
            cudnn.deterministic, cudnn.benchmark = before[1:]
