from __future__ import annotations

import itertools

import edgestill.exporters.saturation as saturation
import numpy as np
import pytest
from edgestill.exporters.int8 import encoding_for, quantize
from edgestill.exporters.rewrites import normalise
from edgestill.exporters.saturation import pairs_at_risk, saturating_pairs, total
from edgestill.pipeline.errors import ExportError, MeasurementError
from onnx import TensorProto, helper, numpy_helper

ZERO = 180  # zero point of the activations below: what padding holds, enough to saturate


def layer(op, weight, shape, *, zero=ZERO, **attributes):
    """input → Q → DQ → op → output, with scale 1: input x becomes the uint8 x + zero."""
    constants = {
        "one": np.float32(1),
        "zero": np.asarray(zero),
        "w": weight,
        "w_zero": np.zeros((), weight.dtype),
    }
    nodes = [
        helper.make_node("QuantizeLinear", ["input", "one", "zero"], ["q"]),
        helper.make_node("DequantizeLinear", ["q", "one", "zero"], ["x"]),
        helper.make_node("DequantizeLinear", ["w", "one", "w_zero"], ["weight"]),
        helper.make_node(op, ["x", "weight"], ["output"], "layer", **attributes),
    ]
    graph = helper.make_graph(
        nodes, "layer",
        [helper.make_tensor_value_info("input", TensorProto.FLOAT, ["N", *shape])],
        [helper.make_tensor_value_info("output", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(value, name) for name, value in constants.items()],
    )  # fmt: skip
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8)


def fed(values, zero=ZERO):
    return values.astype(np.float32) - zero


def brute_force(values, weight, *, groups=1, stride=1, dilation=1, pad=0):
    """Pair sums of a Conv, one by one in Python integers. Returns (outside int16, all)."""
    padded = np.pad(values, ((0, 0), (0, 0), (pad, pad), (pad, pad)), constant_values=ZERO)
    count, _, height, width = padded.shape
    outputs, channels, k_height, k_width = weight.shape
    reach_y, reach_x = dilation * (k_height - 1), dilation * (k_width - 1)
    outside = evaluated = 0
    for n, out, y, x in itertools.product(
        range(count), range(outputs), range(0, height - reach_y, stride),
        range(0, width - reach_x, stride),
    ):  # fmt: skip
        group = out // (outputs // groups)
        products = [
            int(padded[n, group * channels + c, y + dy * dilation, x + dx * dilation])
            * int(weight[out, c, dy, dx])
            for dy in range(k_height)
            for dx in range(k_width)
            for c in range(channels)
        ]
        for first, second in itertools.zip_longest(products[::2], products[1::2], fillvalue=0):
            outside += not -32768 <= first + second <= 32767
            evaluated += 1
    return outside, evaluated


def test_the_static_bound_is_whether_any_input_can_leave_int16():
    values = np.arange(-128, 128)
    first, second = (array.ravel() for array in np.meshgrid(values, values))
    corners = [a * first + b * second for a in (0, 255) for b in (0, 255)]
    expected = (np.max(corners, 0) > 32767) | (np.min(corners, 0) < -32768)
    weights = np.stack([first, second], 1).astype(np.int8)
    np.testing.assert_array_equal(pairs_at_risk(weights)[:, 0], expected)
    assert expected.any()
    assert not expected[np.abs(weights.astype(int)).max(1) <= 64].any()


def test_a_gemm_whose_sums_are_worked_by_hand():
    weight = np.array(
        [
            [127, 127, 0, 0],  # 255·127 + 255·127 = 64,770: out. 100·254 = 25,400: in
            [-128, -128, 0, 0],  # −65,280: out. −25,600: in
            [127, -127, 127, 1],  # opposite signs; 255·128 = 32,640: in
            [0, 127, 127, 0],  # neighbours, but of two pairs: in
            [64, 64, 127, 2],  # 255·129 = 32,895: out
        ],
        np.int8,
    )
    rows = np.array([[255] * 4, [100] * 4, [255, 0, 255, 0]], np.uint8)
    model = layer("Gemm", weight, [4], zero=np.uint8(ZERO), transB=1)
    (found,) = saturating_pairs(model, fed(rows), threads=1)
    assert (found["pairs"], found["pairs_at_risk"]) == (10, 3)
    assert found["pair_sums"] == 3 * 10
    assert found["saturating"] == 3
    assert found["largest_pair_sum"] == 65_280
    assert found["node"] == "layer"


@pytest.mark.parametrize("op", ["Gemm", "MatMul"])
def test_the_weight_of_a_matrix_product_is_read_along_k(op):
    weight = np.array([[127, 0], [127, 0], [0, 100], [0, 120], [0, 0]], np.int8)  # (K, N), K odd
    model = layer(op, weight, [5], zero=np.uint8(ZERO))
    (found,) = saturating_pairs(model, fed(np.full((2, 5), 255)), threads=1)
    assert (found["pairs"], found["saturating"]) == (6, 4)


