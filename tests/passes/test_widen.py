"""From half precision to float32: types inside, types at the borders, values."""

from __future__ import annotations

from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
import pytest

from onnx_lathe.passes import files
from onnx_lathe.passes.precision.widen import Widen, is_half
from onnx_lathe.passes.quantize.dynamic import QuantizeDynamic
from onnx_lathe.passes.run import apply
from onnx_lathe.runtime import tensors
from onnx_lathe.runtime.errors import UnsupportedModelError
from onnx_lathe.runtime.profile import optimized_operators
from onnx_lathe.runtime.session import Session
from tests import graphs

MIXED = """
mixed (float16[batch, 8] x, bool choose) => (float16[batch, 4] y, float[batch, 4] wide, float16[batch, 8] same)
<float16[8, 4] w, float16[4] b>
{
  [product] h = MatMul (x, w)
  [sum] s = Add (h, b)
  [branch] y = If (choose) <
    then_branch = then_graph () => (float16[batch, 4] t)
    {
      [half] c = Constant <value = float16[1] {14336}> ()
      [scaled] t = Mul (s, c)
    },
    else_branch = else_graph () => (float16[batch, 4] e)
    {
      [cast] f = Cast <to = 1> (s)
      [back] g = Cast <to = 10> (f)
      [negated] e = Neg (g)
    }
  >
  [widened] wide = Cast <to = 1> (s)
  [copy] same = Identity (x)
}
"""
FEEDS = {"x": np.linspace(-2, 2, 24, dtype=np.float16).reshape(3, 8)}


def types(path: Path) -> set[int]:
    """The element types of everything inside a model: weights, constants, casts, values."""
    model = onnx.load(path)
    graphs_ = [model.graph, *(a.g for n in model.graph.node for a in n.attribute if a.HasField("g"))]
    found = {tensor.data_type for graph in graphs_ for tensor in graph.initializer}
    found |= {value.type.tensor_type.elem_type for graph in graphs_ for value in graph.value_info}
    return found | {a.t.data_type for graph in graphs_ for n in graph.node for a in n.attribute if a.HasField("t")}


def test_everything_inside_is_float32_and_the_borders_are_as_before(tmp_path: Path) -> None:
    source, target = graphs.save(graphs.build(MIXED), tmp_path / "m.onnx"), tmp_path / "w.onnx"
    (done,) = apply(source, [Widen()], target)
    assert done.changed
    assert types(target) == {onnx.TensorProto.FLOAT}
    onnx.checker.check_model(target, full_check=True)
    before, after = Session(source), Session(target)
    assert (after.inputs, after.outputs) == (before.inputs, before.outputs)
    for choose in (True, False):
        feeds = {**FEEDS, "choose": np.array(choose)}
        want, got = before.run(feeds), after.run(feeds)
        for name, array in want.items():
            assert got[name].dtype == array.dtype
            np.testing.assert_allclose(got[name].astype(np.float32), array.astype(np.float32), rtol=4e-3, atol=4e-3)
    assert not is_half(files.load(target))


def test_a_bfloat16_model_becomes_one_that_a_cpu_runs(tmp_path: Path) -> None:
    text = """
    bf (float[batch, 8] x) => (float[batch, 4] y)
    <bfloat16[8, 4] w>
    {
      [in] h = Cast <to = 16> (x)
      [product] p = MatMul (h, w)
      [out] y = Cast <to = 1> (p)
    }
    """
    source, target = graphs.save(graphs.build(text), tmp_path / "m.onnx"), tmp_path / "w.onnx"
    (done,) = apply(source, [Widen()], target)
    assert done.checks[0].passed
    w = onnx.numpy_helper.to_array(onnx.load(source).graph.initializer[0]).astype(np.float32)
    x = FEEDS["x"].astype(np.float32)
    np.testing.assert_allclose(Session(target).run({"x": x})["y"], x @ w, rtol=1e-5)
    assert ml_dtypes.bfloat16(w[0, 0]) == w[0, 0]


