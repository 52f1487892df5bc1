"""Every option a user can write, as frozen pydantic models. No torch.

This file says what a recipe may hold and what does not fit together; `recipe_file.py` reads the
YAML, keeps its line numbers and resolves its paths. A threshold in `gate` whose measurement the
recipe leaves out is an error here, before anything is trained.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Discriminator, Field, Tag, model_validator

from ..models.hf_folder import PREFIX as HF
from ..models.hf_folder import find_folder
from .policy import GateSpec
from .profile.devices import DeviceName
from .report import LOCAL
from .spec import Fraction, Positive, Size, Spec
from .text_defaults import with_text_defaults
from .training_spec import DistillSpec, TrainSpec


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


class TokenizeSpec(Spec):
    """From a text to the network's input: tokenize → cut at `max_length` → pad on the right."""

    tokenizer: str | None = None  # hf:DIR or a tokenizer.json; None: the teacher's, else student's
    max_length: Annotated[int, Field(ge=3)] | None = None  # tokens; None: by the training texts
    pad: Literal["longest", "max_length"] = "longest"  # of the batch; max_length: a fixed graph
    # leave only the pieces that train, validation and unlabelled use, and single characters
    trim: bool = False
    keep: str | None = None  # a .txt, a text a line: what it uses stays too


class Tokenization(Spec):
    """What the data stage has made of a `TokenizeSpec`: all that an input's numbers depend on."""

    tokenizer_sha256: str  # of the tokenizer.json that ships
    vocabulary: Size  # ids are below it
    pad_id: Annotated[int, Field(ge=0)]
    max_length: Size
    pad: Literal["longest", "max_length"]
    rows: tuple[str, ...]  # names of the network's inputs, in this order
    # for views to train on: what stands for a hidden piece, and what frames a text
    mask_id: Annotated[int, Field(ge=0)] | None = None
    special_ids: tuple[int, ...] = ()


class SourceSpec(Spec):
    """A labelled set: an image folder (one folder a class), a .parquet file, or `digits`; texts:
    .csv, .tsv, .jsonl or .parquet."""

    path: str
    image: str | None = None  # parquet: column of HF image structs; found by itself if unique
    label: str | None = None  # parquet: column of integer or string labels


class SplitSpec(Spec):
    """A part of train, taken once, stratified, by content hash."""

    fraction: Fraction


class UnlabelledSpec(Spec):
    """Images without labels: anywhere below a folder, in a .parquet file, or `digits`. Texts: one
    a line of a .txt, or as a labelled set has them."""

    path: str
    image: str | None = None  # parquet: column of images; labels beside it are ignored


def _which_part(value: object) -> str:
    """`{fraction: 0.2}` or `0.1` takes a part of train; anything else names a set."""
    if isinstance(value, int | float):
        return "number"
    keys = value if isinstance(value, dict) else vars(value) if isinstance(value, Spec) else {}
    return "split" if "fraction" in keys else "source"


_Source = Annotated[SourceSpec, Tag("source")]
_Unlabelled = Annotated[UnlabelledSpec, Tag("source")]
_Split = Annotated[SplitSpec, Tag("split")]
_Number = Annotated[Fraction, Tag("number")]


class DataSpec(Spec):
    """The sets. Model selection sees validation, calibration sees train, test is touched once."""

    train: SourceSpec
    test: Annotated[_Source | _Split, Discriminator(_which_part)]
    validation: Annotated[_Source | _Split | _Number, Discriminator(_which_part)] = 0.1
    # images that only the teacher labels; a fraction hides the labels of that share of train
    unlabelled: Annotated[_Unlabelled | _Split, Discriminator(_which_part)] | None = None
    calibration: Size = 512  # samples of train
    labels: tuple[str, ...] | None = None  # class names in order, where the data has none
    preprocess: PreprocessSpec | None = None  # of images
    tokenize: TokenizeSpec | None = None  # of texts, which have always one
    # of texts: columns by name, or by position from 0; None: found by itself
    text: int | str | None = None
    pair: int | str | None = None  # a second text of each sample; None: there is none
    label: int | str | None = None
    header: bool | None = None  # csv and tsv: is the first line one; None: by looking at it
    encoding: str = "utf-8"
    on_corrupt: Literal["error", "skip"] = "error"
    allow_overlap: bool = False  # the same sample in train and test


