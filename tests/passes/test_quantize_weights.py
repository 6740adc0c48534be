"""Weight-only quantization: what onnxruntime then runs, how near it is, and what stays float."""

from __future__ import annotations

import dataclasses
import errno
import gc
import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import numpy_helper

from onnx_lathe.passes import files, run
from onnx_lathe.passes.oracle import Check
from onnx_lathe.passes.quantize import fitted, grams, packing
from onnx_lathe.passes.quantize.layers import NOT_OBSERVED
from onnx_lathe.passes.quantize.weight_only import BlockProducts, QuantizeWeights
from onnx_lathe.runtime import tensors
from onnx_lathe.runtime.errors import OracleError, OutputError, PassSpecError, SamplesError, UnsupportedModelError
from onnx_lathe.runtime.parity import sqnr_db
from onnx_lathe.runtime.profile import optimized_operators
from onnx_lathe.runtime.samples import Samples
from onnx_lathe.runtime.session import Session
from tests import graphs, tolerances

HEADED = """
headed (float[N, S, 64] x) => (float[N, S, 48] probabilities, float[N, S, 64] hidden)
<float[64, 64] w1, float[64, 64] w2, float[64, 48] w3, float[48] b3>
{
  [first] a = MatMul (x, w1)
  [relu] b = Relu (a)
  [second] hidden = MatMul (b, w2)
  [project] c = MatMul (hidden, w3)
  [bias] d = Add (c, b3)
  [softmax] probabilities = Softmax (d)
}
"""
"""Three layers: one inside, one whose result is an output and read on, and a head with a bias and a softmax."""

LOOPED = """
looped (float[N, 32] x) => (float[N, 32] y)
<float[32, 32] w, float[32, 32] v, float zero = {0.0}>
{
  [total] total = ReduceSum <keepdims = 0> (x)
  [positive] flag = Greater (total, zero)
  [choose] c = If (flag) <
    then_branch = yes () => (float[N, 32] t) { [inner] t = MatMul (x, w) },
    else_branch = no () => (float[N, 32] e) { [plain] e = Neg (x) }
  >
  [outer] d = MatMul (c, v)
  [tanh] f = Tanh (d)
  [add] y = Add (f, x)
}
"""
"""A layer inside a branch, and one behind it."""


@dataclasses.dataclass(frozen=True)
class Quantized:
    """A quantized fixture graph: both files, the plan, the graph after the edit, and what onnxruntime makes of it."""

    source: Path
    target: Path
    edit: BlockProducts
    model: ir.Model
    operators: Mapping[str, int]


def quantize(folder: Path, text: str, request: QuantizeWeights, least_db: float = tolerances.FOUR_BITS_DB) -> Quantized:
    """Quantize a text graph and check the result with its oracle, and that it stays near the float graph."""
    source, target = folder / "source.onnx", folder / "target.onnx"
    graphs.save(graphs.build(text), source)
    model = files.load(source)
    edit = request.plan(model, graphs.samples_for(source), None)
    assert edit(model).modified
    files.save(model, target)
    onnx.checker.check_model(target, full_check=True)
    feeds = tensors.random_feeds(source)
    for check in edit.check(source, target, feeds):
        assert check.passed, check
    want, got = Session(source).run(feeds), Session(target).run(feeds)
    assert min(sqnr_db(want[name], got[name]) for name in want) > least_db
    operators = optimized_operators(target)
    assert operators["MatMulNBits"] == len(edit.layers)
    assert "DequantizeLinear" not in operators
    return Quantized(source, target, edit, model, operators)


def nodes_of(model: ir.Model) -> list[ir.Node]:
    return [node for node in model.graph.all_nodes() if node.op_type == "MatMulNBits"]


def checks(result: Quantized, target: Path) -> list[Check]:
    return list(result.edit.check(result.source, target, tensors.random_feeds(result.source)))


