"""Trainable helpers: shapes are found, not written; temperatures learn against; terms balance."""

from __future__ import annotations

import math

import pytest
import torch
from edgestill.pipeline.distill.balance import LARGEST, Balance
from edgestill.pipeline.distill.exits import Exit
from edgestill.pipeline.distill.parts import (
    CurriculumTemperature,
    Projector,
    Review,
    curriculum_strength,
)
from edgestill.pipeline.distill.terms import factors_of
from edgestill.pipeline.training_spec import HardSpec, KdSpec


@pytest.mark.parametrize(
    ("student", "teacher"),
    [((5, 8, 8), (7, 8, 8)), ((5, 8, 8), (7, 4, 4)), ((5, 3, 3), (7, 9, 9)), ((5,), (7,))],
)
def test_a_projection_joins_any_two_shapes(
    student: tuple[int, ...], teacher: tuple[int, ...]
) -> None:
    mine, theirs = Projector(student, teacher)(torch.randn(2, *student), torch.randn(2, *teacher))

    assert mine.shape == theirs.shape
    assert mine.shape[1] == teacher[0]


def test_fused_maps_have_the_teachers_shapes_in_the_students_order() -> None:
    students, teachers = [(3, 9, 9), (5, 5, 5), (6, 2, 2)], [(8, 8, 8), (16, 4, 4), (24, 4, 4)]

    fused = Review(students, teachers)([torch.randn(2, *shape) for shape in students])

    assert [tuple(feature.shape[1:]) for feature in fused] == teachers


def test_a_shallow_fused_map_depends_on_the_deeper_ones() -> None:
    shapes = [(3, 8, 8), (4, 4, 4)]
    review = Review(shapes, shapes).eval()
    shallow, deep = (torch.randn(1, *shape) for shape in shapes)

    before, after = (review([shallow, maps])[0] for maps in (deep, deep + 1))

    assert not torch.allclose(before, after)


@pytest.mark.parametrize("stage", [(8, 16, 16), (16, 8, 8), (24, 5, 5), (32, 4, 4), (8, 4, 4)])
def test_an_exit_answers_from_any_stage(stage: tuple[int, ...]) -> None:
    assert Exit(stage, (32, 4, 4), classes=7)(torch.randn(2, *stage)).shape == (2, 7)


def test_the_temperature_begins_at_one_plus_twenty_sigmoid_of_one() -> None:
    assert CurriculumTemperature()(0.5).item() == pytest.approx(1 + 20 / (1 + math.exp(-1)))


def test_the_temperature_learns_to_make_the_loss_larger() -> None:
    part = CurriculumTemperature()
    temperature = part(0.5)
    temperature.backward()  # loss = T: descent would lower it
    assert part.theta.grad is not None
    plain = 20 * torch.sigmoid(torch.tensor(1.0)) * (1 - torch.sigmoid(torch.tensor(1.0)))

    torch.testing.assert_close(part.theta.grad, -0.5 * plain)


def test_the_curriculum_rises_by_half_a_cosine() -> None:
    strengths = [curriculum_strength(epoch) for epoch in (0, 5, 10, 30)]

    assert strengths == pytest.approx([0.0, 0.5, 1.0, 1.0])


def test_balanced_terms_are_as_large_as_the_first() -> None:
    balance = Balance(["hard", "attention"])
    terms = {"hard": torch.tensor(2.0), "attention": torch.tensor(1e-3)}
    for _ in range(5):
        scales = balance(terms)

    assert scales["hard"].item() == pytest.approx(1.0)
    assert (scales["attention"] * terms["attention"]).item() == pytest.approx(2.0, rel=1e-4)


def test_a_term_that_is_learnt_is_not_blown_up_without_end() -> None:
    scales = Balance(["hard", "kd"])({"hard": torch.tensor(1.0), "kd": torch.tensor(0.0)})

    assert scales["kd"].item() == pytest.approx(LARGEST)


def test_balance_carries_no_gradient() -> None:
    terms = {"a": torch.tensor(1.0, requires_grad=True), "b": torch.tensor(3.0)}

    assert not any(scale.requires_grad for scale in Balance(["a", "b"])(terms).values())


def test_weights_rise_and_fall_over_the_run() -> None:
    terms = [KdSpec(warmup_epochs=2, fade="linear"), HardSpec(fade="cosine")]
    factors = factors_of(terms, epochs=10)

    assert [factors(t)["kd"] for t in (0, 1, 2, 5, 10)] == pytest.approx([0, 0.45, 0.8, 0.5, 0])
    assert [factors(t)["hard"] for t in (0, 5, 10)] == pytest.approx([1, 0.5, 0])
