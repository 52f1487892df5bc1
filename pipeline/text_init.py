"""`compress init` for texts: a runnable, commented recipe for an encoder and labelled texts.

Looks at columns, classes, and how many tokens the texts have. An encoder that classifies already
goes on as it is; a headless one is fine-tuned, and teaches some of its own layers.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from ..models.hf_folder import HfFolder, find_folder
from .data.source import Source
from .data.text_readers import SUFFIXES, Columns, open_texts
from .data.tokenizer import choose_length, is_tokenizer_folder, open_tokenizer
from .errors import UsageError
from .file_recipe import TEST_FRACTION
from .recipe_file import absolute
from .recipe_writing import USUAL_FLIPS, proposed_limit, relative, relative_model, scalar

ONLY_TEXTS = tuple(suffix for suffix in SUFFIXES if suffix != ".parquet")
DISTILLED_FLIPS = 0.12  # share of answers on which a student of half the layers differs (SST-2)
SHOWN = 8  # class names in a line


def is_about_texts(data: Path, folder: HfFolder | None) -> bool:
    """The set is a file of texts, or a .parquet beside a folder that has a tokenizer."""
    files = [data, *(data.iterdir() if data.is_dir() else ())]
    if any(file.suffix.lower() in ONLY_TEXTS for file in files):
        return True
    return folder is not None and is_tokenizer_folder(folder.path)


def text_recipe(
    model: str, *, weights: Path | None, data: Path, test: Path | None, size: int | None, out: Path
) -> tuple[list[str], str]:
    """What was found, a line each, and the recipe.

    Raises:
        UsageError: the model is no Hugging Face folder, or an option is of images.
        DataError, ModelError: what is given does not work.
    """
    folder = find_folder(absolute(model, Path.cwd(), is_model=True))
    if folder is None:
        raise UsageError(
            f"--model {model}: {data} holds texts, which an encoder in a Hugging Face folder "
            "reads; give it as hf:DIR, or write a recipe for your own FILE.py:factory (README)"
        )
    if weights is not None or size is not None:
        raise UsageError("--weights and --size are of images; a folder has weights and tokenizer")
    source = open_texts(data.expanduser().resolve(), Columns())
    tokenizer = open_tokenizer(f"hf:{folder.path}", paired=False)
    lengths = tokenizer.encode(
        text for text in source.contents() if isinstance(text, tuple)
    ).lengths
    longest = choose_length(lengths, longest=tokenizer.longest)
    n_test = (
        len(open_texts(test.expanduser().resolve(), Columns()).labels)
        if test
        else round(TEST_FRACTION * len(source.labels))
    )
    lines = [_describe(source, data), _describe_lengths(lengths, longest), _describe_model(folder)]
    base = out.resolve().parent
    flips = USUAL_FLIPS if _classifies(folder) else DISTILLED_FLIPS
    tested = (
        f"{{path: {scalar(relative(test, base))}}}" if test else f"{{fraction: {TEST_FRACTION}}}"
    )
    comments = "\n".join(f"# {line}" for line in lines)
    return (
        lines,
        f"""\
# Written by `compress init`. Every key: `compress schema recipe`.
{comments}
task: text-classification
seed: 0
data:
  train: {{path: {scalar(relative(data, base))}}}
  test: {tested:<35}# {"its own set" if test else "of train, by content hash"}; {n_test} texts
  validation: 0.1                      # of train; model selection sees it, never test
{_labels_section(folder, source)}  calibration: 512                     # texts of train that set \
the int8 ranges
  tokenize:
    max_length: {longest:<23}# tokens; longer texts are cut, and counted
{_networks_section(folder, scalar(relative_model(model, base)))}quantize:
  targets: [arm, x86]                  # add nothing for one CPU family only: [arm] or [x86-vnni]
export:
  sequence: dynamic                    # or fixed, at max_length
  min_runtime: "1.17"                  # oldest onnxruntime that must load the file
profile:
  sequences: [32]                      # tokens at which latency is measured
gate:
  max_drop_points: {proposed_limit(n_test, flips=flips):<20g}# {n_test} texts can decide this
""",
    )


def _describe(source: Source, data: Path) -> str:
    counts = np.bincount(source.labels[source.labels >= 0])
    more = f", … ({len(source.class_names)})" if len(source.class_names) > SHOWN else ""
    return (
        f"{data}: {len(source.labels)} texts in {len(source.class_names)} classes "
        f"({', '.join(source.class_names[:SHOWN])}{more}; {counts.min()} to {counts.max()} a class)"
    )


def _describe_lengths(lengths: np.ndarray[tuple[int], np.dtype[np.int64]], longest: int) -> str:
    cut = int((lengths > longest).sum())
    return (
        f"tokens: median {np.median(lengths):.0f}, longest {lengths.max()}; max_length {longest} "
        f"cuts {cut} texts"
    )


def _describe_model(folder: HfFolder) -> str:
    kind = folder.config.get("model_type", "unnamed")
    if _classifies(folder):
        return f"model: a {kind} that classifies already; it is exported and made int8 as it is"
    return (
        f"model: a {kind} without a classifier; it is fine-tuned, and teaches the layers "
        f"{list(_some_layers(folder))} of its own"
    )


def _classifies(folder: HfFolder) -> bool:
    named = folder.config.get("architectures") or ()
    return bool(folder.weights) and any("Classification" in name for name in named)


def _some_layers(folder: HfFolder) -> tuple[int, ...]:
    """Half of its layers, spread, the last one among them."""
    depth = int(folder.config.get("num_hidden_layers") or folder.config.get("n_layers") or 1)
    kept = max(1, depth // 2)
    if kept == 1:
        return (depth - 1,)
    return tuple(round(place * (depth - 1) / (kept - 1)) for place in range(kept))


def _labels_section(folder: HfFolder, source: Source) -> str:
    """Names of the classes, where neither the folder nor the data have any."""
    if folder.names_its_classes or not _classifies(folder):
        return ""
    return (
        f"  # in the order of the network's outputs, which its folder does not name: check it\n"
        f"  labels: {scalar(list(source.class_names))}\n"
    )


def _networks_section(folder: HfFolder, model: str) -> str:
    if _classifies(folder):
        return f"student:\n  model: {model}\n"
    return f"""\
teacher:
  model: {model}
  head: new                            # it has no classifier of these classes yet
  train: {{epochs: 3}}
student:
  model: {model}
  head: new
  keep_layers: {scalar(list(_some_layers(folder))):<24}# fewer are faster
distill:
  epochs: 6
"""
