"""Rounding in torch against onnxruntime's, and its gradients against worked numbers."""

from __future__ import annotations

import math

import numpy as np
import onnx
import pytest
import torch
from edgestill.exporters.calibrate import scale_and_zero_point
from edgestill.exporters.sessions import open_session
from edgestill.pipeline.quantize.fake_quant import (
    EMA_DECAY,
    SMALLEST_SHARE,
    ActivationRange,
    affine,
    fake_activation,
    fake_bias,
    fake_weight,
    learned_activation,
    scale_with_room,
    sqnr_db,
    weight_scale,
)
from edgestill.pipeline.quantize.layout import INF, Range
from onnx import TensorProto, helper, numpy_helper
from onnxruntime.quantization.qdq_quantizer import QDQQuantizer
from onnxruntime.quantization.quant_utils import compute_data_quant_params, compute_scale_zp

FREE = (-INF, INF)
RANGES = [(-1.0, 2.0), (0.0, 6.0), (-3.7, 0.0), (-0.013, 250.0), (-1e-3, 1e-4), (0.0, 0.0),
          (0.0, 1e-37),
          *np.abs(np.random.default_rng(0).normal(size=(200, 2))) * [-1, 1]]  # fmt: skip


def tensor(value) -> torch.Tensor:
    return torch.tensor(value, dtype=torch.float32)


def quantize_in_onnxruntime(values, scale, zero, *, axis=None, path):
    """QuantizeLinear and DequantizeLinear of onnxruntime: the integers and what they stand for."""
    attributes = {} if axis is None else {"axis": axis}
    graph = helper.make_graph(
        [
            helper.make_node("QuantizeLinear", ["x", "s", "z"], ["q"], **attributes),
            helper.make_node("DequantizeLinear", ["q", "s", "z"], ["y"], **attributes),
        ],
        "qdq",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, values.shape)],
        [helper.make_empty_tensor_value_info(name) for name in ("q", "y")],
        [numpy_helper.from_array(scale, "s"), numpy_helper.from_array(zero, "z")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8)
    onnx.save(onnx.shape_inference.infer_shapes(model), path)
    return open_session(path, threads=1, optimize=False).run(None, {"x": values})


@pytest.mark.parametrize("low_high", RANGES[:7])
def test_scale_and_zero_point_of_a_range_are_onnxruntimes_bit_by_bit(low_high):
    low, high = np.float32(low_high[0]), np.float32(low_high[1])
    scale, zero = affine(tensor(low), tensor(high))
    theirs = compute_scale_zp(low, high, np.uint8(0), np.uint8(255))
    assert (zero.item(), scale.numpy()) == (theirs[0], theirs[1])
    assert (scale.numpy(), zero.item()) == scale_and_zero_point(float(low), float(high))


def test_scale_and_zero_point_agree_on_many_ranges():
    assert len(RANGES) > 200
    for low, high in np.array(RANGES, np.float32):
        scale, zero = affine(tensor(low), tensor(high))
        theirs = compute_scale_zp(low, high, np.uint8(0), np.uint8(255))
        assert (zero.item(), scale.numpy()) == (theirs[0], theirs[1])


@pytest.mark.parametrize("limit", [64, 127])
@pytest.mark.parametrize("axis", [0, 1, -1, None])
def test_weight_scales_are_onnxruntimes_bit_by_bit(axis, limit):
    weight = np.random.default_rng(1).normal(size=(5, 6, 3)).astype(np.float32)
    weight[2], weight[:, 1], weight[..., 2] = 0, 0, 0  # a channel without weights has scale 1
    parts = [weight] if axis is None else np.moveaxis(weight, axis, 0)
    expected = [
        compute_data_quant_params(p.ravel(), TensorProto.INT8, True, reduce_range=limit == 64)[1]
        for p in parts
    ]

    found = weight_scale(torch.from_numpy(weight), axis=axis, limit=limit).numpy()

    np.testing.assert_array_equal(found.reshape(-1), np.array(expected).reshape(-1))
    assert found.dtype == np.float32


