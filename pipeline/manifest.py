"""manifest.json: the sha256 of every file that a run published, written last and read first.

It detects accidents: a file that changed, is missing, was added, or belongs to another run. Whoever
can rewrite the folder can rewrite the manifest too; its own sha256, kept elsewhere, or a signature
over it (`signature.py`) detects that as well. Whatever is wrong here is an IntegrityError, exit 6.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from .errors import IntegrityError, UsageError
from .workspace import file_sha256

SCHEMA = "edgestill-manifest/1"
MAX_BYTES = 1 << 20  # ours take 2 kB; a limit before anything is parsed
MAX_NAME = 200  # characters; file systems take 255 bytes a component
HEX = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class Manifest:
    """`sha256` of manifest.json itself, and of each file by its name, both in lower-case hex."""

    path: Path
    content: bytes
    sha256: str
    files: Mapping[str, str]

    @property
    def folder(self) -> Path:
        return self.path.parent


def manifest_bytes(files: Mapping[str, str]) -> bytes:
    """manifest.json for file name → sha256; equal inputs give equal bytes."""
    document = {"schema_version": SCHEMA, "sha256": dict(sorted(files.items()))}
    return (json.dumps(document, indent=2) + "\n").encode()


def read_manifest(path: Path, *, expected_sha256: str | None = None) -> Manifest:
    """The manifest in `path`, read once.

    Args:
        expected_sha256: of the file itself, 64 hexadecimal digits, as `compress run` printed it.
            None: its content is taken as it is.

    Raises:
        UsageError: `expected_sha256` is no sha256.
        IntegrityError: another hash, or not a manifest that this version reads.
    """
    wanted = None if expected_sha256 is None else _hex(expected_sha256)
    with path.open("rb") as handle:
        content = handle.read(MAX_BYTES + 1)
    if len(content) > MAX_BYTES:
        raise IntegrityError(f"{path}: not a manifest: expected at most {MAX_BYTES} bytes")
    found = hashlib.sha256(content).hexdigest()
    if wanted is not None and found != wanted:
        raise IntegrityError(
            f"{path}: is not the manifest that was asked for: expected sha256 {wanted}, got "
            f"{found}; this is another run, or somebody changed it: judge the folder that "
            "`compress run` made, or run again"
        )
    return Manifest(path, content, found, _files(path, content))


def check_files(manifest: Manifest, *, ours: Collection[str]) -> None:
    """Every file of the manifest is in the folder and unchanged, and no other is named like one.

    Args:
        ours: names that a run may publish; one of them beside the manifest is a stranger.

    Raises:
        IntegrityError: the first file that is missing, changed, strange, or a link out of it.
    """
    home = manifest.folder.resolve()
    for name, expected in sorted(manifest.files.items()):
        path = manifest.folder / name
        if not _target(path).is_relative_to(home):
            raise IntegrityError(f"{path}: links out of the folder to {_target(path)}; run again")
        if not path.is_file():
            raise IntegrityError(f"{path}: is in the manifest but not in the folder; run again")
        if (got := file_sha256(path)) != expected:
            raise IntegrityError(
                f"{path}: changed since the run: sha256 {got[:12]}…, the manifest says "
                f"{expected[:12]}…; run again"
            )
    for name in ours:
        path = manifest.folder / name
        is_there = path.exists() or path.is_symlink()
        if is_there and name not in manifest.files and path != manifest.path:
            raise IntegrityError(
                f"{path}: is not in the manifest, so not of this run; remove it, or run again"
            )


def _target(path: Path) -> Path:
    try:
        return path.resolve()
    except (OSError, RuntimeError) as error:  # RuntimeError: a loop of links, until Python 3.13
        raise IntegrityError(f"{path}: leads nowhere: {error}; run again") from None


def _hex(text: str) -> str:
    digits = text.strip().lower().removeprefix("sha256:")
    if not HEX.fullmatch(digits):
        raise UsageError(
            f"expected the sha256 of a manifest, 64 hexadecimal digits, got {text!r}; "
            "`compress run` prints it at its end, and `compress report DIR`"
        )
    return digits


def _files(path: Path, content: bytes) -> dict[str, str]:
    try:
        document = json.loads(content.decode("utf-8"), object_pairs_hook=_without_twins)
        version, files = document["schema_version"], document["sha256"]
        if version != SCHEMA:
            raise ValueError(
                f"its schema_version is {version!r}, this version of edgestill reads {SCHEMA!r}; "
                "use the edgestill that wrote it, or a newer one"
            )
        if not isinstance(files, dict) or not files:
            raise ValueError("it names no file")
        for name, digest in files.items():
            _check_entry(name, digest)
        return dict(files)
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        what = f"{error} is missing" if isinstance(error, KeyError) else error
        raise IntegrityError(f"{path}: not a manifest: {what}") from None


def _without_twins(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """json.loads keeps the last of two equal keys; another reader may keep the first."""
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a key is there twice")
    return found


def _check_entry(name: str, digest: Any) -> None:
    parts = PurePosixPath(name).parts
    is_plain = "\\" not in name and name.isprintable() and str(PurePosixPath(name)) == name
    if not parts or name.startswith("/") or ".." in parts or not is_plain or len(name) > MAX_NAME:
        raise ValueError(f"{name[:80]!r} is no path inside the folder")
    if not isinstance(digest, str) or not HEX.fullmatch(digest):
        raise ValueError(f"{name!r} has {digest!r} instead of a sha256")
