"""Computing only what is read: selections moved from the end of a network to where they save work.

A classifier reads one token of the last layer. Its normalization, feed-forward part, output projection and queries then
need that token alone, and only keys and values need all of them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass as plain_dataclass
from typing import Any, ClassVar

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import ShapeInferencePass
from pydantic.dataclasses import dataclass

from onnx_lathe.passes.additions import add_initializer
from onnx_lathe.passes.edit import Edit
from onnx_lathe.passes.fuse.demand import Asked, Selection, asked_of_inputs, selected
from onnx_lathe.passes.oracle import Tolerance
from onnx_lathe.passes.request import Request, Score
from onnx_lathe.runtime.errors import UnsupportedModelError
from onnx_lathe.runtime.samples import Samples

_WORK = {"MatMul", "Gemm"}
"""Operators for whose sake a selection is moved."""


@dataclass(frozen=True)
class PushSlices(Request):
    """Compute only the positions that are read: a classifier's one token, not the whole last layer."""

    name: ClassVar[str] = "push-slices"

    def plan(self, model: ir.Model, samples: Samples | None, score: Score | None) -> SlicesPushed:
        """Find what may be computed at the positions alone that are read.

        Raises:
            UnsupportedModelError: No product would become smaller.
        """
        del samples, score
        shaped = model.clone()
        ShapeInferencePass(check_type=False, strict_mode=False)(shaped)
        pushed = _smaller(shaped.graph)
        if not any(each.operator in _WORK for each in pushed):
            raise UnsupportedModelError(
                self.name,
                got="no Gather or Slice of known positions whose other positions nothing else reads",
                expected="a selection behind products, such as a classifier's of the first token",
                mend="Leave the pass out.",
            )
        return SlicesPushed(tuple(pushed))


@plain_dataclass(frozen=True)
class Smaller:
    """A node that computes some positions of its result alone.

    Attributes:
        result: The name of its first output.
        operator: Its operator type.
        axis: The axis of the result that becomes shorter; for the selection itself, that of what it reads.
        count: How long that axis is then.
        begins: Whether this is the selection itself: it selects all of what is left to select from.
        slices: What to take of which input, by its index, where what makes that input still makes all.
    """

    result: str
    operator: str
    axis: int
    count: int
    begins: bool
    slices: Mapping[int, Selection]


