"""Text encoders through the exporters: packed tokens in, one input a row, int8 products."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
import torch
from edgestill.exporters.audit import audit, multiply_adds
from edgestill.exporters.bias import int32_biases
from edgestill.exporters.calibrate import ranges_of
from edgestill.exporters.compare import compare
from edgestill.exporters.dynamic_int8 import dynamic_nodes, int8_columns, quantize_dynamically
from edgestill.exporters.embedding import int8_rows, quantize_embeddings
from edgestill.exporters.engagement import engagement
from edgestill.exporters.equalize import equalize
from edgestill.exporters.feeds import feed, longest
from edgestill.exporters.graph import arrays, consumers, producers, read_model
from edgestill.exporters.int8 import encoding_for, int8_nodes, quantize
from edgestill.exporters.reference import logits_float32, logits_float64
from edgestill.exporters.rewrites import normalise
from edgestill.exporters.saturation import saturating_pairs
from edgestill.exporters.sessions import open_session, run_batches
from edgestill.exporters.simplify import simplify
from edgestill.exporters.stamp import stamp, write_model
from edgestill.exporters.text_rewrites import normalise_text
from edgestill.exporters.to_onnx import export_onnx
from edgestill.pipeline.errors import ExportError, IntegrityError
from torch import nn

VOCABULARY, WIDTH, HEADS, POSITIONS = 1100, 16, 2, 40
ROWS = ("input_ids", "attention_mask")
NARROW = float(np.finfo(np.float32).min)


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.query, self.key, self.value, self.out = (nn.Linear(WIDTH, WIDTH) for _ in range(4))
        self.up, self.down = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)
        self.first, self.second = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)

    def forward(self, x, hidden):
        n, s, _ = x.shape
        q, k, v = (
            part(x).view(n, s, HEADS, -1).transpose(1, 2)
            for part in (self.query, self.key, self.value)
        )
        scores = q @ k.transpose(2, 3) / (WIDTH / HEADS) ** 0.5 + hidden
        mixed = (scores.softmax(-1) @ v).transpose(1, 2).reshape(n, s, WIDTH)
        x = self.first(x + self.out(mixed))
        return self.second(x + self.down(nn.functional.gelu(self.up(x))))


class Encoder(nn.Module):
    """BERT in small, without transformers."""

    def __init__(self, rows=ROWS, *, depth: int = 2, ignores_mask: bool = False) -> None:
        super().__init__()
        self.input_names = rows
        self.words = nn.Embedding(VOCABULARY, WIDTH)
        self.positions, self.types = nn.Embedding(POSITIONS, WIDTH), nn.Embedding(2, WIDTH)
        self.norm, self.layers = nn.LayerNorm(WIDTH), nn.ModuleList([Layer() for _ in range(depth)])
        self.head = nn.Linear(WIDTH, 3)
        self.ignores_mask = ignores_mask

    def forward(self, tokens):
        return self.answer(*tokens.unbind(1))

    def answer(self, ids, mask, types=None):
        places = torch.arange(ids.shape[1], device=ids.device)
        x = self.words(ids) + self.positions(places)
        x = x + (self.types.weight[0] if types is None else self.types(types))
        hidden = (1 - mask[:, None, None].to(x.dtype)) * (0.0 if self.ignores_mask else NARROW)
        hidden = hidden + 0 * mask[:, None, None].to(x.dtype)
        x = self.norm(x)
        for layer in self.layers:
            x = layer(x, hidden)
        return self.head(x[:, 0])


def make_encoder(**wishes) -> Encoder:
    torch.manual_seed(0)
    net = Encoder(**wishes)
    nn.init.normal_(net.head.weight, std=1.0)
    return net


def texts(n: int, *, rows: int = 2, length: int = 12, seed: int = 0) -> np.ndarray:
    """int64 (n, rows, length): random ids, of 2 to `length` tokens each, padded with id 1."""
    rng = np.random.default_rng(seed)
    tokens = np.zeros((n, rows, length), np.int64)
    tokens[:, 0] = 1
    for text, size in zip(tokens, rng.integers(2, length + 1, n), strict=True):
        text[0, :size] = rng.integers(5, VOCABULARY, size)
        text[1, :size] = 1
        if rows == 3:
            text[2, size // 2 : size] = 1
    return tokens


def answers(model, tokens, folder, *, batch=8, optimize=True):
    write_model(stamp(model, min_runtime="1.17", metadata={}), folder / "m.onnx")
    session = open_session(folder / "m.onnx", threads=1, optimize=optimize)
    return run_batches(session, tokens, batch)


def op_types(model):
    return [node.op_type for node in model.graph.node]


@pytest.fixture(scope="module")
def text():
    return texts(48)


@pytest.fixture(scope="module")
def encoder():
    return make_encoder()


@pytest.fixture(scope="module")
def written(encoder, text, tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "raw.onnx"
    export_onnx(encoder, torch.from_numpy(text[:2]), path, batch="dynamic", sequence="dynamic")
    return path


@pytest.fixture(scope="module")
def fixed(encoder, text, tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "fixed.onnx"
    export_onnx(encoder, torch.from_numpy(text[:2]), path, batch=4, sequence=8)
    return path


@pytest.fixture(scope="module")
def simplified(written, text):
    return simplify(read_model(written), text, floor=1e-6, threads=1)


@pytest.fixture(scope="module")
def floating(simplified):
    return simplified.model


@pytest.fixture(scope="module")
def encoding(floating):
    return encoding_for(("arm", "x86"), model=floating)


@pytest.fixture(scope="module")
def static(floating, text, encoding):
    return quantize(floating, text, encoding=encoding, threads=1)


@pytest.fixture(scope="module")
def dynamic(floating, encoding):
    return quantize_dynamically(floating, encoding=encoding)


# feeds and sessions


def test_one_name_gets_the_array_and_several_get_a_row_each(text):
    images = np.zeros((2, 3, 4, 4), np.float32)
    assert feed(images, ["input"])["input"] is images
    fed = feed(text, ROWS)
    assert list(fed) == list(ROWS)
    for row, name in enumerate(ROWS):
        assert (fed[name] == text[:, row]).all()
        assert fed[name].flags.c_contiguous


def test_as_many_names_as_rows_are_needed(text):
    with pytest.raises(ExportError, match=r"input_ids, attention_mask, token_type_ids; expected"):
        feed(text, [*ROWS, "token_type_ids"])
    with pytest.raises(ExportError, match="expected exactly one, the images"):
        feed(np.zeros((2, 3, 4, 4), np.float32), ROWS)


def test_a_text_ends_with_its_last_unmasked_token(text):
    assert longest(text) == int(text[:, 1].sum(axis=1).max())
    assert longest(np.zeros((2, 2, 5), np.int64)) == 1


def test_answers_do_not_depend_on_how_far_the_set_is_padded(written, text):
    session = open_session(written, threads=1)
    wider = np.concatenate([text, np.zeros((len(text), 2, 20), np.int64)], axis=2)
    assert (run_batches(session, wider, 8) == run_batches(session, text, 8)).all()
    assert run_batches(session, text[:0], 8).shape == (0, 3)


def test_a_fixed_graph_gets_its_own_batch_and_length(fixed, encoder, text):
    session = open_session(fixed, threads=1)
    short = text[text[:, 1].sum(axis=1) <= 8][:6]
    assert len(short) == 6
    expected = logits_float32(encoder, short, batch_size=6)
    assert np.allclose(run_batches(session, short, 1), expected, atol=1e-5)
    assert np.allclose(run_batches(session, short[..., :8], 1), expected, atol=1e-5)
    with pytest.raises(ExportError, match=r"takes texts of 8 tokens.*max_length"):
        run_batches(session, text, 1)


# torch and export


def test_torch_answers_texts_in_float64_and_float32(encoder, text):
    double, reason = logits_float64(encoder, text, batch_size=7)
    single = logits_float32(encoder, text, batch_size=7)
    assert reason == ""
    assert double.dtype == np.float64
    assert 0 < np.abs(double - single).max() < 1e-5


def test_the_file_has_an_input_for_each_row_and_both_axes_free(written, encoder, text):
    model = read_model(written)
    dims = {v.name: [d.dim_param for d in v.type.tensor_type.shape.dim] for v in model.graph.input}
    assert dims == {"input_ids": ["N", "S"], "attention_mask": ["N", "S"]}
    session = open_session(written, threads=1)
    expected = logits_float32(encoder, text, batch_size=16)
    for batch in (1, 5, 48):
        assert np.allclose(run_batches(session, text, batch), expected, atol=1e-5)


def test_pairs_have_a_third_input(tmp_path):
    net, pairs = make_encoder(rows=(*ROWS, "token_type_ids"), depth=1), texts(12, rows=3)
    export_onnx(net, torch.from_numpy(pairs[:2]), tmp_path / "m.onnx", batch="dynamic")
    session = open_session(tmp_path / "m.onnx", threads=1)
    assert [value.name for value in session.get_inputs()] == [*ROWS, "token_type_ids"]
    expected = logits_float32(net, pairs, batch_size=4)
    assert np.allclose(run_batches(session, pairs, 3), expected, atol=1e-5)
    other = pairs.copy()
    other[:, 2] = 0
    assert not np.allclose(run_batches(session, other, 3), expected, atol=1e-2)


def test_a_net_whose_answers_depend_on_padding_is_refused(text, tmp_path):
    net = make_encoder(ignores_mask=True, depth=1)
    with pytest.raises(ExportError, match="depend on padding"):
        export_onnx(net, torch.from_numpy(text[:2]), tmp_path / "m.onnx", batch="dynamic")
    assert not list(tmp_path.iterdir())


def test_a_length_that_the_net_fixes_is_refused(text, tmp_path):
    class Baked(Encoder):
        def answer(self, ids, mask):
            return super().answer(ids + torch.zeros(12, dtype=torch.int64), mask)

    with pytest.raises(ExportError, match=r"export\.sequence: dynamic.*fixes the length"):
        export_onnx(
            Baked(depth=1), torch.from_numpy(text[:2]), tmp_path / "m.onnx", batch="dynamic"
        )


def test_a_graph_that_answers_otherwise_than_the_net_is_refused(text, tmp_path):
    class Counting(Encoder):
        calls = 0

        def answer(self, ids, mask):  # what the tracer sees is true of one call only
            self.calls += 1
            return super().answer(ids, mask) + self.calls

    with pytest.raises(ExportError, match="answers otherwise than the network on 4 texts"):
        export_onnx(
            Counting(depth=1), torch.from_numpy(text[:2]), tmp_path / "m.onnx", batch="dynamic"
        )
    assert not list(tmp_path.iterdir())


# simplification


def test_a_simplified_encoder_answers_the_same_with_flat_tokens(
    simplified, written, text, tmp_path
):
    assert simplified.simplified, simplified.reason
    expected = answers(read_model(written), text, tmp_path)
    assert np.allclose(answers(simplified.model, text, tmp_path), expected, atol=1e-5)
    ops = op_types(simplified.model)
    assert ops.count("Gemm") == 13  # 6 a layer and the head
    assert ops.count("MatMul") == 4  # scores and mixtures, of two activations
    assert ops.count("Add") < op_types(read_model(written)).count("Add")


def test_gelu_runs_as_one_node(floating, tmp_path):
    write_model(floating, tmp_path / "m.onnx")
    report = engagement(tmp_path / "m.onnx")
    assert report["kernels"]["Gelu"] == 2
    assert "Erf" not in report["kernels"]


def test_rewrites_leave_images_as_they_are(raw):
    assert normalise_text(raw) is raw


def test_bert_loses_its_mask_table_and_its_one_token_type(text, tmp_path):
    transformers = pytest.importorskip("transformers")
    from edgestill.models.hf_text import TextClassifier

    config = transformers.BertConfig(
        vocab_size=VOCABULARY, max_position_embeddings=POSITIONS, num_labels=3, hidden_size=WIDTH,
        num_hidden_layers=1, num_attention_heads=2, intermediate_size=32,
    )  # fmt: skip
    torch.manual_seed(0)
    auto = transformers.AutoModelForSequenceClassification
    net = TextClassifier(auto.from_config(config, attn_implementation="eager").eval(), ROWS)
    export_onnx(net, torch.from_numpy(text[:2]), tmp_path / "m.onnx", batch="dynamic")
    given = read_model(tmp_path / "m.onnx")
    assert "GatherND" in op_types(given)  # what torch writes; else there is nothing to rewrite
    model = normalise(normalise_text(given))
    gone = {"GatherND", "GatherElements", "Range", "GreaterOrEqual", "And", "Max", "Expand"}
    assert gone.isdisjoint(op_types(model))
    assert op_types(model).count("Where") == 1
    assert op_types(model).count("Gather") == 3  # words, positions, the first token
    expected = logits_float32(net, text, batch_size=8)
    assert np.allclose(answers(model, text, tmp_path), expected, atol=1e-5)


# int8


def test_the_graph_decides_the_policy(floating, raw):
    of_text = encoding_for(("arm",), model=floating)
    assert of_text.op_types == ("Gemm", "MatMul")
    assert of_text.embeddings
    assert "LayerNormalization" in of_text.op_reason
    assert encoding_for(("arm",), model=raw) == encoding_for(("arm",))
    assert "Add" in encoding_for(("arm",)).op_types


def test_layer_norm_is_found_written_out_too(floating):
    plain = onnx.ModelProto()
    plain.CopyFrom(floating)
    nodes = []
    for node in floating.graph.node:
        if node.op_type != "LayerNormalization":
            nodes.append(node)
            continue
        x, mean, centred = node.input[0], f"{node.name}_m", f"{node.name}_c"
        make = onnx.helper.make_node
        nodes += [
            make("ReduceMean", [x], [mean]),
            make("Sub", [x, mean], [centred]),
            make("Div", [centred, mean], node.output),
        ]
    del plain.graph.node[:]
    plain.graph.node.extend(nodes)
    assert encoding_for(("arm",), model=plain).op_types == ("Gemm", "MatMul")


def test_static_int8_answers_like_float(static, floating, text, tmp_path):
    agreement = compare(answers(floating, text, tmp_path), answers(static.model, text, tmp_path))
    assert agreement.sqnr_db is not None
    assert 25 < agreement.sqnr_db < 60  # good, and really rounded
    assert agreement.top1_agreement >= 0.95


def test_products_with_weights_are_int8_and_nothing_else(static, text, tmp_path):
    write_model(static.model, tmp_path / "q.onnx")
    report = engagement(tmp_path / "q.onnx", text[:4])
    assert report["kernels"]["QGemm"] == 13
    assert "DequantizeLinear" not in report["kernels"]  # no float node reads a rounded value
    assert "Gemm" not in report["kernels"]
    assert report["not_found"] == []
    left = {node["op"] for node in report["nodes"] if not node["int8"]}
    assert left == {"MatMul"}


def test_residuals_do_not_pass_through_8_bits(static):
    writers = producers(static.model)
    read = [
        writers[name].op_type
        for node in static.model.graph.node
        if node.op_type in ("Add", "LayerNormalization", "Mul", "MatMul", "Softmax")
        for name in node.input
        if name in writers
    ]
    assert read
    assert "DequantizeLinear" not in read


def test_padding_takes_no_part_in_the_ranges(floating, text):
    wider = np.concatenate([text, np.full((len(text), 2, 20), 7, np.int64)], axis=2)
    wider[:, 1, text.shape[2] :] = 0
    assert ranges_of(floating, wider, calibrator="minmax", threads=1) == ranges_of(
        floating, text, calibrator="minmax", threads=1
    )


def test_a_mask_of_infinity_has_no_range_and_hinders_nothing(text):
    value, make = onnx.helper.make_tensor_value_info, onnx.helper.make_node
    stored = {"zero": np.float32(0), "low": np.float32(-np.inf)}
    stored["words"] = np.random.default_rng(0).normal(size=(VOCABULARY, 1)).astype(np.float32)
    stored["last"] = np.array([-1])
    graph = onnx.helper.make_graph(
        [make("Gather", ["words", "input_ids"], ["rows"]),
         make("Squeeze", ["rows", "last"], ["scores"]),
         make("Cast", ["attention_mask"], ["kept"], to=onnx.TensorProto.BOOL),
         make("Where", ["kept", "zero", "low"], ["mask"]),
         make("Add", ["scores", "mask"], ["masked"]),
         make("Softmax", ["masked"], ["logits"])], "g",
        [value(name, onnx.TensorProto.INT64, ["N", 12]) for name in ROWS],
        [value("logits", onnx.TensorProto.FLOAT, ["N", 12])],
        [onnx.numpy_helper.from_array(np.asarray(v), n) for n, v in stored.items()],
    )  # fmt: skip
    opset = [onnx.helper.make_opsetid("", 18)]
    model = onnx.helper.make_model(graph, opset_imports=opset, ir_version=8)
    ranges = ranges_of(model, text, calibrator="mse", threads=1)
    assert ranges.keys() == {"rows", "scores", "logits"}


def test_equal_samples_are_refused(floating, text):
    with pytest.raises(ExportError, match="all 5 samples are the same"):
        ranges_of(floating, np.repeat(text[:1], 5, axis=0), calibrator="minmax", threads=1)


def test_int8_nodes_are_those_that_quantize_makes(floating, encoding, static):
    names = int8_nodes(floating, encoding)
    assert len(names) == static.counts["int8_weights"] == 13
    assert names == dynamic_nodes(floating)


def test_one_layer_alone_may_be_int8_and_one_may_stay(floating, text, encoding, tmp_path):
    names = int8_nodes(floating, encoding)
    alone = quantize(floating, text, encoding=encoding, threads=1, keep_float=names[1:])
    assert alone.counts["int8_weights"] == 1
    rest = quantize(floating, text, encoding=encoding, threads=1, keep_float=names[3:4])
    write_model(rest.model, tmp_path / "q.onnx")
    floats = [n["name"] for n in engagement(tmp_path / "q.onnx")["nodes"] if n["op"] == "Gemm"
              and not n["int8"]]  # fmt: skip
    assert floats == names[3:4]
    assert not any(n["requantized"] for n in engagement(tmp_path / "q.onnx")["nodes"])


def test_a_bias_that_a_norm_shares_stays_exact_for_the_norm(floating, text, encoding):
    shared = onnx.ModelProto()
    shared.CopyFrom(floating)
    norm = next(n for n in shared.graph.node if n.op_type == "LayerNormalization")
    gemm = next(n for n in shared.graph.node if n.op_type == "Gemm")
    gemm.input[2] = norm.input[2]
    found = quantize(shared, text, encoding=encoding, threads=1).model
    kept = next(n for n in found.graph.node if n.op_type == "LayerNormalization")
    assert arrays(found)[kept.input[2]].dtype == np.float32
    assert gemm.name in int32_biases(found)


def test_bias_correction_and_equalization_take_texts(floating, text, encoding, tmp_path):
    found = quantize(equalize(floating), text, encoding=encoding, threads=1, correct_bias=True)
    plain = quantize(floating, text, encoding=encoding, threads=1)
    expected = answers(floating, text, tmp_path)
    means = [
        np.abs((answers(one.model, text, tmp_path) - expected).mean(axis=0)).max()
        for one in (found, plain)
    ]
    assert means[0] < means[1]


def test_saturation_counts_every_position_of_every_text(static, dynamic, text):
    for model in (static.model, dynamic.model):
        rows = saturating_pairs(model, text, threads=1)
        assert len(rows) == 13
        assert all(row["saturating"] == 0 for row in rows)  # 7-bit weights cannot
        tokens = int(text[:, 1].sum())
        assert rows[0]["pair_sums"] == rows[0]["pairs"] * tokens
        assert rows[-1]["pair_sums"] == rows[-1]["pairs"] * len(text)  # the head reads one token


# embeddings


def test_rows_are_off_by_half_a_scale_of_their_own_at_most():
    rng = np.random.default_rng(0)
    table = (rng.normal(size=(1500, 24)) * rng.lognormal(0, 2, (1500, 1))).astype(np.float32)
    table[7] = 0
    rows, scales = int8_rows(table)
    assert (rows.dtype, scales.dtype, scales.shape) == (np.int8, np.float32, (1500, 1))
    error = np.abs(table.astype(np.float64) - scales.astype(np.float64) * rows)
    assert (error <= scales / 2 * (1 + 1e-5)).all()
    assert error.max() > 0
    assert np.abs(rows.astype(int)).max() == 127
    assert (rows[7] == 0).all()


def test_an_int8_table_looks_up_the_rounded_rows_in_a_quarter_of_the_bytes(
    floating, text, tmp_path
):
    found, tables = quantize_embeddings(floating)
    assert len(tables) == 1
    assert onnx.checker.check_model(found, full_check=True) is None
    words = arrays(floating)[tables[0]]
    stored = [t for t in found.graph.initializer if t.name.startswith(tables[0])]
    size = sum(len(t.raw_data) for t in stored)
    assert size == words.nbytes // 4 + 4 * VOCABULARY
    rounded = onnx.ModelProto()
    rounded.CopyFrom(floating)
    rows, scales = int8_rows(words)
    for tensor in rounded.graph.initializer:
        if tensor.name == tables[0]:
            tensor.CopyFrom(
                onnx.numpy_helper.from_array(rows.astype(np.float32) * scales, tables[0])
            )
    expected = answers(rounded, text, tmp_path)
    assert np.allclose(answers(found, text, tmp_path), expected, atol=1e-6)
    assert not np.array_equal(answers(floating, text, tmp_path), expected)


def test_a_table_that_a_product_reads_too_stays(floating):
    tied = onnx.ModelProto()
    tied.CopyFrom(floating)
    table = next(n.input[0] for n in tied.graph.node if n.op_type == "Gather"
                 and arrays(tied)[n.input[0]].shape == (VOCABULARY, WIDTH))  # fmt: skip
    tied.graph.node.append(onnx.helper.make_node("Transpose", [table], ["tied"], name="tied"))
    assert quantize_embeddings(tied)[1] == []


# dynamic int8


def test_dynamic_int8_answers_like_float_in_fused_kernels(dynamic, floating, text, tmp_path):
    found = answers(dynamic.model, text, tmp_path, batch=1)
    agreement = compare(answers(floating, text, tmp_path), found)
    assert agreement.sqnr_db is not None
    assert 25 < agreement.sqnr_db < 60
    write_model(dynamic.model, tmp_path / "q.onnx")
    report = engagement(tmp_path / "q.onnx", text[:4])
    kernels = report["kernels"]
    assert kernels["DynamicQuantizeMatMul"] + kernels["MatMulIntegerToFloat"] == 13
    assert kernels["DynamicQuantizeLinear"] == 2  # query, key and value read one
    assert report["not_found"] == []
    int8 = sum(n["multiply_adds"] for n in report["nodes"] if n["op"] == "MatMulInteger")
    assert report["int8_multiply_adds"] == int8 > 0
    assert not any(node["requantized"] for node in report["nodes"])


def test_columns_are_off_by_half_a_scale_of_their_own_and_reduced_to_7_bits():
    weight = np.random.default_rng(0).normal(size=(20, 6)).astype(np.float32)
    weight[:, 2] = 0
    for largest in (64, 127):
        values, scales = int8_columns(weight, largest=largest)
        assert np.abs(values.astype(int)).max() == largest
        assert (np.abs(weight - scales * values) <= scales / 2 * (1 + 1e-5)).all()


def test_dynamic_int8_is_the_same_bytes_again_and_standard_operators(floating, encoding, dynamic):
    again = quantize_dynamically(floating, encoding=encoding)
    first, second = (m.model.SerializeToString(deterministic=True) for m in (dynamic, again))
    assert first == second
    assert {node.domain for node in dynamic.model.graph.node} == {""}
    assert onnx.checker.check_model(dynamic.model, full_check=True) is None


def test_dynamic_int8_keeps_what_it_is_told(floating, encoding):
    names = dynamic_nodes(floating)
    found = quantize_dynamically(floating, encoding=encoding, keep_float=names[:2])
    assert op_types(found.model).count("MatMulInteger") == len(names) - 2
    assert found.counts["int8_weights"] == len(names) - 2
    with pytest.raises(ExportError, match="no node named nobody"):
        quantize_dynamically(floating, encoding=encoding, keep_float=["nobody"])
    with pytest.raises(ExportError, match="no MatMul or Gemm"):
        quantize_dynamically(floating, encoding=encoding, keep_float=names)
    with pytest.raises(ExportError, match="quantized already"):
        quantize_dynamically(found.model, encoding=encoding)


def test_a_product_left_float_is_an_integrity_error(floating, dynamic):
    from edgestill.exporters import dynamic_int8

    broken = onnx.ModelProto()
    broken.CopyFrom(dynamic.model)
    node = next(n for n in broken.graph.node if n.op_type == "MatMulInteger")
    node.name = "another"
    with pytest.raises(IntegrityError, match="did not become integer"):
        dynamic_int8._check(floating, broken, dynamic_nodes(floating), [])


def test_a_gemm_with_a_transposed_weight_is_the_same_product(text, tmp_path):
    rng = np.random.default_rng(0)
    weight = rng.normal(size=(5, WIDTH)).astype(np.float32)
    value, make = onnx.helper.make_tensor_value_info, onnx.helper.make_node
    graph = onnx.helper.make_graph(
        [make("Gemm", ["x", "w", "b"], ["logits"], name="gemm", transB=1)], "g",
        [value("x", onnx.TensorProto.FLOAT, ["N", WIDTH])],
        [value("logits", onnx.TensorProto.FLOAT, ["N", 5])],
        [onnx.numpy_helper.from_array(weight, "w"),
         onnx.numpy_helper.from_array(np.arange(5, dtype=np.float32), "b")],
    )  # fmt: skip
    opset = [onnx.helper.make_opsetid("", 18)]
    model = onnx.helper.make_model(graph, opset_imports=opset, ir_version=8)
    found = quantize_dynamically(model, encoding=encoding_for(("x86",)))
    x = rng.normal(size=(9, WIDTH)).astype(np.float32)
    expected = x @ weight.T + np.arange(5)
    assert np.abs(answers(found.model, x, tmp_path) - expected).max() < 0.2  # 7 bits


# audit


def test_multiply_adds_are_of_one_text_of_a_stated_length(floating, static, dynamic):
    figures = audit(floating)
    tokens = figures["tokens"]
    assert tokens == 32  # the largest power of two that its 40 positions take
    products = 4 * WIDTH**2 + 2 * WIDTH * 2 * WIDTH  # of one token, one layer
    attention = 2 * tokens * WIDTH  # scores and mixture, of one token
    assert figures["multiply_adds"] == 2 * tokens * (products + attention) + 3 * WIDTH
    for other in (static.model, dynamic.model):
        assert multiply_adds(other) == figures["multiply_adds"]
        assert audit(other)["parameters"] == figures["parameters"]


def test_a_fixed_length_is_counted_as_it_is_and_quantized(fixed, text, tmp_path):
    short = text[text[:, 1].sum(axis=1) <= 8]
    model = normalise(normalise_text(read_model(fixed)))
    assert audit(model)["tokens"] == 8
    found = quantize(model, short, encoding=encoding_for(("arm",), model=model), threads=1)
    assert answers(found.model, short[:5], tmp_path).shape == (5, 3)
    write_model(found.model, tmp_path / "q.onnx")
    assert engagement(tmp_path / "q.onnx", short[:3])["profiled_runs"] >= 1
    rows = saturating_pairs(found.model, short[:5], threads=1)
    assert rows[0]["pair_sums"] == rows[0]["pairs"] * 5 * 8  # a fixed length is padded


def test_images_have_no_tokens(raw):
    assert "tokens" not in audit(raw)


def test_float_and_int8_biases_are_separate_tensors(static):
    readers = consumers(static.model)
    kinds = {t.name: t.data_type for t in static.model.graph.initializer}
    assert all(
        len(readers[name]) == 1 for name, kind in kinds.items() if kind == onnx.TensorProto.INT32
    )
