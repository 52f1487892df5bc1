"""A plan gives the factory's network the shapes that pruning left, exactly and without tracing."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch
from edgestill.models.plan import (
    FewerHeads,
    Plan,
    Skip,
    all_sizes,
    apply_plan,
    extend_plan,
    resize,
    sizes_of,
)
from edgestill.models.source import Network, open_network
from edgestill.models.store import load_network, save_network
from edgestill.pipeline.errors import IntegrityError, ModelError
from torch import Tensor, nn

SHAPE = (3, 16, 16)


def small(width: float = 0.25) -> Network:
    return open_network("resnet14", args={"width": width}, classes=3, input_shape=SHAPE, seed=0)


def narrowed() -> Network:
    """resnet14 with half of a block's inner channels and one block fewer, weights random."""
    network = small()
    plan = Plan(
        removed=("layer2.1",),
        modules={
            "layer1.0.conv1": {"in_channels": 4, "out_channels": 2, "groups": 1},
            "layer1.0.bn1": {"num_features": 2},
            "layer1.0.conv2": {"in_channels": 2, "out_channels": 4, "groups": 1},
        },
    )
    apply_plan(network.module, plan)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in network.module.parameters():
            parameter.normal_(0, 0.3, generator=generator)
    return Network(network.module, network.reference, network.args, trainable=True, plan=plan)


def save(folder: Path, network: Network) -> Path:
    folder.mkdir()
    save_network(
        folder, network, classes=3, input_shape=SHAPE, class_names=("a", "b", "c"), preprocess={}
    )
    return folder


def logits(module: nn.Module) -> Tensor:
    with torch.no_grad():
        result: Tensor = module(torch.linspace(-1, 1, 2 * 3 * 256).view(2, *SHAPE))
    return result


def test_pruned_network_is_rebuilt_bit_for_bit(tmp_path: Path) -> None:
    network = narrowed()

    stored = load_network(save(tmp_path / "a", network)).network

    assert torch.equal(logits(stored.module), logits(network.module))
    assert stored.plan == network.plan
    assert stored.module.get_parameter("layer1.0.conv1.weight").shape == (2, 4, 3, 3)
    assert not any(name.startswith("layer2.1.") for name in stored.module.state_dict())


def test_pruned_network_is_stored_again_in_equal_bytes(tmp_path: Path) -> None:
    first = save(tmp_path / "a", narrowed())

    second = save(tmp_path / "b", load_network(first).network)

    for name in ("network.json", "model.safetensors"):
        assert (first / name).read_bytes() == (second / name).read_bytes()


def test_dense_network_is_stored_without_a_plan(tmp_path: Path) -> None:
    folder = save(tmp_path / "a", small())

    assert "plan" not in json.loads((folder / "network.json").read_text())
    assert load_network(folder).network.plan is None


@pytest.mark.parametrize("plan", [7, {"removed": []}, {"removed": [], "modules": {"a": 3}}])
def test_damaged_plan_is_an_integrity_error(plan: object, tmp_path: Path) -> None:
    path = save(tmp_path / "a", narrowed()) / "network.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"plan": plan}))

    with pytest.raises(IntegrityError):
        load_network(path.parent)


@pytest.mark.parametrize(
    "plan",
    [
        Plan(removed=("layer9",)),
        Plan(modules={"layer9": {"num_features": 2}}),
        Plan(modules={"bn1": {"out_channels": 2}}),
        Plan(modules={"bn1": {"num_features": 0}}),
    ],
)
def test_plan_of_another_network_is_an_error(plan: Plan) -> None:
    with pytest.raises(ModelError, match="prune it again"):
        apply_plan(small().module, plan)


def test_plan_reads_what_it_wrote() -> None:
    plan = narrowed().plan
    assert plan is not None

    assert Plan.from_json(json.loads(json.dumps(plan.to_json()))) == plan


