from __future__ import annotations

import re
import sys

import numpy as np
import onnx
import pytest
from edgestill.exporters import simplify as simplify_module
from edgestill.exporters.compare import agrees, allowed_error, compare, float_floor
from edgestill.exporters.graph import sort_nodes
from edgestill.exporters.rewrites import fold_batchnorm, normalise, pool_means
from edgestill.exporters.sessions import open_session, run_batches
from edgestill.exporters.simplify import batchnorms, run_onnxsim, simplify
from edgestill.exporters.stamp import write_model
from edgestill.pipeline.errors import ExportError
from onnx import TensorProto, helper, numpy_helper


def build(nodes, constants, *, shape=("N", 4, 6, 6), output=("N", None)):
    """A graph input → … → logits around hand-written nodes."""
    return helper.make_model(
        helper.make_graph(
            nodes,
            "g",
            [helper.make_tensor_value_info("input", TensorProto.FLOAT, list(shape))],
            [helper.make_tensor_value_info("logits", TensorProto.FLOAT, list(output))],
            [numpy_helper.from_array(np.asarray(v), k) for k, v in constants.items()],
        ),
        opset_imports=[helper.make_opsetid("", 18)],
        ir_version=8,
    )


def statistics(rng, channels):
    return {
        "scale": rng.uniform(0.5, 2, channels).astype(np.float32),
        "bias": rng.normal(size=channels).astype(np.float32),
        "mean": rng.normal(size=channels).astype(np.float32),
        "var": rng.uniform(0.5, 2, channels).astype(np.float32),
    }


def batchnorm(source, output):
    return helper.make_node(
        "BatchNormalization",
        [source, "scale", "bias", "mean", "var"],
        [output],
        epsilon=1e-3,
        name="bn",
    )


def run(model, inputs, tmp_path):
    write_model(model, tmp_path / "m.onnx")
    return run_batches(open_session(tmp_path / "m.onnx", threads=1), inputs, 8)


def ops(model):
    return [node.op_type for node in model.graph.node]


@pytest.fixture
def rng():
    return np.random.default_rng(0)


@pytest.fixture
def inputs(rng):
    return rng.normal(size=(5, 4, 6, 6)).astype(np.float32)


@pytest.mark.parametrize("with_bias", [True, False])
def test_batchnorm_after_a_conv_goes_into_its_weights(with_bias, rng, inputs, tmp_path):
    constants = statistics(rng, 3) | {"w": rng.normal(size=(3, 4, 3, 3)).astype(np.float32)}
    names = ["input", "w"]
    if with_bias:
        constants["b"] = rng.normal(size=3).astype(np.float32)
        names.append("b")
    nodes = [helper.make_node("Conv", names, ["y"], name="conv"), batchnorm("y", "logits")]
    model = build(nodes, constants, output=("N", 3, 4, 4))
    folded = normalise(model)
    assert ops(folded) == ["Conv"]
    np.testing.assert_allclose(
        run(folded, inputs, tmp_path), run(model, inputs, tmp_path), atol=1e-5, rtol=1e-5
    )


@pytest.mark.parametrize("transposed", [0, 1])
def test_batchnorm_after_a_gemm_goes_into_its_weights(transposed, rng, inputs, tmp_path):
    weight = rng.normal(size=(3, 144) if transposed else (144, 3)).astype(np.float32)
    nodes = [
        helper.make_node("Flatten", ["input"], ["flat"], name="flatten"),
        helper.make_node("Gemm", ["flat", "w"], ["y"], transB=transposed, name="gemm"),
        batchnorm("y", "logits"),
    ]
    model = build(nodes, statistics(rng, 3) | {"w": weight}, output=("N", 3))
    folded = normalise(model)
    assert ops(folded) == ["Flatten", "Gemm"]
    np.testing.assert_allclose(
        run(folded, inputs, tmp_path), run(model, inputs, tmp_path), atol=1e-4, rtol=1e-5
    )


