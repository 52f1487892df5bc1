"""The prune stage: a trained network → a few smaller ones that have yet to recover, best first.

Traces what may be cut, ranks it, searches mixes of blocks and channels (`search.py`) on the way to
the target, and keeps `prune.candidates` of them. Trains nothing. Reads train and validation, never
test. The choice rests on timing; it is stored with the stage and recalled on resume.
"""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ...models.plan import all_sizes, extend_plan
from ...models.source import Network
from ...models.store import StoredNetwork, count_parameters, load_network, save_network
from ..data.dataset import Data, SampleSet, open_data
from ..data.inputs import to_input
from ..errors import ModelError
from ..measure.accuracy import accuracy, logits_of_module
from ..recipe import PruneSpec
from ..stage import Context
from ..train.reproducible import derive_seed, reproducible
from .blocks import find_blocks
from .cost import count_multiply_adds
from .importance import bn_shares, l2_shares, score_all, taylor_shares
from .protect import find_protected
from .search import Goal, Mix, Ranked, Samples, find_mixes, recalibrate
from .select import choose
from .timing import export_for_timing, time_in_turns
from .trace import Groups, find_groups

RECALIBRATION = 1024  # training images that give BatchNorm its statistics after a cut
HARM = 128  # … that blocks are ranked on
TAYLOR = 512  # … that gradients are taken on
TIMING = 16  # inputs rotated while timing
# a standard error of 1.1 points at 85 %; candidates after a cut are further apart than that
VALIDATION = 1024
BATCH_SIZE = 64


@dataclass(frozen=True)
class _Measured:
    """What one network is worth after the cut, before any training."""

    p50_ms: float
    accuracy: float


def prune(
    network_artifact: Path,
    dense_artifact: Path,
    data_artifact: Path,
    spec: PruneSpec,
    *,
    step: int,
    context: Context,
    memory_budget_bytes: int,
) -> dict[str, Any]:
    """The stage. Leaves cut networks in `context.scratch`/1, /2, …, the most promising first.

    Args:
        network_artifact: the network to cut: the dense one, or what recovered from the last step.
        dense_artifact: the network that shares are of.
        step: k of `spec.steps` n; share^(k/n) of the dense network's count is to stay.

    Returns: JSON-able: target, share (of the whole way), goal (of this step), step, importance,
        dense (multiply_adds, parameters, p50_ms, accuracy), n (validation images), candidates (all
        tried, fewest removed blocks first; `kept` is the folder, or None), protected (layers, why).

    Raises:
        ModelError: a captured program, or a network that cannot be traced.
        RecipeError: `protect` matches nothing, or the goal would empty layers.
        ExportError: a candidate cannot be exported.
    """
    data = open_data(data_artifact, memory_budget_bytes=memory_budget_bytes)
    stored, dense = _open(network_artifact), _open(dense_artifact)
    network = stored.network
    with reproducible(threads=context.threads, device="cpu"):
        protect = find_protected(network.module, spec.protect)
        groups = find_groups(network.module, data.input_shape, protect=protect)
        ranked = _rank(network.module, groups, spec, protect=protect, data=data, seed=context.seed)
        kind, share = spec.target
        goal = Goal(kind, share ** (step / spec.steps), _count(dense.network.module, spec, data))
        mixes, (of_dense, *found) = _search(
            network.module, dense.network.module, ranked, goal, data=data, context=context
        )
    kept = choose([(one.p50_ms, one.accuracy) for one in found], spec.candidates)
    for number, index in enumerate(kept, start=1):
        _save(context.scratch / str(number), stored, mixes[index])
    context.events.progress(2, 2)
    return {
        "target": kind,
        "share": share,
        "goal": goal.share,
        "step": step,
        "importance": spec.importance,
        "n": min(VALIDATION, len(data.validation)),
        "dense": _figures(dense.network.module, of_dense, data),
        "candidates": [
            _row(mix, one, kept.index(index) + 1 if index in kept else None)
            for index, (mix, one) in enumerate(zip(mixes, found, strict=True))
        ],
        "protected": [{"layers": list(one.layers), "why": one.why} for one in groups.protected],
    }


def _open(folder: Path) -> StoredNetwork:
    stored = load_network(folder)
    if not stored.network.trainable:
        raise ModelError(
            f"{stored.network.reference}: a captured program cannot be pruned: its shapes are "
            "fixed in its code; give the network as FILE.py:factory with its weights"
        )
    return stored


def _rank(
    network: nn.Module,
    groups: Groups,
    spec: PruneSpec,
    *,
    protect: Sequence[str],
    data: Data,
    seed: int,
) -> Ranked:
    """Scores of all units, and the blocks that may leave."""
    if spec.importance == "taylor":
        rows = _some(len(data.train), TAYLOR, seed=seed, purpose="taylor")
        images, labels = _inputs(data.train, rows, data), torch.from_numpy(data.train.labels[rows])
        batches = zip(torch.split(images, BATCH_SIZE), torch.split(labels, BATCH_SIZE), strict=True)
        shares: Mapping[str, Tensor] = taylor_shares(network, batches)
    else:
        shares = (l2_shares if spec.importance == "l2" else bn_shares)(network)
    scores = score_all(network, groups.free, spec.importance, shares)
    blocks = find_blocks(network, data.input_shape, protect=protect) if spec.blocks else ()
    return Ranked(groups.free, scores, blocks, spec.round_to)


