"""The output folder: what a run withdraws first, what it publishes last, and its manifest.

`model.onnx` appears last, by one rename, after report and manifest, and only on a PASS; anything
else leaves `rejected.onnx`. So a script that copies `model.onnx` can ship neither a model that
failed nor yesterday's; nor can one that copies `model.ort`. What the manifest detects is in
`manifest.py`; that the files agree with one another, in `consistency.py`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import ValidationError

from .. import __version__
from .errors import IntegrityError, UsageError
from .manifest import Manifest, check_files, manifest_bytes, read_manifest
from .report import Report
from .signature import Signed, check_signature
from .workspace import copy_atomically, file_sha256, write_atomically

if TYPE_CHECKING:
    from .gates.samples import Samples

MODEL, REJECTED = "model.onnx", "rejected.onnx"
MOBILE = ("model.ort", "model.required_operators.config")  # with `export.format: [onnx, ort]`
REPORT, MANIFEST = "report.json", "manifest.json"
SAMPLES, TRAINING, RECIPE = "samples.parquet", "training.jsonl", "recipe.yaml"
# In the order in which they are withdrawn: the model first.
FILES = (
    MODEL,
    *MOBILE,
    REJECTED,
    MANIFEST,
    REPORT,
    "report.md",
    SAMPLES,
    TRAINING,
    "model.fp32.onnx",
    "student.safetensors",
    "student.json",
    "student.pt2",
    RECIPE,
    "tokenizer.json",
    "vocab.txt",
    "labels.json",
    "golden.jsonl",
)


def withdraw(folder: Path) -> None:
    """Remove everything a former run published here."""
    for name in FILES:
        (folder / name).unlink(missing_ok=True)


def publish(
    folder: Path,
    *,
    model: Path,
    passed: bool,
    files: Mapping[str, Path | str],
    formats: Mapping[str, Path],
) -> Path:
    """Write `files` (a path is copied, a text is written), the manifest, then the model.

    Args:
        formats: the model in further formats. They could ship too, so they appear only if it
            passed, and after the manifest.

    Returns:
        Where the model stands: `model.onnx` if it passed, else `rejected.onnx`.
    """
    hashes = {}
    for name, content in files.items():
        if isinstance(content, Path):
            copy_atomically(content, folder / name)
        else:
            write_atomically(folder / name, content.encode())
        hashes[name] = file_sha256(folder / name)
    target = folder / (MODEL if passed else REJECTED)
    hashes[target.name] = file_sha256(model)
    shipped = formats if passed else {}
    hashes |= {name: file_sha256(path) for name, path in shipped.items()}
    write_atomically(folder / MANIFEST, manifest_bytes(hashes))
    for name, path in shipped.items():
        copy_atomically(path, folder / name)
    copy_atomically(model, target)
    return target


@dataclass(frozen=True)
class Release:
    """A published run whose files are what its manifest says and agree with one another."""

    folder: Path
    model: Path  # model.onnx, or rejected.onnx
    report: Report
    samples: Samples
    manifest: Manifest
    signed: Signed | None = None  # whose signature over the manifest was checked


def read_release(
    folder: Path, *, manifest_sha256: str | None = None, signed: Signed | None = None
) -> Release:
    """A published run, after every file was checked against the manifest and the others.

    Args:
        folder: output folder of a finished run.
        manifest_sha256: what the manifest itself must be, 64 hexadecimal digits; None: not known,
            then a consistent forgery goes unseen (README, "What it is bound to").
        signed: a signature over the manifest and the key that it must be of.

    Raises:
        UsageError: the folder holds no run, or `manifest_sha256` is no sha256.
        IntegrityError: a file is missing, strange, or differs from the manifest; the report is
            none, or of another version; or files contradict one another.
    """
    from .consistency import check_consistency
    from .gates.samples import read_samples

    if not folder.is_dir():
        raise UsageError(f"{folder}: no such folder; give the output folder of `compress run`")
    if not (folder / MANIFEST).is_file():
        raise UsageError(
            f"{folder}: holds no finished run ({MANIFEST} is missing); run `compress run -o "
            f"{folder}` to the end first"
        )
    manifest = read_manifest(folder / MANIFEST, expected_sha256=manifest_sha256)
    if signed is not None:
        check_signature(manifest, signed)
    models = {MODEL, REJECTED} & set(manifest.files)
    if not {REPORT, SAMPLES, RECIPE} <= set(manifest.files) or len(models) != 1:
        raise IntegrityError(
            f"{folder / MANIFEST}: not a manifest of a run: expected {REPORT}, {SAMPLES}, {RECIPE} "
            f"and either {MODEL} or {REJECTED} in it"
        )
    check_files(manifest, ours=FILES)
    report = _read_report(folder / REPORT)
    release = Release(
        folder=folder,
        model=folder / models.pop(),
        report=report,
        samples=read_samples(folder / SAMPLES),
        manifest=manifest,
        signed=signed,
    )
    check_consistency(release)
    return release


def _read_report(path: Path) -> Report:
    content = path.read_bytes()
    ours = str(Report.model_fields["schema_version"].default)
    try:
        document = json.loads(content)
        version = document.get("schema_version") if isinstance(document, dict) else None
        if version != ours:
            raise IntegrityError(
                f"{path}: its schema_version is {version!r}, edgestill {__version__} reads "
                f"{ours!r}; use the edgestill that wrote it, or a newer one"
            )
        return Report.model_validate_json(content)
    except (ValueError, RecursionError) as error:
        raise IntegrityError(
            f"{path}: not a report this version reads: {_first_problem(error)}"
        ) from None


def _first_problem(error: Exception) -> str:
    if isinstance(error, ValidationError):
        first = error.errors()[0]
        return f"{'.'.join(map(str, first['loc'])) or 'the whole'}: {first['msg']}"
    return str(error).splitlines()[0]
