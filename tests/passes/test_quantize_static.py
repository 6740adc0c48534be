"""Static quantization: which operators onnxruntime then runs, what they compute, and what is refused."""

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
from onnx_lathe.passes.cleanup.cleanup import Cleanup
from onnx_lathe.passes.quantize.insert_qdq import InsertQDQ
from onnx_lathe.passes.quantize.static import QuantizeStatic
from onnx_lathe.passes.run import apply
from onnx_lathe.runtime import providers, tensors
from onnx_lathe.runtime.errors import PassSpecError, SamplesError, UnsupportedModelError
from onnx_lathe.runtime.profile import optimized_operators
from onnx_lathe.runtime.samples import Samples
from onnx_lathe.runtime.session import Session
from tests import graphs

JOIN_OF_A_CLIP = """
  zero = Constant <value_float = 0.0> ()
  half = Constant <value_float = 0.5> ()
  [clip] r = Clip (a, zero, half)
  [join] c = Concat <axis = 1> (r, b)
"""


@dataclasses.dataclass(frozen=True)
class Quantized:
    """A quantized fixture graph.

    Attributes:
        source: The float model.
        target: The quantized one.
        edit: The plan.
        model: The graph after the edit.
        operators: What onnxruntime makes of it.
    """

    source: Path
    target: Path
    edit: InsertQDQ
    model: ir.Model
    operators: Mapping[str, int]

    def integer_operators(self) -> dict[str, int]:
        """Return the counts of operators that compute on integers or convert, without the moving of layouts."""
        names = ("QuantizeLinear", "DequantizeLinear", "MatMulIntegerToFloat", "QGemm")
        return {name: count for name, count in self.operators.items() if name in names or name.startswith("QLinear")}

    def float_layers(self) -> int:
        """Return how many Convs, Gemms and MatMuls run in float."""
        names = ("Conv", "FusedConv", "Gemm", "FusedGemm", "MatMul", "FusedMatMul")
        return sum(self.operators.get(name, 0) for name in names)


def quantize(folder: Path, text: str, request: QuantizeStatic | None = None) -> Quantized:
    """Quantize a text graph on random samples and check the result with its oracle."""
    source = graphs.save(graphs.build(text), folder / "source.onnx")
    return quantize_file(source, request or QuantizeStatic())


def quantize_file(source: Path, request: QuantizeStatic) -> Quantized:
    samples, target = graphs.samples_for(source), source.with_name("target.onnx")
    model = files.load(source)
    edit = request.plan(model, samples, None)
    assert edit(model).modified
    files.save(model, target)
    onnx.checker.check_model(target, full_check=True)
    for check in edit.check(source, target, tensors.first_batch(source, samples, 4)):
        assert check.passed, check
    return Quantized(source, target, edit, model, optimized_operators(target))


def test_convs_pools_and_the_head_run_in_integers(tmp_path: Path) -> None:
    result = quantize(tmp_path, graphs.CLASSIFIER)
    # One rounding of the input and none back: the Clip, the bias and the pools are inside integer operators.
    assert result.integer_operators() == {
        "QLinearConv": 2,
        "QuantizeLinear": 1,
        "QLinearGlobalAveragePool": 1,
        "QGemm": 1,
    }
    assert result.float_layers() == 0
    assert "Clip" not in result.operators
    assert "Relu" not in result.operators
    affine = {value.name: value.affine for value in result.edit.values}
    assert affine["b"] == affine["c"]
    assert affine["b"].zero_point == 0
    assert result.edit.refused == ()


def test_a_residual_path_runs_in_integers_from_the_first_conv_on(tmp_path: Path) -> None:
    result = quantize(tmp_path, graphs.RESIDUAL)
    assert result.integer_operators() == {
        "QLinearConv": 5,
        "QLinearAdd": 2,
        "QuantizeLinear": 2,
        "DequantizeLinear": 1,
        "MatMulIntegerToFloat": 1,
    }
    # The integers' layout is channels-last: a first Conv in float would cost a transpose at each residual path.
    assert result.operators["Transpose"] == 2
    assert result.edit.refused == ()


