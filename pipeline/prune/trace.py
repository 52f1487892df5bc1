"""What must be cut together: units (one channel with all that depends on it) in groups.

Two channels belong to one unit if a layer reads both, or if one turns into the other: the union
of everything `probe.py` found. Units that take equally many channels from the same places form a
group. A transformer's residual width is one unit, since its LayerNorm mixes all of it; the units
of a feed-forward layer, of a grouped convolution or of attention whose heads are split by a fixed
head width come out by themselves; where the attention says how many heads it has, that number is
cut with them. The heads of nn.MultiheadAttention are added.

A group may be cut only if that is proven sound: with half of its units gone the network computes
what the dense one computes when whoever reads those channels multiplies them by zero. What fails
is protected, and the reason is kept.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from ...exporters.reference import evaluating
from ...models.plan import FewerHeads, head_count, is_within
from ..train.reproducible import own_attention
from .cut import Place, Side, cut, silence
from .probe import FAILURES, LOGITS, NORMS, Wiring, find_wiring
from .protect import is_protected

# rounding of float32 through a hundred layers, relative to the largest logit; a wrong cut is ≫ 1 %
SOUND = 1e-3


@dataclass(frozen=True, eq=False)
class Group:
    """U units that are cut alike.

    Attributes:
        name: path of the first layer that puts these channels out.
        places: place → int64 (U, n): the indices there that unit u takes.
    """

    name: str
    places: dict[Place, Tensor]

    @property
    def units(self) -> int:
        return len(next(iter(self.places.values())))

    @property
    def head_width(self) -> int | None:
        """Channels of a head, where the units are those of attention that consists of layers."""
        is_heads = any(side == "heads" for _, side in self.places)
        widths = [index.shape[1] for (_, side), index in self.places.items() if side == "out"]
        return widths[0] if is_heads and widths else None


@dataclass(frozen=True)
class Protected:
    """Layers that stay as they are, and why."""

    layers: tuple[str, ...]
    why: str


@dataclass(frozen=True)
class Groups:
    """All groups of a network that may be cut, and what may not."""

    free: tuple[Group, ...]
    protected: tuple[Protected, ...]


def find_groups(network: nn.Module, example: Tensor, *, protect: Sequence[str] = ()) -> Groups:
    """The network's groups; it is left as it is.

    Args:
        example: two inputs (`example.py`).
        protect: paths of modules (see `protect.py`) that stay as they are, inside and out.
    Raises:
        ModelError: the network cannot be traced.
    """
    wiring = find_wiring(network, example)
    groups, protected = _gather(network, wiring)
    groups = [_counted(group, network) for group in groups] + _heads(network)
    if wiring.unknown:
        protected.append(Protected(wiring.unknown, "reads something without a batch axis"))
    free = []
    for group in groups:
        why = _obvious(group, network, protect)
        if why:
            protected.append(Protected(_layers(group), why))
        else:
            free.append(group)
    sound, unsound = _prove(network, free, example)
    return Groups(tuple(sound), tuple(protected + unsound))


def without_blocks(groups: Sequence[Group], removed: Sequence[str]) -> tuple[Group, ...]:
    """The groups when these blocks give back their input: what lies inside is gone.

    Only for blocks that pass each channel on as itself, which residual ones do.
    """
    left = []
    for group in groups:
        places = {
            (path, side): index
            for (path, side), index in group.places.items()
            if not any(is_within(path, block) for block in removed)
        }
        if any(side != "in" for _, side in places):
            left.append(Group(group.name, places))
    return tuple(left)


def kept_places(
    network: nn.Module, groups: Sequence[Group], kept: dict[str, Tensor]
) -> dict[Place, Tensor]:
    """Place → indices that stay, when of each named group only these units (int64) do."""
    lost = lost_places(groups, kept)
    return {
        place: _complement(gone, _size(network, place)) for place, gone in lost.items() if len(gone)
    }


def lost_places(groups: Sequence[Group], kept: dict[str, Tensor]) -> dict[Place, Tensor]:
    """Place → indices that leave; a place may belong to several groups."""
    lost: dict[Place, list[Tensor]] = {}
    for group in groups:
        if group.name in kept:
            gone = _complement(kept[group.name], group.units)
            for place, index in group.places.items():
                lost.setdefault(place, []).append(index[gone].flatten())
    return {place: torch.cat(parts) for place, parts in lost.items()}


def difference_from_silenced(
    network: nn.Module, groups: Sequence[Group], kept: dict[str, Tensor], inputs: Tensor
) -> float | str:
    """How far the cut network is from the dense one that ignores the same units.

    Returns: the largest difference of a logit over the largest logit, or how the cut one fails.
    """
    smaller, silent = copy.deepcopy(network), copy.deepcopy(network)
    silence(silent, lost_places(groups, kept))
    try:
        cut(smaller, kept_places(network, groups, kept))
        with torch.no_grad(), own_attention(), evaluating(silent), evaluating(smaller):
            expected, got = silent(inputs), smaller(inputs)
    except FAILURES as error:
        return f"cut, the network fails ({' '.join(str(error).split())[:160]})"
    if got.shape != expected.shape:
        return f"cut, the network puts out {tuple(got.shape)} instead of {tuple(expected.shape)}"
    scale = float(expected.abs().max()) or 1.0
    return float((got - expected).abs().max()) / scale


def _gather(network: nn.Module, wiring: Wiring) -> tuple[list[Group], list[Protected]]:
    """Connected components of all dependencies, gathered by the places they take from."""
    start: dict[Place, int] = {}
    total = 0
    for place, width in _widths(wiring):
        start[place] = total
        total += width
    logits = total  # one node for the whole output: it is never cut
    left: list[npt.NDArray[np.int64]] = [np.zeros(0, np.int64)]
    right: list[npt.NDArray[np.int64]] = [np.zeros(0, np.int64)]
    for (source, reader), pairs in wiring.links.items():
        left.append(start[source, "out"] + pairs[:, 0])
        if reader == LOGITS:
            right.append(np.full(len(pairs), logits))
        else:
            side = _reading_side(network, reader)
            right.append(start[reader, side] + pairs[:, 1])
    for path in wiring.widths:
        part = network.get_submodule(path)
        if isinstance(part, nn.Conv2d) and part.groups > 1:
            ends: tuple[tuple[Side, int], ...] = (
                ("in", part.in_channels),
                ("out", part.out_channels),
            )
            for end, width in ends:
                first = np.arange(part.groups) * (part.in_channels // part.groups)
                per = width // part.groups
                left.append(start[path, "in"] + first.repeat(per))
                right.append(start[path, end] + np.arange(width))
    label = _components(np.concatenate(left), np.concatenate(right), total + 1)
    return _grouped(start, label[:total], total, frozen=int(label[logits]))


def _widths(wiring: Wiring) -> list[tuple[Place, int]]:
    found: list[tuple[Place, int]] = []
    for path in wiring.readers:  # in the order of the modules, so that groups are named by firsts
        if path in wiring.widths:
            found.append(((path, "out"), wiring.widths[path]))
            found.append(((path, "in"), wiring.readers[path]))
        else:
            found.append(((path, "out"), wiring.readers[path]))
    return found


def _reading_side(network: nn.Module, path: str) -> Side:
    return "out" if isinstance(network.get_submodule(path), NORMS) else "in"


def _components(
    left: npt.NDArray[np.int64], right: npt.NDArray[np.int64], nodes: int
) -> npt.NDArray[np.int64]:
    """The number of each node's connected component."""
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    edges = coo_array((np.ones(len(left), np.int8), (left, right)), shape=(nodes, nodes))
    labels: npt.NDArray[np.int64] = connected_components(edges, directed=False)[1]
    return labels


