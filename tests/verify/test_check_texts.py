"""`verify_file` of text models: padding, empty and longest texts, tokenizers, columns of data."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest
from edgestill.pipeline.data.inputs import describe
from edgestill.pipeline.data.tokenizer import open_tokenizer
from edgestill.pipeline.errors import DataError, UsageError
from edgestill.pipeline.recipe import Tokenization
from edgestill.pipeline.verify.check import Wish, verify_file
from edgestill.pipeline.verify.record import Verification
from edgestill.pipeline.verify.samples import Set
from onnx import TensorProto, helper, numpy_helper

pytest.importorskip("tokenizers")

LENGTH = 24


def bag_of_words(vectors: np.ndarray, *, masked: bool = True) -> onnx.ModelProto:
    """logits = mean of the tokens' vectors; without `masked` padding counts as words do."""
    weights = {"vectors": vectors, "axis": np.int64([2]), "over": np.int64([1])}
    nodes = [
        helper.make_node("Gather", ["vectors", "input_ids"], ["words"]),
        helper.make_node("Cast", ["attention_mask"], ["ones"], to=TensorProto.FLOAT),
        helper.make_node("Unsqueeze", ["ones", "axis"], ["mask"]),
        helper.make_node("Mul", ["words", "mask"], ["kept"]),
        helper.make_node("ReduceSum", ["kept" if masked else "words", "over"], ["sum"], keepdims=0),
        helper.make_node("ReduceSum", ["mask", "over"], ["count"], keepdims=0),
        helper.make_node("Div", ["sum", "count"], ["logits"]),
    ]
    graph = helper.make_graph(
        nodes, "bag",
        [helper.make_tensor_value_info(name, TensorProto.INT64, ["N", "S"])
         for name in ("input_ids", "attention_mask")],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["N", 2])],
        [numpy_helper.from_array(value, name) for name, value in weights.items()],
    )  # fmt: skip
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, texts: ModuleType) -> SimpleNamespace:
    """A model that counts good and bad words, its tokenizer, and a table of texts."""
    folder = tmp_path_factory.mktemp("texts")
    texts.write_tokenizer(folder)
    texts.write_csv(folder / "test.csv", texts.sentences(60, seed=5))
    tokenizer = open_tokenizer(str(folder))
    vectors = np.random.default_rng(0).normal(0, 0.1, (tokenizer.size, 2)).astype(np.float32)
    for column, words in enumerate((texts.BAD, texts.GOOD)):
        for word in words:
            vectors[tokenizer.library.encode(word).ids[1], column] += 8
    how = Tokenization(
        tokenizer_sha256=hashlib.sha256(tokenizer.document.encode()).hexdigest(),
        vocabulary=tokenizer.size, pad_id=0, max_length=LENGTH, pad="longest",
        rows=("input_ids", "attention_mask"),
    )  # fmt: skip
    files = {}
    for name, masked in (("model", True), ("padded", False)):
        model = bag_of_words(vectors, masked=masked)
        for key, value in describe(("bad", "good"), how).items():
            model.metadata_props.add(key=key, value=value)
        files[name] = folder / f"{name}.onnx"
        onnx.save(model, files[name])
    return SimpleNamespace(folder=folder, data=folder / "test.csv", **files)


def check(made: SimpleNamespace, model: Path, **data: Any) -> Verification:
    return verify_file(model, Wish(reference=made.model, data=Set(**({"path": made.data} | data))))


def failed(found: Verification) -> list[str]:
    return [one.rung for one in found.failed]


def test_a_faithful_text_model_holds_and_its_tokenizer_lies_beside_it(
    made: SimpleNamespace,
) -> None:
    found = check(made, made.model)

    assert failed(found) == []
    assert {"tokenizer", "empty text", f"text of {LENGTH} tokens"} <= {o.rung for o in found.rungs}
    assert found.task is not None
    assert (found.task.n, found.task.reference_correct) == (60, 60)


def test_answers_that_depend_on_padding_are_caught(made: SimpleNamespace) -> None:
    names = failed(check(made, made.padded))

    assert "8 tokens of padding" in names
    assert "final float, batch 7" in names


def test_another_tokenizer_is_named(
    made: SimpleNamespace, texts: ModuleType, tmp_path: Path
) -> None:
    texts.write_tokenizer(tmp_path)
    path = tmp_path / "tokenizer.json"
    document = json.loads(path.read_text())
    document["normalizer"]["lowercase"] = False
    path.write_text(json.dumps(document))

    assert "tokenizer" in failed(check(made, made.model, tokenizer=path))


def test_a_text_model_without_a_tokenizer_is_refused(made: SimpleNamespace, tmp_path: Path) -> None:
    alone = tmp_path / "model.onnx"
    alone.write_bytes(made.model.read_bytes())

    with pytest.raises(UsageError, match="--tokenizer"):
        verify_file(alone, Wish(reference=alone, data=Set(made.data)))


def test_texts_of_other_classes_are_refused(made: SimpleNamespace, tmp_path: Path) -> None:
    table = tmp_path / "other.csv"
    table.write_text("text,label\n" + "the film is warm,happy\nthe plot is dull,sad\n" * 3)

    with pytest.raises(DataError, match="names the classes happy, sad"):
        check(made, made.model, path=table)


def test_images_cannot_verify_a_text_model(made: SimpleNamespace, tmp_path: Path) -> None:
    with pytest.raises(DataError):
        check(made, made.model, path=tmp_path)
