"""Where two graphs part, and what an int8 layer loses by itself."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import onnx
import pytest
from edgestill.exporters import divergence
from edgestill.exporters.divergence import first_divergence, matched
from edgestill.exporters.equalize import equalize
from edgestill.exporters.int8 import encoding_for, quantize
from edgestill.exporters.layer_error import layer_errors
from onnx import TensorProto, helper, numpy_helper

CHANNELS = (3, 6, 6, 8)


def chain(*, prefix: str = "", skip_relu: int | None = None, seed: int = 0) -> onnx.ModelProto:
    """Conv, Relu three times over (N, 3, 6, 6), then the mean: logits (N, 8)."""
    rng = np.random.default_rng(seed)
    nodes, stored, value = [], [], "input"
    for at, (inner, outer) in enumerate(itertools.pairwise(CHANNELS)):
        weight = rng.normal(0, 0.4, (outer, inner, 3, 3)).astype(np.float32)
        stored.append(numpy_helper.from_array(weight, f"block{at}.weight"))
        made = f"{prefix}conv{at}"
        nodes.append(
            helper.make_node("Conv", [value, f"block{at}.weight"], [made], f"{prefix}c{at}",
                             pads=[1, 1, 1, 1])
        )  # fmt: skip
        value = made
        if at != skip_relu:
            nodes.append(helper.make_node("Relu", [made], [f"{made}_r"], f"{prefix}r{at}"))
            value = f"{made}_r"
    nodes.append(helper.make_node("GlobalAveragePool", [value], ["pooled"], "pool"))
    nodes.append(helper.make_node("Flatten", ["pooled"], ["logits"], "flat"))
    graph = helper.make_graph(
        nodes, "chain",
        [helper.make_tensor_value_info("input", TensorProto.FLOAT, ["N", 3, 6, 6])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["N", 8])],
        stored,
    )  # fmt: skip
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8)


def scaled(model: onnx.ModelProto, name: str, factor: float) -> onnx.ModelProto:
    tensor = next(one for one in model.graph.initializer if one.name == name)
    values = numpy_helper.to_array(tensor) * np.float32(factor)
    tensor.CopyFrom(numpy_helper.from_array(values, name))
    return model


@pytest.fixture(scope="module")
def inputs() -> np.ndarray:
    return np.random.default_rng(1).normal(size=(24, 3, 6, 6)).astype(np.float32)


def test_equal_graphs_do_not_part(inputs: np.ndarray) -> None:
    assert first_divergence(chain(), chain(), inputs, floor=0.0, threads=1) is None


def test_a_graph_of_other_names_is_matched_by_place(inputs: np.ndarray) -> None:
    reference, candidate = chain(), scaled(chain(prefix="other_"), "block1.weight", 1.1)

    found = first_divergence(reference, candidate, inputs, floor=0.0, threads=1)

    assert ("conv2", "other_conv2") in matched(reference, candidate)
    assert found is not None
    assert (found.tensor, found.counterpart, found.layer) == ("other_conv1", "conv1", "block1")


def test_a_relu_that_another_export_lost_is_named(inputs: np.ndarray) -> None:
    candidate = chain(prefix="other_", skip_relu=1)

    found = first_divergence(chain(), candidate, inputs, floor=0.0, threads=1)

    assert found is not None
    assert found.tensor == "other_conv2"
    assert "it lacks Relu r1" in found.differences


def test_what_only_the_optimized_graph_does_is_found_by_moving_the_cut(
    inputs: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    cut, candidate = divergence.cut, chain()
    late = ("conv2", "conv2_r", "pooled", "logits")

    def broken(model: onnx.ModelProto, name: str, *arguments: Any, **more: Any) -> np.ndarray:
        value = cut(model, name, *arguments, **more)
        return value + 1 if model is candidate and name in late else value

    monkeypatch.setattr(divergence, "cut", broken)
    found = first_divergence(chain(), candidate, inputs, floor=0.0, threads=1)

    assert found is not None
    assert (found.tensor, found.deployed) == ("conv2", True)


def test_a_difference_that_fusion_hides_is_said_to_be_of_the_unoptimized_graph(
    inputs: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    reference, candidate = chain(), scaled(chain(), "block1.weight", 1.1)
    monkeypatch.setattr(
        divergence, "cut", lambda _, name, feeds, **more: np.zeros((len(feeds["input"]), 2))
    )

    found = first_divergence(reference, candidate, inputs, floor=0.0, threads=1)

    assert found is not None
    assert (found.tensor, found.deployed) == ("conv1", False)


def as_int8(model: onnx.ModelProto, inputs: np.ndarray) -> onnx.ModelProto:
    encoding = encoding_for(("arm", "x86"))
    return quantize(model, inputs, encoding=encoding, calibrator="minmax", threads=1).model


def test_an_error_of_one_int8_layer_stays_in_that_layer(inputs: np.ndarray) -> None:
    quantized = scaled(as_int8(chain(), inputs), "block1.weight_scale", 1.5)

    rows = layer_errors(chain(), quantized, inputs, threads=1)

    assert [row["layer"] for row in rows if row["suspect"]] == ["block1"]
    by_layer = {row["layer"]: row["sqnr_db"] for row in rows}
    assert by_layer["block0"] > 25
    assert by_layer["block2"] > 25


def test_equalized_layers_have_no_dead_channels(inputs: np.ndarray) -> None:
    spread = chain()
    tensor = spread.graph.initializer[0]
    values = (
        numpy_helper.to_array(tensor) * np.float32([1, 30, 0.02, 1, 5, 0.3])[:, None, None, None]
    )
    tensor.CopyFrom(numpy_helper.from_array(values, tensor.name))

    rows = layer_errors(spread, as_int8(equalize(spread), inputs), inputs, threads=1)

    assert rows
    assert not [row["layer"] for row in rows if row["dead"]]


def test_a_value_behind_which_all_agrees_again_is_not_blamed(inputs: np.ndarray) -> None:
    """As rewrites leave them: block 0 doubled and block 1 halved, and the fault in block 2."""
    candidate = scaled(scaled(chain(), "block0.weight", 2.0), "block1.weight", 0.5)
    scaled(candidate, "block2.weight", 1.1)

    found = first_divergence(chain(), candidate, inputs, floor=0.0, threads=1)

    assert found is not None
    assert found.layer == "block2"
