"""Inputs that no test set holds, and other company: what a file does with them.

    images   the darkest and the brightest image there is, NaN, and the largest batch
    texts    an empty text, the longest one, padding behind a text, and the largest batch

Zeros, ones and batches of 1, 2 and 7 are in the ladder (`parity.py`). NaN in an image should come
out as NaN or as an error; where a class comes out instead, that is said and is no failure: integer
kernels and a Relu have no NaN, and only the caller can refuse the image.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort

from ...exporters.compare import agrees, compare
from ...exporters.feeds import entry_of, feed, longest
from ...exporters.graph import batch_size, read_model
from ...exporters.sessions import CANNOT_LOAD, DIED, one_line, open_session, pad_batch, run_batches
from ..data.inputs import Preparation
from ..recipe import PreprocessSpec
from ..report import RungRecord
from .parity import same_answers
from .record import rung

Array = np.ndarray[Any, Any]

PADDED_BEHIND = 8  # tokens of padding that must change nothing
LARGEST_BYTES = 16 * 2**20  # of the largest batch: what lies inside is up to 50 times as much
EMPTY = 2  # tokens of an empty text: the special ones


def extreme_rungs(
    model: Path, reference: Path, inputs: Array, how: Preparation, *, floor: float, noise: float,
    is_int8: bool, threads: int,
) -> list[RungRecord]:  # fmt: skip
    """Args:
        inputs: real samples, float32 (N, C, h, w) or int64 (N, K, S).
        floor, noise: as in `parity.py`.

    Raises:
        ExportError, RuntimeFailure: a file does not run on ordinary inputs.
    """
    sessions = [open_session(path, threads=threads) for path in (reference, model)]
    fixed = batch_size(read_model(model))
    rungs = [
        _against(name, sessions, some, floor=floor, is_int8=is_int8)
        for name, some in _cases(inputs, how)
    ]
    if isinstance(how, PreprocessSpec):
        rungs.append(_nan_rung(sessions[1], inputs))
    elif entry_of(sessions[1]).sequence is None:
        rungs.append(_padding_rung(sessions[1], inputs, how.pad_id, noise=noise, is_int8=is_int8))
    rungs.append(
        _largest_batch(sessions[1], inputs, noise=noise, is_int8=is_int8)
        if fixed is None
        else _fixed_batch(sessions[1], inputs, fixed)
    )
    return rungs


def _cases(inputs: Array, how: Preparation) -> list[tuple[str, Array]]:
    """Name and input (1, …) of each extreme that the reference is asked too."""
    if isinstance(how, PreprocessSpec):
        assert how.mean is not None
        assert how.std is not None
        mean, std = (np.array(one, np.float32)[:, None, None] for one in (how.mean, how.std))
        ones = np.ones_like(inputs[0])
        return [
            ("darkest image", ((0 * ones - mean) / std)[None].astype(np.float32)),
            ("brightest image", ((ones - mean) / std)[None].astype(np.float32)),
        ]
    lengths = inputs[:, 1].sum(axis=1)
    empty = inputs[:1].copy()
    empty[:, 0, EMPTY - 1] = inputs[0, 0, int(lengths[0]) - 1]  # the closing special token
    empty[:, 1] = np.arange(inputs.shape[2]) < EMPTY
    empty[:, 0, EMPTY:] = how.pad_id
    own = inputs[int(lengths.argmax())][:, : int(lengths.max())]
    full = own[:, np.minimum(np.arange(how.max_length), own.shape[1] - 1)][None]
    return [("empty text", empty), (f"text of {how.max_length} tokens", full)]


def _against(
    name: str, sessions: list[ort.InferenceSession], inputs: Array, *, floor: float, is_int8: bool
) -> RungRecord:
    before, after = (run_batches(session, inputs, 1) for session in sessions)
    if is_int8:
        return _told(name, "reference", before, after, passed=True, note="must be finite")
    passed, note = agrees(before, after, floor=floor)
    return _told(name, "reference", before, after, passed=passed, note=note)


def _told(
    name: str, reference: str, before: Array, after: Array, *, passed: bool, note: str
) -> RungRecord:
    found = compare(before, after)
    if found.problem is not None:
        passed, note = False, found.problem
    return rung(
        name, reference, passed=passed, note=note, n=found.n, max_abs=found.max_abs,
        sqnr_db=found.sqnr_db, cosine=found.cosine, top1_agreement=found.top1_agreement,
    )  # fmt: skip


def _nan_rung(session: ort.InferenceSession, inputs: Array) -> RungRecord:
    broken = np.full_like(inputs[:1], np.nan)
    entry = entry_of(session)
    full = pad_batch(broken, entry.batch) if entry.batch else broken
    try:
        (logits,) = session.run(None, feed(full, entry.names))[:1]
    except (*CANNOT_LOAD, *DIED) as error:
        said = f"onnxruntime refuses it: {one_line(error, 80)}"
        return rung("NaN image", "expected: NaN or an error", passed=True, n=1, note=said)
    if not np.isfinite(logits[0]).all():
        said = "NaN comes out"
    else:
        shifted = np.exp(logits[0].astype(np.float64) - logits[0].max())
        said = (
            f"WARNING: class {int(logits[0].argmax())} comes out, with probability "
            f"{float(shifted.max() / shifted.sum()):.2f}: refuse such images before the model"
        )
    return rung("NaN image", "expected: NaN or an error", passed=True, n=1, note=said)


def _padding_rung(
    session: ort.InferenceSession, inputs: Array, pad_id: int, *, noise: float, is_int8: bool
) -> RungRecord:
    """Each text alone, and with padding behind it that the mask hides."""
    names, before, after = entry_of(session).names, [], []
    for text in inputs:
        own = np.ascontiguousarray(text[None, :, : longest(text[None])], np.int64)
        behind = np.zeros((1, len(text), PADDED_BEHIND), np.int64)
        behind[:, 0] = pad_id
        before.append(session.run(None, feed(own, names))[0])
        after.append(session.run(None, feed(np.concatenate([own, behind], 2), names))[0])
    alone, padded = np.concatenate(before), np.concatenate(after)
    return _company(f"{PADDED_BEHIND} tokens of padding", "without", alone, padded, noise, is_int8)


def _largest_batch(
    session: ort.InferenceSession, inputs: Array, *, noise: float, is_int8: bool
) -> RungRecord:
    inputs = inputs[: max(2, LARGEST_BYTES // max(1, inputs[:1].nbytes))]
    alone = run_batches(session, inputs, 1)
    together = run_batches(session, inputs, len(inputs))
    return _company(f"batch {len(inputs)}", "batch 1", alone, together, noise, is_int8)


def _fixed_batch(session: ort.InferenceSession, inputs: Array, size: int) -> RungRecord:
    """The graph fixes its batch, and another size must be refused, not cut short."""
    rows = np.resize(np.arange(len(inputs)), size + 1)
    try:
        got = session.run(None, feed(inputs[rows], entry_of(session).names))[0]
    except (*CANNOT_LOAD, *DIED):
        return rung(f"batch {size} is fixed", "batch " + str(size + 1), passed=True, n=size,
                    note="another size is refused")  # fmt: skip
    said = f"a batch of {size + 1} gives {got.shape}"
    return rung(f"batch {size} is fixed", f"batch {size + 1}", passed=False, n=size, note=said)


def _company(
    name: str, reference: str, alone: Array, together: Array, noise: float, is_int8: bool
) -> RungRecord:
    """The same samples otherwise; dynamic int8 may depend on its company by its own noise."""
    if is_int8:
        return RungRecord(**same_answers(name, reference, alone, together, noise=noise))
    passed, note = agrees(alone, together, floor=0.0)
    return _told(name, reference, alone, together, passed=passed, note=note)
