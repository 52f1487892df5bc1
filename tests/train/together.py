"""Run by test_distributed.py under torchrun: what each of two processes finds, as JSON."""

from __future__ import annotations

import copy
import json
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
from edgestill.pipeline.errors import MeasurementError
from edgestill.pipeline.stage import Context, Silent, World
from edgestill.pipeline.train.distributed import (
    gathered,
    least_over,
    mean_over_batch,
    piece,
    replicated,
    shared,
    sum_over,
)
from edgestill.pipeline.train.meter import LOSS, Meter
from torch import Tensor, nn

INPUTS = torch.linspace(-1, 1, 9 * 4).reshape(9, 4)
# batch, least samples of a part, whether a layer takes no part
CASES = {
    "whole": (8, 1, False),
    "uneven": (5, 1, False),
    "idle": (3, 2, False),  # the second process has no part
    "unused": (8, 1, True),
}


class Net(nn.Module):
    """Means over samples, so that parts average to the whole; its BatchNorm only counts."""

    def __init__(self, *, unused: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 1))
        self.counted = nn.BatchNorm1d(4).requires_grad_(False)
        self.unused = nn.Linear(2, 2) if unused else None

    def forward(self, inputs: Tensor) -> dict[str, Tensor]:
        self.counted(inputs)
        return {"loss": self.layers(inputs).square().mean()}


def gradients(net: nn.Module) -> Tensor:
    return torch.cat([p.grad.flatten() for p in net.parameters() if p.grad is not None])


def step(net: nn.Module, inputs: Tensor, factor: float) -> None:
    (net(inputs)["loss"] * factor).backward()


def averaged(case: str, *, context: Context) -> tuple[dict[str, list[float]], bool]:
    """Gradients of the whole batch and over the processes; whether a rehearsal left no trace."""
    batch, least, unused = CASES[case]
    net = Net(unused=unused)
    before = copy.deepcopy(net.state_dict())
    whole = copy.deepcopy(net)
    step(whole, INPUTS[:batch], 1.0)

    shares = replicated(
        net, copy.deepcopy(net), lambda one: step(one, INPUTS[:4], 1.0), context=context
    )
    untouched = all(p.grad is None for p in net.parameters()) and all(
        tensor.equal(before[name]) for name, tensor in net.state_dict().items()
    )
    own, factor = piece(torch.arange(batch), world=context.world, least=least)
    step(shares, INPUTS[own], factor)
    found = {"expected": gradients(whole).tolist(), "got": gradients(net).tolist()}
    return found, untouched


def metered(world: World) -> tuple[float, str]:
    meter = Meter((LOSS,), device="cpu", world=world)
    meter.add({LOSS: torch.tensor([1.0, 4.0][world.rank])}, samples=[3, 1][world.rank], step=0)
    mean = meter.means()[LOSS]
    meter.add({LOSS: torch.tensor([1.0, float("nan")][world.rank])}, samples=1, step=1)
    try:
        meter.check(epoch=0, advice="")
    except MeasurementError as error:
        return mean, str(error)
    return mean, "nothing"


def found_by(context: Context) -> dict[str, Any]:
    world, rank = context.world, context.world.rank
    found: dict[str, Any] = {"shared": shared(f"of {rank}", world=world)}
    values = torch.tensor([1.0, 10.0]) * (rank + 1)
    found["sum"] = sum_over(values.clone(), world=world).tolist()
    found["least"] = least_over(values.long(), world=world).tolist()

    own, share = piece(torch.arange(5), world=world)
    terms = {"a": INPUTS[own].exp().mean()}
    found["mean"] = float(INPUTS[:5].exp().mean())
    found["mean_over_batch"] = float(mean_over_batch(terms, share=share, world=world)["a"])

    traces = []
    for case in CASES:
        found[case], untouched = averaged(case, context=context)
        traces.append(untouched)
    found["untouched"] = all(traces)
    found["meter"], found["broken"] = metered(world)
    return found


def threads() -> list[str]:
    return [path.read_text().strip() for path in Path("/proc/self/task").glob("*/comm")]


def main(folder: Path) -> None:
    with warnings.catch_warnings(record=True) as caught, gathered() as world:
        context = Context(0, 1, "cpu", folder, Silent(), world)
        found = found_by(context)
        warnings.warn("said by both", stacklevel=1)
    found["threads"] = [name for name in threads() if "gloo" in name]
    found["warned"] = [str(one.message) for one in caught] == ["said by both"]
    (folder / f"{world.rank}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
