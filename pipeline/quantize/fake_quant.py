"""int8 arithmetic in float32: what rounding to integers does to a network, and its gradients.

Rounding is half to even, as in ONNX's QuantizeLinear; scales and zero points are those that
onnxruntime.quantization computes from the same ranges and weights, bit for bit. So the trained
ranges, handed to the int8 writer, are the network that was trained.

Gradients: rounding passes them through (Bengio et al. 2013), saturation stops them, and the ends of
a learned range get those of LSQ (Esser et al. 2020, eq. 3) with a zero point (LSQ+, Bhalgat et al.
2020): inside, the rounding error; beyond an end, one. Weights take their scales from their largest
value in each output channel, which at 7 and 8 bits leaves nothing to learn.
"""

from __future__ import annotations

import math
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from .graph_module import GraphModule, Place
from .layout import LEVELS, Layout, Range

Array = np.ndarray[Any, Any]

EMA_DECAY = 0.99  # of an end of a range, a step
# How far learning may shrink a range: four of eight bits. One of width 0 would have no way back.
SMALLEST_SHARE = 1 / 16
INT32_MAX = 2**31 - 1
BIAS_ROOM = 1.0001  # onnxruntime's, against float32 rounding at the edge of int32
TINY = torch.finfo(torch.float32).tiny
# Gradients that are zero outside of an interval, each in one vectorised pass; masks take four.
_ATEN = torch.ops.aten


class FakeQuant(nn.Module):
    """The float graph, rounded wherever the int8 file rounds. The graph's weights are trained."""

    def __init__(
        self, graph: GraphModule, layout: Layout, *, ranges: Literal["learned", "ema"]
    ) -> None:
        super().__init__()
        self.graph = graph
        self._layout = layout
        self._keys = {key: str(index) for index, key in enumerate(layout.ranges)}
        self.ranges = nn.ModuleDict(
            {
                self._keys[key]: ActivationRange(found, learned=ranges == "learned")
                for key, found in layout.ranges.items()
            }
        )
        self.constants = nn.ParameterList(  # other integers of the file, as they are in it
            nn.Parameter(torch.from_numpy(array), requires_grad=False)
            for array in layout.constants.values()
        )

    def forward(self, *inputs: Tensor) -> Tensor | tuple[Tensor, ...]:
        return self.graph.run(
            *inputs,
            through=self._rounded,
            instead=self._stored(),
            absorbed=self._layout.absorbed,
        )

    def values(self, *inputs: Tensor) -> dict[str, Tensor]:
        """Every value of the graph by its name, activations after their rounding."""
        seen: dict[str, Tensor] = {}

        def through(name: str, value: Tensor) -> Tensor:
            seen[name] = self._rounded(name, value)
            return seen[name]

        self.graph.run(
            *inputs, through=through, instead=self._stored(), absorbed=self._layout.absorbed
        )
        return seen

    def learned_ranges(self) -> dict[str, tuple[float, float]]:
        """(low, high) of each quantized activation, by tensor name, for the int8 writer."""
        return {tensor: self._range(key).ends() for tensor, key in self._layout.activations.items()}

    def project(self) -> None:
        """Puts each range, in place, back to where the int8 file can have it."""
        for module in self.ranges.values():
            assert isinstance(module, ActivationRange)
            module.project()

    def _range(self, key: str) -> ActivationRange:
        found = self.ranges[self._keys[key]]
        assert isinstance(found, ActivationRange)
        return found

    def _rounded(self, name: str, value: Tensor) -> Tensor:
        key = self._layout.activations.get(name)
        if key is None:
            return value
        rounded: Tensor = self._range(key)(value)
        return rounded

    def _stored(self) -> dict[Place, Tensor]:
        """Weights and biases as the file's integers stand for them."""
        instead = dict(zip(self._layout.constants, self.constants, strict=True))
        scales = self._weight_scales()
        for name, weight in self._layout.weights.items():
            rounded = fake_weight(self.graph.tensor(name), scales[name], axis=weight.axis)
            instead |= dict.fromkeys(weight.places, rounded)
        for bias in self._layout.biases:
            scale = self._range(bias.input).scale() * scales[bias.weight]
            instead[bias.place] = fake_bias(self.graph.tensor(bias.name), scale)
        return instead

    def _weight_scales(self) -> dict[str, Tensor]:
        scales = {
            name: weight_scale(self.graph.tensor(name), axis=weight.axis, limit=self._layout.limit)
            for name, weight in self._layout.weights.items()
        }
        for bias in self._layout.biases:
            scales[bias.weight] = scale_with_room(
                scales[bias.weight],
                self.graph.tensor(bias.name),
                input_scale=self._range(bias.input).scale(),
            )
        return scales