class NetworkSpec(Spec):
    """Where a network comes from: a zoo name, FILE.py:factory, FILE.pt2, hf:DIR, a local Hugging
    Face folder with its weights if it has them; a student: FILE.onnx."""

    model: str
    args: dict[str, Any] = Field(default_factory=dict)  # passed to the factory or configuration
    weights: str | None = None  # safetensors, or a state dict that torch.load(weights_only) reads
    head: Literal["keep", "new"] = "keep"  # new: the classifier is replaced, for another task
    # hf: folders of texts: which encoder layers are kept, from 0; what is taken of its weights
    keep_layers: tuple[int, ...] | None = None
    init: Literal["weights", "embeddings", "scratch"] = "weights"
    train: TrainSpec | None = None

    @property
    def is_program(self) -> bool:
        return self.model.endswith(".pt2")

    @property
    def is_onnx(self) -> bool:
        return self.model.endswith(".onnx")

    @property
    def is_hf(self) -> bool:
        return self.model.startswith(HF)

    @property
    def weight_files(self) -> tuple[Path, ...]:
        """The files that hold weights it has already; empty: it is not trained yet."""
        if self.weights is not None:
            return (Path(self.weights),)
        if self.is_program or self.is_onnx:
            return (Path(self.model),)
        folder = find_folder(self.model)
        return () if folder is None or self.init == "scratch" else folder.weights

    @property
    def is_trained(self) -> bool:
        """It answers as it is: nothing of it has been left out, approximated or begins anew."""
        whole = self.init == "weights" and self.keep_layers is None
        whole = whole and "embedding_size" not in self.args
        return bool(self.weight_files) and whole


class TeacherSpec(NetworkSpec):
    min_accuracy: Fraction | None = None  # on validation; below it, it does not teach


class StudentSpec(NetworkSpec):
    pass


class RecoverSpec(Spec):
    """How what is left learns again; all else is as in `distill`, or in `student.train`."""

    epochs: Size = 10
    lr: Positive | None = None  # None: a fifth of the peak it was trained with


class PruneSpec(Spec):
    """Whole channels, attention heads, FFN units and blocks leave; the rest is taught to recover.

    One target is named: the share that stays of multiply-adds, of parameters, or of latency (p50
    of the float ONNX here, batch 1, one thread). A text counts at the data's longest, and is timed
    at the first of `profile.sequences`.
    """

    macs: Fraction | None = None
    parameters: Fraction | None = None
    latency: Fraction | None = None
    importance: Literal["l2", "taylor", "bn"] = "l2"
    blocks: bool = True  # whole residual blocks may leave too
    protect: tuple[str, ...] = ()  # module paths, globs allowed; left as they are
    round_to: Size = 8  # channel counts are multiples of it, as vector kernels like them
    steps: Annotated[int, Field(ge=1, le=10)] = 1  # towards the target, each with its recovery
    candidates: Annotated[int, Field(ge=1, le=5)] = 2  # of the search that recover to the end
    recover: RecoverSpec = RecoverSpec()

    @model_validator(mode="before")
    @classmethod
    def _structured(cls, data: object) -> object:
        if isinstance(data, dict) and {"sparsity", "unstructured"} & set(data):
            raise ValueError(
                "unstructured sparsity is not offered: no CPU kernel of onnxruntime skips zeros, "
                "so the file would be no faster; name the share that stays: macs: 0.5"
            )
        return data

    @model_validator(mode="after")
    def _one_target(self) -> Self:
        named = [n for n in ("macs", "parameters", "latency") if getattr(self, n) is not None]
        if len(named) != 1:
            raise ValueError(
                f"name one of macs, parameters, latency (the share that stays), got "
                f"{' and '.join(named) or 'none'}"
            )
        return self

    @property
    def target(self) -> tuple[Literal["macs", "parameters", "latency"], float]:
        """What is counted, and the share of it that stays."""
        if self.macs is not None:
            return "macs", self.macs
        if self.parameters is not None:
            return "parameters", self.parameters
        assert self.latency is not None
        return "latency", self.latency


class QatSpec(Spec):
    """Training with the rounding in the loop, taught by the float model itself."""

    epochs: Size = 3
    batch_size: Size = 128
    lr: Positive = 0.001  # of AdamW
    ranges: Literal["learned", "ema"] = "learned"  # of activations


