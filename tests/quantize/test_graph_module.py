"""The graph in torch against onnxruntime: operator by operator, and whole networks."""

from __future__ import annotations

import math

import numpy as np
import onnx
import pytest
import torch
from edgestill.exporters.graph import arrays, read_model
from edgestill.exporters.rewrites import normalise
from edgestill.exporters.sessions import open_session
from edgestill.exporters.to_onnx import export_onnx
from edgestill.models.zoo import ZOO, build
from edgestill.pipeline.errors import ExportError
from edgestill.pipeline.quantize.graph_module import GraphModule, trainable
from edgestill.pipeline.quantize.torch_ops import OPS
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor, nn

RNG = np.random.default_rng(0)
IMAGE = RNG.normal(size=(2, 4, 7, 9)).astype(np.float32)
OTHER = RNG.normal(size=(2, 4, 7, 9)).astype(np.float32)
MATRIX = RNG.normal(size=(5, 6)).astype(np.float32)
POSITIVE = np.abs(IMAGE) + np.float32(0.1)
KERNEL = RNG.normal(size=(6, 4, 3, 3)).astype(np.float32)
VECTOR = RNG.normal(size=6).astype(np.float32)
EMPTY = None  # an optional input that is left out


def whole(*values: int) -> np.ndarray:
    return np.array(values, np.int64)


def scalar(value: float) -> np.ndarray:
    return np.array(value, np.float32)


