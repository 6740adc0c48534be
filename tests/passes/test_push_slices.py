"""Selections moved forward: what is then computed, that outputs stay, and where nothing may move."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from onnx_lathe.passes import files
from onnx_lathe.passes.fuse.slices import PushSlices
from onnx_lathe.passes.run import apply
from onnx_lathe.runtime import tensors
from onnx_lathe.runtime.errors import UnsupportedModelError
from onnx_lathe.runtime.facts import read_facts
from onnx_lathe.runtime.session import Session
from tests import graphs

SIZES = {"batch": 2, "seq": 8}
MEAN = "[mean] m = ReduceMean <keepdims = 0> (r2, sequence)"
ENCODER_MACS = 4 * 32 * 64 + 2 * 32 * 96
"""Of one token of `graphs.ENCODER`: four projections of attention, and the feed-forward part."""

TOKENS = {
    "first": ("[pick] m = Gather <axis = 1> (r2, position)", "int64 position = {0}"),
    "last": ("[pick] m = Gather <axis = 1> (r2, position)", "int64 position = {-1}"),
    "slice": (
        "[pick] one_token = Slice (r2, from, to, sequence)\n m = Squeeze (one_token, sequence)",
        "int64[1] from = {-1}, int64[1] to = {9223372036854775807}",
    ),
}


def classifier(token: str) -> str:
    """Return the encoder with one token read instead of the mean of all."""
    node, constants = TOKENS[token]
    return graphs.ENCODER.replace(MEAN, node).replace("int64[1] sequence", f"{constants}, int64[1] sequence")


def both(text: str, folder: Path) -> tuple[Path, Path]:
    source, target = graphs.save(graphs.build(text), folder / "source.onnx"), folder / "target.onnx"
    apply(source, [PushSlices()], target)
    return source, target


def macs(path: Path, **sizes: int) -> int:
    return sum(node.macs or 0 for node in read_facts(path, sizes or SIZES).nodes)


@pytest.mark.parametrize("token", TOKENS)
@pytest.mark.parametrize("seq", [1, 5])
def test_one_token_is_computed_and_outputs_stay(token: str, seq: int, tmp_path: Path) -> None:
    source, target = both(classifier(token), tmp_path)
    feeds = tensors.random_feeds(source, {"batch": 3, "seq": seq})
    feeds["mask"] = np.ones_like(feeds["mask"])
    want, got = Session(source).run(feeds), Session(target).run(feeds)
    np.testing.assert_allclose(got["logits"], want["logits"], rtol=1e-5, atol=1e-6)


def test_what_is_saved_is_all_but_keys_and_values(tmp_path: Path) -> None:
    source, target = both(classifier("first"), tmp_path)
    batch, seq = SIZES["batch"], SIZES["seq"]
    attention = 2 * 64 * seq
    """Scores and contexts of one query."""
    kept = 2 * 32 * 64
    saved = batch * (seq - 1) * (ENCODER_MACS - kept + attention)
    assert macs(source) - macs(target) == saved


def test_shapes_that_are_declared_fit(tmp_path: Path) -> None:
    _, target = both(classifier("first"), tmp_path)
    by_name = {node.name: node.outputs[0] for node in files.load(target).graph}
    feeds = tensors.random_feeds(target, SIZES)
    for name in ("query", "gelu", "scores"):
        shape = by_name[name].shape
        assert shape is None or 1 in shape.dims, name
    assert Session(target, optimize=False).run(feeds)["logits"].shape == (2, 3)


def test_an_asked_for_position_that_others_read_too_stays(tmp_path: Path) -> None:
    text = classifier("first").replace("(float[batch, 3] logits)", "(float[batch, 3] logits, float[batch, seq, 32] r2)")
    text = text.replace("=> (float[batch, 3] logits)", "=> (float[batch, 3] logits, float[batch, seq, 32] r2)")
    with pytest.raises(UnsupportedModelError) as caught:
        both(text, tmp_path)
    assert "push-slices: got no Gather or Slice of known positions whose other positions nothing else reads" in str(
        caught.value
    )


def test_two_tokens_are_no_one_selection(tmp_path: Path) -> None:
    text = classifier("first").replace(
        "[pick] m = Gather <axis = 1> (r2, position)",
        "a = Gather <axis = 1> (r2, position)\n b = Gather <axis = 1> (r2, other)\n m = Add (a, b)",
    )
    text = text.replace("int64 position = {0}", "int64 position = {0}, int64 other = {1}")
    with pytest.raises(UnsupportedModelError, match="whose other positions nothing else reads"):
        both(text, tmp_path)


def test_a_softmax_over_the_selected_axis_needs_all(tmp_path: Path) -> None:
    text = """
    mixed (float[batch, 6, 8] x) => (float[batch, 4] y)
    <float[8, 4] w, int64 position = {2}>
    {
      m = MatMul (x, w)
      p = Softmax <axis = 1> (m)
      y = Gather <axis = 1> (p, position)
    }
    """
    with pytest.raises(UnsupportedModelError, match="whose other positions nothing else reads"):
        both(text, tmp_path)


@pytest.mark.parametrize(("opset", "moves"), [(20, True), (12, False)])
def test_an_old_softmax_runs_over_all_axes_behind_its_own(opset: int, moves: bool, tmp_path: Path) -> None:
    text = f"""<ir_version: 7, opset_import: ["" : {opset}]>
    mixed (float[2, 6, 8] x) => (float[2, 4] y)
    <float[8, 4] w, int64 position = {{2}}>
    {{
      m = MatMul (x, w)
      p = Softmax <axis = 0> (m)
      y = Gather <axis = 1> (p, position)
    }}
    """
    if not moves:
        with pytest.raises(UnsupportedModelError, match="whose other positions nothing else reads"):
            both(text, tmp_path)
        return
    source, target = both(text, tmp_path)
    assert sum(each.macs or 0 for each in read_facts(target).nodes) < sum(
        each.macs or 0 for each in read_facts(source).nodes
    )


def test_gated_parts_and_rotated_queries_follow(tmp_path: Path) -> None:
    text = """
    gated (float[batch, seq, 8] x) => (float[batch, 8] y)
    <float[8, 32] w, float[16, 8] v, int64 position = {0}, int64[2] halves = {16, 16}, int64[1] low = {0},
     int64[1] mid = {8}, int64[1] high = {16}, int64[1] last = {2}>
    {
      m = MatMul (x, w)
      a, b = Split <axis = -1> (m, halves)
      left = Slice (a, low, mid, last)
      right = Slice (a, mid, high, last)
      turned = Neg (right)
      c = Concat <axis = -1> (turned, left)
      g = Mul (c, b)
      d = MatMul (g, v)
      y = Gather <axis = 1> (d, position)
    }
    """
    source, target = both(text, tmp_path)
    assert macs(source) == SIZES["seq"] * macs(target)
    feeds = tensors.random_feeds(source, SIZES)
    np.testing.assert_allclose(Session(target).run(feeds)["y"], Session(source).run(feeds)["y"], rtol=1e-5, atol=1e-6)


def test_a_shape_that_names_the_axis_is_changed(tmp_path: Path) -> None:
    text = """
    patches (float[batch, 5, 8] x) => (float[batch, 2, 4] y)
    <float[8, 8] w, int64[4] split = {-1, 5, 2, 4}, int64 position = {3}>
    {
      m = MatMul (x, w)
      s = Reshape (m, split)
      y = Gather <axis = 1> (s, position)
    }
    """
    source, target = both(text, tmp_path)
    assert macs(source, batch=2) == 5 * macs(target, batch=2)
    feeds = tensors.random_feeds(source, {"batch": 2})
    np.testing.assert_allclose(Session(target).run(feeds)["y"], Session(source).run(feeds)["y"], rtol=1e-5, atol=1e-6)
