"""Splits are stratified, seeded, and follow the content of the images."""

from __future__ import annotations

import numpy as np
import pytest
from edgestill.pipeline.data.split import calibration_indices, split_part
from edgestill.pipeline.errors import DataError

NAMES = ("a", "b", "c")


def contents(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, 16), dtype=np.uint8)


def split(
    digests: np.ndarray, labels: np.ndarray, fraction: float = 0.2, seed: int = 0
) -> np.ndarray:
    return split_part(digests, labels, fraction, seed=seed, part="test", class_names=NAMES)


def test_every_class_gives_its_share() -> None:
    labels = np.repeat([0, 1, 2], [100, 50, 10])
    taken = split(contents(160), labels)
    assert np.bincount(labels[taken]).tolist() == [20, 10, 2]


def test_seed_decides_and_order_does_not() -> None:
    digests, labels = contents(90), np.arange(90) % 3
    taken, shuffled = split(digests, labels), np.random.default_rng(1).permutation(90)
    assert np.array_equal(split(digests[shuffled], labels[shuffled]), taken[shuffled])
    assert not np.array_equal(split(digests, labels, seed=1), taken)


def test_identical_images_land_on_the_same_side_even_under_two_labels() -> None:
    digests = contents(60)[np.arange(120) % 60]
    labels = np.concatenate([np.arange(60) % 3, (np.arange(60) + 1) % 3])
    taken = split(digests, labels)
    assert np.array_equal(taken[:60], taken[60:])
    assert taken.any()


def test_added_images_move_old_ones_only_at_the_border() -> None:
    digests, labels = contents(300), np.arange(300) % 3
    more = np.concatenate([digests, contents(30, seed=5)])
    moved = split(more, np.concatenate([labels, np.zeros(30, int)]))[:300] != split(digests, labels)
    assert not moved[labels > 0].any()
    # 6 of the 30 belong to the part: at most that many old ones change sides
    assert moved.sum() <= 6


def test_class_too_small_for_both_sides_is_an_error_naming_it() -> None:
    labels = np.array([0, 0, 0, 1, 1, 1, 2])
    with pytest.raises(DataError, match=r"data\.test: .*c \(1 samples\)"):
        split(contents(7), labels)


def test_a_class_of_copies_counts_as_one_image() -> None:
    digests, labels = contents(9), np.repeat([0, 1, 2], 3)
    digests[6:] = digests[6]
    with pytest.raises(DataError, match=r"c \(3 samples\)"):
        split(digests, labels)


def test_smallest_possible_class_is_on_both_sides() -> None:
    labels = np.array([0, 0, 1, 1, 2, 2])
    assert np.bincount(labels[split(contents(6), labels)]).tolist() == [1, 1, 1]


@pytest.mark.parametrize("count", [1, 7, 50, 99, 100, 1000])
def test_calibration_is_stratified_as_far_as_whole_images_allow(count: int) -> None:
    labels = np.repeat([0, 1, 2], [60, 30, 10])
    chosen = calibration_indices(contents(100), labels, count, seed=0)
    assert len(set(chosen.tolist())) == len(chosen) == min(count, 100)
    share = np.array([60, 30, 10]) * len(chosen) / 100
    assert np.abs(np.bincount(labels[chosen], minlength=3) - share).max() < 1


def test_calibration_prefix_is_not_sorted_by_class() -> None:
    labels = np.repeat([0, 1, 2], 100)
    chosen = calibration_indices(contents(300), labels, 300, seed=0)
    assert np.bincount(labels[chosen[:60]], minlength=3).min() >= 10
    assert chosen.tolist() == calibration_indices(contents(300), labels, 300, seed=0).tolist()


def test_room_is_left_for_the_split_that_follows() -> None:
    labels = np.repeat([0, 1, 2], 3)
    taken = split_part(contents(9), labels, 0.9, seed=0, part="test", class_names=NAMES, leave=2)
    assert np.bincount(labels[taken]).tolist() == [1, 1, 1]
    with pytest.raises(DataError, match=r"needs at least 4 .* a \(3 samples\)"):
        split_part(contents(9), labels, 0.9, seed=0, part="test", class_names=NAMES, leave=3)
