"""A recipe under way: its workspace on this machine, and how a stage is run in it."""

from __future__ import annotations

import dataclasses
import importlib.metadata
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..models.hf_folder import PREFIX as HF
from .data.dataset import Data, open_data
from .errors import RecipeError
from .measure.machine import available_threads, cpu_capability
from .recipe import NetworkSpec, Recipe
from .stage import ALONE, Artifact, Events, World
from .workspace import Workspace, tree_sha256

PACKAGE = Path(__file__).resolve().parent.parent
SOURCES = ("models", "exporters", "pipeline")  # the root also holds tests, and perhaps a .venv
# Releases that change a stage's bytes; the rest of the environment is in the report.
PINNED = ("torch", "onnx", "onnxruntime", "onnxscript", "onnxsim", "numpy", "pillow",
          "transformers")  # fmt: skip


@dataclass
class Work:
    """A recipe under way: its workspace, and what was committed so far, in order."""

    recipe: Recipe
    workspace: Workspace
    done: list[Artifact] = field(default_factory=list)
    # "teacher", "teacher-2", "student" → hash of its weights file and of the user's own modules
    origins: dict[str, str] = field(default_factory=dict)
    data_fingerprint: str = ""
    notes: list[str] = field(default_factory=list)  # the flow's own; stages keep theirs


def begin(recipe: Recipe, root: Path, *, events: Events, fresh: bool, world: World = ALONE) -> Work:
    """Open the workspace on the machine as it is."""
    compute = recipe.compute
    threads = compute.threads or max(1, available_threads() // world.local_size)
    if threads > available_threads():
        raise RecipeError(
            f"compute.threads: {threads} asked for, this process may use {available_threads()}"
        )
    workspace = Workspace(
        root,
        seed=recipe.seed,
        threads=threads,
        # a float .onnx needs no torch, which may not be there
        device="cpu" if recipe.student.is_onnx else _device(compute.device),
        events=events,
        world=world,
        identity={
            "source": [tree_sha256(PACKAGE / part, pattern="*.py") for part in SOURCES],
            "versions": {name: _version(name) for name in PINNED},
            "cpu": cpu_capability(),
        },
    )
    if fresh and world.leads:
        workspace.forget()
    return Work(recipe, workspace)


def _device(wish: str) -> str:
    """cpu or cuda."""
    if wish == "cpu":
        return wish
    import torch

    if torch.cuda.is_available():
        return "cuda"
    if wish == "cuda":
        raise RecipeError("compute.device: cuda is asked for, and torch sees no CUDA device here")
    return "cpu"


def _version(library: str) -> str | None:
    """None: not installed, and so not used."""
    try:
        return importlib.metadata.version(library)
    except importlib.metadata.PackageNotFoundError:
        return None


def alone(work: Work) -> Work:
    """What comes after training, the first of several processes does by itself."""
    workspace = dataclasses.replace(work.workspace, world=ALONE)
    return dataclasses.replace(work, workspace=workspace)


def run_stage(
    work: Work, name: str, call: Any, *, reads: Mapping[str, Any], together: bool = False
) -> Artifact:
    artifact = work.workspace.run_stage(name, call, reads=reads, together=together)
    if all(one.path != artifact.path for one in work.done):  # labels serve several students
        work.done.append(artifact)
    return artifact


def open_sets(work: Work, data: Artifact) -> Data:
    return open_data(data.path, memory_budget_bytes=memory_budget(work))


def memory_budget(work: Work) -> int:
    return int(work.recipe.compute.memory_budget_gib * 2**30)


def without_paths(value: Any) -> Any:
    """The same tree without absolute paths: where a file lies does not change what is in it."""
    if isinstance(value, dict):
        return {key: without_paths(inner) for key, inner in value.items()}
    if isinstance(value, str):
        path = Path(value.removeprefix(HF).partition(".py:")[0])
        return Path(value).name if path.is_absolute() else value
    return value


def network_reads(work: Work, name: str, spec: NetworkSpec, data: Artifact) -> dict[str, Any]:
    return {
        "spec": without_paths(spec.model_dump(mode="json")),
        "origin": work.origins[name],
        "inputs": [data.sha256],
    }


def numbered(name: str, index: int) -> str:
    """teacher, teacher-2, teacher-3, …"""
    return name if index == 0 else f"{name}-{index + 1}"


def model_of(artifact: Artifact) -> Path:
    return artifact.path / "model.onnx"
