"""Taps: proposed for every zoo net, and the same features and gradients however they are run."""

from __future__ import annotations

import copy
import itertools
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from edgestill.models.zoo import ZOO, build
from edgestill.pipeline.distill.taps import (
    Tapped,
    feature_shapes,
    find_taps,
    match_stages,
    stage_ends,
)
from edgestill.pipeline.errors import ModelError, RecipeError
from torch import Tensor, nn

LAYERS = ("layer1", "layer2", "layer3", "layer4")
PLAIN_SHAPES = {"plain_cnn_small": (1, 8, 8), "plain_cnn_large": (1, 16, 16)}
# by the zoo's file, or by name where a file's nets differ in depth
ENDS = {
    "cifar_resnet": LAYERS[:3],
    "resnet": LAYERS,
    "mobilenet": ("features.3", "features.6", "features.13", "features.18"),
    "plain_cnn_small": ("layer1", "layer3"),
    "plain_cnn_large": LAYERS,
}
SMALL_STEM = ("resnet", "mobilenet")


def zoo_net(name: str) -> tuple[nn.Module, tuple[int, int, int]]:
    """The net and the input it is made for, at 32 × 32 where it can; without memory."""
    shape = PLAIN_SHAPES.get(name, (3, 32, 32))
    args = {"stem": "small"} if ZOO[name].partition(":")[0] in SMALL_STEM else {}
    with torch.device("meta"):
        return build(name, args, classes=10, in_channels=shape[0]), shape


def resnet20() -> nn.Module:
    torch.manual_seed(0)
    return build("resnet20", {}, classes=10, in_channels=3)


