"""What teacher and student stages share: build, train, measure on validation, save."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from ...models.hf_folder import find_folder
from ...models.source import Network, open_network
from ...models.store import count_parameters, save_network
from ...models.weights import LoadReport, load_weights, read_state
from ..data.dataset import Data
from ..data.inputs import input_metadata
from ..measure.accuracy import accuracy, confusion, logits_of_module, per_class_accuracy
from ..recipe import NetworkSpec
from ..stage import Context
from ..train.reproducible import derive_seed
from ..train.task import FitResult

Array = np.ndarray[Any, Any]


def build(
    spec: NetworkSpec, data: Data, *, context: Context, where: str, generation: int = 1
) -> tuple[Network, LoadReport | None]:
    """The recipe's network with its weights, if any.

    Args:
        where: "teacher", "student" or "peer-1" …: who it is, and so its initial weights.
        generation: of a born-again student; each starts anew.

    Raises:
        ModelError, WeightsError: it cannot be built, or its weights do not fit.
    """
    seed = derive_seed(context.seed, where, "weights", *([generation] if generation > 1 else []))
    return open_given(spec, data, seed=seed, where=where)


def open_given(
    spec: NetworkSpec, data: Data, *, seed: int, where: str
) -> tuple[Network, LoadReport | None]:
    """As `build`; `seed`: of what the weights, if any, leave open."""
    network = open_network(
        spec.model,
        args=spec.args,
        classes=len(data.class_names),
        input_shape=data.input_shape,
        keep_layers=spec.keep_layers,
        kept_ids=data.kept_ids,
        seed=seed,
    )
    report = load_given(network.module, spec, data.class_names, where=where, kept_ids=data.kept_ids)
    return network, report


def load_given(
    module: nn.Module,
    spec: NetworkSpec,
    class_names: Sequence[str],
    *,
    where: str,
    kept_ids: Sequence[int] | None = None,
) -> LoadReport | None:
    """Loads the weights that the recipe gives, if any; those of a .pt2 are in it already.

    Args:
        kept_ids: as in `Data`.

    Raises:
        WeightsError: they cannot be read or do not fit.
    """
    if spec.weights is not None:
        state = read_state(Path(spec.weights))
        return load_weights(module, state, head=spec.head, where=where)
    folder = find_folder(spec.model)
    if folder is None or not spec.weight_files:
        return None
    from ...models.hf import load  # transformers is not needed elsewhere

    return load(
        module,
        folder,
        head=spec.head,
        class_names=class_names,
        where=where,
        init=spec.init,
        keep_layers=spec.keep_layers,
        kept_ids=kept_ids,
    )


def measure_validation(
    network: Network, data: Data, *, context: Context, where: str
) -> tuple[dict[str, Any], Array]:
    """Accuracy on validation, in eval mode and float32; also the confusion counts (C, C).

    Raises:
        MeasurementError: a logit is NaN or infinite, or validation is empty.
    """
    labels = data.validation.labels
    logits = logits_of_module(
        network.module,
        data.validation,
        data.preprocess,
        device=context.device,
        fixed_batch=network.fixed_batch,
        name=where,
    )
    found = {
        "n": len(labels),
        "accuracy": accuracy(logits, labels),
        "per_class": per_class_accuracy(logits, labels, class_names=data.class_names),
    }
    return found, confusion(logits, labels)


def training_record(result: FitResult) -> dict[str, Any]:
    """The training run as JSON-able measurements."""
    return asdict(result)


def save(network: Network, data: Data, *, context: Context, folder: str = ".") -> None:
    """Leave the network in `context.scratch`, with all that a user of it has to know."""
    network.module.to("cpu")
    target = context.scratch / folder
    target.mkdir(exist_ok=True)
    save_network(
        target,
        network,
        classes=len(data.class_names),
        input_shape=data.input_shape,
        class_names=data.class_names,
        preprocess=input_metadata(data.preprocess),
    )


def describe_network(
    network: Network, spec: NetworkSpec, report: LoadReport | None
) -> dict[str, Any]:
    """What it is, for the report."""
    return {
        "model": spec.model,
        "args": dict(spec.args),
        "parameters": count_parameters(network.module),
        "weights": None if report is None else asdict(report),
    }
