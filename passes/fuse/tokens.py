"""Token-wise regions: the parts of a network that treat every token by itself, so that tokens may stand in any rows.

A region holds values ``[batch, tokens, hidden]`` (or ``[batch * tokens, hidden]``) and the operators that compute each
row of their last axis from the same row: linear layers, activations, normalizations, skip connections. Inside it the
tokens can be any rows ``[n, hidden]``, as long as they are put in order where the region is entered and left.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from onnx_lathe.passes.fuse.demand import ELEMENTWISE, NORMALIZATIONS
from onnx_lathe.passes.fuse.probe import Probe
from onnx_lathe.passes.fuse.stretch import drop_unused, name
from onnx_lathe.passes.quantize.builder import Builder

PRODUCTS = frozenset({"MatMul", "Gemm"})
"""Linear layers: a region without one is not worth its borders."""
_OVER_LAST = frozenset({"ReduceMean", "ReduceSum", "ReduceMax", "ReduceL2", "ReduceSumSquare"})
_WITH_AXIS = NORMALIZATIONS | {"Softmax", "LogSoftmax", "Split", "Concat"}


@dataclass(frozen=True)
class Border:
    """A value that is read or left at the border of a region.

    Attributes:
        name: The value.
        rank: 3 for ``[batch, tokens, hidden]``, 2 for ``[batch * tokens, hidden]``.
        hidden: The size of its last axis.
    """

    name: str
    rank: int
    hidden: int


@dataclass(frozen=True)
class Region:
    """A token-wise part of a graph.

    Attributes:
        nodes: The first results of its nodes, in their order.
        entries: The values that it reads rows of, and does not compute.
        exits: The values of it that others read, or that the model returns.
    """

    nodes: tuple[str, ...]
    entries: tuple[Border, ...]
    exits: tuple[Border, ...]


def leads(model: ir.Model, known: Probe) -> list[tuple[int, int]]:
    """Return the first two dimensions of each input ``[batch, tokens, hidden]`` of a linear layer, each pair once."""
    found: dict[tuple[int, int], None] = {}
    for node in model.graph:
        shape = known.shape(node.inputs[0]) if node.op_type == "MatMul" and node.domain == "" else None
        if shape is not None and len(shape) == 3 and known.is_fixed(node.inputs[1]):
            found[shape[0], shape[1]] = None
    return list(found)


def find_region(
    model: ir.Model, known: Probe, lead: tuple[int, int], kept_out: Collection[str] = frozenset()
) -> Region | None:
    """Return the token-wise nodes whose values start with the dimensions ``lead``, in parts that have a linear layer.

    Args:
        model: The graph.
        known: Its shapes.
        lead: Batch and tokens.
        kept_out: Values that no node of the region may compute or enter by.
    """
    rule = _TokenWise(known, lead, kept_out)
    nodes = [node for node in model.graph if rule.holds(node)]
    nodes = _without_joins(list(_worthwhile(nodes)))
    if not nodes:
        return None
    inside = {value for node in nodes for value in node.outputs}
    members = set(nodes)
    entries = dict.fromkeys(value for node in nodes for value in rule.rows_of(node) if value not in inside)
    exits = [
        value
        for value in (value for node in nodes for value in node.outputs)
        if value.is_graph_output() or any(use.node not in members for use in value.uses())
    ]
    if not exits:
        return None
    return Region(
        tuple(name(node.outputs[0]) for node in nodes), tuple(map(rule.border, entries)), tuple(map(rule.border, exits))
    )


class _TokenWise:
    """Says which nodes treat each token by itself."""

    def __init__(self, known: Probe, lead: tuple[int, int], kept_out: Collection[str]) -> None:
        self._known = known
        self._leads = (lead, (lead[0] * lead[1],))
        self._kept_out = kept_out

    def holds(self, node: ir.Node) -> bool:
        """Say whether a node is token-wise, all its rows being tokens."""
        outputs = [value for value in node.outputs if value.name]
        if not all(self._is_rows(value) for value in outputs) or len(outputs) != len(node.outputs):
            return False
        if node.op_type in ELEMENTWISE and node.domain in ("", "com.microsoft"):
            return self._elementwise(node)
        rule = {
            **dict.fromkeys(PRODUCTS, self._product),
            **dict.fromkeys(NORMALIZATIONS | {"Softmax", "LogSoftmax", "Split"}, self._over_axis),
            **dict.fromkeys(_OVER_LAST, self._reduced),
            "Concat": self._joined,
            "Reshape": self._same_rows,
        }.get(node.op_type)
        return rule is not None and (node.domain == "" or node.op_type in NORMALIZATIONS) and rule(node)

    def rows_of(self, node: ir.Node) -> Iterator[ir.Value]:
        """Yield the inputs of a token-wise node that have a row for each token."""
        for value in node.inputs[:1] if node.op_type == "Reshape" else node.inputs:
            if value is not None and self._is_rows(value) and not self._is_shared(value, node):
                yield value

    def border(self, value: ir.Value) -> Border:
        """Return what is to be known of a value at the border."""
        shape = self._known.shapes[name(value)]
        return Border(name(value), len(shape), shape[-1])

    def _is_rows(self, value: ir.Value | None) -> bool:
        shape = self._known.shape(value)
        if shape is None or shape[:-1] not in self._leads or name(value) in self._kept_out:
            return False
        return all(shape[-1] % size for size in self._known.symbolic)

    def _is_shared(self, value: ir.Value | None, node: ir.Node) -> bool:
        """Say whether a value is the same for all tokens, and stays so when they lose a dimension."""
        shape, result = self._known.shape(value), self._known.shape(node.outputs[0])
        if shape is None or result is None or not self._known.is_fixed(value):
            return False
        return len(shape) <= 2 and len(shape) <= len(result) and all(dim == 1 for dim in shape[:-1])

    def _elementwise(self, node: ir.Node) -> bool:
        rank = len(self._known.shapes[name(node.outputs[0])])
        given = [value for value in node.inputs if value is not None]
        rows = [value for value in given if not self._is_shared(value, node)]
        return bool(rows) and all(
            self._is_rows(value) and len(self._known.shapes[name(value)]) == rank for value in rows
        )

    def _product(self, node: ir.Node) -> bool:
        data, weight, *bias = node.inputs
        shape = self._known.shape(weight)
        straight = not node.attributes.get_int("transA", 0)
        shared = all(value is None or self._is_shared(value, node) for value in bias)
        return self._is_rows(data) and self._known.is_fixed(weight) and len(shape or ()) == 2 and straight and shared

    def _over_axis(self, node: ir.Node) -> bool:
        if node.op_type in ("Softmax", "LogSoftmax") and "axis" not in node.attributes:
            return False  # the axis depends on the opset
        default = 0 if node.op_type == "Split" else -1
        rest = node.inputs[1:]
        return self._is_rows(node.inputs[0]) and self._is_last(node, default) and all(map(self._is_constant, rest))

    def _is_constant(self, value: ir.Value | None) -> bool:
        return value is None or self._known.is_fixed(value)

    def _is_last(self, node: ir.Node, default: int) -> bool:
        rank = len(self._known.shapes[name(node.outputs[0])])
        return node.attributes.get_int("axis", default) in (-1, rank - 1)

    def _reduced(self, node: ir.Node) -> bool:
        shape = self._known.shape(node.inputs[0])
        if shape is None or not self._is_rows(node.inputs[0]) or not node.attributes.get_int("keepdims", 1):
            return False
        axes = reduced_axes(node, self._known)
        return axes is not None and len(axes) == 1 and axes[0] in (-1, len(shape) - 1)

    def _joined(self, node: ir.Node) -> bool:
        return all(map(self._is_rows, node.inputs)) and self._is_last(node, 0)

    def _same_rows(self, node: ir.Node) -> bool:
        before, after = self._known.shape(node.inputs[0]), self._known.shape(node.outputs[0])
        return self._is_rows(node.inputs[0]) and before is not None and after is not None and before[-1] == after[-1]


def reduced_axes(node: ir.Node, known: Probe) -> list[int] | None:
    """Return the axes that a reduction is told to reduce; None where they are not told, or not constant."""
    if "axes" in node.attributes:
        return list(node.attributes["axes"].as_ints())
    given = node.inputs[1] if len(node.inputs) > 1 else None
    axes = known.constant(given)
    return None if axes is None or not known.is_fixed(given) else [int(axis) for axis in axes.reshape(-1)]


def _worthwhile(nodes: Sequence[ir.Node]) -> Iterator[ir.Node]:
    """Yield the nodes that are connected, by values that token-wise nodes compute, to a linear layer."""
    members = set(nodes)
    reached = [node for node in nodes if node.op_type in PRODUCTS]
    found = set(reached)
    while reached:
        node = reached.pop()
        before = (value.producer() for value in node.inputs if value is not None)
        after = (use.node for value in node.outputs for use in value.uses())
        new = {each for each in (*before, *after) if each is not None and each in members} - found
        found |= new
        reached += new
    return (node for node in nodes if node in found)


def _without_joins(nodes: list[ir.Node]) -> list[ir.Node]:
    """Leave out first nodes that join several entries, such as sums of embeddings: one border costs less than two."""
    while True:
        inside = {value for node in nodes for value in node.outputs}
        computed = {node: [value for value in node.inputs if value is not None and value.producer()] for node in nodes}
        joins = {
            node
            for node in nodes
            if node.op_type not in PRODUCTS
            and not inside.intersection(computed[node])
            and len({value for value in computed[node] if all(use.node is node for use in value.uses())}) > 1
        }
        if not joins:
            return nodes
        nodes = [node for node in nodes if node not in joins]


Move = Callable[[ir.Value, Border], tuple[list[ir.Node], ir.Value]]
"""Makes rows ``[n, hidden]`` of an entry, or puts the rows of an exit back: returns new nodes and their result."""


def is_rewritten(model: ir.Model, region: Region, suffix: str) -> bool:
    """Say whether `rewrite` was here."""
    return any(node.name == f"{region.exits[0].name}{suffix}" for node in model.graph)


def rewrite(model: ir.Model, region: Region, builder: Builder, enter: Move, leave: Move, suffix: str) -> None:
    """Let a region compute with rows ``[n, hidden]``; what others read of it keeps name, type and shape.

    Args:
        model: The graph.
        region: From `find_region`.
        builder: Gives free names.
        enter: Makes rows.
        leave: Puts them back.
        suffix: What the names of the nodes that put rows back end in.
    """
    graph = model.graph
    results = {name(node.outputs[0]): node for node in graph}
    nodes = [results[each] for each in region.nodes]
    members = set(nodes)
    entries = {border.name: border for border in region.entries}
    exits = {border.name: border for border in region.exits}
    rows: dict[ir.Value, ir.Value] = {}
    for node in nodes:
        for value in dict.fromkeys(node.inputs):
            if value is not None and name(value) in entries and value not in rows:
                made, rows[value] = enter(value, entries[name(value)])
                graph.insert_before(node, made)
    removed: list[ir.Node] = []
    for node in nodes:
        originals = list(node.outputs)
        forms = [ir.Value(name=name(value), type=value.type, shape=value.shape) for value in originals]
        if node.op_type == "Reshape":
            first = node.inputs[0]
            assert first is not None, "a Reshape has an input"
            rows[originals[0]] = rows.get(first, first)
            removed.append(node)
        else:
            _use_rows(node, rows, builder)
        handed: list[ir.Node] = []
        for value, form in zip(originals, forms, strict=True):
            current = rows.setdefault(value, value)
            if form.name is not None and form.name in exits:
                made, restored = leave(current, exits[form.name])
                made[-1].name = f"{form.name}{suffix}"
                restored.type, restored.shape = form.type, form.shape
                handed += made
                _hand_over(graph, value, restored, members.union(made), builder)
        graph.insert_after(node, handed)
    for node in removed:
        shape = node.inputs[1]
        graph.remove(node, safe=True)
        drop_unused([shape] if shape is not None else [])


def _use_rows(node: ir.Node, rows: Mapping[ir.Value, ir.Value], builder: Builder) -> None:
    for index, value in enumerate(node.inputs):
        if value is not None and value in rows:
            node.replace_input_with(index, rows[value])
    if node.op_type in _WITH_AXIS:
        node.attributes["axis"] = ir.AttrInt64("axis", -1)
    if "axes" in node.attributes:
        node.attributes["axes"] = ir.AttrInt64s("axes", [-1])
    elif node.op_type in _OVER_LAST:
        node.replace_input_with(1, builder.constant("last_axis", np.array([-1], np.int64)))
    for value in node.outputs:
        value.shape = None if value.shape is None else ir.Shape([None, value.shape[-1]])


def _hand_over(
    graph: ir.Graph, value: ir.Value, restored: ir.Value, inside: Collection[ir.Node], builder: Builder
) -> None:
    """Let the readers of ``value`` outside of the region read ``restored``, which takes its name."""
    for use in tuple(value.uses()):
        if use.node not in inside:
            use.node.replace_input_with(use.idx, restored)
    for index, output in enumerate(graph.outputs):
        if output is value:
            graph.outputs[index] = restored
    restored.name, value.name = name(value), builder.free(f"{name(value)}_rows")
