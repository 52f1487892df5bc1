"""The export stage: a stored network → `exported.onnx` (as torch wrote it) and `model.onnx`.

`model.onnx` is simplified if its outputs stay the same on real samples, and stamped with what a
device needs to use it: class names, preprocessing, the recipe's hash. Does not judge; the parity
ladder (`verify/parity.py`) compares both files with torch afterwards.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import nn
from torch.export import ExportedProgram

from ..exporters.audit import audit
from ..exporters.compare import float_floor
from ..exporters.graph import read_model
from ..exporters.quiet import quiet
from ..exporters.reference import logits_float32, logits_float64
from ..exporters.simplify import simplify
from ..exporters.stamp import stamp, write_model
from ..exporters.to_onnx import export_onnx, program_batch
from ..models.store import PROGRAM, load_network
from .data.dataset import open_data
from .data.inputs import describe, to_input
from .errors import ExportError
from .recipe import ExportSpec
from .stage import Context

EXPORTED, MODEL = "exported.onnx", "model.onnx"
SAMPLES = 64  # real samples that a simplified graph must agree on (reference/toolkits.md §D)
BATCH_SIZE = 32


def export_float(
    network_artifact: Path,
    data_artifact: Path,
    spec: ExportSpec,
    *,
    context: Context,
    metadata: Mapping[str, str],
) -> dict[str, Any]:
    """The stage. Leaves both files in `context.scratch`.

    Args:
        network_artifact: folder written by models/store.py.
        data_artifact: folder of the data stage; calibration samples (of train) are read.
        metadata: further entries for the file's metadata_props.

    Returns:
        bytes, opset, ir, parameters, multiply_adds (of one sample), initializer_bytes, ops,
        batch, simplified, simplify_reason, float_floor.

    Raises:
        ExportError, ModelError: the network cannot be exported.
    """
    stored = load_network(network_artifact)
    data = open_data(data_artifact, memory_budget_bytes=0)  # 64 samples: read from the disk
    if len(data.calibration) == 0:
        raise ExportError(
            "export: no calibration samples to hold the graph against; set data.calibration to "
            f"{SAMPLES} or more"
        )
    samples = to_input(data.train.contents[data.calibration[:SAMPLES]], data.preprocess)
    raw = context.scratch / EXPORTED
    program = _program(network_artifact)
    context.events.progress(0, 3, "torch.onnx.export")
    example = torch.from_numpy(samples[:1].repeat(2, axis=0))
    fixed = spec.sequence == "fixed"
    sequence: Literal["dynamic"] | int = int(samples.shape[-1]) if fixed else "dynamic"
    export_onnx(program or stored.network.module, example, raw, batch=spec.batch, sequence=sequence)

    size = (program and program_batch(program)) or BATCH_SIZE
    floor = _float_floor(stored.network.module, samples, batch_size=size)
    context.events.progress(1, 3, "simplifying" if spec.simplify else "folding")
    simplified = simplify(
        read_model(raw), samples, floor=floor, threads=context.threads, enabled=spec.simplify
    )
    if spec.simplify and not simplified.simplified:
        context.events.note(f"export: the graph was not simplified: {simplified.reason}")
    path = context.scratch / MODEL
    final = stamp(
        simplified.model,
        min_runtime=spec.min_runtime,
        metadata={**describe(data.class_names, data.preprocess), **metadata},
    )
    write_model(final, path)
    context.events.progress(3, 3)
    return {
        **audit(final),
        "bytes": path.stat().st_size,
        "batch": spec.batch,
        "simplified": simplified.simplified,
        "simplify_reason": simplified.reason,
        "float_floor": floor,
    }


def _float_floor(module: nn.Module, samples: np.ndarray[Any, Any], *, batch_size: int) -> float:
    """Error of float32 itself on these samples; 0 where float64 is impossible (see compare.py)."""
    double, _ = logits_float64(module, samples, batch_size=batch_size)
    single = logits_float32(module, samples, batch_size=batch_size)
    return float_floor(double, single) if len(double) else 0.0


def _program(folder: Path) -> ExportedProgram | None:
    """The .pt2 itself, which `load_network` has inspected: only it can be exported again."""
    path = folder / PROGRAM
    if not path.exists():
        return None
    with quiet():
        return torch.export.load(path)
