"""Texts as inputs: cut to the longest of a batch, the same for evaluation and training."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from edgestill.exporters.feeds import longest
from edgestill.pipeline.data.dataset import SampleSet
from edgestill.pipeline.data.inputs import input_shape, repeated_to, to_input
from edgestill.pipeline.data.text_views import TextViews
from edgestill.pipeline.data.views import lengths_of
from edgestill.pipeline.recipe import Tokenization

LENGTHS = [2, 5, 3, 8, 4]


def how(**changes: object) -> Tokenization:
    return Tokenization.model_validate(
        {
            "tokenizer_sha256": "0" * 64, "vocabulary": 100, "pad_id": 0, "max_length": 9,
            "pad": "longest", "rows": ("input_ids", "attention_mask"),
        } | changes
    )  # fmt: skip


def tokens() -> np.ndarray:
    mask = np.arange(9) < np.array(LENGTHS)[:, None]
    ids = np.where(mask, np.arange(1, 46).reshape(5, 9), 0)
    return np.stack([ids, mask], axis=1).astype(np.int32)


def text_set(contents: np.ndarray) -> SampleSet:
    ids = np.arange(5)
    return SampleSet(contents, np.arange(5) % 2, ids, ids.astype(str), None)


def test_input_is_cut_to_the_longest_text_and_is_int64() -> None:
    inputs = to_input(tokens()[:3], how())

    assert inputs.dtype == np.int64
    assert inputs.shape == (3, 2, 5)
    assert np.array_equal(inputs, tokens()[:3, :, :5])


def test_input_of_a_fixed_graph_keeps_its_length() -> None:
    assert to_input(tokens()[:3], how(pad="max_length")).shape == (3, 2, 9)


def test_longest_of_empty_texts_is_one() -> None:
    assert longest(np.zeros((2, 2, 4), np.int32)) == 1


def test_shape_of_the_input_has_the_maximum_length() -> None:
    assert input_shape(tokens(), how()) == (2, 9)


def test_texts_repeated_for_timing_hold_their_own_tokens_and_no_padding() -> None:
    repeated = repeated_to(to_input(tokens(), how()), 6)

    assert repeated.shape == (5, 2, 6)
    assert repeated[:, 1].all()
    assert repeated[0, 0].tolist() == [1, 2, 1, 2, 1, 2]


@pytest.mark.parametrize("mapped", [False, True])
def test_training_batch_equals_the_evaluated_input(mapped: bool, tmp_path: Path) -> None:
    contents = tokens()
    if mapped:
        np.save(tmp_path / "tokens.npy", contents)
        contents = np.load(tmp_path / "tokens.npy", mmap_mode="r")
    views = TextViews(text_set(contents), "cpu")

    batch = views.batch(torch.tensor([2, 0, 4]), view=3)

    assert batch.inputs.dtype == torch.int64
    assert np.array_equal(batch.inputs.numpy(), to_input(tokens()[[2, 0, 4]], how()))
    assert batch.labels.tolist() == [0, 0, 0]
    assert batch.lam is None


def test_lengths_are_those_of_the_rows() -> None:
    views = TextViews(text_set(tokens()), "cpu")

    assert lengths_of(views, torch.tensor([3, 0])).tolist() == [8, 2]
    assert lengths_of(views).tolist() == LENGTHS
