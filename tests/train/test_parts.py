"""Schedule, optimiser, precision, seeds and checkpoints, each alone."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from edgestill.pipeline.errors import OutputError
from edgestill.pipeline.train.checkpoint import digest, load_checkpoint, save_checkpoint
from edgestill.pipeline.train.optimizer import build_optimizer
from edgestill.pipeline.train.precision import bf16_unit, choose_precision
from edgestill.pipeline.train.reproducible import derive_seed, reproducible
from edgestill.pipeline.train.schedule import lr_factor, peak_lr
from edgestill.pipeline.training_spec import TrainSpec
from torch import nn


def factors(spec: TrainSpec, steps_per_epoch: int) -> list[float]:
    total = spec.epochs * steps_per_epoch
    return [lr_factor(spec, step=s, steps_per_epoch=steps_per_epoch) for s in range(total)]


def test_cosine_rises_linearly_over_the_warm_up_then_falls_to_zero() -> None:
    values = factors(TrainSpec(epochs=3, schedule="cosine", warmup_epochs=1), 4)

    assert values[:4] == [0.25, 0.5, 0.75, 1.0]
    assert values[4:] == pytest.approx([(1 + math.cos(math.pi * k / 8)) / 2 for k in range(8)])


def test_warm_up_takes_at_most_half_of_the_run() -> None:
    values = factors(TrainSpec(epochs=2, schedule="constant", warmup_epochs=9), 3)

    assert values == pytest.approx([1 / 3, 2 / 3, 1, 1, 1, 1])


def test_one_cycle_is_torchs_schedule() -> None:
    spec, steps = TrainSpec(epochs=5, schedule="one-cycle", lr=0.4), 7
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.4)
    torchs = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr=0.4, total_steps=35, cycle_momentum=False
    )
    expected = []
    for _ in range(35):
        expected.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        if len(expected) < 35:
            torchs.step()

    assert [0.4 * f for f in factors(spec, steps)] == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("schedule", ["cosine", "one-cycle", "constant"])
def test_a_run_of_one_step_has_a_usable_rate(schedule: str) -> None:
    spec = TrainSpec.model_validate({"epochs": 1, "schedule": schedule})

    assert factors(spec, 1) == [1.0]


def test_default_rate_follows_optimiser_and_batch_size() -> None:
    assert peak_lr(TrainSpec(batch_size=512)) == 0.2
    assert peak_lr(TrainSpec(batch_size=512, optimizer="adamw")) == 1e-3
    assert peak_lr(TrainSpec(batch_size=512, lr=0.7)) == 0.7


@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_only_kernels_and_matrices_decay(name: str) -> None:
    net = nn.Sequential(nn.Conv2d(1, 2, 1), nn.BatchNorm2d(2), nn.Flatten(), nn.Linear(2, 2))
    spec = TrainSpec.model_validate({"optimizer": name, "weight_decay": 0.1})

    decayed, free = build_optimizer(net, spec).param_groups

    assert {p.ndim for p in decayed["params"]} == {2, 4}
    assert {p.ndim for p in free["params"]} == {1}
    assert (decayed["weight_decay"], free["weight_decay"]) == (0.1, 0.0)


@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_fused_step_on_channels_last_kernels_equals_the_plain_optimiser(name: str) -> None:
    torch.manual_seed(0)
    nets = [nn.Conv2d(3, 4, 3), nn.Conv2d(3, 4, 3)]
    nets[1].load_state_dict(nets[0].state_dict())
    nets[0].weight.data = nets[0].weight.data.contiguous(memory_format=torch.channels_last)
    spec = TrainSpec.model_validate({"optimizer": name, "lr": 0.1, "weight_decay": 0.01})
    fused = build_optimizer(nets[0], spec)
    groups = [
        {"params": [nets[1].weight], "weight_decay": 0.01},
        {"params": [nets[1].bias], "weight_decay": 0.0},
    ]
    plain: torch.optim.Optimizer = (
        torch.optim.SGD(groups, lr=0.1, momentum=0.9, nesterov=True, foreach=False)
        if name == "sgd"
        else torch.optim.AdamW(groups, lr=0.1, foreach=False)
    )
    inputs = torch.randn(2, 3, 5, 5)
    for _ in range(3):
        for net, optimizer in zip(nets, (fused, plain), strict=True):
            optimizer.zero_grad()
            net(inputs).square().mean().backward()
            optimizer.step()

    # two orders of the same float32 sums
    torch.testing.assert_close(nets[0].weight, nets[1].weight, atol=1e-5, rtol=1e-4)


def test_bf16_is_taken_only_where_the_processor_multiplies_it() -> None:
    assert bf16_unit("flags\t\t: fpu avx512f avx512_bf16 amx_bf16") == "AMX"
    assert bf16_unit("flags : avx512_bf16") == "AVX-512 BF16"
    assert bf16_unit("Features\t: fp asimd bf16 i8mm") == "ARM BF16"
    assert bf16_unit("flags : avx2 avx512f") is None
    assert bf16_unit("") is None


def test_an_explicit_precision_is_followed_and_says_so() -> None:
    for wish in ("fp32", "bf16"):
        chosen = choose_precision(wish, device="cpu")  # type: ignore[arg-type]
        assert chosen.name == wish
        assert "recipe" in chosen.reason


def test_each_purpose_has_its_own_seed() -> None:
    seeds = {
        derive_seed(s, *p) for s in (0, 1) for p in (("order", 0), ("order", 1), ("layers", 0))
    }

    assert len(seeds) == 6
    assert derive_seed(0, "order", 0) == derive_seed(0, "order", 0)
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_checkpoint_gives_back_the_same_bits(tmp_path: Path) -> None:
    state = {"w": torch.randn(3, 2), "n": torch.tensor(4), "list": [0.1, None, "x"], "d": {}}
    save_checkpoint(tmp_path / "c.pt", state, key="k")

    loaded, reason = load_checkpoint(tmp_path / "c.pt", key="k")

    assert reason is None
    assert digest(loaded) == digest(state)
    assert [p.name for p in tmp_path.iterdir()] == ["c.pt"]


def test_checkpoint_that_cannot_be_written_is_the_users_problem(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="expected to write a checkpoint"):
        save_checkpoint(tmp_path / "missing" / "c.pt", {}, key="k")


def test_digest_sees_value_dtype_shape_and_name() -> None:
    base = {"a": torch.zeros(4)}
    others = [
        {"a": torch.ones(4)},
        {"a": torch.zeros(4, dtype=torch.int32)},
        {"a": torch.zeros(2, 2)},
        {"b": torch.zeros(4)},
    ]

    assert len({digest(state) for state in (base, *others)}) == 5


def test_torchs_fused_transformer_layer_is_off_inside_and_put_back() -> None:
    """Under bf16 autocast it fails in evaluation, where a teacher labels."""
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True).eval()
    before = torch.backends.mha.get_fastpath_enabled()

    with (
        reproducible(threads=1, device="cpu"),
        torch.inference_mode(),
        torch.autocast("cpu", torch.bfloat16),
    ):
        answer = layer(torch.ones(2, 3, 16))

    assert answer.isfinite().all()
    assert torch.backends.mha.get_fastpath_enabled() == before
