"""Files in and out: external weights, whole files or none, and weights that are read only when they are written."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from onnx_lathe.passes import files
from onnx_lathe.runtime import tensors
from onnx_lathe.runtime.errors import ModelFileError, OutputError
from onnx_lathe.runtime.samples import Array
from onnx_lathe.runtime.session import Session
from tests import graphs


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return graphs.save(graphs.build(graphs.FIXED_BATCH), tmp_path / "source.onnx")


@pytest.fixture
def external(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The same model with its larger weights beside it."""
    target = tmp_path / "external" / "model.onnx"
    with monkeypatch.context() as patch:
        patch.setattr(files, "EXTERNAL_ABOVE_BYTES", 0)
        files.save(files.load(source), target)
    return target


def outputs(path: Path) -> Array:
    x = np.linspace(-1.0, 1.0, 64, dtype=np.float32).reshape(4, 16)
    return Session(path).run({"x": x})["y"]


def test_small_weights_stay_in_the_graph_and_large_ones_go_beside_it(external: Path, source: Path) -> None:
    assert (external.parent / "model.onnx.data").stat().st_size == 16 * 32 * 4
    weights = {tensor.name: tensor for tensor in onnx.load(external, load_external_data=False).graph.initializer}
    places = {name: tensor.data_location for name, tensor in weights.items()}
    assert places == {"w1": onnx.TensorProto.EXTERNAL, "b1": 0, "w2": 0}
    np.testing.assert_array_equal(outputs(external), outputs(source))


def test_external_weights_are_written_into_a_graph_that_is_saved_elsewhere(
    external: Path, source: Path, tmp_path: Path
) -> None:
    model = files.load(external)
    target = tmp_path / "elsewhere" / "model.onnx"
    files.save(model, target)
    assert [path.name for path in target.parent.iterdir()] == ["model.onnx"]
    np.testing.assert_array_equal(outputs(target), outputs(source))
    assert isinstance(model.graph.initializers["w1"].const_value, ir.ExternalTensor)


def test_a_model_is_saved_over_itself(external: Path, source: Path) -> None:
    files.save(files.load(external), external)
    assert [path.name for path in external.parent.iterdir()] == ["model.onnx"]
    np.testing.assert_array_equal(outputs(external), outputs(source))


def test_weights_of_subgraphs_count_and_are_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = files.load(graphs.save(graphs.build(graphs.BRANCHES), tmp_path / "source.onnx"))
    branch = next(node for node in model.graph if node.op_type == "If").attributes["then_branch"].as_graph()
    wide = ir.tensor(np.ones(4096, np.float32), name="wide")
    branch.register_initializer(
        ir.Value(name="wide", shape=wide.shape, type=ir.TensorType(wide.dtype), const_value=wide)
    )
    monkeypatch.setattr(files, "EXTERNAL_ABOVE_BYTES", 4096 * 4)
    files.save(model, tmp_path / "model.onnx")
    assert (tmp_path / "model.onnx.data").stat().st_size == 4096 * 4


@pytest.mark.parametrize("limit", [0, 2**20], ids=["external", "inline"])
def test_a_save_that_fails_leaves_the_old_file_and_nothing_else(
    source: Path, tmp_path: Path, limit: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(array: Array) -> Array:
        raise OSError("the disk went away")

    target = tmp_path / "out" / "model.onnx"
    files.save(files.load(source), target)
    before = target.read_bytes()
    model = files.load(source)
    value = model.graph.initializers["w1"]
    tensor = value.const_value
    assert tensor is not None
    value.const_value = files.lazy("w1", tensor, fail, ir.DataType.FLOAT, (16, 32))
    monkeypatch.setattr(files, "EXTERNAL_ABOVE_BYTES", limit)
    with pytest.raises((OSError, ir.serde.SerdeError)):
        files.save(model, target)
    assert target.read_bytes() == before
    assert [path.name for path in target.parent.iterdir()] == ["model.onnx"]


def test_a_lazy_tensor_is_computed_only_as_it_is_written(external: Path, tmp_path: Path) -> None:
    calls: list[tuple[int, ...]] = []

    def double(array: Array) -> Array:
        calls.append(array.shape)
        return 2 * array

    model = files.load(external)
    value = model.graph.initializers["w1"]
    tensor = value.const_value
    assert tensor is not None
    value.const_value = files.lazy("w1", tensor, double, ir.DataType.FLOAT, (16, 32))
    assert calls == []
    files.save(model, tmp_path / "doubled.onnx")
    assert calls == [(16, 32)]
    doubled = {
        item.name: onnx.numpy_helper.to_array(item) for item in onnx.load(tmp_path / "doubled.onnx").graph.initializer
    }
    np.testing.assert_array_equal(doubled["w1"], 2 * tensor.numpy())


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ModelFileError, match=r"absent\.onnx"):
        files.load(tmp_path / "absent.onnx")


