"""What a gate is bound to: every file of the run, and with the manifest's hash every byte of it."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

ROOT = Path(__file__).resolve().parents[2]
GATE = Callable[..., int]
FILES = ("model.onnx", "model.fp32.onnx", "recipe.yaml", "report.json", "report.md",
         "samples.parquet", "training.jsonl")  # fmt: skip


@pytest.fixture(scope="module")
def two_runs(releases: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The run that is tampered with, and another of the same recipe but its seed."""
    home = tmp_path_factory.mktemp("binding")
    one = releases.make_release(home / "one")
    return one, releases.make_release(home / "other", seed=1, lost=5)


@pytest.fixture
def folder(two_runs: tuple[Path, Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(two_runs[0], tmp_path / "out"))


def flip(path: Path, at: float) -> None:
    content = bytearray(path.read_bytes())
    content[int(at * (len(content) - 1))] ^= 1
    path.write_bytes(content)


def into_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def into_link(path: Path) -> None:
    """The same bytes, but from outside, where anybody may change them later."""
    outside = path.parent.with_name("outside")
    outside.mkdir(exist_ok=True)
    shutil.move(path, outside / path.name)
    path.symlink_to(outside / path.name)


DAMAGE: dict[str, Callable[[Path], object]] = {
    "first bit": lambda path: flip(path, 0.0),
    "a bit inside": lambda path: flip(path, 0.5),
    "last bit": lambda path: flip(path, 1.0),
    "half": lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
    "empty": lambda path: path.write_bytes(b""),
    "longer": lambda path: path.write_bytes(path.read_bytes() + b"\n"),
    "gone": lambda path: path.unlink(),
    "a folder": into_folder,
    "a link out": into_link,
}


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("name", FILES)
def test_every_file_is_held_by_the_manifest(
    name: str, damage: str, folder: Path, gate: GATE
) -> None:
    DAMAGE[damage](folder / name)

    assert gate(folder) == 6


@pytest.mark.parametrize("name", FILES)
def test_no_file_of_another_run_takes_the_place_of_its_namesake(
    name: str, folder: Path, two_runs: tuple[Path, Path], gate: GATE
) -> None:
    other = (two_runs[1] / name).read_bytes()
    if other == (folder / name).read_bytes():
        other += b"\n"
    (folder / name).write_bytes(other)

    assert gate(folder) == 6


@pytest.mark.parametrize("name", ["rejected.onnx", "tokenizer.json", "student.safetensors",
                                  "student.pt2", "golden.jsonl"])  # fmt: skip
def test_a_file_named_like_ours_that_the_run_did_not_write_is_refused(
    name: str, folder: Path, gate: GATE
) -> None:
    (folder / name).write_bytes(b"from elsewhere")

    assert gate(folder) == 6


def test_a_file_of_the_users_own_beside_the_run_is_none_of_our_business(
    folder: Path, gate: GATE
) -> None:
    (folder / "notes.txt").write_text("mine")

    assert gate(folder) == 0


def with_manifest(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], object]:
    def edit(path: Path) -> None:
        document = json.loads(path.read_text())
        change(document)
        path.write_text(json.dumps(document))

    return edit


DIGEST = "0" * 64
MANIFESTS: dict[str, Callable[[Path], object]] = {
    "empty": lambda path: path.write_bytes(b""),
    "not JSON": lambda path: path.write_text("sha256:"),
    "not UTF-8": lambda path: path.write_bytes(b'{"schema_version": "\xff"}'),
    "huge": lambda path: path.write_bytes(path.read_bytes() + b" " * (1 << 21)),
    "deep": lambda path: path.write_text("[" * 100_000),
    "a list": lambda path: path.write_text("[]"),
    "without files": with_manifest(lambda m: m.update(sha256={})),
    "without a version": with_manifest(lambda m: m.pop("schema_version")),
    "newer": with_manifest(lambda m: m.update(schema_version="edgestill-manifest/2")),
    "a path upwards": with_manifest(lambda m: m["sha256"].update({"../x": DIGEST})),
    "an absolute path": with_manifest(lambda m: m["sha256"].update({"/etc/passwd": DIGEST})),
    "a path with a backslash": with_manifest(lambda m: m["sha256"].update({"..\\x": DIGEST})),
    "an endless name": with_manifest(lambda m: m["sha256"].update({"x" * 5000: DIGEST})),
    "a name with NUL": with_manifest(lambda m: m["sha256"].update({"x\0": DIGEST})),
    "no digest": with_manifest(lambda m: m["sha256"].update({"model.onnx": None})),
    "a short digest": with_manifest(lambda m: m["sha256"].update({"model.onnx": "00"})),
    "a file that is not there": with_manifest(lambda m: m["sha256"].update({"vocab.txt": DIGEST})),
    "without the report": with_manifest(lambda m: m["sha256"].pop("report.json")),
    "without the samples": with_manifest(lambda m: m["sha256"].pop("samples.parquet")),
    "without the recipe": with_manifest(lambda m: m["sha256"].pop("recipe.yaml")),
    "without the model": with_manifest(lambda m: m["sha256"].pop("model.onnx")),
    "without a file that is there": with_manifest(lambda m: m["sha256"].pop("report.md")),
    "a name twice": lambda path: path.write_text(
        path.read_text().replace('"sha256": {', f'"sha256": {{"report.md": "{DIGEST}",')
    ),
}