def _search(
    network: nn.Module,
    dense: nn.Module,
    ranked: Ranked,
    goal: Goal,
    *,
    data: Data,
    context: Context,
) -> tuple[list[Mix], list[_Measured]]:
    """The mixes, and what the dense network and each of them is worth."""
    samples = _samples(data, seed=context.seed)
    with tempfile.TemporaryDirectory(prefix="edgestill-prune-") as name:
        folder = Path(name)
        if goal.kind == "latency":
            export_for_timing(dense, data.input_shape, folder / "dense.onnx")
        mixes = find_mixes(
            network,
            ranked,
            goal,
            dense_file=folder / "dense.onnx",
            samples=samples,
            tick=lambda note: context.events.progress(0, 2, note),
        )
        context.events.progress(1, 2, f"measuring {len(mixes)} candidates")
        networks = [dense, *(mix.network for mix in mixes)]
        return mixes, _measure(networks, data, samples, folder=folder, seed=context.seed)


def _count(dense: nn.Module, spec: PruneSpec, data: Data) -> int:
    if spec.target[0] == "parameters":
        return count_parameters(dense)
    return count_multiply_adds(dense, data.input_shape)


def _samples(data: Data, *, seed: int) -> Samples:
    def of_train(count: int, purpose: str) -> Tensor:
        rows = _some(len(data.train), count, seed=seed, purpose=purpose)
        return _inputs(data.train, rows, data)

    return Samples(
        recalibration=of_train(RECALIBRATION, "recalibration"),
        harm=of_train(HARM, "harm"),
        timing=of_train(TIMING, "timing").numpy(),
    )


def _measure(
    networks: Sequence[nn.Module], data: Data, samples: Samples, *, folder: Path, seed: int
) -> list[_Measured]:
    """The dense network as it is, then each cut one with BatchNorm statistics of its own."""
    rows = _some(len(data.validation), VALIDATION, seed=seed, purpose="validation")
    chosen = _subset(data.validation, rows)
    files, accuracies = [], []
    for number, network in enumerate(networks):
        if number:
            recalibrate(network, samples.recalibration)
        logits = logits_of_module(
            network, chosen, data.preprocess, device="cpu", name=f"prune: candidate {number}"
        )
        accuracies.append(accuracy(logits, chosen.labels))
        files.append(folder / f"{number}.onnx")
        export_for_timing(network, data.input_shape, files[-1])
    times = time_in_turns(files, samples.timing)
    return [_Measured(*pair) for pair in zip(times, accuracies, strict=True)]


def _save(folder: Path, stored: StoredNetwork, mix: Mix) -> None:
    """The cut network, with what is left of the factory's shapes."""
    network = stored.network
    plan = extend_plan(
        network.plan,
        before=all_sizes(network.module),
        after=all_sizes(mix.network),
        removed=[removal.path for removal in mix.removed],
    )
    folder.mkdir()
    save_network(
        folder,
        Network(mix.network, network.reference, network.args, trainable=True, plan=plan),
        classes=stored.classes,
        input_shape=stored.input_shape,
        class_names=stored.class_names,
        preprocess=stored.preprocess,
    )


def _figures(dense: nn.Module, measured: _Measured, data: Data) -> dict[str, Any]:
    return {
        "multiply_adds": count_multiply_adds(dense, data.input_shape),
        "parameters": count_parameters(dense),
        **dataclasses.asdict(measured),
    }


def _row(mix: Mix, measured: _Measured, kept: int | None) -> dict[str, Any]:
    return {
        "removed": [dataclasses.asdict(removal) for removal in mix.removed],
        "units_kept": {name: len(index) for name, index in mix.kept.items()},
        "multiply_adds": mix.multiply_adds,
        "parameters": mix.parameters,
        **dataclasses.asdict(measured),
        "kept": kept,
    }


def _some(total: int, count: int, *, seed: int, purpose: str) -> np.ndarray[Any, Any]:
    """`count` of `total` rows, ascending, or all of them: sets may be sorted by class."""
    generator = np.random.default_rng(derive_seed(seed, "prune", purpose))
    return np.sort(generator.choice(total, min(count, total), replace=False))


def _subset(images: SampleSet, rows: np.ndarray[Any, Any]) -> SampleSet:
    return SampleSet(
        contents=images.contents[rows],
        labels=images.labels[rows],
        ids=images.ids[rows],
        hashes=images.hashes[rows],
        names=None,
    )


def _inputs(images: SampleSet, rows: np.ndarray[Any, Any], data: Data) -> Tensor:
    return torch.from_numpy(to_input(images.contents[rows], data.preprocess))
