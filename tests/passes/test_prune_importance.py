"""The importances of the idea: the threshold in standard deviations, and the interaction of neurons."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from onnx_ir.passes.common import ShapeInferencePass

from onnx_lathe.passes.prune import interaction
from onnx_lathe.passes.prune.apply import PruneEdit
from onnx_lathe.passes.prune.groups import Consumer
from onnx_lathe.passes.prune.importance import deviation
from onnx_lathe.passes.prune.interaction import interactions
from onnx_lathe.passes.prune.request import Prune
from onnx_lathe.passes.prune.rules import couple
from onnx_lathe.passes.taps import tap
from onnx_lathe.runtime.errors import UnsupportedModelError
from onnx_lathe.runtime.samples import Array, Samples
from tests import graphs
from tests.tolerances import SOLVED

PAIR = """
pair (float[N, 6] x) => (float[N, 3] y)
<float[6, 32] w1, float[32] b1, float[3, 32] w2, float[3] b2>
{
  [make] a = Gemm (x, w1, b1)
  [act] h = Relu (a)
  [read] y = Gemm <transB = 1> (h, w2, b2)
}
"""


def load(text: str) -> ir.Model:
    model = ir.from_proto(graphs.build(text))
    ShapeInferencePass(check_type=False, strict_mode=False)(model)
    return model


def weight(model: ir.Model, name: str) -> Array:
    tensor = model.graph.initializers[name].const_value
    assert tensor is not None
    return tensor.numpy()


def put(model: ir.Model, name: str, array: Array) -> None:
    model.graph.initializers[name].const_value = ir.tensor(array.astype(np.float32), name=name)


def consumer_of(model: ir.Model, name: str) -> Consumer:
    return next(item for item in couple(model).consumers if item.weight.name == name)


def plan(model: ir.Model, samples: Samples | None = None, **options: object) -> PruneEdit:
    edit = Prune(**options).plan(model, samples, None)  # pyright: ignore[reportArgumentType]
    assert isinstance(edit, PruneEdit)
    return edit


def with_small_columns(small: int, factor: float = 0.1) -> ir.Model:
    """Return `PAIR` with every ``small``-th neuron's weights made small."""
    model = load(PAIR)
    array = weight(model, "w1").copy()
    array[:, ::small] *= factor
    put(model, "w1", array)
    return model


@pytest.mark.parametrize("small", [2, 4])
def test_std_takes_the_channels_under_the_threshold_however_many(small: int):
    model = with_small_columns(small)
    edit = plan(model, importance="std", threshold=0.3, multiple=1)
    w1 = weight(model, "w1").astype(np.float64)
    strong = np.sqrt(np.square(w1).mean(axis=0)) >= 0.3 * w1.std()
    assert edit.kept["w1"][1] == edit.kept["w2"][1] == tuple(np.flatnonzero(strong).tolist())
    assert len(edit.kept["w1"][1]) == 32 - 32 // small


def test_std_keeps_the_strongest_of_the_weak_where_widths_are_rounded_up():
    model = with_small_columns(2)
    put(model, "w1", weight(model, "w1") * np.where(np.arange(32) == 4, 2.0, 1.0))
    (group,) = plan(model, importance="std", threshold=0.3, multiple=12).groups
    assert group.kept == 24
    kept = plan(model, importance="std", threshold=0.3, multiple=17).kept["w1"][1]
    assert set(kept) == {*range(1, 32, 2), 4}


def test_std_leaves_a_layer_alone_where_no_channel_is_weak():
    with pytest.raises(UnsupportedModelError, match=r"w1 \(group\): 32 of its 32 channels shall stay"):
        plan(load(PAIR), importance="std", threshold=0.01)
    constant = load(PAIR)
    put(constant, "w1", np.ones((6, 32)))
    with pytest.raises(UnsupportedModelError, match="32 of its 32 channels shall stay"):
        plan(constant, importance="std", threshold=100.0)


