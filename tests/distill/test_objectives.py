"""Each loss against an independent formula, hand-worked numbers and its gradient."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from edgestill.pipeline.distill.objectives import (
    confidence_weights,
    dist,
    dkd,
    ensemble,
    hard_label,
    kd,
    standardize,
)
from scipy.special import log_softmax, softmax
from torch import Tensor

LABELS = torch.tensor([0, 1, 2, 3, 1])
NONE_KNOWN = torch.tensor([-1, -1, -7, -100, -1])
PARTNERS, LAM = torch.tensor([3, 2, 2, 0, 1]), torch.tensor([0.0, 0.3, 0.5, 1.0, 0.9])


def dkd_of_five(student: Tensor, teacher: Tensor, *, temperature: float | Tensor) -> Tensor:
    return dkd(student, teacher, LABELS, temperature=temperature, alpha=0.7, beta=3.0)


SOFT: dict[str, Callable[..., Tensor]] = {
    "kd": kd,
    "dkd": dkd_of_five,
    "dist": partial(dist, beta=0.5, gamma=2.0),
}
soft = pytest.mark.parametrize("objective", SOFT.values(), ids=SOFT)


def logits(seed: int, shape: tuple[int, ...] = (5, 4)) -> Tensor:
    return 3 * torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def gradient(loss: Callable[[Tensor], Tensor], at: Tensor) -> Tensor:
    moved = at.clone().requires_grad_()
    return torch.autograd.grad(loss(moved), moved)[0]


def slopes(loss: Callable[[Tensor], Tensor], at: Tensor, *, step: float = 1e-2) -> Tensor:
    """Central differences."""
    found = torch.zeros_like(at)
    for position in np.ndindex(*at.shape):
        shift = torch.zeros_like(at)
        shift[position] = step
        found[position] = float(loss(at + shift) - loss(at - shift)) / 2 / step
    return found


def assert_gradient_is_slope(loss: Callable[[Tensor], Tensor], at: Tensor) -> None:
    # float32 leaves about three digits of a central difference
    torch.testing.assert_close(gradient(loss, at), slopes(loss, at), atol=3e-3, rtol=1e-2)


def test_kd_is_worked_out_by_hand_for_two_classes() -> None:
    # T = 2 turns the logits 2·ln 3 and 0 into probabilities 3/4 and 1/4, and equal ones into 1/2
    teacher, student = torch.tensor([[2 * math.log(3), 0.0]]), torch.zeros(1, 2)

    loss = kd(student, teacher, temperature=2.0)

    expected = 4 * (0.75 * math.log(0.75 / 0.5) + 0.25 * math.log(0.25 / 0.5))
    assert float(loss) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0, 20.0])
def test_kd_equals_the_formula_in_float64(temperature: float) -> None:
    student, teacher = logits(0), logits(1)
    s = log_softmax(student.double().numpy() / temperature, axis=1)
    t = log_softmax(teacher.double().numpy() / temperature, axis=1)
    expected = temperature**2 * np.mean(np.sum(np.exp(t) * (t - s), axis=1))

    assert float(kd(student, teacher, temperature=temperature)) == pytest.approx(expected, rel=1e-4)


def test_kd_gradient_is_temperature_times_the_difference_of_probabilities() -> None:
    student, teacher = logits(2).requires_grad_(), logits(3).requires_grad_()
    kd(student, teacher, temperature=4.0).backward()  # type: ignore[no-untyped-call]

    # d/ds T²·KL/N = T · (softmax(s/T) - softmax(t/T)) / N
    expected = 4.0 * ((student / 4).softmax(1) - (teacher / 4).softmax(1)) / len(student)
    torch.testing.assert_close(student.grad, expected.detach(), atol=1e-6, rtol=1e-5)
    assert teacher.grad is None


def test_kd_of_equal_logits_is_zero_whatever_their_offset() -> None:
    teacher = logits(6)

    assert float(kd(teacher + 7, teacher, temperature=4.0)) == pytest.approx(0, abs=1e-5)


def test_kd_survives_logits_that_saturate_the_softmax() -> None:
    student, teacher = torch.tensor([[1e4, 0.0]]), torch.tensor([[0.0, 1e4]])

    assert math.isfinite(float(kd(student, teacher, temperature=1.0)))


def test_classes_that_nobody_believes_in_do_not_change_kd() -> None:
    student, teacher = logits(13), logits(14)
    hopeless = torch.full((5, 36), -1e4)

    wider = kd(torch.cat([student, hopeless], 1), torch.cat([teacher, hopeless], 1), temperature=2)

    # a mean over classes would be a tenth of it
    torch.testing.assert_close(wider, kd(student, teacher, temperature=2))


def test_kd_gradient_keeps_its_size_at_high_temperature() -> None:
    student, teacher = logits(15), logits(16)
    centred = (student - student.mean(1, keepdim=True)) - (teacher - teacher.mean(1, keepdim=True))

    moved = gradient(lambda s: kd(s, teacher, temperature=1e4), student)

    # Hinton et al. 2015, eq. 4; without T² it would be 1e8 times smaller
    torch.testing.assert_close(moved, centred / (4 * 5), atol=2e-3, rtol=2e-3)


@pytest.mark.parametrize("bug", ["mean over classes", "no T²", "student first", "softmax twice"])
def test_the_comparison_with_the_formula_tells_the_usual_bugs(bug: str) -> None:
    student, teacher, temperature = logits(0), logits(1), 4.0
    s, t = ((each / temperature).log_softmax(1) for each in (student, teacher))
    square = temperature**2
    wrong = {
        "mean over classes": F.kl_div(s, t, reduction="none", log_target=True).mean() * square,
        "no T²": F.kl_div(s, t, reduction="batchmean", log_target=True),
        "student first": F.kl_div(t, s, reduction="batchmean", log_target=True) * square,
        "softmax twice": F.kl_div(s.softmax(1).log_softmax(1), t, reduction="batchmean",
                                  log_target=True) * square,
    }  # fmt: skip

    assert float(kd(student, teacher, temperature=temperature)) != pytest.approx(
        float(wrong[bug]), rel=0.05
    )


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_hard_label_is_cross_entropy_with_smoothed_targets(smoothing: float) -> None:
    values, labels = logits(9), torch.tensor([0, 1, 2, 3, 1])
    targets = (1 - smoothing) * np.eye(4)[labels] + smoothing / 4
    expected = -(targets * log_softmax(values.double().numpy(), axis=1)).sum(1).mean()

    assert float(hard_label(values, labels, smoothing=smoothing)) == pytest.approx(
        expected, rel=1e-5
    )


def test_mixed_labels_share_the_loss_by_lam() -> None:
    values, labels = logits(10), torch.tensor([0, 1, 2, 3, 1])
    partners, lam = torch.tensor([3, 2, 2, 0, 1]), torch.tensor([0.0, 0.3, 0.5, 1.0, 0.9])
    share = lam.double().numpy()[:, None]
    targets = share * np.eye(4)[labels] + (1 - share) * np.eye(4)[partners]
    targets = 0.8 * targets + 0.2 / 4
    expected = -(targets * log_softmax(values.double().numpy(), axis=1)).sum(1).mean()

    loss = hard_label(values, labels, smoothing=0.2, partner_labels=partners, lam=lam)

    assert float(loss) == pytest.approx(expected, rel=1e-5)


def test_half_of_a_mixed_pair_is_refused() -> None:
    with pytest.raises(ValueError, match="partner_labels and lam together"):
        hard_label(logits(0), torch.zeros(5, dtype=torch.int64), lam=torch.ones(5))


def test_labels_that_do_not_fit_the_logits_are_refused() -> None:
    with pytest.raises(ValueError, match=r"\(5, 4\) and \(4,\)"):
        hard_label(logits(0), torch.zeros(4, dtype=torch.int64))


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_hard_label_of_labelled_rows_is_torchs_cross_entropy_to_the_bit(smoothing: float) -> None:
    values = logits(17, (64, 10))
    labels = torch.arange(64) % 10

    ours = hard_label(values, labels, smoothing=smoothing)

    assert torch.equal(ours, F.cross_entropy(values, labels, label_smoothing=smoothing))


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_hard_label_of_mixed_labelled_rows_is_torchs_to_the_bit(smoothing: float) -> None:
    values, own = logits(59, (64, 10)), torch.arange(64) % 10
    other, lam = own.roll(3), torch.rand(64, generator=torch.Generator().manual_seed(60))
    each = partial(F.cross_entropy, values, label_smoothing=smoothing, reduction="none")

    ours = hard_label(values, own, smoothing=smoothing, partner_labels=other, lam=lam)

    assert torch.equal(ours, (lam * each(own) + (1 - lam) * each(other)).mean())


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("unknown", [-1, -2, -100])
def test_hard_label_is_the_mean_over_labelled_rows(unknown: int, smoothing: float) -> None:
    values, labels = logits(18), LABELS.clone()
    labels[[1, 4]] = unknown
    known = [0, 2, 3]

    found = hard_label(values, labels, smoothing=smoothing)
    moved = gradient(lambda v: hard_label(v, labels, smoothing=smoothing), values)

    torch.testing.assert_close(found, hard_label(values[known], labels[known], smoothing=smoothing))
    assert not moved[[1, 4]].any()
    assert moved[known].all()


def test_mixed_labels_share_the_loss_among_the_known_ones() -> None:
    values = logits(19)
    own, other = torch.tensor([-1, 1, -1, 3, 1]), torch.tensor([3, -1, -1, 0, -1])
    log_p = log_softmax(values.double().numpy(), axis=1)
    # row 0 knows its partner, of share 1; rows 1 and 4 themselves; row 2 nothing; row 3 both
    shares = [(0, 3, 1.0), (1, 1, 0.3), (3, 3, 1.0), (4, 1, 0.9)]
    expected = -sum(share * log_p[row, label] for row, label, share in shares) / 3.2

    found = hard_label(values, own, partner_labels=other, lam=LAM)

    assert float(found) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("mixed", [False, True])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_a_batch_without_labels_costs_nothing_and_moves_nothing(
    mixed: bool, smoothing: float
) -> None:
    pair = {"partner_labels": NONE_KNOWN, "lam": LAM} if mixed else {}
    values = logits(20).requires_grad_()

    loss = hard_label(values, NONE_KNOWN, smoothing=smoothing, **pair)
    (moved,) = torch.autograd.grad(loss, values)

    assert loss.item() == 0
    assert torch.equal(moved, torch.zeros_like(moved))


def test_a_known_label_of_share_zero_costs_nothing() -> None:
    own, other = torch.tensor([0, -1]), torch.tensor([-1, -1])

    loss = hard_label(logits(21, (2, 4)), own, partner_labels=other, lam=torch.zeros(2))

    assert float(loss) == 0


@pytest.mark.parametrize("mixed", [False, True])
def test_hard_label_gradient_equals_finite_differences(mixed: bool) -> None:
    labels = torch.tensor([0, -1, 2, 3, -1])
    pair = {"partner_labels": PARTNERS, "lam": LAM} if mixed else {}

    assert_gradient_is_slope(lambda v: hard_label(v, labels, smoothing=0.1, **pair), logits(22))


def test_standardize_is_a_z_score_with_the_unbiased_deviation() -> None:
    values = logits(23)
    rows = values.double().numpy()
    expected = (rows - rows.mean(1, keepdims=True)) / rows.std(1, ddof=1, keepdims=True)

    np.testing.assert_allclose(standardize(values).numpy(), expected, atol=1e-6, rtol=1e-5)


def test_standardize_forgets_scale_and_offset() -> None:
    values = logits(24)

    torch.testing.assert_close(
        standardize(0.3 * values - 8), standardize(values), atol=1e-5, rtol=1e-5
    )


def test_gradient_through_standardize_equals_finite_differences() -> None:
    teacher = standardize(logits(25))

    assert_gradient_is_slope(lambda s: kd(standardize(s), teacher, temperature=2.0), logits(26))


def test_standardize_leaves_equal_logits_at_zero_with_a_finite_gradient() -> None:
    flat = torch.full((2, 4), 5.0)

    assert not standardize(flat).any()
    assert (
        gradient(lambda s: kd(standardize(s), logits(27, (2, 4)), temperature=2.0), flat)
        .isfinite()
        .all()
    )


@pytest.mark.parametrize("temperature", [1.0, 4.0])
@pytest.mark.parametrize("alpha_beta", [(1.0, 0.0), (0.0, 1.0), (0.5, 8.0)])
def test_dkd_equals_the_formula_in_float64(
    alpha_beta: tuple[float, float], temperature: float
) -> None:
    student, teacher = logits(28), logits(29)
    binary, among_rest = [], []
    for s, t, label in zip(student.double().numpy(), teacher.double().numpy(), LABELS, strict=True):
        p, q = softmax(s / temperature), softmax(t / temperature)
        binary.append(
            q[label] * np.log(q[label] / p[label])
            + (1 - q[label]) * np.log((1 - q[label]) / (1 - p[label]))
        )
        p, q = np.delete(p, label) / (1 - p[label]), np.delete(q, label) / (1 - q[label])
        among_rest.append((q * np.log(q / p)).sum())
    alpha, beta = alpha_beta
    expected = temperature**2 * (alpha * np.mean(binary) + beta * np.mean(among_rest))

    found = dkd(student, teacher, LABELS, temperature=temperature, alpha=alpha, beta=beta)

    assert float(found) == pytest.approx(expected, rel=1e-4)


def test_dkd_is_worked_out_by_hand_for_three_classes() -> None:
    # teacher 1/2, 3/8, 1/8 with target 0; student 1/3 each: rest is 3/4, 1/4 against 1/2, 1/2
    teacher, student = torch.tensor([[0.5, 0.375, 0.125]]).log(), torch.zeros(1, 3)

    loss = dkd(student, teacher, torch.tensor([0]), temperature=1.0, alpha=1.0, beta=2.0)

    binary = 0.5 * math.log(0.5 * 3) + 0.5 * math.log(0.5 * 1.5)
    among_rest = 0.75 * math.log(0.75 * 2) + 0.25 * math.log(0.25 * 2)
    assert float(loss) == pytest.approx(binary + 2 * among_rest, rel=1e-5)


@pytest.mark.parametrize("row", range(5))
def test_dkd_with_beta_of_the_teachers_doubt_is_kd(row: int) -> None:
    student, teacher = logits(30)[row : row + 1], logits(31)[row : row + 1]
    label = LABELS[row : row + 1]
    doubt = 1 - float((teacher / 4).softmax(1)[0, label])

    coupled = dkd(student, teacher, label, temperature=4.0, alpha=1.0, beta=doubt)

    torch.testing.assert_close(coupled, kd(student, teacher, temperature=4.0), atol=1e-5, rtol=1e-4)


def test_among_the_rest_of_two_classes_there_is_nothing_to_learn() -> None:
    labels = torch.tensor([0, 1, 1])

    loss = dkd(logits(32, (3, 2)), logits(33, (3, 2)), labels, temperature=1, alpha=0, beta=8)

    assert float(loss) == 0


def test_dkd_of_saturated_logits_and_its_gradient_are_finite() -> None:
    student, teacher = torch.tensor([[1e3, 0.0, -1e3]]), torch.tensor([[-1e3, 1e3, 0.0]])

    def loss(s: Tensor) -> Tensor:
        return dkd(s, teacher, torch.tensor([0]), temperature=1, alpha=1, beta=8)

    assert loss(student).isfinite()
    assert gradient(loss, student).isfinite().all()


def test_dkd_refuses_labels_of_another_batch() -> None:
    with pytest.raises(ValueError, match=r"expected labels \(5,\), got \(4,\)"):
        dkd(logits(0), logits(1), LABELS[:4], temperature=1, alpha=1, beta=1)


@pytest.mark.parametrize("temperature", [1.0, 4.0])
@pytest.mark.parametrize("beta_gamma", [(1.0, 0.0), (0.0, 1.0), (0.5, 2.0)])
def test_dist_is_one_minus_numpys_correlation(
    beta_gamma: tuple[float, float], temperature: float
) -> None:
    student, teacher = logits(34), logits(35)
    s = softmax(student.double().numpy() / temperature, axis=1)
    t = softmax(teacher.double().numpy() / temperature, axis=1)
    rows = np.mean([1 - np.corrcoef(a, b)[0, 1] for a, b in zip(s, t, strict=True)])
    columns = np.mean([1 - np.corrcoef(a, b)[0, 1] for a, b in zip(s.T, t.T, strict=True)])
    beta, gamma = beta_gamma

    found = dist(student, teacher, temperature=temperature, beta=beta, gamma=gamma)

    expected = temperature**2 * (beta * rows + gamma * columns)
    assert float(found) == pytest.approx(expected, rel=1e-4)


def test_dist_of_opposite_beliefs_is_two_for_rows_and_two_for_columns() -> None:
    beliefs = torch.tensor([[3.0, 0.0], [0.0, 2.0]])

    loss = dist(beliefs, beliefs.flip(1), temperature=3.0, beta=1.0, gamma=10.0)

    # columns: 0 is high then low for the one, low then high for the other
    assert float(loss) == pytest.approx(9 * (2 + 20), rel=1e-5)


def test_dist_does_not_see_an_affine_change_of_the_teachers_probabilities() -> None:
    student, teacher = logits(36), logits(37)
    # half the teacher's belief, half the uniform one, is still a distribution
    milder = 2.0 * (0.5 * (teacher / 2.0).softmax(1) + 0.5 / 4).log()
    loss = partial(SOFT["dist"], temperature=2.0)

    torch.testing.assert_close(loss(student, milder), loss(student, teacher))
    assert float(loss(milder, teacher)) == pytest.approx(0, abs=1e-5)
    assert float(kd(milder, teacher, temperature=2.0)) > 0.1


def test_dist_of_a_single_sample_has_a_finite_gradient() -> None:
    teacher = logits(38, (1, 4))

    moved = gradient(partial(SOFT["dist"], teacher=teacher, temperature=1.0), logits(39, (1, 4)))

    assert moved.isfinite().all()


@soft
def test_gradient_of_a_soft_objective_equals_finite_differences(
    objective: Callable[..., Tensor],
) -> None:
    teacher = logits(40)

    assert_gradient_is_slope(lambda s: objective(s, teacher, temperature=3.0), logits(41))


@soft
def test_gradient_of_a_learned_temperature_equals_finite_differences(
    objective: Callable[..., Tensor],
) -> None:
    student, teacher = logits(42), logits(43)

    # both sides soften with it, and so does T²
    assert_gradient_is_slope(
        lambda t: objective(student, teacher, temperature=t), torch.tensor(3.0)
    )


@soft
def test_a_learned_temperature_has_the_value_of_the_same_number(
    objective: Callable[..., Tensor],
) -> None:
    student, teacher = logits(44), logits(45)

    torch.testing.assert_close(
        objective(student, teacher, temperature=torch.tensor(3.0)),
        objective(student, teacher, temperature=3.0),
    )


@soft
def test_a_student_that_equals_its_teacher_has_nothing_to_learn(
    objective: Callable[..., Tensor],
) -> None:
    teacher = logits(46)

    assert float(objective(teacher, teacher, temperature=2.0)) == pytest.approx(0, abs=1e-5)
    moved = gradient(lambda s: objective(s, teacher, temperature=2.0), teacher)
    assert float(moved.abs().max()) < 1e-5


@soft
def test_no_gradient_reaches_the_teacher(objective: Callable[..., Tensor]) -> None:
    teacher = logits(47).requires_grad_()

    assert not objective(logits(48), teacher, temperature=2.0).requires_grad


@soft
def test_soft_objectives_are_computed_in_float32_inside_autocast(
    objective: Callable[..., Tensor],
) -> None:
    student, teacher = logits(7), logits(8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = objective(student, teacher, temperature=4.0)

    assert inside.dtype == torch.float32
    assert torch.equal(inside, objective(student, teacher, temperature=4.0))


@soft
def test_half_precision_logits_are_widened_first(objective: Callable[..., Tensor]) -> None:
    student, teacher = logits(7).half(), logits(8).half()

    found = objective(student, teacher, temperature=4.0)

    assert torch.equal(found, objective(student.float(), teacher.float(), temperature=4.0))


@soft
@pytest.mark.parametrize("temperature", [0.0, -1.0, float("nan")])
def test_a_temperature_that_is_not_positive_is_refused(
    objective: Callable[..., Tensor], temperature: float
) -> None:
    with pytest.raises(ValueError, match="expected temperature > 0"):
        objective(logits(0), logits(1), temperature=temperature)


@soft
@pytest.mark.parametrize(
    ("mine", "theirs"), [((5, 4), (5, 3)), ((5, 4), (4, 4)), ((0, 4), (0, 4)), ((5,), (5,))]
)
def test_logits_that_do_not_fit_the_teachers_are_refused(
    objective: Callable[..., Tensor], mine: tuple[int, ...], theirs: tuple[int, ...]
) -> None:
    with pytest.raises(ValueError, match="one shape") as caught:
        objective(torch.zeros(mine), torch.zeros(theirs), temperature=1.0)

    assert f"{mine} and {theirs}" in str(caught.value)


PER_SAMPLE = [[0.5, 0.5, 0.0], [1.0, 0.0, 0.0], [0.2, 0.3, 0.5], [0.1, 0.8, 0.1], [0.0, 0.0, 1.0]]


@pytest.mark.parametrize("weights", [[0.2, 0.3, 0.5], PER_SAMPLE], ids=["for all", "per sample"])
def test_the_ensembles_softmax_is_the_mixture_of_softmaxes(weights: list[float]) -> None:
    teachers = logits(49, (3, 5, 4))
    p = softmax(teachers.double().numpy() / 4.0, axis=2)
    expected = np.einsum("nk,knc->nc", np.broadcast_to(weights, (5, 3)), p)

    mixed = ensemble(teachers, torch.tensor(weights), temperature=4.0)

    np.testing.assert_allclose((mixed / 4.0).softmax(1).numpy(), expected, rtol=1e-5, atol=1e-7)


def test_weights_of_the_ensemble_need_not_sum_to_one() -> None:
    teachers = logits(50, (3, 5, 4))
    weights = torch.tensor([0.2, 0.3, 0.5])

    torch.testing.assert_close(
        ensemble(teachers, 7 * weights, temperature=2.0),
        ensemble(teachers, weights, temperature=2.0),
    )


def test_a_teacher_of_weight_zero_is_not_there() -> None:
    teachers = logits(51, (3, 5, 4))

    torch.testing.assert_close(
        ensemble(teachers, torch.tensor([0.4, 0.0, 0.6]), temperature=2.0),
        ensemble(teachers[[0, 2]], torch.tensor([0.4, 0.6]), temperature=2.0),
    )


def test_following_the_ensemble_has_the_gradient_of_following_each_by_its_weight() -> None:
    student, teachers, weights = logits(52), logits(53, (3, 5, 4)), [0.2, 0.3, 0.5]
    mixed = ensemble(teachers, torch.tensor(weights), temperature=4.0)

    together = gradient(lambda s: kd(s, mixed, temperature=4.0), student)
    apart = gradient(
        lambda s: torch.stack(
            [w * kd(s, t, temperature=4.0) for w, t in zip(weights, teachers, strict=True)]
        ).sum(),
        student,
    )

    torch.testing.assert_close(together, apart, atol=1e-6, rtol=1e-4)


def test_averaging_logits_instead_would_be_another_mixture() -> None:
    teachers, half = logits(54, (2, 5, 4)), torch.tensor([0.5, 0.5])

    mixed = ensemble(teachers, half, temperature=1.0).softmax(1)

    assert float((mixed - teachers.mean(0).softmax(1)).abs().max()) > 0.05


def test_weights_that_fit_neither_teachers_nor_samples_are_refused() -> None:
    with pytest.raises(ValueError, match=r"\(3,\) or \(5, 3\), got \(5,\)"):
        ensemble(logits(55, (3, 5, 4)), torch.ones(5), temperature=1.0)


def test_confidence_weights_equal_the_formula_in_float64() -> None:
    teachers = logits(56, (3, 5, 4))
    expected = np.empty((5, 3))
    for row, label in enumerate(LABELS):
        losses = -log_softmax(teachers[:, row].double().numpy(), axis=1)[:, label]
        expected[row] = (1 - softmax(losses)) / 2

    found = confidence_weights(teachers, LABELS)

    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(found.sum(1).numpy(), 1, rtol=1e-6)


def test_the_teacher_nearer_to_the_label_is_trusted_more() -> None:
    right, wrong = torch.tensor([[4.0, 0.0]]), torch.tensor([[0.0, 4.0]])

    (weights,) = confidence_weights(torch.stack([right, wrong]), torch.tensor([0]))

    assert weights[0] > 0.95


def test_a_lone_teacher_is_trusted_fully() -> None:
    assert torch.equal(confidence_weights(logits(57, (1, 5, 4)), LABELS), torch.ones(5, 1))


def test_a_sample_without_a_label_trusts_all_teachers_alike() -> None:
    weights = confidence_weights(logits(58, (3, 5, 4)), NONE_KNOWN)

    torch.testing.assert_close(weights, torch.full((5, 3), 1 / 3))