@pytest.mark.parametrize("options", [{}, {"symmetric": True}, {"power_of_two": True}], ids=str)
@pytest.mark.parametrize("method", ["rtn", "hqq", "gptq"])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("graph", ["PERCEPTRON", "ENCODER", "SHARED_WEIGHT", "FIXED_SEQUENCE", "RESIDUAL_PRODUCT"])
def test_every_layer_runs_as_matmulnbits(
    graph: str, bits: int, method: str, options: dict[str, bool], tmp_path: Path
) -> None:
    request = QuantizeWeights(bits=bits, block=16, method=method, **options)  # pyright: ignore[reportArgumentType]
    result = quantize(tmp_path, getattr(graphs, graph), request)
    assert "Gemm" not in result.operators
    for node in nodes_of(result.model):
        assert node.attributes["accuracy_level"].as_int() == 4
        assert (len(node.inputs) > 3 and node.inputs[3] is not None) == (not options.get("symmetric", False))
    if options.get("power_of_two") and graph != "PERCEPTRON":
        scales = np.concatenate([_stored(node, 2).ravel() for node in nodes_of(result.model)])
        np.testing.assert_array_equal(np.exp2(np.rint(np.log2(scales))), scales)


def test_eight_bits_stay_near_the_float_graph(tmp_path: Path) -> None:
    result = quantize(tmp_path, graphs.ENCODER, QuantizeWeights(block=16), tolerances.QUANTIZED_DB)
    assert {layer.scheme.bits for layer in result.edit.layers} == {8}


def test_the_head_has_its_own_bits(tmp_path: Path) -> None:
    result = quantize(tmp_path, HEADED, QuantizeWeights(bits=4, block=16))
    assert {layer.result: layer.scheme.bits for layer in result.edit.layers} == {"a": 4, "hidden": 8, "c": 8}
    assert [node.attributes["bits"].as_int() for node in nodes_of(result.model)] == [4, 8, 8]
    again = quantize(tmp_path, HEADED, QuantizeWeights(bits=4, head_bits=4, block=16))
    assert {layer.scheme.bits for layer in again.edit.layers} == {4}


def test_a_gemm_keeps_its_factors_and_its_bias(tmp_path: Path) -> None:
    result = quantize(tmp_path, graphs.PERCEPTRON, QuantizeWeights(block=16), tolerances.QUANTIZED_DB)
    gemm = nodes_of(result.model)[2]
    assert [value is None for value in gemm.inputs] == [False, False, False, False, True, False]
    bias = numpy_helper.to_array(next(t for t in onnx.load(result.source).graph.initializer if t.name == "b3"))
    np.testing.assert_array_equal(_stored(gemm, 5), 2.0 * bias)
    assert set(result.model.graph.initializers) & {"w1", "w2", "w3", "b3"} == set()
    plain = quantize(tmp_path, graphs.PERCEPTRON, QuantizeWeights(block=16, symmetric=True), tolerances.QUANTIZED_DB)
    assert [value is None for value in nodes_of(plain.model)[2].inputs] == [False, False, False, True, True, False]


def test_layers_that_share_a_weight_share_its_levels(tmp_path: Path) -> None:
    result = quantize(tmp_path, graphs.SHARED_WEIGHT, QuantizeWeights(block=16, head_bits=8))
    first, second, third = (node.inputs[1] for node in nodes_of(result.model))
    assert first is second
    assert first is not third
    assert result.model.graph.initializers["w"].is_graph_output()


def test_a_last_block_that_is_not_full_is_filled_up(tmp_path: Path) -> None:
    result = quantize(tmp_path, graphs.FIXED_SEQUENCE, QuantizeWeights(bits=4, block=16, head_bits=4))
    assert [node.attributes["K"].as_int() for node in nodes_of(result.model)] == [24, 32]
    levels, zero_points = _stored(nodes_of(result.model)[0], 1), _stored(nodes_of(result.model)[0], 3)
    assert (levels.shape, zero_points.shape) == ((32, 2, 8), (32, 1))
    assert not levels[:, 1, 4:].any()