def test_weight_scales_make_room_for_biases_as_onnxruntime_does():
    scale = np.array([1e-2, 1e-12, 3e-10, 1e-20], np.float32)
    bias = np.array([0.5, 0.5, -3.0, 0.0], np.float32)
    given = np.float32(0.02)
    _, expected = QDQQuantizer._adjust_weight_scale_for_int32_bias(
        None, given, scale.copy(), "w", numpy_helper.from_array(bias, "b"), True
    )

    found = scale_with_room(torch.from_numpy(scale), tensor(bias), input_scale=tensor(given))

    np.testing.assert_array_equal(found.numpy(), expected)
    assert (found.numpy() != scale).tolist() == [False, True, True, False]
    # and the bias then fits
    assert np.abs(bias / (found.numpy().astype(np.float64) * given)).max() < 2**31


@pytest.mark.parametrize(("low", "high"), [(-1.0, 2.0), (0.0, 6.0), (-3.0, 0.0), (-0.01, 9.0)])
def test_activations_round_as_onnxruntime_rounds_them(low, high, tmp_path):
    scale, zero = affine(tensor(low), tensor(high))
    rng = np.random.default_rng(2)
    ties = (rng.integers(-300, 600, 4000) + 0.5).astype(np.float32) * scale.numpy()
    values = np.concatenate([rng.normal(size=4000).astype(np.float32) * 4, ties, [0.0, 1e9, -1e9]])
    values = values.astype(np.float32)

    found = fake_activation(torch.from_numpy(values), tensor(low), tensor(high))

    _, expected = quantize_in_onnxruntime(
        values, scale.numpy(), np.array(int(zero), np.uint8), path=tmp_path / "q.onnx"
    )
    np.testing.assert_array_equal(found.numpy(), expected)
    assert 0.0 in found
    learned = learned_activation(torch.from_numpy(values), tensor(low), tensor(high))
    np.testing.assert_array_equal(learned.numpy(), expected)


@pytest.mark.parametrize("axis", [0, 1])
def test_weights_round_as_onnxruntime_rounds_them(axis, tmp_path):
    weight = np.random.default_rng(3).normal(size=(4, 5, 3, 3)).astype(np.float32)
    scale = weight_scale(torch.from_numpy(weight), axis=axis, limit=64)

    found = fake_weight(torch.from_numpy(weight), scale, axis=axis)

    integers, expected = quantize_in_onnxruntime(
        weight, scale.numpy(), np.zeros(len(scale), np.int8), axis=axis, path=tmp_path / "w.onnx"
    )
    np.testing.assert_array_equal(found.numpy(), expected)
    assert np.abs(integers).max() == 64


def test_biases_round_to_whole_products():
    scale = tensor([0.25, 0.5, 2.0])
    found = fake_bias(tensor([0.3, -0.74, 3.0]), scale)
    assert found.tolist() == [0.25, -0.5, 4.0]  # 1.2 → 1, -1.48 → -1, 1.5 → 2 (half to even)


def test_weights_and_biases_pass_their_gradients():
    weight, bias = (torch.randn(3, 2, requires_grad=True) for _ in range(2))
    scale = weight_scale(weight, axis=0, limit=127)
    (fake_weight(weight, scale, axis=0) * 3 + fake_bias(bias, scale[:, None]) * 5).sum().backward()
    assert (weight.grad == 3).all()
    assert (bias.grad == 5).all()


@pytest.mark.parametrize("function", [fake_activation, learned_activation])
def test_saturated_values_have_no_gradient(function):
    x = tensor([-1.5, -1.0, 0.0, 1.999, 2.5]).requires_grad_()
    (function(x, tensor(-1.0), tensor(2.0)) * tensor([1, 2, 3, 4, 5])).sum().backward()
    assert x.grad.tolist() == [0, 2, 3, 4, 0]


