"""Exits, balance and the schedules of weights; the other helpers are in test_parts.py."""

from __future__ import annotations

import pytest
import torch
from edgestill.pipeline.data.augment import ViewBatch
from edgestill.pipeline.distill.balance import LARGEST, Balance
from edgestill.pipeline.distill.exits import Exit
from edgestill.pipeline.distill.objectives import ensemble, kd
from edgestill.pipeline.distill.terms import Scene, factors_of, teacher_weights, terms_of
from edgestill.pipeline.training_spec import DistillSpec, HardSpec, KdSpec


@pytest.mark.parametrize("stage", [(8, 16, 16), (16, 8, 8), (24, 5, 5), (32, 4, 4), (8, 4, 4)])
def test_an_exit_answers_from_any_stage(stage: tuple[int, ...]) -> None:
    assert Exit(stage, (32, 4, 4), classes=7)(torch.randn(2, *stage)).shape == (2, 7)


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


def test_a_first_term_of_zero_leaves_the_weights_as_they_are() -> None:
    scales = Balance(["hard", "kd"])({"hard": torch.tensor(0.0), "kd": torch.tensor(3.0)})

    assert [scale.item() for scale in scales.values()] == [1.0, 1.0]


def test_a_mixed_image_trusts_teachers_as_its_halves_do() -> None:
    targets = 3 * torch.randn(2, 4, 5, generator=torch.Generator().manual_seed(0))
    labels, partners = torch.tensor([0, 1, 2, 3]), torch.tensor([4, 0, 1, 2])
    lam = torch.tensor([1.0, 0.0, 0.3, 0.5])
    own, other = (teacher_weights("confidence", targets, each) for each in (labels, partners))
    batch = ViewBatch(torch.zeros(4, 1), labels, partners, lam)
    spec = DistillSpec(combine="confidence")
    scene = Scene(spec, batch, 0, targets[0], targets, {}, {})
    mixed = ensemble(targets, lam[:, None] * own + (1 - lam[:, None]) * other, temperature=4.0)

    value = terms_of([KdSpec()], scene)["kd"]

    torch.testing.assert_close(value, kd(targets[0], mixed, temperature=4.0))


def test_fixed_weights_of_teachers_are_shares() -> None:
    shares = teacher_weights((1.0, 3.0), torch.zeros(2, 4, 5), torch.zeros(4))

    assert shares.tolist() == [0.25, 0.75]
