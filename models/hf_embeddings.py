"""Word embeddings of a smaller text encoder: projected to its width, or factorised.

Both keep the first principal directions of the folder's table, the best approximation of that rank
(Eckart & Young 1936). Factorised embeddings are those of ALBERT (Lan et al. 2020, §3.1): a table
(V, E) and one projection to the network's width D, so that V·D numbers become V·E + E·D.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..pipeline.errors import ModelError, WeightsError
from .hf_text import TextClassifier

SIZE = "embedding_size"  # what ALBERT, ELECTRA and MobileBERT call it
POSITIONS = "position_embeddings.weight"
CHUNK = 8192  # rows of a table in float64 at once


class FactorizedEmbedding(nn.Module):
    """Ids (N, S) int64 → (N, S, D): rows of a table (V, E), projected."""

    def __init__(self, words: nn.Embedding, size: int) -> None:
        super().__init__()
        device = words.weight.device
        self.num_embeddings, self.embedding_dim = words.num_embeddings, words.embedding_dim
        self.padding_idx = words.padding_idx
        self.table = nn.Embedding(self.num_embeddings, size, self.padding_idx, device=device)
        self.projection = nn.Linear(size, self.embedding_dim, device=device)

    def forward(self, ids: Tensor) -> Tensor:
        projected: Tensor = self.projection(self.table(ids))
        return projected

    @torch.no_grad()
    def approximate(self, table: Tensor) -> None:
        """Become the best approximation of `table` (V, D): codes (W − μ)·B, projection ·Bᵀ + μ."""
        mean = table.double().mean(0)
        basis = principal_directions(table, self.table.embedding_dim)
        self.table.weight.copy_(((table.double() - mean) @ basis).float())
        self.projection.weight.copy_(basis.float())
        self.projection.bias.copy_(mean.float())


def split_size(config: Any, args: Mapping[str, Any]) -> tuple[dict[str, Any], int | None]:
    """`args` without the `embedding_size` that is ours to make, as this configuration has none."""
    if SIZE not in args or SIZE in config.to_dict():
        return dict(args), None
    return {name: value for name, value in args.items() if name != SIZE}, args[SIZE]


def factorize(network: nn.Module, size: int, where: str, *, keep: bool) -> None:
    """Give `network` factorised word embeddings, in place.

    Args:
        size: E.
        keep: they are the best approximation of those it has; else initialised as ALBERT's.

    Raises:
        ModelError: E is no number from 1 to D - 1.
    """
    known: Any = network
    words = known.get_input_embeddings()
    width = words.embedding_dim
    if not isinstance(size, int) or isinstance(size, bool) or not 0 < size < width:
        raise ModelError(
            f"{where}: args.{SIZE}: expected a whole number from 1 to {width - 1}, less than the "
            f"width of its word embeddings, got {size!r}"
        )
    smaller = FactorizedEmbedding(words, size)
    if keep:
        smaller.approximate(words.weight)
    else:
        for part in (smaller.table, smaller.projection):
            nn.init.normal_(part.weight, std=getattr(known.config, "initializer_range", 0.02))
        nn.init.zeros_(smaller.projection.bias)
    known.set_input_embeddings(smaller)


def size_of(network: nn.Module) -> int | None:
    """E of its factorised word embeddings; None: they are not."""
    known: Any = network
    words = known.get_input_embeddings()
    return words.table.embedding_dim if isinstance(words, FactorizedEmbedding) else None


@torch.no_grad()
def cut_positions(network: nn.Module, like: nn.Module) -> None:
    """Leave as many rows in its position embeddings, in place, as `like` has, the first ones.

    A text is cut at the length that the data have, so that positions beyond it are never read.
    """
    own = {name: table for name, table in _tables(like) if name.endswith(POSITIONS)}
    for name, table in _tables(network):
        if name in own and len(own[name]) < len(table):
            part: Any = network.get_submodule(name.rpartition(".")[0])
            part.num_embeddings = len(own[name])
            part.weight = nn.Parameter(table[: len(own[name])].clone())


@torch.no_grad()
def project_embeddings(module: TextClassifier, given: nn.Module, where: str) -> list[str]:
    """Copy the word, position and type embeddings of `given` into `module`, projected to its width.

    With W (V, D) the word embeddings of `given`, μ their mean and B (D, d) the first d right
    singular vectors of W − μ: words (W − μ)·B, all other tables X·B. The mean goes, as it tells no
    word from another. Of an equal width the tables are copied as they are. A table with fewer rows
    gets the first ones. Factorised words become the best approximation of what they would be.

    Returns:
        The names, in `module`, of what was written.

    Raises:
        WeightsError: `module` is the wider one, or has more rows.
    """
    theirs, own = dict(_tables(given)), dict(_tables(module.network))
    words = next(iter(theirs))
    known: Any = module.network
    own_words = known.get_input_embeddings()
    table, width, own_width = theirs[words], theirs[words].shape[1], own_words.embedding_dim
    if own_width > width:
        raise WeightsError(
            f"{where}: init: embeddings makes them narrower, and the folder's are {width} wide, "
            f"this network's {own_width}; choose a width of at most {width}, or `init: scratch`"
        )
    basis = None if own_width == width else principal_directions(table, own_width)

    def projected(name: str, rows: Tensor) -> Tensor:
        if basis is None:
            return rows
        mean = table.double().mean(0) if name == words else 0.0
        return ((rows.double() - mean) @ basis).float()

    written = []
    for name, target in own.items():
        source = theirs.get(name)
        # MobileBERT's words are narrower than its positions, which then begin anew
        if source is None or (source.shape[1], target.shape[1]) != (width, own_width):
            continue
        _check_rows(name, len(target), source, where)
        target.copy_(projected(name, source[: len(target)]))
        written.append(f"network.{name}")
    if isinstance(own_words, FactorizedEmbedding):
        _check_rows(words, own_words.num_embeddings, table, where)
        own_words.approximate(projected(words, table[: own_words.num_embeddings]))
        path = words.rpartition(".")[0]
        written += [f"network.{path}.{name}" for name in own_words.state_dict()]
    return written


def principal_directions(table: Tensor, count: int) -> Tensor:
    """The first right singular vectors of the table less its mean row, as columns.

    They are the eigenvectors of its Gram matrix, D × D, which is far smaller than the table. The
    largest entry of each is made positive, as a sign is free.

    Args:
        table: (V, D).

    Returns:
        float64 (D, count), orthonormal.
    """
    mean = table.double().mean(0)
    gram = torch.zeros(len(mean), len(mean), dtype=torch.float64)
    for start in range(0, len(table), CHUNK):
        chunk = table[start : start + CHUNK].double() - mean
        gram += chunk.T @ chunk
    vectors: Tensor = torch.linalg.eigh(gram).eigenvectors.flip(1)[:, :count]  # largest first
    largest = vectors.abs().argmax(0)
    return vectors * vectors.gather(0, largest[None]).sign()


def _tables(network: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Its input embeddings by the name of their weight; the words come first, but for factorised
    ones, which have no such weight."""
    known: Any = network
    words = known.get_input_embeddings()
    path = next(name for name, part in network.named_modules() if part is words)
    if not isinstance(words, FactorizedEmbedding):
        yield f"{path}.weight", words.weight
    holder = path.rpartition(".")[0]
    for name, part in network.get_submodule(holder).named_children():
        if isinstance(part, nn.Embedding) and part is not words:
            yield f"{holder}.{name}.weight", part.weight


def _check_rows(name: str, count: int, source: Tensor, where: str) -> None:
    if count > len(source):
        raise WeightsError(
            f"{where}: init: embeddings: {name} has {len(source)} rows in the folder and "
            f"{count} in this network; leave its number out of `args`"
        )
