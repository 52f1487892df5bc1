"""A training run between two epochs: its state, what it is bound to, and how it is taken up."""

from __future__ import annotations

import hashlib
import json
import statistics
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..stage import Context
from ..training_spec import TrainSpec
from .average import Average, assign, tensors_of
from .checkpoint import digest, load_checkpoint, save_checkpoint
from .compiler import Compiler
from .precision import Precision
from .task import Batch, FitResult, Task

CHECKPOINT = "training.pt"


@dataclass
class Run:
    """A training run between two epochs."""

    module: nn.Module
    optimizer: torch.optim.Optimizer
    precision: Precision
    average: Average | None
    batches: list[int]  # sizes
    least: int  # samples that a batch, or a process's part of one, must have
    live: dict[str, Tensor]
    step: nn.Module  # the loss terms as a module, over all processes
    compiler: Compiler
    best: dict[str, Tensor] | None = None
    history: list[dict[str, Any]] = field(default_factory=list)

    @property
    def selected(self) -> dict[str, Any]:
        """The best epoch so far. Equal accuracies: the later, which has been trained longer."""
        return max(self.history, key=lambda entry: (entry["accuracy"], entry["epoch"]))


def run_key(
    module: nn.Module, task: Task[Batch], spec: TrainSpec, *, context: Context, identity: str
) -> str:
    """Hash of what the run depends on. How often it is saved is not part of it."""
    parts = {
        "spec": spec.model_dump(mode="json", exclude={"checkpoint_minutes"}),
        "seed": context.seed,
        "threads": context.threads,
        "device": context.device,
        "processes": context.world.size,
        "torch": torch.__version__,
        "samples": task.samples,
        "weights": dict(task.weights),
        "initial": digest(tensors_of(module)),
        "identity": identity,
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def save(run: Run, *, context: Context, key: str) -> None:
    state = {
        "model": run.live,
        "optimizer": run.optimizer.state_dict(),
        "average": None if run.average is None else run.average.shadow,
        "best": run.best,
        "history": run.history,
    }
    save_checkpoint(context.resume / CHECKPOINT, state, key=key)


def resume(run: Run, *, context: Context, key: str) -> int:
    """Take over a checkpoint's state, if there is one that belongs to this run. Epochs done."""
    path = context.resume / CHECKPOINT
    state, reason = load_checkpoint(path, key=key)
    if reason is not None:
        context.events.note(f"the checkpoint {path} is not used: {reason}; training starts anew")
    if state is None:
        return 0
    assign(run.live, state["model"])
    run.optimizer.load_state_dict(state["optimizer"])
    if run.average is not None:
        assign(run.average.shadow, state["average"])
    if state["best"] is not None:
        run.best = {n: t.to(context.device) for n, t in state["best"].items()}
    run.history = state["history"]
    done = len(run.history)
    context.events.note(f"training goes on after epoch {done}, from a checkpoint")
    return done


def out_of_patience(run: Run, spec: TrainSpec) -> bool:
    """No epoch of the last `early_stopping` has been better than all before it."""
    if spec.early_stopping is None or not run.history:
        return False
    accuracies = [entry["accuracy"] for entry in run.history]
    first_best = accuracies.index(max(accuracies))
    return len(accuracies) - 1 - first_best >= spec.early_stopping


def finish(run: Run, spec: TrainSpec, *, resumed: int, stopped_early: bool) -> FitResult:
    final = run.history[-1]
    chosen = run.selected if spec.select == "best" else final
    if run.best is not None:
        assign(run.live, run.best)
    elif run.average is not None:
        assign(run.live, run.average.shadow)
    run.module.zero_grad(set_to_none=True)
    run.module.eval()
    return FitResult(
        history=run.history,
        selected_epoch=chosen["epoch"],
        selected_accuracy=chosen["accuracy"],
        final_accuracy=final["accuracy"],
        epochs=len(run.history),
        steps=len(run.history) * len(run.batches),
        samples_per_second=statistics.median(e["samples_per_second"] for e in run.history),
        precision=run.precision,
        compiled=run.compiler.is_on,
        resumed_epoch=resumed,
        stopped_early=stopped_early,
    )