def test_gptq_changes_the_outputs_less_than_rounding(tmp_path: Path) -> None:
    source = graphs.save(graphs.build(HEADED), tmp_path / "m.onnx")
    rng = np.random.default_rng(0)
    mixing = rng.standard_normal((4, 64))
    batches = [(rng.standard_normal((8, 6, 4)) @ mixing).astype(np.float32) for _ in range(6)]
    samples = Samples(tuple({"x": batch + np.float32(0.1)} for batch in batches))
    ratio: dict[str, float] = {}
    for method in ("rtn", "gptq"):
        target = tmp_path / f"{method}.onnx"
        request = QuantizeWeights(bits=4, block=32, method=method)  # pyright: ignore[reportArgumentType]
        run.apply(source, [request], target, samples=samples)
        want, got = (Session(path).run(samples.batches[0])["hidden"] for path in (source, target))
        ratio[method] = sqnr_db(want, got)
    assert ratio["gptq"] > ratio["rtn"] + 3.0


def test_gptq_sums_moments_within_a_budget(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    at_once = quantize(tmp_path, graphs.ENCODER, QuantizeWeights(bits=4, block=16, method="gptq"))
    whole = at_once.target.read_bytes()
    monkeypatch.setattr(grams, "GRAM_BYTES", 1)
    monkeypatch.setattr(fitted, "COLUMN_BYTES", 32 * 4 * 5)
    one_by_one = quantize(tmp_path, graphs.ENCODER, QuantizeWeights(bits=4, block=16, method="gptq"))
    some, all_ = (_levels(each.model) for each in (one_by_one, at_once))
    assert np.mean(some != all_) < 0.01, "products of other sizes round otherwise, here and there"
    assert len(whole) == one_by_one.target.stat().st_size


def test_a_full_disk_of_temporary_files_is_an_error_that_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    shelf = fitted.Shelf()
    monkeypatch.setattr(np, "savez", full)
    weight = packing.Packed(np.zeros((1, 1, 16), np.uint8), np.ones((1, 1), np.float32), np.zeros((1, 1), np.uint8))
    with pytest.raises(OutputError, match=r"got no room for the fitted weights \(No space left on device\)"):
        shelf.write("a", weight)


def test_fitted_weights_that_are_gone_already_are_no_obstacle() -> None:
    shelf = fitted.Shelf()
    folder = shelf.folder
    folder.rmdir()
    del shelf
    # What a finalizer raises is printed and lost: warnings are errors here, and pytest warns of it.
    gc.collect()
    assert not folder.exists()


def test_fitted_weights_are_gone_with_the_plan(tmp_path: Path) -> None:
    source = graphs.save(graphs.build(HEADED), tmp_path / "m.onnx")
    samples = graphs.samples_for(source)
    edit = QuantizeWeights(block=16, method="gptq").plan(files.load(source), samples, None)
    assert edit.shelf is not None
    folder = edit.shelf.folder
    assert len(list(folder.iterdir())) == 3
    del edit
    gc.collect()
    assert not folder.exists()


def test_layers_in_branches_are_rounded_but_by_gptq(tmp_path: Path) -> None:
    assert len(quantize(tmp_path, LOOPED, QuantizeWeights(block=16)).edit.layers) == 2
    result = quantize(tmp_path, LOOPED, QuantizeWeights(block=16, method="gptq"))
    assert [layer.result for layer in result.edit.layers] == ["d"]
    assert [(each.node, each.reason) for each in result.edit.refused] == [("inner", NOT_OBSERVED)]


def test_a_large_model_is_checked_by_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "WHOLE_MODEL_BYTES", 0)
    monkeypatch.setattr(files, "EXTERNAL_ABOVE_BYTES", 0)
    monkeypatch.setattr(files, "INLINE_BELOW_BYTES", 100)
    source, target = graphs.save(graphs.build(graphs.ENCODER), tmp_path / "m.onnx"), tmp_path / "q.onnx"
    (done,) = run.apply(source, [QuantizeWeights(bits=4, block=16)], target)
    assert [(check.what, check.scope, check.passed) for check in done.checks] == [
        ("products against numpy", "7 of 7 products", True),
        ("rounded weights against the float ones", "7 of 7 products", True),
    ]
    assert (tmp_path / "q.onnx.data").exists()
    feeds = tensors.random_feeds(source)
    assert sqnr_db(Session(source).run(feeds)["logits"], Session(target).run(feeds)["logits"]) > tolerances.FOUR_BITS_DB


