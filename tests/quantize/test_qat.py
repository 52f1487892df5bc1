"""Training with rounding: where it rounds, that the file computes the same, what it is worth."""

from __future__ import annotations

import dataclasses

import numpy as np
import onnx
import pytest
import torch
import torch.nn.functional as F
from edgestill.exporters.calibrate import scale_and_zero_point
from edgestill.exporters.graph import arrays, producers, read_model
from edgestill.exporters.int8 import encoding_for, quantize
from edgestill.exporters.rewrites import normalise
from edgestill.exporters.sessions import open_session, run_batches
from edgestill.exporters.stamp import write_model
from edgestill.exporters.to_onnx import export_onnx
from edgestill.pipeline.data.dataset import Data, SampleSet
from edgestill.pipeline.data.preprocess import to_input
from edgestill.pipeline.errors import ExportError
from edgestill.pipeline.quantize.fake_quant import FakeQuant, affine, sqnr_db
from edgestill.pipeline.quantize.graph_module import GraphModule
from edgestill.pipeline.quantize.layout import read_layout
from edgestill.pipeline.quantize.qat import train_qat
from edgestill.pipeline.recipe import PreprocessSpec, QatSpec
from edgestill.pipeline.stage import Context, Silent
from sklearn.datasets import load_digits
from torch import Tensor, nn

PREPROCESS = PreprocessSpec(channels="gray", mean=(0.3,), std=(0.37,), crop=8)
TRAIN, VALIDATION, TEST = slice(0, 1000), slice(1000, 1300), slice(1300, None)
REDUCED = encoding_for(("arm", "x86"))
SPEC = QatSpec(epochs=10, batch_size=64, lr=0.001)


