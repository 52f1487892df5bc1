"""A stored network is the network, and its bytes depend on nothing else."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from edgestill.models.source import Network, open_network
from edgestill.models.store import count_parameters, load_network, save_network
from edgestill.pipeline.errors import IntegrityError, ModelError
from torch import nn

SHAPE = (1, 8, 8)
NAMES = ("null", "eins", "zwölf")
USER_NET = """\
from torch import nn

def make(classes, hidden=4):
    first, last = nn.Linear(64, hidden), nn.Linear(hidden, hidden)
    last.weight = first.weight if hidden == 64 else last.weight
    return nn.Sequential(nn.Flatten(), first, last, nn.Linear(hidden, classes))
"""


def opened(reference: str, seed: int = 0, **args: Any) -> Network:
    return open_network(reference, args=args, classes=3, input_shape=SHAPE, seed=seed)


def save(folder: Path, network: Network) -> Path:
    folder.mkdir()
    save_network(
        folder,
        network,
        classes=3,
        input_shape=SHAPE,
        class_names=NAMES,
        preprocess={"mean": [0.5], "steps": ["÷ 255"]},
    )
    return folder


def logits(module: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        result: torch.Tensor = module(torch.linspace(-1, 1, 128).view(2, *SHAPE))
    return result


def user_file(folder: Path) -> Path:
    (folder / "net.py").write_text(USER_NET)
    return folder / "net.py"


def test_network_loaded_gives_the_same_logits_and_description(tmp_path: Path) -> None:
    network = opened("plain_cnn_small", seed=3, width=2.0)

    stored = load_network(save(tmp_path / "a", network))

    assert torch.equal(logits(stored.network.module), logits(network.module))
    assert stored.network.reference == "plain_cnn_small"
    assert stored.network.args == {"width": 2.0}
    assert stored.class_names == NAMES
    assert (stored.classes, stored.input_shape) == (3, SHAPE)
    assert stored.preprocess == {"mean": [0.5], "steps": ["÷ 255"]}
    assert not any(part.training for part in stored.network.module.modules())


def test_equal_networks_are_stored_in_equal_bytes(tmp_path: Path) -> None:
    first, second = opened("plain_cnn_small"), opened("plain_cnn_small")
    second.module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    second.module.train()

    folders = save(tmp_path / "a", first), save(tmp_path / "b", second)

    for name in ("network.json", "model.safetensors"):
        assert (folders[0] / name).read_bytes() == (folders[1] / name).read_bytes()


def test_only_the_two_files_are_left(tmp_path: Path) -> None:
    folder = save(tmp_path / "a", opened("plain_cnn_small"))

    assert {p.name for p in folder.iterdir()} == {"network.json", "model.safetensors"}


def test_user_network_is_built_by_the_same_file_again(tmp_path: Path) -> None:
    file = user_file(tmp_path)
    network = opened(f"{file}:make", seed=1, hidden=5)

    stored = load_network(save(tmp_path / "a", network))

    assert torch.equal(logits(stored.network.module), logits(network.module))
    assert stored.network.sources == (file,)


def test_tied_weights_are_stored_once_and_tied_again(tmp_path: Path) -> None:
    network = opened(f"{user_file(tmp_path)}:make", hidden=64)

    stored = load_network(save(tmp_path / "a", network)).network.module

    assert torch.equal(logits(stored), logits(network.module))
    assert stored.get_parameter("1.weight") is stored.get_parameter("2.weight")
    assert count_parameters(stored) == 64 * 64 + 2 * 64 + 64 * 3 + 3


def test_user_file_that_is_gone_is_named(tmp_path: Path) -> None:
    file = user_file(tmp_path)
    folder = save(tmp_path / "a", opened(f"{file}:make"))
    file.unlink()

    with pytest.raises(ModelError, match=r"net\.py: no such file"):
        load_network(folder)


def test_program_is_copied_and_loads_without_its_origin(tmp_path: Path) -> None:
    source = opened("plain_cnn_small", seed=2)
    batch = ({0: torch.export.Dim("N")},)
    program = torch.export.export(source.module, (torch.zeros(2, *SHAPE),), dynamic_shapes=batch)
    torch.export.save(program, tmp_path / "origin.pt2")
    network = opened(str(tmp_path / "origin.pt2"))

    folder = save(tmp_path / "a", network)
    (tmp_path / "origin.pt2").unlink()
    stored = load_network(folder)

    assert {p.name for p in folder.iterdir()} == {"network.json", "program.pt2"}
    assert torch.equal(logits(stored.network.module), logits(source.module))
    assert stored.network.reference == str(tmp_path / "origin.pt2")
    assert not stored.network.trainable


@pytest.mark.parametrize("damage", ["flip", "cut", "remove", "description", "version"])
def test_damaged_store_is_an_integrity_error(damage: str, tmp_path: Path) -> None:
    folder = save(tmp_path / "a", opened("plain_cnn_small"))
    weights, description = folder / "model.safetensors", folder / "network.json"
    content = weights.read_bytes()
    if damage == "flip":
        weights.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    elif damage == "cut":
        weights.write_bytes(content[:-100])
    elif damage == "remove":
        weights.unlink()
    elif damage == "description":
        description.write_text("{")
    else:
        description.write_text(json.dumps(json.loads(description.read_text()) | {"version": 99}))

    with pytest.raises(IntegrityError):
        load_network(folder)


def test_arguments_that_json_cannot_hold_are_refused(tmp_path: Path) -> None:
    network = opened("plain_cnn_small")
    strange = Network(network.module, "plain_cnn_small", {"width": {1, 2}}, trainable=True)

    with pytest.raises(ModelError, match="args must be"):
        save(tmp_path / "a", strange)


def test_count_takes_shared_parameters_once_and_no_buffers() -> None:
    first = nn.Linear(4, 4)
    second = nn.Linear(4, 4)
    second.weight = first.weight

    # one shared 4 × 4, two biases of 4, and BatchNorm's weight and bias of 4
    assert count_parameters(nn.Sequential(first, second, nn.BatchNorm1d(4))) == 16 + 8 + 8
