"""Pruning in the main job: what is cut, what it is taught by, and what it is held against."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

RECIPE = """\
data:
  train: {path: digits}
  test: {fraction: 0.4}
  calibration: 64
student:
  model: resnet8
  train: {epochs: 3, batch_size: 64, optimizer: adamw, lr: 0.01, augment: {crop: none}}
prune: {macs: 0.6, candidates: 2, recover: {epochs: 2}}
profile: {launches: 3, runs: 20}
gate: {max_drop_points: 30}
compute: {threads: 1}
"""


@pytest.fixture(scope="module")
def pruned(compress: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pruned")
    (folder / "recipe.yaml").write_text(RECIPE)
    done = compress("run", folder / "recipe.yaml", "-o", folder / "out")
    assert done.returncode == 0, done.stdout + done.stderr
    return folder / "out"


def report_of(out: Path) -> dict[str, Any]:
    return dict(json.loads((out / "report.json").read_text()))


def test_the_cut_networks_stand_in_the_table_before_the_one_they_were_cut_from(
    pruned: Path,
) -> None:
    report = report_of(pruned)

    names = [one["name"] for one in report["candidates"]]
    assert names[0] == "float pruned-1"
    assert names[-1] == "float"
    dense = report["candidates"][-1]["multiply_adds"]
    assert all(one["multiply_adds"] <= 0.6 * dense for one in report["candidates"][:-1])


def test_without_a_teacher_the_uncut_network_is_the_reference_and_the_teacher(
    pruned: Path,
) -> None:
    report = report_of(pruned)

    assert report["reference"] == "dense"
    assert report["speedup"]["reference"] == "dense-onnx"
    assert {"labels-dense", "pruned-1"} <= {stage["name"] for stage in report["stages"]}


def test_the_pruned_network_is_rebuilt_from_its_plan_and_weights(
    pruned: Path, tmp_path: Path
) -> None:
    import numpy as np
    import torch
    from edgestill.exporters.sessions import open_session, run_batches
    from edgestill.models.store import load_network

    (tmp_path / "model.safetensors").write_bytes((pruned / "student.safetensors").read_bytes())
    (tmp_path / "network.json").write_bytes((pruned / "student.json").read_bytes())
    inputs = np.random.default_rng(0).standard_normal((4, 1, 8, 8)).astype(np.float32)

    module = load_network(tmp_path).network.module
    with torch.inference_mode():
        logits = module(torch.from_numpy(inputs)).numpy()

    shipped = run_batches(open_session(pruned / "model.fp32.onnx", threads=1), inputs, 4)
    assert np.abs(logits - shipped).max() < 1e-4 * np.abs(logits).max()


def test_each_stage_stands_in_the_report_once(pruned: Path) -> None:
    stages = [stage["name"] for stage in report_of(pruned)["stages"]]

    assert len(stages) == len(set(stages))


def test_with_a_teacher_its_stored_labels_serve_the_recovery_too(
    tmp_path: Path, compress: Any, small_recipe: Path
) -> None:
    prune = "prune: {macs: 0.7, candidates: 1, recover: {epochs: 1}}\n"
    (tmp_path / "recipe.yaml").write_text(small_recipe.read_text() + prune)

    done = compress(
        "run", tmp_path / "recipe.yaml", "-o", tmp_path / "out", "--set", "profile=null"
    )

    assert done.returncode == 0, done.stdout + done.stderr
    report = report_of(tmp_path / "out")
    assert report["reference"] == "teacher"
    names = [one["name"] for one in report["candidates"]]
    assert names == ["int8 pruned-1", "float pruned-1", "int8", "float"]
    stages = [stage["name"] for stage in report["stages"]]
    assert stages.count("labels") == 1
    assert "labels-dense" not in stages


def test_several_steps_recover_between_the_cuts(tmp_path: Path, compress: Any) -> None:
    (tmp_path / "recipe.yaml").write_text(
        RECIPE.replace("candidates: 2", "candidates: 1, steps: 2")
    )

    done = compress(
        "run", tmp_path / "recipe.yaml", "-o", tmp_path / "out", "--set", "profile=null"
    )

    assert done.returncode == 0, done.stdout + done.stderr
    stages = [stage["name"] for stage in report_of(tmp_path / "out")["stages"]]
    order = ["prune-1", "recovered-1", "prune-2", "pruned-1"]
    assert [name for name in stages if name in order] == order


def test_a_protected_path_that_matches_nothing_is_said_with_near_ones(
    tmp_path: Path, compress: Any
) -> None:
    (tmp_path / "recipe.yaml").write_text(
        RECIPE.replace("macs: 0.6", "macs: 0.6, protect: [layr3]")
    )

    done = compress("run", tmp_path / "recipe.yaml", "-o", tmp_path / "out")

    assert done.returncode == 2
    assert "layr3" in done.stderr
    assert "layer3" in done.stderr
