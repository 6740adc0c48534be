"""Writing an attention as one operator: what each operator takes its queries, keys, values and masks as."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import reduce

import numpy as np
import onnx_ir as ir

from onnx_lathe.passes import files
from onnx_lathe.passes.additions import add_initializer, take_free_name
from onnx_lathe.passes.fuse.heads import HEADS_FIRST, Heads, Site, producer, unrepeated
from onnx_lathe.passes.fuse.probe import Probe
from onnx_lathe.passes.fuse.projections import projections
from onnx_lathe.passes.fuse.scores import may_mask_whole, scalar
from onnx_lathe.passes.fuse.stretch import name
from onnx_lathe.passes.quantize.layers import Constant
from onnx_lathe.runtime.samples import Array

STANDARD_OPSET = 23
"""The operator set that brought Attention to ONNX."""
CONTRIB = "com.microsoft"
LOWEST_MASK = -1e38
"""onnxruntime's kernel of the standard operator gives 0 where a row is masked whole by the lowest number of float32,
and the average that Softmax gives by any greater one. Beside a score the two are the same."""

Attributes = Mapping[str, int | float | Sequence[int]]


class Writer:
    """Adds nodes to the main graph, each before the node whose place they take; what two share is added once.

    Args:
        graph: The main graph.
        facts: Its dimensions.
    """

    def __init__(self, graph: ir.Graph, facts: Probe) -> None:
        self.facts = facts
        self._graph = graph
        self._shared: dict[tuple[object, ...], ir.Value] = {}
        self._taken: set[str | None] = {value.name for node in graph for value in node.outputs} | set(
            graph.initializers
        )

    def add(
        self, end: ir.Node, operator: str, inputs: Sequence[ir.Value | None], attributes: Attributes, domain: str = ""
    ) -> ir.Value:
        """Add a node before ``end`` and return its result."""
        while inputs[-1] is None:
            inputs = inputs[:-1]
        node = ir.node(operator, inputs, attributes, domain=domain)
        node.outputs[0].name = node.name = self._free(f"{name(end.outputs[0])}.{operator}")
        self._graph.insert_before(end, node)
        return node.outputs[0]

    def once(self, end: ir.Node, operator: str, inputs: Sequence[ir.Value], attributes: Attributes) -> ir.Value:
        """Add a node that others may have added already."""
        key = (operator, *(id(value) for value in inputs), repr(attributes))
        if key not in self._shared:
            self._shared[key] = self.add(end, operator, inputs, attributes)
        return self._shared[key]

    def numbers(self, *numbers: int) -> ir.Value:
        """Return a constant vector of whole numbers."""
        key = ("numbers", *numbers)
        if key not in self._shared:
            tensor = ir.Tensor(np.asarray(numbers, np.int64), name=self._free("attention.numbers"))
            self._shared[key] = add_initializer(self._graph, tensor)
        return self._shared[key]

    def number(self, number: float) -> ir.Value:
        """Return a constant ``float32 []``."""
        key = ("number", number)
        if key not in self._shared:
            tensor = ir.Tensor(np.asarray(number, np.float32), name=self._free("attention.number"))
            self._shared[key] = add_initializer(self._graph, tensor)
        return self._shared[key]

    def merged(self, end: ir.Node, parts: Sequence[Constant | None], sizes: Sequence[int]) -> ir.Value:
        """Return a weight (or bias) beside each other along the last axis, zeros for None, computed late."""
        given = [part for part in parts if part is not None]
        rows = given[0].shape[:-1]

        def compute() -> Array:
            dtype = given[0].tensor.dtype.numpy()
            arrays = [
                np.zeros((*rows, size), dtype) if part is None else part.read()
                for part, size in zip(parts, sizes, strict=True)
            ]
            return np.concatenate(arrays, axis=-1)

        label = self._free(f"{name(end.outputs[0])}.merged")
        return add_initializer(self._graph, files.computed(label, compute, given[0].tensor.dtype, (*rows, sum(sizes))))

    def tokens(self, end: ir.Node, heads: Heads) -> ir.Value:
        """Return queries, keys or values as ``[batch, tokens, heads * size]``."""
        batch, number, tokens, size = heads.dims
        split = heads.split
        if split is None:
            split = self.add(end, "Transpose", [self.whole(end, heads)], {"perm": HEADS_FIRST})
        reshape = producer(split, "Reshape")
        if reshape is not None and self.facts.shape(reshape.inputs[0]) == (batch, tokens, number * size):
            source = reshape.inputs[0]
            assert source is not None, "a Reshape reads something"
            return source
        return self.add(end, "Reshape", [split, self.numbers(0, 0, number * size)], {})

    def sized(self, end: ir.Node, heads: Heads) -> ir.Value:
        """Return values as `tokens` does, the last dimension stated: onnx takes one that it cannot infer for 0."""
        value = self.tokens(end, heads)
        width = heads.dims[1] * heads.dims[3]
        stated = value.shape is not None and value.shape[-1] == width
        return value if stated else self.add(end, "Reshape", [value, self.numbers(0, 0, width)], {})

    def whole(self, end: ir.Node, heads: Heads) -> ir.Value:
        """Return queries, keys or values as ``[batch, heads, tokens, size]``."""
        if heads.whole is not None:
            return heads.whole
        if heads.split is not None:
            return self.add(end, "Transpose", [heads.split], {"perm": HEADS_FIRST})
        return self.add(end, "Transpose", [heads.turned], {"perm": [0, 1, 3, 2]})

    def count(self, found: Site, tokens: ir.Value) -> ir.Value:
        """Return how many queries there are, ``int64 [1]``: the size of the second axis of ``tokens``.

        It is read off the first attention of as many queries for all of them.
        """
        key = ("count", found.query.dims[2])
        if key not in self._shared:
            dims = self.add(found.end, "Shape", [tokens], {})
            self._shared[key] = self.add(found.end, "Gather", [dims, self.numbers(1)], {"axis": 0})
        return self._shared[key]

    def finish(self, found: Site, result: ir.Value) -> None:
        """Let ``result``, ``[batch, queries, heads * size]``, be read in place of the context."""
        end, (batch, number, queries, _) = found.end, found.query.dims
        size = found.value.dims[3]
        result.type, result.shape = found.context.type, None
        for reader, _ in tuple(found.context.uses()):
            merged = reader.outputs[0]
            same = self.facts.shape(merged) == (batch, queries, number * size)
            if reader.op_type == "Reshape" and same and not merged.is_graph_output():
                result.shape = merged.shape
                merged.replace_all_uses_with(result)
                self._graph.remove(reader, safe=True)
        if found.context.uses():
            split = self.add(end, "Reshape", [result, self.numbers(0, 0, number, size)], {})
            split.type, split.shape = found.context.type, found.context.shape
            found.context.replace_all_uses_with(split)

    def _free(self, label: str) -> str:
        return take_free_name(self._taken, label)


def multi_head(writer: Writer, found: Site) -> None:
    """Write com.microsoft.MultiHeadAttention: heads are split and merged inside."""
    query = writer.tokens(found.end, found.query)
    key_padding, low, bias = _masks(writer, found, query)
    if found.key.split is not None and found.value.split is not None:
        key, value = writer.tokens(found.end, found.key), writer.tokens(found.end, found.value)
    else:
        key, value = writer.whole(found.end, found.key), writer.whole(found.end, found.value)
    attributes = {"num_heads": found.heads, "scale": found.scale, "mask_filter_value": low}
    inputs = [query, key, value, None, key_padding, bias]
    writer.finish(found, writer.add(found.end, "MultiHeadAttention", inputs, attributes, CONTRIB))


def packed(writer: Writer, found: Site) -> None:
    """Write com.microsoft.Attention: one product makes queries, keys and values."""
    made = projections(found, writer.facts)
    assert not isinstance(made, str), "the plan names attentions that have them"
    weight = writer.merged(found.end, made.weights, made.widths)
    bias = writer.merged(found.end, made.biases, made.widths) if any(made.biases) else None
    key_padding, low, scores_bias = _masks(writer, found, made.source)
    attributes: dict[str, int | float | Sequence[int]] = {
        "num_heads": found.heads,
        "scale": found.scale,
        "mask_filter_value": low,
        "qkv_hidden_sizes": [heads.dims[1] * heads.dims[3] for heads in (found.query, found.key, found.value)],
    }
    inputs = [made.source, weight, bias, key_padding, None, scores_bias]
    writer.finish(found, writer.add(found.end, "Attention", inputs, attributes, CONTRIB))


def standard(writer: Writer, found: Site) -> None:
    """Write Attention of operator set 23, which repeats the heads of keys and values itself."""
    query = writer.tokens(found.end, found.query)
    mask = _for_every_query(writer, found, found.terms, query) if found.terms else None
    if mask is not None:
        mask = writer.once(found.end, "Max", [mask, writer.number(LOWEST_MASK)], {})
    key, value = (unrepeated(heads, writer.facts) for heads in (found.key, found.value))
    if key.dims[1] != value.dims[1]:
        key, value = found.key, found.value
    if key.split is not None and value.split is not None:
        parts = [query, writer.tokens(found.end, key), writer.sized(found.end, value)]
        attributes = {"q_num_heads": found.heads, "kv_num_heads": key.dims[1], "scale": found.scale}
        writer.finish(found, writer.add(found.end, "Attention", [*parts, mask], attributes))
        return
    parts = [writer.whole(found.end, heads) for heads in (found.query, key, value)]
    result = writer.add(found.end, "Attention", [*parts, mask], {"scale": found.scale})
    result.type = found.context.type
    turned = writer.add(found.end, "Transpose", [result], {"perm": HEADS_FIRST})
    turned.type, turned.shape = found.context.type, found.context.shape
    found.context.replace_all_uses_with(turned)


def why_not_standard(found: Site, facts: Probe) -> str | None:
    """Say why ONNX's Attention does not take the masks."""
    for term in found.terms:
        if facts.shape(term) is None:
            return f"the dimensions of its mask {term.name!r} are not known"
    reason = may_mask_whole(found.terms)
    return None if reason is None else f"{reason}, which the operator's kernel takes for a row of 0"


