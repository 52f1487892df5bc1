"""`compress profile` and `compress devices` as a user calls them, with few launches."""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import onnx
import pytest
from edgestill.pipeline.cli import entry
from edgestill.pipeline.measure.turns import Sample, Setting
from edgestill.pipeline.profile import measure
from edgestill.pipeline.profile.figures import agreement, drift_percent_per_minute, outliers
from edgestill.pipeline.profile.inputs import Fed, noise, signature_of
from edgestill.pipeline.profile.local import measuring_here
from edgestill.pipeline.profile.measure import settings_for
from edgestill.pipeline.profile.perf_test import parse
from edgestill.pipeline.profile.record import ProfileRecord
from onnx import TensorProto, helper

Save = Callable[..., Path]

PERF_TEST = """\
Session creation time cost: 0.0102016 s
First inference time cost: 2 ms
Average inference time cost: 1.85739 ms
Peak working set size: 36696064 bytes
Runs:100
Min Latency: 0.00183404 s
P50 Latency: 0.00185674 s
P90 Latency: 0.00187215 s
P999 Latency: 0.00190312 s
"""


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))  # of a lock that no other test takes
    monkeypatch.setitem(measure.AMOUNT, "quick", (2, 12, 0.0))
    return tmp_path


def profiled(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, dict[str, Any]]:
    code = entry(["profile", "linear.onnx", "--quick", "--json", *arguments])
    return code, json.loads(capsys.readouterr().out)


def devices_file(workplace: Path, loopback, **fields: object) -> None:
    device = loopback.device(**fields).model_dump(mode="json", exclude_none=True)
    (workplace / "devices.yaml").write_text(json.dumps({"devices": {"pi": device}}))


def test_this_machine_and_a_board_stand_in_one_record_beside_one_that_fails(
    workplace: Path, loopback, save_linear: Save, capsys: pytest.CaptureFixture[str]
) -> None:
    save_linear()
    devices_file(workplace, loopback)
    text = json.loads((workplace / "devices.yaml").read_text())
    text["devices"]["gone"] = {**text["devices"]["pi"], "port": 1}
    (workplace / "devices.yaml").write_text(json.dumps(text))

    code, record = profiled(
        capsys, "--device", "local", "--device", "pi", "--device", "gone", "-o", "out"
    )

    local, board, gone = record["devices"]
    assert code == 5
    assert [one["name"] for one in record["devices"]] == ["local", "pi", "gone"]
    assert [row["latency"]["device"] for row in local["rows"] + board["rows"]] == ["local", "pi"]
    assert all(one["rows"][0]["latency"]["n"] == 24 for one in (local, board))
    assert board["answers"] == {
        "reference": "this machine", "n": 16, "same_class": 16, "max_abs": 0.0, "agree": True,
    }  # fmt: skip
    assert "does not answer" in gone["error"]
    assert not gone["rows"]
    assert json.loads((workplace / "out/profile.json").read_text()) == record
    jsonschema.validate(record, ProfileRecord.model_json_schema(mode="serialization"))
    markdown = (workplace / "out/profile.md").read_text()
    assert "NOISE, not real inputs" in markdown
    assert "gone: FAILED" in markdown
    assert loopback.left_behind() == []


def test_a_board_that_answers_wrongly_has_no_figures(
    workplace: Path, loopback, save_linear: Save, capsys: pytest.CaptureFixture[str]
) -> None:
    save_linear()
    (workplace / "onnxruntime.py").write_text(
        "import os, sys\nsys.path.remove(os.path.dirname(__file__))\n"
        "del sys.modules['onnxruntime']\nimport onnxruntime, numpy\nreal = onnxruntime\n"
        "class Wrong(real.InferenceSession):\n"
        "    def run(self, *a, **k):\n"
        "        return [numpy.roll(one, 1, axis=-1) for one in super().run(*a, **k)]\n"
        "real.InferenceSession = Wrong\n"
    )
    python = workplace / "python"
    python.write_text(f'#!/bin/sh\nPYTHONPATH={workplace} exec {sys.executable} "$@"\n')
    python.chmod(0o755)
    devices_file(workplace, loopback, python=str(python))

    code, record = profiled(capsys, "--device", "pi")

    (device,) = record["devices"]
    assert (code, device["error"]) == (4, None)
    assert device["rows"] == []
    assert device["validity"] == "invalid"
    assert [one["code"] for one in device["findings"] if one["severity"] == "invalid"] == ["WRONG"]


