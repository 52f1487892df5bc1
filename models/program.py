"""A .pt2 file (torch.export.save) → a module that runs; without running code hidden in the file.

`torch.export.load` trusts its file: it unpickles some records without restriction, resolves names
like `torch.x.y` into callables and evaluates shape expressions. So the archive is read here first
and refused unless weights and constants are raw tensors, its pickles pass `weights_only`, its
operators are operators, and its expressions are arithmetic. What passes is loaded by torch.
"""

from __future__ import annotations

import contextlib
import copy
import io
import json
import logging
import pickle
import re
import warnings
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

from ..pipeline.errors import ModelError

# The records of a program of plain tensors (torch/export/pt2_archive). Compiled libraries, pickled
# weights of older releases and custom objects have other names.
_RECORD = re.compile(
    r"models/model\.json|data/(?:weights/(?:weight_\d+|model_weights_config\.json)|"
    r"constants/(?:tensor_\d+|model_constants_config\.json)|sample_inputs/model\.pt)|"
    r"archive_(?:format|version)|byteorder|version|\.data/\w+|extra/.*"
)
_PAYLOAD = re.compile(r"(?:weight|tensor)_\d+")
# What the graph of a network may call. Everything else that torch's reader would resolve
# (`torch.load`, `torch.ops.load_library`, `operator.methodcaller`, …) is not a tensor operator.
_OPERATOR = re.compile(
    r"torch\.ops\.(?:aten|prims?|higher_order|quantized_decomposed|torchvision)(?:\.\w+){1,2}|"
    r"_operator\.(?:add|sub|mul|floordiv|truediv|mod|pow|neg|pos|abs|eq|ne|lt|le|gt|ge|and_|or_|"
    r"not_|getitem)|torch\._?sym_\w+|math\.\w+"
)
# A shape expression as SymPy writes it: functions (Add, FloorDiv), Symbol('s0', positive=True),
# numbers. No attribute, subscript or other string, so nothing its parser could be made to call.
_PART = (
    r"\s*(?:(?:torch\.utils\._sympy\.functions\.)?[A-Z]\w*|'[a-z]{1,3}\d+'|[a-z]{1,3}\d+|"
    r"[a-z_]+=(?:True|False)|int_oo|oo|\d+(?:\.\d+)?|[-+*/%(),<>=&|~!])\s*"
)
_EXPRESSION = re.compile(f"(?:{_PART})+")


class Program(nn.Module):
    """A captured program as a module. Its mode is baked in, so train() and eval() do nothing."""

    def __init__(self, program: ExportedProgram) -> None:
        super().__init__()
        self.program = program.module(check_guards=False)
        self.program.requires_grad_(False)
        self.training = False

    def train(self, mode: bool = True) -> Program:  # noqa: ARG002 (nn.Module's own signature)
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> Program:
        copied = Program.__new__(Program)
        nn.Module.__init__(copied)
        with warnings.catch_warnings():
            # torch copies its own tree specs through a constructor that it deprecated
            warnings.simplefilter("ignore", FutureWarning)
            copied.program = copy.deepcopy(self.program, memo)
        copied.training = False
        return copied

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.program(x)
        return logits


def open_program(path: Path, *, input_shape: tuple[int, int, int]) -> tuple[Program, int | None]:
    """The file's program, and the batch it was captured with (None: any batch).

    Args:
        input_shape: (C, H, W) that the data will give it.

    Raises:
        ModelError: no .pt2 file, one that holds more than a network, one captured in training
            mode, or one whose input is not one float32 (N, C, H, W).
    """
    if not path.is_file():
        raise ModelError(f"{path}: no such file; the model is written FILE.pt2")
    _inspect(path)
    with _silent():
        try:
            program = torch.export.load(path)
        except (RuntimeError, ValueError, AssertionError, KeyError, OSError) as error:
            said = " ".join(str(error).split())[:300]
            raise ModelError(
                f"{path}: torch {torch.__version__} cannot read this program: {said}; save it "
                "again with torch.export.save of this version"
            ) from error
    _check_mode(path, program)
    return Program(program), _check_input(path, program, input_shape)


