"""Options that several commands share: how the images of somebody else's file are prepared."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import click

from .errors import UsageError

if TYPE_CHECKING:
    from .file_recipe import Given

PREPARATION_OPTIONS = (
    click.option("--mean", metavar="LIST", help="Of the training, in units of pixel / 255."),
    click.option("--std", metavar="LIST", help="Likewise."),
    click.option("--resize", type=click.IntRange(min=1), help="Shorter side, in pixels."),
    click.option("--crop", type=click.IntRange(min=1), help="Centre crop, in pixels."),
)


def preparation_options(command: Callable[..., int]) -> Callable[..., int]:
    """--mean, --std, --resize and --crop, which `given` reads."""
    for option in reversed(PREPARATION_OPTIONS):
        command = option(command)
    return command


def given(
    data: str,
    test: str | None,
    *,
    mean: str | None,
    std: str | None,
    resize: int | None,
    crop: int | None,
) -> Given:
    """What the command line says of the images.

    Raises:
        UsageError: --mean or --std are no numbers.
    """
    from .file_recipe import Given

    return Given(
        data,
        test,
        mean=_numbers("--mean", mean),
        std=_numbers("--std", std),
        resize=resize,
        crop=crop,
    )


def _numbers(option: str, text: str | None) -> tuple[float, ...] | None:
    try:
        return None if text is None else tuple(float(part) for part in text.split(","))
    except ValueError:
        raise UsageError(
            f"{option}: expected numbers with commas between them, got {text!r}"
        ) from None
