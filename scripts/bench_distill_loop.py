"""Distillation at CIFAR size, ours against the usual loops, in turns in one process; prints JSON.

* ours: the student stage's task, from stored labels, in the one training loop
* usual: a faithful plain loop as in RepDistiller: PIL images, DataLoader workers, batch 64,
  float32, the teacher beside the student (KD, T 4, 0.9/0.1). torchdistill itself needs
  torchvision, for which there is no build beside this torch, so it cannot run here.
* plain: the same loop without a teacher: supervised PyTorch

ResNet-56 → ResNet-20, both of the zoo; the teacher has its public weights. First throughput, then
test accuracy after equal epochs of the same images. Called by bench_distill.py; runs alone as well.
"""

from __future__ import annotations

import io
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import torch
import torch.nn.functional as F
from edgestill.models.source import open_network
from edgestill.models.weights import load_weights, read_state
from edgestill.pipeline.data.dataset import Data, SampleSet
from edgestill.pipeline.distill.label_store import LabelStore
from edgestill.pipeline.distill.tasks import taught
from edgestill.pipeline.measure.accuracy import accuracy, logits_of_module
from edgestill.pipeline.measure.machine import available_threads
from edgestill.pipeline.recipe import PreprocessSpec
from edgestill.pipeline.stage import Context, Silent
from edgestill.pipeline.strategy import choose
from edgestill.pipeline.train.loop import fit
from edgestill.pipeline.training_spec import AugmentSpec, DistillSpec
from PIL import Image
from torch import Tensor, nn

DATA = Path(
    os.environ.get("EDGESTILL_DATA", Path(__file__).resolve().parent.parent / "../shared/data")
).resolve()
IMAGES, TESTED, EPOCHS, ROUNDS = 10_240, 10_000, 3, 5
STEPS = {"ours": 60, "usual": 40, "plain": 60}
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
AUGMENT = AugmentSpec(crop="pad", pad=4, flip=True)
PREPROCESS = PreprocessSpec(crop=(32, 32), mean=MEAN, std=STD)


def main() -> None:
    threads = available_threads()
    torch.set_num_threads(threads)
    train, test = read("train", IMAGES), read("test", TESTED)
    teacher = network("resnet56").eval().requires_grad_(False)
    state = read_state(DATA / "checkpoints/resnet56-4bfd9763.th")
    load_weights(teacher, state, head="keep", where="teacher")
    runs: dict[str, Callable[[int | None], tuple[float, nn.Module]]] = {
        "ours": lambda steps: ours(train, test, teacher, steps=steps, threads=threads),
        "usual": lambda steps: classic(train, teacher, steps=steps),
        "plain": lambda steps: classic(train, None, steps=steps),
    }
    speeds: dict[str, list[float]] = {name: [] for name in STEPS}
    for turn in range(ROUNDS + 1):  # the first turn is warm-up
        for name, steps in STEPS.items():
            speed, _ = runs[name](steps)
            if turn:
                speeds[name].append(speed)
    found = {}
    for name in STEPS:
        _, student = runs[name](None)
        logits = logits_of_module(student, test, PREPROCESS, device="cpu")
        found[name] = 100 * accuracy(logits, test.labels)
    medians = {name: statistics.median(values) for name, values in speeds.items()}
    print(
        json.dumps(
            {
                "about": f"ResNet-56 → ResNet-20 at CIFAR size, {threads} threads, in turns, "
                f"{ROUNDS} turns. After {EPOCHS} epochs of the same {IMAGES:,} images the test "
                f"accuracies are {found['ours']:.2f} % (ours), {found['usual']:.2f} % (usual) and "
                f"{found['plain']:.2f} % (plain), n = {TESTED:,}, one seed.",
                "what": {
                    "ours": "ours: stored labels, batch 128",
                    "usual": "usual distillation loop: PIL workers, batch 64, fp32, live teacher",
                    "plain": "supervised plain PyTorch: PIL workers, batch 64, fp32",
                },
                "samples_per_second": speeds,
                "accuracy": found,
                "ratios": {name: medians["ours"] / medians[name] for name in medians},
            }
        )
    )


def network(name: str) -> nn.Module:
    return open_network(name, args={}, classes=10, input_shape=(3, 32, 32), seed=0).module


