"""The export and int8 stages, on a network and data that are handed to them in memory."""

from __future__ import annotations

import json
from types import SimpleNamespace

import numpy as np
import onnx
import pytest
import torch
from edgestill.exporters.sessions import open_session, run_batches
from edgestill.pipeline import export as export_stage
from edgestill.pipeline.data.preprocess import to_input
from edgestill.pipeline.errors import ExportError
from edgestill.pipeline.quantize import ptq
from edgestill.pipeline.quantize import result as int8_result
from edgestill.pipeline.recipe import ExportSpec, PreprocessSpec, QuantizeSpec
from edgestill.pipeline.stage import Context, Silent
from torch import nn

PREPROCESS = PreprocessSpec(mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25))
CLASSES = ("ant", "bee", "größe")


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8)
        self.late, self.head = nn.BatchNorm2d(8), nn.Linear(8, 3)

    def forward(self, x):
        x = torch.relu(self.bn(self.conv(x)))
        return self.head(torch.relu(self.late(x + x.flip(3))).mean((2, 3)))


class Notes(Silent):
    def __init__(self):
        self.notes = []

    def note(self, text):
        self.notes.append(text)


@pytest.fixture
def net():
    torch.manual_seed(0)
    net = Net()
    with torch.no_grad():
        net(torch.randn(32, 3, 8, 8))
    return net


@pytest.fixture
def data(monkeypatch):
    rng = np.random.default_rng(0)
    coarse = rng.integers(0, 256, (80, 4, 4, 3), dtype=np.uint8)
    images = coarse.repeat(2, axis=1).repeat(2, axis=2)
    found = SimpleNamespace(
        train=SimpleNamespace(contents=images),
        validation=SimpleNamespace(contents=images[:30], labels=np.arange(30) % 3),
        calibration=np.arange(70)[::-1].copy(),
        preprocess=PREPROCESS,
        class_names=CLASSES,
    )
    opened = lambda folder, *, memory_budget_bytes: found  # noqa: E731
    monkeypatch.setattr(export_stage, "open_data", opened)
    monkeypatch.setattr(int8_result, "open_data", opened)
    return found


@pytest.fixture
def stored(net, monkeypatch):
    network = SimpleNamespace(network=SimpleNamespace(module=net))
    monkeypatch.setattr(export_stage, "load_network", lambda folder: network)


def context(scratch, events=None):
    scratch.mkdir()
    return Context(seed=0, threads=1, device="cpu", scratch=scratch, events=events or Silent())


def export(folder, spec=None, *, scratch="float", events=None):
    return export_stage.export_float(
        folder,
        folder,
        spec or ExportSpec(),
        context=context(folder / scratch, events),
        metadata={"edgestill.recipe_sha256": "abc"},
    )


def quantize(folder, spec=None):
    return ptq.quantize_static(
        folder / "float",
        folder,
        spec or QuantizeSpec(),
        context=context(folder / "int8"),
        export=ExportSpec(),
        memory_budget_bytes=0,
    )


@pytest.mark.usefixtures("stored", "data")
def test_export_leaves_two_files_and_measures_them(tmp_path):
    found = export(tmp_path)
    folder = tmp_path / "float"
    assert sorted(p.name for p in folder.iterdir()) == ["exported.onnx", "model.onnx"]
    assert found["bytes"] == (folder / "model.onnx").stat().st_size
    # Conv 216 + 8, late BatchNorm 8 + 8, Linear 24 + 3
    assert found["parameters"] == 267
    assert found["multiply_adds"] == 6 * 6 * 8 * 27 + 24
    assert (found["opset"], found["ir"], found["batch"]) == (18, 8, "dynamic")
    assert found["simplified"] is True
    assert "real samples" in found["simplify_reason"]
    assert "BatchNormalization" not in found["ops"]
    json.dumps(found, allow_nan=False)


