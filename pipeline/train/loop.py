"""THE training loop: every run of every capability goes through `fit`.

What is learnt is a `Task`: where batches come from, which named loss terms a step computes, how
they are weighed, and how accuracy on validation is measured. The loop owns the rest: precision,
schedule, averaging, clipping, selection, checkpoints, resuming, several processes. It knows no
images and no teacher.

A run is a function of (initial weights, task, spec, seed, threads, device). Order, dropout and
views are derived from the epoch number, so a run that was killed and resumed gives the same bytes
as one that was not. There is no device synchronisation inside a step.
"""

from __future__ import annotations

import copy
import hashlib
import json
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn

from ..errors import DataError, RecipeError
from ..stage import Context
from ..training_spec import TrainSpec
from .average import Average, assign, copy_of, tensors_of
from .checkpoint import digest, load_checkpoint, save_checkpoint
from .compiler import Compiler, choose_compiler
from .distributed import peers_alive, piece, replicated, shared
from .meter import LOSS, Meter
from .optimizer import build_optimizer, set_lr
from .precision import Precision, measured_precision
from .reproducible import derive_seed, reproducible
from .schedule import lr_factor, peak_lr

CHECKPOINT = "training.pt"
CHECK_STEPS = 50  # steps between two looks at the loss, each of which waits for the device
PROGRESS_SECONDS = 0.2
BATCH_NORM = (nn.modules.batchnorm._BatchNorm,)

Batch = TypeVar("Batch")


@dataclass(frozen=True)
class Task(Generic[Batch]):
    """What is learnt, and from what.

    `load` gives the batch of sample positions (B,) for an epoch, on the device. `terms` computes
    each loss term as a mean over the batch; its names are exactly those of `weights`, and the loss
    is Σ weights[name] · factor[name] · terms[name], the factor being 1 unless `factors` gives
    another one at that time (in epochs), times what `balance` makes of the terms. `validate` gives
    "accuracy" in [0, 1], and what else is to be logged, of the network in eval mode and float32,
    which is what ships, whatever precision training runs in.
    """

    samples: int
    load: Callable[[Tensor, int], Batch]
    terms: Callable[[nn.Module, Batch], Mapping[str, Tensor]]
    weights: Mapping[str, float]
    validate: Callable[[nn.Module], Mapping[str, float]]
    factors: Callable[[float], Mapping[str, float]] | None = None
    balance: Callable[[nn.Module, Mapping[str, Tensor]], Mapping[str, Tensor]] | None = None
    after_step: Callable[[nn.Module, int], None] | None = None
    networks: Callable[[nn.Module], list[nn.Module]] = lambda module: [module]  # may be compiled


@dataclass(frozen=True)
class FitResult:
    """What a training run did. The network itself was trained in place."""

    history: list[dict[str, Any]]  # one entry an epoch: terms, accuracy, lr, images/s
    selected_epoch: int  # 1-based
    selected_accuracy: float  # on validation, of the weights that the module now holds
    final_accuracy: float
    epochs: int  # that were run, at most spec.epochs
    steps: int
    images_per_second: float  # median over the epochs, data included, validation not
    precision: Precision
    compiled: bool
    resumed_epoch: int  # epochs taken over from a checkpoint; 0: none
    stopped_early: bool


@dataclass
class _Run:
    """A training run between two epochs."""

    module: nn.Module
    optimizer: torch.optim.Optimizer
    precision: Precision
    average: Average | None
    batches: list[int]  # sizes
    live: dict[str, Tensor]
    step: nn.Module  # the loss terms as a module, over all processes
    compiler: Compiler
    best: dict[str, Tensor] | None = None
    history: list[dict[str, Any]] = field(default_factory=list)

    @property
    def selected(self) -> dict[str, Any]:
        """The best epoch so far. Equal accuracies: the later, which has been trained longer."""
        return max(self.history, key=lambda entry: (entry["accuracy"], entry["epoch"]))


def fit(
    module: nn.Module,
    task: Task[Batch],
    spec: TrainSpec,
    *,
    context: Context,
    identity: str = "",
) -> FitResult:
    """Train `module` in place; it ends in eval mode with the selected weights.

    `select: best` keeps the epoch with the highest validation accuracy (equal: the later one),
    `final` the last. With `ema` set, the average is what is validated, selected and kept.

    Args:
        identity: what else the run depends on (digest of data, labels); a checkpoint with another
            identity is not resumed.
    Raises:
        MeasurementError: a loss term is NaN or infinite.
        ModelError: nothing to train. DataError, RecipeError: no batch can be formed.
        OutputError: a checkpoint cannot be written.
    """
    module.to(context.device)
    key = _key(module, task, spec, context=context, identity=identity)
    batches = batch_sizes(task.samples, spec.batch_size)
    _check_batches(module, batches, processes=context.world.size)
    with (
        reproducible(threads=context.threads, device=context.device),
        _channels_last(module),
        peers_alive(context.world),
    ):
        run = _start(module, task, spec, context=context, batches=batches)
        resumed = _resume(run, context=context, key=key)
        saved = time.monotonic()
        for epoch in range(resumed, spec.epochs):
            if _out_of_patience(run, spec):
                break
            _epoch(run, task, spec, context=context, epoch=epoch)
            due = time.monotonic() - saved >= 60 * spec.checkpoint_minutes
            if due and context.world.leads:
                _save(run, context=context, key=key)
                saved = time.monotonic()
        stopped = len(run.history) < spec.epochs
        context.events.progress(1, 1, _note(run, spec))
        return _finish(run, spec, resumed=resumed, stopped_early=stopped)


