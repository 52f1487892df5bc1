"""A text encoder of fewer words: some rows of its word embeddings, in the order of new ids.

`pipeline/data/vocabulary.py` chooses which and rewrites the tokenizer. Taking rows changes no
answer to the same pieces, which is checked here; ids that a configuration names are renumbered.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..pipeline.errors import ModelError, WeightsError
from .hf_text import most_tokens


def vocabulary_args(
    network: nn.Module, kept_ids: Sequence[int], where: str, *, args: Collection[str] = ()
) -> dict[str, Any]:
    """The options of its configuration that build it with these rows, by their names there.

    Args:
        network: with all of its rows; may lie on the meta device.
        kept_ids: ascending; the old id of each new one.
        args: the options that a recipe has set.

    Raises:
        ModelError: they name a number of words, it has no such rows, or counts positions from a
            padding id that would move.
    """
    known: Any = network
    config, rows = known.config, known.get_input_embeddings().num_embeddings
    twice = {"vocab_size", vocabulary_name(config)} & set(args)
    if twice:
        raise ModelError(
            f"{where}: data.tokenize.trim and args.{min(twice)} both name the number of words; "
            "leave one out"
        )
    if kept_ids[-1] >= rows:
        raise ModelError(
            f"{where}: the tokenizer has the id {kept_ids[-1]} and its word embeddings have {rows} "
            "rows; set data.tokenize.tokenizer to the one that it was trained with"
        )
    new = {old: place for place, old in enumerate(kept_ids)}
    for name, part in network.named_modules():
        first = getattr(part, "padding_idx", None) if name.endswith("position_embeddings") else None
        if first is not None and new.get(first) != first:
            raise ModelError(
                f"{where}: its positions count from the padding id {first}, which "
                "data.tokenize.trim would move; leave `trim` out"
            )
    return {vocabulary_name(config): len(kept_ids), **_special_ids(config, new)}


def vocabulary_name(config: Any) -> str:
    """What this architecture calls vocab_size."""
    name: str = config.attribute_map.get("vocab_size", "vocab_size")
    return name


@torch.no_grad()
def cut_vocabulary(network: nn.Module, kept_ids: Sequence[int], where: str) -> None:
    """Leave these rows alone in its word embeddings; `vocabulary_args` has checked them.

    Raises:
        WeightsError: it answers otherwise to the same pieces afterwards.
    """
    known: Any = network.eval()
    body = getattr(known, known.base_model_prefix)
    ids, mask = _some_texts(network, len(kept_ids))
    rows = torch.tensor(kept_ids)
    expected = body(input_ids=rows[ids], attention_mask=mask)[0]
    words, config = known.get_input_embeddings(), known.config
    table = words.weight
    smaller = nn.Parameter(table[rows], requires_grad=table.requires_grad)
    for part in network.modules():  # a tied table has other owners
        for name, parameter in list(part.named_parameters(recurse=False)):
            if parameter is table:
                setattr(part, name, smaller)
    new = {old: place for place, old in enumerate(kept_ids)}
    words.num_embeddings, words.padding_idx = len(kept_ids), new.get(words.padding_idx)
    options = _special_ids(config, new)
    for name, value in {vocabulary_name(config): len(kept_ids), **options}.items():
        setattr(config, name, value)
    if not torch.equal(body(input_ids=ids, attention_mask=mask)[0], expected):
        raise WeightsError(
            f"{where}: data.tokenize.trim: with fewer words it answers otherwise to the same ones; "
            "leave `trim` out"
        )


def _special_ids(config: Any, new: dict[int, int]) -> dict[str, Any]:
    """The token ids that the configuration names and that change; None where one is gone."""
    named = {n: v for n, v in config.to_dict().items() if n.endswith("_token_id")}
    found: dict[str, Any] = {}
    for name, value in named.items():
        if isinstance(value, int):
            found[name] = new.get(value)
        elif isinstance(value, list):
            found[name] = [new[id_] for id_ in value if id_ in new]
    return {name: value for name, value in found.items() if value != named[name]}


def _some_texts(network: nn.Module, count: int) -> tuple[Tensor, Tensor]:
    """Two texts of arbitrary new ids, without padding, and their mask: (2, S) int64."""
    length = min(8, most_tokens(network) or 8)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(count, (2, length), generator=generator)
    return ids, torch.ones_like(ids)
