from __future__ import annotations

import json

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from edgestill.exporters.engagement import as_text, engagement
from edgestill.exporters.int8 import encoding_for, quantize
from edgestill.exporters.optimized import node_microseconds
from edgestill.exporters.rewrites import normalise
from edgestill.exporters.stamp import stamp, write_model
from edgestill.exporters.unfused import View, why_float
from edgestill.pipeline.errors import ExportError, MeasurementError
from onnx import TensorProto, helper, numpy_helper

# multiply-adds of conftest's SmallNet at 16 px, worked by hand
SMALL_NET = {
    "stem": 16 * 16 * 8 * 3 * 9,
    "depth": 16 * 16 * 8 * 9,
    "point": 16 * 16 * 8 * 8,
    "down": 7 * 7 * 16 * 8 * 9,
    "head": 16 * 5,
}


@pytest.fixture(scope="module")
def floating(raw, tmp_path_factory):
    path = tmp_path_factory.mktemp("float") / "float.onnx"
    write_model(stamp(normalise(raw), min_runtime="1.17", metadata={}), path)
    return path


@pytest.fixture(scope="module")
def int8(raw, samples, tmp_path_factory):
    encoding = encoding_for(("arm", "x86"))
    found = quantize(normalise(raw), samples, encoding=encoding, calibrator="minmax", threads=1)
    path = tmp_path_factory.mktemp("int8") / "int8.onnx"
    write_model(stamp(found.model, min_runtime="1.17", metadata={}), path)
    return path


class Chain:
    """A QDQ graph (N, 4, 6, 6) → … → output, written node by node."""

    def __init__(self, opset: int = 18) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.stored: list[TensorProto] = []
        self.opset = opset
        self.last = "input"

    def add(self, op: str, *more: str, **attributes: object) -> Chain:
        output = f"{op}_{len(self.nodes)}_out"
        name = f"{op}_{len(self.nodes)}"
        self.nodes.append(helper.make_node(op, [self.last, *more], [output], name, **attributes))
        self.last = output
        return self

    def store(self, name: str, values: np.ndarray) -> str:
        self.stored.append(numpy_helper.from_array(values, name))
        return name

    def qdq(self, kind: type = np.uint8) -> Chain:
        tag = f"q{len(self.nodes)}"
        scale = self.store(f"{tag}_scale", np.float32(0.05))
        zero = self.store(f"{tag}_zero", np.array(0, kind))
        self.add("QuantizeLinear", scale, zero)
        return self.add("DequantizeLinear", scale, zero)

    def conv(self, *, weight: type | None = np.int8, bias: type | None = np.int32) -> Chain:
        tag = f"conv{len(self.nodes)}"
        inputs = [self._constant(f"{tag}_w", (4, 4, 3, 3), weight, 0.01)]
        if bias is not None:
            inputs.append(self._constant(f"{tag}_b", (4,), bias, 0.0005))
        return self.add("Conv", *inputs, pads=[1, 1, 1, 1])

    def _constant(self, name: str, shape: tuple, kind: type | None, scale: float) -> str:
        values = np.random.default_rng(0).integers(-60, 60, shape)
        if kind is None or kind is np.float32:
            return self.store(name, (values * scale).astype(np.float32))
        if kind is np.uint8:
            values = values + 60
        stored = self.store(f"{name}_q", values.astype(kind))
        scales = self.store(f"{name}_scale", np.float32(scale))
        zero = self.store(f"{name}_zero", np.array(0, kind))
        self.nodes.append(
            helper.make_node("DequantizeLinear", [stored, scales, zero], [name], f"{name}_dq")
        )
        return name

    def save(self, path):
        shape = ["N", 4, 6, 6]
        nodes = [*self.nodes, helper.make_node("Identity", [self.last], ["output"], "end")]
        graph = helper.make_graph(
            nodes, "chain",
            [helper.make_tensor_value_info("input", TensorProto.FLOAT, shape)],
            [helper.make_tensor_value_info("output", TensorProto.FLOAT, None)],
            self.stored,
        )  # fmt: skip
        opset = [helper.make_opsetid("", self.opset)]
        onnx.save(helper.make_model(graph, opset_imports=opset, ir_version=10), path)
        return path


def chain_report(chain, tmp_path, inputs=None):
    return engagement(chain.save(tmp_path / "chain.onnx"), inputs)


def test_every_multiply_add_of_the_int8_net_is_found_in_an_int8_kernel(int8):
    report = engagement(int8)
    assert report["multiply_adds"] == sum(SMALL_NET.values())
    assert sorted(node["multiply_adds"] for node in report["nodes"]) == sorted(SMALL_NET.values())
    assert {node["kernel"] for node in report["nodes"]} == {"QLinearConv", "QGemm"}
    assert report["int8_multiply_adds_share"] == 1.0
    assert report["not_found"] == []
    assert all(node["int8"] and node["reason"] is None for node in report["nodes"])


