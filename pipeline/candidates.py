"""Every file that could ship, one table of them, and the choice among them.

From each network (what pruning left of it, and the network as it was) come a float file and, where
int8 is asked for, int8 ones: by calibration, of texts also with ranges found as it runs; where that
costs too much, by calibration of the equalized graph, then with layers back in float; trained with
rounding in the loop where that is not enough. None is thrown away before the end. The choice is a
stage: it rests on measured times, so it is stored, and recalled on resume.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from . import steps, timing
from .measure.latency import measure_latency as measure
from .measure.turns import Row
from .quantize.result import exceeds
from .recipe import Recipe
from .record import Candidate, Chosen
from .selection import Limits, select
from .stage import Artifact, Context
from .work import Work, model_of, run_stage

LAUNCHES, RUNS = 3, 100  # a choice needs less than a figure that is reported


def make(work: Work, data: Artifact, students: Sequence[Artifact]) -> list[Candidate]:
    """All candidates, in table order: smaller networks first, int8 before float."""
    return [one for student in students for one in _of_one(work, data, student)]


def of_file(work: Work, data: Artifact, floating: Artifact) -> list[Candidate]:
    """All candidates that come of one float file."""
    return _of_float(work, data, None, floating, mark="", about="")


def _of_one(work: Work, data: Artifact, student: Artifact) -> list[Candidate]:
    mark = "" if student.stage == "student" else f"-{student.stage}"  # as in `export-pruned-1`
    about = "" if not mark else f" {student.stage}"
    floating = steps.export_student(work, data, student, mark=mark)
    return _of_float(work, data, student, floating, mark=mark, about=about)


def _of_float(
    work: Work,
    data: Artifact,
    student: Artifact | None,
    floating: Artifact,
    *,
    mark: str,
    about: str,
) -> list[Candidate]:
    made = [
        Candidate(f"{kind}{about}", student, floating, deployed)
        for kind, deployed in _int8(work, data, floating, mark=mark)
    ]
    return [*made, Candidate(f"float{about}", student, floating, floating)]


def _int8(
    work: Work, data: Artifact, floating: Artifact, *, mark: str
) -> list[tuple[str, Artifact]]:
    """int8 files of one float file: the next is tried where the one before costs too much."""
    spec = work.recipe.quantize
    if spec is None:
        return []
    limit = steps.quantization_limit(work.recipe)

    def costs_too_much(artifact: Artifact) -> bool:
        return exceeds(artifact.measurements["validation"], limit_points=limit)

    made = [("int8", steps.quantize(work, data, floating, mark=mark))]
    if work.recipe.is_text:
        dynamic = steps.quantize_dynamic(work, data, floating, mark=mark)
        made.append(("int8 dynamic", dynamic))
        if not all(costs_too_much(one) for _, one in made):
            return made
    if spec.fallback and costs_too_much(made[-1][1]):
        equalized = steps.quantize_equalized(work, data, floating, mark=mark)
        if equalized is not None:
            made.append(("int8 equalized", equalized))
    if spec.fallback and costs_too_much(made[-1][1]):
        made.append(("int8 with float layers", steps.fall_back(work, data, floating, mark=mark)))
    if spec.qat is not None and (spec.mode == "qat" or costs_too_much(made[-1][1])):
        made.append(("int8 by QAT", steps.train_qat(work, data, floating, made[0][1], mark=mark)))
    return made


def choose(
    work: Work, data: Artifact, tried: Sequence[Candidate], *, reference: Artifact | None
) -> Chosen:
    """The fastest candidate that holds the budget on validation.

    Args:
        reference: the teacher, from which the gate's drop counts; None: the last float network.
    """
    dense = tried[-1].trained if reference is None else reference
    gate = work.recipe.gate
    limits = Limits(
        drop_points=gate.max_drop_points,
        quantization_drop_points=steps.quantization_limit(work.recipe),
        reference_accuracy=dense.measurements["validation"]["accuracy"],
        confidence=gate.confidence,
    )
    table = run_stage(
        work,
        "choice",
        lambda context: _measure(work, data, tried, limits, context=context),
        reads={
            "limits": asdict(limits),
            "candidates": [(one.name, one.deployed.sha256) for one in tried],
        },
    )
    index = table.measurements["selection"]["index"]
    return Chosen(tried[index], dense=tried[-1], table=table)


def _measure(
    work: Work, data: Artifact, tried: Sequence[Candidate], limits: Limits, *, context: Context
) -> dict[str, Any]:
    rows = [_row(one) for one in tried]
    if len(tried) > 1:
        inputs = timing.latency_inputs(work, data)
        measured = measure(
            [
                Row(
                    one.name,
                    "onnx",
                    path := model_of(one.deployed),
                    timing.answers(path, inputs),
                )
                for one in tried
            ],
            inputs,
            launches=LAUNCHES,
            runs=RUNS,
            threads=(1,),
            events=context.events,
        )
        rows = [
            row | {"p50_ms": found["p50_ms"], "raw_ns": found["raw_ns"]}
            for row, found in zip(rows, measured, strict=True)
        ]
    choice = select(rows, limits)
    context.events.note(f"candidates: {choice.why}")
    for text in unmet_wishes(work.recipe, tried[choice.index], dense=tried[-1]):
        context.events.note(text)
    for row in rows:
        row.pop("raw_ns", None)  # the choice is stored; nobody compares these times again
    return {"rows": rows, "selection": asdict(choice)}


def unmet_wishes(recipe: Recipe, chosen: Candidate, *, dense: Candidate) -> list[str]:
    """What was asked for and does not go on, loudly: a PASS would hide it."""
    said = []
    if recipe.prune is not None and chosen.student is dense.student:
        said.append("WARNING: nothing pruned goes on; the candidates' table shows what each lost")
    if recipe.quantize is not None and not chosen.is_quantized:
        said.append("WARNING: a float file goes on, not int8; the candidates' table shows why")
    return said


def _row(one: Candidate) -> dict[str, Any]:
    """What is known of a candidate before it is timed."""
    found = one.deployed.measurements
    validation = one.trained.measurements["validation"]
    n, correct = validation["n"], round(validation["accuracy"] * validation["n"])
    drop, share = 0.0, 0.0
    if one.is_quantized:
        correct = found["validation"]["correct"]
        drop = found["validation"]["drop_points"]
        share = found["engagement"]["int8_multiply_adds_share"]
    return {
        "name": one.name,
        "n": n,
        "correct": correct,
        "quantization_drop_points": drop,
        "bytes": found["bytes"],
        "multiply_adds": found["multiply_adds"],
        "int8_share": share,
        "p50_ms": None,
    }
