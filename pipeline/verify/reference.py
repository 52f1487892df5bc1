"""What a file is held against: a finished run, another .onnx, or the network a recipe names.

    run folder    its float model.fp32.onnx, its network in torch where torch is installed, its
                  samples.parquet (labels by content) and its targets; checked against the manifest
    FILE.onnx     float, or int8 for an int8 file
    recipe.yaml   the trained student it names, with its weights; exported here, which needs torch

Golden bundles are replayed by `replay.py`, which needs none of this.
"""

from __future__ import annotations

import importlib.util
import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from ...exporters.graph import read_model
from ...exporters.simplify import simplify
from ...exporters.stamp import write_model
from ..data.inputs import Preparation
from ..errors import UsageError
from ..recipe import NetworkSpec, Recipe
from ..recipe_file import load_recipe
from ..release import MANIFEST, SAMPLES, read_release
from .facts import Facts, facts_of

if TYPE_CHECKING:
    from torch import nn

Array = np.ndarray[Any, Any]

FLOAT = "model.fp32.onnx"


@dataclass(frozen=True)
class Reference:
    """Attributes:
    facts: of its ONNX file; None until `realised` exports one.
    spec, recipe: the network of a recipe. network: folder of a run with one in torch.
    how, class_names: what it says of its inputs and classes; None: nothing.
    samples: labels by content hash, of a run. targets: CPUs that it is made for, of a run.
    """

    kind: Literal["run", "onnx", "recipe"]
    where: str
    facts: Facts | None
    how: Preparation | None
    class_names: tuple[str, ...] | None
    module: nn.Module | None = None
    network: Path | None = None
    spec: NetworkSpec | None = None
    samples: Path | None = None
    tokenizer: Path | None = None
    targets: tuple[str, ...] | None = None
    note: str | None = None


def find_reference(path: Path) -> Reference:
    """Reads what `path` is; builds nothing yet.

    Raises:
        UsageError: it is none of these. IntegrityError: a run that its manifest does not match.
        RecipeError, ExportError: it cannot be read.
    """
    if path.is_dir():
        return _of_run(path)
    if path.suffix in (".yaml", ".yml"):
        return _of_recipe(path)
    if path.suffix != ".onnx" or not path.is_file():
        raise UsageError(
            f"{path}: expected a reference that exists: the folder of a run, an .onnx file, a "
            "recipe.yaml, or a golden bundle"
        )
    facts = facts_of(path)
    return Reference("onnx", str(path), facts, facts.how, facts.class_names)


def realised(
    reference: Reference, inputs: Array, *, classes: tuple[str, ...], scratch: Path, threads: int
) -> Reference:
    """With its network in torch, and an ONNX file of it where it has none.

    Args:
        inputs: real samples, float32 (N, C, H, W) or int64 (N, K, S). classes: as many as logits.

    Raises:
        UsageError: a recipe's network and no torch. ModelError, WeightsError, ExportError: it
            cannot be built or exported.
    """
    if reference.network is None and reference.spec is None:
        return reference
    if importlib.util.find_spec("torch") is None:
        if reference.spec is None:
            note = "torch is not installed: the ladder starts at the run's float file"
            return replace(reference, note=note)
        raise UsageError(f"{reference.where}: its network runs in torch; pip install torch")
    shape = tuple(int(size) for size in inputs.shape[1:])
    if reference.network is not None:
        return replace(reference, module=_stored(reference.network, scratch, shape, len(classes)))
    assert reference.spec is not None
    module = _built(reference.spec, shape, classes)
    path = _exported(module, inputs, scratch, threads=threads)
    return replace(reference, module=module, facts=facts_of(path))


def _of_run(folder: Path) -> Reference:
    if not (folder / MANIFEST).is_file():
        raise UsageError(
            f"{folder}: holds neither a finished run ({MANIFEST}) nor a golden bundle "
            "(golden.json); give the output folder of `compress run`"
        )
    report = read_release(folder).report
    facts = facts_of(folder / FLOAT)
    has_network = any((folder / name).is_file() for name in ("student.json", "student.pt2"))
    tokenizer = folder / "tokenizer.json"
    return Reference(
        kind="run",
        where=str(folder),
        facts=facts,
        how=facts.how,
        class_names=facts.class_names,
        network=folder if has_network else None,
        samples=folder / SAMPLES,
        tokenizer=tokenizer if tokenizer.is_file() else None,
        targets=tuple((report.recipe.get("quantize") or {}).get("targets", ())) or None,
    )


def _of_recipe(path: Path) -> Reference:
    recipe: Recipe = load_recipe(str(path))
    spec = next((one for one in (recipe.student, *recipe.teachers) if one.is_trained), None)
    if spec is None:
        raise UsageError(
            f"{path}: names no trained network: neither student nor teacher has weights; give the "
            "folder of its finished run instead"
        )
    if spec.is_onnx:
        return find_reference(Path(spec.model))
    how = recipe.data.preprocess
    known = how is not None and how.mean is not None and how.std is not None
    tokenize = recipe.data.tokenize
    return Reference(
        kind="recipe",
        where=f"{path} ({spec.model})",
        facts=None,
        how=how if known else None,
        class_names=recipe.data.labels,
        spec=spec,
        tokenizer=None if tokenize is None or not tokenize.tokenizer else Path(tokenize.tokenizer),
        targets=None if recipe.quantize is None else recipe.quantize.targets,
    )


def _stored(folder: Path, scratch: Path, shape: tuple[int, ...], classes: int) -> nn.Module:
    """The network that a run has published beside its model."""
    from ...models.source import open_network
    from ...models.store import DESCRIPTION, WEIGHTS, load_network

    program = folder / "student.pt2"
    if program.is_file():
        return open_network(
            str(program), args={}, classes=classes, input_shape=shape, seed=0
        ).module
    home = scratch / "network"
    home.mkdir()
    shutil.copyfile(folder / "student.json", home / DESCRIPTION)
    shutil.copyfile(folder / "student.safetensors", home / WEIGHTS)
    return load_network(home).network.module


def _built(spec: NetworkSpec, shape: tuple[int, ...], classes: tuple[str, ...]) -> nn.Module:
    """The recipe's network with the weights it names: whole, nothing new in it."""
    from ...models.hf_folder import find_folder
    from ...models.source import open_network
    from ...models.weights import load_weights, read_state

    network = open_network(
        spec.model, args=spec.args, classes=len(classes), input_shape=shape, seed=0
    )
    folder = find_folder(spec.model)
    if spec.weights is not None:
        load_weights(network.module, read_state(Path(spec.weights)), head="keep", where=spec.model)
    elif folder is not None:
        from ...models.hf import load

        load(network.module, folder, head="keep", class_names=classes, where=spec.model)
    return network.module


def _exported(module: nn.Module, inputs: Array, scratch: Path, *, threads: int) -> Path:
    """As the export stage writes it: simplified, where that keeps the answers."""
    import torch

    from ...exporters.to_onnx import export_onnx

    raw, path = scratch / "exported.onnx", scratch / "reference.onnx"
    example = torch.from_numpy(np.ascontiguousarray(np.repeat(inputs[:1], 2, axis=0)))
    export_onnx(module, example, raw, batch="dynamic")
    write_model(simplify(read_model(raw), inputs, floor=0.0, threads=threads).model, path)
    return path
