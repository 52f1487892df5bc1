"""Several processes: how a batch is shared, and that two of them compute what one does."""

from __future__ import annotations

import json
import math
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from edgestill.pipeline.errors import RecipeError, RuntimeFailure
from edgestill.pipeline.stage import ALONE, Context, Silent, World, launched
from edgestill.pipeline.train.distributed import (
    gathered,
    mean_over_batch,
    peers_alive,
    piece,
    replicated,
    shared,
    sum_over,
    synchronised,
)
from torch import nn

TORCHRUN = [sys.executable, "-P", "-m", "torch.distributed.run", "--standalone",
            "--nproc-per-node", "2"]  # fmt: skip
TOGETHER = Path(__file__).with_name("together.py")


def world(rank: int, size: int) -> World:
    return World(rank=rank, size=size, local_size=size)


@pytest.fixture(scope="module")
def together(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each of two processes found (together.py), by rank."""
    folder = tmp_path_factory.mktemp("together")
    done = subprocess.run(
        [*TORCHRUN, str(TOGETHER), str(folder)],
        cwd=folder, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)]


@pytest.mark.parametrize("size", [1, 2, 3, 4, 7])
@pytest.mark.parametrize("samples", [1, 2, 3, 5, 8, 64])
@pytest.mark.parametrize("least", [1, 2, 3])
def test_the_parts_are_the_batch_and_their_factors_average_to_its_mean(
    size: int, samples: int, least: int
) -> None:
    batch = torch.arange(100, 100 + samples)

    parts = [piece(batch, world=world(rank, size), least=least) for rank in range(size)]

    assert all(len(own) >= min(least, samples) for own, _ in parts)
    assert torch.cat([own for own, factor in parts if factor]).equal(batch)
    means = [factor * own.double().mean() for own, factor in parts]
    assert math.isclose(sum(means) / size, batch.double().mean(), rel_tol=1e-12)


def test_of_a_batch_too_small_for_all_the_last_process_has_no_part() -> None:
    assert piece(torch.tensor([4, 5, 6]), world=world(0, 2), least=2)[0].tolist() == [4, 5, 6]

    own, factor = piece(torch.tensor([4, 5, 6]), world=world(1, 2), least=2)

    assert own.tolist() == [4, 5]  # it must take part all the same, and of one it cannot
    assert factor == 0.0


def test_a_process_alone_keeps_everything_as_it_is() -> None:
    batch, values, net = torch.arange(5), torch.tensor([1.0]), nn.Linear(2, 2)
    terms = {"hard": values}
    context = Context(0, 1, "cpu", Path("nowhere"), Silent())

    assert piece(batch, world=ALONE)[0] is batch
    assert shared(values, world=ALONE) is values
    assert sum_over(values, world=ALONE).tolist() == [1.0]
    assert mean_over_batch(terms, share=1.0, world=ALONE) is terms
    assert replicated(net, net, lambda _: None, context=context) is net


def test_without_torchrun_one_is_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    monkeypatch.setenv("RANK", "3")  # left over from something else
    before = list(warnings.filters)

    with gathered() as found:
        assert found == launched() == ALONE

    assert not torch.distributed.is_initialized()
    assert warnings.filters == before


def test_what_torchrun_sets_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"WORLD_SIZE": "8", "RANK": "5", "LOCAL_WORLD_SIZE": "4"}.items():
        monkeypatch.setenv(name, value)

    assert launched() == World(rank=5, size=8, local_size=4)
    assert not launched().leads


def test_a_lost_process_is_a_runtime_failure_that_says_how_to_go_on() -> None:
    said = "[gloo/transport/tcp/pair.cc:538] Connection closed by peer [127.0.0.1]:1"

    wanted = r"process 1 of 2.*lost one.*same command goes on"
    with pytest.raises(RuntimeFailure, match=wanted), peers_alive(world(1, 2)):
        raise RuntimeError(said)


@pytest.mark.parametrize("of", [ALONE, World(rank=0, size=2)])
def test_an_error_of_ones_own_is_not_taken_for_a_loss(of: World) -> None:
    with pytest.raises(RuntimeError, match="mat1 and mat2"), peers_alive(of):
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")


def test_nothing_to_train_is_a_user_error() -> None:
    net = nn.Linear(2, 2).requires_grad_(False)
    context = Context(0, 1, "cpu", Path("nowhere"), Silent(), World(rank=0, size=2))

    with pytest.raises(RecipeError, match="require a gradient"):
        replicated(net, net, lambda _: None, context=context)


def test_a_tap_on_a_batch_norm_moves_to_its_synchronised_twin() -> None:
    net = nn.Sequential(nn.Conv2d(1, 2, 1), nn.BatchNorm2d(2), nn.ReLU())
    weights = [id(parameter) for parameter in net.parameters()]
    seen: list[int] = []
    handle = net[1].register_forward_hook(lambda *_: seen.append(1))

    net = synchronised(net).eval()
    net(torch.zeros(2, 1, 3, 3))
    handle.remove()
    net(torch.zeros(2, 1, 3, 3))

    assert isinstance(net[1], nn.SyncBatchNorm)
    assert [id(parameter) for parameter in net.parameters()] == weights
    assert seen == [1]


def test_everybody_has_what_the_leader_has(together: list[dict[str, Any]]) -> None:
    assert [found["shared"] for found in together] == ["of 0", "of 0"]


def test_sums_and_least_values_are_over_all(together: list[dict[str, Any]]) -> None:
    assert [found["sum"] for found in together] == [[3.0, 30.0]] * 2
    assert [found["least"] for found in together] == [[1, 10]] * 2


def test_the_mean_over_the_batch_is_that_of_one_process(together: list[dict[str, Any]]) -> None:
    for found in together:
        assert found["mean_over_batch"] == pytest.approx(found["mean"], rel=1e-6)  # float32


@pytest.mark.parametrize("case", ["whole", "uneven", "idle", "unused"])
def test_gradients_are_those_of_the_whole_batch(case: str, together: list[dict[str, Any]]) -> None:
    expected, *got = [
        torch.tensor(values)
        for values in (together[0][case]["expected"], *(found[case]["got"] for found in together))
    ]

    for gradient in got:
        # float32, summed in another order
        torch.testing.assert_close(gradient, expected, rtol=1e-5, atol=1e-6)
    assert got[0].equal(got[1])


def test_a_rehearsal_leaves_no_trace(together: list[dict[str, Any]]) -> None:
    assert all(found["untouched"] for found in together)


def test_the_meter_sees_all_parts_and_a_nan_of_any(together: list[dict[str, Any]]) -> None:
    assert [found["meter"] for found in together] == [pytest.approx((1 * 3 + 4 * 1) / 4)] * 2
    assert all("NaN" in found["broken"] for found in together)


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="threads are listed in /proc")
def test_no_thread_of_the_group_is_left(together: list[dict[str, Any]]) -> None:
    # one that frees a tensor while the interpreter ends aborts the process (-6 instead of 0)
    assert [found["threads"] for found in together] == [[], []]


def test_only_the_leader_warns(together: list[dict[str, Any]]) -> None:
    assert [found["warned"] for found in together] == [True, False]
