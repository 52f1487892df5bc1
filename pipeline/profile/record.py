"""What `compress profile` found out: the record. JSON is the truth, `text.py` a view of it."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from ..report import LatencyRecord
from ..spec import Spec
from .advice import Explanation

Validity = Literal["valid", "noisy", "throttled", "invalid"]


class FindingRecord(Spec):
    """One thing that makes the figures say less (`pitfalls.py`)."""

    code: str
    severity: Literal["invalid", "throttled", "noisy", "note"]
    text: str


class InputsRecord(Spec):
    """What the model was fed with. golden: a bundle of `compress verify --write-golden`."""

    source: Literal["golden", "data", "file", "noise"]
    path: str | None
    n: int


class AnswersRecord(Spec):
    """The device's answers held against the reference's, over all inputs.

    same_class: of outputs (N, C); None where the output has another shape.
    """

    reference: Literal["golden", "this machine"]
    n: int
    same_class: int | None
    max_abs: float
    agree: bool


class PaceRecord(Spec):
    """Runs that begin at a rate, with sleep in between."""

    rate_hz: float
    p50_ms: float
    n: int
    ratio: float  # to back to back, in the same processes


class SustainedRecord(Spec):
    """A long load without a rest: the first minute against the last."""

    seconds: float
    n: int
    first_p50_ms: float
    last_p50_ms: float
    ratio: float


class ProfileRow(Spec):
    """One model in one setting on one device.

    cold_load_ms, cold_first_ms: with the file out of the page cache, medians over fresh processes.
    drift_percent_per_minute: of the median over the whole measurement. outliers: Tukey's fences of
    1.5 and 3 interquartile ranges, within launches; counted, and kept.
    """

    latency: LatencyRecord
    spinning: bool | None  # None: as the runtime ships it (on)
    affinity: tuple[int, ...] | None
    cold_load_ms: float | None
    cold_first_ms: float | None
    drift_percent_per_minute: float | None
    mild_outliers: int
    severe_outliers: int
    speedup: tuple[float, float, float] | None = None  # over the baseline: ratio, 95 % interval
    paced: PaceRecord | None = None
    sustained: SustainedRecord | None = None


class PerfTestRecord(Spec):
    """Figures of onnxruntime's own program, on a board without Python: one launch each. Inputs are
    its own noise, and answers are not seen."""

    threads: int
    launches: int
    runs: int  # a launch
    p50_ms: float  # geometric mean over launches
    launch_p50_ms: tuple[float, float]
    p90_ms: float
    load_ms: float
    peak_rss_bytes: int | None


class DeviceProfile(Spec):
    """One device. `error`: why there is nothing of it, and `exit_code` that of the error."""

    name: str
    kind: Literal["local", "ssh", "emulated"]
    measured_on: Literal["target", "emulated"] = "target"
    int8_kernels: str | None = None
    environment: dict[str, Any] = Field(default_factory=dict)
    before: dict[str, Any] = Field(default_factory=dict)
    after: dict[str, Any] = Field(default_factory=dict)
    rows: tuple[ProfileRow, ...] = ()
    perf_test: PerfTestRecord | None = None
    answers: AnswersRecord | None = None
    validity: Validity = "invalid"
    findings: tuple[FindingRecord, ...] = ()
    error: str | None = None
    exit_code: int = 0


class ProfileRecord(Spec):
    """One call of `compress profile`."""

    schema_version: Literal["edgestill-profile/1"] = "edgestill-profile/1"
    tool_version: str
    created_utc: str
    model: str
    model_sha256: str
    model_bytes: int
    baseline: str | None
    baseline_sha256: str | None
    inputs: InputsRecord
    mode: Literal["quick", "default", "strict"]
    devices: tuple[DeviceProfile, ...]
    why: Explanation | None = None  # of this machine

    @property
    def exit_code(self) -> int:
        """5: a device failed. 4: a measurement proves nothing. Both: 5."""
        codes = {one.exit_code for one in self.devices}
        return next((code for code in (70, 6, 5, 4, 2) if code in codes), 0)
