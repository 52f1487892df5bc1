"""Where two graphs part: the first value that leaves tolerance, and what differs there.

Values are matched by their names, or, where the exporters named them differently, by the place of
their nodes in the sequence of operators and weight shapes. All of them are compared with every
optimisation off; the first from which the difference reaches the logits is computed once more by
both graphs cut behind it and optimised as in deployment, because taps disturb fusion. If
unoptimised graphs agree and deployed ones do not, the cut itself is moved until the first place is
found.

An interior value may be off by 1e-4 + 1e-3·|ref|, or by a thousandth of its own root mean square,
or by what float32 itself is off. Not for float against int8: `layer_error.py`.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from onnx import ModelProto, NodeProto, helper

from .compare import RTOL, allowed_error, compare
from .graph import arrays, producers
from .tensors import CONVERSIONS, cut, feeds_of, layer_of, stored_names, taps

Array = np.ndarray[Any, Any]

CHUNK_BYTES = 256 * 2**20  # of values held at once, of both graphs
WIDENING = 64  # a value may have this many times the bytes of the input: channels over pixels
NAMED_SHARE = 0.5  # of values with a namesake, from which on names are trusted
SHOWN = 6  # channels listed
CARRIERS = frozenset({"Identity", "Constant", "Cast", *CONVERSIONS})


@dataclass(frozen=True)
class Divergence:
    """The first value of the candidate that leaves tolerance.

    Attributes:
        tensor, op, node, layer: of the candidate; layer is a module path where one is known.
        counterpart: its name in the reference.
        max_abs: largest error; None: NaN, infinity or another shape, as `problem` says.
        tolerance: allowed at the element that exceeds it most.
        sqnr_db: of the value.
        deployed: it differs so in graphs that are optimised as in deployment too.
        differences: in words, what differs in or before that node.
    """

    tensor: str
    op: str
    node: str
    layer: str
    counterpart: str
    max_abs: float | None
    tolerance: float | None
    sqnr_db: float | None
    problem: str | None
    deployed: bool
    differences: tuple[str, ...]


def first_divergence(
    reference: ModelProto, candidate: ModelProto, inputs: Array, *, floor: float, threads: int
) -> Divergence | None:
    """None: no matched value differs.

    Args:
        reference, candidate: both float, or both int8.
        inputs: a few samples, float32 (N, C, H, W) or int64 (N, K, S).
        floor: float32's own error of the logits.

    Raises:
        ExportError: the inputs fit one of them only. RuntimeFailure: onnxruntime failed.
    """
    pairs = matched(reference, candidate)
    given, rows = feeds_of(reference, inputs, threads=threads)
    taken, _ = feeds_of(candidate, inputs, threads=threads)

    def deployed(pair: tuple[str, str]) -> _Error | None:
        ref = cut(reference, pair[0], given, threads=threads)
        return _error(ref, cut(candidate, pair[1], taken, threads=threads), floor, rows)

    errors: dict[str, _Error] = {}
    for chunk in _chunks(pairs, given):
        ref = taps(reference, [one for one, _ in chunk], given, threads=threads)
        cand = taps(candidate, [one for _, one in chunk], taken, threads=threads)
        found = {own: _error(ref[one], cand[own], floor, rows) for one, own in chunk}
        errors |= {name: error for name, error in found.items() if error is not None}
    guilty = _guilty(candidate, {own for _, own in pairs}, set(errors))
    first = next((pair for pair in pairs if pair[1] in guilty), None)
    if first is not None:
        confirmed = deployed(first)
        error = errors[first[1]] if confirmed is None else confirmed
        return _describe(reference, candidate, first, error, deployed=confirmed is not None)
    low, high = 0, len(pairs)
    if not pairs or deployed(pairs[-1]) is None:
        return None
    while high - low > 1:  # pairs[high - 1] differs, and pairs[low - 1] does not
        middle = (low + high) // 2
        low, high = (low, middle) if deployed(pairs[middle - 1]) else (middle, high)
    last = deployed(pairs[high - 1])
    assert last is not None
    return _describe(reference, candidate, pairs[high - 1], last, deployed=True)


def _guilty(candidate: ModelProto, known: set[str], wrong: set[str]) -> set[str]:
    """Wrong values from which a way leads to the wrong logits on which no value agrees.

    A rewrite may give an old name to another value: behind it all agrees again.
    """
    writers, seen = producers(candidate), set[str]()
    waiting = [str(candidate.graph.output[0].name)]
    while waiting:
        name = waiting.pop()
        if name in seen or (name in known and name not in wrong):
            continue
        seen.add(name)
        if name in writers:
            waiting.extend(writers[name].input)
    return seen & wrong


def matched(reference: ModelProto, candidate: ModelProto) -> list[tuple[str, str]]:
    """(value of the reference, value of the candidate), in the candidate's order."""
    known = set(producers(reference))
    own = [name for node in _computing(candidate) for name in node.output if name]
    by_name = [(name, name) for name in own if name in known]
    if len(by_name) >= NAMED_SHARE * len(own):
        last = reference.graph.output[0].name, candidate.graph.output[0].name
        return by_name if last in by_name else [*by_name, last]
    return list(_by_place(reference, candidate))


