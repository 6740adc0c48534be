"""Embedding tables as int8 rows: ``y = levels[ids] * scale[ids]``, a scale a row.

A lookup reads few rows and computes nothing, so that it gets smaller by this, and hardly faster or slower.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from onnx_lathe.passes.edit import Refusal
from onnx_lathe.passes.quantize import params, streamed
from onnx_lathe.passes.quantize.builder import Builder
from onnx_lathe.passes.quantize.layers import constant, integer, label, not_float, refusal, result_name
from onnx_lathe.passes.quantize.scheme import WeightScheme
from onnx_lathe.runtime.errors import UnsupportedModelError
from onnx_lathe.runtime.samples import Array

LEAST_ENTRIES = 2**18
"""Tables with fewer numbers (1 MiB) stay float: there is nothing to gain."""
_LEVELS = WeightScheme()
"""Rows are never multiplied as integers: 8 bits are exact on every CPU."""


@dataclass(frozen=True)
class Table:
    """A Gather of rows of a constant matrix.

    Attributes:
        node: The Gather.
        rows: The matrix, ``float32 [rows, features]``.
    """

    node: ir.Node
    rows: ir.TensorProtocol


def find_tables(graph: ir.Graph, exclude: Sequence[str]) -> tuple[list[Table], list[Refusal]]:
    """Return the lookups of a graph whose tables are worth rounding, and those that are not with the reason.

    What a Gather reads of shapes and other small constants is no table and is not spoken of.
    """
    tables: list[Table] = []
    refused: list[Refusal] = []
    for node in graph:
        found = _read(node) if node.op_type == "Gather" and node.domain == "" else None
        if isinstance(found, Table) and label(node) in exclude:
            found = "it is left out by the option exclude"
        if isinstance(found, Table):
            tables.append(found)
        elif found is not None:
            refused.append(refusal(node, found))
    return tables, refused


def is_table(node: ir.Node | None) -> bool:
    """Say whether ``node`` is a lookup that `replace_table` can replace: once it has, it is none."""
    return node is not None and node.op_type == "Gather" and isinstance(_read(node), Table)


def replace_table(builder: Builder, graph: ir.Graph, node: ir.Node) -> None:
    """Put lookups of int8 levels and of their scales in the place of a Gather that `find_tables` gave.

    Raises:
        UnsupportedModelError: The table is not finite.
    """
    found = _read(node)
    assert isinstance(found, Table), f"{label(node)} was planned as a table"
    table, ids, result = node.inputs[0], node.inputs[1], node.outputs[0]
    levels, factors = builder.once(("rows", id(found.rows)), lambda: _rounded(builder, found.rows))

    def op(operator: str, inputs: Sequence[ir.Value | None], suffix: str, dtype: ir.DataType, **more: int) -> ir.Node:
        shape = None if suffix == "scales" else result.shape
        return builder.op(operator, inputs, [(f"{result.name}_{suffix}", dtype, shape)], more)

    lookup = op("Gather", [levels, ids], "levels", ir.DataType.INT8)
    real = op("Cast", [lookup.outputs[0]], "real", ir.DataType.FLOAT, to=ir.DataType.FLOAT)
    scale = op("Gather", [factors, ids], "scales", ir.DataType.FLOAT)
    product = op("Mul", [real.outputs[0], scale.outputs[0]], "scaled", ir.DataType.FLOAT)
    made = [lookup, real, scale, product]
    ir.convenience.replace_nodes_and_values(graph, node, [node], made, [result], [product.outputs[0]])
    builder.drop_unused([table])


def _rounded(builder: Builder, rows: ir.TensorProtocol) -> tuple[ir.Value, ir.Value]:
    """Add the levels of a table and the scales of its rows, ``[rows, 1]``."""
    largest = streamed.largest_magnitudes(rows, 0)
    if not np.isfinite(largest).all():
        raise UnsupportedModelError(
            f"table {rows.name!r}",
            got="NaN or infinity in it",
            expected="finite values",
            mend="Check the training that made it.",
        )
    scales = params.scales_of(largest, _LEVELS)

    def parts() -> Iterator[Array]:
        return streamed.quantized_rows(rows, scales, 0, _LEVELS.limit)

    levels = builder.streamed(f"{rows.name}_rows", parts, ir.DataType.INT8, tuple(rows.shape.numpy()))
    return levels, builder.constant(f"{rows.name}_row_scales", scales[:, None])


def table_names(tables: Sequence[Table]) -> tuple[str, ...]:
    """Return the names of the results, by which plans know the lookups."""
    return tuple(result_name(table.node) for table in tables)


def _read(node: ir.Node) -> Table | str | None:
    """Return the table that a Gather reads, why it stays float, or None where it reads no table at all."""
    found = constant(node.inputs[0])
    if found is None or len(found.shape) != 2 or found.tensor.dtype == ir.DataType.INT8:
        return None
    if found.shape[0] * found.shape[1] < LEAST_ENTRIES:
        return None
    if found.tensor.dtype != ir.DataType.FLOAT:
        return f"its table is {not_float(found.tensor.dtype)}"
    if found.perm is not None or integer(node, "axis", 0) not in (0, -2):
        return "it does not look up rows"
    return Table(node, found.tensor)
