"""Transposes moved to where they meet others and vanish.

A network that was written for one layout of its pixels and exported for another has a Transpose before and after every
convolution. What stands between two of them gives the same in either layout: there it is given the convolutions' own.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from dataclasses import dataclass as plain_dataclass
from typing import Any, ClassVar, Literal

import numpy as np
import onnx_ir as ir
from pydantic.dataclasses import dataclass

from onnx_lathe.passes.edit import Edit
from onnx_lathe.passes.fuse.layout import (
    Perm,
    Turner,
    after,
    computed,
    inverse,
    is_free,
    is_identity,
    operands,
    perm_of,
    permuted,
    rename_axes,
)
from onnx_lathe.passes.fuse.stretch import drop_unused, name, shaped
from onnx_lathe.passes.oracle import Tolerance
from onnx_lathe.passes.quantize.builder import Builder
from onnx_lathe.passes.quantize.layers import integer
from onnx_lathe.passes.quantize.scheme import WeightScheme
from onnx_lathe.passes.request import Request, Score
from onnx_lathe.runtime.errors import UnsupportedModelError
from onnx_lathe.runtime.samples import Samples

LARGEST_REGION = 400
"""Nodes that are turned together: more than any block of a network between two convolutions."""


@dataclass(frozen=True)
class MoveTransposes(Request):
    """Move transposes through nodes that give the same in any layout, where fewer are left; merge reshapes."""

    name: ClassVar[str] = "move-transposes"

    def plan(self, model: ir.Model, samples: Samples | None, score: Score | None) -> MovedTransposes:
        """Find the moves, one after the other, on a copy.

        Raises:
            UnsupportedModelError: No move leaves fewer nodes.
        """
        del samples, score
        copy = shaped(model)
        moves: list[Move] = []
        while (move := next(_moves(copy), None)) is not None:
            assert _apply(copy.graph, move), "a move that was found can be made"
            moves.append(move)
        if not moves:
            raise UnsupportedModelError(
                self.name,
                got="no Transpose or Reshape that could be saved",
                expected="two that meet when they are moved through the nodes between them",
                mend="Leave the pass out.",
            )
        return MovedTransposes(tuple(moves))


@plain_dataclass(frozen=True)
class Move:
    """One step.

    Attributes:
        kind: "turn" gives nodes the layout before a Transpose; "merge" lets a Transpose or Reshape read what the one
            before it reads; "skip" lets a Reshape read what a Transpose reads that moves only axes of size 1; "fold"
            makes a Transpose an attribute of the Gemm that reads it.
        results: The first result of each node that is changed, in the order of the graph.
        source: The value that one of them reads and then no longer does.
        perm: The permutation of the Transposes, of "turn" alone.
    """

    kind: Literal["turn", "merge", "skip", "fold"]
    results: tuple[str, ...]
    source: str
    perm: Perm = ()


@plain_dataclass(frozen=True)
class MovedTransposes(Edit):
    """Moves, in the order in which they are made."""

    tolerance: ClassVar[Tolerance] = Tolerance(
        "The same numbers at other places; sums over axes run in another order, and onnxruntime chooses other kernels.",
        relative=1e-4,
    )

    moves: tuple[Move, ...]

    def describe(self) -> Mapping[str, Any]:
        """Return the plan as JSON."""
        return {"moves": list(map(asdict, self.moves))}

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Make the moves that are still to be made."""
        done = [_apply(model.graph, move) for move in self.moves]
        return ir.passes.PassResult(model, any(done))


def _moves(model: ir.Model) -> Iterator[Move]:
    """Yield moves that each leave fewer nodes."""
    for node in model.graph:
        source = node.inputs[0] if node.inputs else None
        before = None if source is None else source.producer()
        if source is not None and before is not None and before.domain == node.domain == "":
            kind = _pair(node, before, source)
            if kind is not None:
                yield Move(kind, (name(node.outputs[0]),), name(source))
        if node.op_type == "Gemm" and node.domain == "":
            for value in node.inputs[:2]:
                if value is not None and perm_of(value.producer()) == (1, 0) and _dies(value):
                    yield Move("fold", (name(node.outputs[0]),), name(value))
    opset = model.opset_imports.get("", 1)
    for node in model.graph:
        perm = perm_of(node)
        if perm is not None and not is_identity(perm):
            yield from _turns(model.graph, node, perm, opset)