def missing_operators(reference: ModelProto, candidate: ModelProto) -> list[str]:
    """What one graph computes and the other does not, by the sequence of operators; at most six."""
    left, right = list(_computing(reference)), list(_computing(candidate))
    found = []
    before, after = ([node.op_type for node in nodes] for nodes in (left, right))
    matcher = difflib.SequenceMatcher(None, before, after, autojunk=False)
    for tag, a, b, c, d in matcher.get_opcodes():
        if tag == "equal":
            continue
        gone, new = (_listing(nodes) for nodes in (left[a:b], right[c:d]))
        if gone:
            found.append(f"it lacks {gone}")
        if new:
            found.append(f"it has {new} in addition")
    return found[:SHOWN]


@dataclass(frozen=True)
class _Error:
    max_abs: float | None
    tolerance: float | None
    sqnr_db: float | None
    problem: str | None


def _error(reference: Array, candidate: Array, floor: float, rows: int) -> _Error | None:
    """How far the candidate leaves its tolerance, or None where it does not."""
    if reference.dtype.kind != "f" or candidate.dtype.kind != "f":
        return None
    if reference.shape[:1] == candidate.shape[:1] and len(reference) > rows:
        reference, candidate = reference[:rows], candidate[:rows]
    if reference.shape == candidate.shape and not _comparable(reference, candidate):
        return None  # infinities of masks, in both alike
    flat = [one.reshape(max(1, len(one)) if one.ndim else 1, -1) for one in (reference, candidate)]
    if reference.shape != candidate.shape:
        problem = f"shape {candidate.shape} instead of {reference.shape}"
        return _Error(None, None, None, problem)
    agreement = compare(*flat)
    if agreement.problem is not None:
        return _Error(None, None, None, agreement.problem)
    spread = RTOL * float(np.sqrt(np.mean(np.square(flat[0].astype(np.float64)))))
    allowed = np.maximum(allowed_error(flat[0], floor), spread + RTOL * np.abs(flat[0]))
    difference = np.abs(flat[0].astype(np.float64) - flat[1])
    if (difference <= allowed).all():
        return None
    worst = int((difference / allowed).argmax())
    return _Error(agreement.max_abs, float(allowed.flat[worst]), agreement.sqnr_db, None)


def _comparable(reference: Array, candidate: Array) -> bool:
    """Something can be said: they are finite, or not finite at other places."""
    if np.isfinite(reference).all() or not np.array_equal(
        np.isfinite(reference), np.isfinite(candidate)
    ):
        return bool(reference.size)
    return False


