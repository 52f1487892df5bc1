"""Text encoders with fewer words: equal answers, ids renumbered, what is refused."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from edgestill.models.hf import load
from edgestill.models.hf_folder import HfFolder, find_folder
from edgestill.models.hf_vocabulary import cut_vocabulary, vocabulary_args
from edgestill.models.source import Network, open_network
from edgestill.models.store import count_parameters, load_network, save_network
from edgestill.pipeline.errors import ModelError, WeightsError
from torch import Tensor, nn

AUTO = transformers.AutoModelForSequenceClassification
NAMES = ("bad", "good")
LABELS = {"id2label": dict(enumerate(NAMES)), "label2id": {n: i for i, n in enumerate(NAMES)}}
SMALL: dict[str, Any] = {
    "vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2,
    "intermediate_size": 24, "max_position_embeddings": 20,
}  # fmt: skip
KEPT = (0, 1, 2, 3, 7, 8, 15, 21, 22, 39)  # old ids


def bert(**options: Any) -> Any:
    return transformers.BertConfig(**(SMALL | LABELS | options))


def distilbert(**options: Any) -> Any:
    small = {"vocab_size": 40, "dim": 16, "n_layers": 3, "n_heads": 2, "hidden_dim": 24,
             "max_position_embeddings": 20}  # fmt: skip
    return transformers.DistilBertConfig(**(small | LABELS | options))


def roberta(**options: Any) -> Any:
    return transformers.RobertaConfig(**(SMALL | LABELS | {"type_vocab_size": 1} | options))


def electra(**options: Any) -> Any:
    return transformers.ElectraConfig(**(SMALL | LABELS | {"embedding_size": 8} | options))


def mpnet(**options: Any) -> Any:
    return transformers.MPNetConfig(**(SMALL | LABELS | options))


def deberta(**options: Any) -> Any:
    relative = {"relative_attention": True, "pos_att_type": ["p2c", "c2p"],
                "position_biased_input": False}  # fmt: skip
    return transformers.DebertaV2Config(**(SMALL | LABELS | relative | options))


def modernbert(**options: Any) -> Any:
    ids = {"pad_token_id": 0, "cls_token_id": 1, "sep_token_id": 2, "bos_token_id": 1,
           "eos_token_id": 2, "local_attention": 4}  # fmt: skip
    return transformers.ModernBertConfig(**(SMALL | LABELS | ids | options))


ENCODERS = [bert, distilbert, roberta, electra, mpnet, deberta, modernbert]
by_encoder = pytest.mark.parametrize("encoder", ENCODERS, ids=lambda make: make.__name__)


def saved(folder: Path, config: Any) -> HfFolder:
    """A folder with a classifier of this configuration, every weight drawn."""
    network = AUTO.from_config(config)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.3)
    network.save_pretrained(folder)
    found = find_folder(f"hf:{folder}")
    assert found is not None
    return found


def opened(
    folder: HfFolder, kept: Sequence[int] | None, *, layers: Any = None, **args: Any
) -> Network:
    return open_network(
        f"hf:{folder.path}", args=args, classes=2, input_shape=(2, 12), seed=1,
        keep_layers=layers, kept_ids=kept,
    )  # fmt: skip


def loaded(
    folder: HfFolder, kept: Sequence[int] | None, *, layers: Any = None, init: Any = "weights",
    names: Sequence[str] = NAMES, **args: Any,
) -> Network:  # fmt: skip
    network = opened(folder, kept, layers=layers, **args)
    load(
        network.module, folder, head="keep", class_names=names, where="teacher", init=init,
        keep_layers=layers, kept_ids=kept,
    )  # fmt: skip
    return network


def texts(*, pad: int) -> Tensor:
    """Three texts of new ids (3, 2, 9), the second and third padded."""
    generator = torch.Generator().manual_seed(7)
    tokens = torch.zeros(3, 2, 9, dtype=torch.int64)
    tokens[:, 0] = pad
    for text, length in zip(tokens, (9, 5, 2), strict=True):
        text[0, :length] = torch.randint(3, len(KEPT), (length,), generator=generator)
        text[1, :length] = 1
    return tokens


def in_old_ids(tokens: Tensor, kept: Sequence[int] = KEPT) -> Tensor:
    old = tokens.clone()
    old[:, 0] = torch.tensor(kept)[tokens[:, 0]]
    return old


def answers(module: nn.Module, tokens: Tensor) -> Tensor:
    with torch.no_grad():
        logits: Tensor = module.eval()(tokens)
    return logits


def pad_of(network: Network) -> int:
    module: Any = network.module
    return int(module.network.config.pad_token_id or 0)


@by_encoder
@pytest.mark.parametrize("layers", [None, (0, 2)])
def test_with_the_rows_of_some_words_a_network_answers_bit_for_bit_the_same(
    tmp_path: Path, encoder: Any, layers: Any
) -> None:
    folder = saved(tmp_path, encoder())
    whole, small = (loaded(folder, kept, layers=layers) for kept in (None, KEPT))
    tokens = texts(pad=pad_of(small))

    assert answers(small.module, tokens).equal(answers(whole.module, in_old_ids(tokens)))
    width = whole.module.get_submodule("network").get_input_embeddings().embedding_dim
    saving = count_parameters(whole.module) - count_parameters(small.module)
    assert saving == 30 * width


@by_encoder
def test_it_is_stored_and_built_again_without_knowing_of_the_folder_s_words(
    tmp_path: Path, encoder: Any
) -> None:
    folder = saved(tmp_path / "hf", encoder())
    network = loaded(folder, KEPT, layers=(0,), names=NAMES[::-1])
    (tmp_path / "stored").mkdir()
    save_network(
        tmp_path / "stored", network, classes=2, input_shape=(2, 12), class_names=NAMES,
        preprocess={},
    )  # fmt: skip
    again = load_network(tmp_path / "stored").network
    tokens = texts(pad=pad_of(network))

    assert again.args["vocab_size"] == len(KEPT)
    assert answers(again.module, tokens).equal(answers(network.module, tokens))


def test_special_ids_move_with_their_words_and_one_that_is_gone_is_none(tmp_path: Path) -> None:
    kept = (4, 5, 9, 12, 30, 31, 32, 33, 34, 35)
    config = bert(pad_token_id=12, bos_token_id=4, eos_token_id=6)
    folder = saved(tmp_path, config)
    whole, small = loaded(folder, None), loaded(folder, kept)
    tokens = texts(pad=3)
    module: Any = small.module

    assert small.args == {
        "vocab_size": 10, "pad_token_id": 3, "bos_token_id": 0, "eos_token_id": None,
    }  # fmt: skip
    assert module.network.get_input_embeddings().padding_idx == 3
    assert answers(small.module, tokens).equal(answers(whole.module, in_old_ids(tokens, kept)))


@pytest.mark.parametrize("encoder", [roberta, mpnet])
def test_positions_that_count_from_the_padding_id_forbid_to_move_it(
    tmp_path: Path, encoder: Any
) -> None:
    folder = saved(tmp_path, encoder())

    with pytest.raises(ModelError, match=r"positions count from the padding id 1.*leave `trim`"):
        opened(folder, (1, 2, 3, 7))


@pytest.mark.parametrize("encoder", [bert, electra])
def test_embeddings_alone_are_those_of_the_words(tmp_path: Path, encoder: Any) -> None:
    folder = saved(tmp_path, encoder())
    table: Any = AUTO.from_pretrained(tmp_path).get_input_embeddings().weight
    network: Any = loaded(folder, KEPT, init="embeddings", num_hidden_layers=1).module
    narrow = {"embedding_size": 4} if encoder is electra else {"hidden_size": 4}
    narrower: Any = loaded(folder, KEPT, init="embeddings", **narrow).module

    assert network.network.get_input_embeddings().weight.equal(table[list(KEPT)])
    assert narrower.network.get_input_embeddings().weight.shape == (len(KEPT), 4)


def test_a_tied_table_is_cut_wherever_it_is_used() -> None:
    network: Any = transformers.BertForMaskedLM(bert(tie_word_embeddings=True))
    words = network.get_input_embeddings()
    assert network.cls.predictions.decoder.weight is words.weight

    cut_vocabulary(network, KEPT, "here")

    assert words.weight.shape == (len(KEPT), 16)
    assert network.cls.predictions.decoder.weight is words.weight


def test_a_network_that_reads_the_numbers_of_its_words_is_refused() -> None:
    network: Any = AUTO.from_config(bert())
    words = network.get_input_embeddings()
    plain = words.forward
    words.forward = lambda ids: plain(ids) + ids[..., None]

    with pytest.raises(WeightsError, match="answers otherwise to the same ones"):
        cut_vocabulary(network, KEPT, "here")


def test_a_tokenizer_of_other_words_is_refused(tmp_path: Path) -> None:
    folder = saved(tmp_path, bert())

    with pytest.raises(ModelError, match="the id 40 and its word embeddings have 40 rows"):
        opened(folder, (0, 1, 40))


def test_a_number_of_words_in_args_is_refused(tmp_path: Path) -> None:
    folder = saved(tmp_path, bert())

    with pytest.raises(ModelError, match=r"trim and args\.vocab_size both name"):
        opened(folder, KEPT, vocab_size=20)


def test_rows_that_only_fill_the_table_up_are_left_out_too() -> None:
    network = AUTO.from_config(bert(vocab_size=64))  # of a tokenizer of 40

    assert vocabulary_args(network, range(40), "here") == {"vocab_size": 40}
