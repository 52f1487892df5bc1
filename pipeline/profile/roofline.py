"""What this machine can do at most, and so how fast a model could be: its roofline.

Peaks are measured, not read from a data sheet: matrix products through onnxruntime itself, whose
kernels models get, and copies of arrays. The best of some repetitions counts, since other load can
only slow them down. Measured once, a few seconds, and kept in the user's cache folder.

The bound of a model is Σ over its nodes of max(multiply-adds / peak, bytes / bandwidth) (Williams,
Waterman, Patterson 2009, per node, as nodes run one after the other). Weights are read as fast as
all of them together can be, since one run evicts what does not fit; activations as fast as those of
the node can be. No model gets below it while onnxruntime runs it node by node, and few get near.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import platform
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime as ort
from onnx import TensorProto, helper, numpy_helper
from pydantic import Field, ValidationError

from ...exporters.sessions import open_session
from ...exporters.stamp import write_model
from ..measure.condition import condition
from ..measure.machine import cpu_capability, describe_machine
from ..spec import Positive, Size, Spec
from ..workspace import write_atomically
from .pitfalls import busy

SIDE = 1024  # of the square matrices: 2^30 multiply-adds, and 1 MB of int8 weights at least
GEMM_SECONDS, COPY_SECONDS = 0.8, 0.15  # each; both kinds and all sizes stay below 4 s
LEAST_RUNS = 3
# Source and target together: in a core's own cache, in a shared one, and in none.
COPY_BYTES = (1 << 18, 1 << 20, 1 << 22, 1 << 24, 1 << 27)
VERSION = 1  # of what is measured; a stored one of another version is measured again

Array = npt.NDArray[Any]


class Roofline(Spec):
    """Peaks with so many threads. copies: (bytes touched, bytes read and written a second).
    is_calm: nobody else used the CPUs meanwhile; else the peaks are too low, and are not kept."""

    version: int = VERSION
    cpu: str
    onnxruntime: str
    threads: Size
    float_multiply_adds_per_s: Positive
    int8_multiply_adds_per_s: Positive  # uint8 by int8
    copies: tuple[tuple[int, float], ...] = Field(min_length=1)
    is_calm: bool = True

    def peak(self, *, int8: bool) -> float:
        return self.int8_multiply_adds_per_s if int8 else self.float_multiply_adds_per_s

    def bytes_per_s(self, touched: float) -> float:
        """Bandwidth where `touched` bytes are read and written again and again."""
        size = next((size for size, _ in self.copies if size >= touched), self.copies[-1][0])
        # more bytes never go faster: a smaller set that was measured slower was disturbed
        return max(rate for bytes_, rate in self.copies if bytes_ >= size)

    def seconds(
        self, *, multiply_adds: int, int8: bool, weight_bytes: int, all_weights: int, moved: int
    ) -> float:
        """The least that one node can take.

        Args:
            weight_bytes: constants that it reads. all_weights: of all nodes.
            moved: bytes of activations, read and written.
        """
        memory = weight_bytes / self.bytes_per_s(all_weights) + moved / self.bytes_per_s(moved)
        return max(multiply_adds / self.peak(int8=int8), memory)


def roofline_of_this_machine(*, threads: int, fresh: bool = False) -> Roofline:
    """The stored one of this CPU, onnxruntime and thread count, else measured now.

    Args:
        fresh: measure again.
    """
    path = cache_path(threads=threads)
    if not fresh:
        with contextlib.suppress(OSError, ValidationError):
            stored = Roofline.model_validate_json(path.read_bytes())
            if stored.version == VERSION:
                return stored
    found = measure_roofline(threads=threads)
    if not found.is_calm:
        return found  # kept, it would mislead until somebody asks for a fresh one
    with contextlib.suppress(OSError):  # a cache that cannot be written costs seconds, no result
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, found.model_dump_json(indent=1).encode())
    return found


def cache_path(*, threads: int) -> Path:
    """Below $XDG_CACHE_HOME, else where the system keeps caches."""
    home = Path.home() / ("Library/Caches" if platform.system() == "Darwin" else ".cache")
    base = Path(os.environ.get("XDG_CACHE_HOME") or home)
    key = f"{_cpu()}|{cpu_capability()}|{ort.__version__}|{threads}"
    return base / "edgestill" / f"roofline-{hashlib.sha256(key.encode()).hexdigest()[:16]}.json"


def measure_roofline(*, threads: int) -> Roofline:
    """Raises: RuntimeFailure: onnxruntime fails."""
    before = condition()
    found = Roofline(
        cpu=_cpu(),
        onnxruntime=ort.__version__,
        threads=threads,
        float_multiply_adds_per_s=_gemm(threads=threads, int8=False),
        int8_multiply_adds_per_s=_gemm(threads=threads, int8=True),
        copies=tuple((size, _copies(size, threads=threads)) for size in COPY_BYTES),
    )
    is_calm = not busy([([before], [condition()])])
    return found.model_copy(update={"is_calm": is_calm})


def _cpu() -> str:
    return str(describe_machine()["cpu_model"] or platform.machine())


def _gemm(*, threads: int, int8: bool) -> float:
    """Multiply-adds a second of (SIDE, SIDE) by a constant (SIDE, SIDE)."""
    rng = np.random.default_rng(0)
    kind, op = (TensorProto.UINT8, "MatMulInteger") if int8 else (TensorProto.FLOAT, "MatMul")
    size = (SIDE, SIDE)
    if int8:
        weight = rng.integers(-64, 64, size).astype(np.int8)
        activation = rng.integers(0, 128, size).astype(np.uint8)
    else:
        weight = rng.normal(size=size).astype(np.float32)
        activation = rng.normal(size=size).astype(np.float32)
    result = TensorProto.INT32 if int8 else TensorProto.FLOAT
    graph = helper.make_graph(
        [helper.make_node(op, ["x", "w"], ["y"])],
        "gemm",
        [helper.make_tensor_value_info("x", kind, size)],
        [helper.make_tensor_value_info("y", result, size)],
        [numpy_helper.from_array(weight, "w")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)])
    model.ir_version = 8
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "gemm.onnx")
        write_model(model, path)
        session = open_session(path, threads=threads)
    best = _best(lambda: session.run(None, {"x": activation}), seconds=GEMM_SECONDS)
    return SIDE**3 / best


def _copies(size: int, *, threads: int) -> float:
    """Bytes a second of copies between arrays of size / 2 bytes, a part of them a thread."""
    parts = [
        (np.ones(size // (2 * threads), np.uint8), np.zeros(size // (2 * threads), np.uint8))
        for _ in range(threads)
    ]
    repeats = max(1, COPY_BYTES[-1] // (8 * size))  # one copy of a small array is too short

    def work(part: tuple[Array, Array]) -> None:
        for _ in range(repeats):
            np.copyto(part[1], part[0])

    with ThreadPoolExecutor(threads) as pool:
        best = _best(lambda: list(pool.map(work, parts)), seconds=COPY_SECONDS)
    return 2 * sum(source.nbytes for source, _ in parts) * repeats / best


def _best(call: Callable[[], object], *, seconds: float) -> float:
    """Seconds of the fastest call, after one that does not count."""
    call()
    took: list[float] = []
    deadline = time.perf_counter() + seconds
    while len(took) < LEAST_RUNS or time.perf_counter() < deadline:
        start = time.perf_counter()
        call()
        took.append(time.perf_counter() - start)
    return min(took)
