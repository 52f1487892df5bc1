"""`compress verify MODEL.onnx --reference …`: one file held against what it should compute.

    signature → preprocessing → classes → the ladder (parity.py) → extremes → labels → task
    → int8: accuracy, layers, saturation → where the difference enters

What cannot be compared has failed, and a failed signature ends it: no number would mean anything.
"""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from ... import __version__
from ...exporters.compare import float_floor
from ...exporters.divergence import Divergence, first_divergence
from ...exporters.graph import read_model
from ...exporters.sessions import open_session, run_batches
from ..data.inputs import Preparation
from ..errors import ExportError, UsageError
from ..measure.agent_process import Target
from ..measure.answers import answers_of
from ..measure.machine import describe_machine
from ..report import RungRecord
from ..stage import Silent
from ..workspace import file_sha256
from .extremes import extreme_rungs
from .facts import (
    Facts,
    classes_rung,
    facts_of,
    preprocessing_rung,
    refuse_another_task,
    signature_rung,
)
from .golden import refuse_occupied, write_bundle
from .inputs import open_set, tokenizer_rung
from .int8 import int8_rungs
from .parity import INT8_OFF, climb_int8, climb_ladder, int8_noise
from .record import DivergenceRecord, LayerRecord, TaskRecord, Verification
from .reference import Reference, find_reference, realised
from .samples import Set, TestSet
from .task import (
    ELSEWHERE_SAMPLES,
    MODEL,
    OFF,
    REFERENCE,
    Runs,
    answers,
    elsewhere_rung,
    labels_rung,
    order_rung,
    same_file_rung,
    task_parity,
)

Array = np.ndarray[Any, Any]

LADDER_SAMPLES = 128  # float64 convolutions are slow
CLOSE_SAMPLES, CLOSE_BYTES = 16, 2 * 2**20  # whose interior values are looked at, all at once
SAID = ("preprocessing", "classes", "tokenizer", "labels")  # rungs of what is said, not computed
TARGETS = ("arm", "x86")  # as the recipe's quantize.targets


@dataclass(frozen=True)
class Wish:
    """What the command line asks for.

    Attributes:
        how: of a file that does not say it, or to say it otherwise; None: as the files say.
        targets: CPUs that must compute the same; None: the run's own, else arm and x86.
        golden: folder for a bundle of the model's answers, if all holds.
        elsewhere: each opens another machine, which must answer as this one does; one at a time.
    """

    reference: Path
    data: Set
    how: Preparation | None = None
    targets: tuple[str, ...] | None = None
    max_drop_points: float = 1.0
    golden: Path | None = None
    elsewhere: Sequence[Callable[[], AbstractContextManager[Target]]] = ()
    threads: int = 1


@dataclass
class _Found:
    """What has been found so far."""

    rungs: list[RungRecord] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    task: TaskRecord | None = None
    divergence: DivergenceRecord | None = None
    layers: tuple[LayerRecord, ...] = ()
    n: int = 0
    floor: float = 0.0
    noise: float = 0.0

    @property
    def failed(self) -> bool:
        return any(not one.passed for one in self.rungs)


def verify_file(model: Path, wish: Wish) -> Verification:
    """Everything, in the order above.

    Raises:
        UserError: the file, the reference or the data cannot be used, or are of another task.
        MeasurementError: the reference proves nothing. IntegrityError: a changed run.
        RuntimeFailure: onnxruntime failed.
    """
    if wish.golden is not None:
        refuse_occupied(wish.golden)
    facts, reference = facts_of(model), find_reference(wish.reference)
    found = _Found()
    with tempfile.TemporaryDirectory() as name:
        scratch = Path(name)
        if reference.facts is not None:
            _refuse(reference.facts, facts)
            found.rungs.append(signature_rung(reference.facts, facts, where=reference.where))
        if not found.failed:
            names = reference.class_names or facts.class_names or ()
            test = open_set(
                facts, wish.data, how=wish.how or reference.how, class_names=names,
                tokenizer=reference.tokenizer, scratch=scratch, threads=wish.threads,
            )  # fmt: skip
            _climb(facts, reference, test, wish, found, scratch)
            if wish.golden is not None:
                _write_golden(facts, test, wish, found)
    return Verification(
        tool_version=__version__,
        created_utc=datetime.now(UTC).isoformat(timespec="seconds"),
        model=str(model),
        model_sha256=file_sha256(model),
        reference=reference.where,
        reference_kind=reference.kind,
        n=found.n,
        rungs=tuple(found.rungs),
        task=found.task,
        divergence=found.divergence,
        layers=found.layers,
        notes=tuple(found.notes),
        environment=describe_machine(),
    )


