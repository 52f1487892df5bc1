"""The QAT stage: int8 trained with its rounding in the loop, from where calibration left it.

The float graph is trained, and the ranges that were learned go to the same writer of Q and DQ that
calibration uses: there is one way to an int8 file.
"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from ...exporters.equalize import equalize
from ...exporters.graph import read_model
from ...exporters.int8 import encoding_for, quantize
from ..recipe import ExportSpec, QuantizeSpec
from ..stage import Context
from .ptq import always_float
from .qat import train_qat
from .result import MODEL, Prepared, leave, open_source


def quantize_aware(
    float_artifact: Path,
    data_artifact: Path,
    spec: QuantizeSpec,
    *,
    ptq_artifact: Path,
    context: Context,
    export: ExportSpec,
    memory_budget_bytes: int,
) -> dict[str, Any]:
    """The stage. Leaves the int8 file in `context.scratch`.

    Args:
        ptq_artifact: folder of the int8 stage by calibration: where training starts.

    Returns:
        What `result.leave` says, and the record of the training run.

    Raises:
        ExportError: an operator that training cannot run, or a range that did not reach the file.
        MeasurementError: a loss is not finite.
    """
    assert spec.qat is not None
    source = open_source(
        float_artifact, data_artifact, context=context, memory_budget_bytes=memory_budget_bytes
    )
    floating = equalize(source.model) if spec.equalize else source.model
    result = train_qat(
        floating, read_model(ptq_artifact / MODEL), source.data, spec.qat, context=context
    )
    encoding = encoding_for(spec.targets, model=source.model)
    quantized = quantize(
        result.model,
        Prepared(source.data),
        encoding=encoding,
        calibrator=spec.calibrator,
        threads=context.threads,
        ranges=result.ranges,
        keep_float=always_float(floating, spec),
    )
    found = leave(source, quantized, encoding=encoding, export=export, context=context)
    return {**found, "training": asdict(result.training)}
