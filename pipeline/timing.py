"""How fast the models of a run are, here, on real inputs: what is timed, and at which lengths.

The measuring itself is in `measure/latency.py`; other machines are in `elsewhere.py`.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from ..exporters.sessions import open_session, run_batches
from .data.inputs import repeated_to, to_input
from .measure.latency import measure_latency as measure
from .measure.latency import speedup
from .measure.turns import Row
from .recipe import ProfileSpec
from .record import Latency, Models
from .report import LatencyRecord, SpeedupRecord
from .stage import Artifact, Noting
from .work import Work, model_of, open_sets

LATENCY_INPUTS = 8  # real images in rotation, so that no branch or cache learns one by heart


def measure_latency(work: Work, data: Artifact, models: Models) -> Latency:
    """Every model in turns, always fresh: a time that is gated is never recalled."""
    spec, events = work.recipe.profile, Noting(work.workspace.events)
    assert spec is not None
    events.started("latency")
    begun = time.monotonic()
    onnx = {"float": models.floating} | ({"int8": models.deployed} if models.is_quantized else {})
    torch_nets = {} if models.student is None else {"student": models.student}
    if models.dense_onnx is not None:
        onnx = {"dense-onnx": models.dense_onnx} | onnx
    if models.teacher is not None and models.teacher_onnx is not None:
        onnx = {"teacher-onnx": models.teacher_onnx} | onnx
        torch_nets |= {"teacher": models.teacher}
    measured: list[dict[str, Any]] = []
    for sequence in sequences(work, data):
        inputs, is_first = latency_inputs(work, data, sequence=sequence), not measured
        rows = [
            Row(name, "onnx", path := model_of(artifact), answers(path, inputs))
            for name, artifact in onnx.items()
        ]
        if is_first:
            rows += [Row(name, "torch", artifact.path) for name, artifact in torch_nets.items()]
        found = measure(
            rows,
            inputs,
            launches=spec.launches,
            runs=spec.runs,
            threads=tuple(sorted({1, work.workspace.threads})) if is_first else (1,),
            events=events,
        )
        measured += [row | {"sequence": sequence} for row in found]
    records = tuple(LatencyRecord.model_validate(row) for row in measured)
    reference, _ = models.reference_onnx
    deployed = models.deployed_role
    first = measured[0]["sequence"]
    at_one = {r["name"]: r for r in measured if (r["threads"], r["sequence"]) == (1, first)}
    ratio = speedup(at_one[reference], at_one[deployed])
    if models.is_quantized and at_one["int8"]["p50_ms"] >= at_one["float"]["p50_ms"]:
        events.note(
            f"int8 is not faster than the float model here ({at_one['int8']['p50_ms']:.3f} against "
            f"{at_one['float']['p50_ms']:.3f} ms, one thread): it saves bytes, not time"
        )
    work.notes += events.notes
    events.finished("latency", seconds=time.monotonic() - begun, recalled=False)
    return Latency(records, SpeedupRecord(reference=reference, candidate=deployed, **ratio))


def sequences(work: Work, data: Artifact) -> tuple[int | None, ...]:
    """Tokens at which texts are timed: at most what the network takes, and what a graph fixes."""
    if not work.recipe.is_text:
        return (None,)
    longest = open_sets(work, data).input_shape[1]
    if work.recipe.export.sequence == "fixed":
        return (longest,)
    profile = work.recipe.profile or ProfileSpec()
    return tuple(dict.fromkeys(min(one, longest) for one in profile.sequences))


def latency_inputs(work: Work, data: Artifact, *, sequence: int | None = None) -> Any:
    """Real inputs of the network, LATENCY_INPUTS of them, float32 (…, C, H, W) or int64 (…, K, S).

    Args:
        sequence: S, of texts; None: the recipe's first.
    """
    opened = open_sets(work, data)
    some = opened.calibration[:LATENCY_INPUTS]
    inputs = to_input(opened.train.contents[some], opened.preprocess)
    if not work.recipe.is_text:
        return inputs
    length = sequence or sequences(work, data)[0]
    assert length is not None, "texts have a length"
    return repeated_to(inputs, length)


def answers(path: Path, inputs: Any) -> Any:
    """What the model answers untimed, one input at a time as it is timed: a fast wrong answer is
    no result, and dynamic int8 answers otherwise in company."""
    return run_batches(open_session(path, threads=1), inputs, 1)
