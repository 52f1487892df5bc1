from __future__ import annotations

import numpy as np
import onnx
import pytest
from edgestill.exporters.calibrate import (
    BINS,
    ENTROPY_BINS,
    FRACTIONS,
    activations,
    entropy_range,
    mse_range,
    percentile_range,
    ranges_of,
    scale_and_zero_point,
)
from edgestill.exporters.rewrites import normalise
from edgestill.exporters.sample_doubts import channel_statistics, doubt_about_samples
from edgestill.exporters.stamp import write_model
from edgestill.pipeline.errors import ExportError
from onnx import TensorProto, helper, numpy_helper
from onnxruntime.quantization.calibrate import MinMaxCalibrater
from onnxruntime.quantization.quant_utils import compute_scale_zp


@pytest.fixture(scope="module")
def floating(raw):
    return normalise(raw)


def histogram(values):
    low, high = min(values.min(), 0.0), max(values.max(), 0.0)
    counts, _ = np.histogram(values, bins=BINS, range=(low, high))
    return counts.astype(np.float64), float(low), float(high)


def outliers(seed=0, n=200_000):
    """A bell with a few values 8 times farther out: what clipping is for."""
    rng = np.random.default_rng(seed)
    values = rng.normal(size=n)
    values[:20] *= 8
    return values


def error_of(values, low, high):
    """Mean squared error of quantization, value by value."""
    scale, zero = scale_and_zero_point(low, high)
    q = np.clip(np.round(values / float(scale)) + int(zero), 0, 255)
    return float(np.square(values - float(scale) * (q - int(zero))).mean())


class _Once:
    def __init__(self, feed):
        self.feeds = [feed]

    def get_next(self):
        return self.feeds.pop() if self.feeds else None


def test_minmax_ranges_are_those_of_onnxruntime_widened_to_zero(floating, samples, tmp_path):
    write_model(floating, tmp_path / "m.onnx")
    theirs = MinMaxCalibrater(tmp_path / "m.onnx", augmented_model_path=str(tmp_path / "a.onnx"))
    theirs.augment_graph()
    theirs.create_inference_session()
    theirs.collect_data(_Once({theirs.infer_session.get_inputs()[0].name: samples}))
    expected = {
        n: [float(np.ravel(v)[0]) for v in d.range_value] for n, d in theirs.compute_data().items()
    }
    found = ranges_of(floating, samples, calibrator="minmax", threads=1)
    assert found.keys() == expected.keys()
    assert len(found) > 10
    for name, (low, high) in found.items():
        assert low == pytest.approx(min(expected[name][0], 0), rel=1e-5, abs=1e-6)
        assert high == pytest.approx(max(expected[name][1], 0), rel=1e-5, abs=1e-6)


@pytest.mark.parametrize("calibrator", ["percentile", "entropy", "mse"])
def test_other_calibrators_stay_inside_minmax_and_differ_from_it(floating, samples, calibrator):
    outer = ranges_of(floating, samples, calibrator="minmax", threads=1)
    inner = ranges_of(floating, samples, calibrator=calibrator, threads=1)
    assert inner.keys() == outer.keys()
    assert all(outer[n][0] <= inner[n][0] <= 0 <= inner[n][1] <= outer[n][1] for n in outer)
    if calibrator != "percentile":  # 0.0005 % of these few values is less than one
        assert sum(inner[n] != outer[n] for n in outer) > 5


def test_samples_are_read_in_steps_and_how_many_changes_nothing(floating, samples, monkeypatch):
    sizes = []

    class Lazy:
        def __len__(self):
            return len(samples)

        def __getitem__(self, part):
            sizes.append(len(samples[part]))
            return samples[part]

    whole = ranges_of(floating, Lazy(), calibrator="mse", threads=1)
    assert max(sizes) <= 16
    monkeypatch.setattr("edgestill.exporters.calibrate.STEP_BYTES", 1)
    assert ranges_of(floating, samples, calibrator="mse", threads=1) == whole


