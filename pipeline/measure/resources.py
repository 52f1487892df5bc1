"""Memory of this process, and files before they are loaded: what the agent needs of its system.

Standard library only, Python >= 3.9: it lies beside the agent on every board.
"""

from __future__ import annotations

import hashlib
import os
import sys


def forget_peak_rss() -> None:
    """Starts the peak afresh, so that a network does not inherit that of the one before."""
    try:
        with open("/proc/self/clear_refs", "w", encoding="ascii") as file:
            file.write("5")  # proc(5): reset the peak resident set size
    except OSError:
        pass  # not Linux, or read-only /proc: the peak then covers the whole process's life


def peak_rss_bytes() -> int:
    """Peak resident memory. Not from getrusage on Linux: that survives exec, so it would hold
    the peak of a large parent."""
    try:
        with open("/proc/self/status", encoding="ascii", errors="replace") as file:
            for line in file:
                if line.startswith("VmHWM:"):
                    return int(line.split()[1]) * 1024
    except OSError:
        pass
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def check_sha256(path: str, expected: str) -> None:
    """Raises: RuntimeError: the file is another one."""
    with open(path, "rb") as file:
        digest = hashlib.sha256()
        for piece in iter(lambda: file.read(1 << 20), b""):
            digest.update(piece)
    if digest.hexdigest() != expected:
        raise RuntimeError(
            f"{path}: this copy has sha256 {digest.hexdigest()[:12]}…, what was sent has "
            f"{expected[:12]}…: it was cut or changed on the way; measure again"
        )


def drop_pages(path: str) -> None:
    """Reads the file from its disk again next time, as after a start of the machine."""
    if hasattr(os, "posix_fadvise"):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)  # dirty pages stay
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)
