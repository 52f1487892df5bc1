"""The same model in onnxruntime's own format, for builds that read nothing else: `model.ort`.

Mobile builds of onnxruntime leave the ONNX parser out, and every operator that nobody asked for;
`model.required_operators.config` beside the file is what such a build is configured with. The graph
is optimized once, here ("Fixed" style): fusions and int8 kernels of every CPU stay, the layout that
is blocked for this CPU's registers (NCHWc) is left out, and int8 activations stay int8, as ARM has
kernels for them. The file loads in the onnxruntime that wrote it and in later ones, whatever
`export.min_runtime` says of the .onnx: its operators are those of that release. Steps and options
follow onnxruntime/docs/ORT_Format_Update_in_1.13.md and its convert_onnx_models_to_ort.py.

onnxruntime writes its tables in no fixed order: two files of one model hold the same, in other
bytes. Does not judge whether the answers stayed; `pipeline/mobile.py` does.
"""

from __future__ import annotations

from pathlib import Path

import onnxruntime as ort

from ..pipeline.errors import ExportError, RuntimeFailure
from .quiet import quiet
from .sessions import CANNOT_LOAD, DIED, SILENT, one_line

SUFFIX, CONFIG_SUFFIX = ".ort", ".required_operators.config"
# Bakes the layout of one CPU's registers into the file (onnxruntime's converter leaves it out too).
NOT_PORTABLE = ["NchwcTransformer"]
IDENTIFIER = b"ORTM"  # of the flatbuffer, bytes 4 to 8 (ort.fbs)


def write_ort(model: Path, target: Path) -> Path:
    """Writes `target` and, beside it, the operators that a reduced build needs to run it.

    Args:
        model: an ONNX file that onnxruntime here loads.
        target: where to, with the suffix .ort.

    Returns:
        Path of the operators' file.

    Raises:
        ExportError: onnxruntime cannot load the model, or its converter's parts are not installed.
        RuntimeFailure: onnxruntime itself failed.
    """
    options = _options(threads=1)
    options.optimized_model_filepath = str(target)
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_ALL
    options.add_session_config_entry("session.save_model_format", "ORT")
    options.add_session_config_entry("session.qdqisint8allowed", "1")
    _open(model, options, disabled=NOT_PORTABLE)
    config = target.with_name(target.name.removesuffix(SUFFIX) + CONFIG_SUFFIX)
    config.write_text(_required_operators(target))
    return config


def open_ort(path: Path, *, threads: int) -> ort.InferenceSession:
    """A CPU session of an .ort file, as `sessions.open_session` opens an .onnx.

    Raises:
        ExportError: it is missing, or no .ort file that this onnxruntime reads.
        RuntimeFailure: onnxruntime itself failed.
    """
    try:
        with path.open("rb") as handle:
            head = handle.read(8)
    except OSError as error:
        raise ExportError(
            f"{path}: cannot be read: {error.strerror}; expected a file in ORT format"
        ) from error
    if head[4:] != IDENTIFIER:
        raise ExportError(f"{path}: not in ORT format; expected what `export.format: ort` writes")
    return _open(path, _options(threads=threads), disabled=[])


def _options(*, threads: int) -> ort.SessionOptions:
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = SILENT
    return options


def _open(path: Path, options: ort.SessionOptions, *, disabled: list[str]) -> ort.InferenceSession:
    try:
        return ort.InferenceSession(
            str(path), options, providers=["CPUExecutionProvider"], disabled_optimizers=disabled
        )
    except CANNOT_LOAD as error:
        raise ExportError(
            f"{path}: onnxruntime {ort.__version__} cannot load it: {one_line(error)}; an .ort "
            "file needs the release that wrote it, or a later one"
        ) from error
    except DIED as error:
        raise RuntimeFailure(
            f"{path}: onnxruntime {ort.__version__} failed while opening it: {one_line(error)}"
        ) from error


def _required_operators(path: Path) -> str:
    """`domain;opset;operator,operator` lines, as onnxruntime's build.py reads them."""
    # read from the file itself: it holds operators that only the optimizer makes
    try:
        with quiet():
            from onnxruntime.tools.ort_format_model import create_config_from_models
    except ImportError as error:
        raise ExportError(
            f"export.format: ort needs onnxruntime's tools and flatbuffers ({error}); install them "
            "with `pip install --force-reinstall onnxruntime flatbuffers`, or leave ort out"
        ) from error
    raw = path.with_name(f".{path.name}.operators")
    try:
        with quiet():
            create_config_from_models([path], raw, False)
        lines = raw.read_text().splitlines()
    finally:
        raw.unlink(missing_ok=True)
    # its head names the file by the path that it had here
    kept = [line for line in lines if line and not line.startswith("#")]
    return "".join(f"{line}\n" for line in kept)
