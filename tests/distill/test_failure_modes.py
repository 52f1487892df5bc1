"""What goes wrong in published distillation code, and would be seen here.

One section for each failure of reference/distillation.md §4 that applies; a check is shown to tell
the bug from the right code by putting the bug in. Held elsewhere: the formulas against the usual
bugs (test_objectives.py), class order and shifted rows of labelled images (test_stages.py), taps
under torch.compile and DDP (test_taps.py), most of what a recipe may not ask for
(pipeline/test_recipe.py).
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from edgestill.models.source import open_network
from edgestill.models.store import load_network
from edgestill.pipeline import flow
from edgestill.pipeline.data.augment import Views
from edgestill.pipeline.data.dataset import open_data, with_unlabelled
from edgestill.pipeline.data.stage import prepare_data
from edgestill.pipeline.distill import joints as joints_module
from edgestill.pipeline.distill import self_taught, student, tasks, terms
from edgestill.pipeline.distill.joints import join
from edgestill.pipeline.distill.label_store import (
    HEADER,
    LabelStore,
    describe,
    network_sha256,
    open_labels,
)
from edgestill.pipeline.distill.labels import store_labels
from edgestill.pipeline.distill.learner import Learner
from edgestill.pipeline.distill.student import Lessons, check_lessons, train_student
from edgestill.pipeline.distill.taps import Tapped
from edgestill.pipeline.distill.tasks import Course
from edgestill.pipeline.distill.teacher import prepare_teacher
from edgestill.pipeline.distill.terms import Scene, terms_of
from edgestill.pipeline.errors import EdgestillError, IntegrityError, ModelError, RecipeError
from edgestill.pipeline.recipe import DataSpec, Recipe, StudentSpec, TeacherSpec
from edgestill.pipeline.recipe_file import load_recipe
from edgestill.pipeline.stage import Context, Silent
from edgestill.pipeline.strategy import choose
from edgestill.pipeline.train import run as training_run
from edgestill.pipeline.train.average import tensors_of
from edgestill.pipeline.train.checkpoint import digest
from edgestill.pipeline.train.optimizer import build_optimizer
from edgestill.pipeline.training_spec import DistillSpec
from safetensors.torch import load_file
from scipy.special import log_softmax
from torch import Tensor, nn

Array = np.ndarray[Any, Any]
BUDGET = 2**30
SHORT: dict[str, Any] = {"epochs": 2, "batch_size": 16, "lr": 0.05, "views": 2, "precision": "fp32",
                         "augment": {"crop": "pad", "flip": True}}  # fmt: skip
HINT = {"objectives": [{"name": "hint", "student": ["2"], "teacher": ["2"]}, {"name": "hard"}]}

DROPOUT_ONLY = """
from torch import nn


def make(classes, in_channels):
    return nn.Sequential(nn.Flatten(), nn.Dropout(0.5), nn.Linear(64 * in_channels, classes))
"""

CHANGES_ITSELF = """
import torch
from torch import nn


class Counting(nn.Module):
    def __init__(self, classes, in_channels):
        super().__init__()
        self.fc = nn.Linear(64 * in_channels, classes)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x):
        self.calls.add_(1)
        return self.fc(x.flatten(1))


def make(classes, in_channels):
    return Counting(classes, in_channels)
