from __future__ import annotations

import os
import subprocess
import sys
import textwrap

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from edgestill.exporters.audit import audit
from edgestill.exporters.calibrate import ranges_of
from edgestill.exporters.graph import arrays, producers, read_model
from edgestill.exporters.int8 import encoding_for, quantize
from edgestill.exporters.int8_check import check_int8, check_ranges
from edgestill.exporters.rewrites import normalise
from edgestill.exporters.sessions import open_session, run_batches
from edgestill.exporters.stamp import stamp, write_model
from edgestill.exporters.to_onnx import export_onnx
from edgestill.pipeline.errors import ExportError, IntegrityError
from onnx import TensorProto, numpy_helper
from torch import nn

FULL = encoding_for(("arm",))
REDUCED = encoding_for(("arm", "x86"))


@pytest.fixture(scope="module")
def floating(raw):
    return normalise(raw)


@pytest.fixture(scope="module")
def int8(floating, samples):
    return quantize(floating, samples, encoding=REDUCED, calibrator="minmax", threads=1)


def session_of(model, path, *, optimize=True):
    write_model(stamp(model, min_runtime="1.17", metadata={}), path)
    return open_session(path, threads=1, optimize=optimize)


def fused_ops(path, folder):
    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.optimized_model_filepath = str(folder / "optimized.onnx")
    ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return [node.op_type for node in onnx.load(folder / "optimized.onnx").graph.node]


@pytest.mark.parametrize(
    ("targets", "reduced"),
    [
        (("arm", "x86"), True),
        (("x86",), True),
        (("x86-vnni", "x86"), True),
        (("arm",), False),
        (("x86-vnni",), False),
        (("arm", "x86-vnni"), False),
    ],
)
def test_only_x86_without_vnni_takes_a_bit_away(targets, reduced):
    encoding = encoding_for(targets)
    assert encoding.reduce_range is reduced
    assert (encoding.activation_type, encoding.weight_type) == ("uint8", "int8")
    assert encoding.per_channel
    assert encoding.reason


def test_no_target_is_an_error():
    with pytest.raises(ExportError, match="targets"):
        encoding_for(())


def test_reduced_weights_cannot_saturate_a_pair_sum_and_full_ones_use_the_range(floating, samples):
    for encoding, largest in ((REDUCED, 64), (FULL, 127)):
        found = quantize(floating, samples, encoding=encoding, calibrator="minmax", threads=1)
        weights = [
            value
            for name, value in arrays(found.model).items()
            if name.endswith("weight_quantized") and value.ndim >= 2
        ]
        assert len(weights) == 5
        assert {int(np.abs(w.astype(int)).max()) for w in weights} == {largest}


def test_int8_answers_like_float(floating, int8, samples, tmp_path):
    expected = run_batches(session_of(floating, tmp_path / "f.onnx"), samples, 16)
    found = run_batches(session_of(int8.model, tmp_path / "q.onnx"), samples, 16)
    noise = float(np.square(expected - found).sum())
    assert 10 * np.log10(np.square(expected).sum() / noise) > 20  # dB
    assert (expected.argmax(1) == found.argmax(1)).mean() >= 0.95
    assert noise > 0  # it is quantized, not the float net again


def test_every_layer_fuses_and_logits_leave_in_float(int8, tmp_path):
    session_of(int8.model, tmp_path / "q.onnx")
    ops = fused_ops(tmp_path / "q.onnx", tmp_path)
    assert ops.count("QLinearConv") == 4
    assert ops.count("QLinearAdd") == 1
    assert ops.count("QLinearGlobalAveragePool") == 1
    assert ops.count("QGemm") == 1
    assert "Conv" not in ops
    assert "Gemm" not in ops
    # the Mul and Add of the BatchNorm after the Add are the one float island
    assert (ops.count("DequantizeLinear"), ops.count("QuantizeLinear")) == (1, 2)
    assert producers(int8.model)["logits"].op_type == "Gemm"


def test_counts_and_bytes_are_those_of_int8(floating, int8):
    ops = [node.op_type for node in int8.model.graph.node]
    assert int8.counts["quantize_linear"] == ops.count("QuantizeLinear")
    assert int8.counts["dequantize_linear"] == ops.count("DequantizeLinear")
    assert int8.counts["int8_weights"] == 5
    assert int8.counts["int32_biases"] == 5
    before, after = audit(floating), audit(int8.model)
    assert before["parameters"] == after["parameters"]
    assert before["multiply_adds"] == after["multiply_adds"]


