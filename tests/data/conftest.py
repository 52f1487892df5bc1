"""Tiny labelled sets on disk, and a data stage to run on them."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from edgestill.pipeline.data.dataset import Data, open_data
from edgestill.pipeline.data.stage import prepare_data
from edgestill.pipeline.recipe import DataSpec
from edgestill.pipeline.stage import Context, Silent
from PIL import Image


class Notes(Silent):
    def __init__(self) -> None:
        self.texts: list[str] = []

    def note(self, text: str) -> None:
        self.texts.append(text)


@dataclass(frozen=True)
class Prepared:
    folder: Path
    stats: dict[str, Any]
    data: Data
    notes: list[str]


def picture(number: int, size: tuple[int, int] = (8, 8), *, grey: bool = False) -> Image.Image:
    """An image of its own for every number."""
    shape = size if grey else (*size, 3)
    return Image.fromarray(np.random.default_rng(number).integers(0, 256, shape, dtype=np.uint8))


def png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def write_folder(root: Path, counts: Mapping[str, int], *, start: int = 0, **kind: Any) -> Path:
    """`counts` images a class, numbered on from `start`."""
    number = start
    for name, count in counts.items():
        (root / name).mkdir(parents=True)
        for index in range(count):
            picture(number, **kind).save(root / name / f"{index:03}.png")
            number += 1
    return root


def write_parquet(
    path: Path, columns: Mapping[str, Any], *, features: dict[str, Any] | None = None
) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    table = pa.table(dict(columns))
    if features is not None:
        text = json.dumps({"info": {"features": features}})
        table = table.replace_schema_metadata({"huggingface": text})
    pq.write_table(table, path)
    return path


def structs(numbers: range) -> list[dict[str, Any]]:
    """Images as Hugging Face stores them."""
    return [{"bytes": png(picture(number)), "path": f"{number}.png"} for number in numbers]


@pytest.fixture
def prepare(tmp_path: Path) -> Callable[..., Prepared]:
    """prepare(train=…, test=…) runs the data stage; each call has a folder of its own."""
    runs = 0

    def run(*, threads: int = 1, seed: int = 0, budget: int = 2**30, **options: Any) -> Prepared:
        nonlocal runs
        runs += 1
        folder = tmp_path / f"scratch-{runs}"
        folder.mkdir()
        for part in ("train", "validation", "test", "unlabelled"):
            if isinstance(options.get(part), str | Path):
                options[part] = {"path": str(options[part])}
        spec = DataSpec.model_validate(options)
        events = Notes()
        stats = prepare_data(spec, context=Context(seed, threads, "cpu", folder, events))
        data = open_data(folder, memory_budget_bytes=budget)
        return Prepared(folder, stats, data, events.texts)

    return run


@pytest.fixture(scope="session")
def make() -> SimpleNamespace:
    """The builders above: with `--import-mode=importlib` tests cannot import this file."""
    return SimpleNamespace(
        picture=picture, png=png, folder=write_folder, parquet=write_parquet, structs=structs
    )
