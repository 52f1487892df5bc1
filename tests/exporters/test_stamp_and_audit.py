from __future__ import annotations

import numpy as np
import onnx
import pytest
from edgestill.exporters.audit import (
    audit,
    count_parameters,
    initializer_bytes,
    multiply_adds,
    op_counts,
)
from edgestill.exporters.stamp import ir_version, stamp, write_model
from edgestill.pipeline.errors import ExportError, MeasurementError, OutputError
from onnx import TensorProto, helper, numpy_helper


@pytest.mark.parametrize(
    ("runtime", "ir"),
    [("1.14", 8), ("1.17", 8), ("1.17.3", 8), ("1.18", 10), ("1.32.0", 10), ("2.0", 10)],
)
def test_ir_follows_the_oldest_runtime(runtime, ir):
    assert ir_version(runtime) == ir


def test_a_runtime_before_opset_18_is_refused():
    with pytest.raises(ExportError, match=r"1\.13 is older than 1\.14"):
        ir_version("1.13")


def test_stamped_file_carries_only_what_was_asked(raw):
    dirty = onnx.ModelProto()
    dirty.CopyFrom(raw)
    dirty.opset_import.add(domain="com.microsoft.nchwc", version=1)
    dirty.opset_import.add(domain="ai.onnx.ml", version=5)
    dirty.producer_name, dirty.producer_version, dirty.domain = "torch", "2", "here"
    dirty.doc_string = "/home/me/model.py"
    dirty.metadata_props.add(key="tool", value="/home/me")
    dirty.graph.doc_string = "/home/me"
    for message in (
        dirty.graph,
        dirty.graph.node[0],
        dirty.graph.input[0],
        dirty.graph.initializer[0],
    ):
        message.doc_string = "/home/me"
        message.metadata_props.add(key="path", value="/home/me")
    clean = stamp(dirty, min_runtime="1.17", metadata={"b": "2", "a": "1"})
    assert b"/home/me" not in clean.SerializeToString()
    assert (clean.producer_name, clean.producer_version, clean.domain) == ("", "", "")
    assert [(o.domain, o.version) for o in clean.opset_import] == [("", 18)]
    assert [(p.key, p.value) for p in clean.metadata_props] == [("a", "1"), ("b", "2")]
    assert clean.ir_version == 8
    assert dirty.producer_name == "torch"  # the argument is not changed
    assert stamp(clean, min_runtime="1.17", metadata={"a": "1", "b": "2"}) == clean


def test_a_domain_in_use_is_kept(raw):
    model = onnx.ModelProto()
    model.CopyFrom(raw)
    model.graph.node[0].domain = "com.microsoft"
    with pytest.raises(ExportError, match=r"com\.microsoft"):
        stamp(model, min_runtime="1.17", metadata={})
    model.opset_import.add(domain="com.microsoft", version=1)
    clean = stamp(model, min_runtime="1.17", metadata={})
    assert [o.domain for o in clean.opset_import] == ["", "com.microsoft"]


def test_a_newer_opset_is_refused(raw):
    model = onnx.ModelProto()
    model.CopyFrom(raw)
    model.opset_import[0].version = 21
    with pytest.raises(ExportError, match="opset 21"):
        stamp(model, min_runtime="1.17", metadata={})


def test_a_write_replaces_the_file_and_leaves_no_other(raw, tmp_path):
    path = tmp_path / "m.onnx"
    path.write_bytes(b"old")
    write_model(raw, path)
    assert onnx.load(path) == raw
    assert [p.name for p in tmp_path.iterdir()] == ["m.onnx"]


def test_a_write_that_fails_leaves_the_old_file(raw, tmp_path):
    (tmp_path / "file").write_bytes(b"old")
    with pytest.raises(OutputError, match="cannot be written"):
        write_model(raw, tmp_path / "file" / "m.onnx")
    assert (tmp_path / "file").read_bytes() == b"old"


def hand_counted():
    """Conv 3→4 groups 1 3×3 stride 2 on 8×8 → Conv depthwise 4 → MatMul 4 → 5 → Gemm 5 → 2."""
    rng = np.random.default_rng(0)
    constants = {
        "w1": rng.normal(size=(4, 3, 3, 3)),
        "b1": rng.normal(size=4),
        "w2": rng.normal(size=(4, 1, 3, 3)),
        "w3": rng.normal(size=(4, 5)),
        "w4": rng.normal(size=(2, 5)),
        "low": np.array(0.0),
        "high": np.array(6.0),
    }
    nodes = [
        helper.make_node("Conv", ["input", "w1", "b1"], ["a"], strides=[2, 2], pads=[1, 1, 1, 1]),
        helper.make_node("Clip", ["a", "low", "high"], ["b"]),
        helper.make_node("Conv", ["b", "w2"], ["c"], group=4, pads=[1, 1, 1, 1]),
        helper.make_node("GlobalAveragePool", ["c"], ["d"]),
        helper.make_node("Reshape", ["d", "shape"], ["e"]),
        helper.make_node("MatMul", ["e", "w3"], ["f"]),
        helper.make_node("Gemm", ["f", "w4"], ["logits"], transB=1),
    ]
    stored = [numpy_helper.from_array(v.astype(np.float32), k) for k, v in constants.items()]
    stored.append(numpy_helper.from_array(np.array([-1, 4], np.int64), "shape"))
    return helper.make_model(
        helper.make_graph(
            nodes,
            "g",
            [helper.make_tensor_value_info("input", TensorProto.FLOAT, ["N", 3, 8, 8])],
            [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["N", 2])],
            stored,
        ),
        opset_imports=[helper.make_opsetid("", 18)],
        ir_version=8,
    )


def test_counts_equal_the_hand_worked_ones():
    model = hand_counted()
    # 108 + 4 + 36 + 20 + 10; the Clip's bounds and the shape are not learnt
    assert count_parameters(model) == 178
    # Conv 4·4·4 outputs · 27, depthwise 64 · 9, MatMul 5 · 4, Gemm 2 · 5
    assert multiply_adds(model) == 64 * 27 + 64 * 9 + 20 + 10
    assert initializer_bytes(model) == {"float32": 4 * (178 + 2), "int64": 16}
    assert op_counts(model)["Conv"] == 2
    figures = audit(model)
    assert (figures["opset"], figures["ir"]) == (18, 8)


def test_multiply_adds_of_a_fixed_batch_are_those_of_one_sample():
    model = hand_counted()
    for value in (model.graph.input[0], model.graph.output[0]):
        value.type.tensor_type.shape.dim[0].dim_value = 4
    assert multiply_adds(model) == multiply_adds(hand_counted())


def test_a_free_image_size_cannot_be_counted():
    model = hand_counted()
    model.graph.input[0].type.tensor_type.shape.dim[2].dim_param = "H"
    with pytest.raises(MeasurementError, match="static shape"):
        multiply_adds(model)
