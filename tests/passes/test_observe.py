"""What is observed does not depend on how much memory there is for it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from onnx import numpy_helper

from onnx_lathe.passes import files, run
from onnx_lathe.passes.quantize import observe as observing
from onnx_lathe.passes.quantize.histogram import BINS_A_SIDE, Extremes, Histogram
from onnx_lathe.passes.quantize.observe import BATCH, observe, schedule
from onnx_lathe.passes.quantize.static import QuantizeStatic
from onnx_lathe.passes.taps import sizes
from onnx_lathe.runtime.errors import SamplesError
from onnx_lathe.runtime.parity import sqnr_db
from onnx_lathe.runtime.samples import Samples
from onnx_lathe.runtime.session import Session
from tests import graphs
from tests.tolerances import QUANTIZED_DB

LENGTHS = (4, 9, 2)


@pytest.fixture
def encoder(tmp_path: Path) -> Path:
    return graphs.save(graphs.build(graphs.ENCODER), tmp_path / "encoder.onnx")


def sentences(count: int = 5) -> Samples:
    generator = np.random.default_rng(0)
    return Samples(
        tuple(
            {"ids": generator.integers(0, 100, (count, length)), "mask": np.ones((count, length), np.int64)}
            for length in LENGTHS
        )
    )


def test_a_schedule_shrinks_the_batch_and_then_makes_passes() -> None:
    nbytes = {"a": 40, "b": 50, "c": 30}
    assert schedule(nbytes, 120 * BATCH) == (BATCH, [["a", "b", "c"]])
    assert schedule(nbytes, 10**9) == (BATCH, [["a", "b", "c"]])
    assert schedule(nbytes, 250) == (2, [["a", "b", "c"]])
    assert schedule(nbytes, 100) == (1, [["a", "b"], ["c"]])
    assert schedule(nbytes, 1) == (1, [["a"], ["b"], ["c"]])
    assert schedule({"a": 0}, 1) == (BATCH, [["a"]])


def test_sizes_are_those_of_the_largest_sample(encoder: Path) -> None:
    nbytes = sizes(files.load(encoder), ["h", "qk", "mask"], sentences())
    (values,) = observe_all(encoder, ["h", "qk", "mask"])
    assert nbytes == {name: array.nbytes for name, array in values.items()}


def observe_all(path: Path, names: list[str]) -> list[dict[str, np.ndarray]]:
    longest = {name: array[:1] for name, array in sentences().batches[1].items()}
    return list(observing.tap(files.load(path), names, Samples((longest,))))


def test_sizes_are_those_of_a_batch_that_is_fixed(tmp_path: Path) -> None:
    path = graphs.save(graphs.build(graphs.FIXED_BATCH), tmp_path / "model.onnx")
    samples = Samples(({"x": np.ones((9, 16), np.float32)},))
    assert sizes(files.load(path), ["a", "x"], samples) == {"a": 4 * 32 * 4, "x": 4 * 16 * 4}


def test_memory_changes_the_passes_and_not_what_is_observed(encoder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, names = files.load(encoder), ["h", "g", "n2", "m"]
    whole = {name: Histogram() for name in names}
    observe(model, whole, sentences())
    # One sample of the longest sentence has some kilobytes of values.
    monkeypatch.setattr(observing, "_COPIES", 1000)
    told: list[tuple[int, int]] = []
    token = observing.progress.set(lambda done, total, _: told.append((done, total)))
    parts = {name: Histogram() for name in names}
    observe(model, parts, sentences(), memory=1)
    observing.progress.reset(token)
    passes, left = divmod(told[-1][1], 5 * len(LENGTHS))
    assert passes > 1
    assert left == 0
    assert [done for done, _ in told] == list(range(1, told[-1][1] + 1))
    for name in names:
        # Kernels may sum a batch of another size in another order: no count moves by more than a bin.
        assert parts[name].width == whole[name].width
        assert parts[name].counts.sum() == whole[name].counts.sum()
        moved = np.abs(np.cumsum(parts[name].counts) - np.cumsum(whole[name].counts)).max()
        assert moved <= 0.001 * whole[name].counts.sum()


def test_of_large_values_a_part_is_counted_that_no_batch_changes(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    path = graphs.save(graphs.build(graphs.RESIDUAL_PRODUCT), tmp_path / "model.onnx")
    x = np.random.default_rng(0).normal(size=(60, 32)).astype(np.float32)
    monkeypatch.setattr(observing, "COUNTED", 60 * 4)
    found: list[Histogram] = []
    for batch in (8, 3):
        monkeypatch.setattr(observing, "BATCH", batch)
        seen = {"x": Histogram()}
        observe(files.load(path), seen, Samples(({"x": x},)))
        found.append(seen["x"])
    assert np.array_equal(found[0].counts, found[1].counts)
    assert found[0].ends == (float(x.min()), float(x.max()))
    index = np.floor(x[:, ::9].astype(np.float64) / found[0].width).astype(int) + BINS_A_SIDE
    assert np.array_equal(found[0].counts, np.bincount(index.reshape(-1), minlength=2 * BINS_A_SIDE))


def test_extremes_are_the_ends_of_the_histogram(encoder: Path) -> None:
    counted, plain = {"h": Histogram()}, {"h": Extremes()}
    observe(files.load(encoder), counted, sentences())
    observe(files.load(encoder), plain, sentences())
    assert plain["h"].ends == counted["h"].ends is not None


def test_data_that_lack_an_input_are_refused_before_anything_runs(encoder: Path) -> None:
    samples = Samples(({"ids": np.ones((2, 4), np.int64)},), source="ids.npz")
    with pytest.raises(SamplesError, match=r"ids\.npz: got arrays for ids, expected arrays for ids, mask.*'mask'"):
        QuantizeStatic().plan(files.load(encoder), samples, None)


def test_an_input_that_nothing_reads_does_no_harm(tmp_path: Path) -> None:
    text = graphs.RESIDUAL_PRODUCT.replace("(float[N, 32] x)", "(float[N, 32] x, float[N, 3] unused)")
    path = graphs.save(graphs.build(text), tmp_path / "model.onnx")
    samples = Samples(({"x": np.ones((2, 32), np.float32), "unused": np.ones((2, 3), np.float32)},))
    edit = QuantizeStatic(ranges="mse").plan(files.load(path), samples, None)
    assert [value.name for value in edit.values] == ["a"]


@pytest.mark.parametrize("ranges", ["minmax", "percentile", "mse", "kl"])
@pytest.mark.parametrize("constant", [0.0, 3.0, -2.0])
def test_constant_values_are_levels(ranges: str, constant: float, tmp_path: Path) -> None:
    path = graphs.save(graphs.build(graphs.RESIDUAL_PRODUCT.replace("Tanh (x)", "Identity (x)")), tmp_path / "m.onnx")
    samples = Samples(({"x": np.full((2, 32), constant, np.float32)},))
    edit = QuantizeStatic(ranges=ranges).plan(files.load(path), samples, None)  # pyright: ignore[reportArgumentType]
    (value,) = {value.affine for value in edit.values}
    level = np.clip(np.rint(constant / value.scale) + value.zero_point, 0, 255)
    assert (level - value.zero_point) * value.scale == pytest.approx(constant, rel=0.02)


@pytest.mark.parametrize("graph", ["CLASSIFIER", "PERCEPTRON"])
def test_a_channel_of_zeros_stays_zero(graph: str, tmp_path: Path) -> None:
    model = graphs.build(getattr(graphs, graph))
    for tensor in model.graph.initializer:
        if tensor.name == "w1":
            weight = numpy_helper.to_array(tensor).copy()
            weight[(slice(None), 2) if graph == "PERCEPTRON" else 2] = 0.0
            tensor.CopyFrom(numpy_helper.from_array(weight, "w1"))
    source = graphs.save(model, tmp_path / "source.onnx")
    samples = graphs.samples_for(source)
    run.apply(source, [QuantizeStatic(ranges="mse")], tmp_path / "target.onnx", samples=samples)
    feeds = samples.batches[0]
    want, got = (Session(tmp_path / name).run(feeds) for name in ("source.onnx", "target.onnx"))
    for name, array in want.items():
        assert sqnr_db(array, got[name]) > QUANTIZED_DB
