"""Text encoders: heads, FFN units and layers leave, and what remains computes what it must."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from edgestill.exporters.reference import evaluating
from edgestill.models.plan import Skip, all_sizes, extend_plan, head_count
from edgestill.models.source import open_network
from edgestill.models.store import load_network, save_network
from edgestill.pipeline.data.dataset import open_data
from edgestill.pipeline.data.inputs import to_input
from edgestill.pipeline.data.stage import prepare_data
from edgestill.pipeline.distill.joints import join
from edgestill.pipeline.errors import RecipeError
from edgestill.pipeline.learning import check_recovery
from edgestill.pipeline.prune.blocks import find_blocks, without
from edgestill.pipeline.prune.cost import count_multiply_adds
from edgestill.pipeline.prune.cut import cut
from edgestill.pipeline.prune.example import example_of
from edgestill.pipeline.prune.protect import find_protected
from edgestill.pipeline.prune.stage import check_prunable, prune
from edgestill.pipeline.prune.trace import Group, find_groups, kept_places, lost_places
from edgestill.pipeline.recipe import DataSpec, PruneSpec
from edgestill.pipeline.stage import Context, Silent
from edgestill.pipeline.strategy import choose
from edgestill.pipeline.training_spec import DistillSpec, HardSpec, HiddenSpec, RelationsSpec
from torch import Tensor, nn

transformers = pytest.importorskip("transformers")
hf_text = pytest.importorskip("edgestill.models.hf_text")

SIZES = {"vocab_size": 50, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4,
         "intermediate_size": 48, "max_position_embeddings": 40}  # fmt: skip
DISTIL = {"vocab_size": 50, "dim": 32, "n_layers": 3, "n_heads": 4, "hidden_dim": 48,
          "max_position_embeddings": 40}  # fmt: skip
# kind → its options, and where its layers are
KINDS: dict[str, tuple[dict[str, Any], str]] = {
    "bert": (SIZES, "network.bert.encoder.layer"),
    "roberta": (SIZES, "network.roberta.encoder.layer"),
    "electra": ({**SIZES, "embedding_size": 16}, "network.electra.encoder.layer"),
    "distilbert": (DISTIL, "network.distilbert.transformer.layer"),
}


def encoder(kind: str = "bert", **options: Any) -> Any:
    """A classifier of tokens with weights of its own, large enough that no head is idle."""
    sizes = KINDS[kind][0] if kind in KINDS else SIZES
    config = transformers.AutoConfig.for_model(kind, **sizes | options)
    made = transformers.AutoModelForSequenceClassification
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        network = made.from_config(config, attn_implementation="eager").eval()
        for parameter in network.parameters():
            if parameter.ndim == 2:
                parameter.data *= 4
    return hf_text.TextClassifier(network, hf_text.ROWS[:2])


def tokens(count: int = 2, length: int = 12, *, seed: int = 0) -> Tensor:
    """Texts of arbitrary words; the last is padded behind its half."""
    generator = torch.Generator().manual_seed(seed)
    made = torch.randint(3, 50, (count, 2, length), generator=generator)
    made[:, 1] = 1
    made[-1, :, length // 2 :] = 0
    made[-1, 0, length // 2 :] = 1
    return made


def run(network: nn.Module, inputs: Tensor) -> Tensor:
    with torch.no_grad(), evaluating(network):
        logits: Tensor = network(inputs)
    return logits


def zeroed(network: nn.Module, groups: tuple[Group, ...], kept: dict[str, Tensor]) -> nn.Module:
    """The dense network with rows and biases of what writes the lost units at zero.

    GELU, tanh and ReLU of 0 are 0, and a head whose values are 0 adds nothing, whatever it attends
    to: so this is exact.
    """
    silent = copy.deepcopy(network)
    with torch.no_grad():
        for (path, side), index in lost_places(groups, kept).items():
            if side == "out":
                for parameter in silent.get_submodule(path).parameters():
                    parameter[index] = 0
    return silent


def halved(network: nn.Module, protect: tuple[str, ...] = ()) -> tuple[nn.Module, nn.Module]:
    """The network without every other unit, and the dense one with those at zero."""
    groups = find_groups(network, tokens(), protect=protect).free
    kept = {group.name: torch.arange(1, group.units, 2) for group in groups}
    smaller = copy.deepcopy(network)
    cut(smaller, kept_places(network, groups, kept))
    return smaller, zeroed(network, groups, kept)


def assert_same(found: Tensor, expected: Tensor) -> None:
    """float32 sums in another order: 1e-4 of the largest logit; a wrong head moves it by 5 %."""
    limit = 1e-4 * float(expected.abs().max())
    torch.testing.assert_close(found, expected, rtol=0, atol=limit)


@pytest.mark.parametrize("kind", KINDS)
def test_pruned_encoder_equals_dense_one_with_those_heads_and_units_zeroed(kind: str) -> None:
    network, inputs = encoder(kind), tokens(6, seed=5)

    smaller, silent = halved(network)

    expected = run(silent, inputs)
    assert_same(run(smaller, inputs), expected)
    assert not torch.allclose(expected, run(network, inputs), rtol=0.01)
    layer = smaller.get_submodule(f"{KINDS[kind][1]}.0")
    linear = [part for part in layer.modules() if isinstance(part, nn.Linear)]
    assert [(part.in_features, part.out_features) for part in linear] == [
        *[(32, 16)] * 3, (16, 32), (32, 24), (24, 32),
    ]  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_heads_are_whole_and_counted_by_the_attention(kind: str) -> None:
    groups = find_groups(encoder(kind), tokens()).free

    heads = [group for group in groups if group.head_width]
    assert [(group.units, group.head_width) for group in heads] == [(4, 8)] * 3
    for group in heads:
        (third,) = [i[2].tolist() for (path, side), i in group.places.items() if side == "in"]
        assert third == list(range(16, 24))


@pytest.mark.parametrize("kind", KINDS)
def test_encoder_without_a_layer_equals_one_that_never_had_it(kind: str) -> None:
    network, inputs = encoder(kind), tokens(4, seed=6)
    holder, name = KINDS[kind][1].rsplit(".", 1)

    blocks = find_blocks(network, tokens())
    smaller = without(network, [blocks[1]])

    never = copy.deepcopy(network)
    layers = getattr(never.get_submodule(holder), name)
    setattr(never.get_submodule(holder), name, nn.ModuleList([layers[0], layers[2]]))
    assert list(blocks) == [f"{KINDS[kind][1]}.{index}" for index in range(3)]
    assert torch.equal(run(smaller, inputs), run(never, inputs))


def test_padding_changes_no_answer_of_a_pruned_encoder() -> None:
    smaller, _ = halved(encoder())
    inputs = tokens(2, 12)

    alone = run(smaller, inputs[1:, :, :6])

    assert_same(run(smaller, inputs)[1:], alone)


def test_protected_attention_keeps_its_heads_and_other_units_leave() -> None:
    network = encoder()
    protect = find_protected(network, ["*.layer.1.attention.self", "*.pooler"])

    smaller, silent = halved(network, protect)

    heads = [head_count(part) for part in smaller.modules() if head_count(part)]
    assert heads == [2, 4, 2]
    assert smaller.get_submodule("network.bert.pooler.dense").out_features == 32  # type: ignore[union-attr]
    assert_same(run(smaller, tokens()), run(silent, tokens()))


def test_what_is_not_proven_is_protected_and_the_rest_is_cut() -> None:
    """DeBERTa projects a table of positions, which has no batch; its feed-forward is as BERT's."""
    network = encoder("deberta-v2", relative_attention=True, pos_att_type=["c2p", "p2c"])

    groups = find_groups(network, tokens())

    assert [group.units for group in groups.free if ".intermediate." in group.name] == [48] * 3
    assert not any("attention" in group.name for group in groups.free)
    why = {layer: one.why for one in groups.protected for layer in one.layers}
    first = "network.deberta.encoder.layer.0.attention.self"
    assert "batch axis" in why[f"{first}.pos_key_proj"]
    assert "the network fails" in why[f"{first}.query_proj"]


