"""Heat and low power are seen in small made-up /sys trees."""

from __future__ import annotations

from pathlib import Path

import pytest
from edgestill.pipeline.measure import throttling
from edgestill.pipeline.measure.throttling import Throttling, read_throttling, slowed_between


def test_counts_of_all_cores_and_the_firmware_s_flags_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(throttling, "ROOT", tmp_path)
    for core, count in enumerate((3, 4)):
        folder = tmp_path / f"sys/devices/system/cpu/cpu{core}/thermal_throttle"
        folder.mkdir(parents=True)
        (folder / "core_throttle_count").write_text(f"{count}\n")
    flags = tmp_path / throttling.FLAGS
    flags.parent.mkdir(parents=True)
    flags.write_text("50005\n")

    assert read_throttling() == Throttling(counts=7, flags=0x50005)


def test_a_machine_that_says_nothing_gives_no_doubt(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(throttling, "ROOT", tmp_path)

    assert slowed_between(read_throttling(), read_throttling()) == ()


@pytest.mark.parametrize(
    ("before", "after", "expected"),
    [
        (Throttling(7, 0), Throttling(7, 0), ()),
        (Throttling(7, 0), Throttling(8, 0), ("throttled",)),
        (Throttling(0, 0), Throttling(0, 1 << 2), ("throttled",)),
        (Throttling(0, 1 << 3), Throttling(0, 0), ("throttled",)),
        (Throttling(0, 0), Throttling(0, 1 << 18), ("throttled",)),
        (Throttling(0, 1 << 18), Throttling(0, 1 << 18), ()),  # before all this
        (Throttling(0, 0), Throttling(0, 1 << 16), ("undervolted",)),
        (Throttling(0, 5), Throttling(0, 5), ("throttled", "undervolted")),
    ],
)
def test_what_happened_between_two_moments(
    before: Throttling, after: Throttling, expected: tuple[str, ...]
) -> None:
    assert slowed_between(before, after) == expected
