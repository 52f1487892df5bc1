"""From a YAML file and `--set` overrides to a `Recipe`, and every mistake with its line.

Reads and resolves only: what may be written is in `recipe.py`. All problems are reported at once,
each with file, line, key, what was expected and, for an unknown key, the nearest known one.
"""

from __future__ import annotations

import difflib
import importlib.util
import os
import typing
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import UnionType
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from ..models.hf_folder import PREFIX as HF
from ..models.hf_folder import find_folder
from .errors import RecipeError
from .policy import GateSpec
from .profile.devices import FILE as DEVICES
from .recipe import Recipe
from .training_spec import objective_names

SHIPPED = Path(__file__).parent / "recipes"
# Relative paths of a shipped recipe start here: the package folder is no place for anybody's data.
DATA_VARIABLE, DATA_DEFAULT = "EDGESTILL_DATA", "../shared/data"
# Names that stand where a path may stand.
BUILT_IN_DATA = ("digits",)
PATHS = {
    *(("data", part, "path") for part in ("train", "test", "validation", "unlabelled")),
    *((network, key) for network in ("teacher", "student") for key in ("model", "weights")),
    ("data", "tokenize", "tokenizer"),
    ("data", "tokenize", "keep"),
    ("profile", "devices_file"),
    ("gate", "metrics", "metric"),
    ("gate", "slices", "file"),
}
# … of these, others may be a name that is no path
NAMED = ("model", "tokenizer", "metric")
PACKAGE = "package:"  # hf:package:NAME/FOLDER, inside an installed Python package

Location = tuple[str | int, ...]
M = typing.TypeVar("M", bound=BaseModel)


def load_recipe(name: str, *, overrides: Sequence[str] = ()) -> Recipe:
    """The recipe in file `name`, or the shipped recipe of that name, with `KEY=VALUE` overrides.

    Relative paths in a file resolve against its own folder, those in an override against the
    working directory. A devices.yaml beside the file is the one that counts.

    Raises:
        RecipeError: no such recipe, not YAML, or anything in it is wrong (all problems at once).
    """
    path, base = _find(name)
    document = _read(path, path.name)
    _resolve_paths(document.data, (), base)
    return _with_devices(complete(document, overrides=overrides), base)


def complete(document: Document, *, overrides: Sequence[str] = ()) -> Recipe:
    """A document whose paths are resolved, with the overrides, as a recipe.

    Raises:
        RecipeError: anything in it is wrong (all problems at once).
    """
    for text in overrides:
        _override(document, text)
    _take_preprocess(document)
    return validate(Recipe, document)


def shipped_recipes() -> list[str]:
    return sorted(path.stem for path in SHIPPED.glob("*.yaml"))


@dataclass(frozen=True)
class Document:
    """A YAML mapping with the line of every key. `name` is what messages call it."""

    name: str
    data: dict[str, Any]
    lines: Mapping[Location, int]


def load_policy(path: Path) -> GateSpec:
    """The policy in file `path`: the keys of a recipe's `gate`, paths against its own folder.

    Raises:
        RecipeError: no such file, not YAML, or anything in it is wrong (all problems at once).
    """
    document = _read(path, path.name)
    _resolve_paths(document.data, ("gate",), path.resolve().parent)
    return validate(GateSpec, document)


def validate(model: type[M], document: Document) -> M:
    """`document` as `model`, or one RecipeError that lists every problem with its line."""
    try:
        return model.model_validate(document.data)
    except ValidationError as error:
        problems = [line for detail in error.errors() for line in _say(detail, document, model)]
        raise RecipeError("\n".join(dict.fromkeys(problems))) from None


def _find(name: str) -> tuple[Path, Path]:
    path = Path(name).expanduser()
    if path.is_file():
        return path, path.resolve().parent
    shipped = SHIPPED / f"{name}.yaml"
    if "/" not in name and shipped.is_file():
        base = os.environ.get(DATA_VARIABLE, DATA_DEFAULT)
        return shipped, Path(base).expanduser().resolve()
    known = ", ".join(shipped_recipes())
    if path.is_dir():
        raise RecipeError(f"{name}: this is a folder; a recipe is a YAML file, or one of: {known}")
    raise RecipeError(f"{name}: no such file, and no shipped recipe of that name; known: {known}")


