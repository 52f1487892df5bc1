"""Which channels reach which layers, found by perturbing them; any forward() will do.

Tools that read a graph (Torch-Pruning 1.6.1, torch.fx) know a list of operators and guess at
slices, pads and reshapes; option-A shortcuts break them. Here nothing is read. Every convolution
and Linear is replaced by a source of fixed random activations; what lies between them (additions,
concatenation, flattening, gates, attention) runs as it is. A source's channels are changed, and
the layers whose inputs then change depend on them.

One run a source suffices: sample 2b + 1 changes the channels whose number has bit b, sample 2b + 2
the others, so an input channel that depends on one channel reads its number in binary. One that
depends on several reads a set that holds them all; it may hold more, which couples more channels
than needed and never fewer.

Activations are positive and normalisations scale by one, so that no ReLU hides a dependency.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from ...exporters.reference import evaluating
from ..errors import ModelError
from ..train.reproducible import derive_seed, own_attention
from .example import smaller

# What a network's own forward() raises on shapes it was not written for.
FAILURES = (RuntimeError, TypeError, ValueError, LookupError, AttributeError, AssertionError,
            ArithmeticError)  # fmt: skip

NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.GroupNorm)  # one scale a channel
LAYERS = (nn.Conv2d, nn.Linear)
LOGITS = ""  # stands for the network's output among the readers

# float32 rounds at 1e-7; what a changed channel does is 1e-4 even after a mean over thousands
_TOLERANCE = 1e-6

Pairs = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Wiring:
    """What depends on what.

    Attributes:
        widths: path → channels that the layer puts out, of every layer that ran.
        readers: path → channels read, of every layer and normalisation that ran.
        links: (source, reader) → int64 (M, 2), pairs of a channel of the source and one of the
            reader's input that depends on it. The reader LOGITS is the network's output.
        unknown: layers that ran on something without a batch axis, such as a table of positions;
            of them nothing is known.
    """

    widths: Mapping[str, int]
    readers: Mapping[str, int]
    links: Mapping[tuple[str, str], Pairs]
    unknown: tuple[str, ...] = ()


def find_wiring(network: nn.Module, example: Tensor) -> Wiring:
    """Probe the network on an input of the example's size, or on a smaller one if it takes it.

    Args:
        example: two inputs (`example.py`).
    Raises:
        ModelError: it cannot be copied or run.
    """
    try:
        generic = _generic_copy(network)
        with own_attention():
            return _Probe(generic, _traced(generic, example)).run()
    except FAILURES as error:
        said = " ".join(str(error).split())[:300]
        raise ModelError(
            f"prune: {type(network).__name__} cannot be traced ({type(error).__name__}: {said}); "
            "it must run on batches of any size; leave `prune` out for this network"
        ) from error


def layers_of(network: nn.Module) -> dict[str, nn.Module]:
    """Path → every convolution, Linear and normalisation that owns its weight."""
    return {
        path: part
        for path, part in network.named_modules()
        if isinstance(part, LAYERS + NORMS)
        and (isinstance(part, NORMS) or part._parameters.get("weight") is not None)
    }


def _generic_copy(network: nn.Module) -> nn.Module:
    """A copy whose normalisations scale by one and whose other own tensors are in (½, 1)."""
    copied = copy.deepcopy(network).to("cpu", torch.float32).eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(0)
    layers = set(layers_of(copied).values())
    for part in copied.modules():
        if isinstance(part, nn.BatchNorm1d | nn.BatchNorm2d):
            part.reset_running_stats()
        is_norm = isinstance(part, (*NORMS, nn.LayerNorm))
        if is_norm and isinstance(part.weight, Tensor):
            part.weight.fill_(1)
            if isinstance(part.bias, Tensor):
                part.bias.zero_()
        elif part not in layers:
            for parameter in part.parameters(recurse=False):
                parameter.uniform_(0.5, 1, generator=generator)
    return copied


def _traced(network: nn.Module, example: Tensor) -> Tensor:
    """The smallest example that the network takes.

    Flattening ties a network to its size: then the smaller input fails, as a Linear does not fit.
    """
    for less in smaller(example):
        try:
            with torch.no_grad():
                network(less)
        except FAILURES:
            continue
        return less
    return example


@dataclass(frozen=True)
class _Layout:
    """Where the batch lies in a tensor: axis, and rows along it for each sample."""

    axis: int
    rows: int
    shape: tuple[int, ...]  # with the batch axis at `rows`


@dataclass
class _Calls:
    """Layouts of a layer's inputs and outputs, call by call."""

    inputs: list[_Layout] = field(default_factory=list)
    outputs: list[_Layout] = field(default_factory=list)


