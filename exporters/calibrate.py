"""The range of every activation, from real samples: what the int8 writer turns into scales.

Two passes, both of them in steps, so memory does not grow with the number of samples. The first
finds the exact minima and maxima, inside the graph. The second, for every calibrator but `minmax`,
counts the values in histograms over exactly those ranges; a calibrator then gives up the ends of
the range for finer steps in its middle:

    minmax      the whole range
    percentile  all but the outermost 0.0005 % of the values at either end
    entropy     the range whose 256 levels keep most of the distribution (Migacz 2017)
    mse         the range with the least expected squared error of quantization

onnxruntime's calibrators are not used: its minimum leaves NaN out, its histograms grow with the
data and give min-max for entropy at their defaults, and there is no MSE search.
Texts go through one at a time, at their own length, so that no range is one of padding.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import onnx
import onnxruntime as ort
from onnx import ModelProto, TensorProto

from ..pipeline.errors import ExportError
from .feeds import Entry, as_input, entry_of, feed, fitted, is_text, is_tokens
from .graph import consumers
from .sessions import open_session, pad_batch
from .stamp import write_model

Array = np.ndarray[Any, Any]
Calibrator = Literal["minmax", "percentile", "entropy", "mse"]
Range = tuple[float, float]

LEVELS = 256  # of uint8
STEP = 16  # samples at a time, fewer where their activations are large
INPUT_BYTES = 2 * 2**20  # of samples in a step of the first pass
STEP_BYTES = 256 * 2**20  # of activations held at once in the second pass
BINS = 8192  # 32 to a level, so that a range of a tenth still has 3 to each of its levels
PERCENTILE = 99.999  # onnxruntime's default, half of the rest at either end
ENTROPY_BINS = 2048  # onnxruntime's 128 leave a single candidate: min-max
ENTROPY_CANDIDATES = 128
SMOOTHING = 1e-4  # probability of a level that quantization emptied (mxnet, onnxruntime)
# Ends that the MSE search tries, as fractions of the exact one: 5 % apart, down to a twentieth.
FRACTIONS = 0.95 ** np.arange(60)


class Samples(Protocol):
    """Calibration samples, (N, C, H, W) float32 or (N, K, S) int64: an array, or what makes one
    slice at a time."""

    def __len__(self) -> int: ...

    def __getitem__(self, part: slice, /) -> Array: ...


def ranges_of(
    model: ModelProto, samples: Samples, *, calibrator: Calibrator, threads: int
) -> dict[str, Range]:
    """(low, high) of every float activation, by tensor name; low ≤ 0 ≤ high, because uint8 has to
    represent zero exactly.

    A tensor that only a Relu or a Clip reads keeps its min-max range: it is quantized after that.
    Of a text graph, what is -infinity where texts are masked has no range and is left out.

    Args:
        model: float; one input, or one for each row of the tokens.
        samples: N ≥ 1, real, from the training set.

    Raises:
        ExportError: no samples, samples that are not finite or all the same, activations that are
            not finite, or inputs that are not those of the samples.
    """
    if len(samples) == 0:
        raise ExportError("no calibration samples; set data.calibration to 64 or more")
    inferred = onnx.shape_inference.infer_shapes(model)
    names = activations(inferred)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "calibration.onnx")
        write_model(_with_extremes(inferred, names), path)
        session = open_session(path, threads=threads, optimize=False)
        ranges = _min_max(session, names, samples)
        if is_text(model):
            ranges = {name: found for name, found in ranges.items() if found[0] != -np.inf}
        _refuse_infinite(ranges)
        if calibrator == "minmax":
            return ranges
        names = [name for name in names if name in ranges]
        wanted = [name for name in _quantized(inferred, names) if ranges[name][0] < ranges[name][1]]
        write_model(_with_outputs(inferred, wanted), path)
        session = open_session(path, threads=threads, optimize=False)
        counts = _histograms(session, ranges, wanted, samples)
    choose = {"percentile": percentile_range, "entropy": entropy_range, "mse": mse_range}
    found = {name: choose[calibrator](counts[name], *ranges[name]) for name in wanted}
    return {**ranges, **found}


def scale_and_zero_point(low: float, high: float) -> tuple[np.float32, np.uint8]:
    """uint8 parameters of a range, x ≈ scale · (q - zero_point), as onnxruntime.quantization
    computes them: the range is widened to hold zero, the scale rounded to float32, and an empty
    range has scale 1.
    """
    low32, high32 = np.float32(min(low, 0.0)), np.float32(max(high, 0.0))
    scale = (np.float64(high32) - np.float64(low32)) / (LEVELS - 1)
    if scale < np.finfo(np.float32).tiny:
        return np.float32(1.0), np.uint8(0)
    return np.float32(scale), np.uint8(np.round(-np.float64(low32) / scale))


def percentile_range(
    counts: Array, low: float, high: float, *, percentile: float = PERCENTILE
) -> Range:
    """The narrowest range of whole bins outside of which at most (100 - percentile) / 2 percent
    of the values lie at either end.

    Args:
        counts: (B,) values in each of B equal bins over [low, high], low ≤ 0 ≤ high.
    """
    cut = (100.0 - percentile) / 200.0 * counts.sum()
    edges = np.linspace(low, high, len(counts) + 1)
    below = np.concatenate([[0.0], np.cumsum(counts)])
    first = int(np.flatnonzero(below <= cut)[-1])
    last = int(np.flatnonzero(counts.sum() - below <= cut)[0])
    return min(float(edges[first]), 0.0), max(float(edges[last]), 0.0)


def entropy_range(counts: Array, low: float, high: float) -> Range:
    """The range with the least Kullback-Leibler divergence from its own 256 levels.

    Both ends move in together, in 128 steps. P is what the range holds, with what lies outside
    added to its first and last bin; Q is the same without the outside, averaged over the bins of
    each level that hold something (Migacz 2017, "8-bit inference with TensorRT"). The bin of zero
    counts as its larger neighbour: zero is exact in every range, so its many values after a ReLU
    say nothing about the others (NVIDIA's pytorch-quantization does the same).

    Args:
        counts: as in `percentile_range`; B a multiple of 2,048.
    """
    coarse = counts.reshape(ENTROPY_BINS, -1).sum(axis=1)
    width = (high - low) / ENTROPY_BINS
    zero = min(int(-low / width), ENTROPY_BINS - 1)
    neighbours = coarse[max(zero - 1, 0) : zero + 2].copy()
    neighbours[min(zero, 1)] = 0
    coarse[zero] = min(coarse[zero], neighbours.max())
    best, divergence = (low, high), np.inf
    for numerator in range(ENTROPY_CANDIDATES, 0, -1):
        fraction = numerator / ENTROPY_CANDIDATES
        first = round(zero * (1 - fraction))
        last = round(zero + (ENTROPY_BINS - zero) * fraction)
        if last - first < LEVELS:
            break
        found = _divergence(coarse, first, last)
        if found < divergence:
            divergence, best = found, (low + first * width, low + last * width)
    return min(best[0], 0.0), max(best[1], 0.0)


def mse_range(counts: Array, low: float, high: float) -> Range:
    """The range with the least expected squared error of rounding to 256 levels and of clipping.

    Every pair of ends in FRACTIONS of the exact ones is tried; values count at the centre of their
    bin. Equal errors: the wider range.

    Args:
        counts: as in `percentile_range`.
    """
    centres = low + (np.arange(len(counts)) + 0.5) * (high - low) / len(counts)
    powers = np.stack([counts, counts * centres, counts * centres**2])
    moments = np.concatenate([np.zeros((3, 1)), np.cumsum(powers, axis=1)], axis=1)
    lows = low * FRACTIONS if low < 0 else [0.0]
    highs = high * FRACTIONS if high > 0 else [0.0]
    candidates = [(float(a), float(b)) for a in lows for b in highs]
    return min(candidates, key=lambda ends: _squared_error(moments, centres, *ends))


def activations(model: ModelProto) -> list[str]:
    """Float tensors of the main graph that are no constants, in graph order.

    Args:
        model: with inferred shapes.
    """
    constants = {tensor.name for tensor in model.graph.initializer}
    infos = (*model.graph.input, *model.graph.value_info, *model.graph.output)
    floats = {
        info.name for info in infos if info.type.tensor_type.elem_type == TensorProto.FLOAT
    } - constants
    written = [name for node in model.graph.node for name in node.output]
    ordered = [*(value.name for value in model.graph.input), *written]
    return [name for name in dict.fromkeys(ordered) if name in floats]


def steps(samples: Samples, size: int, entry: Entry | None = None) -> Iterator[Array]:
    """The samples in batches: float32 images, `size` of them, or int64 texts, one by one at their
    own length. Where `entry` fixes the batch, of that size, the last one filled up by repeating
    its last sample, which changes no range."""
    size = (entry and entry.batch) or size
    for start in range(0, len(samples), size):
        batch = as_input(samples[start : start + size])
        if entry is None:
            yield batch
        elif entry.batch is not None:
            yield fitted(pad_batch(batch, size), entry)
        elif is_tokens(batch):
            yield from (fitted(batch[row : row + 1], entry) for row in range(len(batch)))
        else:
            yield batch


def _quantized(model: ModelProto, names: list[str]) -> list[str]:
    """Without the tensors that a Relu or Clip alone reads."""
    readers = consumers(model)
    outputs = {value.name for value in model.graph.output}
    return [
        name
        for name in names
        if name in outputs
        or [node.op_type in ("Relu", "Clip") for node in readers.get(name, [])] != [True]
    ]


def _with_extremes(model: ModelProto, names: list[str]) -> ModelProto:
    """Outputs instead: minimum and maximum of each tensor, scalars."""
    result = ModelProto()
    result.CopyFrom(model)
    del result.graph.output[:]
    for index, name in enumerate(names):
        for op in ("ReduceMin", "ReduceMax"):
            output = f"{op}#{index}"
            result.graph.node.append(onnx.helper.make_node(op, [name], [output], keepdims=0))
            result.graph.output.append(
                onnx.helper.make_tensor_value_info(output, TensorProto.FLOAT, [])
            )
    return result


def _with_outputs(model: ModelProto, names: list[str]) -> ModelProto:
    """Outputs instead: the tensors themselves. An input passes through Identity."""
    result = ModelProto()
    result.CopyFrom(model)
    del result.graph.output[:]
    inputs = {value.name for value in model.graph.input}
    for index, name in enumerate(names):
        output = name
        if name in inputs:
            output = f"Identity#{index}"
            result.graph.node.append(onnx.helper.make_node("Identity", [name], [output]))
        result.graph.output.append(
            onnx.helper.make_tensor_value_info(output, TensorProto.FLOAT, None)
        )
    return result


def _min_max(session: ort.InferenceSession, names: list[str], samples: Samples) -> dict[str, Range]:
    entry = entry_of(session)
    lows, highs = np.zeros(len(names)), np.zeros(len(names))
    first: Array | None = None
    varied = False
    for batch in steps(samples, _few(samples), entry):
        if not np.isfinite(batch).all():
            raise ExportError(
                "calibration: the samples are not finite; look for NaN or infinity in the images "
                "and in preprocess.mean and std"
            )
        first = batch[:1] if first is None else first
        varied = varied or batch.shape[1:] != first.shape[1:] or bool((batch != first).any())
        extremes = np.array(session.run(None, feed(batch, entry.names)), np.float64).reshape(-1, 2)
        # NaN stays NaN, and is refused below
        lows, highs = np.minimum(lows, extremes[:, 0]), np.maximum(highs, extremes[:, 1])
    _refuse_constant(first, varied, count=len(samples))
    return {n: (float(a), float(b)) for n, a, b in zip(names, lows, highs, strict=True)}


def _refuse_infinite(ranges: dict[str, Range]) -> None:
    for name, ends in ranges.items():
        if not np.isfinite(ends).all():
            raise ExportError(
                f"calibration: the values of {name!r} are not finite, so they have no range; look "
                "for NaN or infinity in the weights"
            )


def _refuse_constant(first: Array | None, varied: bool, *, count: int) -> None:
    """One value everywhere, or the same sample again and again, has no distribution."""
    assert first is not None
    if not varied and (count > 1 or float(first.min()) == float(first.max())):
        raise ExportError(
            f"calibration: all {count} samples are the same; expected such as the net sees them in "
            "use. Check the paths under data.train, and preprocess or tokenize"
        )


def _histograms(
    session: ort.InferenceSession, ranges: dict[str, Range], names: list[str], samples: Samples
) -> dict[str, Array]:
    """Counts of each tensor's values in BINS equal bins over its range, float64."""
    entry = entry_of(session)
    counts = {name: np.zeros(BINS) for name in names}
    for batch in steps(samples, _affordable(session, entry, samples), entry):
        found = session.run(None, feed(batch, entry.names))
        for name, values in zip(names, found, strict=True):
            low, high = ranges[name]
            place = (values.ravel() - np.float32(low)) * np.float32(BINS / (high - low))
            np.clip(place, 0, BINS - 1, out=place)
            counts[name] += np.bincount(place.astype(np.int16), minlength=BINS)
    return counts


def _few(samples: Samples) -> int:
    """STEP, or fewer where samples are large: every activation is held until its extremes are
    taken, which are up to 200 times the input."""
    one = as_input(samples[0:1])
    return max(1, min(STEP, INPUT_BYTES // max(1, one.nbytes)))


def _affordable(session: ort.InferenceSession, entry: Entry, samples: Samples) -> int:
    if entry.batch is not None:
        return entry.batch
    one = session.run(None, feed(fitted(as_input(samples[0:1]), entry), entry.names))
    size = sum(int(values.nbytes) for values in one)
    return max(1, min(STEP, STEP_BYTES // max(1, size)))


def _divergence(counts: Array, first: int, last: int) -> float:
    inside = counts[first:last]
    reference = inside.astype(np.float64)
    reference[0] += counts[:first].sum()
    reference[-1] += counts[last:].sum()
    held = reference > 0
    level = np.arange(last - first) * LEVELS // (last - first)
    totals = np.bincount(level, inside, LEVELS)
    bins = np.bincount(level, held, LEVELS)
    averaged = np.where(held, totals[level] / np.maximum(bins[level], 1), 0.0)
    if not averaged.any():
        return float(np.inf)
    p, q = _smooth(reference), _smooth(averaged)
    return float((p * np.log(p / q)).sum())


def _smooth(counts: Array) -> Array:
    """Probabilities, none of them 0."""
    share = counts / counts.sum()
    share = np.where(share > 0, share, SMOOTHING)
    smoothed: Array = share / share.sum()
    return smoothed


def _squared_error(moments: Array, centres: Array, low: float, high: float) -> float:
    """Σ count · (x - x̂)², from the cumulative zeroth, first and second moments."""
    scale, zero_point = scale_and_zero_point(low, high)
    levels = float(scale) * (np.arange(LEVELS) - int(zero_point))
    borders = np.searchsorted(centres, (levels[1:] + levels[:-1]) / 2)
    cells = np.diff(moments[:, np.concatenate([[0], borders, [len(centres)]])], axis=1)
    return float((cells[2] - 2 * levels * cells[1] + levels**2 * cells[0]).sum())
