"""`compress run` as a user meets it: what comes out, what never comes out, what survives a kill."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest

COMMAND = [sys.executable, "-P", "-m", "edgestill"]
STAGES = ["data", "teacher", "labels", "student", "export", "int8", "export-teacher", "choice",
          "verify", "latency"]  # fmt: skip


def published(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()} - {".edgestill"}


@pytest.fixture
def copy_of_run(small_run: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(small_run, tmp_path / "out"))


def test_a_passed_run_leaves_exactly_the_promised_files(small_run: Path) -> None:
    assert published(small_run) == {
        "model.onnx", "model.fp32.onnx", "student.safetensors", "student.json", "recipe.yaml",
        "report.json", "report.md", "samples.parquet", "training.jsonl", "manifest.json",
    }  # fmt: skip


def test_the_report_follows_the_published_schema(small_run: Path, compress: Any) -> None:
    schema = json.loads(compress("schema", "report").stdout)

    jsonschema.validate(json.loads((small_run / "report.json").read_text()), schema)


def test_the_report_covers_every_stage_model_and_row(small_run: Path) -> None:
    report = json.loads((small_run / "report.json").read_text())

    assert [stage["name"] for stage in report["stages"]] == STAGES[:-1]
    assert [model["role"] for model in report["models"]] == ["teacher", "student", "float", "int8"]
    assert {row["name"] for row in report["latency"]} == {
        "teacher-onnx", "float", "int8", "student", "teacher",
    }  # fmt: skip
    assert all(len(row["raw_ns"]) == 3 for row in report["latency"])
    assert report["parity"]
    assert report["model_sha256"] == sha256(small_run / "model.onnx")


def test_the_model_runs_on_raw_digits_by_its_metadata_alone(small_run: Path) -> None:
    import onnxruntime as ort
    from sklearn.datasets import load_digits

    session = ort.InferenceSession(small_run / "model.onnx", providers=["CPUExecutionProvider"])
    about = session.get_modelmeta().custom_metadata_map
    spec = json.loads(about["edgestill.preprocess"])
    names = json.loads(about["edgestill.class_names"])
    digits = load_digits()

    x = digits.images[:, None].astype(np.float32) / spec["max_value"]
    x = (x - np.float32(spec["mean"][0])) / np.float32(spec["std"][0])
    (logits,) = session.run(None, {"input": x.astype(np.float32)})

    assert names == [str(name) for name in digits.target_names]
    assert (logits.argmax(1) == digits.target).mean() > 0.85


def test_nothing_of_this_machine_is_in_the_model(small_run: Path, small_recipe: Path) -> None:
    content = (small_run / "model.onnx").read_bytes()

    for word in (str(small_run), str(small_recipe.parent), str(Path.home()), "site-packages"):
        assert word.encode() not in content


def test_a_second_run_recalls_every_stage_and_gives_the_same_bytes(
    copy_of_run: Path, small_recipe: Path, compress: Any
) -> None:
    before = sha256(copy_of_run / "model.onnx")

    done = compress("run", small_recipe, "-o", copy_of_run)

    assert done.returncode == 0
    assert done.stdout.count("recalled") == len(STAGES) - 1  # latency is always measured anew
    assert sha256(copy_of_run / "model.onnx") == before


@pytest.mark.parametrize("stage", STAGES)
def test_a_run_killed_in_a_stage_ends_with_the_same_bytes(
    stage: str, small_run: Path, small_recipe: Path, tmp_path: Path, compress: Any
) -> None:
    # without `profile` the run is shorter, and it is no part of the model
    faster = [] if stage in ("export-teacher", "latency") else ["--set", "profile=null"]
    out = tmp_path / "out"
    command = ["run", str(small_recipe), "-o", str(out), *faster]

    assert killed_in(stage, command)
    assert not (out / "model.onnx").exists()
    done = compress(*command)

    assert done.returncode == 0, done.stdout + done.stderr
    assert candidates(out) == candidates(small_run)
    assert sha256(out / "model.onnx") in candidates(out)


def killed_in(stage: str, command: list[str]) -> bool:
    """SIGKILL the run a moment after it says that it is in `stage`. False: it ended before."""
    process = subprocess.Popen(
        [*COMMAND, *command, "--log-json"],
        stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
    )  # fmt: skip
    assert process.stdout is not None
    with process.stdout:
        for line in process.stdout:
            event = json.loads(line)
            is_epoch = event["kind"] == "epoch" and event["stage"] == stage
            if is_epoch or (event["kind"] == "stage-started" and event["stage"] == stage
                            and stage not in ("teacher", "student")):  # fmt: skip
                threading.Event().wait(0.05)
                process.send_signal(signal.SIGKILL)
                break
    return process.wait() == -signal.SIGKILL


def test_ctrl_c_is_130_and_keeps_what_is_done(
    small_recipe: Path, tmp_path: Path, compress: Any
) -> None:
    process = subprocess.Popen(
        [*COMMAND, "run", str(small_recipe), "-o", str(tmp_path / "out"), "--log-json"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        # a suite in the background inherits an ignored SIGINT, which a terminal's user does not
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )  # fmt: skip
    assert process.stdout is not None
    assert process.stderr is not None
    with process.stdout, process.stderr:
        for line in process.stdout:
            if json.loads(line)["kind"] == "epoch":
                process.send_signal(signal.SIGINT)
                break
        process.stdout.read()
        complaint = process.stderr.read()

    assert process.wait() == 130
    assert "Traceback" not in complaint
    assert (tmp_path / "out" / ".edgestill" / "stages" / "data").is_dir()
    assert not (tmp_path / "out" / "model.onnx").exists()


def test_an_impossible_gate_rejects_and_withdraws_the_former_model(
    copy_of_run: Path, small_recipe: Path, compress: Any
) -> None:
    assert (copy_of_run / "model.onnx").exists()

    done = compress("run", small_recipe, "-o", copy_of_run, "--set", "gate.min_speedup=1000000")

    assert done.returncode == 1, done.stdout
    assert (copy_of_run / "rejected.onnx").exists()
    assert not (copy_of_run / "model.onnx").exists()
    assert "FAIL" in done.stdout


def test_the_ort_file_ships_with_the_model_retrains_nothing_and_is_withdrawn_with_it(
    copy_of_run: Path, small_recipe: Path, compress: Any
) -> None:
    mobile = {"model.ort", "model.required_operators.config"}
    model = sha256(copy_of_run / "model.onnx")
    wish = ["run", small_recipe, "-o", copy_of_run, "--set", "export.format=[onnx,ort]"]

    passed = compress(*wish, "--set", "profile=null")
    shipped, judged = published(copy_of_run), compress("gate", copy_of_run).returncode
    unchanged = sha256(copy_of_run / "model.onnx") == model
    rejected = compress(*wish, "--set", "profile=null", "--set", "gate.max_bytes=1")

    assert (passed.returncode, judged, rejected.returncode) == (0, 0, 1), rejected.stderr
    assert passed.stdout.count("recalled") == len(STAGES) - 2  # no teacher's file without profile
    assert unchanged
    assert mobile <= shipped
    assert not mobile & published(copy_of_run)


def test_a_student_without_a_teacher_beside_it_retrains_nothing(
    copy_of_run: Path, small_recipe: Path, compress: Any
) -> None:
    wish = ["--set", "distill.baseline=true", "--set", "profile=null"]

    done = compress("run", small_recipe, "-o", copy_of_run, *wish)

    assert done.returncode == 0, done.stderr
    assert re.search(r"^baseline +[0-9.]+ % ", done.stdout, re.MULTILINE)
    recalled = re.findall(r"^  (\S+) +recalled$", done.stdout, re.MULTILINE)
    assert recalled == ["data", "teacher", "labels", "student"]  # the file names its recipe


def test_a_run_that_dies_leaves_no_former_model(
    copy_of_run: Path, small_recipe: Path, compress: Any
) -> None:
    done = compress("run", small_recipe, "-o", copy_of_run, "--set", "teacher.min_accuracy=0.99999")

    assert done.returncode == 2
    assert published(copy_of_run) == set()


def test_a_test_set_too_small_is_inconclusive_and_names_n(
    copy_of_run: Path, small_recipe: Path, compress: Any
) -> None:
    # the drop of a file against its own network is 0, so no limit is exceeded; 54 samples prove 4.8
    alone = ["--set", "teacher=null", "--set", "distill=null", "--set", "student.train.epochs=4",
             "--set", "quantize=null"]  # fmt: skip
    small = ["--set", "data.test.fraction=0.03", "--set", "gate.max_drop_points=3"]
    done = compress("run", small_recipe, "-o", copy_of_run, *alone, *small)

    assert "only a model better than its reference could pass" in done.stdout
    assert "test samples would decide" in done.stdout
    assert done.returncode == 3, done.stdout
    assert (copy_of_run / "rejected.onnx").exists()
    assert not (copy_of_run / "model.onnx").exists()


def test_the_gate_judges_again_with_another_policy_and_renames_nothing(
    copy_of_run: Path, tmp_path: Path, compress: Any
) -> None:
    policy = tmp_path / "policy.yaml"
    policy.write_text("max_drop_points: 20\nmin_speedup: 1000000\n")
    before = published(copy_of_run)

    assert compress("gate", copy_of_run).returncode == 0
    strict = compress("gate", copy_of_run, "--policy", policy, "--json")

    assert strict.returncode == 1
    assert json.loads(strict.stdout)["outcome"] == "fail"
    assert published(copy_of_run) == before


@pytest.mark.parametrize("name", ["model.onnx", "report.json", "samples.parquet", "recipe.yaml"])
def test_a_changed_or_missing_file_is_an_integrity_failure(
    name: str, copy_of_run: Path, compress: Any
) -> None:
    path = copy_of_run / name
    path.write_bytes(path.read_bytes() + b" ")
    changed = compress("gate", copy_of_run)
    path.unlink()
    missing = compress("gate", copy_of_run)

    assert (changed.returncode, missing.returncode) == (6, 6)
    assert name in changed.stderr
    assert "Traceback" not in changed.stderr + missing.stderr


def test_samples_that_contradict_the_report_are_an_integrity_failure(
    copy_of_run: Path, compress: Any
) -> None:
    # somebody edits the record and repairs the manifest, but forgets one of the two
    report = copy_of_run / "report.json"
    record = json.loads(report.read_text())
    record["pairs"][0]["lost"] += 1
    report.write_text(json.dumps(record))
    manifest = json.loads((copy_of_run / "manifest.json").read_text())
    manifest["sha256"]["report.json"] = sha256(report)
    (copy_of_run / "manifest.json").write_text(json.dumps(manifest))

    done = compress("gate", copy_of_run)

    assert done.returncode == 6
    assert "samples.parquet" in done.stderr


def test_a_gate_on_what_was_not_measured_is_a_user_error(
    copy_of_run: Path, small_recipe: Path, tmp_path: Path, compress: Any
) -> None:
    compress("run", small_recipe, "-o", copy_of_run, "--set", "profile=null")
    policy = tmp_path / "policy.yaml"
    policy.write_text("min_speedup: 2\n")

    done = compress("gate", copy_of_run, "--policy", policy)

    assert done.returncode == 2
    assert "measured no latency" in done.stderr


def test_a_second_run_in_a_busy_folder_is_refused(
    small_recipe: Path, tmp_path: Path, compress: Any
) -> None:
    out = tmp_path / "out"
    first = subprocess.Popen(
        [*COMMAND, "run", str(small_recipe), "-o", str(out), "--log-json"],
        stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
    )  # fmt: skip
    assert first.stdout is not None
    with first.stdout:
        next(line for line in first.stdout if json.loads(line)["kind"] == "stage-started")
        second = compress("run", small_recipe, "-o", out)
        os.kill(first.pid, signal.SIGKILL)
    first.wait()

    assert second.returncode == 2
    assert f"process {first.pid}" in second.stderr


def test_quiet_prints_the_verdict_alone(
    copy_of_run: Path, small_recipe: Path, compress: Any
) -> None:
    done = compress("run", small_recipe, "-o", copy_of_run, "-q")

    assert done.stdout.splitlines() == [f"PASS {copy_of_run / 'model.onnx'}"]


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def candidates(out: Path) -> tuple[str, str]:
    """The float and the int8 file that a run made. Which of them ships rests on times."""
    stages = out / ".edgestill" / "stages"
    (floating,), (int8,) = stages.glob("export/*/model.onnx"), stages.glob("int8/*/model.onnx")
    return sha256(floating), sha256(int8)


USER_NET = """\
from models.blocks import block
from torch import nn


