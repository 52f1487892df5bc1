"""`compress profile` and `compress devices`: parse, call, print, exit code. Nothing heavy is
imported before it is needed.
"""

from __future__ import annotations

import re
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from .cli_options import given, preparation_options
from .errors import IntegrityError, UsageError

if TYPE_CHECKING:
    from .profile.inputs import Fed, Signature
    from .profile.measure import Wish
    from .profile.record import ProfileRecord

FILE = click.Path(path_type=Path)
DATA_SAMPLES = 64
SPINNING: dict[str, tuple[bool | None, ...]] = {
    "default": (None,), "on": (True,), "off": (False,), "both": (True, False),
}  # fmt: skip
UNITS = {"s": 1.0, "m": 60.0, "h": 3600.0}


@dataclass(frozen=True)
class _Source:
    """What the command line says of the inputs."""

    data: str | None
    inputs: Path | None
    tokenizer: Path | None
    images: dict[str, Any]


@click.command()
@click.argument("model", type=FILE)
@click.option("--device", "names", multiple=True, metavar="NAME", help="Repeatable.  [local]")
@click.option("--data", metavar="D", help="Real samples: image folder, .parquet, digits, texts.")
@click.option("--inputs", type=FILE, metavar="F", help="Real inputs as .npy or .npz.")
@click.option("--tokenizer", type=FILE, help="Of texts: tokenizer.json or its folder.")
@click.option("--threads", default="1", show_default=True, metavar="LIST", help="1,2,4 or sweep.")
@click.option("--quick", is_flag=True, help="3 launches instead of 10.")
@click.option("--strict", is_flag=True, help="1,024 runs a launch, after 60 s of rest.")
@click.option("--rate", type=click.FloatRange(0.01, 10_000), metavar="HZ", help="Also paced.")
@click.option("--sustained", metavar="TIME", help="Also without a rest for so long, e.g. 30m.")
@click.option("--baseline", type=FILE, metavar="OLD.onnx", help="Measured in turns with MODEL.")
@click.option(
    "--spinning", type=click.Choice(list(SPINNING)), default="default", show_default=True,
    help="Threads that wait by computing.",
)  # fmt: skip
@click.option("--affinity", metavar="CPUS", help="0,1 or 2-3: these CPUs; clusters: each kind.")
@click.option("--why", is_flag=True, help="Also what takes the time here, and what to change.")
@click.option("--fresh", is_flag=True, help="With --why: measure this machine's peaks again.")
@click.option("--json", "as_json", is_flag=True, help="Print the record as JSON.")
@click.option("-o", "--out", type=FILE, metavar="DIR", help="Write profile.json and profile.md.")
@preparation_options
def profile(model: Path, **options: Any) -> int:
    """How fast MODEL.onnx is on each device, with which certainty.

    Inputs are the golden ones beside MODEL, where there are any; else --data or --inputs; else
    noise of the right shape, which is said.
    """
    from .profile.inputs import signature_of
    from .profile.text import as_markdown, as_text
    from .workspace import write_atomically

    if options["quick"] and options["strict"]:
        raise UsageError("--quick: contradicts --strict; give one of them")
    images = {name: options[name] for name in ("mean", "std", "resize", "crop")}
    source = _Source(options["data"], options["inputs"], options["tokenizer"], images)
    signature = signature_of(model)
    wish = _wish(model, signature, _fed(model, signature, source), options)
    names = tuple(dict.fromkeys(options["names"])) or ("local",)
    _check_why(names, options)
    record = _measured(wish, names, quiet=options["as_json"])
    if options["why"]:
        record = _explained(record, wish, fresh=options["fresh"])
    out: Path | None = options["out"]
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        write_atomically(out / "profile.json", record.model_dump_json(indent=1).encode())
        write_atomically(out / "profile.md", as_markdown(record).encode())
    click.echo(record.model_dump_json(indent=1) if options["as_json"] else as_text(record))
    return record.exit_code


@click.group()
def devices() -> None:
    """The machines that models are measured on (devices.yaml)."""


