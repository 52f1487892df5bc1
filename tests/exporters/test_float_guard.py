"""A layer that was kept float stays float in the graph that onnxruntime really runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from edgestill.exporters import int8
from edgestill.exporters.engagement import engagement
from edgestill.exporters.rewrites import normalise
from edgestill.exporters.sessions import open_session, run_batches
from edgestill.exporters.stamp import stamp, write_model


def convolutions(model: Any) -> list[str]:
    return [node.name for node in model.graph.node if node.op_type == "Conv"]


def written(raw: Any, samples: np.ndarray, path: Path, *, kept: list[str]) -> Path:
    found = int8.quantize(
        normalise(raw), samples, encoding=int8.encoding_for(("arm", "x86")), threads=1,
        keep_float=kept,
    )  # fmt: skip
    write_model(stamp(found.model, min_runtime="1.17", metadata={}), path)
    return path


@pytest.mark.parametrize("place", range(4))
def test_a_kept_convolution_runs_in_float(raw, samples, tmp_path, place) -> None:
    name = convolutions(normalise(raw))[place]

    report = engagement(written(raw, samples, tmp_path / "m.onnx", kept=[name]))

    (node,) = [node for node in report["nodes"] if node["name"] == name]
    assert not node["int8"]
    assert all(other["int8"] for other in report["nodes"] if other is not node)


def test_without_the_guard_onnxruntime_makes_it_int8(raw, samples, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(int8, "guard", lambda model, names: [])
    name = convolutions(normalise(raw))[2]

    report = engagement(written(raw, samples, tmp_path / "m.onnx", kept=[name]))

    (node,) = [node for node in report["nodes"] if node["name"] == name]
    assert node["requantized"], "this onnxruntime no longer does it: is the guard still needed?"


def test_the_guard_changes_no_answer(raw, samples, tmp_path, monkeypatch) -> None:
    kept = convolutions(normalise(raw))[:2]
    guarded = written(raw, samples, tmp_path / "guarded.onnx", kept=kept)
    monkeypatch.setattr(int8, "guard", lambda model, names: [])
    plain = written(raw, samples, tmp_path / "plain.onnx", kept=kept)

    def logits(path: Path) -> np.ndarray:
        return run_batches(open_session(path, threads=1, optimize=False), samples, 16)

    assert np.array_equal(logits(guarded), logits(plain))
