"""Bias correction: the formula, the means it restores, biases that lack, and what the quantization to come rounds."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from onnx_lathe.passes import files
from onnx_lathe.passes.quantize.static import QuantizeStatic
from onnx_lathe.passes.repair.correct import BiasesCorrected, CorrectBiases
from onnx_lathe.runtime.errors import PassSpecError, SamplesError, UnsupportedModelError
from onnx_lathe.runtime.samples import Array, Samples
from onnx_lathe.runtime.session import Session
from tests import graphs, repairs
from tests.tolerances import REORDERED

LAYERS = """
layers (float[N, 24] x) => (float[N, 4] y)
<float[24, 32] w1, float[32] b1, float[16, 32] w2, float[16] b2, float[16, 4] w3>
{
  [first] a = MatMul (x, w1)
  [bias] b = Add (b1, a)
  [relu1] c = Relu (b)
  [second] d = Gemm <transB = 1, alpha = 0.5, beta = 2.0> (c, w2, b2)
  [relu2] e = Relu (d)
  [third] y = MatMul (e, w3)
}
"""
CONV = """
conv (float[N, 64, 6, 6] image) => (float[N, 16, 6, 6] y)
<float[16, 32, 3, 3] w, float[16] b>
{
  [conv] y = Conv <group = 2, pads = [1, 1, 1, 1]> (image, w, b)
}
"""


def positive(path: Path, count: int = 64) -> Samples:
    """Return samples whose mean is far from zero, as behind a Relu."""
    feeds = graphs.samples_for(path, batches=count // 2).batches
    return Samples(tuple({name: np.abs(array) for name, array in batch.items()} for batch in feeds))


def rounded(weight: Array, axis: int, limit: int = 127, per_channel: bool = True) -> Array:
    """Return the nearest levels of a weight as real numbers."""
    others = tuple(i for i in range(weight.ndim) if i != axis) if per_channel else None
    scale = np.abs(weight).max(axis=others, keepdims=True) / limit
    return np.rint(weight / scale) * scale


def shifts(edit: object) -> dict[str, Array]:
    assert isinstance(edit, BiasesCorrected)
    return {item.layer: item.shift for item in edit.corrections}


def test_the_shift_is_that_of_the_formula_for_each_kind_of_layer(tmp_path: Path):
    path = repairs.source(tmp_path, LAYERS)
    data = positive(path)
    target, edit = repairs.repair(path, CorrectBiases(weight_bits=8), data)
    found, w1 = shifts(edit), repairs.read(path, "a")
    mean = np.concatenate([feeds["x"] for feeds in data.batches]).mean(axis=0)
    np.testing.assert_allclose(found["a"], -(rounded(w1, 1) - w1).T @ mean, rtol=1e-3, atol=1e-7)
    np.testing.assert_allclose(repairs.read(target, "b", 0), repairs.read(path, "b", 0) + found["a"], rtol=REORDERED)
    want = 2.0 * repairs.read(path, "d", 2) + found["d"]
    np.testing.assert_allclose(repairs.read(target, "d", 2), want, rtol=REORDERED)
    # The last MatMul had no bias: now an Add follows, and the output keeps its name.
    assert repairs.operators(target) == ["MatMul", "Add", "Relu", "Gemm", "Relu", "MatMul", "Add"]
    np.testing.assert_allclose(repairs.read(target, "y"), found["y"], rtol=REORDERED)
    described = json.loads(json.dumps(edit.describe()))["corrections"]
    assert [(item["layer"], item["new_bias"]) for item in described] == [("a", False), ("d", False), ("y", True)]
    assert described[0]["largest"] == pytest.approx(np.abs(found["a"]).max())


@pytest.mark.parametrize("text", [CONV, CONV.replace("(image, w, b)", "(image, w)").replace(", float[16] b>", ">")])
def test_a_conv_sums_its_kernel_over_the_mean_of_each_input_channel(text: str, tmp_path: Path):
    path = repairs.source(tmp_path, text)
    data = positive(path)
    target, edit = repairs.repair(path, CorrectBiases(weight_bits=8), data)
    weight = repairs.read(path, "y")
    mean = np.concatenate([feeds["image"] for feeds in data.batches]).mean(axis=(0, 2, 3)).reshape(2, 32)
    difference = (rounded(weight, 0) - weight).sum(axis=(2, 3)).reshape(2, 8, 32)
    np.testing.assert_allclose(
        shifts(edit)["y"], -np.einsum("goi,gi->go", difference, mean).ravel(), rtol=1e-3, atol=1e-7
    )
    bias = repairs.read(path, "y", 2) if "b)" in text else 0.0
    np.testing.assert_allclose(repairs.read(target, "y", 2), bias + shifts(edit)["y"], rtol=REORDERED)


@pytest.mark.parametrize("graph", ["PERCEPTRON", "CLASSIFIER", "BOTTLENECK", "CONV_CHAIN"])
def test_the_mean_error_of_the_outputs_comes_near_zero(graph: str, tmp_path: Path):
    text = getattr(graphs, graph)
    if graph == "CONV_CHAIN":
        text = text.replace(
            "[norm1] n = BatchNormalization (a, scale, shift, mean, var)\n  [relu1] r = Relu (n)",
            "[relu1] r = Relu (a)",
        )
        text = text.replace("float[32] scale, float[32] shift, float[32] mean, float[32] var,\n", "")
    path = repairs.source(tmp_path, text)
    data = positive(path)
    request = CorrectBiases(weight_bits=7, per_channel=False)
    target, edit = repairs.repair(path, request, data)
    want = repairs.outputs(path, data)
    errors: list[float] = []
    for file in (path, target):
        # Weights alone are rounded: what the inputs lose is another matter.
        error = repairs.outputs(round_weights(file, edit, 63), data) - want
        axes = tuple(i for i in range(error.ndim) if i != 1)
        errors.append(float(np.abs(error.mean(axis=axes)).max()))
    # Not zero: at a border the mean of what a Conv reads is another, and a Relu turns noise into a mean.
    assert errors[1] < 0.5 * errors[0]


def round_weights(path: Path, edit: object, limit: int) -> Path:
    """Write a copy of a file with the weights of the corrected layers rounded, one scale a tensor."""
    model = files.load(path)
    for name in shifts(edit):
        node = next(node for node in model.graph if node.outputs[0].name == name)
        if node.op_type == "Add":
            # The bias that a MatMul lacked: the sum has taken the name of its result.
            assert node.inputs[0] is not None
            node = node.inputs[0].producer()
        value = None if node is None else node.inputs[1]
        assert value is not None
        assert value.const_value is not None
        array = rounded(value.const_value.numpy(), 0, limit, per_channel=False)
        value.const_value = files.ir.tensor(array.astype(np.float32), name=value.name)
    target = path.with_name(f"rounded-{path.name}")
    files.save(model, target)
    return target


def test_a_second_round_sees_the_biases_of_the_first(tmp_path: Path):
    path = repairs.source(tmp_path, LAYERS, {"w1": 3.0})
    data = positive(path)
    once, twice, thrice = (
        shifts(CorrectBiases(weight_bits=7, per_channel=False, rounds=rounds).plan(files.load(path), data, None))
        for rounds in (1, 2, 3)
    )
    np.testing.assert_array_equal(once["a"], twice["a"])
    assert np.abs(once["d"] - twice["d"]).max() > 0.0
    np.testing.assert_array_equal(twice["d"], thrice["d"])


def test_layers_that_stay_float_are_not_corrected(tmp_path: Path):
    path = repairs.source(tmp_path, graphs.LONE_DEPTHWISE)
    edit = CorrectBiases().plan(files.load(path), positive(path), None)
    assert set(shifts(edit)) == {"y"}
    assert [(item.node, item.reason) for item in edit.refused] == [
        ("depth", "it is depthwise and stands between float operators: float is faster")
    ]
    edit = CorrectBiases(operators=("Gemm",)).plan(
        files.load(repairs.source(tmp_path, graphs.CLASSIFIER)), positive(tmp_path / "source.onnx"), None
    )
    assert set(shifts(edit)) == {"logits"}


def test_the_quantization_that_follows_finds_the_same_layers_to_round(tmp_path: Path):
    path = repairs.source(tmp_path, graphs.ENCODER)
    data = graphs.samples_for(path)
    target, edit = repairs.repair(path, CorrectBiases(), data)
    later = QuantizeStatic().plan(files.load(target), data, None)
    before = QuantizeStatic().plan(files.load(path), data, None)
    assert len(later.layers) == len(before.layers) == len(shifts(edit))
    assert repairs.noise_db(path, target, QuantizeStatic(), data) > 30.0
    assert list(Session(target).run(data.batches[0])) == ["logits"]


def test_bad_input_is_named(tmp_path: Path):
    path = repairs.source(tmp_path, LAYERS)
    model = files.load(path)
    with pytest.raises(SamplesError, match="correct-biases: got no samples, expected calibration samples"):
        CorrectBiases().plan(model, None, None)
    with pytest.raises(PassSpecError, match="Did you mean 'first'"):
        CorrectBiases(exclude=("frst",)).plan(model, positive(path), None)
    with pytest.raises(UnsupportedModelError, match="correct-biases: got no operator to quantize"):
        CorrectBiases().plan(files.load(repairs.source(tmp_path, graphs.TWO_NAMES)), None, None)
    on_grid = files.load(repairs.source(tmp_path, LAYERS, {"w1": 0.0, "w2": 0.0, "w3": 0.0}))
    with pytest.raises(UnsupportedModelError, match="the weights are on their grid already"):
        CorrectBiases().plan(on_grid, positive(path), None)
    broken = files.load(repairs.source(tmp_path, LAYERS, {"w3": np.nan}))
    with pytest.raises(UnsupportedModelError, match="weight 'w3': got NaN or infinity in it"):
        CorrectBiases().plan(broken, positive(path), None)
