from __future__ import annotations

import numpy as np
import onnx
import pytest
import torch
from edgestill.exporters.equalize import (
    equalize,
    input_range,
    output_range,
    pairs_of,
    scale_input,
)
from edgestill.exporters.graph import arrays, read_model
from edgestill.exporters.rewrites import normalise
from edgestill.exporters.sessions import open_session, run_batches
from edgestill.exporters.stamp import write_model
from edgestill.exporters.to_onnx import export_onnx
from edgestill.models.mobilenet import mobilenetv2
from onnx import numpy_helper
from torch import nn


def export(net, inputs, path):
    export_onnx(net.eval(), torch.from_numpy(inputs[:2]), path, batch="dynamic")
    return normalise(read_model(path))


def logits(model, inputs, path):
    write_model(model, path)
    return run_batches(open_session(path, threads=1, optimize=False), inputs, 16)


def skew(model, seed=0):
    """Each stored weight's output channels times 10^-1.5…1.5: what equalization is for."""
    rng = np.random.default_rng(seed)
    result = onnx.ModelProto()
    result.CopyFrom(model)
    for tensor in result.graph.initializer:
        value = numpy_helper.to_array(tensor)
        if value.ndim == 4:
            factors = 10.0 ** rng.uniform(-1.5, 1.5, (len(value), 1, 1, 1))
            skewed = (value * factors).astype(np.float32)
            tensor.CopyFrom(numpy_helper.from_array(skewed, tensor.name))
    return result


class Chain(nn.Module):
    """Conv, depthwise, Conv in groups, Conv; then a block with a residual."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(),
            nn.Conv2d(8, 8, 3, padding=1, groups=8), nn.LeakyReLU(0.1),
            nn.Conv2d(8, 12, 1, groups=2), nn.MaxPool2d(2),
            nn.Conv2d(12, 6, 1, bias=False),
        )  # fmt: skip
        self.inner = nn.Conv2d(6, 6, 1)
        self.head = nn.Linear(6, 5)

    def forward(self, x):
        x = self.body(x)
        x = x + torch.relu(self.inner(x))
        return self.head(x.mean((2, 3)))


@pytest.fixture(scope="module")
def chain(samples, tmp_path_factory):
    return skew(export(Chain(), samples, tmp_path_factory.mktemp("chain") / "m.onnx"))


@pytest.fixture(scope="module")
def mobilenet(samples, tmp_path_factory):
    torch.manual_seed(0)
    net = mobilenetv2(5, 3, width=0.25, stem="small", dropout=0.0)
    with torch.no_grad():
        for _ in range(20):  # statistics, so that there are biases
            net(torch.from_numpy(samples))
    return export(net, samples, tmp_path_factory.mktemp("mobilenet") / "m.onnx")


def weights_of(pair, model):
    constants = arrays(model)
    groups = next((a.i for a in pair.second.attribute if a.name == "group"), 1)
    return constants[pair.first.input[1]], constants[pair.second.input[1]], groups


def spread(model):
    """Largest ratio of the two ranges of one channel, over all pairs."""
    ratios = []
    for pair in pairs_of(model):
        first, second, groups = weights_of(pair, model)
        ratios.append(np.abs(np.log(output_range(first) / input_range(second, groups))).max())
    return max(ratios)


def test_both_ranges_of_every_channel_become_equal(chain):
    assert spread(chain) > 2
    assert spread(equalize(chain)) < 0.01


def test_a_pair_gets_the_root_of_the_product_of_its_ranges(samples, tmp_path):
    net = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.Conv2d(4, 5, 1), nn.Flatten())
    model = skew(export(net, samples, tmp_path / "m.onnx"))
    (pair,) = pairs_of(model)
    first, second, _ = weights_of(pair, model)
    expected = np.sqrt(np.abs(first).max((1, 2, 3)) * np.abs(second).max((0, 2, 3)))
    after_first, after_second, _ = weights_of(pair, equalize(model))
    assert np.abs(after_first).max((1, 2, 3)) == pytest.approx(expected, rel=1e-5)
    assert np.abs(after_second).max((0, 2, 3)) == pytest.approx(expected, rel=1e-5)


def test_pairs_are_those_that_nobody_else_reads(chain):
    assert [len(arrays(chain)[pair.first.input[1]]) for pair in pairs_of(chain)] == [8, 8, 12]


@pytest.mark.parametrize("skewed", [False, True])
def test_the_function_stays_the_same(chain, mobilenet, samples, tmp_path, skewed):
    for number, model in enumerate((chain, skew(mobilenet) if skewed else mobilenet)):
        expected = logits(model, samples, tmp_path / f"{number}a.onnx")
        found = logits(equalize(model), samples, tmp_path / f"{number}b.onnx")
        # float32 rounding, of values that were scaled by up to 10^1.5 and back
        assert np.abs(expected - found).max() <= 1e-4 * np.abs(expected).max()
        assert equalize(model) != model


def test_relu6_and_residuals_are_left_in_mobilenet(mobilenet):
    """The last block is the only one whose narrow output neither an Add nor a ReLU6 reads."""
    (pair,) = pairs_of(mobilenet)
    constants = arrays(mobilenet)
    assert constants[pair.first.input[1]].shape[2:] == (1, 1)
    assert len(constants[pair.second.input[1]]) == 1280
    assert any(node.op_type == "Clip" for node in mobilenet.graph.node)


def test_input_channels_of_groups_are_found_and_scaled():
    """Against loops: output o of group g reads input channels g·I/G … of that group alone."""
    rng = np.random.default_rng(0)
    weight = rng.normal(size=(6, 4, 3, 3))  # 2 groups, 8 inputs
    largest = np.zeros(8)
    scaled = weight.copy()
    factors = rng.uniform(0.5, 2, 8)
    for o in range(6):
        for i in range(4):
            channel = (o // 3) * 4 + i
            largest[channel] = max(largest[channel], np.abs(weight[o, i]).max())
            scaled[o, i] *= factors[channel]
    assert np.array_equal(input_range(weight, 2), largest)
    assert np.array_equal(scale_input(weight, factors, 2), scaled)


def test_a_dead_channel_stays_as_it_is(chain, samples, tmp_path):
    dead = onnx.ModelProto()
    dead.CopyFrom(chain)
    name = pairs_of(dead)[0].first.input[1]
    for tensor in dead.graph.initializer:
        if tensor.name == name:
            value = numpy_helper.to_array(tensor).copy()
            value[2] = 0
            tensor.CopyFrom(numpy_helper.from_array(value, name))
    found = equalize(dead)
    assert np.isfinite(np.concatenate([v.ravel() for v in arrays(found).values()])).all()
    expected = logits(dead, samples, tmp_path / "a.onnx")
    assert np.allclose(logits(found, samples, tmp_path / "b.onnx"), expected, rtol=1e-4, atol=1e-4)


def test_shared_weights_are_left(samples, tmp_path):
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.head = nn.Conv2d(3, 3, 1), nn.Linear(3, 2)

        def forward(self, x):
            return self.head(self.conv(torch.relu(self.conv(x))).mean((2, 3)))

    model = export(Twice(), samples, tmp_path / "m.onnx")
    assert pairs_of(model) == []
    assert equalize(model) == model
