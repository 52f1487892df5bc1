"""The verdict as JUnit XML: one test case a check. Writes nothing, judges nothing.

The shape is the one that Ant writes and Jenkins, GitLab, Azure Pipelines and CircleCI read:
`testsuites > testsuite > properties, testcase > skipped | error | failure`. It has no word for
"inconclusive": such a check is a failure where it fails the gate, and skipped where the policy lets
it through. Invalid is an error, waived and skipped are skipped.
"""

from __future__ import annotations

import re
from xml.etree import ElementTree as ET

from ..report import Check
from .judgement import Judgement, Refusal, headline, number

# What XML 1.0 cannot hold, not even escaped (§2.2 Char).
NOT_XML = re.compile("[^\t\n\r\u0020-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
CLASS_NAME = "edgestill.gate"


def to_junit(judgement: Judgement) -> bytes:
    """A suite with one case for each check, in the order in which they were judged."""
    cases = []
    for check in judgement.verdict.checks:
        case = _case(check.name)
        kind = _kind(check, judgement)
        if kind is not None:
            found = ET.SubElement(case, kind, message=_clean(check.text))
            if kind != "skipped":
                found.set("type", check.outcome)
            found.text = _clean(_details(check))
        cases.append(case)
    return _document(cases, _properties(judgement))


def refused_junit(refusal: Refusal) -> bytes:
    """One case in error: nothing was judged, and that is no pass."""
    case = _case("judged")
    error = ET.SubElement(case, "error", message=_clean(refusal.reason))
    error.set("type", f"exit {refusal.exit_code}")
    return _document([case], {"folder": refusal.folder, "exit_code": str(refusal.exit_code)})


def _kind(check: Check, judgement: Judgement) -> str | None:
    let_through = judgement.verdict.exit_code == 0
    kinds = {
        "fail": "failure",
        "inconclusive": "skipped" if let_through else "failure",
        "invalid": "error",
        "waived": "skipped",
        "skipped": "skipped",
    }
    return kinds.get(check.outcome)


def _details(check: Check) -> str:
    numbers = f"value {number(check.value)}, bound {number(check.bound)}, limit "
    lines = [f"{numbers}{number(check.limit)} {check.unit}, n {number(check.n)}"]
    if check.waiver is not None:
        one = check.waiver
        lines.append(f"{one.outcome}; waived by {one.owner} until {one.expires}: {one.reason}")
    return "\n".join(lines)


def _properties(judgement: Judgement) -> dict[str, str]:
    verdict, baseline = judgement.verdict, judgement.baseline
    found = {
        "verdict": headline(judgement),
        "exit_code": str(verdict.exit_code),
        "confidence": str(verdict.confidence),
        "tool_version": verdict.tool_version,
        "model_sha256": verdict.model_sha256,
        "data_sha256": verdict.data_sha256,
        "recipe_sha256": verdict.recipe_sha256,
        "policy_sha256": verdict.policy_sha256,
        "manifest_sha256": judgement.release.manifest_sha256,
    }
    if baseline is not None:
        found["baseline_manifest_sha256"] = baseline.manifest_sha256
    return found


def _case(name: str) -> ET.Element:
    return ET.Element("testcase", classname=CLASS_NAME, name=_clean(name), time="0")


def _document(cases: list[ET.Element], properties: dict[str, str]) -> bytes:
    counts = {
        "tests": len(cases),
        "failures": sum(case.find("failure") is not None for case in cases),
        "errors": sum(case.find("error") is not None for case in cases),
        "skipped": sum(case.find("skipped") is not None for case in cases),
    }
    numbers = {name: str(count) for name, count in counts.items()}
    about = {"name": CLASS_NAME, "time": "0", **numbers}
    root = ET.Element("testsuites", about)
    suite = ET.SubElement(root, "testsuite", about)
    holder = ET.SubElement(suite, "properties")
    for name, value in properties.items():
        ET.SubElement(holder, "property", name=name, value=_clean(value))
    suite.extend(cases)
    ET.indent(root)
    content: bytes = ET.tostring(root, encoding="utf-8", xml_declaration=True)
    return content + b"\n"


def _clean(text: str) -> str:
    return NOT_XML.sub("\ufffd", text)
