"""Which modules of two text encoders are compared: those that the recipe names, or those found.

Layers, embeddings and projections are found by their shape and by the names that encoders of the
Hugging Face library give them. Only paths are found here; `joints.py` taps them.
"""

from __future__ import annotations

from math import gcd
from typing import Any

from torch import nn

from ...models.hf_text import encoder_layers
from ...models.plan import HEADS, Skip
from ..errors import RecipeError
from ..training_spec import HiddenSpec, RelationsSpec, TokenSpec
from .taps import find_taps

# Last names of a layer's query, key and value projections: BERT, RoBERTa, ELECTRA and MobileBERT;
# DistilBERT; MPNet; DeBERTa; decoders turned encoders.
PROJECTIONS = (
    ("query", "key", "value"),
    ("q_lin", "k_lin", "v_lin"),
    ("q", "k", "v"),
    ("query_proj", "key_proj", "value_proj"),
    ("q_proj", "k_proj", "v_proj"),
)
_SMALL = 12  # layers of a base-size encoder, whose last layer teaches best


def token_layers(
    term: TokenSpec, student: nn.Module, teacher: nn.Module
) -> tuple[list[str], list[str]]:
    """Paths in the student and in the teacher, the first compared with the first, and so on.

    Raises:
        RecipeError: names that match nothing or are not as many, or nothing to propose.
    """
    assert isinstance(term, HiddenSpec | RelationsSpec)
    where = f"distill.objectives.{term.name}"
    mine, theirs = (
        None if names is None else list(find_taps(network, names, where=f"{where}.{side}"))
        for side, network, names in (
            ("student", student, term.student),
            ("teacher", teacher, term.teacher),
        )
    )
    if isinstance(term, RelationsSpec):
        mine = mine or projections(student, teaches=False, where=where)
        theirs = theirs or projections(teacher, teaches=True, where=where)
        if len(mine) != 3 or len(theirs) != 3:
            raise RecipeError(
                f"{where}: expected the projections of one layer, query, key and value in this "
                f"order, got {len(mine)} of the student ({', '.join(mine)}) and {len(theirs)} of "
                f"the teacher ({', '.join(theirs)})"
            )
        return mine, theirs
    if mine is None or theirs is None:
        return _paired(mine, theirs, student, teacher, where=where)
    if len(mine) != len(theirs):
        raise RecipeError(
            f"{where}: expected as many layers of the student as of the teacher, got "
            f"{len(mine)} ({', '.join(mine)}) and {len(theirs)} ({', '.join(theirs)})"
        )
    return mine, theirs


def _paired(
    mine: list[str] | None,
    theirs: list[str] | None,
    student: nn.Module,
    teacher: nn.Module,
    *,
    where: str,
) -> tuple[list[str], list[str]]:
    """Layers, all of a side that names none; before them the embeddings if neither names any."""
    first: tuple[str | None, str | None] = None, None
    if mine is None and theirs is None:
        first = embeddings_output(student), embeddings_output(teacher)
    mine = mine or layer_outputs(student, where=where)
    theirs = theirs or layer_outputs(teacher, where=where)
    pairs = [(mine[m], theirs[n]) for m, n in pair_uniformly(len(mine), len(theirs))]
    if first[0] is not None and first[1] is not None:
        pairs.insert(0, (first[0], first[1]))
    return [one for one, _ in pairs], [other for _, other in pairs]


def layer_outputs(network: nn.Module, *, where: str) -> list[str]:
    """Paths of the encoder's layers, first → last, without those that were pruned away.

    Raises:
        RecipeError: it has no list of layers.
    """
    path, layers = encoder_layers(network)
    if not layers and any(isinstance(part, Skip) for part in network.modules()):
        raise RecipeError(
            f"{where}: pruning has removed every layer of {type(network).__name__}, and there is "
            "none to compare; list one under prune.protect, or ask for more (prune.macs)"
        )
    if not layers:
        raise RecipeError(
            f"{where}: {type(network).__name__} has no list of layers of one kind; name the "
            "modules whose outputs (N, S, D) are compared"
        )
    return [f"{path}.{index}" for index, part in enumerate(layers) if not isinstance(part, Skip)]


