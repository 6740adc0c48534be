"""What cleanup removes, keeps and does not even read. That outputs stay equal, the contract suite sees."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from onnx_lathe.passes import files
from onnx_lathe.passes.cleanup.cleanup import Cleanup
from onnx_lathe.passes.quantize.dynamic import QuantizeDynamic
from onnx_lathe.passes.run import apply
from onnx_lathe.runtime.samples import Array
from onnx_lathe.runtime.session import Session
from tests import graphs
from tests.tolerances import REORDERED


def load(text: str) -> ir.Model:
    return ir.from_proto(graphs.build(text))


def cleaned(text: str) -> ir.Model:
    model = load(text)
    Cleanup()(model)
    onnx.checker.check_model(ir.to_proto(model), full_check=True)
    return model


def operators(model: ir.Model) -> list[str]:
    return [node.op_type for node in model.graph]


def constant(model: ir.Model, name: str) -> Array:
    tensor = model.graph.initializers[name].const_value
    assert tensor is not None
    return tensor.numpy()


def test_only_what_computes_is_left():
    model = cleaned(graphs.LEFTOVERS)
    assert operators(model) == ["Conv", "Relu", "Mul", "Reshape", "Reshape", "Add", "Neg"]
    assert [node.name for node in model.graph] == ["named_conv", "relu", "scaled", "view", "flat", "sum", "negative"]
    assert [value.name for value in model.graph.outputs] == ["y", "z"]
    assert "unused" not in model.graph.initializers
    assert constant(model, "k.shape").tolist() == [0, -1]
    assert constant(model, "three") == 3.0


def test_batch_normalization_goes_into_the_convolution_before_it():
    model = load(graphs.LEFTOVERS)
    weight, scale, mean, var, shift = (constant(model, name) for name in ("w", "scale", "mean", "var", "shift"))
    Cleanup()(model)
    factor = scale / np.sqrt(var + 1e-5)
    np.testing.assert_allclose(constant(model, "w"), weight * factor[:, None, None, None], rtol=REORDERED)
    np.testing.assert_allclose(constant(model, "w_bias"), shift - mean * factor, rtol=REORDERED)


@pytest.mark.parametrize(
    ("old", "new"),
    [("BatchNormalization (a", "BatchNormalization <training_mode = 1> (a"), ("float[", "float16[")],
    ids=["training", "half"],
)
def test_batch_normalization_stays_where_folding_would_change_it(old: str, new: str):
    text = graphs.CONV_CHAIN.replace(old, new)
    if "training" in new:
        text = text.replace("[norm1] n =", "[norm1] n, m1, v1 =")
    assert "BatchNormalization" in operators(cleaned(text))


def test_values_that_are_two_outputs_keep_both_names():
    model = cleaned(graphs.TWO_NAMES)
    assert [value.name for value in model.graph.outputs] == ["first", "second", "third"]
    assert operators(model) == ["Relu", "Identity", "Identity"]


def test_metadata_and_doc_strings_of_exporters_go_and_the_models_own_stay():
    proto = graphs.build(graphs.FIXED_BATCH)
    proto.doc_string = "what the model is for"
    proto.metadata_props.add(key="labels", value="cat,dog")
    proto.graph.doc_string = "exported"
    for holder in (proto.graph, proto.graph.node[0], proto.graph.value_info.add(name="a"), proto.graph.output[0]):
        holder.metadata_props.add(key="pkg.torch.onnx.stack_trace", value="File /home/somebody/train.py")
    proto.graph.node[0].doc_string = "from train.py"
    model = ir.from_proto(proto)
    assert Cleanup()(model).modified
    text = str(ir.to_proto(model))
    assert "stack_trace" not in text
    assert "train.py" not in text
    assert "exported" not in text
    assert 'value: "cat,dog"' in text
    assert "what the model is for" in text


def test_large_equal_weights_become_one_and_small_ones_stay_apart():
    text = """
    twins (float[N, 128] x) => (float[N, 128] y)
    <float[128, 128] w1, float[128] b1, float[128] b2>
    {
      [first] a = Gemm (x, w1, b1)
      [second] y = Gemm (a, w2, b2)
    }
    """.replace("w1, float[128] b1", "w1, float[128, 128] w2, float[128] b1")
    proto = graphs.build(text)
    weights = {tensor.name: tensor for tensor in proto.graph.initializer}
    weights["w2"].raw_data = weights["w1"].raw_data
    weights["b2"].raw_data = weights["b1"].raw_data
    model = ir.from_proto(proto)
    Cleanup()(model)
    assert list(model.graph.initializers) == ["w1", "b1", "b2"]
    assert [[value.name for value in node.inputs if value] for node in model.graph] == [
        ["x", "w1", "b1"],
        ["a", "w1", "b2"],
    ]


def test_small_weights_are_not_read():
    def read(array: Array) -> Array:
        raise AssertionError("read")

    model = load(graphs.RESIDUAL)
    for name in ("w1", "b1", "w5"):
        value = model.graph.initializers[name]
        tensor = value.const_value
        assert tensor is not None
        value.const_value = files.lazy(name, tensor, read, ir.DataType.FLOAT, tuple(tensor.shape.numpy()))
    Cleanup()(model)


def test_a_transposed_weight_is_transposed_as_it_is_written(tmp_path: Path):
    text = """
    turned (float[N, 8] x) => (float[N, 64] y) <float[64, 8] w>
    {
      [turn] t = Transpose <perm = [1, 0]> (w)
      [product] y = MatMul (x, t)
    }
    """
    model = cleaned(text)
    assert operators(model) == ["MatMul"]
    assert isinstance(model.graph.initializers["t"].const_value, ir.LazyTensor)
    source = graphs.save(graphs.build(text), tmp_path / "source.onnx")
    files.save(model, tmp_path / "clean.onnx")
    x = {"x": np.eye(8, dtype=np.float32)}
    np.testing.assert_array_equal(Session(tmp_path / "clean.onnx").run(x)["y"], Session(source).run(x)["y"])


def test_constants_are_folded_only_where_they_stay_small():
    text = """
    constants (float[N, 4000] x) => (float[N, 4000] y) <float[4000] big, float two = {2.0}, float three = {3.0}>
    {
      [small] six = Mul (two, three)
      [large] scaled = Mul (big, six)
      [sum] y = Add (x, scaled)
    }
    """
    model = cleaned(text)
    assert [node.name for node in model.graph] == ["large", "sum"]
    assert constant(model, "six") == 6.0


@pytest.mark.parametrize(
    ("pieces", "shape"),
    [("b, c, r", [0, 4, -1]), ("b, r, c", [0, -1, 4]), ("r, b, c", None)],
)
def test_a_shape_computed_from_shapes_becomes_a_constant_where_it_means_the_same(pieces: str, shape: list[int] | None):
    text = f"""
    viewed (float[N, 4, H, 6] x) => (float[A, B, C] y)
    <int64 first = {{0}}, int64 second = {{1}}, int64[1] front = {{0}}, int64[1] r = {{-1}}>
    {{
      [shape] s = Shape (x)
      [dim0] d0 = Gather (s, first)
      [dim1] d1 = Gather (s, second)
      [piece0] b = Unsqueeze (d0, front)
      [piece1] c = Unsqueeze (d1, front)
      [join] target = Concat <axis = 0> ({pieces})
      [view] y = Reshape (x, target)
    }}
    """
    model = cleaned(text)
    if shape is None:
        assert "Concat" in operators(model)
    else:
        assert operators(model) == ["Reshape"]
        assert constant(model, "y.shape").tolist() == shape


def test_functions_are_inlined_but_for_those_of_another_operator_set():
    assert operators(cleaned(graphs.FUNCTION)) == ["MatMul", "Add", "Relu", "MatMul", "Add"]
    other = graphs.FUNCTION.replace('"local", opset_import: ["" : 20]', '"local", opset_import: ["" : 18]')
    assert operators(cleaned(other)) == ["Layer", "Relu", "Layer"]


def test_weights_of_old_files_are_no_inputs_any_more():
    model = cleaned(graphs.OLD_INPUTS)
    assert model.ir_version == 4
    assert [value.name for value in model.graph.inputs] == ["x"]


def test_weights_that_users_may_replace_stay_inputs():
    text = graphs.OLD_INPUTS.replace("ir_version: 3", "ir_version: 8")
    proto = graphs.build(text)
    proto.graph.input.add().CopyFrom(onnx.helper.make_tensor_value_info("b1", onnx.TensorProto.FLOAT, [32]))
    model = ir.from_proto(proto)
    Cleanup()(model)
    assert [value.name for value in model.graph.inputs] == ["x", "b1"]


def test_every_node_has_a_name_of_its_own():
    proto = graphs.build(graphs.RESIDUAL)
    for node in proto.graph.node:
        node.name = "same" if node.op_type == "Conv" else ""
    model = ir.from_proto(proto)
    Cleanup()(model)
    names = [node.name for node in model.graph]
    assert len(set(names)) == len(names) == 14
    assert "same" in names
    assert None not in names


@pytest.mark.parametrize(
    ("keepdims", "axes", "left"),
    [(1, "2, 3", ["GlobalAveragePool"]), (0, "-1, -2", ["GlobalAveragePool", "Flatten"]), (1, "1, 2", ["ReduceMean"])],
)
def test_a_mean_over_pixels_becomes_a_pooling(keepdims: int, axes: str, left: list[str]):
    shape = "[N, 3]" if keepdims == 0 else "[N, 3, 1, 1]" if left == ["GlobalAveragePool"] else "[N, 1, 1, 5]"
    model = cleaned(f"""
mean (float[N, 3, 5, 5] x) => (float{shape} y)
<int64[2] axes = {{{axes}}}>
{{
  y = ReduceMean <keepdims = {keepdims}> (x, axes)
}}
""")
    assert operators(model) == left


def test_a_model_that_rounds_as_it_runs_is_cleaned_up(tmp_path: Path) -> None:
    source = graphs.save(graphs.build(graphs.PERCEPTRON), tmp_path / "m.onnx")
    apply(source, [QuantizeDynamic()], tmp_path / "q.onnx")
    (done,) = apply(tmp_path / "q.onnx", [Cleanup()], tmp_path / "c.onnx")
    assert [check.unit for check in done.checks] in ([], ["dB"])
