"""The search: mixes of removed blocks and cut channels that all reach the goal, each measured.

For b = 0, …, B removed blocks, least harmful first, channels are cut until the goal is met; B is
the first number of blocks that meets it alone. Where B is large, MIXES numbers are spread over
0 … B. Every mix is exported, timed in turns with the dense network, its BatchNorm statistics taken
anew from training samples, and its accuracy measured on validation without training.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from ...exporters.reference import evaluating
from ...models.store import count_parameters
from ..errors import RecipeError
from .blocks import Removal, removal_order, without
from .cost import count_multiply_adds
from .cut import cut
from .example import fast
from .select import kept_units
from .timing import export_for_timing, time_in_turns
from .trace import SOUND, Group, difference_from_silenced, kept_places, without_blocks

Array = np.ndarray[Any, Any]

MIXES = 6  # exported and timed: some 5 s each for a net of 56 layers
BISECTIONS = 9  # of the share of units cut, so to 1 in 512
COARSE_STEPS = 4  # groups, one after the other, whose step is too large for what is left to cut
CLOSE = 0.97  # of the goal: no step of the search is finer for small nets
TIMED_BISECTIONS = 4  # each exports a file; 1/16 of the way between nothing and all


@dataclass(frozen=True)
class Goal:
    """At most `share` of the dense network's `dense` (multiply-adds, parameters), or of its p50."""

    kind: Literal["macs", "parameters", "latency"]
    share: float
    dense: int  # multiply-adds for a latency goal, whose dense p50 is measured with each candidate


@dataclass(frozen=True)
class Ranked:
    """What may leave, and how much it matters.

    Attributes:
        groups: those that may be cut.
        scores: group name → (U,).
        blocks: paths that may be removed.
    """

    groups: tuple[Group, ...]
    scores: dict[str, Tensor]
    blocks: tuple[str, ...]
    round_to: int


@dataclass(frozen=True)
class Samples:
    """What a search runs networks on, (N, C, H, W) or (N, K, S).

    Attributes:
        example: two inputs to trace, prove and count with (`example.py`).
        recalibration, harm: of train, for BatchNorm and for the harm of removing blocks.
        timing: of train, to time with; texts all of the length they are timed at.
    """

    example: Tensor
    recalibration: Tensor
    harm: Tensor
    timing: Array


@dataclass
class Mix:
    """One candidate before it is measured: what left, and the network that remains."""

    removed: tuple[Removal, ...]
    kept: dict[str, Tensor]
    network: nn.Module
    multiply_adds: int
    parameters: int


def find_mixes(
    network: nn.Module,
    ranked: Ranked,
    goal: Goal,
    *,
    dense_file: Path,
    samples: Samples,
    tick: Callable[[str], None],
) -> list[Mix]:
    """Mixes that reach the goal, fewest removed blocks first.

    Args:
        network: the one to cut; it is left as it is.
        dense_file: float ONNX of the dense network, for a latency goal.
        tick: told what is being done.

    Raises:
        RecipeError: the goal cannot be reached without emptying layers.
        ExportError: a candidate cannot be exported (latency goals alone).
    """
    costs = _Costs(network, ranked, goal, dense_file=dense_file, samples=samples)
    order: list[Removal] = []
    if not costs.reached_by_blocks(order):
        blocks = ranked.blocks
        for removal in removal_order(network, blocks, samples.harm, at_most=len(blocks)):
            order.append(removal)
            tick(f"without {removal.path}")
            if costs.reached_by_blocks(order):
                break
    most = len(order)
    mixes = []
    for count in sorted({round(n * most / (MIXES - 1)) for n in range(MIXES)}):
        tick(f"channels beside {count} of {most} blocks")
        kept = costs.least_cut(order[:count])
        if kept is not None:
            mixes.append(costs.build(order[:count], kept))
    if not mixes:
        raise RecipeError(costs.why_unreachable(order))
    return mixes


