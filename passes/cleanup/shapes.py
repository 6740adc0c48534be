"""Reshapes to a shape that was computed from shapes, as exporters write ``x.view(x.size(0), -1)``.

Where every number of the shape is a constant, a dimension of the data at the same place (written 0), or the one that
Reshape can infer (written -1), the shape is a constant, and the nodes that computed it are dead.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir


@dataclass(frozen=True, eq=False)
class _Dimension:
    """A dimension of a value that is only known as the model runs."""

    value: ir.Value
    axis: int


def fix_reshapes(model: ir.Model) -> None:
    """Give Reshapes of the main graph constant shapes where that computes the same."""
    for node in model.graph:
        if node.op_type != "Reshape" or node.domain != "" or len(node.inputs) < 2:
            continue
        data, shape = node.inputs
        if data is None or shape is None or ir.convenience.get_const_tensor(shape) is not None:
            continue
        numbers = _written(_follow(shape), data)
        if numbers is None:
            continue
        name = f"{node.outputs[0].name}.shape"
        if name in model.graph.initializers:
            continue
        tensor = ir.Tensor(np.asarray(numbers, dtype=np.int64), name=name)
        value = ir.Value(name=name, type=ir.TensorType(tensor.dtype), shape=tensor.shape, const_value=tensor)
        model.graph.register_initializer(value)
        node.replace_input_with(1, value)
        node.attributes.pop("allowzero", None)


def _written(entries: Sequence[int | _Dimension] | None, data: ir.Value) -> list[int] | None:
    """Return a shape for Reshape in which 0 copies a dimension of ``data`` and -1 is inferred."""
    if entries is None or 0 in entries:
        return None
    numbers = [entry if isinstance(entry, int) else _copied(entry, data, place) for place, entry in enumerate(entries)]
    return numbers if numbers.count(-1) <= 1 else None


def _copied(entry: _Dimension, data: ir.Value, place: int) -> int:
    """Return 0 where ``entry`` is the dimension of ``data`` at ``place``, else -1."""
    if entry.value is data and entry.axis == place:
        return 0
    if data.shape is None or entry.value.shape is None or place >= len(data.shape):
        return -1
    one, other = data.shape[place], entry.value.shape[entry.axis]
    named = isinstance(one, ir.SymbolicDim) and isinstance(other, ir.SymbolicDim) and one.value is not None
    return 0 if named and one == other else -1


def _follow(value: ir.Value) -> list[int | _Dimension] | None:
    """Return the integers that ``value`` holds, traced back through the nodes that exporters compute shapes with."""
    tensor = ir.convenience.get_const_tensor(value)
    if tensor is not None:
        return None if value.is_graph_input() else [int(number) for number in tensor.numpy().flat]
    node = value.producer()
    if node is None or node.domain != "" or not node.inputs or node.inputs[0] is None:
        return None
    source = node.inputs[0]
    if node.op_type == "Shape":
        return _shape(node, source)
    if node.op_type == "Concat":
        parts = [None if item is None else _follow(item) for item in node.inputs]
        return None if None in parts else [entry for part in parts if part is not None for entry in part]
    if node.op_type in ("Unsqueeze", "Squeeze", "Identity", "Cast"):
        return _follow(source)
    if node.op_type in ("Gather", "Slice"):
        return _pick(node, _follow(source))
    return None


def _shape(node: ir.Node, source: ir.Value) -> list[int | _Dimension] | None:
    if source.shape is None:
        return None
    every = [dim if isinstance(dim, int) else _Dimension(source, axis) for axis, dim in enumerate(source.shape)]
    return every[node.attributes.get_int("start", 0) : node.attributes.get_int("end", len(every))]


def _pick(node: ir.Node, entries: list[int | _Dimension] | None) -> list[int | _Dimension] | None:
    """Return what a Gather or Slice of a vector takes of it."""
    constants = [None if item is None else ir.convenience.get_const_tensor(item) for item in node.inputs[1:]]
    if entries is None or None in constants:
        return None
    numbers = [[int(number) for number in item.numpy().flat] for item in constants if item is not None]
    if node.op_type == "Gather":
        return [entries[index] for index in numbers[0]]
    steps = numbers[3] if len(numbers) > 3 else [1]
    return entries[numbers[0][0] : numbers[1][0]] if len(numbers) > 1 and steps == [1] else None
