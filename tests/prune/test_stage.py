"""The stage reaches its goal, leaves networks that load, and says what cannot be done."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from edgestill.models.source import Network, open_network
from edgestill.models.store import load_network, save_network
from edgestill.pipeline.errors import ModelError, RecipeError
from edgestill.pipeline.prune.stage import prune
from edgestill.pipeline.recipe import PruneSpec
from edgestill.pipeline.stage import Context, Silent
from torch import nn

SHAPE = (3, 8, 8)
NAMES = ("blue", "green", "red")
NETS = Path(__file__).with_name("nets.py")


def store(folder: Path, network: Network) -> Path:
    folder.mkdir()
    save_network(
        folder, network, classes=3, input_shape=SHAPE, class_names=NAMES, preprocess={"a": 1}
    )
    return folder


@pytest.fixture(scope="session")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    network = open_network("resnet14", args={"width": 0.5}, classes=3, input_shape=SHAPE, seed=0)
    return store(tmp_path_factory.mktemp("dense") / "a", network)


def run(
    folder: Path,
    dense: Path,
    data: Path,
    *,
    network: Path | None = None,
    step: int = 1,
    **wish: Any,
) -> dict[str, Any]:
    folder.mkdir()
    return prune(
        network or dense,
        dense,
        data,
        PruneSpec.model_validate({"round_to": 4, **wish}),
        step=step,
        context=Context(0, 1, "cpu", folder, Silent()),
        memory_budget_bytes=2**30,
    )


@pytest.fixture
def as_if(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Time is as many ms as there are parameters, since each export takes seconds.

    Holds how many files were timed together, each time.
    """
    asked: list[int] = []

    def export(network: nn.Module, _shape: object, path: Path) -> None:
        path.write_text(str(sum(p.numel() for p in network.parameters())))

    def p50(paths: list[Path], _images: object) -> list[float]:
        asked.append(len(paths))
        return [float(path.read_text()) for path in paths]

    for where in ("search", "stage"):
        monkeypatch.setattr(f"edgestill.pipeline.prune.{where}.export_for_timing", export)
        monkeypatch.setattr(f"edgestill.pipeline.prune.{where}.time_in_turns", p50)
    return asked


def test_half_the_multiply_adds_stay_in_networks_that_load_as_they_were_left(
    dense: Path, coloured: SimpleNamespace, tmp_path: Path, as_if: list[int]
) -> None:
    record = run(tmp_path / "a", dense, coloured.data, macs=0.5, candidates=5)

    whole = record["dense"]["multiply_adds"]
    kept = {row["kept"]: row for row in record["candidates"] if row["kept"]}
    assert json.loads(json.dumps(record)) == record
    assert record["candidates"][0]["removed"] == []
    assert len(record["candidates"]) > 2
    assert as_if == [1 + len(record["candidates"])]
    assert all(0.3 * whole < row["multiply_adds"] <= 0.5 * whole for row in record["candidates"])
    assert sorted(p.name for p in (tmp_path / "a").iterdir()) == [str(n) for n in sorted(kept)]
    for number, row in kept.items():
        loaded = load_network(tmp_path / "a" / str(number))
        assert loaded.network.plan is not None
        assert list(loaded.network.plan.removed) == sorted(b["path"] for b in row["removed"])
        assert sum(p.numel() for p in loaded.network.module.parameters()) == row["parameters"]
        assert (loaded.class_names, loaded.preprocess) == (NAMES, {"a": 1})
        assert loaded.network.module(torch.zeros(2, *SHAPE)).shape == (2, 3)
    assert any("size of tensor" in p["why"] for p in record["protected"])


def test_candidates_are_really_exported_and_timed(
    coloured: SimpleNamespace, tmp_path: Path
) -> None:
    network = open_network("plain_cnn_small", args={}, classes=3, input_shape=SHAPE, seed=0)
    dense = store(tmp_path / "dense", network)

    record = run(tmp_path / "a", dense, coloured.data, macs=0.5)

    assert [row["kept"] for row in record["candidates"]] == [1]
    assert record["candidates"][0]["p50_ms"] > 0
    assert record["dense"]["p50_ms"] > 0


