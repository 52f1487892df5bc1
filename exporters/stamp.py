"""The last word on a graph: loads in the oldest runtime asked for, names nobody's files.

Sets the IR version, removes opset domains that no node uses, strips every trace of the tools that
made it (torch writes absolute source paths into node metadata, onnxsim and onnxruntime add their
own), and writes the caller's metadata sorted. The opset stays as exported: converting it would be
another graph than the one that was verified.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping
from pathlib import Path

from onnx import GraphProto, ModelProto

from ..pipeline.errors import ExportError, OutputError
from .graph import all_graphs, all_nodes

OPSET = 18  # what torch's exporter is written in (torch/onnx/_constants.py); no conversion needed
# (first onnxruntime release, IR version to write), newest first. 8 is the IR of ONNX 1.13, the
# release of opset 18, and onnxruntime 1.14 is built on it; 1.15 to 1.17 also read IR 9, which
# adds only float8 and would gain nothing; 1.18 is built on ONNX 1.16, IR 10. Newer IRs are never
# needed for opset 18. Sources: onnx/docs/Versioning.md, onnxruntime.ai/docs/reference/compatibility
IR_BY_RUNTIME: tuple[tuple[tuple[int, int], int], ...] = (((1, 18), 10), ((1, 14), 8))
# (first release, newest opset it reads) of the same source, for files that somebody else exported
OPSET_BY_RUNTIME: tuple[tuple[tuple[int, int], int], ...] = (
    ((1, 18), 21),
    ((1, 17), 20),
    ((1, 15), 19),
    ((1, 14), 18),
)
GRAPH_NAME = "edgestill"


def ir_version(min_runtime: str) -> int:
    """IR version that onnxruntime `min_runtime` ("1.17", "1.17.3") and every later one reads."""
    return _of_runtime(IR_BY_RUNTIME, min_runtime)


def newest_opset(min_runtime: str) -> int:
    """Newest opset that onnxruntime `min_runtime` and every later one reads."""
    return _of_runtime(OPSET_BY_RUNTIME, min_runtime)


def stamp(model: ModelProto, *, min_runtime: str, metadata: Mapping[str, str]) -> ModelProto:
    """A copy of the graph, clean and stamped. Idempotent; the same arguments give the same bytes.

    Args:
        metadata: becomes `metadata_props`, sorted by key; what was there before is dropped.

    Raises:
        ExportError: the runtime is too old for the graph's opset, or an opset domain is missing.
    """
    clean = strip(model)
    clean.ir_version = ir_version(min_runtime)
    default = next((o.version for o in clean.opset_import if o.domain in ("", "ai.onnx")), None)
    newest = newest_opset(min_runtime)
    if default is not None and default > newest:
        raise ExportError(
            f"the graph is written in opset {default}; expected at most {newest}, which "
            f"onnxruntime {min_runtime} reads; export it again with opset_version={OPSET}, or "
            "raise export.min_runtime"
        )
    for key in sorted(metadata):
        clean.metadata_props.add(key=key, value=metadata[key])
    return clean


def _of_runtime(table: tuple[tuple[tuple[int, int], int], ...], min_runtime: str) -> int:
    major, minor = (int(part) for part in min_runtime.split(".")[:2])
    for release, version in table:
        if (major, minor) >= release:
            return version
    raise ExportError(
        f"export.min_runtime: {min_runtime} is older than 1.14, the first onnxruntime that reads "
        f"opset {OPSET}"
    )


def strip(model: ModelProto) -> ModelProto:
    """A copy without tool metadata, doc strings, producer and unused opset domains."""
    clean = ModelProto()
    clean.CopyFrom(model)
    for field in ("producer_name", "producer_version", "domain", "model_version", "doc_string"):
        clean.ClearField(field)
    for field in ("metadata_props", "training_info", "configuration"):
        _clear(clean, field)
    for graph in all_graphs(clean):
        _strip_graph(graph)
    for node in all_nodes(clean):
        for field in ("doc_string", "metadata_props", "device_configurations"):
            _clear(node, field)
    for function in clean.functions:
        for field in ("doc_string", "metadata_props"):
            _clear(function, field)
        for info in function.value_info:
            _strip_named(info)
    clean.graph.name = GRAPH_NAME
    _keep_used_domains(clean)
    return clean


def write_model(model: ModelProto, path: Path) -> None:
    """Writes the graph with its weights inside: sibling temporary file, fsync, rename.

    Raises:
        OutputError: the folder cannot be written or the disk is full.
    """
    payload = model.SerializeToString(deterministic=True)
    temporary: Path | None = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
        temporary = Path(name)
        with os.fdopen(handle, "wb") as stream:
            stream.write(payload)
            stream.flush()
            os.fsync(stream.fileno())
        temporary.chmod(0o644)  # mkstemp makes it private
        temporary.replace(path)
    except OSError as error:
        raise OutputError(
            f"{path}: cannot be written ({error.strerror or error}); check the folder's "
            "permissions and the free space"
        ) from error
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)


def _strip_graph(graph: GraphProto) -> None:
    for field in ("doc_string", "metadata_props", "quantization_annotation"):
        _clear(graph, field)
    for named in (*graph.input, *graph.output, *graph.value_info, *graph.initializer):
        _strip_named(named)


def _strip_named(message: object) -> None:
    for field in ("doc_string", "metadata_props"):
        _clear(message, field)


def _clear(message: object, field: str) -> None:
    """Fields differ between releases of onnx; one that is not there holds nothing to strip."""
    if field in message.DESCRIPTOR.fields_by_name:  # type: ignore[attr-defined]
        message.ClearField(field)  # type: ignore[attr-defined]


def _keep_used_domains(model: ModelProto) -> None:
    """onnxruntime 1.17 refuses a file that imports an unknown domain version, used or not."""
    used = {_domain(node.domain) for node in all_nodes(model)} | {""}
    missing = used - {_domain(entry.domain) for entry in model.opset_import} - {""}
    if missing:
        raise ExportError(
            f"the graph uses operators of {sorted(missing)} without importing that domain; it was "
            "not written by a conforming exporter"
        )
    kept = [entry for entry in model.opset_import if _domain(entry.domain) in used]
    kept.sort(key=lambda entry: entry.domain)
    del model.opset_import[:]
    model.opset_import.extend(kept)


def _domain(name: str) -> str:
    return "" if name == "ai.onnx" else name
