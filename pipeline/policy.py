"""What a gate may ask for: the recipe's `gate` section, or a policy file in its place. No torch.

Every limit is judged by a check of the same name (`gates/`); a list or mapping of limits gives
checks named `metrics.macro_f1`, `slices.region=north`, `devices.local.min_speedup`,
`baseline.max_drop_points`. A drop is in accuracy points, a share or a growth a fraction.
"""

from __future__ import annotations

import datetime
from typing import Annotated, Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from .spec import Fraction, NotNegative, Positive, Size, Spec

Points = Annotated[float, Field(ge=0, le=100)]
Share = Annotated[float, Field(ge=0, le=1)]
Text = Annotated[str, Field(min_length=1)]

BUILT_IN_METRICS = ("macro_f1", "mean_per_class", "top5")
ALTERNATIVES = ("min_retention", "max_error_growth")  # each takes the place of max_drop_points


class MetricSpec(Spec):
    """One more number that may not fall: of the test set, against the reference.

    A user's own is FILE.py:function, `function(labels, predictions) -> float`: both int arrays
    (N,), the result a fraction, higher is better.
    """

    metric: str
    max_drop_points: Points

    @field_validator("metric")
    @classmethod
    def _known(cls, value: str) -> str:
        if value not in BUILT_IN_METRICS and ".py:" not in value:
            raise ValueError(
                f"no metric is called {value!r}; known: {', '.join(BUILT_IN_METRICS)}, or "
                "FILE.py:function"
            )
        return value


class SliceSpec(Spec):
    """Every value of a column is a part of the test set whose drop is judged by itself."""

    column: Text
    file: Text  # .csv or .parquet with a column `id` as in samples.parquet
    max_drop_points: Points


class DeviceSpec(Spec):
    """Limits on what was measured on one device: batch 1, one thread."""

    min_speedup: Positive | None = None
    max_p90_ms: Positive | None = None
    max_peak_rss_bytes: Size | None = None

    @model_validator(mode="after")
    def _judges_something(self) -> Self:
        if all(value is None for value in vars(self).values()):
            raise ValueError(f"no limit is set; known: {', '.join(type(self).model_fields)}")
        return self


class BaselineSpec(Spec):
    """Limits against the last release (`compress gate --baseline`), sample by sample."""

    max_drop_points: Points | None = None
    max_negative_flips: Share | None = None  # fraction that was right and is wrong now
    max_bytes_growth: NotNegative | None = None  # 0.05: 5 % larger
    max_int8_share_loss: Share | None = None  # of multiply-adds in int8 kernels
    new_ops: bool = True  # false: no operator that the last release did without

    @model_validator(mode="after")
    def _judges_something(self) -> Self:
        limits = {name: value for name, value in vars(self).items() if name != "new_ops"}
        if self.new_ops and all(value is None for value in limits.values()):
            raise ValueError(f"no limit is set; known: {', '.join(type(self).model_fields)}")
        return self


class WaiverSpec(Spec):
    """A check that may go unmet for a while: who says so, why and until when, that day included."""

    check: Text
    reason: Text
    owner: Text
    expires: datetime.date


class GateSpec(Spec):
    """What must hold for `model.onnx` to appear."""

    # against the reference, on the test set
    max_drop_points: Points | None = 1.0
    max_quantization_drop_points: Points | None = None  # … against the float model
    min_retention: Fraction | None = None  # accuracy / the reference's; in max_drop_points' place
    max_error_growth: NotNegative | None = None  # 0.1: 10 % more errors; likewise
    max_negative_flips: Share | None = None  # fraction that the reference has right, this wrong
    max_class_drop_points: Points | None = None  # of any class with 30 samples
    metrics: tuple[MetricSpec, ...] = ()
    max_nll_increase: NotNegative | None = None  # of the mean negative log likelihood, in nats
    max_ece_increase: Share | None = None  # of the expected calibration error, 15 bins
    slices: tuple[SliceSpec, ...] = ()
    # of the machine that the run measured on: batch 1, one thread
    min_speedup: Positive | None = None
    max_p90_ms: Positive | None = None
    max_peak_rss_bytes: Size | None = None
    latency: Literal["required", "not-here"] = "required"  # not-here: the three are skipped
    devices: dict[str, DeviceSpec] = Field(default_factory=dict)
    # of the file
    max_bytes: Size | None = None
    max_multiply_adds: Size | None = None
    max_opset: Size | None = None
    allowed_ops: Annotated[tuple[Text, ...] | None, Field(min_length=1)] = None  # Conv, domain:Op
    min_int8_share: Fraction | None = None  # of multiply-adds, in int8 kernels
    min_cpu_agreement: Fraction | None = None  # share of samples answered alike on other CPUs
    # against the last release
    baseline: BaselineSpec | None = None
    # how it is judged
    confidence: Annotated[float, Field(ge=0.5, lt=1)] = 0.95  # one-sided, of every bound
    inconclusive: Literal["fail", "warn"] = "fail"  # warn: exit 0, though nothing was proven
    waivers: tuple[WaiverSpec, ...] = ()

    @model_validator(mode="before")
    @classmethod
    def _alternatives(cls, data: Any) -> Any:
        """A limit on the ratio takes the place of the built-in one on the difference."""
        if not isinstance(data, dict) or "max_drop_points" in data:
            return data
        if any(data.get(name) is not None for name in ALTERNATIVES):
            return {**data, "max_drop_points": None}
        return data

    @model_validator(mode="after")
    def _judges_something(self) -> Self:
        how = ("confidence", "inconclusive", "waivers", "latency")
        limits = [value for name, value in vars(self).items() if name not in how]
        if all(limit in (None, (), {}) for limit in limits):
            raise ValueError("every limit is null: a gate that judges nothing would pass anything")
        return self

    @model_validator(mode="after")
    def _named_once(self) -> Self:
        for section, names in (
            ("metrics", [one.metric for one in self.metrics]),
            ("slices", [one.column for one in self.slices]),
            ("waivers", [one.check for one in self.waivers]),
        ):
            twice = sorted({name for name in names if names.count(name) > 1})
            if twice:
                raise ValueError(f"{section}: {twice[0]} is named twice; keep one of them")
        return self
