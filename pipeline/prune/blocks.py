"""Blocks that may leave whole: residual blocks and transformer layers, by the harm of removing.

A block is a module that runs once, gives back the shape it is given, and still passes its input
on when every weight inside is zero: there is a way around them. What such a module consists of
counts only where there are several of the kind (a stage of blocks), else the outer one does (a
block with a gate inside).

Harm is KL(dense ‖ without) of the class probabilities on training samples, never on the test set.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...exporters.reference import evaluating
from ...models.plan import Skip, is_within
from ..train.reproducible import own_attention
from .example import fast
from .probe import FAILURES, LAYERS

# Measured anew at each step, so that k removals of n blocks take n + 3k measurements.
AGAIN = 3


@dataclass(frozen=True)
class Removal:
    """A block and the harm of removing it after those before it in the order."""

    path: str
    harm: float  # nats, of the network without it and all before


def find_blocks(
    network: nn.Module, example: Tensor, *, protect: Sequence[str] = ()
) -> tuple[str, ...]:
    """Paths of the removable blocks, in the order they run; none inside another.

    Args:
        example: two inputs (`example.py`).
        protect: paths of modules that must stay, with what they are in.
    """
    calls = _calls(network, example)
    passing = [path for path, call in calls.items() if _passes_input_on(network, path, call)]
    free = [
        path
        for path in passing
        if not any(is_within(path, name) or is_within(name, path) for name in protect)
    ]
    return tuple(path for path in _units(passing) if path in free)


def removal_order(
    network: nn.Module, blocks: Sequence[str], inputs: Tensor, *, at_most: int
) -> Iterator[Removal]:
    """Blocks one by one, each the least harmful found beside those before it.

    At every step the AGAIN blocks that looked least harmful when last measured are measured anew,
    and the least harmful of them leaves. Blocks without which the network does not run stay.

    Args:
        inputs: of train, float32 (N, C, H, W) or int64 (N, K, S).
        at_most: how many are given.
    """
    own = copy.deepcopy(network)
    dense = _log_probabilities(own, inputs)
    assert dense is not None, "the network ran before"
    gone: list[str] = []
    harms = {path: _harm(own, [path], inputs, dense) for path in blocks}
    while len(gone) < at_most:
        left = [path for path, harm in harms.items() if harm < torch.inf and path not in gone]
        if not left:
            return
        likely = sorted(left, key=lambda path: harms[path])[:AGAIN]  # of equals the first to run
        if gone:
            harms |= {path: _harm(own, [*gone, path], inputs, dense) for path in likely}
        best = min(likely, key=lambda path: harms[path])
        if harms[best] < torch.inf:
            gone.append(best)
            yield Removal(best, harms[best])


def without(network: nn.Module, removed: Sequence[str]) -> nn.Module:
    """A copy of the network that skips these blocks."""
    copied = copy.deepcopy(network)
    for path in removed:
        copied.set_submodule(path, Skip())
    return copied


def _harm(network: nn.Module, removed: Sequence[str], inputs: Tensor, dense: Tensor) -> float:
    """Mean KL in nats; infinite if the network does not run without the blocks."""
    with _skipping(network, removed):
        found = _log_probabilities(network, inputs)
    if found is None or found.shape != dense.shape:
        return float("inf")
    harm = float(F.kl_div(found, dense, reduction="batchmean", log_target=True))
    return harm if harm == harm else float("inf")  # NaN: what is left overflows


@contextmanager
def _skipping(network: nn.Module, removed: Sequence[str]) -> Iterator[None]:
    """The network without these blocks, and with them again afterwards."""
    before = {path: network.get_submodule(path) for path in removed}
    for path in removed:
        network.set_submodule(path, Skip())
    try:
        yield
    finally:
        for path, block in before.items():
            network.set_submodule(path, block)


def _log_probabilities(network: nn.Module, inputs: Tensor) -> Tensor | None:
    parts = []
    try:
        with torch.no_grad(), evaluating(network):
            for batch in torch.split(inputs, 64):
                logits: Tensor = network(fast(batch))
                parts.append(logits.log_softmax(1))
    except FAILURES:
        return None
    return torch.cat(parts)


@dataclass
class _Call:
    """How a module was called, and how often."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    count: int


def _calls(network: nn.Module, example: Tensor) -> dict[str, _Call]:
    """Modules that hold others, were given a tensor, and gave back one of its shape."""
    calls: dict[str, _Call] = {}

    def hook(path: str) -> Callable[..., None]:
        def note(_: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            given = args[0] if args else None
            if path in calls:
                calls[path].count += 1
            elif (
                isinstance(given, Tensor)
                and isinstance(output, Tensor)
                and output.shape == given.shape
            ):
                # a copy: an in-place activation may write into it
                calls[path] = _Call((given.clone(), *args[1:]), kwargs, 1)

        return note

    handles = [
        part.register_forward_hook(hook(path), with_kwargs=True)
        for path, part in network.named_modules()
        if path and next(part.children(), None) is not None
    ]
    try:
        with torch.no_grad(), evaluating(network), own_attention():
            network(example)
    finally:
        for handle in handles:
            handle.remove()
    return {path: call for path, call in calls.items() if call.count == 1}


def _passes_input_on(network: nn.Module, path: str, call: _Call) -> bool:
    """Whether the module's output depends on its input with all weights inside zero."""
    block = copy.deepcopy(network.get_submodule(path))
    layers = [m for m in block.modules() if isinstance(m, (*LAYERS, nn.MultiheadAttention))]
    if not layers:
        return False
    with torch.no_grad():
        for layer in layers:
            for parameter in layer.parameters():
                parameter.zero_()
        first, rest = call.args[0], call.args[1:]
        try:
            with evaluating(block), own_attention():
                before = block(first.clone(), *rest, **call.kwargs)
                after = block(first.flip(0) + 1, *rest, **call.kwargs)
        except FAILURES:
            return False
    return not bool(torch.equal(before, after))


def _units(passing: Sequence[str]) -> list[str]:
    """Of nested paths the outer one, unless it holds several that are apart."""
    outermost = [p for p in passing if not any(p != q and is_within(p, q) for q in passing)]
    units = []
    for path in outermost:
        inner = _units([q for q in passing if q != path and is_within(q, path)])
        units += inner if len(inner) > 1 else [path]
    return units
