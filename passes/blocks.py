"""The blocks that a deep network repeats: found by structure, so that forms can be compared on a few of them.

A transformer is the same graph a dozen times over with other weights. How fast a form of it is shows on two of those
blocks with what stands before and behind them: a fraction of the weights to read, write, and run.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from onnx_lathe.passes import files

KEPT = 2
"""Blocks that are left: what passes from one to the next is there once."""
_LEGIBLE = 64
"""Elements up to which whole numbers are a shape or indices, and belong to the structure."""

Origin = tuple[str, object, int]
"""Where a node's input comes from: the kind of place, which one, and which output of it."""


@dataclass(frozen=True)
class Blocks:
    """A stretch of nodes that repeats.

    Attributes:
        start: The position of the first node.
        period: Nodes of a block.
        count: How many blocks follow each other.
    """

    start: int
    period: int
    count: int

    @property
    def stop(self) -> int:
        """The position behind the last node."""
        return self.start + self.period * self.count

    def block(self, position: int) -> int | None:
        """Return the number of the block in which a node stands; None for one outside."""
        return (position - self.start) // self.period if self.start <= position < self.stop else None


def find_blocks(graph: ir.Graph, kept: int = KEPT) -> Blocks | None:
    """Return the blocks by whose removal but for ``kept`` the most nodes go; None where nothing repeats oftener.

    Blocks are equal in their operators, attributes, shapes of weights and connections. Each reads what the one before
    made, what all read, and weights and inputs of its own; nothing outside reads from any but the last one.

    Args:
        graph: A topologically sorted graph.
        kept: How many blocks would be left.
    """
    nodes = list(graph)
    for blocks in _repetitions(nodes, kept):
        found = _connected_alike(nodes, blocks)
        if found.count > kept:
            return found
    return None


def shorten(model: ir.Model, blocks: Blocks, kept: int = KEPT) -> None:
    """Remove all blocks of ``model`` but the first ``kept``; what read the last one reads the last kept one.

    Outputs of removed blocks (such as the keys and values of a decoder's cache) and inputs that only they read go too.
    """
    graph = model.graph
    nodes = list(graph)
    positions = {node: position for position, node in enumerate(nodes)}
    removed = nodes[blocks.start + kept * blocks.period : blocks.stop]
    distance = (blocks.count - kept) * blocks.period
    passed_on = _passed_on(nodes, blocks, positions)
    outputs: list[ir.Value] = []
    for old in graph.outputs:
        position = _position(old, positions)
        block = None if position is None else blocks.block(position)
        if position is None or block is None or block < kept:
            outputs.append(old)
        elif block == blocks.count - 1 and _slot(old, blocks, position) in passed_on:
            new, name = nodes[position - distance].outputs[old.index() or 0], old.name
            new.type, new.shape, old.name = old.type, old.shape, f"{name}.removed"
            new.name = name
            outputs.append(new)
    for node in nodes[blocks.stop - blocks.period : blocks.stop]:
        for number, value in enumerate(node.outputs):
            outside = [(user, index) for user, index in value.uses() if positions[user] >= blocks.stop]
            for user, index in outside:
                user.replace_input_with(index, nodes[positions[node] - distance].outputs[number])
    graph.outputs.clear()
    graph.outputs.extend(outputs)
    read_before = {value for value in graph.inputs if value.uses()}
    graph.remove(removed, safe=True)
    RemoveUnusedNodesPass()(model)
    for value in [value for value in graph.inputs if value in read_before and not value.uses()]:
        graph.inputs.remove(value)


def write_shortened(source: Path, target: Path, kept: int = KEPT) -> float | None:
    """Write the model at ``source`` with ``kept`` of its blocks, and return the share of its nodes that are left.

    None, and nothing is written, where it does not repeat more than ``kept`` blocks.
    """
    model = files.load(source)
    model.graph.sort()
    blocks = find_blocks(model.graph, kept)
    if blocks is None:
        return None
    before = len(model.graph)
    shorten(model, blocks, kept)
    files.save(model, target)
    return len(model.graph) / before


