"""A profile as text: one table of all devices, then what must be known of each. Pure."""

from __future__ import annotations

from . import advice
from .record import DeviceProfile, PerfTestRecord, ProfileRecord, ProfileRow

HEAD = ("device", "model", "threads", "p50", "95 % interval", "p90", "n", "load cold/warm",
        "first", "CPU", "memory", "state")  # fmt: skip
EMULATED = "emulated, not latency"


def as_text(record: ProfileRecord) -> str:
    """For a terminal."""
    lines = [_title(record), "", *_aligned([HEAD, *_rows(record)])]
    for device in record.devices:
        lines += ["", *_about(device)]
    if record.why is not None:
        lines += ["", advice.as_text(record.why)]
    return "\n".join(lines)


def as_markdown(record: ProfileRecord) -> str:
    """For a file or a job's summary."""
    table = [HEAD, ("---",) * len(HEAD), *_rows(record)]
    lines = [f"# {_title(record)}", "", *(f"| {' | '.join(row)} |" for row in table)]
    for device in record.devices:
        head, *rest = _about(device)
        lines += ["", f"## {head}", "", *(f"- {line.strip()}" for line in rest)]
    if record.why is not None:
        head, *rest = advice.as_text(record.why).splitlines()
        lines += ["", f"## {head}", "", *(f"- {line.strip()}" for line in rest)]
    return "\n".join(lines) + "\n"


def _title(record: ProfileRecord) -> str:
    source = record.inputs.source
    fed = {"noise": "NOISE, not real inputs", "golden": "golden inputs"}.get(source, "real inputs")
    return f"{record.model}: {record.inputs.n} samples of {fed}; batch as the graph says, else 1"


def _rows(record: ProfileRecord) -> list[tuple[str, ...]]:
    found: list[tuple[str, ...]] = []
    for device in record.devices:
        found += [_row(device, row) for row in device.rows]
        if device.perf_test is not None:
            found.append(_perf_row(device, device.perf_test))
        if not device.rows and device.perf_test is None:
            state = "FAILED" if device.error else device.validity
            found.append((device.name, *("—",) * (len(HEAD) - 2), state))
    return found


def _row(device: DeviceProfile, row: ProfileRow) -> tuple[str, ...]:
    one = row.latency
    setting = str(one.threads)
    setting += "" if row.spinning is None else " spinning" if row.spinning else " no spinning"
    setting += f" on CPU {','.join(map(str, row.affinity))}" if row.affinity else ""
    cold = "—" if row.cold_load_ms is None else _ms(row.cold_load_ms)
    return (
        device.name,
        one.name,
        setting,
        _ms(one.p50_ms),
        f"{_ms(one.p50_ci95_ms[0])} – {_ms(one.p50_ci95_ms[1])}",
        "—" if one.p90_ms is None else _ms(one.p90_ms),
        f"{one.n}/{one.launches}",
        f"{cold}/{_ms(one.load_ms)}",
        _ms(one.first_ms if row.cold_first_ms is None else row.cold_first_ms),
        _ms(one.cpu_ms),
        f"{one.peak_rss_bytes / 1e6:.0f} MB",
        EMULATED if device.measured_on == "emulated" else device.validity,
    )


def _perf_row(device: DeviceProfile, one: PerfTestRecord) -> tuple[str, ...]:
    return (
        device.name,
        "model",
        str(one.threads),
        _ms(one.p50_ms),
        f"launches {_ms(one.launch_p50_ms[0])} – {_ms(one.launch_p50_ms[1])}",
        _ms(one.p90_ms),
        f"{one.runs * one.launches}/{one.launches}",
        f"—/{_ms(one.load_ms)}",
        "—",
        "—",
        "—" if one.peak_rss_bytes is None else f"{one.peak_rss_bytes / 1e6:.0f} MB",
        device.validity,
    )


def _about(device: DeviceProfile) -> list[str]:
    if device.error is not None:
        return [f"{device.name}: FAILED", f"  {device.error}"]
    machine = device.environment.get("machine", {})
    what = [machine.get("board"), machine.get("cpu_model"), device.int8_kernels]
    runtime = device.environment.get("libraries", {}).get("onnxruntime")
    what.append(f"onnxruntime {runtime}" if runtime else None)
    state = EMULATED if device.measured_on == "emulated" else device.validity
    lines = [f"{device.name}: {state}; {', '.join(one for one in what if one)}"]
    if device.answers is not None:
        same = device.answers.same_class
        alike = "" if same is None else f"{same} of {device.answers.n} in the same class, "
        lines.append(
            f"  answers against {device.answers.reference}: {alike}largest difference "
            f"{device.answers.max_abs:.3g}"
        )
    for row in device.rows:
        lines += [f"  {line}" for line in _of_row(row)]
    return lines + [
        f"  {one.severity.upper():<9} {one.code}: {one.text}" for one in device.findings
    ]


def _of_row(row: ProfileRow) -> list[str]:
    name = f"{row.latency.name}, {row.latency.threads} threads"
    lines = []
    if row.speedup is not None:
        ratio, low, high = row.speedup
        lines.append(f"{name}: {ratio:.3f} × the baseline's speed ({low:.3f} – {high:.3f})")
    drift = row.drift_percent_per_minute
    moved = "" if drift is None else f"drift {drift:+.1f} %/min, "
    lines.append(
        f"{name}: CV {100 * row.latency.cv:.1f} %, MAD {_ms(row.latency.mad_ms)}, {moved}"
        f"outliers {row.mild_outliers} mild, {row.severe_outliers} severe"
    )
    if row.paced is not None:
        lines.append(
            f"{name}: at {row.paced.rate_hz:g} Hz {_ms(row.paced.p50_ms)}, {row.paced.ratio:.2f} × "
            "back to back"
        )
    if row.sustained is not None:
        one = row.sustained
        lines.append(
            f"{name}: {one.seconds:.0f} s without a rest: {_ms(one.first_p50_ms)} at first, "
            f"{_ms(one.last_p50_ms)} at last ({one.ratio:.2f} ×), n = {one.n}"
        )
    return lines


def _ms(value: float) -> str:
    return f"{value:.3g} ms" if value < 1000 else f"{value / 1000:.3g} s"


def _aligned(rows: list[tuple[str, ...]]) -> list[str]:
    widths = [max(len(row[at]) for row in rows) for at in range(len(HEAD))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
            for row in rows]  # fmt: skip
