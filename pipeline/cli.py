"""The command: parse, call, print, exit code. Nothing heavy is imported before it is needed.

Exit codes are those of `errors.py`, plus 1 (gate failed) and 3 (inconclusive), which are results.
"""

from __future__ import annotations

import errno
import importlib
import json
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

import click

from .. import __version__
from .cli_gate import gate, report
from .cli_options import given, preparation_options
from .cli_profile import devices, profile
from .cli_verify import verify
from .errors import EdgestillError, Interrupted, UsageError, UserError
from .stage import launched

if TYPE_CHECKING:
    from .recipe import Recipe
    from .report import Report

SCHEMAS = {  # module and model of what has one, and whether it is written or read
    "report": ("report", "Report", "serialization"),
    "verify": ("verify.record", "Verification", "serialization"),
    "profile": ("profile.record", "ProfileRecord", "serialization"),
    "recipe": ("recipe", "Recipe", "validation"),
    "policy": ("policy", "GateSpec", "validation"),
}
# What the operating system says when the user's disk or folder is at fault, not we.
DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS, errno.EFBIG)

EXAMPLES = """\b
Examples:
  compress run                               the built-in recipe, into out/
  compress run recipe.yaml -o out/phone      your own
  compress run cifar10 --set distill.epochs=5
  torchrun --nproc-per-node 2 -m edgestill run recipe.yaml
  compress init --model resnet18 --weights w.pth --data photos/
  compress gate out/ --policy release.yaml   judge again; the exit code is the verdict
  compress profile out/model.onnx --device pi5

\b
Exit codes: 0 passed · 1 gate failed · 2 recipe, data or weights wrong · 3 inconclusive ·
4 measurement invalid · 5 runtime failure · 6 integrity failure · 70 a bug · 130 interrupted
"""


def entry(arguments: Sequence[str]) -> int:
    """Run the command line `arguments`; returns the exit code. Bugs are raised."""
    signal.signal(signal.SIGTERM, _interrupt)
    try:
        return int(cli.main(list(arguments), prog_name="compress", standalone_mode=False) or 0)
    except click.exceptions.Exit as request:
        return request.exit_code
    except click.ClickException as error:
        error.show()
        return UsageError.exit_code
    except (KeyboardInterrupt, click.Abort):
        resumes = arguments[0] in ("run", "quantize")  # something was interrupted, so there is one
        kept = "; finished stages are kept, the same command goes on from there"
        _complain(f"interrupted{kept if resumes else ''}")
        return Interrupted.exit_code
    except EdgestillError as error:
        _complain(str(error))
        return error.exit_code
    except OSError as error:
        if error.errno not in DISK_ERRORS:
            raise
        where = f"{error.filename}: " if error.filename else ""
        _complain(f"{where}{error.strerror}; finished stages are kept")
        return UserError.exit_code


@click.group(epilog=EXAMPLES, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="edgestill", message="%(prog)s %(version)s")
def cli() -> None:
    """Make a small .onnx of a large teacher or a trained net, and prove that it is good enough."""


cli.add_command(gate)
cli.add_command(report)
cli.add_command(verify)
cli.add_command(profile)
cli.add_command(devices)

SHARED_OPTIONS = (
    click.option(
        "-o",
        "--out",
        default="out",
        show_default=True,
        type=click.Path(path_type=Path),
        help="Output folder; its .edgestill keeps finished stages.",
    ),
    click.option(
        "--set",
        "overrides",
        multiple=True,
        metavar="KEY=VALUE",
        help="Override a key of the recipe, e.g. distill.epochs=5. Repeatable.",
    ),
    click.option("--fresh", is_flag=True, help="Forget stored stages and begin anew."),
    click.option("-q", "--quiet", is_flag=True, help="Print only the verdict."),
    click.option("--log-json", is_flag=True, help="Print one JSON object a line, for machines."),
)


def _shared(command: Callable[..., int]) -> Callable[..., int]:
    """The options of every command that makes a model."""
    for option in reversed(SHARED_OPTIONS):
        command = option(command)
    return command


@cli.command()
@click.argument("recipe", default="digits")
@_shared
def run(recipe: str, **shared: Any) -> int:
    """Make, prove and publish the model that RECIPE (a file or a shipped name) asks for."""
    from .recipe_file import load_recipe

    wish = load_recipe(recipe, overrides=shared.pop("overrides"))
    return _follow(wish, recipe, **shared)


