"""Factorised word embeddings: the best of their rank, stored and loaded, trained, refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from edgestill.models.hf_embeddings import FactorizedEmbedding, principal_directions
from edgestill.models.source import Network
from edgestill.models.store import count_parameters, load_network, save_network
from edgestill.pipeline.errors import ModelError, WeightsError

from .test_hf_text import SHAPE, bert, by_encoder, deberta, electra, given, opened, roberta, saved


def words_of(network: Network) -> Any:
    inner: Any = network.module.network
    return inner.get_input_embeddings()


def test_principal_directions_keep_what_any_rank_keeps_best() -> None:
    table = torch.randn(50, 6, generator=torch.Generator().manual_seed(0)) @ torch.diag(
        torch.tensor([5.0, 3.0, 1.0, 0.1, 0.1, 0.1])
    )
    found = principal_directions(table, 3)
    centred = table.double() - table.double().mean(0)
    torch.testing.assert_close(found.T @ found, torch.eye(3, dtype=torch.float64))
    lost = (centred - centred @ found @ found.T).square().sum()
    torch.testing.assert_close(lost, torch.linalg.svdvals(centred)[3:].square().sum())
    torch.testing.assert_close(principal_directions(-table, 3), found)  # whatever the signs


def test_factorized_embeddings_are_the_best_approximation_of_the_folders(tmp_path: Path) -> None:
    folder = saved(tmp_path, bert())
    whole, network = opened(folder), opened(folder, embedding_size=5)
    given(whole, folder)
    given(network, folder)
    table, words = words_of(whole).weight, words_of(network)
    assert isinstance(words, FactorizedEmbedding)
    assert words.table.weight.shape == (40, 5)
    lost = (words(torch.arange(40)) - table).double().square().sum()
    centred = (table - table.mean(0)).double()
    torch.testing.assert_close(lost, torch.linalg.svdvals(centred)[5:].square().sum())


def test_all_but_one_direction_answers_nearly_as_the_folder(tmp_path: Path) -> None:
    network = bert()
    folder = saved(tmp_path, network)
    whole, factorized = opened(folder), opened(folder, embedding_size=15)
    for one in (whole, factorized):
        given(one, folder)
    tokens = torch.randint(40, (4, *SHAPE), generator=torch.Generator().manual_seed(0))
    tokens[:, 1] = 1
    with torch.no_grad():
        expected, got = whole.module(tokens), factorized.module(tokens)
    assert float((got - expected).abs().max()) < 0.25 * float(expected.abs().max())


@by_encoder
def test_every_encoder_takes_them_with_layers_kept(encoder: Any, tmp_path: Path) -> None:
    """A configuration that knows `embedding_size` makes its own, at its own place."""
    config = encoder()
    folder = saved(tmp_path, config)
    if "embedding_size" in config.to_dict():
        assert not isinstance(words_of(opened(folder, embedding_size=8)), FactorizedEmbedding)
        return
    network = opened(folder, keep=(0, 3), embedding_size=6)
    report = given(network, folder, keep_layers=(0, 3))
    assert report.fresh == ()
    assert words_of(network).table.embedding_dim == 6


def test_a_stored_network_has_them_again(tmp_path: Path) -> None:
    folder = saved(tmp_path / "folder", roberta())
    network = opened(folder, embedding_size=4)
    given(network, folder)
    (tmp_path / "stored").mkdir()
    save_network(tmp_path / "stored", network, classes=3, input_shape=SHAPE,
                 class_names=("bad", "fine", "good"), preprocess={})  # fmt: skip
    again = load_network(tmp_path / "stored").network
    tokens = torch.ones(2, *SHAPE, dtype=torch.int64)
    with torch.no_grad():
        assert torch.equal(again.module(tokens), network.module(tokens))
    assert count_parameters(again.module) < count_parameters(opened(folder).module)


def test_a_narrower_network_gets_them_of_the_projected_table(tmp_path: Path) -> None:
    folder = saved(tmp_path, bert())
    plain = opened(folder, hidden_size=8, intermediate_size=8)
    network = opened(folder, hidden_size=8, intermediate_size=8, embedding_size=7)
    for one in (plain, network):
        given(one, folder, head="new", init="embeddings")
    expected, got = words_of(plain).weight, words_of(network)(torch.arange(40))
    centred = (expected - expected.mean(0)).double()
    lost = torch.linalg.svdvals(centred)[7:].square().sum()
    torch.testing.assert_close((got - expected).double().square().sum(), lost)


@pytest.mark.parametrize("size", [0, 16, 17, -1, True, "8", 2.5])
def test_a_size_that_saves_nothing_is_refused(size: Any, tmp_path: Path) -> None:
    folder = saved(tmp_path, bert())
    with pytest.raises(ModelError, match=r"args.embedding_size: .*from 1 to 15.*got"):
        opened(folder, embedding_size=size)


def test_more_rows_than_the_folder_has(tmp_path: Path) -> None:
    folder = saved(tmp_path, bert())
    network = opened(folder, vocab_size=50, embedding_size=4)
    with pytest.raises(WeightsError, match=r"word_embeddings.weight has 40 rows .* and 50"):
        given(network, folder, head="new", init="embeddings")


def test_the_padding_row_stays_without_gradient(tmp_path: Path) -> None:
    network = opened(saved(tmp_path, deberta()), embedding_size=4)
    tokens = torch.zeros(2, *SHAPE, dtype=torch.int64)
    tokens[:, 1], tokens[:, 0, :3] = 1, 5
    network.module.train()
    network.module(tokens).sum().backward()
    gradient = words_of(network).table.weight.grad
    assert gradient[5].abs().sum() > 0
    assert not gradient[0].any()


@pytest.mark.parametrize("encoder", [bert, roberta, electra], ids=lambda make: make.__name__)
def test_fewer_positions_answer_as_before_up_to_their_number(encoder: Any, tmp_path: Path) -> None:
    folder = saved(tmp_path, encoder())
    whole, shorter = opened(folder), opened(folder, max_position_embeddings=15)
    for one in (whole, shorter):
        assert given(one, folder).fresh == ()
    tokens = torch.randint(3, 40, (2, *SHAPE), generator=torch.Generator().manual_seed(0))
    tokens[:, 1] = 1
    with torch.no_grad():
        torch.testing.assert_close(shorter.module(tokens), whole.module(tokens))
    assert count_parameters(shorter.module) == count_parameters(whole.module) - 5 * (
        8 if encoder is electra else 16
    )


def test_more_positions_than_the_folder_has_are_refused(tmp_path: Path) -> None:
    folder = saved(tmp_path, bert())
    with pytest.raises(WeightsError, match="position_embeddings"):
        given(opened(folder, max_position_embeddings=30), folder)
