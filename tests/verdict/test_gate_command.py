"""`compress gate`: what it prints, writes and exits with, whatever it is given."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
from lxml import etree

GATE = Callable[..., int]
STRICT = "max_drop_points: 0.3\n"  # of 1000 samples with 3 lost and 2 gained: drop 0.1, bound 0.56
UNDER_THE_DROP = "max_drop_points: 0.05\n"


@pytest.fixture
def policy(tmp_path: Path) -> Path:
    path = tmp_path / "release.yaml"
    path.write_text(STRICT)
    return path


@pytest.mark.parametrize(
    ("text", "code"), [("max_drop_points: 3\n", 0), (STRICT, 3), (UNDER_THE_DROP, 1)]
)
def test_the_exit_code_is_the_verdict(
    text: str, code: int, run_folder: Path, policy: Path, gate: GATE
) -> None:
    policy.write_text(text)

    assert gate(run_folder, "--policy", policy) == code


def test_json_is_all_of_it_and_nothing_else_is_on_stdout(
    run_folder: Path,
    policy: Path,
    gate: GATE,
    releases: ModuleType,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert gate(run_folder, "--policy", policy, "--json", "--github") == 3

    found = json.loads(capsys.readouterr().out)
    assert (found["outcome"], found["exit_code"], found["policy"]) == (
        "inconclusive", 3, "release.yaml",
    )  # fmt: skip
    assert found["manifest_sha256"] == releases.sha256(run_folder / "manifest.json")
    assert found["model_sha256"] == releases.sha256(run_folder / "model.onnx")
    assert found["recipe_sha256"] == releases.sha256(run_folder / "recipe.yaml")
    assert found["manifest_vouched_by"] == []


def test_inconclusive_warn_exits_0_and_still_says_inconclusive(
    run_folder: Path, policy: Path, gate: GATE, capsys: pytest.CaptureFixture[str]
) -> None:
    assert gate(run_folder, "--policy", policy, "--inconclusive", "warn") == 0

    assert "verdict: INCONCLUSIVE (exit 0)" in capsys.readouterr().out


def test_inconclusive_fail_replaces_the_policys_warn(
    run_folder: Path, policy: Path, gate: GATE
) -> None:
    policy.write_text(f"{STRICT}inconclusive: warn\n")

    assert gate(run_folder, "--policy", policy) == 0
    assert gate(run_folder, "--policy", policy, "--inconclusive", "fail") == 3


def test_a_gate_that_failed_is_not_let_through_by_warn(
    run_folder: Path, policy: Path, gate: GATE
) -> None:
    policy.write_text(UNDER_THE_DROP)

    assert gate(run_folder, "--policy", policy, "--inconclusive", "warn") == 1


def test_explain_prints_the_check_and_keeps_the_exit_code(
    run_folder: Path, policy: Path, gate: GATE, capsys: pytest.CaptureFixture[str]
) -> None:
    assert gate(run_folder, "--policy", policy, "--explain", "max_drop_points") == 3

    out = capsys.readouterr().out
    assert "What would change it:" in out
    assert "3 lost, 2 gained" in out


def test_every_check_that_comes_out_can_be_explained(
    run_folder: Path, gate: GATE, capsys: pytest.CaptureFixture[str]
) -> None:
    gate(run_folder, "--json")
    names = [check["name"] for check in json.loads(capsys.readouterr().out)["checks"]]

    assert len(names) >= 2
    assert [gate(run_folder, "--explain", name) for name in names] == [0] * len(names)


def test_an_unknown_check_is_a_user_error_with_the_names_there_are(
    run_folder: Path, gate: GATE, capsys: pytest.CaptureFixture[str]
) -> None:
    assert gate(run_folder, "--explain", "max_drop_point") == 2

    assert "did you mean max_drop_points?" in capsys.readouterr().err


def test_markdown_and_junit_are_written(
    run_folder: Path, policy: Path, tmp_path: Path, gate: GATE
) -> None:
    markdown, junit = tmp_path / "gate.md", tmp_path / "gate.xml"

    gate(run_folder, "--policy", policy, "--markdown", markdown, "--junit", junit)

    assert "INCONCLUSIVE (exit 3)" in markdown.read_text()
    assert etree.parse(junit).getroot().get("failures") == "1"


def test_what_is_written_of_a_refusal_replaces_what_an_earlier_gate_wrote(
    run_folder: Path, tmp_path: Path, gate: GATE
) -> None:
    views = ("--markdown", tmp_path / "gate.md", "--junit", tmp_path / "gate.xml")
    assert gate(run_folder, *views) == 0
    (run_folder / "model.onnx").write_bytes(b"")

    assert gate(run_folder, *views) == 6
    assert "nothing judged (exit 6)" in (tmp_path / "gate.md").read_text()
    assert etree.parse(tmp_path / "gate.xml").getroot().get("errors") == "1"


def test_a_crash_leaves_no_view_of_yesterday(
    run_folder: Path, tmp_path: Path, gate: GATE, monkeypatch: pytest.MonkeyPatch
) -> None:
    view = tmp_path / "gate.md"
    view.write_text("## edgestill gate: PASS (exit 0)\n")
    monkeypatch.setattr("edgestill.pipeline.rejudge.judge", lambda *_: 1 / 0)

    with pytest.raises(ZeroDivisionError):
        gate(run_folder, "--markdown", view)

    assert not view.exists()


@pytest.mark.parametrize(
    "target", ["out/report.md", "out/model.onnx", "release.yaml", "no/such.md", "out", "link"]
)
def test_a_view_is_never_written_over_what_is_read_or_what_is_no_file(
    target: str, run_folder: Path, policy: Path, tmp_path: Path, gate: GATE
) -> None:
    (tmp_path / "link").symlink_to("/dev/stdout")
    before = {path: path.read_bytes() for path in run_folder.iterdir()}

    assert gate(run_folder, "--policy", policy, "--markdown", tmp_path / target) == 2
    assert {path: path.read_bytes() for path in run_folder.iterdir()} == before
    assert policy.read_text() == STRICT
    assert (tmp_path / "link").is_symlink()


def test_a_view_may_stand_beside_the_run(run_folder: Path, gate: GATE) -> None:
    assert gate(run_folder, "--markdown", run_folder / "gate.md") == 0
    assert gate(run_folder, "--markdown", run_folder / "gate.md") == 0


@pytest.mark.parametrize(
    "options",
    [
        ("--json", "--explain", "parity"),
        ("--signature", "a.sig"),
        ("--public-key", "a.pub"),
        ("--baseline-manifest-sha256", "0" * 64),
        ("--markdown", "x", "--junit", "x"),
        ("--inconclusive", "pass"),
        ("--policy", "no-such.yaml"),
        ("--baseline", "no-such-folder"),
        ("--nonsense",),
    ],
    ids=" ".join,
)
def test_options_that_make_no_sense_are_user_errors(
    options: tuple[str, ...], run_folder: Path, gate: GATE
) -> None:
    assert gate(run_folder, *options) == 2


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "empty"),
        ("max_drop_point: 1\n", "did you mean `max_drop_points`?"),
        ("max_drop_points: 1\nmax_drop_points: 9\n", "written twice"),
        ("max_drop_points: -1\n", "release.yaml:1"),
        ("max_drop_points: .nan\n", "release.yaml:1"),
        ("max_drop_points: null\n", "judges nothing"),
        ("confidence: 0.1\n", "release.yaml:1"),
        ("- max_drop_points\n", "list"),
        ("baseline: {max_drop_points: 1}\n", "--baseline"),
        ("\x00", "YAML"),
    ],
)
def test_a_policy_that_is_wrong_is_never_a_pass(
    text: str, said: str, run_folder: Path, policy: Path, gate: GATE,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    policy.write_text(text)

    assert gate(run_folder, "--policy", policy) == 2
    assert said in capsys.readouterr().err


def test_code_that_the_folder_names_is_not_run_on_its_own_word(
    releases: ModuleType, tmp_path: Path, gate: GATE
) -> None:
    own = tmp_path / "own.py"
    ran = tmp_path / "ran"
    lines = [
        "import pathlib",
        f"pathlib.Path({str(ran)!r}).touch()",
        "def metric(labels, answers):",
    ]
    own.write_text("\n".join([*lines, "    return 1.0"]))
    limits = {"metrics": [{"metric": f"{own}:metric", "max_drop_points": 3}]}
    folder = releases.make_release(tmp_path / "out", gate=limits)
    known = releases.sha256(folder / "manifest.json")

    assert gate(folder) == 2
    assert not ran.exists()
    assert gate(folder, "--manifest-sha256", known) in (0, 3)
    assert ran.exists()


def test_a_gate_in_the_recipe_that_is_none_is_an_integrity_failure(
    run_folder: Path, releases: ModuleType, gate: GATE, policy: Path
) -> None:
    recipe = json.loads((run_folder / "report.json").read_text())["recipe"] | {"gate": {"x": 1}}
    releases.edit_report(run_folder, recipe=recipe)
    (run_folder / "recipe.yaml").write_text(json.dumps(recipe))
    releases.renew_manifest(run_folder)

    assert gate(run_folder) == 6
    assert gate(run_folder, "--policy", policy) == 3


def test_a_folder_that_holds_no_run_is_a_user_error(
    tmp_path: Path, run_folder: Path, gate: GATE, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "empty").mkdir()
    (run_folder / "manifest.json").unlink()

    codes = [gate(path) for path in (tmp_path / "none", tmp_path / "empty", run_folder)]

    assert codes == [2, 2, 2]
    assert "holds no finished run" in capsys.readouterr().err


def test_a_release_of_another_test_set_is_no_baseline(
    run_folder: Path, policy: Path, tmp_path: Path, releases: ModuleType, gate: GATE,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    old = releases.make_release(tmp_path / "old", test_set=1, n=500)
    policy.write_text("max_drop_points: 3\nbaseline: {max_drop_points: 3}\n")

    assert gate(run_folder, "--policy", policy, "--baseline", old) == 4

    out = capsys.readouterr().out
    assert "500" in out
    assert "1000" in out.replace(",", "")


def test_a_baseline_is_compared_and_shown(
    run_folder: Path, policy: Path, tmp_path: Path, releases: ModuleType, gate: GATE
) -> None:
    old = releases.make_release(tmp_path / "old", lost=2)
    policy.write_text("max_drop_points: 3\nbaseline: {max_drop_points: 3}\n")

    code = gate(
        run_folder, "--policy", policy, "--baseline", old, "--markdown", tmp_path / "gate.md"
    )

    assert code == 0
    text = (tmp_path / "gate.md").read_text()
    assert "Against the last release" in text
    assert releases.sha256(old / "manifest.json") in text


def test_a_report_of_a_newer_version_is_told_apart_from_a_broken_one(
    run_folder: Path, releases: ModuleType, gate: GATE, capsys: pytest.CaptureFixture[str]
) -> None:
    releases.edit_report(run_folder, schema_version="edgestill-report/9", novelty=1)
    releases.renew_manifest(run_folder)

    assert gate(run_folder) == 6
    assert "use the edgestill that wrote it, or a newer one" in capsys.readouterr().err


def test_report_prints_the_hash_that_the_gate_may_be_given(
    run_folder: Path, releases: ModuleType, gate: GATE, capsys: pytest.CaptureFixture[str]
) -> None:
    from edgestill.pipeline.cli import entry

    assert entry(["report", str(run_folder)]) == 0
    known = capsys.readouterr().out.split("`")[-2]

    assert gate(run_folder, "--manifest-sha256", known) == 0


@pytest.mark.parametrize("written", [str.upper, "sha256:{}".format, " {} ".format])
def test_the_hash_may_be_written_as_tools_print_it(
    written: Callable[[str], str], run_folder: Path, releases: ModuleType, gate: GATE
) -> None:
    known = releases.sha256(run_folder / "manifest.json")

    assert gate(run_folder, "--manifest-sha256", written(known)) == 0


@pytest.mark.parametrize("given", ["", "abc", "0" * 63, "g" * 64])
def test_a_hash_that_is_none_is_a_user_error_and_not_the_same_as_no_hash(
    given: str, run_folder: Path, gate: GATE
) -> None:
    assert gate(run_folder, "--manifest-sha256", given) == 2


@pytest.mark.parametrize("log_json", [True, False])
def test_a_run_ends_with_the_hash_that_the_gate_may_be_given(
    log_json: bool, run_folder: Path, releases: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    from edgestill.pipeline.console import Console
    from edgestill.pipeline.release import read_release

    found = read_release(run_folder)
    with Console(log_json=log_json) as console:
        console.verdict(found.report, where="out/model.onnx", manifest_sha256="ab" * 32)

    assert capsys.readouterr().out.count("ab" * 32) == 1


# A machine that judges need not be one that trains.
CHILD = """\
import sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("torch", "onnx", "onnxruntime", "transformers", "onnxsim"):
            raise ImportError(f"{name} is not to be imported here")
