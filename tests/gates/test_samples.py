"""samples.parquet: what a run writes is read back, and what cannot be so is refused."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from edgestill.pipeline.errors import IntegrityError
from edgestill.pipeline.gates.samples import read_samples
from edgestill.pipeline.measure.accuracy import score
from edgestill.pipeline.verify.evidence import _unique, _write_samples


def columns() -> dict[str, Any]:
    return {
        "id": ["a", "b", "c"],
        "label": np.array([0, 1, 2], np.int32),
        "int8_prediction": np.array([0, 2, 2], np.int32),
        "int8_rank": np.array([0, 1, 0], np.int32),
        "int8_p_label": np.array([0.9, 0.1, 0.8], np.float32),
        "int8_top1_probability": np.array([0.9, 0.6, 0.8], np.float32),
        "int8_margin": np.array([0.8, 0.5, 0.7], np.float32),
    }


def write(path: Path, table: dict[str, Any], names: str = "x\ny\nz") -> Path:
    pq.write_table(pa.table(table).replace_schema_metadata({"class_names": names}), path)
    return path


def test_what_a_run_writes_is_read_back(tmp_path: Path) -> None:
    logits = np.random.default_rng(0).normal(size=(50, 7)).astype(np.float32)
    labels = np.arange(50) % 7
    data = SimpleNamespace(
        test=SimpleNamespace(hashes=[f"{i:032x}" for i in range(50)], labels=labels),
        class_names=tuple("abcdefg"),
    )
    scores = score(logits, labels)

    _write_samples(tmp_path / "samples.parquet", data, {"int8": scores})  # type: ignore[arg-type]
    found = read_samples(tmp_path / "samples.parquet")

    assert found.n == 50
    assert found.class_names == tuple("abcdefg")
    one = found.answers["int8"]
    assert (one.correct == scores.correct).all()
    assert (one.rank == (logits > logits[np.arange(50), labels][:, None]).sum(axis=1)).all()
    assert one.p_label == pytest.approx(scores.p_label)


def test_a_rank_of_equal_logits_agrees_with_the_prediction() -> None:
    logits = np.array([[1.0, 1.0, 0.0]] * 3, np.float32)

    found = score(logits, np.array([0, 1, 2]))

    assert found.rank.tolist() == [0, 1, 2]
    assert ((found.rank == 0) == found.correct).all()


def test_the_same_content_twice_is_two_samples() -> None:
    assert _unique(["a", "b", "a", "a"]) == ["a", "b", "a#2", "a#3"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"id": ["a", "b", "a"]}, "is there twice"),
        ({"id": ["a", None, "c"]}, "an id is missing"),
        ({"int8_p_label": np.array([0.9, np.nan, 0.8], np.float32)}, "is NaN or no probability"),
        ({"int8_margin": np.array([0.9, 1.5, 0.8], np.float32)}, "is NaN or no probability"),
        ({"int8_margin": pa.array([0.9, None, 0.8])}, "is NaN or no probability"),
        ({"int8_p_label": ["a", "b", "c"]}, "expected real numbers"),
        ({"label": pa.array([0, None, 2])}, "expected whole numbers"),
        ({"label": np.array([0, 1, 9], np.int32)}, "rank is 0 where"),
        ({"int8_prediction": np.array([0, 7, 2], np.int32)}, "names a class that is none of 3"),
        ({"int8_rank": np.array([0, 0, 0], np.int32)}, "rank is 0 where"),
        ({"int8_rank": None}, "int8_rank"),
        ({"label": None}, "label"),
        ({"int8_prediction": None}, "no model's answers"),
    ],
)
def test_what_cannot_be_so_is_refused(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    table = {k: v for k, v in (columns() | change).items() if v is not None}

    with pytest.raises(IntegrityError, match=message):
        read_samples(write(tmp_path / "samples.parquet", table))


def test_the_table_that_is_changed_above_is_read_as_it_is(tmp_path: Path) -> None:
    assert read_samples(write(tmp_path / "samples.parquet", columns())).n == 3


@pytest.mark.parametrize("content", [b"", b"no parquet", None])
def test_a_file_that_is_no_table_is_refused(tmp_path: Path, content: bytes | None) -> None:
    if content is not None:
        (tmp_path / "samples.parquet").write_bytes(content)

    with pytest.raises(IntegrityError):
        read_samples(tmp_path / "samples.parquet")


def test_a_table_without_rows_is_refused(tmp_path: Path) -> None:
    empty = {name: values[:0] for name, values in columns().items()}
    empty["id"] = pa.array([], pa.string())

    with pytest.raises(IntegrityError, match="holds no sample"):
        read_samples(write(tmp_path / "samples.parquet", empty))
