"""Skip connections kept apart: what onnxruntime then runs, that no bit changes, and where there is nothing to do."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from onnx_lathe.passes import files
from onnx_lathe.passes.fuse.skip import KeepSkipApart
from onnx_lathe.passes.run import apply
from onnx_lathe.runtime import tensors
from onnx_lathe.runtime.errors import UnsupportedModelError
from onnx_lathe.runtime.profile import optimized_operators
from onnx_lathe.runtime.session import Session
from tests import graphs

DECOMPOSED = """<ir_version: 8, opset_import: ["": 13]>
decomposed (float[batch, seq, 8] x, float[batch, seq, 8] y) => (float[batch, seq, 8] z)
<float[8] scale, float[8] shift, float two = {2.0}, float tiny = {0.00001}>
{
  r = Add (x, y)
  m = ReduceMean <axes = [-1]> (r)
  d = Sub (r, m)
  s = Pow (d, two)
  v = ReduceMean <axes = [-1]> (s)
  e = Add (v, tiny)
  q = Sqrt (e)
  n = Div (d, q)
  t = Mul (n, scale)
  z = Add (t, shift)
}
"""
"""Skip connection and normalization as exporters before opset 17 write them."""


@pytest.mark.parametrize("sizes", [{}, {"batch": "2", "seq": "16"}], ids=["dynamic", "fixed"])
@pytest.mark.parametrize("graph", [graphs.ENCODER, DECOMPOSED], ids=["encoder", "decomposed"])
def test_the_fusion_is_kept_away_and_no_bit_changes(graph: str, sizes: dict[str, str], tmp_path: Path) -> None:
    for name, size in sizes.items():
        graph = graph.replace(f"{name},", f"{size},").replace(f"{name}]", f"{size}]")
    source, target = graphs.save(graphs.build(graph), tmp_path / "source.onnx"), tmp_path / "target.onnx"
    fused, skips = optimized_operators(source), optimized_operators(source).get("SkipLayerNormalization", 0)
    assert skips == 1, fused
    (applied,) = apply(source, [KeepSkipApart()], target)
    assert [(check.measured, check.limit) for check in applied.checks] == [(0.0, 0.0)]
    apart = optimized_operators(target)
    assert "SkipLayerNormalization" not in apart
    assert apart["LayerNormalization"] == fused.get("LayerNormalization", 0) + 1
    feeds = tensors.random_feeds(source)
    want, got = Session(source).run(feeds), Session(target).run(feeds)
    for name in want:
        np.testing.assert_allclose(got[name], want[name], rtol=1e-5, atol=1e-5)


def test_a_bias_before_a_normalization_is_no_skip_connection(tmp_path: Path) -> None:
    text = """
    biased (float[batch, seq, 8] x) => (float[batch, seq, 8] y)
    <float[8] bias, float[8] scale, float[8] shift>
    {
      b = Add (x, bias)
      y = LayerNormalization <axis = -1> (b, scale, shift)
    }
    """
    model = files.load(graphs.save(graphs.build(text), tmp_path / "m.onnx"))
    with pytest.raises(UnsupportedModelError, match="keep-skip-apart: got no Add of two computed tensors"):
        KeepSkipApart().plan(model, None, None)