def test_stamped_int8_file_loads_in_the_old_runtime_by_its_header(int8, tmp_path):
    clean = stamp(int8.model, min_runtime="1.17", metadata={})
    write_model(clean, tmp_path / "q.onnx")
    found = onnx.load(tmp_path / "q.onnx")
    assert found.ir_version <= 8
    assert [(o.domain, o.version) for o in found.opset_import] == [("", 18)]
    assert {node.domain for node in found.graph.node} == {""}
    assert [p.name for p in tmp_path.iterdir()] == ["q.onnx"]
    onnx.checker.check_model(found, full_check=True)


def test_percentile_ranges_are_inside_minmax(floating, samples, int8):
    clipped = quantize(floating, samples, encoding=REDUCED, calibrator="percentile", threads=1)
    inner, outer = arrays(clipped.model), arrays(int8.model)
    scales = [name for name in outer if name.endswith("_scale") and outer[name].ndim == 0]
    assert scales
    assert all(inner[name] <= outer[name] * 1.001 for name in scales)


def test_calibration_reads_every_step_once_and_only_slices(floating, samples):
    asked = []

    class Lazy:
        def __len__(self):
            return 40

        def __getitem__(self, part):
            asked.append((part.start, min(part.stop, 40)))
            return samples[part][: 40 - part.start]

    lazily = quantize(floating, Lazy(), encoding=REDUCED, calibrator="minmax", threads=1)
    assert asked == [(0, 1), (0, 16), (16, 32), (32, 40)]  # the first says how large a sample is
    whole = quantize(floating, samples[:40], encoding=REDUCED, calibrator="minmax", threads=1)
    assert lazily.model == whole.model


def test_a_fixed_batch_is_calibrated_and_quantized(samples, tmp_path):
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(784, 3)).eval()
    export_onnx(net, torch.zeros(2, 3, 16, 16), tmp_path / "m.onnx", batch=3)
    model = normalise(read_model(tmp_path / "m.onnx"))
    found = quantize(model, samples[:7], encoding=FULL, calibrator="percentile", threads=1)
    assert run_batches(session_of(found.model, tmp_path / "q.onnx"), samples[:7], 1).shape == (7, 3)


def test_quantizing_twice_is_refused(int8, samples):
    with pytest.raises(ExportError, match="quantized already"):
        quantize(int8.model, samples, encoding=FULL, calibrator="minmax", threads=1)


def test_a_batchnorm_that_is_left_is_refused(raw, samples):
    with pytest.raises(ExportError, match="BatchNormalization"):
        quantize(raw, samples, encoding=FULL, calibrator="minmax", threads=1)


def test_no_samples_are_refused(floating, samples):
    with pytest.raises(ExportError, match="no calibration samples"):
        quantize(floating, samples[:0], encoding=FULL, calibrator="minmax", threads=1)


def test_samples_that_are_not_finite_are_refused(floating, samples):
    broken = samples[:20].copy()
    broken[3, 0, 0, 0] = np.inf
    with pytest.raises(ExportError, match="not finite"):
        quantize(floating, broken, encoding=FULL, calibrator="minmax", threads=1)


def test_a_weight_left_float_is_an_integrity_error(floating, int8):
    broken = onnx.ModelProto()
    broken.CopyFrom(int8.model)
    weight = next(t for t in floating.graph.initializer if t.name == "down.weight")
    broken.graph.initializer.append(weight)
    conv = next(n for n in broken.graph.node if n.op_type == "Conv" and "down" in n.input[1])
    conv.input[1] = weight.name
    with pytest.raises(IntegrityError, match="float weights"):
        check_int8(floating, broken)


def test_weights_stored_twice_are_an_integrity_error(floating, int8):
    broken = onnx.ModelProto()
    broken.CopyFrom(int8.model)
    extra = numpy_helper.from_array(np.zeros(2000, np.float32), "again")
    broken.graph.initializer.append(extra)
    with pytest.raises(IntegrityError, match="bytes of initializers"):
        check_int8(floating, broken)


def test_quantizing_says_nothing(floating, samples, capfd, caplog):
    quantize(floating, samples[:20], encoding=FULL, calibrator="percentile", threads=1)
    assert capfd.readouterr() == ("", "")
    assert caplog.records == []


SCRIPT = """
    import sys
    from pathlib import Path
    import numpy as np
    from edgestill.exporters.graph import read_model
    from edgestill.exporters.int8 import encoding_for, quantize
    from edgestill.exporters.simplify import simplify
    from edgestill.exporters.stamp import stamp, write_model
    raw, samples, out = sys.argv[1:]
    samples = np.load(samples)
    result = simplify(read_model(Path(raw)), samples, floor=0.0, threads=1)
    assert result.simplified, result.reason
    for calibrator in ("minmax", "percentile"):
        found = quantize(result.model, samples, encoding=encoding_for(("arm",)),
                         calibrator=calibrator, threads=1)
        write_model(stamp(found.model, min_runtime="1.17", metadata={"b": "1", "a": "2"}),
                    Path(out, calibrator + ".onnx"))
"""


