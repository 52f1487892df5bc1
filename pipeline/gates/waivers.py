"""A check that is not met may be let through for a while, by somebody who signs for it.

The check keeps what it found; its outcome reads `waived`. What the files are is no check: a release
that is not what its manifest says is refused before anything is judged, and no waiver reaches it.
"""

from __future__ import annotations

import datetime
import difflib
from collections.abc import Sequence

from ..errors import RecipeError
from ..policy import WaiverSpec
from ..report import Check, WaiverRecord


def refuse_expired(waivers: Sequence[WaiverSpec], *, today: datetime.date) -> None:
    """Raises RecipeError that names every waiver whose last day has passed."""
    problems = [
        f"waivers: that of {one.check} expired on {one.expires} (today {today}); meet the limit, "
        f"or ask {one.owner} to renew it"
        for one in waivers
        if one.expires < today
    ]
    if problems:
        raise RecipeError("\n".join(problems))


def apply_waivers(
    checks: Sequence[Check], waivers: Sequence[WaiverSpec], *, today: datetime.date
) -> list[Check]:
    """The checks, those that are not met and have a waiver marked as waived.

    Raises:
        RecipeError: a waiver has expired, or is of a check that there is none of.
    """
    refuse_expired(waivers, today=today)
    names = [check.name for check in checks]
    for waiver in waivers:
        if waiver.check not in names:
            raise RecipeError(f"waivers: {_unknown(waiver.check, names)}")
    by_name = {waiver.check: waiver for waiver in waivers}
    return [
        _waived(check, by_name[check.name]) if check.name in by_name else check for check in checks
    ]


def _waived(check: Check, waiver: WaiverSpec) -> Check:
    if check.outcome not in ("fail", "inconclusive", "invalid"):
        return check
    signed = WaiverRecord(
        outcome=check.outcome, reason=waiver.reason, owner=waiver.owner, expires=waiver.expires
    )
    text = (
        f"{check.outcome.upper()}, waived by {waiver.owner} until {waiver.expires}: "
        f"{waiver.reason}. {check.text}"
    )
    return check.model_copy(update={"outcome": "waived", "waiver": signed, "text": text})


def _unknown(name: str, names: Sequence[str]) -> str:
    if name == "integrity":
        return "integrity cannot be waived: files that are not those of the run prove nothing"
    near = difflib.get_close_matches(name, names, n=1)
    meant = f"did you mean `{near[0]}`?" if near else f"known: {', '.join(names)}"
    return f"no check of this policy is called {name!r}; {meant}"
