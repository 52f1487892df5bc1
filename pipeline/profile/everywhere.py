"""Several devices at once, in one table. Boards are measured side by side; what runs on this
machine, itself and its emulations, one after the other. A device that fails spoils no other.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from threading import Event

import numpy as np
import numpy.typing as npt

from ..errors import EdgestillError, RuntimeFailure, UsageError
from ..measure.agent_process import Here
from ..measure.answers import answers_of
from ..stage import Events, Silent
from . import perf_test
from .devices import EmulatedDevice, LocalDevice, SshDevice
from .local import measuring_here
from .measure import AMOUNT, Wish, profile_on
from .record import DeviceProfile
from .ssh import Board
from .transport import Machine, opened

Device = LocalDevice | SshDevice | EmulatedDevice


def profile_everywhere(
    devices: Sequence[tuple[str, Device]], wish: Wish, *, events: Events
) -> tuple[DeviceProfile, ...]:
    """One profile a device, in the order given; what went wrong is in `error`.

    Raises:
        UsageError: a file cannot travel. RuntimeFailure: this machine, whose answers are what the
            devices' are held against, cannot run the model.
    """
    elsewhere = [name for name, one in devices if not isinstance(one, LocalDevice)]
    reference = None
    if elsewhere:
        _refuse_outside_weights(wish, elsewhere)
        if wish.fed.expected is None:
            with measuring_here():
                reference = answers_of(wish.model, wish.fed.arrays, target=Here(), events=Silent())
    alone = len(devices) == 1
    running: list[Machine] = []
    stopping = Event()

    def measure(name: str, device: Device) -> DeviceProfile:
        own = events if alone else Silent()
        found = _profile(
            name, device, wish, reference=reference, events=own, running=running, stopping=stopping
        )
        if not alone and not stopping.is_set():
            events.note(f"{name}: {'failed' if found.error else found.validity}")
        return found

    def stop() -> None:
        """Ends what the threads wait for, so that they tidy up and end too."""
        stopping.set()
        for machine in list(running):
            for process in list(machine.live):
                process.kill()

    boards: list[tuple[str, Device]] = [
        (name, one) for name, one in devices if isinstance(one, SshDevice)
    ]
    here: list[tuple[str, Device]] = [
        (name, one) for name, one in devices if not isinstance(one, SshDevice)
    ]
    jobs: list[list[tuple[str, Device]]] = [[one] for one in boards]
    jobs += [here] if here else []
    if len(jobs) == 1:
        found = [measure(name, one) for name, one in jobs[0]]
    else:
        found = _side_by_side(jobs, measure, stop)
    return tuple(sorted(found, key=lambda one: [name for name, _ in devices].index(one.name)))


def _side_by_side(
    jobs: Sequence[Sequence[tuple[str, Device]]],
    measure: Callable[[str, Device], DeviceProfile],
    stop: Callable[[], None],
) -> list[DeviceProfile]:
    """A thread a job: they wait for other machines, not for this one. However it ends, none of them
    goes on."""
    with ThreadPoolExecutor(len(jobs)) as pool:
        futures = [
            pool.submit(lambda job: [measure(name, one) for name, one in job], job) for job in jobs
        ]
        try:
            return [profile for future in futures for profile in future.result()]
        finally:  # nothing to do where all of them are done
            for future in futures:
                future.cancel()
            stop()


def _profile(
    name: str,
    device: Device,
    wish: Wish,
    *,
    reference: npt.NDArray[np.float32] | None,
    events: Events,
    running: list[Machine],
    stopping: Event,
) -> DeviceProfile:
    try:
        with opened(name, device) as machine:
            if stopping.is_set():
                raise RuntimeFailure(f"device {name}: interrupted before it began")
            running.append(machine)
            if isinstance(machine, Board) and machine.device.perf_test is not None:
                launches, runs, _ = AMOUNT[wish.mode]
                copied = machine.place(wish.model)
                assert copied.sha256 is not None
                return perf_test.measure(
                    machine, (copied.path, copied.sha256), amount=(launches, runs)
                )
            return profile_on(machine, wish, reference=reference, events=events)
    except EdgestillError as error:
        return DeviceProfile(
            name=name, kind=device.kind, error=str(error), exit_code=error.exit_code
        )


def _refuse_outside_weights(wish: Wish, devices: Sequence[str]) -> None:
    if wish.signature.files:
        raise UsageError(
            f"{wish.model}: its weights are in {', '.join(wish.signature.files)}, which cannot "
            f"travel to {', '.join(devices)}; save it as one file (external_data=False)"
        )
