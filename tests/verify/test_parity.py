from __future__ import annotations

import itertools
import json

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from edgestill.exporters.graph import read_model
from edgestill.exporters.int8 import encoding_for, quantize
from edgestill.exporters.rewrites import normalise
from edgestill.exporters.stamp import write_model
from edgestill.exporters.to_onnx import export_onnx
from edgestill.pipeline.errors import ExportError
from edgestill.pipeline.verify import parity
from edgestill.pipeline.verify.parity import climb_ladder
from onnx import numpy_helper
from torch import nn

KEYS = {"rung", "reference", "n", "max_abs", "tolerance", "sqnr_db", "cosine", "top1_agreement",
        "passed", "note"}  # fmt: skip


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.bn = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.body, self.head = nn.Conv2d(8, 8, 3, padding=1), nn.Linear(8, 4)

    def forward(self, x):
        x = torch.relu(self.bn(self.stem(x)))
        return self.head(torch.relu(x + self.body(x)).mean((2, 3)))


class FixesFloats(Net):
    def forward(self, x):
        return super().forward(x) + nn.functional.linear(x.mean((2, 3)), torch.zeros(4, 3))


@pytest.fixture(scope="module")
def samples():
    rng = np.random.default_rng(0)
    coarse = rng.normal(size=(64, 3, 4, 4)).astype(np.float32)
    return np.kron(coarse, np.ones((1, 1, 3, 3), np.float32))  # patches, (64, 3, 12, 12)


def trained_a_little(net, samples):
    torch.manual_seed(0)
    nn.init.normal_(net.head.weight, std=3.0)
    with torch.no_grad():
        for _ in range(20):
            net(torch.from_numpy(samples))
    return net


def write_all(net, samples, folder, *, batch="dynamic"):
    """exported.onnx, float.onnx and int8.onnx of the net."""
    export_onnx(net, torch.from_numpy(samples[:2]), folder / "exported.onnx", batch=batch)
    floating = normalise(read_model(folder / "exported.onnx"))
    write_model(floating, folder / "float.onnx")
    encoding = encoding_for(("arm", "x86"))
    found = quantize(floating, samples, encoding=encoding, calibrator="minmax", threads=1)
    write_model(found.model, folder / "int8.onnx")


@pytest.fixture(scope="module")
def built(samples, tmp_path_factory):
    torch.manual_seed(0)
    net = trained_a_little(Net(), samples)
    folder = tmp_path_factory.mktemp("nets")
    write_all(net, samples, folder)
    return net, folder


def climb(net, folder, samples, **files):
    paths = {
        name: folder / f"{stem}.onnx"
        for name, stem in (("exported", "exported"), ("final_float", "float"), ("int8", "int8"))
    }
    return climb_ladder(net, **{**paths, **files}, inputs=samples, threads=1)


def changed(source, target, name, change):
    """A copy of an ONNX file with one initializer changed."""
    model = onnx.load(source)
    tensor = next(t for t in model.graph.initializer if t.name == name)
    value = change(numpy_helper.to_array(tensor).copy())
    tensor.CopyFrom(numpy_helper.from_array(value, name))
    onnx.save(model, target)
    return target


def failed(rungs):
    return [rung["rung"] for rung in rungs if not rung["passed"]]


def test_every_rung_of_a_faithful_chain_holds(built, samples):
    rungs = climb(*built, samples)
    assert failed(rungs) == []
    assert [rung["rung"] for rung in rungs] == [
        "torch float32",
        "exported, optimizations off",
        "exported, optimizations on",
        "final float",
        "int8, optimizations off",
        "int8, optimizations on",
        "final float, batch 2",
        "final float, batch 7",
        "int8, batch 2",
        "int8, batch 7",
    ]
    assert all(set(rung) == KEYS for rung in rungs)
    assert all(rung["n"] == 66 for rung in rungs)  # 64 real samples, zeros and ones
    assert all("torch float64" in rung["note"] for rung in rungs[1:6])
    json.dumps(rungs, allow_nan=False)


def test_each_rung_is_held_against_the_one_above(built, samples):
    rungs = climb(*built, samples)
    for above, rung in itertools.pairwise(rungs[:6]):
        assert rung["reference"] == above["rung"]


def test_without_int8_its_rungs_are_absent(built, samples):
    rungs = climb(*built, samples, int8=None)
    assert failed(rungs) == []
    assert not [rung for rung in rungs if "int8" in rung["rung"]]


def test_a_wrong_weight_fails_the_rung_where_it_came_in(built, samples, tmp_path):
    net, folder = built
    broken = changed(
        folder / "float.onnx", tmp_path / "f.onnx", "head.bias", lambda b: b + np.float32(0.05)
    )
    rungs = climb(net, folder, samples, final_float=broken)
    assert failed(rungs) == ["final float"]