def test_search_is_the_same_again(
    dense: Path, coloured: SimpleNamespace, tmp_path: Path, as_if: list[int]
) -> None:
    first, second = (
        run(tmp_path / name, dense, coloured.data, macs=0.6, importance="taylor", blocks=False)
        for name in "ab"
    )

    for one, other in zip(first["candidates"], second["candidates"], strict=True):
        assert one == other
    for name in ("network.json", "model.safetensors"):
        assert (tmp_path / "a/1" / name).read_bytes() == (tmp_path / "b/1" / name).read_bytes()


def test_second_step_is_a_share_of_the_dense_network_and_its_plan_of_the_factorys(
    dense: Path, coloured: SimpleNamespace, tmp_path: Path, as_if: list[int]
) -> None:
    wish = {"parameters": 0.36, "steps": 2, "importance": "bn", "candidates": 1, "blocks": False}
    first = run(tmp_path / "a", dense, coloured.data, **wish)
    second = run(tmp_path / "b", dense, coloured.data, network=tmp_path / "a" / "1", step=2, **wish)

    whole = first["dense"]["parameters"]
    assert (first["goal"], second["goal"]) == (pytest.approx(0.6), pytest.approx(0.36))
    assert second["dense"]["parameters"] == whole
    assert 0.5 * whole < first["candidates"][0]["parameters"] <= 0.6 * whole
    assert 0.25 * whole < second["candidates"][0]["parameters"] <= 0.36 * whole
    loaded = load_network(tmp_path / "b" / "1").network
    assert sum(p.numel() for p in loaded.module.parameters()) <= 0.36 * whole


def test_latency_is_measured_until_it_is_low_enough(
    dense: Path, coloured: SimpleNamespace, tmp_path: Path, as_if: list[int]
) -> None:
    record = run(tmp_path / "a", dense, coloured.data, latency=0.5, blocks=False)

    (row,) = record["candidates"]
    assert 0.3 * record["dense"]["p50_ms"] < row["p50_ms"] <= 0.5 * record["dense"]["p50_ms"]
    assert as_if.count(2) >= 5


def test_goal_that_would_empty_layers_is_an_error(
    dense: Path, coloured: SimpleNamespace, tmp_path: Path, as_if: list[int]
) -> None:
    with pytest.raises(RecipeError, match=r"prune\.macs: 0\.01 .* would leave layers empty"):
        run(tmp_path / "a", dense, coloured.data, macs=0.01)


def test_pattern_that_matches_nothing_is_an_error(
    dense: Path, coloured: SimpleNamespace, tmp_path: Path
) -> None:
    with pytest.raises(RecipeError, match="near names: layer1"):
        run(tmp_path / "a", dense, coloured.data, macs=0.5, protect=["layr1"])


def test_protected_layers_keep_their_weights(
    dense: Path, coloured: SimpleNamespace, tmp_path: Path, as_if: list[int]
) -> None:
    run(tmp_path / "a", dense, coloured.data, macs=0.8, protect=["layer3*"], candidates=1)

    before = load_network(dense).network.module.get_submodule("layer3")
    after = load_network(tmp_path / "a" / "1").network.module.get_submodule("layer3")
    for name, weight in before.named_parameters():
        assert torch.equal(after.get_parameter(name), weight)


def test_captured_program_cannot_be_pruned(coloured: SimpleNamespace, tmp_path: Path) -> None:
    module = open_network("plain_cnn_small", args={}, classes=3, input_shape=SHAPE, seed=0).module
    batch = ({0: torch.export.Dim("N")},)
    program = torch.export.export(module, (torch.zeros(2, *SHAPE),), dynamic_shapes=batch)
    torch.export.save(program, tmp_path / "net.pt2")
    network = open_network(str(tmp_path / "net.pt2"), args={}, classes=3, input_shape=SHAPE, seed=0)
    folder = store(tmp_path / "stored", network)

    with pytest.raises(ModelError, match=r"captured program cannot be pruned.*FILE\.py:factory"):
        run(tmp_path / "a", folder, coloured.data, macs=0.5)