def test_an_older_file_is_measured_in_turns_and_a_pace_beside_the_loop(
    workplace: Path, save_linear: Save, capsys: pytest.CaptureFixture[str]
) -> None:
    save_linear()
    save_linear("old.onnx", seed=2)

    _, record = profiled(capsys, "--baseline", "old.onnx", "--rate", "200", "--sustained", "1s")

    model, baseline = record["devices"][0]["rows"]
    low, high = model["speedup"][1:]
    assert [model["latency"]["name"], baseline["latency"]["name"]] == ["model", "baseline"]
    assert low <= model["speedup"][0] <= high
    assert baseline["speedup"] is None
    assert model["paced"]["rate_hz"] == 200
    assert model["paced"]["ratio"] > 0
    assert model["sustained"]["seconds"] >= 1
    assert model["cold_load_ms"] > 0


def test_a_board_without_python_is_measured_by_onnxruntime_s_own_program(
    workplace: Path, loopback, save_linear: Save, capsys: pytest.CaptureFixture[str]
) -> None:
    save_linear()
    program = workplace / "perf_test"
    program.write_text(f'#!/bin/sh\nfor f; do :; done\n[ -s "$f" ] && cat <<E\n{PERF_TEST}E\n')
    program.chmod(0o755)
    devices_file(workplace, loopback, python="/none", perf_test=str(program))

    code, record = profiled(capsys, "--device", "pi")

    (device,) = record["devices"]
    assert code == 0
    assert device["perf_test"]["p50_ms"] == pytest.approx(1.85674)
    assert device["perf_test"]["launches"] == 2
    assert device["validity"] == "noisy"  # nobody saw its answers
    assert [one["code"] for one in device["findings"]] == ["UNSEEN"]


def test_a_program_that_prints_something_else_is_no_result() -> None:
    from edgestill.pipeline.errors import RuntimeFailure

    assert parse(PERF_TEST).p50_s == pytest.approx(0.00185674)
    with pytest.raises(RuntimeFailure, match="P50 Latency"):
        parse(PERF_TEST.replace("P50", "P51"))