def test_what_a_concat_joins_has_one_scale(tmp_path: Path) -> None:
    result = quantize(tmp_path, graphs.JOINED)
    assert result.integer_operators() == {
        "QLinearConv": 3,
        "QLinearConcat": 1,
        "QuantizeLinear": 1,
        "DequantizeLinear": 1,
    }
    affine = {value.name: value.affine for value in result.edit.values}
    assert affine["a"] == affine["b"] == affine["c"]


def test_a_depthwise_conv_runs_in_integers_between_integer_operators(tmp_path: Path) -> None:
    result = quantize(tmp_path, graphs.BOTTLENECK)
    assert result.integer_operators() == {
        "QLinearConv": 3,
        "QLinearAdd": 1,
        "QuantizeLinear": 1,
        "DequantizeLinear": 1,
    }


def test_a_depthwise_conv_between_float_operators_stays_float(tmp_path: Path) -> None:
    result = quantize(tmp_path, graphs.LONE_DEPTHWISE)
    assert result.float_layers() == 1
    assert [(refusal.node, refusal.reason) for refusal in result.edit.refused] == [
        ("depth", "it is depthwise and stands between float operators: float is faster")
    ]


def test_a_first_conv_joins_through_a_depthwise_one(tmp_path: Path) -> None:
    text = graphs.BOTTLENECK.replace("N, 16, 8, 8] image", "N, 3, 8, 8] image").replace(
        "[32, 16, 1, 1]", "[32, 3, 1, 1]"
    )
    result = quantize(tmp_path, text.replace("y = Add (e, image)", "y = Relu (e)"))
    assert result.integer_operators() == {"QLinearConv": 3, "QuantizeLinear": 1, "DequantizeLinear": 1}


def test_a_first_conv_before_float_operators_stays_float(tmp_path: Path) -> None:
    text = graphs.LONE_DEPTHWISE.replace("N, 16,", "N, 3,").replace("[16, 1, 3, 3]", "[16, 3, 3, 3]")
    result = quantize(tmp_path, text.replace("group = 16, ", ""))
    assert result.float_layers() == 1
    assert [(refusal.node, refusal.reason) for refusal in result.edit.refused] == [
        ("depth", "it has 3 input channels and stands between float operators: float is faster")
    ]


def test_small_groups_stay_float(tmp_path: Path) -> None:
    text = graphs.BOTTLENECK.replace("[32, 1, 3, 3] w2", "[32, 4, 3, 3] w2").replace("group = 32", "group = 8")
    result = quantize(tmp_path, text)
    assert result.integer_operators()["QLinearConv"] == 2
    assert result.edit.refused[0].reason == "its groups are small (4 channels): float is faster"


@pytest.mark.parametrize("excluded", ["depth", "expand", "project"])
def test_onnxruntime_does_not_round_the_weight_of_an_excluded_conv(excluded: str, tmp_path: Path) -> None:
    text = graphs.BOTTLENECK.replace("[32, 1, 3, 3] w2", "[32, 32, 3, 3] w2").replace("group = 32, ", "")
    result = quantize(tmp_path, text, QuantizeStatic(exclude=(excluded,)))
    assert result.integer_operators()["QLinearConv"] == 2
    assert result.float_layers() == 1
    # No DequantizeLinear of a constant: two of values at most.
    assert result.operators["DequantizeLinear"] <= 2
    assert result.edit.refused[0].reason == "it is left out by the option exclude"


def test_a_perceptron_hands_integers_from_gemm_to_gemm(tmp_path: Path) -> None:
    result = quantize(tmp_path, graphs.PERCEPTRON)
    assert result.integer_operators() == {"QGemm": 3, "QuantizeLinear": 1}
    assert "Relu" not in result.operators


@pytest.mark.parametrize("activation", ["Relu (d)", "Clip (d)"])
def test_a_float_reader_behind_an_activation_leaves_the_gemm_in_integers(activation: str, tmp_path: Path) -> None:
    text = graphs.PERCEPTRON.replace("[relu2] e = Relu (d)", f"[act] r = {activation}\n[tanh] e = Tanh (r)")
    result = quantize(tmp_path, text)
    assert result.integer_operators() == {"QGemm": 3, "QuantizeLinear": 2}


