"""How a network is trained, and what a student learns from: the sections that `recipe.py` joins.

An objective is one term of the loss, named in the recipe with its weight; a target is who answers
for it (stored labels, a live teacher, the network itself, peers). Any objective over logits goes
with any target, one teacher or several, labelled images or not; `strategy.py` fills in
what the recipe leaves open.
"""

from __future__ import annotations

from typing import Annotated, Literal, Self, get_args

from pydantic import Discriminator, Field, Tag, model_validator

from .spec import Fraction, NotNegative, Positive, Size, Spec

Target = Literal["stored", "live", "ema", "exits", "peers", "joint"]
TAUGHT: tuple[Target, ...] = ("stored", "live")  # by a teacher, or by the generation before


class AugmentSpec(Spec):
    """Replayable augmentation: every view is a function of (sample, view number, seed)."""

    crop: Literal["none", "pad", "resized"] = "pad"
    pad: Size | None = None  # pixels of reflect padding; None: an eighth of the side
    scale: tuple[Fraction, Annotated[float, Field(gt=0, le=1)]] = (0.35, 1.0)  # area, `resized`
    flip: bool = False  # left-right
    erase: Annotated[float, Field(ge=0, le=1)] = 0.0  # probability of random erasing
    mixup: NotNegative = 0.0  # alpha of Beta(alpha, alpha); 0: off
    cutmix: NotNegative = 0.0
    mask: Annotated[float, Field(ge=0, lt=1)] = 0.0  # of texts: share of their pieces hidden
    span: Annotated[float, Field(ge=0, le=1)] = 0.0  # … probability of being cut to a run of pieces

    @model_validator(mode="after")
    def _one_mix(self) -> Self:
        if self.mixup and self.cutmix:
            raise ValueError("mixup and cutmix are both on: choose one")
        if self.scale[0] >= self.scale[1]:
            raise ValueError(f"scale: {list(self.scale)} must rise from its first to its second")
        return self

    @property
    def of_texts(self) -> bool:
        """It asks for views of texts."""
        return bool(self.mask or self.span)

    @property
    def of_images(self) -> bool:
        """It asks for views of images that are not the default ones."""
        return self.model_copy(update={"mask": 0.0, "span": 0.0}) != AugmentSpec()


class TrainSpec(Spec):
    """One training run. Used for the teacher, for a student without one, and for distillation."""

    epochs: Size = 30
    batch_size: Size = 128  # over all processes
    optimizer: Literal["sgd", "adamw"] = "sgd"
    lr: Positive | None = None  # None: 0.1 · batch/256 for sgd, 1e-3 for adamw
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9  # sgd (Nesterov)
    weight_decay: NotNegative = 5e-4  # on matrices and kernels only
    schedule: Literal["cosine", "one-cycle", "constant"] = "cosine"
    warmup_epochs: NotNegative = 1.0  # at most half of the run
    label_smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.0
    ema: Annotated[float | None, Field(gt=0, lt=1)] = None  # decay a step; shipped if set
    clip_norm: Positive | None = 5.0
    early_stopping: Size | None = None  # epochs without a better validation accuracy
    select: Literal["best", "final"] = "best"  # which epoch's weights go on
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    compile: Literal["auto", "never", "always"] = "auto"  # torch.compile; auto: where it pays
    freeze_norm: bool = False  # BatchNorm keeps its statistics; for fine-tuning small batches
    checkpoint_minutes: NotNegative = 1.0  # at the end of an epoch at earliest
    augment: AugmentSpec = AugmentSpec()


class ObjectiveSpec(Spec):
    """What every term of the loss has: its weight, and how that changes over the run."""

    weight: NotNegative = 1.0
    warmup_epochs: NotNegative = 0.0  # rises linearly from 0
    fade: Literal["none", "linear", "cosine"] = "none"  # falls to 0 at the end of the run


class HardSpec(ObjectiveSpec):
    """Cross-entropy with the true labels, of the images that have one."""

    name: Literal["hard"] = "hard"


def _word_or_number(value: object) -> str:
    return "word" if isinstance(value, str) else "number"


class SoftSpec(ObjectiveSpec):
    """Base of the objectives that compare the student's logits with the target's."""

    temperature: Annotated[  # curriculum: CTKD, learned against
        Annotated[Positive, Tag("number")] | Annotated[Literal["curriculum"], Tag("word")],
        Discriminator(_word_or_number),
    ] = 4.0
    standardize: bool = False  # z-scored logits (Sun et al. 2024); temperature is then around 2


class KdSpec(SoftSpec):
    """T² · KL(target ‖ student) (Hinton et al. 2015)."""

    name: Literal["kd"] = "kd"
    weight: NotNegative = 0.9


class DkdSpec(SoftSpec):
    """KD taken apart: alpha · target class + beta · the other classes (Zhao et al. 2022)."""

    name: Literal["dkd"] = "dkd"
    alpha: NotNegative = 1.0
    beta: NotNegative = 8.0


