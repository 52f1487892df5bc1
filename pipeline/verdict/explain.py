"""How the verdict on one check came about, in words, and what would change it. Computes no verdict.

The words per kind of check are in `RULES`; numbers come from the check itself, and from the report
where counts are needed. A check without an entry is told by its own fields.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping

import numpy as np

from ..errors import UsageError
from ..measure.paired import drop_upper_bound
from ..report import Check, PairRecord, Report, Role
from .judgement import Judgement, number, one_line

_PAIRED_DROP = (
    "Both models answered the same n samples. Lost: the reference was right and the deployed model "
    "wrong; gained: the reverse. The drop is (lost - gained) / n. Its upper bound is the largest "
    "true drop that these counts do not contradict (Tango's score), so it shrinks with more "
    "samples and grows with more on which the two differ. Passed if the bound is within the limit, "
    "failed if the drop itself is beyond it, inconclusive between."
)
_MEASURED_FILE = "Read from the deployed file; no chance is involved, so there is no bound."
_BOOTSTRAP = (
    "Both models' numbers come from the same samples, and so does every resample (paired "
    "bootstrap); the bound is the end of its interval. Passed if the bound is within the limit, "
    "failed if the difference itself is beyond it, inconclusive between."
)
_SPEEDUP = (
    "The reference's float ONNX and the deployed file ran in turns, in fresh processes, on one "
    "thread, batch 1. The speed-up is the quotient of their p50s; its interval comes from "
    "resampling launches and runs. Passed if the interval's lower end reaches the limit, failed "
    "if its upper end stays below, inconclusive between. More launches narrow it "
    "(`profile.launches`)."
)
_P90 = (
    "Of n runs in ascending order, one far enough at the end is above the true 90 % point with the "
    "confidence, whatever the distribution is; that run's time is the bound. It needs 64 runs or "
    "more. Passed if the bound is within the limit."
)
# By the last part of a check's name that is known: `devices.pi5.min_speedup` is a min_speedup.
RULES: Mapping[str, str] = {
    "max_drop_points": _PAIRED_DROP,
    "max_quantization_drop_points": f"{_PAIRED_DROP} The reference here is the float model.",
    "slices": f"{_PAIRED_DROP} Only the samples of this part of the test set count.",
    "min_retention": (
        "Accuracy of the deployed model over that of the reference, on the same samples. The lower "
        "bound is the smallest true ratio that the counts do not contradict (Nam and Blackwelder's "
        "score). Passed if the bound reaches the limit, failed if the ratio itself does not, "
        "inconclusive between."
    ),
    "max_error_growth": (
        "Error rate of the deployed model over that of the reference, less 1, on the same samples. "
        "The upper bound is the largest true growth that the counts do not contradict (Nam and "
        "Blackwelder's score). Passed if the bound is within the limit, failed if the growth "
        "itself is beyond it, inconclusive between."
    ),
    "max_negative_flips": (
        "The share of samples that the reference answers rightly and the deployed model wrongly, "
        "whatever is gained elsewhere. The upper bound is Clopper and Pearson's. Passed if it is "
        "within the limit, failed if the share itself is beyond it, inconclusive between."
    ),
    "max_class_drop_points": (
        "Each class with 30 samples or more is looked at by itself. It counts as harmed where its "
        "drop is beyond the limit and chance does not explain it after Holm's correction for the "
        "number of classes. Smaller classes are named, not judged."
    ),
    "metrics": _BOOTSTRAP,
    "max_nll_increase": _BOOTSTRAP,
    "max_ece_increase": f"{_BOOTSTRAP} The error is over 15 bins of equally many samples.",
    "min_speedup": _SPEEDUP,
    "max_p90_ms": _P90,
    "max_peak_rss_bytes": "The most memory that a process with this model alone took.",
    "max_bytes": _MEASURED_FILE,
    "max_multiply_adds": _MEASURED_FILE,
    "max_opset": _MEASURED_FILE,
    "allowed_ops": f"{_MEASURED_FILE} Every operator must be one of the policy's list.",
    "min_int8_share": (
        "Counted in the graph that onnxruntime runs on the machine of the run: multiply-adds in "
        "int8 kernels over all of them. No chance is involved."
    ),
    "min_cpu_agreement": (
        "The share of samples that the file puts into the same class on another CPU. Passed if its "
        "lower bound reaches the limit, failed if the share itself does not, inconclusive between."
    ),
    "parity": (
        "Each step from the network in torch to the deployed file is compared with the step before "
        "it, on real samples. One that computes something else fails, whatever the accuracy says."
    ),
    "budget": (
        "On validation data no candidate held the limits. A file goes on to the test set where "
        "chance may explain that, and is refused where it does not."
    ),
    "baseline": "Compares with the last release's deployed file, on the samples both runs share.",
}


OF_OPERATORS = {  # what a policy lists, where no number could be another
    "allowed_ops": "a file without these operators, or a policy that lists them",
    "baseline.new_ops": "a file without these operators, or `new_ops: true` in the policy",
}
NO_LIMIT = ("parity", "budget")  # what no policy can loosen


def explain(judgement: Judgement, name: str) -> str:
    """The explanation of the check called `name`, several lines.

    Raises:
        UsageError: no check of that verdict has this name.
    """
    checks = {check.name: check for check in judgement.verdict.checks}
    if name not in checks:
        near = difflib.get_close_matches(name, checks, n=1)
        meant = f", did you mean {near[0]}?" if near else ""
        raise UsageError(
            f"--explain {name}: no such check in this verdict{meant}; there are: "
            f"{', '.join(checks)}"
        )
    check = checks[name]
    lines = [f"{name}: {check.outcome.upper()}", "", f"Seen: {one_line(check.text)}"]
    if rule := rule_of(name):
        lines += ["", f"Rule: {rule}"]
    lines += ["", f"Numbers: {_numbers(check)}"]
    lines += [
        f"  {part.name}: n = {part.n}, drop {part.drop_points:+.2f} points, corrected p = "
        f"{part.p_value:.3g}"
        for part in check.parts
    ]
    if check.waiver is not None:
        one = check.waiver
        lines += [
            "",
            f"Waived: the check itself is {one.outcome.upper()}; {one_line(one.owner)} answers for "
            f"it until {one.expires}: {one_line(one.reason)}",
        ]
    changes = what_would_change(check, judgement.release.report)
    if changes:
        lines += ["", "What would change it:", *(f"- {line}" for line in changes)]
    return "\n".join(lines)


def rule_of(name: str) -> str:
    """How checks of this name are judged, in words; empty where only their own fields tell."""
    group, _, rest = name.partition(".")
    parts = [name, rest.rpartition(".")[2], group] if rest else [name]
    found = next((RULES[part] for part in parts if part in RULES), "")
    return f"{RULES['baseline']} {found}" if group == "baseline" and rest in RULES else found


def what_would_change(check: Check, report: Report) -> list[str]:
    """What would make an unmet check pass, or a passed one fail; one sentence each."""
    outcome = check.waiver.outcome if check.waiver else check.outcome
    if outcome == "skipped":
        return ["the policy decides whether it is judged here"]
    if outcome != "pass" and check.name in OF_OPERATORS:
        return [OF_OPERATORS[check.name]]
    decides = check.value if check.bound is None else check.bound
    if outcome == "invalid" or check.limit is None or decides is None or check.name in NO_LIMIT:
        return []
    is_ceiling = not check.name.rpartition(".")[2].startswith("min_")
    pair = _pair_of(check, report)
    if outcome == "pass":
        found = [f"it passes with any limit of {_strictest(decides, is_ceiling)}"]
        if pair is not None and (most := _most_lost(pair, check)) is not None:
            found.append(f"up to {most:,} lost would pass, with {pair.gained:,} gained as now")
        return found
    found = []
    if check.needed_n is not None:
        found.append(f"about {check.needed_n:,} samples, if all else stays as it is")
    elif outcome == "inconclusive" and check.n is not None:
        found.append("no number of samples: what was seen is too near the limit")
    if pair is not None:
        most = _most_lost(pair, check)
        found.append(
            f"none lost at all would not be enough: n = {pair.n:,} is too small for this limit"
            if most is None
            else f"at most {most:,} lost instead of {pair.lost:,}, with {pair.gained:,} gained "
            "as now"
        )
    elif check.bound is not None and check.value is not None:
        seen = check.limit - (check.bound - check.value)
        found.append(
            f"about {number(seen)} or {'less' if is_ceiling else 'more'} instead of "
            f"{number(check.value)}, if the bound stays as far away"
        )
    found.append(f"a limit of {_strictest(decides, is_ceiling)}, which promises less")
    return found


def _strictest(decides: float, is_ceiling: bool) -> str:
    """The strictest limit that `decides` still meets, rounded to its safe side."""
    if not math.isfinite(decides):
        return "none"
    digits = max(0, 3 - math.floor(math.log10(abs(decides)))) if decides else 0
    scale = 10.0 ** min(digits, 12)
    rounded = (math.ceil if is_ceiling else math.floor)(decides * scale) / scale
    return f"{number(rounded)} or {'more' if is_ceiling else 'less'}"


def _pair_of(check: Check, report: Report) -> PairRecord | None:
    """The counts behind a drop that Tango's bound judges on the whole test set."""
    float_role: Role = "float" if report.reference == "float" else "student"
    roles = {"max_drop_points": report.reference, "max_quantization_drop_points": float_role}
    role = roles.get(check.name)
    return None if role is None else report.pair(role, report.deployed)


def _most_lost(pair: PairRecord, check: Check) -> int | None:
    """How many lost samples the limit allows with as many gained as there are; None: not even 0."""
    if check.confidence is None or check.limit is None:
        return None
    lost = np.arange(pair.n - pair.gained + 1)
    bounds = drop_upper_bound(lost, pair.gained, n=pair.n, confidence=check.confidence)
    allowed = np.flatnonzero(bounds <= check.limit / 100)
    return int(allowed[-1]) if len(allowed) else None


def _numbers(check: Check) -> str:
    known = {
        "value": check.value,
        "bound": check.bound,
        "limit": check.limit,
        "n": check.n,
        "p": check.p_value,
    }
    found = [f"{name} {number(value)}" for name, value in known.items() if value is not None]
    unit = f" ({check.unit})" if check.unit else ""
    sure = "" if check.confidence is None else f", at {100 * check.confidence:g} % confidence"
    return f"{', '.join(found) or 'none'}{unit}{sure}"
