"""The values between the inputs and the logits: read from a graph, or from the graph cut there.

`taps` adds outputs and leaves the rest as it is, with every optimisation off. More outputs disturb
fusion, so what a deployed file computes at a place is asked of `cut`: the graph up to that value,
which is its only output, optimised as in deployment. Layers are called by the module path in the
names of their weights, where the exporter left one.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from onnx import ModelProto, NodeProto, ValueInfoProto

from ..pipeline.errors import RuntimeFailure
from .feeds import as_input, entry_of, feed, fitted
from .graph import all_nodes, drop_unused_initializers, producers
from .sessions import CANNOT_LOAD, DIED, one_line, open_session, pad_batch
from .stamp import write_model

Array = np.ndarray[Any, Any]

CONVERSIONS = frozenset({"QuantizeLinear", "DequantizeLinear", "DynamicQuantizeLinear"})


def taps(
    model: ModelProto, names: Sequence[str], feeds: dict[str, Array], *, threads: int
) -> dict[str, Array]:
    """The named values, optimisations off.

    Args:
        feeds: what the graph's inputs are given, all samples at once.

    Raises:
        ExportError: the graph cannot be opened. RuntimeFailure: onnxruntime failed.
    """
    watched = ModelProto()
    watched.CopyFrom(model)
    del watched.graph.output[:]
    watched.graph.output.extend(ValueInfoProto(name=name) for name in names)
    return _run(watched, names, feeds, threads=threads, optimize=False)


def cut(model: ModelProto, name: str, feeds: dict[str, Array], *, threads: int) -> Array:
    """The value `name` as the deployed graph computes it: nothing behind it, optimisations on."""
    part = ModelProto()
    part.CopyFrom(model)
    writers, wanted, waiting = producers(model), set[str](), [name]
    while waiting:
        node = writers.get(waiting.pop())
        if node is not None and node.output[0] not in wanted:
            wanted.add(node.output[0])
            waiting.extend(node.input)
            waiting.extend(_captured(node))
    kept = [node for node in model.graph.node if node.output[0] in wanted]
    del part.graph.node[:]
    part.graph.node.extend(kept)
    del part.graph.output[:]
    part.graph.output.append(ValueInfoProto(name=name))
    drop_unused_initializers(part)
    return _run(part, [name], feeds, threads=threads, optimize=True)[name]


def feeds_of(model: ModelProto, inputs: Array, *, threads: int) -> tuple[dict[str, Array], int]:
    """What the inputs of `model` are given for these samples, and how many rows are real.

    A fixed batch takes as many as it fixes; the last sample fills it up.

    Args:
        inputs: float32 (N, C, H, W), or int64 tokens (N, K, S).
    """
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "model.onnx")
        write_model(model, path)
        entry = entry_of(open_session(path, threads=threads, optimize=False))
    batch = as_input(inputs[: entry.batch] if entry.batch else inputs)
    full = fitted(pad_batch(batch, entry.batch) if entry.batch else batch, entry)
    return feed(full, entry.names), len(batch)


def layer_of(node: NodeProto, stored: frozenset[str]) -> str:
    """Module path in the name of the node's weight (`layer1.0.conv2`); else the node's own name.

    Args:
        stored: names of the graph's initializers.
    """
    for name in node.input:
        path, _, parameter = name.partition("_quantized")[0].rpartition(".")
        if name in stored and path and parameter.partition("_")[0] in ("weight", "bias"):
            return str(path)
    return str(node.name or node.output[0])


def stored_names(model: ModelProto) -> frozenset[str]:
    """Names of the initializers, and of what DequantizeLinear makes of stored integers."""
    names = {tensor.name for tensor in model.graph.initializer}
    for node in model.graph.node:
        if node.op_type == "DequantizeLinear" and node.input[0] in names:
            names.add(node.output[0])
    return frozenset(names)


def _captured(node: NodeProto) -> set[str]:
    """What graphs inside the node's attributes read, their own values too."""
    holder = ModelProto()
    holder.graph.node.append(node)
    return {name for inner in all_nodes(holder) for name in inner.input}


def _run(
    model: ModelProto, names: Sequence[str], feeds: dict[str, Array], *, threads: int,
    optimize: bool,
) -> dict[str, Array]:  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "part.onnx")
        write_model(model, path)
        session = open_session(path, threads=threads, optimize=optimize)
    taken = {value.name for value in session.get_inputs()}
    try:
        values = session.run(list(names), {k: v for k, v in feeds.items() if k in taken})
    except (*CANNOT_LOAD, *DIED) as error:
        raise RuntimeFailure(
            f"onnxruntime failed on the graph up to {names[-1]}: {one_line(error)}"
        ) from error
    return dict(zip(names, values, strict=True))
