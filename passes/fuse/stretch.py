"""Stretches of a graph that make one value of one other, and what they compute.

Exporters write one function in many ways: ``0.5 * x * (1 + erf(x / sqrt(2)))`` in any order, powers as products, casts
between. A pattern finds the spellings that it lists. A stretch is run on a few numbers in double precision instead, and
is whatever function gives the same ones.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray
from onnx_ir.passes.common import ShapeInferencePass

from onnx_lathe.passes.quantize.layers import constant

Reals = NDArray[np.float64]

LONGEST = 20
"""Nodes of a stretch; a LayerNormalization with casts around it takes 14."""
LARGEST_CONSTANT = 2**16
"""Elements of a constant inside a stretch: what scales or shifts the last axis."""

_WIDE = (ir.DataType.FLOAT, ir.DataType.DOUBLE)
_FLOATS = frozenset({ir.DataType.FLOAT, ir.DataType.DOUBLE, ir.DataType.FLOAT16, ir.DataType.BFLOAT16})
erf: Callable[[Reals], Reals] = np.vectorize(math.erf, otypes=[np.float64])
"""The error function, element by element."""


def _sigmoid(x: Reals) -> Reals:
    return 1.0 / (1.0 + np.exp(-x))


def _same(x: Reals) -> Reals:
    return x


def _mean(x: Reals) -> Reals:
    return np.mean(x, axis=-1, keepdims=True)


def _sum(x: Reals) -> Reals:
    return np.sum(x, axis=-1, keepdims=True)


_OPERATORS: Mapping[str, Callable[..., Any]] = {
    "Add": np.add,
    "Sub": np.subtract,
    "Mul": np.multiply,
    "Div": np.divide,
    "Pow": np.power,
    "Neg": np.negative,
    "Sqrt": np.sqrt,
    "Reciprocal": np.reciprocal,
    "Exp": np.exp,
    "Erf": erf,
    "Tanh": np.tanh,
    "Sigmoid": _sigmoid,
    "Identity": _same,
    "Cast": _same,
    "ReduceMean": _mean,
    "ReduceSum": _sum,
}


@dataclass(frozen=True)
class Stretch:
    """Nodes that compute ``result`` from ``source`` and constants, and whose values nobody else reads.

    Attributes:
        source: The only computed value that is read.
        result: The only value that is read by others.
        nodes: In the order in which they can run.
    """

    source: ir.Value
    result: ir.Value
    nodes: tuple[ir.Node, ...]

    @property
    def constants(self) -> dict[ir.Value, Reals]:
        """The constants that the nodes compute with, axes to reduce left out."""
        read = [value for node in self.nodes for value in _operands(node)]
        return {value: array for value in read if (array := _constant(value)) is not None}

    def may_widen(self, least_rank: int = 0) -> bool:
        """Say whether the result may have more axes than the source, because a constant has them.

        Args:
            least_rank: Of a source whose dimensions are not known.
        """
        rank = least_rank if self.source.shape is None else len(self.source.shape)
        return any(array.ndim > rank for array in self.constants.values())

    def run(self, source: Reals) -> Reals:
        """Return what the nodes make of ``source``, whose last axis is that of the tensor."""
        values: dict[ir.Value, Reals] = {**self.constants, self.source: source}
        with np.errstate(all="ignore"):
            for node in self.nodes:
                values[node.outputs[0]] = _OPERATORS[node.op_type](*(values[value] for value in _operands(node)))
        return values[self.result]


def stretches(core: ir.Node) -> Iterator[Stretch]:
    """Yield the stretches that ``core`` is in: those that end last first, and of these the shortest first."""
    sources = _walk(_operands(core), _operands)
    for result in reversed(_following(core)):
        for source in sources:
            nodes = _between(source, result)
            if nodes and core in nodes:
                yield Stretch(source, result, tuple(nodes))


def shaped(model: ir.Model) -> ir.Model:
    """Return a copy of ``model`` with the types and dimensions that onnx can infer; its weights are shared."""
    copy = model.clone()
    ShapeInferencePass(check_type=False, strict_mode=False)(copy)
    return copy


def values_of(graph: ir.Graph) -> dict[str, ir.Value]:
    """Return the values of a graph by name, without those of its subgraphs."""
    results = (value for node in graph for value in node.outputs)
    return {name(value): value for value in (*graph.inputs, *graph.initializers.values(), *results)}


def put_in_place(old: ir.Value, nodes: Sequence[ir.Node]) -> None:
    """Let the first result of the last of ``nodes`` take the place, name and readers of ``old``.

    What computed ``old`` alone is removed.
    """
    producer, new = old.producer(), nodes[-1].outputs[0]
    assert producer is not None, "only computed values are replaced"
    assert producer.graph is not None, "what is replaced is in a graph"
    producer.graph.insert_before(producer, nodes)
    take_over(old, new)


def take_over(old: ir.Value, new: ir.Value) -> None:
    """Let ``new``, which is in the graph, take the name and readers of ``old``; what computed that alone is removed."""
    new.type, new.shape = old.type, old.shape
    old.replace_all_uses_with(new, replace_graph_outputs=True)
    new.name, old.name = old.name, new.name
    drop_unused([old])


def drop_unused(values: Iterable[ir.Value]) -> None:
    """Remove those of ``values`` that nothing reads, and what computed them alone."""
    waiting = list(values)
    while waiting:
        value = waiting.pop()
        if value.uses() or value.is_graph_output() or value.is_graph_input():
            continue
        node = value.producer()
        if node is None:
            if value.is_initializer() and isinstance(value.graph, ir.Graph):
                del value.graph.initializers[name(value)]
        elif node.graph is not None and not any(each.uses() or each.is_graph_output() for each in node.outputs):
            inputs = [each for each in node.inputs if each is not None]
            node.graph.remove(node, safe=True)
            waiting += inputs


def name(value: ir.Value | None) -> str:
    """Return the name of a value; an optional input that is absent has the empty one."""
    return "" if value is None else value.name or ""


def _operands(node: ir.Node) -> list[ir.Value]:
    """Return what a node computes with: not the axes that it reduces."""
    read = node.inputs[:1] if node.op_type.startswith("Reduce") else node.inputs
    return [value for value in read if value is not None]


def _constant(value: ir.Value) -> Reals | None:
    found = constant(value)
    if found is None or math.prod(found.shape) > LARGEST_CONSTANT or found.tensor.dtype not in _FLOATS:
        return None
    return found.read().astype(np.float64)


def _known(node: ir.Node | None) -> bool:
    """Say whether a node is one that a stretch can hold."""
    if node is None or node.domain != "" or node.op_type not in _OPERATORS:
        return False
    if node.op_type == "Cast":
        return node.attributes.get_int("to", 0) in _WIDE  # a narrower type would round
    return not node.op_type.startswith("Reduce") or _over_last(node)


def _over_last(node: ir.Node) -> bool:
    """Say whether a node reduces the last axis alone, and keeps it."""
    data, axes = node.inputs[0], node.inputs[1] if len(node.inputs) > 1 else None
    given = node.attributes.get("axes")
    if given is not None:
        numbers = list(given.as_ints())
    else:
        tensor = None if axes is None else ir.convenience.get_const_tensor(axes)
        numbers = [] if tensor is None else [int(axis) for axis in tensor.numpy().flat]
    last = {-1} if data is None or data.shape is None else {-1, len(data.shape) - 1}
    return len(numbers) == 1 and numbers[0] in last and node.attributes.get_int("keepdims", 1) == 1


def _walk(start: Sequence[ir.Value], further: Callable[[ir.Node], list[ir.Value]]) -> list[ir.Value]:
    """Return the computed values behind ``start``, the nearest first."""
    found: dict[ir.Value, None] = {}
    waiting = list(start)
    while waiting and len(found) < LONGEST:
        value = waiting.pop(0)
        if value in found or _constant(value) is not None:
            continue
        found[value] = None
        node = value.producer()
        if node is not None and _known(node):
            waiting += further(node)
    return list(found)


def _following(core: ir.Node) -> list[ir.Value]:
    """Return the results of ``core`` and of the nodes after it that a stretch can hold, the nearest first."""
    found: dict[ir.Value, None] = {}
    waiting = [core]
    while waiting and len(found) < LONGEST:
        node = waiting.pop(0)
        if node.outputs[0] not in found and _known(node):
            found[node.outputs[0]] = None
            waiting += [use.node for use in node.outputs[0].uses()]
    return list(found)


def _between(source: ir.Value, result: ir.Value) -> dict[ir.Node, None] | None:
    """Return the nodes that make ``result`` of ``source`` alone; None where there are none, or others read inside."""
    found: dict[ir.Node, None] = {}
    if not _reaches(result, source, found):
        return None
    inside = [node.outputs[0] for node in found if node.outputs[0] is not result]
    private = all(use.node in found for value in inside for use in value.uses())
    return found if private and not any(value.is_graph_output() for value in inside) else None


def _reaches(value: ir.Value, source: ir.Value, found: dict[ir.Node, None]) -> bool:
    """Say whether ``value`` is computed from ``source`` alone, and collect the nodes that do so."""
    if value is source or _constant(value) is not None:
        return True
    node = value.producer()
    if node is None or not _known(node) or len(found) >= LONGEST:
        return False
    if node not in found:
        if not all(_reaches(operand, source, found) for operand in _operands(node)):
            return False
        found[node] = None
    return True
