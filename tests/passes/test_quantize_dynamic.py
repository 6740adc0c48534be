"""Dynamic quantization: which operators onnxruntime then runs, what they compute, and what is refused."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from onnx_lathe.passes import files
from onnx_lathe.passes.quantize.dynamic import IntegerProducts, QuantizeDynamic
from onnx_lathe.runtime import providers, tensors
from onnx_lathe.runtime.errors import PassSpecError, UnsupportedModelError
from onnx_lathe.runtime.parity import sqnr_db
from onnx_lathe.runtime.profile import optimized_operators
from onnx_lathe.runtime.session import Session
from tests import graphs, tolerances


@dataclasses.dataclass(frozen=True)
class Quantized:
    """A quantized fixture graph: both files, the plan, the graph after the edit, and what onnxruntime makes of it."""

    source: Path
    target: Path
    edit: IntegerProducts
    model: ir.Model
    operators: Mapping[str, int]


def quantize(folder: Path, text: str, request: QuantizeDynamic | None = None) -> Quantized:
    """Quantize a text graph and check the result with its oracle, and that it stays near the float graph."""
    source, target = folder / "source.onnx", folder / "target.onnx"
    graphs.save(graphs.build(text), source)
    model = files.load(source)
    edit = (request or QuantizeDynamic()).plan(model, None, None)
    assert edit(model).modified
    files.save(model, target)
    onnx.checker.check_model(target, full_check=True)
    feeds = tensors.random_feeds(source)
    for check in edit.check(source, target, feeds):
        assert check.passed, check
    want, got = Session(source).run(feeds), Session(target).run(feeds)
    assert min(sqnr_db(want[name], got[name]) for name in want) > tolerances.QUANTIZED_DB
    return Quantized(source, target, edit, model, optimized_operators(target))


def test_a_value_of_one_layer_is_rounded_inside_the_product(tmp_path: Path) -> None:
    result = quantize(tmp_path, graphs.PERCEPTRON)
    assert result.operators == {"DynamicQuantizeMatMul": 3, "Relu": 2}


def test_a_value_of_three_layers_is_rounded_once(tmp_path: Path) -> None:
    result = quantize(tmp_path, graphs.ENCODER)
    assert result.operators["DynamicQuantizeLinear"] == 1
    assert result.operators["MatMulIntegerToFloat"] == 3
    assert result.operators["DynamicQuantizeMatMul"] == 4
    assert [(refusal.node, refusal.reason) for refusal in result.edit.refused] == [
        ("scores", "both of its operands are computed"),
        ("context", "both of its operands are computed"),
    ]


def test_each_product_has_its_own_scales(tmp_path: Path) -> None:
    result = quantize(tmp_path, graphs.SHARED_WEIGHT)
    assert result.operators == {"DynamicQuantizeMatMul": 3, "Tanh": 1}
    factors = [
        node.inputs[1] for node in result.model.graph if node.op_type == "Mul" and node.name and "scales" in node.name
    ]
    assert len(set(factors)) == len(factors) == 3
    weights = [node.inputs[1] for node in result.model.graph if node.op_type == "MatMulInteger"]
    assert len(set(weights)) == 2


def test_convs_become_integer_products_with_unsigned_weights(tmp_path: Path) -> None:
    result = quantize(tmp_path, graphs.CLASSIFIER, QuantizeDynamic(weight_bits=8))
    assert result.operators["ConvInteger"] == 2
    assert result.operators["DynamicQuantizeMatMul"] == 1
    weight = result.model.graph.initializers["w1_quantized"].const_value
    assert weight is not None
    assert isinstance(weight, ir.LazyTensor)
    assert weight.dtype == ir.DataType.UINT8
    assert (int(weight.numpy().min()), int(weight.numpy().max())) in ((1, 255), (2, 255), (1, 254))
    assert not {"w1", "b1", "w2", "b2", "w3", "b3"} & set(result.model.graph.initializers)


def test_a_depthwise_conv_stays_float(tmp_path: Path) -> None:
    result = quantize(tmp_path, graphs.BOTTLENECK)
    assert result.operators["ConvInteger"] == 2
    assert result.operators["Conv"] == 1
    assert [refusal.node for refusal in result.edit.refused] == ["depth"]


@pytest.mark.parametrize("per_channel", [True, False])
@pytest.mark.parametrize("graph", ["CLASSIFIER", "PERCEPTRON", "FIXED_SEQUENCE", "CONSTANT_WEIGHT", "RESIDUAL_PRODUCT"])
def test_every_form_keeps_its_oracle(graph: str, per_channel: bool, tmp_path: Path) -> None:
    result = quantize(tmp_path, getattr(graphs, graph), QuantizeDynamic(per_channel=per_channel))
    assert "MatMul" not in result.operators
    assert "Gemm" not in result.operators


def test_operators_and_nodes_can_be_left_out(tmp_path: Path) -> None:
    result = quantize(tmp_path, graphs.CLASSIFIER, QuantizeDynamic(operators=("Gemm", "MatMul")))
    assert result.edit.layers == ("logits",)
    other = QuantizeDynamic(exclude=("fc",)).plan(files.load(result.source), None, None)
    assert other.layers == ("a", "d")
    with pytest.raises(PassSpecError, match="got 'fd', expected the name of a node"):
        QuantizeDynamic(exclude=("fd",)).plan(files.load(result.source), None, None)


def test_weights_have_seven_bits_on_a_cpu_whose_products_saturate(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(providers, "cpu_class", lambda: "x86_64 avx2")
    result = quantize(tmp_path, graphs.PERCEPTRON)
    assert result.edit.weights.bits == 7
    weight = result.model.graph.initializers["w1_quantized"].const_value
    assert weight is not None
    assert np.abs(weight.numpy()).max() == 63


def test_the_plan_is_json_and_the_edit_a_second_time_changes_nothing(tmp_path: Path) -> None:
    result = quantize(tmp_path, graphs.PERCEPTRON)
    assert json.loads(json.dumps(result.edit.describe()))["layers"] == ["a", "d", "y"]
    assert not result.edit(result.model).modified
    assert not result.edit(files.load(result.target)).modified


def test_the_oracle_finds_a_wrong_scale(tmp_path: Path) -> None:
    result = quantize(tmp_path, graphs.PERCEPTRON)
    wrong = onnx.load(result.target)
    for tensor in wrong.graph.initializer:
        if tensor.name == "w2_quantized_scale":
            tensor.CopyFrom(onnx.numpy_helper.from_array(-onnx.numpy_helper.to_array(tensor), tensor.name))
    onnx.save(wrong, tmp_path / "wrong.onnx")
    _, operators, constants = result.edit.check(
        result.source, tmp_path / "wrong.onnx", tensors.random_feeds(result.source)
    )
    assert operators.scope == "3 of 3 integer operators"
    assert (constants.passed, constants.where) == (False, "d")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (graphs.QUANTIZED, "already quantized, expected a float model"),
        (
            f'<ir_version: 5, opset_import: ["" : 10]>\n{graphs.RESIDUAL_PRODUCT}',
            "got opset 10, expected opset 11 or later",
        ),
        (graphs.COUNTING, "no Conv, Gemm or MatMul at all"),
        (graphs.FUNCTION, "1 x MatMul: it is inside a function: run cleanup first"),
    ],
)
def test_what_cannot_be_quantized_is_refused(text: str, message: str, tmp_path: Path) -> None:
    source = tmp_path / "source.onnx"
    onnx.save(graphs.build(text), source)
    with pytest.raises(UnsupportedModelError, match=message):
        QuantizeDynamic().plan(files.load(source), None, None)


LOOPED = """
looped (float[N, 8] x, bool choose) => (float[N, 8] y, float[N, 4] z)
<float[8, 8] w, float[8, 4] v, int64 trips = {3}, bool yes = {1}>
{
  [loop] y = Loop (trips, yes, x) <
    body = body (int64 i, bool c, float[N, 8] state) => (bool d, float[N, 8] next)
    {
      [go] d = Identity (c)
      [inside] p = MatMul (state, w)
      [outside] q = MatMul (x, w)
      [sum] s = Add (p, q)
      [bound] next = Tanh (s)
    }
  >
  [branch] z = If (choose) <
    then_branch = yes_graph () => (float[N, 4] t) { [then_product] t = MatMul (y, v) },
    else_branch = no_graph () => (float[N, 4] e) { [else_product] e = MatMul (x, v) }
  >
}
"""


def test_layers_inside_loops_and_branches_become_integer_products(tmp_path: Path) -> None:
    result = quantize(tmp_path, LOOPED)
    assert result.edit.layers == ("p", "q", "t", "e")
    operators = [node.op_type for node in result.model.graph.all_nodes()]
    assert operators.count("MatMulInteger") == 4
    # x is rounded once, outside the loop; its state in each turn; y for one branch.
    rounded = [node for node in result.model.graph if node.op_type == "DynamicQuantizeLinear"]
    outside = [value.name for node in rounded for value in node.inputs if value is not None]
    assert (outside, operators.count("DynamicQuantizeLinear")) == (["x", "y"], 3)
    assert "w" not in result.model.graph.initializers
    for choose in (True, False):
        feeds = {**tensors.random_feeds(result.source), "choose": np.array(choose)}
        want, got = Session(result.source).run(feeds), Session(result.target).run(feeds)
        assert min(sqnr_db(want[name], got[name]) for name in want) > tolerances.QUANTIZED_DB


def test_results_of_the_same_name_in_two_branches_stay_float(tmp_path: Path) -> None:
    text = LOOPED.replace("(float[N, 4] e)", "(float[N, 4] t)").replace(" e = MatMul", " t = MatMul")
    model = files.load(graphs.save(graphs.build(text), tmp_path / "m.onnx"))
    edit = QuantizeDynamic().plan(model, None, None)
    assert edit.layers == ("p", "q")
    assert {refusal.reason for refusal in edit.refused} == {"another subgraph has a result of the same name"}


def test_scales_of_weights_can_be_powers_of_two(tmp_path: Path) -> None:
    result = quantize(tmp_path, graphs.PERCEPTRON, QuantizeDynamic(power_of_two=True))
    scales = [
        value.const_value.numpy()
        for name, value in result.model.graph.initializers.items()
        if name.endswith("_quantized_scale") and value.const_value is not None
    ]
    assert len(scales) == 3
    for values in scales:
        np.testing.assert_array_equal(np.exp2(np.rint(np.log2(values))), values)