class _Costs:
    """What cutting costs and saves, for one network and goal."""

    def __init__(
        self,
        network: nn.Module,
        ranked: Ranked,
        goal: Goal,
        *,
        dense_file: Path,
        samples: Samples,
    ) -> None:
        self.network, self.ranked, self.goal = network, ranked, goal
        self.dense_file, self.example, self.timing = dense_file, samples.example, samples.timing
        # rounding gives many shares of units the same channel counts, and those decide the cost
        self._known: dict[tuple[object, ...], float] = {}

    def reached_by_blocks(self, removed: Sequence[Removal]) -> bool:
        """Whether the goal is met without cutting channels; of latency goals, likely met."""
        return self._counted(without(self.network, _paths(removed))) <= self.goal.share

    def least_cut(self, removed: Sequence[Removal]) -> dict[str, Tensor] | None:
        """Units that stay (of groups that lose some) when just enough leave beside these blocks.

        Channels leave in steps of `round_to`, and in a group that runs through the whole network
        one step may be far more than is needed. Such a group is left at its size before the step
        and the others are cut instead, as long as they can make up for it.

        Returns: None if all that may leave is not enough.
        """
        least: dict[str, int] = {}
        best: tuple[float, dict[str, Tensor]] | None = None
        for _ in range(1 if self.goal.kind == "latency" else COARSE_STEPS):
            found = self._bisect(removed, least)
            if found is None:
                break
            share, before, after = found
            if best is None or share > best[0]:
                best = share, after
            if share > CLOSE * self.goal.share or before is after:
                break
            least |= self._last_step(removed, before, after)
        return None if best is None else best[1]

    def build(self, removed: Sequence[Removal], kept: dict[str, Tensor]) -> Mix:
        base = without(self.network, _paths(removed))
        groups = without_blocks(self.ranked.groups, _paths(removed))
        found = difference_from_silenced(base, groups, kept, self.example)
        assert isinstance(found, float), found
        assert found <= SOUND, "each group was proven sound, and blocks pass channels on"
        cut(base, kept_places(base, groups, kept))
        return Mix(
            removed=tuple(removed),
            kept=kept,
            network=base,
            multiply_adds=count_multiply_adds(base, self.example),
            parameters=count_parameters(base),
        )

    def why_unreachable(self, order: Sequence[Removal]) -> str:
        least = min(
            self._share(order[:count], self._kept(order[:count], 1.0)) for count in (0, len(order))
        )
        return (
            f"prune.{self.goal.kind}: {self.goal.share:.3g} of the dense network is asked for, and "
            f"{least:.3g} is what stays when every layer that may be cut keeps its least "
            f"(prune.round_to: {self.ranked.round_to}), with {len(order)} blocks removed at most; "
            "going on would leave layers empty. Ask for more, protect less, or lower round_to"
        )

    def _bisect(
        self, removed: Sequence[Removal], least: Mapping[str, int]
    ) -> tuple[float, dict[str, Tensor], dict[str, Tensor]] | None:
        """The cost's share and the units kept by the smallest cut that reaches the goal, with
        those of the largest that does not before it: (share, before, after)."""
        goal = self.goal.share
        before = self._kept(removed, 0.0)
        share = self._share(removed, before)
        if share <= goal:
            return share, before, before
        after = self._kept(removed, 1.0, least)
        share = self._share(removed, after)
        if share > goal:
            return None
        low, high = 0.0, 1.0
        for _ in range(TIMED_BISECTIONS if self.goal.kind == "latency" else BISECTIONS):
            middle = (low + high) / 2
            kept = self._kept(removed, middle, least)
            found = self._share(removed, kept)
            if found <= goal:
                high, after, share = middle, kept, found
            else:
                low, before = middle, kept
        return share, before, after

    def _last_step(
        self,
        removed: Sequence[Removal],
        before: Mapping[str, Tensor],
        after: Mapping[str, Tensor],
    ) -> dict[str, int]:
        """Groups that the last step cut → units they had before it."""
        return {
            group.name: had
            for group in without_blocks(self.ranked.groups, _paths(removed))
            if group.name in after
            and (had := len(before.get(group.name, range(group.units)))) > len(after[group.name])
        }

    def _kept(
        self, removed: Sequence[Removal], share_cut: float, least: Mapping[str, int] | None = None
    ) -> dict[str, Tensor]:
        groups = without_blocks(self.ranked.groups, _paths(removed))
        names = {group.name for group in groups}
        scores = {name: own for name, own in self.ranked.scores.items() if name in names}
        return kept_units(
            groups, scores, share_cut=share_cut, round_to=self.ranked.round_to, least=least
        )

    def _share(self, removed: Sequence[Removal], kept: dict[str, Tensor]) -> float:
        """Share of the dense network's cost that stays."""
        key = (*_paths(removed), *((name, len(index)) for name, index in kept.items()))
        if key not in self._known:
            self._known[key] = self._fresh_share(removed, kept)
        return self._known[key]

    def _fresh_share(self, removed: Sequence[Removal], kept: dict[str, Tensor]) -> float:
        base = without(self.network, _paths(removed))
        groups = without_blocks(self.ranked.groups, _paths(removed))
        cut(base, kept_places(base, groups, kept))
        return self._timed(base) if self.goal.kind == "latency" else self._counted(base)

    def _counted(self, network: nn.Module) -> float:
        if self.goal.kind == "parameters":
            return count_parameters(network) / self.goal.dense
        return count_multiply_adds(network, self.example) / self.goal.dense

    def _timed(self, network: nn.Module) -> float:
        path = self.dense_file.with_name("trial.onnx")
        export_for_timing(network, self.timing, path)
        dense, found = time_in_turns([self.dense_file, path], self.timing)
        path.unlink()
        return found / dense


def _paths(removed: Sequence[Removal]) -> list[str]:
    return [removal.path for removal in removed]


def recalibrate(network: nn.Module, inputs: Tensor, *, batch_size: int = 128) -> None:
    """BatchNorm statistics as the mean over these inputs' batches, in place; nothing else changes.

    The activations of a cut network are others than those its statistics were taken from.

    Args:
        inputs: of train, float32 (N, C, H, W) or int64 (N, K, S).
    """
    norms = [m for m in network.modules() if isinstance(m, nn.BatchNorm1d | nn.BatchNorm2d)]
    norms = [norm for norm in norms if norm.running_mean is not None]
    if not norms:
        return
    with evaluating(network), _averaging(norms), torch.no_grad():
        for batch in torch.split(inputs, batch_size):
            if len(batch) > 1:  # one sample has no variance
                network(fast(batch))


@contextmanager
def _averaging(norms: Sequence[nn.BatchNorm1d | nn.BatchNorm2d]) -> Iterator[None]:
    """In train mode from fresh statistics, a cumulative average; counters and momenta as before."""
    before = [(norm.momentum, norm.num_batches_tracked) for norm in norms]
    for norm in norms:
        norm.num_batches_tracked = torch.zeros((), dtype=torch.long)
        norm.reset_running_stats()
        norm.momentum, norm.training = None, True
    try:
        yield
    finally:
        for norm, (momentum, count) in zip(norms, before, strict=True):
            norm.momentum, norm.num_batches_tracked = momentum, count
