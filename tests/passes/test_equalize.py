"""Cross-layer equalization: what it computes, through which operators it sees, what it leaves alone, what it is for."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from onnx_lathe.passes import files
from onnx_lathe.passes.quantize.static import QuantizeStatic
from onnx_lathe.passes.repair.equalize import Equalize
from onnx_lathe.passes.repair.rescale import Rescaled
from onnx_lathe.runtime.errors import PassSpecError, UnsupportedModelError
from onnx_lathe.runtime.samples import Array
from tests import graphs, repairs

PAIR = """
pair (float[N, 8] x) => (float[N, 4] y)
<float[8, 16] w1, float[16] b1, float[4, 16] w2, float[4] b2>
{
  [first] a = MatMul (x, w1)
  [bias] b = Add (b1, a)
  [act] c = Relu (b)
  [second] y = Gemm <transB = 1, alpha = 0.5, beta = 2.0> (c, w2, b2)
}
"""
CONVS = """
convs (float[N, 8, 8, 8] image) => (float[N, 4] y)
<float[16, 8, 3, 3] w1, float[16] b1, float[16, 8, 3, 3] w2, float[16] b2, float[4, 256] w3, float[16] slope,
 int64[2] flat = {0, -1}>
{
  [first] a = Conv <pads = [1, 1, 1, 1]> (image, w1, b1)
  [leaky] b = LeakyRelu (a)
  [second] c = Conv <group = 2, pads = [1, 1, 1, 1]> (b, w2, b2)
  [pool] d = MaxPool <kernel_shape = [2, 2], strides = [2, 2]> (c)
  [flat] e = Reshape (d, flat)
  [third] y = Gemm <transB = 1> (e, w3)
}
"""
ATTENTION = """
attention (float[N, S, 32] x) => (float[N, S, 32] y)
<float[32, 32] q, float[32, 32] k, float[32, 32] v, float[32] v_bias, float[32, 32] o, int64[4] split = {0, 0, 4, 8},
 int64[3] merge = {0, 0, -1}>
{
  [query] qm = MatMul (x, q)
  [query_split] qs = Reshape (qm, split)
  [query_heads] qh = Transpose <perm = [0, 2, 1, 3]> (qs)
  [key] km = MatMul (x, k)
  [key_split] ks = Reshape (km, split)
  [key_heads] kh = Transpose <perm = [0, 2, 3, 1]> (ks)
  [value] vm = MatMul (x, v)
  [value_bias] vb = Add (vm, v_bias)
  [value_split] vs = Reshape (vb, split)
  [value_heads] vh = Transpose <perm = [0, 2, 1, 3]> (vs)
  [scores] qk = MatMul (qh, kh)
  [weights] p = Softmax <axis = -1> (qk)
  [context] c = MatMul (p, vh)
  [context_turn] ct = Transpose <perm = [0, 2, 1, 3]> (c)
  [context_merge] cm = Reshape (ct, merge)
  [output] y = MatMul (cm, o)
}
"""
GATED = """
gated (float[N, S, 16] x) => (float[N, S, 16] y)
<float[16, 64] w1, float[64] b1, float[32, 16] w2>
{
  [first] a = MatMul (x, w1)
  [bias] b = Add (a, b1)
  [shape] rows = Shape <end = 1> (b)
  [like] ones = ConstantOfShape (rows)
  [halves] gate, up = Split <axis = -1, num_outputs = 2> (b)
  [sigmoid] g = Sigmoid (gate)
  [gated] c = Mul (g, up)
  [second] y = MatMul (c, w2)
}
"""
SHARED_HEADS = """
shared_heads (float[N, S, 32] x) => (float[N, S, 32] y)
<float[32, 32] q, float[32, 16] k, float[32, 16] v, float[32, 32] o, int64 first = {0}, int64 second = {1},
 int64[1] front = {0}, int64[1] two = {2}, int64[1] all_heads = {4}, int64[1] wide = {8},
 int64[1] rest = {-1}, int64[1] third = {2}, int64[4] split = {0, 0, 4, 8}>
{
  [dims] dims = Shape (x)
  [batch] batch = Gather (dims, first)
  [length] length = Gather (dims, second)
  [batch_vector] n = Unsqueeze (batch, front)
  [length_vector] s = Unsqueeze (length, front)
  [narrow_shape] narrow = Concat <axis = 0> (n, s, rest, wide)
  [wide_shape] wide_shape = Concat <axis = 0> (n, two, two, s, wide)
  [merged_shape] merged = Concat <axis = 0> (n, all_heads, s, wide)
  [back_shape] back = Concat <axis = 0> (n, s, rest)
  [query] qm = MatMul (x, q)
  [query_split] qs = Reshape (qm, split)
  [query_heads] qh = Transpose <perm = [0, 2, 1, 3]> (qs)
  [value] vm = MatMul (x, v)
  [value_split] vs = Reshape (vm, narrow)
  [value_heads] vt = Transpose <perm = [0, 2, 1, 3]> (vs)
  [value_pairs] vu = Unsqueeze (vt, third)
  [value_repeated] ve = Expand (vu, wide_shape)
  [value_merged] vh = Reshape (ve, merged)
  [key] km = MatMul (x, k)
  [key_split] ks = Reshape (km, narrow)
  [key_heads] kt = Transpose <perm = [0, 2, 1, 3]> (ks)
  [key_pairs] ku = Unsqueeze (kt, third)
  [key_repeated] ke = Expand (ku, wide_shape)
  [key_merged] kh = Reshape (ke, merged)
  [key_turned] kr = Transpose <perm = [0, 1, 3, 2]> (kh)
  [scores] qk = MatMul (qh, kr)
  [weights] p = Softmax <axis = -1> (qk)
  [context] c = MatMul (p, vh)
  [context_turn] ct = Transpose <perm = [0, 2, 1, 3]> (c)
  [context_merge] cm = Reshape (ct, back)
  [output] y = MatMul (cm, o)
}
"""
CLIP = "zero = Constant <value_float = 0.0> ()\nsix = Constant <value_float = 6.0> ()\n[act] c = Clip (b, zero, six)"


def apart(channels: int) -> Array:
    """Return factors of channels from 0.1 to 10, in no order."""
    return np.random.default_rng(7).permutation(np.geomspace(0.1, 10.0, channels))


def pairs_of(edit: object) -> list[tuple[str, tuple[str, ...]]]:
    assert isinstance(edit, Rescaled)
    return [(step.maker, step.readers) for step in edit.steps]


def test_channels_share_their_width_by_the_formula(tmp_path: Path):
    path = repairs.source(tmp_path, PAIR)
    target, edit = repairs.repair(path, Equalize())
    w1, b1, w2 = repairs.read(path, "a"), repairs.read(path, "b", 0), repairs.read(path, "y")
    r1, r2 = np.abs(w1).max(axis=0), np.abs(w2).max(axis=0)
    s = np.sqrt(r1 * r2) / r2
    np.testing.assert_allclose(repairs.read(target, "a"), w1 / s, rtol=1e-6)
    np.testing.assert_allclose(repairs.read(target, "b", 0), b1 / s, rtol=1e-6)
    np.testing.assert_allclose(repairs.read(target, "y"), w2 * s, rtol=1e-6)
    plan = json.loads(json.dumps(edit.describe()))
    assert [(step["maker"], step["readers"], step["how"]) for step in plan["steps"]] == [("a", ["y"], "folded")]
    assert plan["steps"][0]["least"] == pytest.approx(s.min())
    assert plan["steps"][0]["largest"] == pytest.approx(s.max())


def test_a_row_with_a_depthwise_conv_converges(tmp_path: Path):
    f, g = apart(32), apart(32)[::-1]
    factors = {
        "w1": f[:, None, None, None],
        "b1": f,
        "w2": (g / f)[:, None, None, None],
        "b2": g,
        "w3": 1 / g[:, None, None],
    }
    target, edit = repairs.repair(repairs.source(tmp_path, graphs.BOTTLENECK, factors), Equalize())
    assert pairs_of(edit) == [("a", ("c",)), ("c", ("e",))]
    made = np.abs(repairs.read(target, "a")).max(axis=(1, 2, 3))
    depthwise = np.abs(repairs.read(target, "c")).max(axis=(1, 2, 3))
    read = np.abs(repairs.read(target, "e")).max(axis=(0, 2, 3))
    np.testing.assert_allclose(made, depthwise, rtol=0.03)
    np.testing.assert_allclose(depthwise, read, rtol=0.03)
    with pytest.raises(UnsupportedModelError, match="equalize: got no pair of layers to equalize"):
        Equalize().plan(files.load(target), None, None)


def test_one_scale_a_tensor_loses_far_less_after_it(tmp_path: Path):
    f, g = apart(32), apart(32)[::-1]
    factors = {
        "w1": f[:, None, None, None],
        "b1": f,
        "w2": (g / f)[:, None, None, None],
        "b2": g,
        "w3": 1 / g[:, None, None],
    }
    path = repairs.source(tmp_path, graphs.BOTTLENECK.replace("y = Add (e, image)", "y = Tanh (e)"), factors)
    samples, request = graphs.samples_for(path), QuantizeStatic(per_channel=False)
    before = repairs.noise_db(path, path, request, samples)
    target, _ = repairs.repair(path, Equalize())
    assert repairs.noise_db(path, target, request, samples) > before + 10.0


@pytest.mark.parametrize(
    ("text", "pairs"),
    [
        (PAIR, [("a", "y")]),
        (
            PAIR.replace("Relu (b)", "PRelu (b, slope)").replace("float[4] b2", "float[4] b2, float[16] slope"),
            [("a", "y")],
        ),
        (PAIR.replace("[act] c = Relu (b)", "[act] r = Relu (b)\n[times] c = Mul (b1, r)"), [("a", "y")]),
        (CONVS, [("a", "c"), ("c", "y")]),
        (CONVS.replace("[flat] e = Reshape (d, flat)", "[flat] e = Flatten (d)"), [("a", "c"), ("c", "y")]),
        (
            CONVS.replace("MaxPool <kernel_shape = [2, 2], strides = [2, 2]>", "GlobalAveragePool").replace(
                "256", "16"
            ),
            [("a", "c"), ("c", "y")],
        ),
        (
            CONVS.replace("[pool]", "[slope] c2 = PRelu (c, slope2)\n[pool]")
            .replace("> (c)", "> (c2)")
            .replace("float[16] slope", "float[16, 1, 1] slope2"),
            [("a", "c"), ("c", "y")],
        ),
        (ATTENTION, [("vm", "y")]),
        (SHARED_HEADS, [("vm", "y")]),
        (GATED, [("a", "y")]),
        (GATED.replace("axis = -1", "axis = 2"), [("a", "y")]),
        (graphs.ENCODER, [("vm", "om")]),
        (graphs.PERCEPTRON, [("a", "d"), ("d", "y")]),
        (graphs.CLASSIFIER, [("d", "logits")]),
        (graphs.RESIDUAL, [("a", "c")]),
    ],
    ids=lambda item: item.split()[0] if isinstance(item, str) else "",
)
def test_channels_are_followed_from_layer_to_layer(text: str, pairs: list[tuple[str, str]], tmp_path: Path):
    _, edit = repairs.repair(repairs.source(tmp_path, text), Equalize())
    assert pairs_of(edit) == [(first, (second,)) for first, second in pairs]


def test_a_weight_behind_a_transpose_or_in_a_constant_node_is_replaced_where_it_is_read(tmp_path: Path):
    text = """
    stored (float[N, 2] x) => (float[N, 2] y)
    <float[3, 2] w1, float[2, 3] kept>
    {
      w2 = Constant <value = float[3, 2] {0.5, -1.0, 2.0, 0.25, 8.0, 0.125}> ()
      [turned] t = Transpose (w1)
      [first] a = MatMul (x, t)
      [act] b = Relu (a)
      [second] y = MatMul (b, w2)
    }
    """
    target, _ = repairs.repair(repairs.source(tmp_path, text.replace(", float[2, 3] kept", "")), Equalize())
    assert repairs.operators(target) == ["MatMul", "Relu", "MatMul"]


def test_a_shared_weight_changes_for_its_reader_alone_and_once_for_equal_ones(tmp_path: Path):
    text = """
    shared (float[N, 8] x, float[N, 8] z) => (float[N, 4] y, float[N, 4] u, float[N, 16] v)
    <float[8, 16] w1, float[16, 4] w2>
    {
      [first] a = MatMul (x, w1)
      [act] b = Relu (a)
      [second] y = MatMul (b, w2)
      [first_again] c = MatMul (z, w1)
      [act_again] d = Relu (c)
      [second_again] u = MatMul (d, w2)
      [alone] v = MatMul (z, w1)
    }
    """
    target, _ = repairs.repair(repairs.source(tmp_path, text), Equalize())
    assert sorted(files.load(target).graph.initializers) == ["w1", "w1_equalized", "w2_equalized"]


def test_of_a_split_layer_the_part_that_is_gated_is_scaled_alone(tmp_path: Path):
    path = repairs.source(tmp_path, GATED)
    target, _ = repairs.repair(path, Equalize())
    same = (repairs.read(target, "a") == repairs.read(path, "a")).all(axis=0)
    assert same.tolist() == [True] * 32 + [False] * 32


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (("[act] c = Relu (b)", CLIP), "its bound is one number"),
        (("Relu (b)", "Sigmoid (b)"), "Sigmoid does not pass a factor on"),
        (("=> (float[N, 4] y)", "=> (float[N, 4] y, float[N, 16] c)"), "'c' is an output of the graph"),
        (("=> (float[N, 4] y)", "=> (float[N, 4] y, float[N, 16] a)"), "'a' is an output of the graph"),
        (("[second]", "[other] d = Tanh (a)\n[second]"), "'a' has 2 readers"),
    ],
)
def test_what_scaling_would_change_is_left_alone(change: tuple[str, str], reason: str, tmp_path: Path):
    path = repairs.source(tmp_path, PAIR.replace(*change))
    with pytest.raises(UnsupportedModelError, match=r"per_channel=true serves such layers") as raised:
        Equalize().plan(files.load(path), None, None)
    assert reason in str(raised.value)


def test_refusals_name_the_layer(tmp_path: Path):
    path = repairs.source(tmp_path, graphs.CLASSIFIER)
    assert [(item.node, item.reason[:30]) for item in Equalize().plan(files.load(path), None, None).refused] == [
        ("conv1", "Clip does not pass a factor on"),
        ("fc", "'logits' is an output of the g"),
    ]


def test_a_dead_channel_stays_and_the_others_are_equalized(tmp_path: Path):
    dead = np.ones(16)
    dead[3] = 0.0
    target, _ = repairs.repair(repairs.source(tmp_path, PAIR, {"w1": dead}), Equalize())
    assert np.isfinite(repairs.read(target, "y")).all()
    assert not repairs.read(target, "a")[:, 3].any()


def test_bad_input_is_named(tmp_path: Path):
    model = files.load(repairs.source(tmp_path, PAIR, {"w2": np.nan}))
    with pytest.raises(UnsupportedModelError, match="weight 'w2': got NaN or infinity in it"):
        Equalize().plan(model, None, None)
    with pytest.raises(PassSpecError, match="Did you mean 'second'"):
        Equalize(exclude=("secnd",)).plan(model, None, None)
    with pytest.raises(UnsupportedModelError, match="already quantized"):
        Equalize().plan(ir.from_proto(graphs.build(graphs.QUANTIZED)), None, None)
    with pytest.raises(UnsupportedModelError, match="got no pair of layers to equalize"):
        Equalize(exclude=("first",)).plan(model, None, None)


VECTORS = """
vectors (float[8] x, float[8, 8] other) => (float[8] y)
<float[8, 8] w1, float[8, 8] w2>
{
  [first] a = MatMul (x, w1)
  [act] r = Relu (a)
  [mix] z = MatMul (other, r)
  [second] y = MatMul (z, w2)
}
"""


def test_a_product_with_a_vector_moves_the_axis_of_the_channels(tmp_path: Path):
    path = repairs.source(tmp_path, VECTORS, {"w1": np.geomspace(1.0, 100.0, 8)})
    with pytest.raises(UnsupportedModelError, match="MatMul does not pass a factor on"):
        Equalize().plan(files.load(path), None, None)


BILINEAR = """
bilinear (float[N, 8] x) => (float[N, 4] y)
<float[8, 16] w1, float[8, 16] w2, float[16, 4] w3>
{
  [left] a = MatMul (x, w1)
  [right] b = MatMul (x, w2)
  [product] c = Mul (a, b)
  [last] y = MatMul (c, w3)
}
"""


def test_one_of_two_factors_is_scaled(tmp_path: Path):
    path = repairs.source(tmp_path, BILINEAR, {"w1": np.geomspace(1.0, 100.0, 16)})
    _, edit = repairs.repair(path, Equalize())
    assert [(each.node, each.reason) for each in edit.refused if each.node == "right"] == [
        ("right", "'y' reads a product with what another layer makes")
    ]
