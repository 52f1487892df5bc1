"""The real onnxruntime of other CPUs, emulated: what an int8 file computes on each.

    scripts/arm_sysroot DIR && EDGESTILL_ARM_SYSROOT=DIR scripts/test tests/test_arm.py

pi4 is a Cortex-A72, pi5 a Cortex-A76 (dotprod), avx2 an x86 without VNNI. What each must answer is
worked out here in numpy, so nothing depends on the CPU that runs the tests.
"""

from __future__ import annotations

import importlib.machinery
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from edgestill.exporters.engagement import engagement
from edgestill.exporters.int8 import encoding_for, quantize
from edgestill.exporters.ort_format import write_ort
from edgestill.exporters.saturation import saturating_pairs, total
from onnx import TensorProto, helper, numpy_helper
from sklearn.datasets import load_digits

ROOT = Path(__file__).resolve().parent.parent
CPUS = ("pi4", "pi5", "avx2")
RUN_ONNX = ROOT / "scripts/run_onnx.py"


@pytest.fixture(scope="session")
def sysroot():
    folder = os.environ.get("EDGESTILL_ARM_SYSROOT")
    if not folder:
        pytest.skip("needs EDGESTILL_ARM_SYSROOT, a folder that scripts/arm_sysroot built")
    return Path(folder)