# operator, inputs, attributes
CASES = [
    ("Abs", [IMAGE], {}),
    ("Add", [IMAGE, OTHER[:1, :, :1]], {}),
    ("And", [IMAGE > 0, OTHER > 0], {}),
    ("AveragePool", [IMAGE], {"kernel_shape": [3, 2], "strides": [2, 2]}),
    ("AveragePool", [IMAGE], {"kernel_shape": [3, 3], "pads": [1, 1, 1, 1]}),
    ("AveragePool", [IMAGE], {"kernel_shape": [3, 3], "pads": [0, 1, 2, 1]}),
    ("AveragePool", [IMAGE], {"kernel_shape": [2, 2], "pads": [0, 0, 1, 1],
                              "count_include_pad": 1}),
    ("AveragePool", [IMAGE], {"kernel_shape": [2, 2], "strides": [2, 2], "ceil_mode": 1}),
    ("Cast", [IMAGE], {"to": TensorProto.INT64}),
    ("Clip", [IMAGE, scalar(-0.5), scalar(0.25)], {}),
    ("Clip", [IMAGE, EMPTY, scalar(0.25)], {}),
    ("Concat", [IMAGE, OTHER], {"axis": -3}),
    ("ConstantOfShape", [whole(2, 3)], {"value": numpy_helper.from_array(np.array([7.5], "f4"))}),
    ("Conv", [IMAGE, KERNEL, VECTOR], {"pads": [1, 1, 1, 1], "strides": [2, 1]}),
    ("Conv", [IMAGE, KERNEL], {"pads": [0, 1, 2, 0], "dilations": [2, 1]}),
    ("Conv", [IMAGE, KERNEL[:4, :1]], {"group": 4, "auto_pad": "SAME_UPPER", "strides": [2, 2]}),
    ("Conv", [IMAGE, KERNEL[..., :2, :2]], {"auto_pad": "SAME_LOWER"}),
    ("Conv", [IMAGE[..., 0], KERNEL[..., 0]], {"auto_pad": "VALID"}),
    ("Div", [IMAGE, POSITIVE], {}),
    ("Div", [whole(7, -7, 8), whole(2, 2, 3)], {}),
    ("Dropout", [IMAGE], {}),
    ("Elu", [IMAGE], {"alpha": 0.7}),
    ("Equal", [np.round(IMAGE), np.round(OTHER)], {}),
    ("Erf", [IMAGE], {}),
    ("Exp", [IMAGE], {}),
    ("Expand", [MATRIX[:1], whole(3, 5, 1)], {}),
    ("Flatten", [IMAGE], {}),
    ("Flatten", [IMAGE], {"axis": 3}),
    ("Gather", [MATRIX, np.array([[0, -1], [2, 3]])], {"axis": 0}),
    ("Gather", [MATRIX, np.array(2)], {"axis": -1}),
    ("Gelu", [IMAGE], {}),
    ("Gelu", [IMAGE], {"approximate": "tanh"}),
    ("Gemm", [MATRIX, MATRIX.T.copy(), VECTOR[:5]], {"alpha": 0.5, "beta": 2.0}),
    ("Gemm", [MATRIX, MATRIX], {"transB": 1}),
    ("Gemm", [MATRIX, MATRIX, VECTOR], {"transA": 1}),
    ("GlobalAveragePool", [IMAGE], {}),
    ("GlobalMaxPool", [IMAGE], {}),
    ("Greater", [IMAGE, OTHER], {}),
    ("HardSigmoid", [4 * IMAGE], {"alpha": 0.3}),
    ("HardSwish", [4 * IMAGE], {}),
    ("Identity", [IMAGE], {}),
    ("LayerNormalization", [IMAGE, OTHER[0, 0], OTHER[1, 0]], {"axis": -2, "epsilon": 1e-3}),
    ("LeakyRelu", [IMAGE], {"alpha": 0.2}),
    ("Less", [IMAGE, OTHER], {}),
    ("Log", [POSITIVE], {}),
    ("LogSoftmax", [IMAGE], {"axis": 1}),
    ("MatMul", [IMAGE, OTHER.swapaxes(2, 3).copy()], {}),
    ("Max", [IMAGE, OTHER, scalar(0.1)], {}),
    ("MaxPool", [IMAGE], {"kernel_shape": [3, 3], "strides": [2, 2], "pads": [1, 1, 1, 1]}),
    ("MaxPool", [IMAGE - 9], {"kernel_shape": [2, 2], "pads": [0, 0, 1, 1], "storage_order": 0}),
    ("MaxPool", [IMAGE], {"kernel_shape": [2, 2], "dilations": [2, 2], "strides": [2, 2]}),
    ("Min", [IMAGE, OTHER], {}),
    ("Mul", [IMAGE, OTHER[:, :1]], {}),
    ("Neg", [IMAGE], {}),
    ("Not", [IMAGE > 0], {}),
    ("PRelu", [IMAGE, OTHER[0, :, :1, :1].copy()], {}),
    ("Pad", [IMAGE, whole(0, 1, 0, 2, 0, 0, 3, 0), scalar(1.5)], {}),
    ("Pad", [IMAGE, whole(1, 2), scalar(0.0), whole(-2)], {}),
    ("Pad", [IMAGE, whole(0, 0, 1, 2, 0, 0, 2, 1)], {"mode": "reflect"}),
    ("Pad", [IMAGE, whole(0, 0, 1, 2, 0, 0, 2, 1)], {"mode": "edge"}),
    ("Pow", [POSITIVE, scalar(1.7)], {}),
    ("Reciprocal", [POSITIVE], {}),
    ("ReduceMax", [IMAGE, whole(1)], {"keepdims": 0}),
    ("ReduceMean", [IMAGE, whole(-1, -2)], {}),
    ("ReduceMean", [IMAGE], {"keepdims": 0}),
    ("ReduceMean", [IMAGE], {"noop_with_empty_axes": 1}),
    ("ReduceSum", [IMAGE, whole(0, 2)], {}),
    ("Relu", [IMAGE], {}),
    ("Reshape", [IMAGE, whole(0, -1, 9)], {}),
    ("Shape", [IMAGE], {"start": 1}),
    ("Sigmoid", [IMAGE], {}),
    ("Slice", [IMAGE, whole(1, -3), whole(2**31, 2**31), whole(2, -1), whole(2, 1)], {}),
    ("Slice", [IMAGE, whole(-1), whole(-(2**31)), whole(3), whole(-2)], {}),
    ("Slice", [IMAGE, whole(1), whole(2)], {}),
    ("Softmax", [IMAGE], {"axis": 1}),
    ("Softplus", [IMAGE], {}),
    ("Split", [IMAGE, whole(1, 3)], {"axis": 1}),
    ("Split", [IMAGE], {"axis": -1, "num_outputs": 2}),
    ("Sqrt", [POSITIVE], {}),
    ("Squeeze", [IMAGE[:1, :, :1], whole(0, -2)], {}),
    ("Sub", [IMAGE, OTHER], {}),
    ("Tanh", [IMAGE], {}),
    ("Transpose", [IMAGE], {"perm": [0, 2, 3, 1]}),
    ("Transpose", [MATRIX], {}),
    ("Unsqueeze", [IMAGE, whole(-1, 0)], {}),
    ("Where", [IMAGE > 0, IMAGE, OTHER[:1]], {}),
]  # fmt: skip


