"""What the deployed file gets wrong that the last release got right: sample by sample, by id.

Accuracies of different test sets are not compared, nor are latencies of different runs: the second
were not taken in turns, and a machine differs from itself by more than most changes do.
"""

from __future__ import annotations

import math

import numpy as np

from ..policy import BaselineSpec, GateSpec
from ..report import Check, Report
from .common import exact, invalid
from .drop import Pair, drop_check, flips_check, pair_of
from .evidence import Evidence
from .files import int8_share

LATENCY = (
    "latencies of this run and of the baseline are not compared: only what was measured in turns, "
    "in one run, is"
)


def checks(evidence: Evidence, policy: GateSpec) -> list[Check]:
    limits, old = policy.baseline, evidence.baseline
    if limits is None:
        return []
    if old is None:
        text = "no baseline was given; compress gate DIR --baseline OLD_DIR"
        return [invalid("baseline", text, limit=None, unit="")]
    return [
        *_of_samples(evidence, old, limits, confidence=policy.confidence),
        *_of_files(evidence.report, old.report, limits),
    ]


def _of_samples(
    evidence: Evidence, old: Evidence, limits: BaselineSpec, *, confidence: float
) -> list[Check]:
    found = []
    for name, limit, unit, judge in (
        ("baseline.max_drop_points", limits.max_drop_points, "points", drop_check),
        ("baseline.max_negative_flips", limits.max_negative_flips, "of samples", flips_check),
    ):
        if limit is None:
            continue
        pair = _pair(evidence, old)
        if isinstance(pair, str):
            found.append(invalid(name, pair, limit=limit, unit=unit))
        else:
            found.append(judge(name, pair, limit, confidence=confidence))
    return found


def _pair(new: Evidence, old: Evidence) -> Pair | str:
    """The two deployed models on the test set that both saw, or why there is none."""
    roles = new.report.deployed, old.report.deployed
    if roles[0] not in new.samples.answers or roles[1] not in old.samples.answers:
        return "a deployed model is not in samples.parquet"
    common, mine, theirs = np.intersect1d(
        new.samples.ids.astype(str), old.samples.ids.astype(str), return_indices=True
    )
    if not len(common) == new.samples.n == old.samples.n:
        return (
            f"the test sets differ: n = {new.samples.n} here, {old.samples.n} in the baseline, "
            f"{len(common)} samples in both; judge both releases on the same test set"
        )
    names = new.samples.class_names, old.samples.class_names
    labels = new.samples.labels[mine], old.samples.labels[theirs]
    if names[0] != names[1] or (labels[0] != labels[1]).any():
        return (
            f"the labels differ on {int((labels[0] != labels[1]).sum())} of n = {len(common)} "
            "samples, or the names of the classes do; judge both releases on the same test set"
        )
    return pair_of(
        old.samples.answers[roles[1]].correct[theirs],
        new.samples.answers[roles[0]].correct[mine],
        before="the baseline",
        after=roles[0],
    )


def _of_files(new: Report, old: Report, limits: BaselineSpec) -> list[Check]:
    found = []
    if limits.max_bytes_growth is not None:
        sizes = None if not new.file or not old.file else (new.file.bytes, old.file.bytes)
        found.append(
            exact(
                "baseline.max_bytes_growth",
                None if sizes is None else sizes[0] / sizes[1] - 1,
                limit=limits.max_bytes_growth,
                unit="of the baseline's bytes",
                what="growth of the file"
                + ("" if sizes is None else f", {sizes[1]:,} to {sizes[0]:,} bytes,"),
            )
        )
    if limits.max_int8_share_loss is not None:
        shares = int8_share(old), int8_share(new)
        loss = shares[0] - shares[1]
        found.append(
            exact(
                "baseline.max_int8_share_loss",
                loss if math.isfinite(loss) else None,
                limit=limits.max_int8_share_loss,
                unit="of multiply-adds",
                what=f"int8's share of multiply-adds went from {100 * shares[0]:.1f} % to "
                f"{100 * shares[1]:.1f} %, its loss",
            )
        )
    if not limits.new_ops:
        found.append(_new_ops(new, old))
    return found


def _new_ops(new: Report, old: Report) -> Check:
    name, unit = "baseline.new_ops", "operators"
    if new.file is None or old.file is None:
        return invalid(name, "operators were not recorded; run again", limit=0.0, unit=unit)
    added = sorted(set(new.file.ops) - set(old.file.ops))
    return Check(
        name=name,
        outcome="fail" if added else "pass",
        value=float(len(added)),
        bound=None,
        limit=0.0,
        unit=unit,
        text=f"operators that the baseline did without: {', '.join(added) or 'none'}",
    )