@pytest.mark.parametrize(
    ("groups", "stride", "dilation", "pad", "channels"),
    [(1, 1, 1, 1, 3), (1, 2, 1, 1, 4), (2, 1, 1, 0, 6), (1, 1, 2, 2, 2), (2, 2, 1, 1, 2)],
)
def test_a_conv_agrees_with_pair_sums_taken_one_by_one(groups, stride, dilation, pad, channels):
    rng = np.random.default_rng(groups + stride)
    weight = rng.integers(-128, 128, (4, channels // groups, 3, 3)).astype(np.int8)
    values = rng.integers(0, 256, (3, channels, 6, 5)).astype(np.uint8)
    model = layer(
        "Conv", weight, values.shape[1:], zero=np.uint8(ZERO), group=groups,
        strides=[stride] * 2, dilations=[dilation] * 2, pads=[pad] * 4,
    )  # fmt: skip
    (found,) = saturating_pairs(model, fed(values), threads=1)
    outside, evaluated = brute_force(
        values, weight, groups=groups, stride=stride, dilation=dilation, pad=pad
    )
    assert outside > 0
    assert (found["saturating"], found["pair_sums"]) == (outside, evaluated)


def test_same_padding_is_that_of_onnx():
    weight = np.full((1, 2, 2, 2), 127, np.int8)
    values = np.full((1, 2, 3, 3), 255, np.uint8)
    model = layer("Conv", weight, (2, 3, 3), zero=np.uint8(7), auto_pad="SAME_UPPER")
    (found,) = saturating_pairs(model, fed(values, 7), threads=1)
    # 9 outputs of 4 kernel positions; the padded row and column hold 7 in both channels
    assert found["pair_sums"] == 36
    assert found["saturating"] == 36 - (3 + 3) * 2 + 1


def test_counts_do_not_depend_on_how_the_work_is_cut(monkeypatch):
    rng = np.random.default_rng(5)
    weight = rng.integers(-128, 128, (5, 4, 3, 3)).astype(np.int8)
    samples = fed(rng.integers(0, 256, (9, 4, 5, 5)))
    model = layer("Conv", weight, (4, 5, 5), zero=np.uint8(ZERO))
    whole = saturating_pairs(model, samples, threads=1)
    monkeypatch.setattr(saturation, "BATCH", 2)
    monkeypatch.setattr(saturation, "BLOCK", 7)
    assert saturating_pairs(model, samples, threads=1) == whole
    assert whole[0]["saturating"] > 0


def test_depthwise_layers_are_exempt_and_say_so():
    weight = np.full((3, 1, 2, 2), 127, np.int8)
    model = layer("Conv", weight, (3, 4, 4), zero=np.uint8(ZERO), group=3)
    (found,) = saturating_pairs(model, fed(np.full((1, 3, 4, 4), 255)), threads=1)
    assert (found["pairs_at_risk"], found["saturating"]) == (0, 0)
    assert "32 bits" in found["exempt"]


@pytest.mark.parametrize(("targets", "safe"), [(("arm", "x86"), True), (("arm",), False)])
def test_seven_bit_weights_of_a_real_net_cannot_saturate(raw, samples, targets, safe):
    encoding = encoding_for(targets)
    made = quantize(normalise(raw), samples, encoding=encoding, calibrator="minmax", threads=1)
    layers = saturating_pairs(made.model, samples[:16], threads=1)
    whole = total(layers)
    assert [found["op"] for found in layers] == ["Conv"] * 4 + ["Gemm"]
    assert (whole["pairs_at_risk"] == 0) is safe
    assert (whole["saturating"] == 0) is safe
    assert whole["pair_sums"] == sum(found["pair_sums"] for found in layers) > 0


def test_a_fixed_batch_counts_no_sample_twice():
    weight = np.full((1, 2, 1, 1), 127, np.int8)
    model = layer("Conv", weight, (2, 3, 3), zero=np.uint8(ZERO))
    model.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 4
    (found,) = saturating_pairs(model, fed(np.full((6, 2, 3, 3), 255)), threads=1)
    assert found["saturating"] == found["pair_sums"] == 6 * 9


def test_what_cannot_be_judged_is_an_error(raw):
    weight = np.ones((1, 2, 1, 1), np.int8)
    with pytest.raises(MeasurementError, match="no samples"):
        saturating_pairs(
            layer("Conv", weight, (2, 3, 3), zero=np.uint8(0)), np.zeros((0, 2, 3, 3)), threads=1
        )
    with pytest.raises(ExportError, match="expected uint8"):
        saturating_pairs(
            layer("Conv", weight, (2, 3, 3), zero=np.int8(0)), np.zeros((1, 2, 3, 3)), threads=1
        )
    with pytest.raises(ExportError, match="QDQ file"):
        saturating_pairs(normalise(raw), np.zeros((1, 3, 16, 16)), threads=1)
