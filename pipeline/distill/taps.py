"""Features from inside a network: which modules to tap, and a wrapper that returns their outputs.

A tap is a module's path (`layer3`, `features.13`); its feature is what that module puts out. Which
losses compare the features, and with what adapters, is not decided here.

Taps are forward hooks. They are set before anything compiles the network, and each is an object
that shares one store with the wrapper, not a closure: so a deep copy fills its own store, and
torch.compile traces the hooks into the graph (a hook set after compilation is ignored, PyTorch
#117758). Not for nn.DataParallel, whose replicas would share one store across threads.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ...exporters.feeds import MASK
from ...exporters.reference import evaluating
from ...models.paths import matching, near, outermost
from ..errors import ModelError, RecipeError


class Tapped(nn.Module):
    """`network`, returning (output, features) in the order of `paths`.

    Features keep their graph: gradients flow through them. Parameters are those of `network`,
    under `network.`; its own state dict is as before. `close()` (or contextlib.closing) takes the
    hooks off, which is due before the network is exported.

    Raises:
        ModelError: at construction, a path that names no module; at a call, a tap that did not
            fire exactly once, put out anything but one tensor, or was overwritten in place.
    """

    def __init__(self, network: nn.Module, paths: Sequence[str]) -> None:
        super().__init__()
        self.network = network
        self.paths = tuple(paths)
        self._store = _Store()
        targets = {path: _submodule(network, path) for path in self.paths}
        self._handles = [
            module.register_forward_hook(_Tap(path, self._store))
            for path, module in targets.items()
        ]

    def forward(self, x: Tensor) -> tuple[Tensor, list[Tensor]]:
        store = self._store
        store.is_open = True
        try:
            output: Tensor = self.network(x)
            caught = store.caught
        finally:
            store.is_open = False
            store.caught = {}  # else the last step's features would live until the next
        return output, [self._feature(path, caught.get(path, [])) for path in self.paths]

    def close(self) -> None:
        """Take the hooks off. A later call raises ModelError, as no tap fires."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def _feature(self, path: str, caught: list[tuple[Any, int | None]]) -> Tensor:
        where = f"tap {path!r} of {type(self.network).__name__}"
        if not caught:
            raise ModelError(
                f"{where}: expected the module to run once a call, and it never fired; tap a "
                "module that forward() calls (a list of modules is not called, its items are)"
            )
        if len(caught) > 1:
            raise ModelError(
                f"{where}: expected the module to run once a call, and it is used {len(caught)} "
                "times; tap the module around it, or one that is used once"
            )
        feature, version = caught[0]
        if not isinstance(feature, Tensor):
            raise ModelError(
                f"{where}: expected one tensor as the module's output, got "
                f"{type(feature).__name__}; tap a module inside it that puts out a tensor"
            )
        if _is_overwritten(feature, version):
            raise ModelError(
                f"{where}: expected the module's output to stay as it is, and a later one "
                "overwrote it in place (most often ReLU(inplace=True)); tap that later module"
            )
        return feature


def stage_ends(
    network: nn.Module, input_shape: Sequence[int], *, at_most: int = 4
) -> tuple[str, ...]:
    """The modules that end the network's resolution stages, shallow → deep.

    One dry forward shows every 4-D output (N, C, H, W) and when it came. A stage is a resolution
    above 1 × 1; its end is the last module that put it out before a lower one came. Of modules
    that end together the outermost counts (`layer1`, not `layer1.2.relu`), unless a stage would
    be lost inside it (`features.13`, not `features`). What a block computes at its input's
    resolution before its stride belongs to the block, not to the stage before it. Modules that
    cannot be tapped, being used twice or overwritten in place, are passed over.

    Nets that keep channels last (Swin) or work on tokens (ViT) have their taps named by hand.

    Args:
        input_shape: (C, H, W).
        at_most: ≥ 1; of more stages the deepest are taken.
    Raises:
        ModelError: the network fails on this input, or no module puts out such a tensor.
    """
    assert at_most >= 1
    with _watching(network) as events:
        _dry_run(network, input_shape)
    stages: list[_Event] = []
    for event in _outermost(events):
        size = event.size
        if not stages or _is_lower(size, stages[-1].size):
            stages.append(event)
        elif size == stages[-1].size:
            stages[-1] = event
    if not stages:
        raise ModelError(
            f"{type(network).__name__}: expected modules that put out (N, C, H, W) with H · W > 1 "
            f"for an input of {tuple(input_shape)}, and there is none; name the taps by hand "
            "(a .pt2 program runs no modules and has none: give the network as FILE.py:factory)"
        )
    return tuple(event.path for event in stages[-at_most:])