def test_plans_of_two_prunings_are_one_plan_of_the_factory_network() -> None:
    network = narrowed()
    module = copy.deepcopy(network.module)
    before = all_sizes(module)
    module.set_submodule("layer1.0", Skip())
    resize(module, "layer3.0.bn1", {"num_features": 5})

    plan = extend_plan(network.plan, before=before, after=all_sizes(module), removed=["layer1.0"])

    # what was narrowed first lies inside a block that left since
    assert plan == Plan(("layer1.0", "layer2.1"), {"layer3.0.bn1": {"num_features": 5}})
    rebuilt = small().module
    apply_plan(rebuilt, plan)
    shapes = {name: tensor.shape for name, tensor in module.state_dict().items()}
    assert {name: tensor.shape for name, tensor in rebuilt.state_dict().items()} == shapes


def test_block_inside_a_block_that_left_is_not_listed() -> None:
    plan = extend_plan(Plan(("a.b",)), before={}, after={}, removed=["a", "ab"])

    assert plan.removed == ("a", "ab")


@pytest.mark.parametrize(
    ("module", "sizes"),
    [
        (nn.Conv2d(6, 9, 3, groups=3), {"in_channels": 4, "out_channels": 6, "groups": 2}),
        (nn.Linear(6, 4, bias=False), {"in_features": 2, "out_features": 3}),
        (nn.BatchNorm1d(6), {"num_features": 2}),
        (nn.BatchNorm2d(6, affine=False), {"num_features": 2}),
        (nn.GroupNorm(3, 6), {"num_groups": 2, "num_channels": 4}),
    ],
)
def test_module_resized_has_the_tensors_of_one_built_so(
    module: nn.Module, sizes: dict[str, int]
) -> None:
    kind = {nn.Conv2d: {"kernel_size": 3}, nn.Linear: {"bias": False}, nn.BatchNorm2d:
            {"affine": False}}.get(type(module), {})  # fmt: skip
    built = type(module)(**sizes, **kind)  # type: ignore[arg-type]
    root = nn.Sequential(module)

    resized = resize(root, "0", sizes)

    assert sizes_of(resized) == sizes
    shapes = {name: tensor.shape for name, tensor in resized.state_dict().items()}
    assert shapes == {name: tensor.shape for name, tensor in built.state_dict().items()}


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("masked", ["none", "causal", "padding", "float"])
def test_attention_with_all_its_heads_equals_torchs(batch_first: bool, masked: str) -> None:
    torch.manual_seed(0)
    whole = nn.MultiheadAttention(8, 4, batch_first=batch_first).eval()
    nn.init.normal_(whole.in_proj_bias)
    ours = FewerHeads.like(whole, 4).eval()
    ours.load_state_dict(whole.state_dict())
    x = torch.randn(3, 3, 8)
    more = {
        "none": {},
        "causal": {"attn_mask": torch.ones(3, 3).bool().triu(1), "is_causal": True},
        "padding": {"key_padding_mask": torch.tensor([[False, False, True]] * 3)},
        "float": {"attn_mask": torch.randn(3, 3)},
    }[masked]

    expected = whole(x, x, x, average_attn_weights=False, **more)
    got = ours(x, x, x, average_attn_weights=False, **more)

    for one, other in zip(got, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)
    assert ours(x, x, x, need_weights=False)[1] is None
    assert torch.allclose(ours(x, x, x)[1], whole(x, x, x)[1], atol=1e-6)


def test_attention_refuses_a_mask_for_heads_that_left() -> None:
    ours = FewerHeads(8, 3, head_dim=2, bias=True, batch_first=True)

    with pytest.raises(ModelError, match=r"prune\.protect"):
        ours(*[torch.zeros(2, 3, 8)] * 3, attn_mask=torch.zeros(8, 3, 3))


def test_skip_ignores_whatever_else_a_block_is_called_with() -> None:
    x = torch.ones(2)

    assert Skip()(x, None, src_mask=None) is x
