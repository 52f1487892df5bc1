"""Text encoders from Hugging Face folders: fed, joined by name, cut, made narrower, refused."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from edgestill.models.hf import load
from edgestill.models.hf_folder import HfFolder, find_folder
from edgestill.models.hf_text import (
    TextClassifier,
    check_vocabulary,
    most_tokens,
    pad_id,
)
from edgestill.models.source import Network, open_network
from edgestill.models.store import count_parameters, load_network, save_network
from edgestill.models.weights import LoadReport
from edgestill.pipeline.errors import ModelError, WeightsError
from torch import Tensor, nn

AUTO = transformers.AutoModelForSequenceClassification
NAMES = ("bad", "fine", "good")
SHAPE = (2, 12)
SMALL: dict[str, Any] = {
    "vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 4, "num_attention_heads": 2,
    "intermediate_size": 24, "max_position_embeddings": 20,
}  # fmt: skip
LABELS = {"id2label": dict(enumerate(NAMES)), "label2id": {n: i for i, n in enumerate(NAMES)}}


def bert(**options: Any) -> transformers.BertConfig:
    return transformers.BertConfig(**(SMALL | LABELS | options))


def distilbert(**options: Any) -> transformers.DistilBertConfig:
    small = {"vocab_size": 40, "dim": 16, "n_layers": 4, "n_heads": 2, "hidden_dim": 24,
             "max_position_embeddings": 20}  # fmt: skip
    return transformers.DistilBertConfig(**(small | LABELS | options))


def roberta(**options: Any) -> transformers.RobertaConfig:
    return transformers.RobertaConfig(**(SMALL | LABELS | {"type_vocab_size": 1} | options))


def electra(**options: Any) -> transformers.ElectraConfig:
    return transformers.ElectraConfig(**(SMALL | LABELS | {"embedding_size": 8} | options))


def albert(**options: Any) -> transformers.AlbertConfig:
    return transformers.AlbertConfig(**(SMALL | LABELS | {"embedding_size": 8} | options))


def mpnet(**options: Any) -> transformers.MPNetConfig:
    return transformers.MPNetConfig(**(SMALL | LABELS | options))


def deberta(**options: Any) -> transformers.DebertaV2Config:
    relative = {"relative_attention": True, "pos_att_type": ["p2c", "c2p"],
                "position_biased_input": False}  # fmt: skip
    return transformers.DebertaV2Config(**(SMALL | LABELS | relative | options))


def modernbert(**options: Any) -> transformers.ModernBertConfig:
    ids = {"pad_token_id": 0, "cls_token_id": 1, "sep_token_id": 2, "bos_token_id": 1,
           "eos_token_id": 2, "local_attention": 4}  # fmt: skip
    return transformers.ModernBertConfig(**(SMALL | LABELS | ids | options))


ENCODERS = [bert, distilbert, roberta, electra, albert, mpnet, deberta, modernbert]
by_encoder = pytest.mark.parametrize("encoder", ENCODERS, ids=lambda make: make.__name__)


def saved(folder: Path, network: Any) -> HfFolder:
    """A folder with the weights of a network, or of the classifier of a configuration; every
    weight is drawn, so that biases and norms count too."""
    if isinstance(network, transformers.PretrainedConfig):
        network = AUTO.from_config(network)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.3)
    network.save_pretrained(folder)
    return found(folder)


def found(folder: Path) -> HfFolder:
    result = find_folder(f"hf:{folder}")
    assert result is not None
    return result


def opened(
    folder: HfFolder, *, shape: tuple[int, ...] = SHAPE, classes: int = 3,
    keep: tuple[int, ...] | None = None, **args: Any,
) -> Network:  # fmt: skip
    return open_network(
        f"hf:{folder.path}", args=args, classes=classes, input_shape=shape, seed=1, keep_layers=keep
    )


def given(network: Network, folder: HfFolder, **options: Any) -> LoadReport:
    usual: dict[str, Any] = {"head": "keep", "class_names": NAMES, "where": "teacher"}
    return load(network.module, folder, **(usual | options))


def texts(lengths: tuple[int, ...] = (9, 5), *, pad: int = 0, rows: int = 2) -> Tensor:
    """Tokens (N, rows, longest) of random ids, padded."""
    generator = torch.Generator().manual_seed(7)
    tokens = torch.zeros(len(lengths), rows, max(lengths), dtype=torch.int64)
    tokens[:, 0] = pad
    for text, length in zip(tokens, lengths, strict=True):
        text[0, :length] = torch.randint(3, 40, (length,), generator=generator)
        text[1, :length] = 1
        text[2:, length // 2 : length] = 1
    return tokens


def pad_of(network: Network) -> int:
    """config.json is silent of an architecture's usual one."""
    module: Any = network.module
    return pad_id(module.network)


