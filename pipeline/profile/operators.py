"""Which operators take the time: onnxruntime's own profile, joined with what each node computes.

Taken in runs of their own, since the profiler slows every node down; latency is measured without
it. A node's time is the mean of the middle half of many runs: as little moved by outliers as a
median, and finer than the whole microseconds that the profiler counts in. Each node that runs is
led back to the node of the file that it was (`exporters/engagement.py`), which also says why it
stays float.
"""

from __future__ import annotations

import time
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Mapping, Sequence
from math import prod
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import onnxruntime as ort
from onnx import ModelProto, NodeProto, TensorProto, helper

from ...exporters.engagement import (
    FLOAT_MULTIPLY,
    NCHWC,
    find_again,
    label,
    marked_copy,
    origin_of,
)
from ...exporters.graph import (
    PRODUCT_OPS,
    attribute,
    consumers,
    is_quantized,
    producers,
    read_model,
)
from ...exporters.optimized import INT8_MULTIPLY, WARM_UP, Kernel, kernels_of, timed_as, trace
from ...exporters.unfused import View, why_float
from ..errors import MeasurementError
from ..spec import Spec

LEAST_RUNS, MOST_RUNS, SECONDS = 20, 300, 2.0
CONVOLUTIONS = frozenset({"Conv", "FusedConv", "NhwcFusedConv", "QLinearConv", "ConvInteger"})
# Where the weight stands among the inputs (onnxruntime/docs/ContribOperators.md); else second.
WEIGHT_AT = {"QLinearConv": 3, "QLinearMatMul": 3, "QGemm": 3}
# Hand their input on as it is: nothing is read or written.
VIEWS = frozenset({"Reshape", "Flatten", "Squeeze", "Unsqueeze", "Identity"})

Array = npt.NDArray[Any]


class Operator(Spec):
    """A node that runs.

    name, op: of the node of the file that it was. kernel: what runs instead. us: microseconds a
    run, under the profiler. weight_shape: as the file has it; empty: nothing constant is
    multiplied. moved_bytes: activations read and written. reason: why it stays float; None: it
    does not, or nothing in the file is quantized. island: computes in float what came from int8 and
    goes back to it, and is no product. beside: of a conversion, the name of the float node next
    to it; None: an input or output of the graph. table_bytes: constant rows that it looks up in.
    """

    name: str
    op: str
    kernel: str
    kind: Literal["int8", "conversion", "float"]
    us: float
    multiply_adds: int
    is_product: bool
    weight_shape: tuple[int, ...]
    groups: int
    weight_bytes: int
    moved_bytes: int
    table_bytes: int
    is_last: bool  # a product whose result no other product reads, directly or not
    reason: str | None
    island: bool
    beside: str | None


class Operators(Spec):
    """All nodes in the order of the graph, and how many profiled runs the times are from."""

    nodes: tuple[Operator, ...]
    runs: int
    is_quantized: bool

    @property
    def us(self) -> float:
        return sum(node.us for node in self.nodes)

    @property
    def weight_bytes(self) -> int:
        return sum(node.weight_bytes for node in self.nodes)


def operators_of(path: Path, inputs: Mapping[str, Array], *, threads: int) -> Operators:
    """Profiles the file.

    Args:
        path: a portable ONNX file, QDQ or float.
        inputs: arrays by input name, (N ≥ 1, …); fed one sample at a time, or as many as the graph
            fixes.

    Raises:
        ExportError: it cannot be read, opened or fed. RuntimeFailure: onnxruntime failed.
        MeasurementError: nothing ran.
    """
    portable = read_model(path)

    def run(session: ort.InferenceSession) -> int:
        fed = batches(session, inputs)
        runs, deadline = 0, time.perf_counter() + SECONDS
        while runs < WARM_UP + LEAST_RUNS or (
            runs < WARM_UP + MOST_RUNS and time.perf_counter() < deadline
        ):
            session.run(None, fed[runs % len(fed)])
            runs += 1
        return runs - WARM_UP

    traced = trace(marked_copy(portable), run, threads=threads, where=str(path))
    kernels = kernels_of(traced.model, {})
    ran = _ran(traced.events, traced.model)
    if not any(ran):
        raise MeasurementError(f"{path}: onnxruntime's profile names no node of it that ran")
    return Operators(
        nodes=_joined(portable, traced.model, kernels, ran),
        runs=traced.runs,
        is_quantized=is_quantized(portable),
    )


