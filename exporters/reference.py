"""What torch itself computes: the logits every ONNX file is held against. CPU only.

float64 is the root of the parity ladder: float32's own error is the distance to it.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..pipeline.errors import ModelError
from .feeds import is_tokens, longest
from .quiet import quiet

Array = np.ndarray[Any, Any]


@contextlib.contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """The module in eval mode; every submodule's own mode afterwards."""
    modes = [(part, part.training) for part in module.modules()]
    for part, _ in modes:
        part.training = False
    try:
        yield
    finally:
        for part, mode in modes:
            part.training = mode


def logits_float32(module: nn.Module, inputs: Array, *, batch_size: int) -> Array:
    """Logits of the module in eval mode, float32, (N, classes).

    Args:
        inputs: float32, (N, C, H, W), or int64 tokens, (N, K, S); N ≥ 1.
        batch_size: samples a call; the last batch is filled up by repeating its last sample, so
            that a program captured with a fixed batch can be run too.

    Raises:
        ModelError: the network fails on these inputs.
    """
    try:
        return _run(module, inputs, torch.float32, batch_size)
    except (RuntimeError, TypeError, ValueError, IndexError) as error:
        said = " ".join(str(error).split())[:300]
        raise ModelError(
            f"the network fails on an input of shape {inputs.shape[1:]}: {said}; check "
            + (
                "data.tokenize, and how many tokens and token types the network has"
                if is_tokens(inputs)
                else "data.preprocess and the network's input size"
            )
        ) from error


def logits_float64(module: nn.Module, inputs: Array, *, batch_size: int) -> tuple[Array, str]:
    """Logits of a copy of the module in float64, or an empty array and why it is impossible.

    A network that makes float32 tensors in its forward(), or a program whose graph holds such
    constants, cannot run in float64. Tokens stay int64.
    """
    try:
        with quiet():  # copying a program warns about torch's own internals
            double = copy.deepcopy(module).double()
        return _run(double, inputs, torch.float64, batch_size), ""
    except (RuntimeError, TypeError, ValueError, IndexError, AssertionError) as error:
        said = (" ".join(str(error).split()) or type(error).__name__)[:160]
        return np.zeros((0, 0)), f"the network does not run in float64 ({said})"


def _run(module: nn.Module, inputs: Array, dtype: torch.dtype, batch_size: int) -> Array:
    outputs: list[Array] = []
    with torch.no_grad(), evaluating(module):
        for start in range(0, len(inputs), batch_size):
            part = inputs[start : start + batch_size]
            if is_tokens(part) and hasattr(module, "input_names"):  # a text network, of any length
                part = part[..., : longest(part)]
            batch = torch.from_numpy(np.ascontiguousarray(part))
            missing = batch_size - len(batch)
            full = torch.cat([batch, batch[-1:].expand(missing, *batch.shape[1:])])
            logits: Tensor = module(full.to(torch.int64 if is_tokens(part) else dtype))
            outputs.append(logits[: len(batch)].numpy())
    return np.concatenate(outputs)
