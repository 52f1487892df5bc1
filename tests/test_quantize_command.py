"""`compress quantize` and `compress verify`: for people who come with an .onnx of their own."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from edgestill.pipeline.measure.machine import clips_int8
from onnx import TensorProto, helper, numpy_helper

WITHOUT_TORCH = """\
import sys

class NotInstalled:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "torch":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, NotInstalled())
from edgestill.pipeline.cli import entry
sys.exit(entry(sys.argv[1:]))
"""
FAST = ("--set", "profile=null")


@pytest.fixture
def net(small_run: Path, tmp_path: Path) -> Path:
    """A trained float net that says how its images are prepared."""
    path = tmp_path / "net.onnx"
    path.write_bytes((small_run / "model.fp32.onnx").read_bytes())
    return path


@pytest.fixture
def foreign(net: Path) -> Path:
    """The same from somebody else: it says nothing."""
    model = onnx.load(net)
    del model.metadata_props[:]
    onnx.save(model, net)
    return net


def without_torch(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-P", "-c", WITHOUT_TORCH, *map(str, arguments)],
        capture_output=True,
        text=True,
    )


@pytest.fixture(scope="module")
def done(
    small_run: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, subprocess.CompletedProcess[str]]:
    out = tmp_path_factory.mktemp("quantized") / "out"
    gate = ("--set", "gate.max_drop_points=20", "--set", "gate.min_int8_share=0.9")
    model = small_run / "model.fp32.onnx"
    return out, without_torch("quantize", model, "--data", "digits", "-o", out, *gate)


def test_a_float_file_is_quantized_proven_and_timed_without_torch(
    done: tuple[Path, subprocess.CompletedProcess[str]],
) -> None:
    out, process = done

    assert process.returncode == 0, process.stdout + process.stderr
    report = json.loads((out / "report.json").read_text())
    assert report["reference"] == "float"
    assert {model["role"] for model in report["models"]} == {"float", "int8"}
    assert {row["name"] for row in report["latency"]} == {"float", "int8"}
    assert [one["name"] for one in report["candidates"]] == ["int8", "float"]
    assert (out / "model.onnx").exists()
    assert not (out / "student.safetensors").exists()


def test_its_parity_ladder_starts_at_the_file_that_was_given(
    done: tuple[Path, subprocess.CompletedProcess[str]],
) -> None:
    report = json.loads((done[0] / "report.json").read_text())

    first, *others = report["parity"]
    assert first["rung"] == "exported, optimizations off"
    assert "as it was given" in first["note"]
    assert {"final float", "int8, optimizations on"} <= {rung["rung"] for rung in others}
    assert all(rung["passed"] for rung in report["parity"])


def test_the_share_of_int8_is_in_the_report(
    done: tuple[Path, subprocess.CompletedProcess[str]],
) -> None:
    report = json.loads((done[0] / "report.json").read_text())

    int8, floating = report["candidates"]
    assert int8["int8_share"] > 0.9
    assert floating["int8_share"] == 0
    (check,) = [c for c in report["verdict"]["checks"] if c["name"] == "min_int8_share"]
    assert check["value"] == int8["int8_share"]


def test_a_recipe_may_name_the_file_too(foreign: Path, tmp_path: Path, compress: Any) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        "data:\n  train: {path: digits}\n  test: {fraction: 0.4}\n"
        "  preprocess: {channels: gray, max_value: 16, mean: [0.3], std: [0.37]}\n"
        "student: {model: net.onnx}\nquantize: {targets: [x86-vnni]}\nprofile: null\n"
        "gate: {max_drop_points: 20}\n"
    )

    finished = compress("run", recipe, "-o", tmp_path / "out")

    # a CPU without VNNI clips such a file's sums: it cannot vouch for it, and says so
    clipped = "clips the sums of 8-bit weights" in finished.stdout
    assert clipped == clips_int8()
    assert finished.returncode in ((0, 1) if clipped else (0,)), finished.stdout + finished.stderr
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    (int8,) = [stage for stage in report["stages"] if stage["name"] == "int8"]
    assert int8["measurements"]["encoding"]["reduce_range"] is False


def test_how_images_are_prepared_is_not_guessed(foreign: Path, tmp_path: Path) -> None:
    process = without_torch("quantize", foreign, "--data", "digits", "-o", tmp_path / "out", *FAST)

    assert process.returncode == 2
    assert "--mean" in process.stderr


def refused(model: Path, tmp_path: Path) -> str:
    arguments = ("--data", "digits", "--mean", "0.3", "--std", "0.37", "-o", tmp_path / "out")
    channels = ("--set", "data.preprocess.channels=gray", "--set", "data.preprocess.max_value=16")
    process = without_torch("quantize", model, *arguments, *channels, *FAST)
    assert process.returncode == 2, process.stdout + process.stderr
    assert "Traceback" not in process.stderr
    assert not (tmp_path / "out" / "model.onnx").exists()
    return process.stderr


def test_a_file_that_is_quantized_already_is_refused(small_run: Path, tmp_path: Path) -> None:
    assert "is quantized already" in refused(small_run / "model.onnx", tmp_path)


def test_an_opset_without_scales_per_channel_is_refused(foreign: Path, tmp_path: Path) -> None:
    model = onnx.load(foreign)
    for entry in model.opset_import:
        entry.version = 12
    onnx.save(model, foreign)

    assert "opset 12" in refused(foreign, tmp_path)


def test_weights_outside_the_folder_are_refused(foreign: Path, tmp_path: Path) -> None:
    model = onnx.load(foreign)
    tensor = model.graph.initializer[0]
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value="../elsewhere.bin")
    foreign.write_bytes(model.SerializeToString())

    assert "may only read files beside itself" in refused(foreign, tmp_path)


def test_a_net_of_other_classes_is_refused(tmp_path: Path) -> None:
    weight = numpy_helper.from_array(np.ones((64, 3), np.float32), "w")
    shape = ["n", 1, 8, 8]
    graph = helper.make_graph(
        [
            helper.make_node("Flatten", ["input"], ["flat"]),
            helper.make_node("MatMul", ["flat", "w"], ["logits"]),
        ],
        "three",
        [helper.make_tensor_value_info("input", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["n", 3])],
        [weight],
    )
    path = tmp_path / "three.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)]), path)

    assert "expected logits of (N, 10)" in refused(path, tmp_path)


def test_a_file_that_is_no_onnx_or_not_there_is_refused(tmp_path: Path) -> None:
    junk = tmp_path / "junk.onnx"
    junk.write_bytes(b"not a model")

    assert "not an ONNX file" in refused(junk, tmp_path)
    assert "no such file" in refused(tmp_path / "none.onnx", tmp_path)


def test_verify_says_what_runs_in_int8_and_what_would_saturate(small_run: Path) -> None:
    process = without_torch("verify", small_run / "model.onnx", "--data", "digits")

    assert process.returncode == 0, process.stderr
    assert "int8 kernels: " in process.stdout
    assert "no pair sum" in process.stdout


def test_verify_of_a_float_file_finds_no_int8(small_run: Path) -> None:
    process = without_torch("verify", small_run / "model.fp32.onnx")

    assert process.returncode == 0, process.stderr
    assert "int8 kernels: 0.0%" in process.stdout
