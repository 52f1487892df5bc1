"""What `bench_int8_files.py` measured, as the page benchmarks/int8_files.md."""

from __future__ import annotations

from typing import Any


def to_markdown(results: dict[str, Any]) -> str:
    render = {
        "peers": render_peers, "rescue": render_rescue, "cpus": render_cpus, "cost": render_cost
    }  # fmt: skip
    lines = ["# int8 files", "", "Made by `scripts/bench_int8_files.py`.", ""]
    for part in render:
        if part in results:
            result = results[part]
            machine = result["machine"]
            versions = ", ".join(f"{k} {v}" for k, v in machine["versions"].items() if v)
            lines += [*render[part](result), ""]
            lines += [f"{result['date']}, {machine['cpu_model']}, {versions}.", ""]
    return "\n".join(lines).rstrip() + "\n"


def render_peers(result: dict[str, Any]) -> list[str]:
    lines = [
        "## The same float file made int8 by others",
        "",
        f"The same 512 calibration images for all. NNCF {result['nncf']}. One thread, batch 1, "
        "5 launches, all files of a network in turns in one run; in brackets the range of the "
        "launches, and the 95 % interval of the ratio. `edgestill` here is calibration alone, for "
        "`targets: [arm, x86]`: 7-bit weights, so that no CPU saturates.",
    ]
    return [*lines, *tables(result["rows"])]


def render_rescue(result: dict[str, Any]) -> list[str]:
    return [
        "## Where calibration alone is not enough",
        "",
        "A narrow depthwise-separable net, trained here on CIFAR-10, whose channels were then "
        f"given scales {result['decades']:.0f} decades apart without changing what it computes. "
        f"Layers return to float until validation loses no more than 0.05 points: here "
        f"{', '.join(f'`{name}`' for name in result['kept_float']) or 'none'}. QAT: "
        "6 epochs.",
        *tables(result["rows"]),
    ]


def tables(rows: dict[str, Any]) -> list[str]:
    lines = []
    for name, row in rows.items():
        lines += [
            "",
            f"### {name}",
            "",
            "| file | test accuracy, % | n | kB | p50, ms (launches) | × float (95 %) "
            "| int8 share of multiply-adds |",
            "| --- " * 7 + "|",
        ]
        for who, one in row.items():
            (low, high), (least, most) = one["launch_p50_ms"], one["speedup_ci95"]
            ratio = f"{one['speedup']:.2f} ({least:.2f}–{most:.2f})"
            lines.append(
                f"| {who} | {100 * one['correct'] / one['n']:.2f} | {one['n']:,} "
                f"| {one['bytes'] / 1e3:.0f} | {one['p50_ms']:.3f} ({low:.3f}–{high:.3f}) "
                f"| {'' if who == 'float' else ratio} | {100 * one['int8_share']:.1f} % |"
            )
    return lines


def render_cpus(result: dict[str, Any]) -> list[str]:
    lines = [
        "## The same int8 files on other CPUs",
        "",
        f"The first {result['samples']:,} test images, the real onnxruntime of each CPU under qemu "
        "(`scripts/arm_sysroot`), against this machine. `pi4`: Cortex-A72, no dotprod; `pi5`: "
        "Cortex-A76, dotprod; `avx2`: x86 without VNNI. A sample differs if one bit of its logits "
        "does.",
        "",
        "| network | file | CPU | samples that differ | same class, % | largest difference, share "
        "of the largest logit |",
        "| --- " * 6 + "|",
    ]
    for name, row in result["rows"].items():
        for who, found in row.items():
            for cpu, one in found.items():
                lines.append(
                    f"| {name} | {who} | {cpu} | {one['differ']:,} of {one['n']:,} "
                    f"| {100 * one['same_class'] / one['n']:.1f} "
                    f"| {one['largest'] / one['scale']:.4f} |"
                )
    return lines


def render_cost(result: dict[str, Any]) -> list[str]:
    audits = ", ".join(f"{seconds:.2f} s" for seconds in result["audit_seconds"].values())
    peak, alone = (result[k] / 2**30 for k in ("peak_rss_bytes", "int8_peak_rss_bytes"))
    return [
        "## Time and memory",
        "",
        f"`compress quantize` of MobileNetV2-1.0 at 224 px, {result['samples']} calibration "
        f"images, {result['threads']} threads: the int8 stage took {result['int8_seconds']:.1f} s "
        f"(peak memory of a process that does nothing else: {alone:.2f} GiB), "
        f"the whole command (reading 4,300 photographs, verifying, latency) "
        f"{result['seconds']:.0f} s, its peak memory was {peak:.2f} GiB. The audit of the file: "
        f"{audits}.",
    ]
