"""A network on disk: everything needed to build and use it again, in bytes that depend on nothing
else.

    network.json        reference, args, classes, input shape, class names, preprocessing, the
                        sha256 of the file with the weights, and of a pruned network its plan
    model.safetensors   the weights; a tied tensor once
    program.pt2         instead of it, for a network that came as one

A user's own network is built by their own FILE.py, which must still be there.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import safetensors.torch
from torch import Tensor, nn

from ..pipeline.errors import IntegrityError, ModelError
from .plan import Plan, apply_plan
from .source import Network, open_network
from .weights import load_weights, read_state

DESCRIPTION = "network.json"
WEIGHTS = "model.safetensors"
PROGRAM = "program.pt2"
VERSION = 1


@dataclass(frozen=True)
class StoredNetwork:
    """What `save_network` wrote, built again; the module is in eval mode, on the CPU."""

    network: Network
    classes: int
    input_shape: tuple[int, ...]  # (C, H, W), or (K, S) of texts
    class_names: tuple[str, ...]
    preprocess: dict[str, Any]


def save_network(
    folder: Path,
    network: Network,
    *,
    classes: int,
    input_shape: Sequence[int],
    class_names: Sequence[str],
    preprocess: Mapping[str, Any],
) -> None:
    """Write the network into `folder`, which exists; a stage's commit makes it durable. Equal
    networks give equal bytes.

    Args:
        preprocess: JSON-able, as `pipeline/data/preprocess.py` describes it.

    Raises:
        ModelError: `args` holds something that JSON cannot.
    """
    if network.trainable:
        name, content = WEIGHTS, safetensors.torch.save(_untied(network.module))
    else:
        name, content = PROGRAM, _read_program(Path(network.reference))
    document = {
        "version": VERSION,
        "reference": network.reference,
        "args": network.args,
        "classes": classes,
        "input_shape": list(input_shape),
        "class_names": list(class_names),
        "preprocess": dict(preprocess),
        "weights": name,
        "weights_sha256": hashlib.sha256(content).hexdigest(),
    }
    if network.plan is not None:
        document["plan"] = network.plan.to_json()
    try:
        text = json.dumps(document, indent=1, sort_keys=True, ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise ModelError(
            f"{network.reference}: args must be numbers, texts, lists and mappings: {error}"
        ) from error
    (folder / name).write_bytes(content)
    (folder / DESCRIPTION).write_bytes(f"{text}\n".encode())


def load_network(folder: Path) -> StoredNetwork:
    """The network that `save_network` left in `folder`.

    Raises:
        IntegrityError: files are missing or not as they were written.
        ModelError: the user's own FILE.py is gone or fails; WeightsError: it changed and the
            weights no longer fit.
    """
    try:
        document = json.loads((folder / DESCRIPTION).read_text(encoding="utf-8"))
        path = folder / document["weights"]
        content = path.read_bytes()
        plan = Plan.from_json(document["plan"]) if "plan" in document else None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise IntegrityError(f"{folder}: no stored network can be read here: {error}") from error
    if document["version"] != VERSION:
        raise IntegrityError(
            f"{folder / DESCRIPTION}: expected version {VERSION}, got {document['version']}"
        )
    if hashlib.sha256(content).hexdigest() != document["weights_sha256"]:
        raise IntegrityError(
            f"{path}: is not the file that {DESCRIPTION} describes; it was changed or cut short"
        )
    shape = tuple(document["input_shape"])
    is_program = document["weights"] == PROGRAM
    network = open_network(
        str(path) if is_program else document["reference"],
        args=document["args"],
        classes=document["classes"],
        input_shape=shape,
        seed=0,  # every weight is replaced below
    )
    if plan is not None:
        apply_plan(network.module, plan)
        network = replace(network, plan=plan)
    if not is_program:
        load_weights(network.module, read_state(path), head="keep", where=str(path))
    return StoredNetwork(
        network=replace(network, reference=document["reference"]) if is_program else network,
        classes=document["classes"],
        input_shape=shape,
        class_names=tuple(document["class_names"]),
        preprocess=document["preprocess"],
    )


def count_parameters(module: nn.Module) -> int:
    """Numbers in the module's parameters, a shared one once, trainable or not; no buffers."""
    return sum(parameter.numel() for parameter in module.parameters())


def _untied(module: nn.Module) -> dict[str, Tensor]:
    """The state dict, contiguous on the CPU, each tensor under the first of its names."""
    seen: set[tuple[int, tuple[int, ...]]] = set()
    kept: dict[str, Tensor] = {}
    for name, tensor in module.state_dict().items():
        address = (tensor.data_ptr(), tuple(tensor.shape))
        if tensor.numel() and address in seen:
            continue
        seen.add(address)
        # a copy: views of one storage would be refused, and channels_last would be written so
        kept[name] = tensor.detach().to("cpu").contiguous().clone()
    return kept


def _read_program(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ModelError(f"{path}: cannot be read any more: {error.strerror}") from error