def _chunks(
    pairs: list[tuple[str, str]], feeds: dict[str, Array]
) -> Iterator[list[tuple[str, str]]]:
    """Pairs whose values fit into memory together, as far as the inputs tell."""
    one = 2 * WIDENING * max(value.nbytes for value in feeds.values())
    step = max(1, CHUNK_BYTES // one)
    for start in range(0, len(pairs), step):
        yield pairs[start : start + step]


def _by_place(reference: ModelProto, candidate: ModelProto) -> Iterator[tuple[str, str]]:
    """Nodes that stand alike in both sequences of (operator, shape of the weight)."""
    left, right = list(_computing(reference)), list(_computing(candidate))
    keys = []
    for model, nodes in ((reference, left), (candidate, right)):
        stored = arrays(model)
        keys.append([(n.op_type, next((stored[i].shape for i in n.input if i in stored), ()))
                     for n in nodes])  # fmt: skip
    matcher = difflib.SequenceMatcher(None, keys[0], keys[1], autojunk=False)
    for block in matcher.get_matching_blocks():
        for at in range(block.size):
            yield left[block.a + at].output[0], right[block.b + at].output[0]
    last = reference.graph.output[0].name, candidate.graph.output[0].name
    if not left or not right or (left[-1].output[0], right[-1].output[0]) != last:
        yield last


def _computing(model: ModelProto) -> Iterator[NodeProto]:
    return (node for node in model.graph.node if node.op_type not in CARRIERS)


def _listing(nodes: list[NodeProto]) -> str:
    named = [f"{node.op_type} {node.name or node.output[0]}" for node in nodes[:SHOWN]]
    return ", ".join(named) + (f" and {len(nodes) - SHOWN} more" if len(nodes) > SHOWN else "")


def _describe(
    reference: ModelProto,
    candidate: ModelProto,
    pair: tuple[str, str],
    error: _Error,
    *,
    deployed: bool,
) -> Divergence:
    old, new = producers(reference).get(pair[0]), producers(candidate)[pair[1]]
    differences = [] if old is None else list(_differences(reference, candidate, old, new))
    return Divergence(
        tensor=pair[1],
        op=new.op_type,
        node=str(new.name or new.output[0]),
        layer=layer_of(new, stored_names(candidate)),
        counterpart=pair[0],
        max_abs=error.max_abs,
        tolerance=error.tolerance,
        sqnr_db=error.sqnr_db,
        problem=error.problem,
        deployed=deployed,
        differences=(*differences, *missing_operators(reference, candidate)),
    )


def _differences(
    reference: ModelProto, candidate: ModelProto, old: NodeProto, new: NodeProto
) -> Iterator[str]:
    """Attributes, constants and readings of one node that differ."""
    if old.op_type != new.op_type:
        yield f"the reference computes it by {old.op_type}"
        return
    values = [
        {one.name: helper.get_attribute_value(one) for one in node.attribute} for node in (old, new)
    ]
    for name in sorted(values[0].keys() | values[1].keys()):
        before, after = (one.get(name) for one in values)
        if before != after:
            yield f"{name} is {after}, in the reference {before}"
    stored, given = arrays(reference), arrays(candidate)
    for theirs, mine in zip(old.input, new.input, strict=False):
        weights = stored.get(theirs), given.get(mine)
        if weights[0] is not None and weights[1] is not None:
            yield from _of_weight(weights[0], weights[1], mine)


def _of_weight(before: Array, after: Array, name: str) -> Iterator[str]:
    if before.shape != after.shape or before.dtype.kind != "f":
        if before.shape != after.shape or not np.array_equal(before, after):
            yield f"{name} is another constant"
        return
    bad = int((~np.isfinite(after)).sum())
    if bad:
        yield f"{name} holds NaN or infinity, {bad} of {after.size} numbers"
        return
    rows = [one.astype(np.float64).reshape(len(one) if one.ndim else 1, -1)
            for one in (before, after)]  # fmt: skip
    moved = np.abs(rows[0] - rows[1]).max(1) > RTOL * max(float(np.abs(rows[0]).max()), 1e-30)
    if not moved.any():
        return
    channels = np.flatnonzero(moved)
    what = "all of its channels" if moved.all() else f"channel {_numbers(channels)}"
    norm = float((rows[0][moved] ** 2).sum())
    factor = float((rows[0][moved] * rows[1][moved]).sum()) / norm if norm else 0.0
    if not rows[1][moved].any():
        how = "are zero" if len(channels) > 1 else "is zero"
    elif np.allclose(rows[1][moved], factor * rows[0][moved], rtol=1e-3):
        how = f"× {factor:.4g}"
    else:
        how = "differs"
    yield f"{name}: {what} {how}"


def _numbers(values: Array) -> str:
    shown = ", ".join(str(int(one)) for one in values[:SHOWN])
    return shown + (f" and {len(values) - SHOWN} more" if len(values) > SHOWN else "")