def test_two_processes_write_the_same_bytes(exported, samples, tmp_path):
    np.save(tmp_path / "x.npy", samples)
    argv = [sys.executable, "-P", "-c", textwrap.dedent(SCRIPT), exported, tmp_path / "x.npy"]
    running = []
    for seed in ("1", "2"):
        (tmp_path / seed).mkdir()
        env = {**os.environ, "PYTHONHASHSEED": seed, "OMP_NUM_THREADS": "1"}
        running.append(
            subprocess.Popen([*argv, tmp_path / seed], env=env, stderr=subprocess.PIPE, text=True)
        )
    for process in running:
        _, stderr = process.communicate(timeout=60)
        assert process.returncode == 0, stderr
        assert stderr == ""
    for name in ("minmax.onnx", "percentile.onnx"):
        first, second = ((tmp_path / seed / name).read_bytes() for seed in ("1", "2"))
        assert first == second


def parameters(model, tensor):
    """(scale, zero point) of the QuantizeLinear of a tensor of the float graph."""
    constants = arrays(model)
    node = next(n for n in model.graph.node if n.name == f"{tensor}_QuantizeLinear")
    return constants[node.input[1]], constants[node.input[2]]


def with_ranges(floating, samples, ranges, **wishes):
    return quantize(floating, samples[:0], encoding=FULL, threads=1, ranges=ranges, **wishes)


@pytest.fixture(scope="module")
def ranges(floating, samples):
    return ranges_of(floating, samples, calibrator="minmax", threads=1)


def test_given_ranges_need_no_samples_and_give_the_file_of_calibration(floating, samples, ranges):
    calibrated = quantize(floating, samples, encoding=FULL, calibrator="minmax", threads=1)
    found = with_ranges(floating, samples, ranges)
    assert found.model == calibrated.model


def test_every_given_range_lands_or_has_a_reason(floating, samples, ranges):
    moved = {n: (0.77 * low, 0.81 * high) for n, (low, high) in ranges.items()}
    found = with_ranges(floating, samples, moved)
    landed = set(moved) - found.not_written.keys()
    assert len(landed) >= 8
    for name in landed:
        low, high = (float(np.float32(end)) for end in moved[name])
        scale, zero_point = parameters(found.model, name)
        assert scale == np.float32((high - low) / 255)
        assert zero_point == round(-low / ((high - low) / 255))
    said = " | ".join(found.not_written.values())
    assert "part of its kernel" in said  # before a Relu
    assert found.not_written["logits"] == "a graph output: it leaves in float"


def test_a_range_that_is_missing_is_an_error_and_one_before_a_relu_may_be(
    floating, samples, ranges
):
    absorbed = next(n for n, why in with_ranges(floating, samples, ranges).not_written.items()
                    if "part of its kernel" in why)  # fmt: skip
    fewer = {n: r for n, r in ranges.items() if n not in (absorbed, "logits")}
    assert with_ranges(floating, samples, fewer)
    fewer.pop("input")
    with pytest.raises(ExportError, match="none for 'input'"):
        with_ranges(floating, samples, fewer)


def test_a_range_that_undoes_a_relu_is_refused(floating, samples, ranges):
    relu = next(n for n in floating.graph.node if n.op_type == "Relu").output[0]
    with pytest.raises(ExportError, match=f"'{relu}' is quantized over"):
        with_ranges(floating, samples, {**ranges, relu: (-1.0, 3.0)})
    clip = next(n for n in floating.graph.node if n.op_type == "Clip").output[0]
    with pytest.raises(ExportError, match=f"'{clip}' is quantized over"):
        with_ranges(floating, samples, {**ranges, clip: (0.0, 7.0)})


@pytest.mark.parametrize("bad", [(2.0, 1.0), (0.0, float("nan")), (float("-inf"), 1.0)])
def test_a_range_that_is_none_is_refused(floating, samples, ranges, bad):
    with pytest.raises(ExportError, match="finite low ≤ high"):
        with_ranges(floating, samples, {**ranges, "input": bad})


def test_a_range_of_an_unknown_tensor_is_refused(floating, samples, ranges):
    with pytest.raises(ExportError, match="'nobody'"):
        with_ranges(floating, samples, {**ranges, "nobody": (0.0, 1.0)})


def test_a_scale_that_did_not_land_is_an_integrity_error(floating, samples, ranges):
    written = with_ranges(floating, samples, ranges).model
    other = {**ranges, "input": (-1.0, 1.0)}
    with pytest.raises(IntegrityError, match="'input' has scale"):
        check_ranges(floating, written, other, kept=(), op_types=FULL.op_types)


