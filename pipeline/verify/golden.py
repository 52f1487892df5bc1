"""Writes a golden bundle: inputs, answers and hashes in plain formats; `replay.py` reads it.

Real samples of the test set, spread over it, and the extremes that every file must bear. Answers
are computed as the replay computes them, so that the same file on the same machine gives the same
bits.
"""

from __future__ import annotations

import io
import json
import os
import tempfile
import zipfile
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from ...exporters.feeds import feed
from ..data.inputs import Preparation, input_metadata
from ..errors import MeasurementError, OutputError
from ..workspace import file_sha256, write_atomically
from . import replay
from .facts import Facts, facts_of
from .inputs import open_set
from .samples import Set, TestSet

Array = np.ndarray[Any, Any]

COUNT = 64  # real samples
IMAGE_BATCH = 16


def write_bundle(
    folder: Path, facts: Facts, test: TestSet, *, noise: float, floor: float, threads: int
) -> int:
    """Makes `folder` and writes the bundle; returns the number of samples.

    Args:
        noise: what int8 costs one logit, root mean square; 0: not known, which excuses nothing.
        floor: float32's own error; 0: not known.

    Raises:
        OutputError: the folder holds something, or cannot be written.
        MeasurementError: an answer is NaN. ExportError: the model takes other inputs.
    """
    refuse_occupied(folder)
    rows = test.spread(COUNT)
    packed = test.inputs(rows)
    if packed.ndim == 4:
        packed = np.concatenate([packed, np.zeros_like(packed[:1]), np.ones_like(packed[:1])])
    inputs = feed(packed, facts.inputs)
    batch = 1 if facts.is_text else IMAGE_BATCH
    session = replay.open_model(facts.path, threads)
    outputs = replay.run_all(session, inputs, batch)
    if not np.isfinite(outputs).all():
        raise MeasurementError(f"{facts.path}: gives NaN or infinity: no answers to keep")
    folder.mkdir(parents=True, exist_ok=True)
    files = {
        replay.INPUTS: _npz(inputs),
        replay.OUTPUTS: _npy(outputs),
        "labels.json": _json(list(test.class_names)),
        "replay.py": Path(replay.__file__).read_bytes(),
    }
    if test.texts:
        lines = [json.dumps(list(test.texts[row]), ensure_ascii=False) for row in rows]
        files["texts.jsonl"] = "".join(f"{line}\n" for line in lines).encode()
    for name, content in files.items():
        write_atomically(folder / name, content)
    document = {
        "schema_version": replay.SCHEMA,
        "created_utc": datetime.now(UTC).isoformat(timespec="seconds"),
        "model": {
            "sha256": file_sha256(facts.path),
            "bytes": os.path.getsize(facts.path),
            "int8": facts.is_int8,
        },
        "environment": replay.environment(),
        "threads": threads,
        "batch": batch,
        "n": len(outputs),
        "ids": [str(test.samples.hashes[row]) for row in rows],
        "preparation": input_metadata(test.how),
        "tolerance": {"floor": floor, "noise": noise},
        "files": {name: file_sha256(folder / name) for name in files},
    }
    document["golden_sha256"] = replay.canonical_sha256(document)
    write_atomically(folder / replay.GOLDEN, _json(document))  # last: without it there is no bundle
    return len(outputs)


def refuse_occupied(folder: Path) -> None:
    """Raises: OutputError: the folder holds something, or is none."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise OutputError(
            f"{folder}: is there already and not empty; give a new folder for the bundle"
        )


def make_bundle(
    folder: Path, model: Path, data: Set, *, how: Preparation | None, threads: int
) -> int:
    """As `write_bundle`, for a file that was held against nothing."""
    facts = facts_of(model)
    with tempfile.TemporaryDirectory() as scratch:
        test = open_set(
            facts, data, how=how, class_names=facts.class_names or (), scratch=Path(scratch),
            threads=threads,
        )  # fmt: skip
        return write_bundle(folder, facts, test, noise=0.0, floor=0.0, threads=threads)


def _npz(arrays: dict[str, Array]) -> bytes:
    """As numpy.savez, which takes some names for its own arguments."""
    target = io.BytesIO()
    with zipfile.ZipFile(target, "w") as packed:
        for name, array in arrays.items():
            packed.writestr(zipfile.ZipInfo(f"{name}.npy"), _npy(array))  # dated 1980: same bytes
    return target.getvalue()


def _npy(array: Array) -> bytes:
    target = io.BytesIO()
    np.save(target, array, allow_pickle=False)
    return target.getvalue()


def _json(value: object) -> bytes:
    return (json.dumps(value, indent=1, sort_keys=True, allow_nan=False) + "\n").encode()
