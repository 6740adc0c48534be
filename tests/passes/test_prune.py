"""Structured pruning: what is coupled, what is refused, what is cut, and what least squares wins back."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx.reference import ReferenceEvaluator
from onnx_ir.passes.common import ShapeInferencePass

from onnx_lathe.passes import files
from onnx_lathe.passes.prune.apply import PruneEdit
from onnx_lathe.passes.prune.groups import Coupling
from onnx_lathe.passes.prune.importance import by_channel, mean_of, squared_norms
from onnx_lathe.passes.prune.reconstruct import RIDGE, Moments, least_squares, patches
from onnx_lathe.passes.prune.request import Prune
from onnx_lathe.passes.prune.rules import couple
from onnx_lathe.runtime import tensors
from onnx_lathe.runtime.errors import SamplesError, UnsupportedModelError
from onnx_lathe.runtime.parity import sqnr_db
from onnx_lathe.runtime.samples import Array, Samples
from onnx_lathe.runtime.session import Session
from tests import graphs
from tests.tolerances import REORDERED, SOLVED


def load(text: str) -> ir.Model:
    return ir.from_proto(graphs.build(text))


def coupling_of(text: str) -> Coupling:
    model = load(text)
    ShapeInferencePass(check_type=False, strict_mode=False)(model)
    return couple(model)


def plan(model: ir.Model, samples: Samples | None = None, **options: object) -> PruneEdit:
    edit = Prune(**options).plan(model, samples, None)  # pyright: ignore[reportArgumentType]
    assert isinstance(edit, PruneEdit)
    return edit


def shapes(model: ir.Model) -> dict[str, tuple[int, ...]]:
    return {
        name: tuple(value.const_value.shape.numpy())
        for name, value in model.graph.initializers.items()
        if value.const_value is not None
    }


def weight(model: ir.Model, name: str) -> Array:
    tensor = model.graph.initializers[name].const_value
    assert tensor is not None
    return tensor.numpy()


def put(model: ir.Model, name: str, array: Array) -> None:
    model.graph.initializers[name].const_value = ir.tensor(array.astype(np.float32), name=name)


@pytest.mark.parametrize(
    ("graph", "groups"),
    [
        ("conv_chain", {"w1": (32, "w1.0 b1.0 scale.0 shift.0 mean.0 var.0 w2.1"), "w2": (48, "w2.0 b2.0 w3.1")}),
        (
            "residual",
            {
                "stem": (32, "stem.0 stem_bias.0 w1.1 w2.0 b2.0 w3.1 short.1"),
                "w1": (32, "w1.0 b1.0 w2.1"),
                "w3": (64, "w3.0 short.0 w5.0"),
            },
        ),
        (
            "depthwise",
            {"w0": (16, "w0.0 b0.0 w1.1"), "w1": (64, "w1.0 b1.0 w2.0 b2.0 w3.1"), "w3": (16, "w3.0 w4.1")},
        ),
        (
            "dense",
            {
                "w0": (32, "w0.0 w1.1 scale.0 shift.0 mean.0 var.0 w2.1"),
                "w1": (32, "w1.0 b1.0 scale.0 shift.0 mean.0 var.0 w2.1"),
                "w2": (32, "w2.0 w3.0"),
            },
        ),
        ("flattened", {"w1": (32, "w1.0 b1.0 w2.1"), "w2": (32, "w2.0 b2.0 w3.0")}),
        ("encoder", {"q": (4, "q.1 q_bias.0 k.1 k_bias.0 v.1 v_bias.0 o.0"), "up": (96, "up.1 up_bias.0 down.0")}),
    ],
)
def test_groups_are_the_closure_of_what_must_be_cut_together(graph: str, groups: dict[str, tuple[int, str]]):
    found = {
        group.name: (len(group.channels), " ".join(f"{member.initializer}.{member.axis}" for member in group.members))
        for group in coupling_of(graphs.GRAPHS[graph]).groups
    }
    assert found == groups


def two_layers(between: str, made: str = "a", read: str = "b", hidden: int = 32, extra: str = "") -> str:
    """Return two 1 x 1 convolutions with ``between``, which makes ``read`` of ``made``, in between."""
    return f"""
    two_layers (float[N, 4, 6, 6] x) => (float[N, 3, P, Q] y)
    <float[{hidden}, 4, 1, 1] w1, float[3, {hidden}, 1, 1] w2{extra}>
    {{
      [make] {made} = Conv (x, w1)
      {between}
      [read] y = Conv ({read}, w2)
    }}
    """


@pytest.mark.parametrize(
    "between",
    [
        "[act] b = Sigmoid (a)",
        "[twice] b = Mul (a, a)",
        "[pool] b = MaxPool <kernel_shape = [2, 2]> (a)",
        "[soft] b = Softmax <axis = 3> (a)",
        "[norm] b = InstanceNormalization (a, s, t)",
        "[slope] b = PRelu (a, p)",
        "[turn] c = Transpose <perm = [0, 2, 3, 1]> (a) [back] b = Transpose <perm = [0, 3, 1, 2]> (c)",
        "[room] b = Pad (a, pads)",
        "[large] b = Resize (a, , scales)",
        "[parts] c, d = Split <axis = 1, num_outputs = 2> (a) [join] b = Concat <axis = 1> (d, c)",
        "[squeeze] c = ReduceMean (a, axes) [gate] g = Sigmoid (c) [gated] b = Mul (a, g)",
        "[rows] b = Slice (a, one, two, two)",
        "[pair] c = Reshape (a, fold) [unpair] b = Reshape (c, unfold)",
    ],
)
def test_channels_pass_through_what_treats_each_by_itself(between: str, tmp_path: Path):
    extra = (
        ", float[32] s, float[32] t, float[32, 1, 1] p, int64[8] pads = {0, 0, 1, 1, 0, 0, 1, 1}, "
        "float[4] scales = {1.0, 1.0, 2.0, 2.0}, int64[2] axes = {2, 3}, int64[1] one = {1}, int64[1] two = {2}, "
        "int64[3] fold = {0, 32, 36}, int64[4] unfold = {0, 32, 6, 6}"
    )
    source = graphs.save(graphs.build(two_layers(between, extra=extra)), tmp_path / "source.onnx")
    model = files.load(source)
    edit = plan(model, ratio=0.5)
    assert [(group.name, group.kept) for group in edit.groups] == [("w1", 16)]
    edit(model)
    files.save(model, tmp_path / "cut.onnx")
    assert shapes(files.load(tmp_path / "cut.onnx"))["w1"] == (16, 4, 1, 1)
    (check,) = edit.check(source, tmp_path / "cut.onnx", tensors.random_feeds(source))
    assert check.measured < REORDERED


REFUSED = {
    "[mix] b = Softmax <axis = 1> (a)": "mix (Softmax): w1: normalizes over the axis",
    "[mix] b = LRN <size = 3> (a)": "mix (LRN): w1: no rule says which channels this operator",
    "[mix] c = ReduceMax (a, channels) [wide] b = Add (a, c)": "mix (ReduceMax): w1: reduces over the axis",
    "[group] b = Conv <group = 4> (a, w3)": "group (Conv): w1: a grouped convolution, neither dense nor depthwise",
    "[up] b = ConvTranspose (a, w4)": "up (ConvTranspose): w1: no rule says which channels this operator",
    "[some] b = Slice (a, zero, last, channels)": "some (Slice): w1: slices the axis",
    "[pads] b = Pad (a, pads)": "pads (Pad): w1: pads the axis",
    """[size] s = Shape (a) [real] r = Cast <to = 1> (s) [most] m = ReduceMax <keepdims = 0> (r)
    [scaled] b = Mul (a, m)""": "size (Shape): w1: its length is read as the model runs",
    """[shuffle] c = Reshape (a, pair) [flip] d = Transpose <perm = [0, 2, 1, 3, 4]> (c)
    [flat] b = Reshape (d, whole)""": "flat (Reshape): w1: merges or splits the axis other than block by block",
    """[branch] b = If (yes) <
    then_branch = t () => (float[N, 32, 6, 6] u) { u = Relu (a) },
    else_branch = e () => (float[N, 32, 6, 6] v) { v = Neg (a) }>""": "branch (If): w1: read inside a subgraph",
}


@pytest.mark.parametrize(("between", "reason"), REFUSED.items(), ids=list(REFUSED.values()))
def test_what_is_not_understood_is_refused_with_the_reason(between: str, reason: str):
    extra = (
        ", int64[1] channels = {1}, float[32, 8, 1, 1] w3, float[32, 32, 1, 1] w4, int64[1] zero = {0}, "
        "int64[1] last = {32}, int64[8] pads = {0, 1, 0, 0, 0, -1, 0, 0}, int64[5] pair = {0, 4, 8, 6, 6}, "
        "int64[4] whole = {0, 32, 6, 6}, bool yes = {1}"
    )
    coupling = coupling_of(two_layers(between, extra=extra))
    refused = [f"{item.node} ({item.operator}): {item.reason}" for item in coupling.refused]
    assert "w1" not in [group.name for group in coupling.groups]
    assert any(text.startswith(reason) for text in refused), refused


def test_channels_of_inputs_and_outputs_are_refused():
    refused = {item.node: item.reason for item in coupling_of(graphs.CONV_CHAIN).refused}
    assert refused == {"logits": "w3: reaches a graph output"}
    tied = graphs.CONV_CHAIN.replace("[relu1] r = Relu (n)", "[relu1] r = Relu (n)  [early] early = Identity (r)")
    tied = tied.replace("=> (float[N, 5] logits)", "=> (float[N, 5] logits, float[N, 32, 8, 8] early)")
    assert [group.name for group in coupling_of(tied).groups] == ["w2"]


def test_weights_that_stay_are_those_of_the_kept_channels(tmp_path: Path):
    source = graphs.save(graphs.build(graphs.DEPTHWISE), tmp_path / "source.onnx")
    before, after = files.load(source), files.load(source)
    edit = plan(after, ratio=0.25)
    assert edit(after).modified
    assert shapes(after) == {
        **shapes(before),
        "w1": (48, 16, 1, 1),
        "b1": (48,),
        "w2": (48, 1, 3, 3),
        "b2": (48,),
        "w3": (16, 48, 1, 1),
    }
    for name, axes in edit.kept.items():
        want = weight(before, name)
        for axis, stay in axes.items():
            want = want.take(stay, axis=axis)
        np.testing.assert_array_equal(weight(after, name), want)
    depth = next(node for node in after.graph if node.name == "depth")
    assert depth.attributes.get_int("group", 1) == 48


def test_weights_are_not_read_before_they_are_written():
    model = load(graphs.RESIDUAL)
    edit = plan(model)
    edit(model)
    assert {
        name for name in edit.kept if not isinstance(model.graph.initializers[name].const_value, ir.LazyTensor)
    } == set()


def test_lengths_in_the_graph_follow(tmp_path: Path):
    source = graphs.save(graphs.build(graphs.FLATTENED), tmp_path / "source.onnx")
    model = files.load(source)
    edit = plan(model, ratio=0.5)
    edit(model)
    files.save(model, tmp_path / "cut.onnx")
    onnx.checker.check_model(tmp_path / "cut.onnx", full_check=True)
    assert weight(model, "shape").tolist() == [-1, 256]
    halves = next(node for node in model.graph if node.name == "halves")
    assert [value.name for value in halves.inputs if value] == ["d", "e.lengths"]
    assert weight(model, "e.lengths").tolist() == [16, 16]
    assert shapes(model)["w2"] == (32, 256)


def test_a_shape_that_others_read_too_is_copied(tmp_path: Path):
    text = """
    shared (float[A, B, 8] x) => (float[A, B, 2] y)
    <float[8, 32] w1, float[32, 2] w2, float[8, 32] w3, float[32, 2] w4, int64[1] width = {32}>
    {
      [a0] h0 = MatMul (x, w1)
      [dims] d = Shape <end = 2> (x)
      [join] target = Concat <axis = 0> (d, width)
      [b0] h1 = Reshape (h0, target)
      [c0] h2 = Relu (h1)
      [d0] y0 = MatMul (h2, w2)
      [a1] g0 = MatMul (x, w3)
      [b1] g1 = Reshape (g0, target)
      [c1] g2 = Relu (g1)
      [d1] y1 = MatMul (g2, w4)
      [sum] y = Add (y0, y1)
    }
    """
    source = graphs.save(graphs.build(text), tmp_path / "source.onnx")
    model = files.load(source)
    edit = plan(model, ratio=0.5)
    edit(model)
    files.save(model, tmp_path / "cut.onnx")
    assert [group.kept for group in edit.groups] == [16, 16]
    (check,) = edit.check(source, tmp_path / "cut.onnx", tensors.random_feeds(source))
    assert check.measured < REORDERED


@pytest.mark.parametrize(
    ("ratio", "multiple", "kept"), [(0.3, 16, 80), (0.3, 1, 68), (0.5, 16, 48), (0.99, 16, 16), (0.99, 1, 1)]
)
def test_what_stays_is_rounded_up_to_a_multiple(ratio: float, multiple: int, kept: int):
    edit = plan(load(graphs.ENCODER), ratio=ratio, multiple=multiple)
    assert {group.name: group.kept for group in edit.groups}["up"] == kept


def test_a_multiple_counts_entries_of_what_makes_the_channels():
    heads = {group.name: group for group in plan(load(graphs.ENCODER), ratio=0.4, multiple=16).groups}["q"]
    assert (heads.total, heads.kept) == (4, 3)
    edit = plan(load(graphs.ENCODER), ratio=0.4, multiple=32)
    assert "q" not in {group.name for group in edit.groups}
    assert any(item.node == "q" and "3 of its 4 channels shall stay" in item.reason for item in edit.refused)


def test_the_least_important_go():
    proto = graphs.build(two_layers("[act] b = Relu (a)"))
    for tensor in proto.graph.initializer:
        array = onnx.numpy_helper.to_array(tensor).copy()
        np.moveaxis(array, 0 if tensor.name == "w1" else 1, 0)[::2] *= 0.01
        tensor.CopyFrom(onnx.numpy_helper.from_array(array, tensor.name))
    edit = plan(ir.from_proto(proto), ratio=0.5)
    assert edit.kept["w1"][0] == edit.kept["w2"][1] == tuple(range(1, 32, 2))


def test_fluctuation_keeps_what_varies_though_its_weights_are_small():
    text = """
    varying (float[N, 32] x) => (float[N, 2] y) <float[32, 32] w1, float[32] b1, float[32, 2] w2, float[2] b2>
    { [make] a = Gemm (x, w1, b1) [read] y = Gemm (a, w2, b2) }
    """
    proto = graphs.build(text)
    model = ir.from_proto(proto)
    odd = np.arange(32) % 2 == 1
    put(model, "w1", np.eye(32))
    put(model, "w2", np.where(odd, 0.5, 1.0)[:, None] * np.ones((1, 2)))
    x = np.random.default_rng(0).normal(size=(64, 32)) * np.where(odd, 1.0, 0.05)
    samples = Samples(({"x": x.astype(np.float32)},))
    assert plan(model, samples, ratio=0.5).kept["w1"][1] == tuple(range(1, 32, 2))
    assert plan(model, samples, ratio=0.5, importance="magnitude").kept["w1"][1] == tuple(range(0, 32, 2))


def test_the_same_channels_are_cut_however_samples_are_batched():
    model = load(graphs.FIXED_BATCH.replace("[4,", "[N,"))
    x = np.random.default_rng(0).normal(size=(96, 16)).astype(np.float32)
    one = plan(model, Samples(({"x": x},)), ratio=0.5)
    many = plan(model, Samples(tuple({"x": part} for part in np.split(x, 12))), ratio=0.5)
    assert one.kept == many.kept
    np.testing.assert_allclose(one.new_values["w2"], many.new_values["w2"], rtol=SOLVED, atol=SOLVED)


def test_least_squares_wins_back_what_the_cut_lost(tmp_path: Path):
    """Half of the neurons copy the other half up to a factor, so that the rest can do their work."""
    text = """
    copies (float[N, 16] x) => (float[N, 4] y) <float[16, 64] w1, float[64] b1, float[64, 4] w2, float[4] b2>
    { [make] a = Gemm (x, w1, b1) [act] h = Relu (a) [read] y = Gemm (h, w2, b2) }
    """
    proto = graphs.build(text)
    model = ir.from_proto(proto)
    for name in ("w1", "b1"):
        half = weight(model, name)[..., :32]
        put(model, name, np.concatenate([half, 0.5 * half], axis=-1))
    source = tmp_path / "source.onnx"
    files.save(model, source)
    x = np.random.default_rng(1).normal(size=(256, 16)).astype(np.float32)
    want = Session(source).run({"x": x[128:]})["y"]
    nearness: dict[bool, float] = {}
    for reconstruct in (False, True):
        cut = files.load(source)
        edit = plan(cut, Samples(({"x": x[:128]},)), ratio=0.5, reconstruct=reconstruct)
        edit(cut)
        files.save(cut, tmp_path / "cut.onnx")
        nearness[reconstruct] = sqnr_db(want, Session(tmp_path / "cut.onnx").run({"x": x[128:]})["y"])
        checks = edit.check(source, tmp_path / "cut.onnx", {"x": x[:4]})
        assert [check.unit for check in checks] == ["relative error"] * (1 + reconstruct)
        assert all(check.passed for check in checks)
    assert nearness[True] > nearness[False] + 6.0


@settings(max_examples=20, deadline=None)
@given(
    graph=st.sampled_from(["conv_chain", "residual", "dense", "flattened", "encoder"]),
    ratio=st.floats(0.05, 0.95),
    multiple=st.integers(1, 8),
    reconstruct=st.booleans(),
)
def test_every_cut_computes_what_its_oracle_does(
    tmp_path_factory: pytest.TempPathFactory, graph: str, ratio: float, multiple: int, reconstruct: bool
):
    folder = tmp_path_factory.mktemp("cut")
    source = graphs.save(graphs.build(graphs.GRAPHS[graph]), folder / "source.onnx")
    model = files.load(source)
    samples = graphs.samples_for(source, 2) if reconstruct else None
    try:
        edit = plan(model, samples, ratio=ratio, multiple=multiple)
    except UnsupportedModelError:
        return
    edit(model)
    files.save(model, folder / "cut.onnx")
    checks = edit.check(source, folder / "cut.onnx", tensors.random_feeds(source))
    assert checks[0].measured < REORDERED
    assert all(check.passed for check in checks)


def test_the_plan_is_json():
    described = plan(load(graphs.RESIDUAL)).describe()
    assert json.loads(json.dumps(described)) == described
    assert described["groups"] == [
        {
            "name": "w3",
            "channels": 64,
            "kept": 48,
            "members": [
                {"initializer": "w3", "axis": 0, "role": "produces"},
                {"initializer": "short", "axis": 0, "role": "produces"},
                {"initializer": "w5", "axis": 0, "role": "consumes"},
            ],
        }
    ]


def test_a_model_that_cannot_be_cut_says_why():
    with pytest.raises(UnsupportedModelError, match=r"node 'q': got QuantizeLinear: the model is already quantized"):
        plan(load(graphs.QUANTIZED))
    with pytest.raises(
        UnsupportedModelError, match=r"nothing to cut: y \(Output\): w2: reaches a graph output; w1 \(group\)"
    ):
        plan(load(graphs.FIXED_BATCH))
    with pytest.raises(UnsupportedModelError, match="no weights that make channels for others"):
        plan(load(graphs.COUNTING))


@pytest.mark.parametrize("importance", ["fluctuation", "interaction"])
def test_what_channels_do_is_not_seen_without_samples(importance: str):
    with pytest.raises(SamplesError, match=rf"prune{{importance={importance}}}: got no samples"):
        plan(load(graphs.RESIDUAL), importance=importance)


def test_a_plan_fits_no_other_model():
    edit = plan(load(graphs.RESIDUAL))
    other = load(graphs.RESIDUAL.replace("float[64, 5] w5", "float[64, 6] w5").replace("float[N, 5]", "float[N, 6]"))
    with pytest.raises(UnsupportedModelError, match=r"initializer 'w5': got dimensions \(64, 6\), expected \(64, 5\)"):
        edit(other)


def test_scores_by_channel():
    array = np.arange(12.0).reshape(3, 4)
    np.testing.assert_array_equal(squared_norms(array, 0), [14.0, 126.0, 366.0])
    sums = by_channel(np.array([1.0, 2.0, 4.0, 8.0]), np.array([7, 3, 7, 9]), np.array([9, 7]))
    np.testing.assert_array_equal(sums, [8.0, 5.0])
    np.testing.assert_array_equal(mean_of([np.array([1.0, 3.0]), np.array([10.0, 10.0])]), [0.75, 1.25])


def test_least_squares_is_the_ridge_solution():
    generator = np.random.default_rng(0)
    rows = generator.normal(size=(500, 6)) @ generator.normal(size=(6, 6)) + 1.0
    matrix, kept = generator.normal(size=(6, 3)), np.array([0, 2, 3, 5])
    moments = Moments.zeros(6)
    for part in np.split(rows, 5):
        moments.add(part)
    once = Moments.zeros(6)
    once.add(rows)
    np.testing.assert_allclose(moments.gram, once.gram, rtol=SOLVED)

    solution = least_squares(moments, matrix, kept, has_bias=False)
    root = np.sqrt(RIDGE * np.trace(rows.T @ rows) / 6)
    stacked = np.vstack([rows, root * np.eye(6)])
    want = np.linalg.lstsq(stacked[:, kept], stacked @ matrix)[0]
    np.testing.assert_allclose(solution.weight, want, rtol=SOLVED, atol=SOLVED)
    np.testing.assert_array_equal(solution.shift, np.zeros(3))
    residual = stacked @ matrix - stacked[:, kept] @ want
    energy = np.square(stacked @ matrix).sum()
    np.testing.assert_allclose(solution.error, np.square(residual).sum() / energy, rtol=SOLVED)

    biased = least_squares(moments, matrix, kept, has_bias=True)
    mean_error = (rows @ matrix - rows[:, kept] @ biased.weight - biased.shift).mean(axis=0)
    np.testing.assert_allclose(mean_error, 0.0, atol=SOLVED)
    assert 0.0 <= biased.error <= biased.cut_error


def test_least_squares_changes_nothing_where_nothing_is_cut():
    rows = np.random.default_rng(0).normal(size=(50, 4))
    matrix = np.random.default_rng(1).normal(size=(4, 2))
    moments = Moments.zeros(4)
    moments.add(rows)
    solution = least_squares(moments, matrix, np.arange(4), has_bias=True)
    np.testing.assert_allclose(solution.weight, matrix, rtol=SOLVED)
    np.testing.assert_allclose(solution.shift, 0.0, atol=SOLVED)


@settings(max_examples=25, deadline=None)
@given(
    kernel=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    strides=st.tuples(st.integers(1, 2), st.integers(1, 3)),
    pads=st.tuples(*[st.integers(0, 2)] * 4),
    dilations=st.tuples(st.integers(1, 2), st.integers(1, 2)),
)
def test_patches_are_what_a_convolution_sees(
    kernel: tuple[int, int], strides: tuple[int, int], pads: tuple[int, ...], dilations: tuple[int, int]
):
    generator = np.random.default_rng(0)
    images = generator.normal(size=(2, 3, 7, 8)).astype(np.float32)
    weights = generator.normal(size=(4, 3, *kernel)).astype(np.float32)
    rows = patches(images, kernel, strides, pads, dilations, 10**6, generator)
    node = onnx.helper.make_node("Conv", ["x", "w"], ["y"], strides=strides, pads=pads, dilations=dilations)
    (want,) = ReferenceEvaluator(node).run(None, {"x": images, "w": weights})
    got = (rows @ weights.reshape(4, -1).T).reshape(2, *want.shape[2:], 4)
    np.testing.assert_allclose(np.moveaxis(got, -1, 1), want, rtol=REORDERED, atol=REORDERED)


def test_few_patches_are_some_of_all():
    images = np.random.default_rng(0).normal(size=(2, 3, 7, 8)).astype(np.float32)
    every = patches(images, (3, 3), (1, 1), (1, 1, 1, 1), (1, 1), 10**6, np.random.default_rng(0))
    some = patches(images, (3, 3), (1, 1), (1, 1, 1, 1), (1, 1), 20, np.random.default_rng(0))
    assert every.shape == (2 * 7 * 8, 27)
    assert some.shape == (20, 27)
    assert {row.tobytes() for row in some} <= {row.tobytes() for row in every}