class DistSpec(SoftSpec):
    """Correlation of rows and columns of the probabilities (Huang et al. 2022)."""

    name: Literal["dist"] = "dist"
    weight: NotNegative = 2.0
    beta: NotNegative = 1.0  # between classes, a row a sample
    gamma: NotNegative = 1.0  # within a class, a column a class


class FeatureSpec(ObjectiveSpec):
    """Base of the objectives on intermediate layers, named by module path, globs allowed.

    None: the end of each resolution stage, deepest with deepest.
    """

    student: tuple[str, ...] | None = None
    teacher: tuple[str, ...] | None = None
    of: Annotated[int, Field(ge=1)] = 1  # which teacher, where there are several


class HintSpec(FeatureSpec):
    """Mean squared error through a learned projection (FitNet, Romero et al. 2015)."""

    name: Literal["hint"] = "hint"
    weight: NotNegative = 100.0  # as in RepDistiller; the middle stage unless layers are named


class AttentionSpec(FeatureSpec):
    """Where each stage looks: its mean squared activation (Zagoruyko & Komodakis 2017)."""

    name: Literal["attention"] = "attention"
    weight: NotNegative = 1000.0


class ReviewSpec(FeatureSpec):
    """Fused student stages against every teacher stage (ReviewKD, Chen et al. 2021)."""

    name: Literal["reviewkd"] = "reviewkd"
    weight: NotNegative = 1.0  # authors: 0.6 to 8


class RkdSpec(FeatureSpec):
    """Distances and angles between samples of a batch (Park et al. 2019), last stage, pooled."""

    name: Literal["rkd"] = "rkd"
    distance: NotNegative = 25.0
    angle: NotNegative = 50.0


class TokenSpec(FeatureSpec):
    """Base of the feature objectives of texts, on what an encoder computes for each token."""


class HiddenSpec(TokenSpec):
    """Mean squared error of hidden states through a learned matrix (TinyBERT, Jiao et al. 2020).

    None: the embeddings, and the outputs of all layers, each with one of the teacher's.
    """

    name: Literal["hidden"] = "hidden"
    weight: NotNegative = 1.0  # the paper's, of every layer


class RelationsSpec(TokenSpec):
    """How tokens relate by their queries, keys and values (MiniLMv2, Wang et al. 2021).

    Layers are named as three projections in that order. None: the student's last layer, and an
    upper one of the teacher.
    """

    name: Literal["relations"] = "relations"
    weight: NotNegative = 1.0  # the paper's, of each of the three
    heads: Size | None = None  # relation heads; None: as many as the teacher's layer attends with


Objective = Annotated[
    HardSpec
    | KdSpec
    | DkdSpec
    | DistSpec
    | HintSpec
    | AttentionSpec
    | ReviewSpec
    | RkdSpec
    | HiddenSpec
    | RelationsSpec,
    Field(discriminator="name"),
]


def objective_names() -> list[str]:
    """What `name:` of an objective may be."""
    kinds = get_args(get_args(Objective)[0])
    return [kind.model_fields["name"].default for kind in kinds]


def _word_or_many(value: object) -> str:
    return "many" if isinstance(value, list | tuple) else "word"


class DistillSpec(TrainSpec):
    """Training against a teacher, oneself or peers. What is left open, `strategy` fills in."""

    strategy: Literal["auto", "fast", "quality"] = "auto"
    objectives: tuple[Objective, ...] | None = None
    target: Target | None = None  # None: stored, or live where a feature is compared
    combine: Annotated[  # several teachers; a list: a weight for each
        Annotated[Literal["mean", "confidence"], Tag("word")]
        | Annotated[tuple[NotNegative, ...], Tag("many")],
        Discriminator(_word_or_many),
    ] = "mean"
    views: Size = 8  # augmented views of the training set that a teacher labels
    generations: Size = 1  # born-again: each is taught by the one before
    peers: Annotated[int, Field(ge=2)] = 2  # `peers`: students that learn together
    target_decay: Fraction = 0.999  # `ema`: of the average that teaches
    balance: bool = False  # keeps the terms' sizes in the ratio of their weights by itself
    confidence_floor: Annotated[float | None, Field(ge=0, lt=1)] = None  # of unlabelled images
    baseline: bool = False  # also train the student without a teacher, for comparison

    @model_validator(mode="after")
    def _something_to_learn(self) -> Self:
        terms = self.objectives or ()
        names = [term.name for term in terms]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"objectives: {', '.join(twice)} named more than once")
        if self.objectives is not None and not any(term.weight > 0 for term in terms):
            raise ValueError("objectives: none has a weight above 0: there is nothing to learn")
        if isinstance(self.combine, tuple) and not sum(self.combine) > 0:
            raise ValueError("combine: the teachers' weights sum to 0: nobody would teach")
        return self
