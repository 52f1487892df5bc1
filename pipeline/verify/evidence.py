"""The evidence a verdict rests on: the parity ladder, and every model once over the test set.

The test set is opened here and nowhere earlier. `samples.parquet` holds, for each test sample, its
content hash (with #2, #3, … where the same content is there again), its label and, for each model,
the prediction, the label's rank (0: the prediction), p(label), the top-1 probability and the margin
between the best two: gates, slices and comparisons of releases need nothing else.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from ..data.dataset import Data, open_data
from ..data.inputs import to_input
from ..measure.accuracy import Scores, logits_of_module, logits_of_onnx, score
from ..measure.paired import drop_upper_bound
from ..release import SAMPLES
from ..stage import Context
from .parity import climb_ladder

if TYPE_CHECKING:
    from torch import nn

Array = NDArray[Any]

PARITY_SAMPLES = 128  # of the calibration set: float64 convolutions are slow
CONFIDENCE = 0.95


def gather(
    data_folder: Path,
    *,
    networks: Mapping[str, Path],
    floating: Path,
    int8: Path | None,
    reference: str,
    context: Context,
    memory_budget_bytes: int,
) -> dict[str, Any]:
    """The verify stage. Writes `samples.parquet` into `context.scratch`.

    Args:
        data_folder, floating, int8: folders of committed stages.
        networks: role → folder of a stored network: `student`, which the files were made from
            (absent where a float file was given), and what there is of `teacher`, `dense`,
            `baseline`.
        reference: role that the deployed model is compared with.

    Returns:
        models, pairs and parity as `report.py` defines them.

    Raises:
        MeasurementError: a model gives NaN.
    """
    data = open_data(data_folder, memory_budget_bytes=memory_budget_bytes)
    sample = to_input(data.train.contents[data.calibration[:PARITY_SAMPLES]], data.preprocess)
    parity = climb_ladder(
        _module(networks["student"]) if "student" in networks else None,
        exported=floating / "exported.onnx",
        final_float=floating / "model.onnx",
        int8=None if int8 is None else int8 / "model.onnx",
        inputs=sample,
        threads=context.threads,
    )
    onnx = {"float": floating} | ({} if int8 is None else {"int8": int8})
    scores: dict[str, Scores] = {}
    for done, (role, folder) in enumerate([*networks.items(), *onnx.items()]):
        context.events.progress(done, len(networks) + len(onnx), role)
        if role in networks:
            logits = _logits_of_network(folder, data, context=context, name=role)
        else:
            logits = logits_of_onnx(
                folder / "model.onnx",
                data.test,
                data.preprocess,
                threads=context.threads,
                name=role,
            )
        scores[role] = score(logits, data.test.labels)
    _write_samples(context.scratch / SAMPLES, data, scores)
    deployed = "float" if int8 is None else "int8"
    compared = {(reference, role) for role in scores if role != reference}
    compared |= {("student" if "student" in networks else "float", deployed)}
    compared |= {(role, "student") for role in ("baseline", "dense") if role in networks}
    return {
        "models": [_model(role, s, data, in_torch=role in networks) for role, s in scores.items()],
        "pairs": [_pair(scores, *roles) for roles in sorted(compared)],
        "parity": parity,
    }


def _module(folder: Path) -> nn.Module:
    from ...models.store import load_network  # torch, which a given .onnx does without

    return load_network(folder).network.module


def _logits_of_network(folder: Path, data: Data, *, context: Context, name: str) -> Array:
    from ...models.store import load_network
    from ..train.reproducible import reproducible

    network = load_network(folder).network
    with reproducible(threads=context.threads, device=context.device):
        return logits_of_module(
            network.module.to(context.device),
            data.test,
            data.preprocess,
            device=context.device,
            fixed_batch=network.fixed_batch,
            name=name,
        )


def _model(role: str, scores: Scores, data: Data, *, in_torch: bool) -> dict[str, Any]:
    labels = data.test.labels
    per_class = {
        name: (int(scores.correct[labels == index].sum()), int((labels == index).sum()))
        for index, name in enumerate(data.class_names)
    }
    return {
        "role": role,
        "runs_in": "torch" if in_torch else "onnxruntime",
        "n": len(labels),
        "correct": int(scores.correct.sum()),
        "per_class": per_class,
    }


def _pair(scores: Mapping[str, Scores], reference: str, candidate: str) -> dict[str, Any]:
    before, after = scores[reference].correct, scores[candidate].correct
    lost, gained = int((before & ~after).sum()), int((~before & after).sum())
    n = len(before)
    return {
        "reference": reference,
        "candidate": candidate,
        "n": n,
        "lost": lost,
        "gained": gained,
        "upper_bound_95": float(drop_upper_bound(lost, gained, n=n, confidence=CONFIDENCE)),
    }


def _write_samples(path: Path, data: Data, scores: Mapping[str, Scores]) -> None:
    columns: dict[str, Any] = {
        "id": _unique(data.test.hashes),
        "label": data.test.labels.astype(np.int32),
    }
    for role, s in scores.items():
        columns[f"{role}_prediction"] = s.prediction.astype(np.int32)
        columns[f"{role}_rank"] = s.rank.astype(np.int32)
        columns[f"{role}_p_label"] = _float32(s.p_label)
        columns[f"{role}_top1_probability"] = _float32(s.top1_probability)
        columns[f"{role}_margin"] = _float32(s.margin)
    table = pa.table(columns).replace_schema_metadata({"class_names": "\n".join(data.class_names)})
    pq.write_table(table, path)


def _unique(hashes: Iterable[str]) -> list[str]:
    """The same content twice in the test set is two samples, and an id names one."""
    seen: Counter[str] = Counter()
    ids = []
    for one in hashes:
        seen[one] += 1
        ids.append(str(one) if seen[one] == 1 else f"{one}#{seen[one]}")
    return ids


def _float32(values: NDArray[Any]) -> NDArray[np.float32]:
    return values.astype(np.float32)