def test_a_half_model_is_quantized_behind_it(tmp_path: Path) -> None:
    text = graphs.PERCEPTRON.replace("float[", "float16[")
    source, target = graphs.save(graphs.build(text), tmp_path / "m.onnx"), tmp_path / "q.onnx"
    apply(source, [Widen(), QuantizeDynamic()], target)
    assert optimized_operators(target)["DynamicQuantizeMatMul"] == 3
    feeds = tensors.random_feeds(source)
    want, got = Session(source).run(feeds)["y"], Session(target).run(feeds)["y"]
    assert got.dtype == np.float16
    assert np.abs(got.astype(np.float32) - want).max() < 0.05 * np.abs(want).max()


def test_a_model_in_float32_is_refused(tmp_path: Path) -> None:
    source = graphs.save(graphs.build(graphs.PERCEPTRON), tmp_path / "m.onnx")
    with pytest.raises(UnsupportedModelError, match="widen: got a model that computes nothing in float16 or bfloat16"):
        apply(source, [Widen()], tmp_path / "w.onnx")


AWKWARD = {
    "an output that is cast is read inside": """
        m (float[2, 4] ids) => (float16[2, 4] y, float16[2, 4] z) <float16[4, 4] w>
        { y = Cast <to = 10> (ids) z = MatMul (y, w) }
    """,
    "a weight is an output": """
        m (float16[2, 4] ids) => (float16[4, 4] w, float16[2, 4] z) <float16[4, 4] w>
        { z = MatMul (ids, w) }
    """,
    "the name is taken": """
        m (float16[2, 4] ids) => (float16[2, 4] z) <float16[4, 4] w>
        { ids_wide = MatMul (ids, w) z = Relu (ids_wide) }
    """,
    "an input is an output": """
        m (float16[2, 4] ids) => (float16[2, 4] ids, float16[2, 4] z) <float16[4, 4] w>
        { z = MatMul (ids, w) }
    """,
    "a loop carries it": """
        m (float16[2, 4] ids) => (float16[2, 4] z) <float16[4, 4] w, int64 n = {2}, bool yes = {1}>
        {
          z = Loop (n, yes, ids) <body = b (int64 i, bool c, float16[2, 4] s) => (bool d, float16[2, 4] t)
            { d = Identity (c) t = MatMul (s, w) }>
        }
    """,
    "a sequence inside": """
        m (float16[2, 4] ids) => (float16[2, 4] z) <float16[4, 4] w>
        { a = MatMul (ids, w) s = SplitToSequence <axis = 0> (a) z = ConcatFromSequence <axis = 0> (s) }
    """,
}


@pytest.mark.parametrize("text", AWKWARD.values(), ids=AWKWARD)
def test_awkward_models_stay_what_they_are(text: str, tmp_path: Path) -> None:
    model = graphs.build(text)
    if "SplitToSequence" in text:
        half = onnx.TensorProto.FLOAT16
        model.graph.value_info.append(onnx.helper.make_tensor_sequence_value_info("s", half, None))
    source, target = graphs.save(model, tmp_path / "m.onnx"), tmp_path / "w.onnx"
    (done,) = apply(source, [Widen()], target)
    assert done.changed
    ids = np.linspace(-1, 1, 8).reshape(2, 4)
    feeds = {"ids": ids.astype(np.float32 if "float[2, 4] ids" in text else np.float16)}
    want, got = Session(source).run(feeds), Session(target).run(feeds)
    for name, array in want.items():
        assert got[name].dtype == array.dtype
        np.testing.assert_allclose(got[name].astype(np.float32), array.astype(np.float32), rtol=4e-3, atol=4e-3)
    loaded = files.load(target)
    assert not Widen()(loaded).modified


def test_a_sequence_as_output_is_refused(tmp_path: Path) -> None:
    model = graphs.build(AWKWARD["a sequence inside"].replace("z = ConcatFromSequence <axis = 0> (s)", "z = Relu (a)"))
    half = onnx.TensorProto.FLOAT16
    model.graph.output.append(onnx.helper.make_tensor_sequence_value_info("s", half, None))
    source = graphs.save(model, tmp_path / "m.onnx")
    with pytest.raises(UnsupportedModelError, match=r"widen: 's': got an input or output of type Sequence.*one tensor"):
        apply(source, [Widen()], tmp_path / "w.onnx")
