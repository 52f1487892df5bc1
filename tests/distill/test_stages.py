"""Teacher, stored labels and student, from prepared data to saved networks."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from edgestill.models.store import load_network
from edgestill.pipeline.data.dataset import open_data
from edgestill.pipeline.data.views import open_views
from edgestill.pipeline.distill import labels as labels_module
from edgestill.pipeline.distill.label_store import HEADER, describe, network_sha256, open_labels
from edgestill.pipeline.distill.labels import store_labels
from edgestill.pipeline.distill.student import Lessons, train_student
from edgestill.pipeline.distill.teacher import prepare_teacher
from edgestill.pipeline.errors import IntegrityError, MeasurementError, WeightsError
from edgestill.pipeline.measure.doubts import best_class_order, check_class_order
from edgestill.pipeline.recipe import StudentSpec, TeacherSpec
from edgestill.pipeline.stage import Context, Silent
from edgestill.pipeline.strategy import choose
from edgestill.pipeline.train import precision as precision_module
from edgestill.pipeline.train.checkpoint import digest
from edgestill.pipeline.train.precision import Precision
from edgestill.pipeline.training_spec import DistillSpec
from safetensors.torch import save_file

BUDGET = 2**30
TRAIN = {"epochs": 6, "batch_size": 16, "lr": 0.05}
DISTILL: dict[str, Any] = {**TRAIN, "views": 3, "augment": {"crop": "pad", "flip": True}}


class Notes(Silent):
    def __init__(self) -> None:
        self.texts: list[str] = []

    def note(self, text: str) -> None:
        self.texts.append(text)


def context_in(folder: Path, events: Silent | None = None) -> Context:
    folder.mkdir(parents=True, exist_ok=True)
    return Context(0, 1, "cpu", folder, events or Silent())


def teach(prepared: SimpleNamespace, folder: Path, **options: Any) -> dict[str, Any]:
    events = options.pop("events", None)
    spec = TeacherSpec.model_validate({"model": prepared.factory, "train": TRAIN} | options)
    context = context_in(folder, events)
    return prepare_teacher(spec, prepared.data, context=context, memory_budget_bytes=BUDGET)


def label(prepared: SimpleNamespace, teacher: Path, folder: Path, **options: Any) -> dict[str, Any]:
    events = options.pop("events", None)
    spec = DistillSpec.model_validate(DISTILL | options)
    context = context_in(folder, events)
    return store_labels(spec, teacher, prepared.data, context=context, memory_budget_bytes=BUDGET)


def study(
    prepared: SimpleNamespace,
    folder: Path,
    *,
    taught: SimpleNamespace | None = None,
    distill: dict[str, Any] | None = None,
    **options: Any,
) -> dict[str, Any]:
    """The student stage; `taught` has `.teacher`, and `.labels` if any are stored."""
    events = options.pop("events", None)
    spec = StudentSpec.model_validate({"model": prepared.factory, "args": {"width": 2}} | options)
    lessons = None
    if distill is not None:
        wish = DistillSpec.model_validate(distill)
        lessons = Lessons(
            wish,
            choose(wish),
            stores=(taught.labels,) if taught else (),
            teachers=(taught.teacher,) if taught else (),
        )
    return train_student(
        spec,
        lessons,
        prepared.data,
        context=context_in(folder, events),
        memory_budget_bytes=BUDGET,
    )


@pytest.fixture(scope="module")
def taught(prepared: SimpleNamespace, tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """A trained teacher and its stored labels, as folders, with what their stages measured."""
    root = tmp_path_factory.mktemp("taught")
    found = teach(prepared, root / "teacher")
    stored = label(prepared, root / "teacher", root / "labels")
    return SimpleNamespace(
        teacher=root / "teacher", labels=root / "labels", found=found, stored=stored
    )


def test_teacher_is_trained_measured_and_saved(taught: SimpleNamespace) -> None:
    found = taught.found

    assert found["validation"]["accuracy"] > 0.8
    assert found["validation"]["possibly_seen"] is False
    assert found["training"]["epochs"] == 6
    assert len(found["training"]["history"]) == 6
    assert found["parameters"] > 0
    assert json.loads(json.dumps(found, allow_nan=False)) is not None
    assert load_network(taught.teacher).class_names == ("blue", "green", "red")


def test_same_seed_gives_the_same_teacher(prepared: SimpleNamespace, tmp_path: Path) -> None:
    for name in ("a", "b"):
        teach(prepared, tmp_path / name, train=TRAIN | {"epochs": 2})

    assert network_sha256(tmp_path / "a") == network_sha256(tmp_path / "b")


def test_given_teacher_is_not_trained_and_is_marked_as_possibly_seen(
    prepared: SimpleNamespace, taught: SimpleNamespace, tmp_path: Path
) -> None:
    events = Notes()
    weights = str(taught.teacher / "model.safetensors")

    found = teach(prepared, tmp_path / "given", train=None, weights=weights, events=events)

    assert found["training"] is None
    assert found["validation"]["accuracy"] == taught.found["validation"]["accuracy"]
    assert found["validation"]["possibly_seen"] is True
    assert any("possibly seen" in text for text in events.texts)
    states = [
        load_network(f).network.module.state_dict() for f in (taught.teacher, tmp_path / "given")
    ]
    assert digest(dict(states[0])) == digest(dict(states[1]))


def test_teacher_is_fine_tuned_from_given_weights(
    prepared: SimpleNamespace, taught: SimpleNamespace, tmp_path: Path
) -> None:
    weights = str(taught.teacher / "model.safetensors")

    found = teach(
        prepared, tmp_path / "tuned", weights=weights, head="new", train=TRAIN | {"epochs": 2}
    )

    assert found["training"]["epochs"] == 2
    assert found["weights"] is not None


def test_teacher_below_min_accuracy_is_refused(prepared: SimpleNamespace, tmp_path: Path) -> None:
    untaught = {"epochs": 1, "lr": 1e-9}

    with pytest.raises(WeightsError, match=r"at least 99\.0 % on validation .* got"):
        teach(prepared, tmp_path / "weak", train=untaught, min_accuracy=0.99)


def test_teacher_at_chance_is_announced(prepared: SimpleNamespace, tmp_path: Path) -> None:
    events = Notes()

    teach(prepared, tmp_path / "chance", train={"epochs": 1, "lr": 1e-9}, events=events)

    assert any(text.startswith("WARNING: teacher") for text in events.texts)


def test_teacher_in_another_class_order_is_refused_by_name(
    prepared: SimpleNamespace, taught: SimpleNamespace, tmp_path: Path
) -> None:
    state = load_network(taught.teacher).network.module.state_dict()
    for name in ("6.weight", "6.bias"):
        state[name] = state[name][[1, 2, 0]].contiguous()
    save_file(state, tmp_path / "moved.safetensors")

    with pytest.raises(WeightsError, match="class order") as caught:
        teach(prepared, tmp_path / "t", train=None, weights=str(tmp_path / "moved.safetensors"))

    assert "output 2 (taken for 'red') answers for 'blue'" in str(caught.value)
    assert "`data.labels: [green, red, blue]`" in str(caught.value)


def test_teacher_with_nan_weights_is_refused(
    prepared: SimpleNamespace, taught: SimpleNamespace, tmp_path: Path
) -> None:
    state = load_network(taught.teacher).network.module.state_dict()
    state["6.bias"] = torch.full_like(state["6.bias"], float("nan"))
    save_file(state, tmp_path / "nan.safetensors")

    with pytest.raises((WeightsError, MeasurementError), match=r"6\.bias|NaN"):
        teach(prepared, tmp_path / "t", train=None, weights=str(tmp_path / "nan.safetensors"))


def test_best_class_order_undoes_a_permutation() -> None:
    counts = np.array([[1, 9, 0], [0, 2, 8], [10, 0, 0]])

    order = best_class_order(counts)

    assert order.output_of == (1, 2, 0)
    assert order.accuracy == pytest.approx(3 / 30)
    assert order.reordered_accuracy == pytest.approx(27 / 30)


@pytest.mark.parametrize(
    "counts",
    [
        [[9, 1], [2, 8]],  # good as it is
        [[5, 5], [6, 4]],  # bad in any order
        [[1, 3], [3, 1]],  # too few to tell
    ],
)
def test_class_order_is_not_blamed_without_evidence(counts: list[list[int]]) -> None:
    check_class_order(np.array(counts), ("a", "b"))


def test_stored_labels_are_the_live_teachers_logits_of_the_same_views(
    prepared: SimpleNamespace, taught: SimpleNamespace, tmp_path: Path
) -> None:
    data = open_data(prepared.data, memory_budget_bytes=BUDGET)
    spec = DistillSpec.model_validate(DISTILL | {"precision": "fp32"})
    label(prepared, taught.teacher, tmp_path / "l", precision="fp32")
    store = open_labels(tmp_path / "l", expected=describe(spec, data, seed=0))
    views = open_views(data.train, data.preprocess, spec.augment, context=context_in(tmp_path))
    module = load_network(taught.teacher).network.module.eval()
    indices = torch.tensor([5, 0, 17])
    for view in range(3):
        with torch.no_grad():
            live = module(views.batch(indices, view=view).inputs)
        # float16 rounding
        torch.testing.assert_close(store.rows(indices, view=view), live, atol=1e-5, rtol=2**-10)
    assert not torch.equal(store.rows(indices, view=0), store.rows(indices, view=1))


def test_labels_of_mixed_images_come_from_the_mixed_images(
    prepared: SimpleNamespace, taught: SimpleNamespace, tmp_path: Path
) -> None:
    augment = {"crop": "none", "mixup": 1.0}

    plain = label(prepared, taught.teacher, tmp_path / "plain", augment={"crop": "none"})
    mixed = label(prepared, taught.teacher, tmp_path / "mixed", augment=augment)

    assert mixed["live_check"]["agreement"] >= 0.99
    rows = [np.load(tmp_path / name / "view-0000.npy") for name in ("plain", "mixed")]
    assert not np.array_equal(rows[0], rows[1])
    assert plain["train_view_accuracy"] > mixed["train_view_accuracy"]


def test_labelling_measures_itself(taught: SimpleNamespace) -> None:
    stored = taught.stored

    assert stored["views"] == 3
    assert stored["bytes"] == 3 * stored["rows"] * 3 * 2
    assert stored["live_check"]["agreement"] >= 0.99
    assert stored["resumed_views"] == 0
    assert not (taught.labels / "resume" / HEADER).exists()


def test_unfinished_labels_are_taken_up_and_end_the_same(
    prepared: SimpleNamespace,
    taught: SimpleNamespace,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    forward, calls = labels_module.forward, []

    def dies_in_third_view(*args: Any, **kwargs: Any) -> Any:
        if kwargs["view"] == 2:
            raise KeyboardInterrupt
        calls.append(kwargs["view"])
        return forward(*args, **kwargs)

    monkeypatch.setattr(labels_module, "forward", dies_in_third_view)
    with pytest.raises(KeyboardInterrupt):
        label(prepared, taught.teacher, tmp_path / "l")
    monkeypatch.undo()
    events = Notes()

    found = label(prepared, taught.teacher, tmp_path / "l", events=events)

    assert found["resumed_views"] == 2
    assert events.texts == ["labelling goes on after 2 of 3 views"]
    for name in ("labels.json", "ids.npy", *(f"view-000{view}.npy" for view in range(3))):
        assert (tmp_path / "l" / name).read_bytes() == (taught.labels / name).read_bytes()


def test_unfinished_labels_of_other_views_are_dropped(
    prepared: SimpleNamespace, taught: SimpleNamespace, tmp_path: Path
) -> None:
    resume = tmp_path / "l" / "resume"
    resume.mkdir(parents=True)
    (resume / HEADER).write_text("{}")
    (resume / "view-0000.npy").write_bytes(b"stale")

    found = label(prepared, taught.teacher, tmp_path / "l")

    assert found["resumed_views"] == 0


def test_shifted_rows_do_not_survive_the_live_check(
    prepared: SimpleNamespace, taught: SimpleNamespace, tmp_path: Path
) -> None:
    folder = tmp_path / "l"
    label(prepared, taught.teacher, folder)
    resume = folder / "resume"
    resume.mkdir(exist_ok=True)
    for view in range(3):  # a whole store, one row off, as a cache that shuffling misaligned
        rows = np.load(folder / f"view-000{view}.npy")
        np.save(resume / f"view-000{view}.npy", np.roll(rows, 1, axis=0))
    (resume / HEADER).write_text((folder / HEADER).read_text())

    with pytest.raises(IntegrityError, match="do not belong to these images or this teacher"):
        label(prepared, taught.teacher, folder)


def test_labelling_leaves_the_teachers_buffers_bit_unchanged(
    prepared: SimpleNamespace, taught: SimpleNamespace, tmp_path: Path
) -> None:
    before = network_sha256(taught.teacher)
    module = load_network(taught.teacher).network.module
    state = digest(dict(module.state_dict()))

    label(prepared, taught.teacher, tmp_path / "l")
    study(prepared, tmp_path / "s", taught=taught, distill=DISTILL)

    assert network_sha256(taught.teacher) == before
    again = load_network(taught.teacher).network.module
    assert digest(dict(again.state_dict())) == state


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"augment": {"crop": "pad", "flip": False}}, "augment"),
        ({"views": 2}, "views"),
    ],
)
def test_stale_labels_are_refused_and_the_field_is_named(
    prepared: SimpleNamespace,
    taught: SimpleNamespace,
    tmp_path: Path,
    changed: dict[str, Any],
    named: str,
) -> None:
    with pytest.raises(IntegrityError, match=rf"stale: {named}: expected"):
        study(prepared, tmp_path / "s", taught=taught, distill=DISTILL | changed)


@pytest.mark.parametrize(
    "field",
    ["teacher_sha256", "preprocess", "class_names", "augment_version", "seed", "ids_sha256"],
)
def test_every_field_of_the_header_is_held(
    prepared: SimpleNamespace, taught: SimpleNamespace, field: str
) -> None:
    data = open_data(prepared.data, memory_budget_bytes=BUDGET)
    spec = DistillSpec.model_validate(DISTILL)
    teacher = network_sha256(taught.teacher)
    expected = describe(spec, data, seed=0, teacher=teacher)
    open_labels(taught.labels, expected=expected)

    with pytest.raises(IntegrityError, match=field):
        open_labels(taught.labels, expected=expected | {field: "another"})


def test_distilled_student_learns_from_the_stored_labels(
    prepared: SimpleNamespace, taught: SimpleNamespace, tmp_path: Path
) -> None:
    found = study(prepared, tmp_path / "s", taught=taught, distill=DISTILL | {"epochs": 12})

    assert found["how"] == "distilled"
    assert found["validation"]["accuracy"] > 0.8
    assert set(found["training"]["history"][0]["terms"]) == {"kd", "hard"}
    assert json.loads(json.dumps(found, allow_nan=False)) is not None


def test_a_term_without_weight_is_not_computed(
    prepared: SimpleNamespace, taught: SimpleNamespace, tmp_path: Path
) -> None:
    terms = [{"name": "kd"}, {"name": "hard", "weight": 0}]
    distill = DISTILL | {"epochs": 1, "objectives": terms}

    found = study(prepared, tmp_path / "s", taught=taught, distill=distill)

    assert set(found["training"]["history"][0]["terms"]) == {"kd"}


def test_student_is_trained_alone_from_labels(prepared: SimpleNamespace, tmp_path: Path) -> None:
    found = study(prepared, tmp_path / "s", train=TRAIN | {"augment": {"mixup": 0.2}})

    assert found["how"] == "trained"
    assert set(found["training"]["history"][0]["terms"]) == {"hard"}


def test_given_student_is_only_measured(
    prepared: SimpleNamespace, taught: SimpleNamespace, tmp_path: Path
) -> None:
    events = Notes()

    found = study(
        prepared,
        tmp_path / "s",
        args={},
        weights=str(taught.teacher / "model.safetensors"),
        events=events,
    )

    assert found["how"] == "given"
    assert found["validation"]["accuracy"] == taught.found["validation"]["accuracy"]
    assert any("possibly seen" in text for text in events.texts)


def test_distilling_without_stored_labels_is_refused(
    prepared: SimpleNamespace, tmp_path: Path
) -> None:
    with pytest.raises(IntegrityError, match="expected the teacher's stored labels"):
        study(prepared, tmp_path / "s", distill=DISTILL)


@pytest.mark.parametrize(("off", "chosen"), [(0.0, "bf16"), (1.0, "fp32")])
def test_labels_are_made_in_bf16_only_where_it_is_as_good(
    prepared: SimpleNamespace,
    taught: SimpleNamespace,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    off: float,
    chosen: str,
) -> None:
    bf16, forward = Precision("bf16", "fast here"), labels_module.forward

    def worse_in_bf16(*args: Any, precision: Precision, **kwargs: Any) -> Any:
        logits = forward(*args, precision=precision, **kwargs)
        noise = torch.randn(logits.shape, generator=torch.Generator().manual_seed(0))
        return logits + (off * noise if precision.name == "bf16" else 0)

    for module in (labels_module, precision_module):
        monkeypatch.setattr(module, "choose_precision", lambda wish, device: bf16)
    monkeypatch.setattr(labels_module, "forward", worse_in_bf16)

    found = label(prepared, taught.teacher, tmp_path / "l")

    assert found["precision"]["name"] == chosen
    assert (found["bf16_against_fp32"]["loss"] < 0.01) == (chosen == "bf16")