def answers(module: nn.Module, tokens: Tensor) -> Tensor:
    with torch.no_grad():
        result: Tensor = module.eval()(tokens)
    return result


def own_logits(network: Any, tokens: Tensor) -> Tensor:
    """What transformers answers by itself."""
    with torch.no_grad():
        logits: Tensor = network.eval()(input_ids=tokens[:, 0], attention_mask=tokens[:, 1]).logits
    return logits


# as they come


@by_encoder
@pytest.mark.parametrize("names", [NAMES, ("good", "bad", "fine")])
def test_a_folder_answers_as_it_does_in_transformers_joined_by_name(
    encoder: Any, names: tuple[str, ...], tmp_path: Path
) -> None:
    folder = saved(tmp_path, encoder())
    network = opened(folder)
    tokens = texts(pad=pad_of(network))

    report = given(network, folder, class_names=names)

    expected = own_logits(AUTO.from_pretrained(tmp_path), tokens)
    order = [NAMES.index(name) for name in names]
    assert expected.std() > 0.1
    torch.testing.assert_close(answers(network.module, tokens), expected[:, order])
    assert (report.fresh, report.dropped) == ((), ())
    assert isinstance(network.module, TextClassifier)
    assert network.module.input_names == ("input_ids", "attention_mask")


@by_encoder
def test_padding_changes_no_answer(encoder: Any, tmp_path: Path) -> None:
    folder = saved(tmp_path, encoder())
    network = opened(folder)
    given(network, folder)
    padded = texts((5, 12), pad=pad_of(network))

    alone, beside = answers(network.module, padded[:1, :, :5]), answers(network.module, padded)[:1]

    torch.testing.assert_close(beside, alone, rtol=1e-5, atol=1e-5)
    unmasked = padded.clone()
    unmasked[:, 1] = 1  # so that the comparison above can fail
    assert not torch.allclose(answers(network.module, unmasked)[:1], alone, atol=1e-3)


@pytest.mark.parametrize("encoder", [bert, electra, albert])
def test_a_third_row_tells_the_first_text_from_the_second(encoder: Any, tmp_path: Path) -> None:
    folder = saved(tmp_path, encoder())
    network = opened(folder, shape=(3, 12))
    given(network, folder)
    tokens = texts(rows=3)
    assert isinstance(network.module, TextClassifier)

    by_rows = network.module.answer(*tokens.unbind(1))

    assert network.module.input_names == ("input_ids", "attention_mask", "token_type_ids")
    torch.testing.assert_close(answers(network.module, tokens), by_rows)
    assert not torch.allclose(by_rows, answers(network.module, tokens[:, :2]), atol=1e-2)


@pytest.mark.parametrize("encoder", [distilbert, roberta, mpnet, deberta])
def test_a_third_row_is_refused_where_it_would_mean_nothing(encoder: Any, tmp_path: Path) -> None:
    encoder().save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=r"no token types\); leave out data\.pair"):
        opened(found(tmp_path), shape=(3, 12))


def test_dropout_follows_the_mode_and_attention_is_plain(tmp_path: Path) -> None:
    network = opened(saved(tmp_path, bert(hidden_dropout_prob=0.5)))
    config: Any = network.module.network.config
    tokens = texts()
    assert torch.equal(answers(network.module, tokens), answers(network.module, tokens))
    network.module.train()
    assert not torch.equal(network.module(tokens), network.module(tokens))
    assert config._attn_implementation == "eager"


@pytest.mark.parametrize(("encoder", "limit"), [(bert, 20), (roberta, 18), (mpnet, 18)])
def test_longer_texts_than_it_has_positions_for(encoder: Any, limit: int, tmp_path: Path) -> None:
    """RoBERTa and MPNet count from the padding id, 1, on."""
    folder = saved(tmp_path, encoder())
    network = opened(folder, shape=(2, limit))
    assert most_tokens(network.module.network) == limit
    assert answers(network.module, texts((limit, 3), pad=1)).shape == (2, 3)
    with pytest.raises(ModelError, match=rf"data\.tokenize\.max_length to {limit} or less"):
        opened(folder, shape=(2, limit + 1))


