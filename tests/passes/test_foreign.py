"""Optimizers of others as requests: what they make is checked, and what they cannot do is said."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import onnx
import pytest

from onnx_lathe.passes import files
from onnx_lathe.passes.fuse import foreign
from onnx_lathe.passes.fuse.foreign import OptimizeOnnxruntime, OptimizeOnnxscript
from onnx_lathe.passes.request import Request
from onnx_lathe.passes.run import apply
from onnx_lathe.runtime.errors import DependencyError, UnsupportedModelError
from tests import graphs

BOTH = pytest.mark.parametrize(
    "request_", [OptimizeOnnxscript(), OptimizeOnnxscript("common"), OptimizeOnnxruntime()], ids=str
)

SKIPPED = """
skipped (float[batch, seq, 8] x, float[batch, seq, 8] y) => (float[batch, seq, 8] z)
<float[8] scale, float[8] shift, float one = {1.0}>
{
  same = Mul (x, one)
  r = Add (same, y)
  z = LayerNormalization <axis = -1> (r, scale, shift)
}
"""


@BOTH
def test_an_optimizer_is_applied_and_checked(request_: Request, tmp_path: Path) -> None:
    source, target = graphs.save(graphs.build(SKIPPED), tmp_path / "s.onnx"), tmp_path / "t.onnx"
    (applied,) = apply(source, [request_], target)
    assert applied.changed
    assert applied.checks[0].passed
    operators = [node.op_type for node in onnx.load(target).graph.node]
    common = isinstance(request_, OptimizeOnnxscript) and request_.rules == "common"
    assert operators[-1] == ("LayerNormalization" if common else "SkipLayerNormalization")


@BOTH
def test_a_second_application_changes_nothing(request_: Any, tmp_path: Path) -> None:
    model = files.load(graphs.save(graphs.build(graphs.ENCODER), tmp_path / "m.onnx"))
    request_(model)
    assert not request_(model).modified


def test_where_an_optimizer_finds_nothing_that_is_said(tmp_path: Path) -> None:
    model = files.load(
        graphs.save(graphs.build("bare (float[N] x) => (float[N] y) { [relu] y = Relu (x) }"), tmp_path / "m.onnx")
    )
    with pytest.raises(
        UnsupportedModelError, match="optimize-onnxscript: got a model in which the optimizer finds nothing"
    ):
        OptimizeOnnxscript("common").plan(model, None, None)


def test_onnxscript_leaves_weights_in_their_file(tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    model = graphs.build(graphs.ENCODER)
    onnx.save(model, path, save_as_external_data=True, location="m.data", size_threshold=1024)
    loaded = files.load(path)
    OptimizeOnnxscript()(loaded)
    kinds = {
        type(value.const_value).__name__ for value in loaded.graph.initializers.values() if value.name in ("q", "up")
    }
    assert kinds <= {"ExternalTensor"}


def test_a_failure_of_theirs_is_an_error_of_ours(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def fail(model: object) -> None:
        raise KeyError("domain")

    monkeypatch.setattr(foreign, "optimize_for_ort", fail)
    model = files.load(graphs.save(graphs.build(SKIPPED), tmp_path / "m.onnx"))
    with pytest.raises(UnsupportedModelError, match="optimize-onnxscript: got KeyError in onnxscript: 'domain'"):
        OptimizeOnnxscript()(model)


def test_a_graph_of_theirs_that_does_not_run_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def break_(model: Any) -> None:
        model.graph[-1].op_type = "Nonsense"

    monkeypatch.setattr(foreign, "optimize_for_ort", break_)
    source, target = graphs.save(graphs.build(SKIPPED), tmp_path / "s.onnx"), tmp_path / "t.onnx"
    with pytest.raises(
        UnsupportedModelError, match=r"optimize-onnxscript: got a model that onnxruntime refuses.*Nonsense"
    ):
        apply(source, [OptimizeOnnxscript()], target)
    assert not target.exists()


def test_without_sympy_the_extra_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "sympy" else found(name))
    model = files.load(graphs.save(graphs.build(SKIPPED), tmp_path / "m.onnx"))
    with pytest.raises(DependencyError, match=r"sympy: got a package that is not installed.*onnx-lathe\[fuse\]"):
        OptimizeOnnxruntime()(model)


def test_more_than_one_message_holds_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(foreign, "WHOLE_BYTES", 10)
    model = files.load(graphs.save(graphs.build(SKIPPED), tmp_path / "m.onnx"))
    with pytest.raises(UnsupportedModelError, match=r"optimize-onnxruntime: got 0\.0 GiB of weights, expected at most"):
        OptimizeOnnxruntime()(model)
