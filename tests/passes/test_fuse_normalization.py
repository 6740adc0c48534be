"""Normalizations as one operator: every spelling is found by what it computes, with the skip connection or without."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest

from onnx_lathe.passes import files
from onnx_lathe.passes.fuse.normalization import Form, FuseNormalization
from onnx_lathe.passes.run import apply
from onnx_lathe.runtime import tensors
from onnx_lathe.runtime.errors import UnsupportedModelError
from onnx_lathe.runtime.session import Session
from tests import graphs

MEANS = "m = ReduceMean <axes = [-1]> (r)"
LAYERS = {
    "divided": """d = Sub (r, m) s = Pow (d, two) v = ReduceMean <axes = [-1]> (s) e = Add (v, tiny) q = Sqrt (e)
        n = Div (d, q) t = Mul (n, scale) z = Add (t, shift)""",
    "multiplied": """d = Sub (r, m) s = Mul (d, d) v = ReduceMean <axes = [2]> (s) e = Add (tiny, v) q = Sqrt (e)
        i = Reciprocal (q) n = Mul (d, i) t = Mul (scale, n) z = Add (shift, t)""",
    "as TensorFlow": """d = Sub (r, m) s = Mul (d, d) v = ReduceMean <axes = [-1]> (s) e = Add (tiny, v) q = Sqrt (e)
        i = Reciprocal (q) g = Mul (i, scale) a = Mul (r, g) b = Mul (m, g) c = Sub (shift, b) z = Add (a, c)""",
    "cast": """f = Cast <to = 1> (m) d = Sub (r, f) s = Pow (d, two) v = ReduceMean <axes = [-1]> (s) e = Add (v, tiny)
        q = Pow (e, half) n = Div (d, q) t = Mul (n, scale) z = Add (t, shift)""",
}
RMS = {
    "power": """s = Pow (r, two) v = ReduceMean <axes = [-1]> (s) e = Add (v, tiny) q = Sqrt (e) i = Reciprocal (q)
        n = Mul (r, i) z = Mul (scale, n)""",
    "product": """s = Mul (r, r) v = ReduceMean <axes = [-1]> (s) e = Add (v, tiny) q = Sqrt (e) n = Div (r, q)
        z = Mul (n, scale)""",
}
OTHERS = {
    "channels first": """m = ReduceMean <axes = [1]> (r) d = Sub (r, m) s = Pow (d, two)
        v = ReduceMean <axes = [1]> (s) e = Add (v, tiny) q = Sqrt (e) n = Div (d, q) t = Mul (n, scale)
        z = Add (t, shift)""",
    "a variance of another": f"""{MEANS} d = Sub (r, m) s = Pow (x, two) v = ReduceMean <axes = [-1]> (s)
        e = Add (v, tiny) q = Sqrt (e) n = Div (d, q) t = Mul (n, scale) z = Add (t, shift)""",
    "a mean alone": f"{MEANS} d = Sub (r, m) t = Mul (d, scale) z = Add (t, shift)",
}


def write(path: Path, body: str, opset: int = 17) -> Path:
    """Write a skip connection and what normalizes it."""
    text = f"""<ir_version: 8, opset_import: ["": {opset}]>
    normalized (float[batch, seq, 8] x, float[batch, seq, 8] y) => (float[batch, seq, 8] z, float[batch, seq, 8] r)
    <float[8] scale, float[8] shift, float two = {{2.0}}, float half = {{0.5}}, float tiny = {{0.00001}}>
    {{ r = Add (x, y) {body} }}"""
    return graphs.save(graphs.build(text), path)


def operators(path: Path) -> list[str]:
    """Return the types of the nodes, in order."""
    return [node.op_type for node in onnx.load(path).graph.node]


@pytest.mark.parametrize("form", ["plain", "skip"])
@pytest.mark.parametrize("spelling", LAYERS)
def test_every_spelling_of_a_layer_normalization(spelling: str, form: Form, tmp_path: Path) -> None:
    source, target = write(tmp_path / "s.onnx", f"{MEANS} {LAYERS[spelling]}"), tmp_path / "t.onnx"
    (applied,) = apply(source, [FuseNormalization(form)], target)
    assert operators(target) == (["Add", "LayerNormalization"] if form == "plain" else ["SkipLayerNormalization"])
    assert len(applied.checks) == 1
    rows = {name: np.float32(1e-3) * array for name, array in tensors.random_feeds(source).items()}
    want, got = Session(source, optimize=False).run(rows), Session(target).run(rows)
    np.testing.assert_allclose(got["z"], want["z"], rtol=1e-4, atol=1e-5, err_msg="epsilon counts for small rows")
    np.testing.assert_allclose(got["r"], want["r"], rtol=1e-6)


@pytest.mark.parametrize(
    ("form", "names"),
    [("simplified", ["Add", "SimplifiedLayerNormalization"]), ("skip", ["SkipSimplifiedLayerNormalization"])],
)
@pytest.mark.parametrize("spelling", RMS)
def test_every_spelling_of_a_root_mean_square(spelling: str, form: Form, names: list[str], tmp_path: Path) -> None:
    source, target = write(tmp_path / "s.onnx", RMS[spelling]), tmp_path / "t.onnx"
    apply(source, [FuseNormalization(form)], target)
    assert operators(target) == names


def test_the_standard_operator_needs_its_opset(tmp_path: Path) -> None:
    old = files.load(write(tmp_path / "old.onnx", RMS["power"]))
    with pytest.raises(UnsupportedModelError, match="RMSNormalization needs opset 23, and the model has 17"):
        FuseNormalization().plan(old, None, None)
    body = RMS["power"].replace("ReduceMean <axes = [-1]> (s)", "ReduceMean (s, last)")
    text = f"""<ir_version: 10, opset_import: ["": 23]>
    normalized (float[batch, seq, 8] r) => (float[batch, seq, 8] z)
    <float[8] scale, float two = {{2.0}}, float tiny = {{0.00001}}, int64[1] last = {{-1}}>
    {{ {body} }}"""
    source, target = graphs.save(graphs.build(text), tmp_path / "s.onnx"), tmp_path / "t.onnx"
    apply(source, [FuseNormalization()], target)
    assert operators(target) == ["RMSNormalization"]


@pytest.mark.parametrize("other", OTHERS)
def test_what_computes_something_else_is_left_alone(other: str, tmp_path: Path) -> None:
    model = files.load(write(tmp_path / "m.onnx", OTHERS[other]))
    with pytest.raises(UnsupportedModelError, match="fuse-normalization: got no normalization that the form 'skip'"):
        FuseNormalization("skip").plan(model, None, None)


def test_summands_of_other_shapes_are_no_skip_connection(tmp_path: Path) -> None:
    text = """
    broadcast (float[batch, seq, 8] x, float[seq, 8] y) => (float[batch, seq, 8] z)
    <float[8] scale, float[8] shift>
    { r = Add (x, y) z = LayerNormalization <axis = -1> (r, scale, shift) }"""
    model = files.load(graphs.save(graphs.build(text), tmp_path / "m.onnx"))
    with pytest.raises(UnsupportedModelError, match="no normalization that the form 'skip' would change"):
        FuseNormalization("skip").plan(model, None, None)


def test_a_second_application_changes_nothing(tmp_path: Path) -> None:
    for form in ("plain", "skip"):
        model = files.load(write(tmp_path / "m.onnx", f"{MEANS} {LAYERS['divided']}"))
        edit = FuseNormalization(form).plan(model, None, None)
        assert edit(model).modified
        assert not edit(model).modified


@pytest.mark.parametrize("bias", ["", ", bias"])
@pytest.mark.parametrize("total", [", , , r", ""])
def test_what_one_operator_adds_up_and_normalizes_is_taken_apart(bias: str, total: str, tmp_path: Path) -> None:
    outputs = "float[batch, seq, 8] z" + (", float[batch, seq, 8] r" if total else "")
    text = f"""<ir_version: 8, opset_import: ["": 17, "com.microsoft": 1]>
    skipped (float[batch, seq, 8] x, float[batch, seq, 8] y) => ({outputs})
    <float[8] scale, float[8] shift, float[8] bias>
    {{ z{total} = com.microsoft.SkipLayerNormalization <epsilon = 0.001> (x, y, scale, shift{bias}) }}"""
    source, target = tmp_path / "s.onnx", tmp_path / "t.onnx"
    onnx.save(graphs.build(text), source)
    apply(source, [FuseNormalization()], target)
    assert operators(target) == ["Add"] * (2 if bias else 1) + ["LayerNormalization"]
    apply(target, [FuseNormalization("skip")], source)
    assert operators(source) == ["Add"] * (1 if bias else 0) + ["SkipLayerNormalization"]


def test_a_shift_after_a_root_mean_square_stays_a_sum(tmp_path: Path) -> None:
    body = RMS["power"].replace("z = Mul (scale, n)", "t = Mul (scale, n) z = Add (t, shift)")
    source, target = write(tmp_path / "s.onnx", body), tmp_path / "t.onnx"
    apply(source, [FuseNormalization("simplified")], target)
    assert operators(target) == ["Add", "SimplifiedLayerNormalization", "Add"]
