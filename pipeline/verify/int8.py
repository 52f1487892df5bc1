"""int8 against the float it was made from: accuracy of the logits, what each layer loses by itself,
and what other CPUs would compute.

int8 differs from float by design. Its logits must keep 20 dB and 0.99 of cosine
(reference/profiling.md); below that the burden turns, and only labels that prove the drop to be
within the limit, with no layer that computes something else, let it pass.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from onnx import ModelProto

from ...exporters.graph import read_model
from ...exporters.layer_error import layer_errors
from ...exporters.saturation import saturating_pairs, total
from ..report import RungRecord
from .record import DivergenceRecord, LayerRecord, TaskRecord, rung

Array = np.ndarray[Any, Any]

INT8_DB, INT8_COSINE = 20.0, 0.99
SATURATES = "x86"  # the target whose kernels do (exporters/saturation.py)
SHOWN = 5  # layers named


class Int8(NamedTuple):
    """Rungs, what every layer loses, and the first that computes something else."""

    rungs: list[RungRecord]
    layers: tuple[LayerRecord, ...]
    suspect: DivergenceRecord | None


def int8_rungs(
    model: Path, floating: Path | None, inputs: Array, *, against: RungRecord, task: TaskRecord,
    targets: Sequence[str], threads: int,
) -> Int8:  # fmt: skip
    """Args:
        floating: what it was made from; None: the reference is int8 too, and layers are left out.
        inputs: a few samples, float32 (N, C, h, w) or int64 (N, K, S).
        against: the ladder's rung of the logits, optimizations off.
        targets: CPUs that must compute the same.

    Raises:
        ExportError, RuntimeFailure: a graph cannot be read or run.
    """
    graph = read_model(model)
    layers: tuple[LayerRecord, ...] = ()
    if floating is not None:
        rows = layer_errors(read_model(floating), graph, inputs, threads=threads)
        layers = tuple(
            LayerRecord(**{key: row[key] for key in LayerRecord.model_fields}) for row in rows
        )
    suspects = [layer for layer in layers if layer.suspect]
    rungs = [_accuracy_rung(against, task, suspects)]
    # equalized and retrained layers look suspect too: they are blamed where something is wrong
    wrong = not rungs[0].passed or _too_much_lost(task)
    blamed = suspects if wrong else [layer for layer in suspects if layer.dead]
    if blamed:
        rungs.append(
            rung("int8 layers", "float, on identical inputs", passed=False, n=len(inputs),
                 sqnr_db=blamed[0].sqnr_db, note=_suspicion(blamed))
        )  # fmt: skip
    if SATURATES in targets:
        rungs.append(_saturation_rung(graph, inputs, threads))
    return Int8(rungs, layers, _as_divergence(blamed[0]) if blamed else None)


def _too_much_lost(task: TaskRecord) -> bool:
    return task.drop_points is not None and task.drop_points > task.limit_points


def _accuracy_rung(
    against: RungRecord, task: TaskRecord, suspects: Sequence[LayerRecord]
) -> RungRecord:
    """20 dB and 0.99; or the labels prove it and every layer does what it should."""
    decibels, cosine = against.sqnr_db, against.cosine
    exact = against.max_abs == 0
    close = exact or (
        decibels is not None and cosine is not None and decibels >= INT8_DB
        and cosine >= INT8_COSINE
    )  # fmt: skip
    bound = task.upper_bound_95
    proven = bound is not None and 100 * bound <= task.limit_points
    passed = close or (proven and not suspects)
    note = f"expected ≥ {INT8_DB:g} dB and cosine ≥ {INT8_COSINE:g}"
    if not close and passed:
        note += "; it has less, and the labels prove the drop to be within its limit"
    return rung(
        "int8 accuracy", against.reference, passed=passed, note=note, n=against.n,
        max_abs=against.max_abs, sqnr_db=decibels, cosine=cosine,
    )  # fmt: skip


def _suspicion(suspects: Sequence[LayerRecord]) -> str:
    said = []
    for one in suspects[:SHOWN]:
        channel = ""
        if one.channel_sqnr_db is not None and one.worst_channel is not None:
            channel = f", channel {one.worst_channel} {one.channel_sqnr_db:.1f} dB"
        if one.dead:
            channel += f", dead channels {', '.join(map(str, one.dead[:SHOWN]))}"
        level = "not finite" if one.sqnr_db is None else f"{one.sqnr_db:.1f} dB"
        said.append(f"{one.layer} ({one.op}) {level}{channel}")
    return "; ".join(said) + (f"; {len(suspects) - SHOWN} more" if len(suspects) > SHOWN else "")


def _as_divergence(layer: LayerRecord) -> DivergenceRecord:
    said = () if layer.worst_channel is None else (f"its channel {layer.worst_channel} loses most",)
    if layer.dead:
        said = (*said, f"weights of channel {', '.join(map(str, layer.dead[:SHOWN]))} are zero")
    return DivergenceRecord(
        tensor=layer.tensor, op=layer.op, node=layer.tensor, layer=layer.layer, max_abs=None,
        tolerance=None, sqnr_db=layer.sqnr_db, deployed=False, differences=said,
    )  # fmt: skip


def _saturation_rung(graph: ModelProto, inputs: Array, threads: int) -> RungRecord:
    layers = saturating_pairs(graph, inputs, threads=threads)
    count = total(layers)["saturating"]
    worst = sorted(layers, key=lambda layer: -int(layer["saturating"]))[:SHOWN]
    named = ", ".join(f"{one['node']} {one['saturating']:,}" for one in worst if one["saturating"])
    note = (
        f"{count:,} pair sums saturate ({named}): quantize with x86 among the targets, or say "
        "--targets arm,x86-vnni"
        if count
        else f"no pair sum of {len(layers)} layers saturates"
    )
    return rung("saturation", "x86 without VNNI", passed=not count, n=len(inputs), note=note)