def images(n: int = 4) -> Tensor:
    return torch.randn(n, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def by_hand(network: Any, x: Tensor) -> tuple[Tensor, list[Tensor]]:
    """resnet20's forward written out: logits and the outputs of layer1 and layer3."""
    first = network.layer1(network.relu(network.bn1(network.conv1(x))))
    last = network.layer3(network.layer2(first))
    logits: Tensor = network.linear(network.pool(last).flatten(1))
    return logits, [first, last]


def loss_of(answer: tuple[Tensor, list[Tensor]]) -> Tensor:
    output, features = answer
    # random-sign weights: the mean square of a BatchNorm's output would be constant
    return output.square().mean() + sum(
        (feature * torch.linspace(-1, 1, feature.shape[-1])).mean() for feature in features
    )


def gradients_of(
    run: Callable[[Tensor], tuple[Tensor, list[Tensor]]], network: nn.Module
) -> dict[str, Tensor]:
    network.zero_grad()
    loss_of(run(images())).backward()  # type: ignore[no-untyped-call]
    found = {name: p.grad.clone() for name, p in network.named_parameters() if p.grad is not None}
    assert len(found) == len(list(network.parameters()))
    return found


def assert_same_as_by_hand(
    run: Callable[[Tensor], tuple[Tensor, list[Tensor]]], network: nn.Module
) -> None:
    reference = copy.deepcopy(network)
    expected, expected_features = by_hand(reference, images())
    expected_gradients = gradients_of(lambda x: by_hand(reference, x), reference)

    output, features = run(images())
    gradients = gradients_of(run, network)

    # the same kernels in the same order: float32 noise at most
    torch.testing.assert_close(output, expected)
    torch.testing.assert_close(features, expected_features)
    torch.testing.assert_close(gradients, expected_gradients)


class Odd(nn.Module):
    """One case of each kind: used twice, never used, skipped on demand, overwritten, no tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.twice = nn.Conv2d(3, 3, 1)
        self.never = nn.Conv2d(3, 3, 1)
        self.skipped = nn.Conv2d(3, 3, 1)
        self.norm = nn.BatchNorm2d(3)
        self.relu = nn.ReLU(inplace=True)
        self.pair = Pair()
        self.is_skipping = False

    def forward(self, x: Tensor) -> Tensor:
        x = self.twice(self.twice(x))
        if not self.is_skipping:
            x = self.skipped(x)
        left, right = self.pair(self.relu(self.norm(x)))
        both: Tensor = left + right
        return both


class Pair(nn.Module):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x, x


# Tapped


def test_features_and_gradients_equal_those_of_the_forward_written_out() -> None:
    network = resnet20()

    assert_same_as_by_hand(Tapped(network, ("layer1", "layer3")), network)


def test_features_come_in_the_order_of_the_paths() -> None:
    network = resnet20().eval()

    _, shallow_first = Tapped(network, ("layer1", "layer3"))(images())
    _, deep_first = Tapped(network, ("layer3", "layer1", "layer3"))(images())

    assert [tuple(f.shape) for f in shallow_first] == [(4, 16, 32, 32), (4, 64, 8, 8)]
    torch.testing.assert_close(deep_first, [*shallow_first[::-1], shallow_first[1]])


def test_the_networks_own_state_dict_is_unchanged() -> None:
    network = resnet20()
    before = list(network.state_dict())

    tapped = Tapped(network, ("layer1",))

    assert list(network.state_dict()) == before
    assert list(tapped.state_dict()) == [f"network.{name}" for name in before]


def test_no_feature_lives_longer_than_the_caller_holds_it() -> None:
    tapped = Tapped(resnet20(), ("layer2",))

    _, features = tapped(images())
    watched = weakref.ref(features[0])
    del features, _

    assert watched() is None


def test_a_network_called_or_copied_without_its_wrapper_keeps_nothing() -> None:
    tapped = Tapped(resnet20(), ("layer2",))
    tapped(images())
    caught: list[weakref.ref[Tensor]] = []
    tapped.network.get_submodule("layer2").register_forward_hook(
        lambda module, args, output: caught.append(weakref.ref(output))
    )

    tapped.network(images())
    copy.deepcopy(tapped.network)(images())

    assert len(caught) == 2
    assert [watched() for watched in caught] == [None, None]


def test_a_copy_fills_its_own_features() -> None:
    original = Tapped(resnet20().eval(), ("layer1", "layer3"))
    copied = copy.deepcopy(original)
    with torch.no_grad():
        for parameter in copied.parameters():
            parameter.mul_(2)

    _, features = copied(images())
    _, expected = by_hand(copied.network, images())
    _, unchanged = original(images())
    _, expected_unchanged = by_hand(original.network, images())

    torch.testing.assert_close(features, expected)
    torch.testing.assert_close(unchanged, expected_unchanged)
    assert not torch.allclose(features[0], unchanged[0])


def test_closing_a_copy_leaves_the_original_tapped() -> None:
    original = Tapped(resnet20(), ("layer1",))
    copied = copy.deepcopy(original)

    copied.close()

    assert len(original(images())[1]) == 1
    with pytest.raises(ModelError, match="never fired"):
        copied(images())


def test_close_leaves_no_hook_behind() -> None:
    network = resnet20()
    tapped = Tapped(network, ("layer1", "layer3"))
    hooked = sum(len(module._forward_hooks) for module in network.modules())

    tapped.close()
    tapped.close()

    assert hooked == 2
    assert not any(module._forward_hooks for module in network.modules())


@pytest.mark.parametrize("fullgraph", [True, False])
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_a_compiled_wrapper_gives_the_same_features_and_gradients(
    backend: str, fullgraph: bool
) -> None:
    torch._dynamo.reset()
    network = resnet20()
    tapped = Tapped(network, ("layer1", "layer3"))

    compiled = torch.compile(tapped, backend=backend, fullgraph=fullgraph)

    assert_same_as_by_hand(compiled, network)


class Holder(nn.Module):
    """A wrapper among other things, as a distillation step has it."""

    def __init__(self, tapped: Tapped) -> None:
        super().__init__()
        self.tapped = tapped

    def forward(self, x: Tensor) -> tuple[Tensor, list[Tensor]]:
        output, features = self.tapped(x)
        return output * 1.0, features


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_a_compiled_module_that_holds_a_wrapper_gives_the_same(backend: str) -> None:
    torch._dynamo.reset()
    network = resnet20()
    holder = Holder(Tapped(network, ("layer1", "layer3")))

    assert_same_as_by_hand(torch.compile(holder, backend=backend, fullgraph=True), network)


def test_a_compiled_copy_fills_its_own_features() -> None:
    torch._dynamo.reset()
    copied = copy.deepcopy(Tapped(resnet20(), ("layer1", "layer3")))

    compiled = torch.compile(copied, backend="aot_eager", fullgraph=True)

    assert_same_as_by_hand(compiled, copied.network)


# torch's own warning: it looks at .grad of whatever enters a graph, tapped or not
LOOKS_AT_GRAD = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")


class Breaking(nn.Module):
    """A ReLU that no compiler traces through."""

    def forward(self, x: Tensor) -> Tensor:
        torch._dynamo.graph_break()
        return x.relu()


@LOOKS_AT_GRAD
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_features_survive_a_graph_that_breaks_inside_the_network(backend: str) -> None:
    torch._dynamo.reset()
    network: Any = resnet20()
    network.layer2[0].relu = Breaking()
    tapped = Tapped(network, ("layer1", "layer3"))

    assert_same_as_by_hand(torch.compile(tapped, backend=backend), network)


@LOOKS_AT_GRAD
def test_features_survive_where_only_a_part_of_the_network_is_compiled() -> None:
    torch._dynamo.reset()
    network = resnet20()
    network.get_submodule("layer1").compile(backend="eager")

    assert_same_as_by_hand(Tapped(network, ("layer1", "layer3")), network)


@pytest.fixture
def process_group(tmp_path: Path) -> Iterator[None]:
    """One process that talks to itself, through a file."""
    dist.init_process_group(
        "gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1
    )
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("process_group")
def test_features_and_gradients_are_the_same_under_distributed_data_parallel() -> None:
    network = resnet20()
    holder = Holder(Tapped(network, ("layer1", "layer3")))

    parallel = nn.parallel.DistributedDataParallel(holder)

    assert_same_as_by_hand(parallel, network)


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("never", "tap 'never' of Odd: expected .* it never fired; tap a module that forward"),
        ("twice", "tap 'twice' of Odd: expected .* used 2 times; tap the module around it"),
        ("pair", "tap 'pair' of Odd: expected one tensor .* got tuple; tap a module inside"),
        ("norm", "tap 'norm' of Odd: expected .* overwrote it in place .*; tap that later module"),
    ],
)
def test_a_tap_that_gives_no_feature_is_named(path: str, message: str) -> None:
    tapped = Tapped(Odd(), ("skipped", path))

    with pytest.raises(ModelError, match=message):
        tapped(images())


def test_the_module_that_overwrites_can_be_tapped() -> None:
    _, (feature,) = Tapped(Odd(), ("relu",))(images())

    assert feature.min() == 0


def test_an_unknown_path_is_refused_with_near_names() -> None:
    with pytest.raises(ModelError, match=r"'layr3': CifarResNet has no such .* \(near .*layer3"):
        Tapped(resnet20(), ("layr3",))


def test_no_stale_feature_when_a_later_call_skips_the_module() -> None:
    network = Odd()
    tapped = Tapped(network, ("skipped",))
    tapped(images())
    network.is_skipping = True

    with pytest.raises(ModelError, match=r"'skipped' of Odd: .* never fired"):
        tapped(images())


def test_no_stale_feature_after_a_call_that_failed() -> None:
    network = Odd()
    tapped = Tapped(network, ("skipped",))
    broken, network.pair = network.pair, nn.Linear(1, 1)  # type: ignore[assignment]
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        tapped(images())
    network.pair = broken

    _, features = tapped(images())

    assert len(features) == 1


def test_a_compiled_wrapper_raises_when_a_later_call_skips_the_module() -> None:
    torch._dynamo.reset()
    network = Odd()
    compiled = torch.compile(Tapped(network, ("skipped",)), backend="eager")
    compiled(images())
    network.is_skipping = True

    with pytest.raises(ModelError, match=r"'skipped' of Odd: .* never fired"):
        compiled(images())


# stage_ends and feature_shapes


@pytest.mark.parametrize("name", ZOO)
def test_every_zoo_nets_stage_ends_are_found(name: str) -> None:
    network, shape = zoo_net(name)

    found = stage_ends(network, shape)

    assert found == ENDS.get(name, ENDS.get(ZOO[name].partition(":")[0]))


@pytest.mark.parametrize("name", ZOO)
def test_every_zoo_nets_stages_halve_the_resolution(name: str) -> None:
    network, shape = zoo_net(name)
    tapped = Tapped(network, stage_ends(network, shape))

    shapes = feature_shapes(tapped, shape)

    sizes = [size for _, *size in shapes]
    assert len(sizes) >= 2
    assert all(a == [2 * h for h in b] for a, b in itertools.pairwise(sizes))


@pytest.mark.parametrize(
    ("name", "shape", "expected"),
    [
        ("resnet18", (3, 224, 224), LAYERS),
        ("resnet50", (3, 224, 224), LAYERS),
        ("mobilenetv2", (3, 224, 224), ENDS["mobilenet"]),
        # the strided stem takes 32 × 32 so low that layer4 ends at 1 × 1
        ("resnet50", (3, 32, 32), ("relu", *LAYERS[:3])),
        ("mobilenetv2", (3, 32, 32), ("features.1", *ENDS["mobilenet"][:3])),
        ("plain_cnn_large", (3, 8, 8), LAYERS[:3]),
    ],
)
def test_stage_ends_with_a_strided_stem_or_a_last_stage_of_one_pixel(
    name: str, shape: tuple[int, int, int], expected: tuple[str, ...]
) -> None:
    with torch.device("meta"):
        network = build(name, {}, classes=10, in_channels=3)

    assert stage_ends(network, shape) == expected


def test_of_more_stages_the_deepest_are_proposed() -> None:
    network, shape = zoo_net("mobilenetv2")

    assert stage_ends(network, shape, at_most=2) == ("features.13", "features.18")


def test_a_net_inside_wrappers_has_the_same_stages() -> None:
    network, shape = zoo_net("resnet50")
    wrapped = nn.Sequential(nn.Sequential(network), nn.Identity())

    assert stage_ends(wrapped, shape) == tuple(f"0.0.{name}" for name in LAYERS)


def test_a_flat_list_of_layers_ends_its_stages_before_each_pooling() -> None:
    def pair(inputs: int, outputs: int) -> list[nn.Module]:
        return [nn.Conv2d(inputs, outputs, 3, padding=1), nn.ReLU(inplace=True)]

    features = nn.Sequential(*pair(3, 4), *pair(4, 4), nn.MaxPool2d(2), *pair(4, 8))
    network = nn.Sequential(features, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 2))

    assert stage_ends(network, (3, 8, 8)) == ("0.3", "0.6")


class Untappable(nn.Module):
    """Each of its two stages ends with something that no tap can stand on."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 4, 3, padding=1)
        self.norm1 = nn.BatchNorm2d(4)
        self.conv2 = nn.Conv2d(4, 4, 3, padding=1, stride=2)
        self.relu = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm1(self.conv1(x)).relu_()
        pooled: Tensor = self.relu(self.relu(self.conv2(x))).mean((2, 3))
        return pooled


def test_modules_that_are_overwritten_or_used_twice_are_not_proposed() -> None:
    network = Untappable()

    proposed = stage_ends(network, (3, 32, 32))

    assert proposed == ("conv1", "conv2")
    assert len(Tapped(network, proposed)(images())[1]) == 2


@pytest.mark.parametrize("look", [stage_ends, lambda n, s: feature_shapes(Tapped(n, ["relu"]), s)])
def test_a_dry_run_changes_nothing(look: Callable[[nn.Module, tuple[int, ...]], Any]) -> None:
    network = resnet20()
    network.get_submodule("layer2").eval()
    modes = [module.training for module in network.modules()]
    before = copy.deepcopy(network.state_dict())
    hooks = sum(len(module._forward_hooks) for module in network.modules())
    has_grad = []
    network.get_submodule("conv1").register_forward_hook(
        lambda module, args, output: has_grad.append(output.requires_grad)
    )

    look(network, (3, 32, 32))

    assert [module.training for module in network.modules()] == modes
    torch.testing.assert_close(network.state_dict(), before, rtol=0, atol=0)
    assert has_grad == [False]
    if look is stage_ends:
        assert sum(len(module._forward_hooks) for module in network.modules()) == hooks + 1


def test_shapes_are_those_of_the_features_without_the_batch() -> None:
    network, shape = zoo_net("resnet20")

    shapes = feature_shapes(Tapped(network, ("layer3", "linear", "layer1")), shape)

    assert shapes == [(64, 8, 8), (10,), (16, 32, 32)]


def test_a_dry_run_follows_the_weights_precision() -> None:
    network = resnet20().double()

    assert feature_shapes(Tapped(network, ("layer3",)), (3, 32, 32)) == [(64, 8, 8)]


@pytest.mark.parametrize("look", [stage_ends, lambda n, s: feature_shapes(Tapped(n, ["relu"]), s)])
def test_an_input_the_network_cannot_take_is_refused(
    look: Callable[[nn.Module, tuple[int, ...]], Any],
) -> None:
    network = resnet20()

    with pytest.raises(ModelError, match=r"fails on an input of shape \(1, 32, 32\)"):
        look(network, (1, 32, 32))

    assert all(module.training for module in network.modules())


@pytest.mark.parametrize(
    "network",
    [
        nn.Sequential(nn.Flatten(), nn.Linear(12, 3), nn.Linear(3, 2)),
        nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 2)),
    ],
    ids=["vectors only", "pooled only"],
)
def test_a_net_without_spatial_features_asks_for_taps_by_hand(network: nn.Module) -> None:
    with pytest.raises(ModelError, match=r"Sequential: expected .* name the taps by hand"):
        stage_ends(network, (3, 2, 2))


