"""The data stage: what it stores, counts and refuses."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from edgestill.pipeline.data.dataset import Data, open_data
from edgestill.pipeline.data.readers import open_source
from edgestill.pipeline.errors import DataError, IntegrityError
from edgestill.pipeline.recipe import SourceSpec
from PIL import Image

Prepare = Callable[..., Any]
HALF = {"fraction": 0.5}


@pytest.fixture
def photos(tmp_path: Path, make: SimpleNamespace) -> Path:
    root: Path = make.folder(tmp_path / "photos", {"ant": 10, "bee": 20})
    return root


def refused(prepare: Prepare, **options: Any) -> str:
    with pytest.raises(DataError) as caught:
        prepare(**options)
    return str(caught.value)


def everything(data: Data) -> list[tuple[str, int]]:
    parts = (data.train, data.validation, data.test)
    return [
        (name, int(label))
        for s in parts
        for name, label in zip(s.names or (), s.labels, strict=True)
    ]


def test_every_image_is_in_exactly_one_part_with_its_label(prepare: Prepare, photos: Path) -> None:
    data = prepare(train=photos, test={"fraction": 0.2}, validation=0.25).data
    found = everything(data)
    assert len(found) == len(set(found)) == 30
    assert all(data.class_names[label] == name.split("/")[0] for name, label in found)
    assert [len(part) for part in (data.train, data.validation, data.test)] == [18, 6, 6]
    for name, image in zip(data.train.names, data.train.contents, strict=True):
        assert np.array_equal(image, np.asarray(Image.open(photos / name)))


def test_same_inputs_give_the_same_bytes_whatever_the_threads(
    prepare: Prepare, photos: Path
) -> None:
    def stored(threads: int, seed: int = 0) -> dict[str, bytes]:
        folder = prepare(train=photos, test=HALF, threads=threads, seed=seed).folder
        return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}

    once = stored(1)
    assert len(once) == 14
    assert once == stored(4)
    assert once != stored(1, seed=1)


def test_mapped_and_resident_sets_are_equal(prepare: Prepare, photos: Path) -> None:
    resident = prepare(train=photos, test=HALF)
    mapped = open_data(resident.folder, memory_budget_bytes=0)
    assert isinstance(mapped.train.contents, np.memmap)
    assert not isinstance(resident.data.train.contents, np.memmap)
    assert np.array_equal(mapped.train.contents, resident.data.train.contents)
    assert mapped.train.hashes.tolist() == resident.data.train.hashes.tolist()


def test_ids_are_the_head_of_the_content_hash(prepare: Prepare, photos: Path) -> None:
    train = prepare(train=photos, test=HALF).data.train
    heads = [int.from_bytes(bytes.fromhex(text)[:8], "big", signed=True) for text in train.hashes]
    assert train.ids.tolist() == heads
    assert all(len(text) == 32 for text in train.hashes)


def test_digits_by_default_are_grey_with_white_16_and_normalised(prepare: Prepare) -> None:
    data = prepare(train="digits", test={"fraction": 0.4}).data
    assert data.input_shape == (1, 8, 8)
    assert data.preprocess.channels == "gray"
    assert data.preprocess.max_value == 16
    pixels = data.train.contents / 16
    assert data.preprocess.mean == (pytest.approx(pixels.mean(), abs=6e-5),)
    assert data.preprocess.std == (pytest.approx(pixels.std(), abs=6e-5),)
    assert len(data.calibration) == 512


def test_statistics_are_of_the_cropped_training_images(prepare: Prepare, photos: Path) -> None:
    data = prepare(train=photos, test=HALF, preprocess={"resize": 10, "crop": 6}).data
    assert data.train.contents.shape[1:] == (10, 10, 3)
    seen = data.train.contents[:, 2:8, 2:8] / 255
    assert data.preprocess.mean == pytest.approx(seen.mean((0, 1, 2)), abs=6e-5)
    assert data.preprocess.std == pytest.approx(seen.std((0, 1, 2)), abs=6e-5)


def test_constant_channel_does_not_divide_by_zero(prepare: Prepare, tmp_path: Path) -> None:
    for name, level in (("a", 0), ("b", 9)):
        (tmp_path / "flat" / name).mkdir(parents=True)
        for index in range(3):
            image = Image.new("RGB", (4, 4), (40 * index + level, 7, 7))
            image.save(tmp_path / "flat" / name / f"{index}.png")
    preprocess = prepare(train=tmp_path / "flat", test=HALF, validation=HALF).data.preprocess
    assert min(preprocess.std) > 0


def test_all_grey_images_give_one_channel_and_one_coloured_gives_three(
    prepare: Prepare, make: SimpleNamespace, tmp_path: Path
) -> None:
    root = make.folder(tmp_path / "grey", {"a": 4, "b": 4}, grey=True)
    assert prepare(train=root, test=HALF).data.input_shape == (1, 8, 8)
    make.picture(99).save(root / "a" / "coloured.png")
    assert prepare(train=root, test=HALF).data.input_shape == (3, 8, 8)


def test_sizes_that_differ_need_a_preprocess_and_one_is_proposed(
    prepare: Prepare, make: SimpleNamespace, photos: Path
) -> None:
    make.picture(99, (64, 70)).save(photos / "ant" / "large.png")
    message = refused(prepare, train=photos, test=HALF)
    assert "from 8×8 to 64×70" in message
    assert "data.preprocess: {resize: 8, crop: 8}" in message
    done = prepare(train=photos, test=HALF, preprocess={"resize": 8})
    assert done.data.train.contents.shape[1:] == (8, 8, 3)
    assert done.stats["native_sizes"]["distinct"] == 2
    assert prepare(train=photos, test=HALF, preprocess={"crop": 6}).data.input_shape == (3, 6, 6)
    assert "smaller than 9×9" in refused(prepare, train=photos, test=HALF, preprocess={"crop": 9})


def test_same_image_in_train_and_test_is_an_error_unless_allowed(
    prepare: Prepare, make: SimpleNamespace, photos: Path, tmp_path: Path
) -> None:
    test = make.folder(tmp_path / "held", {"ant": 3, "bee": 3}, start=100)
    # a lossless copy in another format is the same image
    Image.open(photos / "ant" / "004.png").save(test / "ant" / "copy.bmp")
    Image.open(photos / "bee" / "007.png").save(test / "bee" / "copy.tif")
    options = {"train": photos, "test": test, "validation": 0.2}
    message = refused(prepare, **options)
    assert message.startswith(str(test))
    assert "test" in message
    assert "ant/copy.bmp = ant/004.png" in message or "bee/copy.tif = bee/007.png" in message
    overlap = prepare(**options, allow_overlap=True).stats["overlap"]
    assert overlap["train_test"] + overlap["validation_test"] == 2


def test_same_image_in_train_and_a_given_validation_set_is_an_error(
    prepare: Prepare, make: SimpleNamespace, photos: Path, tmp_path: Path
) -> None:
    validation = make.folder(tmp_path / "val", {"ant": 2, "bee": 2}, start=8)
    message = refused(prepare, train=photos, test=HALF, validation=validation)
    assert message.startswith(str(validation)) or "test images are in validation" in message


def test_twins_and_label_noise_in_train_are_counted(prepare: Prepare, photos: Path) -> None:
    for copy in ("ant/x.png", "ant/y.png", "bee/z.png"):
        Image.open(photos / "ant" / "000.png").save(photos / copy)
    for seed in range(20):  # until the four copies are in train
        done = prepare(train=photos, test=HALF, seed=seed)
        if "ant/x.png" in done.data.train.names:
            break
    assert done.stats["duplicates_in_train"] == 3
    assert done.stats["samples_with_two_labels_in_train"] == 1
    assert set(done.stats["overlap"].values()) == {0}


def test_corrupt_image_is_an_error_naming_it_or_skipped_and_counted(
    prepare: Prepare, photos: Path
) -> None:
    (photos / "bee" / "003.png").write_bytes((photos / "bee" / "003.png").read_bytes()[:60])
    (photos / "bee" / "005.png").write_bytes(b"")
    message = refused(prepare, train=photos, test=HALF)
    assert message.startswith("bee/003.png: ")
    assert "on_corrupt: skip" in message
    done = prepare(train=photos, test=HALF, on_corrupt="skip", threads=3)
    assert done.stats["corrupt"] == {"train": 2}
    assert [text.split(":")[0] for text in done.stats["corrupt_where"]["train"]] == [
        "bee/003.png",
        "bee/005.png",
    ]
    assert "2 of 30 images were left out" in done.notes[0]
    assert len(everything(done.data)) == 28
    for file in photos.rglob("*.png"):
        file.write_bytes(b"no image")
    assert "can be" in refused(prepare, train=photos, test=HALF, on_corrupt="skip")


def test_null_image_or_label_is_a_corrupt_row(
    prepare: Prepare, make: SimpleNamespace, tmp_path: Path
) -> None:
    images = make.structs(range(12))
    images[5], images[6] = None, {"bytes": None, "path": "elsewhere.png"}
    labels = [0, 1] * 6
    labels[8], labels[9] = None, -1
    path = make.parquet(tmp_path / "set.parquet", {"image": images, "label": labels})
    assert refused(prepare, train=path, test=HALF).startswith("set.parquet row 5: has no image")
    done = prepare(train=path, test=HALF, on_corrupt="skip")
    rows = [text.split(":")[0] for text in done.stats["corrupt_where"]["train"]]
    assert rows == [f"set.parquet row {row}" for row in (5, 6, 8, 9)]


def test_one_class_only_is_an_error(
    prepare: Prepare, make: SimpleNamespace, tmp_path: Path
) -> None:
    root = make.folder(tmp_path / "one", {"only": 5})
    assert "one class only (only)" in refused(prepare, train=root, test=HALF)


def test_class_too_small_to_split_is_named(
    prepare: Prepare, make: SimpleNamespace, tmp_path: Path
) -> None:
    root = make.folder(tmp_path / "set", {"many": 9, "rare": 1})
    assert "rare (1 samples)" in refused(prepare, train=root, test=HALF)


def test_test_set_with_other_classes_is_an_error_listing_both(
    prepare: Prepare, make: SimpleNamespace, photos: Path, tmp_path: Path
) -> None:
    test = make.folder(tmp_path / "held", {"ant": 2, "wasp": 2}, start=100)
    message = refused(prepare, train=photos, test=test)
    assert "train: ant, bee" in message
    assert "test: ant, wasp" in message
    assert "only in train: bee; only in test: wasp" in message


def test_same_classes_in_another_order_are_mapped_by_name(
    prepare: Prepare, make: SimpleNamespace, photos: Path, tmp_path: Path
) -> None:
    test = make.parquet(
        tmp_path / "held.parquet",
        {"image": make.structs(range(100, 104)), "label": [0, 0, 1, 0]},
        features={"label": {"_type": "ClassLabel", "names": ["bee", "ant"]}},
    )
    data = prepare(train=photos, test=test).data
    assert data.class_names == ("ant", "bee")
    assert data.test.labels.tolist() == [1, 1, 0, 1]


def test_labels_of_the_recipe_fix_the_order_and_name_numbers(
    prepare: Prepare, make: SimpleNamespace, photos: Path, tmp_path: Path
) -> None:
    test = make.parquet(
        tmp_path / "held.parquet", {"image": make.structs(range(100, 103)), "label": [1, 0, 1]}
    )
    assert "`data.labels` if the labels are numbers" in refused(prepare, train=photos, test=test)
    data = prepare(train=photos, test=test, labels=("bee", "ant")).data
    assert data.class_names == ("bee", "ant")
    assert data.test.labels.tolist() == [1, 0, 1]
    assert all(
        name.startswith(data.class_names[label]) for name, label in everything(data)
        if not name.startswith("held")
    )  # fmt: skip


def test_number_without_a_class_is_an_error_and_absent_classes_are_noted(
    prepare: Prepare, make: SimpleNamespace, tmp_path: Path
) -> None:
    def held(name: str, start: int, labels: list[int]) -> Path:
        columns = {"image": make.structs(range(start, start + len(labels))), "label": labels}
        path: Path = make.parquet(tmp_path / name, columns)
        return path

    train = held("train.parquet", 0, [0, 1, 2] * 4)
    assert "test has the label 3" in refused(
        prepare, train=train, test=held("beyond.parquet", 50, [0, 3])
    )
    done = prepare(train=train, test=held("part.parquet", 60, [0, 1, 0]))
    assert done.stats["absent_classes"] == {"test": ["2"]}
    assert "test: holds no sample of 1 classes (2)" in done.notes[0]
    gap = held("gap.parquet", 80, [0, 2] * 4)
    assert "no training sample of the classes 1" in refused(prepare, train=gap, test=HALF)


def test_damaged_result_is_an_integrity_failure(prepare: Prepare, photos: Path) -> None:
    folder = prepare(train=photos, test=HALF).folder
    (folder / "test.labels.npy").write_bytes(b"")
    with pytest.raises(IntegrityError, match="expected the files of the data stage"):
        open_data(folder, memory_budget_bytes=0)


def test_stored_statistics_hold_no_times_and_no_paths(
    prepare: Prepare, photos: Path, tmp_path: Path
) -> None:
    done = prepare(train=photos, test=HALF)
    text = (done.folder / "data.json").read_text()
    assert "seconds" not in text
    assert str(tmp_path) not in text
    assert set(done.stats) - set(json.loads(text)["stats"]) == {"preprocess", "seconds"}


def test_cifar_parquet_is_read_with_its_class_names(shared_data: Path) -> None:
    sources = [
        open_source(SourceSpec(path=str(shared_data / "cifar10-jpeg" / f"{part}.parquet")))
        for part in ("train", "test")
    ]
    assert [len(source) for source in sources] == [50_000, 10_000]
    assert sources[0].class_names == sources[1].class_names
    assert sources[0].class_names[3] == "cat"