def _pair(node: ir.Node, before: ir.Node, source: ir.Value) -> Literal["merge", "skip"] | None:
    """Return how ``node``, a Transpose or Reshape, does without the one before it."""
    first, second = perm_of(before), perm_of(node)
    if first is not None and second is not None:
        return "merge" if _dies(source) or is_identity(after(first, second)) else None
    if node.op_type != "Reshape" or not _dies(source) or not _is_absolute(node):
        return None
    if before.op_type in ("Reshape", "Flatten", "Squeeze", "Unsqueeze"):
        return "merge"
    return "skip" if first is not None and _moves_ones(before, first) else None


def _dies(value: ir.Value) -> bool:
    """Say whether nothing but one node reads ``value``."""
    return len(list(value.uses())) == 1 and not value.is_graph_output()


def _is_absolute(reshape: ir.Node) -> bool:
    """Say whether a Reshape gives the same shape whatever that of its data: constant, and no dimension copied."""
    shape = reshape.inputs[1]
    tensor = None if shape is None else ir.convenience.get_const_tensor(shape)
    return tensor is not None and not np.any(tensor.numpy() == 0)


def _moves_ones(transpose: ir.Node, perm: Perm) -> bool:
    """Say whether a Transpose leaves the order of the axes that may be larger than 1."""
    source = transpose.inputs[0]
    if source is None or source.shape is None:
        return False
    large = [axis for axis in perm if source.shape[axis] != 1]
    return large == sorted(large)


def _turns(graph: ir.Graph, transpose: ir.Node, perm: Perm, opset: int) -> Iterator[Move]:
    """Yield the better of the regions behind a Transpose: with what stands before its nodes, or only what follows."""
    best: tuple[int, list[ir.Node]] = (0, [])
    for backwards in (False, True):
        region = _region(transpose, perm, opset, backwards=backwards)
        saved = _saved(region, perm)
        if saved > best[0]:
            best = (saved, region)
    if best[1]:
        order = {node: index for index, node in enumerate(graph)}
        nodes = sorted(best[1], key=lambda node: order[node])
        yield Move("turn", tuple(name(node.outputs[0]) for node in nodes), name(transpose.outputs[0]), perm)


def _region(transpose: ir.Node, perm: Perm, opset: int, *, backwards: bool) -> list[ir.Node]:
    """Return the nodes around the result of a Transpose that give the same in any layout."""
    found: dict[ir.Node, None] = {}
    waiting = [use.node for use in transpose.outputs[0].uses()]
    while waiting and len(found) < LARGEST_REGION:
        node = waiting.pop(0)
        if node in found or node.graph is not transpose.graph or not is_free(node, len(perm), opset):
            continue
        found[node] = None
        waiting += [use.node for value in node.outputs for use in value.uses()]
        if backwards:
            producers = (value.producer() for value in computed(node))
            waiting += [producer for producer in producers if producer is not None]
    return list(found)


def _saved(region: list[ir.Node], perm: Perm) -> int:
    """Return how many Transposes fewer there are when ``region`` has the layout before a Transpose by ``perm``."""
    inside, saved = set(region), 0
    for value in {value for node in region for value in computed(node)}:
        producer = value.producer()
        if producer in inside:
            continue
        if producer is None or perm_of(producer) != perm:
            saved -= 1
        elif not value.is_graph_output() and all(use.node in inside for use in value.uses()):
            saved += 1
    for value in (value for node in region for value in node.outputs):
        outside = [use.node for use in value.uses() if use.node not in inside]
        perms = [perm_of(node) for node in outside]
        others = [each for each in perms if each != inverse(perm)]
        saved += len(perms) - len(others)
        if None in others or len(others) > 1 or value.is_graph_output():
            saved -= 1
    return saved


