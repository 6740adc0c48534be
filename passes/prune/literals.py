"""Numbers in a graph that say how long an axis is: the shape of a Reshape, the sizes of a Split.

They stand in a constant, or in constants that a Concat joins with lengths computed as the model runs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from onnx_lathe.passes.prune.groups import constant_of, dims
from onnx_lathe.runtime.samples import Array

Place = tuple[int, int]
"""A number in one of the pieces that a Concat joins (0 where there is one alone), and its position there."""
INPUT = 1
"""The input of Reshape and Split that names lengths."""


@dataclass(frozen=True)
class Length:
    """A length that a node is told.

    Attributes:
        number: The length, or None where it is computed as the model runs.
        place: Which of the joined pieces holds it, and where in that piece.
    """

    number: int | None
    place: Place


def read(node: ir.Node) -> list[Length]:
    """Return the lengths that ``node`` is told; nothing where not even their number is known."""
    value = told(node)
    lengths: list[Length] = []
    for index, piece in enumerate([] if value is None else _pieces(value)):
        numbers = constant_of(piece)
        count = dims(piece)[0] if len(dims(piece)) == 1 else None
        if numbers is not None:
            lengths += [Length(int(number), (index, place)) for place, number in enumerate(numbers.flat)]
        elif isinstance(count, int):
            lengths += [Length(None, (index, place)) for place in range(count)]
        else:
            return []
    return lengths


def write(graph: ir.Graph, node: ir.Node, lengths: Mapping[Place, int]) -> None:
    """Tell ``node``, and it alone, new lengths.

    A Split that was told none, and so cuts equal parts, must be told all.
    """
    value = told(node)
    if value is None:
        node.attributes.pop("num_outputs", None)
        node.resize_inputs(INPUT + 1)
        numbers = np.asarray([lengths[0, place] for place in range(len(node.outputs))], dtype=np.int64)
        node.replace_input_with(INPUT, _register(graph, f"{node.outputs[0].name}.lengths", numbers))
        return
    if constant_of(value) is not None:
        _change(graph, node, INPUT, {place: number for (_, place), number in lengths.items()})
        return
    concat = _own_concat(node, value)
    for index in {piece for piece, _ in lengths}:
        _change(graph, concat, index, {place: number for (piece, place), number in lengths.items() if piece == index})


def told(node: ir.Node) -> ir.Value | None:
    """Return the input that names the lengths, where there is one."""
    return node.inputs[INPUT] if len(node.inputs) > INPUT else None


def _pieces(value: ir.Value) -> list[ir.Value]:
    """Return what ``value`` is joined from, or itself."""
    producer = value.producer()
    if constant_of(value) is not None or producer is None or producer.op_type != "Concat":
        return [value]
    return [piece for piece in producer.inputs if piece is not None]


def _own_concat(node: ir.Node, value: ir.Value) -> ir.Node:
    """Return the Concat that makes ``value``, as a copy where others read it too."""
    concat = value.producer()
    assert concat is not None
    assert node.graph is not None
    if len(value.uses()) == 1 and not value.is_graph_output():
        return concat
    copy = ir.Node(
        "", "Concat", concat.inputs, concat.attributes.values(), name=f"{concat.name}.{node.outputs[0].name}"
    )
    result = copy.outputs[0]
    result.name, result.type, result.shape = f"{value.name}.{node.outputs[0].name}", value.type, value.shape
    node.graph.insert_before(node, copy)
    node.replace_input_with(INPUT, result)
    return copy


def _change(graph: ir.Graph, reader: ir.Node, index: int, lengths: Mapping[int, int]) -> None:
    """Put new lengths into the constant at an input of ``reader``, or where others read it too, into a copy."""
    value = reader.inputs[index]
    numbers = None if value is None else constant_of(value)
    assert value is not None
    assert numbers is not None, f"{value.name} is no constant"
    changed = numbers.copy()
    for place, number in lengths.items():
        changed[place] = number
    if value.is_initializer() and len(value.uses()) == 1:
        value.const_value = ir.Tensor(changed, name=value.name)
    else:
        reader.replace_input_with(index, _register(graph, f"{value.name}.{reader.outputs[0].name}", changed))


def _register(graph: ir.Graph, name: str, numbers: Array) -> ir.Value:
    tensor = ir.Tensor(numbers, name=name)
    value = ir.Value(name=name, type=ir.TensorType(tensor.dtype), shape=tensor.shape, const_value=tensor)
    graph.register_initializer(value)
    return value