def test_a_tokenizer_with_more_ids_than_embeddings(tmp_path: Path) -> None:
    module = opened(saved(tmp_path, bert())).module
    check_vocabulary(module, 40, "teacher")
    check_vocabulary(nn.Linear(2, 2), 41, "teacher")  # nothing is known of it
    with pytest.raises(ModelError, match=r"teacher: the tokenizer has 41 ids and .* 40 rows"):
        check_vocabulary(module, 41, "teacher")


# weights


def test_torch_files_and_shards_are_read(tmp_path: Path) -> None:
    whole = AUTO.from_config(bert())
    whole.save_pretrained(tmp_path / "shards", max_shard_size="8KB")
    whole.config.save_pretrained(tmp_path / "torch")
    torch.save(whole.state_dict(), tmp_path / "torch/pytorch_model.bin")
    assert len(found(tmp_path / "shards").weights) > 1
    for name in ("shards", "torch"):
        folder = found(tmp_path / name)
        network = opened(folder)
        given(network, folder)
        torch.testing.assert_close(
            answers(network.module, texts()), own_logits(whole, texts()), rtol=1e-5, atol=1e-6
        )


@pytest.mark.parametrize("pooler", [True, False])
def test_a_headless_encoder_gets_what_it_lacks_from_the_seed(pooler: bool, tmp_path: Path) -> None:
    encoder = transformers.BertModel(bert(id2label=None), add_pooling_layer=pooler)
    folder = saved(tmp_path, encoder)
    first, second = opened(folder), opened(folder)

    report = given(first, folder, head="new")
    torch.rand(3)  # the global generator is elsewhere now
    given(second, folder, head="new")

    state, before = first.module.state_dict(), encoder.state_dict()
    assert all(torch.equal(state[f"network.bert.{n}"], t) for n, t in before.items())
    assert report.tensors == len(before)
    lacking = {"network.classifier.weight", "network.classifier.bias"}
    if not pooler:
        lacking |= {f"network.bert.pooler.dense.{part}" for part in ("weight", "bias")}
    assert (set(report.fresh), report.dropped) == (lacking, ())
    assert all(torch.equal(t, second.module.state_dict()[n]) for n, t in state.items())
    with pytest.raises(WeightsError, match="no classifier of its own: set `head: new` and train"):
        given(opened(folder), folder)


def test_a_language_model_lends_its_encoder(tmp_path: Path) -> None:
    folder = saved(tmp_path, transformers.RobertaForMaskedLM(roberta()))
    report = given(opened(folder), folder, head="new")
    parts = ("dense.weight", "dense.bias", "out_proj.weight", "out_proj.bias")
    assert set(report.fresh) == {f"network.classifier.{part}" for part in parts}


def test_a_new_head_replaces_the_last_layer_alone(tmp_path: Path) -> None:
    folder = saved(tmp_path, distilbert())
    network = opened(folder, classes=5)
    report = given(network, folder, head="new", class_names=tuple("abcde"))
    own = AUTO.from_pretrained(tmp_path).state_dict()
    state = network.module.state_dict()
    assert torch.equal(state["network.pre_classifier.weight"], own["pre_classifier.weight"])
    assert report.fresh == report.dropped == ("network.classifier.weight",
                                              "network.classifier.bias")  # fmt: skip


def test_a_pooler_as_wide_as_the_classes_is_not_reordered(tmp_path: Path) -> None:
    names = tuple(f"class {number:02}" for number in range(16))
    folder = saved(tmp_path, bert(id2label=dict(enumerate(names))))
    network = opened(folder, classes=16)
    given(network, folder, class_names=names[::-1])
    expected = own_logits(AUTO.from_pretrained(tmp_path), texts()).flip(1)
    torch.testing.assert_close(answers(network.module, texts()), expected)


def test_two_unnamed_classes_are_counted(tmp_path: Path) -> None:
    """transformers writes neither their names nor their number."""
    folder = saved(tmp_path, transformers.BertConfig(**SMALL))
    assert "id2label" not in folder.config
    assert folder.labels == ("LABEL_0", "LABEL_1")
    given(opened(folder, classes=2), folder, class_names=("bad", "good"))


