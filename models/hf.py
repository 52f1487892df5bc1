"""A Hugging Face folder → a network of this project, with the folder's weights. Needs transformers.

Built from config.json by transformers' Auto classes, read by `from_pretrained`, so that old names
of weights are understood; local files only, no remote code, no pickled code. What the folder says
of classes and preprocessing is in `hf_folder.py`, what is peculiar to text encoders in
`hf_text.py`.
"""

from __future__ import annotations

import difflib
import pickle
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..pipeline.errors import ModelError, WeightsError
from . import hf_embeddings, hf_text, hf_vocabulary
from .hf_folder import PREFIX, HfFolder
from .hf_library import failures, open_transformers, quiet
from .hf_text import TextClassifier
from .weights import LoadReport, load_weights

Kind = Literal["image", "text"]
Init = Literal["weights", "embeddings", "scratch"]

AUTO = {
    "image": "AutoModelForImageClassification",
    "text": "AutoModelForSequenceClassification",
}
# attention as plain products and softmax, so that a graph of it can be exported and quantized
OPTIONS: dict[str, dict[str, Any]] = {"image": {}, "text": {"attn_implementation": "eager"}}
OTHER_TASKS = {
    "multi_label_classification": "several classes",
    "regression": "a number",
}
SHOWN = 8  # names in a message


