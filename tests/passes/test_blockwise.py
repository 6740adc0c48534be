"""Kernels of block-wise weights against the plain formulas: levels, packing, HQQ and GPTQ."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given
from hypothesis import strategies as st

from onnx_lathe.passes.quantize import gptq, packing
from onnx_lathe.passes.quantize.blockwise import (
    BlockScheme,
    Floats,
    dequantize,
    half_quadratic_grid,
    levels,
    nearest_grid,
    packed,
    unpacked,
)
from onnx_lathe.passes.quantize.numeric import Wide
from tests import tolerances

SCHEMES = [
    BlockScheme(bits, size, symmetric, power_of_two)
    for bits in (4, 8)
    for size in (16, 64)
    for symmetric in (False, True)
    for power_of_two in (False, True)
]
OUTPUTS = 70


def heavy_tailed(shape: tuple[int, ...], seed: int = 0) -> Floats:
    return (np.random.default_rng(seed).standard_t(3, shape) * 0.02).astype(np.float32)


def naive(weight: Floats, scheme: BlockScheme) -> tuple[list[list[int]], Floats, list[list[int]]]:
    """Return levels, scales and zero points of ``[outputs, inputs]``, one block after the other, by the formula."""
    found: list[list[int]] = []
    scales: list[list[np.float32]] = []
    zeros: list[list[int]] = []
    for row in weight:
        found.append([])
        scales.append([])
        zeros.append([])
        for start in range(0, len(row), scheme.size):
            block = row[start : start + scheme.size]
            low, high = np.float64(min(block.min(), 0.0)), np.float64(max(block.max(), 0.0))
            step = max(high, -low) / (2 ** (scheme.bits - 1) - 1) if scheme.symmetric else (high - low) / scheme.top
            step = 1.0 if step == 0.0 else step
            scale = np.float32(2.0 ** np.ceil(np.log2(step)) if scheme.power_of_two else step)
            zero = 2 ** (scheme.bits - 1) if scheme.symmetric else round(float(np.float32(-low) / scale))
            scales[-1].append(scale)
            zeros[-1].append(zero)
            exact = np.rint(block / scale) + np.float32(zero)
            found[-1] += [int(level) for level in np.clip(exact, 0, scheme.top)]
    return found, np.array(scales, np.float32), zeros


@pytest.mark.parametrize("output_axis", [0, 1])
@pytest.mark.parametrize("inputs", [64, 136, 200])
@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_a_weight_is_rounded_as_the_formula_says(
    scheme: BlockScheme, inputs: int, output_axis: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(packing, "SLAB_BYTES", 3 * 16 * OUTPUTS * 4)
    monkeypatch.setattr(packing, "TILE_BYTES", 1)
    weight = heavy_tailed((OUTPUTS, inputs))
    weight[3] = 0.0
    weight[4] = 0.7
    weight[5, :16] = -0.3
    stored = weight if output_axis == 0 else np.ascontiguousarray(weight.T)
    stored.tofile(tmp_path / "w.bin")
    external = ir.ExternalTensor(
        "w.bin", 0, stored.nbytes, ir.DataType.FLOAT, shape=ir.Shape(stored.shape), name="w", base_dir=tmp_path
    )
    want, scales, zeros = naive(weight, scheme)
    for tensor in (ir.tensor(stored), external):
        found = packing.pack(tensor, output_axis, scheme, nearest_grid)
        assert found.levels.shape == (OUTPUTS, -(-inputs // scheme.size), scheme.size * scheme.bits // 8)
        np.testing.assert_array_equal(
            unpacked(found.levels, scheme.bits, scheme.size).reshape(OUTPUTS, -1)[:, :inputs], want
        )
        np.testing.assert_array_equal(found.scales, scales)
        np.testing.assert_array_equal(unpacked(found.zeros, scheme.bits, scales.shape[1]), zeros)
        real = found.rows(np.arange(OUTPUTS), scheme, inputs)
        steps = np.repeat(scales, scheme.size, axis=1)[:, :inputs]
        # A zero point that is rounded moves the last level by up to half a step.
        assert np.all(np.abs(real - weight) <= 1.0001 * steps)
        assert not real[3].any()
        if not scheme.power_of_two:
            np.testing.assert_allclose(real[4], 0.7, rtol=1e-6)


@given(
    st.integers(1, 5).flatmap(
        lambda rows: st.lists(st.lists(st.integers(0, 15), min_size=7, max_size=7), min_size=rows, max_size=rows)
    )
)
def test_packing_loses_nothing(rows: list[list[int]]) -> None:
    found = np.array(rows, np.uint8)
    for count in (6, 7):
        stored = packed(found[:, :count], 4)
        assert stored.shape == (len(rows), (count + 1) // 2)
        np.testing.assert_array_equal(unpacked(stored, 4, count), found[:, :count])
    assert packed(found, 8) is found


def test_two_levels_share_a_byte_the_first_in_the_low_half() -> None:
    assert packed(np.array([1, 2, 15], np.uint8), 4).tolist() == [0x21, 0x0F]


def test_weights_may_be_of_any_size() -> None:
    scheme = BlockScheme(4, 16)
    for size in (1e-30, 1e-10, 1e30):
        values = (np.linspace(-1.0, 2.0, 16, dtype=np.float32) * np.float32(size)).reshape(1, 1, 16)
        for find_grid in (nearest_grid, half_quadratic_grid):
            grid = find_grid(values, 2, scheme)
            real = dequantize(levels(values, grid, scheme.top), grid)
            assert np.all(np.isfinite(real))
            assert np.abs(real - values).max() <= max(0.2 * size, 2.0**-60)


@pytest.mark.parametrize("axis", [1, 2])
@pytest.mark.parametrize("scheme", SCHEMES[:8], ids=str)
def test_hqq_errs_less_than_the_nearest_grid_on_heavy_tails(scheme: BlockScheme, axis: int) -> None:
    weight = heavy_tailed((200, 4, scheme.size))
    values = weight if axis == 2 else np.ascontiguousarray(np.moveaxis(weight, 0, 2))
    error: dict[str, Floats] = {}
    for name, find_grid in (("rtn", nearest_grid), ("hqq", half_quadratic_grid)):
        grid = find_grid(values, axis, scheme)
        found = levels(values, grid, scheme.top)
        assert np.array_equal(grid[1], np.rint(grid[1]))
        assert 0 <= grid[1].min() <= grid[1].max() <= scheme.top
        if scheme.power_of_two:
            assert np.array_equal(np.exp2(np.rint(np.log2(grid[0]))), grid[0])
        error[name] = dequantize(found, grid) - values
    squares = {name: np.square(each).sum(axis=axis) for name, each in error.items()}
    assert np.all(squares["hqq"] <= squares["rtn"] * (1 + tolerances.REORDERED))
    # Of powers of two there is only one other to choose, where it is nearer.
    share = 1.0 if scheme.power_of_two else 0.98
    assert squares["hqq"].sum() < share * squares["rtn"].sum()
    assert np.abs(error["hqq"]).sum() < share * np.abs(error["rtn"]).sum()


def test_hqq_does_not_depend_on_the_size_of_the_weights() -> None:
    values, scheme = heavy_tailed((50, 2, 32)), BlockScheme(4, 32)
    small, large = (half_quadratic_grid(values * np.float32(factor), 2, scheme) for factor in (2.0**-20, 2.0**10))
    np.testing.assert_array_equal(small[0] * np.float32(2.0**30), large[0])
    np.testing.assert_array_equal(small[1], large[1])


def correlated(rows: int, inputs: int, seed: int = 1) -> Floats:
    """Return inputs that a few common causes and some noise make, of unlike energies."""
    rng = np.random.default_rng(seed)
    causes = rng.standard_normal((rows, 8)) @ rng.standard_normal((8, inputs))
    return ((causes + 0.3 * rng.standard_normal((rows, inputs))) * rng.uniform(0.2, 2.0, inputs)).astype(np.float32)


def plain_triangle(hessian: Wide) -> Wide:
    return np.asarray(np.linalg.cholesky(np.linalg.inv(hessian)).T, np.float64)


def test_moments_that_have_no_factors_are_damped_until_they_do() -> None:
    gram = np.array([[1.0, 3.0], [3.0, 1.0]], np.float32)
    upper = gptq.order_of(gram, by_activation=False).upper.astype(np.float64)
    np.testing.assert_allclose(np.linalg.inv(upper.T @ upper), gram + 10.0 * np.eye(2), rtol=1e-5)


def plain_gptq(weight: Floats, x: Floats, scheme: BlockScheme) -> tuple[Floats, Floats]:
    """Return levels and real weights of ``[inputs, outputs]`` as the paper says it, a column at a time, in float64."""
    hessian = 2.0 * x.T.astype(np.float64) @ x.astype(np.float64)
    hessian += 0.01 * np.diagonal(hessian).mean() * np.eye(len(hessian))
    upper = plain_triangle(hessian)
    rest = weight.astype(np.float64)
    found, real = np.empty_like(weight), np.empty_like(weight)
    grid = (np.zeros(0, np.float32), np.zeros(0, np.float32))
    for i in range(len(weight)):
        if i % scheme.size == 0:
            scales, zeros = nearest_grid(rest[None, i : i + scheme.size].astype(np.float32), 1, scheme)
            grid = scales[0, 0], zeros[0, 0]
        found[i] = levels(rest[i].astype(np.float32), grid, scheme.top)
        real[i] = dequantize(found[i], grid)
        rest[i:] -= np.outer(upper[i, i:], (rest[i] - real[i]) / upper[i, i])
    return found, real


def output_error(x: Floats, weight: Floats, real: Floats) -> float:
    return float(np.square(x @ (real - weight)).sum() / np.square(x @ weight).sum())


def real_of(weight: Floats, order: gptq.Order, scheme: BlockScheme) -> tuple[Floats, Floats]:
    found, scales, zeros = gptq.solve(weight, order, scheme)
    place = np.arange(len(weight)) // scheme.size
    return found.astype(np.float32), dequantize(found, (scales[place], zeros[place]))


@pytest.mark.parametrize(
    "scheme", [BlockScheme(4, 16), BlockScheme(4, 256), BlockScheme(4, 32, True), BlockScheme(8, 128)]
)
def test_gptq_is_the_column_by_column_algorithm(scheme: BlockScheme) -> None:
    inputs = 300
    x, weight = correlated(400, inputs), heavy_tailed((inputs, 40), seed=2)
    order = gptq.order_of(x.T @ x, by_activation=False)
    found, real = real_of(weight, order, scheme)
    want, want_real = plain_gptq(weight, x, scheme)
    # A tie that rounding decides moves all that comes after it, of that output.
    same = np.all(np.abs(real - want_real) < 1e-4 * np.abs(want_real).max(), axis=0)
    assert same.mean() > 0.7
    np.testing.assert_array_equal(found[:, same], want[:, same])
    assert output_error(x, weight, real) == pytest.approx(output_error(x, weight, want_real), rel=0.1)


def test_the_triangle_is_the_cholesky_factor_of_the_inverse() -> None:
    x = correlated(200, 50)
    gram = x.T @ x
    hessian = gram.astype(np.float64)
    hessian += 0.01 * np.diagonal(hessian).mean() * np.eye(50)
    want = plain_triangle(hessian)
    np.testing.assert_allclose(gptq.order_of(gram, by_activation=False).upper, want, atol=1e-4 * np.abs(want).max())
    order = gptq.order_of(gram, by_activation=True)
    assert np.all(np.diff(np.diagonal(gram)[order.inputs]) <= 0.0)
    turned = hessian[np.ix_(order.inputs, order.inputs)]
    wide = order.upper.astype(np.float64)
    np.testing.assert_allclose(wide.T @ wide @ turned, np.eye(50), atol=1e-3)
    np.testing.assert_array_equal(np.tril(order.upper, -1), 0.0)


@pytest.mark.parametrize("by_activation", [False, True])
@pytest.mark.parametrize("scheme", [BlockScheme(4, 32), BlockScheme(4, 32, True, True)], ids=str)
def test_gptq_changes_outputs_less_than_rounding(scheme: BlockScheme, by_activation: bool) -> None:
    x, weight = correlated(600, 200), heavy_tailed((200, 60), seed=3)
    _, real = real_of(weight, gptq.order_of(x.T @ x, by_activation=by_activation), scheme)
    nearest = packing.pack(ir.tensor(weight), 1, scheme, nearest_grid).rows(np.arange(60), scheme, 200).T
    assert output_error(x, weight, real) < 0.5 * output_error(x, weight, nearest)


def test_an_input_that_is_always_zero_is_rounded_alone() -> None:
    x, weight, scheme = correlated(100, 64), heavy_tailed((64, 20)), BlockScheme(4, 16)
    x[:, 10:20] = 0.0
    found, _ = real_of(weight, gptq.order_of(x.T @ x, by_activation=False), scheme)
    assert found.max() <= 15
    nothing, _ = real_of(weight, gptq.order_of(np.zeros((64, 64), np.float32), by_activation=False), scheme)
    nearest = packing.pack(ir.tensor(weight), 1, scheme, nearest_grid)
    np.testing.assert_array_equal(nothing.T, unpacked(nearest.levels, 4, 16).reshape(20, 64))


def test_what_is_computed_together_is_computed_once_and_forgotten() -> None:
    calls: list[int] = []

    def compute() -> list[Floats]:
        calls.append(len(calls))
        return [np.full(2, len(calls), np.float32), np.full(3, len(calls), np.float32)]

    together = packing.Together(compute)
    assert together.take(1).tolist() == [1.0, 1.0, 1.0]
    assert together.take(0).tolist() == [1.0, 1.0]
    assert calls == [0]
    assert together.take(0).tolist() == [2.0, 2.0]


@pytest.mark.parametrize("output_axis", [0, 1])
def test_some_outputs_are_read_alone(output_axis: int) -> None:
    stored = heavy_tailed((30, 40))
    want = stored.T[:, 5:9] if output_axis == 0 else stored[:, 5:9]
    np.testing.assert_array_equal(packing.columns(ir.tensor(stored), output_axis, 5, 9), want)
