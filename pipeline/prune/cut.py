"""Take channels, groups of them or heads out of layers: tensors sliced, nothing searched.

Sides of a layer: "out" its output channels (of a normalisation: its channels), "in" its input
channels, "heads" the heads of an attention: of one that consists of layers, their number alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Literal

import torch
from torch import Tensor, nn

from ...models.plan import FewerHeads, Skip, head_count, resize, sizes_of

Side = Literal["in", "out", "heads"]
Place = tuple[str, Side]  # path of a layer, and its side
Kept = Mapping[Place, Tensor]  # int64 indices that stay, ascending


def cut(network: nn.Module, kept: Kept, *, removed: Iterable[str] = ()) -> None:
    """Keep these indices of each place and give back the input of removed blocks, in place.

    The weights that stay are copied bit for bit. A convolution with groups loses whole groups: it
    is named on both sides.
    """
    for path in removed:
        network.set_submodule(path, Skip())
    paths = dict.fromkeys(path for path, _ in kept)
    for path in paths:
        sides = {side: index for (p, side), index in kept.items() if p == path}
        _cut_layer(network, path, sides)


def silence(network: nn.Module, lost: Kept) -> None:
    """Make the dense network ignore these indices, in place: whoever reads them multiplies by 0.

    So it computes what the cut one must compute, whatever stands between the layers.
    """
    with torch.no_grad():
        for (path, side), index in lost.items():
            part = network.get_submodule(path)
            if isinstance(part, nn.MultiheadAttention | FewerHeads):
                _by_head(part.out_proj.weight, part, axis=1)[:, index] = 0
            elif side == "in" and getattr(part, "groups", 1) == 1:
                part.get_parameter("weight")[:, index] = 0


def slices(part: nn.Module, name: str, tensor: Tensor, *, side: Side) -> Tensor | None:
    """The tensor with the channels of `side` first, (channels of the side, …), or None if it has
    no such axis. Gradients of the tensor are sliced alike.

    Args:
        name: of the tensor in the module: "weight", "bias", "in_proj_weight", …
    """
    if side == "heads" and not isinstance(part, nn.MultiheadAttention | FewerHeads):
        return None  # the layers that it consists of are places themselves
    if side == "heads":
        assert isinstance(part, nn.MultiheadAttention | FewerHeads)
        if name.startswith("in_proj"):
            return _by_head(torch.unflatten(tensor, 0, (3, -1)), part, axis=1).movedim(1, 0)
        return _by_head(tensor, part, axis=1).movedim(1, 0) if name.endswith("weight") else None
    if side == "out" or isinstance(part, nn.BatchNorm1d | nn.BatchNorm2d | nn.GroupNorm):
        return tensor
    if name != "weight" or (isinstance(part, nn.Conv2d) and part.groups > 1):
        return None  # a grouped convolution's filters count once, on the output side
    return tensor.movedim(1, 0)


def _cut_layer(network: nn.Module, path: str, sides: Mapping[Side, Tensor]) -> None:
    part = network.get_submodule(path)
    if "heads" in sides:
        _cut_heads(network, path, sides["heads"])
        return
    out, inputs = sides.get("out"), sides.get("in")
    tensors = {**dict(part.named_parameters(recurse=False)), **dict(part.named_buffers())}
    new: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if not tensor.ndim:  # BatchNorm's counter
            continue
        sliced = tensor.detach()
        if out is not None:
            sliced = sliced[out]
        if inputs is not None and name == "weight" and getattr(part, "groups", 1) == 1:
            sliced = sliced[:, inputs]
        new[name] = sliced.clone()
    part = resize(network, path, _sizes(part, out, inputs))
    with torch.no_grad():
        for name, tensor in new.items():
            getattr(part, name).copy_(tensor)


def _sizes(part: nn.Module, out: Tensor | None, inputs: Tensor | None) -> dict[str, int]:
    if isinstance(part, nn.Conv2d):
        n_in = part.in_channels if inputs is None else len(inputs)
        n_out = part.out_channels if out is None else len(out)
        # with groups, in, out and groups shrink alike
        groups = part.groups * n_in // part.in_channels if part.groups > 1 else 1
        return {"in_channels": n_in, "out_channels": n_out, "groups": groups}
    if isinstance(part, nn.Linear):
        return {
            "in_features": part.in_features if inputs is None else len(inputs),
            "out_features": part.out_features if out is None else len(out),
        }
    assert out is not None, "a normalisation is cut at its channels"
    if isinstance(part, nn.GroupNorm):
        groups = part.num_groups * len(out) // part.num_channels
        return {"num_groups": groups, "num_channels": len(out)}
    return {"num_features": len(out)}


def _cut_heads(network: nn.Module, path: str, heads: Tensor) -> None:
    old = network.get_submodule(path)
    if not isinstance(old, nn.MultiheadAttention | FewerHeads):
        count = head_count(old)
        sizes = {name: size * len(heads) // count for name, size in sizes_of(old).items()}
        resize(network, path, sizes)
        return
    new = resize(network, path, {"num_heads": len(heads)})
    assert isinstance(new, FewerHeads)
    with torch.no_grad():
        weight = _by_head(torch.unflatten(old.in_proj_weight, 0, (3, -1)), old, axis=1)
        new.in_proj_weight.copy_(weight[:, heads].flatten(0, 2))
        if old.in_proj_bias is not None and new.in_proj_bias is not None:
            bias = _by_head(torch.unflatten(old.in_proj_bias, 0, (3, -1)), old, axis=1)
            new.in_proj_bias.copy_(bias[:, heads].flatten())
            new.out_proj.bias.copy_(old.out_proj.bias)
        out = _by_head(old.out_proj.weight, old, axis=1)
        new.out_proj.weight.copy_(out[:, heads].flatten(1))


def _by_head(tensor: Tensor, part: nn.MultiheadAttention | FewerHeads, *, axis: int) -> Tensor:
    """A view with `axis` split into (heads, width of a head)."""
    return torch.unflatten(tensor, axis, (part.num_heads, part.head_dim))
