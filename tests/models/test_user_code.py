"""A user's own file: its neighbours stay its own, its mistakes are told with their line."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from edgestill.exporters.to_onnx import export_onnx
from edgestill.models.source import Network, open_network
from edgestill.pipeline.errors import ModelError

SHAPE = (3, 4, 4)
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def clean_interpreter() -> Iterator[None]:
    """What a test leaves on the import path is taken off again."""
    path, modules = list(sys.path), dict(sys.modules)
    yield
    sys.path[:] = path
    for name in set(sys.modules) - set(modules):
        if name.partition(".")[0] in {"models", "utils", "pkg", "helper"}:
            del sys.modules[name]


def opened(reference: str, *, classes: int = 5, **args: Any) -> Network:
    return open_network(reference, args=args, classes=classes, input_shape=SHAPE, seed=0)


def written(folder: Path, files: dict[str, str]) -> Path:
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
    return folder / "net.py"


def project(folder: Path, mark: float, *, package: bool = True) -> Path:
    """net.py beside a `models` package; every logit is `mark`, by a lazy import in forward."""
    files = {
        "net.py": (
            "from models.net import Net\n"
            "def make(classes):\n"
            "    return Net(classes)\n"
        ),
        "models/net.py": (
            "import torch\n"
            "from .layers import head\n"
            "class Net(torch.nn.Module):\n"
            "    def __init__(self, classes):\n"
            "        super().__init__()\n"
            "        self.fc = head(classes)\n"
            "    def forward(self, x):\n"
            "        from models.lazy import mark\n"
            "        return 0 * self.fc(x.flatten(1)) + mark()\n"
        ),
        "models/layers.py": "import torch\ndef head(n):\n    return torch.nn.Linear(48, n)\n",
        "models/lazy.py": f"from . import later\ndef mark():\n    return {mark} + later.zero\n",
        "models/later.py": "zero = 0\n",
    }  # fmt: skip
    return written(folder, files | ({"models/__init__.py": ""} if package else {}))


def logit(network: Network) -> float:
    with torch.no_grad():
        return float(network.module(torch.zeros(2, *SHAPE))[0, 0])


@pytest.mark.parametrize("package", [True, False])
def test_own_models_package_wins_over_the_working_folders_and_a_loaded_one(
    package: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    foreign = ModuleType("models")
    monkeypatch.chdir(ROOT)
    monkeypatch.syspath_prepend(str(ROOT))
    monkeypatch.setitem(sys.modules, "models", foreign)

    network = opened(f"{project(tmp_path, 7.0, package=package)}:make")

    assert logit(network) == 7.0
    assert sys.modules["models"] is foreign
    assert "models.net" not in sys.modules


def test_two_users_with_packages_of_one_name_both_keep_working(tmp_path: Path) -> None:
    teacher = opened(f"{project(tmp_path / 'teacher', 1.0)}:make")
    student = opened(f"{project(tmp_path / 'student', 2.0)}:make")

    # in turns: each forward imports lazily, and must find its own package each time
    found = [logit(net) for net in (teacher, student, teacher, student)]

    assert found == [1.0, 2.0, 1.0, 2.0]
    assert not any(name.partition(".")[0] == "models" for name in sys.modules)


def test_network_with_its_own_package_exports(tmp_path: Path) -> None:
    network = opened(f"{project(tmp_path, 3.0)}:make")

    export_onnx(network.module, torch.zeros(2, *SHAPE), tmp_path / "net.onnx", batch="dynamic")

    assert (tmp_path / "net.onnx").stat().st_size > 0


def test_sources_are_the_imported_files_of_the_folder_in_order(tmp_path: Path) -> None:
    file = project(tmp_path, 1.0)
    (tmp_path / "unused.py").write_text("")

    network = opened(f"{file}:make")

    names = ["models/__init__.py", "models/later.py", "models/layers.py", "models/lazy.py",
             "models/net.py", "net.py"]  # fmt: skip
    assert network.sources == tuple(sorted(tmp_path / name for name in names))


def test_no_bytecode_is_left_beside_the_users_files(tmp_path: Path) -> None:
    opened(f"{project(tmp_path, 1.0)}:make")

    assert list(tmp_path.rglob("__pycache__")) == []


def test_import_path_is_as_before_but_for_the_folder_at_its_end(tmp_path: Path) -> None:
    before = list(sys.path)

    opened(f"{project(tmp_path, 1.0)}:make")

    assert sys.path == [*before, str(tmp_path)]


def test_importlib_inside_forward_finds_the_neighbours(tmp_path: Path) -> None:
    file = written(tmp_path, {
        "net.py": "import importlib, torch\n"
                  "class Net(torch.nn.Module):\n"
                  "    def forward(self, x):\n"
                  "        scale = importlib.import_module('helper').scale\n"
                  "        return scale * x.flatten(1)[:, :5]\n",
        "helper.py": "scale = 2.0\n",
    })  # fmt: skip

    network = opened(f"{file}:Net")

    assert network.module(torch.ones(1, *SHAPE))[0, 0] == 2.0


def test_rewritten_file_is_read_anew(tmp_path: Path) -> None:
    first = logit(opened(f"{project(tmp_path, 1.0)}:make"))
    second = logit(opened(f"{project(tmp_path, 2.0)}:make"))

    assert (first, second) == (1.0, 2.0)


def test_data_folder_named_like_a_library_does_not_hide_the_library(tmp_path: Path) -> None:
    file = written(tmp_path, {
        "net.py": "import yaml, torch\n"
                  "assert yaml.safe_load('1') == 1\n"
                  "def make(classes):\n"
                  "    return torch.nn.Sequential(torch.nn.Flatten(),"
                  " torch.nn.Linear(48, classes))\n",
        "yaml/a.txt": "data",
        "random/code.py": "",
    })  # fmt: skip
    loaded = sys.modules["random"]

    opened(f"{file}:make")

    assert sys.modules["random"] is loaded


def simple(signature: str, classes: str = "classes") -> str:
    return (
        "from torch.nn import Flatten, Linear, Sequential\n"
        f"def make({signature}):\n"
        f"    return Sequential(Flatten(), Linear(48, {classes}))\n"
    )


@pytest.mark.parametrize(
    ("signature", "classes"),
    [("classes", "classes"), ("num_classes", "num_classes"), ("in_channels, classes", "classes"),
     ("*, num_classes=10", "num_classes"), ("", "5"),
     ("classes, input_shape", "classes * input_shape[0] // 3"), ("classes, **more", "classes")],
)  # fmt: skip
def test_factory_gets_classes_and_channels_if_it_names_them(
    signature: str, classes: str, tmp_path: Path
) -> None:
    file = written(tmp_path, {"net.py": simple(signature, classes)})

    assert opened(f"{file}:make").module.get_submodule("1").out_features == 5


def test_arguments_of_the_recipe_win_over_what_is_offered(tmp_path: Path) -> None:
    file = written(tmp_path, {"net.py": simple("num_classes, in_channels", "num_classes")})

    with pytest.raises(ModelError, match="gives 9 classes and the data has 5"):
        opened(f"{file}:make", num_classes=9)
    assert opened(f"{file}:make", in_channels=1).args == {"in_channels": 1}


@pytest.mark.parametrize(
    ("args", "message"),
    [({"dept": 3}, r"no argument 'dept' \(did you mean depth\?\); it takes \(depth, classes\)"),
     ({}, r"missing a required argument: 'depth'; it takes \(depth, classes\).*nothing")],
)  # fmt: skip
def test_arguments_that_do_not_fit_are_told_with_the_signature(
    args: dict[str, Any], message: str, tmp_path: Path
) -> None:
    file = written(tmp_path, {"net.py": simple("depth, classes")})

    with pytest.raises(ModelError, match=message):
        opened(f"{file}:make", **args)


@pytest.mark.parametrize(
    ("source", "message"),
    [("import torch\n\nraise KeyError('width')\n", r"net\.py:3: KeyError: 'width'"),
     ("def make(:\n", r"net\.py:1: SyntaxError: invalid syntax"),
     ("import nothing_such\n", r"net\.py:1: ModuleNotFoundError: No module named 'nothing_such'"),
     ("from .x import y\n", r"net\.py:1: ImportError: .*import its neighbours by their plain"),
     ("import sys\nsys.exit('no GPU')\n", r"net\.py:2: SystemExit: no GPU"),
     ("def make():\n    return 1 / 0\n", r"net\.py:2 in make: ZeroDivisionError: division by zero"),
     ("import torch\nclass make(torch.nn.Linear):\n    def __init__(self):\n"
      "        super().__init__(7, 5)\n    def forward(self, x):\n"
      "        return super().forward(x)\n",
      r"on an input \(2, 3, 4, 4\): net\.py:6 in forward: RuntimeError: mat1 and mat2")],
)  # fmt: skip
def test_error_in_the_users_code_names_line_and_message(
    source: str, message: str, tmp_path: Path
) -> None:
    file = written(tmp_path, {"net.py": source})

    with pytest.raises(ModelError, match=message) as caught:
        opened(f"{file}:make")
    assert "Traceback" not in str(caught.value)
    assert str(file) in str(caught.value)


def test_failed_import_leaves_the_interpreter_as_it_was(tmp_path: Path) -> None:
    written(tmp_path, {"net.py": "import utils\nraise ValueError('no')\n", "utils.py": ""})
    path, finders = list(sys.path), list(sys.meta_path)

    with pytest.raises(ModelError):
        opened(f"{tmp_path / 'net.py'}:make")

    assert (sys.path, sys.meta_path) == (path, finders)
    assert "utils" not in sys.modules


@pytest.mark.parametrize(
    ("reference", "message"),
    [("net.py:mak", r"has no 'mak' \(did you mean make\?\); it defines make, Other"),
     ("net.py:number", "is not callable 'number'; it defines make, Other"),
     ("net.py", r"which function builds the network\? Write net\.py:NAME, with one of make, Other"),
     ("net.py:", "which function builds"),
     ("gone.py:make", r"gone\.py: no such file")],
)  # fmt: skip
def test_missing_factory_lists_what_the_file_has(
    reference: str, message: str, tmp_path: Path
) -> None:
    written(tmp_path, {"net.py": "number = 3\ndef make(): pass\nclass Other: pass\n"})

    with pytest.raises(ModelError, match=message):
        opened(str(tmp_path / reference))


@pytest.mark.parametrize(
    ("value", "message"),
    [("None", r"must return a torch\.nn\.Module, got None"),
     ("torch.nn.Identity", "got a class; return an instance of it"),
     ("{'model': 1}", r"got \{'model': 1\}")],
)  # fmt: skip
def test_factory_that_returns_no_module_is_told_so(
    value: str, message: str, tmp_path: Path
) -> None:
    file = written(tmp_path, {"net.py": f"import torch\ndef make():\n    return {value}\n"})

    with pytest.raises(ModelError, match=message):
        opened(f"{file}:make")