def test_the_plan_is_json_and_the_edit_a_second_time_changes_nothing(tmp_path: Path) -> None:
    result = quantize(tmp_path, graphs.PERCEPTRON, QuantizeWeights(bits=4, block=16))
    plan = json.loads(json.dumps(result.edit.describe()))
    assert plan["method"] == "rtn"
    assert plan["layers"][0] == {
        "result": "a",
        "scheme": {"bits": 4, "size": 16, "symmetric": False, "power_of_two": False},
    }
    assert not result.edit(result.model).modified
    assert not result.edit(files.load(result.target)).modified


@pytest.mark.parametrize(("suffix", "failed"), [("levels", [0, 1, 2]), ("scales", [0, 2]), ("zero_points", [0, 2])])
def test_the_oracle_finds_weights_that_are_wrong(suffix: str, failed: list[int], tmp_path: Path) -> None:
    result = quantize(tmp_path, graphs.RESIDUAL_PRODUCT, QuantizeWeights(block=16))
    wrong = onnx.load(result.target)
    for tensor in wrong.graph.initializer:
        if tensor.name == f"w_{suffix}":
            stored = numpy_helper.to_array(tensor)
            spoilt = -stored if suffix == "scales" else stored ^ np.uint8(128)
            tensor.CopyFrom(numpy_helper.from_array(spoilt, tensor.name))
    onnx.save(wrong, tmp_path / "wrong.onnx")
    found = [number for number, check in enumerate(checks(result, tmp_path / "wrong.onnx")) if not check.passed]
    assert found == [number for number in failed if number != 1]


def test_a_wrong_edit_is_never_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = graphs.save(graphs.build(graphs.RESIDUAL_PRODUCT), tmp_path / "m.onnx")

    def turned(found: packing.Levels, bits: int) -> packing.Levels:
        del bits
        return found[..., ::-1]

    monkeypatch.setattr(packing, "packed", turned)
    with pytest.raises(OracleError, match="quantize-weights"):
        run.apply(source, [QuantizeWeights(block=16)], tmp_path / "q.onnx")
    assert not (tmp_path / "q.onnx").exists()


def test_operators_and_nodes_can_be_left_out(tmp_path: Path) -> None:
    model = files.load(graphs.save(graphs.build(graphs.PERCEPTRON), tmp_path / "m.onnx"))
    gemms = QuantizeWeights(block=16, operators=("Gemm",)).plan(model, None, None)
    assert [layer.result for layer in gemms.layers] == ["d", "y"]
    others = QuantizeWeights(block=16, exclude=("second",)).plan(model, None, None)
    assert [layer.result for layer in others.layers] == ["a", "y"]
    assert [(each.node, each.reason) for each in others.refused] == [("second", "it is left out by the option exclude")]
    with pytest.raises(PassSpecError, match="got 'secnd', expected the name of a node"):
        QuantizeWeights(exclude=("secnd",)).plan(model, None, None)


