"""torch.compile: when it is used, that it changes no result, and what is left of it afterwards."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from edgestill.pipeline.errors import RecipeError
from edgestill.pipeline.stage import Context, Silent
from edgestill.pipeline.train import compiler
from edgestill.pipeline.train.compiler import Compiler, choose_compiler
from edgestill.pipeline.train.loop import fit
from edgestill.pipeline.train.task import FitResult, Task
from edgestill.pipeline.training_spec import TrainSpec
from torch import Tensor, nn

SAMPLES, CLASSES = 26, 3  # batches of 8, 8, 8 and 2
MANY = 10**9  # calls, so that a trial pays whatever one takes

needs_compiler = pytest.mark.skipif(
    not any(shutil.which(name) for name in ("g++", "clang++")),
    reason="inductor needs a C++ compiler (g++ or clang++)",
)


class Notes(Silent):
    def __init__(self) -> None:
        self.notes: list[str] = []

    def note(self, text: str) -> None:
        self.notes.append(text)


def context_in(folder: Path, events: Silent | None = None) -> Context:
    folder.mkdir(exist_ok=True)
    return Context(seed=0, threads=1, device="cpu", scratch=folder, events=events or Silent())


def small_net() -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        return nn.Sequential(
            nn.Conv2d(2, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(),
            nn.Linear(4 * 4, CLASSES),
        )  # fmt: skip


def classify() -> Task[Any]:
    generator = torch.Generator().manual_seed(1)
    labels = torch.arange(SAMPLES) % CLASSES
    inputs = torch.randn(SAMPLES, 2, 4, 4, generator=generator) + labels[:, None, None, None]
    return Task(
        samples=SAMPLES,
        load=lambda indices, epoch: (inputs[indices], labels[indices]),
        terms=lambda module, batch: {"hard": F.cross_entropy(module(batch[0]), batch[1])},
        weights={"hard": 1.0},
        validate=lambda module: {"accuracy": 0.5},
    )


def train(folder: Path, **options: Any) -> tuple[nn.Module, FitResult]:
    events = options.pop("events", None)
    net = small_net()
    spec = TrainSpec(**{"epochs": 2, "batch_size": 8, "precision": "fp32"} | options)
    return net, fit(net, classify(), spec, context=context_in(folder, events))


def choose(
    wish: Any, folder: Path, *, calls: int = MANY, step: Callable[[], object] | None = None
) -> tuple[Compiler, nn.Module, Notes]:
    """The choice for a net whose step calls its copy, the net, and what was noted."""
    net, copied, notes = small_net(), small_net(), Notes()
    inputs = torch.zeros(4, 2, 4, 4)
    chosen = choose_compiler(
        wish, [net], [copied], step or (lambda: copied(inputs)),
        calls=calls, context=context_in(folder, notes),
    )  # fmt: skip
    return chosen, net, notes


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """torch.compile that compiles nothing; the shapes that its calls were given."""
    shapes: list[tuple[int, ...]] = []

    def compiled(call: Callable[[Tensor], Tensor], **_: Any) -> Callable[[Tensor], Tensor]:
        def recorded(inputs: Tensor) -> Tensor:
            shapes.append(tuple(inputs.shape))
            return call(inputs)

        return recorded

    monkeypatch.setattr(torch, "compile", compiled)
    monkeypatch.setattr(compiler, "_can_compile", lambda device: True)
    return shapes


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Seconds that the trial is told each call takes, in turns; the last goes on."""
    seconds = [1.0]

    def timed(call: Callable[[], object]) -> float:
        call()
        return seconds.pop(0) if len(seconds) > 1 else seconds[0]

    monkeypatch.setattr("edgestill.pipeline.train.trial._timed", timed)
    return seconds


def refuse(*_: Any, **__: Any) -> None:
    raise AssertionError("expected no compilation")


def break_down(*_: Any, **__: Any) -> Callable[..., None]:
    def call(*_: Any) -> None:
        raise RuntimeError("CppCompileError: no space left\nand a long story")

    return call


@pytest.mark.parametrize(("wish", "calls"), [("never", MANY), ("auto", 1)])
def test_never_or_for_a_short_run_nothing_is_compiled(
    wish: str, calls: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "compile", refuse)

    chosen, _, notes = choose(wish, tmp_path, calls=calls)

    assert not chosen.is_on
    assert notes.notes == []


