"""Who may import whom, and what stays light: held by reading the imports."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SOURCES = sorted(
    path for folder in ("models", "exporters", "pipeline") for path in (ROOT / folder).rglob("*.py")
)
INSIDE_CAPABILITIES = [
    path for path in SOURCES if len(path.relative_to(ROOT).parts) == 3 and "pipeline" in path.parts
]
LAYERS = {"models": {"models"}, "exporters": {"models", "exporters"},
          "pipeline": {"models", "exporters", "pipeline"}}  # fmt: skip
SERVING = {"data", "train", "measure"}
HEAVY = {"torch", "onnx", "onnxruntime", "transformers", "scipy", "onnxsim", "sklearn", "pyarrow"}
LIGHT = ["cli", "cli_options", "cli_profile", "cli_verify", "cli_gate", "rejudge", "manifest",
         "signature", "consistency", "spec", "training_spec", "strategy", "conflicts", "recipe",
         "recipe_file", "file_recipe", "gate", "markdown", "report", "selection", "release",
         "workspace", "errors", "stage", "console"]  # fmt: skip


def our_imports(path: Path) -> Iterator[tuple[str, ...]]:
    """Modules of ours that `path` imports anywhere, as paths from the root."""
    package = path.relative_to(ROOT).parent.parts
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = package[: len(package) - (node.level - 1)]
            module = tuple(node.module.split(".")) if node.module else ()
            if module:
                yield (*base, *module)
            else:
                yield from ((*base, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("edgestill"):
            yield tuple((node.module or "").split(".")[1:])


def top_level_imports(path: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            names.add((node.module or "").split(".")[0])
    return names


def test_there_are_sources_to_check() -> None:
    assert len(SOURCES) > 20
    assert len(INSIDE_CAPABILITIES) > 20


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_point_downwards(path: Path) -> None:
    folder = path.relative_to(ROOT).parts[0]
    wrong = [
        ".".join(target)
        for target in our_imports(path)
        if target[0] in LAYERS
        and target[0] not in LAYERS[folder]
        and target != ("pipeline", "errors")
    ]

    assert not wrong


@pytest.mark.parametrize("path", INSIDE_CAPABILITIES, ids=lambda p: str(p.relative_to(ROOT)))
def test_capabilities_do_not_import_each_other(path: Path) -> None:
    capability = path.relative_to(ROOT).parts[1]
    others = {
        target[1]
        for target in our_imports(path)
        if target[0] == "pipeline"
        and len(target) > 1
        and (ROOT / "pipeline" / target[1]).is_dir()
        and target[1] not in SERVING | {capability}
    }

    assert not others


@pytest.mark.parametrize("name", LIGHT)
def test_the_light_modules_import_nothing_heavy_at_the_top(name: str) -> None:
    assert not top_level_imports(ROOT / "pipeline" / f"{name}.py") & HEAVY


def test_main_imports_only_the_standard_library() -> None:
    assert top_level_imports(ROOT / "__main__.py") <= set(sys.stdlib_module_names) | {"__future__"}


@pytest.mark.parametrize("arguments", [["--help"], ["run", "no-such-recipe"], ["schema"]])
def test_help_and_a_bad_recipe_load_nothing_heavy(arguments: list[str]) -> None:
    code = (
        "import sys\n"
        "from edgestill.pipeline.cli import entry\n"
        f"entry({arguments!r})\n"
        f"print('LOADED', sorted(set(sys.modules) & {HEAVY!r}))"
    )

    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True)

    assert "LOADED []" in done.stdout, done.stdout[-500:] + done.stderr[-2000:]


def test_importing_the_package_loads_nothing_heavy() -> None:
    code = f"import sys, edgestill; print(sorted(set(sys.modules) & {HEAVY!r}))"

    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True)

    assert done.stdout.strip() == "[]"
