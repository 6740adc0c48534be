"""What each layer costs alone, and the search for the fewest to keep float."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx import numpy_helper

from onnx_lathe.passes import files
from onnx_lathe.passes.cleanup.cleanup import Cleanup
from onnx_lathe.passes.quantize.divergence import LARGEST_KL, LIMIT_DB, Difference, looks_like_classes
from onnx_lathe.passes.quantize.dynamic import QuantizeDynamic
from onnx_lathe.passes.quantize.mixture import fewest_float
from onnx_lathe.passes.quantize.sensitivity import LayerSensitivity, OutputDifference, rank, sensitivity
from onnx_lathe.passes.quantize.static import QuantizeStatic
from onnx_lathe.runtime.errors import PassSpecError, UnsupportedModelError
from onnx_lathe.runtime.parity import sqnr_db
from onnx_lathe.runtime.session import Session
from tests import graphs


def test_the_ratio_and_the_divergence_are_those_of_all_batches_together() -> None:
    generator = np.random.default_rng(0)
    want = generator.normal(size=(12, 5)).astype(np.float32)
    got = (want + 0.1 * generator.normal(size=want.shape)).astype(np.float32)
    difference = Difference(classes=True)
    for start in (0, 4, 8):
        difference.update(want[start : start + 4], got[start : start + 4])
    assert difference.sqnr_db == pytest.approx(sqnr_db(want, got))
    p, q = (np.exp(x.astype(np.float64)) / np.exp(x.astype(np.float64)).sum(axis=1, keepdims=True) for x in (want, got))
    assert difference.kl == pytest.approx((p * np.log(p / q)).sum(axis=1).mean())
    shares = Difference(classes=True)
    shares.update(p, q)
    assert shares.kl == pytest.approx(difference.kl)


def test_what_does_not_differ_and_what_is_not_finite_stand_at_the_ends() -> None:
    want = np.array([[1.0, 2.0]])
    same, broken = Difference(classes=True), Difference(classes=True)
    same.update(want, want)
    broken.update(want, np.array([[np.nan, 1.0]]))
    assert (same.sqnr_db, same.kl) == (LIMIT_DB, 0.0)
    assert (broken.sqnr_db, broken.kl) == (-LIMIT_DB, LARGEST_KL)
    assert Difference(classes=False).kl is None


def test_classes_are_known_by_name_or_by_their_sum() -> None:
    assert looks_like_classes("logits", np.ones((2, 3)))
    assert looks_like_classes("y", np.full((2, 4), 0.25))
    assert not looks_like_classes("y", np.ones((2, 4)))
    assert not looks_like_classes("logits", np.ones((2, 1)))


def test_a_layer_with_one_huge_weight_costs_most(tmp_path: Path) -> None:
    model = graphs.build(graphs.PERCEPTRON)
    for tensor in model.graph.initializer:
        if tensor.name == "w2":
            weight = numpy_helper.to_array(tensor).copy()
            weight[0] *= 300.0
            weight[1:] += 0.02
            tensor.CopyFrom(numpy_helper.from_array(weight, "w2"))
    source = graphs.save(model, tmp_path / "source.onnx")
    found = sensitivity(source, QuantizeStatic(per_channel=False), graphs.samples_for(source))
    assert found[0].layer == "second"
    assert {layer.layer: layer.operator for layer in found} == {"first": "MatMul", "second": "Gemm", "third": "Gemm"}


@pytest.mark.parametrize("request_", [QuantizeStatic(), QuantizeDynamic()], ids=["static", "dynamic"])
@pytest.mark.parametrize("graph", ["ENCODER", "RESIDUAL", "CONSTANT_WEIGHT", "SHARED_WEIGHT"])
def test_each_figure_is_that_of_the_model_in_which_all_others_are_excluded(
    graph: str, request_: QuantizeStatic | QuantizeDynamic, tmp_path: Path
) -> None:
    source = graphs.save(graphs.build(getattr(graphs, graph)), tmp_path / "source.onnx")
    samples = graphs.samples_for(source)
    found = sensitivity(source, request_, samples)
    names = [layer.layer for layer in found]
    for layer in found[:2]:
        others = tuple(name for name in names if name != layer.layer)
        model = files.load(source)
        try:
            edit = dataclasses.replace(request_, exclude=others).plan(model, samples, None)
        except UnsupportedModelError:
            continue  # alone it would not earn its rounding
        edit(model)
        files.save(model, tmp_path / "alone.onnx")
        float_model, alone = Session(source), Session(tmp_path / "alone.onnx")
        for output in layer.outputs:
            both = [
                [session.run(feeds)[output.name].reshape(-1) for feeds in samples.iter_batches(8)]
                for session in (float_model, alone)
            ]
            want, got = (np.concatenate(arrays) for arrays in both)
            expected = min(LIMIT_DB, sqnr_db(want, got))
            assert output.sqnr_db == pytest.approx(expected, abs=1.0)


def test_a_depthwise_layer_is_judged_alone_too(tmp_path: Path) -> None:
    source = graphs.save(graphs.build(graphs.BOTTLENECK), tmp_path / "source.onnx")
    found = sensitivity(source, QuantizeStatic(), graphs.samples_for(source))
    assert {layer.layer for layer in found} == {"expand", "depth", "project"}
    assert all(20.0 < layer.outputs[0].sqnr_db < 80.0 for layer in found)


def test_gains_order_the_layers(tmp_path: Path) -> None:
    source = graphs.save(graphs.build(graphs.PERCEPTRON), tmp_path / "source.onnx")
    gains = {"first": 1e-3, "second": 1e-6, "third": -1.0}
    found = sensitivity(source, QuantizeDynamic(), graphs.samples_for(source), gain=gains.get, count=4)
    assert [layer.layer for layer in found] == ["third", "second", "first"]
    assert {layer.layer: layer.gain for layer in found} == gains


def test_a_gain_that_is_unknown_leaves_the_order_to_the_cost() -> None:
    def layer(name: str, db: float, gain: float | None) -> LayerSensitivity:
        return LayerSensitivity(name, "MatMul", (OutputDifference("y", db, None),), gain)

    good, bad = layer("good", 50.0, 1e-9), layer("bad", 10.0, 1.0)
    assert [each.layer for each in rank([bad, good])] == ["good", "bad"]
    assert [each.layer for each in rank([good, bad, layer("new", 30.0, None)])] == ["bad", "new", "good"]


def test_other_passes_and_models_without_real_outputs_are_refused(tmp_path: Path) -> None:
    source = graphs.save(graphs.build(graphs.PERCEPTRON), tmp_path / "source.onnx")
    samples = graphs.samples_for(source)
    with pytest.raises(PassSpecError, match="got a pass that rounds no layer by itself, expected quantize-static or"):
        sensitivity(source, Cleanup(), samples)
    model = onnx.load(source)
    model.graph.node.append(onnx.helper.make_node("ArgMax", ["y"], ["best"], axis=1, keepdims=0))
    del model.graph.output[:]
    model.graph.output.append(onnx.helper.make_tensor_value_info("best", onnx.TensorProto.INT64, ["N"]))
    with pytest.raises(UnsupportedModelError, match="got no output of real numbers"):
        sensitivity(graphs.save(model, tmp_path / "whole.onnx"), QuantizeDynamic(), samples)


LAYERS = tuple("abcdefgh")


@given(st.integers(0, len(LAYERS) + 3))
def test_the_search_finds_the_fewest_in_few_trials(needed: int) -> None:
    trials: list[Sequence[str]] = []

    def certified(exclude: Sequence[str]) -> bool:
        trials.append(exclude)
        return len(exclude) >= needed

    found = fewest_float(LAYERS, certified)
    assert len(trials) <= 4
    assert all(tuple(trial) == LAYERS[: len(trial)] for trial in trials)
    assert all(len(trial) < len(LAYERS) for trial in trials)
    assert found.tried == tuple((len(trial), len(trial) >= needed) for trial in trials)
    assert found.certified == (needed < len(LAYERS))
    assert found.exclude == LAYERS[: min(needed, len(LAYERS) - 1)]


def test_the_search_says_why() -> None:
    assert "All layers are quantized" in fewest_float(LAYERS, lambda _: True).reason
    some = fewest_float(LAYERS, lambda exclude: len(exclude) >= 3)
    assert some.reason == "3 of 8 layers stay float; with 2 the accuracy was not certified."
    none = fewest_float(LAYERS, lambda _: False)
    assert none.reason == "No mixture was certified, not even with 7 of 8 layers float; that one is the nearest."
    assert fewest_float(("only",), lambda _: False).exclude == ()


def test_what_is_called_certified_was_judged_where_errors_do_not_add() -> None:
    # More float layers are worse here now and then: the search may miss the fewest, and never lies.
    allowed = {2, 6, 7}
    found = fewest_float(LAYERS, lambda exclude: len(exclude) in allowed)
    assert found.certified
    assert (len(found.exclude), True) in found.tried
