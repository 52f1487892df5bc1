"""Pruning of texts in the main job: an encoder is cut, recovers, and ships as a file that answers
as what is stored beside it."""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
import yaml
from edgestill.exporters.sessions import open_session, run_batches
from edgestill.models.plan import head_count
from edgestill.models.store import load_network
from edgestill.pipeline.flow import run
from edgestill.pipeline.recipe_file import load_recipe

pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def pruned(texts: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A trained encoder of two layers and four heads at 0.6 of its multiply-adds."""
    root = tmp_path_factory.mktemp("pruned-texts")
    texts.write_csv(root / "train.csv", texts.sentences(160, seed=1))
    sizes = {"num_hidden_layers": 2, "num_attention_heads": 4}
    texts.write_folder(root / "trained", head=True, **sizes)
    recipe = {
        "task": "text-classification",
        "data": {"train": {"path": "train.csv"}, "test": {"fraction": 0.4}, "calibration": 16},
        "student": {"model": "hf:trained"},
        "prune": {"macs": 0.6, "blocks": False, "candidates": 1, "recover": {"epochs": 1}},
        "profile": None,
        "gate": {"max_drop_points": 90},
        "compute": {"threads": 1},
    }
    (root / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    report = run(load_recipe(str(root / "recipe.yaml")), root / "out")
    assert report is not None
    assert report.verdict.outcome == "pass"
    return root / "out"


def test_pruned_encoder_and_the_uncut_one_stand_in_the_table(pruned: Path) -> None:
    report = json.loads((pruned / "report.json").read_text())

    rows = {one["name"]: one["multiply_adds"] for one in report["candidates"]}
    assert list(rows) == ["float pruned-1", "float"]
    # the table counts a text of 128 tokens, the goal one of the data's longest
    assert rows["float pruned-1"] < 0.7 * rows["float"]
    assert report["reference"] == "dense"


def test_file_answers_any_batch_and_length_as_the_stored_network_does(
    pruned: Path, tmp_path: Path
) -> None:
    (tmp_path / "model.safetensors").write_bytes((pruned / "student.safetensors").read_bytes())
    (tmp_path / "network.json").write_bytes((pruned / "student.json").read_bytes())
    module = load_network(tmp_path).network.module
    session = open_session(pruned / "model.onnx", threads=1)

    for count, length in ((1, 3), (5, 9)):
        inputs = np.random.default_rng(0).integers(4, 40, (count, 2, length))
        inputs[:, 1] = 1
        inputs[-1, :, (length + 1) // 2 :] = 0  # padded
        with torch.inference_mode():
            expected = module(torch.from_numpy(inputs)).numpy()
        assert np.abs(run_batches(session, inputs, count) - expected).max() < 1e-5

    counts = [head_count(part) for part in module.modules() if head_count(part)]
    assert len(counts) == 2
    assert min(counts) < 4


def test_golden_answers_are_those_of_the_pruned_file(pruned: Path) -> None:
    rows = [json.loads(line) for line in (pruned / "golden.jsonl").read_text().splitlines()]
    session = open_session(pruned / "model.onnx", threads=1)

    assert rows
    for row in rows[:8]:
        ids = np.array(row["input_ids"], np.int64)
        found = run_batches(session, np.stack([ids, np.ones_like(ids)])[None], 1)
        assert np.allclose(found[0], row["logits"], atol=1e-6)
