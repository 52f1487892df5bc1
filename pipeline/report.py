"""The one versioned record of a run. JSON is the truth; Markdown is a view of it.

`report.json` follows `Report.model_json_schema()` (`compress schema`). Gates, comparisons between
releases and the terminal's table read nothing but this record and `samples.parquet`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from .spec import Spec

Outcome = Literal["pass", "fail", "inconclusive", "invalid"]
Role = Literal["teacher", "dense", "student", "float", "int8", "baseline"]


class StageRecord(Spec):
    """One stage: what it measured, how long it took, whether it was recalled from the workspace."""

    name: str
    recalled: bool
    seconds: float
    sha256: str
    measurements: dict[str, Any]


class ModelRecord(Spec):
    """One model on the whole test set. Networks run in torch, `float` and `int8` in onnxruntime;
    `dense` is the student before it was cut, `baseline` the student trained without a teacher."""

    role: Role
    runs_in: Literal["torch", "onnxruntime"]
    n: int
    correct: int
    per_class: dict[str, tuple[int, int]]  # class name → (correct, n)
    parameters: int | None = None
    multiply_adds: int | None = None
    onnx_bytes: int | None = None  # of its ONNX file, where it has one

    @property
    def accuracy(self) -> float:
        return self.correct / self.n


class PairRecord(Spec):
    """Two models on the same n test samples."""

    reference: Role
    candidate: Role
    n: int
    lost: int  # reference right, candidate wrong: negative flips
    gained: int  # reference wrong, candidate right
    upper_bound_95: float  # one-sided, of the drop, as a fraction (gate.drop_upper_bound)

    @property
    def drop(self) -> float:
        """Fraction of accuracy lost; negative when the candidate is better."""
        return (self.lost - self.gained) / self.n


class CandidateRecord(Spec):
    """A file that could have shipped. Accuracy is of validation, which chose; p50 is of one thread
    at batch 1, measured beside the others, None where nothing else was made."""

    name: str
    n: int
    correct: int
    quantization_drop_points: float
    bytes: int
    multiply_adds: int
    int8_share: float  # of multiply-adds, in int8 kernels of onnxruntime on this machine
    p50_ms: float | None


class SelectionRecord(Spec):
    """Which candidate went on (selection.py)."""

    index: int
    held: bool
    refused: bool
    why: str


class RungRecord(Spec):
    """One rung of the parity ladder, against the rung above it."""

    rung: str
    reference: str
    n: int
    max_abs: float | None
    tolerance: float | None
    sqnr_db: float | None
    cosine: float | None
    top1_agreement: float | None
    passed: bool
    note: str = ""


class LatencyRecord(Spec):
    """Batch 1, one model and thread count; milliseconds, over all launches."""

    name: str
    runs_in: Literal["torch", "onnxruntime"]
    threads: int
    n: int
    launches: int
    p50_ms: float
    p50_ci95_ms: tuple[float, float]
    launch_p50_ms: tuple[float, float]  # lowest and highest median of a launch
    min_ms: float
    p90_ms: float | None
    p95_ms: float | None
    p99_ms: float | None
    mad_ms: float
    cv: float
    load_ms: float
    first_ms: float
    cpu_ms: float
    peak_rss_bytes: int
    raw_ns: list[list[int]]  # a list for each launch


class SpeedupRecord(Spec):
    """p50 of the reference's float ONNX / p50 of the deployed file, one thread, batch 1."""

    reference: str
    candidate: str
    ratio: float
    ci95: tuple[float, float]


class Check(Spec):
    """One thing the gate looked at."""

    name: str
    outcome: Outcome
    value: float | None
    bound: float | None  # the confidence bound that decides
    limit: float | None
    unit: str
    confidence: float | None = None
    needed_n: int | None = None
    text: str


class Verdict(Spec):
    """The gate's answer. `exit_code` is the command's."""

    outcome: Outcome
    exit_code: int
    checks: tuple[Check, ...]
    policy_sha256: str


