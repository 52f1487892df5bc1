"""What a file answers on a machine: what the agreement of two CPUs rests on.

Inputs go one by one, or in batches of the size that the graph fixes, and texts at their own length,
as on a device. One thread.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt

from ..stage import Events
from .agent_process import Target, running
from .turns import Inputs, logits_of, stored

BATCHES = 32  # a question: the answer must come before agent_process.ANSWER_SECONDS, under qemu too


def answers_of(
    model: Path, inputs: Inputs, *, target: Target, events: Events
) -> npt.NDArray[np.float32]:
    """The first output to all N inputs, (N, …).

    Args:
        inputs: as `turns.take`.

    Raises:
        RuntimeFailure: it does not run there, or the connection broke.
    """
    n = len(inputs if isinstance(inputs, np.ndarray) else next(iter(inputs.values())))
    found: list[npt.NDArray[np.float32]] = []
    with (
        stored(inputs) as local,
        running([(f"answers of {model} on {target.name}", "onnx")], target) as (child,),
    ):
        placed, arrays = target.place(model), target.place(local)
        digests = {one.path: one.sha256 for one in (placed, arrays) if one.sha256 is not None}
        batch = child.ask("open", path=placed.path, inputs=arrays.path, threads=1, sha256=digests)[
            "batch"
        ]
        for start in range(0, -(-n // batch), BATCHES):
            found.append(logits_of(child, start=start, batches=BATCHES))
            events.progress(min((start + BATCHES) * batch, n), n, f"answers of {target.name}")
    return np.concatenate(found)