def test_a_layer_narrower_than_a_block_stays_float(tmp_path: Path) -> None:
    model = files.load(graphs.save(graphs.build(graphs.PERCEPTRON), tmp_path / "m.onnx"))
    edit = QuantizeWeights(block=32).plan(model, None, None)
    assert [layer.result for layer in edit.layers] == ["d", "y"]
    assert [each.reason for each in edit.refused] == ["it has 24 inputs, fewer than a block of 32"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (graphs.QUANTIZED, "already quantized, expected a float model"),
        (graphs.COUNTING, "no Conv, Gemm or MatMul at all"),
        (graphs.CONSTANT_WEIGHT, "1 x MatMul: it has 2 inputs, fewer than a block of 128"),
        (graphs.OLD_INPUTS, "2 x Gemm: its weight is also an input of the graph"),
        (graphs.FUNCTION, "1 x MatMul: it is inside a function: run cleanup first"),
        (
            graphs.RESIDUAL_PRODUCT.replace("MatMul (a, w)", "MatMul (w, a)"),
            "1 x MatMul: its weight is the left operand",
        ),
        (
            f'<ir_version: 5, opset_import: ["" : 6]>\n{graphs.RESIDUAL_PRODUCT}',
            "got opset 6, expected opset 7 or later",
        ),
    ],
)
def test_what_cannot_be_quantized_is_refused(text: str, message: str, tmp_path: Path) -> None:
    onnx.save(graphs.build(text), tmp_path / "source.onnx")
    with pytest.raises(UnsupportedModelError, match=message):
        QuantizeWeights().plan(files.load(tmp_path / "source.onnx"), None, None)


def test_a_model_is_not_quantized_twice(tmp_path: Path) -> None:
    result = quantize(tmp_path, graphs.RESIDUAL_PRODUCT, QuantizeWeights(block=16))
    with pytest.raises(UnsupportedModelError, match="already quantized"):
        QuantizeWeights(block=16).plan(files.load(result.target), None, None)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_weight_that_is_not_finite_is_refused_by_name(value: float, tmp_path: Path) -> None:
    proto = graphs.build(graphs.RESIDUAL_PRODUCT)
    weight = numpy_helper.to_array(proto.graph.initializer[0]).copy()
    weight[3, 4] = value
    proto.graph.initializer[0].CopyFrom(numpy_helper.from_array(weight, "w"))
    model = files.load(graphs.save(proto, tmp_path / "m.onnx"))
    with pytest.raises(UnsupportedModelError, match=r"weight 'w': got NaN or infinity in it, expected finite values"):
        QuantizeWeights(block=16).plan(model, None, None)


def test_gptq_needs_samples_that_fit(tmp_path: Path) -> None:
    source = graphs.save(graphs.build(graphs.PERCEPTRON), tmp_path / "m.onnx")
    request = QuantizeWeights(block=16, method="gptq")
    with pytest.raises(SamplesError, match="got no samples, expected calibration samples, on which GPTQ keeps"):
        request.plan(files.load(source), None, None)
    with pytest.raises(SamplesError, match="Add an array for 'x'"):
        request.plan(files.load(source), Samples(({"z": np.zeros((2, 24), np.float32)},)), None)
    spread = Samples(({"x": np.full((2, 24), 3e38, np.float32)},))
    with pytest.raises(SamplesError, match=r"got NaN, infinity or numbers over 2\^50 as the network runs"):
        request.plan(files.load(source), spread, None)


def test_an_input_that_never_varies_is_no_obstacle(tmp_path: Path) -> None:
    source = graphs.save(graphs.build(graphs.PERCEPTRON), tmp_path / "m.onnx")
    for value in (0.0, 1.0):
        samples = Samples(({"x": np.full((4, 24), value, np.float32)},))
        (done,) = run.apply(
            source, [QuantizeWeights(bits=4, block=16, method="gptq")], tmp_path / "q.onnx", samples=samples
        )
        assert all(check.passed for check in done.checks)


def _stored(node: ir.Node, index: int) -> np.ndarray[tuple[int, ...], np.dtype[np.float32]]:
    value = node.inputs[index]
    assert value is not None
    assert value.const_value is not None
    return value.const_value.numpy()


def _levels(model: ir.Model) -> np.ndarray[tuple[int, ...], np.dtype[np.float32]]:
    return np.concatenate([_stored(node, 1).ravel() for node in nodes_of(model)])
