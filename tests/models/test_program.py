""".pt2 files: read as they were captured, and refused if they could do more than compute."""

from __future__ import annotations

import json
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from edgestill.exporters.to_onnx import export_onnx
from edgestill.models.source import Network, open_network
from edgestill.pipeline.errors import ModelError
from torch import nn

SHAPE = (3, 8, 8)
Records = dict[str, bytes]


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(0.5),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 5),
    ).eval()  # fmt: skip


def captured(path: Path, module: nn.Module, *, batch: Any = None, example: Any = None) -> Path:
    shapes = None if batch is None else ({0: batch},)
    example = torch.zeros(2, *SHAPE) if example is None else example
    torch.export.save(torch.export.export(module, (example,), dynamic_shapes=shapes), path)
    return path


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("program") / "net.pt2"
    return captured(path, net(), batch=torch.export.Dim("N"))


def opened(path: Path, *, classes: int = 5, input_shape: Any = SHAPE, **args: Any) -> Network:
    return open_network(str(path), args=args, classes=classes, input_shape=input_shape, seed=0)


def tampered(program: Path, path: Path, change: Callable[[Records], None]) -> Path:
    """A copy of the archive with some of its records changed."""
    with zipfile.ZipFile(program) as archive:
        records = {n.partition("/")[2]: archive.read(n) for n in archive.namelist()}
    change(records)
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in records.items():
            archive.writestr(f"net/{name}", content)
    return path


def test_program_computes_what_the_module_did_at_any_batch(program: Path) -> None:
    network = opened(program)
    x = torch.randn(7, *SHAPE)

    with torch.inference_mode():
        assert torch.equal(network.module(x), net()(x))
        assert network.module(x[:1]).shape == (1, 5)
    assert (network.trainable, network.fixed_batch, network.args) == (False, None, {})


def test_fixed_batch_is_reported_and_run(tmp_path: Path) -> None:
    network = opened(captured(tmp_path / "net.pt2", net(), example=torch.zeros(3, *SHAPE)))

    assert network.fixed_batch == 3


def test_modes_do_nothing_and_no_parameter_asks_for_gradients(program: Path) -> None:
    module = opened(program).module

    assert module.eval() is module
    assert not module.train().training
    assert not any(p.requires_grad for p in module.parameters())


def test_copied_program_computes_the_same_in_float64(program: Path) -> None:
    import copy

    module = opened(program).module
    x = torch.randn(2, *SHAPE)

    double = copy.deepcopy(module).double()

    with torch.no_grad():
        assert double(x.double()).dtype == torch.float64
        torch.testing.assert_close(double(x.double()).float(), module(x))


def test_program_module_exports(program: Path, tmp_path: Path) -> None:
    path = tmp_path / "net.onnx"

    export_onnx(opened(program).module, torch.zeros(2, *SHAPE), path, batch="dynamic")

    assert path.stat().st_size > 0


def test_program_captured_in_training_mode_is_refused(tmp_path: Path) -> None:
    path = captured(tmp_path / "net.pt2", net().train())

    with pytest.raises(ModelError, match=r"captured in training mode.*call model\.eval\(\)"):
        opened(path)


def test_bounded_batch_is_refused(tmp_path: Path) -> None:
    path = captured(tmp_path / "net.pt2", net(), batch=torch.export.Dim("N", max=64))

    with pytest.raises(ModelError, match="batch may be at most 64"):
        opened(path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"input_shape": (3, 9, 8)}, r"takes float32 \('N', 3, 8, 8\).*\('N', 3, 9, 8\)"),
     ({"input_shape": (1, 8, 8)}, "change data.preprocess"),
     ({"classes": 4}, "gives 5 classes and the data has 4; a captured program keeps"),
     ({"width": 2}, r"takes no args, got \['width'\]")],
)  # fmt: skip
def test_program_for_other_data_names_both_sides(
    changes: dict[str, Any], message: str, program: Path
) -> None:
    with pytest.raises(ModelError, match=message):
        opened(program, **changes)


