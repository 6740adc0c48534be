"""Values read inside a graph, against the same values computed by hand."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from onnx_lathe.passes import files
from onnx_lathe.passes.taps import tap
from onnx_lathe.runtime.errors import SamplesError
from onnx_lathe.runtime.samples import Samples
from tests import graphs
from tests.tolerances import REORDERED

RAMP = np.linspace(-1.0, 1.0, 10 * 16, dtype=np.float32).reshape(10, 16)


@pytest.fixture
def dynamic(tmp_path: Path) -> Path:
    text = graphs.FIXED_BATCH.replace("[4,", "[N,")
    return graphs.save(graphs.build(text), tmp_path / "model.onnx")


def test_values_are_those_of_the_graph_batch_by_batch(dynamic: Path) -> None:
    model = files.load(dynamic)
    weights = {name: value.const_value.numpy() for name, value in model.graph.initializers.items() if value.const_value}
    batches = list(tap(model, ["b", "x"], Samples(({"x": RAMP},)), batch=4))
    assert [len(values["x"]) for values in batches] == [4, 4, 2]
    assert list(batches[0]) == ["b", "x"]
    np.testing.assert_array_equal(np.concatenate([values["x"] for values in batches]), RAMP)
    want = 1 / (1 + np.exp(-(RAMP @ weights["w1"] + weights["b1"])))
    np.testing.assert_allclose(np.concatenate([values["b"] for values in batches]), want, rtol=REORDERED)


def test_the_model_is_not_changed(dynamic: Path, tmp_path: Path) -> None:
    model = files.load(dynamic)
    files.save(model, tmp_path / "before.onnx")
    list(tap(model, ["a"], Samples(({"x": RAMP},))))
    files.save(model, tmp_path / "after.onnx")
    assert (tmp_path / "after.onnx").read_bytes() == (tmp_path / "before.onnx").read_bytes()


def test_inputs_alone_need_no_run(dynamic: Path) -> None:
    (values,) = tap(files.load(dynamic), ["x"], Samples(({"x": RAMP},)))
    np.testing.assert_array_equal(values["x"], RAMP)


def test_a_fixed_batch_is_kept_and_the_rest_left(tmp_path: Path) -> None:
    model = files.load(graphs.save(graphs.build(graphs.FIXED_BATCH), tmp_path / "model.onnx"))
    batches = list(tap(model, ["a"], Samples(({"x": RAMP},))))
    assert [values["a"].shape for values in batches] == [(4, 32), (4, 32)]
    with pytest.raises(SamplesError, match="at least 4: the model's batch is fixed"):
        tap(model, ["a"], Samples(({"x": RAMP[:3]},)))


def test_samples_that_do_not_fit_are_refused(dynamic: Path) -> None:
    model = files.load(dynamic)
    with pytest.raises(SamplesError, match=r"got arrays for y, expected arrays for x\. Add an array for 'x'"):
        tap(model, ["a"], Samples(({"y": RAMP},), source="other.npz"))
    with pytest.raises(SamplesError, match=r"wide\.npz: input 'x'"):
        list(tap(model, ["a"], Samples(({"x": RAMP.reshape(5, 32)},), source="wide.npz")))
