"""Quantization-aware training: the float graph learns to be rounded, taught by itself.

    float graph ─► FakeQuant (rounds where the int8 file of calibration rounds) ─► fit
        └────────► the same graph in float: its logits are the targets

What is trained is the graph that ships, its BatchNormalization folded, so nothing is folded in
training that is folded otherwise in the file. The result is a float graph and the ranges of its
activations; `exporters/int8.py` writes both, as it writes those of calibration. Loss: KL to the
float network's answers, and a little cross-entropy with the labels.

Does not write int8 and does not judge; one stage of several that may win.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from onnx import ModelProto
from torch import Tensor, nn

from ..data.augment import ViewBatch
from ..data.dataset import Data
from ..data.views import open_views
from ..measure.accuracy import accuracy, logits_of_module
from ..recipe import QatSpec
from ..stage import Context
from ..train.loop import fit
from ..train.task import FitResult, Task
from ..training_spec import TrainSpec
from .fake_quant import FakeQuant, sqnr_db
from .graph_module import GraphModule
from .layout import read_layout

Array = np.ndarray[Any, Any]

WEIGHTS = {"soft": 1.0, "hard": 0.1}  # of the loss; the float network knows more than the labels
TEMPERATURE = 1.0  # the answers to imitate are the network's own, not those of a larger one
WARMUP_EPOCHS = 0.25  # the weights are trained already; only momentum starts from nothing


@dataclass(frozen=True, eq=False)
class QatResult:
    """What training found, for `exporters.int8.quantize`.

    Attributes:
        model: the float graph with trained weights; names and structure are those it had.
        ranges: (low, high) of each quantized activation, by tensor name.
        training: what the run did.
    """

    model: ModelProto
    ranges: dict[str, tuple[float, float]]
    training: FitResult


def train_qat(
    floating: ModelProto,
    quantized: ModelProto,
    data: Data,
    spec: QatSpec,
    *,
    context: Context,
) -> QatResult:
    """Train `floating` to hold its accuracy when rounded as `quantized` is.

    Deterministic, and taken up from a checkpoint in `context.resume` like any training.

    Args:
        floating: the graph of the export stage, one input (N, C, H, W), output logits (N, classes).
        quantized: what `exporters.int8.quantize` made of it; its ranges are where training starts.

    Raises:
        ExportError: an operator that cannot be trained, or graphs that do not belong together.
        MeasurementError: a loss is not finite.
    """
    student = FakeQuant(GraphModule(floating), read_layout(floating, quantized), ranges=spec.ranges)
    teacher = GraphModule(floating)
    teacher.to(context.device).eval().requires_grad_(False)
    train = train_spec(spec)
    task = imitation(data, teacher, train, context=context)
    training = fit(student, task, train, context=context, identity=_identity(floating, data))
    return QatResult(
        model=student.graph.to_model(),
        ranges=student.learned_ranges(),
        training=training,
    )


def train_spec(spec: QatSpec) -> TrainSpec:
    """The run as the training loop takes it.

    In float32: bfloat16 has eight bits itself. AdamW: once normalisation is folded, gradients
    differ by the square of a channel's scale, and one rate of SGD does not fit them all. Without
    weight decay: a folded weight's size is its function, and few epochs leave nothing to
    regularise.
    """
    return TrainSpec(
        epochs=spec.epochs,
        batch_size=spec.batch_size,
        optimizer="adamw",
        lr=spec.lr,
        weight_decay=0.0,
        warmup_epochs=WARMUP_EPOCHS,
        precision="fp32",
        compile="never",
    )


def imitation(
    data: Data, teacher: nn.Module, spec: TrainSpec, *, context: Context
) -> Task[ViewBatch]:
    """KL(teacher ‖ student), summed over classes, mean over the batch, and cross-entropy."""
    views = open_views(data.train, data.preprocess, spec.augment, context=context)
    reference = _logits(teacher, data, context)

    def terms(module: nn.Module, batch: ViewBatch) -> Mapping[str, Tensor]:
        with torch.no_grad():
            target = F.log_softmax(teacher(batch.inputs) / TEMPERATURE, dim=1)
        logits: Tensor = module(batch.inputs)
        found = F.log_softmax(logits / TEMPERATURE, dim=1)
        soft = F.kl_div(found, target, reduction="batchmean", log_target=True)
        return {"soft": TEMPERATURE**2 * soft, "hard": F.cross_entropy(logits, batch.labels)}

    def validate(module: nn.Module) -> Mapping[str, float]:
        logits = _logits(module, data, context)
        return {
            "accuracy": accuracy(logits, data.validation.labels),
            "agreement": float((logits.argmax(1) == reference.argmax(1)).mean()),
            "sqnr_db": sqnr_db(reference, logits),
        }

    def after_step(module: nn.Module, _step: int) -> None:
        assert isinstance(module, FakeQuant)
        module.project()

    return Task(
        samples=len(data.train.labels),
        load=lambda indices, epoch: views.batch(indices, view=epoch),
        terms=terms,
        weights=WEIGHTS,
        validate=validate,
        after_step=after_step,
    )


def _logits(module: nn.Module, data: Data, context: Context) -> Array:
    return logits_of_module(
        module, data.validation, data.preprocess, device=context.device, name="the rounded network"
    )


def _identity(floating: ModelProto, data: Data) -> str:
    """What the run depends on besides its start: who teaches, and what from."""
    found = hashlib.sha256(floating.SerializeToString(deterministic=True))
    found.update(data.train.ids.tobytes())
    found.update(data.train.labels.tobytes())
    return found.hexdigest()
