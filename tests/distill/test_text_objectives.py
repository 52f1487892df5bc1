"""The objectives on tokens: each against loops in float64, its invariances, its layers, its run."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from edgestill.models.hf_text import TextClassifier
from edgestill.models.store import load_network
from edgestill.pipeline.data.augment import ViewBatch
from edgestill.pipeline.data.dataset import open_data
from edgestill.pipeline.data.stage import prepare_data
from edgestill.pipeline.distill.joints import Joints, join
from edgestill.pipeline.distill.parts import RelationHeads, TokenProjector
from edgestill.pipeline.distill.student import Lessons, train_student
from edgestill.pipeline.distill.tasks import taught as taught_course
from edgestill.pipeline.distill.teacher import prepare_teacher
from edgestill.pipeline.distill.terms import Scene, terms_of
from edgestill.pipeline.distill.text_objectives import hidden_states, relations
from edgestill.pipeline.distill.token_layers import pair_uniformly, projections
from edgestill.pipeline.errors import ModelError, RecipeError
from edgestill.pipeline.recipe import Recipe
from edgestill.pipeline.recipe_file import SHIPPED, load_recipe
from edgestill.pipeline.stage import Context, Silent
from edgestill.pipeline.strategy import choose
from edgestill.pipeline.training_spec import DistillSpec, HiddenSpec, RelationsSpec
from torch import Tensor, nn

Array = np.ndarray[Any, Any]
Loss = Callable[..., Tensor]


def draw(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def mask_of(*lengths: int, width: int) -> Tensor:
    return (torch.arange(width)[None] < torch.tensor(lengths)[:, None]).long()


def three(seed: int, *shape: int) -> list[Tensor]:
    return [draw(seed + index, *shape) for index in range(3)]


# --- formulas


def relation(states: Array, length: int, heads: int) -> Array:
    """(S, D) → (A, length, length), by loops."""
    size = states.shape[1] // heads
    found = np.zeros((heads, length, length))
    for head in range(heads):
        part = states[:, head * size : (head + 1) * size]
        for i in range(length):
            weights = [math.exp(float(part[i] @ part[j]) / math.sqrt(size)) for j in range(length)]
            found[head, i] = np.array(weights) / sum(weights)
    return found


def expected_relations(
    student: list[Tensor], teacher: list[Tensor], lengths: list[int], heads: int
) -> float:
    total = 0.0
    for mine, theirs in zip(student, teacher, strict=True):
        for text, length in enumerate(lengths):
            q = relation(mine[text].double().numpy(), length, heads)
            p = relation(theirs[text].double().numpy(), length, heads)
            total += (p * np.log(p / q)).sum() / heads / length / len(lengths)
    return total


@pytest.mark.parametrize("heads", [1, 2, 4])
def test_relations_are_the_loops_of_the_paper_between_any_two_widths(heads: int) -> None:
    student, teacher = three(0, 3, 5, 8), three(10, 3, 5, 12)
    mask = mask_of(5, 2, 1, width=5)

    found = relations(student, teacher, mask=mask, heads=heads)

    assert float(found) == pytest.approx(
        expected_relations(student, teacher, [5, 2, 1], heads), rel=1e-5
    )


def test_hidden_states_are_the_mean_over_width_tokens_and_texts() -> None:
    student, teacher = three(20, 2, 4, 3), three(30, 2, 4, 3)
    lengths, expected = [4, 2], 0.0
    for mine, theirs in zip(student, teacher, strict=True):
        off = (mine.double() - theirs.double()).numpy() ** 2
        for text, length in enumerate(lengths):
            tokens = [off[text, place].sum() / 3 for place in range(length)]
            expected += sum(tokens) / length / 2

    found = hidden_states(student, teacher, mask=mask_of(*lengths, width=4))

    assert float(found) == pytest.approx(expected, rel=1e-5)


LOSSES: dict[str, Loss] = {"hidden": hidden_states, "relations": partial(relations, heads=2)}
each_loss = pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)


def gradient(value: Callable[[Tensor], Tensor], at: Tensor) -> Tensor:
    moved = at.clone().requires_grad_()
    return torch.autograd.grad(value(moved), moved)[0]


@each_loss
def test_gradient_is_the_slope_of_the_loss(loss: Loss) -> None:
    teacher, mask, step = draw(1, 2, 3, 4), mask_of(3, 2, width=3), 1e-2
    at = draw(2, 2, 3, 4)

    def value(states: Tensor) -> Tensor:
        return loss([states], [teacher], mask=mask)

    slope = torch.zeros_like(at)
    for place in np.ndindex(*at.shape):
        shift = torch.zeros_like(at)
        shift[place] = step
        slope[place] = float(value(at + shift) - value(at - shift)) / 2 / step

    # float32 leaves about three digits of a central difference
    torch.testing.assert_close(gradient(value, at), slope, atol=1e-4, rtol=2e-2)


@each_loss
def test_what_stands_at_padding_changes_neither_value_nor_gradient(loss: Loss) -> None:
    student, teacher = three(40, 2, 6, 4), three(50, 2, 6, 4)
    mask = mask_of(6, 3, width=6)
    value, slope = value_and_gradient(loss, student, teacher, mask)
    for each in (*student, *teacher):
        each[1, 3:] = 1e4 * draw(60, 3, 4)

    moved, moved_slope = value_and_gradient(loss, student, teacher, mask)

    assert float(moved) == float(value)
    assert torch.equal(moved_slope, slope)
    assert not moved_slope[1, 3:].any()


def value_and_gradient(
    loss: Loss, student: list[Tensor], teacher: list[Tensor], mask: Tensor
) -> tuple[Tensor, Tensor]:
    first = student[0].clone().requires_grad_()
    value = loss([first, *student[1:]], teacher, mask=mask)
    return value.detach(), torch.autograd.grad(value, first)[0]


@each_loss
def test_a_text_is_worth_the_same_however_far_it_is_padded(loss: Loss) -> None:
    student, teacher = three(70, 2, 4, 4), three(80, 2, 4, 4)
    longer = [
        [nn.functional.pad(x, (0, 0, 0, 5), value=3.0) for x in s] for s in (student, teacher)
    ]

    short = loss(student, teacher, mask=mask_of(4, 2, width=4))
    padded = loss(*longer, mask=mask_of(4, 2, width=9))

    torch.testing.assert_close(padded, short, rtol=1e-6, atol=0)


@each_loss
def test_nothing_is_lost_on_the_teacher_itself_and_no_gradient_reaches_it(loss: Loss) -> None:
    student, teacher, mask = three(90, 2, 3, 4), three(95, 2, 3, 4), mask_of(3, 1, width=3)

    assert float(loss(teacher, teacher, mask=mask)) == pytest.approx(0, abs=1e-7)
    assert float(loss(student, teacher, mask=mask)) > 1e-2
    watched = [each.requires_grad_() for each in teacher]
    assert not loss(student, watched, mask=mask).requires_grad


@each_loss
def test_bfloat16_inputs_under_autocast_are_compared_in_float32(loss: Loss) -> None:
    sides = [[x.bfloat16() for x in three(seed, 2, 5, 8)] for seed in (100, 110)]
    mask = mask_of(5, 4, width=5)
    exact = loss(*([x.float() for x in side] for side in sides), mask=mask)

    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = loss(*sides, mask=mask)

    assert found.dtype == torch.float32
    assert torch.equal(found, exact)


def test_relations_do_not_see_a_rotation_within_a_head() -> None:
    teacher, mask = draw(120, 2, 4, 6), mask_of(4, 3, width=4)
    rotation = torch.linalg.qr(draw(121, 3, 3))[0]

    turned = torch.cat([teacher[..., :3] @ rotation, teacher[..., 3:]], dim=2)

    loss = relations([turned], [teacher], mask=mask, heads=2)
    assert float(loss) == pytest.approx(0, abs=1e-6)
    assert float(relations([turned], [teacher], mask=mask, heads=3)) > 1e-3


@each_loss
def test_a_text_without_a_token_is_no_number(loss: Loss) -> None:
    assert loss([draw(0, 2, 3, 4)], [draw(1, 2, 3, 4)], mask=mask_of(3, 0, width=3)).isnan()


@each_loss
@pytest.mark.parametrize(
    ("student", "teacher", "mask", "said"),
    [
        ([], [], (2, 3), "at least one; got 0 and 0"),
        ([(2, 3, 4)], [(2, 3, 4), (2, 3, 4)], (2, 3), "got 1 and 2"),
        ([(2, 3, 4)], [(1, 3, 4)], (2, 3), r"got \(1, 3, 4\) and \(2, 3\)"),
        ([(2, 3, 4)], [(2, 3, 4)], (2, 5), r"got \(2, 3, 4\) and \(2, 5\)"),
        ([(0, 3, 4)], [(0, 3, 4)], (0, 3), "N and S > 0"),
    ],
)
def test_tensors_that_do_not_belong_together_are_refused(
    loss: Loss, student: Any, teacher: Any, mask: Any, said: str
) -> None:
    sides = [[torch.zeros(shape) for shape in side] for side in (student, teacher)]

    with pytest.raises(ValueError, match=said):
        loss(*sides, mask=torch.ones(mask))


def test_widths_are_held() -> None:
    mask, narrow, wide = torch.ones(2, 3), torch.zeros(2, 3, 4), torch.zeros(2, 3, 6)

    with pytest.raises(ValueError, match=r"one shape, got \(2, 3, 4\) and \(2, 3, 6\)"):
        hidden_states([narrow], [wide], mask=mask)
    with pytest.raises(ValueError, match=r"4 heads divide, got \[6\]"):
        relations([narrow], [wide], mask=mask, heads=4)


# --- which layers

transformers = pytest.importorskip("transformers")


SIZES = {"hidden_size": 24, "num_hidden_layers": 4, "num_attention_heads": 2,
         "intermediate_size": 32, "vocab_size": 20, "max_position_embeddings": 20}  # fmt: skip
DISTIL = {"dim": 24, "n_layers": 4, "n_heads": 2, "hidden_dim": 32, "vocab_size": 20,
          "max_position_embeddings": 20}  # fmt: skip


def encoder(kind: str = "bert", **options: Any) -> nn.Module:
    sizes: dict[str, Any] = DISTIL if kind == "distilbert" else SIZES
    if kind == "mobilebert":
        sizes = sizes | {"true_hidden_size": 24, "intra_bottleneck_size": 24}
    config = transformers.AutoConfig.for_model(kind, **{**sizes, "num_labels": 2, **options})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = transformers.AutoModelForSequenceClassification.from_config(config)
    return TextClassifier(network.eval(), ("input_ids", "attention_mask"))


def joined(term: Any, student: nn.Module, teacher: nn.Module) -> Joints:
    return join([term], student, [teacher], input_shape=(2, 7))


KINDS = {
    "bert": "network.bert.encoder.layer.3.attention.self.query",
    "roberta": "network.roberta.encoder.layer.3.attention.self.query",
    "electra": "network.electra.encoder.layer.3.attention.self.query",
    "distilbert": "network.distilbert.transformer.layer.3.attention.q_lin",
    "mpnet": "network.mpnet.encoder.layer.3.attention.attn.q",
    "deberta-v2": "network.deberta.encoder.layer.3.attention.self.query_proj",
    "mobilebert": "network.mobilebert.encoder.layer.3.attention.self.query",
    "nomic_bert": "network.nomic_bert.layers.3.self_attn.q_proj",
}


@pytest.mark.parametrize("kind", KINDS)
def test_layers_and_projections_of_the_common_encoders_are_found(kind: str) -> None:
    student, teacher = encoder(hidden_size=8, num_hidden_layers=2), encoder(kind)

    tapped = joined(RelationsSpec(), student, teacher)
    layers = joined(HiddenSpec(), student, teacher)

    assert tapped.teacher_paths[0][0] == KINDS[kind]
    assert len(tapped.teacher_paths[0]) == 3
    assert tapped.student_paths[0] == "network.bert.encoder.layer.1.attention.self.query"
    assert tapped.parts["relations"].count == 2
    depth = [path.rpartition(".")[2] for path in layers.teacher_paths[0]]
    assert depth == ["embeddings", "1", "3"]


@pytest.mark.parametrize(
    ("students", "teachers", "expected"),
    [
        (4, 12, [3, 6, 9, 12]),  # TinyBERT's own
        (6, 12, [2, 4, 6, 8, 10, 12]),
        (4, 6, [2, 3, 5, 6]),
        (3, 3, [1, 2, 3]),
        (1, 6, [6]),
        (4, 2, [1, 1, 2, 2]),
    ],
)
def test_layers_are_paired_uniformly_last_with_last(
    students: int, teachers: int, expected: list[int]
) -> None:
    pairs = pair_uniformly(students, teachers)

    assert [mine + 1 for mine, _ in pairs] == list(range(1, students + 1))
    assert [theirs + 1 for _, theirs in pairs] == expected


@pytest.mark.parametrize(("depth", "layer"), [(3, 3), (12, 12), (24, 21)])
def test_a_deep_teacher_is_compared_at_an_upper_middle_layer(depth: int, layer: int) -> None:
    network = encoder(num_hidden_layers=depth, hidden_size=2, intermediate_size=2)

    assert projections(network, teaches=True, where="x")[0].split(".")[4] == str(layer - 1)
    assert projections(network, teaches=False, where="x")[0].split(".")[4] == str(depth - 1)


def test_layers_are_named_by_hand() -> None:
    layer = "network.bert.encoder.layer"
    named = HiddenSpec(student=(f"{layer}.0",), teacher=(f"{layer}.2",))
    attention = f"{layer}.1.attention.self"
    three_of = tuple(f"{attention}.{name}" for name in ("query", "key", "value"))

    assert joined(named, encoder(), encoder()).teacher_paths == ((f"{layer}.2",),)
    assert joined(RelationsSpec(teacher=three_of), encoder(), encoder()).teacher_paths == (
        three_of,
    )
    one_side = joined(HiddenSpec(student=(f"{layer}.0", f"{layer}.3")), encoder(), encoder())
    assert one_side.teacher_paths == ((f"{layer}.1", f"{layer}.3"),)


class Bare(nn.Module):
    """Layers whose attention nobody would find by name."""

    def __init__(self, width: int = 6) -> None:
        super().__init__()
        self.words = nn.Embedding(20, width)
        self.blocks = nn.ModuleList(nn.Linear(width, width) for _ in range(2))
        self.q, self.k, self.v = (nn.Linear(width, width) for _ in range(3))
        self.head = nn.Linear(width, 2)

    def forward(self, tokens: Tensor) -> Tensor:
        states = self.words(tokens[:, 0])
        for block in self.blocks:
            states = block(states)
        states = self.q(states) + self.k(states) + self.v(states)
        return self.head(states.mean(1))


def test_a_network_of_ones_own_says_what_its_projections_are() -> None:
    found = joined(
        RelationsSpec(student=("q", "k", "v"), teacher=("q", "k", "v"), heads=3), Bare(), Bare(9)
    )

    assert found.student_paths == ("q", "k", "v")
    assert joined(HiddenSpec(), Bare(), Bare(9)).student_paths == ("blocks.0", "blocks.1")


@pytest.mark.parametrize(
    ("term", "student", "teacher", "said"),
    [
        (RelationsSpec(), Bare, encoder, r"student: \[layer.query, layer.key, layer.value\]"),
        (RelationsSpec(), encoder, Bare, r"teacher: \[layer.query, layer.key, layer.value\]"),
        (RelationsSpec(), partial(encoder, hidden_size=10, num_attention_heads=1),
         partial(encoder, num_attention_heads=4), "4 relation heads .* 10, 24; .* a divisor of 2"),
        (RelationsSpec(heads=5), encoder, encoder, "5 relation heads divide not all"),
        (RelationsSpec(student=("q", "k", "v"), teacher=("q", "k", "v")), Bare, Bare,
         "does not say how many heads .* a divisor of 6"),
        (RelationsSpec(student=("q", "k")), Bare, encoder, "got 2 of the student"),
        (RelationsSpec(), encoder, partial(encoder, "deberta-v2", share_att_key=True),
         "positions as well as tokens .* use `hidden`"),
        (HiddenSpec(student=("q",), teacher=("q", "k")), Bare, Bare, "as many layers"),
        (HiddenSpec(student=("nothing",)), Bare, Bare, "no module named 'nothing'"),
        (HiddenSpec(student=("head",), teacher=("q",)), Bare, Bare, r"\(N, S, D\).*got \(N, 2\)"),
        (HiddenSpec(), partial(nn.Linear, 7, 2), Bare, "has no list of layers"),
    ],
)  # fmt: skip
def test_what_cannot_be_joined_is_said_before_training(
    term: Any, student: Callable[[], nn.Module], teacher: Callable[[], nn.Module], said: str
) -> None:
    with pytest.raises(RecipeError, match=f"^distill.objectives.{term.name}.*{said}"):
        joined(term, student(), teacher())


def test_a_layer_that_is_never_reached_is_an_error() -> None:
    with pytest.raises(ModelError, match="never fired"):
        joined(HiddenSpec(student=("blocks",), teacher=("q",)), Bare(), Bare())


def test_layers_of_two_equal_widths_share_one_matrix_which_begins_as_the_identity() -> None:
    part = TokenProjector([(4, 6), (4, 6), (6, 6)])
    states = [draw(0, 2, 3, 4), draw(1, 2, 3, 4), draw(2, 2, 3, 6)]

    found = part(states)

    assert [tuple(p.shape) for p in part.parameters()] == [(6, 4), (6, 6)]
    torch.testing.assert_close(found[1], states[1] @ next(part.parameters()).T)
    assert torch.equal(found[2], states[2])


def test_terms_leave_out_padding_and_split_into_the_heads_that_were_found() -> None:
    student, teacher, mask = three(130, 2, 5, 6), three(140, 2, 5, 6), mask_of(5, 2, width=5)
    tokens = torch.stack([torch.ones(2, 5, dtype=torch.int64), mask], dim=1)
    batch = ViewBatch(tokens, torch.zeros(2, dtype=torch.int64), None, None)
    parts = {"relations": RelationHeads(3), "hidden": TokenProjector([(6, 6)] * 3)}
    features = dict.fromkeys(parts, (student, teacher))
    scene = Scene(DistillSpec(), batch, 0, draw(0, 2, 2), draw(1, 1, 2, 2), features, parts)

    found = terms_of([RelationsSpec(), HiddenSpec()], scene)

    assert found["relations"].item() == relations(student, teacher, mask=mask, heads=3).item()
    assert found["hidden"].item() == hidden_states(student, teacher, mask=mask).item()


# --- from texts to a student


BUDGET = 2**30
TRAIN = {"epochs": 3, "lr": 2e-3, "batch_size": 16}
HARD, KD = {"name": "hard", "weight": 0.1}, {"name": "kd", "temperature": 2}


@pytest.fixture(scope="module")
def school(tmp_path_factory: pytest.TempPathFactory, texts: ModuleType) -> SimpleNamespace:
    """Prepared texts, some without labels; `.teacher`, trained; `.recipe(distill, student)`."""
    root = tmp_path_factory.mktemp("school")
    rows = texts.sentences(300, seed=1)
    texts.write_csv(root / "train.csv", rows[:160])
    texts.write_csv(root / "test.csv", rows[160:220])
    (root / "more.txt").write_text("\n".join(text for text, _ in rows[220:]), encoding="utf-8")
    folder = texts.write_folder(root / "encoder")

    def recipe(student: Any = None, teacher: Any = None, **distill: Any) -> Recipe:
        narrow = {"hidden_size": 16, "num_hidden_layers": 2, "intermediate_size": 32}
        model = {"model": f"hf:{folder}", "head": "new"}
        return Recipe.model_validate(
            {
                "task": "text-classification",
                "data": {
                    "train": {"path": str(root / "train.csv")},
                    "test": {"path": str(root / "test.csv")},
                    "unlabelled": {"path": str(root / "more.txt")},
                    "validation": 0.2, "calibration": 16,
                },
                "teacher": teacher or {**model, "train": {**TRAIN, "epochs": 12}},
                "student": student or {**model, "args": narrow, "init": "scratch"},
                "distill": {**TRAIN, **distill},
                "profile": None,
            }
        )  # fmt: skip

    plain = recipe()
    for stage in ("data", "teacher"):
        (root / stage).mkdir()
    context = Context(0, 1, "cpu", root / "data", Silent())
    prepare_data(plain.data, context=context)
    context = Context(0, 1, "cpu", root / "teacher", Silent())
    able = prepare_teacher(
        plain.teachers[0], root / "data", context=context, memory_budget_bytes=BUDGET
    )
    assert able["validation"]["accuracy"] > 0.9
    return SimpleNamespace(
        root=root, data=root / "data", teacher=root / "teacher", recipe=recipe, folder=folder
    )


def study(school: SimpleNamespace, folder: Path, recipe: Recipe) -> dict[str, Any]:
    assert recipe.distill is not None
    folder.mkdir()
    plan = choose(recipe.distill, is_text=True)
    lessons = Lessons(recipe.distill, plan, teachers=(school.teacher,) * len(recipe.teachers))
    context = Context(0, 1, "cpu", folder, Silent())
    return train_student(
        recipe.student, lessons, school.data, context=context, memory_budget_bytes=BUDGET
    )


def losses(found: dict[str, Any], name: str) -> list[float]:
    return [entry["terms"][name] for entry in found["training"]["history"]]


RUNS: dict[str, dict[str, Any]] = {
    "hidden": {"objectives": [{"name": "hidden"}, KD, HARD]},
    "relations": {"objectives": [{"name": "relations"}, KD, HARD]},
    "both": {"objectives": [{"name": "hidden"}, {"name": "relations"}, HARD]},
    "quality": {"strategy": "quality"},
    "balanced": {"objectives": [KD, {"name": "hidden"}, {"name": "relations"}], "balance": True},
    "bf16": {"objectives": [{"name": "hidden"}, {"name": "relations"}, KD], "precision": "bf16"},
    "phases": {"objectives": [{"name": "relations", "fade": "linear"},
                              {**KD, "warmup_epochs": 1}, {**HARD, "warmup_epochs": 1}]},
}  # fmt: skip


@pytest.mark.parametrize("name", RUNS)
def test_student_of_another_width_comes_closer_to_its_live_teacher(
    school: SimpleNamespace, tmp_path: Path, name: str
) -> None:
    recipe = school.recipe(**RUNS[name], epochs=5)
    assert recipe.distill is not None
    expected = {term.name for term in choose(recipe.distill, is_text=True).objectives}

    found = study(school, tmp_path / "s", recipe)

    assert found["distillation"]["target"] == "live"
    assert set(found["training"]["history"][0]["terms"]) == expected
    assert {"hidden", "relations"} & expected
    for term in {"hidden", "relations"} & expected:
        first, *_, last = losses(found, term)
        assert last < 0.9 * first, (term, losses(found, term))
    assert found["unlabelled"] == {"used": 80, "given": 80}
    assert json.loads(json.dumps(found, allow_nan=False)) is not None


def test_what_ships_has_no_hooks_and_no_helpers(school: SimpleNamespace, tmp_path: Path) -> None:
    study(school, tmp_path / "s", school.recipe(**RUNS["both"]))

    network = load_network(tmp_path / "s").network.module

    assert isinstance(network, TextClassifier)
    assert all(name.startswith("network.bert.") or "classifier" in name
               for name in network.state_dict())  # fmt: skip
    assert not any(part._forward_hooks for part in network.modules())


def test_relations_alone_teach_a_random_student_how_the_teachers_tokens_relate(
    school: SimpleNamespace, tmp_path: Path
) -> None:
    alone = [{"name": "relations"}]
    before = school.recipe(objectives=alone, epochs=1, lr=1e-12)
    after = school.recipe(objectives=alone, epochs=6)
    for name, recipe in (("before", before), ("after", after)):
        study(school, tmp_path / name, recipe)

    far, near = (divergence_on_validation(school, tmp_path / n) for n in ("before", "after"))

    assert near < 0.7 * far


@torch.no_grad()
def divergence_on_validation(school: SimpleNamespace, folder: Path) -> float:
    """By the loops of `expected_relations`, of texts that were not trained on."""
    data = open_data(school.data, memory_budget_bytes=BUDGET)
    tokens = torch.from_numpy(np.array(data.validation.contents[:8])).long()
    lengths = tokens[:, 1].sum(1).tolist()
    sides = []
    for path, layer in ((folder, 1), (school.teacher, 2)):
        module = load_network(path).network.module.eval()
        attention = module.get_submodule(f"network.bert.encoder.layer.{layer}.attention.self")
        caught: list[Tensor] = []
        for name in ("query", "key", "value"):
            attention.get_submodule(name).register_forward_hook(
                lambda _m, _a, output, into=caught: into.append(output)
            )
        module(tokens)
        sides.append(caught)
    return expected_relations(sides[0], sides[1], lengths, heads=2)


def test_teacher_stays_in_eval_mode_and_its_dropout_is_off(school: SimpleNamespace) -> None:
    recipe = school.recipe(objectives=[{"name": "hidden"}, {"name": "relations"}, HARD])
    spec, data = recipe.distill, open_data(school.data, memory_budget_bytes=BUDGET)
    context = Context(0, 1, "cpu", school.root, Silent())
    teacher = load_network(school.teacher).network.module.requires_grad_(False).eval()
    student = load_network(school.teacher).network.module
    course = taught_course(
        student, data, choose(spec, is_text=True), spec, teachers=[teacher], context=context
    )
    lesson = course.task.load(torch.arange(8), 0)

    course.learner.train()
    noisy = course.task.terms(course.learner, lesson)
    course.learner.eval()
    same = course.task.terms(course.learner, lesson)

    assert not teacher.training
    # the student is the teacher, and its projections begin as the identity
    assert same["hidden"].item() == pytest.approx(0, abs=1e-9)
    assert same["relations"].item() == pytest.approx(0, abs=1e-6)
    assert noisy["hidden"].item() > 1e-3


def test_second_of_two_teachers_is_compared_with(school: SimpleNamespace, tmp_path: Path) -> None:
    model = {"model": f"hf:{school.folder}", "head": "new", "train": TRAIN}
    recipe = school.recipe(teacher=[model, model], objectives=[{"name": "relations", "of": 2}, KD])

    found = study(school, tmp_path / "s", recipe)

    assert losses(found, "relations")[-1] < losses(found, "relations")[0]


@pytest.mark.parametrize(
    ("distill", "said"),
    [
        ({"objectives": [{"name": "attention"}, HARD]}, "`hidden` and `relations`"),
        ({"objectives": [{"name": "rkd"}, HARD]}, "`hidden` and `relations`"),
        ({"strategy": "quality", "target": "stored"}, "only a live teacher shows"),
        ({"objectives": [HARD]}, "no objective can use images without labels"),
    ],
)
def test_wishes_that_texts_cannot_have(
    school: SimpleNamespace, distill: dict[str, Any], said: str
) -> None:
    with pytest.raises(ValueError, match=said):
        school.recipe(**distill)


def test_unlabelled_texts_can_be_learnt_from_by_their_relations_alone(
    school: SimpleNamespace,
) -> None:
    recipe = school.recipe(objectives=[{"name": "relations"}, HARD])

    assert recipe.data.unlabelled is not None


@pytest.mark.parametrize("name", ["hidden", "relations"])
def test_images_have_no_tokens(name: str) -> None:
    wish = f"distill.objectives=[{{name: {name}}}, {{name: hard}}]"

    with pytest.raises(RecipeError, match=f"{name} compares the tokens of texts"):
        load_recipe("digits", overrides=[wish])


def test_probabilities_alone_are_the_default_of_texts(school: SimpleNamespace) -> None:
    plans = {
        strategy: choose(school.recipe(strategy=strategy).distill, is_text=True)
        for strategy in ("auto", "fast", "quality")
    }

    names = {key: [term.name for term in plan.objectives] for key, plan in plans.items()}
    assert names == {
        "auto": ["kd", "hard"], "fast": ["kd", "hard"], "quality": ["kd", "hard", "relations"],
    }  # fmt: skip
    assert [plan.target for plan in plans.values()] == ["stored", "stored", "live"]


def test_the_shipped_example_fades_relations_while_the_answers_take_over(
    school: SimpleNamespace, tmp_path: Path
) -> None:
    import yaml

    narrow = {"hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 2}
    shipped = yaml.safe_load((SHIPPED / "sst2-relations.yaml").read_text(encoding="utf-8"))
    recipe = school.recipe(
        student={**shipped["student"], "model": f"hf:{school.folder}", "args": narrow},
        objectives=shipped["distill"]["objectives"],
        epochs=shipped["distill"]["epochs"],
        lr=5e-3,
    )

    found = study(school, tmp_path / "s", recipe)

    assert losses(found, "relations")[-1] < losses(found, "relations")[0]
    assert losses(found, "kd")[-1] < losses(found, "kd")[0]
    assert found["validation"]["accuracy"] > 0.8