def _refuse(reference: Facts, facts: Facts) -> None:
    refuse_another_task(reference, facts)
    if reference.is_int8 and not facts.is_int8:
        raise UsageError(
            f"{reference.path}: is int8, and {facts.path} is float: give the float file as the "
            "reference, and the int8 one as the model"
        )


def _climb(
    facts: Facts, reference: Reference, test: TestSet, wish: Wish, found: _Found, scratch: Path
) -> None:
    inputs = test.inputs(test.spread(LADDER_SAMPLES))
    found.n = len(test.samples)
    classes = reference.class_names or facts.class_names or test.class_names
    if not classes and facts.classes:
        classes = tuple(str(index) for index in range(facts.classes))
    reference = realised(reference, inputs, classes=classes, scratch=scratch, threads=wish.threads)
    found.notes += [reference.note] if reference.note else []
    theirs = reference.facts
    assert theirs is not None
    if not found.rungs:  # of a recipe, whose file was exported only now
        _refuse(theirs, facts)
        found.rungs.append(signature_rung(theirs, facts, where=reference.where))
    found.rungs.append(preprocessing_rung(reference.how, facts.how))
    found.rungs.append(classes_rung(reference.class_names, facts.class_names))
    if facts.is_text:
        found.rungs.append(tokenizer_rung(test))
    if not found.rungs[0].passed:
        return
    ladder = _ladder(facts, reference, theirs, inputs, threads=wish.threads)
    found.rungs += ladder
    _whole_set(facts, reference, theirs, test, wish, found, inputs)
    if wish.elsewhere:
        _elsewhere(facts, test, wish, found)
    if facts.is_int8:
        _int8(facts, theirs, found, inputs, threads=wish.threads,
              targets=wish.targets or reference.targets or TARGETS)  # fmt: skip
    if found.failed and found.divergence is None and facts.is_int8 == theirs.is_int8:
        _locate(facts, theirs, wish, found, inputs)


def _ladder(
    facts: Facts, reference: Reference, theirs: Facts, inputs: Array, *, threads: int
) -> list[RungRecord]:
    if theirs.is_int8:
        rungs = climb_int8(theirs.path, facts.path, inputs=inputs, threads=threads)
    else:
        rungs = climb_ladder(
            reference.module,
            exported=theirs.path,
            final_float=None if facts.is_int8 else facts.path,
            int8=facts.path if facts.is_int8 else None,
            inputs=inputs,
            threads=threads,
        )
    return [RungRecord(**one) for one in rungs]


def _whole_set(
    facts: Facts, reference: Reference, theirs: Facts, test: TestSet, wish: Wish, found: _Found,
    inputs: Array,
) -> None:  # fmt: skip
    """Extremes, labels and the task, each model once over every sample."""
    files = {REFERENCE: theirs.path, MODEL: facts.path}
    runs: Runs = {
        f"{who}{how}": (path, not how) for who, path in files.items() for how in ("", OFF)
    }
    logits = answers(runs, test, threads=wish.threads)
    before, after = logits[REFERENCE], logits[MODEL]
    if before.shape != after.shape or before.ndim != 2:
        raise UsageError(
            f"{facts.path}: gives {after.shape[1:]} for a sample, and the reference "
            f"{before.shape[1:]}; give a reference of the same task"
        )
    _check_classes(before, test, facts)
    moved = order_rung(before, after)
    found.rungs += [moved] if moved is not None else []
    task, task_rung = task_parity(
        before, after, test, is_int8=facts.is_int8, limit_points=wish.max_drop_points
    )
    found.noise = int8_noise(before, after) if facts.is_int8 else 0.0
    found.floor = _floor(reference, inputs)
    found.rungs += [
        same_file_rung(
            f"{who}, whole set", f"{who}, whole set{OFF}", logits[f"{who}{OFF}"], logits[who],
            floor=found.floor, noise=found.noise if one.is_int8 else None,
        )
        for who, one in ((REFERENCE, theirs), (MODEL, facts))
    ]  # fmt: skip
    if np.isfinite(after).all():
        found.rungs += extreme_rungs(
            facts.path, theirs.path, inputs, test.how, floor=found.floor, noise=found.noise,
            is_int8=facts.is_int8, threads=wish.threads,
        )  # fmt: skip
    if test.labelled:
        found.rungs.append(labels_rung(before, test, reference.samples))
    found.task = task
    found.rungs.append(task_rung)


