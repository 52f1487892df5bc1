"""The training loop: resuming, selection, averaging, batches, failures. Nets of a few weights."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from edgestill.pipeline.errors import DataError, MeasurementError, ModelError, RecipeError
from edgestill.pipeline.stage import Context, Silent
from edgestill.pipeline.train.batches import batch_sizes, epoch_order
from edgestill.pipeline.train.checkpoint import digest
from edgestill.pipeline.train.loop import fit
from edgestill.pipeline.train.run import CHECKPOINT
from edgestill.pipeline.train.task import FitResult, Task
from edgestill.pipeline.training_spec import TrainSpec
from torch import Tensor, nn

SAMPLES, CLASSES = 23, 3


class Killed(Exception):
    """Stands for a kill signal in the middle of a run."""


class Recorder(Silent):
    def __init__(self) -> None:
        self.notes: list[str] = []
        self.records: list[dict[str, Any]] = []
        self.steps: list[tuple[float, float]] = []

    def progress(self, done: float, total: float, note: str = "") -> None:
        self.steps.append((done, total))
        assert note

    def note(self, text: str) -> None:
        self.notes.append(text)

    def record(self, kind: str, **fields: Any) -> None:
        self.records.append({"kind": kind, **fields})


def context_in(folder: Path, *, seed: int = 0, events: Silent | None = None) -> Context:
    return Context(seed=seed, threads=1, device="cpu", scratch=folder, events=events or Silent())


def small_net() -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        return nn.Sequential(
            nn.Conv2d(2, 4, 3, bias=False),
            nn.BatchNorm2d(4),
            nn.ReLU(),
            nn.Dropout(0.3),
            nn.Flatten(),
            nn.Linear(4 * 4, CLASSES),
        )


def images() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    labels = torch.arange(SAMPLES) % CLASSES
    inputs = torch.randn(SAMPLES, 2, 4, 4, generator=generator) + labels[:, None, None, None]
    return inputs, labels


def classify(validate: Callable[[nn.Module], dict[str, float]] | None = None) -> Task[Any]:
    inputs, labels = images()

    def accuracy(module: nn.Module) -> dict[str, float]:
        with torch.no_grad():
            return {"accuracy": float((module(inputs).argmax(1) == labels).double().mean())}

    return Task(
        samples=SAMPLES,
        load=lambda indices, epoch: (inputs[indices], labels[indices]),
        terms=lambda module, batch: {"hard": F.cross_entropy(module(batch[0]), batch[1])},
        weights={"hard": 1.0},
        validate=validate or accuracy,
    )


def scripted(accuracies: list[float], *, killed_after: int | None = None) -> Task[Any]:
    """A task whose validation accuracies are given; it may be killed after an epoch."""
    calls: list[int] = []

    def validate(module: nn.Module) -> dict[str, float]:
        calls.append(1)
        if killed_after is not None and len(calls) > killed_after:
            raise Killed
        return {"accuracy": accuracies[(len(calls) - 1) % len(accuracies)]}

    return classify(validate)


def train(
    folder: Path, task: Task[Any] | None = None, *, net: nn.Module | None = None, **options: Any
) -> tuple[nn.Module, FitResult]:
    net = small_net() if net is None else net
    events = options.pop("events", None)
    seed = options.pop("seed", 0)
    spec = TrainSpec(**{"epochs": 4, "batch_size": 8, "checkpoint_minutes": 0} | options)
    folder.mkdir(exist_ok=True)
    context = context_in(folder, seed=seed, events=events)
    return net, fit(net, task or classify(), spec, context=context)


RUNS: list[dict[str, Any]] = [
    {},
    {"ema": 0.9},
    {"optimizer": "adamw", "schedule": "one-cycle", "select": "final"},
    {"precision": "bf16", "ema": 0.9, "select": "final"},
]


@pytest.mark.parametrize("options", RUNS, ids=str)
def test_killed_and_resumed_gives_the_bytes_of_a_run_never_stopped(
    tmp_path: Path, options: dict[str, Any]
) -> None:
    whole, expected = train(tmp_path / "whole", **options)

    inner, calls = classify(), []

    def dies_in_third_epoch(module: nn.Module) -> float:
        calls.append(1)
        if len(calls) == 3:
            raise Killed
        return inner.validate(module)

    with pytest.raises(Killed):
        train(tmp_path / "cut", classify(dies_in_third_epoch), **options)
    torch.manual_seed(123)  # another process has another random state
    resumed, result = train(tmp_path / "cut", **options)

    assert result.resumed_epoch == 2
    assert digest(resumed.state_dict()) == digest(whole.state_dict())
    timeless = [
        [{k: v for k, v in entry.items() if k != "samples_per_second"} for entry in r.history]
        for r in (expected, result)
    ]
    assert timeless[0] == timeless[1]


def test_resumed_run_selects_the_best_epoch_from_before_the_kill(tmp_path: Path) -> None:
    accuracies = [0.9, 0.5, 0.4, 0.3]
    whole, expected = train(tmp_path / "whole", scripted(accuracies))
    with pytest.raises(Killed):
        train(tmp_path / "cut", scripted(accuracies, killed_after=2))

    resumed, result = train(tmp_path / "cut", scripted(accuracies[2:]))

    assert expected.selected_epoch == result.selected_epoch == 1
    assert digest(resumed.state_dict()) == digest(whole.state_dict())


def test_resumed_run_stops_early_where_the_whole_one_does(tmp_path: Path) -> None:
    accuracies = [0.5, 0.9, 0.6, 0.7, 0.8, 0.8]
    options: dict[str, Any] = {"epochs": 6, "early_stopping": 3}
    _, expected = train(tmp_path / "whole", scripted(accuracies), **options)
    with pytest.raises(Killed):
        train(tmp_path / "cut", scripted(accuracies, killed_after=4), **options)

    _, result = train(tmp_path / "cut", scripted(accuracies[4:]), **options)

    assert expected.stopped_early
    assert result.stopped_early
    assert expected.epochs == result.epochs == 5
    assert result.selected_epoch == 2


def test_same_seed_gives_same_bytes_and_another_seed_others(tmp_path: Path) -> None:
    first, _ = train(tmp_path / "a")
    again, _ = train(tmp_path / "b")
    other, _ = train(tmp_path / "c", seed=1)

    assert digest(first.state_dict()) == digest(again.state_dict())
    assert digest(first.state_dict()) != digest(other.state_dict())


@pytest.mark.parametrize("damage", ["truncated", "flipped", "other options", "garbage"])
def test_checkpoint_that_cannot_be_trusted_is_noted_and_not_used(
    tmp_path: Path, damage: str
) -> None:
    whole, _ = train(tmp_path / "whole")
    train(tmp_path / "run", epochs=4, lr=0.2 if damage == "other options" else None)
    path = tmp_path / "run" / "resume" / CHECKPOINT
    content = bytearray(path.read_bytes())
    if damage == "truncated":
        path.write_bytes(content[: len(content) // 2])
    elif damage == "flipped":
        weight = whole.state_dict()["5.bias"].numpy().tobytes()
        content[content.find(weight)] ^= 1
        path.write_bytes(content)
    elif damage == "garbage":
        path.write_bytes(b"not a checkpoint")
    events = Recorder()

    net, result = train(tmp_path / "run", events=events)

    assert result.resumed_epoch == 0
    assert "is not used" in events.notes[0]
    assert digest(net.state_dict()) == digest(whole.state_dict())


def test_checkpoint_is_not_written_before_its_time(tmp_path: Path) -> None:
    train(tmp_path / "run", checkpoint_minutes=60)

    assert not (tmp_path / "run" / "resume" / CHECKPOINT).exists()


def test_random_state_thread_count_and_kernel_layout_are_put_back(tmp_path: Path) -> None:
    threads, state = torch.get_num_threads(), torch.get_rng_state()

    net, _ = train(tmp_path / "run")

    assert torch.get_num_threads() == threads
    assert torch.equal(torch.get_rng_state(), state)
    assert net[0].weight.is_contiguous()  # type: ignore[index]


def test_shipped_average_is_the_recurrence_computed_by_hand(tmp_path: Path) -> None:
    states: list[dict[str, Tensor]] = []
    inner = classify()

    def terms(module: nn.Module, batch: Any) -> dict[str, Tensor]:
        states.append({n: t.clone() for n, t in module.state_dict().items()})
        return dict(inner.terms(module, batch))

    task = Task(inner.samples, inner.load, terms, inner.weights, inner.validate)
    live, _ = train(tmp_path / "live", select="final", epochs=2, precision="fp32", compile="never")
    averaged, _ = train(
        tmp_path / "ema", task, select="final", epochs=2, ema=0.5, precision="fp32", compile="never"
    )

    for name in ("5.weight", "1.running_var"):
        after = [state[name] for state in states[1:]] + [live.state_dict()[name]]
        shadow = states[0][name].double()
        for step, value in enumerate(after):
            decay = min(0.5, (1 + step) / (10 + step))
            shadow = decay * shadow + (1 - decay) * value.double()
        # float32 recurrence against a float64 one
        torch.testing.assert_close(averaged.state_dict()[name].double(), shadow, atol=1e-6, rtol=0)
    counter = averaged.state_dict()["1.num_batches_tracked"]
    assert counter == live.state_dict()["1.num_batches_tracked"]


def test_best_epoch_is_the_later_of_equally_accurate_ones(tmp_path: Path) -> None:
    _, result = train(tmp_path / "run", scripted([0.2, 0.8, 0.8, 0.3]))

    assert result.selected_epoch == 3
    assert result.selected_accuracy == 0.8
    assert result.final_accuracy == 0.3


def test_final_selection_keeps_the_last_epoch(tmp_path: Path) -> None:
    best, _ = train(tmp_path / "best", scripted([0.1, 0.2, 0.3, 0.4]))
    final, result = train(tmp_path / "final", scripted([0.9, 0.2, 0.3, 0.4]), select="final")

    assert result.selected_epoch == 4
    assert digest(final.state_dict()) == digest(best.state_dict())


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_loss_that_is_not_finite_stops_and_names_term_and_epoch(
    tmp_path: Path, value: float
) -> None:
    inner, calls = classify(), []

    def terms(module: nn.Module, batch: Any) -> dict[str, Tensor]:
        calls.append(1)
        hard = inner.terms(module, batch)["hard"]
        return {"soft": hard, "hard": hard * (value if len(calls) == 5 else 1)}

    task = Task(inner.samples, inner.load, terms, {"soft": 0.5, "hard": 0.5}, inner.validate)

    with pytest.raises(MeasurementError, match=r"in hard in epoch 2 \(step 5\); lower lr"):
        train(
            tmp_path / "run", task, precision="fp32", compile="never"
        )  # `auto` rehearses a step first


def test_history_holds_sample_weighted_means_of_each_term(tmp_path: Path) -> None:
    inner, seen = classify(), []

    def terms(module: nn.Module, batch: Any) -> dict[str, Tensor]:
        hard = inner.terms(module, batch)["hard"]
        seen.append((hard.item(), len(batch[1])))
        return {"a": hard, "b": 2 * hard}

    task = Task(inner.samples, inner.load, terms, {"a": 0.25, "b": 0.5}, inner.validate)
    events = Recorder()

    _, result = train(
        tmp_path / "run", task, epochs=1, events=events, precision="fp32", compile="never"
    )

    mean = sum(loss * size for loss, size in seen) / SAMPLES
    entry = result.history[0]
    assert entry["terms"] == pytest.approx({"a": mean, "b": 2 * mean}, rel=1e-6)
    assert entry["loss"] == pytest.approx(1.25 * mean, rel=1e-6)
    assert events.records == [{"kind": "epoch", **entry}]


def test_progress_never_falls_and_ends_complete(tmp_path: Path) -> None:
    events = Recorder()
    train(tmp_path / "run", scripted([0.9, 0.1, 0.1, 0.1]), early_stopping=1, events=events)

    parts = [done / total for done, total in events.steps]
    assert parts == sorted(parts)
    assert parts[-1] == 1


@pytest.mark.parametrize(
    ("samples", "size", "expected"),
    [
        (10, 5, [5, 5]),
        (11, 5, [5, 6]),  # a batch of one joins the one before
        (12, 5, [5, 5, 2]),
        (3, 5, [3]),
        (1, 5, [1]),
        (6, 5, [6]),
    ],
)
def test_every_sample_is_in_a_batch_and_none_is_alone(
    samples: int, size: int, expected: list[int]
) -> None:
    assert batch_sizes(samples, size) == expected


def test_batches_that_batchnorm_cannot_learn_from_are_refused(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="BatchNorm2d, which needs at least 2"):
        train(tmp_path / "run", batch_size=1)
    with pytest.raises(DataError, match="empty set"):
        batch_sizes(0, 4)


def test_net_without_trainable_parameters_is_refused(tmp_path: Path) -> None:
    net = small_net().requires_grad_(False)

    with pytest.raises(ModelError, match="none that requires a gradient"):
        train(tmp_path / "run", net=net)


def test_order_is_a_permutation_that_changes_with_the_epoch() -> None:
    orders = [epoch_order(50, seed=3, epoch=epoch) for epoch in (0, 1, 0)]

    assert torch.equal(orders[0].sort().values, torch.arange(50))
    assert torch.equal(orders[0], orders[2])
    assert not torch.equal(orders[0], orders[1])
