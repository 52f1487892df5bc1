"""The float stage for a file that somebody else exported: checked, simplified, stamped. No torch.

Leaves what the export stage leaves (`export.py`): `exported.onnx`, the file as it was given with
its weights inside, and `model.onnx`. What the file was trained with is not guessed: the recipe says
how images are prepared.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from onnx import ModelProto, TensorProto

from ..exporters.audit import audit
from ..exporters.graph import is_quantized, read_model
from ..exporters.int8 import OLDEST_OPSET
from ..exporters.sessions import open_session, run_batches
from ..exporters.simplify import simplify
from ..exporters.stamp import stamp as stamped
from ..exporters.stamp import write_model
from .data.dataset import Data, open_data
from .data.inputs import describe, to_input
from .errors import ExportError
from .measure.accuracy import accuracy, confusion, logits_of_onnx, per_class_accuracy
from .measure.doubts import check_class_order, note_doubts
from .recipe import ExportSpec
from .stage import Context

EXPORTED, MODEL = "exported.onnx", "model.onnx"
SAMPLES = 64  # as the export stage's


def take_float(
    path: Path,
    data_artifact: Path,
    spec: ExportSpec,
    *,
    context: Context,
    metadata: dict[str, str],
    memory_budget_bytes: int,
) -> dict[str, Any]:
    """The stage. Leaves both files in `context.scratch`.

    Returns:
        What `audit` counts, bytes, simplified, simplify_reason, validation (n, accuracy,
        per_class).

    Raises:
        ExportError: the file is quantized already, has more than one input, is of an opset that is
            too old, or its input and output do not fit the data.
        WeightsError: its outputs are another permutation of the classes.
    """
    given = read_model(path)
    data = open_data(data_artifact, memory_budget_bytes=memory_budget_bytes)
    check_file(given, data, where=str(path))
    if spec.batch != "dynamic":
        raise ExportError(
            f"export.batch: {path} has its batch fixed in the graph or free; it is not changed: "
            "leave `export.batch` out"
        )
    raw = context.scratch / EXPORTED
    write_model(given, raw)
    samples = to_input(data.train.contents[data.calibration[:SAMPLES]], data.preprocess)
    _check_logits(raw, samples, data, where=str(path), threads=context.threads)
    context.events.progress(1, 3, "simplifying" if spec.simplify else "folding")
    simplified = simplify(given, samples, floor=0.0, threads=context.threads, enabled=spec.simplify)
    if spec.simplify and not simplified.simplified:
        context.events.note(f"{path.name}: the graph was not simplified: {simplified.reason}")
    final = stamped(
        simplified.model,
        min_runtime=spec.min_runtime,
        metadata={**describe(data.class_names, data.preprocess), **metadata},
    )
    target = context.scratch / MODEL
    write_model(final, target)
    context.events.progress(2, 3, "measuring on validation")
    validation = _measure(target, data, context=context)
    return {
        **audit(final),
        "bytes": target.stat().st_size,
        "simplified": simplified.simplified,
        "simplify_reason": simplified.reason,
        "validation": {**validation, "possibly_seen": True},
    }


def check_file(model: ModelProto, data: Data, *, where: str) -> None:
    """What can be read off the graph.

    Raises:
        ExportError: see `take_float`.
    """
    if is_quantized(model):
        raise ExportError(
            f"{where}: is quantized already (it has QuantizeLinear or DequantizeLinear nodes); "
            "give the float ONNX it was made from"
        )
    opset = next((o.version for o in model.opset_import if o.domain in ("", "ai.onnx")), 0)
    if opset < OLDEST_OPSET:
        raise ExportError(
            f"{where}: is written in opset {opset}; int8 with a scale per channel needs "
            f"{OLDEST_OPSET} or newer: export it again with opset_version=18, or convert it with "
            "onnx.version_converter"
        )
    stored = {tensor.name for tensor in model.graph.initializer}
    inputs = [value for value in model.graph.input if value.name not in stored]
    if len(inputs) != 1:
        raise ExportError(
            f"{where}: expected one input, the image, got {len(inputs)}: "
            f"{', '.join(value.name for value in inputs)}"
        )
    tensor = inputs[0].type.tensor_type
    shape = [dim.dim_value or None for dim in tensor.shape.dim]
    wanted = [None, *data.input_shape]
    fits = len(shape) == 4 and all(
        have is None or want is None or have == want
        for have, want in zip(shape, wanted, strict=True)
    )
    if tensor.elem_type != TensorProto.FLOAT or not fits:
        raise ExportError(
            f"{where}: expected a float32 input of (N, {', '.join(map(str, data.input_shape))}), "
            f"as data.preprocess makes it, got {shape} of type "
            f"{TensorProto.DataType.Name(tensor.elem_type)}; check resize, crop and channels"
        )


def _check_logits(
    path: Path, samples: np.ndarray[Any, Any], data: Data, *, where: str, threads: int
) -> None:
    logits = run_batches(open_session(path, threads=threads), samples, len(samples))
    wanted = len(data.class_names)
    if logits.ndim != 2 or logits.shape[1] != wanted:
        raise ExportError(
            f"{where}: expected logits of (N, {wanted}), one for each class of the data, got "
            f"{logits.shape}; check the data's classes, or data.labels"
        )


def _measure(path: Path, data: Data, *, context: Context) -> dict[str, Any]:
    labels = data.validation.labels
    logits = logits_of_onnx(
        path, data.validation, data.preprocess, threads=context.threads, name="the given file"
    )
    check_class_order(confusion(logits, labels), data.class_names)
    found = {
        "n": len(labels),
        "accuracy": accuracy(logits, labels),
        "per_class": per_class_accuracy(logits, labels, class_names=data.class_names),
    }
    note_doubts(found, data, seen=True, context=context, where="the given file")
    return found