def test_program_of_two_inputs_is_refused(tmp_path: Path) -> None:
    class Two(nn.Module):
        def forward(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
            return (a + b).flatten(1)[:, :5]

    example = (torch.zeros(2, *SHAPE), torch.zeros(2, *SHAPE))
    torch.export.save(torch.export.export(Two(), example), tmp_path / "net.pt2")

    with pytest.raises(ModelError, match="takes 2 inputs; expected one image batch"):
        opened(tmp_path / "net.pt2")


@pytest.mark.parametrize("kind", ["text", "state dict", "zip", "cut"])
def test_file_that_is_no_program_says_how_to_write_one(
    kind: str, program: Path, tmp_path: Path
) -> None:
    path = tmp_path / "net.pt2"
    if kind == "text":
        path.write_bytes(b"hello")
    elif kind == "state dict":
        torch.save(net().state_dict(), path)
    elif kind == "zip":
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("a", "b")
    else:
        path.write_bytes(program.read_bytes()[:2000])

    with pytest.raises(ModelError, match=r"is no \.pt2 program.*torch\.export\.save"):
        opened(path)


def test_missing_program_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="no such file"):
        opened(tmp_path / "none.pt2")


def edited(record: str, change: Callable[[Any], None]) -> Callable[[Records], None]:
    def apply(records: Records) -> None:
        document = json.loads(records[record])
        change(document)
        records[record] = json.dumps(document).encode()

    return apply


def call(target: str) -> Callable[[Records], None]:
    def change(document: Any) -> None:
        document["graph_module"]["graph"]["nodes"][0]["target"] = target

    return edited("models/model.json", change)


def first_weight(**fields: Any) -> Callable[[Records], None]:
    def change(document: Any) -> None:
        next(iter(document["config"].values())).update(fields)

    return edited("data/weights/model_weights_config.json", change)


def expression(text: str) -> Callable[[Records], None]:
    def apply(records: Records) -> None:
        model = records["models/model.json"].decode()
        start = model.index('"expr_str": "') + len('"expr_str": "')
        end = model.index('"', start)
        records["models/model.json"] = (model[:start] + text + model[end:]).encode()

    return apply


def with_record(name: str, content: bytes) -> Callable[[Records], None]:
    return lambda records: records.update({name: content})


HOSTILE = {
    "unpickled weight": first_weight(use_pickle=True),
    "custom object": first_weight(path_name="custom_obj_0"),
    "torch.load": call("torch.load"),
    "torch.hub.load": call("torch.hub.load"),
    "library": call("torch.ops.load_library"),
    "methodcaller": call("_operator.methodcaller"),
    "expression": expression("exec(chr(112))"),
    "attribute": expression("Integer(1).__class__"),
    "string": expression("S('1')"),
    "sample inputs": with_record("data/sample_inputs/model.pt", pickle.dumps(print)),
    "compiled code": with_record("data/aotinductor/model/lib.so", b""),
    "pickled weights": with_record("data/weights/model.pt", b""),
    "second program": with_record("models/other.json", b"{}"),
    "record of the same name": with_record("Models/model.json", b"{}"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_program_that_could_run_code_is_refused(name: str, program: Path, tmp_path: Path) -> None:
    path = tampered(program, tmp_path / "net.pt2", HOSTILE[name])

    with pytest.raises(ModelError, match="holds more than plain tensors and operators"):
        opened(path)


def test_second_record_of_one_name_is_refused(program: Path, tmp_path: Path) -> None:
    path = tampered(program, tmp_path / "net.pt2", lambda records: None)
    with zipfile.ZipFile(path, "a") as archive, pytest.warns(UserWarning, match="Duplicate"):
        archive.writestr("net/models/model.json", b"{}")

    with pytest.raises(ModelError, match="two records of one name"):
        opened(path)


def test_shape_arithmetic_is_no_hidden_code(tmp_path: Path) -> None:
    class Shapes(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            twice = torch.cat([x, x])  # 2·N
            return twice.reshape(twice.shape[0] // 2, -1)[:, :5]

    path = captured(tmp_path / "net.pt2", Shapes(), batch=torch.export.Dim("N"))

    assert opened(path).fixed_batch is None