def single(op, inputs, attributes, *, opset=20, outputs=1):
    """A graph of one node. The first input is the graph's, the others are stored."""
    names = ["" if value is None else f"in.{i}" for i, value in enumerate(inputs)]
    results = [f"out{i}" for i in range(outputs)]
    first = helper.np_dtype_to_tensor_dtype(inputs[0].dtype)
    graph = helper.make_graph(
        [helper.make_node(op, names, results, name="the_node", **attributes)],
        "single",
        [helper.make_tensor_value_info(names[0], first, inputs[0].shape)],
        [helper.make_empty_tensor_value_info(name) for name in results],
        [
            numpy_helper.from_array(np.ascontiguousarray(value), name)
            for name, value in zip(names[1:], inputs[1:], strict=True)
            if name
        ],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8)
    return onnx.shape_inference.infer_shapes(model)


def run_onnx(model, value, path):
    onnx.save(model, path)
    session = open_session(path, threads=1, optimize=False)
    return session.run(None, {session.get_inputs()[0].name: value})


def test_every_operator_of_the_table_has_a_case():
    assert {case[0] for case in CASES} == set(OPS)


@pytest.mark.parametrize(
    ("op", "inputs", "attributes"), CASES, ids=[f"{i}-{c[0]}" for i, c in enumerate(CASES)]
)
def test_operator_equals_onnxruntime(op, inputs, attributes, tmp_path):
    model = single(op, inputs, attributes, outputs=2 if op == "Split" else 1)

    found = GraphModule(model)(torch.from_numpy(inputs[0]))

    expected = run_onnx(model, inputs[0], tmp_path / "one.onnx")
    for ours, theirs in zip(found if isinstance(found, tuple) else (found,), expected, strict=True):
        assert ours.dtype == torch.from_numpy(theirs).dtype
        assert ours.shape == theirs.shape
        # float32: sums over at most 63 products of a few units
        np.testing.assert_allclose(ours.detach().numpy(), theirs, rtol=2e-5, atol=2e-6)


def test_axes_may_still_be_attributes_as_before_opset_18(tmp_path):
    model = single("ReduceMean", [IMAGE], {"axes": [2, 3]}, opset=13)
    expected = run_onnx(model, IMAGE, tmp_path / "old.onnx")[0]
    np.testing.assert_allclose(GraphModule(model)(torch.from_numpy(IMAGE)), expected, atol=1e-6)


class Attention(nn.Module):
    """Patches, a class token, one head of attention, LayerNorm, GELU: what transformers export."""

    def __init__(self):
        super().__init__()
        self.patches, self.token = nn.Conv2d(3, 16, 4, 4), nn.Parameter(torch.randn(1, 1, 16))
        self.norm, self.qkv, self.out = nn.LayerNorm(16), nn.Linear(16, 48), nn.Linear(16, 16)
        self.feed, self.head = (
            nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16)),
            nn.Linear(16, 5),
        )

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.patches(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(tokens.shape[0], -1, -1), tokens], 1)
        q, k, v = self.qkv(self.norm(x)).chunk(3, -1)
        x = x + self.out((q @ k.transpose(1, 2) / math.sqrt(16)).softmax(-1) @ v)
        return self.head((x + self.feed(x))[:, 0])


FAST = {"resnet8", "mobilenetv2", "plain_cnn_small"}  # one of each kind of structure
DEEPER = {"resnet14", "resnet32", "resnet44", "resnet56"}  # more of the blocks of 8, 20 and 110
NETS = ["attention", *(name for name in ZOO if name not in DEEPER)]


@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=() if n in FAST | {"attention"} else pytest.mark.slow) for n in NETS],
)
def test_network_equals_onnxruntime(name, tmp_path):
    torch.manual_seed(0)
    net = Attention() if name == "attention" else build(name, {}, classes=5, in_channels=3)
    images = torch.randn(3, 3, 32, 32)
    with torch.no_grad():
        net(images)  # statistics for its BatchNorms
    export_onnx(net, images[:2], tmp_path / "raw.onnx", batch="dynamic")
    model = normalise(read_model(tmp_path / "raw.onnx"))

    with torch.no_grad():
        found = GraphModule(model)(images).numpy()

    expected = run_onnx(model, images.numpy(), tmp_path / "net.onnx")[0]
    # the summation order differs; 110 layers reach a few millionths
    assert np.abs(found - expected).max() < 2e-5 * np.abs(expected).max()