def find_taps(network: nn.Module, patterns: Sequence[str], *, where: str) -> tuple[str, ...]:
    """Module paths that match the patterns, each once, in the order of patterns, then of modules.

    Args:
        patterns: full paths or globs over them (fnmatch, case-sensitive): `layer?`,
            `features.1[0-3]`. A star crosses dots: `layer1*` is also everything inside `layer1`.
        where: the recipe's key, for messages.
    Raises:
        RecipeError: no pattern, or some that match nothing (one a line, with near names).
    """
    # under every name, since a shared module may be asked for by its second one
    names = [name for name, _ in network.named_modules(remove_duplicate=False) if name]
    if not patterns:
        raise RecipeError(
            f"{where}: expected at least one module of {type(network).__name__}, got an empty "
            f"list; it has {outermost(names)}"
        )
    found: dict[str, None] = {}
    problems = []
    for pattern in patterns:
        matches = matching(pattern, names)
        found.update(dict.fromkeys(matches))
        if not matches:
            problems.append(
                f"{where}: no module named {pattern!r} in {type(network).__name__}; "
                f"{near(pattern, names)}"
            )
    if problems:
        raise RecipeError("\n".join(problems))
    return tuple(found)


def feature_shapes(tapped: nn.Module, input_shape: Sequence[int]) -> list[tuple[int, ...]]:
    """Shapes of the features without the batch axis, from one dry forward in eval mode.

    Args:
        tapped: a `Tapped`, or a module that returns what one returns.
        input_shape: (C, H, W), or (K, S) of texts.
    Raises:
        ModelError: the network fails on this input, or a tap does.
    """
    _, features = _dry_run(tapped, input_shape)
    return [tuple(feature.shape[1:]) for feature in features]


def match_stages(
    student_shapes: Sequence[tuple[int, ...]], teacher_shapes: Sequence[tuple[int, ...]]
) -> list[tuple[int, int]]:
    """Pairs of indices (student, teacher), shallow → deep: deepest with deepest, and so upwards.

    The side with more stages leaves its shallowest unpaired. Resolutions need not agree.

    Raises:
        RecipeError: a side has no feature.
    """
    students, teachers = len(student_shapes), len(teacher_shapes)
    pairs = min(students, teachers)
    if not pairs:
        raise RecipeError(
            "distill: expected at least one feature of the student and one of the teacher, got "
            f"{students} and {teachers}; name taps for both"
        )
    return [(students - left, teachers - left) for left in range(pairs, 0, -1)]


class _Store:
    """What the taps caught in the running call. Closed between calls, so that a network called
    without its wrapper, or copied out of it, keeps nothing."""

    def __init__(self) -> None:
        self.is_open = False
        self.caught: dict[str, list[tuple[Any, int | None]]] = {}


class _Tap:
    """The forward hook of one path."""

    def __init__(self, path: str, store: _Store) -> None:
        self.path = path
        self.store = store

    def __call__(self, _module: nn.Module, _args: Any, output: Any) -> None:
        if self.store.is_open:
            output = _only_tensor(output)
            self.store.caught.setdefault(self.path, []).append((output, _version(output)))


def _only_tensor(output: Any) -> Any:
    """Layers of text encoders put out (states,) or (states, None): that is one tensor too."""
    if isinstance(output, tuple) and output and all(more is None for more in output[1:]):
        return output[0]
    return output