def _apply(graph: ir.Graph, move: Move) -> bool:
    """Make a move; False where the graph is not as it was planned, or the move was made."""
    made = {name(node.outputs[0]): node for node in graph if name(node.outputs[0]) in move.results}
    nodes = [made[result] for result in move.results if result in made]
    if len(nodes) < len(move.results) or not any(name(value) == move.source for node in nodes for value in node.inputs):
        return False
    builder = Builder(graph, WeightScheme())
    if move.kind == "turn":
        _turn(graph, builder, nodes, move.perm)
    elif move.kind == "fold":
        _fold(nodes[0], move.source)
    else:
        _merge(nodes[0])
    return True


def _turn(graph: ir.Graph, builder: Builder, nodes: list[ir.Node], perm: Perm) -> None:
    """Give ``nodes`` the layout before a Transpose by ``perm``, and turn what others read of them."""
    inside, turner, left = set(nodes), Turner(graph, builder, perm), list[ir.Value]()
    for node in nodes:
        rename_axes(node, perm, builder)
        for index, value in operands(node):
            if value.producer() not in inside:
                node.replace_input_with(index, turner.before(value))
                left.append(value)
    for value in [value for node in nodes for value in node.outputs]:
        shape = value.shape
        value.shape = None if shape is None else permuted(shape, inverse(perm))
        outside = [(use.node, use.idx) for use in value.uses() if use.node not in inside]
        old = value.name
        value.name = builder.free(f"{old}_turned")
        if outside or value.is_graph_output():
            _turn_back(graph, turner, value, outside, old, shape)
    drop_unused(left)


def _turn_back(
    graph: ir.Graph,
    turner: Turner,
    value: ir.Value,
    readers: Sequence[tuple[ir.Node, int]],
    old: str | None,
    shape: ir.Shape | None,
) -> None:
    """Let those outside a region read ``value`` in the layout and by the name that they know."""
    transpose = turner.after(value)
    made = transpose.outputs[0]
    made.name, made.shape = old, shape
    for node, number in readers:
        node.replace_input_with(number, made)
    for index, output in enumerate(graph.outputs):
        if output is value:
            graph.outputs[index] = made


def _fold(gemm: ir.Node, source: str) -> None:
    """Make a Transpose an attribute of the Gemm that reads it."""
    index = [name(value) for value in gemm.inputs].index(source)
    value = gemm.inputs[index]
    assert value is not None
    transpose, attribute = value.producer(), "transB" if index else "transA"
    assert transpose is not None
    gemm.replace_input_with(index, transpose.inputs[0])
    gemm.attributes[attribute] = ir.AttrInt64(attribute, 1 - integer(gemm, attribute, 0))
    drop_unused([value])


def _merge(node: ir.Node) -> None:
    """Let a Transpose or Reshape read what the one before it reads; a Transpose that moves nothing is removed."""
    source = node.inputs[0]
    assert source is not None
    before, second = source.producer(), perm_of(node)
    assert before is not None
    first = perm_of(before)
    node.replace_input_with(0, before.inputs[0])
    if first is not None and second is not None:
        perm = after(first, second)
        node.attributes["perm"] = ir.AttrInt64s("perm", list(perm))
        if is_identity(perm):
            _bypass(node)
    drop_unused([source])


def _bypass(transpose: ir.Node) -> None:
    """Remove a Transpose that moves nothing; what an output of the graph is called stays there as an Identity."""
    result, source = transpose.outputs[0], transpose.inputs[0]
    assert source is not None, "a Transpose reads something"
    if result.is_graph_output():
        transpose.op_type = "Identity"
        transpose.attributes.clear()
        return
    result.replace_all_uses_with(source)
    drop_unused([result])
