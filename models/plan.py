"""What pruning left of a network: the shapes that remain and the blocks that left, as plain data.

A plan belongs to the network its factory builds. `apply_plan` gives that network the plan's
shapes, zeros in them, without tracing anything; then the weights load. It records absolute shapes,
so a network pruned twice has one plan too: the shapes after the second time.

    {"removed": ["layer1.3"],
     "modules": {"layer1.0.conv1": {"in_channels": 16, "out_channels": 8, "groups": 1}, …}}

Which channels should leave is decided in `pipeline/prune`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..pipeline.errors import ModelError


@dataclass(frozen=True)
class Plan:
    """What remains of a network.

    Attributes:
        removed: paths of the modules that give back their input; none inside another.
        modules: path → size attributes of a module (`sizes_of`) that are not the factory's.
    """

    removed: tuple[str, ...] = ()
    modules: Mapping[str, Mapping[str, int]] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """JSON-able; equal plans give equal documents."""
        return {
            "removed": sorted(self.removed),
            "modules": {path: dict(sizes) for path, sizes in sorted(self.modules.items())},
        }

    @staticmethod
    def from_json(document: Mapping[str, Any]) -> Plan:
        """What `to_json` gave. Raises: KeyError, TypeError, ValueError for anything else."""
        modules = {
            str(path): {str(name): int(size) for name, size in sizes.items()}
            for path, sizes in document["modules"].items()
        }
        return Plan(tuple(str(path) for path in document["removed"]), modules)


# What attention modules call the number of their heads, and the channels of all heads together.
HEADS = ("num_attention_heads", "n_heads", "num_heads")
_OF_ALL_HEADS = ("all_head_size",)

# Modules that can be cut → the attributes that say their size.
SIZES: dict[type[nn.Module], tuple[str, ...]] = {
    nn.Conv2d: ("in_channels", "out_channels", "groups"),
    nn.Linear: ("in_features", "out_features"),
    nn.BatchNorm1d: ("num_features",),
    nn.BatchNorm2d: ("num_features",),
    nn.GroupNorm: ("num_groups", "num_channels"),
    nn.MultiheadAttention: ("num_heads",),
}


def sizes_of(module: nn.Module) -> dict[str, int]:
    """The module's size attributes; none if it is of no kind that can be cut.

    An attention that consists of Linear layers has no tensors of its own: it counts its heads.
    """
    kind = next((kind for kind in SIZES if isinstance(module, kind)), None)
    if kind is not None:
        return {name: int(getattr(module, name)) for name in SIZES[kind]}
    own = {name: vars(module).get(name) for name in (*HEADS, *_OF_ALL_HEADS)}
    found = {name: size for name, size in own.items() if type(size) is int and size > 0}
    return found if set(found) & set(HEADS) else {}


def head_count(module: nn.Module) -> int:
    """Heads of an attention module; 0: it is none, or does not say."""
    sizes = sizes_of(module)
    return next((sizes[name] for name in HEADS if name in sizes), 0)


def all_sizes(module: nn.Module) -> dict[str, dict[str, int]]:
    """Path → sizes of every module inside that can be cut, a shared one under its first path.

    What an attention consists of follows from its heads and is left out.
    """
    parts = dict(module.named_modules())
    packed = [path for path, part in parts.items() if isinstance(part, _ATTENTION)]
    return {
        path: sizes
        for path, part in parts.items()
        if (sizes := sizes_of(part)) and not any(path.startswith(f"{one}.") for one in packed)
    }


def extend_plan(
    plan: Plan | None,
    *,
    before: Mapping[str, Mapping[str, int]],
    after: Mapping[str, Mapping[str, int]],
    removed: Iterable[str] = (),
) -> Plan:
    """The plan of a network that had `plan` (None: the factory's) and was cut once more.

    Args:
        before, after: `all_sizes` of it before and after the cut.
        removed: blocks that left this time.
    """
    old = plan or Plan()
    gone = _outermost((*old.removed, *removed))
    changed = {path: dict(sizes) for path, sizes in after.items() if sizes != before.get(path)}
    kept = {
        path: sizes
        for path, sizes in {**old.modules, **changed}.items()
        if not any(is_within(path, block) for block in gone)
    }
    return Plan(gone, kept)


def apply_plan(module: nn.Module, plan: Plan) -> None:
    """Give the factory's network the plan's shapes, in place; tensors that change hold zeros.

    Raises:
        ModelError: the plan names a module that the network lacks, or sizes it cannot have.
    """
    for path in plan.removed:
        _find(module, path)
        module.set_submodule(path, Skip())
    for path, sizes in plan.modules.items():
        part = _find(module, path)
        if not sizes_of(part).keys() == sizes.keys() or min(sizes.values()) < 1:
            raise ModelError(
                f"{path}: a {type(part).__name__} cannot have the sizes {dict(sizes)} of the "
                "pruning plan; the network's code has changed since it was pruned: prune it again"
            )
        resize(module, path, sizes)


def resize(root: nn.Module, path: str, sizes: Mapping[str, int]) -> nn.Module:
    """The module at `path` with other sizes, its tensors zero; in place but for attention.

    An nn.MultiheadAttention cannot hold fewer heads than its width asks for, so
    `FewerHeads` takes its place.
    """
    part = root.get_submodule(path)
    if isinstance(part, nn.MultiheadAttention | FewerHeads):
        root.set_submodule(path, FewerHeads.like(part, sizes["num_heads"]))
        for outer, encoder in root.named_modules():
            if isinstance(encoder, nn.TransformerEncoder) and (not outer or is_within(path, outer)):
                encoder.use_nested_tensor = False  # the batch of padded texts that it would pack
        return root.get_submodule(path)
    for name, size in sizes.items():
        setattr(part, name, size)
    for name, shape in _shapes(part).items():
        _replace(part, name, shape)
    return part


def is_within(path: str, block: str) -> bool:
    """Whether the module at `path` is `block` or inside it."""
    return path == block or path.startswith(f"{block}.")


class Skip(nn.Identity):
    """Where a block was: gives back its first input, whatever else it is called with."""

    def forward(self, input: Tensor, *_: object, **__: object) -> Tensor:
        return input


class FewerHeads(nn.Module):
    """nn.MultiheadAttention after heads left: H heads of width D inside, E outside.

    Its tensors have nn.MultiheadAttention's names: in_proj_weight (3·H·D, E), in_proj_bias
    (3·H·D,), out_proj.weight (E, H·D). Called like one; inputs are (N, S, E) if `batch_first`,
    else (S, N, E). Returns the output and, if asked for, the attention weights, averaged over the
    heads that remain or not.
    """

    # nn.TransformerEncoderLayer reads it, and then leaves its fused path for full-width heads alone
    _qkv_same_embed_dim = False

    def __init__(
        self, width: int, num_heads: int, *, head_dim: int, bias: bool, batch_first: bool
    ) -> None:
        super().__init__()
        self.embed_dim, self.num_heads, self.head_dim = width, num_heads, head_dim
        self.batch_first, self.dropout = batch_first, 0.0
        inner = num_heads * head_dim
        self.in_proj_weight = nn.Parameter(torch.zeros(3 * inner, width))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * inner)) if bias else None
        self.out_proj = nn.Linear(inner, width, bias=bias)
        with torch.no_grad():
            for parameter in self.out_proj.parameters():
                parameter.zero_()

    @staticmethod
    def like(module: nn.MultiheadAttention | FewerHeads, num_heads: int) -> FewerHeads:
        made = FewerHeads(
            module.embed_dim,
            num_heads,
            head_dim=module.head_dim,
            bias=module.in_proj_bias is not None,
            batch_first=module.batch_first,
        )
        made.dropout = module.dropout
        made.train(module.training)
        return made.to(module.out_proj.weight)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        first = self.batch_first
        q, k, v = (x if first else x.transpose(0, 1) for x in (query, key, value))
        weights = self.in_proj_weight.chunk(3)
        biases = (None,) * 3 if self.in_proj_bias is None else self.in_proj_bias.chunk(3)
        q, k, v = (
            torch.unflatten(F.linear(x, w, b), -1, (-1, self.head_dim)).transpose(1, 2)
            for x, w, b in zip((q, k, v), weights, biases, strict=True)
        )
        scores = q @ k.transpose(-2, -1) * self.head_dim**-0.5  # (N, H, S, S)
        scores = _masked(scores, attn_mask, is_causal=is_causal)
        if key_padding_mask is not None:
            scores = _masked(scores, key_padding_mask[:, None, None, :], is_causal=False)
        shares = scores.softmax(-1)
        mixed = F.dropout(shares, self.dropout, self.training) @ v
        output = self.out_proj(mixed.transpose(1, 2).flatten(2))
        shown = shares.mean(1) if average_attn_weights else shares
        return (output if first else output.transpose(0, 1)), (shown if need_weights else None)


SIZES[FewerHeads] = ("num_heads",)
_ATTENTION = (nn.MultiheadAttention, FewerHeads)


def _masked(scores: Tensor, mask: Tensor | None, *, is_causal: bool) -> Tensor:
    """A boolean mask forbids where it is true, a float one is added (as in torch)."""
    if mask is None and is_causal:
        mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).triu(1)
    if mask is None:
        return scores
    if mask.ndim == 3:  # (N · H, S, S) of the heads there once were: which remain is not known
        raise ModelError(
            "pruned attention: expected a mask (S, S) or (N, S) that is the same for all heads, "
            f"got one of shape {tuple(mask.shape)}; list the attention under prune.protect"
        )
    return scores.masked_fill(mask, -torch.inf) if mask.dtype == torch.bool else scores + mask


def _shapes(part: nn.Module) -> dict[str, tuple[int, ...]]:
    """Name → shape of the module's tensors, from its size attributes."""
    if isinstance(part, nn.Conv2d):
        inputs = part.in_channels // part.groups
        return {
            "weight": (part.out_channels, inputs, *part.kernel_size),
            "bias": (part.out_channels,),
        }
    if isinstance(part, nn.Linear):
        return {"weight": (part.out_features, part.in_features), "bias": (part.out_features,)}
    if isinstance(part, nn.GroupNorm):
        return {"weight": (part.num_channels,), "bias": (part.num_channels,)}
    if not isinstance(part, nn.BatchNorm1d | nn.BatchNorm2d):
        return {}  # an attention that counts its heads
    names = ("weight", "bias", "running_mean", "running_var")
    return dict.fromkeys(names, (part.num_features,))


def _replace(part: nn.Module, name: str, shape: tuple[int, ...]) -> None:
    """Zeros instead of the parameter or buffer `name`, if there is one."""
    old = getattr(part, name, None)
    if old is None:
        return
    new = torch.zeros(shape, dtype=old.dtype, device=old.device)
    if isinstance(old, nn.Parameter):
        new = nn.Parameter(new, requires_grad=old.requires_grad)
    setattr(part, name, new)


def _find(module: nn.Module, path: str) -> nn.Module:
    try:
        return module.get_submodule(path)
    except AttributeError as error:
        raise ModelError(
            f"{path}: the pruning plan names it, and {type(module).__name__} has no such module; "
            "the network's code has changed since it was pruned: prune it again"
        ) from error


def _outermost(paths: Sequence[str]) -> tuple[str, ...]:
    unique = sorted(set(paths))
    return tuple(
        path
        for path in unique
        if not any(path != other and is_within(path, other) for other in unique)
    )
