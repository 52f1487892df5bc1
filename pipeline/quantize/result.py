"""What every int8 stage starts from, leaves behind and says of it.

An int8 stage turns the float file of the export stage into an int8 one. Here is what they share:
the float file with its answers on validation, and the end of each: the stamped file, its audit, and
what the rounding costs. Validation decides what is tried next and which candidate goes on; the test
set is not touched.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from onnx import ModelProto

from ...exporters.audit import audit
from ...exporters.engagement import engagement
from ...exporters.graph import read_model
from ...exporters.int8 import Encoding, Quantized
from ...exporters.stamp import stamp, write_model
from ..data.dataset import Data, open_data
from ..data.inputs import to_input
from ..errors import IntegrityError
from ..measure.accuracy import logits_of_onnx
from ..recipe import ExportSpec
from ..stage import Context

Array = np.ndarray[Any, Any]

MODEL = "model.onnx"
AUDIT_SAMPLES = 8  # a share of time needs few


@dataclass(frozen=True, eq=False)
class Source:
    """The float file, the sets, and the float file's logits on validation, (N, C) float32."""

    path: Path
    model: ModelProto
    data: Data
    logits: Array


def open_source(
    float_artifact: Path, data_artifact: Path, *, context: Context, memory_budget_bytes: int
) -> Source:
    path = float_artifact / MODEL
    data = open_data(data_artifact, memory_budget_bytes=memory_budget_bytes)
    logits = logits_of_onnx(path, data.validation, data.preprocess, threads=context.threads)
    return Source(path, read_model(path), data, logits)


class Prepared:
    """Calibration samples, read and preprocessed as they are asked for: memory stays flat."""

    def __init__(self, data: Data) -> None:
        self._data = data

    def __len__(self) -> int:
        return len(self._data.calibration)

    def __getitem__(self, part: slice) -> Array:
        indices = self._data.calibration[part]
        inputs: Array = to_input(self._data.train.contents[indices], self._data.preprocess)
        return inputs


def cost_on_validation(source: Source, path: Path, *, threads: int) -> dict[str, Any]:
    """What `path` answers differently from the float file, on validation.

    Returns: n, correct, float_correct, lost (float right, int8 wrong), gained, drop_points,
        agreement (fraction of equal answers).
    """
    labels = source.data.validation.labels
    logits = logits_of_onnx(path, source.data.validation, source.data.preprocess, threads=threads)
    before, after = source.logits.argmax(1), logits.argmax(1)
    was, is_now = before == labels, after == labels
    lost, gained = int((was & ~is_now).sum()), int((~was & is_now).sum())
    return {
        "n": len(labels),
        "correct": int(is_now.sum()),
        "float_correct": int(was.sum()),
        "lost": lost,
        "gained": gained,
        "drop_points": 100 * (lost - gained) / len(labels),
        "agreement": float((before == after).mean()),
    }


def exceeds(validation: Mapping[str, Any], *, limit_points: float) -> bool:
    """Whether the drop is beyond the limit by more than one sample: one alone shows nothing."""
    lost = validation["lost"] - validation["gained"]
    return bool(lost - 1 > limit_points / 100 * validation["n"])


def write_int8(
    source: Source, quantized: Quantized, path: Path, *, export: ExportSpec
) -> ModelProto:
    """The int8 file with the float file's metadata, as it would ship."""
    metadata = {entry.key: entry.value for entry in source.model.metadata_props}
    final = stamp(quantized.model, min_runtime=export.min_runtime, metadata=metadata)
    write_model(final, path)
    return final


def leave(
    source: Source,
    quantized: Quantized,
    *,
    encoding: Encoding,
    export: ExportSpec,
    context: Context,
) -> dict[str, Any]:
    """Write the stage's file into its scratch folder; what the report should say of it.

    Returns: bytes, float_bytes, opset, ir, parameters, multiply_adds, initializer_bytes, ops,
        encoding (with its reason), calibration_samples, counts, not_written (ranges, with the
        reason), engagement (see
        `exporters/engagement.py`), validation (see `cost_on_validation`).

    Raises:
        IntegrityError: onnxruntime makes int8 of what was kept float.
    """
    path = context.scratch / MODEL
    final = write_int8(source, quantized, path, export=export)
    data = source.data
    some = to_input(data.train.contents[data.calibration[:AUDIT_SAMPLES]], data.preprocess)
    audited = engagement(path, some)
    changed = [node["name"] for node in audited["nodes"] if node["requantized"]]
    if changed:
        raise IntegrityError(
            f"int8: onnxruntime {audited['onnxruntime']} rounds the weights of {changed[0]} "
            "itself, per tensor, though the file keeps them float; report this graph"
        )
    return {
        **audit(final),
        "bytes": path.stat().st_size,
        "float_bytes": source.path.stat().st_size,
        "encoding": asdict(encoding),
        "calibration_samples": len(data.calibration),
        "counts": quantized.counts,
        "not_written": dict(quantized.not_written),
        "engagement": audited,
        "validation": cost_on_validation(source, path, threads=context.threads),
    }
