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
from edgestill.pipeline.errors import RecipeError
from edgestill.pipeline.recipe import Tokenization
from edgestill.pipeline.training_spec import AugmentSpec

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


def views_of(contents: np.ndarray, *, seed: int = 0, **augment: float) -> TextViews:
    """The first and the last piece of each text frame it."""
    ids = contents[:, 0]
    ends = ids[np.arange(len(ids)), contents[:, 1].sum(1) - 1]
    made = how(mask_id=99, special_ids=sorted({*ids[:, 0].tolist(), *ends.tolist()}))
    return TextViews(text_set(contents), made, AugmentSpec(**augment), seed, "cpu")


def content_of(row: torch.Tensor) -> list[int]:
    """Ids (K, S) → the pieces between the frame, of the places that are attended."""
    ids: list[int] = row[0, row[1] == 1].tolist()
    return ids[1:-1]


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
    views = views_of(contents)

    batch = views.batch(torch.tensor([2, 0, 4]), view=3)

    assert batch.inputs.dtype == torch.int64
    assert np.array_equal(batch.inputs.numpy(), to_input(tokens()[[2, 0, 4]], how()))
    assert batch.labels.tolist() == [0, 0, 0]
    assert batch.lam is None


def test_lengths_are_those_of_the_rows() -> None:
    views = views_of(tokens())

    assert lengths_of(views, torch.tensor([3, 0])).tolist() == [8, 2]
    assert lengths_of(views).tolist() == LENGTHS


def test_a_span_is_a_run_of_the_text_within_its_frame() -> None:
    whole = tokens()
    views = views_of(whole, span=1.0)
    seen = set()
    for view in range(200):
        batch = views.batch(torch.arange(5), view=view).inputs
        for number, row in enumerate(batch):
            text = whole[number, 0, : LENGTHS[number]].tolist()
            ids = row[0, row[1] == 1].tolist()
            run = ids[1:-1]
            assert (ids[0], ids[-1]) == (text[0], text[-1])
            assert (
                run == text[(at := text.index(run[0])) : at + len(run)] if run else len(text) == 2
            )
            assert not row[0, row[1] == 0].any()  # padding behind, of id 0
            seen.add((number, tuple(run)))
    assert len([one for one in seen if one[0] == 3]) == 21  # every run of six pieces


def test_a_span_moves_with_its_mask_and_is_cut_to_the_longest() -> None:
    views = views_of(tokens(), span=1.0)
    batch = views.batch(torch.tensor([1, 2, 4]), view=0).inputs
    lengths = batch[:, 1].sum(1)
    assert batch.shape[2] == int(lengths.max())
    assert torch.equal(batch[:, 1], (torch.arange(batch.shape[2]) < lengths[:, None]).long())


def test_hidden_pieces_are_the_asked_share_and_never_the_frame() -> None:
    views = views_of(tokens(), mask=0.3)
    hidden = total = 0
    for view in range(400):
        batch = views.batch(torch.arange(5), view=view).inputs
        for row, text in zip(batch, tokens(), strict=True):
            assert row[0, 0] == text[0, 0]
            content = content_of(row)
            hidden, total = hidden + content.count(99), total + len(content)
    assert abs(hidden / total - 0.3) < 0.03  # 4,800 pieces: a standard error of 0.007


def test_a_view_is_a_function_of_text_view_and_seed_alone() -> None:
    one, same = (views_of(tokens(), span=0.5, mask=0.2) for _ in range(2))
    other = views_of(tokens(), seed=1, span=0.5, mask=0.2)
    whole = [one.batch(torch.arange(5), view=view).inputs for view in range(8)]
    for view, batch in enumerate(whole):
        alone = same.batch(torch.tensor([3]), view=view).inputs[0]
        assert torch.equal(alone, batch[3, :, : alone.shape[1]])
    assert any(not torch.equal(whole[0], batch) for batch in whole[1:])
    others = [other.batch(torch.arange(5), view=view).inputs for view in range(8)]
    assert any(not torch.equal(a, b) for a, b in zip(whole, others, strict=True))


def test_half_of_the_texts_are_cut_where_half_are_asked_for() -> None:
    views = views_of(tokens(), span=0.5)
    full = sum(
        len(content_of(views.batch(torch.tensor([3]), view=view).inputs[0])) == 6
        for view in range(600)
    )
    # half are whole, and a sixth of the runs are whole too
    assert abs(full / 600 - (0.5 + 0.5 / 6)) < 0.07


def test_hiding_needs_a_mask_token() -> None:
    with pytest.raises(RecipeError, match="no mask token"):
        TextViews(text_set(tokens()), how(), AugmentSpec(mask=0.1), 0, "cpu")