def _read(path: Path, name: str) -> Document:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        raise RecipeError(f"{name}: not a text file in UTF-8, so not a recipe") from None
    except OSError as error:
        raise RecipeError(f"{path}: cannot be read: {error.strerror}") from None
    try:
        root = yaml.compose(text, Loader=yaml.SafeLoader)
        data = yaml.safe_load(text)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{name}:{mark.line + 1}" if mark else name
        problem = getattr(error, "problem", None) or str(error).splitlines()[0]
        raise RecipeError(f"{where}: not valid YAML: {problem}") from None
    if root is None or not isinstance(data, dict):
        got = "an empty file" if root is None else type(data).__name__
        raise RecipeError(f"{name}: expected sections (task, data, student, …), got {got}")
    lines: dict[Location, int] = {}
    _collect_lines(root, (), lines, name)
    return Document(name, data, lines)


def _collect_lines(node: yaml.Node, at: Location, lines: dict[Location, int], name: str) -> None:
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            here = (*at, str(key.value))
            if here in lines:
                raise RecipeError(
                    f"{name}:{key.start_mark.line + 1} {_dotted(here)}: written twice (first on "
                    f"line {lines[here]}); the second would silently win"
                )
            lines[here] = key.start_mark.line + 1
            _collect_lines(value, here, lines, name)
    elif isinstance(node, yaml.SequenceNode):
        for index, value in enumerate(node.value):
            lines[(*at, index)] = value.start_mark.line + 1
            _collect_lines(value, (*at, index), lines, name)


def _override(document: Document, text: str) -> None:
    """Apply one `KEY=VALUE` in place; paths in it resolve against the working directory."""
    name, equals, literal = text.partition("=")
    keys = tuple(name.strip().split("."))
    if not equals or not all(keys):
        raise RecipeError(f"--set {text}: expected KEY=VALUE, e.g. --set distill.epochs=5")
    try:
        value = yaml.safe_load(literal)
    except yaml.YAMLError:
        raise RecipeError(f"--set {text}: the value is not valid YAML") from None
    place: Any = document.data
    for depth, key in enumerate(keys[:-1]):
        if isinstance(place, dict) and place.get(key) is None:
            place[key] = {}
        inner = _item(place, key)
        if not isinstance(inner, dict | list):
            raise RecipeError(
                f"--set {text}: {_dotted(keys[: depth + 1])} is {inner!r} in "
                f"{document.name}, not a section"
            )
        place = inner
    if isinstance(place, list):
        raise RecipeError(f"--set {text}: names an item of a list; give the whole list instead")
    place[keys[-1]] = value
    section = tuple(key for key in keys[:-1] if not key.isdecimal())
    _resolve_paths(place, section, Path.cwd(), only=keys[-1])


def _item(place: Any, key: str) -> Any:
    """`place[key]`, where the key may be a position in a list; None if there is none."""
    if isinstance(place, list):
        return place[int(key)] if key.isdecimal() and int(key) < len(place) else None
    return place[key]


def _resolve_paths(
    section: dict[str, Any], at: tuple[str, ...], base: Path, *, only: str | None = None
) -> None:
    """Make every path below `section` absolute, in place. Wrong types are left to validation."""
    for key, value in section.items():
        here = (*at, str(key))
        if only is not None and key != only:
            continue
        for one in value if isinstance(value, list) else (value,):
            if isinstance(one, dict):
                _resolve_paths(one, here, base)
        if isinstance(value, str) and here in PATHS:
            section[key] = absolute(value, base, is_model=key in NAMED)


def _with_devices(recipe: Recipe, folder: Path) -> Recipe:
    profile, beside = recipe.profile, folder / DEVICES
    if profile is None or profile.devices_file is not None or not beside.is_file():
        return recipe
    profile = profile.model_copy(update={"devices_file": beside})
    return recipe.model_copy(update={"profile": profile})


def _take_preprocess(document: Document) -> None:
    """Where the recipe says nothing of preprocessing, its hf: folders say it, in place: the trained
    ones, for weights know one preprocessing only; where none is trained, all of them."""
    data = document.data.get("data")
    if not isinstance(data, dict) or data.get("preprocess") is not None:
        return
    said: dict[str, dict[str, Any]] = {}
    trained: set[str] = set()
    for name in ("teacher", "student"):
        section = document.data.get(name)
        for one in section if isinstance(section, list) else (section,):
            model = one.get("model") if isinstance(one, dict) else None
            folder = find_folder(model) if isinstance(model, str) else None
            if folder is not None and (preprocess := folder.preprocess()):
                said[str(model)] = preprocess
                trained |= {str(model)} if folder.weights else set()
    found = {model: one for model, one in said.items() if model in trained or not trained}
    if not found:
        return
    first, *others = found
    different = [model for model in others if found[model] != found[first]]
    if different:
        raise RecipeError(
            f"{document.name}: {first} and {different[0]} have different preprocessing, and all "
            "networks see the same images: write `data.preprocess`"
        )
    data["preprocess"] = found[first]


