"""Transposes that meet and vanish, and what must stay where it is."""

from __future__ import annotations

from pathlib import Path

import onnx
import pytest

from onnx_lathe.passes import files
from onnx_lathe.passes.fuse.transposes import MoveTransposes
from onnx_lathe.passes.run import apply
from onnx_lathe.runtime.errors import UnsupportedModelError
from tests import graphs
from tests.tolerances import REORDERED

PIXELS_LAST = """
pixels_last (float[N, 8, 8, 4] image) => (float[N, 5] logits)
<float[8, 4, 3, 3] w1, float[8, 8, 3, 3] w2, float[8, 8, 1, 1] w3, float[8] bias, float[1, 1, 1, 8] gain,
 float[8, 5] head, float zero = {0.0}, float six = {6.0}, int64[2] pixels = {1, 2}>
{
  t1 = Transpose <perm = [0, 3, 1, 2]> (image)
  c1 = Conv <pads = [1, 1, 1, 1]> (t1, w1)
  t2 = Transpose <perm = [0, 2, 3, 1]> (c1)
  b1 = Add (t2, bias)
  r1 = Clip (b1, zero, six)
  t3 = Transpose <perm = [0, 3, 1, 2]> (r1)
  c2 = Conv <pads = [1, 1, 1, 1]> (t3, w2)
  t4 = Transpose <perm = [0, 2, 3, 1]> (c2)
  s = Softmax <axis = -1> (t4)
  a = Add (s, r1)
  g = Mul (gain, a)
  t5 = Transpose <perm = [0, 3, 1, 2]> (g)
  c3 = Conv (t5, w3)
  t6 = Transpose <perm = [0, 2, 3, 1]> (c3)
  j = Concat <axis = 3> (t6, g)
  first, second = Split <axis = 3, num_outputs = 2> (j)
  p = Sub (first, second)
  m = ReduceMean <keepdims = 1> (p, pixels)
  f = Flatten (m)
  logits = MatMul (f, head)
}
"""


def operators(path: Path) -> list[str]:
    """Return the types of the nodes, in order."""
    return [node.op_type for node in onnx.load(path).graph.node]


def test_a_network_with_its_pixels_last(tmp_path: Path) -> None:
    source, target = graphs.save(graphs.build(PIXELS_LAST), tmp_path / "s.onnx"), tmp_path / "t.onnx"
    (applied,) = apply(source, [MoveTransposes()], target)
    assert applied.checks[0].measured < REORDERED
    assert operators(source).count("Transpose") == 6
    assert operators(target).count("Transpose") == 2, "one before the first Conv, one before the Flatten"
    onnx.checker.check_model(target, full_check=True)


@pytest.mark.parametrize(
    ("body", "left"),
    [
        ("t = Transpose <perm = [1, 0]> (x) y = Transpose <perm = [1, 0]> (t)", ["Identity"]),
        ("t = Transpose <perm = [1, 0]> (x) r = Relu (t) y = Transpose <perm = [1, 0]> (r)", ["Relu", "Identity"]),
        ("t = Transpose <perm = [1, 0]> (x) y = Gemm <transA = 1> (t, w)", ["Gemm"]),
        ("a = Reshape (x, flat) b = Reshape (a, back) y = Relu (b)", ["Reshape", "Relu"]),
        ("u = Unsqueeze (x, first) b = Reshape (u, back) y = Relu (b)", ["Reshape", "Relu"]),
        (
            "u = Unsqueeze (x, first) t = Transpose <perm = [1, 0, 2]> (u) b = Reshape (t, back) y = Relu (b)",
            ["Reshape", "Relu"],
        ),
    ],
    ids=["pair", "around", "gemm", "reshapes", "unsqueeze", "ones"],
)
def test_small_chains(body: str, left: list[str], tmp_path: Path) -> None:
    text = f"""
    chain (float[6, 6] x) => (float[6, 6] y)
    <float[6, 6] w, int64[1] flat = {{-1}}, int64[2] back = {{6, 6}}, int64[1] first = {{0}}>
    {{ {body} }}"""
    source, target = graphs.save(graphs.build(text), tmp_path / "s.onnx"), tmp_path / "t.onnx"
    apply(source, [MoveTransposes()], target)
    assert operators(target) == left


@pytest.mark.parametrize(
    "body",
    [
        "t = Transpose <perm = [1, 0]> (x) y = Relu (t)",
        "t = Transpose <perm = [1, 0]> (x) r = Relu (t) y = Add (r, x)",
        "t = Transpose <perm = [1, 0]> (x) m = MatMul (t, w) y = Transpose <perm = [1, 0]> (m)",
        "t = Transpose <perm = [1, 0]> (x) y = Reshape (t, back)",
        "a = Reshape (x, flat) b = Relu (a) y = Reshape (b, back)",
    ],
)
def test_what_would_save_nothing_stays(body: str, tmp_path: Path) -> None:
    text = f"""
    chain (float[6, 6] x) => (float[6, 6] y)
    <float[6, 6] w, int64[1] flat = {{-1}}, int64[2] back = {{6, 6}}>
    {{ {body} }}"""
    model = files.load(graphs.save(graphs.build(text), tmp_path / "m.onnx"))
    with pytest.raises(UnsupportedModelError, match="move-transposes: got no Transpose or Reshape that could be saved"):
        MoveTransposes().plan(model, None, None)


def test_an_old_softmax_holds_a_transpose_back(tmp_path: Path) -> None:
    text = """<ir_version: 7, opset_import: ["" : {opset}]>
    chain (float[6, 6] x) => (float[6, 6] y)
    {{ t = Transpose <perm = [1, 0]> (x) s = Softmax <axis = 1> (t) y = Transpose <perm = [1, 0]> (s) }}"""
    old, new = (graphs.save(graphs.build(text.format(opset=opset)), tmp_path / f"{opset}.onnx") for opset in (12, 13))
    apply(new, [MoveTransposes()], tmp_path / "t.onnx")
    assert operators(tmp_path / "t.onnx") == ["Softmax", "Identity"]
    with pytest.raises(UnsupportedModelError, match="move-transposes: got no Transpose or Reshape that could be saved"):
        MoveTransposes().plan(files.load(old), None, None)


def test_a_second_application_changes_nothing(tmp_path: Path) -> None:
    model = files.load(graphs.save(graphs.build(PIXELS_LAST), tmp_path / "m.onnx"))
    edit = MoveTransposes().plan(model, None, None)
    assert edit(model).modified
    assert not edit(model).modified