def test_layers_that_the_configuration_does_not_count_are_no_detail(tmp_path: Path) -> None:
    saved(tmp_path, bert())
    config = tmp_path / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"num_hidden_layers": 2}))
    folder = found(tmp_path)
    with pytest.raises(WeightsError, match=r"layers that its config\.json has not"):
        given(opened(folder), folder)


# students


@pytest.mark.parametrize("encoder", [e for e in ENCODERS if e is not albert])
def test_layers_that_are_kept_answer_as_the_teacher_without_the_others(
    encoder: Any, tmp_path: Path
) -> None:
    folder = saved(tmp_path / "teacher", encoder())
    network = opened(folder, keep=(0, 2, 3))
    given(network, folder, keep_layers=(0, 2, 3))

    teacher: Any = AUTO.from_pretrained(folder.path, attn_implementation="eager")
    inner = getattr(teacher, teacher.base_model_prefix)
    holder = next(part for part in (getattr(inner, n, None) for n in ("encoder", "transformer"))
                  if part is not None) if encoder is not modernbert else inner  # fmt: skip
    name = "layers" if encoder is modernbert else "layer"
    del getattr(holder, name)[1]
    teacher.config.num_hidden_layers = 3
    tokens = texts(pad=pad_of(network))
    torch.testing.assert_close(
        answers(network.module, tokens), own_logits(teacher, tokens), rtol=1e-5, atol=1e-6
    )

    (tmp_path / "stored").mkdir()
    save_network(tmp_path / "stored", network, classes=3, input_shape=SHAPE, class_names=NAMES,
                 preprocess={})  # fmt: skip
    stored = load_network(tmp_path / "stored")
    assert stored.input_shape == SHAPE
    assert torch.equal(answers(stored.network.module, tokens), answers(network.module, tokens))


def test_the_depth_has_its_own_name_in_args(tmp_path: Path) -> None:
    distilbert().save_pretrained(tmp_path)
    assert opened(found(tmp_path), keep=(3, 1)).args == {"n_layers": 2}
    assert opened(found(tmp_path), num_hidden_layers=3).args == {"num_hidden_layers": 3}
    for args in ({"n_layers": 2}, {"num_hidden_layers": 2}):
        with pytest.raises(ModelError, match="both name the depth"):
            opened(found(tmp_path), keep=(3, 1), **args)


@pytest.mark.parametrize(
    ("encoder", "keep", "message"),
    [
        (bert, (), "names no layer"),
        (bert, (0, 4), r"there is no layer 4; it has the layers 0 to 3"),
        (bert, (-1,), "there is no layer -1"),
        (distilbert, (1, 2, 1), "layer 1 is named twice"),
        (albert, (0,), r"albert has 4 layers and 1 of their own weights"),
    ],
)
def test_layers_that_cannot_be_kept(
    encoder: Any, keep: tuple[int, ...], message: str, tmp_path: Path
) -> None:
    encoder().save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=rf"keep_layers: .*{message}"):
        opened(found(tmp_path), keep=keep)


def test_layers_that_depend_on_their_place_are_refused(tmp_path: Path) -> None:
    """ModernBERT's first layer has no norm, so another cannot take its place."""
    folder = saved(tmp_path, modernbert())
    network = opened(folder, keep=(1, 2))
    with pytest.raises(WeightsError, match="attn_norm"):
        given(network, folder, keep_layers=(1, 2))


def test_other_layers_than_the_network_was_made_for_are_noticed(tmp_path: Path) -> None:
    folder = saved(tmp_path, modernbert(global_attn_every_n_layers=2))
    network = opened(folder, keep=(0, 1))
    with pytest.raises(WeightsError, match="depend on their place"):
        given(network, folder, keep_layers=(0, 2), head="new")


