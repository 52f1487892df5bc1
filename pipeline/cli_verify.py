"""`compress verify`: parse, call, print, exit code. Nothing heavy is imported before it is needed:
a golden bundle is replayed with numpy and onnxruntime alone.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from .cli_options import given, preparation_options
from .errors import IntegrityError, UsageError

if TYPE_CHECKING:
    from .data.inputs import Preparation
    from .verify.record import Verification
    from .verify.samples import Set

FILE = click.Path(path_type=Path)
GOLDEN = "golden.json"  # as verify/replay.py
CPUS = ("arm", "x86", "x86-vnni")
VERIFY_OPTIONS = (
    click.option(
        "--reference",
        type=FILE,
        metavar="REF",
        help="What it must compute: folder of a run, another .onnx, a recipe.yaml with weights, or "
        "a golden bundle.",
    ),
    click.option(
        "--data", help="Test set: image folder, .parquet, digits; of texts .csv, .tsv, .jsonl."
    ),
    click.option("--unlabelled", is_flag=True, help="--data has no labels, or wrong ones."),
    click.option("--tokenizer", type=FILE, help="tokenizer.json or its folder; else beside MODEL."),
    click.option("--max-length", type=click.IntRange(min=3), help="Tokens a text is cut at."),
    click.option("--text", metavar="COLUMN", help="Of texts, by name or position from 0."),
    click.option("--pair", metavar="COLUMN", help="A second text."),
    click.option("--label", metavar="COLUMN", help="Likewise."),
    click.option(
        "--targets", metavar="LIST", help="CPUs it is for: arm, x86, x86-vnni.  [the run's]"
    ),
    click.option(
        "--max-drop",
        type=click.FloatRange(0, 100),
        default=1.0,
        show_default=True,
        metavar="POINTS",
        help="Accuracy that it may lose against REF.",
    ),
    click.option(
        "--device",
        "devices",
        multiple=True,
        metavar="NAME",
        help="Of devices.yaml: must answer as this machine does, on up to 1,000 samples.",
    ),
    click.option("--write-golden", type=FILE, metavar="DIR", help="Keep inputs and answers there."),
    click.option("--json", "as_json", is_flag=True, help="Print the record as JSON."),
)


@dataclass(frozen=True)
class _Asked:
    """The command line, parsed."""

    reference: Path | None
    data: str | None
    unlabelled: bool
    tokenizer: Path | None
    max_length: int | None
    text: str | None
    pair: str | None
    label: str | None
    targets: str | None
    max_drop: float
    devices: tuple[str, ...]
    write_golden: Path | None
    as_json: bool


def _options(command: Callable[..., int]) -> Callable[..., int]:
    for option in reversed(VERIFY_OPTIONS):
        command = option(command)
    return command


@click.command()
@click.argument("model", type=FILE)
@_options
@preparation_options
def verify(model: Path, **options: Any) -> int:
    """Hold MODEL.onnx against REF, rung by rung: what differs, and where it enters.

    Without --reference: what runs in int8 kernels on this machine, what does not, and why.
    """
    images = {name: options.pop(name) for name in ("mean", "std", "resize", "crop")}
    asked = _Asked(**options)
    if asked.reference is not None and (asked.reference / GOLDEN).is_file():
        _refuse_beside_bundle(asked)
        return _say(_replayed(model, asked.reference), asked)
    if asked.reference is None and asked.devices:
        raise UsageError("--device: is asked whether MODEL holds there too; give --reference REF")
    if asked.reference is None and asked.as_json:
        raise UsageError("--json: prints what was held against a reference; give --reference REF")
    data, how = _set(asked), _preparation(model, asked, images)
    if asked.reference is not None:
        if data is None:
            raise UsageError("--reference: both are asked on real samples; give --data TEST")
        return _say(_verified(model, asked, data, how), asked)
    from .measure.machine import available_threads
    from .verify.file import audit_file

    threads = available_threads()
    click.echo(audit_file(model, data=data, how=how, threads=threads))
    if asked.write_golden is not None:
        if data is None:
            raise UsageError("--write-golden: answers are to real samples; give --data TEST")
        from .verify.golden import make_bundle

        count = make_bundle(asked.write_golden, model, data, how=how, threads=threads)
        click.echo(f"{asked.write_golden}: {count} golden answers")
    return 0


def _refuse_beside_bundle(asked: _Asked) -> None:
    for option, value in {
        "--data": asked.data, "--write-golden": asked.write_golden, "--device": asked.devices,
    }.items():  # fmt: skip
        if value:
            raise UsageError(
                f"{option}: {asked.reference} is a golden bundle, which has its own inputs and "
                f"answers; leave {option} out"
            )


def _say(found: Verification, asked: _Asked) -> int:
    from .verify.record import as_text

    click.echo(found.model_dump_json(indent=1) if asked.as_json else as_text(found))
    return found.exit_code


def _verified(model: Path, asked: _Asked, data: Set, how: Preparation | None) -> Verification:
    from .measure.machine import available_threads
    from .profile.devices import device_named
    from .profile.transport import opened
    from .verify.check import Wish, verify_file

    assert asked.reference is not None
    named = {name: device_named(name, Path.cwd()) for name in asked.devices}
    wish = Wish(
        reference=asked.reference,
        data=data,
        how=how,
        targets=_targets(asked.targets),
        max_drop_points=asked.max_drop,
        golden=asked.write_golden,
        elsewhere=[partial(opened, name, one) for name, one in named.items()],
        threads=available_threads(),
    )
    return verify_file(model, wish)


def _replayed(model: Path, folder: Path) -> Verification:
    from datetime import UTC, datetime

    from .. import __version__
    from .report import RungRecord
    from .verify.record import Verification
    from .verify.replay import Tampered, Unusable, replay

    try:
        found = replay(model, folder)
    except Tampered as error:
        raise IntegrityError(str(error)) from error
    except Unusable as error:
        raise UsageError(str(error)) from error
    return Verification(
        tool_version=__version__,
        created_utc=datetime.now(UTC).isoformat(timespec="seconds"),
        model=str(model),
        model_sha256=found["model_sha256"],
        reference=str(folder),
        reference_kind="golden",
        n=found["golden"]["n"],
        rungs=tuple(RungRecord(**one) for one in found["rungs"]),
        environment=found["environment"],
    )


def _set(asked: _Asked) -> Set | None:
    if asked.data is None:
        return None
    from .data.text_readers import Columns
    from .verify.samples import Set

    columns = Columns(
        text=_column(asked.text), label=_column(asked.label), pair=_column(asked.pair)
    )
    return Set(
        path=Path(asked.data),
        labelled=not asked.unlabelled,
        tokenizer=asked.tokenizer,
        max_length=asked.max_length,
        columns=columns,
    )


def _column(said: str | None) -> str | int | None:
    return int(said) if said is not None and said.isdecimal() else said


def _preparation(model: Path, asked: _Asked, images: dict[str, Any]) -> Preparation | None:
    """Of images, where the command line says any of it; None: as the files say."""
    if all(value is None for value in images.values()):
        return None
    from .file_recipe import preprocess_of
    from .recipe import PreprocessSpec

    return PreprocessSpec.model_validate(
        preprocess_of(model, given(asked.data or "", None, **images))
    )


def _targets(said: str | None) -> tuple[str, ...] | None:
    if said is None:
        return None
    targets = tuple(part.strip() for part in said.split(","))
    if unknown := [one for one in targets if one not in CPUS]:
        raise UsageError(f"--targets: expected some of {', '.join(CPUS)}, got {unknown[0]!r}")
    return targets
