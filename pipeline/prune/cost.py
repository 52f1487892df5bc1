"""What a torch network costs, by the definitions of exporters/audit.py."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from ...exporters.reference import evaluating
from .probe import noise, own_attention


def count_multiply_adds(network: nn.Module, input_shape: Sequence[int]) -> int:
    """Multiply-accumulates of convolutions and matrix products for one image (C, H, W).

    The same as `exporters.audit.multiply_adds` of the exported file: a multiply and its add count
    once, attention's products count, biases, pooling and elementwise operators do not. On the CPU.
    """
    counter = FlopCounterMode(display=False)
    image = noise(input_shape, batch=1)
    # fused attention kernels would be counted by other rules, or not at all
    one_by_one = sdpa_kernel(SDPBackend.MATH)
    with torch.no_grad(), evaluating(network), own_attention(), one_by_one, counter:
        network(image)
    return int(counter.get_total_flops()) // 2