@plain_dataclass(frozen=True)
class SlicesPushed(Edit):
    """Nodes that compute less, and selections in front of them.

    Attributes:
        nodes: In the order of the graph.
    """

    tolerance: ClassVar[Tolerance] = Tolerance(
        "The same sums, though a product of fewer rows may add them in another order.", relative=1e-5
    )

    nodes: tuple[Smaller, ...]

    def describe(self) -> Mapping[str, Any]:
        """Return the plan as JSON."""
        return {"nodes": [dataclasses.asdict(node) for node in self.nodes]}

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Make the nodes compute less."""
        nodes = {node.outputs[0].name: node for node in model.graph if node.outputs}
        modified = False
        for smaller in self.nodes:
            node = nodes[smaller.result]
            for index, selection in smaller.slices.items():
                modified |= _select(model.graph, node, index, selection)
            modified |= _shorten(model.graph, node, smaller)
        return ir.passes.PassResult(model, modified=modified)


def _smaller(graph: ir.Graph) -> list[Smaller]:
    """Return every node that may compute less, and the selections at which that begins."""
    asked: dict[tuple[ir.Node, int], Asked] = {}
    found: list[tuple[ir.Node, Selection]] = []
    less: set[ir.Node] = set()
    for node in reversed(graph):
        wanted = _wanted(node, asked)
        inputs = None if wanted is None else asked_of_inputs(node, wanted)
        if wanted is not None and inputs is not None:
            asked |= {(node, index): each for index, each in enumerate(inputs)}
            found.append((node, wanted))
            less.add(node)
        elif (selection := selected(node)) is not None:
            asked[node, 0] = selection
            found.append((node, selection))
    smaller: list[Smaller] = []
    for node, selection in reversed(found):
        begins = node not in less
        if begins and _producer(node, 0) not in less:
            continue
        reads_less = {
            index: each
            for index in range(len(node.inputs))
            if not begins and (each := asked.get((node, index))) is not None and _producer(node, index) not in less
        }
        name = node.outputs[0].name or ""
        smaller.append(Smaller(name, node.op_type, selection.axis, selection.count, begins, reads_less))
    return smaller


def _wanted(node: ir.Node, asked: Mapping[tuple[ir.Node, int], Asked]) -> Asked:
    """Return the selection that all who read what a node makes ask for."""
    several = len(node.outputs) > 1 and node.op_type != "Split"
    if several or any(value.is_graph_output() for value in node.outputs):
        return None
    wishes = {asked.get((user, index)) for value in node.outputs for user, index in value.uses()}
    return wishes.pop() if len(wishes) == 1 else None


def _producer(node: ir.Node, index: int) -> ir.Node | None:
    value = node.inputs[index]
    return None if value is None else value.producer()


def _select(graph: ir.Graph, node: ir.Node, index: int, selection: Selection) -> bool:
    """Put a Slice before an input of ``node``; the same one for all that take the same of a value."""
    value = node.inputs[index]
    assert value is not None, "a selection is of an input that is there"
    suffix = f".{selection.axis}.{selection.start}.{selection.count}"
    name, made = f"{value.name}{suffix}", value.producer()
    if made is not None and made.op_type == "Slice" and made.name == value.name and name.endswith(suffix * 2):
        return False
    known = next((user.outputs[0] for user, _ in value.uses() if user.outputs[0].name == name), None)
    if known is None:
        numbers = {"start": selection.start, "stop": selection.stop, "axis": selection.axis}
        limits = [_constant(graph, f"{name}.{key}", [number]) for key, number in numbers.items()]
        cut = ir.node("Slice", [value, *limits], name=name)
        known = cut.outputs[0]
        known.name, known.type = name, value.type
        known.shape = _cut(value.shape, selection.axis, selection.count)
        if made is not None:
            graph.insert_after(made, cut)
        else:
            graph.insert_before(graph[0], cut)
    node.replace_input_with(index, known)
    return True


def _shorten(graph: ir.Graph, node: ir.Node, smaller: Smaller) -> bool:
    """Let a node's own numbers fit the shorter axis: those of a selection, and of a Reshape."""
    if smaller.begins:
        numbers = [0] if node.op_type == "Gather" else [0, smaller.count]
        indices = range(1, 1 + len(numbers))
        if all(_known(node, index).item() == number for index, number in zip(indices, numbers, strict=True)):
            return False
        for index, number in zip(indices, numbers, strict=True):
            new = np.full(_known(node, index).shape, number, np.int64)
            node.replace_input_with(index, _constant(graph, f"{smaller.result}.{index}.selected", new))
        return True
    for result in node.outputs:
        result.shape = _cut(result.shape, smaller.axis, smaller.count)
    if node.op_type != "Reshape":
        return False
    sizes = _known(node, 1).copy()
    if sizes[smaller.axis] in (0, -1, smaller.count):
        return False
    sizes[smaller.axis] = smaller.count
    node.replace_input_with(1, _constant(graph, f"{smaller.result}.selected", sizes))
    return True


def _known(node: ir.Node, index: int) -> np.ndarray:
    value = node.inputs[index]
    tensor = None if value is None else value.const_value
    assert tensor is not None, "only what is known is moved or made smaller"
    return tensor.numpy()


def _cut(shape: ir.Shape | None, axis: int, count: int) -> ir.Shape | None:
    return None if shape is None else ir.Shape([*shape[:axis], count, *shape[axis + 1 :]])


def _constant(graph: ir.Graph, name: str, numbers: Sequence[int] | np.ndarray) -> ir.Value:
    return add_initializer(graph, ir.Tensor(np.asarray(numbers, np.int64), name=name))