class Report(Spec):
    """Everything a run found out."""

    schema_version: Literal["edgestill-report/1"] = "edgestill-report/1"
    tool_version: str
    created_utc: str
    recipe: dict[str, Any]
    reference: Role
    deployed: Role
    model_sha256: str
    data_sha256: str
    environment: dict[str, Any]
    stages: tuple[StageRecord, ...]
    notes: tuple[str, ...]
    candidates: tuple[CandidateRecord, ...]
    selection: SelectionRecord
    models: tuple[ModelRecord, ...]
    pairs: tuple[PairRecord, ...]
    parity: tuple[RungRecord, ...]
    latency: tuple[LatencyRecord, ...]
    speedup: SpeedupRecord | None
    verdict: Verdict | None = None

    def model(self, role: Role) -> ModelRecord:
        return next(model for model in self.models if model.role == role)

    def pair(self, reference: Role, candidate: Role) -> PairRecord | None:
        wanted = (reference, candidate)
        return next((p for p in self.pairs if (p.reference, p.candidate) == wanted), None)

    def p50(self, name: str, *, threads: int) -> LatencyRecord | None:
        wanted = (name, threads)
        return next((row for row in self.latency if (row.name, row.threads) == wanted), None)


def summary_rows(report: Report) -> list[dict[str, str]]:
    """The table a person reads: reference → student → deployed."""
    rows = []
    for model in report.models:
        if model.role == "float" and "float" not in (report.deployed, report.reference):
            continue  # the same numbers as the student in torch; the parity ladder shows it
        latency = report.p50(_latency_name(model.role), threads=1)
        pair = report.pair(report.reference, model.role)
        rows.append(
            {
                "model": _title(model.role, report),
                "accuracy": f"{100 * model.accuracy:.2f} %",
                "drop": "" if pair is None else f"{100 * pair.drop:+.2f}",
                "bound": "" if pair is None else f"≤ {100 * pair.upper_bound_95:.2f}",
                "onnx": "" if model.onnx_bytes is None else human_bytes(model.onnx_bytes),
                "p50": "" if latency is None else f"{latency.p50_ms:.3f} ms",
            }
        )
    return rows


def _latency_name(role: Role) -> str:
    names = {"teacher": "teacher-onnx", "dense": "dense-onnx", "student": "float"}
    return names.get(role, role)


def _title(role: Role, report: Report) -> str:
    owners = {"reference": report.reference, "deployed": report.deployed}
    marks = [word for word, owner in owners.items() if owner == role]
    return f"{role} ({', '.join(marks)})" if marks else role


def human_bytes(count: int) -> str:
    """1 kB = 1000 bytes, as disks and app stores count."""
    if count < 1_000_000:
        return f"{count / 1e3:.1f} kB"
    return f"{count / 1e6:.2f} MB"


def to_markdown(report: Report) -> str:
    """The report as Markdown: verdict first, then what it rests on."""
    parts = [_verdict_markdown(report), _table_markdown(report), _candidates_markdown(report)]
    parts += [_latency_markdown(report), _parity_markdown(report), _classes_markdown(report)]
    parts += [_notes_markdown(report), _provenance_markdown(report)]
    return "\n\n".join(part for part in parts if part) + "\n"


def _verdict_markdown(report: Report) -> str:
    verdict = report.verdict
    if verdict is None:
        return "# edgestill report\n\nNot judged."
    lines = [f"# edgestill report: {verdict.outcome.upper()}", ""]
    lines += [f"- **{c.outcome.upper()}** `{c.name}`: {c.text}" for c in verdict.checks]
    return "\n".join(lines)


def _table_markdown(report: Report) -> str:
    header = (
        "model",
        f"test accuracy (n = {report.models[0].n})",
        "drop, points",
        "95 % bound",
        "ONNX file",
        "p50, 1 thread",
    )
    lines = _markdown_rows(header, [list(row.values()) for row in summary_rows(report)])
    if report.speedup is not None:
        s = report.speedup
        lines.append(
            f"\nSpeed-up of `{s.candidate}` over `{s.reference}`: {s.ratio:.2f}× "
            f"(95 % interval {s.ci95[0]:.2f} to {s.ci95[1]:.2f})."
        )
    return "\n".join(["## Models", "", *lines])


