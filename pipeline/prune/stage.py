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
from ..data.inputs import repeated_to, to_input
from ..errors import ModelError
from ..measure.accuracy import accuracy, logits_of_module
from ..recipe import PruneSpec
from ..stage import Context
from ..train.reproducible import derive_seed, reproducible
from .blocks import find_blocks
from .cost import count_multiply_adds
from .example import example_of
from .importance import bn_shares, l2_shares, score_all, taylor_shares
from .protect import find_protected
from .search import Goal, Mix, Ranked, Samples, find_mixes, recalibrate
from .select import choose
from .timing import export_for_timing, time_in_turns
from .trace import Groups, find_groups

RECALIBRATION = 1024  # training samples that give BatchNorm its statistics after a cut
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
    sequence: int | None = None,
) -> dict[str, Any]:
    """The stage. Leaves cut networks in `context.scratch`/1, /2, …, the most promising first.

    Args:
        network_artifact: the network to cut: the dense one, or what recovered from the last step.
        dense_artifact: the network that shares are of.
        step: k of `spec.steps` n; share^(k/n) of the dense network's count is to stay.
        sequence: tokens of a text at which networks are timed. Multiply-adds count at the data's
            maximum length; None: images.

    Returns: JSON-able: target, share (of the whole way), goal (of this step), step, importance,
        dense (multiply_adds, parameters, p50_ms, accuracy), n (validation samples), candidates (all
        tried, fewest removed blocks first; `kept` is the folder, or None), protected (layers, why);
        of texts also tokens (counted at) and sequence (timed at).

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
        samples = _samples(data, seed=context.seed, sequence=sequence)
        groups = find_groups(network.module, samples.example, protect=protect)
        blocks = _blocks(network.module, samples.example, spec, protect=protect)
        ranked = _rank(network.module, groups, spec, blocks=blocks, data=data, seed=context.seed)
        kind, share = spec.target
        count = _count(dense.network.module, spec, samples.example)
        goal = Goal(kind, share ** (step / spec.steps), count)
        mixes, (of_dense, *found) = _search(
            network.module, dense.network.module, ranked, goal, data=data, samples=samples,
            context=context,
        )  # fmt: skip
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
        "dense": _figures(dense.network.module, of_dense, samples.example),
        "candidates": [
            _row(mix, one, kept.index(index) + 1 if index in kept else None)
            for index, (mix, one) in enumerate(zip(mixes, found, strict=True))
        ],
        "protected": [{"layers": list(one.layers), "why": one.why} for one in groups.protected],
        **({} if sequence is None else {"tokens": data.input_shape[1], "sequence": sequence}),
    }


def check_prunable(
    network: nn.Module, spec: PruneSpec, data: Data
) -> tuple[Groups, tuple[str, ...]]:
    """What can be known before training: what may be cut, and the blocks that may leave.

    Raises:
        ModelError: the network cannot be traced.
        RecipeError: `protect` matches nothing, or the importance has nothing to go by.
    """
    protect, example = find_protected(network, spec.protect), example_of(data)
    groups = find_groups(network, example, protect=protect)
    if spec.importance == "bn":
        score_all(network, groups.free, "bn", bn_shares(network))
    return groups, _blocks(network, example, spec, protect=protect)


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
    blocks: tuple[str, ...],
    data: Data,
    seed: int,
) -> Ranked:
    """Scores of all units, beside the blocks that may leave."""
    if spec.importance == "taylor":
        rows = _some(len(data.train), TAYLOR, seed=seed, purpose="taylor")
        inputs, labels = _inputs(data.train, rows, data), torch.from_numpy(data.train.labels[rows])
        batches = zip(torch.split(inputs, BATCH_SIZE), torch.split(labels, BATCH_SIZE), strict=True)
        shares: Mapping[str, Tensor] = taylor_shares(network, batches)
    else:
        shares = (l2_shares if spec.importance == "l2" else bn_shares)(network)
    scores = score_all(network, groups.free, spec.importance, shares)
    return Ranked(groups.free, scores, blocks, spec.round_to)


def _blocks(
    network: nn.Module, example: Tensor, spec: PruneSpec, *, protect: Sequence[str]
) -> tuple[str, ...]:
    return find_blocks(network, example, protect=protect) if spec.blocks else ()


def _search(
    network: nn.Module,
    dense: nn.Module,
    ranked: Ranked,
    goal: Goal,
    *,
    data: Data,
    samples: Samples,
    context: Context,
) -> tuple[list[Mix], list[_Measured]]:
    """The mixes, and what the dense network and each of them is worth."""
    with tempfile.TemporaryDirectory(prefix="edgestill-prune-") as name:
        folder = Path(name)
        if goal.kind == "latency":
            export_for_timing(dense, samples.timing, folder / "dense.onnx")
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


def _count(dense: nn.Module, spec: PruneSpec, example: Tensor) -> int:
    if spec.target[0] == "parameters":
        return count_parameters(dense)
    return count_multiply_adds(dense, example)


def _samples(data: Data, *, seed: int, sequence: int | None) -> Samples:
    def of_train(count: int, purpose: str) -> Tensor:
        rows = _some(len(data.train), count, seed=seed, purpose=purpose)
        return _inputs(data.train, rows, data)

    timing = of_train(TIMING, "timing").numpy()
    return Samples(
        example=example_of(data),
        recalibration=of_train(RECALIBRATION, "recalibration"),
        harm=of_train(HARM, "harm"),
        timing=timing if sequence is None else repeated_to(timing, sequence),
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
        export_for_timing(network, samples.timing, files[-1])
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


def _figures(dense: nn.Module, measured: _Measured, example: Tensor) -> dict[str, Any]:
    return {
        "multiply_adds": count_multiply_adds(dense, example),
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


def _subset(samples: SampleSet, rows: np.ndarray[Any, Any]) -> SampleSet:
    return SampleSet(
        contents=samples.contents[rows],
        labels=samples.labels[rows],
        ids=samples.ids[rows],
        hashes=samples.hashes[rows],
        names=None,
    )


def _inputs(samples: SampleSet, rows: np.ndarray[Any, Any], data: Data) -> Tensor:
    return torch.from_numpy(to_input(samples.contents[rows], data.preprocess))