def test_std_never_takes_all_channels():
    (group,) = plan(load(PAIR), importance="std", threshold=1e6, multiple=1).groups
    assert group.kept == 1


def test_a_deviation_in_blocks_is_numpys():
    array = np.random.default_rng(0).normal(3.0, 2.0, (1100, 1000)).astype(np.float32)
    assert deviation(array) == pytest.approx(array.std(dtype=np.float64), rel=SOLVED)


def test_the_interaction_of_a_linear_layer_is_its_formula():
    model = load(PAIR)
    x = np.random.default_rng(0).normal(size=(50, 6)).astype(np.float32)
    consumer = consumer_of(model, "w2")
    found, left = interactions(model, [consumer], Samples(({"x": x[:20]}, {"x": x[20:]})))
    h = np.maximum(x @ weight(model, "w1") + weight(model, "b1"), 0.0)
    w2 = weight(model, "w2")
    y = h @ w2.T + weight(model, "b2")
    want = [sum(abs(np.mean(y[:, i] * w2[i, j] * h[:, j])) for i in range(3)) for j in range(32)]
    np.testing.assert_allclose(found[consumer], want, rtol=1e-5)
    assert left == []


def test_the_interaction_of_a_convolution_sums_over_its_kernel():
    model = load(graphs.CONV_CHAIN)
    image = np.random.default_rng(0).normal(size=(5, 3, 8, 8)).astype(np.float32)
    samples = Samples(({"image": image},))
    consumer = consumer_of(model, "w2")
    found, _ = interactions(model, [consumer], samples)
    (values,) = tap(model, ["m", "c"], samples)
    padded = np.pad(values["m"], ((0, 0), (0, 0), (1, 1), (1, 1)))
    w2 = weight(model, "w2")
    want = np.zeros(32)
    for j in range(32):
        # What channel j brings to each result: c is 2 x 2, from a kernel of 3 x 3 at every second place.
        windows = np.lib.stride_tricks.sliding_window_view(padded[:, j], (3, 3), axis=(1, 2))[:, ::2, ::2]
        brought = np.einsum("npqab,iab->nipq", windows, w2[:, j])
        want[j] = np.abs((values["c"] * brought).mean(axis=(0, 2, 3))).sum()
    np.testing.assert_allclose(found[consumer], want, rtol=1e-4)


def test_interaction_keeps_what_the_results_are_made_of():
    model = load(PAIR)
    odd = np.arange(32) % 2 == 1
    put(model, "w1", np.tile(np.eye(6), 6)[:, :32])
    put(model, "b1", np.full(32, 5.0))
    # The even neurons have the larger weights, but cancel each other in every result.
    signs = np.where(np.arange(32) % 4 == 0, 1.0, -1.0)
    put(model, "w2", np.where(odd, 0.5, 0.9 * signs) * np.ones((3, 1)))
    x = 0.01 * np.random.default_rng(0).normal(size=(64, 6))
    samples = Samples(({"x": x.astype(np.float32)},))
    by_interaction = plan(model, samples, ratio=0.5, importance="interaction", reconstruct=False)
    assert set(by_interaction.kept["w1"][1]) != set(np.flatnonzero(odd).tolist())
    assert plan(model, samples, ratio=0.5, importance="magnitude").kept["w1"][1] == tuple(range(0, 32, 2))


def test_a_layer_too_large_for_its_products_is_scored_by_magnitude(monkeypatch: pytest.MonkeyPatch):
    samples = Samples(({"x": np.random.default_rng(0).normal(size=(20, 6)).astype(np.float32)},))
    model = with_small_columns(2, factor=0.0)
    monkeypatch.setattr(interaction, "MAX_WEIGHTS", 95)
    edit = plan(model, samples, ratio=0.5, importance="interaction")
    assert edit.kept == plan(model, samples, ratio=0.5, importance="magnitude").kept
    assert [(item.node, item.reason) for item in edit.refused if "interaction" in item.reason] == [
        ("read", "w2: no interaction over 96 weights, more than 95")
    ]