@pytest.mark.filterwarnings("ignore:.*nested tensors is in prototype")  # of the uncut encoder
def test_own_encoder_of_torchs_layers_is_cut_and_runs_on_padded_texts(nets: ModuleType) -> None:
    torch.manual_seed(3)
    network, inputs = nets.Words(50).eval(), tokens(6, seed=5)
    groups = {group.name: group for group in find_groups(network, tokens()).free}
    name = "encoder.layers.1.self_attn"

    cut(
        smaller := copy.deepcopy(network),
        kept_places(network, [groups[name]], {name: torch.tensor([1, 3])}),
    )

    with torch.no_grad():  # its output matrix reads heads 0 and 2, four channels each
        network.get_parameter(f"{name}.out_proj.weight")[:, [0, 1, 2, 3, 8, 9, 10, 11]] = 0
    assert set(groups) == {
        f"encoder.layers.{i}.{n}" for i in "01" for n in ("linear1", "self_attn")
    }
    assert head_count(smaller.get_submodule(name)) == 2
    assert_same(run(smaller, inputs), run(network, inputs))


@pytest.fixture(scope="module")
def told(texts: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """`.data`: the folder of a data stage; `.dense`: a stored BERT of three layers; `.opened`."""
    root = tmp_path_factory.mktemp("told")
    texts.write_csv(root / "train.csv", texts.sentences(80, seed=1))
    folder = texts.write_folder(root / "bert", num_attention_heads=4, head=True)
    (root / "data").mkdir()
    spec = DataSpec.model_validate(
        {
            "train": {"path": str(root / "train.csv")}, "test": {"fraction": 0.2},
            "validation": 0.3, "calibration": 8, "text": "text", "label": "label",
            "tokenize": {"tokenizer": str(folder / "tokenizer.json")},
        }
    )  # fmt: skip
    prepare_data(spec, context=Context(0, 1, "cpu", root / "data", Silent()))
    opened = open_data(root / "data", memory_budget_bytes=2**30)
    shape = opened.input_shape
    network = open_network(f"hf:{folder}", args={}, classes=2, input_shape=shape, seed=3)
    (root / "dense").mkdir()
    save_network(
        root / "dense", network, classes=2, input_shape=shape,
        class_names=opened.class_names, preprocess={},
    )  # fmt: skip
    return SimpleNamespace(data=root / "data", dense=root / "dense", opened=opened)


def stage(told: SimpleNamespace, folder: Path, **wish: Any) -> dict[str, Any]:
    folder.mkdir()
    return prune(
        told.dense, told.dense, told.data,
        PruneSpec.model_validate({"round_to": 4, "candidates": 5, **wish}),
        step=1, context=Context(0, 1, "cpu", folder, Silent()), memory_budget_bytes=2**30,
        sequence=6,
    )  # fmt: skip


@pytest.fixture
def untimed(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """Time is as many ms as there are parameters; holds the shapes that were timed."""
    asked: list[tuple[int, ...]] = []

    def export(network: nn.Module, inputs: Any, path: Path) -> None:
        asked.append(inputs.shape)
        path.write_text(str(sum(p.numel() for p in network.parameters())))

    def p50(paths: list[Path], _: object) -> list[float]:
        return [float(path.read_text()) for path in paths]

    for where in ("search", "stage"):
        monkeypatch.setattr(f"edgestill.pipeline.prune.{where}.export_for_timing", export)
        monkeypatch.setattr(f"edgestill.pipeline.prune.{where}.time_in_turns", p50)
    return asked


def test_networks_are_traced_on_texts_of_train_as_long_as_any(told: SimpleNamespace) -> None:
    example, opened = example_of(told.opened), told.opened

    assert example.shape == (2, *opened.input_shape)
    assert example.dtype == torch.int64
    words = set(opened.train.contents[:, 0].flatten().tolist())
    assert set(example[:, 0].flatten().tolist()) <= words | {opened.preprocess.pad_id}
    half = (opened.input_shape[1] + 1) // 2
    assert example[:, 1].sum(1).tolist() == [opened.input_shape[1], half]


@pytest.mark.parametrize("importance", ["l2", "taylor"])
def test_share_of_multiply_adds_stays_in_networks_that_load_as_they_were_left(
    told: SimpleNamespace, tmp_path: Path, untimed: list[tuple[int, ...]], importance: str
) -> None:
    record = stage(told, tmp_path / "a", macs=0.6, importance=importance)

    whole, length = record["dense"]["multiply_adds"], told.opened.input_shape[1]
    rows = {row["kept"]: row for row in record["candidates"] if row["kept"]}
    assert json.loads(json.dumps(record)) == record
    assert (record["tokens"], record["sequence"]) == (length, 6)
    assert {shape[1:] for shape in untimed} == {(2, 6)}
    assert rows
    assert all(0.3 * whole < row["multiply_adds"] <= 0.6 * whole for row in record["candidates"])
    assert {len(row["removed"]) for row in record["candidates"]} >= {0, 1}
    for number, row in rows.items():
        module = load_network(tmp_path / "a" / str(number)).network.module
        assert count_multiply_adds(module, example_of(told.opened)) == row["multiply_adds"]
        assert sum(p.numel() for p in module.parameters()) == row["parameters"]


def test_multiply_adds_are_counted_by_hand_at_the_longest_text(told: SimpleNamespace) -> None:
    network = load_network(told.dense).network.module
    s, d, f = told.opened.input_shape[1], 32, 64

    found = count_multiply_adds(network, example_of(told.opened))

    # q, k, v, o; two products of attention; the feed-forward; pooler and classifier of one token
    layer = 4 * s * d * d + 2 * s * s * d + 2 * s * d * f
    assert found == 3 * layer + d * d + 2 * d


def test_there_is_no_batchnorm_to_rank_an_encoder_by(
    told: SimpleNamespace, tmp_path: Path, untimed: list[tuple[int, ...]]
) -> None:
    with pytest.raises(RecipeError, match=r"importance: bn, but no channels.*use l2 or taylor"):
        stage(told, tmp_path / "a", macs=0.6, importance="bn")


def test_pruned_encoder_is_rebuilt_with_the_heads_and_layers_it_was_left_with(
    told: SimpleNamespace, tmp_path: Path
) -> None:
    stored = load_network(told.dense)
    dense = stored.network.module
    smaller, _ = halved(dense)
    cut(smaller, {}, removed=["network.bert.encoder.layer.1"])
    plan = extend_plan(
        None, before=all_sizes(dense), after=all_sizes(smaller),
        removed=["network.bert.encoder.layer.1"],
    )  # fmt: skip
    network = stored.network
    save_network(
        tmp_path, type(network)(smaller, network.reference, {}, trainable=True, plan=plan),
        classes=2, input_shape=stored.input_shape, class_names=stored.class_names, preprocess={},
    )  # fmt: skip

    loaded = load_network(tmp_path).network.module

    inputs = to_input(told.opened.train.contents[:5], told.opened.preprocess)
    assert torch.equal(
        run(loaded, torch.from_numpy(inputs)), run(smaller, torch.from_numpy(inputs))
    )
    for index, heads in ((0, 2), (2, 2)):
        attention: Any = loaded.get_submodule(f"network.bert.encoder.layer.{index}.attention.self")
        assert (attention.num_attention_heads, attention.all_head_size) == (heads, 8 * heads)


def test_layers_that_are_left_are_paired_with_the_teachers() -> None:
    teacher = encoder(num_hidden_layers=6)
    student = without(encoder(), ["network.bert.encoder.layer.1"])

    found = join([HiddenSpec()], student, [teacher], input_shape=(2, 10))

    layers = [path for path in found.student_paths if ".layer." in path]
    assert layers == ["network.bert.encoder.layer.0", "network.bert.encoder.layer.2"]
    assert [path[-1] for path in found.teacher_paths[0] if ".layer." in path] == ["2", "5"]


def test_relations_of_heads_that_are_left_divide_both_widths() -> None:
    teacher, student = encoder(hidden_size=48, num_attention_heads=6), encoder()
    groups = find_groups(student, tokens()).free
    kept = {group.name: torch.arange(1) for group in groups if group.head_width}
    cut(student, kept_places(student, groups, kept))

    found = join([RelationsSpec()], student, [teacher], input_shape=(2, 10))

    # of 8 and 48 channels, the most up to the teacher's 6 that divide both
    assert found.parts["relations"].count == 4


@pytest.mark.parametrize(
    ("term", "said"),
    [
        (
            RelationsSpec(heads=3),
            r"relations\.heads: 3 .* heads that are 8 wide; leave `heads` out",
        ),
        (
            HiddenSpec(student=("*.layer.1.output",), teacher=("*.layer.1",)),
            r"hidden\.student: .*layer\.1\.output is inside .*layer\.1, .*prune\.protect too",
        ),
    ],
)
def test_objective_that_pruning_may_break_is_refused_before_training(
    told: SimpleNamespace, term: Any, said: str
) -> None:
    student = load_network(told.dense).network.module
    spec = DistillSpec(objectives=(HardSpec(), term))
    groups, blocks = check_prunable(student, PruneSpec(macs=0.5), told.opened)

    with pytest.raises(RecipeError, match=said):
        check_recovery(choose(spec, is_text=True), student, groups, blocks)

    protect = PruneSpec(macs=0.5, protect=("*.layer.*",))
    check_recovery(
        choose(spec, is_text=True), student, *check_prunable(student, protect, told.opened)
    )


def test_encoder_without_any_layer_left_has_nothing_to_compare() -> None:
    student = without(encoder(), [f"network.bert.encoder.layer.{index}" for index in range(3)])

    assert sum(isinstance(part, Skip) for part in student.modules()) == 3
    with pytest.raises(RecipeError, match=r"pruning has removed every layer.*prune\.protect"):
        join([HiddenSpec()], student, [encoder()], input_shape=(2, 10))
