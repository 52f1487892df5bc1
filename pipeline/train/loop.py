"""THE training loop: every run of every capability goes through `fit`.

What is learnt is a `Task` (`task.py`): where batches come from, which named loss terms a step
computes, how they are weighed, and how accuracy on validation is measured. The loop owns the rest:
precision, schedule, averaging, clipping, selection, checkpoints, resuming, several processes. It
knows no kind of sample and no teacher.

A run is a function of (initial weights, task, spec, seed, threads, device). Order, dropout and
views are derived from the epoch number, so a run that was killed and resumed gives the same bytes
as one that was not. There is no device synchronisation inside a step.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from ..stage import Context
from ..training_spec import TrainSpec
from .average import Average, copy_of, tensors_of
from .batches import (
    BATCH_NORM,
    batch_sizes,
    bucketed,
    check_batches,
    epoch_order,
    norm_of,
)
from .compiler import choose_compiler
from .distributed import mean_over_batch, peers_alive, piece, replicated, shared
from .meter import LOSS, Meter
from .optimizer import build_optimizer, set_lr
from .precision import Precision, measured_precision
from .reproducible import derive_seed, reproducible
from .run import Run, finish, out_of_patience, resume, run_key, save
from .schedule import lr_factor, peak_lr
from .task import Batch, FitResult, Task

CHECK_STEPS = 50  # steps between two looks at the loss, each of which waits for the device
PROGRESS_SECONDS = 0.2


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
    key = run_key(module, task, spec, context=context, identity=identity)
    norm = None if spec.freeze_norm else norm_of(module)
    least = max(task.least, 1 if norm is None else 2)
    batches = batch_sizes(task.samples, spec.batch_size, least=max(2, least))
    check_batches(batches, norm, least=least, processes=context.world.size)
    with (
        reproducible(threads=context.threads, device=context.device),
        _channels_last(module),
        peers_alive(context.world),
    ):
        run = _start(module, task, spec, context=context, batches=batches, least=least)
        resumed = resume(run, context=context, key=key)
        saved = time.monotonic()
        for epoch in range(resumed, spec.epochs):
            if out_of_patience(run, spec):
                break
            _epoch(run, task, spec, context=context, epoch=epoch)
            due = time.monotonic() - saved >= 60 * spec.checkpoint_minutes
            if due and context.world.leads:
                save(run, context=context, key=key)
                saved = time.monotonic()
        stopped = len(run.history) < spec.epochs
        context.events.progress(1, 1, _note(run, spec))
        return finish(run, spec, resumed=resumed, stopped_early=stopped)


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
    least: int,
) -> Run:
    optimizer = build_optimizer(module, spec)
    rehearsing = copy.deepcopy(module)
    calls = spec.epochs * len(batches)

    def rehearse(step: nn.Module, precision: Precision) -> None:
        _rehearse(step, task, precision, batch_size=batches[0], context=context)

    def step(precision: Precision) -> None:
        rehearse(_Terms(rehearsing, task), precision)

    precision = measured_precision(spec.precision, step, name="step", calls=calls, context=context)
    compiler = choose_compiler(
        spec.compile,
        task.networks(module),
        task.networks(rehearsing),
        lambda: step(precision),
        calls=calls,
        context=context,
    )
    replicas = replicated(
        _Terms(module, task),
        _Terms(rehearsing, task),
        lambda one: rehearse(one, precision),
        context=context,
    )
    return Run(
        module=module,
        optimizer=optimizer,
        precision=precision,
        average=None if spec.ema is None else Average(module, decay=spec.ema),
        batches=batches,
        least=least,
        live=tensors_of(module),
        step=replicas,
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
    step: nn.Module, task: Task[Batch], precision: Precision, *, batch_size: int, context: Context
) -> None:
    """A step's forward and backward pass. Its gradients stay, and what it does to buffers."""
    step.train()
    step.zero_grad(set_to_none=True)
    indices, _ = piece(torch.arange(batch_size), world=context.world)
    batch = task.load(indices, 0)
    with precision.autocast(context.device):
        terms = step(batch)
    torch.stack(list(terms.values())).sum().backward()  # type: ignore[no-untyped-call]


def _epoch(run: Run, task: Task[Batch], spec: TrainSpec, *, context: Context, epoch: int) -> None:
    """Train one epoch, validate, and append to the history."""
    started = time.perf_counter()
    # dropout and the like: each process draws for samples of its own
    rank = (context.world.rank,) if context.world.rank else ()
    torch.manual_seed(derive_seed(context.seed, "layers", epoch, *rank))
    _train_mode(run.module, freeze_norm=spec.freeze_norm)
    order = epoch_order(task.samples, seed=context.seed, epoch=epoch)
    if task.lengths is not None:
        order = bucketed(order, task.lengths, run.batches, seed=context.seed, epoch=epoch)
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
        "samples_per_second": task.samples / seconds,
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
    run: Run,
    task: Task[Batch],
    spec: TrainSpec,
    *,
    indices: Tensor,
    meter: Meter,
    context: Context,
    step: int,
) -> None:
    """One optimiser step, on this process's part of the batch."""
    own, share = piece(indices, world=context.world, least=run.least)
    batch = task.load(own, step // len(run.batches))
    with run.precision.autocast(context.device):
        terms = run.step(batch)
    assert terms.keys() == task.weights.keys(), f"{set(terms)} are not {set(task.weights)}"
    scales: Mapping[str, Tensor] = {}
    if task.balance is not None:
        whole = mean_over_batch(terms, share=share, world=context.world)
        scales = task.balance(run.module, whole)
    loss = _weighed(task, terms, scales, time_epochs=step / len(run.batches))
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
    task: Task[Batch],
    terms: Mapping[str, Tensor],
    scales: Mapping[str, Tensor],
    *,
    time_epochs: float,
) -> Tensor:
    """Σ weight · factor · scale · term."""
    factors = {} if task.factors is None else task.factors(time_epochs)
    parts = {n: weight * factors.get(n, 1.0) * terms[n] for n, weight in task.weights.items()}
    if scales:
        parts = {name: scales[name] * part for name, part in parts.items()}
    return torch.stack(list(parts.values())).sum()


def _advice(spec: TrainSpec) -> str:
    return (
        f"lower lr (now {peak_lr(spec):g}), lengthen warmup_epochs, set clip_norm, or try "
        "precision: fp32"
    )


def _note(run: Run, spec: TrainSpec) -> str:
    if not run.history:
        return f"epoch 1/{spec.epochs}"
    last = run.history[-1]
    agrees = f"agrees {100 * last['agreement']:.1f} % · " if "agreement" in last else ""
    return (
        f"epoch {last['epoch']}/{spec.epochs} · loss {last['loss']:.3f} · validation "
        f"{100 * last['accuracy']:.1f} % · {agrees}{last['samples_per_second']:,.0f} samples/s"
    )
