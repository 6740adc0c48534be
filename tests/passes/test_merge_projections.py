"""Products of one tensor made one: exact, with or without biases, and rounded once by a quantization after it."""

from __future__ import annotations

from pathlib import Path

import onnx
import pytest

from onnx_lathe.passes import files
from onnx_lathe.passes.fuse.merge import MergeProjections
from onnx_lathe.passes.quantize.dynamic import QuantizeDynamic
from onnx_lathe.passes.run import apply
from onnx_lathe.runtime.errors import UnsupportedModelError
from tests import graphs
from tests.tolerances import REORDERED

GATED = """
gated (float[N, 4, 32] x) => (float[N, 4, 32] y, float[N, 4, 48] up)
<float[32, 48] gate, float[32, 48] wide, float[48] wide_bias, float[48, 32] down>
{
  g = MatMul (x, gate)
  s = Sigmoid (g)
  u = MatMul (x, wide)
  up = Add (wide_bias, u)
  m = Mul (s, up)
  y = MatMul (m, down)
}
"""

GEMMS = """
gemms (float[N, 8] x) => (float[N, 3] a, float[N, 5] b)
<float[3, 8] w, float[5, 8] v, float[5] bias>
{
  a = Gemm <transB = 1> (x, w)
  b = Gemm <transB = 1> (x, v, bias)
}
"""

MIXED = """
mixed (float[N, 8] x) => (float[N, 3] a, float[N, 5] b)
<float[8, 3] w, float[5, 8] v, float[5] bias>
{
  a = Gemm (x, w)
  b = Gemm <transB = 1> (x, v, bias)
}
"""


def operators(path: Path) -> list[str]:
    """Return the types of the nodes, in order."""
    return [node.op_type for node in onnx.load(path).graph.node]


@pytest.mark.parametrize(("text", "products"), [(graphs.ENCODER, 7), (GATED, 2), (GEMMS, 1), (MIXED, 1)])
def test_products_become_one(text: str, products: int, tmp_path: Path) -> None:
    source, target = graphs.save(graphs.build(text), tmp_path / "s.onnx"), tmp_path / "t.onnx"
    (applied,) = apply(source, [MergeProjections()], target)
    assert len(applied.plan["groups"]) == 1
    assert applied.checks[0].measured < REORDERED
    after = operators(target)
    assert after.count("MatMul") + after.count("Gemm") == products
    assert after.count("Split") == 1
    onnx.checker.check_model(target, full_check=True)


def test_biases_are_merged_too_and_a_missing_one_is_zero(tmp_path: Path) -> None:
    source, target = graphs.save(graphs.build(GATED), tmp_path / "s.onnx"), tmp_path / "t.onnx"
    apply(source, [MergeProjections()], target)
    assert operators(target) == ["MatMul", "Add", "Split", "Sigmoid", "Mul", "MatMul"]


def test_dynamic_quantization_rounds_what_they_read_once(tmp_path: Path) -> None:
    source, target = graphs.save(graphs.build(graphs.ENCODER), tmp_path / "s.onnx"), tmp_path / "t.onnx"
    apply(source, [MergeProjections(), QuantizeDynamic()], target)
    merged = operators(target)
    apply(source, [QuantizeDynamic()], target)
    assert merged.count("MatMulInteger") == operators(target).count("MatMulInteger") - 2


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (graphs.SHARED_WEIGHT, "no two products with constant weights that read one tensor, expected a MatMul"),
        (
            """twice (float[N, 4] x) => (float[N, 4] a, float[N, 4] b) <float[4, 4] w>
            { a = MatMul (x, w) b = MatMul (x, w) }""",
            "2 x its weight is read elsewhere too, and would be stored twice",
        ),
        (
            """factors (float[N, 4] x) => (float[N, 4] a, float[N, 4] b) <float[4, 4] w, float[4, 4] v>
            { a = Gemm <alpha = 0.5> (x, w) b = Gemm (x, v) }""",
            "1 x it has factors or a transposed input",
        ),
    ],
    ids=["none", "shared", "factors"],
)
def test_what_cannot_be_merged(text: str, reason: str, tmp_path: Path) -> None:
    model = files.load(graphs.save(graphs.build(text), tmp_path / "m.onnx"))
    with pytest.raises(UnsupportedModelError, match=reason):
        MergeProjections().plan(model, None, None)


def test_a_second_application_changes_nothing(tmp_path: Path) -> None:
    model = files.load(graphs.save(graphs.build(graphs.ENCODER), tmp_path / "m.onnx"))
    edit = MergeProjections().plan(model, None, None)
    assert edit(model).modified
    assert not edit(model).modified
    with pytest.raises(UnsupportedModelError):
        MergeProjections().plan(model, None, None)


def test_an_old_opset_is_refused(tmp_path: Path) -> None:
    model = files.load(graphs.save(graphs.build(graphs.OLD_INPUTS), tmp_path / "m.onnx"))
    with pytest.raises(UnsupportedModelError, match="merge-projections: got opset 9, expected opset 13 or later"):
        MergeProjections().plan(model, None, None)
