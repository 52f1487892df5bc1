"""A tiny ONNX network, built without torch: logits = flatten(x) @ w."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

CLASSES = 3
PIXELS = (1, 2, 2)


@pytest.fixture
def inputs() -> np.ndarray:
    return np.random.default_rng(0).normal(size=(8, *PIXELS)).astype(np.float32)


@pytest.fixture
def weight() -> np.ndarray:
    return np.random.default_rng(1).normal(size=(4, CLASSES)).astype(np.float32)


@pytest.fixture
def expected(inputs: np.ndarray, weight: np.ndarray) -> np.ndarray:
    return inputs.reshape(len(inputs), -1) @ weight


@pytest.fixture
def save_linear(tmp_path: Path, weight: np.ndarray) -> Callable[..., Path]:
    def save(
        name: str = "linear.onnx", *, batch: int | str = "N", weight: np.ndarray = weight
    ) -> Path:
        floats = TensorProto.FLOAT
        graph = helper.make_graph(
            [
                helper.make_node("Flatten", ["input"], ["flat"]),
                helper.make_node("MatMul", ["flat", "w"], ["logits"]),
            ],
            "linear",
            [helper.make_tensor_value_info("input", floats, [batch, *PIXELS])],
            [helper.make_tensor_value_info("logits", floats, [batch, CLASSES])],
            [numpy_helper.from_array(weight, "w")],
        )
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)])
        model.ir_version = 8
        path = tmp_path / name
        onnx.save(model, path)
        return path

    return save
