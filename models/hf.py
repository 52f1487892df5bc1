"""A Hugging Face folder → a network of this project, with the folder's weights. Needs transformers.

Built from config.json by `AutoModelForImageClassification`, read by `from_pretrained`, so that old
names of weights are understood; local files only, no remote code, no pickled code. What the folder
says of classes and preprocessing is in `hf_folder.py`.
"""

from __future__ import annotations

import difflib
import importlib
import pickle
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import safetensors
import torch
from torch import Tensor, nn

from ..pipeline.errors import ModelError, WeightsError
from .hf_folder import PREFIX, HfFolder
from .weights import LoadReport, load_weights

OTHER_TASKS = {
    "multi_label_classification": "several classes an image",
    "regression": "a number an image",
}
SHOWN = 8  # names in a message
# what transformers raises on a folder that it cannot use
_FAILURES = (OSError, ValueError, RuntimeError, KeyError, TypeError, ImportError, AttributeError)


class ImageClassifier(nn.Module):
    """(N, C, H, W), preprocessed, → logits (N, classes)."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.network(pixel_values=x).logits
        return logits


def build(folder: HfFolder, args: Mapping[str, Any], *, classes: int) -> ImageClassifier:
    """The network of config.json, freshly initialised from torch's global generator.

    Args:
        args: options of its configuration, by their names there.

    Raises:
        ModelError: another task, an unknown option, no network of transformers', or transformers
            is not installed.
    """
    where = f"{PREFIX}{folder.path}"
    task = folder.config.get("problem_type")
    if task in OTHER_TASKS:
        raise ModelError(
            f"{where}: its problem_type is {task} ({OTHER_TASKS[task]}); this job is "
            "classification with one class an image"
        )
    transformers = _transformers(where)
    with _quiet(transformers):
        try:
            config = transformers.AutoConfig.from_pretrained(folder.path, local_files_only=True)
            _override(config, args, where)
            config.num_labels = classes
            config.architectures = config.architectures or []  # transformers reads a list
            network = transformers.AutoModelForImageClassification.from_config(
                config, dtype=torch.float32, trust_remote_code=False
            )
        except _FAILURES as error:
            raise _no_classifier(folder, where, error) from error
    return ImageClassifier(network)


def load(
    module: nn.Module,
    folder: HfFolder,
    *,
    head: Literal["keep", "new"],
    class_names: Sequence[str],
    where: str,
) -> LoadReport:
    """Copy the folder's weights into what `build` made of it.

    With `head: keep` its classes are joined to the data's by name, and the classifier's rows are
    put into the data's order.

    Raises:
        WeightsError: no weights, damaged ones, ones that do not fit, or other classes.
    """
    name = f"{where}: {PREFIX}{folder.path}"
    given = _pretrained(folder, keep=head == "keep", where=name)
    state = given.state_dict()
    if head == "keep":
        order = _order(folder, class_names, name)
        state = _reordered(given, state, order)
    report = load_weights(
        module, {f"network.{key}": tensor for key, tensor in state.items()}, head=head, where=name
    )
    if head == "keep":
        _check_order(given, module, order, name)
    return report


def _transformers(where: str) -> Any:
    try:
        return importlib.import_module("transformers")
    except ImportError as error:
        raise ModelError(
            f"{where}: needs transformers: pip install 'edgestill[hf]' ({error})"
        ) from error


@contextmanager
def _quiet(transformers: Any) -> Iterator[None]:
    """No bars and no advice on the terminal; what matters becomes an error here."""
    logging = transformers.utils.logging
    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


def _override(config: Any, args: Mapping[str, Any], where: str) -> None:
    known = config.to_dict()
    for key, value in args.items():
        if key not in known:
            near = difflib.get_close_matches(key, known, n=3)
            hint = f"; near: {', '.join(near)}" if near else ""
            raise ModelError(f"{where}: its configuration has no option {key!r}{hint}")
        setattr(config, key, value)


def _no_classifier(folder: HfFolder, where: str, error: Exception) -> ModelError:
    kind = folder.config.get("model_type")
    said = " ".join(str(error).split())[:200]
    why = "remote code is not run; " if "auto_map" in folder.config else ""
    return ModelError(
        f"{where}: no image classifier can be built of its {kind or 'unnamed'} model: {why}{said}"
    )


def _pretrained(folder: HfFolder, *, keep: bool, where: str) -> Any:
    transformers = _transformers(where)
    with _quiet(transformers), torch.random.fork_rng(devices=[]):
        try:
            network, info = transformers.AutoModelForImageClassification.from_pretrained(
                folder.path,
                local_files_only=True,
                trust_remote_code=False,
                dtype=torch.float32,
                output_loading_info=True,
            )
        except pickle.UnpicklingError as error:
            raise WeightsError(
                f"{where}: its weights hold pickled code, which is not run; save them again as "
                "safetensors (save_pretrained does)"
            ) from error
        except (*_FAILURES, safetensors.SafetensorError) as error:
            said = " ".join(str(error).split())[:200]
            raise WeightsError(f"{where}: its weights cannot be read: {said}") from error
    missing = sorted(info["missing_keys"])
    body = [key for key in missing if not _is_head(key)]
    if body or (missing and keep):
        hint = "" if body else "; it has no classifier of its own: set `head: new` and train it"
        listed = ", ".join((body or missing)[:SHOWN])
        raise WeightsError(f"{where}: {len(body or missing)} weights are missing: {listed}{hint}")
    return network.eval()


def _is_head(name: str) -> bool:
    return any("classifier" in part or part == "head" for part in name.split("."))


def _order(folder: HfFolder, class_names: Sequence[str], where: str) -> list[int]:
    """For each class of the data, its place among the folder's logits."""
    labels = list(folder.labels)
    if not folder.names_its_classes:  # `data.labels` is then given, in the folder's order
        labels = list(class_names) if len(labels) == len(class_names) else labels
    places = {label: place for place, label in enumerate(labels)}
    folded = {label.casefold(): place for label, place in places.items()}
    if len(folded) < len(labels):
        folded = places  # names that differ by case alone
    found = [places.get(name, folded.get(name.casefold())) for name in class_names]
    unknown = [name for name, place in zip(class_names, found, strict=True) if place is None]
    if unknown or len(labels) != len(class_names):
        raise WeightsError(
            f"{where}: its classes are not the data's.\n"
            f"  data: {_listing(class_names)}\n  folder: {_listing(labels)}\n"
            "Give `data.labels` the folder's names, or set `head: new` and train it"
        )
    return [place for place in found if place is not None]


def _listing(names: Sequence[str]) -> str:
    more = f", … ({len(names)} in all)" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more


def _reordered(given: nn.Module, state: dict[str, Tensor], order: list[int]) -> dict[str, Tensor]:
    """The state with the rows of every classifier in this order; some nets have two."""
    heads = [
        name
        for name, part in given.named_modules()
        if isinstance(part, nn.Linear) and part.out_features == len(order) and _is_head(name)
    ]
    rows = {f"{name}.{part}" for name in heads for part in ("weight", "bias")}
    return {key: value[order] if key in rows else value for key, value in state.items()}


@torch.no_grad()
def _check_order(given: nn.Module, module: nn.Module, order: list[int], where: str) -> None:
    """The reordered network answers as the folder's own, class by class."""
    config: Any = given.config
    size = getattr(config, "image_size", 64)
    sides = (size, size) if isinstance(size, int) else tuple(size)
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(2, getattr(config, "num_channels", 3), *sides, generator=generator)
    expected = given(pixel_values=noise).logits[:, order]
    if not torch.allclose(module.eval()(noise), expected, rtol=1e-3, atol=1e-4):
        raise WeightsError(
            f"{where}: its classifier cannot be put into the data's order of classes; write "
            "`data.labels` in the folder's order"
        )
