"""Every option a user can write, as frozen pydantic models. No torch.

This file says what a recipe may hold and what does not fit together; `recipe_file.py` reads the
YAML, keeps its line numbers and resolves its paths. A threshold in `gate` whose measurement the
recipe leaves out is an error here, before anything is trained.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    Tag,
    model_validator,
)

Fraction = Annotated[float, Field(gt=0, lt=1)]
Positive = Annotated[float, Field(gt=0)]
Size = Annotated[int, Field(ge=1)]


class Spec(BaseModel):
    """Base of every section: frozen, and an unknown key is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())


class ComputeSpec(Spec):
    """Where and with how much the work is done."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    threads: Size | None = None  # None: every CPU this process may use
    memory_budget_gib: Positive = 2.0  # decoded images above this stay on disk, memory-mapped


def _pair(value: object) -> object:
    """`32` means `[32, 32]` for a crop; a resize of one number is the shorter side."""
    return [value, value] if isinstance(value, int) and not isinstance(value, bool) else value


class PreprocessSpec(Spec):
    """From a decoded image to the network's input; the one definition used everywhere.

    decode (EXIF turned, 8 bits a channel) → `channels` → `resize` → centre `crop` →
    x / max_value → (x - mean) / std → float32 (C, H, W).
    """

    resize: Size | tuple[Size, Size] | None = None  # shorter side, or (height, width); None: none
    crop: Annotated[tuple[Size, Size] | None, BeforeValidator(_pair)] = None  # (height, width)
    interpolation: Literal["nearest", "bilinear", "bicubic"] = "bilinear"
    antialias: bool = True
    channels: Literal["rgb", "bgr", "gray"] = "rgb"
    max_value: Positive = 255.0  # pixel value that becomes 1.0
    mean: tuple[float, ...] | None = None  # per channel, after /max_value; None: of the train set
    std: tuple[Positive, ...] | None = None

    @model_validator(mode="after")
    def _channels_match(self) -> Self:
        count = self.channel_count
        for name, values in (("mean", self.mean), ("std", self.std)):
            if values is not None and len(values) != count:
                raise ValueError(
                    f"{name} has {len(values)} values but channels: {self.channels} has {count}"
                )
        return self

    @property
    def channel_count(self) -> int:
        return 1 if self.channels == "gray" else 3


class SourceSpec(Spec):
    """A labelled set: an image folder (one folder a class), a .parquet file, or `digits`."""

    path: str
    image: str | None = None  # parquet: column of HF image structs; found by itself if unique
    label: str | None = None  # parquet: column of integer or string labels


class SplitSpec(Spec):
    """A part of train, taken once, stratified, by content hash."""

    fraction: Fraction


def _which_part(value: object) -> str:
    """`{fraction: 0.2}` or `0.1` takes a part of train; anything else names a set."""
    if isinstance(value, int | float):
        return "number"
    keys = value if isinstance(value, dict) else vars(value) if isinstance(value, Spec) else {}
    return "split" if "fraction" in keys else "source"


_Source = Annotated[SourceSpec, Tag("source")]
_Split = Annotated[SplitSpec, Tag("split")]
_Number = Annotated[Fraction, Tag("number")]


class DataSpec(Spec):
    """The sets. Model selection sees validation, calibration sees train, test is touched once."""

    train: SourceSpec
    test: Annotated[_Source | _Split, Discriminator(_which_part)]
    validation: Annotated[_Source | _Split | _Number, Discriminator(_which_part)] = 0.1
    calibration: Size = 512  # samples of train
    labels: tuple[str, ...] | None = None  # class names in order, where the data has none
    preprocess: PreprocessSpec | None = None
    on_corrupt: Literal["error", "skip"] = "error"
    allow_overlap: bool = False  # the same image in train and test


class AugmentSpec(Spec):
    """Replayable augmentation: every view is a function of (sample, view number, seed)."""

    crop: Literal["none", "pad", "resized"] = "pad"
    pad: Size | None = None  # pixels of reflect padding; None: an eighth of the side
    scale: tuple[Fraction, Annotated[float, Field(gt=0, le=1)]] = (0.35, 1.0)  # area, `resized`
    flip: bool = False  # left-right
    erase: Annotated[float, Field(ge=0, le=1)] = 0.0  # probability of random erasing
    mixup: Annotated[float, Field(ge=0)] = 0.0  # alpha of Beta(alpha, alpha); 0: off
    cutmix: Annotated[float, Field(ge=0)] = 0.0

    @model_validator(mode="after")
    def _one_mix(self) -> Self:
        if self.mixup and self.cutmix:
            raise ValueError("mixup and cutmix are both on: choose one")
        if self.scale[0] >= self.scale[1]:
            raise ValueError(f"scale: {list(self.scale)} must rise from its first to its second")
        return self


class TrainSpec(Spec):
    """One training run. Used for the teacher, for a student without one, and for distillation."""

    epochs: Size = 30
    batch_size: Size = 128
    optimizer: Literal["sgd", "adamw"] = "sgd"
    lr: Positive | None = None  # None: 0.1 · batch/256 for sgd, 1e-3 for adamw
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9  # sgd (Nesterov)
    weight_decay: Annotated[float, Field(ge=0)] = 5e-4  # on matrices and kernels only
    schedule: Literal["cosine", "one-cycle", "constant"] = "cosine"
    warmup_epochs: Annotated[float, Field(ge=0)] = 1.0  # at most half of the run
    label_smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.0
    ema: Annotated[float | None, Field(gt=0, lt=1)] = None  # decay a step; shipped if set
    clip_norm: Positive | None = 5.0
    early_stopping: Size | None = None  # epochs without a better validation accuracy
    select: Literal["best", "final"] = "best"  # which epoch's weights go on
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    checkpoint_minutes: Annotated[float, Field(ge=0)] = 1.0  # at the end of an epoch at earliest
    augment: AugmentSpec = AugmentSpec()


class DistillSpec(TrainSpec):
    """Training against the teacher's stored soft labels and the hard ones."""

    strategy: Literal["auto"] = "auto"  # vision: stored soft labels, KD + cross-entropy
    temperature: Positive = 4.0
    soft_weight: Annotated[float, Field(ge=0)] = 0.9  # of T² · KL(teacher ‖ student)
    hard_weight: Annotated[float, Field(ge=0)] = 0.1  # of cross-entropy
    views: Size = 8  # augmented views of the training set that the teacher labels

    @model_validator(mode="after")
    def _something_to_learn(self) -> Self:
        if self.soft_weight + self.hard_weight == 0:
            raise ValueError("soft_weight and hard_weight are both 0: there is nothing to learn")
        return self


