"""What a verdict rests on: nothing else is read, neither clock nor network."""

from __future__ import annotations

import datetime
from dataclasses import dataclass

from ..report import Report
from .samples import Samples


@dataclass(frozen=True)
class Evidence:
    """A run's record and its test samples; `baseline` is that of the last release, if there is one.

    `today` decides whether a waiver still holds.
    """

    report: Report
    samples: Samples
    baseline: Evidence | None
    today: datetime.date