# find_taps


@pytest.mark.parametrize(
    ("patterns", "expected"),
    [
        (["layer3", "layer1"], ("layer3", "layer1")),
        (["layer?"], LAYERS[:3]),
        (["layer3", "layer?"], ("layer3", "layer1", "layer2")),
        (["layer[12].0.conv?"], ("layer1.0.conv1", "layer1.0.conv2",
                                 "layer2.0.conv1", "layer2.0.conv2")),
        (["layer1*2"], ("layer1.0.conv2", "layer1.0.bn2", "layer1.1.conv2", "layer1.1.bn2",
                        "layer1.2", "layer1.2.conv2", "layer1.2.bn2")),
    ],
)  # fmt: skip
def test_taps_come_in_the_order_of_the_patterns_and_then_of_the_modules(
    patterns: list[str], expected: tuple[str, ...]
) -> None:
    network, _ = zoo_net("resnet20")

    assert find_taps(network, patterns, where="here") == expected


def test_a_shared_module_is_found_by_its_second_name() -> None:
    shared = nn.Linear(2, 2)

    assert find_taps(nn.Sequential(shared, shared), ["1"], where="here") == ("1",)


@pytest.mark.parametrize("pattern", ["layr3", "Layer3", "layr?"])
def test_a_pattern_without_a_match_is_refused_with_near_names(pattern: str) -> None:
    network, _ = zoo_net("resnet20")
    where = "distill.objectives[1].student"

    with pytest.raises(RecipeError) as caught:
        find_taps(network, ["layer1", pattern], where=where)

    said = str(caught.value)
    assert said.startswith(f"{where}: no module named {pattern!r} in CifarResNet; near names: ")
    assert "layer" in said.partition("near names: ")[2]