def ours(
    train: SampleSet, test: SampleSet, teacher: nn.Module, *, steps: int | None, threads: int
) -> tuple[float, nn.Module]:
    """Labels are made beforehand, as the labels stage does; their making is not timed."""
    spec = DistillSpec(epochs=EPOCHS, views=2, lr=0.2, select="final", augment=AUGMENT)
    if steps is not None:
        train = some(train, steps * spec.batch_size)
        spec = spec.model_copy(update={"epochs": 1})
    data = Data(train, some(test, 256), test, np.arange(8), tuple("abcdefghij"), PREPROCESS,
                (3, 32, 32), {})  # fmt: skip
    views = [labelled(teacher, data, spec, view, real=steps is None) for view in range(2)]
    store = LabelStore({}, len(views), views.__getitem__, np.zeros((256, 10), np.float32))
    student = network("resnet20")
    with tempfile.TemporaryDirectory() as scratch:
        context = Context(0, threads, "cpu", Path(scratch), Silent())
        course = taught(student, data, choose(spec), spec, stores=[store], context=context)
        result = fit(course.learner, course.task, spec, context=context)
    return result.samples_per_second, student


def labelled(
    teacher: nn.Module, data: Data, spec: DistillSpec, view: int, *, real: bool
) -> np.ndarray[Any, Any]:
    """The teacher's logits; for throughput alone any numbers do."""
    from edgestill.pipeline.data.augment import Views

    rows = len(data.train.labels)
    if not real:
        return np.random.default_rng(view).standard_normal((rows, 10)).astype(np.float16)
    views = Views(data.train, PREPROCESS, spec.augment, 0, "cpu")
    parts = []
    with torch.inference_mode():
        for indices in torch.arange(rows).split(512):
            parts.append(teacher(views.batch(indices, view).inputs).half().numpy())
    return np.concatenate(parts)


def classic(
    train: SampleSet, teacher: nn.Module | None, *, steps: int | None
) -> tuple[float, nn.Module]:
    """The loop that distillation papers publish. Its first batches, which start the workers, are
    not timed."""
    torch.manual_seed(0)
    student = network("resnet20").train()
    optimizer = torch.optim.SGD(student.parameters(), 0.05, momentum=0.9, weight_decay=5e-4)
    loader = torch.utils.data.DataLoader(
        Pictures(train), batch_size=64, shuffle=True, num_workers=2, drop_last=True
    )
    total = len(loader) * EPOCHS
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, total)
    begun, done = 0.0, 0
    for done, (images, labels) in enumerate(batches(loader, steps)):
        if done == 5:
            begun = time.perf_counter()
        logits = student(images)
        loss = F.cross_entropy(logits, labels)
        if teacher is not None:
            with torch.no_grad():
                answers = teacher(images)
            divergence = F.kl_div(
                F.log_softmax(logits / 4, 1), F.softmax(answers / 4, 1), reduction="batchmean"
            )
            loss = 0.1 * loss + 0.9 * 16 * divergence
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return (done - 4) * 64 / (time.perf_counter() - begun), student


def batches(loader: Any, steps: int | None) -> Iterator[tuple[Tensor, Tensor]]:
    if steps is None:
        for _ in range(EPOCHS):
            yield from loader
        return
    for index, batch in enumerate(loader):
        if index == steps + 5:
            return
        yield batch


class Pictures(torch.utils.data.Dataset[tuple[Tensor, int]]):
    """Random crop of the padded image, flip, to tensor, normalize: on PIL images, one by one."""

    def __init__(self, images: SampleSet) -> None:
        self.images = images

    def __len__(self) -> int:
        return len(self.images.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        image = Image.fromarray(self.images.contents[index])
        canvas = Image.new("RGB", (40, 40))
        canvas.paste(image, (4, 4))
        left, top = torch.randint(0, 9, (2,)).tolist()
        image = canvas.crop((left, top, left + 32, top + 32))
        if torch.rand(()) < 0.5:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255
        normal = (pixels - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None]
        return normal, int(self.images.labels[index])


def read(part: str, count: int) -> SampleSet:
    table = pq.read_table(DATA / f"cifar10-jpeg/{part}.parquet").slice(0, count)
    image, label = table.column_names[:2]
    pictures = [
        np.array(Image.open(io.BytesIO(row["bytes"])).convert("RGB"))
        for row in table.column(image).to_pylist()
    ]
    return as_set(np.stack(pictures), np.array(table.column(label).to_pylist()))


def some(images: SampleSet, count: int) -> SampleSet:
    return as_set(images.contents[:count], images.labels[:count])


def as_set(images: np.ndarray[Any, Any], labels: np.ndarray[Any, Any]) -> SampleSet:
    count = len(labels)
    return SampleSet(
        contents=images,
        labels=labels,
        ids=np.arange(count),
        hashes=np.array([f"{index:032x}" for index in range(count)]),
        names=None,
    )


if __name__ == "__main__":
    main()