class ActivationRange(nn.Module):
    """The ends of a range, float32 scalars, learned or averaged. An end at 0 stays there."""

    low: Tensor
    high: Tensor

    def __init__(self, start: Range, *, learned: bool) -> None:
        super().__init__()
        self._bounds = start.bounds
        self._start = max(start.low, start.bounds[0]), min(start.high, start.bounds[1])
        self._learned = learned
        for name, value in zip(("low", "high"), self._start, strict=True):
            end = torch.tensor(value, dtype=torch.float32)
            if learned and value != 0:
                self.register_parameter(name, nn.Parameter(end))
            else:
                self.register_buffer(name, end)
        self.project()

    def forward(self, x: Tensor) -> Tensor:
        if self._learned:
            return learned_activation(x, self.low, self.high)
        if self.training:
            self._observe(x.detach())
        return fake_activation(x, self.low, self.high)

    @torch.no_grad()
    def scale(self) -> Tensor:
        return affine(self.low, self.high)[0]

    def ends(self) -> tuple[float, float]:
        return self.low.item(), self.high.item()

    @torch.no_grad()
    def project(self) -> None:
        """low ≤ 0 ≤ high, inside the bounds, no narrower than SMALLEST_SHARE of the start."""
        low, high = self._start
        self.low.clamp_(self._bounds[0], min(low * SMALLEST_SHARE, 0.0))
        self.high.clamp_(max(high * SMALLEST_SHARE, 0.0), self._bounds[1])

    @torch.no_grad()
    def _observe(self, x: Tensor) -> None:
        least, most = torch.aminmax(x)
        self.low.lerp_(least.clamp(*self._bounds), 1 - EMA_DECAY)
        self.high.lerp_(most.clamp(*self._bounds), 1 - EMA_DECAY)
        self.project()


