"""Rows of real tokens: how they are taken from among padding, and how they come back.

Attention wants its heads apart, ``[batch, heads, tokens, size]``, which exporters make of ``[batch, tokens, hidden]``
by a Reshape and a Transpose. The Gather that puts rows back can place each head by itself just as well, and the one
that takes them can take each head from its place: the Transposes are then not needed.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from onnx_lathe.passes.fuse.probe import Probe
from onnx_lathe.passes.fuse.stretch import name, take_over, values_of
from onnx_lathe.passes.fuse.tokens import Border, Region
from onnx_lathe.passes.quantize.builder import Builder

_HEADS_FIRST = [0, 2, 1, 3]
_TURNED = [0, 2, 3, 1]
"""Heads first and tokens last, as keys are wanted."""


@dataclass(frozen=True)
class Turn:
    """A border of a region behind which only the heads matter.

    Attributes:
        border: The value at the border, ``[batch, tokens, heads * size]``.
        turned: The same, heads apart: ``[batch, heads, tokens, size]`` or, for keys, ``[batch, heads, size, tokens]``.
        heads: How many.
        size: Of each.
    """

    border: str
    turned: str
    heads: int
    size: int


def splits(model: ir.Model, known: Probe, region: Region, lead: tuple[int, int]) -> Iterator[Turn]:
    """Yield the exits that are split into heads and read in no other way; ``lead`` is the size of batch and tokens."""
    inside, values = set(region.nodes), values_of(model.graph)
    for border in region.exits:
        value = values[border.name]
        readers = [use.node for use in value.uses() if name(use.node.outputs[0]) not in inside]
        if len(readers) == 1 and not value.is_graph_output():
            turn = _only_reader(readers[0].outputs[0])
            apart = _heads(known, lead, readers[0].outputs[0])
            turned = turn is not None and _order(turn) in (_HEADS_FIRST, _TURNED)
            if readers[0].op_type == "Reshape" and apart is not None and turn is not None and turned:
                yield Turn(border.name, name(turn.outputs[0]), *apart)


def joins(model: ir.Model, known: Probe, region: Region, lead: tuple[int, int]) -> Iterator[Turn]:
    """Yield the entries that are joined from heads; ``lead`` is the size of batch and tokens."""
    values = values_of(model.graph)
    for border in region.entries:
        joined = values[border.name].producer()
        if joined is None or joined.op_type != "Reshape":
            continue
        turn = None if joined.inputs[0] is None else joined.inputs[0].producer()
        apart = _heads(known, lead, joined.inputs[0])
        if turn is not None and _order(turn) == _HEADS_FIRST and apart is not None:
            yield Turn(border.name, name(turn.inputs[0]), *apart)


def _heads(known: Probe, lead: tuple[int, int], value: ir.Value | None) -> tuple[int, int] | None:
    """Return number and size of the heads of ``[batch, tokens, heads, size]``; None where a value is something else."""
    shape = known.shape(value) or ()
    return (shape[2], shape[3]) if len(shape) == 4 and shape[:2] == lead else None


def _before(value: ir.Value | None) -> ir.Value:
    """Return the first input of what computes ``value``."""
    node = None if value is None else value.producer()
    first = None if node is None else node.inputs[0]
    assert first is not None, "splits() and joins() found the nodes"
    return first


def _order(node: ir.Node) -> list[int] | None:
    order = node.attributes.get("perm") if node.op_type == "Transpose" and node.domain == "" else None
    return None if order is None else list(order.as_ints())


def _only_reader(value: ir.Value) -> ir.Node | None:
    uses = list(value.uses())
    return uses[0].node if len(uses) == 1 and not value.is_graph_output() else None


class RealRows:
    """The rows of real tokens, and their places among padding.

    Args:
        builder: Names and constants.
        mask: 0 where a token is padding, ``[batch, tokens]``.
        joined: The entries that are joined from heads.
        heads: The numbers of heads that there are.

    Attributes:
        nodes: What finds rows and places, from the mask alone.
    """

    def __init__(self, builder: Builder, mask: ir.Value, joined: Sequence[Turn], heads: Collection[int]) -> None:
        self._builder = builder
        self._joined = {turn.border: turn for turn in joined}
        self.nodes: list[ir.Node] = []
        self._real = self._add("Cast", mask, to=int(ir.DataType.BOOL), called="is_real")
        self._dims = self._add("Shape", mask, called="padded_dims")
        tokens = self._add("Gather", self._dims, self._constant("tokens_axis", 1), called="padded_tokens")
        zero, one, all_ = (self._constant(f"token_{each}", each) for each in (0, 1, [-1]))
        first = self._add(
            "Equal", self._add("Range", zero, tokens, one, called="token_position"), zero, called="is_first"
        )
        kept = self._add("Or", self._real, first, called="is_kept")
        flat = self._add("Reshape", kept, all_, called="is_kept_flat")
        self._indices = self._add("Reshape", self._add("NonZero", flat, called="kept"), all_, called="kept_rows")
        counted = self._add("Cast", flat, to=int(ir.DataType.INT64), called="kept_counts")
        # Each padded place reads the row that was kept last before it, which is one of its own sentence.
        self._flat_places = self._add("Sub", self._add("CumSum", counted, zero, called="kept_sum"), one, called="place")
        self._places = self._add("Reshape", self._flat_places, self._dims, called="places")
        self._head_places = {number: self._places_of_heads(number) for number in heads}
        self._head_rows = {number: self._rows_of_heads(number, tokens) for number in heads}

    def enter(self, value: ir.Value, border: Border) -> tuple[list[ir.Node], ir.Value]:
        """Return the rows of the real tokens."""
        if border.name in self._joined:
            return self._enter_heads(value, border, self._joined[border.name])
        made, flat = [], value
        if border.rank > 2:
            shape = self._constant("rows_shape", [-1, border.hidden])
            made, flat = self._made("Reshape", value, shape, called=f"{border.name}_flat")
        gather, rows = self._made("Gather", flat, self._indices, called=f"{border.name}_real")
        rows.type = value.type
        return made + gather, rows

    def leave(self, rows: ir.Value, border: Border) -> tuple[list[ir.Node], ir.Value]:
        """Return the rows in their places; padded ones hold another row of the sentence."""
        places = self._flat_places if border.rank == 2 else self._places
        return self._made("Gather", rows, places, called=f"{border.name}_places")

    def split(self, graph: ir.Graph, turn: Turn) -> None:
        """Let the rows of an exit come back with their heads apart."""
        old = values_of(graph)[turn.turned]
        transpose, restored = old.producer(), _before(_before(old))
        gather = restored.producer()
        assert transpose is not None, "splits() found it"
        assert gather is not None, "leave() made it"
        shape = self._constant("heads_shape", [-1, turn.size])
        made, flat = self._made("Reshape", _before(restored), shape, called=f"{turn.border}_heads")
        placed, value = self._made("Gather", flat, self._head_places[turn.heads], called=f"{turn.turned}_places")
        placed[-1].name = gather.name
        made += placed
        if _order(transpose) == _TURNED:
            turned, value = self._made("Transpose", value, called=f"{turn.turned}_turned")
            turned[0].attributes["perm"] = ir.AttrInt64s("perm", [0, 1, 3, 2])
            made += turned
        graph.insert_before(transpose, made)
        take_over(old, value)

    def zero(self, graph: ir.Graph, output: str, rank: int) -> None:
        """Put 0 in the padded places of an output."""
        index, value = next((at, value) for at, value in enumerate(graph.outputs) if name(value) == output)
        assert value.dtype is not None, "an output has a type"
        made, real = [], self._real
        if rank > 2:
            shape = self._constant("real_shape", [0, 0, *[1] * (rank - 2)])
            made, real = self._made("Reshape", self._real, shape, called=f"{output}_is_real")
        nothing = self._builder.constant(f"{output}_nothing", np.zeros((), value.dtype.numpy()))
        where, zeroed = self._made("Where", real, value, nothing, called=f"{output}_zeroed")
        graph.extend([*made, *where])
        zeroed.type, zeroed.shape = value.type, value.shape
        graph.outputs[index] = zeroed
        zeroed.name, value.name = output, self._builder.free(f"{output}_with_padding")

    def _enter_heads(self, value: ir.Value, border: Border, turn: Turn) -> tuple[list[ir.Node], ir.Value]:
        """Return the rows of the real tokens of a value that is joined from heads."""
        shapes = [self._constant("heads_shape", [-1, turn.size]), self._constant("rows_shape", [-1, border.hidden])]
        made, flat = self._made("Reshape", _before(_before(value)), shapes[0], called=f"{border.name}_heads")
        taken, heads = self._made("Gather", flat, self._head_rows[turn.heads], called=f"{border.name}_taken")
        whole, rows = self._made("Reshape", heads, shapes[1], called=f"{border.name}_real")
        rows.type = value.type
        return [*made, *taken, *whole], rows

    def _places_of_heads(self, heads: int) -> ir.Value:
        """Return the row of each head, ``[batch, heads, tokens]``, of rows ``[n * heads, size]``."""
        first = self._add("Mul", self._places, self._constant("heads", heads), called="first_head")
        apart = self._add("Reshape", first, self._constant("heads_apart", [0, 1, -1]), called="first_heads")
        number = self._builder.constant("head", np.arange(heads, dtype=np.int64)[:, None])
        return self._add("Add", apart, number, called="head_places")

    def _rows_of_heads(self, heads: int, tokens: ir.Value) -> ir.Value:
        """Return the row of each head of each real token, ``[n, heads]``, of ``[batch * heads * tokens, size]``."""
        sentence = self._add("Div", self._indices, tokens, called="sentence")
        others = self._add("Mul", tokens, self._constant("other_heads", heads - 1), called="tokens_of_others")
        before = self._add("Mul", sentence, others, called="before_sentence")
        first = self._add("Add", self._indices, before, called="first_head_row")
        column = self._add("Reshape", first, self._constant("column", [-1, 1]), called="first_head_rows")
        step = self._add("Mul", self._constant("head_number", list(range(heads))), tokens, called="head_step")
        return self._add("Add", column, step, called="head_rows")

    def _add(self, operator: str, *inputs: ir.Value, called: str, **attributes: int) -> ir.Value:
        made, value = self._made(operator, *inputs, called=called, **attributes)
        self.nodes += made
        return value

    def _made(self, operator: str, *inputs: ir.Value, called: str, **attributes: int) -> tuple[list[ir.Node], ir.Value]:
        node = ir.node(operator, inputs, attributes, name=self._builder.free(f"{called}_node"))
        node.outputs[0].name = self._builder.free(called)
        return [node], node.outputs[0]

    def _constant(self, called: str, numbers: int | list[int]) -> ir.Value:
        return self._builder.constant(called, np.array(numbers, np.int64))
