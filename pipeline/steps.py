"""The stages as `flow.py` calls them: each names what it reads, so that it is recalled exactly
when nothing it reads has changed, and hands its work to the capability that does it. Those that
learn are in `learning.py`, what is timed in `timing.py`; what the report makes of all is in
`record.py`. What needs torch is imported where it is called: a float .onnx is quantized, proven and
timed without it.
"""

from __future__ import annotations

import datetime
import hashlib
import json
from functools import partial
from pathlib import Path
from typing import Any

from . import release, timing
from .data.stage import prepare_data as prepare
from .data.stage import source_fingerprint
from .errors import UsageError
from .gate import check_policy
from .measure.machine import clips_int8
from .measure.paired import provable_drop
from .mobile import write_mobile
from .onnx_file import take_float as take
from .quantize.dynamic import quantize_dynamic as dynamic
from .quantize.fallback import return_to_float
from .quantize.ptq import quantize_static
from .recipe import QuantizeSpec, Recipe
from .record import Models, baseline_note
from .stage import Artifact
from .text_release import text_files
from .verify.evidence import gather
from .work import Work, memory_budget, model_of, open_sets, run_stage, without_paths
from .workspace import file_sha256


def prepare_data(work: Work) -> Artifact:
    spec = work.recipe.data
    work.data_fingerprint = source_fingerprint(spec)
    return run_stage(
        work,
        "data",
        lambda context: prepare(spec, context=context),
        reads={"spec": without_paths(spec.model_dump(mode="json")), "data": work.data_fingerprint},
    )


def say_what_can_be_proven(work: Work, data: Artifact) -> None:
    """The smallest drop that this test set can prove, said before hours are spent on it, and a CPU
    that cannot vouch for int8; a gate that could not be judged in the end is refused."""
    check_policy(work.recipe.gate, today=datetime.date.today())
    _warn_of_clipping(work)
    gate, n = work.recipe.gate, len(open_sets(work, data).test.labels)
    if gate.max_drop_points is None:
        return
    perfect, usual = (
        100 * provable_drop(n, flips=flips, confidence=gate.confidence) for flips in (0.0, 0.04)
    )
    text = (
        f"{n} test samples can prove a drop of at most {perfect:.2f} points for a model that "
        f"answers as its reference does, {usual:.2f} where 4 % of the answers differ "
        f"(limit {gate.max_drop_points:g}, confidence {gate.confidence:g})"
    )
    if perfect > gate.max_drop_points:
        text += ": too few for this limit, so only a model better than its reference could pass"
    work.notes.append(text)
    work.workspace.events.note(text)


def _warn_of_clipping(work: Work) -> None:
    spec = work.recipe.quantize
    if spec is None or "x86" in spec.targets or not clips_int8():
        return
    text = (
        "WARNING: this x86 CPU has no VNNI and clips the sums of 8-bit weights, and "
        f"quantize.targets ({', '.join(spec.targets)}) leaves x86 out: what int8 answers here, and "
        "its accuracy, are not the targets'; add x86 to quantize.targets, or run on a target"
    )
    work.notes.append(text)
    work.workspace.events.note(text)


def take_float(work: Work, data: Artifact) -> Artifact:
    """The float .onnx that was given, as the export stage leaves one."""
    path, spec = Path(work.recipe.student.model), work.recipe.export
    work.origins["student"] = _file_hash(path)
    metadata = {"edgestill.recipe_sha256": recipe_sha256(work)}
    return run_stage(
        work,
        "float",
        lambda context: take(
            path, data.path, spec, context=context, metadata=metadata,
            memory_budget_bytes=memory_budget(work),
        ),
        reads={
            "spec": spec.content,
            "metadata": metadata,
            "file": work.origins["student"],
            "data": data.sha256,
        },
    )  # fmt: skip


def _file_hash(path: Path) -> str:
    try:
        return file_sha256(path)
    except OSError as error:
        raise UsageError(f"{path}: cannot be read: {error.strerror}; check the path") from None


def prune(
    work: Work, data: Artifact, network: Artifact, dense: Artifact, *, step: int
) -> list[Path]:
    """Folders of cut networks on the way to the target, the most promising first."""
    from .prune.stage import prune as cut

    spec = work.recipe.prune
    assert spec is not None
    sequence = timing.sequences(work, data)[0]
    found = run_stage(
        work,
        f"prune-{step}",
        lambda context: cut(
            network.path, dense.path, data.path, spec, step=step, context=context,
            memory_budget_bytes=memory_budget(work), sequence=sequence,
        ),
        reads={
            "spec": spec.model_dump(mode="json", exclude={"recover"}),
            "step": step,
            "sequence": sequence,
            "inputs": [data.sha256, network.sha256, dense.sha256],
        },
    )  # fmt: skip
    return sorted(found.path.glob("[1-9]"))


def export_student(work: Work, data: Artifact, student: Artifact, *, mark: str) -> Artifact:
    """mark: of which network, where there are several, e.g. `-pruned-1`."""
    return _export(work, f"export{mark}", student, data)


def export_teacher(work: Work, data: Artifact, teacher: Artifact) -> Artifact | None:
    """The teacher's float ONNX: what speed-up and size are measured against."""
    return _export(work, "export-teacher", teacher, data) if work.recipe.profile else None


def quantize(work: Work, data: Artifact, floating: Artifact, *, mark: str) -> Artifact:
    """int8 by calibration alone."""
    return _int8(work, f"int8{mark}", quantize_static, data, [floating])