def build(num_classes, in_channels, width=24):
    return nn.Sequential(
        block(in_channels, width), block(width, width), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Linear(width, num_classes),
    )
"""
USER_BLOCKS = """\
from torch import nn


def block(inputs, outputs):
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, 3, padding=1), nn.BatchNorm2d(outputs), nn.ReLU()
    )
"""


def test_a_user_folder_with_its_own_models_package_works_from_any_directory(
    small_recipe: Path, tmp_path: Path, compress: Any
) -> None:
    work = tmp_path / "work"
    (work / "models").mkdir(parents=True)
    (work / "models" / "__init__.py").write_text("")
    (work / "models" / "blocks.py").write_text(USER_BLOCKS)
    (work / "net.py").write_text(USER_NET)
    recipe = small_recipe.read_text().replace("model: plain_cnn_small\n  args: {width: 2.0}",
                                              "model: net.py:build")  # fmt: skip
    (work / "recipe.yaml").write_text(recipe)
    repository = Path(__file__).resolve().parent.parent

    made = []
    for name, start in (("own", work), ("repository", repository)):
        done = compress("run", work / "recipe.yaml", "-o", tmp_path / name, "-q", cwd=start)
        assert done.returncode in (0, 1, 3), done.stderr
        made.append(candidates(tmp_path / name))

    assert made[0] == made[1]
    assert not list(work.rglob("__pycache__"))


def test_the_report_reads_as_markdown_with_every_section(small_run: Path, compress: Any) -> None:
    done = compress("report", small_run)

    assert done.returncode == 0
    text, _, last = done.stdout.rstrip().rpartition("\n")
    assert text.rstrip() == (small_run / "report.md").read_text().rstrip()
    digest = hashlib.sha256((small_run / "manifest.json").read_bytes()).hexdigest()
    assert digest in last
    for title in ("# edgestill report: PASS", "## Models", "## Latency", "## Parity", "## Classes",
                  "## Provenance"):  # fmt: skip
        assert title in done.stdout


def test_json_lines_are_json_and_end_with_the_verdict(
    copy_of_run: Path, small_recipe: Path, compress: Any
) -> None:
    done = compress("run", small_recipe, "-o", copy_of_run, "--log-json")

    events = [json.loads(line) for line in done.stdout.splitlines()]
    assert events[-1]["kind"] == "verdict"
    assert events[-1]["outcome"] == "pass"