def embeddings_output(network: nn.Module) -> str | None:
    """Path of the module that puts out the sum of the embeddings; None: not to be told."""
    words = next((part for part in network.modules() if isinstance(part, nn.Embedding)), None)
    path = next((name for name, part in network.named_modules() if part is words), "")
    holder = path.rpartition(".")[0]
    layers, _ = encoder_layers(network)
    if words is None or not holder or layers.startswith(f"{holder}."):
        return None
    return holder


def pair_uniformly(students: int, teachers: int) -> list[tuple[int, int]]:
    """Each of the student's layers m = 1 … M with the teacher's ⌈m · N / M⌉: evenly spread, last
    with last (TinyBERT's uniform strategy, where M divides N). From 0."""
    return [(m - 1, -(-m * teachers // students) - 1) for m in range(1, students + 1)]


def projections(network: nn.Module, *, teaches: bool, where: str) -> list[str]:
    """Paths of the query, key and value projections of the layer whose relations are compared.

    The student's is its last. So is the teacher's, up to 12 layers; of a larger one it is that at
    7/8 of its depth: the paper takes the 21st of BERT-large's 24, and the 19th of RoBERTa-large's.

    Raises:
        RecipeError: it has no list of layers, or the layer has no such modules.
    """
    paths = layer_outputs(network, where=where)
    depth = len(paths)
    chosen = round(depth * 7 / 8) if teaches and depth > _SMALL else depth
    path = paths[chosen - 1]
    linear = [n for n, p in network.get_submodule(path).named_modules() if isinstance(p, nn.Linear)]
    for names in PROJECTIONS:
        found = [[n for n in linear if n.rpartition(".")[2] == name] for name in names]
        if all(len(each) == 1 for each in found):
            three = [f"{path}.{each[0]}" for each in found]
            _check_of_tokens_alone(network, three[0], where=where)
            return three
    side = "teacher" if teaches else "student"
    raise RecipeError(
        f"{where}: {path} of {type(network).__name__} has no linear modules called "
        f"{', '.join('/'.join(names) for names in PROJECTIONS)}; name them in this order, e.g. "
        f"`{side}: [layer.query, layer.key, layer.value]` (it has {', '.join(linear) or 'none'})"
    )


def _check_of_tokens_alone(network: nn.Module, query: str, *, where: str) -> None:
    if getattr(network.get_submodule(query.rpartition(".")[0]), "share_att_key", False):
        raise RecipeError(
            f"{where}: {query} of {type(network).__name__} projects positions as well as tokens "
            "(DeBERTa's share_att_key), and relations are of tokens alone; use `hidden`"
        )


def has_fewer_heads(network: nn.Module, query: str) -> bool:
    """Whether pruning has taken heads from the attention of this query projection."""
    attention = network.get_submodule(query.rpartition(".")[0])
    config = getattr(attention, "config", None)
    counts = ((getattr(attention, name, None), getattr(config, name, None)) for name in HEADS)
    return any(own is not None and given is not None and own < given for own, given in counts)


def relation_heads(
    asked: int | None,
    teacher: nn.Module,
    query: str,
    *,
    widths: list[int],
    is_cut: bool,
    where: str,
) -> int:
    """As many as asked for, or as the teacher's layer attends with; or the most below that divide
    all widths, where `is_cut`.

    Args:
        query: path of the teacher's query projection. widths: of all projections, on both sides.
        is_cut: the student's attention has lost heads, so that its widths are what was left.
    Raises:
        RecipeError: the layer does not say how many, or a width is not divided by them.
    """
    attention: Any = teacher.get_submodule(query.rpartition(".")[0])
    said = (attention, getattr(attention, "config", None))
    counts = (getattr(one, name, None) for one in said for name in HEADS)
    heads = asked or next((count for count in counts if isinstance(count, int)), None)
    if heads is None:
        raise RecipeError(
            f"{where}: {type(attention).__name__} of the teacher does not say how many heads it "
            f"has; set `heads` to a divisor of {gcd(*widths)}"
        )
    if is_cut and asked is None:
        return max(count for count in range(1, heads + 1) if gcd(*widths) % count == 0)
    if any(width % heads for width in widths):
        raise RecipeError(
            f"{where}: {heads} relation heads divide not all of the widths "
            f"{', '.join(map(str, sorted(set(widths))))}; set `heads` to a divisor of "
            f"{gcd(*widths)}"
        )
    return heads
