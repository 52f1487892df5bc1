"""Why a model is not faster: what takes the time, the bound of the machine, and each rule."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from edgestill.pipeline.cli import entry
from edgestill.pipeline.errors import ExportError
from edgestill.pipeline.profile import measure, roofline, rules
from edgestill.pipeline.profile.advice import Explanation, as_text, explain
from edgestill.pipeline.profile.operators import Operator, Operators, operators_of
from edgestill.pipeline.profile.roofline import Roofline, cache_path, roofline_of_this_machine
from edgestill.pipeline.profile.rules import RULES, Facts, advise
from onnx import TensorProto, helper, numpy_helper

# Of no machine: 10^12 and 10^11 multiply-adds a second, 10^11 and 10^10 bytes a second.
PEAKS = Roofline(
    cpu="none", onnxruntime="none", threads=1, float_multiply_adds_per_s=1e11,
    int8_multiply_adds_per_s=1e12, copies=((1 << 18, 1e11), (1 << 27, 1e10)),
)  # fmt: skip
SIDE = 24


class Net:
    """A graph (N, 16, SIDE, SIDE) → … → output, written node by node."""

    def __init__(self, *shape: int | str, kind: int = TensorProto.FLOAT) -> None:
        self.shape = shape or ("N", 16, SIDE, SIDE)
        self.kind = kind
        self.nodes: list[onnx.NodeProto] = []
        self.stored: list[TensorProto] = []
        self.last = "input"

    def add(self, op: str, *more: str, **attributes: object) -> Net:
        name = f"{op}_{len(self.nodes)}"
        self.nodes.append(helper.make_node(op, [self.last, *more], [f"{name}_out"], name,
                                           **attributes))  # fmt: skip
        self.last = f"{name}_out"
        return self

    def store(self, name: str, values: Any) -> str:
        self.stored.append(numpy_helper.from_array(values, name))
        return name

    def qdq(self) -> Net:
        tag = f"q{len(self.nodes)}"
        scale = self.store(f"{tag}_scale", np.float32(0.05))
        zero = self.store(f"{tag}_zero", np.array(0, np.uint8))
        return self.add("QuantizeLinear", scale, zero).add("DequantizeLinear", scale, zero)

    def weight(self, *shape: int, int8: bool) -> str:
        values, name = np.random.default_rng(0).integers(-60, 60, shape), f"w{len(self.nodes)}"
        if not int8:
            return self.store(name, (values * 0.001).astype(np.float32))
        stored = self.store(name, values.astype(np.int8))
        scale = self.store(f"{name}_scale", np.float32(0.001))
        zero = self.store(f"{name}_zero", np.array(0, np.int8))
        node = helper.make_node("DequantizeLinear", [stored, scale, zero], [f"{name}_dq"],
                                f"{name}_dq")  # fmt: skip
        self.nodes.append(node)
        return f"{name}_dq"

    def conv(self, size: int = 3, *, out: int = 16, into: int = 16, group: int = 1,
             int8: bool = False) -> Net:  # fmt: skip
        weight = self.weight(out, into // group, size, size, int8=int8)
        return self.add("Conv", weight, group=group, pads=[size // 2] * 4)

    def int8(self, *middle: str) -> Net:
        """Conv → middle → Conv, each between Q and DQ."""
        self.qdq().conv(int8=True)
        for op in middle:
            self.qdq().add(op)
        return self.qdq().conv(int8=True).qdq()

    def save(self, path: Path) -> Path:
        graph = helper.make_graph(
            self.nodes,
            "net",
            [helper.make_tensor_value_info("input", self.kind, self.shape)],
            [helper.make_tensor_value_info(self.last, TensorProto.FLOAT, None)],
            self.stored,
        )
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)])
        model.ir_version = 8
        onnx.save(model, path)
        return path


def profiled(net: Net, folder: Path, *shape: int, integers: bool = False) -> Operators:
    size = (8, *(shape or (16, SIDE, SIDE)))
    rng = np.random.default_rng(0)
    array = rng.integers(0, 50, size) if integers else rng.normal(size=size).astype(np.float32)
    return operators_of(net.save(folder / "net.onnx"), {"input": array}, threads=1)


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("edgestill.pipeline.profile.operators.SECONDS", 0.01)


def of_op(found: Operators, op: str) -> list[Operator]:
    return [node for node in found.nodes if node.op == op and node.kind != "conversion"]


def test_a_blocked_convolution_is_led_back_to_its_node_with_its_own_multiply_adds(
    tmp_path: Path,
) -> None:
    found = profiled(Net().conv().add("Relu").conv(out=20), tmp_path)

    first, second = [node for node in found.nodes if node.is_product]
    assert [first.name, second.name] == ["Conv_0", "Conv_2"]
    assert first.multiply_adds == SIDE * SIDE * 16 * 16 * 9
    assert second.multiply_adds == SIDE * SIDE * 20 * 16 * 9  # 32 in a layout blocked by 16
    assert second.weight_shape == (20, 16, 3, 3)


def test_a_blocked_pooling_is_led_back_too_and_what_only_reorders_is_itself(
    tmp_path: Path,
) -> None:
    found = profiled(Net().conv().add("MaxPool", kernel_shape=[2, 2]), tmp_path)

    assert ("MaxPool_1", "MaxPool") in [(node.name, node.op) for node in found.nodes]
    assert all(node.op == node.kernel.removeprefix("nchwc.") for node in found.nodes)


def test_what_leaves_the_graph_in_float_is_no_island(tmp_path: Path) -> None:
    found = profiled(Net().int8().add("HardSwish"), tmp_path)

    assert of_op(found, "HardSwish")
    assert not any(node.island for node in found.nodes)


def test_bytes_are_those_of_weights_and_of_activations_in_and_out(tmp_path: Path) -> None:
    net = Net("N", 32)
    (found,) = profiled(net.add("MatMul", net.weight(32, 8, int8=False)), tmp_path, 32).nodes

    assert found.weight_bytes == 4 * 32 * 8  # packed by the runtime before the first run
    assert found.moved_bytes == 4 * (32 + 8)
    assert found.multiply_adds == 32 * 8


def test_int8_nodes_are_told_from_float_ones_which_say_why(tmp_path: Path) -> None:
    found = profiled(Net().int8("HardSwish"), tmp_path)

    assert [node.kind for node in of_op(found, "Conv") if node.is_product] == ["int8", "int8"]
    (swish,) = {(node.name, node.kind, node.island) for node in of_op(found, "HardSwish")}
    assert swish == ("HardSwish_6", "float", True)
    assert all("no int8 kernel" in str(node.reason) for node in of_op(found, "HardSwish"))


def test_what_reads_the_float_result_of_an_int8_product_is_float(tmp_path: Path) -> None:
    net = Net("N", 16).qdq()
    found = profiled(net.add("Gemm", net.weight(16, 16, int8=True)).add("Tanh"), tmp_path, 16)

    assert [(one.kernel, one.kind) for one in found.nodes[-2:]] == [
        ("QGemm", "int8"), ("Tanh", "float"),
    ]  # fmt: skip


def test_inputs_of_another_shape_are_named_as_the_mistake(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=r"net\.onnx"):
        profiled(Net().conv(), tmp_path, 3, 5, 5)


# Rule → a net on which it speaks, and one, as like as may be, on which it does not.
SPEAKS: dict[str, tuple[Callable[[], Net], Callable[[], Net]]] = {
    "float": (lambda: Net().conv().conv(), lambda: Net().int8()),
    "float-products": (
        lambda: Net().int8().conv(5),
        lambda: Net().int8().conv(5, int8=True).qdq(),
    ),
    "float-activations": (lambda: Net().int8("HardSwish"), lambda: Net().int8()),
    "float-islands": (
        lambda: Net().int8("GlobalMaxPool", "Softplus"),
        lambda: Net().int8("HardSwish"),
    ),
    "conversions": (
        lambda: Net().int8().conv(5).add("Tanh").qdq().conv(5, int8=True).qdq(),
        lambda: Net().int8("HardSwish"),  # those around an island are that rule's
    ),
    "depthwise": (lambda: Net().conv().conv(5, group=16), lambda: Net().conv().conv(5, group=2)),
    "reordering": (
        lambda: Net().conv().add("Transpose", perm=[0, 1, 3, 2]).conv(),
        lambda: Net().conv().conv(),
    ),
    "odd-channels": (
        lambda: Net().conv(out=9).conv(into=9).conv(),
        lambda: Net().conv(out=8).conv(into=8).conv(out=9),  # the last ones are the classes
    ),
}


@pytest.mark.parametrize("rule", SPEAKS)
def test_a_rule_speaks_where_its_cause_is(rule: str, tmp_path: Path) -> None:
    found = RULES[rule](Facts(profiled(SPEAKS[rule][0](), tmp_path), PEAKS))

    assert found is not None
    assert found.rule == rule
    assert 0 <= found.gain <= found.share <= 1


@pytest.mark.parametrize("rule", SPEAKS)
def test_a_rule_is_silent_where_its_cause_is_not(rule: str, tmp_path: Path) -> None:
    assert RULES[rule](Facts(profiled(SPEAKS[rule][1](), tmp_path), PEAKS)) is None


def lookup(rows: int) -> Net:
    net = Net("N", 12, kind=TensorProto.INT64)
    table = net.store("table", np.ones((rows, 16), np.float32))
    net.nodes.append(helper.make_node("Gather", [table, "input"], ["rows"], "embedding"))
    net.last = "rows"
    return net.add("MatMul", net.weight(16, 512, int8=False))


def test_embeddings_are_spoken_of_by_their_part_of_the_bytes(tmp_path: Path) -> None:
    large = profiled(lookup(2000), tmp_path, 12, integers=True)
    found = RULES["embeddings"](Facts(large, PEAKS))

    assert found is not None
    assert "80%" in found.text  # 2,000 rows of 16, beside 16 by 512


def test_no_embeddings_are_spoken_of_where_nothing_is_looked_up(tmp_path: Path) -> None:
    assert RULES["embeddings"](Facts(profiled(Net().conv(), tmp_path), PEAKS)) is None


def node(**fields: Any) -> Operator:
    about: dict[str, Any] = {
        "name": "n", "op": "Add", "kernel": "Add", "kind": "float", "us": 1.0, "multiply_adds": 0,
        "is_product": False, "weight_shape": (), "groups": 1, "weight_bytes": 0, "moved_bytes": 8,
        "table_bytes": 0, "is_last": False, "reason": None, "island": False, "beside": None,
    }  # fmt: skip
    return Operator(**(about | fields))


def facts(*nodes: Operator, **more: Any) -> Facts:
    return Facts(Operators(nodes=nodes, runs=1, is_quantized=False), PEAKS, **more)


def test_many_tiny_nodes_are_spoken_of_and_few_or_long_ones_are_not() -> None:
    rule = RULES["tiny-nodes"]

    assert rule(facts(*[node()] * rules.TINY_NODES)) is not None
    assert rule(facts(*[node()] * (rules.TINY_NODES - 1))) is None
    assert rule(facts(*[node(us=rules.TINY_US)] * 50)) is None


@pytest.mark.parametrize(
    ("by_threads", "speaks"),
    [({1: 1.0, 2: 1.1}, True), ({1: 1.0, 2: 0.7}, False), ({1: 1.0, 2: 1.01}, False),
     ({2: 1.1}, False)],
)  # fmt: skip
def test_more_threads_are_spoken_of_only_where_they_are_slower(
    by_threads: dict[int, float], speaks: bool
) -> None:
    found = RULES["threads"](facts(node(), threads=2, by_threads=by_threads))

    assert (found is not None) is speaks
    assert found is None or found.gain == pytest.approx(1 - 1 / 1.1)


def test_every_rule_has_its_tests() -> None:
    assert set(RULES) == set(SPEAKS) | {"embeddings", "tiny-nodes", "threads"}


def test_the_three_that_gain_most_come_first_and_no_more() -> None:
    found = advise(
        facts(
            node(is_product=True, us=50, weight_shape=(9, 8, 3, 3), multiply_adds=100),
            node(kernel="Transpose", op="Transpose", us=30),
            node(table_bytes=8, op="Gather", us=20),
            threads=2,
            by_threads={1: 0.5, 2: 1.0},
        )
    )

    assert [one.rule for one in found] == ["threads", "float", "reordering"]
    assert [one.gain for one in found] == [0.5, pytest.approx(0.45), 0.3]


def test_the_bound_of_a_node_is_the_longer_of_computing_and_reading() -> None:
    seconds = PEAKS.seconds

    assert seconds(
        multiply_adds=10**9, int8=True, weight_bytes=0, all_weights=0, moved=1000
    ) == pytest.approx(1e-3)
    assert seconds(
        multiply_adds=10**9, int8=False, weight_bytes=0, all_weights=0, moved=1000
    ) == pytest.approx(1e-2)
    # weights of a model beyond the caches come as fast as memory gives them, activations faster
    assert seconds(
        multiply_adds=1, int8=True, weight_bytes=10**5, all_weights=10**8, moved=10**5
    ) == pytest.approx(1e-5 + 1e-6)


def test_a_small_set_measured_slower_than_a_large_one_was_disturbed() -> None:
    peaks = PEAKS.model_copy(update={"copies": ((100, 1.0), (1000, 5.0), (10_000, 2.0))})

    assert [peaks.bytes_per_s(size) for size in (50, 500, 5000, 10**6)] == [5.0, 5.0, 2.0, 2.0]


@pytest.fixture
def small_peaks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(roofline, "SIDE", 64)
    monkeypatch.setattr(roofline, "GEMM_SECONDS", 0.01)
    monkeypatch.setattr(roofline, "COPY_SECONDS", 0.005)
    monkeypatch.setattr(roofline, "COPY_BYTES", (1 << 16, 1 << 18))
    monkeypatch.setattr(roofline, "busy", lambda conditions: [])


@pytest.mark.usefixtures("small_peaks")
def test_the_roofline_is_measured_once_and_again_only_when_asked() -> None:
    first = roofline_of_this_machine(threads=1)

    assert roofline_of_this_machine(threads=1) == first
    assert roofline_of_this_machine(threads=1, fresh=True) != first
    assert roofline_of_this_machine(threads=2).threads == 2


@pytest.mark.usefixtures("small_peaks")
@pytest.mark.parametrize(
    "content", ["", "{}", PEAKS.model_copy(update={"version": 0}).model_dump_json()]
)
def test_a_stored_roofline_that_is_none_is_measured_again(content: str) -> None:
    path = cache_path(threads=1)
    path.parent.mkdir(parents=True)
    path.write_text(content)

    assert roofline_of_this_machine(threads=1).version == roofline.VERSION
    assert path.read_text() != content


@pytest.mark.usefixtures("small_peaks")
def test_peaks_measured_beside_others_are_said_to_be_and_not_kept(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(roofline, "busy", lambda conditions: ["BG"])

    found = roofline_of_this_machine(threads=1)

    assert not cache_path(threads=1).exists()
    shown = as_text(explained(tmp_path, 1.0).model_copy(update={"roofline": found}))
    assert "others used the CPUs" in shown


@pytest.mark.usefixtures("small_peaks")
def test_a_cache_that_cannot_be_written_is_no_failure(tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file where the folder would be")

    assert roofline_of_this_machine(threads=1).float_multiply_adds_per_s > 0


def explained(tmp_path: Path, p50_ms: float) -> Explanation:
    model = Net().conv().conv().save(tmp_path / "net.onnx")
    inputs = {"input": np.ones((8, 16, SIDE, SIDE), np.float32)}
    return explain(model, inputs, threads=1, by_threads={1: p50_ms}, roofline=PEAKS)


def test_the_share_of_the_bound_is_the_bound_over_p50(tmp_path: Path) -> None:
    found = explained(tmp_path, 1.0)

    assert found.bound_ms >= 2 * SIDE * SIDE * 16 * 16 * 9 / 1e11 * 1e3
    assert found.share_of_bound == pytest.approx(found.bound_ms / 1.0)
    assert "1. all 2 products run in float" in as_text(found)


def test_more_than_the_bound_is_said_to_be_of_peaks_too_low(tmp_path: Path) -> None:
    assert "--fresh" in as_text(explained(tmp_path, 1e-6))
    assert "--fresh" not in as_text(explained(tmp_path, 1.0))


@pytest.mark.usefixtures("small_peaks")
def test_the_command_says_why_in_text_in_json_and_in_the_file(
    tmp_path: Path,
    save_linear: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    monkeypatch.setitem(measure.AMOUNT, "quick", (2, 12, 0.0))
    save_linear()

    entry(["profile", "linear.onnx", "--quick", "--why", "-o", "out"])
    shown = capsys.readouterr().out

    written = json.loads((tmp_path / "out/profile.json").read_text())
    assert "why not faster, 1 threads" in shown
    assert "## why not faster" in (tmp_path / "out/profile.md").read_text()
    (row,) = written["devices"][0]["rows"]
    assert written["why"]["p50_ms"] == row["latency"]["p50_ms"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--fresh"], "add --why"),
        (["--why", "--affinity", "0"], "without --affinity"),
        (["--why", "--device", "pi5"], "add --device local"),
    ],
)
def test_what_why_cannot_tell_is_refused(
    arguments: list[str], message: str, save_linear: Callable[..., Path],
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    code = entry(["profile", str(save_linear()), *arguments])

    assert code == 2
    assert message in capsys.readouterr().err