class NetworkSpec(Spec):
    """Where a network comes from: a zoo name, FILE.py:factory, or FILE.pt2."""

    model: str
    args: dict[str, Any] = {}  # passed to the factory
    weights: str | None = None  # safetensors, or a state dict that torch.load(weights_only) reads
    head: Literal["keep", "new"] = "keep"  # new: the classifier is replaced, for another task
    train: TrainSpec | None = None

    @property
    def is_program(self) -> bool:
        return self.model.endswith(".pt2")

    @property
    def is_trained(self) -> bool:
        return self.weights is not None or self.is_program


class TeacherSpec(NetworkSpec):
    min_accuracy: Fraction | None = None  # on validation; below it, it does not teach


class StudentSpec(NetworkSpec):
    pass


class QuantizeSpec(Spec):
    """Static int8. The targets decide the encoding, so that every one of them computes the same."""

    mode: Literal["ptq"] = "ptq"
    targets: tuple[Literal["arm", "x86", "x86-vnni"], ...] = Field(("arm", "x86"), min_length=1)
    calibrator: Literal["minmax", "percentile"] = "minmax"


def _dotted(value: object) -> object:
    """YAML reads an unquoted 1.20 as a number; 1.2 would be a different release."""
    if isinstance(value, float):
        raise ValueError(f"{value} reads as a number: write it in quotes, e.g. '1.17'")
    return value


class ExportSpec(Spec):
    batch: Literal["dynamic"] | Size = "dynamic"
    min_runtime: Annotated[str, BeforeValidator(_dotted), Field(pattern=r"^\d+\.\d+(\.\d+)?$")] = (
        "1.17"  # oldest onnxruntime that must load the file
    )
    simplify: bool = True

    @model_validator(mode="after")
    def _runtime_is_reachable(self) -> Self:
        version = tuple(int(part) for part in self.min_runtime.split(".")[:2])
        if version < (1, 14):
            # opset 18 is what torch's exporter is written in; onnxruntime reads it from 1.14 on
            raise ValueError(
                f"{self.min_runtime} is older than 1.14, the first onnxruntime that reads opset 18"
            )
        return self


class ProfileSpec(Spec):
    """Latency at batch 1, one thread and all threads, every model in turns."""

    devices: tuple[Literal["local"], ...] = Field(("local",), min_length=1)
    launches: Annotated[int, Field(ge=3)] = 5  # fresh processes a model; the spread is over these
    runs: Annotated[int, Field(ge=20)] = 200  # timed inferences a model, launch and thread count