@devices.command("list")
def list_devices() -> int:
    """Names, kinds and addresses."""
    from .profile.devices import EmulatedDevice, SshDevice, known_devices

    for name, one in known_devices(Path.cwd()).items():
        where = "this machine"
        if isinstance(one, SshDevice):
            where = one.host
        elif isinstance(one, EmulatedDevice):
            where = f"{one.cpu} in {one.sysroot}"
        click.echo(f"{name:<16} {one.kind:<9} {where}")
    return 0


@devices.command("check")
@click.argument("name")
@click.option("--model", type=FILE, help="Whether this file would run there.")
@click.option("--threads", type=click.IntRange(min=1), default=1, show_default=True)
def check_device(name: str, model: Path | None, threads: int) -> int:
    """What NAME is, which int8 kernels it takes, and what will go wrong."""
    from .profile.check import check
    from .profile.devices import device_named

    found = check(name, device_named(name, Path.cwd()), model=model, threads=threads)
    for line in found.lines:
        click.echo(line)
    for one in found.findings:
        click.echo(f"{one.severity.upper():<9} {one.code}: {one.text}")
    return found.exit_code


def _wish(model: Path, signature: Signature, fed: Fed, options: dict[str, Any]) -> Wish:
    from .profile.inputs import checked, signature_of
    from .profile.measure import Wish

    baseline: Path | None = options["baseline"]
    if baseline is not None:
        other = signature_of(baseline)
        if [entry.name for entry in other.entries] != [entry.name for entry in signature.entries]:
            raise UsageError(
                f"{baseline}: takes other inputs than {model}; give an older version of the same "
                "model"
            )
        checked(fed, other)
    if options["spinning"] == "both" and options["threads"] == "1":
        raise UsageError("--spinning both: one thread has nobody to wait for; give --threads 2")
    return Wish(
        model=model,
        signature=signature,
        fed=fed,
        mode="quick" if options["quick"] else "strict" if options["strict"] else "default",
        threads=None
        if options["threads"] == "sweep"
        else _numbers("--threads", options["threads"]),
        spinning=SPINNING[options["spinning"]],
        affinity=_affinity(options["affinity"]),
        baseline=baseline,
        rate_hz=options["rate"],
        sustained_s=_seconds(options["sustained"]),
    )


def _measured(wish: Wish, names: tuple[str, ...], *, quiet: bool) -> ProfileRecord:
    from datetime import UTC, datetime

    from .. import __version__
    from .console import Console
    from .profile.devices import device_named
    from .profile.everywhere import profile_everywhere
    from .profile.record import InputsRecord, ProfileRecord
    from .workspace import file_sha256

    targets = [(name, device_named(name, Path.cwd())) for name in names]
    with Console(quiet=quiet) as console:
        console.started("profile")
        found = profile_everywhere(targets, wish, events=console)
    fed = wish.fed
    return ProfileRecord(
        tool_version=__version__,
        created_utc=datetime.now(UTC).isoformat(timespec="seconds"),
        model=str(wish.model),
        model_sha256=file_sha256(wish.model),
        model_bytes=wish.model.stat().st_size,
        baseline=None if wish.baseline is None else str(wish.baseline),
        baseline_sha256=None if wish.baseline is None else file_sha256(wish.baseline),
        inputs=InputsRecord(source=fed.source, path=fed.path and str(fed.path), n=fed.n),
        mode=wish.mode,
        devices=found,
    )


def _check_why(names: tuple[str, ...], options: dict[str, Any]) -> None:
    if options["fresh"] and not options["why"]:
        raise UsageError("--fresh: measures again what only --why uses; add --why")
    if options["why"] and "local" not in names:
        raise UsageError("--why: is told of this machine alone; add --device local")
    if options["why"] and options["affinity"] is not None:
        raise UsageError("--why: is told without --affinity; leave one of them out")


