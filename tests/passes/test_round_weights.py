"""Learned rounding: lower output errors than nearest, levels that the later quantization finds, and what is held."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from onnx_lathe.passes import files
from onnx_lathe.passes.quantize.static import QuantizeStatic
from onnx_lathe.passes.registry import parse, spell
from onnx_lathe.passes.repair.adaround import RoundWeights, WeightsRounded
from onnx_lathe.passes.repair.rounding import errors_of, gram, round_up
from onnx_lathe.passes.taps import tap
from onnx_lathe.runtime.errors import PassSpecError, SamplesError, UnsupportedModelError
from onnx_lathe.runtime.samples import Array, Samples
from tests import graphs, repairs

MIXED = """
mixed (float[N, 8, 8, 8] image) => (float[N, 5] logits)
<float[32, 8, 3, 3] w1, float[32] b1, float[32, 1, 3, 3] w2, float[32, 32, 1, 1] w3, float[32, 5] w4>
{
  [conv] a = Conv <pads = [1, 1, 1, 1]> (image, w1, b1)
  [relu1] b = Relu (a)
  [depth] c = Conv <group = 32, auto_pad = "SAME_UPPER", strides = [2, 2], kernel_shape = [3, 3]> (b, w2)
  [relu2] d = Relu (c)
  [project] e = Conv (d, w3)
  [gap] f = GlobalAveragePool (e)
  [flat] g = Flatten (f)
  [fc] logits = Gemm <alpha = 0.5> (g, w4)
}
"""
OPTIONS = [
    RoundWeights(weight_bits=8),
    RoundWeights(weight_bits=7, per_channel=False),
    RoundWeights(weight_bits=8, power_of_two=True),
    RoundWeights(weight_bits=8, weight_exponent=-5),
]


def correlated(path: Path) -> Samples:
    """Return samples whose entries depend on each other."""
    smooth = np.linalg.cholesky(0.9 ** np.abs(np.subtract.outer(np.arange(8), np.arange(8))))
    return Samples(
        tuple(
            {name: (array @ smooth.T).astype(np.float32) for name, array in batch.items()}
            for batch in graphs.samples_for(path, batches=16).batches
        )
    )


def levels(path: Path, request: RoundWeights, data: Samples) -> dict[str, Array]:
    """Return the levels that static quantization with the same options makes of each weight, as the file holds them."""
    static = QuantizeStatic(
        per_channel=request.per_channel,
        power_of_two=request.power_of_two,
        weight_exponent=request.weight_exponent,
        weight_bits=request.weight_bits,
    )
    graph = repairs.quantized(path, static, data).graph
    return {
        name.partition("_")[0]: value.const_value.numpy()
        for name, value in graph.initializers.items()
        if name.startswith("w") and name.endswith("_quantized") and value.const_value is not None
    }


def correlated_rows(rows: int, columns: int) -> Array:
    generator = np.random.default_rng(0)
    mixing = generator.normal(size=(columns, columns)) * 0.9 ** np.arange(columns)[:, None]
    return generator.normal(size=(rows, columns)) @ mixing + 0.1 * generator.normal(size=(rows, columns))


@pytest.mark.parametrize("limit", [7, 15, 31, 63, 127])
def test_learned_rounding_has_a_lower_output_error_at_every_width(limit: int):
    weight = np.random.default_rng(1).normal(size=(1, 16, 48)).astype(np.float32)
    moments = gram(correlated_rows(2_000, 48), 1)
    scales = np.abs(weight).max(axis=2, keepdims=True) / limit
    learned = round_up(weight, scales, moments, limit, 300)
    up, before, after = learned.up, learned.nearest_error, learned.error
    assert after.sum() < 0.5 * before.sum()
    exact = weight / scales
    # The errors are those of the levels, and no output is worse than at nearest.
    np.testing.assert_allclose(errors_of(np.floor(exact) + up - exact, moments), after, rtol=1e-3)
    np.testing.assert_allclose(errors_of(np.rint(exact) - exact, moments), before, rtol=1e-3)
    np.testing.assert_allclose(errors_of(exact, moments), learned.energy, rtol=1e-3)
    assert learned.moved == np.count_nonzero(np.floor(exact) + up != np.rint(exact))
    assert (after <= before).all()
    assert np.abs(np.floor(exact) + up - exact).max() < 1.0


def test_hardly_any_of_all_roundings_of_a_few_weights_is_better():
    weight = np.random.default_rng(2).normal(size=(1, 6, 8)).astype(np.float32)
    moments = gram(correlated_rows(500, 8), 1)
    scales = np.abs(weight).max(axis=2, keepdims=True) / 7
    learned = round_up(weight, scales, moments, 7, 1_000)
    up, after = learned.up, learned.error
    exact = (weight / scales)[0]
    every = np.stack(np.meshgrid(*[[0, 1]] * 8, indexing="ij"), axis=-1).reshape(-1, 8)
    held = np.abs(weight[0]) >= np.abs(weight[0]).max(axis=1, keepdims=True)
    for output in range(6):
        tried = every[(every == up[0, output])[:, held[output]].all(axis=1)]
        errors = errors_of((np.floor(exact[output]) + tried - exact[output])[None], moments)
        assert (errors < 0.999 * after[0, output]).mean() < 0.05


def test_groups_are_problems_of_their_own():
    weight = np.random.default_rng(3).normal(size=(5, 4, 9)).astype(np.float32)
    rows = np.concatenate([correlated_rows(300, 9) * (1 + group) for group in range(5)], axis=1)
    moments, scales = gram(rows, 5), np.abs(weight).max(axis=2, keepdims=True) / 7
    together = round_up(weight, scales, moments, 7, 100).up
    for group in range(5):
        part = slice(group, group + 1)
        np.testing.assert_array_equal(round_up(weight[part], scales[part], moments[part], 7, 100).up, together[part])


def test_what_is_on_the_grid_or_beyond_it_is_held():
    weight = np.array([[[7.0, -7.0, 2.0, -3.0, 9.4, -8.6]]], np.float32)
    learned = round_up(weight, np.ones((1, 1, 1), np.float32), gram(correlated_rows(50, 6), 1), 7, 50)
    np.testing.assert_array_equal(np.clip(np.floor(weight) + learned.up, -7, 7), [[[7, -7, 2, -3, 7, -7]]])
    assert learned.moved == 0
    np.testing.assert_array_equal(learned.error, learned.nearest_error)


@pytest.mark.parametrize("request_", OPTIONS, ids=spell)
def test_quantization_with_the_same_options_finds_exactly_the_chosen_levels(request_: RoundWeights, tmp_path: Path):
    path = repairs.source(tmp_path, MIXED)
    data = correlated(path)
    target, edit = repairs.repair(path, request_, data)
    assert isinstance(edit, WeightsRounded)
    sources = {item.source for item in edit.layers}
    plain, found = levels(path, request_, data), levels(target, request_, data)
    assert sources <= set(plain)
    for item in edit.layers:
        shape = plain[item.source].shape
        weight = repairs.read(path, item.layer) * np.float32(item.alpha)
        axis = 1 if item.form.inputs_first else 0
        scales = (
            item.scales.reshape([-1 if i == axis else 1 for i in range(weight.ndim)])
            if item.scales.ndim
            else item.scales
        )
        want = repairs.read(target, item.layer) / scales
        np.testing.assert_allclose(want, np.rint(want), atol=1e-4)
        np.testing.assert_array_equal(found[item.source], np.rint(want).astype(np.int8))
        assert found[item.source].shape == shape
        assert (found[item.source] != plain[item.source]).any()
        assert np.abs(found[item.source].astype(np.int32) - plain[item.source]).max() == 1


def test_the_outputs_of_layers_lose_less_than_at_nearest(tmp_path: Path):
    path = repairs.source(tmp_path, MIXED)
    data, request = correlated(path), RoundWeights(weight_bits=7, per_channel=False)
    target, edit = repairs.repair(path, request, data)
    described = json.loads(json.dumps(edit.describe()))["layers"]
    assert [item["layer"] for item in described] == ["a", "c", "e", "logits"]
    assert all(item["error"] < 0.8 * item["nearest_error"] and 0.0 < item["moved"] < 0.5 for item in described)
    read = np.concatenate([values["f"].reshape(-1, 32) for values in tap(files.load(path), ["f"], data)])
    weight, learned = repairs.read(path, "logits") * 0.5, repairs.read(target, "logits")
    scale = np.abs(weight).max() / 63
    nearest = np.rint(weight / scale) * scale
    energy = np.square(read @ weight).sum()
    figures = described[-1]["nearest_error"], described[-1]["error"]
    for figure, rounded in zip(figures, (nearest, learned), strict=True):
        assert np.square(read @ rounded - read @ weight).sum() / energy == pytest.approx(figure, rel=0.01)


def test_the_result_is_the_same_every_time_and_streams_in_any_portions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = repairs.source(tmp_path, MIXED)
    data, request = correlated(path), RoundWeights(iterations=50)
    first = request.plan(files.load(path), data, None)
    monkeypatch.setattr("onnx_lathe.passes.repair.adaround.PORTION_BYTES", 1)
    second = request.plan(files.load(path), data, None)
    for one, other in zip(first.layers, second.layers, strict=True):
        np.testing.assert_array_equal(one.up, other.up)


def test_layers_are_chosen_and_left_out_by_name(tmp_path: Path):
    model = files.load(repairs.source(tmp_path, MIXED))
    data = correlated(tmp_path / "source.onnx")
    chosen = RoundWeights(iterations=50, layers=("conv", "fc"), exclude=("project",)).plan(model, data, None)
    assert {item.layer for item in chosen.layers} == {"a", "logits"}
    with pytest.raises(PassSpecError, match=r"option layers: got 'con', expected the name of a node .* mean 'conv'"):
        RoundWeights(layers=("con",)).plan(model, data, None)
    assert parse("round-weights{layers=conv|fc,iterations=50}") == (RoundWeights(iterations=50, layers=("conv", "fc")),)


def test_wide_layers_and_weights_on_their_grid_are_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = repairs.source(tmp_path, MIXED)
    data, request = correlated(path), RoundWeights(iterations=50, weight_bits=8)
    monkeypatch.setattr("onnx_lathe.passes.repair.adaround.MAX_COLUMNS", 40)
    target, edit = repairs.repair(path, request, data)
    assert [(item.node, item.reason) for item in edit.refused] == [("conv", "an output sums 72 inputs, more than 40")]
    with pytest.raises(UnsupportedModelError, match="round-weights: got no layer that a learned rounding makes better"):
        request.plan(files.load(target), data, None)


def test_bad_input_is_named(tmp_path: Path):
    path = repairs.source(tmp_path, MIXED)
    with pytest.raises(SamplesError, match="round-weights: got no samples, expected calibration samples"):
        RoundWeights().plan(files.load(path), None, None)
    with pytest.raises(PassSpecError, match=r"round-weights\{iterations\}: got 0, expected greater than or equal to 1"):
        parse("round-weights{iterations=0}")
    huge = files.load(repairs.source(tmp_path, MIXED, {"w1": 1e38}))
    with pytest.raises(SamplesError, match=r"value 'b': got NaN or infinity as the network runs"):
        RoundWeights().plan(huge, correlated(path), None)
    broken = files.load(repairs.source(tmp_path, MIXED, {"w2": np.inf}))
    with pytest.raises(UnsupportedModelError, match="weight 'w2': got NaN or infinity in it"):
        RoundWeights().plan(broken, correlated(path), None)
