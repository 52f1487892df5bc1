"""The zoo: our own networks by name, and the check of the arguments they are asked for with.

Each is a plain function (classes, in_channels, *, options) → nn.Module; its file says which
submodules end a resolution stage and which one is the classifier. No weights are downloaded.
"""

from __future__ import annotations

import difflib
import importlib
import inspect
from collections.abc import Callable, Mapping
from typing import Any, Literal, get_args, get_origin, get_type_hints

from torch import nn

from ..pipeline.errors import ModelError

ZOO: dict[str, str] = {
    "resnet8": "cifar_resnet:resnet8",
    "resnet14": "cifar_resnet:resnet14",
    "resnet20": "cifar_resnet:resnet20",
    "resnet32": "cifar_resnet:resnet32",
    "resnet44": "cifar_resnet:resnet44",
    "resnet56": "cifar_resnet:resnet56",
    "resnet110": "cifar_resnet:resnet110",
    "resnet18": "resnet:resnet18",
    "resnet50": "resnet:resnet50",
    "mobilenetv2": "mobilenet:mobilenetv2",
    "plain_cnn_small": "plain:plain_cnn_small",
    "plain_cnn_large": "plain:plain_cnn_large",
}


def build(name: str, args: Mapping[str, Any], *, classes: int, in_channels: int) -> nn.Module:
    """The zoo's network `name`, freshly initialised from torch's global generator.

    Raises:
        ModelError: no such name (near ones are named), an argument it does not take, or a value
            of the wrong kind.
    """
    if name not in ZOO:
        near = difflib.get_close_matches(name, ZOO, n=3)
        meant = f" (did you mean {' or '.join(near)}?)" if near else ""
        raise ModelError(
            f"{name}: no such network{meant}; the zoo has {', '.join(ZOO)}; a network of your own "
            "is FILE.py:factory or FILE.pt2"
        )
    factory = _factory(name)
    _check(name, factory, args)
    return factory(classes, in_channels, **args)


def options(name: str) -> dict[str, Any]:
    """What `args` may hold for the zoo's `name`, with the defaults."""
    parameters = inspect.signature(_factory(name)).parameters.values()
    return {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY}


def _factory(name: str) -> Callable[..., nn.Module]:
    module, _, function = ZOO[name].partition(":")
    factory: Callable[..., nn.Module] = getattr(
        importlib.import_module(f".{module}", __package__), function
    )
    return factory


def _check(name: str, factory: Callable[..., nn.Module], args: Mapping[str, Any]) -> None:
    allowed = options(name)
    hints = get_type_hints(factory)
    for key, value in args.items():
        if key not in allowed:
            near = difflib.get_close_matches(key, allowed, n=1)
            meant = f" (did you mean {near[0]}?)" if near else ""
            raise ModelError(
                f"{name}: no argument {key!r}{meant}; it takes "
                + ", ".join(f"{k} (default {v})" for k, v in allowed.items())
            )
        problem = _problem(key, value, hints[key])
        if problem:
            raise ModelError(f"{name}: args.{key}: expected {problem}, got {value!r}")


def _problem(key: str, value: object, hint: Any) -> str | None:
    """What `value` should have been, or None if it is."""
    if get_origin(hint) is Literal:
        choices = get_args(hint)
        return None if value in choices else " or ".join(choices)
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if key == "dropout":
        return None if is_number and 0 <= float(str(value)) < 1 else "a number in [0, 1)"
    # 16 times the published widths is beyond any net that fits a device
    return None if is_number and 0 < float(str(value)) <= 16 else "a number in (0, 16]"
