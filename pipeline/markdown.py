"""The report as a person reads it: the table for the terminal, and all of it as Markdown."""

from __future__ import annotations

from collections.abc import Sequence

from .report import LOCAL, LatencyRecord, Report, Role


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
    header: tuple[str, ...] = (
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
    if any(row.sequence for row in report.latency):
        header = (*header, "tokens")
        rows = [
            [*cells, str(row.sequence)] for cells, row in zip(rows, report.latency, strict=True)
        ]
    if any(row.device != LOCAL for row in report.latency):
        header = (*header, "on")
        rows = [[*cells, _place(row)] for cells, row in zip(rows, report.latency, strict=True)]
    cpu = report.environment.get("cpu_model") or "unknown CPU"
    batch = report.recipe["export"]["batch"]
    title = f"## Latency on {cpu}, batch {1 if batch == 'dynamic' else batch}"
    return "\n".join([title, "", *_markdown_rows(header, rows)])


def _place(row: LatencyRecord) -> str:
    said = "" if row.measured_on == "target" else f" ({row.measured_on}: no latency)"
    return f"{row.device}{said}"


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