def test_an_emulated_board_agrees_and_its_time_is_no_latency(
    workplace: Path, save_linear: Save, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    if not os.environ.get("EDGESTILL_ARM_SYSROOT"):
        pytest.skip("needs EDGESTILL_ARM_SYSROOT, a folder that scripts/arm_sysroot built")
    monkeypatch.setattr(measure, "EMULATED_LAUNCHES", 2)
    save_linear()

    code = entry(["profile", "linear.onnx", "--device", "a72-emulated", "-o", "out"])

    shown = capsys.readouterr().out
    (device,) = json.loads((workplace / "out/profile.json").read_text())["devices"]
    assert code == 0
    assert device["rows"][0]["latency"]["measured_on"] == "emulated"
    assert device["int8_kernels"].startswith("NEON without dotprod")
    assert device["answers"]["same_class"] == 16
    assert shown.count("emulated, not latency") >= 2


def test_a_board_of_another_architecture_is_measured_over_ssh(
    workplace: Path, loopback, save_linear: Save, capsys: pytest.CaptureFixture[str]
) -> None:
    sysroot = os.environ.get("EDGESTILL_ARM_SYSROOT")
    if not sysroot:
        pytest.skip("needs EDGESTILL_ARM_SYSROOT, a folder that scripts/arm_sysroot built")
    python = workplace / "python"
    python.write_text(f'#!/bin/sh\nexec {sysroot}/run pi4 "$@"\n')
    python.chmod(0o755)
    devices_file(workplace, loopback, python=str(python))
    save_linear()

    _, record = profiled(capsys, "--device", "pi")

    (device,) = record["devices"]
    assert device["environment"]["machine"]["arch"] == "aarch64"
    assert device["answers"]["same_class"] == 16
    assert loopback.left_behind() == []


def test_two_measurements_of_this_machine_do_not_run_at_once(
    workplace: Path, save_linear: Save, capsys: pytest.CaptureFixture[str]
) -> None:
    save_linear()

    with measuring_here():
        code, record = profiled(capsys)

    assert code == 2
    assert "another measurement runs on this machine" in record["devices"][0]["error"]
    assert profiled(capsys)[0] == 0


def test_check_says_what_a_board_is_and_that_a_model_is_too_new(
    workplace: Path, loopback, save_linear: Save, capsys: pytest.CaptureFixture[str]
) -> None:
    python = workplace / "python"
    python.write_text(
        '#!/bin/sh\ncase "$*" in *survey*) exec '
        f'{sys.executable} "$@" ;; *) echo 2.0.0 1.17.3 ;; esac\n'
    )
    python.chmod(0o755)
    devices_file(workplace, loopback, python=str(python))
    save_linear(opset=21)

    code = entry(["devices", "check", "pi", "--model", "linear.onnx", "--threads", "4096"])

    shown = capsys.readouterr().out
    assert code == 5
    for word in ("CPU  ", "int8 kernels", "memory", "onnxruntime   1.17.3"):
        assert word in shown
    assert "opset 21, onnxruntime 1.17.3 reads up to 20" in shown
    assert "CGROUP: 4096 threads on" in shown


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["linear.onnx", "--device", "pi5"], 2, "device 'pi5': expected one of local"),
        (["none.onnx"], 2, "none.onnx: no such file"),
        (["linear.onnx", "--threads", "two"], 2, "--threads: expected numbers"),
        (["linear.onnx", "--threads", "4096", "--quick"], 4, "4096 threads on"),
        (["linear.onnx", "--quick", "--affinity", "4095"], 2, "--affinity: expected some of the"),
        (["linear.onnx", "--threads", "2", "--affinity", "0"], 4, "2 threads on 1 CPUs"),
        (["linear.onnx", "--sustained", "soon"], 2, "--sustained: expected a time"),
        (["linear.onnx", "--inputs", "few.npy"], 2, "at least 8 to rotate, got 3"),
        (["linear.onnx", "--inputs", "wide.npy"], 2, r"expected float32 \(N, 1, 4, 4\)"),
        (["linear.onnx", "--inputs", "nan.npy"], 2, "holds NaN or infinity"),
        (["linear.onnx", "--quick", "--strict"], 2, "contradicts --strict"),
    ],
)
def test_a_mistake_is_named(
    workplace: Path, save_linear: Save, capsys: pytest.CaptureFixture[str], arguments: list[str],
    code: int, message: str,
) -> None:  # fmt: skip
    save_linear()
    right = np.zeros((9, 1, 4, 4), np.float32)
    np.save("few.npy", right[:3])
    np.save("wide.npy", np.zeros((9, 1, 4, 5), np.float32))
    np.save("nan.npy", right * np.nan)

    found = entry(["profile", *arguments])

    shown = capsys.readouterr()
    assert found == code
    assert re.search(message, shown.err + shown.out)


