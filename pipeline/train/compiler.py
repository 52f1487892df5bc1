"""torch.compile for the networks of a training step, where its compile time pays back.

Compiling takes most of a minute on a small CPU and gains 10 to 30 % (design figures: 1,305 to
1,506 images/s for 38 s). So `auto` tries it only for runs long enough to win that back several
times, on a copy of nothing but the step itself, and keeps it only if it is clearly faster. The
choice is stored with the unfinished stage, as every choice made by a clock is (`trial.py`).

Only training steps of the usual batch size run compiled: validation and an epoch's last batch have
other shapes, and each would be compiled again.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from ..stage import Context
from .distributed import shared
from .trial import fastest

TRIED_FROM_SECONDS = 600.0  # of eager training: ten times what compiling costs here


@dataclass(frozen=True)
class Compiler:
    """The networks of a step, and the compiled call of each; empty where nothing is compiled."""

    calls: tuple[tuple[nn.Module, Any], ...] = ()

    @property
    def is_on(self) -> bool:
        return bool(self.calls)

    @contextmanager
    def used(self, wanted: bool) -> Iterator[None]:
        """Run the networks compiled inside the block. Their parameters and names stay theirs."""
        if not wanted or not self.calls:
            yield
            return
        for network, call in self.calls:
            network._compiled_call_impl = call
        try:
            yield
        finally:
            for network, _ in self.calls:
                network._compiled_call_impl = None


def choose_compiler(
    wish: Literal["auto", "never", "always"],
    networks: list[nn.Module],
    rehearsed: list[nn.Module],
    step: Callable[[], object],
    *,
    calls: int,
    context: Context,
) -> Compiler:
    """Compile, or not; what was chosen and why is said.

    Args:
        networks: modules whose calls are compiled.
        rehearsed: copies of them, on which
        step: is a training step without lasting effects.
        calls: how many steps the run has.
    """
    if wish == "never" or (wish == "auto" and not _can_compile(context.device)):
        return Compiler()
    if wish == "auto" and not _pays(rehearsed, step, calls=calls, context=context):
        return Compiler()
    return _compiled(networks)


def _pays(
    rehearsed: list[nn.Module], step: Callable[[], object], *, calls: int, context: Context
) -> bool:
    made: list[Compiler] = []  # when it is first called: importing the compiler alone takes seconds

    def compiled_step() -> None:
        if not made:
            made.append(_compiled(rehearsed))
        with made[0].used(True):
            step()

    try:
        chosen, seconds = fastest(
            "compile",
            {"eager": step, "compiled": compiled_step},
            calls=calls,
            context=context,
            pays_from=TRIED_FROM_SECONDS,
        )
    except RuntimeError as error:  # what dynamo and inductor raise; the step itself runs eagerly
        context.events.note(
            f"torch.compile is not used: {type(error).__name__}: {str(error).splitlines()[0][:120]}"
        )
        chosen, seconds = "eager", None
    chosen = shared(chosen, world=context.world)
    if seconds is not None:
        context.events.note(
            f"torch.compile: a step takes {1e3 * seconds['compiled']:.1f} ms compiled, "
            f"{1e3 * seconds['eager']:.1f} ms eager: {chosen}"
        )
    return bool(chosen == "compiled")


def _compiled(networks: list[nn.Module]) -> Compiler:
    return Compiler(tuple((net, torch.compile(net._call_impl, dynamic=False)) for net in networks))


def _can_compile(device: str) -> bool:
    """On the CPU, inductor needs a C++ compiler."""
    return device == "cuda" or any(shutil.which(name) for name in ("g++", "clang++"))
