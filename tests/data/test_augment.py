"""A view is a function of (sample, view, seed), whatever the batch; and it is what it says."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from edgestill.pipeline.data import counter
from edgestill.pipeline.data.augment import MixPlan, ViewBatch, Views, mix_plan, render
from edgestill.pipeline.data.dataset import SampleSet
from edgestill.pipeline.data.preprocess import to_input
from edgestill.pipeline.errors import DataError
from edgestill.pipeline.recipe import PreprocessSpec
from edgestill.pipeline.training_spec import AugmentSpec

COUNT, SIDE = 40, 16
PREPROCESS = PreprocessSpec(crop=(12, 14), mean=(0.5, 0.4, 0.3), std=(0.2, 0.25, 0.3))
EVERYTHING: list[dict[str, Any]] = [
    {"crop": "none"},
    {"crop": "pad", "flip": True},
    {"crop": "pad", "pad": 7, "erase": 0.5},
    {"crop": "resized", "flip": True, "erase": 0.5},
    {"crop": "pad", "flip": True, "mixup": 0.4},
    {"crop": "resized", "cutmix": 1.0},
]


def image_set(count: int = COUNT, side: int = SIDE) -> SampleSet:
    generator = np.random.default_rng(0)
    return SampleSet(
        contents=generator.integers(0, 256, (count, side, side, 3), dtype=np.uint8),
        labels=np.arange(count) % 3,
        ids=generator.integers(-(2**63), 2**63 - 1, count),
        hashes=np.array([f"{index:032x}" for index in range(count)]),
        names=None,
    )


def views_of(options: dict[str, Any], split: SampleSet | None = None, seed: int = 0) -> Views:
    return Views(split or image_set(), PREPROCESS, AugmentSpec(**options), seed, "cpu")


def same(one: ViewBatch, other: ViewBatch) -> bool:
    def equal(a: torch.Tensor | None, b: torch.Tensor | None) -> bool:
        return a is b if a is None or b is None else torch.equal(a, b)

    return all(
        equal(getattr(one, name), getattr(other, name))
        for name in ("inputs", "labels", "partner_labels", "lam")
    )


def rendered(images: torch.Tensor, size: tuple[int, int], **options: Any) -> torch.Tensor:
    ids = torch.arange(len(images)) * 7919
    return render(images, ids, view=0, seed=0, spec=AugmentSpec(**options), crop=size)


@pytest.mark.parametrize("options", EVERYTHING)
def test_view_does_not_depend_on_the_batch(options: dict[str, Any]) -> None:
    views, order = views_of(options), torch.randperm(COUNT, generator=torch.manual_seed(0))
    whole = views.batch(torch.arange(COUNT), view=3)
    fresh = views_of(options)
    for chunk in order.split(7):
        batch = fresh.batch(chunk, view=3)
        assert torch.equal(batch.inputs, whole.inputs[chunk])
        assert torch.equal(batch.labels, whole.labels[chunk])
        if batch.lam is not None and whole.lam is not None:
            assert torch.equal(batch.lam, whole.lam[chunk])


@pytest.mark.parametrize("options", EVERYTHING[1:])
def test_view_number_and_seed_change_the_view(options: dict[str, Any]) -> None:
    indices = torch.arange(COUNT)
    first = views_of(options).batch(indices, view=0).inputs
    assert not torch.equal(first, views_of(options).batch(indices, view=1).inputs)
    assert not torch.equal(first, views_of(options, seed=1).batch(indices, view=0).inputs)


@pytest.mark.parametrize("options", EVERYTHING)
def test_memory_mapped_set_gives_the_same_views(options: dict[str, Any], tmp_path: Any) -> None:
    split = image_set()
    np.save(tmp_path / "images.npy", split.contents)
    mapped = SampleSet(
        contents=np.load(tmp_path / "images.npy", mmap_mode="r"),
        labels=split.labels,
        ids=split.ids,
        hashes=split.hashes,
        names=None,
    )
    indices = torch.tensor([5, 3, 39, 3])
    assert same(
        views_of(options, mapped).batch(indices, view=2), views_of(options).batch(indices, view=2)
    )


def test_view_without_augmentation_is_the_evaluation_input() -> None:
    split = image_set()
    batch = views_of({"crop": "none"}, split).batch(torch.arange(COUNT), view=5)
    assert np.array_equal(batch.inputs.numpy(), to_input(split.contents, PREPROCESS))
    assert batch.inputs.is_contiguous(memory_format=torch.channels_last)
    assert batch.labels.tolist() == split.labels.tolist()
    assert batch.partner_labels is None
    assert batch.lam is None


def test_pad_crop_is_a_window_of_the_reflected_image_or_of_its_mirror() -> None:
    images = torch.from_numpy(image_set(60, 8).contents)
    found = rendered(images, (8, 8), pad=2, flip=True)
    padded = np.pad(images.numpy(), ((0, 0), (2, 2), (2, 2), (0, 0)), mode="reflect")
    seen = set()
    for image, view in zip(padded, found.numpy(), strict=True):
        matches = [
            (top, left, flipped)
            for top in range(5)
            for left in range(5)
            for flipped in (False, True)
            if np.array_equal(
                view[:, ::-1] if flipped else view, image[top : top + 8, left : left + 8]
            )
        ]
        assert len(matches) == 1
        seen.add(matches[0])
    assert {flipped for *_, flipped in seen} == {False, True}
    assert {top for top, *_ in seen} == {left for _, left, _ in seen} == set(range(5))


def test_default_padding_is_an_eighth_of_the_side() -> None:
    images = torch.arange(8, dtype=torch.uint8).repeat(200, 8, 1)[..., None]  # pixel = its column
    first = rendered(images, (8, 8))[:, 0, 0, 0]
    assert set(first.tolist()) == {0, 1}  # shifts of -1 (reflected: 1), 0, 1


def test_padding_that_cannot_be_reflected_is_an_error() -> None:
    with pytest.raises(DataError, match=r"augment\.pad: 8 pixels .* at most 7"):
        rendered(torch.zeros(1, 8, 8, 3, dtype=torch.uint8), (8, 8), pad=8)


def test_resized_crop_keeps_area_and_aspect_within_bounds() -> None:
    ramp = torch.arange(0, 256, 4, dtype=torch.uint8)
    across, down = ramp.expand(64, 64), ramp[:, None].expand(64, 64)
    images = torch.stack([across, down], -1).expand(300, -1, -1, -1)
    views = rendered(images, (32, 32), crop="resized", scale=(0.3, 0.9)).float()
    # a linear ramp shows which part of the image a view spans: 32 pixels are 31 steps apart
    width = (views[:, 16, -1, 0] - views[:, 16, 0, 0]) / 4 * 32 / 31
    height = (views[:, -1, 16, 1] - views[:, 0, 16, 1]) / 4 * 32 / 31
    inner = (width < 60) & (height < 60)  # larger ones were cut to the image
    share, aspect = (width * height / 64**2)[inner], (width / height)[inner]
    assert 0.28 < share.min() < 0.4
    assert 0.7 < share.max() < 0.95
    assert 0.72 < aspect.min() < 0.85
    assert 1.2 < aspect.max() < 1.4


def test_resized_crop_of_a_flat_image_is_flat() -> None:
    flat = torch.full((20, 12, 12, 3), 77, dtype=torch.uint8)
    assert torch.equal(rendered(flat, (12, 12), crop="resized"), flat)


def test_erasing_fills_a_rectangle_with_the_mean_colour_of_the_view() -> None:
    images = torch.from_numpy(image_set(200, 16).contents)
    found = rendered(images, (16, 16), crop="none", erase=0.5)
    changed = (found != images).any(-1)
    hit = changed.flatten(1).any(1)
    assert 70 < hit.sum() < 130
    for index in hit.nonzero().flatten().tolist():
        rows, columns = changed[index].any(1).nonzero(), changed[index].any(0).nonzero()
        box = found[index, rows.min() : rows.max() + 1, columns.min() : columns.max() + 1]
        mean = images[index].flatten(0, 1).sum(0, dtype=torch.int64) // 256
        assert (box == mean.to(torch.uint8)).all()
        assert box.shape[0] * box.shape[1] <= 0.34 * 256


def test_mixup_is_replayed_from_the_plan_alone() -> None:
    split, options = image_set(), {"crop": "pad", "flip": True, "mixup": 0.4}
    ids = torch.from_numpy(split.ids)
    plan = mix_plan(ids, view=3, seed=0, spec=AugmentSpec(**options), crop=(12, 14))
    assert isinstance(plan, MixPlan)
    plain = views_of({"crop": "pad", "flip": True}, split).batch(torch.arange(COUNT), view=3)
    chosen = torch.tensor([4, 9, 31])
    batch = views_of(options, split).batch(chosen, view=3)
    lam, partner = plan.lam[chosen], plan.partner[chosen]
    share = lam[:, None, None, None]
    expected = plain.inputs[chosen] * share + plain.inputs[partner] * (1 - share)
    torch.testing.assert_close(batch.inputs, expected, rtol=0, atol=1e-6)
    assert batch.partner_labels is not None
    assert batch.lam is not None
    assert torch.equal(batch.partner_labels, torch.from_numpy(split.labels)[partner])
    assert torch.equal(batch.lam, lam)


def test_cutmix_takes_lam_from_the_pixels_that_were_pasted() -> None:
    split = image_set()
    mixed = views_of({"crop": "none", "cutmix": 1.0}, split).batch(torch.arange(COUNT), view=0)
    plain = views_of({"crop": "none"}, split).batch(torch.arange(COUNT), view=0)
    kept = (mixed.inputs == plain.inputs).all(1).float().mean((1, 2))
    assert mixed.lam is not None
    # a pasted pixel that happens to equal the one below would count as kept
    torch.testing.assert_close(kept, mixed.lam, rtol=0, atol=1e-6)


def test_partner_is_a_permutation_without_fixed_points() -> None:
    ids = torch.from_numpy(image_set().ids)
    for view in range(5):
        plan = mix_plan(ids, view=view, seed=0, spec=AugmentSpec(mixup=1.0), crop=(8, 8))
        assert plan is not None
        assert sorted(plan.partner.tolist()) == list(range(COUNT))
        assert (plan.partner != torch.arange(COUNT)).all()
    assert mix_plan(ids, view=0, seed=0, spec=AugmentSpec(), crop=(8, 8)) is None


def test_mixup_shares_follow_the_beta_distribution() -> None:
    ids = torch.arange(20_000)
    plan = mix_plan(ids, view=0, seed=0, spec=AugmentSpec(mixup=0.4), crop=(8, 8))
    assert plan is not None
    # Beta(a, a): mean 1/2, variance 1 / (4 (2a + 1)); 5 standard errors of n = 20,000
    assert abs(plan.lam.mean() - 0.5) < 5 * (0.139 / 20_000) ** 0.5
    assert abs(plan.lam.var() - 1 / (4 * 1.8)) < 0.005


def test_counter_draws_are_splitmix64_in_unsigned_arithmetic() -> None:
    word = (1 << 64) - 1

    def mix(z: int) -> int:
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & word
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & word
        return z ^ (z >> 31)

    words = [0, 1, 2**63, word, 0x0123456789ABCDEF]
    signed = torch.tensor([z - (1 << 64) if z >> 63 else z for z in words])
    assert [int(z) & word for z in counter._mix(signed)] == [mix(z) for z in words]
    # first output of the reference implementation with seed 0
    assert counter._mix_int(0) == 0xE220A8397B1DCDAF


def test_counter_draws_are_uniform_and_independent() -> None:
    u = counter.uniform(torch.arange(50_000), 4, seed=0, view=0, purpose=0)
    other = counter.uniform(torch.arange(50_000), 4, seed=0, view=1, purpose=0)
    assert (u >= 0).all()
    assert (u < 1).all()
    counts = torch.stack([torch.histc(row, 20, 0, 1) for row in u])
    # chi-square with 19 degrees of freedom: 99.99 % quantile is 50.8
    assert (((counts - 2500) ** 2 / 2500).sum(1) < 50.8).all()
    together = torch.corrcoef(torch.cat([u, other]))
    assert (together - torch.eye(8)).abs().max() < 5 / 50_000**0.5
    neighbours = torch.corrcoef(torch.stack([u[0, :-1], u[0, 1:]]))[0, 1]
    assert neighbours.abs() < 5 / 50_000**0.5


@pytest.mark.gpu
@pytest.mark.parametrize("options", EVERYTHING)
def test_cuda_gives_the_views_of_the_cpu(options: dict[str, Any]) -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    indices = torch.arange(COUNT)
    cpu = views_of(options).batch(indices, view=1)
    cuda = Views(image_set(), PREPROCESS, AugmentSpec(**options), 0, "cuda").batch(indices, view=1)
    # one grey level, for float crops
    torch.testing.assert_close(cuda.inputs.cpu(), cpu.inputs, rtol=0, atol=1 / 255 / 0.2 + 1e-5)
