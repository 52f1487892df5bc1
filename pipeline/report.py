"""The one versioned record of a run. JSON is the truth; Markdown (`markdown.py`) is a view of it.

`report.json` follows `Report.model_json_schema()` (`compress schema`). Gates, comparisons between
releases and the terminal's table read nothing but this record and `samples.parquet`.
"""

from __future__ import annotations

import datetime
from typing import Any, Literal

import yaml
from pydantic import Field

from .spec import Spec

LOCAL = "local"  # the machine that the run itself measures on, as a device
Outcome = Literal["pass", "fail", "inconclusive", "invalid"]
# waived: not met, and the policy says who answers for it; skipped: the policy does not ask here
CheckOutcome = Literal["pass", "fail", "inconclusive", "invalid", "waived", "skipped"]
Role = Literal["teacher", "dense", "student", "float", "int8", "baseline"]


class StageRecord(Spec):
    """One stage: what it measured, how long it took, whether it was recalled from the workspace."""

    name: str
    recalled: bool
    seconds: float
    sha256: str
    measurements: dict[str, Any]


class ModelRecord(Spec):
    """One model on the whole test set. Networks run in torch, `float` and `int8` in onnxruntime;
    `dense` is the student before it was cut, `baseline` the student trained without a teacher."""

    role: Role
    runs_in: Literal["torch", "onnxruntime"]
    n: int
    correct: int
    per_class: dict[str, tuple[int, int]]  # class name → (correct, n)
    parameters: int | None = None
    multiply_adds: int | None = None
    onnx_bytes: int | None = None  # of its ONNX file, where it has one

    @property
    def accuracy(self) -> float:
        return self.correct / self.n


class PairRecord(Spec):
    """Two models on the same n test samples."""

    reference: Role
    candidate: Role
    n: int
    lost: int  # reference right, candidate wrong: negative flips
    gained: int  # reference wrong, candidate right
    upper_bound_95: float  # one-sided, of the drop, a fraction (measure/paired.py)

    @property
    def drop(self) -> float:
        """Fraction of accuracy lost; negative when the candidate is better."""
        return (self.lost - self.gained) / self.n


class CandidateRecord(Spec):
    """A file that could have shipped. Accuracy is of validation, which chose; p50 is of one thread
    at batch 1, measured beside the others, None where nothing else was made."""

    name: str
    n: int
    correct: int
    quantization_drop_points: float
    bytes: int
    multiply_adds: int
    int8_share: float  # of multiply-adds, in int8 kernels of onnxruntime on this machine
    p50_ms: float | None


class SelectionRecord(Spec):
    """Which candidate went on (selection.py)."""

    index: int
    held: bool
    refused: bool
    why: str


class RungRecord(Spec):
    """One rung of the parity ladder, against the rung above it."""

    rung: str
    reference: str
    n: int
    max_abs: float | None
    tolerance: float | None
    sqnr_db: float | None
    cosine: float | None
    top1_agreement: float | None
    passed: bool
    note: str = ""


class FileRecord(Spec):
    """What the deployed file asks of the runtime that loads it."""

    bytes: int
    opset: int  # of the domain ai.onnx
    ops: dict[str, int]  # domain:operator → nodes, those inside subgraphs and functions too


class AgreementRecord(Spec):
    """The deployed file on another CPU: how many samples it puts into the class it does here."""

    cpu: str
    n: int
    same_class: int


class LatencyRecord(Spec):
    """Batch 1, one model and thread count; milliseconds, over all launches."""

    name: str
    device: str = LOCAL
    # proxy: another machine stands for the device; emulated: another kind of CPU does
    measured_on: Literal["target", "proxy", "emulated"] = "target"
    # what makes the figures say less: a launch did not settle; heat or power slowed the device down
    doubts: tuple[Literal["unsettled", "throttled", "undervolted"], ...] = ()
    runs_in: Literal["torch", "onnxruntime"]
    threads: int
    sequence: int | None = None  # tokens of the text; None: an image
    n: int
    launches: int
    p50_ms: float
    p50_ci95_ms: tuple[float, float]
    launch_p50_ms: tuple[float, float]  # lowest and highest median of a launch
    min_ms: float
    p90_ms: float | None
    p95_ms: float | None
    p99_ms: float | None
    mad_ms: float
    cv: float
    load_ms: float
    first_ms: float
    cpu_ms: float
    peak_rss_bytes: int
    raw_ns: list[list[int]]  # a list for each launch


class SpeedupRecord(Spec):
    """p50 of the reference's float ONNX / p50 of the deployed file, one thread, batch 1."""

    reference: str
    candidate: str
    ratio: float
    ci95: tuple[float, float]


class PartRecord(Spec):
    """One class of a check that looks at many."""

    name: str
    n: int
    drop_points: float
    p_value: float  # corrected for the number of parts


class WaiverRecord(Spec):
    """Who answers for a check that is not met. `outcome` is what the check found."""

    outcome: Outcome
    reason: str
    owner: str
    expires: datetime.date


class Check(Spec):
    """One thing the gate looked at."""

    name: str
    outcome: CheckOutcome
    value: float | None
    bound: float | None  # the confidence bound that decides
    limit: float | None
    unit: str
    confidence: float | None = None
    n: int | None = None
    needed_n: int | None = None
    p_value: float | None = None  # of a drop: McNemar's, mid-p, two-sided
    parts: tuple[PartRecord, ...] = ()  # the worst first
    waiver: WaiverRecord | None = None
    text: str


class Verdict(Spec):
    """The gate's answer, and what it is about. `exit_code` is the command's."""

    outcome: Outcome
    exit_code: int
    checks: tuple[Check, ...]
    confidence: float  # one-sided, of every bound
    notes: tuple[str, ...] = ()  # what must not be overlooked
    tool_version: str
    model_sha256: str
    data_sha256: str
    recipe_sha256: str  # of recipe.yaml
    policy_sha256: str  # paths in it replaced by the hashes of the files
    baseline_model_sha256: str | None = None
    files_sha256: dict[str, str] = Field(default_factory=dict)  # that the policy names


class Report(Spec):
    """Everything a run found out."""

    schema_version: Literal["edgestill-report/1"] = "edgestill-report/1"
    tool_version: str
    created_utc: str
    recipe: dict[str, Any]
    reference: Role
    deployed: Role
    model_sha256: str
    data_sha256: str
    environment: dict[str, Any]
    stages: tuple[StageRecord, ...]
    notes: tuple[str, ...]
    candidates: tuple[CandidateRecord, ...]
    selection: SelectionRecord
    models: tuple[ModelRecord, ...]
    pairs: tuple[PairRecord, ...]
    parity: tuple[RungRecord, ...]
    latency: tuple[LatencyRecord, ...]
    speedup: SpeedupRecord | None
    file: FileRecord | None = None
    agreements: tuple[AgreementRecord, ...] = ()
    verdict: Verdict | None = None

    def model(self, role: Role) -> ModelRecord:
        return next(model for model in self.models if model.role == role)

    def pair(self, reference: Role, candidate: Role) -> PairRecord | None:
        wanted = (reference, candidate)
        return next((p for p in self.pairs if (p.reference, p.candidate) == wanted), None)

    def p50(self, name: str, *, threads: int) -> LatencyRecord | None:
        wanted = (name, threads)
        return next((row for row in self.latency if (row.name, row.threads) == wanted), None)

    @property
    def recipe_yaml(self) -> str:
        """The text of `recipe.yaml`."""
        text: str = yaml.safe_dump(self.recipe, sort_keys=False, allow_unicode=True)
        return text