def test_histograms_hold_each_value_once(floating, samples, monkeypatch):
    """The percentile calibrator sees exactly what numpy sees on the input tensor."""
    seen = {}

    def spy(counts, low, high):
        seen[(low, high)] = counts
        return low, high

    monkeypatch.setattr("edgestill.exporters.calibrate.percentile_range", spy)
    ranges_of(floating, samples, calibrator="percentile", threads=1)
    counts, low, high = histogram(samples)
    found = seen[(low, high)]
    assert found.sum() == samples.size
    # a value on an edge may fall to either side in float32
    assert np.abs(np.cumsum(found) - np.cumsum(counts)).max() <= 2


@pytest.mark.parametrize("shift", [0.0, 3.0])
def test_percentile_cuts_the_quantiles_of_numpy(shift):
    values = outliers() + shift
    counts, low, high = histogram(values)
    width = (high - low) / BINS
    found = percentile_range(counts, low, high, percentile=99.9)
    expected = np.quantile(values, [0.0005, 0.9995])
    assert found[0] == pytest.approx(expected[0], abs=2 * width)
    assert found[1] == pytest.approx(expected[1], abs=2 * width)


def test_mse_is_the_best_of_all_pairs_of_ends():
    for values in (outliers(), np.maximum(outliers(1), 0), -np.abs(outliers(2)), outliers(3) + 2):
        values = values[:30_000]
        counts, low, high = histogram(values)
        lows = low * FRACTIONS[:25] if low else [0.0]
        highs = high * FRACTIONS[:25] if high else [0.0]
        best = min(error_of(values, a, b) for a in lows[::3] for b in highs[::3])
        found = mse_range(counts, low, high)
        # values count at the centre of their bin, 1/32 of a level wide
        assert error_of(values, *found) <= 1.002 * best
        assert error_of(values, *found) <= error_of(values, low, high)


def test_mse_gives_up_an_outlier_and_keeps_a_uniform_range():
    """One of a million at 10: kept, steps of 11/255 cost 1.6e-4; at 5, 25e-6 and 0.5e-4."""
    values = np.linspace(-1, 1, 1_000_000)
    assert mse_range(*histogram(values)) == (-1, 1)
    values[0] = 10.0
    assert mse_range(*histogram(values))[1] < 7


def brute_divergence(counts, first, last):
    """Σ p ln(p / q) by loops, straight from the definition."""
    p = [float(c) for c in counts[first:last]]
    n = len(p)
    levels = [[i for i in range(n) if i * 256 // n == level] for level in range(256)]
    q = [0.0] * n
    inside = list(p)
    p[0] += float(sum(counts[:first]))
    p[-1] += float(sum(counts[last:]))
    for level in levels:
        filled = [i for i in level if p[i] > 0]
        for i in filled:
            q[i] = sum(inside[j] for j in level) / len(filled)
    shares = []
    for side in (p, q):
        share = [c / sum(side) or 1e-4 for c in side]
        shares.append([s / sum(share) for s in share])
    return sum(a * np.log(a / b) for a, b in zip(*shares, strict=True))


@pytest.mark.parametrize("one_sided", [False, True])
def test_entropy_is_the_candidate_of_least_divergence(one_sided):
    values = np.maximum(outliers(), 0) if one_sided else outliers()
    counts, low, high = histogram(values)
    coarse = counts.reshape(ENTROPY_BINS, -1).sum(axis=1)
    zero = int(-low / (high - low) * ENTROPY_BINS)
    coarse[zero] = min(coarse[zero], max(coarse[max(zero - 1, 0)] * (zero > 0), coarse[zero + 1]))
    width = (high - low) / ENTROPY_BINS
    divergences = {}
    for k in range(128, 0, -8):
        first = round(zero * (1 - k / 128))
        last = round(zero + (ENTROPY_BINS - zero) * k / 128)
        if last - first >= 256:
            ends = (low + first * width, low + last * width)
            divergences[ends] = brute_divergence(coarse, first, last)
    found = entropy_range(counts, low, high)
    place = [round((end - low) / width) for end in found]
    assert brute_divergence(coarse, *place) <= min(divergences.values()) + 1e-12
    assert found[1] < high  # more bins than levels: not the min-max range


def test_scale_and_zero_point_are_those_that_onnxruntime_writes():
    rng = np.random.default_rng(0)
    pairs = [*(rng.normal(size=(200, 2)) * 10.0 ** rng.integers(-6, 4, (200, 1))), (0, 0), (1, 5)]
    for a, b in pairs:
        low, high = np.float32(min(a, b)), np.float32(max(a, b))
        zero, scale = compute_scale_zp(low, high, np.uint8(0), np.uint8(255))
        assert scale_and_zero_point(float(low), float(high)) == (np.float32(scale), zero)


def test_a_constant_tensor_has_a_range_and_needs_no_histogram(samples):
    weight = numpy_helper.from_array(np.zeros((2, 3, 1, 1), np.float32), "w")
    graph = helper.make_graph(
        [helper.make_node("Conv", ["x", "w"], ["y"])],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", 3, 16, 16])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [weight],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8)
    assert ranges_of(model, samples, calibrator="mse", threads=1)["y"] == (0.0, 0.0)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda x: x[:0], "no calibration samples"),
        (lambda x: np.zeros_like(x), "all 64 samples are the same"),
        (lambda x: np.repeat(x[:1], 64, axis=0), "all 64 samples are the same"),
        (lambda x: np.where(x > 1, np.nan, x), "not finite"),
    ],
)
def test_samples_without_a_distribution_are_refused(floating, samples, change, said):
    with pytest.raises(ExportError, match=said):
        ranges_of(floating, change(samples), calibrator="minmax", threads=1)