def affine(low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
    """Scale and zero point of uint8 for a range: onnxruntime's `compute_scale_zp`.

    Args:
        low, high: float32 scalars, low ≤ 0 ≤ high, so that zero is exactly an integer.

    Returns:
        scale, float32 > 0; zero point, a float32 whole number in 0…255.
    """
    step = (high.double() - low.double()) / (LEVELS - 1)
    usable = step >= TINY
    zero = torch.where(usable, (-low.double() / step).round(), 0.0)
    return torch.where(usable, step, 1.0).float(), zero.float()


@torch.no_grad()
def weight_scale(weight: Tensor, *, axis: int | None, limit: int) -> Tensor:
    """max |w| / limit, float32: (C,) along `axis`, or a scalar; 1 where that is 0.

    Args:
        limit: 127, or 64 with `reduce_range`.
    """
    over = [a for a in range(weight.ndim) if axis is None or a != axis % weight.ndim]
    step = weight.abs().amax(over).double() / limit
    return torch.where(step >= TINY, step, 1.0).float()


@torch.no_grad()
def scale_with_room(scale: Tensor, bias: Tensor, *, input_scale: Tensor) -> Tensor:
    """The weight's scale, raised where the bias would not fit int32 at scale · input_scale.

    onnxruntime's `_adjust_weight_scale_for_int32_bias`; channels without weights have it.
    """
    largest = bias.detach().abs().reshape(-1)
    if not scale.ndim:
        largest = largest.max()
    product = input_scale.double() * scale.double()
    least = BIAS_ROOM * largest.double() / INT32_MAX
    raised = (scale.double() * (least / product)).float()
    return torch.where((product < least) & (product > 0), raised, scale)


def fake_activation(x: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """x rounded to the 256 values of the range; saturated values have no gradient."""
    rounded: Tensor = _FixedRounding.apply(x, low, high)  # type: ignore[no-untyped-call]
    return rounded


def learned_activation(x: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """`fake_activation`, with gradients for the ends of the range: see `_LearnedRounding`."""
    rounded: Tensor = _LearnedRounding.apply(x, low, high)  # type: ignore[no-untyped-call]
    return rounded


def fake_weight(weight: Tensor, scale: Tensor, *, axis: int | None) -> Tensor:
    """The weight rounded to int8 and back; the gradient passes."""
    along = _broadcast(scale, weight.ndim, axis)
    rounded = (weight.detach() / along).round_().clamp_(-128, 127).mul_(along)
    return _passed(weight, rounded)


def fake_bias(bias: Tensor, scale: Tensor) -> Tensor:
    """The bias rounded to int32 and back, in float64 as onnxruntime does; the gradient passes."""
    steps = (bias.detach().double() / scale.double()).round_().clamp_(-INT32_MAX - 1, INT32_MAX)
    return _passed(bias, steps.float() * scale)


def sqnr_db(reference: Array, found: Array) -> float:
    """10 · log10(Σ reference² / Σ (reference - found)²); infinite if they are equal."""
    signal = np.square(reference, dtype=np.float64).sum()
    noise = np.square(np.subtract(reference, found, dtype=np.float64)).sum()
    return math.inf if noise == 0 else float(10 * np.log10(signal / noise))


class _FixedRounding(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, low: Tensor, high: Tensor) -> Tensor:
        scale, zero = _numbers(low, high)
        ctx.save_for_backward(x)
        ctx.edges = _edges(scale, zero)
        return _round(x, scale, zero)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        (x,) = ctx.saved_tensors
        return _ATEN.hardtanh_backward(gradient, x, *ctx.edges), None, None


class _LearnedRounding(torch.autograd.Function):
    """With s = (high - low) / 255: ∂x̂/∂s = round(x/s) - x/s inside; ∂x̂/∂end = 1 beyond it.

    LSQ scales the gradient of s by g = 1 / √(N · 255), N values a sample. A step in `high` moves s
    by a 255th of it, and so does its gradient, hence 255² · g here for the same movement of s.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, low: Tensor, high: Tensor) -> Tensor:
        scale, zero = _numbers(low, high)
        rounded = _round(x, scale, zero)
        ctx.save_for_backward(x, rounded)
        ctx.scale, ctx.edges = scale, _edges(scale, zero)
        return rounded

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None]:
        x, rounded = ctx.saved_tensors
        least, most = ctx.edges
        inside = _ATEN.hardtanh_backward(gradient, x, least, most)
        of_span = (rounded - x).mul_(inside).sum() / ctx.scale / (LEVELS - 1)
        factor = (LEVELS - 1) ** 2 / math.sqrt(x[0].numel() * (LEVELS - 1))
        low = high = None
        if ctx.needs_input_grad[1]:
            low = factor * (_ATEN.threshold_backward(gradient, -x, -least).sum() - of_span)
        if ctx.needs_input_grad[2]:
            high = factor * (_ATEN.threshold_backward(gradient, x, most).sum() + of_span)
        return inside, low, high


def _numbers(low: Tensor, high: Tensor) -> tuple[float, float]:
    """`affine` as Python numbers: kernels with scalars are several times those with tensors."""
    scale, zero = affine(low, high)
    return scale.item(), zero.item()


def _round(x: Tensor, scale: float, zero: float) -> Tensor:
    """Whole numbers are exact in float32: saturating round(x/s) + z to 0…255, less z, is this."""
    return (x / scale).round_().clamp_(-zero, LEVELS - 1 - zero).mul_(scale)


def _edges(scale: float, zero: float) -> tuple[float, float]:
    """Between them lies all that rounds to an integer of the range."""
    return (-zero - 0.5) * scale, (LEVELS - 0.5 - zero) * scale


def _passed(value: Tensor, rounded: Tensor) -> Tensor:
    """`rounded`, with the gradient of `value`."""
    return rounded + (value - value.detach())


def _broadcast(scale: Tensor, rank: int, axis: int | None) -> Tensor:
    if axis is None:
        return scale
    return scale.reshape([-1 if a == axis % rank else 1 for a in range(rank)])
