"""Which nodes run as int8 kernels: read from the graph that onnxruntime really runs, and why not.

onnxruntime is asked for its optimized graph, of this machine and version, and every multiply-add
node of the portable file is found again in it. For that each node of a copy is named by its place
(`#12#`): names take no part in fusion, and a fused node keeps one in its own. What cannot be found
again counts as float. Multiply-adds are those of `audit.py`; time is a share taken from
onnxruntime's profiler and no latency. `unfused.py` says why a node stays float.

A Conv or Gemm whose weight is float in the file, between DequantizeLinear and QuantizeLinear, does
not stay float: newer releases (found in 1.32, absent from 1.17) make its weight int8 when they open
the file, per tensor (weight_bias_quantization.cc). Such a node counts as int8 and is marked
`requantized`: it is less accurate than int8 per channel, and than what its author meant.

Which kernel family runs an int8 node (VNNI, dotprod, …) is the CPU's matter and not seen here.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
from onnx import ModelProto, NodeProto

from ..pipeline.errors import MeasurementError
from .audit import node_multiply_adds
from .graph import PRODUCT_OPS, WEIGHTED_OPS, consumers, read_model
from .optimized import CONVERSIONS, INT8_MULTIPLY, Kernel, optimize
from .unfused import View, why_float

Array = np.ndarray[Any, Any]

# Kernels that multiply floats; MatMulNBits unpacks its weights to do so.
FLOAT_MULTIPLY = frozenset(
    {"Conv", "FusedConv", "NhwcFusedConv", "Gemm", "FusedGemm", "MatMul", "FusedMatMul",
     "MatMulNBits"}
)  # fmt: skip
MARK = r"#(\d+)#"  # in a node's name: its place in the portable graph
NCHWC = "com.microsoft.nchwc"  # the domain of layouts blocked for this CPU


def engagement(path: Path, inputs: Array | None = None, *, threads: int = 1) -> dict[str, Any]:
    """How much of this file onnxruntime runs in int8 on this machine. JSON-able.

    Args:
        path: a portable ONNX file, QDQ or float.
        inputs: float32, (N ≥ 1, C, H, W), or int64 tokens, (N ≥ 1, K, S), real; profiled one at a
            time. None leaves out time.

    Returns:
        int8_multiply_adds_share (0…1), multiply_adds and int8_multiply_adds (of one sample, see
        `audit.py` for texts),
        int8_time_share, conversion_time_share (Q and DQ) and float_time_share (None without
        inputs), nodes (every Conv, Gemm and MatMul: name, op, multiply_adds, kernel, int8,
        requantized, reason, time_share), float_between_qdq (name, op, reason, time_share),
        quantize_nodes_left (by operator, and how many of them touch a graph input or output),
        kernels (by operator), not_found (names), onnxruntime (version), threads, profiled_runs.

    Raises:
        ExportError: the file cannot be read or opened, or has other inputs.
        MeasurementError: nothing in it multiplies, or a shape cannot be inferred.
        RuntimeFailure: onnxruntime failed.
    """
    portable = read_model(path)
    marked = marked_copy(portable)
    costs = _costs(marked, path)
    optimized, kernels, runs = optimize(marked, inputs, threads=threads, where=str(path))
    found = find_again(portable, [kernel.node for kernel in kernels], costs)
    view = View.of(portable)
    nodes = [_describe(portable, i, costs[i], kernels, found, view) for i in sorted(costs)]
    total = sum(costs.values())
    int8 = sum(node["multiply_adds"] for node in nodes if node["int8"])
    return {
        "int8_multiply_adds_share": int8 / total,
        "multiply_adds": total,
        "int8_multiply_adds": int8,
        **{f"{kind}_time_share": _time(kernels, kind) for kind in ("int8", "conversion", "float")},
        "nodes": nodes,
        "float_between_qdq": _float_islands(kernels, optimized, portable, view),
        "quantize_nodes_left": _conversions_left(optimized),
        "kernels": dict(sorted(Counter(label(kernel.node) for kernel in kernels).items())),
        "not_found": [node["name"] for node in nodes if node["kernel"] is None],
        "onnxruntime": ort.__version__,
        "threads": threads,
        "profiled_runs": runs,
    }


def as_text(report: dict[str, Any], *, most: int = 12) -> str:
    """The report as a few lines for a terminal; at most `most` float nodes are named."""
    nodes = report["nodes"]
    lines = [
        f"int8 kernels: {report['int8_multiply_adds_share']:.1%} of multiply-adds, "
        f"{sum(node['int8'] for node in nodes)} of {len(nodes)} Conv, Gemm and MatMul nodes"
    ]
    if report["int8_time_share"] is not None:
        lines.append(
            f"time: {report['int8_time_share']:.1%} int8, "
            f"{report['conversion_time_share']:.1%} between float and int8, "
            f"{report['float_time_share']:.1%} float"
        )
    requantized = [node["name"] for node in nodes if node["requantized"]]
    if requantized:
        lines.append(
            f"  {len(requantized)} of them are float in the file ({', '.join(requantized[:3])}): "
            "onnxruntime makes their weights int8 itself, per tensor"
        )
    rows = [
        (node["op"], node["name"], node["time_share"], node["reason"])
        for node in (*(n for n in nodes if not n["int8"]), *report["float_between_qdq"])
    ]
    for op, name, share, reason in rows[:most]:
        shown = "" if share is None else f"{share:6.1%} "
        lines.append(f"  float {shown}{op} {name}: {reason}")
    if len(rows) > most:
        lines.append(f"  and {len(rows) - most} more float nodes")
    kernels = sorted(report["kernels"].items(), key=lambda item: (-item[1], item[0]))
    lines.append("kernels: " + ", ".join(f"{name} {count}" for name, count in kernels))
    return "\n".join(lines)


def _costs(marked: ModelProto, path: Path) -> dict[int, int]:
    """Multiply-adds of one sample by place in the graph."""
    by_name = node_multiply_adds(marked)
    if not sum(by_name.values()):
        raise MeasurementError(
            f"{path}: no Conv, Gemm or MatMul in its main graph, so there is no share to take; "
            "expected the portable file (float or QDQ), not one that onnxruntime optimized"
        )
    return {
        place: by_name[node.name]
        for place, node in enumerate(marked.graph.node)
        if node.name in by_name
    }


def marked_copy(portable: ModelProto) -> ModelProto:
    """The graph with each node named by its place."""
    copy = ModelProto()
    copy.CopyFrom(portable)
    for place, node in enumerate(copy.graph.node):
        node.name = f"#{place}#"
    return copy


def find_again(
    portable: ModelProto, nodes: Sequence[NodeProto], costs: dict[int, int]
) -> dict[int, int]:
    """Place in the portable graph → place in the optimized one, where that is beyond doubt. Of the
    places that `costs` names: Conv, Gemm and MatMul."""
    candidates = {
        index: _origins(node, portable, costs)
        for index, node in enumerate(nodes)
        if node.op_type in INT8_MULTIPLY | FLOAT_MULTIPLY
    }
    found: dict[int, int] = {}
    claimed_twice: set[int] = set()
    settled = True
    while settled:  # a fused residual Add has two origins; the other one's own kernel decides
        settled = False
        for index, places in list(candidates.items()):
            left = places - found.keys() if len(places) > 1 else places
            if len(left) == 1:
                (place,) = left
                if place in found:
                    claimed_twice.add(place)
                found[place] = index
                del candidates[index]
                settled = True
    return {place: index for place, index in found.items() if place not in claimed_twice}


def _origins(node: NodeProto, portable: ModelProto, costs: dict[int, int]) -> set[int]:
    """Places of the multiply-add nodes that this kernel may have been."""
    marked = {int(place) for place in re.findall(MARK, node.name)} & costs.keys()
    if marked:
        return marked
    # the blocked layout's kernels are named after what they write (nchwc_transformer.cc)
    places = {name: i for i, n in enumerate(portable.graph.node) for name in n.output if name}
    waiting = [node.name.removesuffix("_nchwc"), *node.output]
    origins: set[int] = set()
    seen: set[str] = set()
    while waiting:
        name = waiting.pop()
        if name in seen or name not in places:
            continue
        seen.add(name)
        if places[name] in costs:
            origins.add(places[name])
        else:
            waiting.extend(portable.graph.node[places[name]].input)
    return origins


def _describe(
    portable: ModelProto, place: int, cost: int, kernels: list[Kernel], found: dict[int, int],
    view: View,
) -> dict[str, Any]:  # fmt: skip
    node = portable.graph.node[place]
    kernel = kernels[found[place]] if place in found else None
    int8 = kernel is not None and kernel.node.op_type in INT8_MULTIPLY
    if kernel is None:
        reason: str | None = "not found again in the optimized graph, so counted as float"
    else:
        reason = None if int8 else why_float(node, view)
    return {
        "name": node.name or node.output[0],
        "op": node.op_type,
        "multiply_adds": cost,
        "kernel": label(kernel.node) if kernel else None,
        "int8": int8,
        "requantized": (
            int8 and node.op_type in WEIGHTED_OPS and not view.is_dequantized(node.input[1])
        ),
        "reason": reason,
        "time_share": kernel.time_share if kernel else None,
    }


def _float_islands(
    kernels: list[Kernel], optimized: ModelProto, portable: ModelProto, view: View
) -> list[dict[str, Any]]:
    """What runs in float between a DequantizeLinear and a QuantizeLinear, but multiply-adds."""
    readers = consumers(optimized)
    after: set[str] = set()  # values that a DequantizeLinear reaches in float
    for kernel in kernels:  # in graph order, which is topological
        starts = kernel.node.op_type == "DequantizeLinear"
        if starts or (kernel.kind == "float" and after & set(kernel.node.input)):
            after.update(kernel.node.output)
    before: set[str] = set()  # values that reach a QuantizeLinear in float
    for kernel in reversed(kernels):
        ends = kernel.node.op_type == "QuantizeLinear"
        if ends or (kernel.kind == "float" and before & set(kernel.node.output)):
            before.update(kernel.node.input)
    islands: dict[str, dict[str, Any]] = {}
    for kernel in kernels:
        node = kernel.node
        between = after & set(node.input) and before & set(node.output)
        if kernel.kind != "float" or not between:
            continue
        origin = origin_of(node, portable, view, readers)
        if origin.op_type in PRODUCT_OPS | FLOAT_MULTIPLY:
            continue
        name = origin.name or origin.output[0]
        row = islands.setdefault(
            name,
            {"name": name, "op": origin.op_type, "reason": why_float(origin, view),
             "time_share": None},
        )  # fmt: skip
        if kernel.time_share is not None:
            row["time_share"] = (row["time_share"] or 0.0) + kernel.time_share
    return list(islands.values())


def origin_of(
    node: NodeProto, portable: ModelProto, view: View, readers: dict[str, list[NodeProto]]
) -> NodeProto:
    """The node of the portable graph that this one is, or is a part of; else the node itself."""
    part = node
    while True:
        if mark := re.search(MARK, part.name):
            found: NodeProto = portable.graph.node[int(mark[1])]
            return found
        written = next((name for name in part.output if name in view.writers), None)
        if written is not None:
            return view.writers[written]
        following = readers.get(part.output[0], [])
        if not following:
            return node
        part = following[0]
        if part.op_type in CONVERSIONS:  # this one's input was written by what is looked for
            mark = re.search(MARK, part.name)
            reader = portable.graph.node[int(mark[1])] if mark else part
            return view.writers.get(reader.input[0], node)


def _conversions_left(optimized: ModelProto) -> dict[str, int]:
    """Q and DQ that run as nodes of their own; a file needs one of them at an input or output."""
    edges = {value.name for value in (*optimized.graph.input, *optimized.graph.output)}
    nodes = [node for node in optimized.graph.node if node.op_type in CONVERSIONS]
    counts: dict[str, int] = dict(sorted(Counter(node.op_type for node in nodes).items()))
    counts["at_inputs_and_outputs"] = sum(
        bool({*node.input[:1], *node.output} & edges) for node in nodes
    )
    return counts


def _time(kernels: Iterable[Kernel], kind: str) -> float | None:
    shares = [kernel.time_share for kernel in kernels if kernel.kind == kind]
    known = [share for share in shares if share is not None]
    if shares and not known:
        return None
    return float(sum(known)) if any(k.time_share is not None for k in kernels) else None


def label(node: NodeProto) -> str:
    """The operator, with its domain where that is a layout's."""
    return f"nchwc.{node.op_type}" if node.domain == NCHWC else node.op_type
