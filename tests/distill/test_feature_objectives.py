"""Each feature loss against loops in float64, its invariances, and its gradient."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from edgestill.pipeline.distill.feature_objectives import (
    attention,
    hierarchical,
    hint,
    pooled,
    rkd_angle,
    rkd_distance,
)
from torch import Tensor

Array = np.ndarray[Any, Any]
relational = pytest.mark.parametrize("objective", [rkd_distance, rkd_angle])


def draw(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def gradient(loss: Callable[[Tensor], Tensor], at: Tensor) -> Tensor:
    moved = at.clone().requires_grad_()
    return torch.autograd.grad(loss(moved), moved)[0]


def assert_gradient_is_slope(loss: Callable[[Tensor], Tensor], at: Tensor) -> None:
    step, found = 1e-2, torch.zeros_like(at)
    for position in np.ndindex(*at.shape):
        shift = torch.zeros_like(at)
        shift[position] = step
        found[position] = float(loss(at + shift) - loss(at - shift)) / 2 / step
    # float32 leaves about three digits of a central difference
    torch.testing.assert_close(gradient(loss, at), found, atol=1e-4, rtol=2e-2)


def shrink(features: Array, size: int) -> Array:
    """Average pooling to size × size, where it divides the sides evenly."""
    n, c, h, w = features.shape
    return features.reshape(n, c, size, h // size, size, w // size).mean((3, 5))


def smooth_l1(difference: Array) -> float:
    size = np.abs(difference)
    return float(np.where(size < 1, 0.5 * size**2, size - 0.5).mean())


def test_hint_is_the_mean_over_all_elements() -> None:
    student, teacher = draw(0, 2, 3, 4, 4), draw(1, 2, 3, 4, 4)
    expected = ((student.double() - teacher.double()).numpy() ** 2).sum() / (2 * 3 * 4 * 4)

    assert float(hint(student, teacher)) == pytest.approx(expected, rel=1e-5)


def test_hint_gradient_is_twice_the_difference_over_the_number_of_elements() -> None:
    student, teacher = draw(2, 3, 5), draw(3, 3, 5)

    moved = gradient(partial(hint, teacher=teacher), student)

    torch.testing.assert_close(moved, 2 * (student - teacher) / 15)


def test_hint_refuses_features_of_two_shapes() -> None:
    with pytest.raises(ValueError, match=r"\(2, 3, 4, 4\) and \(2, 3, 2, 2\)"):
        hint(draw(0, 2, 3, 4, 4), draw(1, 2, 3, 2, 2))


def test_hint_refuses_an_empty_batch() -> None:
    with pytest.raises(ValueError, match="N > 0"):
        hint(torch.zeros(0, 3), torch.zeros(0, 3))


def looks(features: Array) -> Array:
    """The attention of each sample, (N, H · W)."""
    energy = (features**2).mean(1).reshape(len(features), -1)
    return energy / np.sqrt((energy**2).sum(1, keepdims=True))


def test_attention_sums_the_stages_mean_squared_difference() -> None:
    student = [draw(4, 3, 2, 8, 8), draw(5, 3, 4, 4, 4)]
    teacher = [draw(6, 3, 6, 8, 8), draw(7, 3, 5, 4, 4)]
    expected = sum(
        ((looks(s.double().numpy()) - looks(t.double().numpy())) ** 2).mean()
        for s, t in zip(student, teacher, strict=True)
    )

    assert float(attention(student, teacher)) == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("larger", ["student", "teacher"])
def test_attention_pools_the_larger_map(larger: str) -> None:
    big, small = draw(8, 2, 3, 8, 8), draw(9, 2, 3, 4, 4)
    pair = (big, small) if larger == "student" else (small, big)
    pooled_look = looks(shrink(big.double().numpy(), 4))
    expected = ((pooled_look - looks(small.double().numpy())) ** 2).mean()

    assert float(attention([pair[0]], [pair[1]])) == pytest.approx(expected, rel=1e-4)


def test_attention_does_not_see_the_scale_of_a_map() -> None:
    teacher = draw(10, 2, 3, 4, 4)

    assert float(attention([5 * teacher], [teacher])) == pytest.approx(0, abs=1e-12)


def test_attention_gradient_equals_finite_differences() -> None:
    teacher = draw(11, 2, 5, 2, 2)

    assert_gradient_is_slope(lambda s: attention([s], [teacher]), draw(12, 2, 2, 4, 4))


def test_attention_of_a_dead_map_has_a_finite_gradient() -> None:
    teacher = draw(13, 2, 3, 4, 4)

    moved = gradient(lambda s: attention([s], [teacher]), torch.zeros(2, 3, 4, 4))

    assert moved.isfinite().all()


@pytest.mark.parametrize(("size", "levels"), [(8, (4, 2, 1)), (4, (2, 1)), (2, (1,)), (1, ())])
def test_hierarchical_is_the_weighted_mean_of_its_levels(size: int, levels: tuple[int]) -> None:
    student, teacher = draw(14, 2, 3, size, size), draw(15, 2, 3, size, size)
    s, t = student.double().numpy(), teacher.double().numpy()
    weights = [1, 0.5, 0.25, 0.125][: 1 + len(levels)]
    errors = [((s - t) ** 2).mean()]
    errors += [((shrink(s, level) - shrink(t, level)) ** 2).mean() for level in levels]

    found = hierarchical([student], [teacher])

    assert float(found) == pytest.approx(np.average(errors, weights=weights), rel=1e-5)


def test_hierarchical_of_a_constant_difference_is_its_square_for_each_pair() -> None:
    teacher = [draw(16, 2, 3, 8, 8), draw(17, 2, 4, 4, 4)]

    loss = hierarchical([each + 3 for each in teacher], teacher)

    assert float(loss) == pytest.approx(2 * 9, rel=1e-5)


def test_hierarchical_gradient_equals_finite_differences() -> None:
    teacher = draw(18, 1, 2, 4, 4)

    assert_gradient_is_slope(lambda s: hierarchical([s], [teacher]), draw(19, 1, 2, 4, 4))


@pytest.mark.parametrize("objective", [attention, hierarchical])
def test_maps_without_a_partner_are_refused(objective: Callable[..., Tensor]) -> None:
    one = draw(20, 2, 3, 4, 4)

    with pytest.raises(ValueError, match="got 2 and 1"):
        objective([one, one], [one])
    with pytest.raises(ValueError, match="at least one"):
        objective([], [])


@pytest.mark.parametrize("objective", [attention, hierarchical])
def test_a_batch_of_one_is_not_broadcast(objective: Callable[..., Tensor]) -> None:
    with pytest.raises(ValueError, match=r"got N of \[2\] and \[1\]"):
        objective([draw(21, 2, 3, 4, 4)], [draw(22, 1, 3, 4, 4)])


def distances(points: Array) -> Array:
    found = np.array([[np.linalg.norm(a - b) for b in points] for a in points])
    return found / found[~np.eye(len(points), dtype=bool)].mean()


def test_rkd_distance_equals_loops_over_pairs() -> None:
    student, teacher = 5 * draw(23, 6, 4), draw(24, 6, 7)
    expected = smooth_l1(distances(student.double().numpy()) - distances(teacher.double().numpy()))

    assert float(rkd_distance(student, teacher)) == pytest.approx(expected, rel=1e-4)


def angles(points: Array) -> Array:
    count = len(points)
    found = np.zeros((count, count, count))
    for i, j, k in itertools.product(range(count), repeat=3):
        to_j, to_k = points[j] - points[i], points[k] - points[i]
        if to_j.any() and to_k.any():
            found[i, j, k] = to_j @ to_k / np.linalg.norm(to_j) / np.linalg.norm(to_k)
    return found


def test_rkd_angle_equals_loops_over_triples() -> None:
    student, teacher = 5 * draw(25, 5, 4), draw(26, 5, 7)
    expected = smooth_l1(angles(student.double().numpy()) - angles(teacher.double().numpy()))

    assert float(rkd_angle(student, teacher)) == pytest.approx(expected, rel=1e-4)


def test_rkd_angle_of_a_right_angle_against_a_line_is_worked_out_by_hand() -> None:
    corner = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    line = torch.tensor([[0.0], [1.0], [2.0]])

    loss = rkd_angle(corner, line)

    # cosines at the three points: 0, 1/√2, 1/√2 against 1, -1, 1; every angle is counted twice
    gaps = np.array([1.0, 1 + 0.5**0.5, 1 - 0.5**0.5])
    each = np.where(gaps < 1, 0.5 * gaps**2, gaps - 0.5)
    assert float(loss) == pytest.approx(2 * each.sum() / 27, rel=1e-5)


@relational
def test_relations_do_not_change_with_position_rotation_and_scale(
    objective: Callable[..., Tensor],
) -> None:
    teacher = draw(27, 6, 4)
    rotation, _ = torch.linalg.qr(draw(28, 4, 4))

    # from a distance of 100 a Gram matrix in float32 would have lost the differences
    assert float(objective(0.1 * teacher @ rotation + 100, teacher)) == pytest.approx(0, abs=1e-7)
    assert float(objective(draw(29, 6, 4), teacher)) > 1e-3


@relational
def test_gradient_of_relations_equals_finite_differences(objective: Callable[..., Tensor]) -> None:
    assert_gradient_is_slope(partial(objective, teacher=draw(30, 5, 6)), 2 * draw(31, 5, 3))


@relational
def test_samples_that_coincide_have_a_bounded_gradient(objective: Callable[..., Tensor]) -> None:
    student = draw(32, 6, 4)
    student[3] = student[0]

    assert float(gradient(partial(objective, teacher=draw(33, 6, 4)), student).abs().max()) < 1


@relational
def test_a_student_whose_samples_all_coincide_has_a_bounded_gradient(
    objective: Callable[..., Tensor],
) -> None:
    moved = gradient(partial(objective, teacher=draw(34, 6, 4)), torch.ones(6, 4))

    assert float(moved.abs().max()) < 1


def test_rkd_distance_refuses_a_lone_sample() -> None:
    with pytest.raises(ValueError, match=r"N ≥ 2, got \(1, 4\)"):
        rkd_distance(draw(35, 1, 4), draw(36, 1, 4))


def test_rkd_angle_refuses_a_pair() -> None:
    with pytest.raises(ValueError, match=r"N ≥ 3, got \(2, 4\)"):
        rkd_angle(draw(35, 2, 4), draw(36, 2, 4))


@relational
def test_relations_refuse_two_batch_sizes(objective: Callable[..., Tensor]) -> None:
    with pytest.raises(ValueError, match=r"\(5, 4\) and \(6, 4\)"):
        objective(draw(37, 5, 4), draw(38, 6, 4))


def test_pooled_averages_a_map_and_leaves_a_vector() -> None:
    feature, vector = draw(39, 2, 3, 4, 4), draw(40, 2, 3)

    np.testing.assert_allclose(
        pooled(feature).numpy(), shrink(feature.numpy(), 1)[..., 0, 0], rtol=1e-5, atol=1e-6
    )
    assert torch.equal(pooled(vector), vector)


FEATURE: dict[str, tuple[Callable[..., Tensor], tuple[int, ...]]] = {
    "hint": (hint, (4, 3, 4, 4)),
    "attention": (lambda s, t: attention([s], [t]), (4, 3, 4, 4)),
    "hierarchical": (lambda s, t: hierarchical([s], [t]), (4, 3, 4, 4)),
    "rkd_distance": (rkd_distance, (4, 6)),
    "rkd_angle": (rkd_angle, (4, 6)),
}


@pytest.mark.parametrize("name", FEATURE)
def test_feature_objectives_are_computed_in_float32_inside_autocast(name: str) -> None:
    objective, shape = FEATURE[name]
    student, teacher = draw(41, *shape), draw(42, *shape)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = objective(student, teacher)

    assert inside.dtype == torch.float32
    assert torch.equal(inside, objective(student, teacher))


@pytest.mark.parametrize("name", FEATURE)
def test_half_precision_features_are_widened_first(name: str) -> None:
    objective, shape = FEATURE[name]
    # squares of 300 do not fit float16
    student, teacher = 300 * draw(43, *shape).half(), 300 * draw(44, *shape).half()

    found = objective(student, teacher)

    assert found.isfinite()
    assert torch.equal(found, objective(student.float(), teacher.float()))


@pytest.mark.parametrize("name", FEATURE)
def test_no_gradient_reaches_the_teachers_features(name: str) -> None:
    objective, shape = FEATURE[name]

    assert not objective(draw(45, *shape), draw(46, *shape).requires_grad_()).requires_grad


@pytest.mark.parametrize("name", FEATURE)
def test_features_that_equal_the_teachers_leave_nothing_to_learn(name: str) -> None:
    objective, shape = FEATURE[name]
    teacher = draw(47, *shape)

    assert float(objective(teacher, teacher)) == 0
    assert not gradient(lambda s: objective(s, teacher), teacher).any()
