"""Masks, guards, shapes and scales folded: what is left of them, that values stay, and what must not be touched."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from onnx_lathe.passes import files
from onnx_lathe.passes.fuse.masks import FoldMasks
from onnx_lathe.passes.run import apply
from onnx_lathe.runtime.errors import UnsupportedModelError
from onnx_lathe.runtime.samples import Array
from onnx_lathe.runtime.session import Session
from tests import graphs
from tests.attention_graphs import EXPORTED, SCRIPTED, padded

OLD = '<ir_version: 8, opset_import: ["" : 17]>\n'


def weights(model: ir.Model, *names: str) -> dict[str, Array]:
    tensors = {name: model.graph.initializers[name].const_value for name in names}
    return {name: tensor.numpy().copy() for name, tensor in tensors.items() if tensor is not None}


def operators(path: Path) -> Counter[str]:
    return Counter(node.op_type for node in files.load(path).graph)


@pytest.mark.parametrize("graph", [EXPORTED, OLD + EXPORTED], ids=["20", "17"])
def test_what_the_newer_exporter_writes_is_folded(graph: str, tmp_path: Path) -> None:
    source, target = graphs.save(graphs.build(graph), tmp_path / "m.onnx"), tmp_path / "folded.onnx"
    (applied,) = apply(source, [FoldMasks()], target, samples=padded())
    assert applied.changed
    assert not applied.refused
    left = operators(target)
    assert left.keys().isdisjoint({"IsNaN", "GatherND", "Range", "And", "Expand", "Mul", "Shape", "Slice", "Concat"})
    assert (left["Where"], left["Transpose"], left["Reshape"]) == (1, 4, 4)
    model = files.load(target)
    edit = FoldMasks().plan(files.load(source), None, None)
    assert not edit(model).modified
    with pytest.raises(UnsupportedModelError, match="fold-masks: got no mask, guard, shape or scale of attention"):
        FoldMasks().plan(model, None, None)


@pytest.mark.parametrize("graph", [SCRIPTED, OLD + SCRIPTED], ids=["20", "17"])
def test_a_sentence_without_any_key_keeps_a_context_of_zero(graph: str, tmp_path: Path) -> None:
    source, target = graphs.save(graphs.build(graph), tmp_path / "m.onnx"), tmp_path / "folded.onnx"
    (applied,) = apply(source, [FoldMasks()], target, samples=padded())
    assert applied.plan["guard by value"] == 1
    left = operators(target)
    assert left.keys().isdisjoint({"IsNaN", "Expand"})
    assert (left["Where"], left["Mul"]) == (1, 1)
    (feeds,) = padded().batches
    assert np.all(feeds["mask"][2] == 0)
    got = Session(target).run(feeds)["y"]
    np.testing.assert_array_equal(got[2], np.zeros_like(got[2]))
    np.testing.assert_allclose(got, Session(source).run(feeds)["y"], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("old", "new", "reason"),
    [
        ("bias = Where (kept, none, low)", "bias = Cast <to = 1> (given)", "nothing bounds 'bias'"),
        ("float low = {-3.4028234663852886e38}", "float low = {-inf}", "nothing bounds 'bias'"),
        (
            "masked = Add (scores, bias)",
            "once = Add (scores, bias)\n  masked = Add (once, bias)",
            "the sum of 'bias', 'bias' overflows",
        ),
    ],
)
def test_a_guard_stays_where_a_row_may_be_masked_whole(old: str, new: str, reason: str, tmp_path: Path) -> None:
    text = EXPORTED.replace(old, new).replace("mask)", "mask, double[batch, 1, seq, seq] given)", 1)
    if "inf" in new:
        # A mask by query and key: no value can be silenced for it.
        text = text.replace("certain = And (yes, any_query)", "certain = GreaterOrEqual (queries, keys)")
    model = files.load(graphs.save(graphs.build(text), tmp_path / "m.onnx"))
    edit = FoldMasks().plan(model, None, None)
    (refusal,) = edit.refused
    assert (refusal.node, refusal.operator) == ("guarded", "Where")
    assert reason in refusal.reason
    edit(model)
    assert "IsNaN" in {node.op_type for node in model.graph}


def test_scales_go_into_the_weight_that_makes_queries_and_into_its_bias(tmp_path: Path) -> None:
    source = graphs.save(graphs.build(EXPORTED), tmp_path / "m.onnx")
    model = files.load(source)
    before = weights(model, "wq", "bq", "wk")
    FoldMasks().plan(model, None, None)(model)
    after = weights(model, *before)
    factor = np.float32(np.float64(np.float32(0.6)) ** 2)
    np.testing.assert_array_equal(after["wq"], before["wq"] * factor)
    np.testing.assert_array_equal(after["bq"], before["bq"] * factor)
    np.testing.assert_array_equal(after["wk"], before["wk"])


def test_a_weight_that_others_read_is_not_scaled(tmp_path: Path) -> None:
    text = EXPORTED.replace("MatMul (x, wk)", "MatMul (x, wq)").replace("float[32, 32] wk, ", "")
    source, target = graphs.save(graphs.build(text), tmp_path / "m.onnx"), tmp_path / "folded.onnx"
    (applied,) = apply(source, [FoldMasks()], target, samples=padded())
    assert "scale" not in applied.plan
    assert operators(target)["Mul"] == 2


def test_an_expand_that_gives_a_result_its_dimensions_stays(tmp_path: Path) -> None:
    text = """
    wide (float[1, 4] x, float[N, 4] y) => (float[N, 4] z)
    <float two = {2.0}>
    {
      dims = Shape (y)
      wide = Expand (x, dims)
      twice = Mul (wide, two)
      z = Add (twice, wide)
    }
    """
    model = files.load(graphs.save(graphs.build(text), tmp_path / "m.onnx"))
    with pytest.raises(UnsupportedModelError, match="Leave the pass out"):
        FoldMasks().plan(model, None, None)


def test_a_sliding_window_is_not_taken_for_a_mask_of_nothing(tmp_path: Path) -> None:
    """At the few tokens of a probe a window of 64 hides nothing; at more it does."""
    window = "gap = Sub (queries, keys) wide = Abs (gap) certain = LessOrEqual (wide, window)"
    text = EXPORTED.replace("certain = And (yes, any_query)", window).replace(
        "int64 one", "int64 window = {64}, int64 one"
    )
    source, target = graphs.save(graphs.build(text), tmp_path / "m.onnx"), tmp_path / "folded.onnx"
    apply(source, [FoldMasks()], target, samples=padded(2, 100))
    assert operators(target)["LessOrEqual"] == 1
