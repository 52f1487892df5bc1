"""What is read from where: digits, folders, parquet; and what is refused."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from edgestill.pipeline.data.readers import open_source
from edgestill.pipeline.data.source import Source
from edgestill.pipeline.data.stage import source_fingerprint
from edgestill.pipeline.errors import DataError
from edgestill.pipeline.recipe import DataSpec, SourceSpec

CLASS_LABEL = {"label": {"_type": "ClassLabel", "names": ["cat", "ant"]}}


def read(path: Path | str, **columns: str) -> Source:
    return open_source(SourceSpec(path=str(path), **columns))


def refused(path: Path | str, **columns: str) -> str:
    with pytest.raises(DataError) as caught:
        read(path, **columns)
    assert str(caught.value).startswith(str(path))
    return str(caught.value)


def fingerprint_of(path: Path | str) -> str:
    spec = {"train": {"path": str(path)}, "test": {"fraction": 0.5}}
    return source_fingerprint(DataSpec.model_validate(spec))


def test_digits_are_raw_values_up_to_16() -> None:
    source = read("digits")
    images = np.stack(list(source.contents()))
    assert images.shape == (1797, 8, 8)
    assert (images.dtype, images.max(), source.max_value) == (np.uint8, 16, 16)
    assert source.class_names == tuple("0123456789")


def test_folder_lists_classes_by_name_and_deeper_folders_with_them(
    tmp_path: Path, make: SimpleNamespace
) -> None:
    root = make.folder(tmp_path / "set", {"b": 2, "a": 1, "a/deep": 1})
    (root / "b" / "notes.txt").write_text("")
    (root / "b" / ".hidden.png").write_text("")
    (root / "readme.md").write_text("")
    (root / ".cache").mkdir()
    source = read(root)
    assert source.class_names == ("a", "b")
    assert source.names == ["a/000.png", "a/deep/000.png", "b/000.png", "b/001.png"]
    assert source.labels.tolist() == [0, 0, 1, 1]
    assert source.ignored == 3


def test_empty_class_folder_is_an_error_naming_it(tmp_path: Path, make: SimpleNamespace) -> None:
    root = make.folder(tmp_path / "set", {"a": 1, "b": 1, "hollow": 0})
    assert "hollow" in refused(root)


def test_missing_path_and_wrong_kind_of_path_are_told_apart(
    tmp_path: Path, make: SimpleNamespace
) -> None:
    assert "no such file or folder" in refused(tmp_path / "nowhere")
    (tmp_path / "photo.jpg").write_bytes(b"")
    assert "got a .jpg" in refused(tmp_path / "photo.jpg")
    make.folder(tmp_path / "flat" / "set", {"a": 2})
    assert "no sub-folder" in refused(tmp_path / "flat" / "set" / "a")


def test_parent_of_train_and_test_is_recognised(tmp_path: Path, make: SimpleNamespace) -> None:
    make.folder(tmp_path / "set" / "train", {"a": 1, "b": 1})
    make.folder(tmp_path / "set" / "test", {"a": 1, "b": 1})
    assert "look like splits" in refused(tmp_path / "set")


def test_parquet_takes_class_names_from_hugging_face_metadata(
    tmp_path: Path, make: SimpleNamespace
) -> None:
    path = make.parquet(
        tmp_path / "set.parquet",
        {"image": make.structs(range(3)), "label": [1, 0, 1]},
        features=CLASS_LABEL,
    )
    source = read(path)
    assert source.class_names == ("cat", "ant")
    assert source.labels.tolist() == [1, 0, 1]
    assert not source.numbered
    assert list(source.contents())[2] == make.png(make.picture(2))
    assert source.names[2] == "set.parquet row 2"


def test_parquet_without_metadata_numbers_its_classes(
    tmp_path: Path, make: SimpleNamespace
) -> None:
    columns = {"img": make.structs(range(3)), "fine_label": [0, 2, 1], "coarse_label": [0, 0, 0]}
    source = read(make.parquet(tmp_path / "set.parquet", columns))
    assert source.class_names == ("0", "1", "2")
    assert source.numbered


def test_string_labels_are_classes_in_sorted_order(tmp_path: Path, make: SimpleNamespace) -> None:
    raw = [make.png(make.picture(number)) for number in range(3)]
    words = pa.array(["dog", "ant", None]).dictionary_encode()
    source = read(make.parquet(tmp_path / "set.parquet", {"picture_of": raw, "kind": words}))
    assert source.class_names == ("ant", "dog")
    assert source.labels.tolist() == [1, 0, -1]
    assert list(source.contents()) == raw


def test_shards_of_a_folder_are_read_in_order_of_name(
    tmp_path: Path, make: SimpleNamespace
) -> None:
    for shard in (1, 0):
        make.parquet(
            tmp_path / "set" / f"train-0000{shard}-of-00002.parquet",
            {"image": make.structs(range(2 * shard, 2 * shard + 2)), "label": [0, 1]},
        )
    assert list(read(tmp_path / "set").contents()) == [
        make.png(make.picture(number)) for number in range(4)
    ]


def test_shards_of_several_sets_in_one_folder_are_refused(
    tmp_path: Path, make: SimpleNamespace
) -> None:
    for split in ("train", "test"):
        columns = {"image": make.structs(range(2)), "label": [0, 1]}
        make.parquet(tmp_path / "set" / f"{split}-00000-of-00001.parquet", columns)
    assert "2 sets (test, train)" in refused(tmp_path / "set")


def test_shards_with_other_class_names_are_refused(tmp_path: Path, make: SimpleNamespace) -> None:
    for number, names in enumerate((["a", "b"], ["b", "a"])):
        make.parquet(
            tmp_path / "set" / f"{number}.parquet",
            {"image": make.structs(range(2)), "label": [0, 1]},
            features={"label": {"_type": "ClassLabel", "names": names}},
        )
    with pytest.raises(DataError, match="differ from those of"):
        read(tmp_path / "set")


def test_ambiguous_columns_are_an_error_listing_them(tmp_path: Path, make: SimpleNamespace) -> None:
    columns = {"image": make.structs(range(2)), "left": [0, 1], "right": [1, 0]}
    path = make.parquet(tmp_path / "set.parquet", columns)
    message = refused(path)
    assert "which column is the label? left, right all fit" in message
    assert "right (int64)" in message
    assert read(path, label="right").labels.tolist() == [1, 0]
    assert "no column 'wrong'" in refused(path, label="wrong")
    assert "has a type not read here" in refused(path, image="left")


@pytest.mark.parametrize("labels", [[None, None], [-1, -1]])
def test_labels_that_are_all_missing_are_an_error(
    tmp_path: Path, make: SimpleNamespace, labels: list[Any]
) -> None:
    columns = {"image": make.structs(range(2)), "label": pa.array(labels, pa.int64())}
    assert "every label is" in refused(make.parquet(tmp_path / "set.parquet", columns))


def test_label_beyond_the_declared_names_is_an_error(tmp_path: Path, make: SimpleNamespace) -> None:
    columns = {"image": make.structs(range(2)), "label": [0, 7]}
    path = make.parquet(tmp_path / "set.parquet", columns, features=CLASS_LABEL)
    assert "label 7 has no name" in refused(path)


def test_zero_rows_and_files_that_are_no_parquet_are_errors(
    tmp_path: Path, make: SimpleNamespace
) -> None:
    schema = {"image": pa.array([], pa.binary()), "label": pa.array([], pa.int64())}
    assert "holds no rows" in refused(make.parquet(tmp_path / "empty.parquet", schema))
    (tmp_path / "fake.parquet").write_text("image,label\n")
    assert "cannot be read as parquet" in refused(tmp_path / "fake.parquet")


def test_fingerprint_follows_content_and_not_place(tmp_path: Path, make: SimpleNamespace) -> None:
    one, two = (make.folder(tmp_path / name, {"a": 2, "b": 1}) for name in ("one", "two"))
    assert fingerprint_of(one) == fingerprint_of(two)
    before = fingerprint_of(two)
    (two / "a" / "000.png").rename(two / "b" / "009.png")
    assert fingerprint_of(two) != before
    assert fingerprint_of("digits") == fingerprint_of("digits")


def test_fingerprint_of_parquet_changes_with_a_byte(tmp_path: Path, make: SimpleNamespace) -> None:
    paths = [
        make.parquet(
            tmp_path / f"{name}.parquet", {"image": make.structs(range(2)), "label": label}
        )
        for name, label in (("one", [0, 1]), ("same", [0, 1]), ("other", [1, 0]))
    ]
    one, same, other = map(fingerprint_of, paths)
    assert one == same != other