def test_an_encoder_reads_integers_and_writes_floats(tmp_path: Path) -> None:
    result = quantize(tmp_path, graphs.ENCODER)
    # Six of the seven products have a third, symbolic dimension; the head is a Gemm to onnxruntime.
    assert result.integer_operators() == {"QuantizeLinear": 5, "MatMulIntegerToFloat": 6, "QGemm": 1}
    assert result.operators["LayerNormalization"] + result.operators["SkipLayerNormalization"] == 2
    assert [(refusal.node, refusal.reason) for refusal in result.edit.refused] == [
        ("scores", "both of its operands are computed"),
        ("context", "both of its operands are computed"),
    ]


def test_products_of_known_shape_become_integer_gemms(tmp_path: Path) -> None:
    result = quantize(tmp_path, graphs.FIXED_SEQUENCE)
    assert result.integer_operators() == {"QuantizeLinear": 2, "QGemm": 2}


def test_a_product_of_two_dimensions_before_a_residual_add_is_an_integer_gemm(tmp_path: Path) -> None:
    result = quantize(tmp_path, graphs.RESIDUAL_PRODUCT)
    assert result.integer_operators() == {"QuantizeLinear": 1, "QGemm": 1}


def test_a_shared_weight_is_stored_once_a_layout_and_stays_an_output(tmp_path: Path) -> None:
    result = quantize(tmp_path, graphs.SHARED_WEIGHT)
    levels = [
        value for value in result.model.graph.initializers.values() if value.dtype == ir.DataType.INT8 and value.shape
    ]
    weights = [value for value in levels if value.shape is not None and len(value.shape) == 2]
    assert len(weights) == 2
    assert "w" in result.model.graph.initializers


def test_a_constant_node_is_a_weight_and_goes(tmp_path: Path) -> None:
    result = quantize(tmp_path, graphs.CONSTANT_WEIGHT)
    assert result.integer_operators() == {"QuantizeLinear": 1, "MatMulIntegerToFloat": 1}
    assert all(node.op_type != "Constant" for node in result.model.graph)


def test_float_weights_go_and_integer_weights_are_computed_while_they_are_written(tmp_path: Path) -> None:
    result = quantize(tmp_path, graphs.CLASSIFIER)
    initializers = result.model.graph.initializers
    assert not {"w1", "b1", "w2", "b2", "w3", "b3"} & set(initializers)
    assert isinstance(initializers["w1_quantized"].const_value, ir.LazyTensor)
    saved = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in onnx.load(result.target).graph.initializer}
    weight = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in onnx.load(result.source).graph.initializer}
    levels, scales = saved["w1_quantized"], saved["w1_quantized_scale"]
    assert (levels.dtype, scales.shape) == (np.int8, (32,))
    assert np.abs(levels * scales[:, None, None, None] - weight["w1"]).max() <= 0.5001 * scales.max()
    input_scale = next(value.affine.scale for value in result.edit.values if value.name == "image")
    assert saved["a_bias"].dtype == np.int32
    assert saved["a_bias_scale"].tobytes() == (np.float32(input_scale) * scales).tobytes()


def test_the_plan_is_json_and_the_edit_a_second_time_changes_nothing(tmp_path: Path) -> None:
    result = quantize(tmp_path, graphs.CLASSIFIER)
    plan = json.loads(json.dumps(result.edit.describe()))
    assert plan["layers"] == [{"result": name, "bias_add": None, "as_gemm": False} for name in ("a", "d", "logits")]
    assert plan["values"][0]["name"] == "image"
    assert not result.edit(result.model).modified
    assert not result.edit(files.load(result.target)).modified


@pytest.mark.parametrize(
    "request_",
    [
        QuantizeStatic(ranges="percentile"),
        QuantizeStatic(ranges="mse"),
        QuantizeStatic(ranges="kl"),
        QuantizeStatic(per_channel=False),
        QuantizeStatic(weight_bits=7),
    ],
    ids=lambda request: ",".join(str(value) for value in dataclasses.astuple(request)[:5]),
)
@pytest.mark.parametrize("graph", ["CLASSIFIER", "PERCEPTRON", "ENCODER"])
def test_every_option_keeps_its_oracle_and_the_answer(graph: str, request_: QuantizeStatic, tmp_path: Path) -> None:
    result = quantize(tmp_path, getattr(graphs, graph), request_)
    assert result.float_layers() == (2 if graph == "ENCODER" else 0)
    feeds = graphs.samples_for(result.source).batches[0]
    want, got = Session(result.source).run(feeds), Session(result.target).run(feeds)
    for name, array in want.items():
        assert np.corrcoef(array.reshape(-1), got[name].reshape(-1))[0, 1] > 0.95


