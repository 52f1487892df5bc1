"""Several processes that train one network: who they are, and what they say to one another.

`torchrun` starts them and sets RANK and WORLD_SIZE; gloo carries CPU tensors, NCCL CUDA ones
(PyTorch's own backends). The first process leads: it alone writes, measures and judges. A batch is
cut into one piece a process; its samples and their augmentation do not depend on how many share
it. Without `torchrun` every function here does nothing.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ..errors import RecipeError, RuntimeFailure
from ..stage import Context, World


@contextmanager
def gathered() -> Iterator[World]:
    """The processes that `torchrun` started, joined; one alone otherwise."""
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1 or "RANK" not in os.environ:
        yield World()
        return
    local = int(os.environ.get("LOCAL_RANK", "0"))
    if torch.cuda.is_available():
        torch.cuda.set_device(local)
        dist.init_process_group("cpu:gloo,cuda:nccl")
    else:
        dist.init_process_group("gloo")
    try:
        # a kernel of one channel has one layout under two names; only speed would be concerned
        warnings.filterwarnings("ignore", message="Grad strides do not match bucket view")
        yield World(
            rank=int(os.environ["RANK"]),
            size=size,
            local_size=int(os.environ.get("LOCAL_WORLD_SIZE", size)),
        )
    finally:
        dist.destroy_process_group()


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
    if world.size > 1:
        dist.all_reduce(tensor, op=dist.ReduceOp.MIN)
    return tensor


def piece(indices: Tensor, *, world: World) -> tuple[Tensor, float]:
    """This process's part of a batch, and what its mean loss counts for.

    The factor makes the average over processes the mean over the batch, whatever the parts' sizes.
    A process for which no sample is left computes the first one with factor 0: all must take part.

    Returns:
        positions (b,), b ≥ 1; and b · processes / B, or 0.
    """
    if world.size == 1:
        return indices, 1.0
    own = torch.tensor_split(indices, world.size)[world.rank]
    if len(own) == 0:
        return indices[:1], 0.0
    return own, len(own) * world.size / len(indices)


def replicated(step: nn.Module, *, context: Context) -> nn.Module:
    """`step` with its gradients averaged over the processes; itself where there is one.

    BatchNorm becomes SyncBatchNorm on CUDA; on the CPU, which has none, each process normalises
    its own part of the batch and the leader's statistics are kept.

    Raises:
        RecipeError: nothing to average.
    """
    if context.world.size == 1:
        return step
    if not any(parameter.requires_grad for parameter in step.parameters()):
        raise RecipeError("training: expected parameters that require a gradient, got none")
    if context.device == "cuda":
        step = nn.SyncBatchNorm.convert_sync_batchnorm(step)  # type: ignore[no-untyped-call]
        device = torch.cuda.current_device()
        return DistributedDataParallel(step, device_ids=[device])
    return DistributedDataParallel(step)