@cli.command()
@click.argument("model", type=click.Path(path_type=Path))
@click.option("--data", required=True, help="Image folder, .parquet, or digits; with labels.")
@click.option("--test", help="Test set, if apart from --data.")
@click.option(
    "--targets",
    default="arm,x86",
    show_default=True,
    metavar="LIST",
    help="CPUs that must compute the same: arm, x86, x86-vnni.",
)
@preparation_options
@_shared
def quantize(
    model: Path,
    data: str,
    test: str | None,
    targets: str,
    mean: str | None,
    std: str | None,
    resize: int | None,
    crop: int | None,
    **shared: Any,
) -> int:
    """Make int8 of a float MODEL.onnx of your own, prove it and publish it. Needs no torch."""
    from .file_recipe import recipe_for_file

    said = given(data, test, mean=mean, std=std, resize=resize, crop=crop)
    overrides = shared.pop("overrides")
    wish = recipe_for_file(model, said, targets=targets.split(","), overrides=overrides)
    return _follow(wish, str(model), **shared)


def _follow(wish: Recipe, name: str, out: Path, *, fresh: bool, quiet: bool, log_json: bool) -> int:
    """Do what a recipe asks for, and say what came of it."""
    from .console import Console
    from .release import MANIFEST, MODEL, REJECTED
    from .workspace import file_sha256

    run_flow: Callable[..., Report | None]
    if wish.student.is_onnx:
        from .file_flow import run as run_flow
    else:
        from .flow import run as run_flow
    helps = not launched().leads  # one of torchrun's processes: the first speaks
    with Console(quiet=quiet or helps, log_json=log_json and not helps) as console:
        console.say(f"edgestill {__version__}: {name} → {out}")
        report = run_flow(wish, out, events=console, fresh=fresh)
    if report is None:
        return 0  # a process that helped with training; the first one reports
    assert report.verdict is not None
    passed = report.verdict.outcome == "pass"
    where = str(out / (MODEL if passed else REJECTED))
    console.verdict(report, where=where, manifest_sha256=file_sha256(out / MANIFEST))
    return report.verdict.exit_code


@cli.command()
@click.option(
    "--model", required=True, metavar="M", help="Zoo name, FILE.py:factory, FILE.pt2 or hf:DIR."
)
@click.option("--weights", type=click.Path(path_type=Path), help="Its trained weights.")
@click.option(
    "--data",
    "data",
    required=True,
    type=click.Path(path_type=Path),
    help="Image folder, .parquet, or digits.",
)
@click.option("--test", type=click.Path(path_type=Path), help="Test set, if apart from --data.")
@click.option("--size", type=click.IntRange(min=1), help="Side of the network's input, in pixels.")
@click.option(
    "-o",
    "--out",
    default="recipe.yaml",
    show_default=True,
    type=click.Path(path_type=Path),
    help="File to write; never overwritten.",
)
def init(
    model: str, weights: Path | None, data: Path, test: Path | None, size: int | None, out: Path
) -> int:
    """Write a runnable, commented recipe for the model and data you have."""
    from .init import write_recipe

    for line in write_recipe(model, weights=weights, data=data, test=test, size=size, out=out):
        click.echo(line)
    return 0


@cli.command()
@click.argument("kind", type=click.Choice(list(SCHEMAS)), default="report")
def schema(kind: str) -> int:
    """Print the JSON schema of report.json, a recipe, a gate policy, or what verify and profile
    print with --json."""
    module, name, mode = SCHEMAS[kind]
    model = getattr(importlib.import_module(f".{module}", __package__), name)
    click.echo(json.dumps(model.model_json_schema(mode=mode), indent=1))
    return 0


def _interrupt(_number: int, _frame: FrameType | None) -> None:
    """SIGTERM ends a run as cleanly as Ctrl-C does."""
    raise KeyboardInterrupt


def _complain(text: str) -> None:
    """Say why the command ends; of torchrun's processes the first that ends says it for all."""
    if launched().size > 1:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # it ends already: let it say why
        from .train.distributed import first_to_end

        if not first_to_end():
            return
    sys.stderr.write(f"error: {text}\n" if text else "error\n")
