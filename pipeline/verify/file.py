"""`compress verify MODEL.onnx`: how much of a file runs in int8 here, and what would go wrong
elsewhere. No torch.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ...exporters.engagement import as_text, engagement
from ...exporters.graph import is_quantized, read_model
from ...exporters.saturation import saturating_pairs, total
from ..data.look import inputs_of, look_at, source_at
from ..recipe import PreprocessSpec

SAMPLES = 64


def audit_file(
    model: Path, *, data: Path | None, preprocess: PreprocessSpec | None, threads: int
) -> str:
    """The audit as text. With images it also has shares of time, and counts saturating pairs.

    Args:
        data, preprocess: a labelled set and how its images are prepared, both or none.

    Raises:
        ExportError, DataError: the file or the images cannot be used.
        MeasurementError: nothing in the graph multiplies.
    """
    if data is None or preprocess is None:
        return as_text(engagement(model, threads=threads))
    images = look_at(source_at(data), count=SAMPLES).images[:SAMPLES]
    inputs = inputs_of(images, preprocess)
    lines = [as_text(engagement(model, inputs, threads=threads))]
    graph = read_model(model)
    if is_quantized(graph):
        lines.append(_saturation(saturating_pairs(graph, inputs, threads=threads), len(inputs)))
    return "\n".join(lines)


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
