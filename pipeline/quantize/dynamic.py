"""The stage of dynamic int8: weights rounded once, activations measured anew for every input.

Nothing is calibrated, so no text can leave the range; each layer pays for finding its own.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ...exporters.dynamic_int8 import quantize_dynamically
from ...exporters.int8 import encoding_for
from ..recipe import ExportSpec, QuantizeSpec
from ..stage import Context
from .result import leave, open_source


def quantize_dynamic(
    float_artifact: Path,
    data_artifact: Path,
    spec: QuantizeSpec,
    *,
    context: Context,
    export: ExportSpec,
    memory_budget_bytes: int,
) -> dict[str, Any]:
    """The stage. Leaves the int8 file in `context.scratch`, with the float file's metadata.

    Returns:
        What `result.leave` says.

    Raises:
        ExportError: the graph has nothing to quantize.
    """
    source = open_source(
        float_artifact, data_artifact, context=context, memory_budget_bytes=memory_budget_bytes
    )
    context.events.progress(0, 1, "rounding weights, measuring on validation")
    encoding = encoding_for(spec.targets, model=source.model)
    quantized = quantize_dynamically(source.model, encoding=encoding)
    found = leave(source, quantized, encoding=encoding, export=export, context=context)
    context.events.progress(1, 1)
    return found
