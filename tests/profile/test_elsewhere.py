"""Other machines in a run and in `verify`: the answers they give, their times, and who refuses."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jsonschema
import numpy as np
import pytest
from edgestill.pipeline.verify.task import elsewhere_rung

# What is asked for beyond the recipe of `small_run`.
WISHES = (
    "profile.devices=[pi]", "gate.min_cpu_agreement=0.98",
    "gate.devices={pi: {max_peak_rss_bytes: 1000000000}}",
)  # fmt: skip
# As `onnxruntime`, before the real one: every answer has its sign turned.
WRONG = """\
import importlib, sys
sys.path.remove({folder!r})
del sys.modules["onnxruntime"]
real = importlib.import_module("onnxruntime")
class InferenceSession(real.InferenceSession):
    def run(self, *arguments):
        return [-output for output in super().run(*arguments)]
real.InferenceSession = InferenceSession
"""


@pytest.fixture(scope="module")
def place(
    loopback, small_run: Path, small_recipe: Path, tmp_path_factory: pytest.TempPathFactory
) -> SimpleNamespace:
    """`.board(python)` writes `.folder`'s devices.yaml; `.run` are the words of the command, up to
    its output folder; `.out` is one that has all stages but the proof already."""
    folder = tmp_path_factory.mktemp("elsewhere")
    recipe, out = folder / "recipe.yaml", folder / "out"
    shutil.copyfile(small_recipe, recipe)
    shutil.copytree(small_run, out)

    def board(python: str) -> None:
        device = {"kind": "ssh", "host": "board", "python": python,
                  "ssh_config": str(loopback.config)}  # fmt: skip
        (folder / "devices.yaml").write_text(json.dumps({"devices": {"pi": device}}))

    run = ["run", recipe, *(word for wish in WISHES for word in ("--set", wish)), "-o"]
    return SimpleNamespace(folder=folder, out=out, board=board, run=run)


@pytest.fixture
def wrong_python(tmp_path: Path) -> str:
    (tmp_path / "onnxruntime.py").write_text(WRONG.format(folder=str(tmp_path)))
    program = tmp_path / "python"
    program.write_text(f'#!/bin/sh\nPYTHONPATH={tmp_path} exec {sys.executable} "$@"\n')
    program.chmod(0o755)
    return str(program)


def report_of(folder: Path) -> Any:
    return json.loads((folder / "report.json").read_text())


def test_a_board_answers_in_a_run_is_timed_there_and_judged(
    place: SimpleNamespace, loopback, compress
) -> None:
    place.board(sys.executable)

    done = compress(*place.run, place.out, cwd=place.folder.parent)

    assert done.returncode == 0, done.stdout + done.stderr
    report = report_of(place.out)
    (agreement,) = report["agreements"]
    assert (agreement["cpu"], agreement["same_class"]) == ("pi", agreement["n"])
    assert agreement["n"] > 700
    (rung,) = [one for one in report["parity"] if one["rung"] == "on pi"]
    assert rung["passed"]
    there = {row["name"]: row for row in report["latency"] if row["device"] == "pi"}
    assert set(there) == {"teacher-onnx", report["deployed"]}
    assert {row["measured_on"] for row in there.values()} == {"target"}
    assert report["environment"]["devices"]["pi"]["int8_kernels"]
    assert "PASS         min_cpu_agreement: pi puts" in done.stdout
    assert "devices.pi.max_peak_rss_bytes" in done.stdout
    assert "| pi |" in (place.out / "report.md").read_text()
    assert compress("gate", place.out).returncode == 0
    assert loopback.left_behind() == []


def test_a_board_that_answers_otherwise_fails_the_run_and_has_no_times(
    place: SimpleNamespace, wrong_python: str, compress
) -> None:
    place.board(wrong_python)

    done = compress(*place.run, place.out)

    report = report_of(place.out)
    assert done.returncode == 1, done.stdout + done.stderr
    assert "on pi" in next(line for line in done.stdout.splitlines() if "parity" in line)
    assert report["agreements"][0]["same_class"] < report["agreements"][0]["n"] / 2
    assert {row["device"] for row in report["latency"]} == {"local"}
    assert not (place.out / "model.onnx").exists()


def test_verify_asks_a_board_too(
    place: SimpleNamespace, wrong_python: str, compress, small_run: Path
) -> None:
    command = ["verify", small_run / "model.onnx", "--reference", small_run, "--data", "digits",
               "--device", "pi"]  # fmt: skip

    place.board(sys.executable)
    good = compress(*command, "--json", cwd=place.folder)
    place.board(wrong_python)
    bad = compress(*command, cwd=place.folder)

    assert good.returncode == 0, good.stdout + good.stderr
    record = json.loads(good.stdout)
    assert [one["passed"] for one in record["rungs"] if one["rung"] == "on pi"] == [True]
    jsonschema.validate(record, json.loads(compress("schema", "verify").stdout))
    assert bad.returncode == 1, bad.stdout + bad.stderr
    assert "the difference enters at: on pi" in bad.stdout


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ("profile.devices=[pi5]", "device 'pi5': expected one of local"),
        ("profile.devices=[no name]", "profile.devices"),
        ("gate.min_cpu_agreement=0.9", "name one in `profile.devices`"),
        ("gate.devices={pi: {max_p90_ms: 1}}", "gate.devices.pi: would never be measured"),
    ],
)
def test_what_no_machine_could_show_is_refused_before_anything_is_made(
    setting: str, said: str, tmp_path: Path, compress, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))

    done = compress("run", "digits", "-o", tmp_path / "out", "--set", setting, cwd=tmp_path)

    assert done.returncode == 2, done.stdout + done.stderr
    assert said in done.stderr
    assert not list((tmp_path / "out").glob(".edgestill/stages/*"))


def test_a_board_without_python_or_out_of_reach_ends_the_run_before_training(
    place: SimpleNamespace, tmp_path: Path, compress
) -> None:
    place.board("/no/such/python")

    done = compress(*place.run, tmp_path / "out")

    assert done.returncode == 5, done.stdout + done.stderr
    assert "install Python 3.9" in done.stderr
    assert not list((tmp_path / "out").glob(".edgestill/stages/*"))


def test_float_answers_of_two_cpus_are_held_to_floats_tolerance_int8_to_the_answer() -> None:
    here = np.random.default_rng(0).normal(size=(100, 5)).astype(np.float32)
    near = here + np.float32(1e-5)
    off = here + np.float32(0.01)

    assert elsewhere_rung("b", here, near, noise=None).passed
    assert not elsewhere_rung("b", here, off, noise=None).passed
    assert elsewhere_rung("b", here, off, noise=0.1).passed
    assert not elsewhere_rung("b", here, -here, noise=0.1).passed
    assert not elsewhere_rung("b", here, here * np.float32("nan"), noise=0.1).passed


def test_a_file_that_is_broken_here_does_not_excuse_what_it_answers_elsewhere() -> None:
    """A file that saturates on this CPU alone: its error here is no noise of int8."""
    rng = np.random.default_rng(0)
    there = rng.normal(size=(1000, 10)).astype(np.float32)
    here = there + rng.normal(size=there.shape).astype(np.float32)

    assert not elsewhere_rung("b", here, there, noise=1.0).passed
