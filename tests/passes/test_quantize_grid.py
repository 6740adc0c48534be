"""Weights on a grid of 2^k that the user gives: what is rounded, clamped, lost and refused."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from onnx_lathe.passes import files
from onnx_lathe.passes.prune.groups import tensor_of
from onnx_lathe.passes.quantize.dynamic import QuantizeDynamic
from onnx_lathe.passes.quantize.grid import GridFit
from onnx_lathe.passes.quantize.scheme import exact_weight_bits
from onnx_lathe.passes.quantize.static import QuantizeStatic
from onnx_lathe.runtime import providers, tensors
from onnx_lathe.runtime.errors import UnsupportedModelError
from onnx_lathe.runtime.samples import Array, Samples
from tests import graphs

PAIR = """
pair (float[N, 8] x) => (float[N, 4] y)
<float[8, 32] w1, float[32] b1, float[32, 4] w2, float[4] b2>
{
  [first] a = Gemm (x, w1, b1)
  [act] b = Relu (a)
  [second] y = Gemm (b, w2, b2)
}
"""
REQUESTS = [request(weight_exponent=-6, weight_bits=8) for request in (QuantizeStatic, QuantizeDynamic)]


def pair(folder: Path, **changes: Array | float) -> Path:
    """Write `PAIR` with some of its weights replaced, or scaled."""
    proto = graphs.build(PAIR)
    for tensor in proto.graph.initializer:
        change = changes.get(tensor.name)
        if change is not None:
            array = onnx.numpy_helper.to_array(tensor)
            array = change if isinstance(change, np.ndarray) else array * change
            tensor.CopyFrom(onnx.numpy_helper.from_array(array.astype(np.float32), tensor.name))
    return graphs.save(proto, folder / "source.onnx")


def samples() -> Samples:
    return Samples(({"x": np.random.default_rng(0).normal(size=(32, 8)).astype(np.float32)},))


def weight(model: ir.Model, name: str) -> Array:
    return tensor_of(model.graph.initializers[name]).numpy()


@pytest.mark.parametrize("request_", REQUESTS, ids=lambda request: request.name)
def test_weights_are_rounded_to_multiples_of_the_step(request_: QuantizeStatic | QuantizeDynamic, tmp_path: Path):
    source = pair(tmp_path, w1=8.0)
    model = files.load(source)
    before = {name: weight(model, name) for name in ("w1", "w2")}
    edit = request_.plan(model, samples(), None)
    assert edit(model).modified
    files.save(model, tmp_path / "target.onnx")
    after = files.load(tmp_path / "target.onnx")
    levels = {name: np.clip(np.rint(array * 64), -127, 127) for name, array in before.items()}
    for name, want in levels.items():
        np.testing.assert_array_equal(weight(after, f"{name}_quantized"), want)
        assert weight(after, f"{name}_quantized_scale").tolist() == 2.0**-6
    assert edit.fits == tuple(
        GridFit(
            result,
            name,
            saturated=float((np.abs(np.rint(before[name] * 64)) > 127).mean()),
            lost=float(((levels[name] == 0) & (before[name] != 0)).mean()),
        )
        for result, name in (("a", "w1"), ("y", "w2"))
    )
    assert (edit.fits[0].saturated > 0.1, edit.fits[1].saturated, edit.fits[0].lost > 0.0) == (True, 0.0, True)
    described = edit.describe()
    assert json.loads(json.dumps(described)) == described
    assert described["weights"]["exponent"] == -6
    assert described["fits"][0]["layer"] == "a"
    if exact_weight_bits(providers.cpu_class()) == request_.weight_bits:
        for check in edit.check(source, tmp_path / "target.onnx", tensors.random_feeds(source)):
            assert check.passed, check


@pytest.mark.parametrize("request_", REQUESTS, ids=lambda request: request.name)
def test_a_layer_whose_weights_would_all_be_zero_stays_float(
    request_: QuantizeStatic | QuantizeDynamic, tmp_path: Path
):
    edit = request_.plan(files.load(pair(tmp_path, w1=1e-3)), samples(), None)
    assert [(item.node, item.reason) for item in edit.refused] == [
        ("first", "all of its weights round to zero at a step of 2^-6")
    ]
    assert [fit.weight for fit in edit.fits] == ["w2"]
    with pytest.raises(UnsupportedModelError, match=r"2 x Gemm: all of its weights round to zero at a step of 2\^-6"):
        request_.plan(files.load(pair(tmp_path, w1=1e-3, w2=1e-3)), samples(), None)


@pytest.mark.parametrize("request_", REQUESTS, ids=lambda request: request.name)
def test_a_weight_that_is_not_finite_is_refused(request_: QuantizeStatic | QuantizeDynamic, tmp_path: Path):
    source = pair(tmp_path, w2=np.full((32, 4), np.nan))
    with pytest.raises(UnsupportedModelError, match="weight 'w2': got NaN or infinity in it"):
        request_.plan(files.load(source), Samples(({"x": np.zeros((2, 8), np.float32)},)), None)


def test_a_bias_that_does_not_fit_at_the_step_is_refused(tmp_path: Path):
    model = files.load(pair(tmp_path, b2=1e9))
    edit = QuantizeStatic(weight_exponent=-6).plan(model, samples(), None)
    with pytest.raises(UnsupportedModelError, match=r"weight 'w2': got a bias that needs a scale of .* at most 2\^-6"):
        edit(model)


def test_every_scale_is_a_power_of_two_with_both_options():
    model = ir.from_proto(graphs.build(PAIR))
    edit = QuantizeStatic(weight_exponent=-6, power_of_two=True).plan(model, samples(), None)
    assert all(np.frexp(value.affine.scale)[0] == 0.5 for value in edit.values)
    assert QuantizeStatic().plan(model, samples(), None).fits == ()
