"""A torch network → one float ONNX file, by torch.onnx.export with dynamo, opset 18.

Input "input" (N, C, H, W) float32, output "logits" (N, classes); N free or fixed; weights inside
the file; no trace of the machine it was made on. Texts: an input (N, S) int64 for each row of the
tokens, named as the network names it, S free or fixed. Does not simplify, fold or verify:
`simplify.py` and `pipeline/verify/parity.py` do. There is no fallback to the TorchScript exporter:
a graph that needs it is an error that names the operator or the line.
"""

from __future__ import annotations

import tempfile
import traceback
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnx
import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from ..pipeline.errors import ExportError, RuntimeFailure
from .compare import agrees
from .feeds import MASK
from .quiet import quiet
from .reference import evaluating, logits_float32
from .sessions import open_session, run_batches
from .stamp import OPSET, strip, write_model

Batch = Literal["dynamic"] | int

INPUT, OUTPUT, BATCH_AXIS, SEQUENCE_AXIS = "input", "logits", "N", "S"
LEAST_TOKENS = 3  # of an example: 1 and the batch of 2 would be taken for constants
_HERE = Path(__file__).resolve().parent
# Folders whose lines say nothing about the user's network.
_NOT_THE_USERS = (str(Path(torch.__file__).parent), str(_HERE), str(_HERE.parent / "pipeline"))


def export_onnx(
    network: nn.Module | ExportedProgram,
    example: Tensor,
    path: Path,
    *,
    batch: Batch,
    sequence: Batch = "dynamic",
) -> None:
    """Writes the network as ONNX, checked by onnx.checker with full shape inference.

    Args:
        network: a module (exported in eval mode, its modes restored afterwards) or a program read
            from a .pt2 file. A module of texts has `input_names`, one for each row of the tokens,
            and `answer(*rows)`, the logits of rows (N, S) each: that is what is traced.
        example: float32, (≥ 2, C, H, W); only its shape matters. With 1, torch.export would take
            the batch for a constant (pytorch#157621). Of texts (≥ 2, K, S), whose ids are used.
        batch: "dynamic", or the fixed number of samples a call.
        sequence: of texts: "dynamic", or the fixed number of tokens.

    Raises:
        ExportError: an operator that ONNX lacks, control flow that depends on the data, or a
            network that fixes its batch; names the operator or the user's line. Of texts: a graph
            that holds for one length only, or answers otherwise than the network, or whose answers
            depend on padding.
    """
    assert len(example) >= 2, "an example batch of 1 would be taken for a constant"
    if isinstance(network, nn.Module) and is_text_network(network):
        assert example.ndim == 3, "the example is (N, K, S)"
        model = _from_text(network, example, batch, sequence)
        _check(model, batch, names=_input_names(network), sequence=sequence)
        model = strip(model)
        _check_text(network, model, example, sequence=sequence)
        write_model(model, path)
        return
    assert example.ndim == 4, "the example is (N, C, H, W)"
    if isinstance(network, ExportedProgram):
        model = _from_program(network, batch)
    else:
        model = _from_module(network, example, batch)
    _check(model, batch)
    write_model(strip(model), path)


def is_text_network(module: nn.Module) -> bool:
    """It names its rows of tokens and answers them one by one."""
    return hasattr(module, "input_names") and callable(getattr(module, "answer", None))


def program_batch(program: ExportedProgram) -> int | None:
    """The batch a program was captured with, or None where it is free."""
    names = set(program.graph_signature.user_inputs)
    for node in program.graph.nodes:
        if node.op == "placeholder" and node.name in names and node.meta["val"].ndim:
            first = node.meta["val"].shape[0]
            return first if isinstance(first, int) else None
    raise ExportError("the program takes no tensor; expected one input (N, C, H, W)")


def _from_module(module: nn.Module, example: Tensor, batch: Batch) -> onnx.ModelProto:
    if isinstance(batch, int):
        shown = example[:1].expand(batch, *example.shape[1:]).contiguous()
        dynamic_shapes: Any = None
    else:
        shown = example
        dynamic_shapes = ({0: Dim(BATCH_AXIS)},)
    with evaluating(module):
        return _export(module, (shown,), dynamic_shapes)


