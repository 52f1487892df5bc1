"""The int8 stage: `model.onnx` of the export stage, calibrated on train, → int8 `model.onnx`.

The targets decide the encoding, so that every one of them computes the same integers. Does not
measure accuracy; `verify` does, on samples that calibration has not seen.
"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from ...exporters.audit import audit
from ...exporters.graph import read_model
from ...exporters.int8 import encoding_for, quantize
from ...exporters.stamp import stamp, write_model
from ..data.dataset import Data, open_data
from ..data.preprocess import to_input
from ..recipe import ExportSpec, QuantizeSpec
from ..stage import Context

Array = np.ndarray[Any, Any]

MODEL = "model.onnx"


def quantize_static(
    float_artifact: Path,
    data_artifact: Path,
    spec: QuantizeSpec,
    *,
    context: Context,
    export: ExportSpec,
) -> dict[str, Any]:
    """The stage. Leaves the int8 file in `context.scratch`, with the float file's metadata.

    Args:
        float_artifact: folder of the export stage.
        data_artifact: folder of the data stage; its calibration samples (of train) are read.

    Returns:
        bytes, float_bytes, opset, ir, parameters, multiply_adds, initializer_bytes, ops,
        encoding (with its reason), calibrator, calibration_samples, counts.

    Raises:
        ExportError: the graph cannot be quantized.
        IntegrityError: the result is not int8 throughout.
    """
    source = float_artifact / MODEL
    floating = read_model(source)
    data = open_data(data_artifact, memory_budget_bytes=0)
    encoding = encoding_for(spec.targets)
    context.events.progress(0, 1, f"calibrating on {len(data.calibration)} samples")
    quantized = quantize(
        floating,
        _Prepared(data),
        encoding=encoding,
        calibrator=spec.calibrator,
        threads=context.threads,
    )
    path = context.scratch / MODEL
    metadata = {entry.key: entry.value for entry in floating.metadata_props}
    final = stamp(quantized.model, min_runtime=export.min_runtime, metadata=metadata)
    write_model(final, path)
    context.events.progress(1, 1)
    return {
        **audit(final),
        "bytes": path.stat().st_size,
        "float_bytes": source.stat().st_size,
        "encoding": asdict(encoding),
        "calibrator": spec.calibrator,
        "calibration_samples": len(data.calibration),
        "counts": quantized.counts,
    }


class _Prepared:
    """Calibration samples, read and preprocessed as they are asked for: memory stays flat."""

    def __init__(self, data: Data) -> None:
        self._data = data

    def __len__(self) -> int:
        return len(self._data.calibration)

    def __getitem__(self, part: slice) -> Array:
        indices = self._data.calibration[part]
        inputs: Array = to_input(self._data.train.images[indices], self._data.preprocess)
        return inputs
