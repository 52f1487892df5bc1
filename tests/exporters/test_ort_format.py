from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from edgestill.exporters.int8 import encoding_for, quantize
from edgestill.exporters.ort_format import open_ort, write_ort
from edgestill.exporters.rewrites import normalise
from edgestill.exporters.sessions import open_session, run_batches
from edgestill.exporters.stamp import stamp, write_model
from edgestill.pipeline.errors import ExportError
from edgestill.pipeline.mobile import held_against


@pytest.fixture(scope="module")
def int8(raw, samples, tmp_path_factory) -> Path:
    encoding = encoding_for(("arm", "x86"))
    found = quantize(normalise(raw), samples, encoding=encoding, calibrator="minmax", threads=1)
    path = tmp_path_factory.mktemp("int8") / "model.onnx"
    write_model(stamp(found.model, min_runtime="1.17", metadata={"edgestill.key": "v"}), path)
    return path


def test_the_ort_file_answers_as_the_onnx_file(int8, samples, tmp_path) -> None:
    write_ort(int8, tmp_path / "model.ort")

    expected = run_batches(open_session(int8, threads=1), samples, 8)
    found = run_batches(open_ort(tmp_path / "model.ort", threads=1), samples, 8)

    assert held_against(expected, found, quantized=True)["n"] == len(samples)


def test_metadata_goes_along(int8, tmp_path) -> None:
    write_ort(int8, tmp_path / "model.ort")

    about = open_ort(tmp_path / "model.ort", threads=1).get_modelmeta().custom_metadata_map

    assert about["edgestill.key"] == "v"


def test_the_operators_are_those_of_int8_kernels_and_no_layout_of_this_cpu(
    int8, exported, tmp_path
) -> None:
    quantized = write_ort(int8, tmp_path / "model.ort").read_text()
    floating = write_ort(exported, tmp_path / "float.ort").read_text()

    assert "QLinearConv" in quantized
    assert "Conv" in floating
    assert "nchwc" not in quantized + floating


def test_nothing_of_this_machine_is_written_into_either_file(int8, tmp_path) -> None:
    config = write_ort(int8, tmp_path / "model.ort")

    for path in (tmp_path / "model.ort", config):
        assert str(tmp_path).encode() not in path.read_bytes()


def test_two_files_are_left_and_nothing_is_printed(int8, tmp_path, capfd) -> None:
    write_ort(int8, tmp_path / "model.ort")

    assert {path.name for path in tmp_path.iterdir()} == {
        "model.ort", "model.required_operators.config",
    }  # fmt: skip
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("content", [b"", b"no model", b"\x18\x00\x00\x00ORTM broken"])
def test_what_is_no_ort_file_is_refused(content, tmp_path) -> None:
    (tmp_path / "model.ort").write_bytes(content)

    with pytest.raises(ExportError, match=r"model\.ort"):
        open_ort(tmp_path / "model.ort", threads=1)


def test_an_onnx_file_under_another_name_is_refused(int8, tmp_path) -> None:
    (tmp_path / "model.ort").write_bytes(int8.read_bytes())

    with pytest.raises(ExportError, match="not in ORT format"):
        open_ort(tmp_path / "model.ort", threads=1)


def test_other_classes_in_the_ort_file_are_refused_however_near_the_logits_are() -> None:
    logits = np.tile(np.array([1.0, 1.001, 0.5], np.float32), (64, 1))

    with pytest.raises(ExportError, match=r"0\.0% in the same class"):
        held_against(logits, logits[:, [1, 0, 2]], quantized=True)


def test_a_missing_ort_file_is_refused(tmp_path) -> None:
    with pytest.raises(ExportError, match="cannot be read"):
        open_ort(tmp_path / "model.ort", threads=1)


@pytest.mark.parametrize("quantized", [True, False])
def test_another_network_in_the_ort_file_is_refused(quantized) -> None:
    logits = np.random.default_rng(0).normal(size=(64, 5)).astype(np.float32)

    with pytest.raises(ExportError, match="does not answer"):
        held_against(logits, logits[::-1], quantized=quantized)


def test_nan_in_the_ort_files_answers_is_refused() -> None:
    logits = np.ones((4, 5), np.float32)

    with pytest.raises(ExportError, match="NaN"):
        held_against(logits, logits * np.nan, quantized=True)
