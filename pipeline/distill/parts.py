"""Trainable helpers of the objectives. They learn beside the student and leave before export.

Every size comes from shapes found by a dry forward; none is written by hand.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Shape = tuple[int, ...]
_WIDEST = 512  # of the fusion's inner channels, as in ReviewKD's code


class Projector(nn.Module):
    """Brings a student's feature to the teacher's channels: 1 × 1 convolution (or a matrix) and
    BatchNorm (FitNet's regressor, Romero et al. 2015). Of two sizes the larger is pooled."""

    def __init__(self, student_shape: Shape, teacher_shape: Shape) -> None:
        """Args: (C, H, W), or (D,) of both."""
        super().__init__()
        inputs, outputs = student_shape[0], teacher_shape[0]
        self.project: nn.Module
        self.norm: nn.Module
        if len(student_shape) == 1:
            self.project = nn.Linear(inputs, outputs, bias=False)
            self.norm = nn.BatchNorm1d(outputs)
        else:
            self.project = nn.Conv2d(inputs, outputs, 1, bias=False)
            self.norm = nn.BatchNorm2d(outputs)

    def forward(self, student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
        """The student's projected feature and the teacher's, of one shape."""
        if student.ndim == 4:
            height, width = (min(student.shape[axis], teacher.shape[axis]) for axis in (2, 3))
            size = (height, width)
            student, teacher = (
                f if tuple(f.shape[2:]) == size else F.adaptive_avg_pool2d(f, size)
                for f in (student, teacher)
            )
        return self.norm(self.project(student)), teacher


class Review(nn.Module):
    """ReviewKD's fusion (Chen et al. 2021, §3.2): from the deepest stage to the shallowest, each of
    the student's maps is merged with what the deeper ones have gathered, weighted by attention,
    and projected to the teacher's map of that stage."""

    def __init__(self, student_shapes: Sequence[Shape], teacher_shapes: Sequence[Shape]) -> None:
        """Args: (C, H, W) shallow → deep, as many of both."""
        super().__init__()
        inner = min(_WIDEST, max(shape[0] for shape in teacher_shapes))
        pairs = list(zip(student_shapes, teacher_shapes, strict=True))
        self.fusions = nn.ModuleList(
            _Fusion(mine[0], inner, theirs, fuses=index < len(pairs) - 1)
            for index, (mine, theirs) in enumerate(pairs)
        )

    def forward(self, features: Sequence[Tensor]) -> list[Tensor]:
        """The student's maps, shallow → deep → maps of the teacher's shapes, in that order."""
        gathered, fused = None, []
        for fusion, feature in zip(reversed(self.fusions), reversed(features), strict=True):
            output, gathered = fusion(feature, gathered)
            fused.append(output)
        return fused[::-1]


class _Fusion(nn.Module):
    """One stage of `Review`."""

    def __init__(self, inputs: int, inner: int, teacher: Shape, *, fuses: bool) -> None:
        super().__init__()
        self.size = (teacher[1], teacher[2])
        self.enter = nn.Sequential(nn.Conv2d(inputs, inner, 1, bias=False), nn.BatchNorm2d(inner))
        self.leave = nn.Sequential(
            nn.Conv2d(inner, teacher[0], 3, padding=1, bias=False), nn.BatchNorm2d(teacher[0])
        )
        self.attend = nn.Conv2d(2 * inner, 2, 1) if fuses else None

    def forward(self, feature: Tensor, gathered: Tensor | None) -> tuple[Tensor, Tensor]:
        mine = F.interpolate(self.enter(feature), self.size, mode="nearest")
        if self.attend is not None:
            assert gathered is not None
            deeper = F.interpolate(gathered, self.size, mode="nearest")
            shares = self.attend(torch.cat([mine, deeper], dim=1)).sigmoid()
            mine = mine * shares[:, :1] + deeper * shares[:, 1:]
        return self.leave(mine), mine


class TokenProjector(nn.Module):
    """Brings a student's hidden states to the teacher's widths: a matrix without bias, learnt even
    where the widths are equal (W_h in TinyBERT, Jiao et al. 2020, §3.1). Layers of the same two
    widths share it, as in the authors' code. Between equal widths it begins as the identity."""

    def __init__(self, widths: Sequence[tuple[int, int]]) -> None:
        """Args: width of the student's states and of the teacher's, a pair of layers."""
        super().__init__()
        self.names = [f"{inputs}_{outputs}" for inputs, outputs in widths]
        self.matrices = nn.ModuleDict()
        for name, (inputs, outputs) in dict(zip(self.names, widths, strict=True)).items():
            matrix = nn.Linear(inputs, outputs, bias=False)
            if inputs == outputs:
                nn.init.eye_(matrix.weight)
            self.matrices[name] = matrix

    def forward(self, students: Sequence[Tensor]) -> list[Tensor]:
        """(N, S, D) a layer → the same in the teacher's widths."""
        pairs = zip(self.names, students, strict=True)
        return [self.matrices[name](states) for name, states in pairs]


class RelationHeads(nn.Module):
    """How many relation heads queries, keys and values are split into. Nothing to learn."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.count = count


class CurriculumTemperature(nn.Module):
    """A temperature learnt against the student (CTKD, Li et al. 2023): T = start + span · σ(θ).

    θ moves to make the loss larger, for its gradient is reversed and scaled by a strength that
    rises from 0: the task gets harder as the student gets better. θ begins at 1, as in the
    authors' code: T = 1 + 20 · σ(1) = 15.6.
    """

    def __init__(self, start: float = 1.0, span: float = 20.0) -> None:
        super().__init__()
        self.start, self.span = start, span
        self.theta = nn.Parameter(torch.ones(()))

    def forward(self, strength: float) -> Tensor:
        """The temperature, 0-dim, > 0. strength ≥ 0: 0 leaves θ where it is."""
        theta: Tensor = _Reversed.apply(self.theta, strength)  # type: ignore[no-untyped-call]
        return self.start + self.span * theta.sigmoid()


def curriculum_strength(epoch: int, *, ramp_epochs: int = 10, top: float = 1.0) -> float:
    """Half a cosine from 0 to `top` over the first epochs (Li et al. 2023, §3.3)."""
    done = min(1.0, epoch / ramp_epochs)
    return top * 0.5 * (1 - math.cos(math.pi * done))


class _Reversed(torch.autograd.Function):
    """The identity, whose gradient is -strength times what comes (Ganin & Lempitsky 2015)."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, strength: float) -> Tensor:
        ctx.strength = strength
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor, None]:
        return -ctx.strength * grads[0], None
