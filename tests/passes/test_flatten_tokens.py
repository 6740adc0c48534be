"""Tokens as rows: what onnxruntime then runs, what stays, and where there is nothing to do."""

from __future__ import annotations

from pathlib import Path

import pytest

from onnx_lathe.passes import files
from onnx_lathe.passes.fuse.flatten import FlattenTokens
from onnx_lathe.passes.fuse.probe import probe
from onnx_lathe.passes.quantize.dynamic import QuantizeDynamic
from onnx_lathe.passes.run import apply
from onnx_lathe.runtime.errors import UnsupportedModelError
from onnx_lathe.runtime.profile import optimized_operators
from tests import graphs

SPLIT = """
split (float[batch, seq, 8] x, int64[batch, seq] ids) => (float[batch, seq, 6] y, float[batch, 6, seq] z)
<float[8, 12] w, float[12] b, float[6, 6] w2, int64[1] last = {2}, int64[2] flat = {-1, 8}, int64[2] whole = {0, 2}>
{
  [flat] f = Reshape (x, flat)
  [joined] g = Gemm (f, w, b)
  [dims] d = Shape (ids)
  [width] width = Constant <value_ints = [12]> ()
  [shape] s = Concat <axis = 0> (d, width)
  [rows] r = Reshape (g, s)
  [halves] one, two = Split <axis = 2, num_outputs = 2> (r)
  [mean] m = ReduceMean (two, last)
  [centred] c = Sub (one, m)
  [softmax] p = Softmax <axis = 2> (c)
  [out] y = MatMul (p, w2)
  [turned] z = Transpose <perm = [0, 2, 1]> (two)
}
"""
"""A linear layer on rows already, axes counted from the front, and a value that leaves the region as it is."""


def test_linear_layers_get_rows_and_no_skip_connection_is_fused(tmp_path: Path) -> None:
    source, target = graphs.save(graphs.build(graphs.ENCODER), tmp_path / "source.onnx"), tmp_path / "target.onnx"
    fused = optimized_operators(source)
    assert (fused.get("SkipLayerNormalization"), fused.get("Gemm")) == (1, 1), fused
    (applied,) = apply(source, [FlattenTokens()], target)
    assert all(check.passed for check in applied.checks)
    found = optimized_operators(target)
    assert "SkipLayerNormalization" not in found
    assert found["Gemm"] == 7, "each product takes its bias"


def test_axes_are_counted_from_the_end_where_a_dimension_goes(tmp_path: Path) -> None:
    source, target = graphs.save(graphs.build(SPLIT), tmp_path / "source.onnx"), tmp_path / "target.onnx"
    (applied,) = apply(source, [FlattenTokens()], target)
    assert applied.checks[0].measured < 1e-6
    operators = [node.op_type for node in files.load(target).graph]
    assert operators.count("Reshape") == 3, "one at each border: x, y and two"
    (region,) = applied.plan["regions"]
    assert region["source"] == "x"
    assert [border["name"] for border in region["region"]["exits"]] == ["two", "y"]


def test_integer_products_stay_integer_on_rows(tmp_path: Path) -> None:
    source, target = graphs.save(graphs.build(graphs.ENCODER), tmp_path / "source.onnx"), tmp_path / "target.onnx"
    apply(source, [FlattenTokens(), QuantizeDynamic()], target)
    found = optimized_operators(target)
    assert found.get("MatMulIntegerToFloat", 0) + found.get("DynamicQuantizeMatMul", 0) == 7
    assert "Gemm" not in found


def test_without_linear_layers_on_tokens_it_refuses(tmp_path: Path) -> None:
    model = files.load(graphs.save(graphs.build(graphs.CONV_CHAIN), tmp_path / "m.onnx"))
    with pytest.raises(
        UnsupportedModelError, match=r"flatten-tokens: got no product of tokens \[batch, tokens, hidden\]"
    ):
        FlattenTokens().plan(model, None, None)


def test_a_probe_follows_computed_shapes_and_keeps_them_apart_from_constants(tmp_path: Path) -> None:
    model = files.load(graphs.save(graphs.build(SPLIT), tmp_path / "m.onnx"))
    known = probe(model)
    assert known.shapes["r"] == (11, 13, 12)
    assert known.constants["s"].tolist() == [11, 13, 12]
    assert "s" not in known.fixed
    assert "width" in known.fixed
    assert probe(model, least=100).shapes["r"] == (11, 101, 12)