class QuantizeSpec(Spec):
    """Static int8. The targets decide the encoding, so that every one of them computes the same."""

    mode: Literal["ptq", "qat"] = "ptq"  # ptq: QAT is tried where nothing else keeps the accuracy
    targets: tuple[Literal["arm", "x86", "x86-vnni"], ...] = Field(("arm", "x86"), min_length=1)
    calibrator: Literal["minmax", "percentile", "entropy", "mse"] = "minmax"
    equalize: bool = False  # cross-layer equalization, exact before rounding
    correct_bias: bool = False
    keep_float: tuple[str, ...] = ()  # node names of the float graph, globs allowed
    # against the float model, on validation; beyond it, until one holds: the graph is equalized,
    # layers return to float, QAT is tried
    max_drop_points: Annotated[float, Field(ge=0, le=100)] = 0.5
    fallback: bool = True  # equalize and return layers to float, where that is needed
    qat: QatSpec | None = QatSpec()  # null: never


def _dotted(value: object) -> object:
    """YAML reads an unquoted 1.20 as a number; 1.2 would be a different release."""
    if isinstance(value, float):
        raise ValueError(f"{value} reads as a number: write it in quotes, e.g. '1.17'")
    return value


class ExportSpec(Spec):
    batch: Literal["dynamic"] | Size = "dynamic"
    sequence: Literal["dynamic", "fixed"] = "dynamic"  # of texts; fixed: at the maximum length
    min_runtime: Annotated[str, BeforeValidator(_dotted), Field(pattern=r"^\d+\.\d+(\.\d+)?$")] = (
        "1.17"  # oldest onnxruntime that must load the file
    )
    simplify: bool = True
    # ort: also in onnxruntime's own format, for mobile builds; the verdict is about the .onnx
    format: tuple[Literal["onnx", "ort"], ...] = ("onnx",)

    @property
    def content(self) -> dict[str, Any]:
        """What decides the bytes of the .onnx: all but the further formats it is written in."""
        return self.model_dump(mode="json", exclude={"format"})

    @model_validator(mode="after")
    def _formats_begin_with_onnx(self) -> Self:
        if "onnx" not in self.format or len(set(self.format)) < len(self.format):
            raise ValueError(
                f"format: expected [onnx] or [onnx, ort], got [{', '.join(self.format)}]: the "
                ".onnx is what is proven, and model.ort is made of it"
            )
        return self

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

    # this machine, which is always measured, and others of devices.yaml: there the deployed file
    # must give the same answers to test samples, and is timed against the reference's float file
    devices: tuple[DeviceName, ...] = Field((LOCAL,), min_length=1)
    devices_file: Path | None = None  # None: devices.yaml beside the recipe, else as `profile`
    launches: Annotated[int, Field(ge=3)] = 5  # fresh processes a model; the spread is over these
    runs: Annotated[int, Field(ge=20)] = 200  # timed inferences a model, launch and thread count
    # of texts: tokens; the first counts for the speed-up, the others are timed on one thread
    sequences: tuple[Size, ...] = Field((32,), min_length=1)


def _one_or_many(value: object) -> str:
    return "many" if isinstance(value, list | tuple) else "one"


_Many = Annotated[tuple[TeacherSpec, ...], Tag("many")]
_Teachers = Annotated[Annotated[TeacherSpec, Tag("one")] | _Many, Discriminator(_one_or_many)]


class Recipe(Spec):
    """The whole wish. The sections are wishes, not steps: `flow.py` owns the order."""

    task: Literal["image-classification", "text-classification"] = "image-classification"
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 0
    compute: ComputeSpec = ComputeSpec()
    data: DataSpec
    teacher: _Teachers | None = None  # a list: several teachers, the first is the reference
    student: StudentSpec
    distill: DistillSpec | None = None
    prune: PruneSpec | None = None
    quantize: QuantizeSpec | None = None
    export: ExportSpec = ExportSpec()
    profile: ProfileSpec | None = ProfileSpec()
    gate: GateSpec = GateSpec()

    @property
    def teachers(self) -> tuple[TeacherSpec, ...]:
        """None, one or several."""
        if self.teacher is None:
            return ()
        return self.teacher if isinstance(self.teacher, tuple) else (self.teacher,)

    @model_validator(mode="before")
    @classmethod
    def _filled_in(cls, data: object) -> object:
        """What follows from the task; and a teacher implies distillation."""
        if not isinstance(data, dict):
            return data
        if data.get("task") == "text-classification":
            return with_text_defaults(data)
        if data.get("teacher") and data.get("distill") is None:
            return {**data, "distill": {}}
        return data

    @property
    def is_text(self) -> bool:
        return self.task == "text-classification"

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        from .conflicts import conflicts  # which reads this module's types

        problems = [text for holds, text in conflicts(self) if holds]
        if problems:
            raise ValueError("\n".join(problems))
        return self