class Separable(nn.Module):
    """Depthwise and pointwise layers, ReLU, ReLU6, a residual Add, a hard-swish (float)."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = self.layer(1, 8, 3), nn.Linear(16, 10)
        self.depth = nn.ModuleList(self.layer(8, 8, 3, groups=8, stride=s) for s in (1, 2, 1))
        self.point = nn.ModuleList(self.layer(8, c, 1) for c in (8, 8, 16))

    @staticmethod
    def layer(i: int, o: int, k: int, **options: int) -> nn.Sequential:
        conv = nn.Conv2d(i, o, k, padding=k // 2, bias=False, **options)
        return nn.Sequential(conv, nn.BatchNorm2d(o))

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        x = F.relu(x + self.point[0](F.relu(self.depth[0](x))))
        x = F.relu6(self.point[1](F.relu(self.depth[1](x))))
        x = F.hardswish(self.point[2](F.relu(self.depth[2](x))))
        return self.head(x.mean((2, 3)))


def spread(net: Separable, *, decades: float) -> None:
    """The same function, with the channels behind each depthwise layer at scales of their own.

    One scale a tensor cannot hold them; ReLU(k·x) = k·ReLU(x) is undone by the layer after it.
    """
    with torch.no_grad():
        for depth, point in zip(net.depth, net.point, strict=True):
            factor = torch.logspace(-decades / 2, decades / 2, 8)[torch.randperm(8)]
            depth[1].weight.mul_(factor)
            depth[1].bias.mul_(factor)
            point[0].weight.div_(factor[None, :, None, None])


def part(images, labels, where) -> SampleSet:
    count = len(labels[where])
    ids = np.arange(count, dtype=np.int64) + where.start
    return SampleSet(images[where], labels[where].astype(np.int64), ids, ids.astype(str), None)


@pytest.fixture(autouse=True, scope="module")
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def data() -> Data:
    digits = load_digits()
    order = np.random.default_rng(0).permutation(len(digits.target))
    images = (digits.images[order] * 255 / 16).round().astype(np.uint8)[..., None]
    labels = digits.target[order]
    sets = [part(images, labels, where) for where in (TRAIN, VALIDATION, TEST)]
    return Data(
        train=sets[0], validation=sets[1], test=sets[2], calibration=np.arange(256),
        class_names=tuple("0123456789"), preprocess=PREPROCESS, input_shape=(1, 8, 8), stats={},
    )  # fmt: skip


@pytest.fixture(scope="module")
def samples(data) -> np.ndarray:
    return to_input(data.train.contents[data.calibration], PREPROCESS)


@pytest.fixture(scope="module")
def trained(data) -> Separable:
    torch.manual_seed(0)
    net = Separable()
    inputs = torch.from_numpy(to_input(data.train.contents, PREPROCESS))
    labels = torch.from_numpy(data.train.labels)
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.01)
    for _ in range(15):
        for batch in torch.randperm(len(labels)).split(64):
            optimizer.zero_grad()
            F.cross_entropy(net(inputs[batch]), labels[batch]).backward()
            optimizer.step()
    return net.eval()


def exported(net, samples, folder) -> onnx.ModelProto:
    export_onnx(net, torch.from_numpy(samples[:2]), folder / "net.onnx", batch="dynamic")
    return normalise(read_model(folder / "net.onnx"))


@pytest.fixture(scope="module")
def floating(trained, samples, tmp_path_factory) -> onnx.ModelProto:
    return exported(trained, samples, tmp_path_factory.mktemp("floating"))


@pytest.fixture(scope="module")
def hostile(trained, samples, tmp_path_factory) -> onnx.ModelProto:
    import copy

    net = copy.deepcopy(trained)
    torch.manual_seed(1)
    spread(net, decades=2.0)
    return exported(net, samples, tmp_path_factory.mktemp("hostile"))


def int8(model, samples, **options) -> onnx.ModelProto:
    return quantize(model, samples, encoding=REDUCED, threads=1, **options).model


def logits_of(model, inputs, path) -> np.ndarray:
    write_model(model, path)
    return run_batches(open_session(path, threads=1), inputs, 64)


def train(model, quantized, data, scratch, spec=SPEC):
    scratch.mkdir(exist_ok=True)
    context = Context(seed=0, threads=1, device="cpu", scratch=scratch, events=Silent())
    return train_qat(model, quantized, data, spec, context=context)


@pytest.fixture(scope="module")
def learned(hostile, data, samples, tmp_path_factory):
    return train(hostile, int8(hostile, samples), data, tmp_path_factory.mktemp("learned"))


@pytest.fixture(scope="module")
def written(learned, samples) -> onnx.ModelProto:
    return int8(learned.model, samples[:2], ranges=learned.ranges)


@pytest.fixture(scope="module")
def rounded(learned, written) -> FakeQuant:
    """The network as it was trained: its weights, and its ranges read back from the file."""
    module = FakeQuant(
        GraphModule(learned.model), read_layout(learned.model, written), ranges="learned"
    )
    return module.eval()


# where it rounds


def test_training_rounds_exactly_where_the_file_does(floating, samples):
    quantized = int8(floating, samples)
    layout = read_layout(floating, quantized)
    ops = [node.op_type for node in quantized.graph.node]
    assert len(layout.activations) == ops.count("QuantizeLinear") > 10
    assert len(layout.weights) == 8
    assert len(layout.biases) == 8
    assert layout.limit == 64
    assert "logits" not in layout.activations
    relus = [n for n in floating.graph.node if n.op_type in ("Relu", "Clip")]
    assert layout.absorbed == {node.name for node in relus}
    for node in relus:
        assert node.input[0] not in layout.activations  # nothing is rounded before a ReLU
        bounds = layout.ranges[layout.activations[node.output[0]]].bounds
        assert bounds == ((0.0, 6.0) if node.op_type == "Clip" else (0.0, float("inf")))
    full = quantize(floating, samples, encoding=encoding_for(("arm",)), threads=1).model
    assert read_layout(floating, full).limit == 127


def test_a_layer_that_the_file_keeps_in_float_is_not_rounded(floating, samples):
    convs = [node for node in floating.graph.node if node.op_type == "Conv"]
    layout = read_layout(floating, int8(floating, samples, keep_float=[convs[2].name]))
    assert convs[2].input[1] not in layout.weights
    assert convs[1].input[1] in layout.weights


def test_a_file_of_another_graph_is_refused(floating, hostile, samples):
    with pytest.raises(ExportError, match=r"weight .* is not the float weight rounded"):
        read_layout(floating, int8(hostile, samples))
    longer = onnx.ModelProto.FromString(floating.SerializeToString())
    longer.graph.node.append(onnx.helper.make_node("Neg", ["logits"], ["z"], name="more"))
    with pytest.raises(ExportError, match="has no node 'more'"):
        read_layout(longer, int8(floating, samples))


def test_before_training_it_answers_as_the_file_does(floating, data, samples, tmp_path):
    quantized = int8(floating, samples)
    inputs = to_input(data.test.contents, PREPROCESS)
    module = FakeQuant(GraphModule(floating), read_layout(floating, quantized), ranges="ema")
    with torch.no_grad():
        found = module.eval()(torch.from_numpy(inputs)).numpy()
    expected = logits_of(quantized, inputs, tmp_path / "q.onnx")
    assert (found.argmax(1) == expected.argmax(1)).mean() >= 0.99
    # kernels differ by single steps, which are 8 bits of the largest activation
    assert sqnr_db(expected, found) > 35


# that the file computes the same


def segments(model) -> list[tuple[str, list[str], str]]:
    """Each quantized tensor: its name, the integers it is computed from, and its own integers."""
    writers, found = producers(model), []
    for node in model.graph.node:
        if node.op_type != "QuantizeLinear":
            continue
        waiting, sources = [node.input[0]], []
        while waiting:
            name = waiting.pop()
            writer = writers.get(name)
            if writer is None or writer.op_type == "QuantizeLinear":
                sources.append(name)
            else:
                waiting += writer.input
        stored = arrays(model)
        sources = sorted({name for name in sources if name and name not in stored})
        found.append((node.input[0], sources, node.output[0]))
    return found


@pytest.mark.parametrize("optimize", [False, True])
def test_node_by_node_on_identical_integers_file_and_training_are_within_one_step(
    written, rounded, data, tmp_path, optimize
):
    inputs = torch.from_numpy(to_input(data.test.contents[:64], PREPROCESS))
    with torch.no_grad():
        values = rounded.values(inputs)
    scales = {
        node.output[0]: node for node in written.graph.node if node.op_type == "QuantizeLinear"
    }
    stored = arrays(written)

    def integers(name: str) -> np.ndarray:
        """Of a QuantizeLinear's output; the graph's input is itself."""
        if name not in scales:
            return values[name].numpy()
        node = scales[name]
        scale, zero = stored[node.input[1]], stored[node.input[2]]
        return (np.round(values[node.input[0]].numpy() / scale) + zero).astype(np.uint8)

    # it cuts by shapes, which the file does not carry
    extractor, checked = onnx.utils.Extractor(onnx.shape_inference.infer_shapes(written)), 0
    for tensor, sources, target in segments(written):
        path = tmp_path / "part.onnx"
        onnx.save(extractor.extract_model(sources, [target]), path)
        session = open_session(path, threads=1, optimize=optimize)
        given = {name: integers(name) for name in sources}
        if sources == ["input"]:
            given = {"input": inputs.numpy()}
        found = session.run(None, given)[0]
        steps = np.abs(found.astype(int) - integers(target).astype(int))
        assert steps.max() <= 1, tensor
        assert (steps > 0).mean() < 0.01, tensor
        checked += 1
    assert checked > 10


def test_the_trained_ranges_are_in_the_file_bit_by_bit(learned, written, rounded):
    stored = arrays(written)
    nodes = [node for node in written.graph.node if node.op_type == "QuantizeLinear"]
    for node in nodes:
        low, high = learned.ranges[node.input[0]]
        scale, zero = affine(torch.tensor(low), torch.tensor(high))
        assert (scale.numpy(), zero.item()) == (stored[node.input[1]], stored[node.input[2]])
        assert scale_and_zero_point(low, high) == (stored[node.input[1]], stored[node.input[2]])
    assert {node.input[0] for node in nodes} == set(learned.ranges)


def test_training_keeps_names_and_structure(hostile, learned):
    assert learned.model.graph.node == hostile.graph.node
    assert list(arrays(learned.model)) == list(arrays(hostile))
    moved = [n for n, a in arrays(hostile).items() if (arrays(learned.model)[n] != a).any()]
    assert len(moved) == 16  # a weight and a bias of each layer


# what it is worth


def test_qat_brings_back_what_calibration_lost(
    hostile, learned, written, rounded, data, samples, tmp_path
):
    inputs, labels = to_input(data.test.contents, PREPROCESS), data.test.labels
    reference = logits_of(hostile, inputs, tmp_path / "f.onnx")
    calibrated = logits_of(int8(hostile, samples), inputs, tmp_path / "p.onnx")
    found = logits_of(written, inputs, tmp_path / "q.onnx")
    before, lost, after = (
        100 * (logits.argmax(1) == labels).mean() for logits in (reference, calibrated, found)
    )
    assert before > 90
    assert lost < before - 10
    # 497 images cannot tell half a point; that much of a large loss is back, they can. How much
    # depends on the CPU, whose float sums have their own order: 13 of 27 points on one
    assert after - lost > (before - lost) / 3
    with torch.no_grad():
        simulated = rounded(torch.from_numpy(inputs)).numpy()
    assert (simulated.argmax(1) == found.argmax(1)).mean() >= 0.99
    assert sqnr_db(found, simulated) > 30
    answers = reference.argmax(1)
    assert (found.argmax(1) == answers).mean() > (calibrated.argmax(1) == answers).mean()
    history = learned.training.history
    assert {"accuracy", "agreement", "sqnr_db"} <= set(history[0])
    assert history[-1]["terms"]["soft"] < history[0]["terms"]["soft"]


def test_averaged_ranges_are_written_too(hostile, data, samples, tmp_path):
    spec = SPEC.model_copy(update={"ranges": "ema", "epochs": 1})
    start = int8(hostile, samples)
    found = train(hostile, start, data, tmp_path / "ema", spec)
    assert found.ranges.keys() == read_layout(hostile, start).activations.keys()
    int8(found.model, samples[:2], ranges=found.ranges)  # raises where one does not land


def test_killed_and_resumed_gives_the_same_bytes(floating, data, samples, tmp_path, monkeypatch):
    from edgestill.pipeline.train import loop

    spec, start = SPEC.model_copy(update={"epochs": 2}), int8(floating, samples)
    whole = train(floating, start, data, tmp_path / "whole", spec)
    real = loop._epoch

    def dies_in_the_second(*arguments, epoch, **options):
        if epoch == 1:
            raise KeyboardInterrupt
        real(*arguments, epoch=epoch, **options)

    monkeypatch.setattr(loop, "_epoch", dies_in_the_second)
    original = loop.fit
    often = lambda module, task, spec, **options: original(  # noqa: E731
        module, task, spec.model_copy(update={"checkpoint_minutes": 0}), **options
    )
    monkeypatch.setattr("edgestill.pipeline.quantize.qat.fit", often)
    with pytest.raises(KeyboardInterrupt):
        train(floating, start, data, tmp_path / "killed", spec)
    monkeypatch.setattr(loop, "_epoch", real)
    resumed = train(floating, start, data, tmp_path / "killed", spec)

    assert resumed.training.resumed_epoch == 1
    assert resumed.model.SerializeToString() == whole.model.SerializeToString()
    assert resumed.ranges == whole.ranges


def test_the_record_can_be_written_as_json(learned):
    import json

    json.dumps(dataclasses.asdict(learned.training), allow_nan=False)