def _masks(writer: Writer, found: Site, tokens: ir.Value) -> tuple[ir.Value | None, float, ir.Value | None]:
    """Return the mask of keys ``int32 [batch, keys]``, what it adds where it is 0, and what else is added to scores."""
    kept: ir.Value | None = None
    low, rest = -10000.0, list(found.terms)
    for term in found.terms:
        mask = _key_mask(term, found, writer.facts)
        if mask is not None:
            flags = writer.once(found.end, "Cast", [mask[0]], {"to": int(ir.DataType.INT32)})
            kept = writer.once(found.end, "Reshape", [flags, writer.numbers(0, -1)], {})
            low = mask[1]
            rest.remove(term)
            break
    return kept, low, _for_every_query(writer, found, rest, tokens) if rest else None


def _key_mask(term: ir.Value, found: Site, facts: Probe) -> tuple[ir.Value, float] | None:
    """Return the flags ``[batch, 1, 1, keys]`` and the number of ``Where(flags, 0, number)``."""
    where = producer(term, "Where")
    if where is None or facts.shape(term) != (found.key.dims[0], 1, 1, found.key.dims[2]):
        return None
    flags, zero, low = where.inputs
    number = scalar(low)
    if flags is None or facts.shape(flags) != facts.shape(term) or scalar(zero) != 0.0 or number is None:
        return None
    return (flags, number) if np.isfinite(number) else None


def _sum(writer: Writer, found: Site, terms: Sequence[ir.Value]) -> ir.Value | None:
    """Return the terms added up; masks that all layers share are added once."""
    return reduce(lambda one, other: writer.once(found.end, "Add", [one, other], {}), terms) if terms else None


def _for_every_query(writer: Writer, found: Site, terms: Sequence[ir.Value], tokens: ir.Value) -> ir.Value:
    """Return the sum of terms as ``[batch or 1, heads or 1, queries, keys]``: no other dimension may be repeated."""
    bias = _sum(writer, found, terms)
    assert bias is not None, "there are terms"
    shapes = [writer.facts.shape(term) or () for term in terms]
    rank = max(len(shape) for shape in shapes)
    if rank < 4:
        bias = writer.once(found.end, "Unsqueeze", [bias, writer.numbers(*range(4 - rank))], {})
    if any(shape[-2:-1] == (found.query.dims[2],) for shape in shapes):
        return bias
    count = writer.count(found, tokens)
    dims = writer.once(found.end, "Concat", [writer.numbers(1, 1), count, writer.numbers(1)], {"axis": 0})
    return writer.once(found.end, "Expand", [bias, dims], {})
