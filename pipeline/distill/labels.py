"""The labels stage: a teacher's logits over K replayable views of the training set, stored once.

Views are written one by one, so that a killed stage goes on after the last whole one; of several
processes each writes every so-many-th. Before the store is handed on, 256 of its rows are compared
with the live teacher.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...exporters.reference import evaluating
from ...models.source import Network
from ...models.store import load_network
from ..data.dataset import Data, open_data, with_unlabelled
from ..data.views import AnyViews, lengths_of, open_views
from ..errors import ModelError, WeightsError
from ..measure.accuracy import logits_of_module
from ..stage import Context
from ..train.average import tensors_of
from ..train.checkpoint import digest
from ..train.distributed import wait_for_all
from ..train.precision import Precision, choose_precision, measured_precision
from ..train.reproducible import reproducible
from ..training_spec import DistillSpec
from ..workspace import write_atomically
from .label_store import (
    CHECKED,
    HEADER,
    IDS,
    VALIDATION,
    compare_live,
    describe,
    forward,
    network_sha256,
    open_store,
    view_name,
)
from .objectives import kd

Array = np.ndarray[Any, Any]

BATCH = 512  # forward only, so twice what training takes
# Most that bf16 may add to the distillation loss, which is 0.1 to 1 in training. T²·KL is half the
# variance of the logits' error: 0.14 a logit. ResNet-56 on CIFAR-10 is off by 0.06.
BF16_LOSS = 0.01
BF16_TEMPERATURE = 4.0  # whatever the recipe says, so that the labels do not depend on it


def store_labels(
    spec: DistillSpec,
    teacher_artifact: Path,
    data_artifact: Path,
    *,
    context: Context,
    memory_budget_bytes: int,
) -> dict[str, Any]:
    """The labels stage. Leaves the store in `context.scratch`; an unfinished one is taken up.

    The teacher runs in eval mode without gradients, in bfloat16 where that is fast and as good as
    float32 (measured on 256 samples), and must leave its own buffers unchanged.

    Raises:
        IntegrityError: stored and live logits differ.
        WeightsError: logits that are not finite or exceed float16.
        ModelError: the teacher changes its own buffers in eval mode.
    """
    data = open_data(data_artifact, memory_budget_bytes=memory_budget_bytes)
    images = with_unlabelled(data)
    network = load_network(teacher_artifact).network
    module = network.module.to(context.device)
    views = open_views(images, data.preprocess, spec.augment, context=context)
    before = digest(tensors_of(module))
    with reproducible(threads=context.threads, device=context.device), evaluating(module):
        precision, doubt = _label_precision(network, views, spec, context=context)
        header = describe(spec, data, seed=context.seed, teacher=network_sha256(teacher_artifact))
        header["precision"] = precision.name
        kept = _take_up(context, header) if context.world.leads else 0
        wait_for_all(context.world)
        start = time.perf_counter()
        _label_views(network, views, header, precision=precision, context=context)
        wait_for_all(context.world)
        seconds = time.perf_counter() - start
        if not context.world.leads:
            return {}
        validation = _validation_logits(network, data, context=context)
        store = open_store(context.resume, header, validation=validation)
        live = compare_live(store, network, views, precision=precision, context=context)
    if digest(tensors_of(module)) != before:
        raise ModelError(
            f"teacher: {type(module).__name__} changed its own weights or buffers in eval mode; "
            "expected a teacher that stays as it is while it labels"
        )
    hits = [_accuracy(store.view(number), images.labels) for number in range(spec.views)]
    size = spec.views * store.view(0).nbytes
    np.save(context.scratch / VALIDATION, validation)
    _publish(context, header, ids=images.ids)
    made = (spec.views - kept) * len(images.labels)
    return {
        "views": spec.views,
        "resumed_views": kept,
        "rows": len(images.labels),
        "bytes": size,
        "precision": asdict(precision),
        "bf16_against_fp32": doubt,
        "samples_per_second": made / seconds if made else None,
        "live_check": live,
        # of the teacher, by the image's own label; mixed images have two, so it says less there
        "train_view_accuracy": float(np.mean(hits)),
    }


def _validation_logits(network: Network, data: Data, *, context: Context) -> Array:
    return logits_of_module(
        network.module,
        data.validation,
        data.preprocess,
        device=context.device,
        fixed_batch=network.fixed_batch,
        name="teacher",
    )


def _label_precision(
    network: Network, views: AnyViews, spec: DistillSpec, *, context: Context
) -> tuple[Precision, dict[str, Any] | None]:
    """The precision to label in, and how far bf16 is from fp32 if there was a choice."""
    if not network.trainable:
        return Precision("fp32", "a captured program keeps its own number formats"), None
    wanted = choose_precision(spec.precision, device=context.device)
    if spec.precision != "auto" or wanted.name == "fp32":
        return wanted, None
    rows = len(views)
    indices = torch.from_numpy(np.linspace(0, rows - 1, min(CHECKED, rows)).astype(np.int64))
    exact, rough = (
        forward(network, views, indices, view=0, precision=precision, context=context)
        for precision in (Precision("fp32", ""), wanted)
    )
    doubt = {
        "n": len(indices),
        "loss": float(kd(rough, exact, temperature=BF16_TEMPERATURE)),
        "agreement": float((exact.argmax(1) == rough.argmax(1)).double().mean()),
    }
    if doubt["loss"] <= BF16_LOSS:

        def label(precision: Precision) -> None:
            forward(network, views, indices, view=0, precision=precision, context=context)

        calls = math.ceil(rows / len(indices)) * spec.views
        return measured_precision(
            spec.precision, label, name="label", calls=calls, context=context
        ), doubt
    reason = f"in bf16 the teacher is {doubt['loss']:.2g} off itself, as a distillation loss"
    return Precision("fp32", reason), doubt


def _take_up(context: Context, header: Mapping[str, Any]) -> int:
    """Prepare the resume folder for `header`; views that another header made are dropped."""
    path = context.resume / HEADER
    text = json.dumps(header, indent=1, sort_keys=True)
    if not path.is_file() or path.read_text(encoding="utf-8") != text:
        for view in context.resume.glob("view-*"):
            view.unlink()
        write_atomically(path, text.encode())
    kept = sum((context.resume / view_name(v)).is_file() for v in range(header["views"]))
    if kept:
        context.events.note(f"labelling goes on after {kept} of {header['views']} views")
    return kept


def _label_views(
    network: Network,
    views: AnyViews,
    header: Mapping[str, Any],
    *,
    precision: Precision,
    context: Context,
) -> None:
    """Write every view that is missing, each whole or not at all."""
    rows, count = header["rows"], header["views"]
    order = _order(views)
    for view in range(context.world.rank, count, context.world.size):
        path = context.resume / view_name(view)
        if path.is_file():
            continue
        temporary = path.with_name(path.name + ".part")
        shape = (rows, len(header["class_names"]))
        stored = np.lib.format.open_memmap(temporary, "w+", np.dtype("<f2"), shape)
        for start in range(0, rows, BATCH):
            indices = order[start : start + BATCH]
            logits = forward(
                network, views, indices, view=view, precision=precision, context=context
            )
            stored[indices.numpy()] = _to_half(logits)
            done = view * rows + start + len(indices)
            context.events.progress(done, count * rows, f"view {view + 1}/{count}")
        stored.flush()
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)


def _order(views: AnyViews) -> Tensor:
    """Rows as they are labelled: texts by length, as a batch is padded to its longest."""
    lengths = lengths_of(views)
    return torch.arange(len(views)) if lengths is None else torch.argsort(lengths, stable=True)


def _to_half(logits: Tensor) -> Array:
    half = logits.half()
    if not bool(half.isfinite().all()):
        raise WeightsError(
            "teacher: expected finite logits below 65,504, which float16 can hold, got "
            f"{float(logits.abs().max()):g}; look at its weights and at the preprocessing's mean "
            "and std"
        )
    return half.numpy()


def _publish(context: Context, header: Mapping[str, Any], *, ids: Array) -> None:
    np.save(context.scratch / IDS, np.ascontiguousarray(ids, dtype="<i8"))
    for name in (*(view_name(view) for view in range(header["views"])), HEADER):
        os.replace(context.resume / name, context.scratch / name)


def _accuracy(logits: Array, labels: Array) -> float:
    """Of the rows that have a label."""
    labelled = labels >= 0
    return float((np.asarray(logits)[labelled].argmax(axis=1) == labels[labelled]).mean())