def test_batchnorm_that_cannot_fold_becomes_the_hand_worked_mul_and_add(rng, inputs, tmp_path):
    constants = statistics(rng, 4)
    model = build(
        [helper.make_node("Add", ["input", "input"], ["y"], name="add"), batchnorm("y", "logits")],
        constants,
        output=("N", 4, 6, 6),
    )
    folded = normalise(model)
    assert ops(folded) == ["Add", "Mul", "Add"]
    c = {name: value.reshape(-1, 1, 1).astype(np.float64) for name, value in constants.items()}
    by_hand = (2 * inputs - c["mean"]) / np.sqrt(c["var"] + 1e-3) * c["scale"] + c["bias"]
    np.testing.assert_allclose(run(folded, inputs, tmp_path), by_hand, atol=1e-5)


def test_a_conv_that_others_read_too_is_not_changed(rng, inputs, tmp_path):
    constants = statistics(rng, 4) | {"w": rng.normal(size=(4, 4, 1, 1)).astype(np.float32)}
    nodes = [
        helper.make_node("Conv", ["input", "w"], ["y"], name="conv"),
        batchnorm("y", "z"),
        helper.make_node("Add", ["y", "z"], ["logits"], name="add"),
    ]
    model = build(nodes, constants, output=("N", 4, 6, 6))
    folded = normalise(model)
    assert ops(folded) == ["Conv", "Mul", "Add", "Add"]
    np.testing.assert_allclose(
        run(folded, inputs, tmp_path), run(model, inputs, tmp_path), atol=1e-5
    )


def test_shared_weights_are_folded_for_one_reader_only(rng, inputs, tmp_path):
    constants = statistics(rng, 4) | {"w": rng.normal(size=(4, 4, 1, 1)).astype(np.float32)}
    nodes = [
        helper.make_node("Conv", ["input", "w"], ["a"], name="conv_a"),
        batchnorm("a", "b"),
        helper.make_node("Conv", ["b", "w"], ["logits"], name="conv_b"),
    ]
    model = build(nodes, constants, output=("N", 4, 6, 6))
    folded = normalise(model)
    assert ops(folded) == ["Conv", "Conv"]
    np.testing.assert_allclose(
        run(folded, inputs, tmp_path), run(model, inputs, tmp_path), atol=1e-5
    )


def test_batchnorm_in_training_mode_is_left_alone(rng):
    node = batchnorm("input", "logits")
    node.attribute.append(helper.make_attribute("training_mode", 1))
    model = build([node], statistics(rng, 4), output=("N", 4, 6, 6))
    assert ops(fold_batchnorm(model)) == ["BatchNormalization"]


@pytest.mark.parametrize("keepdims", [0, 1])
def test_mean_over_space_becomes_global_average_pool(keepdims, inputs, tmp_path):
    node = helper.make_node(
        "ReduceMean", ["input", "axes"], ["logits"], keepdims=keepdims, name="mean"
    )
    output = ("N", 4, 1, 1) if keepdims else ("N", 4)
    model = build([node], {"axes": np.array([-1, 2], np.int64)}, output=output)
    pooled = normalise(model)
    assert ops(pooled)[0] == "GlobalAveragePool"
    found = run(pooled, inputs, tmp_path)
    np.testing.assert_allclose(
        found, inputs.mean((2, 3), keepdims=bool(keepdims), dtype=np.float64), atol=1e-6
    )


def test_mean_over_channels_stays(inputs):
    node = helper.make_node("ReduceMean", ["input", "axes"], ["logits"], keepdims=0, name="mean")
    model = build([node], {"axes": np.array([1, 2], np.int64)}, output=("N", 6))
    assert ops(pool_means(model)) == ["ReduceMean"]


def test_sorted_nodes_keep_their_order_where_it_is_free(rng):
    model = build(
        [
            helper.make_node("Relu", ["b"], ["logits"], name="last"),
            helper.make_node("Relu", ["input"], ["a"], name="first"),
            helper.make_node("Relu", ["a"], ["b"], name="middle"),
        ],
        {},
    )
    sort_nodes(model)
    assert [node.name for node in model.graph.node] == ["first", "middle", "last"]


