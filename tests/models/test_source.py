"""A reference becomes a network that gives finite logits, or one clear error."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from edgestill.models.source import Network, open_network
from edgestill.pipeline.errors import ModelError

SHAPE = (3, 8, 8)


def opened(reference: str, *, classes: int = 5, seed: int = 0, **args: Any) -> Network:
    return open_network(reference, args=args, classes=classes, input_shape=SHAPE, seed=seed)


def written(folder: Path, forward: str) -> str:
    """A user's file whose network returns `forward`, an expression of x (N, 3, 8, 8)."""
    (folder / "net.py").write_text(
        "import torch\n"
        "class Net(torch.nn.Module):\n"
        "    def __init__(self):\n"
        "        super().__init__()\n"
        "        self.fc = torch.nn.Linear(3, 5)\n"
        "    def forward(self, x):\n"
        "        logits = self.fc(x.mean((2, 3)))\n"
        f"        return {forward}\n"
    )
    return f"{folder / 'net.py'}:Net"


def weights(network: Network) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in network.module.parameters()])


def test_zoo_network_takes_the_datas_channels_and_classes() -> None:
    network = opened("plain_cnn_small", width=2.0)

    assert network.module.get_submodule("fc").out_features == 5
    assert network.module.get_parameter("layer1.0.weight").shape == (32, 3, 3, 3)
    assert (network.trainable, network.sources, network.fixed_batch) == (True, (), None)


def test_network_comes_in_eval_mode() -> None:
    assert not any(part.training for part in opened("plain_cnn_small").module.modules())


def test_same_seed_gives_the_same_weights_and_another_seed_others() -> None:
    first, second, other = (opened("plain_cnn_small", seed=s) for s in (1, 1, 2))

    assert torch.equal(weights(first), weights(second))
    assert not torch.equal(weights(first), weights(other))


def test_weights_do_not_depend_on_the_global_generators_nor_change_them(tmp_path: Path) -> None:
    (tmp_path / "net.py").write_text(
        "import random, numpy, torch\n"
        "def make(classes):\n"
        "    net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.LazyLinear(classes))\n"
        "    net.register_buffer('noise', torch.tensor([random.random(), numpy.random.rand()]))\n"
        "    return net\n"
    )
    states, draws = [], []
    for between in (False, True):
        torch.manual_seed(7)
        np.random.seed(7)
        random.seed(7)
        if between:
            states.append(opened(f"{tmp_path / 'net.py'}:make").module.state_dict())
        draws.append((torch.rand(1).item(), np.random.rand(), random.random()))
    states.append(opened(f"{tmp_path / 'net.py'}:make").module.state_dict())

    assert draws[0] == draws[1]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


@pytest.mark.parametrize(
    ("forward", "message"),
    [("(logits, x)", r"expected the logits, a tensor \(N, 5\), and got a tuple"),
     ("{'logits': logits, 'aux': x}", "got a dict with logits, aux; return the logits alone"),
     ("logits.argmax(1)", r"expected logits \(2, 5\) for a batch of 2, got \(2,\)"),
     ("logits[:, :, None, None]", r"got \(2, 5, 1, 1\)"),
     ("logits.mean(0, keepdim=True)", r"got \(1, 5\)"),
     ("logits.long()", "expected float logits, got int64"),
     ("logits / 0", "gives NaN or infinite logits"),
     ("logits[:, :4]", "gives 4 classes and the data has 5.*`classes`.*head: new")],
)  # fmt: skip
def test_output_that_is_no_logits_is_explained(forward: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=message):
        opened(written(tmp_path, forward))


def test_image_too_small_for_a_zoo_net_names_both(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"resnet18: cannot take an input \(3, 0, 8\)"):
        open_network("resnet18", args={}, classes=2, input_shape=(3, 0, 8), seed=0)


def test_unknown_name_lists_the_zoo() -> None:
    with pytest.raises(ModelError, match=r"mobilenet_v2: no such network.*mobilenetv2"):
        opened("mobilenet_v2")