def _grouped(
    start: dict[Place, int], label: npt.NDArray[np.int64], total: int, *, frozen: int
) -> tuple[list[Group], list[Protected]]:
    """Units with equal footprints together, each place's indices ascending."""
    units: dict[int, dict[Place, list[int]]] = {}
    places = list(start)
    ends = [*(start[place] for place in places[1:]), total]
    for place, end in zip(places, ends, strict=True):
        for index, component in enumerate(label[start[place] : end]):
            units.setdefault(int(component), {}).setdefault(place, []).append(index)
    together: dict[tuple[tuple[Place, int], ...], list[dict[Place, list[int]]]] = {}
    protected = []
    for component, unit in units.items():
        writes = any(side == "out" for _, side in unit)
        reads = any(side == "in" for _, side in unit)
        if component == frozen:
            layers = tuple(dict.fromkeys(path for path, _ in unit))
            protected.append(Protected(layers, "gives the logits"))
        elif writes and reads:
            footprint = tuple((place, len(index)) for place, index in unit.items())
            together.setdefault(footprint, []).append(unit)
    groups = []
    names: dict[str, int] = {}
    for footprint, same in together.items():
        first = next(path for (path, side), _ in footprint if side == "out")
        names[first] = names.get(first, 0) + 1
        name = first if names[first] == 1 else f"{first} ({names[first]})"
        tensors = {place: torch.tensor([unit[place] for unit in same]) for place, _ in footprint}
        groups.append(Group(name, tensors))
    return groups, protected


