"""A vision transformer of a Hugging Face folder, on photographs: benchmarks/vit.md.

    python scripts/bench_vit.py --work DIR [--epochs 30]

Builds a folder as transformers writes it (a ViT's configuration and preprocessing, no weights),
trains the teacher from it on the flowers (4,317 photographs in a folder without a split), distills
a narrower and shallower ViT of the same folder, makes it int8, proves and times it: one recipe, the
whole pipeline. DIR keeps the run. Data: $EDGESTILL_DATA.
"""

from __future__ import annotations

import argparse
import datetime
import json
from pathlib import Path
from typing import Any

import transformers
from bench_shrink import DATA, ROOT
from edgestill.pipeline.flow import run
from edgestill.pipeline.markdown import summary_rows
from edgestill.pipeline.measure.machine import describe_machine
from edgestill.pipeline.recipe import Recipe
from edgestill.pipeline.recipe_file import load_recipe
from edgestill.pipeline.report import Report
from edgestill.pipeline.stage import Silent

SIDE, PATCH = 96, 12  # 64 patches and the class token
TEACHER = {"hidden_size": 192, "num_hidden_layers": 6, "num_attention_heads": 6,
           "intermediate_size": 768}  # fmt: skip
STUDENT = {"hidden_size": 96, "num_hidden_layers": 4, "num_attention_heads": 3,
           "intermediate_size": 384}  # fmt: skip
AUGMENT = {"crop": "resized", "flip": True}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--epochs", type=int, default=30, help="of the teacher; the student's too")
    given = parser.parse_args()
    folder = given.work.resolve() / "vit"
    write_folder(folder)
    report = run(recipe(folder, epochs=given.epochs), folder.parent / "run", events=Silent())
    assert report is not None
    target = ROOT / "benchmarks" / "vit.md"
    target.write_text(to_markdown(report, epochs=given.epochs))
    print(target.read_text())


def write_folder(folder: Path) -> None:
    """config.json and preprocessor_config.json."""
    config = transformers.ViTConfig(image_size=SIDE, patch_size=PATCH, **TEACHER)
    config.architectures = ["ViTForImageClassification"]
    config.save_pretrained(folder)
    half = [0.5, 0.5, 0.5]
    size = {"height": SIDE, "width": SIDE}
    transformers.ViTImageProcessor(size=size, image_mean=half, image_std=half).save_pretrained(
        folder
    )


def recipe(folder: Path, *, epochs: int) -> Recipe:
    training = {"epochs": epochs, "optimizer": "adamw", "lr": 0.001, "batch_size": 64,
                "augment": AUGMENT}  # fmt: skip
    network = {"model": f"hf:{folder}"}
    wish = {
        "data": {"train": {"path": str(DATA / "flowers")}, "test": {"fraction": 0.2}},
        "teacher": {**network, "train": training},
        "student": {**network, "args": STUDENT},
        "distill": training,
        "quantize": {},
        # of 863 photographs, on a tenth of which two nets of this kind differ
        "gate": {"max_drop_points": 8.0, "max_quantization_drop_points": 3.0},
    }
    path = folder.with_name("vit.yaml")
    path.write_text(json.dumps(wish, indent=1))  # JSON is YAML
    return load_recipe(str(path))  # preprocessing is what the folder says


def to_markdown(report: Report, *, epochs: int) -> str:
    assert report.verdict is not None
    rows: list[list[str]] = [list(row.values()) for row in summary_rows(report)]
    header = ["model", f"test accuracy (n = {report.models[0].n})", "drop, points",
              "95 % bound", "ONNX file", "p50, 1 thread"]  # fmt: skip
    lines = [header, ["---"] * len(header), *rows]
    table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    checks = "\n".join(f"- {c.outcome.upper()} `{c.name}`: {c.text}" for c in report.verdict.checks)
    parts = [
        "# A vision transformer from a Hugging Face folder",
        f"Made by `scripts/bench_vit.py --epochs {epochs}`: a ViT of {_shape(TEACHER)} teaches one "
        f"of {_shape(STUDENT)}, patches of {PATCH} in {SIDE} pixels, photographs of five flowers, "
        "both from random weights. One seed.",
        table,
        checks,
        _machine(report),
    ]
    return "\n\n".join(parts) + "\n"


def _shape(args: dict[str, Any]) -> str:
    return f"{args['num_hidden_layers']} layers, {args['hidden_size']} wide"


def _machine(report: Report) -> str:
    seconds = sum(stage.seconds for stage in report.stages if not stage.recalled)
    machine = describe_machine()
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    return (
        f"{seconds:.0f} s of stages. {datetime.date.today().isoformat()}, {machine['cpu_model']}, "
        f"{machine['available_threads']} threads, {versions}."
    )


if __name__ == "__main__":
    main()