def test_the_batchnorm_between_the_layers_is_the_float_island_and_says_why(int8):
    report = engagement(int8)
    reasons = {row["op"]: row["reason"] for row in report["float_between_qdq"]}
    assert set(reasons) >= {"Mul", "Add"}
    assert "constant" in reasons["Mul"]
    left = report["quantize_nodes_left"]
    assert (left["DequantizeLinear"], left["QuantizeLinear"]) == (1, 2)
    assert left["at_inputs_and_outputs"] == 1


def test_kernels_are_those_of_a_session_of_ones_own(int8, tmp_path):
    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    ort.InferenceSession(str(int8), options, providers=["CPUExecutionProvider"])
    nodes = [node.op_type for node in onnx.load(tmp_path / "optimized.onnx").graph.node]
    assert engagement(int8)["kernels"] == {op: nodes.count(op) for op in sorted(set(nodes))}


def test_a_float_model_has_no_share_and_every_node_is_found_under_its_blocked_name(floating):
    report = engagement(floating)
    assert report["int8_multiply_adds_share"] == 0.0
    assert report["not_found"] == []
    assert len(report["nodes"]) == len(SMALL_NET)
    assert all("kept float" in node["reason"] for node in report["nodes"])
    assert report["float_between_qdq"] == []


def test_time_is_split_into_shares_that_add_up(int8, samples):
    report = engagement(int8, samples[:3])
    kinds = [report[f"{kind}_time_share"] for kind in ("int8", "conversion", "float")]
    assert sum(kinds) == pytest.approx(1.0)
    assert min(kinds) > 0
    multiplying = sum(node["time_share"] for node in report["nodes"])
    assert 0 < multiplying < report["int8_time_share"] + 1e-9
    assert 1 <= report["profiled_runs"] <= 10


def test_warm_up_runs_count_for_nothing():
    events = []
    for run, duration in enumerate((900, 900, 3, 4)):
        begin = 1000 * run
        events.append({"cat": "Session", "name": "model_run", "ts": begin, "dur": 950})
        for name in ("a", "b"):
            kernel = {"cat": "Node", "name": f"{name}_kernel_time", "ts": begin + 1}
            events.append({**kernel, "dur": duration})
    assert node_microseconds(events) == {"a": 7, "b": 7}


def test_without_samples_time_is_unknown_and_not_zero(int8):
    report = engagement(int8)
    assert report["int8_time_share"] is None
    assert report["nodes"][0]["time_share"] is None
    assert "time:" not in as_text(report)


def test_the_report_is_json_and_nothing_is_left_beside_the_file(int8, samples):
    before = sorted(int8.parent.iterdir())
    json.dumps(engagement(int8, samples[:2]), allow_nan=False)
    assert sorted(int8.parent.iterdir()) == before


@pytest.mark.parametrize(
    ("chain", "reason"),
    [
        (Chain().qdq().conv(weight=None).qdq(), "weight is kept float"),
        (Chain().conv().qdq(), "without DequantizeLinear before it"),
        (Chain().qdq().conv(), "goes on in float to Identity"),
        (Chain().qdq().conv().add("HardSwish").qdq(), "goes on in float to HardSwish"),
        (Chain(21).qdq(np.uint16).conv(bias=None).qdq(np.uint16), "uint16"),
    ],
)  # fmt: skip
def test_a_conv_that_stays_float_says_which_rule_keeps_it(chain, reason, tmp_path):
    report = chain_report(chain, tmp_path)
    (node,) = report["nodes"]
    assert not node["int8"]
    assert reason in node["reason"]
    assert report["int8_multiply_adds_share"] == 0.0


@pytest.mark.parametrize(
    ("chain", "reason"),
    [
        (Chain().qdq(np.int8).conv(bias=None).qdq(), "its input is int8 and its output uint8"),
        (Chain().qdq().conv(bias=np.float32).qdq(), "bias is float"),
        (Chain().qdq().conv(bias=np.int8).qdq(), "bias is int8"),
        (Chain().qdq(np.int8).conv(weight=np.uint8, bias=None).qdq(np.int8), "weight uint8"),
    ],
)  # fmt: skip
def test_rules_that_hold_on_other_cpus_and_older_releases_are_known(chain, reason, tmp_path):
    model = onnx.load(chain.save(tmp_path / "chain.onnx"))
    (conv,) = (node for node in model.graph.node if node.op_type == "Conv")
    assert reason in why_float(conv, View.of(model))


