"""Whether heat or power slowed this machine down between two moments. Reads /sys, without root.

x86 Linux counts how often each core and package was slowed down by heat (sysfs, thermal_throttle);
a Raspberry Pi's firmware keeps flags (`vcgencmd get_throttled`: bits 0, 2 and 3 now, 16, 18 and 19
since boot). Other machines say nothing: that is no doubt, and no proof either.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

ROOT = Path("/")
COUNTS = "sys/devices/system/cpu/cpu[0-9]*/thermal_throttle/*_throttle_count"
FLAGS = "sys/devices/platform/soc/soc:firmware/get_throttled"
UNDERVOLTED = 1 << 0
THROTTLED = 1 << 2 | 1 << 3  # by the firmware; by its soft temperature limit
SINCE_BOOT = 16  # bits higher

Slowed = Literal["throttled", "undervolted"]


@dataclass(frozen=True)
class Throttling:
    """What the machine says at one moment."""

    counts: int  # of all cores, since boot
    flags: int


def read_throttling() -> Throttling:
    """0 where the machine says nothing."""
    counts = (_number(path, base=10) for path in ROOT.glob(COUNTS))
    return Throttling(sum(counts), _number(ROOT / FLAGS, base=16))


def slowed_between(before: Throttling, after: Throttling) -> tuple[Slowed, ...]:
    """What happened from one moment to the other."""
    lasting = before.flags | after.flags  # now, at one of the moments
    fresh = (after.flags & ~before.flags) >> SINCE_BOOT  # since boot, but not before
    found: list[Slowed] = []
    if after.counts > before.counts or (lasting | fresh) & THROTTLED:
        found.append("throttled")
    if (lasting | fresh) & UNDERVOLTED:
        found.append("undervolted")
    return tuple(found)


def _number(path: Path, *, base: int) -> int:
    try:
        return int(path.read_text(encoding="ascii").strip(), base)
    except (OSError, ValueError):
        return 0