def test_every_pattern_without_a_match_is_named() -> None:
    network, _ = zoo_net("resnet20")

    with pytest.raises(RecipeError) as caught:
        find_taps(network, ["layr3", "zzz"], where="here")

    first, second = str(caught.value).splitlines()
    assert "'layr3'" in first
    assert "'zzz' in CifarResNet; it has conv1, bn1, relu, layer1" in second


def test_no_pattern_is_refused() -> None:
    network, _ = zoo_net("resnet20")

    with pytest.raises(RecipeError, match=r"here: expected at least one module .* empty list"):
        find_taps(network, [], where="here")


# match_stages


@pytest.mark.parametrize(
    ("students", "teachers", "expected"),
    [
        (3, 3, [(0, 0), (1, 1), (2, 2)]),
        (2, 4, [(0, 2), (1, 3)]),
        (4, 2, [(2, 0), (3, 1)]),
        (1, 1, [(0, 0)]),
    ],
)
def test_the_deepest_stages_are_paired_and_come_shallow_first(
    students: int, teachers: int, expected: list[tuple[int, int]]
) -> None:
    shape = (8, 4, 4)

    assert match_stages([shape] * students, [shape] * teachers) == expected


@pytest.mark.parametrize(("students", "teachers"), [(0, 2), (2, 0), (0, 0)])
def test_a_side_without_stages_is_refused(students: int, teachers: int) -> None:
    shape = (8, 4, 4)

    with pytest.raises(RecipeError, match=f"got {students} and {teachers}; name taps"):
        match_stages([shape] * students, [shape] * teachers)