@pytest.fixture
def large(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A model whose weights lie beside it, in the file that is called after another model."""
    monkeypatch.setattr(files, "EXTERNAL_ABOVE_BYTES", 0)
    monkeypatch.setattr(files, "INLINE_BELOW_BYTES", 16)
    files.save(files.load(graphs.save(graphs.build(graphs.PERCEPTRON), tmp_path / "p.onnx")), tmp_path / "model.onnx")
    (tmp_path / "model.onnx").rename(tmp_path / "original.onnx")
    return tmp_path / "original.onnx"


def test_weights_of_another_model_are_not_written_over(large: Path) -> None:
    target = large.with_name("model.onnx")
    with pytest.raises(OutputError, match=r"model\.onnx\.data: got a file that is there and is not that of a model"):
        files.save(files.load(large), target)
    assert not target.exists()
    Session(large)


def test_weights_of_another_model_are_not_removed(large: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "EXTERNAL_ABOVE_BYTES", 2**28)
    target, weights = large.with_name("model.onnx"), large.with_name("model.onnx.data")
    before = weights.read_bytes()
    files.save(files.load(large), target)
    assert weights.read_bytes() == before
    feeds = tensors.random_feeds(target)
    want, got = Session(large).run(feeds), Session(target).run(feeds)
    assert all(np.array_equal(want[name], got[name]) for name in want)


def test_own_weights_are_replaced_and_removed(large: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = large.with_name("copy.onnx")
    for _ in range(2):
        files.save(files.load(large), target)
    assert target.with_name("copy.onnx.data").exists()
    monkeypatch.setattr(files, "EXTERNAL_ABOVE_BYTES", 2**28)
    files.save(files.load(large), target)
    assert not target.with_name("copy.onnx.data").exists()


def test_constants_whose_values_lie_in_a_file_move_along(tmp_path: Path) -> None:
    model = graphs.build(graphs.CONSTANT_WEIGHT)
    folder = tmp_path / "source"
    folder.mkdir()
    onnx.save_model(
        model,
        folder / "m.onnx",
        save_as_external_data=True,
        location="weights.bin",
        size_threshold=0,
        convert_attribute=True,
    )
    target = tmp_path / "other" / "m.onnx"
    files.save(files.load(folder / "m.onnx"), target)
    feeds = tensors.random_feeds(target)
    want, got = Session(folder / "m.onnx").run(feeds), Session(target).run(feeds)
    assert all(np.array_equal(want[name], got[name]) for name in want)


def test_a_streamed_tensor_is_written_part_by_part_and_read_whole(tmp_path: Path) -> None:
    whole = np.arange(24, dtype=np.int8).reshape(6, 4)
    tensor = files.StreamedTensor("w", lambda: iter((whole[:2], whole[2:5], whole[5:])), ir.DataType.INT8, (6, 4))
    with (tmp_path / "w.bin").open("wb") as file:
        tensor.tofile(file)
    assert (tmp_path / "w.bin").read_bytes() == whole.tobytes() == tensor.tobytes()
    np.testing.assert_array_equal(tensor.numpy(), whole)


def test_a_streamed_tensor_that_lacks_a_part_is_a_defect(tmp_path: Path) -> None:
    tensor = files.StreamedTensor("w", lambda: iter((np.zeros(3, np.int8),)), ir.DataType.INT8, (6, 4))
    with pytest.raises(AssertionError, match="w is computed whole"):
        tensor.numpy()
    with pytest.raises(AssertionError, match="w is computed whole"), (tmp_path / "w.bin").open("wb") as file:
        tensor.tofile(file)