@pytest.mark.parametrize("damage", MANIFESTS)
def test_a_manifest_that_is_none_is_refused(damage: str, folder: Path, gate: GATE) -> None:
    MANIFESTS[damage](folder / "manifest.json")

    assert gate(folder) == 6


@pytest.mark.parametrize(
    "damage", [name for name in MANIFESTS if "path" in name or "name with" in name]
)
def test_a_manifest_that_names_what_is_outside_is_refused_before_anything_is_opened(
    damage: str, folder: Path, gate: GATE, capsys: pytest.CaptureFixture[str]
) -> None:
    MANIFESTS[damage](folder / "manifest.json")

    gate(folder)

    assert "is no path inside the folder" in capsys.readouterr().err


def test_a_loop_of_links_is_refused(folder: Path, gate: GATE) -> None:
    (folder / "report.md").unlink()
    (folder / "report.md").symlink_to(folder / "report.md")

    assert gate(folder) == 6


def in_report(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], object]:
    def edit(folder: Path) -> None:
        path = folder / "report.json"
        document = json.loads(path.read_text())
        change(document)
        path.write_text(json.dumps(document))

    return edit


def in_recipe(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], object]:
    """The same edit in recipe.yaml and in the report's recipe."""

    def edit(folder: Path) -> None:
        in_report(lambda report: change(report["recipe"]))(folder)
        text = json.dumps(json.loads((folder / "report.json").read_text())["recipe"])
        (folder / "recipe.yaml").write_text(text)  # JSON is YAML

    return edit


def in_samples(column: str, value: object) -> Callable[[Path], object]:
    def edit(folder: Path) -> None:
        path = folder / "samples.parquet"
        table = pq.read_table(path)
        rows = table[column].to_pylist()
        rows[0] = value
        at, field = table.column_names.index(column), table.field(column)
        pq.write_table(table.set_column(at, field, pa.array(rows, field.type)), path)

    return edit


def an_id_twice(folder: Path) -> None:
    ids = pq.read_table(folder / "samples.parquet")["id"].to_pylist()
    in_samples("id", ids[1])(folder)


def better_answers(folder: Path) -> None:
    """int8's first lost sample becomes right, in the samples and in every count of it."""
    for column, value in {"int8_rank": 0, "int8_prediction": 0, "int8_p_label": 0.9}.items():
        in_samples(column, value)(folder)

    def recount(report: dict[str, Any]) -> None:
        for model in report["models"]:
            if model["role"] == "int8":
                model["correct"] += 1
                model["per_class"]["cat"][0] += 1
        for pair in report["pairs"]:
            if pair["candidate"] == "int8":
                pair["lost"] -= 1

    in_report(recount)(folder)


def other_model(folder: Path) -> None:
    (folder / "model.onnx").write_bytes((folder / "model.onnx").read_bytes()[::-1])
    digest = hashlib.sha256((folder / "model.onnx").read_bytes()).hexdigest()
    in_report(lambda report: report.update(model_sha256=digest))(folder)


