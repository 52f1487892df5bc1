"""`compress run` on texts: a teacher in a Hugging Face folder → an int8 student, its tokenizer."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import venv
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

pytest.importorskip("transformers")

COMMAND = [sys.executable, "-P", "-m", "edgestill"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, texts: ModuleType) -> Path:
    """Sets, teacher and recipe."""
    root = tmp_path_factory.mktemp("text")
    rows = texts.sentences(900, seed=1)
    texts.write_csv(root / "train.csv", rows[:500])
    texts.write_csv(root / "test.csv", rows[500:])
    # wide enough that int8 is the fastest candidate
    wide = {"hidden_size": 128, "num_attention_heads": 4, "intermediate_size": 512}
    texts.write_folder(root / "teacher", **wide)
    (root / "recipe.yaml").write_text(yaml.safe_dump(recipe()))
    return root


def recipe(**changes: Any) -> dict[str, Any]:
    train = {"epochs": 4, "lr": 0.001, "batch_size": 16}
    return {
        "task": "text-classification",
        "data": {
            "train": {"path": "train.csv"}, "test": {"path": "test.csv"},
            "validation": 0.2, "calibration": 64,
        },
        "teacher": {"model": "hf:teacher", "head": "new", "train": train},
        "student": {"model": "hf:teacher", "head": "new", "keep_layers": [0, 2]},
        "distill": train,
        "quantize": {},
        "profile": {"launches": 3, "runs": 20, "sequences": [8, 16]},
        "gate": {"max_drop_points": 20},
        "compute": {"threads": 1},
    } | changes  # fmt: skip


def compress(*arguments: str, folder: Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [*COMMAND, *arguments], cwd=folder, env=environment, capture_output=True, text=True,
        check=False,
    )  # fmt: skip


@pytest.fixture(scope="module")
def run(folder: Path) -> Path:
    done = compress("run", "recipe.yaml", "-o", "out", folder=folder)
    assert done.returncode == 0, done.stderr
    return folder / "out"


def report_of(run: Path) -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads((run / "report.json").read_text())
    return loaded


def test_a_passed_run_leaves_the_model_and_all_that_it_is_used_with(run: Path) -> None:
    published = {path.name for path in run.iterdir()} - {".edgestill"}

    assert published == {
        "model.onnx", "model.fp32.onnx", "student.safetensors", "student.json", "recipe.yaml",
        "report.json", "report.md", "samples.parquet", "training.jsonl", "manifest.json",
        "tokenizer.json", "labels.json", "golden.jsonl", "vocab.txt",
    }  # fmt: skip
    manifest = json.loads((run / "manifest.json").read_text())
    assert {"tokenizer.json", "golden.jsonl"} <= set(manifest["sha256"])


def test_student_learns_and_int8_keeps_it(run: Path) -> None:
    models = {m["role"]: m["correct"] / m["n"] for m in report_of(run)["models"]}

    assert models["teacher"] > 0.95
    assert models["student"] > 0.95
    assert models["int8"] >= models["student"] - 0.02


@pytest.fixture(scope="module")
def bare_python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The interpreter of a venv that holds what the README says a device needs, and nothing else:
    the installed files of three packages and of what these require, linked."""
    root = tmp_path_factory.mktemp("bare") / "venv"
    venv.create(root, with_pip=False)
    (site,) = root.glob("lib/python*/site-packages")
    for distribution in required_by("numpy", "onnxruntime", "tokenizers"):
        for top in {file.parts[0] for file in distribution.files or ()} - {"..", "__pycache__"}:
            if not (site / top).exists():
                (site / top).symlink_to(Path(str(distribution.locate_file(top))).resolve())
    return root / "bin" / "python"


def required_by(*names: str) -> list[metadata.Distribution]:
    """These distributions and, by and by, all that they require here."""
    found: dict[str, metadata.Distribution] = {}
    left = list(names)
    while left:
        name = canonicalize_name(left.pop())
        if name in found:
            continue
        found[name] = metadata.distribution(name)
        wanted = [Requirement(text) for text in found[name].requires or ()]
        left += [one.name for one in wanted if one.marker is None or one.marker.evaluate()]
    return list(found.values())


def test_readme_snippet_answers_where_three_packages_are_all_there_is(
    run: Path, bare_python: Path
) -> None:
    readme = (Path(__file__).resolve().parent.parent / "README.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```python\n(.*?)^```$", readme, flags=re.DOTALL | re.MULTILINE)
    (snippet,) = [block for block in blocks if "tokenizers" in block]
    code = f"""
from importlib.util import find_spec
more = ("torch", "transformers", "onnx", "scipy", "pydantic", "edgestill")
assert not [name for name in more if find_spec(name)], "more is installed than is needed"
{snippet}
"""

    done = subprocess.run(
        [bare_python, "-P", "-c", code], cwd=run.parent, capture_output=True, text=True,
        check=False,
    )  # fmt: skip

    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["good"]


