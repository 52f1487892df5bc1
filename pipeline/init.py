"""`compress init`: a runnable, commented recipe for the model and data a user has.

Looks at the data (classes, counts, sizes) and, where trained weights are given, measures which
common preprocessing they answer best under. It writes what it found and how, and guesses nothing
silently: preprocessing stands in the recipe with the accuracy it was chosen by.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from ..models.hf_folder import find_folder
from ..models.source import Network, open_network
from .data.look import Look, inputs_of, look_at, source_at
from .data.readers import open_source
from .distill.networks import load_given
from .errors import OutputError
from .file_recipe import TEST_FRACTION
from .measure.accuracy import run_module
from .recipe import PreprocessSpec, StudentSpec
from .recipe_file import absolute
from .recipe_writing import proposed_limit, relative, relative_model, scalar
from .text_init import is_about_texts, text_recipe
from .workspace import write_atomically

BATCH = 32
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
# How trained nets commonly see pixels: (channels, mean, std) after /255.
CONVENTIONS = {
    "ImageNet mean and std, RGB": ("rgb", *IMAGENET),
    "[-1, 1], RGB": ("rgb", (0.5,) * 3, (0.5,) * 3),
    "[0, 1], RGB": ("rgb", (0.0,) * 3, (1.0,) * 3),
    "ImageNet mean and std, BGR": ("bgr", *(part[::-1] for part in IMAGENET)),
    "[-1, 1], BGR": ("bgr", (0.5,) * 3, (0.5,) * 3),
    "[0, 1], BGR": ("bgr", (0.0,) * 3, (1.0,) * 3),
}


def write_recipe(
    model: str, *, weights: Path | None, data: Path, test: Path | None, size: int | None, out: Path
) -> list[str]:
    """Write `out`; returns what was found, a line each, for the person in front.

    Raises:
        OutputError: `out` exists. DataError, ModelError, WeightsError: what is given does not work.
    """
    if out.exists():
        raise OutputError(f"{out}: exists already and is not overwritten; choose another with -o")
    found = absolute(model, Path.cwd(), is_model=True)
    if is_about_texts(data, find_folder(found)):
        lines, text = text_recipe(model, weights=weights, data=data, test=test, size=size, out=out)
    else:
        lines, text = _image_recipe(
            model, weights=weights, data=data, test=test, size=size, out=out
        )
    write_atomically(out, text.encode())
    return [*lines, f"wrote {out}; next: compress run {out}"]


def _image_recipe(
    model: str, *, weights: Path | None, data: Path, test: Path | None, size: int | None, out: Path
) -> tuple[list[str], str]:
    """What was found, a line each, and the recipe."""
    look = look_at(source_at(data))
    side = size or look.usual_side
    base = out.resolve().parent
    lines = [_describe(look, data)]
    n_test = (
        len(open_source(source_at(test)).labels)
        if test
        else round(TEST_FRACTION * len(look.source.labels))
    )
    spec = StudentSpec(
        model=absolute(model, Path.cwd(), is_model=True),
        weights=None if weights is None else str(weights),
    )
    preprocess, reason = _preprocess(spec, look=look, side=side)
    lines.append(reason)
    text = _render(
        model=relative_model(model, base),
        weights=None if weights is None else relative(weights, base),
        data=relative(data, base),
        test=None if test is None else relative(test, base),
        preprocess=preprocess,
        found=lines,
        limit=proposed_limit(n_test),
        n_test=n_test,
        trained=spec.is_trained,
    )
    return lines, text


def _describe(look: Look, data: Path) -> str:
    counts = np.bincount(look.source.labels[look.source.labels >= 0])
    heights, widths = zip(*look.sizes, strict=True)
    shape = (
        f"all {heights[0]}×{widths[0]}"
        if len(look.sizes) == 1
        else f"{min(heights)}–{max(heights)} high, {min(widths)}–{max(widths)} wide"
    )
    return (
        f"{data}: {len(look.source.labels)} images in {len(look.source.class_names)} classes "
        f"({counts.min()} to {counts.max()} a class); {shape} ({len(look.images)} looked at)"
    )


def _preprocess(
    student: StudentSpec, *, look: Look, side: int
) -> tuple[PreprocessSpec | None, str]:
    """The section to write, and why; None where nothing is needed."""
    resize = None if look.sizes == {(side, side)} else round(side * 8 / 7)  # 256 for 224
    folder = find_folder(student.model)
    said = folder.preprocess() if folder is not None and student.is_trained else None
    if said is not None:
        return PreprocessSpec.model_validate(said), f"preprocessing: from {student.model}"
    if not student.is_trained:
        if resize is None:
            return None, "preprocessing: pixels as they are, mean and std of the training set"
        spec = PreprocessSpec(resize=resize, crop=(side, side))
        return spec, f"preprocessing: shorter side to {resize}, centre {side}×{side}"
    accuracies = dict(_measure(student, look=look, resize=resize, side=side))
    best = max(accuracies, key=lambda name: accuracies[name])
    figures = ", ".join(f"{name} {100 * value:.1f} %" for name, value in accuracies.items())
    return _convention(best, resize, side), (
        f"preprocessing: measured on {len(look.images)} images: {figures}; check that it is what "
        "the net was trained with"
    )


def _convention(name: str, resize: int | None, side: int) -> PreprocessSpec:
    channels, mean, std = CONVENTIONS[name]
    return PreprocessSpec.model_validate(
        {"resize": resize, "crop": side, "channels": channels, "mean": mean, "std": std}
    )


def _measure(
    student: StudentSpec, *, look: Look, resize: int | None, side: int
) -> Iterator[tuple[str, float]]:
    names = look.source.class_names
    network = open_network(
        student.model, args={}, classes=len(names), input_shape=(3, side, side), seed=0
    )
    load_given(network.module, student, names, where="student")
    network.module.eval()
    labels = np.array(look.labels)
    for name in CONVENTIONS:
        spec = _convention(name, resize, side)
        yield name, float((_answers(network, look.images, spec) == labels).mean())


def _answers(
    network: Network, images: list[Image.Image], spec: PreprocessSpec
) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    inputs = torch.from_numpy(inputs_of(images, spec))
    with torch.inference_mode():
        answers = [
            run_module(network.module, batch, fixed_batch=network.fixed_batch).argmax(1)
            for batch in torch.split(inputs, BATCH)
        ]
    return torch.cat(answers).numpy()


def _render(
    *,
    model: str,
    weights: str | None,
    data: str,
    test: str | None,
    preprocess: PreprocessSpec | None,
    found: list[str],
    limit: float,
    n_test: int,
    trained: bool,
) -> str:
    comments = "\n".join(f"# {line}" for line in found)
    tested = f"{{path: {scalar(test)}}}" if test else f"{{fraction: {TEST_FRACTION}}}"
    student = [f"  model: {scalar(model)}"]
    if weights is not None:
        student.append(f"  weights: {scalar(weights)}")
    if not trained:
        student.append(
            "  train:                             # learnt from the labels; add a `teacher:` "
            "section and\n"
            "    epochs: 30                       # move this to `distill:` to learn from it\n"
            "    augment: {crop: pad, flip: true} # no flip where left and right differ"
        )
    return f"""\