def test_golden_inputs_beside_the_file_are_taken_and_its_answers_held_against_theirs(
    workplace: Path, save_linear: Save, inputs: dict[str, np.ndarray],
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    model = save_linear()
    weight = np.random.default_rng(1).normal(size=(16, 3)).astype(np.float32)
    logits = inputs["input"].reshape(16, -1) @ weight
    write_golden(model, inputs, logits)

    _, right = profiled(capsys)
    write_golden(model, inputs, np.roll(logits, 1, axis=1))
    code, wrong = profiled(capsys)

    assert right["inputs"]["source"] == "golden"
    assert right["devices"][0]["answers"]["reference"] == "golden"
    assert right["devices"][0]["rows"]
    assert code == 4
    assert wrong["devices"][0]["rows"] == []


def write_golden(model: Path, inputs: dict[str, np.ndarray], logits: np.ndarray) -> None:
    from edgestill.pipeline.verify import replay
    from edgestill.pipeline.workspace import file_sha256

    folder = model.parent
    np.savez(folder / replay.INPUTS, **inputs)
    np.save(folder / replay.OUTPUTS, logits.astype(np.float32))
    document: dict[str, Any] = {
        "schema_version": replay.SCHEMA,
        "model": {"sha256": file_sha256(model), "int8": False},
        "files": {name: file_sha256(folder / name) for name in (replay.INPUTS, replay.OUTPUTS)},
    }
    document["golden_sha256"] = replay.canonical_sha256(document)
    (folder / replay.GOLDEN).write_text(json.dumps(document))


def test_agreement_is_of_classes_and_of_other_outputs_by_size() -> None:
    logits = np.eye(100, 4, dtype=np.float32)
    turned = logits.copy()
    turned[:2] = np.roll(turned[:2], 1, axis=1)

    assert agreement(logits, logits) == (100, 0.0, True)
    assert agreement(logits, turned) == (98, 1.0, True)
    assert agreement(logits, np.roll(logits, 1, axis=1))[2] is False
    assert agreement(logits, logits * np.nan)[2] is False
    assert agreement(logits, logits[:, :3])[2] is False
    image = np.ones((2, 1, 3, 3), np.float32)
    assert agreement(image, image * 1.04)[::2] == (None, True)
    assert agreement(image, image * 1.06)[::2] == (None, False)


def test_outliers_are_tukey_s() -> None:
    calm = [100, 101, 102, 103] * 10  # with one more: quartiles 101 and 103, fences at 106 and 109

    assert outliers([calm]) == (0, 0)
    assert outliers([[*calm, 107], [*calm, 200]]) == (1, 1)


def test_a_slope_is_found_and_too_short_a_measurement_has_none() -> None:
    def sample(*blocks: tuple[float, float]) -> Sample:
        empty = np.zeros((1, 1), np.float32)
        return Sample(None, Setting(1), {}, empty, empty, blocks=list(blocks))  # type: ignore[arg-type]

    rising = [(second, 1e6 * 1.1 ** (second / 60)) for second in (0.0, 20.0, 40.0, 60.0)]
    assert drift_percent_per_minute([sample(*rising)]) == pytest.approx(10.0)
    assert drift_percent_per_minute([sample(*((at / 10, ns) for at, ns in rising))]) is None


def test_a_sweep_goes_over_threads_spinning_and_kinds_of_cores() -> None:
    facts = {
        "machine": {"available_threads": 6, "affinity": [0, 1, 2, 3, 4, 5]},
        "clusters": [{"cpus": [4, 5]}, {"cpus": [0, 1, 2, 3]}],
    }
    wish = measure.Wish(
        Path("m"), signature=None, fed=None, threads=None, spinning=(True, False),  # type: ignore[arg-type]
        affinity="clusters",
    )  # fmt: skip

    found = settings_for(wish, facts)

    assert {one.threads for one in found} == {1, 2, 4, 6}
    assert Setting(2, True, (4, 5)) in found
    assert Setting(4, False, (0, 1, 2, 3)) in found
    assert all(one.affinity is None or one.threads <= len(one.affinity) for one in found)


@pytest.mark.parametrize(
    ("said", "tokens"),
    [(None, 128), ('{"max_length": 56}', 56), ('{"max_length": 512}', 128), ("[1]", 128)],
)
def test_noise_has_the_model_s_shape_and_tokens_are_ones_that_exist(
    said: str | None, tokens: int, tmp_path: Path
) -> None:
    ints = TensorProto.INT64
    names = ("input_ids", "attention_mask")
    graph = helper.make_graph(
        [helper.make_node("Add", list(names), ["sum"])],
        "text",
        [helper.make_tensor_value_info(name, ints, ["N", "S"]) for name in names],
        [helper.make_tensor_value_info("sum", ints, ["N", "S"])],
    )
    model = helper.make_model(graph)
    if said is not None:
        helper.set_model_props(model, {"edgestill.preprocess": said})
    onnx.save(model, tmp_path / "text.onnx")

    fed = noise(signature_of(tmp_path / "text.onnx"), path=tmp_path / "text.onnx")

    assert isinstance(fed, Fed)
    assert fed.source == "noise"
    assert fed.arrays["input_ids"].shape == (16, tokens)
    assert fed.arrays["input_ids"].max() < 100
    assert (fed.arrays["attention_mask"] == 1).all()
