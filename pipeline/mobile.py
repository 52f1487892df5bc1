"""The ort stage: the file that goes on, in ORT format too, and proof that it answers the same.

Only loaded and held against the .onnx here: accuracy and latency are those of model.onnx, which the
gate judges. The samples are of train, so that the test set is still touched once.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from ..exporters.compare import agrees, compare
from ..exporters.graph import is_quantized, read_model
from ..exporters.ort_format import open_ort, write_ort
from ..exporters.sessions import open_session, run_batches
from .data.dataset import open_data
from .data.inputs import to_input
from .errors import ExportError
from .stage import Context
from .workspace import file_sha256

SAMPLES = 64
FLOOR = 0.0  # a float graph must be as close as a rewrite of it must
# Between an int8 file and itself with float nodes fused differently: a step of rounding here and
# there. The limits are those that int8 itself has against float (verify/parity.py).
LEAST_SQNR_DB, LEAST_AGREEMENT = 20.0, 0.98


def write_mobile(model: Path, data: Path, *, context: Context) -> dict[str, Any]:
    """The stage. Leaves model.ort and model.required_operators.config in `context.scratch`.

    Args:
        model: the .onnx that goes on. data: folder of the data stage.

    Returns:
        bytes, sha256, operators (lines of the config), onnxruntime (the oldest that loads it), n,
        max_abs, sqnr_db (None: no error), top1_agreement; the last four against the .onnx.

    Raises:
        ExportError: it cannot be converted, or answers otherwise.
    """
    import onnxruntime

    target = context.scratch / "model.ort"
    config = write_ort(model, target)
    opened = open_data(data, memory_budget_bytes=0)  # 64 samples: read from the disk
    samples = to_input(opened.train.contents[opened.calibration[:SAMPLES]], opened.preprocess)
    expected = run_batches(open_session(model, threads=context.threads), samples, 1)
    found = run_batches(open_ort(target, threads=context.threads), samples, 1)
    same = held_against(expected, found, quantized=is_quantized(read_model(model)))
    version = onnxruntime.__version__
    context.events.note(
        f"model.ort: onnxruntime {version} or later loads it, whatever export.min_runtime says of "
        "model.onnx"
    )
    return {
        "bytes": target.stat().st_size,
        "sha256": file_sha256(target),
        "operators": config.read_text().splitlines(),
        "onnxruntime": version,
        **same,
    }


def held_against(
    expected: np.ndarray[Any, Any], found: np.ndarray[Any, Any], *, quantized: bool
) -> dict[str, Any]:
    """n, max_abs, sqnr_db and top1_agreement of the .ort file's logits, (N, C) both.

    Raises: ExportError: they are not those of the same network.
    """
    agreement = compare(expected, found)
    problem = agreement.problem
    if problem is None and not quantized:
        close, said = agrees(expected, found, floor=FLOOR)
        problem = None if close else said
    elif problem is None:
        sqnr, top1 = agreement.sqnr_db, agreement.top1_agreement
        assert top1 is not None
        if (sqnr is not None and sqnr < LEAST_SQNR_DB) or top1 < LEAST_AGREEMENT:
            noise = "no error" if sqnr is None else f"{sqnr:.1f} dB SQNR"
            problem = f"{top1:.1%} in the same class and {noise} on {agreement.n} samples"
    if problem is not None:
        raise ExportError(
            f"model.ort: does not answer as model.onnx does: {problem}; leave ort out of "
            "export.format, and report the model to onnxruntime"
        )
    return {
        "n": agreement.n,
        "max_abs": agreement.max_abs,
        "sqnr_db": agreement.sqnr_db,
        "top1_agreement": agreement.top1_agreement,
    }
