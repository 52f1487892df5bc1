"""`compress verify MODEL.onnx`: how much of a file runs in int8 here, and what would go wrong
elsewhere. No torch.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from ...exporters.engagement import as_text, engagement
from ...exporters.graph import is_quantized, read_model
from ...exporters.saturation import saturating_pairs, total
from ..data.inputs import Preparation
from ..data.look import inputs_of, look_at, source_at
from ..recipe import PreprocessSpec
from .facts import facts_of
from .inputs import open_set
from .samples import Set

Array = np.ndarray[Any, Any]

SAMPLES = 64


def audit_file(model: Path, *, data: Set | None, how: Preparation | None, threads: int) -> str:
    """The audit as text. With data it also has shares of time, and counts saturating pairs.

    Args:
        data: a set of images or texts. how: its preparation; None: as the file says.

    Raises:
        ExportError, DataError: the file or the data cannot be used.
        UsageError: nothing says how inputs are prepared.
        MeasurementError: nothing in the graph multiplies.
    """
    if data is None:
        return as_text(engagement(model, threads=threads))
    inputs = _inputs(model, data, how, threads=threads)
    lines = [as_text(engagement(model, inputs, threads=threads))]
    graph = read_model(model)
    if is_quantized(graph):
        lines.append(_saturation(saturating_pairs(graph, inputs, threads=threads), len(inputs)))
    return "\n".join(lines)


def _inputs(model: Path, data: Set, how: Preparation | None, *, threads: int) -> Array:
    """SAMPLES inputs: of images only so many are opened."""
    facts = facts_of(model)
    how = how or facts.how
    if isinstance(how, PreprocessSpec) and data.labelled:
        return inputs_of(look_at(source_at(data.path), count=SAMPLES).images[:SAMPLES], how)
    with tempfile.TemporaryDirectory() as scratch:
        test = open_set(
            facts, data, how=how, class_names=(), scratch=Path(scratch), threads=threads
        )
        return test.inputs(test.spread(SAMPLES))


def _saturation(layers: list[dict[str, Any]], n: int) -> str:
    """What an x86 CPU without VNNI would compute wrongly."""
    count = total(layers)["saturating"]
    if not count:
        return f"x86 without VNNI: no pair sum of {len(layers)} layers saturates on {n} images"
    worst = sorted(layers, key=lambda layer: -layer["saturating"])[:5]
    named = ", ".join(f"{one['name']} {one['saturating']:,}" for one in worst if one["saturating"])
    return (
        f"x86 without VNNI: {count:,} pair sums saturate on {n} images ({named}): such a CPU "
        "computes something else; quantize with x86 among the targets"
    )