@pytest.fixture
def small() -> onnx.ModelProto:
    """Conv, Relu, MatMul with the Add that is its bias, and a Mul whose factor is no weight."""
    nodes = [
        helper.make_node("Conv", ["x", "conv.weight", "conv.bias"], ["a"], name="conv"),
        helper.make_node("Relu", ["a"], ["b"], name="relu"),
        helper.make_node("Mul", ["b", "factor"], ["c"], name="mul"),
        helper.make_node("GlobalAveragePool", ["c"], ["d"], name="pool"),
        helper.make_node("Flatten", ["d"], ["e"], name="flat"),
        helper.make_node("MatMul", ["e", "fc.weight"], ["f"], name="fc"),
        helper.make_node("Add", ["f", "fc.bias"], ["y"], name="fc_bias"),
    ]
    stored = {
        "conv.weight": KERNEL, "conv.bias": VECTOR, "factor": RNG.normal(size=(6, 1, 1)),
        "fc.weight": RNG.normal(size=(6, 3)), "fc.bias": RNG.normal(size=3),
    }  # fmt: skip
    graph = helper.make_graph(
        nodes,
        "small",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", 4, 7, 9])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["N", 3])],
        [numpy_helper.from_array(value.astype(np.float32), name) for name, value in stored.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8)


def test_weights_and_biases_are_trained_and_nothing_else(small):
    trained = {"conv.weight", "conv.bias", "fc.weight", "fc.bias"}
    assert trainable(small) == trained
    module = GraphModule(small)
    assert len(list(module.parameters())) == 4
    assert len(list(module.buffers())) == 1
    module(torch.from_numpy(IMAGE)).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in module.parameters())


def test_the_graph_comes_back_with_its_names_and_with_what_was_trained(small):
    module = GraphModule(small)
    assert module.to_model() == small

    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(1.0)

    before, after = arrays(small), arrays(module.to_model())
    assert list(before) == list(after)
    for name in before:
        moved = 0.0 if name == "factor" else 1.0
        np.testing.assert_allclose(after[name], before[name] + moved, rtol=1e-6)
    assert module.to_model().graph.node == small.graph.node


def test_the_given_graph_is_left_alone(small):
    kept = small.SerializeToString()
    module = GraphModule(small)
    with torch.no_grad():
        next(module.parameters()).zero_()
    assert small.SerializeToString() == kept


def test_values_pass_through_the_given_hand(small):
    seen = []

    def through(name, value):
        seen.append(name)
        return value * 2 if name == "b" else value

    module, x = GraphModule(small), torch.from_numpy(IMAGE)
    zero = torch.zeros(3)
    plain = module.run(x, instead={("fc_bias", 1): zero})
    doubled = module.run(x, through=through, instead={("fc_bias", 1): zero})

    assert seen == ["x", "a", "b", "c", "d", "e", "f", "y"]
    torch.testing.assert_close(doubled, 2 * plain)
    linear = module.run(x, absorbed={"relu"}, instead={("fc_bias", 1): zero})
    torch.testing.assert_close(linear, -module.run(-x, absorbed={"relu"}, instead={
        ("fc_bias", 1): zero, ("conv", 2): -torch.from_numpy(VECTOR)}))  # fmt: skip


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (single("Einsum", [MATRIX], {"equation": "ij->ji"}), r"'the_node': Einsum cannot"),
        (
            single("AveragePool", [IMAGE], {"kernel_shape": [2, 2], "dilations": [1, 2]}),
            "AveragePool with dilations cannot",
        ),
        (single("MaxPool", [IMAGE], {"kernel_shape": [2, 2]}, outputs=2), "with a second output"),
        (single("Relu", [IMAGE], {}, opset=12), "opset 12, expected 13"),
    ],
)
def test_what_it_does_not_know_is_an_error_that_says_what_to_do(model, message):
    with pytest.raises(ExportError, match=message) as error:
        GraphModule(model)
    assert "leave out QAT" in str(error.value)