def _candidates_markdown(report: Report) -> str:
    if len(report.candidates) < 2:
        return ""
    header = (
        "candidate",
        f"validation accuracy (n = {report.candidates[0].n})",
        "lost by int8, points",
        "p50, 1 thread",
        "ONNX file",
        "multiply-adds",
        "of them int8",
        "",
    )
    rows = [
        [
            one.name,
            f"{100 * one.correct / one.n:.2f} %",
            f"{one.quantization_drop_points:+.2f}" if one.int8_share else "",
            "–" if one.p50_ms is None else f"{one.p50_ms:.3f} ms",
            human_bytes(one.bytes),
            f"{one.multiply_adds / 1e6:.1f} M",
            f"{100 * one.int8_share:.0f} %",
            "**went on**" if index == report.selection.index else "",
        ]
        for index, one in enumerate(report.candidates)
    ]
    lines = ["## Candidates", "", *_markdown_rows(header, rows), "", f"{report.selection.why}."]
    return "\n".join(lines)


def _latency_markdown(report: Report) -> str:
    if not report.latency:
        return ""
    header = (
        "model",
        "runs in",
        "threads",
        "p50, ms",
        "95 % interval",
        "launch p50s",
        "p90",
        "p99",
        "n",
        "peak RSS",
    )
    rows = [
        [
            row.name,
            row.runs_in,
            str(row.threads),
            f"{row.p50_ms:.3f}",
            f"{row.p50_ci95_ms[0]:.3f}–{row.p50_ci95_ms[1]:.3f}",
            f"{row.launch_p50_ms[0]:.3f}–{row.launch_p50_ms[1]:.3f}",
            "–" if row.p90_ms is None else f"{row.p90_ms:.3f}",
            "–" if row.p99_ms is None else f"{row.p99_ms:.3f}",
            f"{row.n} in {row.launches} launches",
            human_bytes(row.peak_rss_bytes),
        ]
        for row in report.latency
    ]
    cpu = report.environment.get("cpu_model") or "unknown CPU"
    batch = report.recipe["export"]["batch"]
    title = f"## Latency on {cpu}, batch {1 if batch == 'dynamic' else batch}"
    return "\n".join([title, "", *_markdown_rows(header, rows)])


def _parity_markdown(report: Report) -> str:
    header = (
        "rung",
        "against",
        "max |Δ|",
        "tolerance",
        "SQNR, dB",
        "cosine",
        "top-1 agreement",
        "",
    )
    rows = [
        [
            rung.rung,
            rung.reference,
            _number(rung.max_abs, ".2e"),
            _number(rung.tolerance, ".2e"),
            _number(rung.sqnr_db, ".1f"),
            _number(rung.cosine, ".6f"),
            _number(rung.top1_agreement, ".4f"),
            ("ok" if rung.passed else "**FAILED**") + (f": {rung.note}" if rung.note else ""),
        ]
        for rung in report.parity
    ]
    return "\n".join(["## Parity", "", *_markdown_rows(header, rows)])


def _classes_markdown(report: Report) -> str:
    reference, deployed = report.model(report.reference), report.model(report.deployed)
    drops = []
    for name, (correct, n) in deployed.per_class.items():
        before = reference.per_class[name][0]
        drops.append(((before - correct) / n if n else 0.0, name, before, correct, n))
    worst = sorted(drops, key=lambda row: (-row[0], row[1]))[:10]
    rows = [
        [name, str(n), f"{100 * before / n:.1f} %", f"{100 * correct / n:.1f} %", f"{100 * d:+.1f}"]
        for d, name, before, correct, n in worst
        if n
    ]
    header = ("class", "n", report.reference, report.deployed, "drop, points")
    title = f"## Classes, worst drop first ({len(rows)} of {len(drops)})"
    return "\n".join([title, "", *_markdown_rows(header, rows)])


def _notes_markdown(report: Report) -> str:
    if not report.notes:
        return ""
    return "\n".join(["## Notes", "", *(f"- {note}" for note in report.notes)])


def _provenance_markdown(report: Report) -> str:
    rows = [
        [s.name, "recalled" if s.recalled else "run", f"{s.seconds:.1f}"] for s in report.stages
    ]
    versions = ", ".join(f"{k} {v}" for k, v in (report.environment.get("versions") or {}).items())
    return "\n".join(
        [
            "## Provenance",
            "",
            f"model sha256 `{report.model_sha256}`, data sha256 `{report.data_sha256}`, "
            f"edgestill {report.tool_version}, {report.created_utc}",
            "",
            versions,
            "",
            *_markdown_rows(("stage", "", "seconds"), rows),
        ]
    )


def _markdown_rows(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"

    return [line(header), "|" + " --- |" * len(header), *(line(row) for row in rows)]


def _number(value: float | None, form: str) -> str:
    return "–" if value is None else format(value, form)