"""


class Killed(Exception):
    """Stands for a kill signal in the middle of a run."""


def context_in(folder: Path) -> Context:
    folder.mkdir(parents=True, exist_ok=True)
    return Context(0, 1, "cpu", folder, Silent())


def teach(prepared: SimpleNamespace, folder: Path, **options: Any) -> Path:
    wish = {"model": prepared.factory, "train": {"epochs": 4, "batch_size": 16, "lr": 0.05}}
    spec = TeacherSpec.model_validate(wish | options)
    prepare_teacher(spec, prepared.data, context=context_in(folder), memory_budget_bytes=BUDGET)
    return folder


def teach_by(source: str, prepared: SimpleNamespace, folder: Path) -> Path:
    """A teacher from a factory of its own."""
    folder.mkdir(parents=True)
    (folder / "net.py").write_text(source)
    return teach(prepared, folder, model=f"{folder / 'net.py'}:make")


def label(prepared: SimpleNamespace, teacher: Path, folder: Path) -> Path:
    spec = DistillSpec.model_validate(SHORT)
    context = context_in(folder)
    store_labels(spec, teacher, prepared.data, context=context, memory_budget_bytes=BUDGET)
    return folder


def study(
    prepared: SimpleNamespace, folder: Path, distill: dict[str, Any], **lessons: Any
) -> dict[str, Any]:
    wish = DistillSpec.model_validate(SHORT | distill)
    spec = StudentSpec.model_validate({"model": prepared.factory, "args": {"width": 2}})
    return train_student(
        spec,
        Lessons(wish, choose(wish), **lessons),
        prepared.data,
        context=context_in(folder),
        memory_budget_bytes=BUDGET,
    )


def course_of(
    prepared: SimpleNamespace, folder: Path, distill: dict[str, Any], **answers: Any
) -> Course:
    """The course of a fresh student; `answers` are `stores` or `teachers`."""
    data = open_data(prepared.data, memory_budget_bytes=BUDGET)
    wish = DistillSpec.model_validate(SHORT | distill)
    make = tasks.taught if answers else self_taught.averaged
    context = context_in(folder)
    return make(plain(prepared), data, choose(wish), wish, context=context, **answers)


def plain(prepared: SimpleNamespace) -> nn.Module:
    shape = (3, 8, 8)
    return open_network(
        prepared.factory, args={"width": 2}, classes=3, input_shape=shape, seed=1
    ).module


@pytest.fixture(scope="module")
def teacher(prepared: SimpleNamespace, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return teach(prepared, tmp_path_factory.mktemp("failures") / "teacher")


# --- the teacher, while it teaches


def watched(monkeypatch: pytest.MonkeyPatch, *, bug: bool) -> list[tuple[nn.Module, bool, bool]]:
    """How the live teacher answers: (it, is a part of it in train mode, has it a gradient).

    `bug` leaves it in train mode, as TinyBERT and torchdistill ≥ 1.0 do.
    """
    seen: list[tuple[nn.Module, bool, bool]] = []
    live = student._live

    def spy(folder: Path, context: Context) -> nn.Module:
        module = live(folder, context).train(bug)

        def note(module: nn.Module, _args: Any, output: Tensor) -> None:
            training = any(part.training for part in module.modules())
            seen.append((module, training, output.requires_grad))

        module.register_forward_hook(note)
        return module

    monkeypatch.setattr(student, "_live", spy)
    return seen


def test_a_live_teacher_answers_in_eval_mode_without_gradient_and_stays_as_it_is(
    prepared: SimpleNamespace, teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = watched(monkeypatch, bug=False)

    study(prepared, tmp_path / "s", {"target": "live"}, teachers=(teacher,))

    stored = load_network(teacher).network.module
    assert len(seen) > 4
    assert not any(training or graph for _, training, graph in seen)
    assert digest(tensors_of(seen[0][0])) == digest(tensors_of(stored))
    assert all(parameter.grad is None for parameter in seen[0][0].parameters())


def test_a_teacher_in_train_mode_is_found_by_its_buffers(
    prepared: SimpleNamespace, teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    watched(monkeypatch, bug=True)

    with pytest.raises(ModelError, match="stay as it is while it teaches"):
        study(prepared, tmp_path / "s", {"target": "live"}, teachers=(teacher,))


def test_dropout_at_work_in_a_teacher_without_buffers_would_be_seen(
    prepared: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dropping = teach_by(DROPOUT_ONLY, prepared, tmp_path / "t")
    found = []
    for bug in (False, True):
        with monkeypatch.context() as patch:
            seen = watched(patch, bug=bug)
            study(prepared, tmp_path / f"s{bug}", {"target": "live"}, teachers=(dropping,))
        found.append(any(training for _, training, _ in seen))

    assert found == [False, True]


def test_a_teacher_that_changes_itself_in_eval_mode_is_refused(
    prepared: SimpleNamespace, tmp_path: Path
) -> None:
    counting = teach_by(CHANGES_ITSELF, prepared, tmp_path / "t")

    with pytest.raises(ModelError, match="Counting changed its own weights or buffers"):
        label(prepared, counting, tmp_path / "l")
    with pytest.raises(ModelError, match="weights or buffers have changed in eval mode"):
        study(prepared, tmp_path / "s", {"target": "live"}, teachers=(counting,))


def trained_tensors(course: Course) -> set[int]:
    spec = DistillSpec.model_validate(SHORT)
    groups = build_optimizer(course.learner, spec).param_groups
    return {parameter.data_ptr() for group in groups for parameter in group["params"]}


def tensors_at(module: nn.Module) -> set[int]:
    return {tensor.data_ptr() for tensor in module.state_dict().values()}


@pytest.mark.parametrize("bug", [False, True])
def test_neither_optimizer_nor_checkpoint_holds_a_live_teacher(
    prepared: SimpleNamespace, teacher: Path, tmp_path: Path, bug: bool
) -> None:
    module = load_network(teacher).network.module
    course = course_of(prepared, tmp_path, HINT, teachers=[module])
    assert isinstance(course.learner, Learner)
    if bug:  # as torchdistill #122 and TinyBERT #106: the teacher is wrapped with the student
        course.learner.peers.append(module)

    assert bool(trained_tensors(course) & tensors_at(module)) == bug
    assert bool(tensors_at(course.learner) & tensors_at(module)) == bug
    assert tensors_at(course.learner.parts) & trained_tensors(course)


# --- the average that teaches


class Forgetful(Learner):
    """The bug: its average follows the student into train mode."""

    def train(self, mode: bool = True) -> Forgetful:
        nn.Module.train(self, mode)
        return self


@pytest.mark.parametrize("learner", [Learner, Forgetful])
def test_the_average_answers_in_eval_mode_while_the_student_trains(
    prepared: SimpleNamespace,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    learner: type[Learner],
) -> None:
    monkeypatch.setattr(self_taught, "Learner", learner)
    course = course_of(prepared, tmp_path, {"target": "ema"})
    module = course.learner.train()
    assert isinstance(module, Learner)
    assert module.frozen is not None
    before = digest(tensors_of(module.frozen))

    course.task.terms(module, course.task.load(torch.arange(16), 0))

    is_right = learner is Learner
    # the reverse failure, TRL #5862: eval() of shared weights turns the student's dropout off
    assert all(part.training for part in module.student.modules())
    assert any(part.training for part in module.frozen.modules()) != is_right
    assert (digest(tensors_of(module.frozen)) == before) == is_right
    assert not trained_tensors(course) & tensors_at(module.frozen)


def test_the_average_follows_the_student_by_its_decay(
    prepared: SimpleNamespace, tmp_path: Path
) -> None:
    course = course_of(prepared, tmp_path, {"target": "ema", "target_decay": 0.5})
    module, follow = course.learner, course.task.after_step
    assert isinstance(module, Learner)
    assert module.frozen is not None
    assert follow is not None
    old, new = torch.randn(3), torch.randn(3)
    module.frozen.state_dict()["6.bias"].copy_(old)
    module.network.state_dict()["6.bias"].copy_(new)

    follow(module, 0)  # decay is the smaller of 0.5 and (1 + step) / (10 + step)
    after_first = module.frozen.state_dict()["6.bias"].clone()
    follow(module, 1000)

    torch.testing.assert_close(after_first, 0.1 * old + 0.9 * new)
    torch.testing.assert_close(module.frozen.state_dict()["6.bias"], 0.5 * after_first + 0.5 * new)


# --- what a step of the task computes


def inverted(term: Any, scene: Scene) -> Any:
    """LSKD #15: the flag selects the loss that is not standardized."""
    other = term.model_copy(update={"standardize": not term.standardize})
    return SOFTENED(other, scene)


