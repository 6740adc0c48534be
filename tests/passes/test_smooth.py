"""SmoothQuant: the formula, the places where divisors go, the search, and what it is for."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnx
import pytest

from onnx_lathe.passes import files
from onnx_lathe.passes.quantize.scheme import WeightScheme
from onnx_lathe.passes.quantize.static import QuantizeStatic
from onnx_lathe.passes.registry import parse, spell
from onnx_lathe.passes.repair.rescale import Rescaled
from onnx_lathe.passes.repair.smooth import GRID, Smooth
from onnx_lathe.passes.repair.smoothing import rounding_error, smoothing
from onnx_lathe.passes.taps import tap
from onnx_lathe.runtime.errors import PassSpecError, SamplesError, UnsupportedModelError
from onnx_lathe.runtime.samples import Array, Samples
from tests import graphs, repairs

BLOCK = """
block (float[N, S, 32] x) => (float[N, S, 32] y)
<float[32] scale, float[32] shift, float[32, 48] up, float[48] up_bias, float[48, 32] gate, float[48, 32] down>
{
  [norm] h = LayerNormalization <axis = -1> (x, scale, shift)
  [up] u = MatMul (h, up)
  [up_bias] ub = Add (u, up_bias)
  [act] a = Relu (ub)
  [down] d = MatMul (a, down)
  [gate] g = MatMul (h, up)
  [tanh] t = Tanh (g)
  [out] o = MatMul (t, gate)
  [sum] y = Add (d, o)
}
"""
NORM = "[norm] h = LayerNormalization <axis = -1> (x, scale, shift)"
DECOMPOSED = """[mean] m = ReduceMean <axes = [-1]> (x)
  [centred] c = Sub (x, m)
  two = Constant <value_float = 2.0> ()
  [square] sq = Pow (c, two)
  [variance] var = ReduceMean <axes = [-1]> (sq)
  eps = Constant <value_float = 0.00001> ()
  [stable] st = Add (var, eps)
  [root] rt = Sqrt (st)
  [divided] dv = Div (c, rt)
  [scaled] sc = Mul (dv, scale)
  [shifted] h = Add (sc, shift)"""
AT_17 = '<ir_version: 8, opset_import: ["" : 17, "com.microsoft" : 1]>'
OUTLIERS = np.where(np.arange(32) % 11 == 3, 60.0, 1.0)
"""Factors of channels, three of them far out."""


def samples(path: Path) -> Samples:
    return graphs.samples_for(path, batches=8)


def block(folder: Path, text: str = BLOCK, header: str = "") -> Path:
    """Write the block with outlying channels behind its normalization."""
    return repairs.source(folder, f"{header}\n{text}", {"scale": OUTLIERS, "shift": OUTLIERS})


def steps(edit: object) -> Mapping[str, tuple[tuple[str, ...], str]]:
    assert isinstance(edit, Rescaled)
    return {step.maker: (step.readers, step.how) for step in edit.steps}


def normalized(path: Path, data: Samples) -> Array:
    """Return what a block's layers read, ``[rows, channels]``."""
    return np.concatenate([values["h"].reshape(-1, 32) for values in tap(files.load(path), ["h"], data)])


@pytest.mark.parametrize("alpha", [0.0, 0.5, 0.8])
def test_divisors_are_those_of_the_formula_and_go_into_the_normalization(alpha: float, tmp_path: Path):
    path = block(tmp_path)
    data = samples(path)
    target, edit = repairs.repair(path, Smooth(alpha=alpha), data)
    assert steps(edit) == {"h": (("u", "g"), "folded"), "u": (("d",), "folded")}
    largest = np.abs(normalized(path, data)).max(axis=0)
    weight = repairs.read(path, "u")
    s = largest**alpha / np.abs(weight).max(axis=1) ** (1 - alpha)
    np.testing.assert_allclose(repairs.read(target, "h", 1), repairs.read(path, "h", 1) / s, rtol=1e-4)
    np.testing.assert_allclose(repairs.read(target, "h", 2), repairs.read(path, "h", 2) / s, rtol=1e-4)
    np.testing.assert_allclose(repairs.read(target, "g"), weight * s[:, None], rtol=1e-4)
    assert repairs.operators(target) == repairs.operators(path)
    plan = json.loads(json.dumps(edit.describe()))
    assert plan["steps"][0]["alpha"] == alpha
    assert plan["steps"][0]["largest"] == pytest.approx(s.max(), rel=1e-4)


