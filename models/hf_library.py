"""transformers, opened where it is needed: its absence, its failures, its bars and advice."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import safetensors

from ..pipeline.errors import ModelError


def open_transformers(where: str) -> Any:
    """The package.

    Raises:
        ModelError: it is not installed; the message names the extra.
    """
    try:
        return importlib.import_module("transformers")
    except ImportError as error:
        raise ModelError(
            f"{where}: needs transformers: pip install 'edgestill[hf]' ({error})"
        ) from error


def failures() -> tuple[type[Exception], ...]:
    """What transformers raises on a folder or an option that it cannot use."""
    hub = importlib.import_module("huggingface_hub.errors")
    checked: type[Exception] = hub.StrictDataclassError  # an option of the wrong kind
    damaged: type[Exception] = safetensors.SafetensorError
    return (OSError, ValueError, RuntimeError, KeyError, TypeError, ImportError, AttributeError,
            checked, damaged)  # fmt: skip


@contextmanager
def quiet(transformers: Any) -> Iterator[None]:
    """No bars and no advice on the terminal; what matters becomes an error here."""
    logging = transformers.utils.logging
    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