def _elsewhere(facts: Facts, test: TestSet, wish: Wish, found: _Found) -> None:
    inputs = test.inputs(test.spread(ELSEWHERE_SAMPLES))
    here = run_batches(open_session(facts.path, threads=1), inputs, 1)  # as on a device
    noise = found.noise if facts.is_int8 else None
    for opening in wish.elsewhere:
        with opening() as machine:
            there = answers_of(facts.path, inputs, target=machine, events=Silent())
        found.rungs.append(elsewhere_rung(machine.name, here, there, noise=noise))


def _check_classes(logits: Array, test: TestSet, facts: Facts) -> None:
    if test.labelled and int(test.samples.labels.max()) >= logits.shape[1]:
        raise ExportError(
            f"{facts.path}: tells {logits.shape[1]} classes apart, and the test set has the label "
            f"{int(test.samples.labels.max())}; give the model's own test set"
        )


def _floor(reference: Reference, inputs: Array) -> float:
    """What float32 itself is off, where there is a network to ask."""
    if reference.module is None:
        return 0.0
    from ...exporters.reference import logits_float32, logits_float64

    some = _few(inputs)
    double, _ = logits_float64(reference.module, some, batch_size=len(some))
    if not len(double):
        return 0.0
    return float_floor(double, logits_float32(reference.module, some, batch_size=len(some)))


def _int8(
    facts: Facts, theirs: Facts, found: _Found, inputs: Array, *, targets: Sequence[str],
    threads: int,
) -> None:  # fmt: skip
    assert found.task is not None
    judged = int8_rungs(
        facts.path,
        None if theirs.is_int8 else theirs.path,
        _few(inputs),
        against=next(one for one in found.rungs if one.rung == INT8_OFF),
        task=found.task,
        targets=targets,
        threads=threads,
    )
    found.rungs += judged.rungs
    found.layers, found.divergence = judged.layers, judged.suspect


def _few(inputs: Array) -> Array:
    """At most CLOSE_SAMPLES, fewer where they are large: all of their interior is held."""
    return inputs[: max(2, min(CLOSE_SAMPLES, CLOSE_BYTES // max(1, inputs[:1].nbytes)))]


def _locate(facts: Facts, theirs: Facts, wish: Wish, found: _Found, inputs: Array) -> None:
    """The first value that leaves tolerance, where a number differed."""
    if all(one.passed or one.rung in SAID for one in found.rungs):
        return
    parted: Divergence | None = first_divergence(
        read_model(theirs.path), read_model(facts.path), _few(inputs), floor=0.0,
        threads=wish.threads,
    )  # fmt: skip
    if parted is None:
        return
    said = dataclasses.asdict(parted)
    differences = tuple(said["differences"]) + ((parted.problem,) if parted.problem else ())
    kept = {key: said[key] for key in DivergenceRecord.model_fields if key in said}
    found.divergence = DivergenceRecord(**(kept | {"differences": differences}))


def _write_golden(facts: Facts, test: TestSet, wish: Wish, found: _Found) -> None:
    assert wish.golden is not None
    if found.failed:
        found.notes.append(f"{wish.golden}: not written, as the model did not hold")
        return
    count = write_bundle(
        wish.golden, facts, test, noise=found.noise, floor=found.floor, threads=wish.threads
    )
    found.notes.append(f"{wish.golden}: {count} golden answers")