def test_golden_answers_are_those_of_the_shipped_tokenizer_and_model(run: Path) -> None:
    import onnxruntime
    from tokenizers import Tokenizer

    rows = [json.loads(line) for line in (run / "golden.jsonl").read_text().splitlines()]
    about = report_of(run)["stages"][0]["measurements"]["preprocess"]
    tokenizer = Tokenizer.from_file(str(run / "tokenizer.json"))
    tokenizer.enable_truncation(about["max_length"])
    session = onnxruntime.InferenceSession(run / "model.onnx")

    assert len(rows) == 64
    assert {len(row["input_ids"]) for row in rows} >= {about["max_length"], 2}
    for row in rows:
        ids = tokenizer.encode(row["text"]).ids
        assert ids == row["input_ids"], row["text"]
        feed = {"input_ids": np.array([ids]), "attention_mask": np.ones((1, len(ids)), np.int64)}
        (logits,) = session.run(None, feed)
        assert np.allclose(logits[0], row["logits"], atol=1e-6)


def test_padding_changes_no_answer_of_the_float_file(run: Path) -> None:
    import onnxruntime

    session = onnxruntime.InferenceSession(run / "model.fp32.onnx")
    ids = np.array([[2, 10, 11, 12, 3]])
    alone = session.run(None, {"input_ids": ids, "attention_mask": np.ones_like(ids)})[0]
    padded = np.pad(ids, ((0, 0), (0, 6)))
    mask = (np.arange(11) < 5).astype(np.int64)[None]
    beside = session.run(None, {"input_ids": padded, "attention_mask": mask})[0]

    assert np.allclose(alone, beside, atol=1e-5)


def test_report_says_how_texts_were_tokenized_and_cut(run: Path) -> None:
    data = report_of(run)["stages"][0]["measurements"]

    assert data["preprocess"]["rows"] == ["input_ids", "attention_mask"]
    assert data["lengths"]["train"]["texts"] == 500
    assert data["counts"] == {"train": 400, "validation": 100, "test": 400}


def test_latency_is_told_by_length(run: Path) -> None:
    rows = report_of(run)["latency"]

    assert {(row["name"], row["sequence"]) for row in rows if row["runs_in"] == "onnxruntime"} == {
        (name, sequence) for name in ("teacher-onnx", "float", "int8") for sequence in (8, 16)
    }
    assert "| tokens |" in (run / "report.md").read_text()


def test_second_run_is_recalled_and_gives_the_same_bytes(run: Path, folder: Path) -> None:
    before = (run / "model.onnx").read_bytes()

    done = compress("run", "recipe.yaml", "-o", "out", folder=folder)

    assert done.returncode == 0, done.stderr
    stages = report_of(run)["stages"]
    assert all(stage["recalled"] for stage in stages if stage["name"] != "latency")
    assert (run / "model.onnx").read_bytes() == before


def test_trained_folder_goes_straight_to_a_graph_of_one_length(
    folder: Path, texts: ModuleType
) -> None:
    import onnxruntime

    texts.write_folder(folder / "trained", head=True)
    wish = recipe(student={"model": "hf:trained"}, export={"sequence": "fixed"}, quantize=None)
    del wish["teacher"], wish["distill"]
    (folder / "given.yaml").write_text(yaml.safe_dump(wish))

    done = compress("run", "given.yaml", "-o", "given", folder=folder)

    assert done.returncode == 0, done.stderr
    session = onnxruntime.InferenceSession(folder / "given" / "model.onnx")
    length = report_of(folder / "given")["stages"][0]["measurements"]["preprocess"]["max_length"]
    assert [value.shape for value in session.get_inputs()] == [["N", length]] * 2
    assert {row["sequence"] for row in report_of(folder / "given")["latency"]} == {length}


BAD: dict[str, tuple[Callable[[Path], dict[str, Any]], str]] = {
    "no such column": (
        lambda root: {"data": {**recipe()["data"], "label": "mood"}},
        "mood",
    ),
    "a text in both sets": (
        lambda root: {"data": {**recipe()["data"], "test": {"path": "train.csv"}}},
        "data.allow_overlap",
    ),
    "no tokenizer": (
        lambda root: {"student": {"model": "net.py:build"}, "teacher": None, "distill": None},
        "data.tokenize",
    ),
    "a BatchNorm that no encoder has": (
        lambda root: {"prune": {"macs": 0.5, "importance": "bn"}},
        "prune.importance: bn",
    ),
    "augmentation": (
        lambda root: {"distill": {"augment": {"flip": True}}},
        "augment",
    ),
    "layers that are not there": (
        lambda root: {"student": {**recipe()["student"], "keep_layers": [0, 7]}},
        "7",
    ),
    "a fresh head that nothing trains": (
        lambda root: {"teacher": {"model": "hf:teacher", "head": "new"}},
        "head",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_recipe_is_one_message_and_exit_2(folder: Path, case: str) -> None:
    change, said = BAD[case]
    path = folder / "bad.yaml"
    path.write_text(yaml.safe_dump(recipe(**change(folder))))

    done = compress("run", "bad.yaml", "-o", "bad-out", folder=folder)

    assert done.returncode == 2, done.stdout + done.stderr
    assert said in done.stderr
    assert "Traceback" not in done.stderr