@pytest.fixture
def answers(sysroot, tmp_path):
    """`answers(cpu, model, inputs)`: the model's output there; "here" is this machine."""

    def run(cpu, model, inputs):
        model_path, inputs_path = tmp_path / "model.onnx", tmp_path / "inputs.npy"
        logits_path = tmp_path / f"{cpu}.npy"
        onnx.save(model, model_path)
        np.save(inputs_path, inputs)
        python = [sys.executable] if cpu == "here" else [str(sysroot / "run"), cpu]
        done = subprocess.run(
            [*python, str(RUN_ONNX), str(model_path), str(inputs_path), str(logits_path)],
            capture_output=True, text=True, timeout=300,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        assert json.loads(done.stdout)["samples"] == len(inputs)
        return np.load(logits_path)

    return run


def graph_of(nodes, constants, shape, *, opset=18):
    graph = helper.make_graph(
        nodes, "graph",
        [helper.make_tensor_value_info("input", TensorProto.FLOAT, ["N", *shape])],
        [helper.make_tensor_value_info("output", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(value, name) for name, value in constants.items()],
    )  # fmt: skip
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8)


def digits_net():
    """Convs dense, depthwise, pointwise and 64 channels wide, a mean and a Gemm; no Add."""
    rng = np.random.default_rng(0)
    nodes, constants, last = [], {}, "input"

    def weight(name, shape):
        fan_in = np.prod(shape[1:])
        constants[name] = (rng.normal(size=shape) * np.sqrt(2 / fan_in)).astype(np.float32)
        constants[f"{name}_bias"] = rng.normal(size=shape[0]).astype(np.float32) * 0.1
        return [name, f"{name}_bias"]

    layers = [(16, 1, 3, 1), (16, 1, 3, 16), (64, 16, 1, 1), (64, 64, 3, 1)]
    for index, (outputs, inputs, kernel, groups) in enumerate(layers):
        operands = weight(f"w{index}", (outputs, inputs, kernel, kernel))
        conv = helper.make_node(
            "Conv", [last, *operands], [f"conv{index}"], f"conv{index}", group=groups,
            pads=[kernel // 2] * 4,
        )  # fmt: skip
        last = f"relu{index}"
        nodes += [conv, helper.make_node("Relu", [f"conv{index}"], [last], last)]
    nodes += [
        helper.make_node("GlobalAveragePool", [last], ["mean"], "mean"),
        helper.make_node("Flatten", ["mean"], ["flat"], "flat"),
        helper.make_node("Gemm", ["flat", *weight("head", (10, 64))], ["output"], "head", transB=1),
    ]
    return graph_of(nodes, constants, (1, 8, 8))


def qdq_product(weight, *, activations=np.uint8, zero=0):
    """output = Σ_k (x_k − zero) · w_k exactly: every scale is 1 and sums stay below 2²⁴."""
    constants = {
        "one": np.float32(1),
        "zero": np.array(zero, activations),
        "w": weight,
        "w_zero": np.int8(0),
        "b": np.zeros(len(weight), np.int32),
        "b_zero": np.int32(0),
    }
    nodes = [
        helper.make_node("QuantizeLinear", ["input", "one", "zero"], ["q"]),
        helper.make_node("DequantizeLinear", ["q", "one", "zero"], ["x"]),
        helper.make_node("DequantizeLinear", ["w", "one", "w_zero"], ["weight"]),
        helper.make_node("DequantizeLinear", ["b", "one", "b_zero"], ["bias"]),
        helper.make_node("Gemm", ["x", "weight", "bias"], ["output"], "layer", transB=1),
    ]
    return graph_of(nodes, {k: np.asarray(v) for k, v in constants.items()}, weight.shape[1:])


def qdq_conv(weight, shape):
    """uint8 → Conv → uint8 with a step of 256: output = 256 · clip(round(acc / 256), 0, 255)."""
    constants = {
        "one": np.float32(1),
        "step": np.float32(256),
        "zero": np.uint8(0),
        "w": weight,
        "w_zero": np.int8(0),
    }
    nodes = [
        helper.make_node("QuantizeLinear", ["input", "one", "zero"], ["q"]),
        helper.make_node("DequantizeLinear", ["q", "one", "zero"], ["x"]),
        helper.make_node("DequantizeLinear", ["w", "one", "w_zero"], ["weight"]),
        helper.make_node("Conv", ["x", "weight"], ["acc"], "layer"),
        helper.make_node("QuantizeLinear", ["acc", "step", "zero"], ["out_q"]),
        helper.make_node("DequantizeLinear", ["out_q", "step", "zero"], ["output"]),
    ]
    return graph_of(nodes, {k: np.asarray(v) for k, v in constants.items()}, shape)


def accumulate(rows, weight, *, saturate):
    """Sums over K of u8 · s8, (N, K) by (M, K); pair sums clipped to int16 where told."""
    rows, weight = rows.astype(np.int64), weight.astype(np.int64)
    products = rows[:, None] * weight[None]
    odd = products.shape[2] % 2
    products = np.pad(products, ((0, 0), (0, 0), (0, odd)))
    pairs = products[..., ::2] + products[..., 1::2]
    return (np.clip(pairs, -32768, 32767) if saturate else pairs).sum(-1)


def test_the_pinned_wheels_are_the_versions_that_the_tests_use():
    pinned = dict(
        line.split("==") for line in (ROOT / "constraints.txt").read_text().split() if "==" in line
    )
    loader = importlib.machinery.SourceFileLoader("arm_sysroot", str(ROOT / "scripts/arm_sysroot"))
    spec = importlib.util.spec_from_loader(loader.name, loader)
    script = importlib.util.module_from_spec(spec)
    sys.dont_write_bytecode, before = True, sys.dont_write_bytecode
    try:
        loader.exec_module(script)
    finally:
        sys.dont_write_bytecode = before
    assert set(script.CPUS) == set(CPUS)
    for wheels in script.WHEELS.values():
        assert {name.split("==")[0] for name in wheels} == {"numpy", "onnxruntime"}
        assert all(pinned[name.split("==")[0]] == name.split("==")[1] for name in wheels)


def test_a_folder_of_someone_elses_is_refused_untouched(tmp_path):
    (tmp_path / "mine.txt").write_text("mine")
    done = subprocess.run(
        [sys.executable, str(ROOT / "scripts/arm_sysroot"), str(tmp_path)],
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 2
    assert "name another folder" in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_a_seven_bit_file_of_integer_nodes_is_bit_equal_on_every_cpu(answers, tmp_path):
    inputs = (load_digits().images[:, None] / 8 - 1).astype(np.float32)
    encoding = encoding_for(("arm", "x86"))
    model = quantize(digits_net(), inputs[100:200], encoding=encoding, threads=1).model
    onnx.save(model, tmp_path / "net.onnx")
    found = engagement(tmp_path / "net.onnx")
    assert found["int8_multiply_adds_share"] == 1.0
    assert found["float_between_qdq"] == []
    here = answers("here", model, inputs[:12])
    assert (here.std(0) > 0.01).all()  # the samples are told apart
    for cpu in CPUS:
        np.testing.assert_array_equal(answers(cpu, model, inputs[:12]), here, err_msg=cpu)


def test_the_ort_file_written_here_answers_on_arm_as_the_onnx_file_does(sysroot, tmp_path):
    """Its graph was optimized on this CPU, whatever it is: nothing of it may be baked in."""
    inputs = (load_digits().images[:, None] / 8 - 1).astype(np.float32)
    encoding = encoding_for(("arm", "x86"))
    model = quantize(digits_net(), inputs[100:200], encoding=encoding, threads=1).model
    paths = {"onnx": tmp_path / "net.onnx", "ort": tmp_path / "net.ort"}
    onnx.save(model, paths["onnx"])
    write_ort(paths["onnx"], paths["ort"])
    np.save(tmp_path / "inputs.npy", inputs[:12])
    for cpu in ("pi4", "pi5"):
        found = {}
        for kind, path in paths.items():
            logits = tmp_path / f"{kind}.npy"
            subprocess.run(
                [str(sysroot / "run"), cpu, str(RUN_ONNX), str(path),
                 str(tmp_path / "inputs.npy"), str(logits)],
                check=True, capture_output=True, timeout=300,
            )  # fmt: skip
            found[kind] = np.load(logits)
        np.testing.assert_array_equal(found["ort"], found["onnx"], err_msg=cpu)


def test_eight_bit_weights_saturate_without_vnni_as_counted_and_nowhere_else(answers):
    rng = np.random.default_rng(1)
    weight = rng.integers(-128, 128, (16, 64)).astype(np.int8)
    inputs = rng.integers(0, 256, (12, 64)).astype(np.float32)
    model = qdq_product(weight)
    exact = accumulate(inputs, weight, saturate=False)
    clipped = accumulate(inputs, weight, saturate=True)
    assert total(saturating_pairs(model, inputs, threads=1))["saturating"] > 0
    assert (exact != clipped).any()
    np.testing.assert_array_equal(answers("avx2", model, inputs), clipped)
    for cpu in ("pi4", "pi5"):
        np.testing.assert_array_equal(answers(cpu, model, inputs), exact, err_msg=cpu)


@pytest.mark.parametrize("channels", [3, 4])
def test_a_conv_pairs_channels_within_and_across_kernel_positions(answers, channels):
    """3 channels: pairs straddle kernel positions and K is odd; 4: they do not."""
    rng = np.random.default_rng(channels)
    weight = rng.choice([-128, -100, 20, 127], (16, channels, 3, 3), p=[0.1, 0.1, 0.3, 0.5])
    weight = weight.astype(np.int8)
    inputs = rng.integers(128, 256, (3, channels, 6, 6)).astype(np.float32)
    windows = np.lib.stride_tricks.sliding_window_view(inputs, (3, 3), axis=(2, 3))
    rows = windows.transpose(0, 2, 3, 4, 5, 1).reshape(-1, 9 * channels)  # (position, channel)
    kernels = weight.transpose(0, 2, 3, 1).reshape(16, -1)
    expected = {}
    for saturate in (False, True):
        sums = accumulate(rows, kernels, saturate=saturate).reshape(3, 4, 4, 16)
        expected[saturate] = 256 * np.clip(np.rint(sums / 256), 0, 255).transpose(0, 3, 1, 2)
    model = qdq_conv(weight, inputs.shape[1:])
    assert (expected[True] != expected[False]).any()
    np.testing.assert_array_equal(answers("avx2", model, inputs), expected[True])
    for cpu in ("pi4", "pi5"):
        np.testing.assert_array_equal(answers(cpu, model, inputs), expected[False], err_msg=cpu)


def test_s8s8_is_exact_on_arm_and_saturates_on_x86_without_vnni(answers):
    """x86 shifts the activations by 128 first (QDQS8ToU8Transformer), so even small ones clip."""
    rng = np.random.default_rng(2)
    weight = rng.integers(90, 128, (16, 64)).astype(np.int8)
    inputs = rng.integers(0, 40, (6, 64)).astype(np.float32)
    model = qdq_product(weight, activations=np.int8)
    exact = accumulate(inputs, weight, saturate=False)
    shifted = accumulate(inputs + 128, weight, saturate=True)
    offset = 128 * weight.astype(np.int64).sum(1)
    for cpu in ("pi4", "pi5"):
        np.testing.assert_array_equal(answers(cpu, model, inputs), exact, err_msg=cpu)
    np.testing.assert_array_equal(answers("avx2", model, inputs), shifted - offset)
    assert (shifted - offset != exact).any()


def test_a_residual_add_rounds_ties_to_even_on_x86_and_away_from_zero_on_arm(answers):
    """The one int8 kernel that is not the same everywhere: QLinearAdd, in float32 on x86 and in
    22-bit fixed point on ARM (mlas/lib/qladd.cpp). Here every odd sum is a tie."""
    constants = {"one": np.float32(1), "two": np.float32(2), "zero": np.uint8(0)}
    nodes = [
        helper.make_node("QuantizeLinear", ["input", "one", "zero"], ["q"]),
        helper.make_node("DequantizeLinear", ["q", "one", "zero"], ["x"]),
        helper.make_node("MaxPool", ["x"], ["pooled"], kernel_shape=[1, 3], pads=[0, 1, 0, 1]),
        helper.make_node("QuantizeLinear", ["pooled", "one", "zero"], ["pooled_q"]),
        helper.make_node("DequantizeLinear", ["pooled_q", "one", "zero"], ["y"]),
        helper.make_node("Add", ["x", "y"], ["sum"], "add"),
        helper.make_node("QuantizeLinear", ["sum", "two", "zero"], ["sum_q"]),
        helper.make_node("DequantizeLinear", ["sum_q", "two", "zero"], ["output"]),
    ]
    model = graph_of(nodes, {k: np.asarray(v) for k, v in constants.items()}, (2, 4, 16))
    inputs = np.random.default_rng(3).integers(0, 200, (2, 2, 4, 16)).astype(np.float32)
    padded = np.pad(inputs, ((0, 0), (0, 0), (0, 0), (1, 1)))
    pooled = np.max([padded[..., :-2], padded[..., 1:-1], padded[..., 2:]], axis=0)
    halves = (inputs + pooled) / 2
    to_even, away = 2 * np.rint(halves), 2 * np.floor(halves + 0.5)
    assert (to_even != away).any()
    np.testing.assert_array_equal(answers("avx2", model, inputs), to_even)
    for cpu in ("pi4", "pi5"):
        np.testing.assert_array_equal(answers(cpu, model, inputs), away, err_msg=cpu)
