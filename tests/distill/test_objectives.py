"""Each loss against an independent formula, hand-worked numbers and its gradient."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from edgestill.pipeline.distill.objectives import hard_label, kd
from scipy.special import log_softmax
from torch import Tensor


def logits(seed: int, shape: tuple[int, int] = (5, 4)) -> Tensor:
    return 3 * torch.randn(shape, generator=torch.Generator().manual_seed(seed))


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


def test_kd_gradient_equals_finite_differences() -> None:
    student, teacher = logits(4, (2, 3)), logits(5, (2, 3))
    moved = student.clone().requires_grad_()
    kd(moved, teacher, temperature=3.0).backward()  # type: ignore[no-untyped-call]
    assert moved.grad is not None

    step = 1e-2
    for position in np.ndindex(2, 3):
        shift = torch.zeros(2, 3)
        shift[position] = step
        rise = kd(student + shift, teacher, temperature=3.0)
        fall = kd(student - shift, teacher, temperature=3.0)
        # float32 leaves about three digits of a central difference
        assert float(moved.grad[position]) == pytest.approx(float(rise - fall) / 2 / step, abs=2e-3)


def test_kd_of_equal_logits_is_zero_whatever_their_offset() -> None:
    teacher = logits(6)

    assert float(kd(teacher + 7, teacher, temperature=4.0)) == pytest.approx(0, abs=1e-5)


def test_kd_is_computed_in_float32_inside_autocast() -> None:
    student, teacher = logits(7), logits(8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = kd(student, teacher, temperature=4.0)

    assert inside.dtype == torch.float32
    assert torch.equal(inside, kd(student, teacher, temperature=4.0))


def test_kd_survives_logits_that_saturate_the_softmax() -> None:
    student, teacher = torch.tensor([[1e4, 0.0]]), torch.tensor([[0.0, 1e4]])

    assert math.isfinite(float(kd(student, teacher, temperature=1.0)))


@pytest.mark.parametrize("temperature", [0.0, -1.0, float("nan")])
def test_kd_refuses_a_temperature_that_is_not_positive(temperature: float) -> None:
    with pytest.raises(ValueError, match="expected temperature > 0"):
        kd(logits(0), logits(1), temperature=temperature)


def test_kd_refuses_shapes_that_differ() -> None:
    with pytest.raises(ValueError, match=r"\(5, 4\) and \(5, 3\)"):
        kd(logits(0), logits(1, (5, 3)), temperature=1.0)


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
