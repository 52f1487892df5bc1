"""What an ONNX file says of itself, and the rungs that compare two files before any number:
`signature`, `preprocessing`, `classes`.

A file of this project names its classes and how inputs are prepared in its metadata; one of
somebody else's says nothing, and then nothing is compared but shapes.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from onnx import ModelProto, TensorProto, ValueInfoProto

from ...exporters.feeds import is_text
from ...exporters.graph import is_quantized, read_model
from ..data.inputs import Preparation
from ..errors import ExportError, UsageError
from ..recipe import PreprocessSpec, Tokenization
from ..report import RungRecord
from .record import rung

TOKEN_ROWS = ("input_ids", "attention_mask", "token_type_ids")
Shape = tuple[int | None, ...]  # None: free


@dataclass(frozen=True)
class Facts:
    """Attributes:
    input_shape: of the first input; None: the graph does not say.
    classes: C of the logits (N, C), where the graph fixes it.
    class_names, how: of the metadata; None: it does not say.
    """

    path: Path
    inputs: tuple[str, ...]
    input_shape: Shape | None
    dtype: str
    classes: int | None
    is_text: bool
    is_int8: bool
    class_names: tuple[str, ...] | None
    how: Preparation | None


def facts_of(path: Path) -> Facts:
    """Raises: ExportError: not an ONNX file, or its inputs are neither one image nor tokens."""
    model = read_model(path)
    stored = {tensor.name for tensor in model.graph.initializer}
    inputs = [value for value in model.graph.input if value.name not in stored]
    text = is_text(model)
    names = tuple(str(value.name) for value in inputs)
    if text and (len(names) < 2 or names != TOKEN_ROWS[: len(names)]):
        raise ExportError(
            f"{path}: expected the inputs {', '.join(TOKEN_ROWS)} in this order, the last only "
            f"for pairs, got {', '.join(names)}; export it with those"
        )
    if not text and len(names) != 1:
        raise ExportError(
            f"{path}: expected one input, the image, or the tokens {', '.join(TOKEN_ROWS[:2])}, "
            f"got {len(names)}: {', '.join(names) or 'none'}"
        )
    class_names, how = _metadata(model, path)
    out = _shape(model.graph.output[0]) if model.graph.output else None
    kind = inputs[0].type.tensor_type.elem_type
    return Facts(
        path=path,
        inputs=names,
        input_shape=_shape(inputs[0]),
        dtype=TensorProto.DataType.Name(kind).lower(),
        classes=out[1] if out is not None and len(out) == 2 else None,
        is_text=text,
        is_int8=is_quantized(model),
        class_names=class_names,
        how=how,
    )


def refuse_another_task(reference: Facts, model: Facts) -> None:
    """Raises: UsageError: one reads images and the other texts, or other classes."""
    kinds = ["texts" if one.is_text else "images" for one in (reference, model)]
    if kinds[0] != kinds[1]:
        raise UsageError(
            f"{reference.path}: reads {kinds[0]}, and {model.path} reads {kinds[1]}; give a "
            "reference of the same task"
        )
    if reference.classes and model.classes and reference.classes != model.classes:
        raise UsageError(
            f"{reference.path}: tells {reference.classes} classes apart, and {model.path} "
            f"{model.classes}; give a reference of the same task"
        )


def signature_rung(reference: Facts, model: Facts, *, where: str) -> RungRecord:
    """Layout, size and type of the input; a failure makes every number impossible."""
    problems = []
    if reference.dtype != model.dtype:
        problems.append(f"input of {model.dtype}, expected {reference.dtype}")
    theirs, mine = reference.input_shape, model.input_shape
    if theirs is not None and mine is not None and not _fits(theirs, mine):
        turned = len(theirs) == len(mine) == 4 and _fits((theirs[0], *theirs[2:], theirs[1]), mine)
        why = "the layout is NHWC, expected NCHW" if turned else "other axes"
        problems.append(f"input {_dims(mine)}, expected {_dims(theirs)}: {why}")
    if len(reference.inputs) != len(model.inputs):
        problems.append(f"inputs {', '.join(model.inputs)}, expected {', '.join(reference.inputs)}")
    note = "; ".join(problems)
    if not problems and reference.inputs != model.inputs:
        note = f"called {model.inputs[0]!r}, in the reference {reference.inputs[0]!r}"
    return rung("signature", where, passed=not problems, note=note)


def preprocessing_rung(theirs: Preparation | None, mine: Preparation | None) -> RungRecord:
    """What the two say of how inputs are prepared."""
    if theirs is None or mine is None:
        who = "neither" if theirs is mine else "the reference alone" if mine is None else "it alone"
        note = f"{who} says how inputs are prepared: nothing to compare"
        return rung("preprocessing", "metadata", passed=True, note=note)
    if type(theirs) is not type(mine):
        return rung("preprocessing", "metadata", passed=False, note="one is of texts")
    before, after = (one.model_dump(mode="json") for one in (theirs, mine))
    different = [
        f"{key} is {after[key]}, in the reference {before[key]}"
        for key in before
        if before[key] != after[key] and before[key] is not None
    ]
    return rung("preprocessing", "metadata", passed=not different, note="; ".join(different))


def classes_rung(theirs: tuple[str, ...] | None, mine: tuple[str, ...] | None) -> RungRecord:
    """Names and order of the classes."""
    if theirs is None or mine is None:
        return rung("classes", "metadata", passed=True, note="not both name their classes")
    moved = [
        f"output {at} is {new!r}, in the reference {old!r}"
        for at, (old, new) in enumerate(zip(theirs, mine, strict=False))
        if old != new
    ]
    if len(theirs) != len(mine):
        moved.append(f"{len(mine)} names, in the reference {len(theirs)}")
    note = "; ".join(moved[:6]) + (f"; {len(moved) - 6} more" if len(moved) > 6 else "")
    return rung("classes", "metadata", passed=not moved, note=note)


def _metadata(model: ModelProto, path: Path) -> tuple[tuple[str, ...] | None, Preparation | None]:
    found = {entry.key: entry.value for entry in model.metadata_props}
    try:
        names = json.loads(found.get("edgestill.class_names", "null"))
        stored = json.loads(found.get("edgestill.preprocess", "null"))
        if stored is None:
            return None if names is None else tuple(map(str, names)), None
        kind: Any = Tokenization if "tokenizer_sha256" in stored else PreprocessSpec
        how = kind.model_validate({k: stored[k] for k in kind.model_fields if k in stored})
    except (ValueError, TypeError) as error:
        raise ExportError(
            f"{path}: its metadata edgestill.… cannot be read: {' '.join(str(error).split())[:200]}"
            "; export it again"
        ) from error
    return None if names is None else tuple(map(str, names)), how


def _shape(value: ValueInfoProto) -> Shape | None:
    tensor = value.type.tensor_type
    if not tensor.HasField("shape"):
        return None
    return tuple(dim.dim_value or None for dim in tensor.shape.dim)


def _fits(one: Shape, other: Shape) -> bool:
    return len(one) == len(other) and all(
        a is None or b is None or a == b for a, b in zip(one[1:], other[1:], strict=True)
    )


def _dims(shape: Shape) -> str:
    return f"({', '.join('N' if size is None else str(size) for size in shape)})"
