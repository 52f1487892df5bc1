"""The output folder: what a run withdraws first, what it publishes last, and its manifest.

`model.onnx` appears last, by one rename, after report and manifest, and only on a PASS; anything
else leaves `rejected.onnx`. So a script that copies `model.onnx` can ship neither a model that
failed nor yesterday's. The manifest detects accidents, not somebody who can rewrite it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from .errors import IntegrityError, UsageError
from .report import Report
from .workspace import copy_atomically, file_sha256, write_atomically

MODEL, REJECTED = "model.onnx", "rejected.onnx"
REPORT, MANIFEST = "report.json", "manifest.json"
SAMPLES, TRAINING = "samples.parquet", "training.jsonl"
# In the order in which they are withdrawn: the model first.
FILES = (
    MODEL,
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
    "recipe.yaml",
    "tokenizer.json",
    "vocab.txt",
    "labels.json",
    "golden.jsonl",
)


def withdraw(folder: Path) -> None:
    """Remove everything a former run published here."""
    for name in FILES:
        (folder / name).unlink(missing_ok=True)


def publish(folder: Path, *, model: Path, passed: bool, files: Mapping[str, Path | str]) -> Path:
    """Write `files` (a path is copied, a text is written), the manifest, then the model.

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
    manifest = {"schema_version": "edgestill-manifest/1", "sha256": dict(sorted(hashes.items()))}
    write_atomically(folder / MANIFEST, (json.dumps(manifest, indent=2) + "\n").encode())
    copy_atomically(model, target)
    return target


def read_release(folder: Path) -> Report:
    """The report of a published run, after every file was checked against the manifest.

    Raises:
        UsageError: the folder holds no run.
        IntegrityError: a file is missing, differs from the manifest, or is no report.
    """
    if not folder.is_dir():
        raise UsageError(f"{folder}: no such folder; give the output folder of `compress run`")
    manifest = folder / MANIFEST
    if not manifest.is_file():
        raise UsageError(
            f"{folder}: holds no finished run ({MANIFEST} is missing); run `compress run -o "
            f"{folder}` to the end first"
        )
    for name, expected in sorted(_manifest_hashes(manifest).items()):
        path = folder / name
        if not path.is_file():
            raise IntegrityError(f"{path}: is in the manifest but not in the folder")
        if (got := file_sha256(path)) != expected:
            raise IntegrityError(
                f"{path}: changed since the run: sha256 {got[:12]}…, the manifest says "
                f"{expected[:12]}…; run again"
            )
    for name in (MODEL, REJECTED):
        if (folder / name).is_file() and name not in _manifest_hashes(manifest):
            raise IntegrityError(f"{folder / name}: is not in the manifest; run again")
    try:
        report = Report.model_validate_json((folder / REPORT).read_bytes())
    except ValueError as error:
        raise IntegrityError(
            f"{folder / REPORT}: not a report this version reads: {str(error).splitlines()[0]}"
        ) from None
    _check_samples(folder / SAMPLES, report)
    return report


def _check_samples(path: Path, report: Report) -> None:
    """The counts that the gate reads must be those of the samples that they summarise."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        table = pq.read_table(path)
        labels = table["label"].to_numpy()
        correct = {
            role: table[f"{role}_prediction"].to_numpy() == labels
            for pair in report.pairs
            for role in (pair.reference, pair.candidate)
        }
    except (pa.ArrowException, KeyError) as error:
        raise IntegrityError(f"{path}: does not hold the samples of {REPORT}: {error}") from None
    for pair in report.pairs:
        before, after = correct[pair.reference], correct[pair.candidate]
        found = (len(labels), int((before & ~after).sum()), int((~before & after).sum()))
        if found != (pair.n, pair.lost, pair.gained):
            raise IntegrityError(
                f"{path}: {pair.reference} against {pair.candidate} gives n, lost, gained = "
                f"{found}, {REPORT} says {(pair.n, pair.lost, pair.gained)}; run again"
            )


def _manifest_hashes(manifest: Path) -> dict[str, str]:
    try:
        hashes = json.loads(manifest.read_text(encoding="utf-8"))["sha256"]
        if not {REPORT, SAMPLES} <= set(hashes) or not {MODEL, REJECTED} & set(hashes):
            raise ValueError("report, samples or model are missing from it")
        return dict(hashes)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise IntegrityError(f"{manifest}: not a manifest: {error}") from None
