"""An unfinished training run on disk: written whole or not at all, read back bit by bit.

The file is `torch.save` of plain containers and tensors, so that `torch.load(weights_only=True)`
reads it: no code can hide in it. It carries a digest of its own contents; a truncated, damaged or
foreign file is never half used.
"""

from __future__ import annotations

import hashlib
import os
import pickle
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import OutputError

FORMAT = 1


def save_checkpoint(path: Path, state: dict[str, Any], *, key: str) -> None:
    """Write `state` (containers, numbers, strings, tensors) for the run that `key` describes.

    Raises:
        OutputError: the folder cannot be written or the disk is full.
    """
    whole = {"format": FORMAT, "key": key, "state": state, "digest": digest(state)}
    temporary = path.with_name(path.name + ".part")
    try:
        with temporary.open("wb") as file:
            torch.save(whole, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:  # torch's zip writer wraps a full disk
        raise OutputError(
            f"{path}: expected to write a checkpoint, got: {error}; free some space or choose "
            "another output folder, the run goes on from the former checkpoint"
        ) from error


def load_checkpoint(path: Path, *, key: str) -> tuple[dict[str, Any] | None, str | None]:
    """(state, None), or (None, why the file was not used). No file at all is (None, None)."""
    if not path.is_file():
        return None, None
    try:
        whole = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, KeyError, OSError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        return None, f"it cannot be read ({reason})"
    if not isinstance(whole, dict) or whole.get("format") != FORMAT or "state" not in whole:
        return None, "it is not a checkpoint of this version"
    if whole.get("key") != key:
        return None, "it belongs to a run with other options, data or initial weights"
    if whole.get("digest") != digest(whole["state"]):
        return None, "its contents do not match its digest"
    state: dict[str, Any] = whole["state"]
    return state, None


def digest(value: Any) -> str:
    """sha256 over the values, names, dtypes and shapes in nested containers of tensors."""
    sha = hashlib.sha256()
    _feed(sha, value)
    return sha.hexdigest()


def _feed(sha: Any, value: Any) -> None:
    if isinstance(value, Tensor):
        sha.update(f"T{value.dtype}{tuple(value.shape)}".encode())
        sha.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    elif isinstance(value, dict):
        sha.update(f"D{len(value)}".encode())
        for name, item in value.items():
            sha.update(f"K{name!r}".encode())
            _feed(sha, item)
    elif isinstance(value, list | tuple):
        sha.update(f"L{len(value)}".encode())
        for item in value:
            _feed(sha, item)
    else:
        sha.update(f"V{value!r}".encode())
