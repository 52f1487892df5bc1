"""The int8 stage: `model.onnx` of the export stage, calibrated on train, → int8 `model.onnx`.

The targets decide the encoding, so that every one of them computes the same integers.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from onnx import ModelProto

from ...exporters.calibrate import Range, ranges_of
from ...exporters.equalize import equalize
from ...exporters.graph import matching_nodes
from ...exporters.int8 import Quantized, encoding_for, quantize
from ...exporters.sample_doubts import channel_statistics, doubt_about_samples
from ..recipe import ExportSpec, QuantizeSpec, Tokenization
from ..stage import Context
from .result import Prepared, Source, leave, open_source


def quantize_static(
    float_artifact: Path,
    data_artifact: Path,
    spec: QuantizeSpec,
    *,
    context: Context,
    export: ExportSpec,
    memory_budget_bytes: int,
) -> dict[str, Any]:
    """The stage. Leaves the int8 file in `context.scratch`, with the float file's metadata.

    Args:
        float_artifact: folder of the export stage.
        data_artifact: folder of the data stage; its calibration samples (of train) are read, and
            validation, on which the cost is measured.

    Returns:
        What `result.leave` says, calibrator, kept_float.

    Raises:
        ExportError: the graph cannot be quantized, or `keep_float` names no node of it.
        IntegrityError: the result is not int8 throughout.
    """
    source = open_source(
        float_artifact, data_artifact, context=context, memory_budget_bytes=memory_budget_bytes
    )
    context.events.progress(0, 2, f"calibrating on {len(source.data.calibration)} samples")
    _note_doubts(source, context)
    calibrated = calibrate(source, spec, threads=context.threads)
    quantized = write(calibrated, source, spec, threads=context.threads)
    context.events.progress(1, 2, "measuring on validation")
    encoding = encoding_for(spec.targets, model=source.model)
    found = leave(source, quantized, encoding=encoding, export=export, context=context)
    context.events.progress(2, 2)
    return {
        **found,
        "calibrator": spec.calibrator,
        "kept_float": sorted(always_float(calibrated.model, spec)),
    }


@dataclass(frozen=True)
class Calibrated:
    """The float graph as it will be rounded, and the range of each of its activations."""

    model: ModelProto
    ranges: dict[str, Range]


def calibrate(source: Source, spec: QuantizeSpec, *, threads: int) -> Calibrated:
    model = equalize(source.model) if spec.equalize else source.model
    samples = Prepared(source.data)
    ranges = ranges_of(model, samples, calibrator=spec.calibrator, threads=threads)
    return Calibrated(model, ranges)


def write(
    calibrated: Calibrated,
    source: Source,
    spec: QuantizeSpec,
    *,
    keep_float: Collection[str] = (),
    threads: int,
) -> Quantized:
    """The int8 graph of a calibrated one, as `spec` wishes.

    Args:
        keep_float: names of nodes that stay float, besides those that `spec` names.
    """
    return quantize(
        calibrated.model,
        Prepared(source.data),
        encoding=encoding_for(spec.targets, model=calibrated.model),
        threads=threads,
        keep_float={*keep_float, *always_float(calibrated.model, spec)},
        ranges=calibrated.ranges,
        correct_bias=spec.correct_bias,
    )


def _note_doubts(source: Source, context: Context) -> None:
    """Calibration samples that are unlike the training set. Of unscaled images nothing is known."""
    how = source.data.preprocess
    if isinstance(how, Tokenization) or all(deviation == 1 for deviation in how.std or ()):
        return
    doubt = doubt_about_samples(*channel_statistics(Prepared(source.data)))
    if doubt is not None:
        context.events.note(f"WARNING: calibration: {doubt}")


def always_float(model: ModelProto, spec: QuantizeSpec) -> frozenset[str]:
    """Nodes that the recipe keeps in float. Raises ExportError for names that match none."""
    return matching_nodes(model, spec.keep_float, where="quantize.keep_float")