def batches(session: ort.InferenceSession, inputs: Mapping[str, Array]) -> list[dict[str, Array]]:
    """Feeds in rotation: samples one by one, or repeated to the batch that the graph fixes."""
    sizes = [value.shape[0] for value in session.get_inputs() if value.shape]
    size = next((one for one in sizes if isinstance(one, int) and one > 0), 1)
    count = len(next(iter(inputs.values())))
    places = [np.arange(start, start + size) % count for start in range(0, max(count, 1), size)]
    return [
        {name: np.ascontiguousarray(array[rows]) for name, array in inputs.items()}
        for rows in places
    ]


class _Ran(Spec):
    """Times of one node, and the shapes and bytes of its first run."""

    us: float
    inputs: tuple[tuple[int, ...], ...]
    outputs: tuple[tuple[int, ...], ...]
    moved_bytes: int


def _ran(events: Sequence[Mapping[str, Any]], model: ModelProto) -> list[_Ran | None]:
    """What the profile says of each node of the graph, in the graph's order.

    Nodes of one name are told apart by the numbers that the profiler gives them, in whose order
    the graph is written.
    """
    starts = sorted(event["ts"] for event in events if event["name"] == "model_run")
    named = {node.name for node in model.graph.node if node.name}
    found: dict[str, dict[int, list[Mapping[str, Any]]]] = defaultdict(lambda: defaultdict(list))
    for event in events:
        name, end, _ = event["name"].partition("_kernel_time")
        if event["cat"] != "Node" or not end or event["ts"] < starts[WARM_UP]:
            continue
        index = int(event["args"]["node_index"])
        key = name if name in named else event["args"]["op_name"]
        found[key][index].append(event)
    waiting = {name: [found[name][index] for index in sorted(found[name])] for name in found}
    ran: list[_Ran | None] = []
    for node in model.graph.node:
        queue = waiting.get(timed_as(node), [])
        ran.append(_summed(queue.pop(0), starts) if queue else None)
    return ran


def _summed(events: Sequence[Mapping[str, Any]], starts: Sequence[int]) -> _Ran:
    took = [0.0] * (len(starts) - WARM_UP)
    for event in events:  # the middle of the runs; a node in a loop runs several times in each
        took[bisect_right(starts, event["ts"]) - 1 - WARM_UP] += event["dur"]
    ordered, quarter = sorted(took), len(took) // 4
    about = events[0]["args"]
    return _Ran(
        us=float(np.mean(ordered[quarter : len(ordered) - quarter])),
        inputs=_shapes(about["input_type_shape"]),
        outputs=_shapes(about["output_type_shape"]),
        moved_bytes=int(about["activation_size"]) + int(about["output_size"]),
    )


def _shapes(values: Sequence[Mapping[str, Sequence[int]]]) -> tuple[tuple[int, ...], ...]:
    return tuple(tuple(shape) for value in values for shape in value.values())


def _joined(
    portable: ModelProto,
    optimized: ModelProto,
    kernels: Sequence[Kernel],
    ran: Sequence[_Ran | None],
) -> tuple[Operator, ...]:
    view, readers, writers = View.of(portable), consumers(optimized), producers(optimized)
    stored = {tensor.name: tensor for tensor in optimized.graph.initializer}
    read_on = _read_by_products(portable)
    islands = _islands(kernels)
    quantized = is_quantized(portable)
    origins = _origins(portable, [kernel.node for kernel in kernels], view, readers)
    by_output = {k.node.output[0]: one for k, one in zip(kernels, origins, strict=True)}
    rows = []
    for kernel, origin, one in zip(kernels, origins, ran, strict=True):
        if one is None:
            continue  # a constant that was computed once, before the first run
        node = kernel.node
        is_product = node.op_type in INT8_MULTIPLY | FLOAT_MULTIPLY
        weight = _weight_shape(origin, view) if is_product else ()
        constants = [stored[name] for name in node.input if name in stored]
        is_lookup = node.op_type == "Gather" and node.input[0] in stored
        rows.append(
            Operator(
                name=origin.name or origin.output[0],
                op=origin.op_type,
                kernel=label(node),
                kind=kernel.kind,
                us=one.us,
                multiply_adds=_multiply_adds(node, one, weight, stored) if is_product else 0,
                is_product=is_product,
                weight_shape=weight,
                groups=attribute(origin, "group", 1) if is_product else 1,
                weight_bytes=0 if is_lookup else sum(map(_bytes, constants)),
                moved_bytes=_moved(node, one, is_lookup=is_lookup),
                table_bytes=_bytes(stored[node.input[0]]) if is_lookup else 0,
                is_last=is_product and not read_on & set(origin.output),
                reason=why_float(origin, view) if kernel.kind == "float" and quantized else None,
                island=id(kernel) in islands,
                beside=_beside(node, readers, writers, by_output)
                if kernel.kind == "conversion"
                else None,
            )
        )
    return tuple(rows)