def test_a_clip_runs_in_float_where_the_scale_does_not_follow_its_bound(tmp_path: Path) -> None:
    result = quantize(tmp_path, graphs.CLASSIFIER, QuantizeStatic(power_of_two=True))
    assert result.integer_operators()["QLinearConv"] == 2
    assert result.float_layers() == 0
    assert result.operators["Clip"] == 1
    assert all(np.frexp(value.affine.scale)[0] == 0.5 for value in result.edit.values)


def test_a_clip_before_a_concat_keeps_its_own_scale(tmp_path: Path) -> None:
    text = graphs.JOINED.replace("[join] c = Concat <axis = 1> (a, b)", JOIN_OF_A_CLIP)
    result = quantize(tmp_path, text)
    assert result.integer_operators()["QLinearConv"] == 3
    assert result.integer_operators()["QLinearConcat"] == 1
    assert "Clip" not in result.operators
    scales = {value.name: value.affine.scale for value in result.edit.values}
    assert 255 * scales["r"] == pytest.approx(0.5)
    assert scales["b"] == scales["c"] > scales["r"]


def test_weights_have_seven_bits_on_a_cpu_whose_products_saturate(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(providers, "cpu_class", lambda: "x86_64 avx2")
    result = quantize(tmp_path, graphs.CLASSIFIER)
    assert result.edit.weights.bits == 7
    levels = result.model.graph.initializers["w1_quantized"].const_value
    assert levels is not None
    assert np.abs(levels.numpy()).max() == 63


def test_a_conv_whose_result_is_the_output_keeps_the_name_of_the_output(tmp_path: Path) -> None:
    result = quantize(tmp_path, graphs.JOINED)
    assert [value.name for value in result.model.graph.outputs] == ["y"]
    assert result.model.graph.outputs[0].producer().op_type == "DequantizeLinear"  # pyright: ignore[reportOptionalMemberAccess]


def test_the_oracle_finds_a_wrong_weight(tmp_path: Path) -> None:
    result = quantize(tmp_path, graphs.CLASSIFIER)
    wrong = onnx.load(result.target)
    for tensor in wrong.graph.initializer:
        if tensor.name == "w2_quantized":
            tensor.CopyFrom(onnx.numpy_helper.from_array(-onnx.numpy_helper.to_array(tensor), tensor.name))
    onnx.save(wrong, tmp_path / "wrong.onnx")
    feeds = graphs.samples_for(result.source).batches[0]
    whole, operators, *_ = result.edit.check(result.source, tmp_path / "wrong.onnx", feeds)
    assert not whole.passed
    assert whole.unit == "dB"
    # The file is consistent in itself: each operator computes what it says.
    assert operators.passed
    assert operators.scope == "4 of 4 integer operators"


def test_an_input_that_is_not_normal_is_calibrated_in_batches_of_any_shape(tmp_path: Path) -> None:
    source = graphs.save(graphs.build(graphs.ENCODER), tmp_path / "source.onnx")
    generator = np.random.default_rng(0)
    batches = tuple(
        {"ids": generator.integers(0, 100, (3, length)), "mask": np.ones((3, length), np.int64)} for length in (4, 9)
    )
    edit = QuantizeStatic(ranges="percentile").plan(files.load(source), Samples(batches), None)
    assert len(edit.layers) == 7


def plan(text: str, folder: Path, request: QuantizeStatic | None = None, samples: bool = True) -> InsertQDQ:
    source = folder / "source.onnx"
    onnx.save(graphs.build(text), source)
    given = graphs.samples_for(source) if samples else None
    return (request or QuantizeStatic()).plan(files.load(source), given, None)


def test_a_quantized_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModelError, match="already quantized, expected a float model"):
        plan(graphs.QUANTIZED, tmp_path)


def test_an_old_opset_is_refused(tmp_path: Path) -> None:
    text = f'<ir_version: 7, opset_import: ["" : 12]>\n{graphs.CLASSIFIER}'
    with pytest.raises(UnsupportedModelError, match="got opset 12, expected opset 13 or later"):
        plan(text, tmp_path)


