"""Golden bundles: written once, replayed with numpy and onnxruntime alone, and not forgeable by
accident."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from edgestill.pipeline.errors import OutputError
from edgestill.pipeline.recipe import PreprocessSpec
from edgestill.pipeline.verify.golden import make_bundle
from edgestill.pipeline.verify.replay import Tampered, Unusable, read_bundle, replay
from edgestill.pipeline.verify.samples import Set
from onnx import TensorProto, helper, numpy_helper
from PIL import Image

ONLY_NUMPY_AND_ONNXRUNTIME = """\
import sys

class NotInstalled:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("torch", "onnx", "scipy", "pyarrow", "PIL"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, NotInstalled())
from edgestill.pipeline.cli import entry
sys.exit(entry(sys.argv[1:]))
"""
HOW = PreprocessSpec(mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25))


def write_linear(path: Path, *, scale: float = 1.0) -> Path:
    """logits = W · pixels: a file whose answers a hand could compute."""
    weight = np.random.default_rng(0).normal(size=(48, 3)).astype(np.float32) * np.float32(scale)
    graph = helper.make_graph(
        [
            helper.make_node("Flatten", ["input"], ["flat"]),
            helper.make_node("MatMul", ["flat", "w"], ["logits"]),
        ],
        "linear",
        [helper.make_tensor_value_info("input", TensorProto.FLOAT, ["N", 3, 4, 4])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["N", 3])],
        [numpy_helper.from_array(weight, "w")],
    )
    opset = [helper.make_opsetid("", 18)]
    onnx.save(helper.make_model(graph, opset_imports=opset, ir_version=8), path)
    return path


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with model.onnx, images/ and bundle/."""
    folder = tmp_path_factory.mktemp("golden")
    rng = np.random.default_rng(0)
    for name in ("a", "b", "c"):
        (folder / "images" / name).mkdir(parents=True)
        for index in range(5):
            pixels = rng.integers(0, 256, (4, 4, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / "images" / name / f"{index}.png")
    model = write_linear(folder / "model.onnx")
    make_bundle(folder / "bundle", model, Set(folder / "images"), how=HOW, threads=1)
    return folder


@pytest.fixture
def copy(made: Path, tmp_path: Path) -> Path:
    """The bundle, to be changed."""
    target = tmp_path / "bundle"
    target.mkdir()
    for path in (made / "bundle").iterdir():
        (target / path.name).write_bytes(path.read_bytes())
    return target


def test_the_same_file_gives_the_same_bits(made: Path) -> None:
    found = replay(made / "model.onnx", made / "bundle")

    assert all(one["passed"] for one in found["rungs"])
    assert "bit-equal" in found["rungs"][-1]["note"]
    assert found["rungs"][-1]["n"] == 17  # 15 images, zeros and ones


def test_outputs_are_those_of_the_formula(made: Path) -> None:
    weight = numpy_helper.to_array(onnx.load(made / "model.onnx").graph.initializer[0])
    with np.load(made / "bundle" / "inputs.npz") as stored:
        pixels = stored["input"]

    outputs = np.load(made / "bundle" / "outputs.npy")

    np.testing.assert_allclose(outputs, pixels.reshape(len(pixels), -1) @ weight, rtol=1e-4)


def test_another_file_is_held_within_the_float_tolerance(made: Path, tmp_path: Path) -> None:
    near = write_linear(tmp_path / "near.onnx", scale=1 + 1e-6)
    far = write_linear(tmp_path / "far.onnx", scale=1.01)

    assert replay(near, made / "bundle")["rungs"][-1]["passed"]
    assert not replay(far, made / "bundle")["rungs"][-1]["passed"]


@pytest.mark.parametrize("name", ["inputs.npz", "outputs.npy", "labels.json", "replay.py"])
def test_a_changed_file_is_tampering(made: Path, copy: Path, name: str) -> None:
    content = (copy / name).read_bytes()
    (copy / name).write_bytes(content[:-1] + bytes([content[-1] ^ 1]))

    with pytest.raises(Tampered, match=name):
        replay(made / "model.onnx", copy)


def test_a_changed_or_missing_header_is_tampering(copy: Path) -> None:
    path = copy / "golden.json"
    document = json.loads(path.read_text())
    document["tolerance"]["noise"] = 1e9
    path.write_text(json.dumps(document))

    with pytest.raises(Tampered, match="was changed"):
        read_bundle(copy)
    path.write_text("{}")
    with pytest.raises(Tampered, match=r"is no golden\.json"):
        read_bundle(copy)
    path.unlink()
    with pytest.raises(Unusable, match="cannot be read"):
        read_bundle(copy)


def test_the_command_replays_without_onnx_and_exits_6_on_tampering(made: Path, copy: Path) -> None:
    def command(bundle: Path, *options: str) -> subprocess.CompletedProcess[str]:
        code = [sys.executable, "-P", "-c", ONLY_NUMPY_AND_ONNXRUNTIME]
        arguments = ["verify", str(made / "model.onnx"), "--reference", str(bundle), *options]
        return subprocess.run([*code, *arguments], capture_output=True, text=True)

    held = command(made / "bundle", "--json")
    (copy / "outputs.npy").write_bytes(b"")
    broken = command(copy)

    assert held.returncode == 0, held.stderr
    assert json.loads(held.stdout)["reference_kind"] == "golden"
    assert broken.returncode == 6
    assert "outputs.npy: changed" in broken.stderr


def test_a_board_replays_it_with_the_file_in_the_bundle(made: Path) -> None:
    script = [sys.executable, "-I", str(made / "bundle" / "replay.py")]
    done = subprocess.run([*script, str(made / "model.onnx")], capture_output=True, text=True)

    assert done.returncode == 0, done.stderr
    assert "bit-equal" in done.stdout


def test_a_folder_with_something_in_it_is_not_written_into(made: Path) -> None:
    with pytest.raises(OutputError, match="not empty"):
        make_bundle(made / "bundle", made / "model.onnx", Set(made / "images"), how=HOW, threads=1)


def test_a_model_with_other_inputs_is_said(made: Path, tmp_path: Path) -> None:
    model = onnx.load(made / "model.onnx")
    model.graph.input[0].name = model.graph.node[0].input[0] = "pixels"
    onnx.save(model, tmp_path / "m.onnx")

    rung = replay(tmp_path / "m.onnx", made / "bundle")["rungs"][-1]

    assert (rung["rung"], rung["passed"]) == ("signature", False)
    assert "it takes pixels; the bundle has input" in rung["note"]
