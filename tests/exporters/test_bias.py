from __future__ import annotations

import numpy as np
import onnx
import pytest
import torch
from edgestill.exporters.bias import channel_means, correct_bias, int32_biases
from edgestill.exporters.graph import arrays, read_model
from edgestill.exporters.int8 import encoding_for, quantize
from edgestill.exporters.rewrites import normalise
from edgestill.exporters.sessions import open_session, run_batches
from edgestill.exporters.stamp import write_model
from edgestill.exporters.to_onnx import export_onnx
from edgestill.models.mobilenet import mobilenetv2
from edgestill.pipeline.errors import ExportError
from onnx import numpy_helper

ENCODING = encoding_for(("arm", "x86"))


@pytest.fixture(scope="module")
def floating(samples, tmp_path_factory):
    """A depthwise net."""
    torch.manual_seed(0)
    net = mobilenetv2(5, 3, width=0.25, stem="small", dropout=0.0)
    torch.nn.init.normal_(net.classifier[1].weight, std=0.5)
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


def mean_errors(floating, quantized, samples):
    """|mean difference| of each layer, in steps of its own bias: (layers,) of the largest."""
    constants = arrays(quantized)
    biases = int32_biases(quantized)
    layers = [node for node in quantized.graph.node if node.name in biases]
    originals = {node.name: node.output[0] for node in floating.graph.node}
    before = channel_means(floating, [originals[n.name] for n in layers], samples, threads=1)
    after = channel_means(quantized, [n.output[0] for n in layers], samples, threads=1)
    steps = [constants[biases[n.name].input[1]] for n in layers]
    return [
        float((np.abs(a - b) / step).max()) for a, b, step in zip(before, after, steps, strict=True)
    ]


def test_every_layer_gets_the_mean_of_the_float_layer(floating, plain, corrected, samples):
    before = mean_errors(floating, plain, samples)
    after = mean_errors(floating, corrected, samples)
    assert len(before) == 53
    assert np.median(before) > 10
    # half a step of the bias, and what kernels that run fused in the end round otherwise
    assert max(after) < 0.05 * max(before)
    assert np.median(after) < 1


def test_logits_come_nearer_to_float_on_other_samples(
    floating, plain, corrected, samples, tmp_path
):
    fresh = samples[:, ::-1, ::-1].copy()  # other colours, upside down
    errors = []
    for number, model in enumerate((floating, plain, corrected)):
        write_model(model, tmp_path / f"{number}.onnx")
        errors.append(run_batches(open_session(tmp_path / f"{number}.onnx", threads=1), fresh, 16))
    reference, uncorrected, moved = errors
    assert np.square(moved - reference).mean() < 0.7 * np.square(uncorrected - reference).mean()


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


def test_means_are_those_of_numpy(floating, samples, tmp_path):
    conv = next(n for n in floating.graph.node if n.op_type == "Conv")
    whole = onnx.ModelProto()
    whole.CopyFrom(floating)
    del whole.graph.output[:]
    whole.graph.output.append(
        onnx.helper.make_tensor_value_info(conv.output[0], onnx.TensorProto.FLOAT, None)
    )
    write_model(whole, tmp_path / "m.onnx")
    values = run_batches(open_session(tmp_path / "m.onnx", threads=1), samples[:21], 7)
    (found,) = channel_means(floating, [conv.output[0]], samples[:21], threads=1)
    assert found == pytest.approx(values.mean((0, 2, 3), dtype=np.float64), rel=1e-5, abs=1e-6)


def test_quantize_corrects_if_asked(floating, corrected, samples):
    found = quantize(
        floating, samples, encoding=ENCODING, calibrator="minmax", threads=1, correct_bias=True
    )
    assert found.model == corrected


def test_no_samples_are_refused(floating, plain, samples):
    with pytest.raises(ExportError, match="bias correction: no calibration samples"):
        correct_bias(floating, plain, samples[:0], threads=1)
