"""What goes into a network and what comes out: names, shapes, dtypes, class names. No torch.

A free axis is a name ("N"); dtypes are NumPy's names ("float32"), the same for torch and ONNX.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class TensorSpec:
    """One input or output. `shape`: an int is fixed, a name free; equal names are equal sizes."""

    name: str
    shape: tuple[int | str, ...]
    dtype: str

    def to_json(self) -> dict[str, Any]:
        return {"name": self.name, "shape": list(self.shape), "dtype": self.dtype}

    @classmethod
    def from_json(cls, document: Mapping[str, Any]) -> TensorSpec:
        return cls(document["name"], tuple(document["shape"]), document["dtype"])


@dataclass(frozen=True)
class Signature:
    """All inputs and outputs in order, and what the classes are called."""

    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    class_names: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """JSON-able; `from_json` gives an equal signature back."""
        return {
            "inputs": [spec.to_json() for spec in self.inputs],
            "outputs": [spec.to_json() for spec in self.outputs],
            "class_names": list(self.class_names),
        }

    @classmethod
    def from_json(cls, document: Mapping[str, Any]) -> Signature:
        return cls(
            tuple(TensorSpec.from_json(spec) for spec in document["inputs"]),
            tuple(TensorSpec.from_json(spec) for spec in document["outputs"]),
            tuple(document["class_names"]),
        )