def test_samples_are_needed(tmp_path: Path) -> None:
    with pytest.raises(SamplesError, match=r"got no samples, expected calibration samples.*--data"):
        plan(graphs.CLASSIFIER, tmp_path, samples=False)


@pytest.mark.parametrize(
    ("graph", "reason"),
    [
        ("HALF", "1 x Gemm: its weight is FLOAT16, not FLOAT: run widen first"),
        ("FUNCTION", "1 x MatMul: it is inside a function: run cleanup first"),
        ("COUNTING", "no Conv, Gemm or MatMul at all"),
    ],
)
def test_a_model_with_nothing_to_quantize_is_refused_with_the_reasons(graph: str, reason: str, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModelError, match="no operator to quantize") as error:
        plan(getattr(graphs, graph), tmp_path)
    assert reason in str(error.value)


def test_operators_and_nodes_can_be_left_out(tmp_path: Path) -> None:
    edit = plan(graphs.CLASSIFIER, tmp_path, QuantizeStatic(operators=("Conv",), exclude=("conv1",)))
    assert [layer.result for layer in edit.layers] == ["d"]
    assert [(refusal.node, refusal.reason) for refusal in edit.refused] == [
        ("conv1", "it is left out by the option exclude"),
        ("fc", "its type is left out by the option operators"),
    ]


def test_an_unknown_node_to_exclude_is_refused(tmp_path: Path) -> None:
    with pytest.raises(PassSpecError, match=r"got 'conv3', expected the name of a node.*Did you mean 'conv2'"):
        plan(graphs.CLASSIFIER, tmp_path, QuantizeStatic(exclude=("conv3",)))


def test_a_weight_that_a_caller_may_replace_stays_float(tmp_path: Path) -> None:
    model = graphs.build(graphs.PERCEPTRON)
    weight = next(tensor for tensor in model.graph.initializer if tensor.name == "w2")
    model.graph.input.append(onnx.helper.make_tensor_value_info("w2", weight.data_type, list(weight.dims)))
    source = graphs.save(model, tmp_path / "source.onnx")
    samples = Samples(({"x": np.ones((2, 24), np.float32)},))
    edit = QuantizeStatic().plan(files.load(source), samples, None)
    assert [(refusal.node, refusal.reason) for refusal in edit.refused] == [
        ("second", "its weight is also an input of the graph")
    ]


def test_values_that_are_not_finite_are_named(tmp_path: Path) -> None:
    text = graphs.RESIDUAL_PRODUCT.replace("Tanh (x)", "Log (x)")
    with pytest.raises(SamplesError, match="batch 0 of 8 samples: value 'a': got NaN or infinity as the"):
        plan(text, tmp_path)


def test_a_weight_that_is_not_finite_is_named(tmp_path: Path) -> None:
    source = tmp_path / "source.onnx"
    model = graphs.build(graphs.RESIDUAL_PRODUCT)
    weight = np.full((32, 32), np.nan, np.float32)
    model.graph.initializer[0].CopyFrom(onnx.numpy_helper.from_array(weight, "w"))
    onnx.save(model, source)
    graph = files.load(source)
    edit = QuantizeStatic().plan(graph, graphs.samples_for(source), None)
    with pytest.raises(UnsupportedModelError, match="weight 'w': got NaN or infinity in it"):
        edit(graph)


@pytest.mark.parametrize("graph", [graphs.CONV_CHAIN, graphs.RESIDUAL, graphs.CLASSIFIER, graphs.DEPTHWISE])
def test_any_one_layer_can_stay_float(graph: str, tmp_path: Path) -> None:
    """Such as the one behind a pooling, which then computes in float from what a convolution rounded."""
    source = graphs.save(graphs.build(graph), tmp_path / "m.onnx")
    apply(source, [Cleanup()], source)
    samples = graphs.samples_for(source)
    layers = [node.name for node in onnx.load(source).graph.node if node.op_type in ("Conv", "Gemm", "MatMul")]
    assert len(layers) > 1
    for name in layers:
        (done,) = apply(source, [QuantizeStatic(exclude=(name,))], tmp_path / "q.onnx", samples=samples)
        assert all(check.passed for check in done.checks)