sys.meta_path.insert(0, Refuse())
from edgestill.pipeline.cli import entry
sys.exit(entry(sys.argv[1:]))
"""


def test_ten_thousand_samples_are_judged_without_torch_onnx_or_onnxruntime(
    releases: ModuleType, tmp_path: Path
) -> None:
    new = releases.make_release(tmp_path / "new", n=10_000, lost=30)
    old = releases.make_release(tmp_path / "old", n=10_000, lost=20)
    policy = tmp_path / "policy.yaml"
    policy.write_text(
        "max_drop_points: 3\nmax_quantization_drop_points: 3\nmin_speedup: 1.5\nmax_bytes: 99999\n"
        "baseline: {max_drop_points: 3}\n"
    )
    views = ("--github", "--markdown", tmp_path / "m.md", "--junit", tmp_path / "j.xml")

    done = subprocess.run(
        [sys.executable, "-P", "-c", CHILD, "gate", *map(str, (new, "--policy", policy)),
         "--baseline", str(old), *map(str, views)],
        capture_output=True, text=True,
    )  # fmt: skip

    assert done.returncode == 0, done.stdout + done.stderr
    assert "PASS (exit 0)" in (tmp_path / "m.md").read_text()


def test_a_copy_elsewhere_is_judged_the_same(
    run_folder: Path, tmp_path: Path, gate: GATE, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = shutil.copytree(run_folder, tmp_path / "elsewhere")

    said = []
    for folder in (run_folder, copy):
        gate(folder, "--json")
        said.append(capsys.readouterr().out)

    assert said[0] == said[1]