def _origins(
    portable: ModelProto,
    nodes: Sequence[NodeProto],
    view: View,
    readers: dict[str, list[NodeProto]],
) -> list[NodeProto]:
    """The node of the file that each kernel was; the kernel itself where it was none."""
    products = {
        place: 1 for place, node in enumerate(portable.graph.node) if node.op_type in PRODUCT_OPS
    }
    found = {kernel: place for place, kernel in find_again(portable, nodes, products).items()}
    origins = []
    for index, node in enumerate(nodes):
        if index in found:
            origins.append(portable.graph.node[found[index]])
        elif node.domain == NCHWC:  # named after what it writes; what reorders is not of the file
            origins.append(view.writers.get(node.name.removesuffix("_nchwc"), node))
        else:
            origins.append(origin_of(node, portable, view, readers))
    return origins


def _read_by_products(portable: ModelProto) -> set[str]:
    """Values from which a product is reached."""
    read: set[str] = set()
    for node in reversed(portable.graph.node):  # topological, so readers come first
        if node.op_type in PRODUCT_OPS or read & set(node.output):
            read.update(node.input)
    return read


def _islands(kernels: Sequence[Kernel]) -> set[int]:
    """Ids of the kernels that compute in float between int8 ones."""
    after: set[str] = set()  # float values that came from int8
    inside = []
    for kernel in kernels:  # in graph order, which is topological
        reached = after & set(kernel.node.input)
        if kernel.kind == "float" and reached:
            inside.append(kernel)
        if kernel.kind != "float" or reached:
            after.update(kernel.node.output)
    before: set[str] = set()  # those that go back to it
    for kernel in reversed(kernels):
        if kernel.kind != "float" or before & set(kernel.node.output):
            before.update(kernel.node.input)
    return {
        id(kernel)
        for kernel in inside
        if before & set(kernel.node.output) and kernel.node.op_type not in FLOAT_MULTIPLY
    }


def _beside(
    node: NodeProto,
    readers: Mapping[str, Sequence[NodeProto]],
    writers: Mapping[str, NodeProto],
    origins: Mapping[str, NodeProto],
) -> str | None:
    """Name of the float node that a Q reads from, or that a DQ writes to."""
    if node.op_type == "DequantizeLinear":
        following = readers.get(node.output[0], ())
        near = following[0] if following else None
    else:
        near = writers.get(node.input[0])
    if near is None or near.output[0] not in origins:
        return None
    origin = origins[near.output[0]]
    return str(origin.name or origin.output[0])


def _weight_shape(origin: NodeProto, view: View) -> tuple[int, ...]:
    """Of the constant that the file's node multiplies with; blocked layouts pad their copy."""
    for name in origin.input[1:2]:
        writer = view.writers.get(name)
        source = writer.input[0] if writer and writer.op_type == "DequantizeLinear" else name
        if source in view.stored:
            dims = tuple(int(size) for size in view.stored[source].dims)
            transposed = origin.op_type == "Gemm" and attribute(origin, "transB", 0)
            return dims[::-1] if transposed else dims
    return ()


def _multiply_adds(
    node: NodeProto, ran: _Ran, weight: tuple[int, ...], stored: Mapping[str, TensorProto]
) -> int:
    """Of one run. Conv: positions of the output · elements of the weight; else outputs · inner."""
    outputs = prod(ran.outputs[0]) if ran.outputs else 0
    if node.op_type in CONVOLUTIONS:
        at = WEIGHT_AT.get(node.op_type, 1)
        own = tuple(stored[node.input[at]].dims) if node.input[at] in stored else ran.inputs[1]
        return outputs // int(own[0]) * prod(weight or own)
    if len(weight) >= 2:
        return outputs * weight[-2]
    first = ran.inputs[0] if ran.inputs else (1,)
    return outputs * first[-2 if attribute(node, "transA", 0) else -1]


def _moved(node: NodeProto, ran: _Ran, *, is_lookup: bool) -> int:
    if node.op_type in VIEWS:
        return 0
    # of a table only the rows that are asked for: as many bytes as are written
    return 2 * ran.moved_bytes if is_lookup else ran.moved_bytes


def _bytes(tensor: TensorProto) -> int:
    return int(prod(tensor.dims) * helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize)