def batch_sizes(samples: int, batch_size: int) -> list[int]:
    """Sizes of an epoch's batches. The last may be smaller; a last one of 1 joins the one before.

    A batch of one sample has no variance for BatchNorm to normalise by.
    """
    if samples < 1:
        raise DataError("train: expected at least one sample, got an empty set; check data.train")
    sizes = [batch_size] * (samples // batch_size)
    rest = samples % batch_size
    if rest == 1 and sizes:
        sizes[-1] += 1
    elif rest:
        sizes.append(rest)
    return sizes


def epoch_order(samples: int, *, seed: int, epoch: int) -> Tensor:
    """The order of the samples in an epoch: a permutation given by (seed, epoch) alone."""
    generator = torch.Generator().manual_seed(derive_seed(seed, "order", epoch))
    return torch.randperm(samples, generator=generator)


def _check_batches(module: nn.Module, batches: list[int], *, processes: int) -> None:
    if batches[0] < processes:
        raise RecipeError(
            f"batch_size: expected at least a sample for each of {processes} processes, got "
            f"batches of {batches[0]}; raise batch_size or start fewer processes"
        )
    norm = next((m for m in module.modules() if isinstance(m, BATCH_NORM)), None)
    if norm is not None and min(batches) == 1:
        raise RecipeError(
            f"batch_size: the network has {type(norm).__name__}, which needs at least 2 samples a "
            f"batch to learn from, got batches of 1 ({sum(batches)} samples); raise batch_size"
        )


@contextmanager
def _channels_last(module: nn.Module) -> Iterator[None]:
    """Convolution kernels in channels_last: 1.2× faster on CPU and on tensor cores (design §6)."""
    kernels = [parameter for parameter in module.parameters() if parameter.ndim == 4]
    for kernel in kernels:
        kernel.data = kernel.data.contiguous(memory_format=torch.channels_last)
    try:
        yield
    finally:
        for kernel in kernels:
            kernel.grad = None
            kernel.data = kernel.data.contiguous()


def _start(
    module: nn.Module,
    task: Task[Batch],
    spec: TrainSpec,
    *,
    context: Context,
    batches: list[int],
) -> _Run:
    optimizer = build_optimizer(module, spec)
    rehearsing = copy.deepcopy(module)
    calls = spec.epochs * len(batches)

    def step(precision: Precision) -> None:
        _rehearse(rehearsing, task, precision, batch_size=batches[0], context=context)

    precision = measured_precision(spec.precision, step, name="step", calls=calls, context=context)
    compiler = choose_compiler(
        spec.compile,
        task.networks(module),
        task.networks(rehearsing),
        lambda: step(precision),
        calls=calls,
        context=context,
    )
    return _Run(
        module=module,
        optimizer=optimizer,
        precision=precision,
        average=None if spec.ema is None else Average(module, decay=spec.ema),
        batches=batches,
        live=tensors_of(module),
        step=replicated(_Terms(module, task), context=context),
        compiler=compiler,
    )


class _Terms(nn.Module):
    """The loss terms as a module of their own, so that DistributedDataParallel can wrap them."""

    def __init__(self, module: nn.Module, task: Task[Any]) -> None:
        super().__init__()
        self.module = module
        self._task = task

    def forward(self, batch: Any) -> dict[str, Tensor]:
        return dict(self._task.terms(self.module, batch))


def _rehearse(
    copied: nn.Module, task: Task[Batch], precision: Precision, *, batch_size: int, context: Context
) -> None:
    """A step's forward and backward pass on a copy of the network, which is thrown away."""
    copied.train()
    copied.zero_grad(set_to_none=True)
    indices, _ = piece(torch.arange(batch_size), world=context.world)
    batch = task.load(indices, 0)
    with precision.autocast(context.device):
        terms = task.terms(copied, batch)
    torch.stack(list(terms.values())).sum().backward()  # type: ignore[no-untyped-call]


def _epoch(run: _Run, task: Task[Batch], spec: TrainSpec, *, context: Context, epoch: int) -> None:
    """Train one epoch, validate, and append to the history."""
    started = time.perf_counter()
    torch.manual_seed(derive_seed(context.seed, "layers", epoch))  # dropout and the like
    _train_mode(run.module, freeze_norm=spec.freeze_norm)
    order = epoch_order(task.samples, seed=context.seed, epoch=epoch)
    meter = Meter((*task.weights, LOSS), device=context.device, world=context.world)
    done, total = epoch * len(run.batches), spec.epochs * len(run.batches)
    told = time.monotonic()
    for step, indices in enumerate(torch.split(order, run.batches), start=done):
        factor = lr_factor(spec, step=step, steps_per_epoch=len(run.batches))
        set_lr(run.optimizer, peak_lr(spec) * factor)
        with run.compiler.used(len(indices) == run.batches[0]):
            _step(run, task, spec, indices=indices, meter=meter, context=context, step=step)
        if (step + 1 - done) % CHECK_STEPS == 0:
            meter.check(epoch=epoch, advice=_advice(spec))
        if time.monotonic() - told >= PROGRESS_SECONDS:
            told = time.monotonic()
            context.events.progress(step + 1, total, _note(run, spec))
    meter.check(epoch=epoch, advice=_advice(spec))
    means = meter.means()
    seconds = time.perf_counter() - started
    found: Mapping[str, float] = {}
    if context.world.leads:
        with nullcontext() if run.average is None else run.average.in_place():
            run.module.eval()
            found = task.validate(run.module)
    entry = {
        "epoch": epoch + 1,
        "loss": means.pop(LOSS),
        "terms": means,
        **shared(dict(found), world=context.world),
        "lr": run.optimizer.param_groups[0]["lr"],
        "images_per_second": task.samples / seconds,
    }
    run.history.append(entry)
    if spec.select == "best" and run.selected is entry:
        run.best = copy_of(run.live if run.average is None else run.average.shadow)
    context.events.record("epoch", **entry)
    context.events.progress(done + len(run.batches), total, _note(run, spec))


def _train_mode(module: nn.Module, *, freeze_norm: bool) -> None:
    module.train()
    if freeze_norm:
        for part in module.modules():
            if isinstance(part, BATCH_NORM):
                part.eval()


def _step(
    run: _Run,
    task: Task[Batch],
    spec: TrainSpec,
    *,
    indices: Tensor,
    meter: Meter,
    context: Context,
    step: int,
) -> None:
    """One optimiser step, on this process's part of the batch."""
    own, share = piece(indices, world=context.world)
    batch = task.load(own, step // len(run.batches))
    with run.precision.autocast(context.device):
        terms = run.step(batch)
    assert terms.keys() == task.weights.keys(), f"{set(terms)} are not {set(task.weights)}"
    loss = _weighed(run, task, terms, time_epochs=step / len(run.batches))
    run.optimizer.zero_grad(set_to_none=True)
    (loss if share == 1.0 else loss * share).backward()  # type: ignore[no-untyped-call]
    if spec.clip_norm is not None:
        nn.utils.clip_grad_norm_(run.module.parameters(), spec.clip_norm)
    run.optimizer.step()
    meter.add({**terms, LOSS: loss}, samples=len(own) if share else 0, step=step)
    if task.after_step is not None:
        task.after_step(run.module, step)
    if run.average is not None:
        run.average.update(step=step)


def _weighed(
    run: _Run, task: Task[Batch], terms: Mapping[str, Tensor], *, time_epochs: float
) -> Tensor:
    """Σ weight · factor · balance · term."""
    factors = {} if task.factors is None else task.factors(time_epochs)
    parts = {n: weight * factors.get(n, 1.0) * terms[n] for n, weight in task.weights.items()}
    if task.balance is not None:
        scales = task.balance(run.module, terms)
        parts = {name: scales[name] * part for name, part in parts.items()}
    return torch.stack(list(parts.values())).sum()


def _advice(spec: TrainSpec) -> str:
    return (
        f"lower lr (now {peak_lr(spec):g}), lengthen warmup_epochs, set clip_norm, or try "
        "precision: fp32"
    )


def _out_of_patience(run: _Run, spec: TrainSpec) -> bool:
    """No epoch of the last `early_stopping` has been better than all before it."""
    if spec.early_stopping is None or not run.history:
        return False
    accuracies = [entry["accuracy"] for entry in run.history]
    first_best = accuracies.index(max(accuracies))
    return len(accuracies) - 1 - first_best >= spec.early_stopping


def _note(run: _Run, spec: TrainSpec) -> str:
    if not run.history:
        return f"epoch 1/{spec.epochs}"
    last = run.history[-1]
    agrees = f"agrees {100 * last['agreement']:.1f} % · " if "agreement" in last else ""
    return (
        f"epoch {last['epoch']}/{spec.epochs} · loss {last['loss']:.3f} · validation "
        f"{100 * last['accuracy']:.1f} % · {agrees}{last['images_per_second']:,.0f} images/s"
    )


def _finish(run: _Run, spec: TrainSpec, *, resumed: int, stopped_early: bool) -> FitResult:
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
        images_per_second=statistics.median(e["images_per_second"] for e in run.history),
        precision=run.precision,
        compiled=run.compiler.is_on,
        resumed_epoch=resumed,
        stopped_early=stopped_early,
    )


def _key(
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


def _save(run: _Run, *, context: Context, key: str) -> None:
    state = {
        "model": run.live,
        "optimizer": run.optimizer.state_dict(),
        "average": None if run.average is None else run.average.shadow,
        "best": run.best,
        "history": run.history,
    }
    save_checkpoint(context.resume / CHECKPOINT, state, key=key)


def _resume(run: _Run, *, context: Context, key: str) -> int:
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