# Written by `compress init`. Every key: `compress schema recipe`.
{comments}
task: image-classification
seed: 0
data:
  train: {{path: {scalar(data)}}}
  test: {tested:<35}# {"its own set" if test else "of train, by content hash"}; {n_test} images
  validation: 0.1                      # of train; model selection sees it, never test
  calibration: 512                     # samples of train that set the int8 ranges
{_preprocess_section(preprocess, trained)}student:
{chr(10).join(student)}
quantize:
  targets: [arm, x86]                  # add nothing for one CPU family only: [arm] or [x86-vnni]
export:
  batch: dynamic                       # or a fixed number
  min_runtime: "1.17"                  # oldest onnxruntime that must load the file
gate:
  max_drop_points: {limit:<20g}# against {"its float version" if trained else "the float student"};\
 {n_test} samples can decide this
"""


def _preprocess_section(spec: PreprocessSpec | None, trained: bool) -> str:
    if spec is None:
        return ""
    kept: Mapping[str, object] = spec.model_dump(mode="json", exclude_none=True)
    order = ("resize", "crop", "interpolation", "antialias", "channels", "mean", "std")
    rows = [f"    {key}: {scalar(kept[key])}" for key in order if key in kept]
    why = "  # must be what the net was trained with" if trained else ""
    return "\n".join([f"  preprocess:{why}", *rows]) + "\n"
