"""ONNX operators as torch functions, with the meaning they have in opsets 13 to 20.

Each takes the node's inputs in order (None where one is left out) and its attributes by their ONNX
names, so a signature is what is supported of an operator. Shapes, axes and other whole numbers are
int64 tensors on the CPU; that reading them waits for no device is the caller's doing. Differs from
onnxruntime by rounding alone. Semantics: github.com/onnx/onnx/blob/main/docs/Operators.md.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial, reduce

import numpy as np
import torch
import torch.nn.functional as F
from onnx import TensorProto
from torch import Tensor

from .torch_windows import average_pool, conv, max_pool

Ints = Tensor | Sequence[int]  # an input since its opset, an attribute before
Op = Callable[..., Tensor | tuple[Tensor, ...]]

_DTYPES: dict[int, torch.dtype] = {
    TensorProto.FLOAT: torch.float32,
    TensorProto.DOUBLE: torch.float64,
    TensorProto.FLOAT16: torch.float16,
    TensorProto.BFLOAT16: torch.bfloat16,
    TensorProto.INT64: torch.int64,
    TensorProto.INT32: torch.int32,
    TensorProto.INT8: torch.int8,
    TensorProto.UINT8: torch.uint8,
    TensorProto.BOOL: torch.bool,
}
# Attributes that change nothing here: the type of an inner sum, float8, randomness in training.
IGNORED = {
    "Cast": {"saturate"},
    "Dropout": {"seed"},
    "LayerNormalization": {"stash_type"},
    "MaxPool": {"storage_order"},  # of its second output
}
_PAD_MODES = {"constant": "constant", "reflect": "reflect", "edge": "replicate", "wrap": "circular"}


def gemm(
    a: Tensor,
    b: Tensor,
    c: Tensor | None = None,
    *,
    alpha: float = 1.0,
    beta: float = 1.0,
    transA: int = 0,
    transB: int = 0,
) -> Tensor:
    """alpha · A·B + beta · C, (M, N)."""
    product = alpha * ((a.T if transA else a) @ (b.T if transB else b))
    return product if c is None else product + beta * c


def clip(x: Tensor, low: Tensor | None = None, high: Tensor | None = None) -> Tensor:
    return x.clamp(None if low is None else low.item(), None if high is None else high.item())


def divide(a: Tensor, b: Tensor) -> Tensor:
    """Whole numbers are divided towards zero."""
    return torch.div(a, b, rounding_mode=None if a.is_floating_point() else "trunc")


def hard_sigmoid(x: Tensor, *, alpha: float = 0.2, beta: float = 0.5) -> Tensor:
    return (alpha * x + beta).clamp(0.0, 1.0)


def gelu(x: Tensor, *, approximate: str = "none") -> Tensor:
    return F.gelu(x, approximate=approximate)


def softmax(x: Tensor, *, axis: int = -1) -> Tensor:
    return x.softmax(axis)


def log_softmax(x: Tensor, *, axis: int = -1) -> Tensor:
    return x.log_softmax(axis)


def leaky_relu(x: Tensor, *, alpha: float = 0.01) -> Tensor:
    return F.leaky_relu(x, alpha)


def elu(x: Tensor, *, alpha: float = 1.0) -> Tensor:
    return F.elu(x, alpha)


def prelu(x: Tensor, slope: Tensor) -> Tensor:
    return torch.where(x < 0, slope * x, x)


def layer_normalization(
    x: Tensor,
    scale: Tensor,
    bias: Tensor | None = None,
    *,
    axis: int = -1,
    epsilon: float = 1e-5,
) -> Tensor:
    """Over the axes from `axis` on."""
    return F.layer_norm(x, x.shape[axis:], scale, bias, epsilon)


def reduce_with(
    function: Callable[..., Tensor],
    x: Tensor,
    axes: Ints | None = None,
    *,
    keepdims: int = 1,
    noop_with_empty_axes: int = 0,
) -> Tensor:
    over = [] if axes is None else ints(axes)
    if not over and noop_with_empty_axes:
        return x
    return function(x, dim=over or list(range(x.ndim)), keepdim=bool(keepdims))


def global_average_pool(x: Tensor) -> Tensor:
    return x.mean(list(range(2, x.ndim)), keepdim=True)


def global_max_pool(x: Tensor) -> Tensor:
    return x.amax(list(range(2, x.ndim)), keepdim=True)


def flatten(x: Tensor, *, axis: int = 1) -> Tensor:
    """Always two axes; those before `axis` become the first."""
    first = math.prod(x.shape[:axis])
    return x.reshape(first, -1) if first else x.reshape(0, math.prod(x.shape[axis:]))


def reshape(x: Tensor, shape: Ints, *, allowzero: int = 0) -> Tensor:
    """0 keeps an axis, -1 is what is left over."""
    wanted = ints(shape)
    if not allowzero:
        wanted = [size or x.shape[axis] for axis, size in enumerate(wanted)]
    return x.reshape(wanted)


def transpose(x: Tensor, *, perm: Sequence[int] = ()) -> Tensor:
    return x.permute(*(perm or range(x.ndim - 1, -1, -1)))


def squeeze(x: Tensor, axes: Ints | None = None) -> Tensor:
    return x.squeeze() if axes is None else x.squeeze(tuple(ints(axes)))


def unsqueeze(x: Tensor, axes: Ints) -> Tensor:
    """Axes are those of the result."""
    where = ints(axes)
    rank = x.ndim + len(where)
    for axis in sorted(axis % rank for axis in where):
        x = x.unsqueeze(axis)
    return x


def slice_(
    x: Tensor, starts: Ints, ends: Ints, axes: Ints | None = None, steps: Ints | None = None
) -> Tensor:
    begin, end = ints(starts), ints(ends)
    where = list(range(len(begin))) if axes is None else ints(axes)
    by = [1] * len(begin) if steps is None else ints(steps)
    for axis, *part in zip(where, begin, end, by, strict=True):
        start, stop, step = slice(*part).indices(x.shape[axis])
        if step > 0:
            x = x.movedim(axis, 0)[start:stop:step].movedim(0, axis)
        else:
            rows = torch.arange(start, stop, step, device=x.device)
            x = x.index_select(axis, rows)
    return x


def pad(
    x: Tensor,
    pads: Ints,
    value: Tensor | None = None,
    axes: Ints | None = None,
    *,
    mode: str = "constant",
) -> Tensor:
    """Begins of all axes, then their ends."""
    given = ints(pads)
    where = list(range(x.ndim)) if axes is None else [a % x.ndim for a in ints(axes)]
    around = [(0, 0)] * x.ndim
    for axis, begin, end in zip(where, given, given[len(where) :], strict=False):
        around[axis] = (begin, end)
    while len(around) > 1 and around[0] == (0, 0):  # torch's other modes know only inner axes
        around = around[1:]
    flat = [size for pair in reversed(around) for size in pair]
    if mode == "constant":
        return F.pad(x, flat, value=0.0 if value is None else value.item())
    return F.pad(x, flat, mode=_PAD_MODES[mode])


def concat(*parts: Tensor, axis: int) -> Tensor:
    return torch.cat(parts, axis)


def split(
    x: Tensor, sizes: Ints | None = None, *, axis: int = 0, num_outputs: int = 0
) -> tuple[Tensor, ...]:
    """Into the sizes, or into equal parts of which the last may be smaller."""
    if sizes is not None:
        return torch.split_with_sizes(x, ints(sizes), axis)
    return torch.split(x, -(-x.shape[axis] // num_outputs), axis)


def gather(x: Tensor, indices: Tensor, *, axis: int = 0) -> Tensor:
    """The axis becomes the axes of the indices; negative ones count from the end."""
    axis %= x.ndim
    rows = indices.to(x.device)
    rows = torch.where(rows < 0, rows + x.shape[axis], rows)
    taken = x.index_select(axis, rows.reshape(-1))
    return taken.reshape(*x.shape[:axis], *rows.shape, *x.shape[axis + 1 :])


def expand(x: Tensor, shape: Ints) -> Tensor:
    """Both ways, as in numpy."""
    return x.expand(np.broadcast_shapes(x.shape, tuple(ints(shape))))


def cast(x: Tensor, *, to: int) -> Tensor:
    return x.to(_DTYPES[to])


def shape(x: Tensor, *, start: int = 0, end: int | None = None) -> Tensor:
    return torch.tensor(x.shape[start:end], dtype=torch.int64)


def constant_of_shape(size: Tensor, *, value: Tensor | None = None) -> Tensor:
    fill = torch.zeros(1) if value is None else value
    return fill.reshape(()).expand(ints(size)).clone()


def identity(x: Tensor, *_: Tensor | None) -> Tensor:
    """Also Dropout, which does nothing once a net is trained."""
    return x


def ints(values: Ints) -> list[int]:
    """Whole numbers as a list, wherever the opset has put them."""
    listed: list[int] = values.tolist() if isinstance(values, Tensor) else list(values)
    return listed


def _fold(function: Callable[[Tensor, Tensor], Tensor]) -> Callable[..., Tensor]:
    """An operator of any number of inputs from one of two."""
    return lambda *parts: reduce(function, parts)


OPS: dict[str, Op] = {
    "Abs": torch.abs,
    "Add": torch.add,
    "And": torch.logical_and,
    "AveragePool": average_pool,
    "Cast": cast,
    "Clip": clip,
    "Concat": concat,
    "ConstantOfShape": constant_of_shape,
    "Conv": conv,
    "Div": divide,
    "Dropout": identity,
    "Elu": elu,
    "Equal": torch.eq,
    "Erf": torch.erf,
    "Exp": torch.exp,
    "Expand": expand,
    "Flatten": flatten,
    "Gather": gather,
    "Gelu": gelu,
    "Gemm": gemm,
    "GlobalAveragePool": global_average_pool,
    "GlobalMaxPool": global_max_pool,
    "Greater": torch.gt,
    "HardSigmoid": hard_sigmoid,
    "HardSwish": F.hardswish,
    "Identity": identity,
    "LayerNormalization": layer_normalization,
    "LeakyRelu": leaky_relu,
    "Less": torch.lt,
    "Log": torch.log,
    "LogSoftmax": log_softmax,
    "MatMul": torch.matmul,
    "Max": _fold(torch.maximum),
    "MaxPool": max_pool,
    "Min": _fold(torch.minimum),
    "Mul": torch.mul,
    "Neg": torch.neg,
    "Not": torch.logical_not,
    "PRelu": prelu,
    "Pad": pad,
    "Pow": torch.pow,
    "Reciprocal": torch.reciprocal,
    "ReduceMax": partial(reduce_with, torch.amax),
    "ReduceMean": partial(reduce_with, torch.mean),
    "ReduceSum": partial(reduce_with, torch.sum),
    "Relu": torch.relu,
    "Reshape": reshape,
    "Shape": shape,
    "Sigmoid": torch.sigmoid,
    "Slice": slice_,
    "Softmax": softmax,
    "Softplus": F.softplus,
    "Split": split,
    "Sqrt": torch.sqrt,
    "Squeeze": squeeze,
    "Sub": torch.sub,
    "Tanh": torch.tanh,
    "Transpose": transpose,
    "Unsqueeze": unsqueeze,
    "Where": torch.where,
}