class GateSpec(Spec):
    """What must hold for `model.onnx` to appear."""

    max_drop_points: Annotated[float | None, Field(ge=0, le=100)] = 1.0
    max_quantization_drop_points: Annotated[float | None, Field(ge=0, le=100)] = None
    min_speedup: Positive | None = None
    confidence: Annotated[float, Field(ge=0.5, lt=1)] = 0.95

    @model_validator(mode="after")
    def _judges_something(self) -> Self:
        limits = (self.max_drop_points, self.max_quantization_drop_points, self.min_speedup)
        if all(limit is None for limit in limits):
            raise ValueError("every limit is null: a gate that judges nothing would pass anything")
        return self


class Recipe(Spec):
    """The whole wish. The sections are wishes, not steps: `flow.py` owns the order."""

    task: Literal["image-classification"] = "image-classification"
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 0
    compute: ComputeSpec = ComputeSpec()
    data: DataSpec
    teacher: TeacherSpec | None = None
    student: StudentSpec
    distill: DistillSpec | None = None
    quantize: QuantizeSpec | None = None
    export: ExportSpec = ExportSpec()
    profile: ProfileSpec | None = ProfileSpec()
    gate: GateSpec = GateSpec()

    @model_validator(mode="before")
    @classmethod
    def _teacher_implies_distillation(cls, data: object) -> object:
        if isinstance(data, dict) and data.get("teacher") and data.get("distill") is None:
            return {**data, "distill": {}}
        return data

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        problems = [text for holds, text in _conflicts(self) if holds]
        if problems:
            raise ValueError("\n".join(problems))
        return self


def _conflicts(recipe: Recipe) -> list[tuple[bool, str]]:
    """(does it hold, what to say), a row a rule; each text starts with the key it is about."""
    teacher, student, gate = recipe.teacher, recipe.student, recipe.gate
    given = [n for n in (teacher, student) if n is not None and n.weights is not None]
    programs = [n for n in (teacher, student) if n is not None and n.is_program]
    return [
        (
            teacher is not None and not teacher.is_trained and teacher.train is None,
            "teacher: neither weights nor train is given, and an untrained teacher teaches noise; "
            "add `weights:` or `train: {epochs: 20}`",
        ),
        (
            teacher is None and recipe.distill is not None,
            "distill: there is no teacher to distil from; add a `teacher:` section, or use "
            "`student.train` to train from labels alone",
        ),
        (
            teacher is not None and student.train is not None,
            "student.train: with a teacher the student is trained by `distill`; move these "
            "options there",
        ),
        (
            teacher is None and student.train is None and not student.is_trained,
            "student: it has no weights, no teacher and no `train` section, so nothing would be "
            "learnt; add one of them",
        ),
        (
            student.is_program and (student.train is not None or recipe.distill is not None),
            "student.model: a .pt2 program cannot be trained; give FILE.py:factory, or leave out "
            "teacher, distill and train to export it as it is",
        ),
        (
            teacher is not None and teacher.is_program and teacher.train is not None,
            "teacher.train: a .pt2 program cannot be trained; leave `train` out",
        ),
        (
            any(n.is_program and n.weights is not None for n in (teacher, student) if n),
            "weights: a .pt2 file holds its own weights; leave `weights` out",
        ),
        (
            any(n.head == "new" and n.weights is None for n in (teacher, student) if n),
            "head: `new` replaces the classifier of given weights, and none are given",
        ),
        (
            any(
                n.head == "new" and not n.train and not (n is student and recipe.distill)
                for n in given
            ),
            "head: a new classifier must be trained; add a `train` section beside it",
        ),
        (
            bool(given or programs) and not _is_fully_given(recipe.data.preprocess),
            "data.preprocess: weights are given, and what they were trained with is not guessed; "
            "write preprocess with mean and std (`compress init` proposes one)",
        ),
        (
            gate.max_quantization_drop_points is not None and recipe.quantize is None,
            "gate.max_quantization_drop_points: nothing is quantized, so it would never be "
            "measured; add a `quantize:` section or remove the limit",
        ),
        (
            gate.min_speedup is not None and recipe.profile is None,
            "gate.min_speedup: `profile` is null, so latency would never be measured; remove "
            "`profile: null` or the limit",
        ),
    ]


def _is_fully_given(preprocess: PreprocessSpec | None) -> bool:
    return preprocess is not None and preprocess.mean is not None and preprocess.std is not None
