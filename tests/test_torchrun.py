"""Training on two processes: the same as on one, said once, and what a lost process leaves."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from edgestill.models.plain import plain_cnn_small
from safetensors.torch import load_file, save_file

LEARN_MANY = Path(__file__).with_name("learn_many.py")
ALONE = [sys.executable, "-P"]
TORCHRUN = [sys.executable, "-P", "-m", "torch.distributed.run", "--standalone",
            "--nproc-per-node", "2"]  # fmt: skip

# Without BatchNorm a step is a mean over samples, which parts of a batch average to.
NET = """\
from torch import nn


def make(classes, in_channels, width=8):
    return nn.Sequential(
        nn.Conv2d(in_channels, width, 3, padding=1), nn.ReLU(),
        nn.Conv2d(width, 2 * width, 3, stride=2, padding=1), nn.ReLU(),
        nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(8 * width, classes),
    )
"""

# 969 images train: batches of 57 leave no rest; of 88 one image, which joins the batch before;
# of 69 three, too few for two processes with BatchNorm.
COMMON = """\
data:
  train: {path: digits}
  test: {fraction: 0.4}
  calibration: 64
quantize: {}
profile: null
gate: {max_drop_points: 90}
compute: {threads: 1}
"""
TEACHER = """\
teacher:
  model: net.py:make
  args: {width: 16}
  train: {epochs: 3, batch_size: 88, optimizer: adamw, lr: 0.01, precision: fp32}
"""
RECIPES = {
    "stored": TEACHER + """\
student: {model: net.py:make}
distill:
  {epochs: 8, batch_size: 88, optimizer: adamw, lr: 0.01, views: 3, precision: fp32,
   checkpoint_minutes: 0, augment: {crop: pad, pad: 1}}
""",
    # taps, a learnt temperature, balanced terms, the average that ships, clipping
    "live": TEACHER + """\
student: {model: net.py:make}
distill:
  {epochs: 3, batch_size: 88, optimizer: adamw, lr: 0.01, precision: fp32, ema: 0.9, balance: true,
   clip_norm: 0.5, objectives: [{name: kd, temperature: curriculum}, {name: attention, weight: 1}]}
""",
    # helpers with BatchNorm, images without labels
    "unlabelled": TEACHER.replace("epochs: 3", "epochs: 1") + """\
student: {model: net.py:make}
distill:
  {epochs: 2, batch_size: 57, optimizer: adamw, lr: 0.01, precision: fp32,
   objectives: [{name: hard}, {name: kd}, {name: hint}, {name: rkd}], target: live}
""",
    # the last batch of 3 is the first process's: of one image BatchNorm learns nothing
    "norm": """\
student:
  model: plain_cnn_small
  train: {epochs: 8, batch_size: 69, optimizer: adamw, lr: 0.01, precision: fp32}
""",
    "frozen": """\
student:
  model: plain_cnn_small
  weights: given.safetensors
  train:
    {epochs: 4, batch_size: 57, optimizer: adamw, lr: 0.003, precision: fp32, freeze_norm: true}
""",
}  # fmt: skip
MORE_DATA = {
    "unlabelled": "  unlabelled: {fraction: 0.3}\n",
    "frozen": "  preprocess: {channels: gray, max_value: 16, mean: [0.3], std: [0.4]}\n",
}


Process = subprocess.CompletedProcess[str]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The recipes, with what they name."""
    folder = tmp_path_factory.mktemp("torchrun")
    (folder / "net.py").write_text(NET)
    for name, text in RECIPES.items():
        common = COMMON.replace("quantize", MORE_DATA.get(name, "") + "quantize")
        (folder / f"{name}.yaml").write_text(common + text)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        save_file(plain_cnn_small(10, 1).state_dict(), folder / "given.safetensors")
    return folder


@pytest.fixture(scope="module")
def learnt(folder: Path) -> Path:
    """`one/RECIPE` and `two/RECIPE`: what one process and two have learnt from each recipe."""
    recipes = [f"{name}.yaml" for name in RECIPES]
    with ThreadPoolExecutor() as pool:
        one = pool.submit(call, [*ALONE, LEARN_MANY, "one", *recipes], folder)
        two = pool.submit(call, [*TORCHRUN, LEARN_MANY, "two", *recipes], folder)
    for done in (one.result(), two.result()):
        assert done.returncode == 0, done.stdout + done.stderr
        assert "arning" not in done.stderr
    return folder