KD, SOFTENED = terms.kd, terms._softened
FORMULA_BUGS: dict[str, dict[str, Callable[..., Any]]] = {
    "none": {},
    "mean over classes": {"kd": lambda s, t, *, temperature: KD(s, t, temperature=temperature) / 3},
    "no T²": {"kd": lambda s, t, *, temperature: KD(s, t, temperature=temperature) / 9},
    "probabilities for logits": {
        "kd": lambda s, t, *, temperature: KD(s.softmax(1), t, temperature=temperature)
    },
    "teacher follows": {"kd": lambda s, t, *, temperature: KD(t, s, temperature=temperature)},
    "inverted flag": {"_softened": inverted},
}


@pytest.mark.parametrize("standardize", [False, True])
@pytest.mark.parametrize("bug", FORMULA_BUGS)
def test_a_steps_kd_is_the_formula_in_float64(
    prepared: SimpleNamespace,
    teacher: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    bug: str,
    standardize: bool,
) -> None:
    term = {"name": "kd", "temperature": 3, "standardize": standardize}
    module = load_network(teacher).network.module.eval()
    course = course_of(prepared, tmp_path, {"target": "live", "objectives": [term]},
                       teachers=[module])  # fmt: skip
    learner, lesson = course.learner.eval(), course.task.load(torch.arange(8), 0)
    assert isinstance(learner, Learner)
    for name, wrong in FORMULA_BUGS[bug].items():
        monkeypatch.setattr(terms, name, wrong)

    found = course.task.terms(learner, lesson)["kd"].item()

    with torch.no_grad():
        both = [net(lesson.batch.inputs).double().numpy() for net in (module, learner.network)]
    if standardize:
        both = [(z - z.mean(1, keepdims=True)) / z.std(1, ddof=1, keepdims=True) for z in both]
    log_p, log_q = (log_softmax(z / 3, axis=1) for z in both)
    expected = 9 * (np.exp(log_p) * (log_p - log_q)).sum(1).mean()
    assert (found == pytest.approx(expected, rel=1e-3)) == (bug == "none")