class ImageClassifier(nn.Module):
    """(N, C, H, W), preprocessed, → logits (N, classes)."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.network(pixel_values=x).logits
        return logits


def build(
    folder: HfFolder, args: Mapping[str, Any], *, classes: int, input_shape: tuple[int, ...]
) -> ImageClassifier | TextClassifier:
    """The network of config.json, freshly initialised from torch's global generator.

    Args:
        args: options of its configuration, by their names there.
        input_shape: (C, H, W) of images, or (K, S) of texts.

    Raises:
        ModelError: another task, an unknown option, no network of transformers', no encoder, texts
            that it cannot be fed, or transformers is not installed.
    """
    where = f"{PREFIX}{folder.path}"
    if len(input_shape) == 3:
        return ImageClassifier(_from_config(folder, args, kind="image", classes=classes))
    network = _from_config(folder, args, kind="text", classes=classes)
    hf_text.check_rows(network, input_shape, where)
    return TextClassifier(network, hf_text.ROWS[: input_shape[0]])


def kept_args(
    folder: HfFolder,
    args: Mapping[str, Any],
    keep_layers: Sequence[int] | None,
    *,
    kept_ids: Sequence[int] | None = None,
) -> dict[str, Any]:
    """`args` with what builds a text encoder of these layers alone, from 0, and of these words.

    Raises:
        ModelError: no layers, one twice, one that it does not have, it shares its layers, the
            words cannot be taken, or `args` names a depth or a number of words of its own.
    """
    where = f"{PREFIX}{folder.path}"
    with torch.device("meta"):
        network = _from_config(folder, args, kind="text", classes=2)
    more: dict[str, Any] = {}
    if keep_layers is not None:
        twice = {"num_hidden_layers", hf_text.depth_name(network.config)} & set(args)
        if twice:
            raise ModelError(
                f"{where}: keep_layers and args.{min(twice)} both name the depth; leave one out"
            )
        more |= hf_text.layer_args(network, keep_layers, where)
    if kept_ids is not None:
        more |= hf_vocabulary.vocabulary_args(network, kept_ids, where, args=args)
    return {**args, **more}


def load(
    module: nn.Module,
    folder: HfFolder,
    *,
    head: Literal["keep", "new"],
    class_names: Sequence[str],
    where: str,
    init: Init = "weights",
    keep_layers: Sequence[int] | None = None,
    kept_ids: Sequence[int] | None = None,
) -> LoadReport:
    """Copy the folder's weights into what `build` made of it.

    With `head: keep` its classes are joined to the data's by name, and the classifier's rows are
    put into the data's order.

    Args:
        init: of text encoders. "embeddings": these alone, projected to the module's width, all
            else is left as initialised, the classifier too; "scratch": all of it is left so.
        keep_layers: of text encoders: the layers whose weights `module` has, from 0; None: all.
        kept_ids: of text encoders: the words whose rows `module` has, ascending; None: all.

    Raises:
        ModelError: `init` or `keep_layers` for images, or for each other.
        WeightsError: no weights, damaged ones, ones that do not fit, or other classes.
    """
    name = f"{where}: {PREFIX}{folder.path}"
    if isinstance(module, TextClassifier) and init != "weights":
        if keep_layers is not None:
            raise ModelError(
                f"{name}: keep_layers keeps weights and init: {init} leaves them; leave one out "
                "(`args` can set the depth too)"
            )
        return _load_part(module, folder, init=init, where=name, kept_ids=kept_ids)
    kind: Kind = "text" if isinstance(module, TextClassifier) else "image"
    if kind == "image" and (init != "weights" or keep_layers is not None):
        raise ModelError(f"{name}: init and keep_layers are of text encoders; leave them out")
    given, missing = _pretrained(folder, kind=kind, keep=head == "keep", where=name)
    if kept_ids is not None:
        hf_vocabulary.cut_vocabulary(given, kept_ids, name)
    if keep_layers is not None:
        hf_text.cut_layers(given, keep_layers)
    if isinstance(module, TextClassifier):
        hf_embeddings.cut_positions(given, module.network)
        if size := hf_embeddings.size_of(module.network):
            hf_embeddings.factorize(given, size, name, keep=True)
    state = {f"network.{key}": tensor for key, tensor in given.state_dict().items()}
    own = module.state_dict()
    # what the folder lacks stays as `build` has drawn it, from its seed
    fresh = [f"network.{key}" for key in missing if f"network.{key}" in own]
    state |= {key: own[key].clone() for key in fresh}
    order = _order(folder, class_names, name) if head == "keep" else None
    if order is not None:
        state = _reordered(given, state, order, kind)
    try:
        report = load_weights(module, state, head=head, where=name)
    except WeightsError as error:
        hint = _hint(given, module.network) if kind == "text" else ""
        raise WeightsError(f"{error}{hint}") from error
    if keep_layers is not None:
        hf_text.check_cut(given, module, name)
    if order is not None:
        _check_order(given, module, order, name)
    return _with_fresh(report, fresh)


def _load_part(
    module: TextClassifier,
    folder: HfFolder,
    *,
    init: Init,
    where: str,
    kept_ids: Sequence[int] | None,
) -> LoadReport:
    """Its embeddings alone, or nothing."""
    loaded: list[str] = []
    if init == "embeddings":
        given, _ = _pretrained(folder, kind="text", keep=False, where=where)
        if kept_ids is not None:
            hf_vocabulary.cut_vocabulary(given, kept_ids, where)
        loaded = hf_embeddings.project_embeddings(module, given, where)
    fresh = hf_text.begun_anew(module, loaded)
    return LoadReport(tensors=len(loaded), fresh=fresh, dropped=(), cast_from=())


def _with_fresh(report: LoadReport, fresh: Sequence[str]) -> LoadReport:
    """The report, with these counted among what was left as initialised."""
    added = [name for name in fresh if name not in report.fresh]
    return replace(
        report,
        tensors=report.tensors - len(added),
        fresh=(*added, *report.fresh),
        dropped=tuple(name for name in report.dropped if name not in fresh),
    )


def _from_config(folder: HfFolder, args: Mapping[str, Any], *, kind: Kind, classes: int) -> Any:
    """transformers' own network of config.json."""
    where = f"{PREFIX}{folder.path}"
    task = folder.config.get("problem_type")
    each = "an image" if kind == "image" else "a text"
    if task in OTHER_TASKS:
        raise ModelError(
            f"{where}: its problem_type is {task} ({OTHER_TASKS[task]} {each}); this job is "
            f"classification with one class {each}"
        )
    transformers = open_transformers(where)
    with quiet(transformers):
        try:
            config = transformers.AutoConfig.from_pretrained(folder.path, local_files_only=True)
            options, size = (
                hf_embeddings.split_size(config, args) if kind == "text" else (args, None)
            )
            _override(config, options, where)
            config.num_labels = classes
            config.architectures = config.architectures or []  # transformers reads a list
            if kind == "text":
                hf_text.check_encoder(config, where)
            network = getattr(transformers, AUTO[kind]).from_config(
                config, dtype=torch.float32, trust_remote_code=False, **OPTIONS[kind]
            )
        except failures() as error:
            raise _no_classifier(folder, kind, where, error) from error
    if size is not None:
        hf_embeddings.factorize(network, size, where, keep=False)
    return network


def _override(config: Any, args: Mapping[str, Any], where: str) -> None:
    known = {*config.to_dict(), *config.attribute_map}  # DistilBERT's n_layers has two names
    for key, value in args.items():
        if key not in known:
            near = difflib.get_close_matches(key, known, n=3)
            hint = f"; near: {', '.join(near)}" if near else ""
            raise ModelError(f"{where}: its configuration has no option {key!r}{hint}")
        setattr(config, key, value)