def _explained(record: ProfileRecord, wish: Wish, *, fresh: bool) -> ProfileRecord:
    """With why it is not faster here; as it is where this machine failed, which it says."""
    from .profile.advice import explain
    from .profile.local import measuring_here
    from .profile.measure import MODEL

    own = [row for one in record.devices if one.name == "local" for row in one.rows]
    # where both are there, that with threads that spin, as the runtime ships it, counts
    rows = sorted(
        (row for row in own if row.latency.name == MODEL), key=lambda row: row.spinning is not False
    )
    if not rows:
        return record
    by_threads = {row.latency.threads: row.latency.p50_ms for row in rows}
    with measuring_here():
        why = explain(
            wish.model,
            wish.fed.arrays,
            threads=max(by_threads),
            by_threads=by_threads,
            fresh=fresh,
        )
    return record.model_copy(update={"why": why})


def _fed(model: Path, signature: Signature, source: _Source) -> Fed:
    from .profile.inputs import from_file, noise

    if source.inputs is not None and source.data is not None:
        raise UsageError("--inputs: contradicts --data; give one of them")
    if source.inputs is not None:
        return from_file(source.inputs, signature)
    if source.data is not None:
        return _of_data(model, signature, source)
    return _golden(model, signature) or noise(signature, path=model)


def _of_data(model: Path, signature: Signature, source: _Source) -> Fed:
    """Samples spread over the set, prepared as the file says."""
    from .file_recipe import preprocess_of
    from .measure.machine import available_threads
    from .profile.inputs import Fed, checked, from_samples
    from .recipe import PreprocessSpec
    from .verify.facts import facts_of
    from .verify.inputs import open_set
    from .verify.samples import Set

    assert source.data is not None
    how = None
    if any(value is not None for value in source.images.values()):
        said = given(source.data, None, **source.images)
        how = PreprocessSpec.model_validate(preprocess_of(model, said))
    with tempfile.TemporaryDirectory() as scratch:
        test = open_set(
            facts_of(model), Set(path=Path(source.data), tokenizer=source.tokenizer), how=how,
            class_names=(), scratch=Path(scratch), threads=available_threads(),
        )  # fmt: skip
        samples = test.inputs(test.spread(DATA_SAMPLES))
    arrays = from_samples(samples, signature)
    return checked(Fed(arrays, "data", Path(source.data)), signature)


def _golden(model: Path, signature: Signature) -> Fed | None:
    """The bundle of `verify --write-golden` beside the file, or in golden/ there."""
    import numpy as np

    from .profile.inputs import Fed, checked
    from .verify.replay import GOLDEN, INPUTS, OUTPUTS, Tampered, Unusable, read_bundle
    from .workspace import file_sha256

    folders = (model.parent, model.parent / "golden")
    folder = next((one for one in folders if (one / INPUTS).is_file()), None)
    if folder is None or not (folder / GOLDEN).is_file():
        return None
    try:
        golden = read_bundle(folder)
    except Tampered as error:
        raise IntegrityError(f"{error}; or give --inputs") from error
    except Unusable as error:
        raise UsageError(f"{error}; or give --inputs") from error
    with np.load(folder / INPUTS, allow_pickle=False) as stored:
        arrays = {name: stored[name] for name in stored.files}
    is_own = golden["model"]["sha256"] == file_sha256(model)
    expected = np.load(folder / OUTPUTS, allow_pickle=False) if is_own else None
    return checked(Fed(arrays, "golden", folder, expected), signature)


def _numbers(option: str, text: str) -> tuple[int, ...]:
    """`1,2` and `2-3`."""
    found: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d{1,4})(?:-(\d{1,4}))?\s*", part)
        if match is None:
            raise UsageError(f"{option}: expected numbers with commas between them, got {text!r}")
        found += range(int(match[1]), int(match[2] or match[1]) + 1)
    if (option == "--threads" and 0 in found) or not found:
        raise UsageError(f"{option}: expected numbers from 1, got {text!r}")
    return tuple(dict.fromkeys(found))


def _affinity(text: str | None) -> Any:
    return text if text in (None, "clusters") else _numbers("--affinity", str(text))


def _seconds(text: str | None) -> float | None:
    if text is None:
        return None
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([smh]?)", text.strip())
    if match is None or float(match[1]) <= 0:
        raise UsageError(f"--sustained: expected a time such as 90s, 30m or 1h, got {text!r}")
    return float(match[1]) * UNITS[match[2] or "s"]
