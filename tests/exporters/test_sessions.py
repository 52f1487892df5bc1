from __future__ import annotations

import numpy as np
import onnx
import pytest
from edgestill.exporters.graph import read_model, refuse_escaping_data
from edgestill.exporters.sessions import open_session, pad_batch, run_batches
from edgestill.pipeline.errors import ExportError
from onnx import TensorProto


def test_a_missing_file_is_an_export_error(tmp_path):
    with pytest.raises(ExportError, match="no such file"):
        open_session(tmp_path / "none.onnx", threads=1)


@pytest.mark.parametrize("content", [b"", b"not a model", b"\x08\x08"])
def test_what_is_not_onnx_is_an_export_error(content, tmp_path):
    path = tmp_path / "m.onnx"
    path.write_bytes(content)
    with pytest.raises(ExportError, match="not an ONNX file"):
        open_session(path, threads=1)


def test_an_unknown_operator_is_an_export_error(raw, tmp_path, capfd):
    broken = onnx.ModelProto()
    broken.CopyFrom(raw)
    broken.graph.node[0].op_type = "Convolute"
    onnx.save(broken, tmp_path / "m.onnx")
    with pytest.raises(ExportError, match=r"cannot load it.*Convolute.*min_runtime"):
        open_session(tmp_path / "m.onnx", threads=1)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("location", ["/etc/passwd", "../other.data", "a/../../b", "C:\\w.data"])
def test_weights_outside_the_folder_are_refused(location, raw, tmp_path):
    model = onnx.ModelProto()
    model.CopyFrom(raw)
    tensor = model.graph.initializer[0]
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value=location)
    path = tmp_path / "m.onnx"
    path.write_bytes(model.SerializeToString())
    with pytest.raises(ExportError, match="may only read files beside"):
        open_session(path, threads=1)


def test_weights_beside_the_file_are_read(raw, tmp_path):
    model = onnx.ModelProto()
    model.CopyFrom(raw)
    path = tmp_path / "m.onnx"
    onnx.save(model, path, save_as_external_data=True, location="w.data", size_threshold=0)
    refuse_escaping_data(onnx.load(path, load_external_data=False), path)
    assert read_model(path).graph.initializer[0].raw_data == raw.graph.initializer[0].raw_data
    (tmp_path / "w.data").unlink()
    with pytest.raises(ExportError, match="external weights cannot be read"):
        read_model(path)


def test_a_wrong_input_shape_is_an_export_error(exported):
    session = open_session(exported, threads=1)
    with pytest.raises(ExportError, match=r"expected \['N', 3, 16, 16\], got \(2, 3, 9, 9\)"):
        run_batches(session, np.zeros((2, 3, 9, 9), np.float32), 2)


def test_no_samples_give_no_rows(exported, samples):
    assert run_batches(open_session(exported, threads=1), samples[:0], 4).shape == (0, 5)


def test_batch_size_changes_no_logit(exported, samples):
    session = open_session(exported, threads=1)
    whole = run_batches(session, samples[:9], 9)
    np.testing.assert_allclose(run_batches(session, samples[:9], 4), whole, atol=1e-5)


def test_a_batch_is_filled_up_with_its_last_sample():
    padded = pad_batch(np.array([[1], [2]]), 4)
    assert padded.ravel().tolist() == [1, 2, 2, 2]