def test_hard_swish_runs_in_float_between_two_int8_layers_and_is_named_once(tmp_path):
    chain = Chain().qdq().conv().qdq().add("HardSwish").qdq().conv().qdq()
    report = chain_report(chain, tmp_path, np.ones((1, 4, 6, 6), np.float32))
    assert report["int8_multiply_adds_share"] == 1.0
    (island,) = report["float_between_qdq"]  # onnxruntime runs it as HardSigmoid and Mul
    assert island["op"] == "HardSwish"
    assert island["reason"] == "onnxruntime has no int8 kernel for HardSwish"
    assert island["time_share"] == pytest.approx(report["float_time_share"])
    kinds = [report[f"{kind}_time_share"] for kind in ("int8", "conversion", "float")]
    assert sum(kinds) == pytest.approx(1.0)  # nodes without a name included
    assert "HardSwish" in as_text(report)


def test_half_the_layers_in_float_are_half_the_multiply_adds(tmp_path):
    chain = Chain().qdq().conv().qdq().add("Relu").conv(weight=None, bias=None).qdq()
    report = chain_report(chain, tmp_path)
    assert report["int8_multiply_adds_share"] == 0.5
    assert report["int8_multiply_adds"] == 6 * 6 * 4 * 4 * 9
    assert "not absorbed" in report["float_between_qdq"][0]["reason"]


def test_float_weights_that_onnxruntime_makes_int8_itself_are_marked(tmp_path):
    chain = Chain().qdq().conv().qdq().conv(weight=None, bias=None).qdq()
    report = chain_report(chain, tmp_path)
    assert [node["requantized"] for node in report["nodes"]] == [False, True]
    assert [node["int8"] for node in report["nodes"]] == [True, True]
    assert "1 of them are float in the file" in as_text(report)


def test_nodes_without_names_are_told_apart(tmp_path):
    chain = Chain().qdq().conv().qdq().add("Relu").conv(weight=None, bias=None)
    chain.qdq().conv().qdq()
    for node in chain.nodes:
        node.name = ""
    report = chain_report(chain, tmp_path)
    assert [node["int8"] for node in report["nodes"]] == [True, False, True]
    assert report["int8_multiply_adds_share"] == pytest.approx(2 / 3)


def test_what_is_not_found_again_counts_as_float(tmp_path):
    chain = Chain().qdq().conv().qdq()
    left = chain.store("left", np.ones((6, 6), np.float32))
    chain.nodes.append(helper.make_node("MatMul", [left, left], ["folded"], "constant"))
    chain.add("Add", "folded")
    report = chain_report(chain, tmp_path)
    assert report["not_found"] == ["constant"]
    assert report["int8_multiply_adds_share"] < 1
    assert report["multiply_adds"] == report["int8_multiply_adds"] + 6 * 6 * 6
    assert "counted as float" in as_text(report)


def test_residual_adds_fused_into_a_float_conv_leave_each_conv_found(tmp_path):
    chain = Chain()
    chain.conv(weight=None, bias=None)
    first = chain.last
    chain.add("Relu").conv(weight=None, bias=None).add("Add", first).add("Relu")
    chain.conv(weight=None, bias=None)
    report = chain_report(chain, tmp_path)
    assert report["not_found"] == []
    assert len(report["nodes"]) == 3


def test_a_graph_that_multiplies_nothing_is_an_error(tmp_path):
    with pytest.raises(MeasurementError, match="no Conv, Gemm or MatMul"):
        chain_report(Chain().add("Relu"), tmp_path)


def test_samples_of_another_shape_and_none_at_all_are_errors(int8):
    with pytest.raises(ExportError, match="feed"):
        engagement(int8, np.zeros((1, 5, 16, 16), np.float32))
    with pytest.raises(MeasurementError, match="no samples"):
        engagement(int8, np.zeros((0, 3, 16, 16), np.float32))


def test_a_missing_file_is_the_users_error(tmp_path):
    with pytest.raises(ExportError, match="no such file"):
        engagement(tmp_path / "none.onnx")


def test_a_fixed_batch_is_filled_and_counted_once(tmp_path):
    chain = Chain().qdq().conv().qdq()
    model = onnx.load(chain.save(tmp_path / "chain.onnx"))
    model.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 3
    onnx.save(model, tmp_path / "three.onnx")
    report = engagement(tmp_path / "three.onnx", np.ones((2, 4, 6, 6), np.float32))
    assert report["multiply_adds"] == 6 * 6 * 4 * 4 * 9
    assert report["int8_time_share"] > 0