# --- stored labels of unlabelled images


@pytest.fixture(scope="module")
def half(prepared: SimpleNamespace, tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """Half of the training images without a label: `.data`, `.teacher`, `.labels`, `.factory`."""
    root = tmp_path_factory.mktemp("half")
    spec = DataSpec.model_validate(
        {
            "train": {"path": str(prepared.root / "images")},
            "test": {"fraction": 0.2},
            "validation": 0.3,
            "unlabelled": {"fraction": 0.5},
            "calibration": 8,
            "preprocess": {"mean": [0.3, 0.3, 0.3], "std": [0.2, 0.2, 0.2]},
        }
    )
    prepare_data(spec, context=context_in(root / "data"))
    made = SimpleNamespace(data=root / "data", factory=prepared.factory)
    made.teacher = teach(made, root / "teacher")
    made.labels = label(made, made.teacher, root / "labels")
    return made


KEPT: list[Tensor] = []  # positions of the images that the run learns from
ROWS, BATCH = LabelStore.rows, Views.batch


def among_kept(indices: Tensor) -> Tensor:
    return torch.searchsorted(KEPT[0], indices)


ROW_BUGS: dict[str, tuple[Any, str, Callable[..., Any]] | None] = {
    "none": None,
    # haitongli #4, #9: cached in another order than the loader's
    "labels one row off": (LabelStore, "rows",
        lambda self, at, *, view: ROWS(self, (at - 1) % len(self.view(0)), view=view)),
    "labels of another view": (LabelStore, "rows",
        lambda self, at, *, view: ROWS(self, at, view=1 - view)),
    "labels counted among the kept": (LabelStore, "rows",
        lambda self, at, *, view: ROWS(self, among_kept(at), view=view)),
    "images counted among the kept": (Views, "batch",
        lambda self, at, *, view: BATCH(self, among_kept(at), view=view)),
}  # fmt: skip


@pytest.mark.parametrize("bug", ROW_BUGS)
def test_every_image_meets_the_answer_that_its_teacher_gave_it(
    half: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bug: str
) -> None:
    data, spec = open_data(half.data, memory_budget_bytes=BUDGET), DistillSpec(**SHORT)
    expected = describe(spec, data, seed=0, teacher=network_sha256(half.teacher))
    store = open_labels(half.labels, expected=expected)
    images = with_unlabelled(data)
    sure = np.mean([torch.from_numpy(np.array(store.view(view))).float().softmax(1).amax(1).numpy()
                    for view in range(2)], axis=0)  # fmt: skip
    wish = {"confidence_floor": float(np.median(sure[images.labels < 0]))}
    monkeypatch.setattr(tasks, "_rows", remembering(tasks._rows))
    course = course_of(half, tmp_path, wish, stores=[store])
    module = load_network(half.teacher).network.module.eval()
    if ROW_BUGS[bug] is not None:
        monkeypatch.setattr(*ROW_BUGS[bug])  # type: ignore[call-overload]

    apart = []
    for epoch in range(4):
        lesson = course.task.load(torch.arange(course.task.samples), epoch)
        with torch.no_grad():
            live = module(lesson.batch.inputs)
        apart.append(float((lesson.stored[0] - live).abs().max() / live.abs().max()))

    assert 0 < course.unlabelled < int((images.labels < 0).sum())
    # float16 rounds by 2^-11
    assert (max(apart) < 2**-9) == (bug == "none")


def remembering(rows: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def call(*arguments: Any) -> Tensor:
        KEPT[:] = [rows(*arguments)]
        return KEPT[0]

    return call


def test_shifted_rows_of_unlabelled_images_alone_do_not_survive_the_live_check(
    half: SimpleNamespace, tmp_path: Path
) -> None:
    folder = label(half, half.teacher, tmp_path / "l")
    labelled = len(open_data(half.data, memory_budget_bytes=BUDGET).train.labels)
    resume = folder / "resume"
    resume.mkdir(exist_ok=True)
    for view in range(2):
        rows = np.load(folder / f"view-000{view}.npy")
        rows[labelled:] = np.roll(rows[labelled:], 1, axis=0)
        np.save(resume / f"view-000{view}.npy", rows)
    (resume / HEADER).write_text((folder / HEADER).read_text())

    with pytest.raises(IntegrityError, match="do not belong to these images or this teacher"):
        label(half, half.teacher, folder)


def test_labels_of_another_teacher_are_refused_before_training(
    prepared: SimpleNamespace, teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = teach(prepared, tmp_path / "other", args={"width": 5})
    stores = (label(prepared, other, tmp_path / "l"),)
    monkeypatch.setattr(student, "fit", None)  # would be called to train

    with pytest.raises(IntegrityError, match="stale: teacher_sha256: expected") as caught:
        study(prepared, tmp_path / "s", {}, stores=stores, teachers=(teacher,))

    assert len(str(caught.value).splitlines()) == 1


# --- layers and helpers


def staged(*channels: int) -> nn.Sequential:
    """A net of one 3 × 3 convolution of stride 2 for each stage."""
    torch.manual_seed(sum(channels))
    layers: list[nn.Module] = []
    for inputs, outputs in zip((3, *channels), channels, strict=False):
        convolution = nn.Conv2d(inputs, outputs, 3, stride=2, padding=1)
        layers.append(nn.Sequential(convolution, nn.BatchNorm2d(outputs), nn.ReLU()))
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels[-1], 3))


ODD = (3, 23, 37)  # C, H, W
FEATURES = ["hint", "attention", "reviewkd", "rkd"]


def odd_step(name: str) -> tuple[Tensor, nn.Module, nn.ModuleDict]:
    """One step of a feature objective between nets of odd widths, depths and resolutions."""
    spec = DistillSpec.model_validate({"objectives": [{"name": name}]})
    plan, mine, theirs = choose(spec), staged(5, 7, 11), staged(9, 13, 17, 19)
    joined = join(plan.features, mine, [theirs], input_shape=ODD)
    inputs, parts = torch.randn(4, *ODD), nn.ModuleDict(joined.parts)
    logits, features = Tapped(mine, joined.student_paths)(inputs)
    with torch.no_grad():
        answer, shown = Tapped(theirs.eval(), joined.teacher_paths[0])(inputs)
    picked = joined.pick(features, [shown])
    scene = Scene(spec, None, 0, logits, answer[None], picked, parts)  # type: ignore[arg-type]
    return terms_of(plan.objectives, scene)[name], mine, parts


@pytest.mark.parametrize("name", FEATURES)
def test_nets_of_odd_widths_depths_and_resolutions_are_joined_by_themselves(name: str) -> None:
    value, mine, parts = odd_step(name)
    value.backward()  # type: ignore[no-untyped-call]

    assert value.isfinite()
    assert value > 0
    assert all(p.grad is not None and p.grad.any() for p in mine[0].parameters() if p.ndim > 1)
    assert all(p.grad is not None for p in parts.parameters())


@pytest.mark.parametrize("name", ["hint", "reviewkd"])
def test_shapes_written_by_hand_would_not_fit_them(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # mdistiller #22, #23; ReviewKD #15: a table of widths for each pair
    by_hand = [(16, 32, 32), (32, 16, 16), (64, 8, 8)]
    monkeypatch.setattr(joints_module, "_shapes", lambda net, paths, shape: by_hand[: len(paths)])

    with pytest.raises((RuntimeError, ValueError)):
        odd_step(name)


class Spare(nn.Module):
    """Has a layer that it does not run."""

    def __init__(self) -> None:
        super().__init__()
        self.body = staged(4, 6)
        self.spare = nn.Conv2d(3, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.body(x)
        return logits


def test_a_layer_that_never_runs_is_refused_before_training() -> None:
    term = {"name": "hint", "student": ["spare"], "teacher": ["0"]}
    plan = choose(DistillSpec.model_validate({"objectives": [term]}))

    with pytest.raises(ModelError, match=r"'spare' of Spare: .* it never fired"):
        check_lessons(plan, Spare(), [staged(4, 6)], input_shape=ODD)


def test_a_tap_that_is_lost_stops_the_run_and_does_not_count_as_zero(
    prepared: SimpleNamespace, teacher: Path, tmp_path: Path
) -> None:
    module = load_network(teacher).network.module.eval()
    course = course_of(prepared, tmp_path, HINT, teachers=[module])
    lesson = course.task.load(torch.arange(8), 0)
    assert course.task.terms(course.learner, lesson)["hint"] > 0
    assert isinstance(course.learner, Learner)

    course.learner.close()  # yolo-distiller #13: hooks are lost, the loss is 0 from then on

    with pytest.raises(ModelError, match="it never fired"):
        course.task.terms(course.learner, lesson)


HELPED: dict[str, dict[str, Any]] = {
    "hint": HINT,
    "balanced": {**HINT, "balance": True},
    "curriculum": {"target": "live", "objectives": [{"name": "kd", "temperature": "curriculum"}]},
    "exits": {"target": "exits"},
    "ema": {"target": "ema"},
    "peers": {"target": "peers"},
}


@pytest.mark.parametrize("name", HELPED)
def test_a_saved_student_is_the_plain_network(
    prepared: SimpleNamespace, teacher: Path, tmp_path: Path, name: str
) -> None:
    own = HELPED[name].get("target") in ("exits", "ema", "peers")

    study(prepared, tmp_path / "s", HELPED[name], teachers=() if own else (teacher,))

    saved = load_file(tmp_path / "s" / "model.safetensors")
    wanted = plain(prepared).state_dict()
    assert {key: value.shape for key, value in saved.items()} == {
        key: value.shape for key, value in wanted.items()
    }


@pytest.mark.parametrize("bug", [False, True])
@pytest.mark.parametrize("name", ["hint", "exits"])
def test_no_hook_is_left_on_the_student_that_is_saved(
    prepared: SimpleNamespace,
    teacher: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    bug: bool,
) -> None:
    hooked: list[bool] = []

    def look(network: Any, *_args: Any, **_options: Any) -> None:
        hooked.append(any(part._forward_hooks for part in network.module.modules()))

    monkeypatch.setattr(student, "save", look)
    if bug:
        monkeypatch.setattr(Learner, "close", lambda self: None)

    study(prepared, tmp_path / "s", HELPED[name], teachers=() if name == "exits" else (teacher,))

    assert hooked == [bug]


# --- resuming what has helpers beside it

RESUMED: dict[str, tuple[dict[str, Any], str]] = {  # wish, and where its further state is
    "ema": ({"target": "ema", "target_decay": 0.9}, "frozen."),
    "exits": ({"target": "exits"}, "parts."),
    "peers": ({"target": "peers"}, "peers."),
    "curriculum": (HELPED["curriculum"], "parts."),
    "balance": ({**HINT, "balance": True}, f"parts.{tasks.BALANCE}."),
    "projection": (HINT, "parts.hint."),
}


@pytest.mark.parametrize("bug", [False, True])
@pytest.mark.parametrize("name", RESUMED)
def test_killed_and_resumed_gives_the_bytes_of_a_run_never_stopped(
    prepared: SimpleNamespace,
    teacher: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    bug: bool,
) -> None:
    wish, further = RESUMED[name]
    wish = wish | {"epochs": 4, "checkpoint_minutes": 0, "select": "final"}
    teachers = () if wish.get("target") in ("ema", "exits", "peers") else (teacher,)
    study(prepared, tmp_path / "whole", wish, teachers=teachers)
    with monkeypatch.context() as patch:
        patch.setattr(tasks, "accuracy", dying(tasks.accuracy, call=3))
        with pytest.raises(Killed):
            study(prepared, tmp_path / "cut", wish, teachers=teachers)
    torch.manual_seed(123)  # another process has another random state
    if bug:  # what helps the student begins anew, as if the checkpoint did not hold it
        monkeypatch.setattr(training_run, "assign", without(further))

    found = study(prepared, tmp_path / "cut", wish, teachers=teachers)

    weights = [(tmp_path / run / "model.safetensors").read_bytes() for run in ("whole", "cut")]
    assert found["training"]["resumed_epoch"] == 2
    assert (weights[0] == weights[1]) != bug


def dying(accuracy: Callable[..., float], *, call: int) -> Callable[..., float]:
    calls: list[int] = []

    def measured(*arguments: Any) -> float:
        calls.append(1)
        if len(calls) == call:
            raise Killed
        return accuracy(*arguments)

    return measured


def without(prefix: str) -> Callable[..., None]:
    def assign(target: Any, source: Any) -> None:
        kept = {name: tensor for name, tensor in target.items() if not name.startswith(prefix)}
        assert len(kept) < len(target)
        ASSIGN(kept, {name: source[name] for name in kept})

    return assign


ASSIGN = training_run.assign

# --- wishes that cannot be met

TAUGHT = """\
data:
  train: {path: digits}
  test: {fraction: 0.4}
student: {model: plain_cnn_small}
"""
TEACHER = "{model: plain_cnn_small, args: {width: 2}, train: {epochs: 1}}"
UNLABELLED = "  unlabelled: {fraction: 0.5}\n"


@pytest.mark.parametrize(
    ("data", "teacher", "distill", "expected"),
    [
        ("", TEACHER, "strategy: quality, target: stored", "reviewkd compares layers"),
        (UNLABELLED, TEACHER, "strategy: quality, confidence_floor: 0.5", "on stored labels"),
        (UNLABELLED, TEACHER, "objectives: [{name: hard}, {name: kd, weight: 0}]", "no objective"),
        ("", None, "target: peers, objectives: [{name: hard}, {name: kd, weight: 0}]", "needs `ha"),
        ("", f"[{TEACHER}, {TEACHER}]", "generations: 2, objectives: [{name: rkd, of: 2}]",
         "from the second of 2 generations on there is one"),
        ("", f"[{TEACHER}, {TEACHER}]", "objectives: [{name: rkd, of: 3}]", "not there (2 given)"),
        ("", f"[{TEACHER}, {TEACHER}]", "combine: [0, 0]", "sum to 0"),
        ("", f"[{TEACHER}, {TEACHER}]", "combine: [-1, 2]", "greater than or equal to 0, got -1"),
        ("", TEACHER, "objectives: [{name: dist, temperature: 0}]", "greater than 0, got 0"),
        ("", TEACHER, "objectives: [{name: kd, temperature: hot}]", "be 'curriculum', got 'hot'"),
        ("", TEACHER, "combine: median", "'mean' or 'confidence', got 'median'"),
        ("", None, "target: ema, objectives: [{name: hard}, {name: kd}, {name: rkd}]", "a live"),
        ("", TEACHER, "objectives: [{name: dkd}, {name: hard}], augment: {cutmix: 1}", "use kd"),
    ],
)  # fmt: skip
def test_what_would_fail_hours_later_is_one_line_about_the_recipe(
    tmp_path: Path, data: str, teacher: str | None, distill: str, expected: str
) -> None:
    path = tmp_path / "recipe.yaml"
    given = f"teacher: {teacher}\n" if teacher else ""
    path.write_text(
        TAUGHT.replace("student:", f"{data}student:") + f"{given}distill: {{{distill}}}"
    )

    with pytest.raises(RecipeError) as caught:
        load_recipe(str(path))

    (line,) = str(caught.value).splitlines()
    assert line.startswith("recipe.yaml:")
    assert expected in line


LATER: list[tuple[dict[str, Any], str]] = [
    ({"objectives": [{"name": "hint", "student": ["layer9"]}]}, "no module named 'layer9'"),
    ({"objectives": [{"name": "hint", "student": ["layer1"], "teacher": ["layer1", "layer2"]}]},
     "as many layers of the student as of the teacher, got 1"),
    ({"objectives": [{"name": "attention", "student": ["fc"], "teacher": ["fc"]}]},
     "expected feature maps (N, C, H, W)"),
    ({"objectives": [{"name": "reviewkd", "student": ["flatten"], "teacher": ["layer1"]}]},
     "expected feature maps (N, C, H, W)"),
    ({"objectives": [{"name": "rkd", "student": ["layer?"], "teacher": ["layer?"]}]},
     "expected one layer of each, got 3"),
]  # fmt: skip


@pytest.mark.parametrize(("distill", "expected"), LATER)
def test_layers_that_cannot_be_compared_are_one_line_before_anything_is_trained(
    tmp_path: Path, distill: dict[str, Any], expected: str
) -> None:
    recipe = Recipe.model_validate(
        {
            "data": {"train": {"path": "digits"}, "test": {"fraction": 0.4}, "calibration": 8},
            "teacher": {"model": "plain_cnn_small", "train": {}},
            "student": {"model": "plain_cnn_small"},
            "distill": distill,
            "compute": {"threads": 1},
        }
    )

    with pytest.raises(EdgestillError) as caught:
        flow.run(recipe, tmp_path)

    (line,) = str(caught.value).splitlines()
    assert expected in line
    assert [stage.name for stage in (tmp_path / ".edgestill" / "stages").iterdir()] == ["data"]