def faster(folder: Path) -> None:
    """Other raw latencies, with everything that is computed from them."""
    from edgestill.pipeline.measure.latency_stats import ratio_of, summarize

    def edit(report: dict[str, Any]) -> None:
        rows = {row["name"]: row for row in report["latency"]}
        raw = [[run // 2 for run in launch] for launch in rows["int8"]["raw_ns"]]
        rows["int8"].update({"raw_ns": raw} | summarize(raw))
        report["speedup"].update(ratio_of(rows["teacher-onnx"]["raw_ns"], raw))

    in_report(edit)(folder)


def first(rows: list[dict[str, Any]], **wanted: Any) -> dict[str, Any]:
    return next(row for row in rows if wanted.items() <= row.items())


# The manifest is made anew after each of these. SEEN: the files contradict one another.
SEEN: dict[str, Callable[[Path], object]] = {
    "a lost sample less": in_report(lambda r: r["pairs"][0].update(lost=2)),
    "a gained sample more": in_report(lambda r: r["pairs"][0].update(gained=3)),
    "more samples": in_report(lambda r: [m.update(n=2000) for m in r["models"]]),
    "more right answers": in_report(lambda r: first(r["models"], role="int8").update(correct=999)),
    "a better class": in_report(
        lambda r: first(r["models"], role="int8")["per_class"].update(cat=[334, 334])
    ),
    "a class renamed": in_report(
        lambda r: first(r["models"], role="int8").update(per_class={"cow": [899, 1000]})
    ),
    "no pair": in_report(lambda r: r.update(pairs=[])),
    "no model": in_report(lambda r: r.update(models=[])),
    "a pair twice": in_report(lambda r: r["pairs"].append(r["pairs"][0])),
    "another reference": in_report(lambda r: r.update(reference="baseline")),
    "another candidate": in_report(lambda r: r["selection"].update(index=7)),
    "a smaller file": in_report(lambda r: r["file"].update(bytes=10)),
    "another model hash": in_report(lambda r: r.update(model_sha256=DIGEST)),
    "a faster p50": in_report(lambda r: r["latency"][1].update(p50_ms=0.01)),
    "a faster p90": in_report(lambda r: r["latency"][1].update(p90_ms=0.01)),
    "a steadier latency": in_report(lambda r: r["latency"][1].update(cv=0.0001)),
    "raw latencies": in_report(lambda r: r["latency"][1].update(raw_ns=[[1000] * 40] * 5)),
    "no raw latencies": in_report(lambda r: r["latency"][1].update(raw_ns=[])),
    "a larger speed-up": in_report(lambda r: r["speedup"].update(ratio=30.0)),
    "a surer speed-up": in_report(lambda r: r["speedup"].update(ci95=[3.9, 4.0])),
    "a speed-up of others": in_report(lambda r: r["speedup"].update(candidate="float")),
    "a FAIL made a PASS in name": in_report(lambda r: r["verdict"].update(outcome="fail")),
    "no verdict": in_report(lambda r: r.update(verdict=None)),
    "a recipe.yaml of its own": lambda f: (f / "recipe.yaml").write_text("gate: {}\n"),
    "a looser gate in the report": in_report(
        lambda r: r["recipe"]["gate"].update(max_drop_points=99.0)
    ),
    "recipe.yaml no YAML": lambda f: (f / "recipe.yaml").write_text("{"),
    "a newer report": in_report(lambda r: r.update(schema_version="edgestill-report/2")),
    "a key of somebody's": in_report(lambda r: r.update(mood="good")),
    "the report no JSON": lambda f: (f / "report.json").write_text("{"),
    "the report a list": lambda f: (f / "report.json").write_text("[]"),
    "the report empty": lambda f: (f / "report.json").write_bytes(b""),
    "the samples no parquet": lambda f: (f / "samples.parquet").write_bytes(b"PAR1"),
    "the samples empty": lambda f: (f / "samples.parquet").write_bytes(b""),
    "a label": in_samples("label", 1),
    "a label of no class": in_samples("label", 77),
    "a prediction": in_samples("int8_prediction", 0),
    "a rank": in_samples("int8_rank", 0),
    "a probability that is NaN": in_samples("int8_p_label", float("nan")),
    "an id twice": an_id_twice,
    "the model": lambda f: flip(f / "model.onnx", 0.5),
}

# UNSEEN without the manifest's hash: nothing else in the folder says otherwise. README lists them.
UNSEEN: dict[str, Callable[[Path], object]] = {
    "better answers in the samples, with every count of them": better_answers,
    "other raw latencies, with every figure computed from them": faster,
    "another model, with its hash": other_model,
    "a looser gate in the recipe, where no `--policy` is given": in_recipe(
        lambda recipe: recipe["gate"].update(max_drop_points=99.0)
    ),
    "figures of the parity ladder": in_report(lambda r: r["parity"][0].update(sqnr_db=99.0)),
    "what is stated in one place only: hash of the data, machine, operators, int8 share, notes":
        in_report(lambda r: r.update(
            data_sha256=DIGEST, notes=["all is well"], environment={"cpu_model": "Pi 5"},
            file=r["file"] | {"opset": 11, "ops": {}})),
    "files that the gate does not read: float model, weights, `report.md`, `training.jsonl`":
        lambda f: [(f / name).write_bytes(b"?") for name in FILES
                   if name in ("model.fp32.onnx", "report.md", "training.jsonl")],
}  # fmt: skip


@pytest.mark.parametrize("edit", [*SEEN, *UNSEEN])
def test_no_edit_passes_where_the_manifests_hash_is_known(
    edit: str, folder: Path, releases: ModuleType, gate: GATE
) -> None:
    known = releases.sha256(folder / "manifest.json")
    (SEEN | UNSEEN)[edit](folder)
    releases.renew_manifest(folder)

    assert releases.sha256(folder / "manifest.json") != known, "nothing was edited"
    assert gate(folder, "--manifest-sha256", known) == 6


@pytest.mark.parametrize("edit", SEEN)
def test_files_that_contradict_one_another_are_refused_though_the_manifest_was_made_anew(
    edit: str, folder: Path, releases: ModuleType, gate: GATE
) -> None:
    SEEN[edit](folder)
    releases.renew_manifest(folder)

    assert gate(folder) == 6


@pytest.mark.parametrize("edit", UNSEEN)
def test_what_goes_unseen_without_the_hash_is_said_in_the_readme(
    edit: str, folder: Path, releases: ModuleType, gate: GATE
) -> None:
    UNSEEN[edit](folder)
    releases.renew_manifest(folder)

    assert gate(folder) == 0
    readme = " ".join((ROOT / "README.md").read_text(encoding="utf-8").split())
    assert f"- {edit}" in readme


@pytest.mark.parametrize("name", ["model.onnx", "recipe.yaml", "report.json"])
def test_a_file_of_another_run_contradicts_the_rest_though_the_manifest_was_made_anew(
    name: str, folder: Path, two_runs: tuple[Path, Path], releases: ModuleType, gate: GATE
) -> None:
    shutil.copy(two_runs[1] / name, folder / name)
    releases.renew_manifest(folder)

    assert gate(folder) == 6


def test_another_run_whole_is_refused_where_the_hash_is_known(
    two_runs: tuple[Path, Path], releases: ModuleType, gate: GATE
) -> None:
    known = releases.sha256(two_runs[0] / "manifest.json")

    assert gate(two_runs[1]) == 0
    assert gate(two_runs[1], "--manifest-sha256", known) == 6


def test_another_baseline_is_refused_where_its_hash_is_known(
    two_runs: tuple[Path, Path], releases: ModuleType, gate: GATE
) -> None:
    one, other = two_runs
    known = ("--baseline-manifest-sha256", releases.sha256(other / "manifest.json"))

    assert gate(one, "--baseline", other, *known) == 0
    assert gate(one, "--baseline", one, *known) == 6


def test_a_rejected_run_cannot_be_renamed_into_a_passed_one(
    releases: ModuleType, tmp_path: Path, gate: GATE
) -> None:
    folder = releases.make_release(tmp_path / "out", outcome="fail")
    (folder / "rejected.onnx").rename(folder / "model.onnx")
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["sha256"]["model.onnx"] = manifest["sha256"].pop("rejected.onnx")
    (folder / "manifest.json").write_text(json.dumps(manifest))

    assert gate(folder) == 6


def test_an_ort_file_that_the_report_does_not_know_is_refused(
    folder: Path, releases: ModuleType, gate: GATE
) -> None:
    (folder / "model.ort").write_bytes(b"of somebody else")
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["sha256"]["model.ort"] = releases.sha256(folder / "model.ort")
    (folder / "manifest.json").write_text(json.dumps(manifest))

    assert gate(folder) == 6


def test_there_are_more_than_a_hundred_ways_among_these() -> None:
    assert len(FILES) * len(DAMAGE) + len(MANIFESTS) + len(SEEN) + len(UNSEEN) > 100