def _inspect(path: Path) -> None:
    """Refuse what is no program of torch.export.save, or holds more than a network."""
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
            # every record lies below one folder, named after the file when it was written
            records = {name.partition("/")[2]: name for name in names}
            if "archive_format" not in records or "models/model.json" not in records:
                raise ModelError(f"{path}: {_NOT_PT2}")
            odd = [name for name in records if not _RECORD.fullmatch(name)]
            # torch takes the first of two records of one name, and this reader the last
            if not odd and len({name.lower() for name in records}) < len(names):
                odd = ["two records of one name"]
            read = {} if odd else {k: archive.read(records[k]) for k in (*_JSON, _SAMPLE)}
        graph, *configs = [json.loads(read[name]) for name in _JSON] if read else [{}]
        payloads = [payload for part in configs for payload in part["config"].values()]
    except (zipfile.BadZipFile, EOFError, KeyError, TypeError, ValueError, OSError) as error:
        raise ModelError(f"{path}: {_NOT_PT2}") from error
    hidden = odd[0] if odd else _hidden_code(graph, payloads, read[_SAMPLE])
    if hidden:
        raise ModelError(
            f"{path}: holds more than plain tensors and operators ({hidden}), which could run "
            "code when read; give FILE.py:factory and safetensors weights"
        )


_JSON = (
    "models/model.json",
    "data/weights/model_weights_config.json",
    "data/constants/model_constants_config.json",
)
_SAMPLE = "data/sample_inputs/model.pt"
_NOT_PT2 = (
    "is no .pt2 program of torch.export.save, or a damaged one; write it with "
    "torch.export.save(torch.export.export(model.eval(), (example,), "
    "dynamic_shapes=({0: torch.export.Dim('N')},)), FILE.pt2). A state dict goes into `weights:`"
)


def _hidden_code(graph: Any, payloads: list[dict[str, Any]], sample: bytes) -> str | None:
    """What in the archive is more than tensors, operators and arithmetic; None if nothing is."""
    for payload in payloads:
        if payload["use_pickle"] or not _PAYLOAD.fullmatch(payload["path_name"]):
            return f"pickled object {payload['path_name']}"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about formats; what cannot be read is refused
            if sample:
                torch.load(io.BytesIO(sample), weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, LookupError, TypeError):
        return "its sample inputs are no tensors"
    for key, value in _leaves(graph):
        if key == "target" and not _OPERATOR.fullmatch(value):
            return f"call of {value[:80]}"
        if key == "expr_str" and not _EXPRESSION.fullmatch(value):
            return f"expression {value[:80]}"
    return None


def _leaves(node: Any) -> Iterator[tuple[str, str]]:
    """Every (key, string) of a JSON document."""
    pending = [node]
    while pending:
        item = pending.pop()
        if isinstance(item, dict):
            yield from ((k, v) for k, v in item.items() if isinstance(v, str))
            pending.extend(item.values())
        elif isinstance(item, list):
            pending.extend(item)


def _check_mode(path: Path, program: ExportedProgram) -> None:
    """Dropout and batch statistics that are captured as active stay active for ever."""
    flags = {"aten.dropout.default": 2, "aten.feature_dropout.default": 2,
             "aten.batch_norm.default": 5}  # fmt: skip
    for node in program.graph.nodes:
        at = flags.get(str(node.target))
        if at is not None and len(node.args) > at and node.args[at] is True:
            raise ModelError(
                f"{path}: was captured in training mode ({node.target} is active); call "
                "model.eval() before torch.export.export"
            )


def _check_input(
    path: Path, program: ExportedProgram, input_shape: tuple[int, int, int]
) -> int | None:
    names = program.graph_signature.user_inputs
    nodes = [n for n in program.graph.nodes if n.op == "placeholder" and n.name in names]
    values = [node.meta.get("val") for node in nodes]
    if len(values) != 1 or not isinstance(values[0], Tensor):
        raise ModelError(f"{path}: takes {len(names)} inputs; expected one image batch")
    value = values[0]
    # a free axis fits every size
    fixed = [size if isinstance(size, int) else None for size in value.shape]
    fits = len(fixed) == 4 and all(
        size in (None, wanted) for size, wanted in zip(fixed[1:], input_shape, strict=True)
    )
    shown = tuple("N" if size is None else size for size in fixed)
    if not fits or value.dtype != torch.float32:
        raise ModelError(
            f"{path}: takes {str(value.dtype).removeprefix('torch.')} {shown}, and the data gives "
            f"float32 {('N', *input_shape)}; change data.preprocess, or export it for this shape"
        )
    if fixed[0] is None:
        _check_range(path, program, value.shape[0])
    return fixed[0]


def _check_range(path: Path, program: ExportedProgram, axis: Any) -> None:
    """A free batch must be free: a bound would fail in the middle of an evaluation."""
    bounds = program.range_constraints.get(axis.node.expr)
    limit = "" if bounds is None else str(bounds.upper)
    if not limit.isdigit():  # "int_oo": no limit
        return
    raise ModelError(
        f"{path}: its batch may be at most {limit}; export it with an unbounded "
        "torch.export.Dim('N'), or with a fixed batch"
    )


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    """torch logs the traceback of what it then raises; the error is enough."""
    logger = logging.getLogger("torch.export")
    before = logger.disabled
    logger.disabled = True
    try:
        yield
    finally:
        logger.disabled = before
