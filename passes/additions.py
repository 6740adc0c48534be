"""What passes add to a graph: constants, under names that are free."""

from __future__ import annotations

import onnx_ir as ir


def add_initializer(graph: ir.Graph, tensor: ir.TensorProtocol) -> ir.Value:
    """Add a tensor to the initializers of ``graph`` under its own name, and return its value."""
    value = ir.Value(
        name=tensor.name, type=ir.TensorType(tensor.dtype), shape=ir.Shape(tensor.shape.numpy()), const_value=tensor
    )
    graph.register_initializer(value)
    return value


def take_free_name(taken: set[str | None], name: str) -> str:
    """Return ``name``, with a number behind it where it is taken, and take it."""
    free, number = name, 0
    while free in taken:
        number += 1
        free = f"{name}_{number}"
    taken.add(free)
    return free
