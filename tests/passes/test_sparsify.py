"""Masks: which weights become zero, and that the graph computes with them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from onnx_lathe.passes import files
from onnx_lathe.passes.prune.groups import tensor_of
from onnx_lathe.passes.prune.sparsify import Sparsify
from onnx_lathe.runtime import tensors
from onnx_lathe.runtime.errors import UnsupportedModelError
from onnx_lathe.runtime.samples import Array
from tests import graphs

WEIGHTS = ("w1", "w2", "w3")


def weights(model: ir.Model, names: tuple[str, ...] = WEIGHTS) -> dict[str, Array]:
    return {name: tensor_of(model.graph.initializers[name]).numpy() for name in names}


def sparsified(request: Sparsify, folder: Path) -> tuple[dict[str, Array], dict[str, Array], dict[str, object]]:
    """Return the weights of a small convolutional network before and after, and the plan as JSON."""
    source = graphs.save(graphs.build(graphs.CONV_CHAIN), folder / "source.onnx")
    model = files.load(source)
    before = weights(model)
    edit = request.plan(model, None, None)
    assert edit(model).modified
    assert all(isinstance(model.graph.initializers[name].const_value, ir.LazyTensor) for name in WEIGHTS)
    files.save(model, folder / "target.onnx")
    for check in edit.check(source, folder / "target.onnx", tensors.random_feeds(source)):
        assert check.passed, check
    return before, weights(files.load(folder / "target.onnx")), dict(edit.describe())


def test_std_zeroes_what_lies_under_a_threshold_of_deviations(tmp_path: Path):
    before, after, described = sparsified(Sparsify(threshold=0.8), tmp_path)
    for name, weight in before.items():
        np.testing.assert_array_equal(after[name], np.where(np.abs(weight) < 0.8 * weight.std(), 0.0, weight))
    zeros = sum(int((weight == 0).sum()) for weight in after.values())
    assert described["zeros"] == zeros / sum(weight.size for weight in after.values())
    assert json.loads(json.dumps(described)) == described


def test_magnitude_zeroes_a_share_of_each_weight(tmp_path: Path):
    before, after, described = sparsified(Sparsify(rule="magnitude", ratio=0.75), tmp_path)
    for name, weight in after.items():
        assert int((weight == 0).sum()) == weight.size * 3 // 4
        assert np.abs(weight[weight != 0]).min() > np.abs(before[name][weight == 0]).max()
    assert described["compressed_after"] < 0.45 * described["compressed_before"] < described["bytes"]  # pyright: ignore


def test_what_is_zero_is_not_zeroed_again():
    model = ir.from_proto(graphs.build(graphs.CONV_CHAIN))
    Sparsify(rule="magnitude", ratio=0.5).plan(model, None, None)(model)
    with pytest.raises(UnsupportedModelError, match=r"sparsify: got no float weight .* with an entry to zero"):
        Sparsify(rule="magnitude", ratio=0.25).plan(model, None, None)


def test_biases_tables_and_integers_are_left_alone():
    model = ir.from_proto(graphs.build(graphs.ENCODER))
    masks = Sparsify().plan(model, None, None).masks
    assert [mask.weight for mask in masks] == ["q", "k", "v", "o", "up", "down", "head"]
    with pytest.raises(UnsupportedModelError, match="sparsify before quantization"):
        Sparsify().plan(ir.from_proto(graphs.build(graphs.COUNTING)), None, None)


def test_a_plan_fits_no_other_model():
    edit = Sparsify().plan(ir.from_proto(graphs.build(graphs.CONV_CHAIN)), None, None)
    with pytest.raises(UnsupportedModelError, match=r"initializer 'w1': got \d+ entries, expected 864 entries"):
        edit(ir.from_proto(graphs.build(graphs.FLATTENED)))
    with pytest.raises(UnsupportedModelError, match="initializer 'w1': got no such weight"):
        edit(ir.from_proto(graphs.build(graphs.COUNTING)))
