"""Who answers for a student: programs, several teachers, itself; and what is left of them."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from edgestill.models.store import load_network
from edgestill.pipeline.distill.student import Lessons, train_student
from edgestill.pipeline.distill.teacher import prepare_teacher
from edgestill.pipeline.recipe import StudentSpec, TeacherSpec
from edgestill.pipeline.stage import Context, Silent
from edgestill.pipeline.strategy import choose
from edgestill.pipeline.training_spec import DistillSpec

BUDGET = 2**30
SHORT: dict[str, Any] = {"epochs": 2, "batch_size": 16, "lr": 0.05, "views": 2,
                         "augment": {"crop": "pad", "flip": True}}  # fmt: skip


def context_in(folder: Path) -> Context:
    folder.mkdir(parents=True, exist_ok=True)
    return Context(0, 1, "cpu", folder, Silent())


def teach(prepared: SimpleNamespace, folder: Path, **options: Any) -> Path:
    wish = {"model": prepared.factory, "train": {"epochs": 4, "batch_size": 16, "lr": 0.05}}
    spec = TeacherSpec.model_validate(wish | options)
    prepare_teacher(spec, prepared.data, context=context_in(folder), memory_budget_bytes=BUDGET)
    return folder


def study(
    prepared: SimpleNamespace, folder: Path, distill: dict[str, Any], *teachers: Path, **more: Any
) -> dict[str, Any]:
    wish = DistillSpec.model_validate(SHORT | distill)
    spec = StudentSpec.model_validate({"model": prepared.factory, "args": {"width": 2}})
    lessons = Lessons(wish, choose(wish), teachers=teachers, **more)
    return train_student(
        spec, lessons, prepared.data, context=context_in(folder), memory_budget_bytes=BUDGET
    )


@pytest.mark.parametrize("fixed", [False, True])
def test_a_captured_program_can_teach_live(
    prepared: SimpleNamespace, tmp_path: Path, fixed: bool
) -> None:
    module = load_network(teach(prepared, tmp_path / "net")).network.module.eval()
    dynamic = None if fixed else ({0: torch.export.Dim("N")},)
    example = torch.zeros(3, 3, 8, 8)
    program = torch.export.export(module, (example,), dynamic_shapes=dynamic)
    torch.export.save(program, tmp_path / "teacher.pt2")
    teacher = teach(prepared, tmp_path / "teacher", model=str(tmp_path / "teacher.pt2"), train=None)

    found = study(prepared, tmp_path / "s", {"target": "live"}, teacher)

    assert set(found["training"]["history"][-1]["terms"]) == {"kd", "hard"}
    assert found["training"]["history"][-1]["agreement"] > 0


@pytest.mark.parametrize("target", ["ema", "exits", "peers"])
def test_nothing_of_what_taught_a_student_is_saved_with_it(
    prepared: SimpleNamespace, tmp_path: Path, target: str
) -> None:
    study(prepared, tmp_path / "s", {"target": target})
    plain = load_network(tmp_path / "s").network.module

    assert all(not module._forward_hooks for module in plain.modules())
    assert {name.partition(".")[0] for name in plain.state_dict()} <= set("0123456")


def test_a_joint_teacher_is_saved_beside_the_student(
    prepared: SimpleNamespace, tmp_path: Path
) -> None:
    joint = TeacherSpec.model_validate({"model": prepared.factory})

    found = study(prepared, tmp_path / "s", {"target": "joint"}, joint=joint)

    stored = load_network(tmp_path / "s" / "teacher")
    assert found["teacher"]["validation"]["n"] > 0
    assert stored.class_names == ("blue", "green", "red")
    assert "teacher.hard" in found["training"]["history"][-1]["terms"]


@pytest.mark.parametrize("combine", ["mean", "confidence", (0.0, 1.0)])
def test_several_live_teachers_are_one_mixed_target(
    prepared: SimpleNamespace, tmp_path: Path, combine: Any
) -> None:
    teachers = [teach(prepared, tmp_path / f"t{width}", args={"width": width}) for width in (3, 5)]

    both = study(prepared, tmp_path / "both", {"target": "live", "combine": combine}, *teachers)
    second = study(prepared, tmp_path / "one", {"target": "live"}, teachers[1])

    losses = [run["training"]["history"][0]["terms"]["kd"] for run in (both, second)]
    # a weight of 0 leaves the other teacher alone
    assert (losses[0] == pytest.approx(losses[1], rel=1e-4)) == (combine == (0.0, 1.0))


def test_helper_parts_begin_from_the_seed(prepared: SimpleNamespace, tmp_path: Path) -> None:
    teacher = teach(prepared, tmp_path / "t")
    wish = {"objectives": [{"name": "hint", "student": ["2"], "teacher": ["2"]}, {"name": "kd"}]}

    weights = []
    for name in ("a", "b"):
        torch.manual_seed(len(weights))  # whatever the process has drawn before
        study(prepared, tmp_path / name, wish, teacher)
        weights.append((tmp_path / name / "model.safetensors").read_bytes())

    assert weights[0] == weights[1]