@pytest.mark.usefixtures("stored")
def test_file_tells_how_to_use_it(data, tmp_path):
    export(tmp_path)
    entries = onnx.load(tmp_path / "float" / "model.onnx").metadata_props
    metadata = {entry.key: entry.value for entry in entries}
    assert [entry.key for entry in entries] == sorted(metadata)
    assert json.loads(metadata["edgestill.class_names"]) == list(CLASSES)
    assert json.loads(metadata["edgestill.preprocess"])
    assert metadata["edgestill.recipe_sha256"] == "abc"


@pytest.mark.usefixtures("stored", "data")
def test_int8_stage_quantizes_what_export_left(net, data, tmp_path):
    before = export(tmp_path)
    found = quantize(tmp_path)
    path = tmp_path / "int8" / "model.onnx"
    assert [p.name for p in path.parent.iterdir()] == ["model.onnx"]
    assert found["bytes"] == path.stat().st_size
    assert found["parameters"] == before["parameters"]
    assert found["multiply_adds"] == before["multiply_adds"]
    assert (found["calibration_samples"], found["calibrator"]) == (70, "minmax")
    assert found["encoding"]["reduce_range"] is True
    assert "VNNI" in found["encoding"]["reason"]
    assert found["counts"]["int8_weights"] == 2
    assert (
        onnx.load(path).metadata_props
        == onnx.load(tmp_path / "float" / "model.onnx").metadata_props
    )
    json.dumps(found, allow_nan=False)
    inputs = to_input(data.train.contents, PREPROCESS)
    net.eval()
    with torch.no_grad():
        expected = net(torch.from_numpy(np.ascontiguousarray(inputs))).numpy()
    logits = run_batches(open_session(path, threads=1), inputs, 16)
    # 7-bit weights and 8-bit activations of a three-layer net
    assert np.abs(logits - expected).max() < 0.1 * np.ptp(expected)


@pytest.mark.usefixtures("stored", "data")
def test_the_same_stage_twice_writes_the_same_bytes(tmp_path):
    export(tmp_path)
    export(tmp_path, scratch="again")
    for name in ("exported.onnx", "model.onnx"):
        first, second = ((tmp_path / f / name).read_bytes() for f in ("float", "again"))
        assert first == second


@pytest.mark.usefixtures("stored", "data")
def test_a_graph_that_was_not_simplified_is_told(tmp_path, monkeypatch):
    from edgestill.exporters import simplify

    monkeypatch.setattr(simplify, "run_onnxsim", lambda model: (None, "it crashed (SIGSEGV)"))
    events = Notes()
    found = export(tmp_path, events=events)
    assert found["simplified"] is False
    assert "SIGSEGV" in found["simplify_reason"]
    assert "SIGSEGV" in events.notes[0]


@pytest.mark.usefixtures("stored", "data")
def test_a_fixed_batch_goes_through_both_stages(tmp_path):
    found = export(tmp_path, ExportSpec(batch=1))
    assert found["batch"] == 1
    quantize(tmp_path, QuantizeSpec(targets=("arm",), calibrator="percentile"))
    session = open_session(tmp_path / "int8" / "model.onnx", threads=1)
    assert session.get_inputs()[0].shape == [1, 3, 8, 8]


@pytest.mark.usefixtures("data")
def test_a_program_is_exported_as_a_program(net, tmp_path, monkeypatch):
    program = torch.export.export(net.eval(), (torch.zeros(2, 3, 8, 8),))
    torch.export.save(program, tmp_path / "program.pt2")
    network = SimpleNamespace(network=SimpleNamespace(module=program.module()))
    monkeypatch.setattr(export_stage, "load_network", lambda folder: network)
    with pytest.raises(ExportError, match="fixed batch of 2"):
        export(tmp_path, scratch="refused")
    assert export(tmp_path, ExportSpec(batch=2))["batch"] == 2


@pytest.mark.usefixtures("stored")
def test_no_calibration_samples_are_an_error(data, tmp_path):
    data.calibration = data.calibration[:0]
    with pytest.raises(ExportError, match=r"data\.calibration"):
        export(tmp_path)
