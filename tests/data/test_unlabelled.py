"""Images without labels: where they come from, what is stored, dropped, counted and refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from edgestill.pipeline.data.dataset import open_data, with_unlabelled
from edgestill.pipeline.data.readers import open_source
from edgestill.pipeline.data.stage import prepare_data, source_fingerprint
from edgestill.pipeline.errors import DataError, IntegrityError, RecipeError
from edgestill.pipeline.recipe import DataSpec, UnlabelledSpec
from edgestill.pipeline.recipe_file import load_recipe
from edgestill.pipeline.stage import Context, Silent
from edgestill.pipeline.workspace import tree_sha256
from PIL import Image

Prepare = Callable[..., Any]
HALF = {"fraction": 0.5}


@pytest.fixture
def photos(tmp_path: Path, make: SimpleNamespace) -> Path:
    root: Path = make.folder(tmp_path / "photos", {"ant": 10, "bee": 20})
    return root


@pytest.fixture
def pool(tmp_path: Path, make: SimpleNamespace) -> Path:
    """Six new images, at the top and in folders whose names mean nothing."""
    places = ("z.png", "a.png", "ant/0.png", "wasp/deep/1.png", "train/2.png", "test/3.png")
    for number, place in enumerate(places):
        path = tmp_path / "pool" / place
        path.parent.mkdir(parents=True, exist_ok=True)
        make.picture(100 + number).save(path)
    return tmp_path / "pool"


def refused(prepare: Prepare, **options: Any) -> str:
    with pytest.raises(DataError) as caught:
        prepare(**options)
    return str(caught.value)


def pixels(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path))


def stored(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


# What is read from where


def test_images_anywhere_below_a_folder_are_read_in_order_of_name(pool: Path) -> None:
    (pool / "notes.txt").write_text("")
    (pool / ".hidden.png").write_text("")
    (pool / ".cache").mkdir()
    (pool / ".cache" / "x.png").write_text("")
    source = open_source(UnlabelledSpec(path=str(pool)))
    assert source.names == [
        "a.png", "ant/0.png", "test/3.png", "train/2.png", "wasp/deep/1.png", "z.png",
    ]  # fmt: skip
    assert list(source.contents()) == [pool / name for name in source.names]
    assert set(source.labels.tolist()) == {-1}
    assert source.ignored == 2


@pytest.mark.parametrize("labels", [None, [3, -1, 99], [None, None, None], [0.5, 0.25, 0.125]])
def test_parquet_needs_no_labels_and_ignores_those_it_has(
    tmp_path: Path, make: SimpleNamespace, labels: list[Any] | None
) -> None:
    columns = {"image": make.structs(range(3))} | ({} if labels is None else {"label": labels})
    path = make.parquet(tmp_path / "set.parquet", columns)
    source = open_source(UnlabelledSpec(path=str(path)))
    assert source.labels.tolist() == [-1, -1, -1]
    assert source.names == [f"set.parquet row {row}" for row in range(3)]
    assert list(source.contents()) == [make.png(make.picture(number)) for number in range(3)]


def test_image_column_of_a_parquet_is_the_one_asked_for(
    tmp_path: Path, make: SimpleNamespace
) -> None:
    columns = {"left": make.structs(range(2)), "right": make.structs(range(2, 4))}
    path = make.parquet(tmp_path / "set.parquet", columns)
    source = open_source(UnlabelledSpec(path=str(path), image="right"))
    assert next(source.contents()) == make.png(make.picture(2))


def test_digits_can_be_read_without_their_labels() -> None:
    source = open_source(UnlabelledSpec(path="digits"))
    assert len(source) == 1797
    assert set(source.labels.tolist()) == {-1}


# What is stored


def test_set_of_its_own_becomes_a_fourth_part_and_changes_no_other(
    prepare: Prepare, photos: Path, pool: Path
) -> None:
    without = prepare(train=photos, test=HALF)
    done = prepare(train=photos, test=HALF, unlabelled=pool)
    more = done.data.unlabelled
    assert more.names == sorted(more.names)
    assert len(more) == len(more.ids) == len(more.hashes) == 6
    assert more.labels.tolist() == [-1] * 6
    for name, image in zip(more.names, more.contents, strict=True):
        assert np.array_equal(image, pixels(pool / name))
    assert done.stats["counts"]["unlabelled"] == 6
    assert done.stats["counts"].items() > without.stats["counts"].items()
    assert done.notes == [
        "unlabelled: 6 samples are learnt from without labels, beside "
        f"{len(done.data.train)} with labels"
    ]
    before, after = stored(without.folder), stored(done.folder)
    new = {"unlabelled.labels.npy", "unlabelled.hashes.npy", "unlabelled.names.json"}
    assert set(after) - set(before) == new
    changed = {name for name in before if before[name] != after[name]}
    assert changed == {"data.json", "train.contents.npy"}
    assert np.array_equal(done.data.train.contents, without.data.train.contents)
    assert done.data.preprocess == without.data.preprocess
    assert done.data.calibration.tolist() == without.data.calibration.tolist()
    assert done.stats["contents_digest"] != without.stats["contents_digest"]


def test_fraction_hides_labels_of_train_and_leaves_test_and_validation_alone(
    prepare: Prepare, photos: Path
) -> None:
    options = {"train": photos, "test": {"fraction": 0.2}, "validation": 0.25}
    without = prepare(**options)
    done = prepare(**options, unlabelled={"fraction": 0.75})
    data = done.data
    assert sorted([*data.train.names, *data.unlabelled.names]) == sorted(without.data.train.names)
    # 6 of the 18 left for training are ants: round(0.75 · 6) = 4 (to even), round(0.75 · 12) = 9
    hidden = [name.split("/")[0] for name in data.unlabelled.names]
    assert (hidden.count("ant"), hidden.count("bee")) == (4, 9)
    assert set(data.unlabelled.labels.tolist()) == {-1}
    assert [data.class_names[label] for label in data.train.labels] == [
        name.split("/")[0] for name in data.train.names
    ]
    for name in ("test", "validation"):
        assert getattr(data, name).names == getattr(without.data, name).names
    assert done.stats["counts"] == {"train": 5, "validation": 6, "test": 6, "unlabelled": 13}
    assert sum(done.stats["per_class"]["train"].values()) == 5


def test_no_file_of_the_stage_holds_a_hidden_label(prepare: Prepare, photos: Path) -> None:
    folder = prepare(train=photos, test=HALF, unlabelled=HALF).folder
    assert set(np.load(folder / "unlabelled.labels.npy").tolist()) == {-1}
    assert not (folder / "resume" / "train.decoded.npy").exists()


def test_labelled_share_shrinks_by_content_as_the_fraction_grows(
    prepare: Prepare, photos: Path
) -> None:
    def labelled(fraction: float, seed: int = 0) -> set[str]:
        options = {"train": photos, "test": photos, "validation": 0.1, "allow_overlap": True}
        done = prepare(**options, unlabelled={"fraction": fraction}, seed=seed)
        return set(done.data.train.names)

    few, half, most = labelled(0.8), labelled(0.5), labelled(0.2)
    assert few < half < most
    assert labelled(0.5, seed=1) != half


def test_calibration_is_of_the_labelled_train_and_takes_all_if_it_asks_for_more(
    prepare: Prepare, photos: Path
) -> None:
    data = prepare(train=photos, test=HALF, unlabelled=HALF, calibration=500).data
    assert sorted(data.calibration.tolist()) == list(range(len(data.train)))


def test_statistics_are_of_the_labelled_images_alone(prepare: Prepare, photos: Path) -> None:
    data = prepare(train=photos, test=HALF, unlabelled=HALF).data
    seen = data.train.contents / 255
    assert data.preprocess.mean == pytest.approx(seen.mean((0, 1, 2)), abs=6e-5)
    assert data.preprocess.std == pytest.approx(seen.std((0, 1, 2)), abs=6e-5)


def test_colour_of_unlabelled_images_does_not_change_what_the_network_takes(
    prepare: Prepare, make: SimpleNamespace, pool: Path, tmp_path: Path
) -> None:
    grey = make.folder(tmp_path / "grey", {"a": 6, "b": 6}, grey=True)
    data = prepare(train=grey, test=HALF, unlabelled=pool).data
    assert data.input_shape == (1, 8, 8)
    expected = np.asarray(Image.open(pool / "a.png").convert("L"))
    assert np.array_equal(data.unlabelled.contents[0, ..., 0], expected)


@pytest.mark.parametrize("unlabelled", ["pool", "fraction"])
def test_same_inputs_give_the_same_bytes_whatever_the_threads(
    prepare: Prepare, photos: Path, pool: Path, unlabelled: str
) -> None:
    wanted = {"pool": pool, "fraction": HALF}[unlabelled]
    one, two = (
        stored(prepare(train=photos, test=HALF, unlabelled=wanted, threads=threads).folder)
        for threads in (1, 4)
    )
    assert len(one) == 17
    assert one == two


def test_recipe_without_unlabelled_gives_the_bytes_it_always_gave(tmp_path: Path) -> None:
    # both hashes were taken before there were unlabelled images; numpy 2.4, any machine
    for number in range(24):
        folder = tmp_path / "set" / ("ant", "bee")[number % 2]
        folder.mkdir(parents=True, exist_ok=True)
        image = np.arange(6 * 6 * 3).reshape(6, 6, 3) * (number + 3) % 251
        Image.fromarray(image.astype(np.uint8)).save(folder / f"{number:02}.bmp")
    options = {"train": {"path": str(tmp_path / "set")}, "test": {"fraction": 0.25}}
    spec = DataSpec.model_validate({**options, "validation": 0.25})
    (tmp_path / "out").mkdir()
    prepare_data(spec, context=Context(0, 1, "cpu", tmp_path / "out", Silent()))
    assert tree_sha256(tmp_path / "out") == (
        "27aef6ae8148f8261dbbcef987e72e3f3caecbd61dbe9d050c0a1aff4de76816"
    )
    assert source_fingerprint(spec) == (
        "50eb69bbaeea3f1892786a532e9f9f03cc172e19ce72f048f4b344db7d97a6c0"
    )


# Decoded as train is


def test_unlabelled_images_are_turned_and_resized_exactly_as_train(
    prepare: Prepare, make: SimpleNamespace, photos: Path, tmp_path: Path
) -> None:
    make.picture(99, (20, 30)).save(photos / "ant" / "wide.png")
    sideways = Image.Exif()
    sideways[0x0112] = 6
    (tmp_path / "pool").mkdir()
    make.picture(99, (20, 30)).save(tmp_path / "pool" / "0.bmp")
    make.picture(98, (20, 30)).save(tmp_path / "pool" / "1.png", exif=sideways)
    turned = make.picture(98, (20, 30)).transpose(Image.Transpose.ROTATE_270)
    turned.save(photos / "bee" / "tall.png")
    options = {"train": photos, "test": photos, "validation": 0.1, "allow_overlap": True}
    preprocess = {"resize": 10, "crop": 6}
    seen = prepare(**options, preprocess=preprocess).data.test
    expected = [seen.contents[seen.names.index(n)] for n in ("ant/wide.png", "bee/tall.png")]
    (photos / "ant" / "wide.png").unlink()  # so that the two of the pool are new
    (photos / "bee" / "tall.png").unlink()
    got = prepare(**options, preprocess=preprocess, unlabelled=tmp_path / "pool").data.unlabelled
    assert np.array_equal(got.contents, np.stack(expected))


def test_sizes_that_differ_need_a_preprocess(
    prepare: Prepare, make: SimpleNamespace, photos: Path, pool: Path
) -> None:
    make.picture(99, (64, 70)).save(pool / "large.png")
    message = refused(prepare, train=photos, test=HALF, unlabelled=pool)
    assert str(pool) in message
    assert "from 8×8 to 64×70" in message
    done = prepare(train=photos, test=HALF, unlabelled=pool, preprocess={"resize": 8})
    assert done.data.unlabelled.contents.shape == (7, 8, 8, 3)


def test_corrupt_unlabelled_image_is_an_error_naming_it_or_skipped_and_counted(
    prepare: Prepare, photos: Path, pool: Path
) -> None:
    (pool / "train" / "2.png").write_bytes(b"no image")
    message = refused(prepare, train=photos, test=HALF, unlabelled=pool)
    assert message.startswith("train/2.png: ")
    assert "on_corrupt: skip" in message
    done = prepare(train=photos, test=HALF, unlabelled=pool, on_corrupt="skip")
    assert done.stats["corrupt"] == {"train": 0, "unlabelled": 1}
    assert done.stats["counts"]["unlabelled"] == 5
    assert "unlabelled: 1 of 6 images were left out" in done.notes[0]


# The same image twice


@pytest.mark.parametrize("part", ["test", "validation"])
def test_unlabelled_image_of_test_or_validation_is_an_error_unless_allowed(
    prepare: Prepare, make: SimpleNamespace, photos: Path, pool: Path, tmp_path: Path, part: str
) -> None:
    held = make.folder(tmp_path / "held", {"ant": 3, "bee": 3}, start=50)
    for copy in ("copy.bmp", "twin.bmp"):  # a lossless copy in another format is the same image
        Image.open(held / "bee" / "002.png").save(pool / copy)
    options = {"train": photos, "test": HALF, part: held, "unlabelled": pool}
    message = refused(prepare, **options)
    assert message.startswith(str(held))
    assert f"1 of 6 {part} samples are in unlabelled too (bee/002.png = copy.bmp)" in message
    assert "data.allow_overlap" in message
    done = prepare(**options, allow_overlap=True)
    assert done.stats["overlap"][f"unlabelled_{part}"] == 1
    assert sum(done.stats["overlap"].values()) == 1
    assert "copy.bmp" in done.data.unlabelled.names


def test_overlap_with_a_part_split_from_train_is_found_too(prepare: Prepare, photos: Path) -> None:
    message = refused(prepare, train=photos, test=HALF, unlabelled=photos)
    assert "samples are in unlabelled too" in message


def test_images_of_train_and_repeated_ones_are_dropped_noted_and_counted(
    prepare: Prepare, make: SimpleNamespace, photos: Path, pool: Path, tmp_path: Path
) -> None:
    held = make.folder(tmp_path / "held", {"ant": 2, "bee": 2}, start=50)
    options = {"train": photos, "test": held, "validation": held, "allow_overlap": True}
    for copy in ("b.bmp", "c.bmp"):
        Image.open(photos / "ant" / "000.png").save(pool / copy)
    for copy in ("d.bmp", "e.bmp", "f.bmp"):
        Image.open(pool / "a.png").save(pool / copy)
    done = prepare(**options, unlabelled=pool)
    assert done.stats["unlabelled_dropped"] == {"in_train": 2, "repeated": 3}
    assert done.stats["counts"]["unlabelled"] == 6
    assert done.notes == [
        "unlabelled: 6 samples are learnt from without labels, beside 30 with labels; 5 were "
        "dropped (2 are training samples, 3 repeat another)"
    ]
    assert set(done.data.unlabelled.hashes).isdisjoint(done.data.train.hashes)
    assert len(set(done.data.unlabelled.hashes)) == 6
    assert done.data.unlabelled.names[0] == "a.png"


def test_repeated_images_whose_labels_are_hidden_are_dropped_too(
    prepare: Prepare, photos: Path
) -> None:
    for name in ("ant/000.png", "bee/005.png", "bee/006.png"):
        Image.open(photos / name).save(photos / name.replace(".png", ".bmp"))
    found = {"unlabelled": 0, "train": 0}
    for seed in range(8):
        done = prepare(train=photos, test=HALF, unlabelled=HALF, seed=seed)
        repeated = done.stats["unlabelled_dropped"]
        assert repeated["in_train"] == 0
        data = done.data
        assert len(set(data.unlabelled.hashes)) == len(data.unlabelled)
        assert set(data.unlabelled.hashes).isdisjoint(data.train.hashes)
        found["unlabelled"] += repeated["repeated"]
        found["train"] += done.stats["duplicates_in_train"]
    assert min(found.values()) > 0


def test_nothing_new_is_an_error(prepare: Prepare, photos: Path, tmp_path: Path) -> None:
    (tmp_path / "pool").mkdir()
    Image.open(photos / "ant" / "000.png").save(tmp_path / "pool" / "copy.bmp")
    options = {"train": photos, "test": photos, "validation": photos, "allow_overlap": True}
    message = refused(prepare, **options, unlabelled=tmp_path / "pool")
    assert message.startswith(f"{tmp_path / 'pool'}: expected samples that train lacks, got 1 ")
    assert "leave `data.unlabelled` out" in message


# Train and unlabelled together


@pytest.mark.parametrize("unlabelled", ["pool", "fraction"])
def test_with_unlabelled_is_train_then_unlabelled_resident_or_mapped(
    prepare: Prepare, photos: Path, pool: Path, unlabelled: str
) -> None:
    wanted = {"pool": pool, "fraction": HALF}[unlabelled]
    resident = prepare(train=photos, test=HALF, unlabelled=wanted)
    mapped = open_data(resident.folder, memory_budget_bytes=0)
    for data in (resident.data, mapped):
        joined = with_unlabelled(data)
        n = len(data.train)
        assert len(joined) == n + len(data.unlabelled)
        for field in ("contents", "labels", "ids", "hashes", "names"):
            whole = getattr(joined, field)
            assert np.array_equal(whole[:n], getattr(data.train, field))
            assert np.array_equal(whole[n:], getattr(data.unlabelled, field))
        assert np.shares_memory(joined.contents, data.train.contents)
        assert np.shares_memory(joined.contents, data.unlabelled.contents)
    for images in (joined.contents, mapped.train.contents, mapped.unlabelled.contents):
        assert isinstance(images, np.memmap)
    assert not isinstance(resident.data.unlabelled.contents, np.memmap)
    assert np.array_equal(with_unlabelled(resident.data).contents, joined.contents)


def test_with_unlabelled_is_train_itself_where_there_is_nothing_more(
    prepare: Prepare, photos: Path
) -> None:
    data = prepare(train=photos, test=HALF).data
    assert data.unlabelled is None
    assert with_unlabelled(data) is data.train


def test_memory_budget_counts_the_unlabelled_images(
    prepare: Prepare, photos: Path, pool: Path
) -> None:
    folder = prepare(train=photos, test=HALF, unlabelled=pool).folder
    size = sum(path.stat().st_size for path in folder.glob("*.contents.npy"))
    assert size > 36 * 8 * 8 * 3
    fits = open_data(folder, memory_budget_bytes=size)
    assert not isinstance(with_unlabelled(fits).contents, np.memmap)
    exceeds = open_data(folder, memory_budget_bytes=size - 1)
    assert isinstance(with_unlabelled(exceeds).contents, np.memmap)


def test_lost_or_damaged_unlabelled_file_is_an_integrity_failure(
    prepare: Prepare, photos: Path, pool: Path
) -> None:
    folder = prepare(train=photos, test=HALF, unlabelled=pool).folder
    np.save(folder / "unlabelled.labels.npy", np.full(5, -1))
    with pytest.raises(IntegrityError, match="the files of unlabelled differ in length"):
        open_data(folder, memory_budget_bytes=0)
    (folder / "unlabelled.labels.npy").unlink()
    with pytest.raises(IntegrityError, match="expected the files of the data stage"):
        open_data(folder, memory_budget_bytes=0)


# What is refused


def test_missing_empty_and_imageless_places_are_one_message_each(
    prepare: Prepare, photos: Path, tmp_path: Path
) -> None:
    def message(path: Path) -> str:
        text = refused(prepare, train=photos, test=HALF, unlabelled=path)
        assert text.startswith(str(path))
        assert "\n" not in text
        spec = spec_with({"path": str(path)})
        with pytest.raises(DataError) as caught:  # the fingerprint is taken before the stage runs
            source_fingerprint(spec)
        assert str(caught.value) == text
        return text

    assert "there is no such file or folder; give an image folder" in message(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    assert "got none and 0 other files; add images" in message(tmp_path / "empty")
    (tmp_path / "texts" / "deep").mkdir(parents=True)
    (tmp_path / "texts" / "deep" / "a.txt").write_text("")
    assert "(.avif, .bmp, " in message(tmp_path / "texts")
    assert "got none and 1 other files" in message(tmp_path / "texts")
    (tmp_path / "list.csv").write_text("")
    assert "expected an image folder or a .parquet file, got a .csv" in message(
        tmp_path / "list.csv"
    )


def test_parquet_without_images_is_one_message_with_its_columns(
    prepare: Prepare, make: SimpleNamespace, photos: Path, tmp_path: Path
) -> None:
    def message(columns: dict[str, Any], **more: str) -> str:
        path = make.parquet(tmp_path / "set.parquet", columns)
        wanted = {"path": str(path), **more}
        text = refused(prepare, train=photos, test=HALF, unlabelled=wanted)
        assert text.startswith(str(path))
        assert "\n" not in text
        return text

    text = message({"text": ["a", "b"], "label": [0, 1]})
    assert "which column is the image? none fits; its columns are text (string), " in text
    assert text.endswith("set `image:`")
    assert "no column 'photo'" in message({"image": make.structs(range(100, 102))}, image="photo")
    assert "left, right all fit" in message({"left": [b"0"], "right": [b"1"]})
    assert "holds no rows; expected at least one image" in message(
        {"image": pa.array([], pa.binary())}
    )


def test_null_image_of_a_parquet_is_a_corrupt_row(
    prepare: Prepare, make: SimpleNamespace, photos: Path, tmp_path: Path
) -> None:
    columns = {"image": [*make.structs(range(100, 102)), None]}
    path = make.parquet(tmp_path / "set.parquet", columns)
    message = refused(prepare, train=photos, test=HALF, unlabelled=path)
    assert message.startswith("set.parquet row 2: has no image")


def test_class_too_small_to_hide_some_of_it_is_named(
    prepare: Prepare, make: SimpleNamespace, tmp_path: Path
) -> None:
    root = make.folder(tmp_path / "set", {"many": 9, "rare": 3})
    message = refused(prepare, train=root, test={"fraction": 0.2}, unlabelled=HALF)
    assert message.startswith("data.unlabelled: ")
    assert "rare (1 samples)" in message


# The recipe


def spec_with(unlabelled: object) -> DataSpec:
    return DataSpec.model_validate(
        {"train": {"path": "digits"}, "test": {"fraction": 0.4}, "unlabelled": unlabelled}
    )


def test_fingerprint_follows_the_unlabelled_images_and_not_their_place(
    pool: Path, tmp_path: Path
) -> None:
    def of(unlabelled: object) -> str:
        return source_fingerprint(spec_with(unlabelled))

    before, without = of({"path": str(pool)}), of(None)
    assert before != without
    assert of(HALF) == without  # the share is in the spec, the images are train's
    moved = pool.rename(tmp_path / "elsewhere")
    assert of({"path": str(moved)}) == before
    (moved / "notes.txt").write_text("no image")
    assert of({"path": str(moved)}) == before
    (moved / "z.png").rename(moved / "ant" / "z.png")
    assert of({"path": str(moved)}) != before


def test_data_stage_is_recalled_until_the_unlabelled_images_change(
    make: SimpleNamespace, photos: Path, pool: Path, tmp_path: Path
) -> None:
    from edgestill.pipeline import steps
    from edgestill.pipeline.work import begin

    text = {
        "data": {"train": {"path": "photos"}, "test": HALF, "unlabelled": {"path": "pool"}},
        "teacher": {"model": "resnet20", "train": {"epochs": 1}},
        "student": {"model": "resnet20"},
        "compute": {"device": "cpu", "threads": 1},
    }
    (tmp_path / "recipe.yaml").write_text(json.dumps(text))  # JSON is YAML

    def recalled(*overrides: str) -> bool:
        recipe = load_recipe(str(tmp_path / "recipe.yaml"), overrides=overrides)
        work = begin(recipe, tmp_path / "work", events=Silent(), fresh=False)
        return bool(steps.prepare_data(work).recalled)

    assert not recalled()
    assert recalled()
    make.picture(999).save(pool / "new.png")
    assert not recalled()
    assert not recalled("data.unlabelled={fraction: 0.5}")
    assert not recalled("data.unlabelled={fraction: 0.6}")
    assert recalled("data.unlabelled={fraction: 0.5}")
    assert recalled()


RECIPE = "data:\n  train: {path: photos}\n  test: {fraction: 0.5}\n  unlabelled: %s\n"
NETWORKS = "teacher: {model: resnet20, train: {epochs: 1}}\nstudent: {model: resnet20}\n"


def test_paths_start_at_the_recipe_and_those_of_an_override_where_the_user_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home, here = tmp_path / "home", tmp_path / "here"
    home.mkdir()
    here.mkdir()
    monkeypatch.chdir(here)
    recipe = home / "recipe.yaml"
    recipe.write_text(RECIPE % "{path: pool}" + NETWORKS)

    def unlabelled(*overrides: str) -> object:
        return load_recipe(str(recipe), overrides=overrides).data.unlabelled

    assert unlabelled() == UnlabelledSpec(path=str(home / "pool"))
    override = "data.unlabelled.path=more"
    assert unlabelled(override) == UnlabelledSpec(path=str(here / "more"))
    recipe.write_text((RECIPE + NETWORKS) % "null")
    assert unlabelled() is None
    assert unlabelled(override) == UnlabelledSpec(path=str(here / "more"))
    assert unlabelled("data.unlabelled.path=digits") == UnlabelledSpec(path="digits")


@pytest.mark.parametrize(
    ("written", "said"),
    [
        ("{path: pool, label: kind}", "data.unlabelled.label: unknown key; known here: "),
        ("{path: pool, imag: a}", "data.unlabelled.imag: unknown key; did you mean `image`?"),
        ("{image: a}", "data.unlabelled.path: missing"),
        ("0.9", "data.unlabelled: expected {path: …} or {fraction: …}"),
        ("{fraction: 1.0}", "data.unlabelled.fraction: input should be less than 1, got 1.0"),
        ("{fraction: 0.5, path: pool}", "data.unlabelled.path: unknown key"),
    ],
)
def test_mistake_in_the_section_is_named_with_its_line(
    tmp_path: Path, written: str, said: str
) -> None:
    (tmp_path / "recipe.yaml").write_text(RECIPE % written + NETWORKS)
    with pytest.raises(RecipeError) as caught:
        load_recipe(str(tmp_path / "recipe.yaml"))
    assert str(caught.value).startswith(f"recipe.yaml:4 {said}")
