"""Every objective against an independent formula in numpy float64, and against its gradient."""

from __future__ import annotations

import itertools
from collections.abc import Callable
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
from edgestill.pipeline.distill.objectives import (
    confidence_weights,
    dist,
    dkd,
    ensemble,
    hard_label,
    kd,
    standardize,
)
from torch import Tensor

N, C = 6, 5
ATOL = 1e-5  # float32 sums of a few dozen terms of size 1
Array = np.ndarray[Any, Any]


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


STUDENT, TEACHER = 2 * draw(N, C, seed=1), 3 * draw(N, C, seed=2)
LABELS = torch.tensor([0, 4, 2, 1, 3, 2])


def softmax(z: Array, axis: int = -1) -> Array:
    e = np.exp(z - z.max(axis, keepdims=True))
    return e / e.sum(axis, keepdims=True)


def f64(x: Tensor) -> Array:
    return x.double().numpy()


def check_gradient(loss: Callable[[Tensor], Tensor], at: Tensor, *, rtol: float = 2e-2) -> None:
    """Autograd against central differences; float32 losses allow two digits."""
    x = at.clone().requires_grad_()
    loss(x).backward()
    assert x.grad is not None
    step = 1e-2
    for index in itertools.islice(np.ndindex(*at.shape), 0, None, max(1, at.numel() // 12)):
        plus, minus = at.clone(), at.clone()
        plus[index] += step
        minus[index] -= step
        numeric = (loss(plus) - loss(minus)).item() / (2 * step)
        largest = x.grad.abs().max().item()
        assert abs(x.grad[index].item() - numeric) <= rtol * largest + 1e-4


def test_dkd_is_target_against_rest_and_the_rest_among_itself() -> None:
    temperature, alpha, beta = 3.0, 0.7, 2.5
    p, q = softmax(f64(TEACHER) / temperature), softmax(f64(STUDENT) / temperature)
    expected = 0.0
    for row, label in enumerate(LABELS.tolist()):
        others = [c for c in range(C) if c != label]
        pt, qt = p[row, label], q[row, label]
        binary = pt * np.log(pt / qt) + (1 - pt) * np.log((1 - pt) / (1 - qt))
        ph, qh = p[row, others] / (1 - pt), q[row, others] / (1 - qt)
        expected += alpha * binary + beta * (ph * np.log(ph / qh)).sum()
    expected *= temperature**2 / N

    found = dkd(STUDENT, TEACHER, LABELS, temperature=temperature, alpha=alpha, beta=beta)

    assert found.item() == pytest.approx(expected, abs=ATOL)


def test_dkd_with_the_teachers_own_doubt_as_beta_is_kd() -> None:
    # Zhao et al. 2022, eq. 7, one sample at a time
    for row in range(N):
        s, t, label = STUDENT[row : row + 1], TEACHER[row : row + 1], LABELS[row : row + 1]
        doubt = 1 - (t / 4).softmax(1)[0, label].item()

        apart = dkd(s, t, label, temperature=4.0, alpha=1.0, beta=doubt)

        torch.testing.assert_close(apart, kd(s, t, temperature=4.0), atol=ATOL, rtol=1e-4)


def test_dkd_is_finite_where_the_teacher_is_certain() -> None:
    sure = torch.full((1, C), -60.0)
    sure[0, 0] = 60.0
    student = torch.zeros(1, C, requires_grad=True)

    loss = dkd(student, sure, torch.tensor([0]), temperature=1.0, alpha=1.0, beta=8.0)
    loss.backward()

    assert loss.isfinite()
    assert student.grad is not None
    assert student.grad.isfinite().all()


def test_dist_is_one_minus_pearson_of_rows_and_columns() -> None:
    p, q = softmax(f64(TEACHER) / 4), softmax(f64(STUDENT) / 4)
    rows = np.mean([1 - np.corrcoef(p[i], q[i])[0, 1] for i in range(N)])
    columns = np.mean([1 - np.corrcoef(p[:, c], q[:, c])[0, 1] for c in range(C)])

    found = dist(STUDENT, TEACHER, temperature=4.0, beta=1.5, gamma=0.5)

    assert found.item() == pytest.approx(16 * (1.5 * rows + 0.5 * columns), abs=1e-4)


def test_standardized_rows_have_mean_0_and_unbiased_deviation_1() -> None:
    z = f64(TEACHER)
    expected = (z - z.mean(1, keepdims=True)) / z.std(1, ddof=1, keepdims=True)

    np.testing.assert_allclose(standardize(TEACHER).numpy(), expected, atol=1e-5)
    torch.testing.assert_close(standardize(3 * TEACHER - 2), standardize(TEACHER))


def test_a_mixture_of_teachers_has_the_mixed_probabilities_at_its_temperature() -> None:
    teachers, weights = torch.stack([TEACHER, STUDENT, draw(N, C, seed=3)]), [0.5, 0.0, 1.5]
    expected = sum(w / 2 * softmax(f64(z) / 4) for w, z in zip(weights, teachers, strict=True))

    mixed = ensemble(teachers, torch.tensor(weights), temperature=4.0)

    np.testing.assert_allclose((mixed / 4).softmax(1).numpy(), expected, atol=1e-6)


def test_following_the_mixture_has_the_gradient_of_following_each_teacher() -> None:
    teachers, weights = torch.stack([TEACHER, draw(N, C, seed=4)]), draw(N, 2, seed=5).softmax(1)
    student = STUDENT.clone().requires_grad_()
    mixed = ensemble(teachers, weights, temperature=2.0)
    (whole,) = torch.autograd.grad(kd(student, mixed, temperature=2.0), student)
    parts = torch.zeros_like(STUDENT)
    for row, teacher in itertools.product(range(N), range(2)):
        one = kd(student[row : row + 1], teachers[teacher, row : row + 1], temperature=2.0)
        parts += weights[row, teacher] * torch.autograd.grad(one, student)[0] / N

    torch.testing.assert_close(whole, parts, atol=1e-6, rtol=1e-4)


def test_confidence_is_one_minus_the_softmax_of_each_teachers_cross_entropy() -> None:
    teachers = torch.stack([TEACHER, STUDENT, draw(N, C, seed=6)])
    labels = LABELS.clone()
    labels[3] = -1
    losses = np.array(
        [[-np.log(softmax(f64(z[n]))[labels[n]]) for z in teachers] for n in range(N)]
    )
    expected = (1 - softmax(losses)) / 2
    expected[3] = 1 / 3

    found = confidence_weights(teachers, labels)

    np.testing.assert_allclose(found.numpy(), expected, atol=1e-6)
    np.testing.assert_allclose(found.sum(1).numpy(), 1.0, atol=1e-6)
    assert confidence_weights(teachers[:1], labels).equal(torch.ones(N, 1))


def test_unlabelled_rows_carry_no_hard_loss() -> None:
    labels = LABELS.clone()
    labels[[1, 4]] = -1
    kept = labels >= 0

    partly = hard_label(STUDENT, labels, smoothing=0.1)

    torch.testing.assert_close(partly, hard_label(STUDENT[kept], LABELS[kept], smoothing=0.1))


def test_a_batch_without_labels_has_no_hard_loss_and_no_gradient() -> None:
    student = STUDENT.clone().requires_grad_()

    loss = hard_label(student, torch.full((N,), -1))
    loss.backward()

    assert loss.item() == 0.0
    assert student.grad is not None
    assert student.grad.equal(torch.zeros_like(STUDENT))


def test_mixed_images_count_the_shares_that_have_a_label() -> None:
    lam, partners = torch.linspace(0.2, 0.9, N), LABELS.roll(1)
    labels = LABELS.clone()
    labels[0] = -1
    log_p = np.log(softmax(f64(STUDENT)))
    total = weight = 0.0
    for row in range(N):
        for share, label in (
            (lam[row].item(), labels[row].item()),
            (1 - lam[row].item(), partners[row].item()),
        ):
            if label >= 0:
                total -= share * log_p[row, int(label)]
                weight += share

    found = hard_label(STUDENT, labels, partner_labels=partners, lam=lam)

    assert found.item() == pytest.approx(total / weight, abs=ATOL)


def test_hint_is_the_mean_squared_error() -> None:
    a, b = draw(2, 3, 4, 4, seed=1), draw(2, 3, 4, 4, seed=2)

    assert hint(a, b).item() == pytest.approx(float(((f64(a) - f64(b)) ** 2).mean()), abs=ATOL)


def test_attention_compares_unit_vectors_of_mean_squared_activation() -> None:
    a, b = [draw(2, 3, 4, 4, seed=1)], [draw(2, 7, 4, 4, seed=2)]
    looks = []
    for feature in (a[0], b[0]):
        flat = (f64(feature) ** 2).mean(1).reshape(2, -1)
        looks.append(flat / np.linalg.norm(flat, axis=1, keepdims=True))

    found = attention(a, b)

    assert found.item() == pytest.approx(float(((looks[0] - looks[1]) ** 2).mean()), abs=1e-7)


def test_attention_pools_the_larger_map_to_the_smaller() -> None:
    large, small = draw(2, 3, 8, 8, seed=1), draw(2, 3, 4, 4, seed=2)
    by_hand = large.view(2, 3, 4, 2, 4, 2).mean((3, 5))

    torch.testing.assert_close(attention([large], [small]), attention([by_hand], [small]))


def test_hierarchical_is_the_weighted_mean_over_pooled_sizes() -> None:
    a, b = draw(2, 3, 8, 8, seed=1), draw(2, 3, 8, 8, seed=2)
    expected, total = float(((f64(a) - f64(b)) ** 2).mean()), 1.0
    for level, weight in ((4, 1 / 2), (2, 1 / 4), (1, 1 / 8)):
        side = 8 // level
        pools = [f64(f).reshape(2, 3, level, side, level, side).mean((3, 5)) for f in (a, b)]
        expected += weight * float(((pools[0] - pools[1]) ** 2).mean())
        total += weight

    assert hierarchical([a], [b]).item() == pytest.approx(expected / total, abs=ATOL)


def huber(x: Array) -> Array:
    return np.where(np.abs(x) < 1, 0.5 * x**2, np.abs(x) - 0.5)


def test_rkd_distance_compares_distances_over_their_mean() -> None:
    a, b = draw(N, 4, seed=1), draw(N, 7, seed=2)
    sides = []
    for e in (f64(a), f64(b)):
        d = np.linalg.norm(e[:, None] - e[None], axis=2)
        sides.append(d / d[d > 0].mean())

    found = rkd_distance(a, b)

    assert found.item() == pytest.approx(float(huber(sides[0] - sides[1]).mean()), abs=ATOL)


def test_rkd_angle_compares_the_cosines_of_triples() -> None:
    a, b = draw(N, 4, seed=1), draw(N, 7, seed=2)
    sides = []
    for e in (f64(a), f64(b)):
        cosines = np.zeros((N, N, N))
        for i, j, k in itertools.product(range(N), repeat=3):
            u, v = e[j] - e[i], e[k] - e[i]
            if np.linalg.norm(u) and np.linalg.norm(v):
                cosines[i, j, k] = u @ v / np.linalg.norm(u) / np.linalg.norm(v)
        sides.append(cosines)

    found = rkd_angle(a, b)

    assert found.item() == pytest.approx(float(huber(sides[0] - sides[1]).mean()), abs=ATOL)


LOSSES: dict[str, tuple[Callable[[Tensor], Tensor], Tensor]] = {
    "kd": (lambda s: kd(s, TEACHER, temperature=4.0), STUDENT),
    "dkd": (
        lambda s: dkd(s, TEACHER, LABELS, temperature=4.0, alpha=1.0, beta=8.0),
        STUDENT,
    ),
    "dist": (lambda s: dist(s, TEACHER, temperature=4.0, beta=1.0, gamma=1.0), STUDENT),
    "standardized kd": (
        lambda s: kd(standardize(s), standardize(TEACHER), temperature=2.0),
        STUDENT,
    ),
    "hard": (lambda s: hard_label(s, LABELS, smoothing=0.1), STUDENT),
    "hint": (lambda s: hint(s, draw(2, 3, 4, 4)), draw(2, 3, 4, 4, seed=1)),
    "attention": (
        lambda s: 1000 * attention([s], [draw(2, 3, 4, 4)]),
        draw(2, 3, 4, 4, seed=1),
    ),
    "hierarchical": (
        lambda s: hierarchical([s], [draw(2, 3, 4, 4)]),
        draw(2, 3, 4, 4, seed=1),
    ),
    "rkd distance": (lambda s: 25 * rkd_distance(s, draw(N, 4)), draw(N, 4, seed=1)),
    "rkd angle": (lambda s: 50 * rkd_angle(s, draw(N, 4)), draw(N, 4, seed=1)),
}


@pytest.mark.parametrize("name", LOSSES)
def test_the_gradient_is_that_of_the_value(name: str) -> None:
    check_gradient(*LOSSES[name])


def test_kd_pulls_with_t_times_the_difference_of_probabilities() -> None:
    # d/ds T²·KL = T · (softmax(s/T) - softmax(t/T)) / N: a mean over classes would be C times less
    student = STUDENT.clone().requires_grad_()
    kd(student, TEACHER, temperature=4.0).backward()
    expected = 4 * (softmax(f64(STUDENT) / 4) - softmax(f64(TEACHER) / 4)) / N

    assert student.grad is not None
    np.testing.assert_allclose(student.grad.numpy(), expected, atol=1e-6)


@pytest.mark.parametrize("name", ["kd", "dkd", "dist", "attention", "hint"])
def test_equal_answers_lose_nothing_and_no_gradient_reaches_the_teacher(name: str) -> None:
    teacher = TEACHER.clone().requires_grad_()
    maps = draw(2, 3, 4, 4).requires_grad_()
    values = {
        "kd": lambda: kd(TEACHER.clone(), teacher, temperature=4.0),
        "dkd": lambda: dkd(TEACHER.clone(), teacher, LABELS, temperature=4.0, alpha=1.0, beta=8.0),
        "dist": lambda: dist(TEACHER.clone(), teacher, temperature=4.0, beta=1.0, gamma=1.0),
        "attention": lambda: attention([maps.detach().clone()], [maps]),
        "hint": lambda: hint(maps.detach().clone(), maps),
    }

    value = values[name]()

    assert value.item() == pytest.approx(0.0, abs=1e-5)
    assert not value.requires_grad


def test_samples_that_coincide_have_a_finite_gradient() -> None:
    same = torch.ones(4, 3, requires_grad=True)

    (rkd_distance(same, draw(4, 3)) + rkd_angle(same, draw(4, 3))).backward()

    assert same.grad is not None
    assert same.grad.isfinite().all()


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda: dkd(STUDENT, TEACHER[:2], LABELS, temperature=1, alpha=1, beta=1), "one shape"),
        (lambda: dkd(STUDENT, TEACHER, LABELS[:2], temperature=1, alpha=1, beta=1), "labels"),
        (lambda: dist(STUDENT, TEACHER, temperature=0, beta=1, gamma=1), "temperature > 0"),
        (lambda: ensemble(torch.stack([STUDENT]), torch.ones(2), temperature=1), "weights"),
        (lambda: hint(draw(2, 3), draw(2, 4)), "one shape"),
        (lambda: attention([], []), "at least one"),
        (lambda: hierarchical([draw(1, 1, 2, 2)], []), "as many maps"),
        (lambda: rkd_distance(draw(1, 3), draw(1, 3)), "N ≥ 2"),
        (lambda: rkd_angle(draw(2, 3), draw(2, 3)), "N ≥ 3"),
    ],
)
def test_what_does_not_fit_is_refused(call: Callable[[], Tensor], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        call()


def test_pooled_averages_maps_and_leaves_embeddings() -> None:
    maps = draw(2, 3, 4, 4)

    torch.testing.assert_close(pooled(maps), maps.flatten(2).mean(2))
    assert pooled(draw(2, 5)).shape == (2, 5)