def _version(output: Any) -> int | None:
    """How often the tensor was written in place; None if it is none, or where nobody counts.

    Not read while compiling (it would break the graph): an uncompiled dry forward, such as
    `feature_shapes`, has found what there is to find.
    """
    if torch.compiler.is_compiling() or not isinstance(output, Tensor) or output.is_inference():
        return None
    return output._version


def _is_overwritten(output: Tensor, version: int | None) -> bool:
    """Whether it was written to since `version`. Only one of the two readings may have been
    compiled, where a graph breaks in between."""
    now = _version(output)
    return version is not None and now is not None and now != version


def _submodule(network: nn.Module, path: str) -> nn.Module:
    try:
        return network.get_submodule(path)
    except AttributeError as error:
        names = [name for name, _ in network.named_modules() if name]
        raise ModelError(
            f"tap {path!r}: {type(network).__name__} has no such module "
            f"({near(path, names)}); name one of its "
            "modules by its full path"
        ) from error


def _dry_run(module: nn.Module, input_shape: Sequence[int]) -> Any:
    """The module's output for two zero samples, where and in what precision its weights are."""
    tensors = itertools.chain(module.parameters(), module.buffers())
    like = next((t for t in tensors if t.is_floating_point()), torch.zeros(()))
    is_text = len(input_shape) == 2
    inputs = torch.zeros(
        2, *input_shape, device=like.device, dtype=torch.int64 if is_text else like.dtype
    )
    if is_text:
        inputs[:, MASK] = 1  # every token is real
    try:
        with torch.no_grad(), evaluating(module):
            return module(inputs)
    except (RuntimeError, TypeError, ValueError, IndexError) as error:
        said = " ".join(str(error).split())[:300]
        raise ModelError(
            f"{type(module).__name__} fails on an input of shape {tuple(input_shape)}: {said}; "
            "check data.preprocess (of texts data.tokenize) and the network's input size"
        ) from error


@dataclass(frozen=True)
class _Event:
    """A module has put out a 4-D tensor."""

    path: str
    output: Tensor
    version: int | None

    @property
    def size(self) -> tuple[int, int]:
        return self.output.shape[2], self.output.shape[3]

    def is_inside(self, path: str) -> bool:
        return self.path.startswith(f"{path}.")


@contextmanager
def _watching(network: nn.Module) -> Iterator[list[_Event]]:
    """The events of what runs inside, in order, a module after what it contains."""
    events: list[_Event] = []

    def watch(path: str, module: nn.Module) -> Any:
        def hook(_module: nn.Module, _args: Any, output: Any) -> None:
            if isinstance(output, Tensor) and output.ndim == 4:
                events.append(_Event(path, output, _version(output)))

        return module.register_forward_hook(hook)

    handles = [watch(path, module) for path, module in network.named_modules() if path]
    try:
        yield events
    finally:
        for handle in handles:
            handle.remove()


def _outermost(events: list[_Event]) -> list[_Event]:
    """The events that may end a stage: spatial, tappable, hiding no stage, inside no such other."""
    paths = [event.path for event in events]
    whole = [
        event
        for at, event in enumerate(events)
        if paths.count(event.path) == 1
        and not _is_overwritten(event.output, event.version)
        and not _hides_a_stage(events[: at + 1])
    ]
    outer = [event for event in whole if not any(event.is_inside(other.path) for other in whole)]
    # only now: what a block computes before it ends at 1 × 1 ends no stage either
    return [event for event in outer if event.size != (1, 1)]


def _hides_a_stage(until: list[_Event]) -> bool:
    """Whether the last module shows inside it a higher resolution that nothing before it had."""
    last = until[-1]
    start = next(
        at for at, event in enumerate(until) if event is last or event.is_inside(last.path)
    )
    before = {event.size for event in until[:start]}
    inside = {event.size for event in until[start:-1]}
    return any(_is_lower(last.size, size) for size in inside - before)


def _is_lower(size: tuple[int, int], other: tuple[int, int]) -> bool:
    return size != other and size[0] <= other[0] and size[1] <= other[1]
