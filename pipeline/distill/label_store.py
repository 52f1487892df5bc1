"""Stored soft labels on disk: what binds them to their origin, and how they are read and held
against the live teacher.

Layout of the folder: `labels.json`, the header; `view-0000.npy` … one float16 (N, C) array a view,
rows in the order of the training images (the unlabelled ones last); `ids.npy`, the sample ids of
those rows; `validation.npy`, float32 logits of the validation set. The full logits are stored for
every C: 2·C bytes a sample and view.

The header binds all that the numbers depend on. A student that sees other pixels, classes or rows
than the teacher did learns noise without any error, so a store that does not match is refused.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...models.source import Network
from ..data.augment import AUGMENT_VERSION
from ..data.dataset import Data, with_unlabelled
from ..data.inputs import input_metadata
from ..data.views import AnyViews
from ..errors import IntegrityError
from ..measure.accuracy import run_module
from ..stage import Context
from ..train.precision import Precision
from ..training_spec import DistillSpec
from ..workspace import file_sha256

Array = np.ndarray[Any, Any]

FORMAT = 1
HEADER = "labels.json"
IDS = "ids.npy"
VALIDATION = "validation.npy"
CHECKED = 256  # samples compared with the live teacher
AGREEMENT = 0.99  # least fraction of them with the same answer

# Stored against live logits, as a fraction of the largest: float16 rounds by 2^-11; a batch of
# another size may sum in another order, which in bfloat16 (2^-8) moves a rounding or two.
TOLERANCE = {"fp32": 2.0**-9, "bf16": 2.0**-5}


@dataclass
class LabelStore:
    """An opened store. One view is mapped at a time, so memory does not grow with their number.

    Attributes:
        views: how many there are.
        open_view: view number → (N, C) float16.
        validation: (M, C) float32, logits of the validation set.
    """

    header: Mapping[str, Any]
    views: int
    open_view: Callable[[int], Array]
    validation: Array
    _current: tuple[int, Array] | None = None

    def view(self, number: int) -> Array:
        """All rows of one view. The one before is let go."""
        if self._current is None or self._current[0] != number:
            self._current = None
            self._current = number, self.open_view(number)
        return self._current[1]

    def rows(self, indices: Tensor, *, view: int) -> Tensor:
        """Teacher logits of sample positions (B,) in one view: (B, C) float32, on the CPU."""
        return torch.from_numpy(self.view(view)[indices.cpu().numpy()]).float()


def describe(
    spec: DistillSpec, data: Data, *, seed: int, teacher: str | None = None
) -> dict[str, Any]:
    """What a store must have been made from, as its header holds it. teacher None: not compared."""
    ids = np.ascontiguousarray(with_unlabelled(data).ids, dtype="<i8")
    header = {
        "format": FORMAT,
        "class_names": list(data.class_names),
        "preprocess": input_metadata(data.preprocess),
        "augment_version": AUGMENT_VERSION,
        "augment": spec.augment.model_dump(mode="json"),
        "seed": seed,
        "rows": len(ids),
        "ids_sha256": hashlib.sha256(ids.tobytes()).hexdigest(),
        "views": spec.views,
        "dtype": "float16",
    }
    described: dict[str, Any] = json.loads(json.dumps(header))  # tuples become lists, as on disk
    return described if teacher is None else {**described, "teacher_sha256": teacher}


def open_labels(folder: Path, *, expected: Mapping[str, Any]) -> LabelStore:
    """Open a store whose header holds everything in `expected` (see `describe`).

    Raises:
        IntegrityError: a field differs, or a file is missing or of another shape.
    """
    path = folder / HEADER
    try:
        header = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise IntegrityError(
            f"{path}: expected the header of stored labels, got: {error}; run with --fresh"
        ) from error
    for name, value in expected.items():
        if header.get(name) != value:
            raise IntegrityError(
                f"{path}: these stored labels are stale: {name}: expected {_short(value)}, got "
                f"{_short(header.get(name))}; run with --fresh to label again"
            )
    return open_store(folder, header, validation=open_array(folder / VALIDATION))


def open_store(folder: Path, header: Mapping[str, Any], *, validation: Array) -> LabelStore:
    """The views in `folder`, each of which must be there and of the header's shape.

    Raises:
        IntegrityError: one is not.
    """
    shape = (header["rows"], len(header["class_names"]))

    def open_view(number: int) -> Array:
        path = folder / view_name(number)
        array = open_array(path)
        if array.shape != shape or array.dtype != np.float16:
            raise IntegrityError(
                f"{path}: expected float16 {shape}, got {array.dtype} {array.shape}; run with "
                "--fresh to label again"
            )
        return array

    store = LabelStore(header, header["views"], open_view, validation)
    for number in range(store.views):
        store.view(number)
    return store


def compare_live(
    store: LabelStore,
    network: Network,
    views: AnyViews,
    *,
    precision: Precision,
    context: Context,
) -> dict[str, Any]:
    """Hold 256 stored rows, spread over samples and views, against the live teacher.

    Two answers agree when the stored one is, up to the tolerance, also the live one's largest.

    Raises:
        IntegrityError: answers differ on more than 1 %, or a logit by more than its rounding.
    """
    rows, agree, worst, largest = int(store.header["rows"]), 0, 0.0, 0.0
    chosen = np.unique(np.linspace(0, rows - 1, min(CHECKED, rows)).astype(np.int64))
    for view in range(store.views):
        indices = torch.from_numpy(chosen[view :: store.views].copy())
        if len(indices) == 0:
            continue
        live = forward(network, views, indices, view=view, precision=precision, context=context)
        stored = store.rows(indices, view=view)
        limit = TOLERANCE[precision.name] * float(live.abs().max())
        worst = max(worst, float((live - stored).abs().max()))
        largest = max(largest, float(live.abs().max()))
        answer = live.gather(1, stored.argmax(1, keepdim=True)).squeeze(1)
        agree += int((answer >= live.amax(1) - limit).sum())
    tolerance = TOLERANCE[precision.name] * largest
    found = {
        "n": len(chosen),
        "agreement": agree / len(chosen),
        "max_abs": worst,
        "tolerance": tolerance,
    }
    if found["agreement"] < AGREEMENT or worst > tolerance:
        raise IntegrityError(
            f"stored labels: expected the live teacher's logits within {tolerance:.3g} and the "
            f"same answer for {100 * AGREEMENT:.0f} % of {len(chosen)} samples, got a difference "
            f"of {worst:.3g} and {100 * found['agreement']:.1f} %: the rows do not belong to these "
            "images or this teacher; run with --fresh to label again"
        )
    return found


def network_sha256(folder: Path) -> str:
    """Hash of a stored network's files: weights or program, and what describes them."""
    names = ("network.json", "model.safetensors", "program.pt2")
    present = [name for name in names if (folder / name).is_file()]
    text = "\n".join(f"{name} {file_sha256(folder / name)}" for name in present)
    return hashlib.sha256(text.encode()).hexdigest()


def forward(
    network: Network,
    views: AnyViews,
    indices: Tensor,
    *,
    view: int,
    precision: Precision,
    context: Context,
) -> Tensor:
    """Teacher logits of one batch, (B, C) float32 on the CPU."""
    batch = views.batch(indices, view=view)
    with torch.inference_mode(), precision.autocast(context.device):
        logits = run_module(network.module, batch.inputs, fixed_batch=network.fixed_batch)
    return logits.float().cpu()


def open_array(path: Path) -> Array:
    try:
        array: Array = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise IntegrityError(
            f"{path}: expected stored labels, got: {error}; run with --fresh to label again"
        ) from error
    return array


def view_name(view: int) -> str:
    return f"view-{view:04d}.npy"


def _short(value: Any, limit: int = 120) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= limit else text[: limit - 1] + "…"