def test_outlying_channels_come_down_and_rounding_loses_less(tmp_path: Path):
    path = block(tmp_path)
    data = samples(path)
    target, _ = repairs.repair(path, Smooth(), data)
    before, after = (np.abs(normalized(file, data)).max(axis=0) for file in (path, target))
    assert before.max() / np.median(before) > 5 * after.max() / np.median(after)
    noise = [repairs.noise_db(path, file, QuantizeStatic(weight_bits=8), data) for file in (path, target)]
    assert noise[1] > noise[0] + 6.0


@pytest.mark.parametrize(
    ("text", "header"),
    [
        (BLOCK.replace(NORM, DECOMPOSED), AT_17),
        (BLOCK.replace(NORM, DECOMPOSED.replace("(sc, shift)", "(shift, sc)")), AT_17),
        (BLOCK.replace(NORM, DECOMPOSED.split("  [shifted]")[0].replace("sc = Mul", "h = Mul")), AT_17),
        (BLOCK.replace(NORM, "[norm] h = SimplifiedLayerNormalization <axis = -1> (x, scale)"), ""),
        (BLOCK.replace(NORM, "[norm] h = com.microsoft.SkipLayerNormalization (x, x, scale, shift)"), AT_17),
    ],
    ids=["decomposed", "shift first", "root mean square", "simplified", "skip"],
)
def test_every_spelling_of_a_normalization_takes_them(text: str, header: str, tmp_path: Path):
    path, target = tmp_path / "source.onnx", tmp_path / "target.onnx"
    # Not checked as it is saved: onnxruntime's own operators have no schema there.
    onnx.save(graphs.build(f"{header}\n{text}" if header else text), path)
    model, data = files.load(path), samples(path)
    edit = Smooth().plan(model, data, None)
    assert steps(edit)["h"] == (("u", "g"), "folded")
    assert edit(model).modified
    files.save(model, target)
    assert repairs.operators(target) == repairs.operators(path)
    for check in edit.check(path, target, data.batches[0]):
        assert check.passed, check


def test_a_scale_that_is_computed_takes_none(tmp_path: Path):
    path = repairs.source(tmp_path, BLOCK.replace(NORM, f"computed = Neg (scale)\n{NORM.replace('scale', 'computed')}"))
    assert set(steps(Smooth().plan(files.load(path), samples(path), None))) == {"u"}


def test_a_normalization_that_the_skip_connection_reads_gets_one_mul_before_its_layers(tmp_path: Path):
    path = repairs.source(tmp_path, graphs.ENCODER, {"norm2_scale": OUTLIERS})
    data = samples(path)
    target, edit = repairs.repair(path, Smooth(), data)
    assert steps(edit) == {
        "h": (("qm", "km", "vm"), "multiplied"),
        "n2": (("um",), "multiplied"),
        "vm": (("om",), "folded"),
    }
    count = repairs.operators(path).count("Mul")
    assert repairs.operators(target).count("Mul") == count + 2
    np.testing.assert_array_equal(repairs.read(target, "n2", 1), repairs.read(path, "n2", 1))
    noise = [repairs.noise_db(path, file, QuantizeStatic(weight_bits=8), data) for file in (path, target)]
    assert noise[1] > noise[0] + 1.0


def test_no_mul_is_inserted_where_the_option_says_so(tmp_path: Path):
    path = repairs.source(tmp_path, graphs.ENCODER)
    target, edit = repairs.repair(path, Smooth(insert=False), samples(path))
    assert steps(edit) == {"vm": (("om",), "folded")}
    assert repairs.operators(target) == repairs.operators(path)
    reasons = [(item.node, item.reason) for item in edit.refused if item.operator == "LayerNormalization"]
    assert reasons == [(name, "others read it too, and the option insert is off") for name in ("norm1", "norm2")]


def test_what_an_excluded_layer_reads_is_not_folded(tmp_path: Path):
    path = block(tmp_path)
    _, edit = repairs.repair(path, Smooth(exclude=("gate",)), samples(path))
    assert steps(edit)["h"] == (("u",), "multiplied")


def test_a_search_finds_a_lower_error_in_its_grid_or_leaves_alone(tmp_path: Path):
    path = block(tmp_path)
    data = samples(path)
    target, edit = repairs.repair(path, Smooth(alpha="search"), data)
    assert isinstance(edit, Rescaled)
    chosen = {step.maker: step.alpha for step in edit.steps}
    assert chosen["h"] in GRID
    noise = [repairs.noise_db(path, file, QuantizeStatic(weight_bits=8), data) for file in (path, target)]
    assert noise[1] > noise[0] + 6.0


