"""The record of one `compress verify`: `--json` prints it, the terminal shows it. No onnx."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import computed_field

from ..report import RungRecord
from ..spec import Spec


class FlipRecord(Spec):
    """A sample that the two answer differently although the reference is sure. Margins are the two
    largest logits' difference."""

    id: str
    name: str
    label: str | None
    reference: str
    candidate: str
    reference_margin: float
    candidate_margin: float | None  # None: not finite


class TaskRecord(Spec):
    """Both over the whole set. Without labels the counts of right answers are None."""

    n: int
    reference_correct: int | None
    candidate_correct: int | None
    lost: int | None  # reference right, candidate wrong
    gained: int | None
    upper_bound_95: float | None  # one-sided, of the drop, as a fraction
    limit_points: float
    flips: int
    benign: int  # of them, those whose reference margin is within the noise
    clear: tuple[FlipRecord, ...]  # the others, the largest margin first; at most CLEAR_FLIPS

    @property
    def drop_points(self) -> float | None:
        if self.lost is None or self.gained is None:
            return None
        return 100 * (self.lost - self.gained) / self.n


class DivergenceRecord(Spec):
    """The first value that leaves tolerance (exporters/divergence.py), or the int8 layer that loses
    most on identical inputs (exporters/layer_error.py)."""

    tensor: str
    op: str
    node: str
    layer: str
    max_abs: float | None
    tolerance: float | None
    sqnr_db: float | None
    deployed: bool
    differences: tuple[str, ...]


class LayerRecord(Spec):
    """An int8 layer and its float self on identical inputs."""

    tensor: str
    op: str
    layer: str
    sqnr_db: float | None  # None: no error
    worst_channel: int | None
    channel_sqnr_db: float | None
    dead: tuple[int, ...]  # output channels whose weights are all 0, and float's are not
    suspect: bool


class Verification(Spec):
    """Everything that one verification found out."""

    schema_version: Literal["edgestill-verify/1"] = "edgestill-verify/1"
    tool_version: str
    created_utc: str
    model: str
    model_sha256: str
    reference: str
    reference_kind: Literal["run", "onnx", "recipe", "golden"]
    n: int
    rungs: tuple[RungRecord, ...]
    task: TaskRecord | None = None
    divergence: DivergenceRecord | None = None
    layers: tuple[LayerRecord, ...] = ()
    notes: tuple[str, ...] = ()
    environment: dict[str, Any]

    @computed_field  # type: ignore[prop-decorator]
    @property
    def exit_code(self) -> int:
        """0 passed, 1 a rung failed or none was climbed."""
        return 0 if self.rungs and not self.failed else 1

    @property
    def failed(self) -> tuple[RungRecord, ...]:
        return tuple(rung for rung in self.rungs if not rung.passed)


def rung(
    name: str, reference: str, *, passed: bool, note: str, n: int = 0, **figures: Any
) -> RungRecord:
    """A rung that is no step of the ladder; figures as in `RungRecord`."""
    unknown = ("max_abs", "tolerance", "sqnr_db", "cosine", "top1_agreement")
    return RungRecord(
        rung=name, reference=reference, n=n, passed=passed, note=note,
        **(dict.fromkeys(unknown) | figures),
    )  # fmt: skip


def as_text(found: Verification, *, most: int = 10) -> str:
    """The record as lines for a terminal; at most `most` flips are named."""
    lines = [f"{found.model} against {found.reference} ({found.reference_kind}), n = {found.n}"]
    lines += [f"  note: {note}" for note in found.notes]
    lines += [_line(one) for one in found.rungs]
    if found.task is not None:
        lines += _flips(found.task, most)
    if found.failed:
        first = found.failed[0]
        lines.append(f"the difference enters at: {first.rung}")
        lines += _where(found.divergence)
        lines.append(f"FAIL: {len(found.failed)} of {len(found.rungs)} rungs failed")
    else:
        lines.append(f"PASS: {len(found.rungs)} rungs hold")
    return "\n".join(lines)


def _line(one: RungRecord) -> str:
    figures = []
    if one.max_abs is not None:
        allowed = "" if one.tolerance is None else f" of {one.tolerance:.2e}"
        figures.append(f"max|Δ| {one.max_abs:.2e}{allowed}")
    if one.sqnr_db is not None:
        figures.append(f"{one.sqnr_db:.1f} dB")
    if one.top1_agreement is not None:
        figures.append(f"same answers {one.top1_agreement:.2%}")
    said = "; ".join([*figures, *([one.note] if one.note else [])])
    return f"{'PASS' if one.passed else 'FAIL'}  {one.rung} ↔ {one.reference}: {said or 'holds'}"


def _flips(task: TaskRecord, most: int) -> list[str]:
    if not task.flips:
        return []
    lines = [
        f"flips: {task.flips} of {task.n}; {task.benign} benign (the reference's margin is within "
        f"the noise), {task.flips - task.benign} clear"
    ]
    for flip in task.clear[:most]:
        label = "" if flip.label is None else f", label {flip.label}"
        lines.append(
            f"  {flip.name}: {flip.reference} (margin {flip.reference_margin:.3g}) → "
            f"{flip.candidate}{label}"
        )
    return lines


def _where(found: DivergenceRecord | None) -> list[str]:
    if found is None:
        return []
    figures = [f"tensor {found.tensor}"]
    if found.max_abs is not None:
        allowed = "" if found.tolerance is None else f", tolerance {found.tolerance:.2e}"
        figures.append(f"max|Δ| {found.max_abs:.2e}{allowed}")
    if found.sqnr_db is not None:
        figures.append(f"SQNR {found.sqnr_db:.1f} dB")
    if not found.deployed:
        figures.append("with optimizations off")
    lines = [
        f"first tensor that leaves tolerance: {found.layer} ({found.op} {found.node}), "
        + ", ".join(figures)
    ]
    return lines + [f"  {difference}" for difference in found.differences]
