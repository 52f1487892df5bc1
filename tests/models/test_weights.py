"""Checkpoints: read without running code, loaded wholly or refused with advice."""

from __future__ import annotations

import argparse
import os
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from edgestill.models.weights import load_weights, read_state
from edgestill.models.zoo import build
from edgestill.pipeline.errors import WeightsError
from torch import Tensor, nn


def net(name: str = "resnet20", classes: int = 10, **args: Any) -> nn.Module:
    return build(name, args, classes=classes, in_channels=3)


def saved(path: Path, content: Any) -> Path:
    torch.save(content, path)
    return path


def equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


class Bomb:
    """Unpickled by anything but weights_only it would make a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("key", ["state_dict", "model", "model_state", "net", "module", None])
@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "module._orig_mod."])
def test_state_is_found_under_its_usual_wrappers_and_prefixes(
    key: str | None, prefix: str, tmp_path: Path
) -> None:
    state = nn.Linear(3, 2).state_dict()
    renamed = {prefix + name: tensor for name, tensor in state.items()}
    content = renamed if key is None else {key: renamed, "epoch": 3, "loss": torch.tensor(0.5)}

    assert equal(read_state(saved(tmp_path / "w.pth", content)), dict(state))


def test_safetensors_file_is_read_whatever_its_suffix(tmp_path: Path) -> None:
    state = nn.Linear(3, 2).state_dict()
    safetensors.torch.save_file(state, tmp_path / "w.bin")

    assert equal(read_state(tmp_path / "w.bin"), dict(state))


def test_legacy_torch_format_is_read(tmp_path: Path) -> None:
    state = nn.Linear(3, 2).state_dict()
    torch.save(state, tmp_path / "w.pth", _use_new_zipfile_serialization=False)

    assert equal(read_state(tmp_path / "w.pth"), dict(state))


def test_harmless_training_metadata_beside_the_weights_is_no_obstacle(tmp_path: Path) -> None:
    content = {
        "model": nn.Linear(3, 2).state_dict(),
        "args": argparse.Namespace(lr=0.1, out=Path("runs")),
        "best": np.float64(0.9),
        "epoch": np.int64(3),
    }

    assert set(read_state(saved(tmp_path / "w.pth", content))) == {"weight", "bias"}


def test_plain_weights_are_preferred_to_averaged_ones(tmp_path: Path) -> None:
    plain, averaged = nn.Linear(3, 2).state_dict(), nn.Linear(3, 2).state_dict()
    path = saved(tmp_path / "w.pth", {"model_ema": averaged, "model": plain})

    assert equal(read_state(path), dict(plain))


def test_averaged_weights_alone_are_not_chosen_silently(tmp_path: Path) -> None:
    path = saved(tmp_path / "w.pth", {"ema_state_dict": nn.Linear(3, 2).state_dict()})

    with pytest.raises(WeightsError, match=r"only averaged weights \(ema_state_dict\)"):
        read_state(path)


def test_averaged_model_saved_alone_is_read(tmp_path: Path) -> None:
    model = nn.Linear(3, 2)
    averaged = torch.optim.swa_utils.AveragedModel(model)

    state = read_state(saved(tmp_path / "w.pth", averaged.state_dict()))

    assert equal(state, dict(model.state_dict()))


def test_pickled_code_is_refused_and_not_run(tmp_path: Path) -> None:
    path = saved(tmp_path / "w.pth", {"state_dict": Bomb(tmp_path / "boom")})

    with pytest.raises(WeightsError, match=r"holds pickled code.*mkdir.*torch\.save"):
        read_state(path)
    assert not (tmp_path / "boom").exists()


def test_whole_pickled_module_is_refused_with_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match=r"Linear\), which is not run; save its weights alone"):
        read_state(saved(tmp_path / "w.pth", nn.Linear(3, 2)))


@pytest.mark.parametrize(
    "content",
    [b"", b"hello world", b"\x80\x02junk", b"PK\x03\x04junk", pickle.dumps({"a": 1}),
     b"\x10\0\0\0\0\0\0\0{"],
)  # fmt: skip
def test_file_that_is_no_checkpoint_is_an_error(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "w.pth"
    path.write_bytes(content)

    with pytest.raises(WeightsError, match=r"w\.pth: (is no checkpoint|is damaged)"):
        read_state(path)


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_truncated_checkpoint_is_an_error(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"w{suffix}"
    save: Any = torch.save if suffix == ".pth" else safetensors.torch.save_file
    save(nn.Linear(30, 20).state_dict(), path)
    path.write_bytes(path.read_bytes()[:-200])

    with pytest.raises(WeightsError, match="damaged"):
        read_state(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [({"epoch": 3}, "no state dict in it.*'epoch'"), ([1], "holds a list"), ({}, "got nothing")],
)
def test_checkpoint_without_a_state_dict_says_what_it_holds(
    content: Any, message: str, tmp_path: Path
) -> None:
    with pytest.raises(WeightsError, match=message):
        read_state(saved(tmp_path / "w.pth", content))


def test_missing_file_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match="no such file"):
        read_state(tmp_path / "none.pth")


def test_loaded_network_has_exactly_the_given_weights() -> None:
    torch.manual_seed(0)
    source, target = net(), net()

    report = load_weights(target, source.state_dict(), head="keep", where="teacher")

    assert equal(target.state_dict(), source.state_dict())
    assert (report.tensors, report.fresh, report.dropped) == (len(source.state_dict()), (), ())


def test_batchnorm_counters_may_be_missing() -> None:
    state = {k: v for k, v in net().state_dict().items() if "num_batches" not in k}

    assert load_weights(net(), state, head="keep", where="teacher").tensors == len(state)


def test_half_precision_becomes_float32() -> None:
    state = {k: v.half() if v.is_floating_point() else v for k, v in net().state_dict().items()}
    target = net()

    report = load_weights(target, state, head="keep", where="teacher")

    assert report.cast_from == ("float16",)
    assert {p.dtype for p in target.parameters()} == {torch.float32}


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_weight_that_is_not_finite_is_named_and_nothing_is_loaded(value: float) -> None:
    source, target = net(), net()
    source.get_parameter("layer2.1.conv1.weight").data[0, 0, 0, 0] = value
    before = {k: v.clone() for k, v in target.state_dict().items()}

    with pytest.raises(WeightsError, match=r"layer2\.1\.conv1\.weight: 1 of 9216 values"):
        load_weights(target, source.state_dict(), head="keep", where="teacher")
    assert equal(target.state_dict(), before)


def test_float64_beyond_float32_is_an_error() -> None:
    state = dict(net().state_dict())
    state["bn1.running_var"] = torch.full((16,), 1e300, dtype=torch.float64)

    with pytest.raises(WeightsError, match=r"bn1\.running_var: 16 of 16 values"):
        load_weights(net(), state, head="keep", where="teacher")


def test_integer_weights_are_refused() -> None:
    state = {k: v.to(torch.int8) for k, v in net().state_dict().items()}

    with pytest.raises(WeightsError, match="expected float32, got int8"):
        load_weights(net(), state, head="keep", where="teacher")


def test_mismatch_lists_names_shapes_counts_and_the_net_that_fits() -> None:
    state = net("resnet56").state_dict()

    with pytest.raises(WeightsError) as caught:
        load_weights(net("resnet18"), state, head="keep", where="teacher")

    message = str(caught.value)
    assert message.startswith("teacher: the weights do not fit the network")
    assert "layer2.0.downsample.0.weight" in message
    assert "conv1.weight (network (64, 3, 7, 7), checkpoint (16, 3, 3, 3))" in message
    assert "more)" in message
    assert message.endswith("these weights fit: resnet56")


def test_fitting_net_is_named_with_its_arguments_whatever_the_order_of_names() -> None:
    state = dict(sorted(net("resnet18", 7, stem="small", width=0.25).state_dict().items()))

    with pytest.raises(WeightsError, match=r"fit: resnet18 with args {stem: small, width: 0\.25}"):
        load_weights(net("resnet20", 7), state, head="keep", where="teacher")


def test_foreign_checkpoint_gets_general_advice() -> None:
    with pytest.raises(WeightsError, match="check `model` and `args`"):
        load_weights(net(), nn.Linear(3, 2).state_dict(), head="keep", where="student")


@pytest.mark.parametrize("name", ["resnet20", "resnet18", "mobilenetv2", "plain_cnn_small"])
def test_other_class_count_asks_for_a_new_head_and_a_new_head_loads(name: str) -> None:
    source, target = net(name, 10, width=0.25), net(name, 5, width=0.25)
    fresh = target.state_dict()[list(target.state_dict())[-1]].clone()

    with pytest.raises(WeightsError, match=r"trained for 10 classes.*head: new"):
        load_weights(target, source.state_dict(), head="keep", where="teacher")
    report = load_weights(target, source.state_dict(), head="new", where="teacher")

    bias = list(target.state_dict())[-1]
    assert report.dropped == report.fresh == (bias.replace("bias", "weight"), bias)
    assert torch.equal(target.state_dict()[bias], fresh)
    first = next(iter(target.state_dict()))
    assert torch.equal(target.state_dict()[first], source.state_dict()[first])


def test_new_head_replaces_a_last_1x1_convolution() -> None:
    def fully_convolutional(classes: int) -> nn.Module:
        return nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, classes, 1), nn.AdaptiveAvgPool2d(1))

    report = load_weights(
        fully_convolutional(4), fully_convolutional(9).state_dict(), head="new", where="teacher"
    )

    assert report.dropped == ("1.weight", "1.bias")


def test_new_head_without_a_classifier_is_an_error() -> None:
    module = nn.Conv2d(3, 8, 3)

    with pytest.raises(WeightsError, match=r"no nn\.Linear and no 1 × 1"):
        load_weights(module, module.state_dict(), head="new", where="teacher")


def test_tied_tensor_needs_to_be_given_once() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(3, 3), nn.Linear(3, 3)
            self.b.weight = self.a.weight

    source, target = Tied(), Tied()
    state = {k: v for k, v in source.state_dict().items() if k != "b.weight"}

    load_weights(target, state, head="keep", where="teacher")

    assert torch.equal(target.b.weight, source.a.weight)


@pytest.mark.parametrize(
    ("file", "name"), [("resnet56-4bfd9763.th", "resnet56"), ("resnet20-12fca82f.th", "resnet20")]
)
def test_public_cifar_checkpoints_load(shared_data: Path, file: str, name: str) -> None:
    state = read_state(shared_data / "checkpoints" / file)

    report = load_weights(net(name), state, head="keep", where="teacher")

    assert report.tensors == len(state)
