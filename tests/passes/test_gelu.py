"""Gelu in one spelling: every way to write it is found by what it computes, and nothing else is."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest

from onnx_lathe.passes import files
from onnx_lathe.passes.fuse.activations import curve, find_activations, largest_difference
from onnx_lathe.passes.fuse.gelu import Form, Gelu
from onnx_lathe.passes.fuse.stretch import shaped
from onnx_lathe.passes.run import apply
from onnx_lathe.runtime import tensors
from onnx_lathe.runtime.errors import UnsupportedModelError
from onnx_lathe.runtime.session import Session
from tests import graphs

CONSTANTS = """float half = {0.5}, float one = {1.0}, float two = {2.0}, float three = {3.0}, float root = {1.4142135},
 float inverse_root = {0.70710677}, float outer = {0.7978845608}, float inner = {0.044715}, float quick = {1.702},
 float[6] bias"""

SPELLINGS = {
    "half first": ("erf", "h = Mul (x, half) d = Div (x, root) e = Erf (d) s = Add (e, one) y = Mul (h, s)"),
    "half last": ("erf", "d = Mul (inverse_root, x) e = Erf (d) s = Add (one, e) p = Mul (x, s) y = Mul (p, half)"),
    "half inside": ("erf", "d = Div (x, root) e = Erf (d) s = Add (e, one) h = Mul (half, s) y = Mul (x, h)"),
    "half twice": ("erf", "d = Div (x, root) e = Erf (d) p = Mul (e, half) s = Add (p, half) y = Mul (s, x)"),
    "operator": ("erf", "y = Gelu (x)"),
    "onnxruntime": ("erf", "y = com.microsoft.Gelu (x)"),
    "with bias": ("erf", "y = com.microsoft.BiasGelu (x, bias)"),
    "power": (
        "tanh",
        """c = Pow (x, three) i = Mul (inner, c) a = Add (x, i) o = Mul (outer, a) t = Tanh (o) s = Add (one, t)
        h = Mul (half, x) y = Mul (h, s)""",
    ),
    "products": (
        "tanh",
        """p = Mul (x, x) q = Mul (p, inner) r = Add (q, one) u = Mul (x, outer) o = Mul (u, r) t = Tanh (o)
        s = Add (t, one) m = Mul (x, s) y = Mul (m, half)""",
    ),
    "sigmoid of the same": (
        "tanh",
        """c = Pow (x, three) i = Mul (inner, c) a = Add (x, i) o = Mul (outer, a) d = Mul (two, o) s = Sigmoid (d)
        y = Mul (x, s)""",
    ),
    "approximate": ("tanh", 'y = Gelu <approximate = "tanh"> (x)'),
    "fast": ("tanh", "y = com.microsoft.FastGelu (x, bias)"),
    "silu": ("sigmoid", "s = Sigmoid (x) y = Mul (s, x)"),
    "quick": ("sigmoid", "q = Mul (x, quick) s = Sigmoid (q) y = Mul (x, s)"),
    "quick operator": ("sigmoid", "y = com.microsoft.QuickGelu <alpha = 1.5> (x)"),
}

IN_FORM = {
    "fused": ("operator", "approximate", "quick operator"),
    "erf": ("half first", "half last", "half inside", "half twice"),
    "quick": ("quick operator",),
}

OTHERS = {
    "another factor": "h = Mul (x, half) d = Div (x, two) e = Erf (d) s = Add (e, one) y = Mul (h, s)",
    "without half": "d = Div (x, root) e = Erf (d) s = Add (e, one) y = Mul (x, s)",
    "a bias inside": """b = Add (x, bias) d = Div (x, root) e = Erf (d) s = Add (e, one) h = Mul (b, half)
        y = Mul (h, s)""",
    "tanh alone": "t = Tanh (x) y = Mul (t, x)",
    "sigmoid of another": "b = Add (x, bias) s = Sigmoid (b) y = Mul (s, x)",
}


def write(path: Path, body: str, opset: int = 20) -> Path:
    """Write a model of one activation."""
    header = f'<ir_version: 10, opset_import: ["": {opset}, "com.microsoft": 1]>'
    text = f"{header}\nactivation (float[N, 6] x) => (float[N, 6] y)\n<{CONSTANTS}>\n{{ {body} }}"
    model = graphs.build(text)
    onnx.save(model, path)
    return path


@pytest.mark.parametrize("form", ["fused", "erf", "fast", "quick"])
@pytest.mark.parametrize("spelling", SPELLINGS)
def test_every_spelling_in_every_form(spelling: str, form: Form, tmp_path: Path) -> None:
    function, body = SPELLINGS[spelling]
    source, target = write(tmp_path / "source.onnx", body), tmp_path / "target.onnx"
    (found,) = find_activations(shaped(files.load(source)))
    assert found.function == function
    if (function == "sigmoid" and form in ("erf", "fast")) or (function == "tanh" and form == "erf"):
        with pytest.raises(UnsupportedModelError, match=r"which is another function|not an approximation of Gelu"):
            Gelu(form).plan(files.load(source), None, None)
        return
    if spelling in IN_FORM.get(form, ()):
        with pytest.raises(UnsupportedModelError, match=f"no activation that the form '{form}' would change, expected"):
            Gelu(form).plan(files.load(source), None, None)
        return
    (applied,) = apply(source, [Gelu(form)], target)
    assert applied.checks[0].passed
    x = np.linspace(-6, 6, 60, dtype=np.float32).reshape(10, 6)
    want, got = Session(source).run({"x": x})["y"], Session(target).run({"x": x})["y"]
    np.testing.assert_allclose(got, want, atol=applied.plan["largest_difference"] + 1e-5)
    operators = [node.op_type for node in onnx.load(target).graph.node]
    named = {"fused": {"erf": "Gelu", "tanh": "Gelu", "sigmoid": "QuickGelu"}[function], "erf": "Erf"}
    assert named.get(form, {"fast": "FastGelu", "quick": "QuickGelu"}.get(form)) in operators


@pytest.mark.parametrize("other", OTHERS)
def test_what_computes_something_else_is_left_alone(other: str, tmp_path: Path) -> None:
    model = files.load(write(tmp_path / "m.onnx", OTHERS[other]))
    assert list(find_activations(shaped(model))) == []
    with pytest.raises(UnsupportedModelError, match="gelu: got no activation that the form 'fused' would change"):
        Gelu().plan(model, None, None)


def test_before_opset_20_the_operators_are_those_of_onnxruntime(tmp_path: Path) -> None:
    source, target = write(tmp_path / "s.onnx", SPELLINGS["half last"][1], opset=17), tmp_path / "t.onnx"
    apply(source, [Gelu()], target)
    assert [(node.domain, node.op_type) for node in onnx.load(target).graph.node] == [("com.microsoft", "Gelu")]


def test_a_value_inside_that_others_read_keeps_the_spelling(tmp_path: Path) -> None:
    text = f"""<ir_version: 10, opset_import: ["": 20]>
    shared (float[N, 6] x) => (float[N, 6] y, float[N, 6] e)
    <{CONSTANTS}>
    {{ {SPELLINGS["half first"][1]} }}"""
    model = files.load(graphs.save(graphs.build(text), tmp_path / "m.onnx"))
    assert list(find_activations(shaped(model))) == []


def test_one_activation_that_reads_another(tmp_path: Path) -> None:
    text = f"""<ir_version: 10, opset_import: ["": 20]>
    chain (float[N, 6] x) => (float[N, 6] z)
    <{CONSTANTS}>
    {{ y = Gelu (x) z = Gelu (y) }}"""
    source, target = graphs.save(graphs.build(text), tmp_path / "s.onnx"), tmp_path / "t.onnx"
    (applied,) = apply(source, [Gelu("quick")], target)
    assert len(applied.plan["activations"]) == 2
    assert [node.op_type for node in onnx.load(target).graph.node] == ["QuickGelu", "QuickGelu"]


def test_half_precision_is_refused_with_the_reason(tmp_path: Path) -> None:
    text = "half (float16[N, 6] x) => (float16[N, 6] y) { y = Gelu (x) }"
    model = files.load(graphs.save(graphs.build(text), tmp_path / "m.onnx"))
    with pytest.raises(UnsupportedModelError, match="its elements are FLOAT16: only those of FLOAT are rewritten"):
        Gelu("fast").plan(model, None, None)


@pytest.mark.parametrize("form", ["fused", "erf", "fast", "quick"])
def test_a_second_application_changes_nothing(form: Form, tmp_path: Path) -> None:
    source = write(tmp_path / "source.onnx", SPELLINGS["half first"][1])
    model = files.load(source)
    if form == "erf":
        model = files.load(write(tmp_path / "source.onnx", SPELLINGS["operator"][1]))
    edit = Gelu(form).plan(model, None, None)
    assert edit(model).modified
    assert not edit(model).modified
    files.save(model, tmp_path / "t.onnx")
    assert all(check.passed for check in edit.check(source, tmp_path / "t.onnx", tensors.random_feeds(source)))


def test_how_far_the_approximations_are_away() -> None:
    assert 4.7e-4 < largest_difference(curve("erf"), curve("tanh")) < 4.8e-4
    assert 2.0e-2 < largest_difference(curve("erf"), curve("sigmoid", 1.702)) < 2.1e-2
