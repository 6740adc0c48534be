"""Embedding tables as int8 rows: which, how near, and what is left alone."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from onnx_lathe.passes import files
from onnx_lathe.passes.quantize import tables
from onnx_lathe.passes.quantize.dynamic import QuantizeDynamic
from onnx_lathe.passes.quantize.static import QuantizeStatic
from onnx_lathe.passes.run import apply
from onnx_lathe.runtime.errors import UnsupportedModelError
from onnx_lathe.runtime.profile import optimized_operators
from onnx_lathe.runtime.samples import Samples
from onnx_lathe.runtime.session import Session
from tests import graphs

TIED = """
tied (int64[batch, seq] ids) => (float[batch, seq, 300] logits, float[batch, seq, 32] rows)
<float[300, 32] table>
{
  [embed] x = Gather (table, ids)
  [same] rows = Identity (x)
  [turn] head = Transpose <perm = [1, 0]> (table)
  [project] logits = MatMul (x, head)
}
"""
"""A table that is also the head, and a lookup that is an output."""


@pytest.fixture(autouse=True)
def small_tables(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tables, "LEAST_ENTRIES", 2000)


def test_rows_become_int8_and_come_out_within_half_a_step(tmp_path: Path) -> None:
    source, target = graphs.save(graphs.build(TIED), tmp_path / "m.onnx"), tmp_path / "q.onnx"
    (done,) = apply(source, [QuantizeDynamic()], target)
    assert done.plan["tables"] == ["x"]
    stored = {tensor.name: tensor for tensor in onnx.load(target).graph.initializer}
    assert "table" not in stored
    assert (stored["table_rows"].data_type, list(stored["table_rows"].dims)) == (onnx.TensorProto.INT8, [300, 32])
    ids = np.array([[0, 5, 299, -1]])
    want, got = Session(source).run({"ids": ids})["rows"], Session(target).run({"ids": ids})["rows"]
    steps = np.abs(want).max(axis=-1, keepdims=True) / 127
    assert np.all(np.abs(got - want) <= 0.5001 * steps)
    assert np.abs(got - want).max() > 0.0
    assert optimized_operators(target)["Gather"] == 2


def test_static_quantization_rounds_tables_too(tmp_path: Path) -> None:
    source, target = graphs.save(graphs.build(TIED), tmp_path / "m.onnx"), tmp_path / "q.onnx"
    samples = Samples(({"ids": np.arange(300).reshape(30, 10)},))
    (done,) = apply(source, [QuantizeStatic()], target, samples=samples)
    assert done.plan["tables"] == ["x"]
    assert "table_rows" in {tensor.name for tensor in onnx.load(target).graph.initializer}
    assert QuantizeStatic(operators=("MatMul",)).plan(files.load(source), samples, None).tables == ()


def test_a_table_that_two_lookups_read_is_stored_once(tmp_path: Path) -> None:
    text = TIED.replace("[same] rows = Identity (x)", "[again] rows = Gather (table, ids)")
    (done,) = apply(graphs.save(graphs.build(text), tmp_path / "m.onnx"), [QuantizeDynamic()], tmp_path / "q.onnx")
    assert done.plan["tables"] == ["x", "rows"]
    stored = [tensor.name for tensor in onnx.load(tmp_path / "q.onnx").graph.initializer if "row" in tensor.name]
    assert sorted(stored) == ["table_row_scales", "table_rows"]


def test_a_row_of_zeros_stays_one(tmp_path: Path) -> None:
    model = graphs.build(TIED)
    table = onnx.numpy_helper.to_array(model.graph.initializer[0]).copy()
    table[7] = 0.0
    model.graph.initializer[0].CopyFrom(onnx.numpy_helper.from_array(table, "table"))
    apply(graphs.save(model, tmp_path / "m.onnx"), [QuantizeDynamic()], tmp_path / "q.onnx")
    assert not Session(tmp_path / "q.onnx").run({"ids": np.array([[7]])})["rows"].any()


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (TIED.replace("Gather (", "Gather <axis = 1> ("), "it does not look up rows"),
        (TIED.replace("float[", "float16["), "its table is FLOAT16, not FLOAT: run widen first"),
    ],
)
def test_what_is_no_lookup_of_float_rows_is_left_alone(text: str, reason: str, tmp_path: Path) -> None:
    model = files.load(graphs.save(graphs.build(text), tmp_path / "m.onnx"))
    found, refused = tables.find_tables(model.graph, ())
    assert found == []
    assert [(each.node, each.reason) for each in refused] == [("embed", reason)]


def test_lookups_can_be_left_out_and_small_ones_are_not_spoken_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = files.load(graphs.save(graphs.build(TIED), tmp_path / "m.onnx"))
    assert QuantizeDynamic(operators=("MatMul",)).plan(model, None, None).tables == ()
    plan = QuantizeDynamic(exclude=("embed",)).plan(model, None, None)
    assert (plan.tables, [each.reason for each in plan.refused]) == ((), ["it is left out by the option exclude"])
    monkeypatch.setattr(tables, "LEAST_ENTRIES", 10_000)
    assert tables.find_tables(model.graph, ()) == ([], [])


def test_a_model_of_lookups_alone_gets_smaller(tmp_path: Path) -> None:
    text = (
        TIED.replace("[turn] head = Transpose <perm = [1, 0]> (table)", "")
        .replace("[project] logits = MatMul (x, head)", "[more] logits = Relu (x)")
        .replace("seq, 300]", "seq, 32]")
    )
    (done,) = apply(graphs.save(graphs.build(text), tmp_path / "m.onnx"), [QuantizeDynamic()], tmp_path / "q.onnx")
    assert (done.plan["layers"], done.plan["tables"]) == ([], ["x"])
    model = files.load(tmp_path / "m.onnx")
    edit = QuantizeDynamic().plan(model, None, None)
    assert [edit(model).modified, edit(model).modified] == [True, False]
    assert (tmp_path / "q.onnx").stat().st_size < 0.5 * (tmp_path / "m.onnx").stat().st_size


def test_a_table_with_nan_is_refused_by_name(tmp_path: Path) -> None:
    model = files.load(graphs.save(graphs.build(TIED), tmp_path / "m.onnx"))
    values = model.graph.initializers["table"]
    assert values.const_value is not None
    spoilt = values.const_value.numpy().copy()
    spoilt[3, 3] = np.nan
    values.const_value = ir.tensor(spoilt, name="table")
    plan = QuantizeDynamic(operators=("Gather",)).plan(model, None, None)
    with pytest.raises(UnsupportedModelError, match=r"table 'table': got NaN or infinity in it, expected finite"):
        plan.call(model)