def test_nan_fails_every_rung_that_meets_it(built, samples, tmp_path):
    net, folder = built
    broken = changed(
        folder / "float.onnx", tmp_path / "f.onnx", "head.bias", lambda b: b * np.float32("nan")
    )
    rungs = climb(net, folder, samples, final_float=broken)
    assert failed(rungs)[:2] == ["final float", "int8, optimizations off"]
    final = next(rung for rung in rungs if rung["rung"] == "final float")
    assert final["max_abs"] is None
    assert "NaN" in final["note"]
    json.dumps(rungs, allow_nan=False)


def test_another_number_of_classes_fails(built, samples, tmp_path):
    net, folder = built
    torch.manual_seed(0)
    other = Net()
    other.head = nn.Linear(8, 5)
    export_onnx(other, torch.from_numpy(samples[:2]), tmp_path / "o.onnx", batch="dynamic")
    rungs = climb(net, folder, samples, final_float=tmp_path / "o.onnx", int8=None)
    assert failed(rungs) == ["final float"]
    assert "shape" in next(r for r in rungs if not r["passed"])["note"]


def test_nothing_to_compare_is_a_failed_rung(built, samples):
    rungs = climb(*built, samples[:0])
    assert [(rung["passed"], rung["n"]) for rung in rungs] == [(False, 0)]


def test_few_samples_are_said(built, samples):
    assert "only 3 real samples" in climb(*built, samples[:3])[0]["note"]


def test_a_missing_file_is_an_error_not_a_skipped_rung(built, samples, tmp_path):
    with pytest.raises(ExportError, match="no such file"):
        climb(*built, samples, int8=tmp_path / "none.onnx")


def test_a_net_without_float64_has_float32_as_its_root(samples, tmp_path):
    torch.manual_seed(0)
    net = trained_a_little(FixesFloats(), samples)
    write_all(net, samples, tmp_path)
    rungs = climb(net, tmp_path, samples)
    assert failed(rungs) == []
    assert rungs[0]["reference"] == "itself"
    assert "does not run in float64" in rungs[0]["note"]
    assert "torch float32" in rungs[1]["note"]


def test_a_program_with_a_fixed_batch_is_climbed_at_that_batch(built, samples, tmp_path):
    net, _ = built
    program = torch.export.export(net.eval(), (torch.from_numpy(samples[:2]),))
    write_all(program, samples, tmp_path, batch=2)
    rungs = climb(program.module(), tmp_path, samples)
    assert failed(rungs) == []
    assert not [rung for rung in rungs if "batch" in rung["rung"]]


def test_an_unstable_net_fails_its_own_first_rung(built, samples):
    class Cancels(nn.Module):
        """(x + 1e8) - 1e8: exact in float64, off by up to 4 in float32."""

        def forward(self, x):
            return (x.mean((2, 3)) + 1e8) - 1e8

    _, folder = built
    rungs = climb(Cancels(), folder, samples, int8=None)
    assert rungs[0]["rung"] in failed(rungs)


@pytest.mark.parametrize(
    ("n", "flips", "passed"), [(66, 2, True), (66, 3, False), (1000, 20, True), (1000, 21, False)]
)
def test_int8_kernels_may_disagree_on_two_percent_and_by_chance_on_two(n, flips, passed):
    reference = np.tile([1.0, 0.0], (n, 1))
    found = reference.copy()
    found[:flips] = found[:flips, ::-1]
    rung = parity.same_answers("on", "off", reference, found, noise=0.5)
    assert rung["passed"] is passed
    assert f"{flips} answers differ" in rung["note"]


def test_ties_closer_than_int8s_noise_are_no_answers():
    reference, found = np.tile([1.0, 0.0], (66, 1)), np.tile([0.0, 1.0], (66, 1))
    assert parity.same_answers("on", "off", reference, found, noise=0.8)["passed"]
    assert not parity.same_answers("on", "off", reference, found, noise=0.6)["passed"]


def test_int8_that_computes_something_else_fused_fails(built, samples, monkeypatch):
    """What a saturating kernel would do: optimized logits far from the unoptimized ones."""
    net, folder = built
    run = parity.run_batches

    def shuffled(session, inputs, batch_size):
        logits = run(session, inputs, batch_size)
        on = session.get_session_options().graph_optimization_level
        is_int8 = "int8" in session._model_path
        fused = on == ort.GraphOptimizationLevel.ORT_ENABLE_ALL
        return np.roll(logits, 1, axis=1) if is_int8 and fused else logits

    monkeypatch.setattr(parity, "run_batches", shuffled)
    assert failed(climb(net, folder, samples)) == ["int8, optimizations on"]