def test_named_nodes_stay_float_and_no_others(floating, samples):
    node = next(n for n in floating.graph.node if n.input[1:2] == ["down.weight"])
    found = quantize(floating, samples, encoding=FULL, threads=1, keep_float=[node.name])
    assert found.counts["int8_weights"] == 4
    assert arrays(found.model)["down.weight"].dtype == np.float32
    with pytest.raises(IntegrityError, match="kept float weights"):
        check_int8(floating, found.model)


def test_one_layer_alone_may_be_int8(floating, samples):
    names = [n.name for n in floating.graph.node if n.op_type in ("Conv", "Gemm")]
    found = quantize(floating, samples, encoding=FULL, threads=1, keep_float=names[1:])
    assert found.counts["int8_weights"] == 1


def test_a_node_to_keep_that_does_not_exist_is_refused(floating, samples):
    with pytest.raises(ExportError, match="no node named nobody"):
        quantize(floating, samples, encoding=FULL, threads=1, keep_float=["nobody"])


def test_a_bias_with_another_scale_than_its_products_is_an_integrity_error(floating, int8):
    broken = onnx.ModelProto()
    broken.CopyFrom(int8.model)
    for tensor in broken.graph.initializer:
        if tensor.name == "down.bias_quantized_scale":
            value = 1.01 * numpy_helper.to_array(tensor)
            tensor.CopyFrom(numpy_helper.from_array(value.astype(np.float32), tensor.name))
    with pytest.raises(IntegrityError, match="scale of input times weight"):
        check_int8(floating, broken)


def conv_then(nodes, outputs, *, opset=18, constants=()):
    """x → Conv → `nodes`, which start from "c"."""
    rng = np.random.default_rng(0)
    weight = numpy_helper.from_array(rng.normal(size=(4, 3, 3, 3)).astype(np.float32), "w")
    value = onnx.helper.make_tensor_value_info
    graph = onnx.helper.make_graph(
        [onnx.helper.make_node("Conv", ["x", "w"], ["c"], name="conv"), *nodes],
        "g",
        [value("x", TensorProto.FLOAT, ["N", 3, 16, 16])],
        [value(name, TensorProto.FLOAT, None) for name in outputs],
        [weight, *constants],
    )
    return onnx.helper.make_model(
        graph, opset_imports=[onnx.helper.make_opsetid("", opset)], ir_version=8
    )


def test_a_relu_at_the_end_is_not_lost(samples, tmp_path):
    model = conv_then([onnx.helper.make_node("Relu", ["c"], ["y"], name="relu")], ["y"])
    found = quantize(model, samples, encoding=FULL, threads=1)
    write_model(found.model, tmp_path / "q.onnx")
    outputs = run_batches(open_session(tmp_path / "q.onnx", threads=1), samples, 16)
    assert outputs.min() == 0
    assert outputs.max() > 1


def test_a_clip_that_no_uint8_range_can_stand_for_stays_float(samples, tmp_path):
    bounds = [numpy_helper.from_array(np.float32(b), n) for b, n in ((0.5, "low"), (2, "high"))]
    clip = onnx.helper.make_node("Clip", ["c", "low", "high"], ["y"], name="clip")
    model = conv_then([clip], ["y"], constants=bounds)
    found = quantize(model, samples, encoding=FULL, threads=1)
    assert "Clip" in [node.op_type for node in found.model.graph.node]
    write_model(found.model, tmp_path / "q.onnx")
    outputs = run_batches(open_session(tmp_path / "q.onnx", threads=1), samples, 16)
    assert (outputs.min(), outputs.max()) == pytest.approx((0.5, 2), abs=0.01)


def test_an_opset_without_scales_per_channel_is_refused(samples):
    model = conv_then([], ["c"], opset=12)
    with pytest.raises(ExportError, match="opset 12; expected 13"):
        quantize(model, samples, encoding=FULL, threads=1)


def test_weights_that_are_not_finite_are_refused(floating, samples):
    broken = onnx.ModelProto()
    broken.CopyFrom(floating)
    for tensor in broken.graph.initializer:
        if tensor.name == "down.weight":
            value = numpy_helper.to_array(tensor).copy()
            value[0, 0, 0, 0] = np.nan
            tensor.CopyFrom(numpy_helper.from_array(value, tensor.name))
    with pytest.raises(ExportError, match=r"down\.weight are not finite"):
        quantize(broken, samples, encoding=FULL, threads=1)


def test_the_policy_of_operators_stands_with_its_reason():
    assert REDUCED.op_types == FULL.op_types  # one file for all of them
    assert "Add" in FULL.op_types
    assert "Mul" not in FULL.op_types
    assert "residual Adds" in FULL.op_reason
