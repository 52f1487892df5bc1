"""Layers that return to float when int8 costs too much accuracy: as few as will do, cheap ones
first to stay.

1. Sensitivity. Each layer alone becomes int8; what that does to the logits of calibration samples
   is its harm (mean squared error).
2. Return. The most harmful layers go back to float, one group at a time, each twice as large as the
   one before, until the drop on validation holds its limit.
3. Regain. Of those, the layers with most multiply-adds try to become int8 again, one by one, as
   long as the limit holds: what stays float is what costs least latency.

Accuracy control by ranked layers is NNCF's idea (Intel, `quantize_with_accuracy_control`); step 3
is what takes the latency into account.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ...exporters.audit import node_multiply_adds
from ...exporters.int8 import encoding_for, int8_nodes
from ...exporters.sessions import open_session, run_batches
from ...exporters.stamp import write_model
from ..recipe import ExportSpec, QuantizeSpec
from ..stage import Context
from .ptq import Calibrated, always_float, calibrate, write
from .result import (
    Prepared,
    Source,
    cost_on_validation,
    exceeds,
    leave,
    open_source,
    write_int8,
)

SENSITIVITY_SAMPLES = 128  # of the calibration samples; a ranking needs no more
BATCH_SIZE = 32
LAYER_OPS = ("Conv", "Gemm", "MatMul", "Add", "Concat", "GlobalAveragePool", "AveragePool")
MOST_REGAINED = 16  # layers that are tried in step 3, the costliest first


@dataclass(frozen=True)
class Layer:
    """A node of the float graph. harm: of it alone in int8. multiply_adds: of one sample."""

    name: str
    harm: float
    multiply_adds: int


@dataclass(frozen=True)
class Trial:
    """A set of layers in float, and the drop on validation with it."""

    kept_float: tuple[str, ...]
    drop_points: float
    holds: bool


def return_to_float(
    float_artifact: Path,
    data_artifact: Path,
    spec: QuantizeSpec,
    *,
    limit_points: float,
    context: Context,
    export: ExportSpec,
    memory_budget_bytes: int,
) -> dict[str, Any]:
    """The stage. Leaves the int8 file with the fewest multiply-adds in float that was found.

    If no set of layers holds the limit, it leaves the one with the least drop: the candidates'
    table says that it does not hold.

    Returns:
        What `result.leave` says; layers (each with its harm), trials, kept_float, holds.

    Raises:
        ExportError, IntegrityError: as `ptq.quantize_static`.
    """
    source = open_source(
        float_artifact, data_artifact, context=context, memory_budget_bytes=memory_budget_bytes
    )
    context.events.progress(0, 1, "calibrating")
    calibrated = calibrate(source, spec, threads=context.threads)
    layers = measure_sensitivity(calibrated, source, spec, context=context)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "trial.onnx")

        def attempt(kept: frozenset[str]) -> Trial:
            quantized = write(calibrated, source, spec, keep_float=kept, threads=context.threads)
            write_int8(source, quantized, path, export=export)
            cost = cost_on_validation(source, path, threads=context.threads)
            holds = not exceeds(cost, limit_points=limit_points)
            trial = Trial(tuple(sorted(kept)), cost["drop_points"], holds)
            context.events.progress(
                len(kept), len(layers), f"{len(kept)} in float, drop {trial.drop_points:.2f}"
            )
            return trial

        chosen, trials = search(layers, attempt)
    quantized = write(
        calibrated, source, spec, keep_float=chosen.kept_float, threads=context.threads
    )
    encoding = encoding_for(spec.targets, model=source.model)
    found = leave(source, quantized, encoding=encoding, export=export, context=context)
    return {
        **found,
        "layers": [asdict(layer) for layer in layers],
        "trials": [asdict(trial) for trial in trials],
        "kept_float": list(chosen.kept_float),
        "holds": chosen.holds,
    }


def search(
    layers: Sequence[Layer], attempt: Callable[[frozenset[str]], Trial]
) -> tuple[Trial, list[Trial]]:
    """The cheapest set of layers in float that holds, or else the one with the least drop.

    Args:
        layers: at least one.
        attempt: makes and measures the int8 file with these layers in float.

    Returns:
        The chosen trial, and all of them in order.
    """
    ranked = [layer.name for layer in sorted(layers, key=lambda one: (-one.harm, one.name))]
    trials: list[Trial] = []
    count, size = 0, 1
    # all in float is no int8 file any more
    while count < len(ranked) - 1:
        count, size = min(count + size, len(ranked) - 1), 2 * size
        trials.append(attempt(frozenset(ranked[:count])))
        if trials[-1].holds:
            return _regain(layers, trials[-1], attempt, trials), trials
    return min(trials, key=lambda trial: (trial.drop_points, len(trial.kept_float))), trials


def _regain(
    layers: Sequence[Layer],
    held: Trial,
    attempt: Callable[[frozenset[str]], Trial],
    trials: list[Trial],
) -> Trial:
    costs = {layer.name: layer.multiply_adds for layer in layers}
    dearest = sorted(held.kept_float, key=lambda name: (-costs[name], name))[:MOST_REGAINED]
    for name in dearest:
        fewer = frozenset(held.kept_float) - {name}
        if not fewer:
            continue
        trials.append(attempt(fewer))
        if trials[-1].holds:
            held = trials[-1]
    return held


def measure_sensitivity(
    calibrated: Calibrated, source: Source, spec: QuantizeSpec, *, context: Context
) -> list[Layer]:
    """Every layer with the harm that it alone does in int8, in graph order."""
    plain = spec.model_copy(update={"correct_bias": False})  # of single layers it says nothing
    costs = node_multiply_adds(source.model)
    fixed = always_float(source.model, spec)
    may = set(int8_nodes(source.model, encoding_for(spec.targets, model=source.model))) - fixed
    names = [
        node.name
        for node in source.model.graph.node
        if node.op_type in LAYER_OPS and node.name in may
    ]
    data = source.data
    inputs = Prepared(data)[slice(0, SENSITIVITY_SAMPLES)]
    session = open_session(source.path, threads=context.threads)
    reference = run_batches(session, inputs, BATCH_SIZE)
    layers = []
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "layer.onnx")
        for done, name in enumerate(names):
            others = [other for other in names if other != name]
            quantized = write(calibrated, source, plain, keep_float=others, threads=context.threads)
            write_model(quantized.model, path)
            found = run_batches(open_session(path, threads=context.threads), inputs, BATCH_SIZE)
            error = float(np.square(found.astype(np.float64) - reference).mean())
            layers.append(Layer(name, error, costs.get(name, 0)))
            context.events.progress(done + 1, len(names), f"sensitivity of {name}")
    return layers