def test_a_search_leaves_alone_what_nothing_makes_better(tmp_path: Path):
    text = f"""
    constant (float[N, S, 32] x) => (float[N, S, 4] y)
    <float[32] scale, float[32] shift, float[32, 4] w>
    {{
      {NORM}
      [product] y = MatMul (h, w)
    }}
    """
    path = repairs.source(tmp_path, text, {"scale": 0.0, "shift": 0.0})
    with pytest.raises(UnsupportedModelError, match="no smoothing lowers the output error of its readers"):
        Smooth(alpha="search").plan(files.load(path), samples(path), None)


def test_the_rounding_error_is_that_of_rounded_products():
    generator = np.random.default_rng(0)
    rows = (generator.normal(size=(64, 16)) * np.where(np.arange(16) == 5, 80.0, 1.0)).astype(np.float32)
    weight = generator.normal(size=(16, 8)).astype(np.float32)
    low, high = rows.min(axis=0), rows.max(axis=0)
    s = smoothing(np.abs(rows).max(axis=0), np.abs(weight).max(axis=1), 0.5)
    x, w = rows / s, weight * s[:, None]
    step, column = (x.max() - x.min()) / 255, np.abs(w).max(axis=0) / 127
    zero = np.rint(-x.min() / step)
    rounded = (np.clip(np.rint(x / step) + zero, 0, 255) - zero) * step
    got = rounded @ (np.rint(w / column) * column)
    want = rows @ weight
    error = np.square(got - want).sum() / np.square(want).sum()
    assert rounding_error(rows, weight, low, high, s, WeightScheme()) == pytest.approx(error, rel=0.02)
    assert rounding_error(rows, weight, low, high, np.ones(16), WeightScheme()) > 3 * error


def test_a_channel_that_is_zero_is_left_alone():
    s = smoothing(np.array([0.0, 4.0, 4.0, 1e30]), np.array([1.0, 0.0, 1.0, 1e-30]), 0.5)
    assert s.tolist() == [1.0, 1.0, 2.0, 1e5]


def test_bad_input_is_named(tmp_path: Path):
    path = block(tmp_path)
    model = files.load(path)
    with pytest.raises(SamplesError, match="smooth: got no samples, expected calibration samples"):
        Smooth().plan(model, None, None)
    with pytest.raises(
        UnsupportedModelError, match=r"smooth: got nothing to smooth, expected a normalization, or a layer"
    ):
        Smooth().plan(files.load(repairs.source(tmp_path, graphs.JOINED)), samples(path), None)
    huge = files.load(repairs.source(tmp_path, BLOCK, {"scale": 1e38}))
    with pytest.raises(SamplesError, match="value 'h': got NaN or infinity as the network runs"):
        Smooth().plan(huge, samples(path), None)
    broken = files.load(repairs.source(tmp_path, BLOCK, {"up": np.nan, "down": np.nan}))
    with pytest.raises(SamplesError, match="got NaN or infinity as the network runs"):
        Smooth().plan(broken, samples(path), None)


def test_alpha_is_a_number_or_a_search():
    assert parse("smooth{alpha=0.25}") == (Smooth(alpha=0.25),)
    assert parse(spell(Smooth(alpha="search", insert=False))) == (Smooth(alpha="search", insert=False),)
    for text in ("smooth{alpha=2}", "smooth{alpha=seek}"):
        with pytest.raises(PassSpecError, match=r"smooth\{alpha\}"):
            parse(text)


@pytest.mark.parametrize("other", ["h", "r"], ids=["squared", "with its Relu"])
def test_a_layer_that_reads_a_normalization_twice_gets_it_divided_once(other: str, tmp_path: Path):
    text = f"""
    twice (float[N, S, 32] x) => (float[N, S, 16] y)
    <float[32] scale, float[32] shift, float[32, 16] w>
    {{
      {NORM}
      {"[relu] r = Relu (h)" if other == "r" else ""}
      [product] p = Mul (h, {other})
      [layer] y = MatMul (p, w)
    }}
    """
    path = block(tmp_path, text)
    target, edit = repairs.repair(path, Smooth(), samples(path))
    assert steps(edit) == {"h": (("y",), "multiplied")}
    assert repairs.operators(target).count("Mul") == 2
