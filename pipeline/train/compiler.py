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

from ..errors import RecipeError
from ..stage import Context
from .distributed import least_over, shared
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


EAGER = Compiler()


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
    Raises:
        RecipeError: `always`, and it cannot be done.
    """
    if wish == "never":
        return EAGER
    if wish == "always":
        _insist(rehearsed, step)
        return _compiled(networks)
    if not _by_all(_can_compile(context.device), context=context):
        return EAGER
    return _compiled(networks) if _pays(rehearsed, step, calls=calls, context=context) else EAGER


def _insist(rehearsed: list[nn.Module], step: Callable[[], object]) -> None:
    """A failure is said before training, not in the midst of it."""
    try:
        with _compiled(rehearsed).used(True):
            step()
    except RuntimeError as error:
        raise RecipeError(
            f"compile: always is asked for, and torch.compile cannot do it: {_cause(error)}; use "
            "`compile: auto`, which goes on without"
        ) from error


def _pays(
    rehearsed: list[nn.Module], step: Callable[[], object], *, calls: int, context: Context
) -> bool:
    works = True
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
        context.events.note(f"torch.compile is not used: {_cause(error)}")
        # kept as any choice is: what failed for want of disk or memory may not fail next time
        chosen, seconds = fastest("compile", {"eager": step}, calls=calls, context=context)
        works = False
    chosen = shared(chosen, world=context.world)
    if not _by_all(works, context=context):
        return False
    if seconds is not None:
        context.events.note(
            f"torch.compile: a step takes {1e3 * seconds['compiled']:.1f} ms compiled, "
            f"{1e3 * seconds['eager']:.1f} ms eager: {chosen}"
        )
    return bool(chosen == "compiled")


def _by_all(holds: bool, *, context: Context) -> bool:
    """Whether it holds in every process."""
    return bool(least_over(torch.tensor(int(holds)), world=context.world))


def _cause(error: RuntimeError) -> str:
    said = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {said[0][:160]}"


def _compiled(networks: list[nn.Module]) -> Compiler:
    return Compiler(tuple((net, torch.compile(net._call_impl, dynamic=False)) for net in networks))


def _can_compile(device: str) -> bool:
    """On the CPU, inductor needs a C++ compiler."""
    return device == "cuda" or any(shutil.which(name) for name in ("g++", "clang++"))