def absolute(value: str, base: Path, *, is_model: bool) -> str:
    """A path, or the reference of a network, that is written relative to `base`."""
    if is_model and value.startswith(HF + PACKAGE):
        return HF + _in_package(value.removeprefix(HF + PACKAGE))
    if is_model and value.startswith(HF):
        return HF + absolute(value.removeprefix(HF), base, is_model=False)
    if is_model and not (value.endswith((".pt2", ".onnx", ".json")) or ".py:" in value):
        return value  # a zoo name
    if not is_model and value in BUILT_IN_DATA:
        return value
    path = Path(value).expanduser()
    return os.path.normpath(base / path)


def _in_package(value: str) -> str:
    """The folder that `NAME/FOLDER` means; the package is found, not imported."""
    name, _, inner = value.partition("/")
    found = importlib.util.find_spec(name) if name.isidentifier() else None
    if found is None or not found.submodule_search_locations:
        raise RecipeError(
            f"{HF}{PACKAGE}{value}: no Python package {name} is installed here; install it "
            f"(pip install {name.replace('_', '-')}), or give a folder as hf:DIR"
        )
    return os.path.join(next(iter(found.submodule_search_locations)), inner)


def _say(detail: ErrorDetails, document: Document, model: type[BaseModel]) -> Iterator[str]:
    """One line a problem: `file:line key: what is wrong; what to do`."""
    location = _in_document(detail["loc"], document.data)
    message = detail["msg"].removeprefix("Value error, ")
    if detail["type"] == "extra_forbidden":
        message = f"unknown key{_nearest(location, model)}"
    elif detail["type"] == "missing":
        message = "missing, and it has no default"
    elif detail["type"] in ("union_tag_invalid", "union_tag_not_found"):
        message = _wrong_choice(detail)
    elif detail["type"] == "tuple_type":
        message = f"expected a list, got {detail['input']!r}"
    elif not detail["type"].startswith("value_error"):
        message = f"{message[0].lower()}{message[1:]}, got {detail['input']!r}"
    if location:
        yield f"{_where(location, document)} {_dotted(location)}: {message}"
        return
    for line in message.splitlines():  # rules over several sections name their own key
        key = tuple(line.partition(":")[0].split("."))
        yield f"{_where(key, document)} {line}"


def _wrong_choice(detail: ErrorDetails) -> str:
    """What a section that comes in several kinds should have been."""
    context = detail.get("ctx", {})
    if context.get("discriminator") != "'name'":
        return "expected {path: …} or {fraction: …}"
    known = objective_names()
    given = context.get("tag")
    if given is None:
        return f"expected `name:` to say which objective it is: {', '.join(known)}"
    near = difflib.get_close_matches(str(given), known, n=1)
    meant = f"; did you mean `{near[0]}`?" if near else f"; known: {', '.join(known)}"
    return f"no objective is called {given!r}{meant}"


def _in_document(loc: Location, data: Any) -> Location:
    """pydantic's location without the tags of unions, which the user never wrote."""
    kept: list[str | int] = []
    place = data
    for index, key in enumerate(loc):
        is_last = index == len(loc) - 1
        if isinstance(place, dict) and (key in place or (is_last and key not in _TAGS)):
            kept.append(key)
            place = place.get(key)
        elif isinstance(place, list | tuple) and isinstance(key, int) and key < len(place):
            kept.append(key)
            place = place[key]
    return tuple(kept)


_TAGS = ("source", "split", "number", "word", "one", "many")


def _where(location: Location, document: Document) -> str:
    for length in range(len(location), 0, -1):
        line = document.lines.get(location[:length])
        if line is not None:
            return f"{document.name}:{line}"
    return document.name


def _dotted(location: Location) -> str:
    return ".".join(str(part) for part in location)


def _nearest(location: Location, model: type[BaseModel]) -> str:
    names = sorted({name for m in _models_at(model, location[:-1]) for name in m.model_fields})
    near = difflib.get_close_matches(str(location[-1]), names, n=1)
    if near:
        return f"; did you mean `{near[0]}`?"
    return f"; known here: {', '.join(names)}"


def _models_at(model: type[BaseModel], location: Location) -> list[type[BaseModel]]:
    models = [model]
    for key in location:
        found = [m.model_fields[str(key)].annotation for m in models if str(key) in m.model_fields]
        models = [inner for annotation in found for inner in _models_in(annotation)] or models
    return models


def _models_in(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    if typing.get_origin(annotation) in (typing.Union, UnionType, typing.Annotated, tuple):
        return [m for part in typing.get_args(annotation) for m in _models_in(part)]
    return []
