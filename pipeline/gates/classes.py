"""Drops class by class: a loss that the whole hides (Hooker et al., arXiv:1911.05248).

A class fails when its drop is beyond the limit and it is significantly worse: McNemar's one-sided
mid-p, corrected by Holm's method (Scandinavian Journal of Statistics 6:65, 1979) for the number of
classes that are judged. With many classes of few samples each, some exceed any limit by chance:
those are named, and pass. A class of fewer than 30 samples is not judged, and counted in the text.
So this check finds damage; it does not prove that there is none.
"""

from __future__ import annotations

import numpy as np

from ..measure.paired import mcnemar_worse_p
from ..policy import GateSpec
from ..report import Check, PartRecord
from .common import invalid, percent
from .drop import Pair, pair_of
from .evidence import Evidence

LEAST = 30  # samples of a class: below, not even the loss of every sixth one is significant
NAMED = 5  # the worst ones, in the text


def checks(evidence: Evidence, policy: GateSpec) -> list[Check]:
    limit = policy.max_class_drop_points
    if limit is None:
        return []
    name, report, samples = "max_class_drop_points", evidence.report, evidence.samples
    roles = report.reference, report.deployed
    if not set(roles) <= set(samples.answers) or roles[0] == roles[1]:
        text = f"{roles[0]} and {roles[1]} are not two models of samples.parquet"
        return [invalid(name, text, limit=limit, unit="points")]
    right = [samples.answers[role].correct for role in roles]
    pairs = {}
    for label, title in enumerate(samples.class_names):
        own = samples.labels == label
        if own.any():
            pairs[title] = pair_of(right[0][own], right[1][own], before=roles[0], after=roles[1])
    judged = {title: pair for title, pair in pairs.items() if pair.n >= LEAST}
    if not judged:
        text = f"no class has {LEAST} test samples, the least that a drop is judged by"
        return [invalid(name, text, limit=limit, unit="points")]
    small = [title for title in samples.class_names if title not in judged]
    return [_check(name, judged, limit, confidence=policy.confidence, small=small)]


def holm(p_values: list[float]) -> list[float]:
    """Holm's adjusted p-values, in the order given: each may be held against the whole level."""
    order = np.argsort(p_values, kind="stable")
    scaled = np.sort(p_values) * np.arange(len(p_values), 0, -1)
    adjusted = np.empty(len(p_values))
    adjusted[order] = np.minimum(np.maximum.accumulate(scaled), 1.0)
    return [float(one) for one in adjusted]


def _check(
    name: str, judged: dict[str, Pair], limit: float, *, confidence: float, small: list[str]
) -> Check:
    p_values = holm([mcnemar_worse_p(pair.lost, pair.gained) for pair in judged.values()])
    parts = [
        PartRecord(name=title, n=pair.n, drop_points=100 * pair.drop, p_value=p)
        for (title, pair), p in zip(judged.items(), p_values, strict=True)
    ]
    parts.sort(key=lambda part: (-part.drop_points, part.name))
    beyond = [part for part in parts if part.drop_points > limit]
    failed = [part for part in beyond if part.p_value <= 1 - confidence]
    worst = ", ".join(f"{p.name} {p.drop_points:+.1f} (n = {p.n})" for p in parts[:NAMED])
    text = (
        f"{len(failed)} of {len(judged)} classes lose more than {limit:g} points and significantly "
        f"({percent(confidence)}, Holm); the worst: {worst}"
    )
    if failed:
        text += f"; beyond the limit: {', '.join(part.name for part in failed[:NAMED])}"
    if len(beyond) > len(failed):
        text += f"; {len(beyond) - len(failed)} beyond the limit, which chance explains"
    if small:
        text += f"; {len(small)} classes of fewer than {LEAST} samples are not judged"
    return Check(
        name=name,
        outcome="fail" if failed else "pass",
        value=parts[0].drop_points,
        bound=None,
        limit=limit,
        unit="points",
        confidence=confidence,
        n=sum(pair.n for pair in judged.values()),
        p_value=min(p_values),
        parts=tuple(parts),
        text=text,
    )