def test_one_sample_that_varies_is_enough(floating, samples):
    assert ranges_of(floating, samples[:1], calibrator="minmax", threads=1)


def test_activations_that_overflow_are_refused(floating, samples):
    broken = onnx.ModelProto()
    broken.CopyFrom(floating)
    for tensor in broken.graph.initializer:
        if tensor.name == "down.weight":
            tensor.CopyFrom(
                numpy_helper.from_array(np.full((16, 8, 3, 3), 3e38, "f4"), "down.weight")
            )
    with pytest.raises(ExportError, match="not finite"):
        ranges_of(broken, samples, calibrator="minmax", threads=1)


def test_two_inputs_are_refused(samples):
    inputs = [helper.make_tensor_value_info(n, TensorProto.FLOAT, ["N", 3, 16, 16]) for n in "ab"]
    output = helper.make_tensor_value_info("c", TensorProto.FLOAT, None)
    graph = helper.make_graph([helper.make_node("Add", ["a", "b"], ["c"])], "g", inputs, [output])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8)
    with pytest.raises(ExportError, match="inputs a, b"):
        ranges_of(model, samples, calibrator="minmax", threads=1)


def test_activations_are_float_values_in_graph_order(floating):
    found = activations(floating)
    assert found[0] == floating.graph.input[0].name
    assert found[-1] == "logits"
    assert not set(found) & {tensor.name for tensor in floating.graph.initializer}


def test_channel_statistics_are_those_of_numpy(samples):
    mean, deviation = channel_statistics(samples)
    assert mean == pytest.approx(samples.mean((0, 2, 3), dtype=np.float64))
    assert deviation == pytest.approx(samples.astype(np.float64).std((0, 2, 3)))
    with pytest.raises(ExportError, match="no calibration samples"):
        channel_statistics(samples[:0])


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda x: 255 * x, "much larger"),
        (lambda x: x + 12, "much larger"),
        (lambda x: x / 255, "hardly vary"),
        (lambda x: x + 2, "far from the training set"),
    ],
)
def test_samples_far_from_normalised_are_doubted(samples, change, said):
    assert said in doubt_about_samples(*channel_statistics(change(samples)))


def test_normalised_samples_are_not_doubted(samples):
    assert doubt_about_samples(*channel_statistics(samples)) is None
    # one bright channel is a kind of picture, not a mistake
    assert doubt_about_samples(np.array([0.2, 1.9, 0.1]), np.ones(3)) is None
