"""Histograms, ranges, scales, and the numpy arithmetic of integer operators."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx
import onnx.helper
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from onnx.reference import ReferenceEvaluator

from onnx_lathe.passes.quantize import numeric, params
from onnx_lathe.passes.quantize.histogram import BINS_A_SIDE, Extremes, Histogram
from onnx_lathe.passes.quantize.scheme import Affine, Ranges, WeightScheme, exact_weight_bits
from onnx_lathe.runtime.samples import Array

FLOATS = st.floats(-(2.0**99), 2.0**99, width=32)


def histogram(*batches: Array) -> Histogram:
    """Return the histogram of batches in their order."""
    counted = Histogram()
    for batch in batches:
        assert counted.update(np.asarray(batch, np.float32))
    return counted


def clipped(ranges: Ranges, values: Array, percentile: float = 99.9) -> tuple[float, float]:
    return params.choose_range(histogram(values), ranges, percentile)


def rounding_error(values: Array, affine: Affine) -> float:
    levels = np.clip(np.rint(values / affine.scale) + affine.zero_point, 0, 255)
    return float(((values - (levels - affine.zero_point) * affine.scale) ** 2).sum())


@given(st.lists(arrays(np.float32, st.integers(0, 40), elements=FLOATS), min_size=1, max_size=6))
def test_streamed_equals_all_at_once_in_any_order(batches: list[Array]) -> None:
    whole, forward, backward = histogram(np.concatenate(batches)), histogram(*batches), histogram(*reversed(batches))
    for streamed in (forward, backward):
        assert np.array_equal(streamed.counts, whole.counts)
        assert (streamed.low, streamed.high, streamed.width) == (whole.low, whole.high, whole.width)
    assert whole.counts.sum() == sum(batch.size for batch in batches)


@pytest.mark.parametrize("scale", [1e-40, 1e-20, 1e-3, 1.0, 4095.0, 1e10, 1e38])
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_values_of_any_size_are_counted_as_float64_arithmetic_does(scale: float, sign: float) -> None:
    values = (np.random.default_rng(5).normal(size=100_000).clip(-2, 2) * sign * scale).astype(np.float32)
    values[:20] = np.float32(-1e-45), np.float32(-0.0), np.float32(1e-45), *[0.0] * 17
    counted = histogram(values)
    index = np.floor(values.astype(np.float64) / counted.width).astype(int) + BINS_A_SIDE
    assert np.array_equal(counted.counts, np.bincount(index, minlength=2 * BINS_A_SIDE))


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_is_told_and_not_counted(bad: float) -> None:
    for seen in (Extremes(), Histogram()):
        assert seen.update(np.ones(3, np.float32))
        assert not seen.update(np.array([0.0, bad, 5.0], np.float32))
        assert seen.ends == (1.0, 1.0)
    assert Extremes().ends is None


@given(arrays(np.float32, st.integers(1, 40), elements=FLOATS))
def test_the_larger_side_uses_at_least_2048_bins(values: Array) -> None:
    counted = histogram(values)
    largest = float(np.abs(values).max())
    assert counted.width == 0.0 or BINS_A_SIDE // 2 <= largest / counted.width < BINS_A_SIDE


def test_each_bin_counts_the_values_inside_it() -> None:
    values = np.random.default_rng(0).normal(size=10_000).astype(np.float32)
    counted = histogram(values)
    edges = np.arange(-BINS_A_SIDE, BINS_A_SIDE + 1) * counted.width
    assert np.array_equal(counted.counts, np.histogram(values, edges)[0])


def test_minmax_covers_all_values() -> None:
    assert clipped("minmax", np.array([-3.0, 0.5, 7.0])) == (-3.0, 7.0)


@pytest.mark.parametrize("ranges", ["minmax", "percentile", "mse", "kl"])
def test_constant_and_missing_values_have_a_range(ranges: Ranges) -> None:
    assert clipped(ranges, np.zeros(0)) == (0.0, 0.0)
    assert clipped(ranges, np.zeros(5)) == (0.0, 0.0)
    low, high = clipped(ranges, np.full(5, 4.0))
    assert low <= high == 4.0


def test_percentile_leaves_out_both_tails() -> None:
    values = np.random.default_rng(1).normal(size=100_000).astype(np.float32)
    values[0] = 1000.0
    low, high = clipped("percentile", values, 99.0)
    width = histogram(values).width
    assert low == pytest.approx(np.percentile(values, 0.5), abs=width)
    assert high == pytest.approx(np.percentile(values, 99.5), abs=width)
    assert clipped("percentile", values, 100.0) == clipped("minmax", values)


def test_mse_is_the_best_clip() -> None:
    values = np.random.default_rng(2).standard_t(3, size=50_000).astype(np.float32)
    error = rounding_error(values, params.activation(*clipped("mse", values)))
    largest = float(np.abs(values).max())
    clips = [
        (max(values.min(), -share * largest), min(values.max(), share * largest)) for share in np.arange(1, 101) / 100
    ]
    best = min(rounding_error(values, params.activation(*clip)) for clip in clips)
    # The histogram knows each value to half a bin.
    assert best <= error < 1.01 * best < rounding_error(values, params.activation(*clipped("minmax", values)))


def test_kl_clips_an_outlier_and_little_else() -> None:
    values = np.maximum(np.random.default_rng(3).normal(size=100_000), 0.0).astype(np.float32)
    bulk = float(values.max())
    values[0] = 10 * bulk
    low, high = clipped("kl", values)
    assert low == 0.0
    assert 0.4 * bulk < high < 1.5 * bulk


@given(FLOATS, FLOATS, st.booleans())
def test_zero_is_a_level_and_the_range_is_covered(first: float, second: float, power_of_two: bool) -> None:
    low, high = sorted((first, second))
    affine = params.activation(low, high, power_of_two=power_of_two)
    assert 0 <= affine.zero_point <= 255
    assert float(np.float32(affine.scale)) == affine.scale > 0.0
    if power_of_two:
        assert np.frexp(affine.scale)[0] == 0.5
    # The zero point is rounded: either end may lie half a step outside.
    slack = affine.scale * (0.5 + 1e-4)
    assert (0 - affine.zero_point) * affine.scale <= min(low, 0.0) + slack
    assert (255 - affine.zero_point) * affine.scale >= max(high, 0.0) - slack


@given(st.floats(2.0**-20, 2.0**20, width=32))
def test_no_level_lies_above_the_bound_of_a_clip(bound: float) -> None:
    affine = params.activation(0.0, bound)
    assert affine.zero_point == 0
    assert np.float32(affine.scale) * np.float32(255) <= np.float32(bound)


def test_a_relu_has_zero_point_zero_and_a_range_of_zeros_has_scale_one() -> None:
    assert params.activation(0.0, 25.5) == Affine(float(np.float32(0.1)), 0)
    assert params.activation(0.0, 0.0) == Affine(1.0, 0)
    assert params.activation(1.0, 3.0).zero_point == 0
    assert params.activation(-3.0, -1.0).zero_point == 255


@pytest.mark.parametrize("bits", [7, 8])
def test_weights_are_symmetric_a_scale_a_channel(bits: int) -> None:
    scheme = WeightScheme(8 if bits == 8 else 7)
    weight = np.random.default_rng(4).normal(size=(6, 5)).astype(np.float32)
    weight[:, 2] = 0.0
    scales = params.weight_scales(weight, 1, scheme)
    levels = params.quantize_weight(weight, scales, 1, scheme)
    assert levels.dtype == np.int8
    assert scales[2] == 1.0
    others = [0, 1, 3, 4]
    assert np.array_equal(scales[others], (np.abs(weight).max(axis=0) / scheme.limit)[others])
    assert np.array_equal(np.abs(levels).max(axis=0)[others], [scheme.limit] * 4)
    assert (np.abs(levels * scales - weight) <= 0.5001 * scales).all()


def test_one_scale_a_tensor_and_powers_of_two() -> None:
    weight = np.array([[0.1, -0.5], [12.7, 3.0]], np.float32)
    assert params.weight_scales(weight, 0, WeightScheme(per_channel=False)) == pytest.approx(0.1)
    assert params.weight_scales(weight, 0, WeightScheme(power_of_two=True)).tolist() == [2.0**-7, 2.0**-3]


def test_a_large_bias_widens_the_weight_scale_until_it_fits() -> None:
    weight, bias, input_scale = np.zeros((2, 3), np.float32), np.array([1e6, 0.0], np.float32), 1e-4
    scales = params.weight_scales(weight, 0, WeightScheme(), params.bias_floor(bias, input_scale))
    levels = params.quantize_bias(bias, params.bias_scales(input_scale, scales))
    assert levels.dtype == np.int32
    assert levels[0] == pytest.approx(2**30, rel=1e-6)
    assert levels[0] * np.float64(np.float32(input_scale) * scales[0]) == pytest.approx(1e6, rel=1e-6)


def test_bias_scales_are_float32_products() -> None:
    scales = np.array([0.1, 0.3], np.float32)
    assert params.bias_scales(0.7, scales).tobytes() == (np.float32(0.7) * scales).tobytes()


@pytest.mark.parametrize(
    ("cpu_class", "bits"),
    [
        ("x86_64 avx512-vnni", 8),
        ("x86_64 amx-int8", 8),
        ("x86_64 avx-vnni", 8),
        ("x86_64 avx512", 7),
        ("x86_64 avx2", 7),
        ("amd64 baseline", 7),
        ("aarch64 dotprod", 8),
        ("arm64 baseline", 8),
    ],
)
def test_weights_have_seven_bits_where_products_saturate(cpu_class: str, bits: int) -> None:
    assert exact_weight_bits(cpu_class) == bits


@pytest.mark.parametrize(
    ("shape", "kernel", "groups", "strides", "pads", "dilations"),
    [
        ((2, 3, 9), (4, 3, 3), 1, (2,), (1, 0), (1,)),
        ((2, 4, 7, 6), (6, 2, 3, 2), 2, (1, 2), (1, 0, 2, 1), (2, 1)),
        ((1, 5, 6, 6), (5, 1, 3, 3), 5, (1, 1), (1, 1, 1, 1), (1, 1)),
        ((1, 2, 4, 5, 3), (3, 2, 2, 2, 2), 1, (1, 2, 1), (0,) * 6, (1, 1, 1)),
    ],
)
def test_convolve_is_conv(
    shape: Sequence[int],
    kernel: Sequence[int],
    groups: int,
    strides: Sequence[int],
    pads: Sequence[int],
    dilations: Sequence[int],
) -> None:
    generator = np.random.default_rng(5)
    x, w = generator.integers(-9, 9, shape).astype(np.float64), generator.integers(-9, 9, kernel).astype(np.float64)
    node = onnx.helper.make_node(
        "Conv", ["x", "w"], ["y"], group=groups, strides=strides, pads=pads, dilations=dilations
    )
    assert np.array_equal(numeric.convolve(x, w, groups, strides, pads, dilations), reference(node, x=x, w=w)[0])


@pytest.mark.parametrize("auto_pad", ["SAME_UPPER", "SAME_LOWER"])
def test_same_pads_are_those_of_onnx(auto_pad: str) -> None:
    x, w = np.random.default_rng(6).integers(-9, 9, (1, 2, 8, 7)).astype(np.float64), np.ones((1, 2, 4, 3))
    pads = numeric.same_pads((8, 7), (4, 3), (2, 2), (1, 1), upper=auto_pad == "SAME_UPPER")
    node = onnx.helper.make_node("Conv", ["x", "w"], ["y"], auto_pad=auto_pad, strides=[2, 2], kernel_shape=[4, 3])
    assert np.array_equal(numeric.convolve(x, w, 1, (2, 2), pads, (1, 1)), reference(node, x=x, w=w)[0])


@pytest.mark.parametrize("values", [[-1.0, 2.0, 0.3], [1.0, 2.0, 3.3], [-5.0, -0.1, -3.0], [0.0, 0.0, 0.0]])
def test_dynamic_quantize_is_dynamic_quantize_linear(values: list[float]) -> None:
    x = np.array(values, np.float32)
    node = onnx.helper.make_node("DynamicQuantizeLinear", ["x"], ["q", "s", "z"])
    levels, scale, zero_point = numeric.dynamic_quantize(x)
    if not x.any():
        assert (levels.tolist(), scale, zero_point) == ([0, 0, 0], 1.0, 0)
        return
    want_levels, want_scale, want_zero_point = reference(node, x=x)
    assert np.array_equal(levels, want_levels)
    assert (scale, zero_point) == (want_scale, want_zero_point)


def reference(node: onnx.NodeProto, **inputs: Array) -> list[Array]:
    """Run one node in the reference implementation of onnx."""
    opset = onnx.helper.make_opsetid("", 20)

    def info(name: str, array: Array | None) -> onnx.ValueInfoProto:
        dtype = onnx.TensorProto.FLOAT if array is None else onnx.helper.np_dtype_to_tensor_dtype(array.dtype)
        return onnx.helper.make_tensor_value_info(name, dtype, None)

    graph = onnx.helper.make_graph(
        [node], "one", [info(name, array) for name, array in inputs.items()], [info(name, None) for name in node.output]
    )
    results = ReferenceEvaluator(onnx.helper.make_model(graph, opset_imports=[opset])).run(None, inputs)
    return [np.asarray(result) for result in results]
