"""Which way of computing is fastest for this network on this machine: measured, not guessed.

bfloat16 units speed dense convolutions up and can slow depthwise ones down: on AVX-512 BF16,
ResNet-20 trains at 943 images/s in bf16 and 571 in fp32, MobileNetV2-0.5 at 932 and 2,381. So a
run long enough to repay it (`PAYS_FROM_SECONDS`) begins with a short trial on a copy of the
network. Shorter runs take the first candidate, and so stay the same bytes from run to run. What
was chosen is kept with the unfinished stage: a resumed run repeats it.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping

from ..stage import Context
from ..workspace import write_atomically

PAYS_FROM_SECONDS = 30.0
ROUNDS = 3
CLEARLY_FASTER = 1.1  # within this factor it is noise, and the first in table order is taken


def fastest(
    name: str,
    candidates: Mapping[str, Callable[[], object]],
    *,
    calls: int,
    context: Context,
    pays_from: float = PAYS_FROM_SECONDS,
) -> tuple[str, dict[str, float] | None]:
    """Name of the candidate to use for `calls` calls, and the seconds a call took, if measured.

    Args:
        name: of the choice; a resumed stage recalls it by this name.
        candidates: in table order; each does one unit of the work, without lasting effects.
        calls: how often the chosen one will be called.
        pays_from: seconds of work by the first candidate from which a trial is worth its time.
    """
    path = context.resume / f"choice-{name}.json"
    if path.is_file():
        stored = json.loads(path.read_text(encoding="utf-8"))
        return stored["chosen"], stored["seconds"]
    first = next(iter(candidates))
    chosen, seconds = first, None
    if len(candidates) > 1:
        candidates[first]()  # warm-up
        if _timed(candidates[first]) * calls >= pays_from:
            seconds = _in_turns(candidates)
            best = min(seconds, key=seconds.__getitem__)
            chosen = best if seconds[first] > CLEARLY_FASTER * seconds[best] else first
    content = json.dumps({"chosen": chosen, "seconds": seconds})
    if context.world.leads:
        write_atomically(path, content.encode())
    return chosen, seconds


def _in_turns(candidates: Mapping[str, Callable[[], object]]) -> dict[str, float]:
    """Least seconds of each; A B A B, after one warm-up call of those that had none."""
    for call in list(candidates.values())[1:]:
        call()
    found = dict.fromkeys(candidates, float("inf"))
    for _ in range(ROUNDS):
        for name, call in candidates.items():
            found[name] = min(found[name], _timed(call))
    return found


def _timed(call: Callable[[], object]) -> float:
    begun = time.perf_counter()
    call()
    return time.perf_counter() - begun
