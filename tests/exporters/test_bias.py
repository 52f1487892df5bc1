from __future__ import annotations

import numpy as np
import onnx
import pytest
import torch
from edgestill.exporters.bias import correct_bias, int32_biases, mean_errors, passing_range
from edgestill.exporters.graph import arrays, read_model
from edgestill.exporters.int8 import encoding_for, quantize
from edgestill.exporters.rewrites import normalise
from edgestill.exporters.sessions import open_session, run_batches
from edgestill.exporters.stamp import write_model
from edgestill.exporters.to_onnx import export_onnx
from edgestill.models.layers import init_kaiming
from edgestill.models.mobilenet import InvertedResidual
from edgestill.pipeline.errors import ExportError
from onnx import numpy_helper
from torch import nn

ENCODING = encoding_for(("arm", "x86"))


@pytest.fixture(scope="module")
def floating(samples, tmp_path_factory):
    """A depthwise net with residual Adds."""
    torch.manual_seed(0)
    shapes = [(8, 8, 1, 1), (8, 12, 2, 6), (12, 12, 1, 6), (12, 16, 2, 6), (16, 16, 1, 6)]
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU6(),
        *(InvertedResidual(i, o, stride=s, expansion=e) for i, o, s, e in shapes),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 5),
    )  # fmt: skip
    init_kaiming(net)
    nn.init.zeros_(net[-1].bias)
    with torch.no_grad():
        for _ in range(20):  # statistics, so that there are biases
            net(torch.from_numpy(samples))
    net.eval()
    path = tmp_path_factory.mktemp("m") / "m.onnx"
    export_onnx(net, torch.from_numpy(samples[:2]), path, batch="dynamic")
    return normalise(read_model(path))


@pytest.fixture(scope="module")
def plain(floating, samples):
    found = quantize(floating, samples, encoding=ENCODING, calibrator="minmax", threads=1)
    return found.model


@pytest.fixture(scope="module")
def corrected(floating, plain, samples):
    return correct_bias(floating, plain, samples, threads=1)


def layer_errors(floating, quantized, samples):
    """Largest |mean error| of each layer, in steps of its own bias."""
    constants, biases = arrays(quantized), int32_biases(quantized)
    layers = [node for node in floating.graph.node if node.name in biases]
    return [
        float(
            np.abs(
                mean_errors(floating, quantized, node, samples, threads=1)
                / constants[biases[node.name].input[1]]
            ).max()
        )
        for node in layers
    ]


def with_output(model, name):
    result = onnx.ModelProto()
    result.CopyFrom(model)
    del result.graph.output[:]
    info = onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None)
    result.graph.output.append(info)
    return result


def test_every_layer_gets_the_mean_of_the_float_layer(floating, plain, corrected, samples):
    before = layer_errors(floating, plain, samples)
    assert len(before) == 15  # every Conv; the classifier starts without a bias
    assert np.median(before) > 10
    # the correction is rounded to a whole step; nothing after a layer changes what it was given.
    # Sums are float32, in the CPU's own order, and reach 70,000 steps: their last bit is 2⁻⁷ steps
    assert max(layer_errors(floating, corrected, samples)) <= 0.5 + 2**-7


def test_layers_come_nearer_to_float_on_other_samples(
    floating, plain, corrected, samples, tmp_path
):
    """Squared error of some layers, on images that were not measured."""
    fresh = samples[:, ::-1, ::-1].copy()  # other colours, upside down
    convs = [node for node in floating.graph.node if node.op_type == "Conv"]
    gains = []
    for conv in convs[2::2]:
        values = []
        for model in (floating, plain, corrected):
            name = next(n for n in model.graph.node if n.name == conv.name).output[0]
            write_model(with_output(model, name), tmp_path / "m.onnx")
            values.append(run_batches(open_session(tmp_path / "m.onnx", threads=1), fresh, 16))
        reference, before, after = values
        gains.append(np.square(before - reference).mean() / np.square(after - reference).mean())
    assert len(gains) == 7
    assert np.median(gains) > 1.1


def test_only_values_that_pass_the_clip_count(floating, plain, samples, tmp_path):
    """Against numpy on the whole graphs, unfused."""
    node = next(n for n in floating.graph.node if n.op_type == "Conv")
    name = next(n for n in plain.graph.node if n.name == node.name).output[0]
    assert passing_range(plain, name) == pytest.approx((0, 6), rel=0.6)  # ReLU6, at most
    assert passing_range(plain, "logits") == (-np.inf, np.inf)
    values = []
    for model, output in ((floating, node.output[0]), (plain, name)):
        write_model(with_output(model, output), tmp_path / "m.onnx")
        session = open_session(tmp_path / "m.onnx", threads=1, optimize=False)
        values.append(run_batches(session, samples[:21], 7).astype(np.float64))
    expected, found = values
    low, high = passing_range(plain, name)
    found_means = mean_errors(floating, plain, node, samples[:21], threads=1)
    for channel, mean in enumerate(found_means):
        passes = (expected[:, channel] >= low) & (expected[:, channel] <= high)
        error = (found - expected)[:, channel][passes]
        assert mean == pytest.approx(error.mean() if passes.sum() >= 16 else 0, abs=1e-5)


def test_only_biases_change(plain, corrected):
    before, after = arrays(plain), arrays(corrected)
    changed = {name for name in before if not np.array_equal(before[name], after[name])}
    assert before.keys() == after.keys()
    assert changed
    assert changed <= {dequantize.input[0] for dequantize in int32_biases(plain).values()}
    assert [n.SerializeToString() for n in plain.graph.node] == [
        n.SerializeToString() for n in corrected.graph.node
    ]


def test_a_bias_that_was_shifted_is_shifted_back(floating, corrected, samples):
    shifted = onnx.ModelProto()
    shifted.CopyFrom(corrected)
    name = next(iter(int32_biases(shifted).values())).input[0]
    for tensor in shifted.graph.initializer:
        if tensor.name == name:
            moved = numpy_helper.to_array(tensor) + np.int32(5000)
            tensor.CopyFrom(numpy_helper.from_array(moved, name))
    found = arrays(correct_bias(floating, shifted, samples, threads=1))[name]
    assert np.abs(found.astype(int) - arrays(corrected)[name]).max() <= 1


def test_quantize_corrects_if_asked(floating, corrected, samples):
    found = quantize(
        floating, samples, encoding=ENCODING, calibrator="minmax", threads=1, correct_bias=True
    )
    assert found.model == corrected


def test_no_samples_are_refused(floating, plain, samples):
    with pytest.raises(ExportError, match="bias correction: no calibration samples"):
        correct_bias(floating, plain, samples[:0], threads=1)
