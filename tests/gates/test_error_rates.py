"""The checks err about as often as they say: a small run of scripts/sim_gate.py."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent


@pytest.fixture(scope="module")
def simulation() -> Iterator[ModuleType]:
    spec = importlib.util.spec_from_file_location("sim_gate", ROOT / "scripts/sim_gate.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["sim_gate"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    yield module
    del sys.modules["sim_gate"]


def too_often(rows: list[Any]) -> list[Any]:
    """At most 5 % on the limit, at least 80 % without a loss, up to four deviations of chance."""
    assert rows
    return [
        row
        for row in rows
        if (row.rate > 0.05 + 4 * row.deviation) * row.at_limit
        + (row.rate < 0.80 - 4 * row.deviation) * (not row.at_limit)
    ]


@pytest.mark.parametrize(
    ("part", "draws"), [("drops", 2000), ("ratios", 300), ("shares", 2000), ("classes", 100)]
)
def test_counts_are_judged_as_rightly_as_is_said(
    simulation: ModuleType, part: str, draws: int
) -> None:
    assert not too_often(getattr(simulation, part)(draws))


@pytest.mark.parametrize("part", ["metrics", "calibration"])
def test_bootstraps_are_as_right_as_is_said(
    simulation: ModuleType, monkeypatch: pytest.MonkeyPatch, part: str
) -> None:
    monkeypatch.setattr(simulation.bootstrap, "RESAMPLES", 200)
    monkeypatch.setattr(simulation.bootstrap, "LEAST_RESAMPLES", 200)

    assert not too_often(getattr(simulation, part)(40))


def test_latencies_are_as_right_as_is_said(simulation: ModuleType) -> None:
    import numpy as np

    # launches that differ from each other more than their runs do, as those of a busy machine
    rng = np.random.default_rng(0)
    pools = {
        name: (base * np.exp(rng.normal(0, 0.1, (30, 1)) + rng.normal(0, 0.05, (30, 40)))).tolist()
        for name, base in (("teacher-onnx", 2e6), ("int8", 1e6))
    }

    rows = simulation.latencies(60, pools)

    assert not too_often([row for row in rows if "not the check" not in row.situation])