def test_without_a_cpp_compiler_auto_does_not_try(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "compile", refuse)
    monkeypatch.setattr(shutil, "which", lambda name: None)

    assert not choose("auto", tmp_path)[0].is_on


@pytest.mark.parametrize(("compiled", "expected"), [(0.5, True), (0.99, False)])
@pytest.mark.usefixtures("stand_in")
def test_a_long_run_compiles_if_that_is_clearly_faster(
    compiled: float, expected: bool, tmp_path: Path, clock: list[float]
) -> None:
    clock[:] = [1.0, *[1.0, compiled] * 3]

    chosen, net, notes = choose("auto", tmp_path)

    assert chosen.is_on is expected
    assert [network for network, _ in chosen.calls] == [net] * expected
    (note,) = notes.notes
    assert f"{1e3 * compiled:.1f} ms compiled, 1000.0 ms eager" in note


@pytest.mark.usefixtures("stand_in")
def test_a_resumed_run_repeats_the_choice_whatever_it_would_measure_now(
    tmp_path: Path, clock: list[float]
) -> None:
    clock[:] = [1.0, *[1.0, 0.5] * 3]
    assert choose("auto", tmp_path)[0].is_on
    clock[:] = [1.0, *[0.5, 1.0] * 3]

    assert choose("auto", tmp_path, step=refuse)[0].is_on


@pytest.mark.usefixtures("clock")
def test_a_failure_to_compile_is_said_and_training_goes_on_without(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compiler, "_can_compile", lambda device: True)
    with monkeypatch.context() as patch:
        patch.setattr(torch, "compile", break_down)
        chosen, _, notes = choose("auto", tmp_path)

    assert not chosen.is_on
    (note,) = notes.notes
    assert note == ("torch.compile is not used: RuntimeError: CppCompileError: no space left")
    assert json.loads((tmp_path / "resume/choice-compile.json").read_text())["chosen"] == "eager"
    monkeypatch.setattr(torch, "compile", refuse)
    assert not choose("auto", tmp_path)[0].is_on  # nor when it is resumed


def test_always_that_cannot_be_done_is_an_error_before_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "compile", break_down)

    with pytest.raises(RecipeError, match=r"compile: always .* no space left; use `compile: auto`"):
        train(tmp_path, compile="always")


def test_only_batches_of_the_usual_size_run_compiled(
    tmp_path: Path, stand_in: list[tuple[int, ...]]
) -> None:
    _, result = train(tmp_path, compile="always")

    rehearsed, *trained = [shape[0] for shape in stand_in]
    assert result.compiled
    assert rehearsed == 8
    assert trained == [8, 8, 8] * 2  # the last, of 2, and validation are not among them


def test_after_the_block_the_network_runs_as_before(stand_in: list[tuple[int, ...]]) -> None:
    net = small_net()
    chosen = Compiler(((net, torch.compile(net._call_impl)),))

    with chosen.used(True):
        net(torch.zeros(2, 2, 4, 4))
    net(torch.zeros(3, 2, 4, 4))
    with chosen.used(False):
        net(torch.zeros(3, 2, 4, 4))

    assert stand_in == [(2, 2, 4, 4)]
    assert net._compiled_call_impl is None


@needs_compiler
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # what dynamo and inductor warn of is not ours
def test_compiled_training_is_eager_training_and_leaves_the_network_as_it_came(
    tmp_path: Path,
) -> None:
    eager, expected = train(tmp_path / "eager", compile="never")
    net, result = train(tmp_path / "compiled", compile="always")

    assert (result.compiled, expected.compiled) == (True, False)
    assert net._compiled_call_impl is None
    assert list(net.state_dict()) == list(small_net().state_dict())
    for mine, theirs in zip(expected.history, result.history, strict=True):
        assert theirs["loss"] == pytest.approx(mine["loss"], rel=1e-5)
    for name, tensor in net.state_dict().items():
        # fused kernels sum in another order: some 1e-7 a step in float32
        torch.testing.assert_close(tensor, eager.state_dict()[name], rtol=1e-4, atol=1e-5)