@pytest.mark.parametrize("encoder", [bert, roberta, electra])
def test_embeddings_are_projected_by_truncated_svd(encoder: Any, tmp_path: Path) -> None:
    folder = saved(tmp_path, encoder())
    width = "embedding_size" if encoder is electra else "hidden_size"
    network = opened(folder, **{width: 4, "num_hidden_layers": 1})
    kind = folder.config["model_type"]
    before = {name: t.clone() for name, t in network.module.state_dict().items()}

    report = given(network, folder, head="new", init="embeddings")

    theirs = AUTO.from_pretrained(tmp_path).state_dict()
    after = network.module.state_dict()
    prefix = f"{kind}.embeddings."
    words = theirs[f"{prefix}word_embeddings.weight"].double().numpy()
    centred = words - words.mean(0)
    u, s, vt = np.linalg.svd(centred, full_matrices=False)
    sign = np.sign(vt[np.arange(4), np.abs(vt[:4]).argmax(1)])
    expected = {"word": (u * s)[:, :4] * sign}  # (W − μ)·V = U·S
    for table in ("position", "token_type"):
        rows = theirs[f"{prefix}{table}_embeddings.weight"].double().numpy()
        expected[table] = rows @ vt[:4].T * sign
    for table, rows in expected.items():
        got = after[f"network.{prefix}{table}_embeddings.weight"]
        np.testing.assert_allclose(got.numpy(), rows, atol=1e-5)
    written = {f"network.{prefix}{table}_embeddings.weight" for table in expected}
    assert all(torch.equal(t, before[n]) for n, t in after.items() if n not in written)
    assert report.tensors == 3
    assert f"network.{kind}.encoder" in report.fresh
    assert f"network.{kind}.embeddings.LayerNorm" in report.fresh


def test_embeddings_of_the_same_width_are_copied(tmp_path: Path) -> None:
    folder = saved(tmp_path, electra())
    network = opened(folder, hidden_size=8, intermediate_size=8, num_hidden_layers=1,
                     max_position_embeddings=14)  # fmt: skip
    given(network, folder, head="new", init="embeddings")
    theirs, own = AUTO.from_pretrained(tmp_path).state_dict(), network.module.state_dict()
    name = "electra.embeddings.word_embeddings.weight"
    assert torch.equal(own[f"network.{name}"], theirs[name])
    name = "electra.embeddings.position_embeddings.weight"
    assert torch.equal(own[f"network.{name}"], theirs[name][:14])


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ({"hidden_size": 32}, r"folder's are 16 wide, this network's 32"),
        ({"max_position_embeddings": 30}, r"position_embeddings.weight has 20 rows .* and 30"),
    ],
)
def test_embeddings_that_the_folder_has_too_few_of(
    args: dict[str, Any], message: str, tmp_path: Path
) -> None:
    folder = saved(tmp_path, bert())
    with pytest.raises(WeightsError, match=message):
        given(opened(folder, **args), folder, init="embeddings", head="new")


def test_from_scratch_nothing_is_read(tmp_path: Path) -> None:
    folder = saved(tmp_path, bert())
    network = opened(folder, hidden_size=8)
    before = {name: t.clone() for name, t in network.module.state_dict().items()}
    report = given(network, folder, init="scratch")
    assert report.fresh == ("network.bert", "network.classifier")
    assert all(torch.equal(t, before[n]) for n, t in network.module.state_dict().items())


def test_weights_of_another_size_name_the_ways_out(tmp_path: Path) -> None:
    folder = saved(tmp_path, bert())
    for args, sizes in (({"hidden_size": 8}, "hidden_size: 16 → 8"),
                        ({"num_hidden_layers": 2}, "num_hidden_layers: 4 → 2")):  # fmt: skip
        with pytest.raises(WeightsError, match=rf"(?s)do not fit.*{sizes}.*`init: embeddings`"):
            given(opened(folder, **args), folder)


def test_wishes_that_contradict_each_other(tmp_path: Path) -> None:
    folder = saved(tmp_path, bert())
    with pytest.raises(ModelError, match="keep_layers keeps weights and init: embeddings"):
        given(opened(folder, keep=(0,)), folder, init="embeddings", keep_layers=(0,))
    with pytest.raises(ModelError, match="are of text encoders"):
        load(nn.Linear(2, 2), folder, head="keep", class_names=NAMES, where="x", init="scratch")


# refused


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (transformers.GPT2Config(n_embd=8, n_layer=1, n_head=2), "gpt2 is a decoder"),
        (transformers.T5Config(d_model=8, num_layers=1), "t5 is an encoder with a decoder"),
        (transformers.BartConfig(d_model=8), "bart is an encoder with a decoder"),
        (bert(is_decoder=True), "bert is a decoder"),
        (bert(architectures=["BertLMHeadModel"]), "BertLMHeadModel is a decoder"),
        (transformers.XLNetConfig(d_model=8, n_layer=1, n_head=2), "xlnet is a decoder"),
        (transformers.ViTConfig(), "no text classifier can be built of its vit model"),
        (bert(problem_type="regression"), r"regression \(a number a text\)"),
        (bert(problem_type="multi_label_classification"), "several classes a text"),
        (transformers.FNetConfig(hidden_size=8, num_hidden_layers=1), "changes with the padding"),
    ],
    ids=lambda value: getattr(value, "model_type", None),
)
def test_what_is_no_encoder_of_one_class_is_named(
    config: Any, message: str, tmp_path: Path
) -> None:
    config.save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=message):
        opened(found(tmp_path))