def test_a_cycle_is_refused():
    nodes = [
        helper.make_node("Add", ["input", "b"], ["a"], name="x"),
        helper.make_node("Relu", ["a"], ["b"], name="y"),
    ]
    with pytest.raises(ExportError, match="cycle"):
        sort_nodes(build(nodes, {}))


def test_simplified_net_has_no_batchnorm_and_the_same_outputs(raw, samples, tmp_path):
    assert batchnorms(raw)  # the one after the Add: the exporter cannot fold it
    result = simplify(raw, samples, floor=0.0, threads=1)
    assert result.simplified, result.reason
    assert "64 real samples" in result.reason
    assert batchnorms(result.model) == []
    assert "ReduceMean" not in ops(result.model)
    ok, said = agrees(run(raw, samples, tmp_path), run(result.model, samples, tmp_path), floor=0.0)
    assert ok, said


def test_without_onnxsim_batchnorm_is_folded_all_the_same(raw, samples):
    result = simplify(raw, samples, floor=0.0, threads=1, enabled=False)
    assert not result.simplified
    assert "switched off" in result.reason
    assert batchnorms(result.model) == []


def test_a_simplifier_that_changes_the_outputs_is_not_used(raw, samples, monkeypatch, tmp_path):
    broken = onnx.ModelProto()
    broken.CopyFrom(raw)
    for tensor in broken.graph.initializer:
        if tensor.name == "head.bias":
            value = numpy_helper.to_array(tensor) + np.float32(0.5)
            tensor.CopyFrom(numpy_helper.from_array(value, tensor.name))
    monkeypatch.setattr(simplify_module, "run_onnxsim", lambda model: (broken, ""))
    result = simplify(raw, samples, floor=0.0, threads=1)
    assert not result.simplified
    assert "outputs differ" in result.reason
    assert "5.00e-01" in result.reason
    assert batchnorms(result.model) == []
    assert agrees(run(raw, samples, tmp_path), run(result.model, samples, tmp_path), floor=0)[0]


@pytest.mark.parametrize(
    ("code", "why"),
    [
        ("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)", r"crashed \(SIGSEGV\)"),
        ("raise RuntimeError('no such luck')", "failed: RuntimeError: no such luck"),
        ("pass", "invalid graph"),
        ("import time; time.sleep(60)", "longer than 1 s"),
    ],
)
def test_a_simplifier_that_dies_becomes_a_reason(code, why, raw):
    result, reason = run_onnxsim(raw, command=(sys.executable, "-S", "-c", code), timeout=1)
    assert result is None
    assert re.search(why, reason), reason


def test_comparison_figures_follow_their_definitions():
    reference = np.array([[3.0, 0.0], [0.0, 4.0]])
    candidate = np.array([[3.0, 0.0], [0.5, 4.0]])
    found = compare(reference, candidate)
    assert found.max_abs == 0.5
    assert found.sqnr_db == pytest.approx(20.0)  # 10·log10(25 / 0.25)
    assert found.cosine == pytest.approx(25 / (5 * np.sqrt(25.25)))
    assert found.top1_agreement == 1.0


@pytest.mark.parametrize(
    ("reference", "candidate", "problem"),
    [
        (np.zeros((0, 3)), np.zeros((0, 3)), "nothing was compared"),
        (np.zeros((2, 3)), np.zeros((2, 4)), "shape"),
        (np.zeros((2, 3)), np.full((2, 3), np.nan), "NaN"),
        (np.full((2, 3), np.inf), np.full((2, 3), np.inf), "infinity"),
    ],
)
def test_what_cannot_be_compared_says_so(reference, candidate, problem):
    found = compare(reference, candidate)
    assert problem in (found.problem or "")
    assert found.max_abs is None
    assert not agrees(reference, candidate, floor=1.0)[0]


def test_float_tolerance_follows_the_floor_and_the_fixed_part():
    reference = np.array([[0.0, 100.0]])
    np.testing.assert_allclose(allowed_error(reference, 0.0), [[1e-4, 0.1001]])
    np.testing.assert_allclose(allowed_error(reference, 0.02), [[0.2, 0.2]])
    # an unstable net must not widen its own tolerance without limit
    assert float_floor(reference, reference + 50) == pytest.approx(0.1001)
