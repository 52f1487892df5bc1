"""Shapes, wiring and gradients of the trainable helpers."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from edgestill.pipeline.distill.objectives import kd
from edgestill.pipeline.distill.parts import (
    CurriculumTemperature,
    Projector,
    Review,
    curriculum_strength,
)
from torch import Tensor, nn

STUDENT = [(4, 16, 16), (6, 8, 8), (10, 4, 4)]
TEACHER = [(8, 16, 16), (12, 8, 8), (16, 4, 4)]


def draw(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def maps(shapes: list[tuple[int, int, int]], *, samples: int = 2) -> list[Tensor]:
    return [draw(index, samples, *shape) for index, shape in enumerate(shapes)]


@pytest.mark.parametrize(
    ("student", "teacher", "joint"),
    [
        ((4, 8, 8), (6, 8, 8), (6, 8, 8)),
        ((4, 8, 8), (6, 4, 4), (6, 4, 4)),
        ((4, 4, 4), (6, 7, 7), (6, 4, 4)),
        ((4, 8, 3), (6, 5, 6), (6, 5, 3)),
        ((4,), (6,), (6,)),
    ],
)
def test_projector_brings_both_to_the_teachers_channels_and_the_smaller_size(
    student: tuple[int, ...], teacher: tuple[int, ...], joint: tuple[int, ...]
) -> None:
    mine, theirs = Projector(student, teacher)(draw(0, 3, *student), draw(1, 3, *teacher))

    assert mine.shape == theirs.shape == (3, *joint)


def test_projector_mixes_channels_position_by_position_and_then_normalises() -> None:
    projector, student = Projector((3, 2, 2), (5, 2, 2)), draw(2, 4, 3, 2, 2)
    weight = next(projector.parameters()).detach()[:, :, 0, 0]
    mixed = torch.einsum("oc,nchw->nohw", weight, student)
    centred = mixed - mixed.mean((0, 2, 3), keepdim=True)
    expected = centred / (centred.square().mean((0, 2, 3), keepdim=True) + 1e-5).sqrt()

    projected, _ = projector(student, draw(3, 4, 5, 2, 2))

    torch.testing.assert_close(projected, expected, atol=1e-5, rtol=1e-4)


def test_projector_averages_the_larger_teacher_and_leaves_one_of_the_same_size() -> None:
    projector, large = Projector((3, 2, 2), (5, 4, 4)), draw(4, 2, 5, 4, 4)

    _, pooled = projector(draw(5, 2, 3, 2, 2), large)
    _, same = projector(draw(5, 2, 3, 4, 4), large)

    torch.testing.assert_close(pooled[0, 0, 0, 0], large[0, 0, :2, :2].mean())
    assert same is large


def test_review_gives_a_map_of_the_teachers_shape_for_every_stage() -> None:
    fused = Review(STUDENT, TEACHER)(maps(STUDENT))

    assert [tuple(each.shape[1:]) for each in fused] == TEACHER


@pytest.mark.parametrize(
    ("student", "teacher"),
    [
        ([(3, 9, 7), (5, 5, 4)], [(4, 14, 14), (7, 6, 5)]),  # odd, and smaller than the teacher's
        ([(3, 16, 16), (5, 8, 8)], [(4, 8, 8), (7, 1, 1)]),  # larger than the teacher's
        ([(3, 8, 8)], [(4, 8, 8)]),  # nothing to fuse
    ],
)
def test_review_joins_any_sizes(
    student: list[tuple[int, int, int]], teacher: list[tuple[int, int, int]]
) -> None:
    fused = Review(student, teacher)(maps(student))

    assert [tuple(each.shape[1:]) for each in fused] == teacher


def test_a_reviewed_stage_draws_on_itself_and_all_deeper_ones_only() -> None:
    review, features = Review(STUDENT, TEACHER), [m.requires_grad_() for m in maps(STUDENT)]

    for stage, fused in enumerate(review(features)):
        found = torch.autograd.grad(fused.square().sum(), features, retain_graph=True,
                                    allow_unused=True)  # fmt: skip
        used = [grad is not None and bool(grad.any()) for grad in found]
        assert used == [other >= stage for other in range(len(features))]


def attention_of_first_stage(review: Review) -> nn.Conv2d:
    (found,) = [
        module
        for name, module in review.named_modules()
        if isinstance(module, nn.Conv2d) and module.out_channels == 2 and module.bias is not None
    ]
    return found


@pytest.mark.parametrize(("own", "deeper"), [(True, False), (False, True)])
def test_attention_chooses_between_a_stage_and_what_came_from_below(
    own: bool, deeper: bool
) -> None:
    review, features = Review(STUDENT[:2], TEACHER[:2]), maps(STUDENT[:2])
    attend = attention_of_first_stage(review)
    with torch.no_grad():
        attend.weight.zero_()
        # σ(±200) is 1 or 0 in float32
        attend.bias.copy_(torch.tensor([200.0 if own else -200.0, 200.0 if deeper else -200.0]))
    before = review(features)[0]

    without_own = review([features[0] + draw(9, *features[0].shape), features[1]])[0]
    without_deeper = review([features[0], features[1] + draw(9, *features[1].shape)])[0]

    assert torch.equal(without_own, before) is not own
    assert torch.equal(without_deeper, before) is not deeper


def test_review_computes_the_papers_fusion() -> None:
    review, features = Review(STUDENT[:2], TEACHER[:2]).eval(), maps(STUDENT[:2])
    own, deep = (fusion.enter(f) for fusion, f in zip(review.fusions, features, strict=True))
    below = deep.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)  # nearest, 8 to 16
    attend = attention_of_first_stage(review)
    scores = torch.einsum("oc,nchw->nohw", attend.weight[:, :, 0, 0], torch.cat([own, below], 1))
    share = torch.sigmoid(scores + attend.bias[None, :, None, None])
    fused = own * share[:, 0:1] + below * share[:, 1:2]

    found = review(features)

    torch.testing.assert_close(found[0], review.fusions[0].leave(fused), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(found[1], review.fusions[1].leave(deep), atol=1e-5, rtol=1e-4)


def test_the_fusions_inner_width_is_bounded() -> None:
    review = Review([(4, 2, 2)], [(600, 2, 2)])

    assert {m.out_channels for m in review.modules() if isinstance(m, nn.Conv2d)} == {512, 600}


def test_review_refuses_lists_of_two_lengths() -> None:
    with pytest.raises(ValueError, match="zip"):
        Review(STUDENT, TEACHER[:2])


@pytest.mark.parametrize(
    "make",
    [lambda: Projector((4, 8, 8), (6, 8, 8)), lambda: Review(STUDENT, TEACHER)],
    ids=["Projector", "Review"],
)
def test_the_global_seed_decides_the_first_weights(make: Callable[[], nn.Module]) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(5)
        first = make().state_dict()
        torch.manual_seed(5)
        again = make().state_dict()

    assert len(first) > 0
    assert all(torch.equal(first[name], again[name]) for name in first)


def test_every_parameter_of_the_helpers_learns() -> None:
    review, projector = Review(STUDENT, TEACHER), Projector((4, 8, 8), (6, 4, 4))
    projected, theirs = projector(draw(6, 2, 4, 8, 8), draw(7, 2, 6, 4, 4))
    fused = review(maps(STUDENT))
    loss = F.mse_loss(projected, theirs) + sum(
        F.mse_loss(mine, wanted) for mine, wanted in zip(fused, maps(TEACHER), strict=True)
    )

    parameters = [*review.parameters(), *projector.parameters()]

    assert all(found.any() for found in torch.autograd.grad(loss, parameters))


def test_the_curriculum_begins_at_the_authors_temperature() -> None:
    temperature = CurriculumTemperature()(0.0)

    assert temperature.ndim == 0
    assert temperature.item() == pytest.approx(1 + 20 / (1 + math.exp(-1)), rel=1e-6)


@pytest.mark.parametrize("theta", [-100.0, 0.0, 100.0])
def test_the_temperature_stays_within_its_span(theta: float) -> None:
    part = CurriculumTemperature(start=2.0, span=3.0)
    with torch.no_grad():
        part.theta.fill_(theta)

    assert part(1.0).item() == pytest.approx(2 + 3 / (1 + math.exp(-theta)))


@pytest.mark.parametrize("strength", [0.0, 0.25, 1.0])
def test_the_temperatures_gradient_is_reversed_and_scaled(strength: float) -> None:
    part = CurriculumTemperature()
    sigmoid = 1 / (1 + math.exp(-1))

    (moved,) = torch.autograd.grad(part(strength), part.theta)

    assert float(moved) == pytest.approx(-strength * 20 * sigmoid * (1 - sigmoid), rel=1e-5)


def test_a_descent_step_on_the_loss_makes_it_harder_for_the_student() -> None:
    student, teacher, part = 3 * draw(10, 5, 4), 3 * draw(11, 5, 4), CurriculumTemperature()
    before = kd(student, teacher, temperature=part(1.0))

    (moved,) = torch.autograd.grad(before, part.theta)
    with torch.no_grad():
        part.theta -= 0.01 * moved / moved.abs()

    assert kd(student, teacher, temperature=part(1.0)).item() > before.item()


def test_the_strength_rises_from_zero_to_the_top_by_half_a_cosine() -> None:
    found = [curriculum_strength(epoch, ramp_epochs=4, top=2.0) for epoch in range(7)]

    expected = [0, 1 - 0.5**0.5, 1, 1 + 0.5**0.5, 2, 2, 2]
    assert found == pytest.approx(expected, abs=1e-12)