def _no_classifier(folder: HfFolder, kind: Kind, where: str, error: Exception) -> ModelError:
    named = folder.config.get("model_type")
    said = " ".join(str(error).split())[:200]
    why = "remote code is not run; " if "auto_map" in folder.config else ""
    return ModelError(
        f"{where}: no {kind} classifier can be built of its {named or 'unnamed'} model: {why}{said}"
    )


def _pretrained(
    folder: HfFolder, *, kind: Kind, keep: bool, where: str
) -> tuple[nn.Module, list[str]]:
    """The folder's own network in eval mode, and the names of what its weights lack."""
    transformers = open_transformers(where)
    with quiet(transformers), torch.random.fork_rng(devices=[]):
        try:
            network, info = getattr(transformers, AUTO[kind]).from_pretrained(
                folder.path,
                local_files_only=True,
                trust_remote_code=False,
                dtype=torch.float32,
                output_loading_info=True,
                **OPTIONS[kind],
            )
        except pickle.UnpicklingError as error:
            raise WeightsError(
                f"{where}: its weights hold pickled code, which is not run; save them again as "
                "safetensors (save_pretrained does)"
            ) from error
        except failures() as error:
            said = " ".join(str(error).split())[:200]
            raise WeightsError(f"{where}: its weights cannot be read: {said}") from error
    missing = sorted(info["missing_keys"])
    body = [key for key in missing if not _is_head(key)]
    if body or (missing and keep):
        hint = "" if body else "; it has no classifier of its own: set `head: new` and train it"
        listed = ", ".join((body or missing)[:SHOWN])
        raise WeightsError(f"{where}: {len(body or missing)} weights are missing: {listed}{hint}")
    if kind == "text":
        _check_depth(network, info["unexpected_keys"], where)
    return network.eval(), missing


def _check_depth(network: Any, unexpected: Sequence[str], where: str) -> None:
    """Layers that its config.json does not count would be left out in silence."""
    path = hf_text.encoder_layers(network)[0].removeprefix(f"{network.base_model_prefix}.")
    more = sorted(key for key in unexpected if path and f".{path}." in f".{key}")
    if more:
        raise WeightsError(
            f"{where}: its weights have layers that its config.json has not "
            f"(num_hidden_layers: {network.config.num_hidden_layers}): {', '.join(more[:SHOWN])}; "
            "copy the folder again, or take some of its layers with `keep_layers`"
        )


def _is_head(name: str) -> bool:
    parts = name.split(".")
    return any("classifier" in part or part in ("head", "pooler") for part in parts)


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


def _reordered(
    given: nn.Module, state: dict[str, Tensor], order: list[int], kind: Kind
) -> dict[str, Tensor]:
    """The state with the rows of every classifier in this order; some nets of images have two."""
    heads = [
        name
        for name, part in given.named_modules()
        if isinstance(part, nn.Linear) and part.out_features == len(order) and _is_head(name)
    ]
    if kind == "text":  # where a pooler may be as wide
        heads = heads[-1:]
    rows = {f"network.{name}.{part}" for name in heads for part in ("weight", "bias")}
    return {key: value[order] if key in rows else value for key, value in state.items()}


def _hint(given: Any, network: Any) -> str:
    """What to do where `args` has made another text encoder than the folder's."""
    sizes = hf_text.other_sizes(given.config.to_dict(), network.config.to_dict())
    if not sizes:
        return ""
    return (
        f"\n  `args` makes another network of it ({sizes}): set `init: embeddings` to take its "
        "embeddings alone, or keep whole layers with `keep_layers`"
    )


@torch.no_grad()
def _check_order(given: nn.Module, module: nn.Module, order: list[int], where: str) -> None:
    """The reordered network answers as the folder's own, class by class."""
    is_text = isinstance(module, TextClassifier)
    inputs = hf_text.random_rows(given) if is_text else {"pixel_values": _noise(given)}
    network: Any = module.eval().network
    expected = given(**inputs).logits[:, order]
    if not torch.allclose(network(**inputs).logits, expected, rtol=1e-3, atol=1e-4):
        raise WeightsError(
            f"{where}: its classifier cannot be put into the data's order of classes; write "
            "`data.labels` in the folder's order"
        )


def _noise(given: nn.Module) -> Tensor:
    config: Any = given.config
    size = getattr(config, "image_size", 64)
    sides = (size, size) if isinstance(size, int) else tuple(size)
    generator = torch.Generator().manual_seed(0)
    return torch.randn(2, getattr(config, "num_channels", 3), *sides, generator=generator)