def quantize_dynamic(work: Work, data: Artifact, floating: Artifact, *, mark: str) -> Artifact:
    """int8 whose activations are measured as it runs."""
    return _int8(work, f"int8-dynamic{mark}", dynamic, data, [floating])


def quantize_equalized(
    work: Work, data: Artifact, floating: Artifact, *, mark: str
) -> Artifact | None:
    """int8 by calibration of the equalized graph. None: it has no layers to equalize, or is so."""
    from ..exporters.equalize import pairs_of
    from ..exporters.graph import read_model

    spec = work.recipe.quantize
    assert spec is not None
    if spec.equalize or not pairs_of(read_model(model_of(floating))):
        return None
    spec = spec.model_copy(update={"equalize": True})
    return _int8(work, f"int8-equalized{mark}", quantize_static, data, [floating], spec=spec)


def fall_back(work: Work, data: Artifact, floating: Artifact, *, mark: str) -> Artifact:
    """int8 but for the layers that lose most."""
    limit = quantization_limit(work.recipe)
    stage = partial(return_to_float, limit_points=limit)
    return _int8(work, f"int8-fallback{mark}", stage, data, [floating], limit=limit)


def train_qat(
    work: Work, data: Artifact, floating: Artifact, ptq: Artifact, *, mark: str
) -> Artifact:
    """int8 trained with its rounding, from where calibration has left it."""
    from .quantize.qat_stage import quantize_aware

    stage = partial(quantize_aware, ptq_artifact=ptq.path)
    return _int8(work, f"int8-qat{mark}", stage, data, [floating, ptq])


def quantization_limit(recipe: Recipe) -> float:
    """Points that int8 may lose against its float model, on validation."""
    limit = recipe.gate.max_quantization_drop_points
    if limit is None and recipe.quantize is not None:
        limit = recipe.quantize.max_drop_points
    return 0.0 if limit is None else limit


def _int8(
    work: Work,
    name: str,
    stage: Any,
    data: Artifact,
    inputs: list[Artifact],
    *,
    spec: QuantizeSpec | None = None,
    **more: Any,
) -> Artifact:
    """spec: None: the recipe's own."""
    spec, export = spec or work.recipe.quantize, work.recipe.export
    assert spec is not None
    return run_stage(
        work,
        name,
        lambda context: stage(
            inputs[0].path, data.path, spec, context=context, export=export,
            memory_budget_bytes=memory_budget(work),
        ),
        reads={
            "spec": spec.model_dump(mode="json"),
            "export": export.content,
            "inputs": [data.sha256, *(one.sha256 for one in inputs)],
            **more,
        },
    )  # fmt: skip


def verify(work: Work, data: Artifact, models: Models) -> Artifact:
    """Parity rung by rung, and every model once over the whole test set."""
    networks = {
        "teacher": models.teacher,
        "dense": models.dense,
        "student": models.student,
        "baseline": models.baseline,
    }
    present = {role: one for role, one in networks.items() if one is not None}
    evidence = run_stage(
        work,
        "verify",
        lambda context: gather(
            data.path,
            networks={role: one.path for role, one in present.items()},
            floating=models.floating.path,
            int8=models.deployed.path if models.is_quantized else None,
            reference=models.reference,
            context=context,
            memory_budget_bytes=memory_budget(work),
        ),
        reads={
            "data": data.sha256,
            "networks": {role: one.sha256 for role, one in present.items()},
            "files": [models.floating.sha256, models.deployed.sha256],
        },
    )
    gained = baseline_note(dict(evidence.measurements))
    if gained is not None:
        work.notes.append(gained)
        work.workspace.events.note(gained)
    return evidence


def files_beside(work: Work, data: Artifact, models: Models) -> dict[str, Path | str]:
    """What the deployed file is used with: of texts the tokenizer, labels and golden answers."""
    if not work.recipe.is_text:
        return {}
    names = open_sets(work, data).class_names
    model, threads = model_of(models.deployed), work.workspace.threads
    return text_files(data.path, model, class_names=names, threads=threads)


def other_formats(work: Work, data: Artifact, models: Models) -> dict[str, Path]:
    """The file that goes on, in the further formats that the recipe asks for, by file name."""
    if "ort" not in work.recipe.export.format:
        return {}
    model = model_of(models.deployed)
    made = run_stage(
        work,
        "ort",
        lambda context: write_mobile(model, data.path, context=context),
        reads={"inputs": [data.sha256, models.deployed.sha256]},
    )
    return {name: made.path / name for name in release.MOBILE}


def _export(work: Work, name: str, network: Artifact, data: Artifact) -> Artifact:
    from .export import export_float

    spec = work.recipe.export
    metadata = {"edgestill.recipe_sha256": recipe_sha256(work)}
    return run_stage(
        work,
        name,
        lambda context: export_float(
            network.path, data.path, spec, context=context, metadata=metadata
        ),
        reads={
            "spec": spec.content,
            "metadata": metadata,
            "inputs": [data.sha256, network.sha256],
        },
    )


def recipe_sha256(work: Work) -> str:
    """Of the sections up to export, with every path replaced by the hash of what it names."""
    sections = work.recipe.model_dump(
        mode="json",
        include={
            "task",
            "seed",
            "data",
            "teacher",
            "student",
            "distill",
            "prune",
            "quantize",
        },
    ) | {"export": work.recipe.export.content}
    document = {
        **without_paths(sections),
        "data_sha256": work.data_fingerprint,
        "origins": work.origins,
    }
    return hashlib.sha256(json.dumps(document, sort_keys=True).encode()).hexdigest()