def _repetitions(nodes: Sequence[ir.Node], kept: int) -> Iterator[Blocks]:
    """Yield what may repeat by the nodes alone, wherever a block may begin; what removes most comes first."""
    numbers: dict[object, int] = {}
    labels = np.array([numbers.setdefault(_label(node), len(numbers)) for node in nodes])
    found: list[Blocks] = []
    for period in range(1, len(nodes) // (kept + 1) + 1):
        equal = np.flatnonzero(np.diff(np.concatenate(([0], labels[period:] == labels[:-period], [0]))))
        for start, stop in zip(equal[::2].tolist(), equal[1::2].tolist(), strict=True):
            for first in range(start, min(start + period, stop)):
                count = (stop + period - first) // period
                if count > kept:
                    found.append(Blocks(first, period, count))
    yield from sorted(found, key=lambda blocks: ((kept - blocks.count) * blocks.period, blocks.period, blocks.start))


def _label(node: ir.Node) -> object:
    """Return what nodes at the same place of two blocks share; a node with a subgraph is equal to none."""
    attributes: list[object] = []
    for name, attribute in sorted(node.attributes.items()):
        if attribute.type in (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS):
            return id(node)
        tensor = attribute.type == ir.AttributeType.TENSOR and not attribute.is_ref()
        attributes.append((name, _weight(attribute.value) if tensor else str(attribute.value)))
    inputs = tuple(None if value is None else _weight(value.const_value) for value in node.inputs)
    return node.domain, node.op_type, node.overload, tuple(attributes), inputs, len(node.outputs)


def _weight(tensor: ir.TensorProtocol | None) -> object:
    """Return what of a weight belongs to the structure: its type and dims, and its values where they are a shape."""
    if tensor is None:
        return "computed"
    legible = tensor.dtype.is_integer() and tensor.size <= _LEGIBLE
    return str(tensor.dtype), tuple(tensor.shape.numpy()), tensor.numpy().tobytes() if legible else None


def _connected_alike(nodes: Sequence[ir.Node], blocks: Blocks) -> Blocks:
    """Return the blocks, the first ones left out, that are also connected alike; a count of 0 where none are."""
    positions = {node: position for position, node in enumerate(nodes)}
    within = nodes[blocks.start : blocks.stop]
    for number, node in enumerate(within):
        # A reader without a position stands in a subgraph.
        readers = [positions.get(user) for value in node.outputs for user, _ in value.uses()]
        is_last = number >= len(within) - blocks.period
        if any(reader is None or (reader >= blocks.stop and not is_last) for reader in readers):
            return Blocks(blocks.start, blocks.period, 0)
    origins = [
        [_origin(value, blocks, number // blocks.period, positions) for value in node.inputs]
        for number, node in enumerate(within)
    ]
    first = blocks.count - 1
    while first > 0 and _alike(origins, first - 1, blocks):
        first -= 1
    return Blocks(blocks.start + first * blocks.period, blocks.period, blocks.count - first)


def _origin(value: ir.Value | None, blocks: Blocks, block: int, positions: dict[ir.Node, int]) -> Origin:
    if value is None or value.const_value is not None:
        return "weight", None, 0
    producer = value.producer()
    if producer is None:
        return "input", value.name, 0
    if producer not in positions:
        return "outer", value.name, 0
    position = positions[producer]
    made_in, number = blocks.block(position), value.index() or 0
    if made_in is None:
        return "outer", value.name, number
    offset = (position - blocks.start) % blocks.period
    kinds = {0: "inner", 1: "passed on"}
    return kinds.get(block - made_in, f"{block - made_in} blocks back"), offset, number


def _alike(origins: Sequence[Sequence[Origin]], block: int, blocks: Blocks) -> bool:
    """Say whether a block is connected as the next one; what that one is passed, the first may have from before."""
    for offset in range(blocks.period):
        mine, next_ones = (origins[(number * blocks.period) + offset] for number in (block, block + 1))
        for one, other in zip(mine, next_ones, strict=True):
            own_inputs = one[0] == other[0] == "input"
            begins = block == 0 and other[0] == "passed on" and one[0] in ("outer", "input", "weight")
            reach = other[0].endswith("back")
            if reach or not (one == other or own_inputs or begins):
                return False
    return True


def _passed_on(nodes: Sequence[ir.Node], blocks: Blocks, positions: dict[ir.Node, int]) -> set[tuple[int, int]]:
    """Return offset and output number of what a block takes from the one before."""
    second = range(blocks.start + blocks.period, blocks.start + 2 * blocks.period)
    origins = [_origin(value, blocks, 1, positions) for position in second for value in nodes[position].inputs]
    return {(offset, number) for kind, offset, number in origins if kind == "passed on" and isinstance(offset, int)}


def _position(value: ir.Value, positions: dict[ir.Node, int]) -> int | None:
    producer = value.producer()
    return None if producer is None else positions.get(producer)


def _slot(value: ir.Value, blocks: Blocks, position: int) -> tuple[int, int]:
    return (position - blocks.start) % blocks.period, value.index() or 0