class _Rows(nn.Module):
    """What is traced of a text network: its rows as inputs of their own."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network: Any = network

    def forward(self, *rows: Tensor) -> Tensor:
        logits: Tensor = self.network.answer(*rows)
        return logits


def _from_text(
    network: nn.Module, example: Tensor, batch: Batch, sequence: Batch
) -> onnx.ModelProto:
    names = _input_names(network)
    tokens = text_example(
        example,
        count=2 if batch == "dynamic" else batch,
        length=max(example.shape[2], LEAST_TOKENS) if sequence == "dynamic" else sequence,
    )
    free: dict[int, Any] = {0: Dim(BATCH_AXIS)} if batch == "dynamic" else {}
    free |= {1: Dim(SEQUENCE_AXIS)} if sequence == "dynamic" else {}
    dynamic_shapes = (tuple(free for _ in names),) if free else None
    rows = tuple(row.contiguous() for row in tokens.unbind(1))
    with evaluating(network):
        return _export(_Rows(network), rows, dynamic_shapes, names=names)


def _input_names(network: Any) -> tuple[str, ...]:
    return tuple(str(name) for name in network.input_names)


def text_example(example: Tensor, *, count: int, length: int) -> Tensor:
    """Texts of the example's ids, int64 (count, K, length); each is a token shorter than the one
    before it, down to 1, and padded."""
    tokens = example[:1].long().repeat(count, 1, -(-length // example.shape[2]))[..., :length]
    lengths = (length - torch.arange(count)).clamp(min=1)
    tokens[:, MASK] = (torch.arange(length) < lengths[:, None]).long()
    return tokens


def _from_program(program: ExportedProgram, batch: Batch) -> onnx.ModelProto:
    captured = program_batch(program)
    if captured is not None and captured != batch:
        raise ExportError(
            f"export.batch: {batch} is asked for, and the .pt2 program was captured with a fixed "
            f"batch of {captured}; set export.batch: {captured}, or capture it with "
            'dynamic_shapes=({0: torch.export.Dim("N")},)'
        )
    model = _export(program, None, None)
    if captured is None and isinstance(batch, int):
        model = _fix_batch(model, batch)
    return model


def _export(
    network: nn.Module | ExportedProgram,
    args: tuple[Tensor, ...] | None,
    dynamic_shapes: Any,
    *,
    names: tuple[str, ...] = (INPUT,),
) -> onnx.ModelProto:
    try:
        with quiet(), torch.no_grad(), tempfile.TemporaryDirectory() as folder:
            program = torch.onnx.export(
                network,
                args or (),
                dynamo=True,
                opset_version=OPSET,
                external_data=False,
                input_names=list(names),
                output_names=[OUTPUT],
                dynamic_shapes=dynamic_shapes,
                verbose=False,
                artifacts_dir=folder,
            )
            assert program is not None
            path = Path(folder, "model.onnx")
            program.save(path, external_data=False)
            return onnx.load(path)
    except torch.onnx.errors.OnnxExporterError as error:
        raise ExportError(_explain(error)) from error


def _fix_batch(model: onnx.ModelProto, batch: int) -> onnx.ModelProto:
    """The graph with its free first axis set; inner shapes are inferred anew."""
    for info in (*model.graph.input, *model.graph.output):
        info.type.tensor_type.shape.dim[0].dim_value = batch
    del model.graph.value_info[:]
    return onnx.shape_inference.infer_shapes(model)


def _check(
    model: onnx.ModelProto,
    batch: Batch,
    *,
    names: tuple[str, ...] = (INPUT,),
    sequence: Batch | None = None,
) -> None:
    """The graph is valid, has its inputs and one output, and the sizes that were asked for."""
    found = ([v.name for v in model.graph.input], [v.name for v in model.graph.output])
    if found != ([*names], [OUTPUT]):
        wanted, hint = "one input", "forward() take one image batch and return only its logits"
        if sequence is not None:
            wanted = f"the inputs {', '.join(names)}"
            hint = "answer() use every row and return only the logits"
        raise ExportError(
            f"expected {wanted} and one output, got {len(found[0])} and {len(found[1])}; let {hint}"
        )
    try:
        onnx.checker.check_model(model, full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise ExportError(
            f"torch.onnx.export wrote an invalid graph: {' '.join(str(error).split())[:300]}; "
            "rewrite the part of forward() it names, or report it to PyTorch"
        ) from error
    for info in (*model.graph.input, model.graph.output[0]):
        dims = info.type.tensor_type.shape.dim
        if not dims:
            raise ExportError(f"{info.name}: no shape could be inferred; expected (N, …)")
        got = _size(dims[0])
        if got != batch:
            raise ExportError(
                f"export.batch: {batch} is asked for, and the network fixes the batch of its "
                f"{info.name} to {got}; look for a reshape or view with a constant first size in "
                "forward() (use x.flatten(1) or -1), or set export.batch: 1"
            )
        if sequence is not None and info.name != OUTPUT and _size(dims[1]) != sequence:
            raise ExportError(
                f"export.sequence: {sequence} is asked for, and the network fixes the length of "
                f"its {info.name} to {_size(dims[1])}; look for a constant length in answer(), or "
                "set export.sequence: fixed"
            )


def _size(dim: Any) -> Batch:
    size: Batch = dim.dim_value if dim.HasField("dim_value") else "dynamic"
    return size


def _check_text(
    network: nn.Module, model: onnx.ModelProto, example: Tensor, *, sequence: Batch
) -> None:
    """The graph answers as the network at another batch and length, and ignores padding.

    A length that the tracer took for a constant, or a mask that it folded, shows here and nowhere
    in the shapes.
    """
    length = sequence if sequence != "dynamic" else max(2, example.shape[2] - 1)
    tokens = text_example(example, count=LEAST_TOKENS, length=length).numpy()
    padded = np.concatenate([tokens, tokens[:1]])
    padded[-1, MASK, (length + 1) // 2 :] = 0
    changed = padded.copy()  # other ids, where no text is
    changed[:, 0] = np.where(padded[:, MASK] == 0, padded[:, :1, 0], padded[:, 0])
    with quiet():
        expected = logits_float32(network, padded, batch_size=len(padded))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "model.onnx")
        write_model(model, path)
        session = open_session(path, threads=1)
        try:
            found = run_batches(session, padded, len(padded))
            others = [run_batches(session, padded, 1), run_batches(session, changed, len(changed))]
        except RuntimeFailure as error:
            raise ExportError(
                f"the exported graph does not run on {len(padded)} texts of {length} tokens: "
                f"{error}; look for a constant length in answer()"
            ) from error
    same, said = agrees(expected, found, floor=0.0)
    if not same:
        raise ExportError(
            f"the exported graph answers otherwise than the network on {len(padded)} texts of "
            f"{length} tokens ({said}); look for a constant length, or a branch that depends on "
            "the mask, in answer()"
        )
    for other in others:
        same, said = agrees(found, other, floor=0.0)
        if not same:
            raise ExportError(
                f"the network's answers depend on padding ({said}); let answer() use the "
                "attention mask wherever tokens are mixed or averaged"
            )


def _explain(error: BaseException) -> str:
    """One message from the exporter's chain of errors: what failed, at which line, what to do."""
    chain = _chain(error)
    root = chain[-1]
    where = next((line for link in reversed(chain) if (line := _user_line(link))), "forward()")
    kind = type(root).__name__
    if kind == "DispatchError":
        return (
            f"{_operator(root)}: ONNX has no such operator and PyTorch no decomposition for it; "
            "replace it in forward() by operators of opset 18"
        )
    if "DataDependent" in kind or "Unsupported" in kind:
        return (
            f"{where}: the control flow depends on the values of a tensor, so it has no fixed "
            "graph; write it without `if` or `while` on tensors (torch.where keeps both branches)"
        )
    said = next((line.strip() for line in str(root).splitlines() if line.strip()), kind)
    if "constraint" in str(root).lower() and "dynamic" in str(root).lower():
        return (
            f"{where}: the network only accepts one batch size ({said[:200]}); make forward() "
            "independent of it, or set export.batch: 1"
        )
    return f"{where}: the network cannot be traced for export ({kind}: {said[:300]})"


def _chain(error: BaseException) -> list[BaseException]:
    """The error, what caused it, what caused that, …; outermost first."""
    chain = [error]
    while (cause := chain[-1].__cause__ or chain[-1].__context__) and cause not in chain:
        chain.append(cause)
    return chain


def _operator(root: BaseException) -> str:
    """`aten.linalg_eig.default` from the dispatcher's message."""
    text = str(root)
    name = text.partition("op='")[2].partition("'")[0]
    overload = text.partition("overload='")[2].partition("'")[0]
    return f"operator {name}.{overload}" if name else text.splitlines()[0][:200]


def _user_line(error: BaseException) -> str | None:
    """`net.py:7 (if x.sum() > 0:)`, the innermost line that is neither torch's nor ours."""
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        foreign = frame.filename.startswith(("<", *_NOT_THE_USERS))
        if not foreign and "site-packages" not in frame.filename:
            return f"{frame.filename}:{frame.lineno} ({frame.line})"
    return None
