"""The gate as CI runs it: GitHub's action and its files, GitLab's job."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import yaml
from lxml import etree

ROOT = Path(__file__).resolve().parents[2]
ACTION = yaml.safe_load((ROOT / "action.yml").read_text(encoding="utf-8"))
GITHUB = yaml.safe_load((ROOT / "ci/github-example.yml").read_text(encoding="utf-8"))
GITLAB = yaml.safe_load((ROOT / "ci/gitlab-example.yml").read_text(encoding="utf-8"))
(STEP,) = ACTION["runs"]["steps"]


@pytest.fixture
def workspace(releases: ModuleType, tmp_path: Path) -> Path:
    """What a job has after the build: `out/` and a policy in the checkout."""
    folder: Path = releases.make_release(tmp_path / "work" / "out").parent
    (folder / "release.yaml").write_text("max_drop_points: 3\n")
    return folder


Run = Callable[..., tuple[subprocess.CompletedProcess[str], dict[str, str]]]


@pytest.fixture
def step(workspace: Path, tmp_path: Path) -> Run:
    """`step(folder="out", …)`: the action's step as GitHub's runner starts it, and its outputs."""
    defaults = {name: one.get("default", "") for name, one in ACTION["inputs"].items()}

    def start(**inputs: str) -> tuple[subprocess.CompletedProcess[str], dict[str, str]]:
        given = defaults | {"python": sys.executable} | inputs
        values = {
            name: re.sub(r"\$\{\{ inputs\.([\w-]+) \}\}", lambda found: given[found[1]], text)
            for name, text in STEP["env"].items()
        }
        github = {
            "GITHUB_ACTIONS": "true",
            "GITHUB_ACTION_PATH": str(ROOT),
            "GITHUB_STEP_SUMMARY": str(tmp_path / "summary.md"),
            "GITHUB_OUTPUT": str(tmp_path / "output"),
        }
        for name in ("summary.md", "output"):
            (tmp_path / name).write_text("")
        done = subprocess.run(
            ["bash", "--noprofile", "--norc", "-eo", "pipefail", "-c", STEP["run"]],
            cwd=workspace, env=os.environ | github | values, capture_output=True, text=True,
        )  # fmt: skip
        return done, outputs((tmp_path / "output").read_text())

    return start


def outputs(text: str) -> dict[str, str]:
    """As the runner reads GITHUB_OUTPUT: NAME=VALUE, or NAME<<MARK … MARK."""
    found, lines = {}, iter(text.splitlines())
    for line in lines:
        if "<<" in line:
            name, mark = line.split("<<")
            found[name] = "\n".join(iter(lambda: next(lines), mark))
        else:
            name, _, found[name] = line.partition("=")
    return found


def annotations(done: subprocess.CompletedProcess[str]) -> list[str]:
    text = done.stdout + done.stderr
    return [line for line in text.splitlines() if line.startswith("::")]


def test_a_passed_gate_ends_with_0_and_says_so_everywhere(
    step: Run, workspace: Path, tmp_path: Path, releases: ModuleType
) -> None:
    known = releases.sha256(workspace / "out/manifest.json")
    done, found = step(
        folder="out", policy="release.yaml", baseline="out", **{"manifest-sha256": known}
    )

    assert done.returncode == 0, done.stderr
    assert found == {
        "outcome": "pass", "exit_code": "0",
        "markdown": "gate-reports/gate.md", "junit": "gate-reports/gate.xml",
    }  # fmt: skip
    summary = (tmp_path / "summary.md").read_text()
    assert "edgestill gate: PASS (exit 0)" in summary
    assert "checked by its sha256" in summary
    assert (workspace / "gate-reports/gate.md").read_text() in summary
    assert etree.parse(workspace / "gate-reports/gate.xml").getroot().get("failures") == "0"
    assert annotations(done) == []


@pytest.mark.parametrize(
    ("limit", "code", "outcome"), [("0.05", 1, "fail"), ("0.3", 3, "inconclusive")]
)
def test_a_gate_that_is_not_passed_fails_the_step_and_annotates_it(
    limit: str, code: int, outcome: str, step: Run, workspace: Path, tmp_path: Path
) -> None:  # fmt: skip
    (workspace / "release.yaml").write_text(f"max_drop_points: {limit}\n")

    done, found = step(folder="out", policy="release.yaml")

    assert done.returncode == code
    assert (found["outcome"], found["exit_code"]) == (outcome, str(code))
    assert annotations(done)[0].startswith(f"::error title={outcome}%3A max_drop_points::")
    assert f"(exit {code})" in (tmp_path / "summary.md").read_text()


def test_an_integrity_failure_is_said_everywhere_and_is_no_verdict(
    step: Run, workspace: Path, tmp_path: Path
) -> None:
    (workspace / "out/model.onnx").write_bytes(b"another")

    done, found = step(folder="out", policy="release.yaml")

    assert done.returncode == 6
    assert (found["outcome"], found["exit_code"]) == ("error", "6")
    assert annotations(done)[0].startswith("::error title=gate%3A nothing judged (exit 6)::")
    assert "nothing judged (exit 6)" in (tmp_path / "summary.md").read_text()
    assert etree.parse(workspace / "gate-reports/gate.xml").getroot().get("errors") == "1"


@pytest.mark.parametrize(
    "inputs",
    [{"folder": "none"}, {"folder": "out", "inconclusive": "perhaps"}, {"folder": "-h"}],
    ids=str,
)
def test_wrong_inputs_fail_the_step_with_2_and_leave_no_report_of_yesterday(
    inputs: dict[str, str], step: Run, workspace: Path
) -> None:
    yesterday = workspace / "gate-reports/gate.md"
    yesterday.parent.mkdir()
    yesterday.write_text("## edgestill gate: PASS (exit 0)\n")

    done, found = step(**inputs)

    assert done.returncode == 2, done.stdout + done.stderr
    assert (found["outcome"], found["exit_code"]) == ("error", "2")
    assert annotations(done)
    assert not yesterday.exists() or "nothing judged" in yesterday.read_text()


def test_an_interpreter_without_edgestill_is_no_pass(step: Run, tmp_path: Path) -> None:
    broken = tmp_path / "python"
    broken.write_text("#!/bin/sh\nexit 1\n")
    broken.chmod(0o755)

    done, found = step(folder="out", python=str(broken))

    assert done.returncode == 1
    assert found["outcome"] == "error"


def test_a_folder_called_edgestill_in_the_checkout_is_not_run(step: Run, workspace: Path) -> None:
    (workspace / "edgestill").mkdir()
    (workspace / "edgestill/__main__.py").write_text("raise SystemExit(0)\n")

    done, _ = step(folder="none")

    assert done.returncode == 2


def test_no_input_is_pasted_into_the_text_of_the_command() -> None:
    assert "inputs." not in STEP["run"]
    assert set(ACTION["inputs"]) == {
        found for text in STEP["env"].values() for found in re.findall(r"inputs\.([\w-]+)", text)
    }


def test_the_outputs_of_the_action_are_those_of_its_step() -> None:
    assert {name: one["value"] for name, one in ACTION["outputs"].items()} == {
        name: f"${{{{ steps.gate.outputs.{name} }}}}"
        for name in ("outcome", "exit_code", "markdown", "junit")
    }


def test_the_github_example_gives_the_action_what_it_takes() -> None:
    (used,) = [one for one in GITHUB["jobs"]["gate"]["steps"] if one.get("id") == "gate"]
    needed = {name for name, one in ACTION["inputs"].items() if one.get("required")}

    assert needed <= set(used["with"]) <= set(ACTION["inputs"])
    assert used["with"]["folder"] == "out"


@pytest.mark.parametrize("known", [True, False])
def test_the_gitlab_example_runs_and_leaves_what_it_names(
    known: bool, workspace: Path, tmp_path: Path, releases: ModuleType
) -> None:
    job = GITLAB["gate"]
    install, *commands = job["script"]
    assert install == "pip install edgestill"
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/python").write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
    (tmp_path / "bin/python").chmod(0o755)
    digest = releases.sha256(workspace / "out/manifest.json") if known else "0" * 64
    env = {"PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}", "MANIFEST_SHA256": digest}

    done = subprocess.run(
        ["bash", "-eo", "pipefail", "-c", "\n".join(commands)],
        cwd=workspace, env=os.environ | env, capture_output=True, text=True,
    )  # fmt: skip

    assert done.returncode == (0 if known else 6), done.stderr
    named = [*job["artifacts"]["paths"], job["artifacts"]["reports"]["junit"]]
    assert all((workspace / name).is_file() for name in named)