def test_ends_of_a_range_have_the_gradients_of_lsq():
    """Term by term: beyond an end 1; inside (round(v) - v) / 255 for high, its opposite for low."""
    low, high = (tensor(value).requires_grad_() for value in (-1.0, 2.0))
    x, weights = 2 * torch.randn(2, 500), torch.randn(2, 500)
    assert (x > 2).any()
    assert (x < -1).any()
    (learned_activation(x, low, high) * weights).sum().backward()

    of_low = of_high = 0.0
    step = 3.0 / 255  # -1 and 2 are on the grid: the zero point is 85
    for value, weight in zip(x.double().reshape(-1), weights.double().reshape(-1), strict=True):
        if value < -1 - step / 2:
            of_low += weight
        elif value > 2 + step / 2:
            of_high += weight
        else:
            error = (torch.round(value / step) - value / step) * weight / 255
            of_high += error
            of_low -= error
    # LSQ's 1 / √(N · 255) for the step, N values a sample, is 255² times that for the range
    factor = 255**2 / math.sqrt(500 * 255)
    assert high.grad.item() == pytest.approx(factor * float(of_high), rel=1e-4)
    assert low.grad.item() == pytest.approx(factor * float(of_low), rel=1e-4)


def test_a_learned_range_closes_in_on_what_is_worth_keeping():
    """Of 1,000 values around ±1 and one of 40, the least squared error leaves out the one."""
    torch.manual_seed(0)
    x = torch.cat([torch.randn(1000), tensor([40.0])])[None]
    module = ActivationRange(Range(-4.0, 40.0, FREE), learned=True)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.02)

    def error() -> torch.Tensor:
        return (module(x) - x)[:, :-1].square().sum()

    before = error().item()
    for _ in range(300):
        optimizer.zero_grad()
        error().backward()
        optimizer.step()
        module.project()
    assert error().item() < before / 10
    assert module.high < 10


def test_averaged_ranges_move_towards_each_batch_and_only_in_training():
    module = ActivationRange(Range(-1.0, 2.0, FREE), learned=False)
    assert not list(module.parameters())
    module(tensor([-2.0, 4.0]))
    assert module.ends() == pytest.approx(
        (-1.0 - (1 - EMA_DECAY) * 1.0, 2.0 + (1 - EMA_DECAY) * 2.0)
    )
    before = module.ends()
    module.eval()(tensor([-9.0, 9.0]))
    assert module.ends() == before


@pytest.mark.parametrize("learned", [True, False])
def test_a_range_stays_where_the_file_can_have_it(learned):
    relu6 = ActivationRange(Range(0.0, 5.0, (0.0, 6.0)), learned=learned)
    free = ActivationRange(Range(-2.0, 4.0, FREE), learned=learned)
    for _ in range(500):
        relu6(tensor([[-50.0, 50.0]]))
    with torch.no_grad():
        relu6.high.add_(9.0)
        free.low.add_(9.0)
        free.high.sub_(9.0)
    relu6.project()
    free.project()
    assert relu6.ends() == (0.0, 6.0)
    assert free.ends() == (-2.0 * SMALLEST_SHARE, 4.0 * SMALLEST_SHARE)


def test_a_range_behind_a_relu_is_learned_at_its_upper_end_alone():
    module = ActivationRange(Range(0.0, 5.0, (0.0, INF)), learned=True)
    assert [name for name, _ in module.named_parameters()] == ["high"]
    assert set(module.state_dict()) == {"low", "high"}  # what a checkpoint keeps


def test_sqnr_is_ten_decibels_a_factor_of_ten_in_power():
    signal = np.array([3.0, 4.0], np.float32)
    assert sqnr_db(signal, signal + np.float32(0.5)) == pytest.approx(10 * math.log10(25 / 0.5))
    assert sqnr_db(signal, signal) == math.inf
