"""Attention as exporters spell it: products of heads, a mask, a Softmax, and the Transposes around them.

A site is found by what it computes. Dimensions come from `onnx_lathe.passes.fuse.probe`, which tells a batch from a
sequence and both from every number that the model holds.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import onnx_ir as ir

from onnx_lathe.passes.fuse.probe import Probe
from onnx_lathe.passes.fuse.scores import Scores, empty_row, guard, scale, scores

Dims = tuple[int, ...]

HEADS_FIRST = [0, 2, 1, 3]
"""``[batch, tokens, heads, size]`` to ``[batch, heads, tokens, size]``, and back."""


@dataclass(frozen=True, eq=False)
class Heads:
    """Queries, keys or values, head by head.

    Attributes:
        whole: ``[batch, heads, tokens, size]``; None where only ``turned`` is there.
        split: ``[batch, tokens, heads, size]``, which a Transpose makes ``whole`` of; None where nothing does.
        turned: Keys as ``[batch, heads, size, tokens]``; None where nobody made them so.
        dims: The dimensions of ``whole`` at the sizes of the probe.
    """

    whole: ir.Value | None
    split: ir.Value | None
    turned: ir.Value | None
    dims: Dims


@dataclass(frozen=True, eq=False)
class Site:
    """One attention.

    Attributes:
        softmax: Its Softmax, by whose result plans know it.
        query: Of ``[batch, heads, queries, size]``.
        key: Of ``[batch, heads, keys, size]``.
        value: Of ``[batch, heads, keys, size of a value]``.
        scale: By what scores are multiplied.
        terms: What is added to the scores.
        context: What comes out, ``[batch, queries, heads, size of a value]``.
    """

    softmax: ir.Node
    query: Heads
    key: Heads
    value: Heads
    scale: float
    terms: Sequence[ir.Value]
    context: ir.Value

    @property
    def end(self) -> ir.Node:
        """The Transpose that makes the context."""
        node = self.context.producer()
        assert node is not None, "a context is computed"
        return node

    @property
    def heads(self) -> int:
        """The number of heads."""
        return self.query.dims[1]


def site(softmax: ir.Node, facts: Probe) -> Site | str:
    """Return the attention around a Softmax; where there is none that fits the fused operators, say why."""
    found = scores(softmax)
    if isinstance(found, str):
        return found
    shape = facts.shape(found.product.outputs[0])
    if shape is None or len(shape) != 4 or shape != facts.shape(softmax.outputs[0]):
        return "its scores are not of four known dimensions [batch, heads, queries, keys]"
    if softmax.attributes.get_int("axis", -1) not in (-1, 3):
        return "its Softmax is not over the keys"
    if _read_elsewhere(found):
        return "its scores are read elsewhere too"
    product = _context_product(softmax, found)
    if isinstance(product, str):
        return product
    context = _merged(product, facts)
    if context is None or context.is_graph_output():
        return "its heads are not brought back to [batch, tokens, heads, size]"
    return _with_operands(softmax, found, product, context, facts)


def _with_operands(softmax: ir.Node, found: Scores, product: ir.Node, context: ir.Value, facts: Probe) -> Site | str:
    query, query_factor = _unscaled(found.product.inputs[0])
    key, key_factor = _unscaled(found.product.inputs[1])
    queries, keys, values = heads_of(query, facts), _keys(key, facts), heads_of(product.inputs[1], facts)
    if queries is None or keys is None or values is None:
        return "its queries, keys or values are not of four known dimensions [batch, heads, tokens, size]"
    if keys[0].dims[:3] != values.dims[:3] or queries.dims[:2] != values.dims[:2]:
        return "its queries, keys and values differ in batch or heads"
    heads = queries.dims[1]
    if any(heads % size == 0 for size in facts.symbolic):
        return "the number of its heads is known only as it runs"
    factor = found.factor * query_factor * key_factor * keys[1]
    return Site(softmax, queries, keys[0], values, factor, found.terms, context)


def _read_elsewhere(found: Scores) -> bool:
    results = [node.outputs[0] for node in (found.product, *found.steps)]
    return any(len(value.uses()) != 1 or value.is_graph_output() for value in results)


def _context_product(softmax: ir.Node, found: Scores) -> ir.Node | str:
    """Return the product of the probabilities with the values."""
    probabilities, guarded = softmax.outputs[0], guard(softmax)
    if guarded is not None:
        reason = empty_row(softmax, found)
        if reason is not None:
            return reason
        probabilities = guarded
    uses = tuple(probabilities.uses())
    if len(uses) != 1 or probabilities.is_graph_output():
        return "its probabilities are read by others too"
    reader, place = uses[0]
    if reader.op_type != "MatMul" or reader.domain != "" or place != 0:
        return f"{reader.op_type} reads its probabilities"
    return reader


def _merged(product: ir.Node, facts: Probe) -> ir.Value | None:
    """Return the context after the Transpose that brings heads behind tokens."""
    value = product.outputs[0]
    while len(value.uses()) == 1 and not value.is_graph_output():
        (use,) = value.uses()
        reader = use.node
        if reader.op_type == "Transpose" and list(reader.attributes.get_ints("perm", ())) == HEADS_FIRST:
            return reader.outputs[0]
        if reader.op_type != "Reshape" or facts.shape(reader.outputs[0]) != facts.shape(value):
            return None
        value = reader.outputs[0]
    return None


def _unscaled(value: ir.Value | None) -> tuple[ir.Value | None, float]:
    """Return a value before it is multiplied by a number, and that number."""
    factor = 1.0
    while value is not None and (scaled := scale(value.producer())) is not None:
        value, factor = scaled[0], factor * scaled[1]
    return value, factor


def heads_of(value: ir.Value | None, facts: Probe) -> Heads | None:
    """Return a value ``[batch, heads, tokens, size]`` as heads; None where its dimensions are not four known ones."""
    dims = facts.shape(value)
    if value is None or dims is None or len(dims) != 4:
        return None
    turn = producer(value, "Transpose")
    split = turn.inputs[0] if turn is not None and _perm(turn) == HEADS_FIRST else None
    return Heads(value, split, None, dims)


def unrepeated(heads: Heads, facts: Probe) -> Heads:
    """Return keys or values before each head was repeated for a group of heads of queries; as they are without that."""
    join = producer(heads.whole, "Reshape")
    repeat = None if join is None else producer(join.inputs[0], "Expand")
    insert = None if repeat is None else producer(repeat.inputs[0], "Unsqueeze")
    source = None if insert is None else heads_of(insert.inputs[0], facts)
    if repeat is None or insert is None or source is None:
        return heads
    batch, number, tokens, size = source.dims
    times = heads.dims[1] // number
    once, often = (facts.shape(node.outputs[0]) for node in (insert, repeat))
    repeats = once == (batch, number, 1, tokens, size) and often == (batch, number, times, tokens, size)
    return source if repeats and heads.dims == (batch, number * times, tokens, size) else heads


def _keys(value: ir.Value | None, facts: Probe) -> tuple[Heads, float] | None:
    """Return keys ``[batch, heads, keys, size]`` of what scores are computed with, and a factor found on the way."""
    dims = facts.shape(value)
    if value is None or dims is None or len(dims) != 4:
        return None
    turn = producer(value, "Transpose")
    if turn is not None and _perm(turn) == [0, 2, 3, 1]:
        return Heads(None, turn.inputs[0], value, (dims[0], dims[1], dims[3], dims[2])), 1.0
    whole = turn.inputs[0] if turn is not None and _perm(turn) == [0, 1, 3, 2] else turned_in_batch(value, facts)
    if whole is None:
        return Heads(None, None, value, (dims[0], dims[1], dims[3], dims[2])), 1.0
    whole, factor = _unscaled(whole)
    found = heads_of(whole, facts)
    return None if found is None else (found, factor)


def turned_in_batch(value: ir.Value, facts: Probe) -> ir.Value | None:
    """Return keys before heads were merged into the batch, turned, and split again, as torch exports it."""
    last = producer(value, "Reshape")
    turn = None if last is None else producer(last.inputs[0], "Transpose")
    first = None if turn is None else producer(turn.inputs[0], "Reshape")
    if turn is None or first is None or _perm(turn) != [0, 2, 1]:
        return None
    source, merged, result = (facts.shape(each) for each in (first.inputs[0], first.outputs[0], value))
    if source is None or len(source) != 4:
        return None
    batch, heads, tokens, size = source
    turned = merged == (batch * heads, tokens, size) and result == (batch, heads, size, tokens)
    return first.inputs[0] if turned else None


def producer(value: ir.Value | None, operator: str) -> ir.Node | None:
    """Return the node that computes a value, where it is of this operator of ONNX."""
    node = None if value is None else value.producer()
    return node if node is not None and node.op_type == operator and node.domain == "" else None


def _perm(node: ir.Node) -> list[int]:
    return list(node.attributes.get_ints("perm", ()))
