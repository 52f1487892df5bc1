"""What the student learns from, where the recipe leaves it open, and why. Pure; no torch.

Vision (reference figures: DKD, ReviewKD and standardized KD lie within a point of each other, and
tuned KD matches them at ImageNet's scale):

* `fast`: soft labels stored once, KD on standardized logits. A step costs what a supervised one
  does, whatever the teacher.
* `quality`: the teacher runs beside the student, and ReviewKD compares their stages as well.
* `auto` is `fast`.

Texts:

* `fast`: probability distillation, KD at temperature 2 with 0.1 of cross-entropy (TextBrewer's
  advice, Yang et al. 2020), from soft labels stored once.
* `quality`: the teacher runs beside the student, and the attention relations of one layer are
  compared as well, queries, keys and values each with weight 1 (MiniLMv2, Wang et al. 2021).
* `auto` is `fast`.
"""

from __future__ import annotations

from dataclasses import dataclass

from .training_spec import (
    DistillSpec,
    FeatureSpec,
    HardSpec,
    KdSpec,
    Objective,
    RelationsSpec,
    ReviewSpec,
    Target,
)

# Weight of KD on standardized logits: the authors' 9 at temperature 2 with 0.1 of cross-entropy.
STANDARDIZED = KdSpec(weight=9.0, temperature=2.0, standardize=True)
HARD = HardSpec(weight=0.1)
TEXT: tuple[Objective, ...] = (KdSpec(weight=0.9, temperature=2.0), HARD)


@dataclass(frozen=True)
class Plan:
    """The objectives with their weights, who answers, and one sentence on why."""

    objectives: tuple[Objective, ...]
    target: Target
    why: str

    @property
    def features(self) -> tuple[FeatureSpec, ...]:
        return tuple(term for term in self.objectives if isinstance(term, FeatureSpec))


def choose(spec: DistillSpec, *, is_text: bool = False) -> Plan:
    """Fill in `objectives` and `target`. Terms of weight 0 are left out."""
    if spec.objectives is not None:
        kept = tuple(term for term in spec.objectives if term.weight > 0)
        has_features = any(isinstance(term, FeatureSpec) for term in kept)
        target: Target = spec.target or ("live" if has_features else "stored")
        return Plan(kept, target, f"{_names(kept)} from {SAID[target]}, as the recipe says")
    if spec.target is not None and spec.target in OWN:
        own = OWN[spec.target]
        why = f"{_names(own)} from {SAID[spec.target]}: the published weights of that method"
        return Plan(own, spec.target, why)
    base: tuple[Objective, ...]
    more: Objective
    if is_text:
        base, more, what = TEXT, RelationsSpec(), "attention relations"
    else:
        base, more, what = (STANDARDIZED, HARD), ReviewSpec(), "stages"
    quality = spec.strategy == "quality"
    objectives = (*base, more) if quality else base
    target = spec.target or ("live" if quality else "stored")
    if quality:
        why = f"`quality` compares {what} too, which needs the teacher beside the student"
    elif is_text:
        why = f"`{spec.strategy}` for texts is the teacher's probabilities"
    else:
        why = f"`{spec.strategy}` for images is logits alone, which costs no more than labels do"
    return Plan(objectives, target, f"{_names(objectives)} from {SAID[target]}: {why}")


SAID: dict[Target, str] = {
    "stored": "stored soft labels",
    "live": "the live teacher",
    "ema": "the average of the student itself",
    "exits": "the student's deepest exit",
    "peers": "students that learn together",
    "joint": "a teacher trained together with the student",
}

# Objectives where a target has no teacher to be told apart from: the published settings.
OWN: dict[Target, tuple[Objective, ...]] = {
    "ema": (HardSpec(weight=1.0), KdSpec(weight=1.0, temperature=1.0)),
    "exits": (HardSpec(weight=0.9), KdSpec(weight=0.1, temperature=3.0)),  # BYOT: alpha 0.1, T 3
    "peers": (HardSpec(weight=1.0), KdSpec(weight=1.0, temperature=1.0)),  # DML: T 1
    "joint": (HardSpec(weight=1.0), KdSpec(weight=1.0, temperature=1.0)),
}


def _names(objectives: tuple[Objective, ...]) -> str:
    return " + ".join(
        f"{term.weight:g}·{term.name}"
        + (" (standardized)" if getattr(term, "standardize", False) else "")
        for term in objectives
    )
