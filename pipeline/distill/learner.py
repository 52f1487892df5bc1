"""What the optimiser sees while a student learns: the student, and what leaves before export.

Projections, exits and peers are trained beside the student and dropped with the learner. A network
that only answers (the average that teaches) is a part of it too, so that a checkpoint holds it,
but has no gradient and never leaves eval mode. Live teachers stay outside: they do not change.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Self

from torch import Tensor, nn

from .taps import Tapped


class Learner(nn.Module):
    """`student` with its helpers; `see` runs it and returns its tapped features too."""

    def __init__(
        self,
        student: nn.Module,
        *,
        taps: Sequence[str] = (),
        parts: Mapping[str, nn.Module] | None = None,
        peers: Sequence[nn.Module] = (),
        frozen: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.student = Tapped(student, taps) if taps else student
        self.parts = nn.ModuleDict(dict(parts or {}))
        self.peers = nn.ModuleList(peers)
        self.frozen = frozen
        if frozen is not None:
            frozen.eval().requires_grad_(False)

    def train(self, mode: bool = True) -> Self:
        """As `nn.Module.train`, but what only answers stays in eval mode."""
        super().train(mode)
        if self.frozen is not None:
            self.frozen.eval()
        return self

    def see(self, inputs: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Logits (N, C), and the features of the taps in their order."""
        if isinstance(self.student, Tapped):
            logits, features = self.student(inputs)
            return logits, features
        logits = self.student(inputs)
        return logits, []

    @property
    def network(self) -> nn.Module:
        """The student itself, as it will ship."""
        return self.student.network if isinstance(self.student, Tapped) else self.student

    def close(self) -> None:
        """Leave the student as it came: no hooks, no helpers."""
        if isinstance(self.student, Tapped):
            self.student.close()
