"""Text encoders: the classifier of tokens, what it can be fed, which of its layers stay.

Layers and embeddings are found by their shape, whatever an architecture calls them. Nothing is read
from disk here; `hf.py` builds and loads. A smaller student keeps whole layers (Sanh et al. 2019,
DistilBERT, §2); what becomes of its word embeddings is in `hf_embeddings.py`.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..pipeline.errors import ModelError, WeightsError
from .plan import Skip

ROWS = ("input_ids", "attention_mask", "token_type_ids")
# options of a configuration that hold one entry a layer (ModernBERT, Longformer)
PER_LAYER = ("layer_types", "attention_window")


class TextClassifier(nn.Module):
    """Tokens (N, K, S) int64 → logits (N, classes). `input_names`: what the K rows are."""

    def __init__(self, network: nn.Module, input_names: tuple[str, ...]) -> None:
        super().__init__()
        self.network = network
        self.input_names = input_names

    def forward(self, tokens: Tensor) -> Tensor:
        return self.answer(*tokens.unbind(1))

    def answer(
        self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor | None = None
    ) -> Tensor:
        """Logits (N, classes) of the rows, each (N, S) int64: what an exporter traces."""
        rows = {"input_ids": input_ids, "attention_mask": attention_mask}
        if token_type_ids is not None:
            rows["token_type_ids"] = token_type_ids
        logits: Tensor = self.network(**rows, return_dict=True).logits
        return logits


def check_vocabulary(module: nn.Module, size: int, where: str) -> None:
    """Every id below `size` has an embedding. Of a user's own network nothing is known.

    Raises:
        ModelError: the tokenizer has more ids than the network.
    """
    if not isinstance(module, TextClassifier):
        return
    network: Any = module.network
    rows = network.get_input_embeddings().num_embeddings
    if size > rows:
        raise ModelError(
            f"{where}: the tokenizer has {size} ids and its word embeddings have {rows} rows; set "
            "data.tokenize.tokenizer to the one that it was trained with"
        )


def check_encoder(config: Any, where: str) -> None:
    """The configuration is of an encoder, which reads a text in both directions.

    Raises:
        ModelError: it is of a decoder, or of an encoder with a decoder.
    """
    tables = importlib.import_module("transformers.models.auto.modeling_auto")
    # an architecture that can be trained to fill gaps reads in both directions
    is_causal = (
        config.model_type in tables.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
        and config.model_type not in tables.MODEL_FOR_MASKED_LM_MAPPING_NAMES
    )
    named = [n for n in config.architectures or [] if n.endswith(("ForCausalLM", "LMHeadModel"))]
    if getattr(config, "is_encoder_decoder", False):
        what = "an encoder with a decoder"
    elif is_causal or named or getattr(config, "is_decoder", False):
        what = "a decoder, which reads from left to right"
    else:
        return
    raise ModelError(
        f"{where}: its {named[0] if named else config.model_type} is {what}; a text classifier is "
        "an encoder here: BERT, DistilBERT, RoBERTa, ELECTRA, MPNet, DeBERTa, …"
    )


def check_rows(network: nn.Module, input_shape: tuple[int, ...], where: str) -> None:
    """The encoder can be fed tokens of this shape (K, S).

    Raises:
        ModelError: it has no token types and K is 3, or fewer than S positions.
    """
    config: Any = network.config
    count, length = input_shape
    assert count in (2, 3), f"expected 2 or 3 rows of tokens, got {count}"
    if count == 3 and (getattr(config, "type_vocab_size", None) or 0) < 2:
        raise ModelError(
            f"{where}: its {config.model_type} tells no first text from a second (it has no token "
            "types); leave out data.pair, or choose a network with type_vocab_size: 2"
        )
    limit = most_tokens(network)
    if limit is not None and length > limit:
        raise ModelError(
            f"{where}: has positions for {limit} tokens and texts have {length}; set "
            f"data.tokenize.max_length to {limit} or less"
        )


def most_tokens(network: nn.Module) -> int | None:
    """The tokens that it has positions for; None: its configuration names no limit."""
    for name, part in network.named_modules():
        if name.endswith("position_embeddings") and isinstance(part, nn.Embedding):
            # RoBERTa and its kin count positions from the padding id on
            first = 0 if part.padding_idx is None else part.padding_idx + 1
            return part.num_embeddings - first
    config: Any = network.config
    limit = getattr(config, "max_position_embeddings", None)
    return limit if isinstance(limit, int) and limit > 0 else None


# layers that stay


def layer_args(network: nn.Module, keep: Sequence[int], where: str) -> dict[str, Any]:
    """The options of its configuration that build it with these layers only, by their names there.

    Args:
        network: with all of its layers; may lie on the meta device.
        keep: the layers that stay, from 0, in their new order.

    Raises:
        ModelError: no layers, one twice, one that it does not have, or it shares its layers.
    """
    config: Any = network.config
    depth = config.num_hidden_layers
    path, layers = encoder_layers(network)
    if len(layers) != depth:
        raise ModelError(
            f"{where}: keep_layers: its {config.model_type} has {depth} layers and {len(layers)} "
            f"of their own weights ({path or 'none'}), so none can be left out; set the depth in "
            "`args`, or choose a network whose layers share no weights"
        )
    problem = _problem(keep, depth)
    if problem:
        raise ModelError(f"{where}: keep_layers: {problem}; it has the layers 0 to {depth - 1}")
    lists = {n: v for n in PER_LAYER if isinstance(v := getattr(config, n, None), list)}
    return {depth_name(config): len(keep), **{n: [v[i] for i in keep] for n, v in lists.items()}}


def depth_name(config: Any) -> str:
    """What this architecture calls num_hidden_layers: DistilBERT n_layers."""
    name: str = config.attribute_map.get("num_hidden_layers", "num_hidden_layers")
    return name


def cut_layers(network: nn.Module, keep: Sequence[int]) -> None:
    """Leave these layers alone in the network, in this order; `layer_args` has checked them."""
    path, layers = encoder_layers(network)
    holder, _, name = path.rpartition(".")
    setattr(network.get_submodule(holder), name, nn.ModuleList([layers[i] for i in keep]))
    config: Any = network.config
    config.num_hidden_layers = len(keep)


@torch.no_grad()
def check_cut(given: nn.Module, module: nn.Module, where: str) -> None:
    """The last layer of `module` answers as that of `given`, from which layers were cut.

    Raises:
        WeightsError: it does not, as what a layer computes depends on its place.
    """
    rows = random_rows(given)
    networks: tuple[Any, Any] = given.eval(), module.eval().network
    expected, got = (getattr(one, one.base_model_prefix)(**rows)[0] for one in networks)
    if not torch.allclose(got, expected, rtol=1e-3, atol=1e-4):
        raise WeightsError(
            f"{where}: keep_layers: what is left answers otherwise than the folder's layers do, as "
            "they depend on their place or `args` changes them; keep all layers"
        )


def random_rows(network: nn.Module) -> dict[str, Tensor]:
    """Two texts of arbitrary ids for a comparison, the second padded; each row (2, S) int64."""
    config: Any = network.config
    length = min(8, most_tokens(network) or 8)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(config.vocab_size, (2, length), generator=generator)
    mask = torch.ones_like(ids)
    ids[1, length // 2 + 1 :], mask[1, length // 2 + 1 :] = pad_id(network), 0
    return {"input_ids": ids, "attention_mask": mask}


def pad_id(network: nn.Module) -> int:
    config: Any = network.config
    return getattr(config, "pad_token_id", None) or 0


def encoder_layers(network: nn.Module) -> tuple[str, nn.ModuleList]:
    """Path and list of its layers: the longest outermost list of blocks of one type, among them
    what pruning has put in the place of others (`plan.Skip`)."""
    found: dict[str, nn.ModuleList] = {"": nn.ModuleList()}
    for path, part in network.named_modules():
        is_inside = any(path.startswith(f"{outer}.") for outer in found if outer)
        if isinstance(part, nn.ModuleList) and not is_inside:
            kinds = {*map(type, part)} - {Skip}
            if len(kinds) == 1:
                found[path] = part
    longest = max(found, key=lambda path: len(found[path]))
    return longest, found[longest]


def _problem(keep: Sequence[int], depth: int) -> str | None:
    if not keep:
        return "names no layer"
    wrong = [i for i in keep if not 0 <= i < depth]
    if wrong:
        return f"there is no layer {wrong[0]}"
    twice = [i for i in keep if list(keep).count(i) > 1]
    return f"layer {twice[0]} is named twice" if twice else None


# what a report or a message says


def begun_anew(module: nn.Module, loaded: Sequence[str]) -> tuple[str, ...]:
    """The outermost parts, two names deep or more, below which nothing was loaded."""
    paths = []
    for name in module.state_dict():
        if name in loaded:
            continue
        parts = name.split(".")
        prefixes = [".".join(parts[:end]) for end in range(2, len(parts) + 1)]
        paths.append(
            next(p for p in prefixes if not any(f"{n}.".startswith(f"{p}.") for n in loaded))
        )
    return tuple(dict.fromkeys(paths))


def other_sizes(given: Mapping[str, Any], own: Mapping[str, Any]) -> str:
    """Numbers in which two configurations differ, e.g. "hidden_size: 384 → 192"."""
    return ", ".join(
        f"{key}: {given[key]} → {value}"
        for key, value in own.items()
        if isinstance(value, int) and isinstance(given.get(key), int) and given[key] != value
    )
