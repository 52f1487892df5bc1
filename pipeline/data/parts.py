"""Which samples form train, validation, test and, if asked for, the unlabelled part.

Test leaves train first, then validation, then the samples whose labels are hidden. A sample that
test or validation shares with what is trained on, with a label or without, is an error unless
`data.allow_overlap`; an unlabelled sample that is a training sample, or repeats another unlabelled
one, is dropped, because it would teach nothing new.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from ..errors import DataError
from ..recipe import DataSpec, SplitSpec
from .dataset import UNLABELLED
from .ingest import Ingested
from .source import NO_LABEL
from .split import split_part

# The second of each pair measures what was learnt from, or chosen on, the first.
_PAIRS = (("train", "validation"), ("train", "test"), ("validation", "test"))
_PAIRS_UNLABELLED = ((UNLABELLED, "validation"), (UNLABELLED, "test"))


@dataclass(frozen=True, eq=False)
class Part:
    """Rows of an ingested source that form one part."""

    of: Ingested
    chosen: npt.NDArray[np.int64]  # positions among the source's usable samples
    hidden: bool = False  # the source has labels, and this part must not show them

    def __len__(self) -> int:
        return len(self.chosen)

    @property
    def rows(self) -> npt.NDArray[np.int64]:
        return self.of.rows[self.chosen]

    @property
    def labels(self) -> npt.NDArray[np.int64]:
        labels = self.of.labels[self.chosen]
        return np.full_like(labels, NO_LABEL) if self.hidden else labels

    @property
    def digests(self) -> npt.NDArray[np.uint8]:
        return self.of.digests[self.chosen]

    @property
    def names(self) -> list[str]:
        return [self.of.names[position] for position in self.chosen]


def divide(
    spec: DataSpec, ingested: Mapping[str, Ingested], class_names: tuple[str, ...], *, seed: int
) -> dict[str, Part]:
    """The sets given, and those that are a fraction of train taken out of it.

    Hidden labels change neither test nor validation, so runs with and without them compare.

    Raises:
        DataError: a class that is too small to be on both sides.
    """
    parts = {part: Part(of, np.arange(len(of.rows))) for part, of in ingested.items()}
    fractions = {"test": spec.test, "validation": spec.validation, UNLABELLED: spec.unlabelled}
    for part, wanted in fractions.items():
        if not isinstance(wanted, SplitSpec | float):
            continue
        more = part == "test" and "validation" not in ingested
        rest = parts["train"]
        taken = split_part(
            rest.digests,
            rest.labels,
            wanted.fraction if isinstance(wanted, SplitSpec) else wanted,
            seed=seed,
            part=part,
            class_names=class_names,
            leave=2 if more else 1,
        )
        parts[part] = Part(rest.of, rest.chosen[taken], hidden=part == UNLABELLED)
        parts["train"] = Part(rest.of, rest.chosen[~taken])
    return parts


def drop_known(unlabelled: Part, train: Part) -> tuple[Part, dict[str, int]]:
    """The unlabelled samples that are new, and how many were not, by reason.

    Raises:
        DataError: none is new.
    """
    known = {digest.tobytes() for digest in train.digests}
    seen: set[bytes] = set()
    dropped = Counter(in_train=0, repeated=0)
    new = []
    for position, row in enumerate(unlabelled.digests):
        digest = row.tobytes()
        if digest in known:
            dropped["in_train"] += 1
        elif digest in seen:
            dropped["repeated"] += 1
        else:
            seen.add(digest)
            new.append(position)
    if not new:
        raise DataError(
            f"{unlabelled.of.source.where}: expected samples that train lacks, got "
            f"{len(unlabelled)} unlabelled samples that are all in train; give others, or leave "
            "`data.unlabelled` out"
        )
    return replace(unlabelled, chosen=unlabelled.chosen[new]), dict(dropped)


def count_overlap(parts: Mapping[str, Part], *, allowed: bool) -> dict[str, int]:
    """How many samples of the second part of each pair are in the first too.

    Raises:
        DataError: one is, and it is not allowed.
    """
    positions = {part: positions_of(chosen) for part, chosen in parts.items()}
    counts = {}
    for first, second in (*_PAIRS, *(_PAIRS_UNLABELLED if UNLABELLED in parts else ())):
        shared = [digest for digest in positions[second] if digest in positions[first]]
        count = sum(len(positions[second][digest]) for digest in shared)
        counts[f"{first}_{second}"] = count
        if count and not allowed:
            examples = [
                f"{parts[second].of.names[parts[second].chosen[positions[second][digest][0]]]} = "
                f"{parts[first].of.names[parts[first].chosen[positions[first][digest][0]]]}"
                for digest in shared[:2]
            ]
            raise DataError(
                f"{parts[second].of.source.where}: {count} of {len(parts[second])} {second} "
                f"samples are in {first} too ({'; '.join(examples)}), so {second} would measure "
                "what was learnt by heart; remove them from one set, or accept it with "
                "`data.allow_overlap: true` (the count goes into the report)"
            )
    return counts


def positions_of(part: Part) -> dict[bytes, list[int]]:
    """Where each content occurs, in order of first occurrence."""
    found: dict[bytes, list[int]] = {}
    for position, digest in enumerate(part.digests):
        found.setdefault(digest.tobytes(), []).append(position)
    return found
