"""Which layers of student and teacher are compared, and what has to be learnt to compare them.

Layers come from the recipe by name, or are the ends of the resolution stages, deepest with
deepest; of texts the layers of the encoders (`token_layers.py`). Every shape is found by one dry
forward; what cannot be joined is said before training.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from ..errors import RecipeError
from ..training_spec import (
    FeatureSpec,
    HiddenSpec,
    HintSpec,
    RelationsSpec,
    ReviewSpec,
    RkdSpec,
    TokenSpec,
)
from .parts import Projector, RelationHeads, Review, TokenProjector
from .taps import Tapped, feature_shapes, find_taps, match_stages, stage_ends
from .token_layers import has_fewer_heads, relation_heads, token_layers

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Joint:
    """One objective's layers: positions in the student's taps and in those of teacher `of`."""

    name: str
    of: int  # 0-based
    student: tuple[int, ...]
    teacher: tuple[int, ...]


@dataclass(frozen=True)
class Joints:
    """All that the feature objectives of a plan tap."""

    student_paths: tuple[str, ...]
    teacher_paths: tuple[tuple[str, ...], ...]  # of each teacher
    joints: tuple[Joint, ...]
    parts: dict[str, nn.Module]

    def pick(
        self, student: Sequence[Tensor], teachers: Sequence[Sequence[Tensor]]
    ) -> dict[str, tuple[list[Tensor], list[Tensor]]]:
        """Objective name → its features, of those that the taps gave."""
        return {
            joint.name: (
                [student[index] for index in joint.student],
                [teachers[joint.of][index] for index in joint.teacher],
            )
            for joint in self.joints
        }


def join(
    terms: Sequence[FeatureSpec],
    student: nn.Module,
    teachers: Sequence[nn.Module],
    *,
    input_shape: tuple[int, ...],
) -> Joints:
    """Find the layers of every feature objective, and make the parts that join them.

    Parts are initialised from torch's global generator.

    Raises:
        RecipeError: a name that matches nothing, lists of different lengths, shapes that cannot be
            compared, or a text encoder whose layers are not found. ModelError: a network has no
            stages to propose.
    """
    student_paths: list[str] = []
    teacher_paths: list[list[str]] = [[] for _ in teachers]
    joints: list[Joint] = []
    parts: dict[str, nn.Module] = {}
    part: nn.Module | None
    for term in terms:
        teacher, number = teachers[term.of - 1], term.of - 1
        if isinstance(term, TokenSpec):
            mine, theirs = token_layers(term, student, teacher)
        else:
            mine, theirs = _layers(term, student, teacher, input_shape)
        joints.append(
            Joint(
                _name(term),
                number,
                tuple(_position(student_paths, path) for path in mine),
                tuple(_position(teacher_paths[number], path) for path in theirs),
            )
        )
        shapes = _shapes(student, mine, input_shape), _shapes(teacher, theirs, input_shape)
        if isinstance(term, TokenSpec):
            part = _token_part(term, *shapes, (student, mine), (teacher, theirs))
        else:
            part = _part(term, *shapes)
        if part is not None:
            parts[_name(term)] = part
    return Joints(
        tuple(student_paths), tuple(tuple(paths) for paths in teacher_paths), tuple(joints), parts
    )


def _layers(
    term: FeatureSpec, student: nn.Module, teacher: nn.Module, input_shape: tuple[int, ...]
) -> tuple[list[str], list[str]]:
    where = f"distill.objectives.{_name(term)}"
    mine = (
        stage_ends(student, input_shape)
        if term.student is None
        else find_taps(student, term.student, where=f"{where}.student")
    )
    theirs = (
        stage_ends(teacher, input_shape)
        if term.teacher is None
        else find_taps(teacher, term.teacher, where=f"{where}.teacher")
    )
    if term.student is not None and term.teacher is not None:
        if len(mine) != len(theirs) and not isinstance(term, ReviewSpec):
            raise RecipeError(
                f"{where}: expected as many layers of the student as of the teacher, got "
                f"{len(mine)} ({', '.join(mine)}) and {len(theirs)} ({', '.join(theirs)})"
            )
        if isinstance(term, RkdSpec) and len(mine) != 1:
            raise RecipeError(f"{where}: expected one layer of each, got {len(mine)}")
        return list(mine), list(theirs)
    pairs = match_stages([()] * len(mine), [()] * len(theirs))
    if isinstance(term, HintSpec):
        pairs = pairs[len(pairs) // 2 :][:1]  # the middle stage, as the authors' "layer 2" of 3
    if isinstance(term, RkdSpec):
        pairs = pairs[-1:]
    return [mine[index] for index, _ in pairs], [theirs[index] for _, index in pairs]


def _part(term: FeatureSpec, student: list[Shape], teacher: list[Shape]) -> nn.Module | None:
    for shape in (*student, *teacher):
        if len(shape) not in (1, 3):
            raise RecipeError(
                f"distill.objectives.{_name(term)}: expected layers that put out (N, C, H, W) or "
                f"(N, D), got (N, {', '.join(map(str, shape))}); name other layers"
            )
    is_map = {len(shape) == 3 for shape in (*student, *teacher)}
    if not isinstance(term, RkdSpec) and (
        len(is_map) > 1 or (False in is_map and not isinstance(term, HintSpec))
    ):
        raise RecipeError(
            f"distill.objectives.{_name(term)}: expected feature maps (N, C, H, W) on both sides, "
            f"got {student} of the student and {teacher} of the teacher; name other layers"
        )
    if isinstance(term, HintSpec):
        pairs = zip(student, teacher, strict=True)
        return nn.ModuleList(Projector(mine, theirs) for mine, theirs in pairs)
    if isinstance(term, ReviewSpec):
        return Review(student, teacher)
    return None


def _token_part(
    term: TokenSpec,
    student: list[Shape],
    teacher: list[Shape],
    of_student: tuple[nn.Module, Sequence[str]],
    of_teacher: tuple[nn.Module, Sequence[str]],
) -> nn.Module:
    """`of_student`, `of_teacher`: the network and its layers."""
    where = f"distill.objectives.{_name(term)}"
    for shape in (*student, *teacher):
        if len(shape) != 2:
            raise RecipeError(
                f"{where}: expected layers that put out (N, S, D), a row a token, got "
                f"(N, {', '.join(map(str, shape))}); name other layers"
            )
    if isinstance(term, HiddenSpec):
        return TokenProjector([(m[1], t[1]) for m, t in zip(student, teacher, strict=True)])
    assert isinstance(term, RelationsSpec)
    widths = [shape[1] for shape in (*student, *teacher)]
    is_cut = has_fewer_heads(of_student[0], of_student[1][0])
    network, paths = of_teacher
    heads = relation_heads(term.heads, network, paths[0], widths=widths, is_cut=is_cut, where=where)
    return RelationHeads(heads)


def _shapes(network: nn.Module, paths: list[str], input_shape: tuple[int, ...]) -> list[Shape]:
    tapped = Tapped(network, paths)
    try:
        return feature_shapes(tapped, input_shape)
    finally:
        tapped.close()


def _position(paths: list[str], path: str) -> int:
    if path not in paths:
        paths.append(path)
    return paths.index(path)


def _name(term: FeatureSpec) -> str:
    name: str = term.name  # type: ignore[attr-defined]  # every objective but the bases has one
    return name
