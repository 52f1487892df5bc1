"""The other machines of `profile.devices`: boards that ssh reaches, CPUs that qemu stands in for.

On each the deployed file answers test samples, which must be what it answers here, and is timed in
turns with the reference's. Nothing of it is stored: a board is asked anew in every run.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..exporters.feeds import feed
from . import timing
from .data.dataset import spread
from .data.inputs import to_input
from .errors import MeasurementError, RecipeError, RuntimeFailure
from .measure.answers import answers_of
from .profile.devices import SshDevice, device_named
from .profile.inputs import Fed, signature_of
from .profile.kernels import int8_kernels
from .profile.measure import BASELINE, MODEL, Wish, profile_on
from .profile.pitfalls import deadly_wheel
from .profile.record import DeviceProfile
from .profile.transport import Machine, libraries, opened, survey
from .record import Elsewhere, Models
from .report import LOCAL, AgreementRecord, LatencyRecord
from .stage import Artifact
from .verify.parity import int8_noise
from .verify.task import ELSEWHERE_SAMPLES, elsewhere_rung
from .work import Work, model_of, open_sets


def check_devices(work: Work) -> None:
    """Every one of them is reached and runs onnxruntime, or nothing is trained for it.

    Raises:
        UsageError, RecipeError: no such device, or one without Python. RuntimeFailure: it cannot
            be reached, or onnxruntime does not run there.
    """
    if not work.workspace.world.leads:
        return
    for name in _names(work):
        with _machine(work, name) as machine:
            facts = _facts(machine)
            if found := deadly_wheel(facts, facts["libraries"]["onnxruntime"]):
                raise RuntimeFailure(f"device {name}: {found[0].text}")


def prove_elsewhere(work: Work, data: Artifact, models: Models) -> Elsewhere:
    """Answers and times of the deployed file on every other machine.

    Raises:
        RuntimeFailure, MeasurementError, UsageError: a machine failed; finished stages are kept.
    """
    names, found = _names(work), Elsewhere()
    if not names:
        return found
    sets = open_sets(work, data)
    rows = spread(len(sets.test.labels), ELSEWHERE_SAMPLES)
    inputs = to_input(sets.test.contents[rows], sets.preprocess)
    events = work.workspace.events
    deployed, floating = map(model_of, (models.deployed, models.floating))
    here = timing.answers(deployed, inputs)
    noise = int8_noise(timing.answers(floating, inputs), here) if models.is_quantized else None
    for name in names:
        events.started(f"on {name}")
        begun = time.monotonic()
        with _machine(work, name) as machine:
            facts = _facts(machine)
            there = answers_of(deployed, inputs, target=machine, events=events)
            rung = elsewhere_rung(name, here, there, noise=noise)
            if rung.passed:  # a wrong answer's speed is no result
                profile = _timed(work, data, models, machine)
                found.latency.extend(_records(work, data, models, profile))
        same = round((rung.top1_agreement or 0.0) * len(here))
        found.rungs.append(rung)
        found.agreements.append(AgreementRecord(cpu=name, n=len(here), same_class=same))
        found.environment[name] = facts
        events.finished(f"on {name}", seconds=time.monotonic() - begun, recalled=False)
    return found


def _names(work: Work) -> list[str]:
    spec = work.recipe.profile
    return [] if spec is None else [name for name in spec.devices if name != LOCAL]


def _facts(machine: Machine) -> dict[str, Any]:
    """What it is, and what it runs with."""
    found, (versions, _) = survey(machine)["machine"], libraries(machine)
    kernels = int8_kernels(found["arch"], found["features"])
    return {**found, "libraries": versions, "int8_kernels": kernels}


@contextmanager
def _machine(work: Work, name: str) -> Iterator[Machine]:
    spec = work.recipe.profile
    assert spec is not None
    device = device_named(name, Path.cwd(), file=spec.devices_file)
    if isinstance(device, SshDevice) and device.perf_test is not None:
        raise RecipeError(
            f"profile.devices: {name} has no Python, so it gives no answers to compare; take it "
            "out, and time the file with `compress profile --device`"
        )
    with opened(name, device) as machine:
        yield machine


def _timed(work: Work, data: Artifact, models: Models, machine: Machine) -> DeviceProfile:
    """The deployed file and the reference's, one thread, in turns."""
    events, path = work.workspace.events, model_of(models.deployed)
    signature = signature_of(path)
    inputs = timing.latency_inputs(work, data)
    arrays = feed(inputs, [entry.name for entry in signature.entries])
    _, reference = models.reference_onnx
    baseline = None if reference is models.deployed else model_of(reference)
    wish = Wish(path, signature, Fed(arrays, "data"), baseline=baseline)
    answered = timing.answers(path, inputs)
    profile = profile_on(machine, wish, reference=answered, events=events)
    said = [f"on {machine.name}: {one.text}" for one in profile.findings if one.severity != "note"]
    if profile.validity == "invalid":
        raise MeasurementError("; ".join(said))
    for text in said:
        work.notes.append(text)
        events.note(text)
    return profile


def _records(
    work: Work, data: Artifact, models: Models, profile: DeviceProfile
) -> Iterator[LatencyRecord]:
    """Named as the run names its models."""
    names = {BASELINE: models.reference_onnx[0], MODEL: models.deployed_role}
    sequence = timing.sequences(work, data)[0]
    for row in profile.rows:
        update = {"name": names[row.latency.name], "sequence": sequence}
        yield row.latency.model_copy(update=update)