@pytest.fixture(scope="module")
def killed(folder: Path) -> dict[str, Any]:
    """A run that lost its helper, went on, lost its leader, and went on to the end."""
    command = [*TORCHRUN, "-m", "edgestill", "run", "stored.yaml", "-o", "killed"]
    helper = killed_at(2, command, folder, victim="helper")
    leader = killed_at(4, command, folder, victim="leader")
    logs = ["--log-dir", "logs", "--redirects", "3"]
    command[len(TORCHRUN) : len(TORCHRUN)] = logs
    return {"helper": helper, "leader": leader, "end": call(command, folder)}


def call(command: list[Any], folder: Path) -> Process:
    return subprocess.run(
        [str(part) for part in command],
        cwd=folder, capture_output=True, text=True, timeout=300,
    )  # fmt: skip


def killed_at(epoch: int, command: list[str], folder: Path, *, victim: str) -> Process:
    """Run, and SIGKILL one of the two processes after that epoch of the student."""
    process = subprocess.Popen(
        [*command, "--log-json"],
        cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stdout is not None
    printed = ""
    for line in process.stdout:
        printed += line
        event = json.loads(line)
        if (event["kind"], event["stage"], event.get("epoch")) == ("epoch", "student", epoch):
            leader = int((folder / "killed/.edgestill/lock").read_text())
            (helper,) = {child for child in children_of(process.pid) if child != leader}
            os.kill(leader if victim == "leader" else helper, signal.SIGKILL)
            break
    rest, complaint = process.communicate(timeout=60)
    return subprocess.CompletedProcess(command, process.returncode, printed + rest, complaint)


def children_of(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def stage(folder: Path, name: str) -> Path:
    """The only result of a stage."""
    (found,) = (folder / ".edgestill" / "stages" / name).iterdir()
    return found


def measured(folder: Path, name: str = "student") -> dict[str, Any]:
    measurements = json.loads((stage(folder, name) / "outcome.json").read_text())["measurements"]
    assert isinstance(measurements, dict)
    return measurements


def weights(folder: Path, name: str = "student") -> dict[str, torch.Tensor]:
    return load_file(stage(folder, name) / "model.safetensors")


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


# of accuracies, seed to seed
SPREAD = 0.1
# float32 rounds sums of 44 + 45 and of 89 samples apart by some 1e-7 of a gradient; Adam divides
# by its running size, so that a weight whose gradient is all but 0 feels it most
CLOSE = {"rtol": 0.0, "atol": 5e-4}


@pytest.mark.parametrize(
    ("recipe", "name"),
    [("stored", "teacher"), ("stored", "student"), ("live", "student"), ("frozen", "student")],
)
def test_two_processes_learn_the_weights_that_one_learns(
    recipe: str, name: str, learnt: Path
) -> None:
    one, two = (weights(learnt / world / recipe, name) for world in ("one", "two"))

    assert one.keys() == two.keys()
    for tensor in one:
        torch.testing.assert_close(two[tensor], one[tensor], **CLOSE)


def test_the_weights_have_moved_much_further_than_they_differ(learnt: Path) -> None:
    given = load_file(learnt / "given.safetensors")
    after = weights(learnt / "two/frozen")

    moved = max(float((after[name] - given[name]).abs().max()) for name in given)

    assert moved > 100 * CLOSE["atol"]


def test_two_processes_store_the_labels_that_one_stores(learnt: Path) -> None:
    one, two = (stage(learnt / world / "stored", "labels") for world in ("one", "two"))

    assert sorted(path.name for path in one.iterdir()) == sorted(p.name for p in two.iterdir())
    assert sha256(one / "ids.npy") == sha256(two / "ids.npy")
    for view in range(3):
        mine, theirs = (np.load(folder / f"view-{view:04d}.npy") for folder in (one, two))
        # logits up to 10 or so in float16, of teachers that differ as above
        np.testing.assert_allclose(theirs, mine, rtol=0, atol=0.03)


def test_with_batch_norm_two_processes_learn_as_well_as_one(learnt: Path) -> None:
    one, two = (
        measured(learnt / world / "norm")["validation"]["accuracy"] for world in ("one", "two")
    )

    assert two == pytest.approx(one, abs=SPREAD)


@pytest.mark.parametrize("recipe", ["live", "unlabelled"])
def test_every_term_is_the_mean_over_all_processes(recipe: str, learnt: Path) -> None:
    one, two = (
        measured(learnt / world / recipe)["training"]["history"] for world in ("one", "two")
    )

    assert one[0]["terms"].keys() == two[0]["terms"].keys()
    if recipe == "live":
        for mine, theirs in zip(one, two, strict=True):
            assert theirs["terms"] == pytest.approx(mine["terms"], rel=1e-3)
            assert theirs["loss"] == pytest.approx(mine["loss"], rel=1e-3)


@pytest.mark.parametrize("victim", ["helper", "leader"])
def test_a_lost_process_ends_the_run_and_is_said_once(victim: str, killed: dict[str, Any]) -> None:
    done = killed[victim]

    assert done.returncode != 0
    said = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(said) == 1, done.stderr
    assert "lost one" in said[0] or "interrupted" in said[0]
    assert "the same command goes on from there" in said[0]
    assert "edgestill: this is a bug" not in done.stderr


def test_the_same_command_goes_on_to_the_bytes_of_a_run_never_killed(
    killed: dict[str, Any], learnt: Path
) -> None:
    assert killed["end"].returncode == 0, killed["end"].stdout + killed["end"].stderr

    student = measured(learnt / "killed")

    assert student["training"]["resumed_epoch"] >= 3  # an epoch is told before it is saved
    for name in ("teacher", "student"):
        assert sha256(stage(learnt / "killed", name) / "model.safetensors") == sha256(
            stage(learnt / "two/stored", name) / "model.safetensors"
        )


def test_only_the_first_process_speaks_and_publishes(killed: dict[str, Any], folder: Path) -> None:
    assert killed["end"].returncode == 0
    spoken = {
        path.parent.name + path.name: path.read_text() for path in folder.glob("logs/*/*/*/std*")
    }

    assert spoken["0stdout.log"].count("PASS: killed/model.onnx") == 1
    assert {name for name, text in spoken.items() if text} == {"0stdout.log"}
    assert not list((folder / "killed").rglob("*.part")) + list((folder / "killed").rglob("*.tmp"))
    assert {path.name for path in (folder / "killed").iterdir()} == {
        ".edgestill", "model.onnx", "model.fp32.onnx", "student.safetensors", "student.json",
        "recipe.yaml", "report.json", "report.md", "samples.parquet", "training.jsonl",
        "manifest.json",
    }  # fmt: skip


def test_an_impossible_gate_rejects(killed: dict[str, Any], folder: Path) -> None:
    assert killed["end"].returncode == 0
    shutil.copytree(folder / "killed", folder / "rejected")

    strict = ["--set", "gate.max_drop_points=0"]
    done = call(
        [*TORCHRUN, "-m", "edgestill", "run", "stored.yaml", "-o", "rejected", *strict], folder
    )

    assert done.returncode == 1  # torchrun's own, whatever a process ends with
    assert "recalled" in done.stdout
    assert (folder / "rejected/rejected.onnx").exists()
    assert not (folder / "rejected/model.onnx").exists()


@pytest.mark.parametrize(
    ("key", "message"),
    [
        ("student.train.batch_size=1", "batch_size: expected at least 4 samples, 2 for each of 2"),
        ("student.train.batchsize=8", "did you mean `batch_size`?"),
    ],
)
def test_an_error_of_all_processes_is_said_once(key: str, message: str, learnt: Path) -> None:
    command = [*TORCHRUN, "-m", "edgestill", "run", "norm.yaml", "-o", "two/norm", "--set", key]

    done = call(command, learnt)

    assert done.stderr.count("error: ") == done.stderr.count(message) == 1, done.stderr
    assert "exitcode  : 2 " in done.stderr
