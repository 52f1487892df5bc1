"""What a recipe for texts means where it says nothing. Pure; no torch."""

from __future__ import annotations

from typing import Any

from ..models.hf_folder import PREFIX as HF

# How encoders are fine-tuned: Devlin et al. 2019 (AdamW, 2e-5 to 5e-5, batches of 16 or 32, decay
# 0.01, clipped at 1). Batches differ in length, so a step would be compiled again and again.
TRAINING = {
    "optimizer": "adamw", "lr": 5e-5, "batch_size": 32, "weight_decay": 0.01, "clip_norm": 1.0,
    "epochs": 3, "warmup_epochs": 0.3, "compile": "never",
}  # fmt: skip
# Distillation wants a higher rate and more epochs (TextBrewer's advice, Yang et al. 2020).
DISTILLING = {**TRAINING, "lr": 1e-4, "epochs": 10, "views": 1}
VIEWS = 8  # where a text is seen otherwise in each


def with_text_defaults(recipe: dict[str, Any]) -> dict[str, Any]:
    """The mapping of a recipe, completed; what has the wrong type is left to validation."""
    names = ("data", "distill", "quantize", "export")
    data, distill, quantize, export = (recipe.get(name) for name in names)
    changed = dict(recipe)
    if isinstance(data, dict) and isinstance(data.get("tokenize") or {}, dict):
        wish = data.get("tokenize") or {}
        wish = wish if wish.get("tokenizer") else {**wish, "tokenizer": _tokenizer_of(recipe)}
        if isinstance(export, dict) and export.get("sequence") == "fixed":
            wish = {**wish, "pad": "max_length"}
        changed["data"] = {**data, "tokenize": wish}
    for name in ("teacher", "student"):
        section = recipe.get(name)
        if isinstance(section, list):
            changed[name] = [_trained(one) for one in section]
        elif section is not None:
            changed[name] = _trained(section)
    if distill is None and recipe.get("teacher"):
        distill = {}
    if isinstance(distill, dict):
        seen_otherwise = {"mask", "span"} & set(distill.get("augment") or {})
        views = {"views": VIEWS} if seen_otherwise else {}
        changed["distill"] = {**DISTILLING, **views, **distill}
    if isinstance(quantize, dict):
        changed["quantize"] = {"qat": None, **quantize}
    return changed


def _tokenizer_of(recipe: dict[str, Any]) -> str | None:
    """The first network that is a Hugging Face folder: teachers, then the student."""
    teacher = recipe.get("teacher")
    networks = [*(teacher if isinstance(teacher, list) else [teacher]), recipe.get("student")]
    models = [str(one.get("model")) for one in networks if isinstance(one, dict)]
    return next((model for model in models if model.startswith(HF)), None)


def _trained(network: Any) -> Any:
    if isinstance(network, dict) and isinstance(network.get("train"), dict):
        return {**network, "train": {**TRAINING, **network["train"]}}
    return network
