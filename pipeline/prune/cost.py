"""What a torch network costs, by the definitions of exporters/audit.py."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from ...exporters.reference import evaluating
from ..train.reproducible import own_attention


def count_multiply_adds(network: nn.Module, example: Tensor) -> int:
    """Multiply-accumulates of convolutions and matrix products for one sample, on the CPU.

    The same as `exporters.audit.multiply_adds` of a file exported for this size: a multiply and its
    add count once, attention's products count, biases, pooling and elementwise operators do not. A
    text counts at the example's length, padded or not; the audit of a graph of any length counts
    at its own, so shares of it differ where attention's products weigh.

    Args:
        example: (N ≥ 1, C, H, W) or (N ≥ 1, K, S); the first is run.
    """
    counter = FlopCounterMode(display=False)
    # fused attention kernels would be counted by other rules, or not at all
    one_by_one = sdpa_kernel(SDPBackend.MATH)
    with torch.no_grad(), evaluating(network), own_attention(), one_by_one, counter:
        network(example[:1])
    return int(counter.get_total_flops()) // 2