def _heads(network: nn.Module) -> list[Group]:
    """Each attention's heads, where its projections are packed as torch packs them."""
    groups = []
    for path, part in network.named_modules():
        packed = isinstance(part, FewerHeads) or (
            isinstance(part, nn.MultiheadAttention)
            and part._qkv_same_embed_dim
            and part.bias_k is None
            and not part.add_zero_attn
        )
        if packed:
            assert isinstance(part, FewerHeads | nn.MultiheadAttention)
            index = torch.arange(part.num_heads)[:, None]
            groups.append(Group(path, {(path, "heads"): index}))
    return groups


def _counted(group: Group, network: nn.Module) -> Group:
    """The group with the innermost attention whose heads its units are, if one counts them.

    Units of one channel a layer are those of a feed-forward layer, however many there are.
    """
    outputs = [path for path, side in group.places if side == "out"]
    if min(index.shape[1] for index in group.places.values()) == 1:
        return group
    holders = [
        path
        for path, part in network.named_modules()
        if head_count(part) == group.units and all(is_within(out, path) for out in outputs)
    ]
    if not holders:
        return group
    heads: Place = (max(holders, key=len), "heads")
    return Group(group.name, {heads: torch.arange(group.units)[:, None], **group.places})


def _obvious(group: Group, network: nn.Module, protect: Sequence[str]) -> str:
    """Why the group stays, where that needs no trial; empty if it needs one."""
    named = [path for path in _layers(group) if is_protected(path, protect)]
    if named:
        return f"prune.protect names {named[0]}"
    tied = _tied(network)
    shared = [path for path in _layers(group) if path in tied]
    if shared:
        return f"{shared[0]} shares its weight with another layer"
    if group.units == 1:
        return "its channels depend on one another (they are normalised or mixed together)"
    return ""


def _tied(network: nn.Module) -> set[str]:
    """Paths of layers one of whose parameters has a second owner."""
    owners: dict[int, list[str]] = {}
    for path, part in network.named_modules():
        for parameter in part._parameters.values():
            if parameter is not None:
                owners.setdefault(id(parameter), []).append(path)
    return {path for paths in owners.values() if len(paths) > 1 for path in paths}


def _prove(
    network: nn.Module, groups: Sequence[Group], example: Tensor
) -> tuple[list[Group], list[Protected]]:
    """Sound groups and the others, by halves: all at once where all is well."""

    def check(some: Sequence[Group]) -> tuple[list[Group], list[Protected]]:
        if not some:
            return [], []
        kept = {group.name: torch.arange(0, group.units, 2) for group in some}
        found = difference_from_silenced(network, some, kept, example)
        if isinstance(found, float) and found <= SOUND:
            return list(some), []
        if len(some) > 1:
            middle = len(some) // 2
            first, second = check(some[:middle]), check(some[middle:])
            return first[0] + second[0], first[1] + second[1]
        why = found if isinstance(found, str) else (
            f"without some of its channels the network computes something else than if they were "
            f"zero (logits are {found:.1g} of the largest apart)"
        )  # fmt: skip
        return [], [Protected(_layers(some[0]), why)]

    return check(groups)


def _layers(group: Group) -> tuple[str, ...]:
    return tuple(dict.fromkeys(path for path, _ in group.places))


def _size(network: nn.Module, place: Place) -> int:
    path, side = place
    part = network.get_submodule(path)
    if side == "heads":
        return head_count(part)
    if isinstance(part, nn.Conv2d):
        return part.in_channels if side == "in" else part.out_channels
    if isinstance(part, nn.Linear):
        return part.in_features if side == "in" else part.out_features
    return part.num_channels if isinstance(part, nn.GroupNorm) else part.num_features  # type: ignore[return-value]


def _complement(index: Tensor, size: int) -> Tensor:
    stays = torch.ones(size, dtype=torch.bool)
    stays[index] = False
    return stays.nonzero().flatten()
