"""Several processes that train one network: who they are, and what they say to one another.

`torchrun` starts them and sets RANK and WORLD_SIZE; gloo carries CPU tensors, NCCL CUDA ones
(PyTorch's own backends). The first process leads: it alone writes, measures and judges. A batch is
cut into one part a process; its samples and their augmentation do not depend on how many share
it. Without `torchrun` every function here does nothing.

A process that dies or fails ends the others: gloo notices a closed connection at once, and
`torchrun` terminates whoever is left. All of them need to see one output folder.
"""

from __future__ import annotations

import gc
import os
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.rendezvous import rendezvous
from torch.nn.parallel import DistributedDataParallel

from ..errors import RecipeError, RuntimeFailure
from ..stage import Context, World, launched
from .average import assign, copy_of, tensors_of

# How long one waits for another. Not for a dead one, which is noticed at once, but for one at work:
# the leader decodes and validates alone, and a view of a large set takes its time to label.
PATIENCE = timedelta(days=1)
STORE_PATIENCE = timedelta(seconds=10)  # torchrun's own store answers at once, or never
ENDED = "edgestill/ended"  # how many processes have ended early

# A kernel of one channel has one layout under two names; only speed would be concerned.
REMARK = "Grad strides do not match bucket view"


@contextmanager
def gathered() -> Iterator[World]:
    """The processes that `torchrun` started, joined; one alone otherwise."""
    world = launched()
    if world.size == 1:
        yield world
        return
    # before there is a group: its functions keep the one they find as a default argument, and a
    # group that is kept never ends its threads, which then die within an ending interpreter
    import torch.distributed.nn.functional

    backend = "gloo"
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
        backend = "cpu:gloo,cuda:nccl"
    dist.init_process_group(backend, timeout=PATIENCE)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=REMARK)
        if not world.leads:
            warnings.simplefilter("ignore")  # the leader warns of the same
        yield world
    # not after an error: it would wait for what another is still in; the process ends anyway
    gc.collect()  # DistributedDataParallel holds the group, and itself
    dist.destroy_process_group()


def first_to_end() -> bool:
    """Whether this process is the first of all that ends early: it says why, the others follow it.

    Each is asked once. Where the store that they share is gone, every one is the first.
    """
    try:
        store, _, _ = next(rendezvous("env://", timeout=STORE_PATIENCE))
        return bool(store.add(ENDED, 1) == 1)
    except (RuntimeError, ValueError):  # DistError is the former
        return True


@contextmanager
def peers_alive(world: World) -> Iterator[None]:
    """Says plainly that another process is gone, which the backends say in their own words."""
    try:
        yield
    except RuntimeError as error:
        if world.size == 1 or not _is_loss(error):
            raise
        raise RuntimeFailure(
            f"process {world.rank} of {world.size}: expected the others to go on, lost one "
            f"({str(error).splitlines()[0][:160]}); finished stages and the last checkpoint are "
            "kept, the same command goes on from there"
        ) from error


def _is_loss(error: RuntimeError) -> bool:
    if isinstance(error, dist.DistError):
        return True
    text = str(error).lower()
    return any(word in text for word in ("gloo", "nccl", "connection closed", "connection reset"))


def shared(value: Any, *, world: World) -> Any:
    """The leader's `value`, in every process."""
    if world.size == 1:
        return value
    box = [value]
    with peers_alive(world):
        dist.broadcast_object_list(box, src=0)
    return box[0]


def wait_for_all(world: World) -> None:
    if world.size > 1:
        with peers_alive(world):
            dist.barrier()


def sum_over(tensor: Tensor, *, world: World) -> Tensor:
    """In place, over the processes."""
    if world.size > 1:
        dist.all_reduce(tensor, op=dist.ReduceOp.SUM)
    return tensor


def least_over(tensor: Tensor, *, world: World) -> Tensor:
    """In place, over the processes."""
    if world.size > 1:
        dist.all_reduce(tensor, op=dist.ReduceOp.MIN)
    return tensor


def piece(indices: Tensor, *, world: World, least: int = 1) -> tuple[Tensor, float]:
    """This process's part of a batch, and what its mean loss counts for.

    The factor makes the average over processes the mean over the batch, whatever the parts' sizes.
    Of a batch too small for all of them only the first ones have a part. The others compute the
    batch's first samples with factor 0, for all must take part.

    Args:
        indices: (B,), B ≥ 1.
        least: samples that a part must have: BatchNorm cannot normalise one.
    Returns:
        positions (b,), b ≥ min(least, B); and b · processes / B, or 0.
    """
    if world.size == 1:
        return indices, 1.0
    parts = min(world.size, max(1, len(indices) // least))
    if world.rank >= parts:
        return indices[:least], 0.0
    own = torch.tensor_split(indices, parts)[world.rank]
    return own, len(own) * world.size / len(indices)


def mean_over_batch(
    terms: Mapping[str, Tensor], *, share: float, world: World
) -> Mapping[str, Tensor]:
    """Each term's mean over the whole batch, without its graph.

    Args:
        terms: means over this process's part, 0-dim.
        share: the part's factor, see `piece`.
    """
    if world.size == 1:
        return terms
    means = torch.stack([term.detach().float() for term in terms.values()]) * (share / world.size)
    return dict(zip(terms, sum_over(means, world=world).unbind(), strict=True))


def replicated(
    step: nn.Module,
    copied: nn.Module,
    rehearse: Callable[[nn.Module], None],
    *,
    context: Context,
) -> nn.Module:
    """`step` with its gradients averaged over the processes; itself where there is one.

    The same as one process for means over samples. What compares the samples of a batch sees those
    of its process: `rkd`, `dist`, the mean over labelled images where some are unlabelled. So does
    BatchNorm on the CPU, where the leader's statistics are kept; on CUDA it becomes SyncBatchNorm.

    Args:
        step: returns loss terms.
        copied: another such module, on which
        rehearse: runs a forward and a backward pass, to see which parameters take part. It is also
            run on the result, and undone: DistributedDataParallel lays its buckets out anew after
            the first pass, and a resumed run must sum in the order of one that never stopped.
    Raises:
        RecipeError: nothing to average.
    """
    if context.world.size == 1:
        return step
    if not any(parameter.requires_grad for parameter in step.parameters()):
        raise RecipeError("training: expected parameters that require a gradient, got none")
    devices = None
    if context.device == "cuda":
        step, devices = synchronised(step), [torch.cuda.current_device()]
    rehearse(copied)
    idle = any(p.requires_grad and p.grad is None for p in copied.parameters())
    whole = DistributedDataParallel(step, device_ids=devices, find_unused_parameters=idle)
    kept = copy_of(tensors_of(step))
    rehearse(whole)
    assign(tensors_of(step), kept)
    step.zero_grad(set_to_none=True)
    return whole


def synchronised(step: nn.Module) -> nn.Module:
    """`step` with SyncBatchNorm for BatchNorm; hooks (a tap may sit on one) move with it."""
    before = dict(step.named_modules())
    step = nn.SyncBatchNorm.convert_sync_batchnorm(step)  # type: ignore[no-untyped-call]
    for name, module in step.named_modules():
        if module is not before[name]:
            module._forward_hooks = before[name]._forward_hooks  # one table: handles stay valid
    return step
