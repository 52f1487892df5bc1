"""Parts of a set, stratified and seeded, by the content of the samples rather than their place.

Within a class the distinct samples are ordered by a keyed hash (BLAKE2b) of their content, and the
first ones form the part. So the same sample always lands on one side however often and under
whatever name it occurs, and samples added elsewhere move an old one only at the border.
"""

from __future__ import annotations

import hashlib

import numpy as np
import numpy.typing as npt

from ..errors import DataError
from .source import listing

Labels = npt.NDArray[np.int64]
Digests = npt.NDArray[np.uint8]  # (N, 16): content hashes
Indices = npt.NDArray[np.int64]


def keyed_order(digests: Digests, *, seed: int, purpose: str) -> Indices:
    """Indices that put the samples in the order of hash(seed, purpose; content); stable for twins.

    Args:
        digests: (N, 16) content hashes.
        purpose: another purpose gives an unrelated order.

    Returns:
        (N,) int64, a permutation.
    """
    key = hashlib.sha256(f"edgestill/{purpose}/{seed}".encode()).digest()
    rank = b"".join(
        hashlib.blake2b(digest.tobytes(), key=key, digest_size=8).digest() for digest in digests
    )
    return np.argsort(np.frombuffer(rank, ">u8"), kind="stable").astype(np.int64)


def split_part(
    digests: Digests,
    labels: Labels,
    fraction: float,
    *,
    seed: int,
    part: str,
    class_names: tuple[str, ...],
    leave: int = 1,
) -> npt.NDArray[np.bool_]:
    """Which samples go to `part`: about `fraction` of the distinct samples of each class.

    Each class gives at least one distinct sample and keeps at least `leave`. A sample that occurs
    under two labels is counted with the smaller one.

    Returns:
        (N,) bool.

    Raises:
        DataError: a class that is too small to be on both sides.
    """
    first, group = _distinct(digests)
    home = np.full(len(first), np.iinfo(np.int64).max)
    np.minimum.at(home, group, labels)
    order = keyed_order(digests[first], seed=seed, purpose=part)
    taken = np.zeros(len(first), bool)
    for label in range(len(class_names)):
        members = order[home[order] == label]
        count = max(1, round(fraction * len(members)))
        taken[members[: max(0, min(count, len(members) - leave))]] = True
    chosen: npt.NDArray[np.bool_] = taken[group]
    _check_both_sides(labels, chosen, part=part, class_names=class_names, needed=1 + leave)
    return chosen


def calibration_indices(digests: Digests, labels: Labels, count: int, *, seed: int) -> Indices:
    """min(count, N) samples, each class by its share of the set as far as whole samples allow.

    The order is random (keyed), so that any prefix is a fair sample too.

    Returns:
        (min(count, N),) int64 indices.
    """
    order = keyed_order(digests, seed=seed, purpose="calibration")
    count = min(count, len(labels))
    sizes = np.bincount(labels)
    share = sizes * count / len(labels)
    quota = np.floor(share).astype(np.int64)
    # largest remainder; of equal ones the smaller label
    by_remainder = np.argsort(-(share - quota), kind="stable")
    quota[by_remainder[: count - int(quota.sum())]] += 1
    in_order = labels[order]
    position = np.empty(len(labels), np.int64)  # how many of its class came before, in this order
    for label in range(len(sizes)):
        of_class = in_order == label
        position[of_class] = np.arange(int(of_class.sum()))
    return order[position < quota[in_order]]


def _distinct(digests: Digests) -> tuple[Indices, Indices]:
    """(first index of each distinct content, the content's number for every sample)."""
    keys = np.ascontiguousarray(digests).view("V16").ravel()
    _, first, group = np.unique(keys, return_index=True, return_inverse=True)
    return first.astype(np.int64), group.astype(np.int64).ravel()


def _check_both_sides(
    labels: Labels,
    chosen: npt.NDArray[np.bool_],
    *,
    part: str,
    class_names: tuple[str, ...],
    needed: int,
) -> None:
    inside = np.bincount(labels[chosen], minlength=len(class_names))
    outside = np.bincount(labels[~chosen], minlength=len(class_names))
    short = [
        f"{name} ({inside[label] + outside[label]} samples)"
        for label, name in enumerate(class_names)
        if inside[label] == 0 or outside[label] == 0
    ]
    if short:
        raise DataError(
            f"data.{part}: a class needs at least {needed} distinct samples to be in every part, "
            f"which these lack: {listing(short)}; add samples, or give {part} as a set of its own"
        )
