"""The scale of attention's scores, folded into the weight that makes the queries.

Exporters multiply queries and keys each by the root of it, or the scores by all of it. Times a constant, a product
with a constant weight is a product with another constant weight.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from onnx_lathe.passes import files
from onnx_lathe.passes.fuse.scores import Scores, scale, scores
from onnx_lathe.runtime.samples import Array

_FLOATS = (ir.DataType.FLOAT, ir.DataType.DOUBLE)
"""Types in which a scaled weight rounds no worse than scaled queries."""


def fold_scales(model: ir.Model) -> Counter[str]:
    """Let no factor stand between a product that makes queries and a Softmax, where a weight can take it."""
    counts: Counter[str] = Counter()
    for node in tuple(model.graph):
        found = scores(node) if node.op_type == "Softmax" and node.domain == "" else "no Softmax"
        if not isinstance(found, str) and _fold(model.graph, found):
            counts["scale"] += 1
    return counts


def _fold(graph: ir.Graph, found: Scores) -> bool:
    factors = [node for node in found.steps if scale(node) is not None]
    operands = [each for value in found.product.inputs if value is not None for each in _factors(value)]
    steps = [*factors, *operands]
    if not steps or any(len(step.outputs[0].uses()) != 1 or step.outputs[0].is_graph_output() for step in steps):
        return False
    total = float(np.prod([scaled[1] for node in steps if (scaled := scale(node)) is not None]))
    query = found.product.inputs[0]
    constants = _constants(_source(query), total)
    if constants is None:
        return False
    for node in steps:
        scaled = scale(node)
        assert scaled is not None, "every step multiplies"
        node.outputs[0].replace_all_uses_with(scaled[0])
        graph.remove(node, safe=True)
    for value in constants:
        _multiply(value, total)
    return True


def _factors(value: ir.Value) -> list[ir.Node]:
    """Return the nodes that multiply an operand of the product by a number, without anything between."""
    found: list[ir.Node] = []
    while (node := value.producer()) is not None and (scaled := scale(node)) is not None:
        found.append(node)
        value = scaled[0]
    return found


def _source(query: ir.Value | None) -> ir.Value | None:
    """Return the queries before they are multiplied."""
    while query is not None and (scaled := scale(query.producer())) is not None:
        query = scaled[0]
    return query


def _constants(query: ir.Value | None, factor: float) -> Sequence[ir.Value] | None:
    """Return the weight, and the bias, that make queries and nothing else; None where there is none to scale."""
    found: list[ir.Value] = []
    value = query
    while value is not None:
        node = value.producer()
        if node is None or node.domain != "" or len(value.uses()) != 1 or value.is_graph_output():
            return None
        if node.op_type in ("Transpose", "Reshape", "Identity"):
            value = node.inputs[0]
        elif node.op_type == "Add":
            weights = [operand for operand in node.inputs if _is_own_weight(operand)]
            if len(weights) != 1 or weights[0] is None:
                return None
            found += [each for each in weights if each is not None]
            value = next(operand for operand in node.inputs if operand is not weights[0])
        elif node.op_type == "MatMul":
            weight = node.inputs[1]
            if weight is None or not _is_own_weight(weight) or not np.isfinite(factor):
                return None
            return [*found, weight]
        else:
            return None
    return None


def _is_own_weight(value: ir.Value | None) -> bool:
    if value is None or value.const_value is None or not value.is_initializer():
        return False
    own = not value.is_graph_input() and not value.is_graph_output() and len(value.uses()) == 1
    return own and value.dtype in _FLOATS


def _multiply(value: ir.Value, factor: float) -> None:
    """Scale a weight as it is written."""
    tensor = value.const_value
    assert tensor is not None, "a weight has values"

    def compute(array: Array) -> Array:
        return (array * array.dtype.type(factor)).astype(array.dtype)

    shape = tuple(int(dim) for dim in tensor.shape.numpy())
    value.const_value = files.lazy(
        name=tensor.name or "", source=tensor, compute=compute, dtype=tensor.dtype, shape=shape
    )