class _Probe:
    """One network under observation; its layers' forward() are replaced for good."""

    def __init__(self, network: nn.Module, example: Tensor) -> None:
        self.network, self.example = network, example
        self.layers = layers_of(network)
        self.calls, self.unknown = self._layouts()
        self.layers = {path: part for path, part in self.layers.items() if path in self.calls}
        self.sources = {p: m for p, m in self.layers.items() if isinstance(m, LAYERS)}
        self.widths = {
            path: self.calls[path].outputs[0].shape[_channel_axis(part)]
            for path, part in self.sources.items()
        }
        self.readers = {
            path: self.calls[path].inputs[0].shape[_channel_axis(part)]
            for path, part in self.layers.items()
        }
        self._source, self._seen, self._changed = "", dict[str, int](), dict[str, Any]()

    def run(self) -> Wiring:
        handles = [
            part.register_forward_pre_hook(self._reader(path)) for path, part in self.layers.items()
        ]
        for path, part in self.sources.items():
            part.forward = self._stub(path)  # type: ignore[method-assign, assignment]
        links: dict[tuple[str, str], Pairs] = {}
        try:
            for source in self.sources:
                for reader, changed in self._probe(source).items():
                    pairs = _decode(changed, self.widths[source])
                    if len(pairs):
                        links[source, reader] = pairs
        finally:
            for handle in handles:
                handle.remove()
        return Wiring(self.widths, self.readers, links, self.unknown)

    def _layouts(self) -> tuple[dict[str, _Calls], tuple[str, ...]]:
        """Where the batch lies, seen from what differs between a batch of two and one of three;
        and the layers of which that cannot be said."""
        two, three = self._shapes(2), self._shapes(3)
        found: dict[str, _Calls] = {}
        unknown: dict[str, None] = {}
        for (path, *small), (other, *large) in zip(two, three, strict=True):
            assert path == other, "the layers run in another order for another batch"
            given, made = _layout(small[0], large[0]), _layout(small[1], large[1])
            if given is None or made is None:
                unknown[path] = None
                continue
            calls = found.setdefault(path, _Calls())
            calls.inputs.append(given)
            calls.outputs.append(made)
        known = {path: calls for path, calls in found.items() if path not in unknown}
        return known, tuple(unknown)

    def _shapes(self, batch: int) -> list[tuple[str, tuple[int, ...], tuple[int, ...]]]:
        shapes: list[tuple[str, tuple[int, ...], tuple[int, ...]]] = []

        def hook(path: str) -> Callable[..., None]:
            def note(_: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
                shapes.append((path, tuple(args[0].shape), tuple(output.shape)))

            return note

        handles = [part.register_forward_hook(hook(path)) for path, part in self.layers.items()]
        try:
            with torch.no_grad(), evaluating(self.network):
                self.network(torch.cat([self.example, self.example[:1]])[:batch])
        finally:
            for handle in handles:
                handle.remove()
        return shapes

    def _probe(self, source: str) -> dict[str, Any]:
        """Reader → bool (samples - 1, channels): what changed against the first sample."""
        self._source, self._seen, self._changed = source, {}, {}
        samples = 1 + 2 * _bits(self.widths[source])
        with torch.no_grad():
            logits = self.network(self.example[:1].repeat_interleave(samples, 0))
        self._note(LOGITS, logits, _Layout(0, 1, (1, *logits.shape[1:])), axis=1)
        return self._changed

    def _reader(self, path: str) -> Callable[..., None]:
        def look(part: nn.Module, args: tuple[Tensor, ...]) -> None:
            call = self._seen.get(path, 0)
            if not isinstance(part, LAYERS):
                self._seen[path] = call + 1  # a source counts its calls itself, later
            layout = self.calls[path].inputs[call]
            self._note(path, args[0], layout, axis=_channel_axis(part))

        return look

    def _stub(self, path: str) -> Callable[[Tensor], Tensor]:
        def forward(_: Tensor) -> Tensor:
            call = self._seen.get(path, 0)
            self._seen[path] = call + 1
            axis = _channel_axis(self.sources[path])
            layout = self.calls[path].outputs[call]
            is_probed = path == self._source
            samples = 1 + 2 * _bits(self.widths[self._source])
            generator = torch.Generator().manual_seed(derive_seed(0, path, call))
            still = 0.1 + 0.1 * torch.rand(layout.shape, generator=generator)
            stacked = still.unsqueeze(layout.axis)
            stacked = stacked.repeat_interleave(samples, layout.axis)
            if is_probed:
                change = 0.5 + 0.5 * torch.rand(layout.shape, generator=generator)
                where = _masks(self.widths[path])  # (samples, C)
                shape = [1] * stacked.ndim
                shape[layout.axis] = samples
                shape[axis if axis < 0 else axis + (axis >= layout.axis)] = where.shape[1]
                stacked = stacked + change.unsqueeze(layout.axis) * where.view(shape)
            return stacked.flatten(layout.axis, layout.axis + 1)

        return forward

    def _note(self, path: str, x: Tensor, layout: _Layout, *, axis: int) -> None:
        samples = x.shape[layout.axis] // layout.rows
        split = torch.unflatten(x, layout.axis, (samples, layout.rows)).movedim(layout.axis, 0)
        first = split[:1]
        limit = _TOLERANCE * float(first.abs().max())
        differs = (split[1:] - first).abs() > limit
        channel = axis % x.ndim + 1  # the sample axis stands before all others now
        others = [a for a in range(1, differs.ndim) if a != channel]
        found = differs.any(dim=others) if others else differs
        before = self._changed.get(path)
        self._changed[path] = found if before is None else before | found


def _channel_axis(part: nn.Module) -> int:
    return -1 if isinstance(part, nn.Linear) else 1


def _layout(two: tuple[int, ...], three: tuple[int, ...]) -> _Layout | None:
    """Of a tensor's shapes in a batch of two and of three; None: no axis grows with the batch."""
    axes = [axis for axis in range(len(two)) if two[axis] != three[axis]]
    if len(axes) != 1 or two[axes[0]] * 3 != three[axes[0]] * 2:
        return None
    axis, rows = axes[0], two[axes[0]] // 2
    return _Layout(axis, rows, (*two[:axis], rows, *two[axis + 1 :]))


def _bits(width: int) -> int:
    return max(1, (width - 1).bit_length())


def _masks(width: int) -> Tensor:
    """Which channels each sample changes, float (1 + 2 · bits, C); the first changes none."""
    numbers = torch.arange(width)
    rows = [torch.zeros(width)]
    for bit in range(_bits(width)):
        has = (numbers >> bit & 1).float()
        rows += [has, 1 - has]
    return torch.stack(rows)


def _decode(changed: Tensor, width: int) -> Pairs:
    """Pairs (channel of the source, channel of the reader) from the samples that changed."""
    possible = np.broadcast_to(changed.any(0).numpy(), (width, changed.shape[1])).copy()
    numbers = np.arange(width)[:, None]
    for bit in range(_bits(width)):
        has, has_not = changed[2 * bit].numpy(), changed[2 * bit + 1].numpy()
        possible &= np.where(numbers >> bit & 1, has, has_not)
    return np.argwhere(possible)
