"""Student training against a bare PyTorch loop, in turns in one process; prints JSON.

The bare loop has the same net, batch, dtype, memory format and optimiser, and no data work at all:
one batch made beforehand, used again and again. Ours gathers, augments and normalises every batch
from CIFAR-sized uint8 images. Called by bench_main_job.py; runs alone as well.
"""

from __future__ import annotations

import json
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from edgestill.models.source import open_network
from edgestill.pipeline.data.augment import Views
from edgestill.pipeline.data.dataset import SampleSet
from edgestill.pipeline.measure.machine import available_threads
from edgestill.pipeline.recipe import PreprocessSpec
from edgestill.pipeline.stage import Context, Silent
from edgestill.pipeline.train.loop import fit
from edgestill.pipeline.train.optimizer import build_optimizer
from edgestill.pipeline.train.precision import choose_precision
from edgestill.pipeline.train.task import Task
from edgestill.pipeline.training_spec import AugmentSpec, TrainSpec

NET, BATCH, STEPS, ROUNDS = "resnet20", 256, 30, 7
PREPROCESS = PreprocessSpec(crop=(32, 32), mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25))


def main() -> None:
    threads = available_threads()
    torch.set_num_threads(threads)
    spec = TrainSpec(
        epochs=1, batch_size=BATCH, warmup_epochs=0, augment=AugmentSpec(pad=4, flip=True)
    )
    images = random_set(STEPS * BATCH)
    speeds: dict[str, list[float]] = {"bare": [], "ours": []}
    for turn in range(ROUNDS + 1):  # the first turn is warm-up
        for name, speed in (("bare", bare(spec)), ("ours", ours(spec, images, threads))):
            if turn:
                speeds[name].append(speed)
    precision = choose_precision("auto", device="cpu")
    print(
        json.dumps(
            {
                "what": f"{NET}, 32×32, batch {BATCH}, {precision.name}, channels_last, "
                f"{threads} threads, {STEPS} steps a turn",
                "samples_per_second": speeds,
                "ratio": statistics.median(speeds["ours"]) / statistics.median(speeds["bare"]),
            }
        )
    )


def network() -> torch.nn.Module:
    return open_network(NET, args={}, classes=10, input_shape=(3, 32, 32), seed=0).module.train()


def bare(spec: TrainSpec) -> float:
    module = network().to(memory_format=torch.channels_last)
    optimizer = build_optimizer(module, spec)
    precision = choose_precision("auto", device="cpu")
    inputs = torch.randn(BATCH, 3, 32, 32).contiguous(memory_format=torch.channels_last)
    labels = torch.randint(10, (BATCH,))
    begun = time.perf_counter()
    for _ in range(STEPS):
        with precision.autocast("cpu"):
            loss = torch.nn.functional.cross_entropy(module(inputs), labels)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
    return STEPS * BATCH / (time.perf_counter() - begun)


def ours(spec: TrainSpec, images: SampleSet, threads: int) -> float:
    views = Views(images, PREPROCESS, spec.augment, 0, "cpu")
    task = Task(
        samples=len(images.labels),
        load=views.batch,
        terms=lambda module, batch: {
            "hard": torch.nn.functional.cross_entropy(module(batch.inputs), batch.labels)
        },
        weights={"hard": 1.0},
        validate=lambda _: {"accuracy": 0.0},
    )
    with tempfile.TemporaryDirectory() as scratch:
        context = Context(0, threads, "cpu", Path(scratch), Silent())
        result = fit(network(), task, spec, context=context)
    return result.samples_per_second


def random_set(count: int) -> SampleSet:
    rng = np.random.default_rng(0)
    return SampleSet(
        contents=rng.integers(0, 256, (count, 32, 32, 3), dtype=np.uint8),
        labels=rng.integers(0, 10, count),
        ids=np.arange(count),
        hashes=[f"{i:032x}" for i in range(count)],
        names=[str(i) for i in range(count)],
    )


if __name__ == "__main__":
    main()
