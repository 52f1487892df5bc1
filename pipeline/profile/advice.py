"""Why a model is not faster: where its time goes, how near it is to what this machine can do, and
the three changes that would gain most.

Only of this machine: kernels, peaks and times are its own. p50 comes from `compress profile`'s own
measurement; nothing is timed here but onnxruntime's profile and the roofline.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy.typing as npt

from ..spec import Spec
from .operators import Operators, operators_of
from .roofline import Roofline, roofline_of_this_machine
from .rules import Advice, Facts, advise

SHOWN = 8  # nodes in the table

Array = npt.NDArray[Any]


class Explanation(Spec):
    """threads: of every figure. bound_ms: no run gets below it (`roofline.py`). share_of_bound:
    bound_ms / p50_ms; above 1 the peaks are too low."""

    threads: int
    p50_ms: float
    bound_ms: float
    share_of_bound: float
    operators: Operators
    roofline: Roofline
    advice: tuple[Advice, ...]


def explain(
    model: Path,
    inputs: Mapping[str, Array],
    *,
    threads: int,
    by_threads: Mapping[int, float],
    roofline: Roofline | None = None,
    fresh: bool = False,
) -> Explanation:
    """Profiles the model on this machine, in runs of its own, and says what to change.

    Args:
        model: a portable ONNX file.
        inputs: arrays by input name, (N ≥ 1, …), real ones where there are any.
        threads: intra-op, ≥ 1.
        by_threads: thread count → p50 in ms, as measured before; `threads` among them.
        roofline: of this machine with so many threads; None: the stored one, or measured now.
        fresh: measure the roofline again.

    Raises:
        ExportError: the model cannot be read, opened or fed. RuntimeFailure: onnxruntime failed.
        MeasurementError: nothing ran.
    """
    p50_ms = by_threads[threads]
    operators = operators_of(model, inputs, threads=threads)
    peaks = roofline or roofline_of_this_machine(threads=threads, fresh=fresh)
    facts = Facts(operators, peaks, threads=threads, by_threads=by_threads)
    bound_ms = sum(facts.bound_us(node) for node in operators.nodes) / 1e3
    return Explanation(
        threads=threads,
        p50_ms=p50_ms,
        bound_ms=bound_ms,
        share_of_bound=bound_ms / p50_ms,
        operators=operators,
        roofline=peaks,
        advice=advise(facts),
    )


def as_text(explanation: Explanation) -> str:
    """For a terminal."""
    one, peaks = explanation, explanation.roofline
    lines = [
        f"why not faster, {one.threads} threads, {one.operators.runs} profiled runs:",
        f"  bound of this machine {one.bound_ms:.3g} ms, p50 {one.p50_ms:.3g} ms: "
        f"{one.share_of_bound:.0%} of the bound reached",
        f"  peaks: int8 {2e-9 * peaks.int8_multiply_adds_per_s:,.0f} GOP/s, float "
        f"{2e-9 * peaks.float_multiply_adds_per_s:,.0f} GFLOP/s, memory "
        f"{1e-9 * peaks.copies[0][1]:.0f} GB/s in cache, {1e-9 * peaks.copies[-1][1]:.0f} outside",
    ]
    if not peaks.is_calm:
        lines.append("  others used the CPUs while the peaks were measured: the bound is too high")
    elif one.share_of_bound > 1:
        lines.append("  above 100 %: the peaks are too low; measure them again with --fresh")
    lines += _table(one)
    if not one.advice:
        lines.append("  nothing found that would gain 2 % or more")
    for number, advice in enumerate(one.advice, start=1):
        lines.append(
            f"  {number}. {advice.text}. {advice.share:.0%} of the time, gains at most "
            f"{advice.gain:.0%}"
        )
    lines.append("  gains do not add up: two may speak of the same node")
    return "\n".join(lines)


def _table(one: Explanation) -> list[str]:
    facts = Facts(one.operators, one.roofline)
    slowest = sorted(one.operators.nodes, key=lambda node: -node.us)[:SHOWN]
    lines = []
    for node in slowest:
        reached = facts.bound_us(node) / node.us if node.us else 0.0
        reason = "" if node.reason is None else f"; float: {node.reason}"
        lines.append(
            f"  {node.us / one.operators.us:6.1%}  {node.kernel:<20} {node.name}: {node.kind}, "
            f"{node.multiply_adds:,} multiply-adds, {reached:.0%} of its bound{reason}"
        )
    return lines