def test_an_option_of_the_wrong_kind_is_an_error_of_ours(tmp_path: Path) -> None:
    bert().save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="no text classifier can be built"):
        opened(found(tmp_path), hidden_size=15)
    with pytest.raises(ModelError):
        opened(found(tmp_path), hidden_size="wide")


# other references

MEAN_NET = """\
import torch

class Net(torch.nn.Module):
    def __init__(self, classes, input_shape, masked=True):
        super().__init__()
        self.rows, self.masked = input_shape[0], masked
        self.words = torch.nn.Embedding(8, 6)
        self.fc = torch.nn.Linear(6, classes)

    def forward(self, tokens):
        assert tokens.dtype == torch.int64 and tokens.shape[1] == self.rows
        mask = tokens[:, 1, :, None].float() if self.masked else torch.ones(1)
        words = self.words(tokens[:, 0]) * mask
        return self.fc(words.sum(1) / (mask.sum(1) if self.masked else words.shape[1]))
"""


def test_a_users_network_takes_tokens(tmp_path: Path) -> None:
    (tmp_path / "net.py").write_text(MEAN_NET)
    reference = f"{tmp_path / 'net.py'}:Net"

    network = open_network(reference, args={}, classes=3, input_shape=(3, 7), seed=0)

    assert answers(network.module, torch.ones(4, 3, 5, dtype=torch.int64)).shape == (4, 3)
    with pytest.raises(ModelError, match=r"changes with the padding.*attention mask"):
        open_network(reference, args={"masked": False}, classes=3, input_shape=(2, 7), seed=0)
    with pytest.raises(ModelError, match="keep_layers names layers of a text encoder in an hf:"):
        open_network(reference, args={}, classes=3, input_shape=(2, 7), seed=0, keep_layers=(0,))


@pytest.mark.parametrize("reference", ["resnet20", "/nowhere/net.pt2", "bert-base-uncased"])
def test_other_references_are_no_networks_of_texts(reference: str) -> None:
    with pytest.raises(ModelError, match=r"no network of texts.*hf:DIR or FILE.py:factory"):
        open_network(reference, args={}, classes=2, input_shape=SHAPE, seed=0)


def test_a_real_minilm_is_cut_to_three_layers(minilm: Path) -> None:
    folder = found(minilm)
    whole = opened(folder, classes=2, shape=(2, 64))
    report = given(whole, folder, head="new", class_names=("bad", "good"))
    three = opened(folder, classes=2, shape=(2, 64), keep=(0, 2, 5))
    given(three, folder, head="new", class_names=("bad", "good"), keep_layers=(0, 2, 5))
    layer: Any = whole.module.get_submodule("network.bert.encoder.layer.0")
    per_layer = sum(parameter.numel() for parameter in layer.parameters())

    # by hand: 384·1536·2 + 4·384² + biases and norms
    assert per_layer == 2 * 384 * 1536 + 4 * 384**2 + 1536 + 5 * 384 + 4 * 384
    assert count_parameters(whole.module) == 22_713_216 + 384 * 2 + 2
    assert count_parameters(whole.module) - count_parameters(three.module) == 3 * per_layer
    assert report.fresh == ("network.classifier.weight", "network.classifier.bias")
    logits = answers(three.module, texts((9, 5)))
    assert logits.shape == (2, 2)
    assert bool(torch.isfinite(logits).all())
    assert dataclasses.replace(three).args == {"num_hidden_layers": 3}


def test_without_transformers_the_extra_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = saved(tmp_path, bert())
    monkeypatch.setitem(sys.modules, "transformers", None)  # importing it fails

    with pytest.raises(ModelError, match=r"pip install 'edgestill\[hf\]'"):
        opened(folder)

    images = open_network("resnet8", args={}, classes=3, input_shape=(3, 32, 32), seed=0)
    assert images.trainable
