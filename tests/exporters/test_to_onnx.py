from __future__ import annotations

import logging
import warnings

import numpy as np
import pytest
import torch
from edgestill.exporters.graph import read_model
from edgestill.exporters.reference import evaluating, logits_float32, logits_float64
from edgestill.exporters.sessions import open_session, run_batches
from edgestill.exporters.to_onnx import export_onnx
from edgestill.pipeline.errors import ExportError, ModelError
from torch import nn


class Tiny(nn.Module):
    def __init__(self):
        super().__init__()
        self.head = nn.Linear(3, 4)

    def forward(self, x):
        return self.head(x.mean((2, 3)))


class DependsOnData(Tiny):
    def forward(self, x):
        if x.sum() > 0:
            return super().forward(x)
        return super().forward(-x)


class UsesEigenvalues(nn.Module):
    def forward(self, x):
        return torch.linalg.eigvals(x[:, 0]).real


class FixesItsBatch(Tiny):
    def forward(self, x):
        return self.head(x.mean((2, 3)).reshape(2, 3))


class MakesItsOwnFloats(Tiny):
    def forward(self, x):
        return nn.functional.linear(x.mean((2, 3)), torch.ones(4, 3))


@pytest.fixture
def example():
    return torch.zeros(2, 3, 8, 8)


def test_exported_net_computes_what_torch_computes(net, exported, samples):
    expected = logits_float32(net, samples, batch_size=16)
    found = run_batches(open_session(exported, threads=1), samples, 16)
    # float32 sums of at most 72 products of order 1, in another order
    np.testing.assert_allclose(found, expected, atol=1e-4, rtol=1e-4)


def test_file_has_the_agreed_names_a_free_batch_and_no_paths(exported):
    model = read_model(exported)
    assert [v.name for v in model.graph.input] == ["input"]
    assert [v.name for v in model.graph.output] == ["logits"]
    assert model.graph.input[0].type.tensor_type.shape.dim[0].dim_param == "N"
    assert [(o.domain, o.version) for o in model.opset_import] == [("", 18)]
    assert [p.name for p in exported.parent.iterdir()] == [exported.name]
    assert b"/edgestill" not in exported.read_bytes()
    assert str(exported.parent).encode() not in exported.read_bytes()
    assert b".py" not in exported.read_bytes()


def test_every_modules_mode_is_restored(example, tmp_path):
    net = nn.Sequential(nn.Conv2d(3, 2, 1), nn.BatchNorm2d(2), nn.Flatten(), nn.Linear(128, 2))
    net.train()
    net[1].eval()
    export_onnx(net, example, tmp_path / "m.onnx", batch="dynamic")
    assert [part.training for part in net] == [True, False, True, True]


def test_modes_are_restored_after_a_failure():
    net = Tiny().train()
    with pytest.raises(IndexError), evaluating(net):
        net(torch.zeros(1))
    assert net.training
    assert net.head.training


@pytest.mark.parametrize("batch", [1, 3])
def test_a_fixed_batch_is_written_and_the_last_batch_is_filled_up(batch, tmp_path, samples):
    net = Tiny()
    export_onnx(net, torch.zeros(2, 3, 16, 16), tmp_path / "m.onnx", batch=batch)
    session = open_session(tmp_path / "m.onnx", threads=1)
    assert session.get_inputs()[0].shape == [batch, 3, 16, 16]
    found = run_batches(session, samples[:7], 64)
    assert found.shape == (7, 4)
    np.testing.assert_allclose(found, logits_float32(net, samples[:7], batch_size=7), atol=1e-5)


def test_export_says_nothing_and_leaves_logging_as_it_was(example, tmp_path, capfd):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        export_onnx(Tiny(), example, tmp_path / "m.onnx", batch="dynamic")
    assert capfd.readouterr() == ("", "")
    assert caught == []
    assert logging.root.manager.disable == 0


def test_data_dependent_control_flow_names_the_users_line(example, tmp_path, capfd):
    with pytest.raises(ExportError, match=r"test_to_onnx\.py:\d+ \(if x\.sum\(\) > 0:\).*depends"):
        export_onnx(DependsOnData(), example, tmp_path / "m.onnx", batch="dynamic")
    assert capfd.readouterr() == ("", "")
    assert not list(tmp_path.iterdir())


def test_a_missing_operator_is_named(example, tmp_path):
    with pytest.raises(ExportError, match=r"aten\.linalg_eig"):
        export_onnx(UsesEigenvalues(), example, tmp_path / "m.onnx", batch="dynamic")


def test_a_net_that_fixes_its_batch_is_refused_for_a_dynamic_one(example, tmp_path):
    with pytest.raises(ExportError, match="batch"):
        export_onnx(FixesItsBatch(), example, tmp_path / "m.onnx", batch="dynamic")
    export_onnx(FixesItsBatch(), example, tmp_path / "m.onnx", batch=2)


def test_a_net_with_two_outputs_is_refused(example, tmp_path):
    class Two(Tiny):
        def forward(self, x):
            return super().forward(x), x

    with pytest.raises(ExportError, match="one input and one output"):
        export_onnx(Two(), example, tmp_path / "m.onnx", batch="dynamic")


def test_a_fixed_program_is_exported_with_its_batch_and_no_other(tmp_path, samples):
    net = Tiny().eval()
    program = torch.export.export(net, (torch.zeros(2, 3, 16, 16),))
    path = tmp_path / "net.pt2"
    torch.export.save(program, path)
    program = torch.export.load(path)
    for batch in ("dynamic", 1):
        with pytest.raises(ExportError, match=r"fixed batch of 2.*export\.batch: 2"):
            export_onnx(program, torch.zeros(2, 3, 16, 16), tmp_path / "m.onnx", batch=batch)
    export_onnx(program, torch.zeros(2, 3, 16, 16), tmp_path / "m.onnx", batch=2)
    found = run_batches(open_session(tmp_path / "m.onnx", threads=1), samples[:5], 64)
    expected = logits_float32(program.module(), samples[:5], batch_size=2)
    np.testing.assert_allclose(found, expected, atol=1e-5)


@pytest.mark.parametrize("batch", ["dynamic", 3])
def test_a_program_with_a_free_batch_is_exported_either_way(batch, tmp_path, samples):
    shapes = ({0: torch.export.Dim("N")},)
    net = Tiny().eval()
    program = torch.export.export(net, (torch.zeros(2, 3, 16, 16),), dynamic_shapes=shapes)
    export_onnx(program, torch.zeros(2, 3, 16, 16), tmp_path / "m.onnx", batch=batch)
    session = open_session(tmp_path / "m.onnx", threads=1)
    size = session.get_inputs()[0].shape[0]
    assert isinstance(size, str) if batch == "dynamic" else size == batch
    found = run_batches(session, samples[:5], 5)
    np.testing.assert_allclose(found, logits_float32(net, samples[:5], batch_size=5), atol=1e-5)


def test_float64_that_is_impossible_says_why():
    inputs = np.zeros((2, 3, 8, 8), np.float32)
    logits, why = logits_float64(MakesItsOwnFloats(), inputs, batch_size=2)
    assert len(logits) == 0
    assert "float64" in why


def test_float64_leaves_the_module_in_float32(samples):
    net = Tiny()
    logits, why = logits_float64(net, samples[:3], batch_size=2)
    assert (logits.dtype, why) == (np.float64, "")
    assert net.head.weight.dtype == torch.float32


def test_an_input_of_the_wrong_size_is_a_model_error():
    with pytest.raises(ModelError, match="input size"):
        logits_float32(nn.Linear(3, 2), np.zeros((2, 3, 8, 9), np.float32), batch_size=2)
