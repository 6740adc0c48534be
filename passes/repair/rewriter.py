"""Giving nodes other constants in the place of those that they read."""

from __future__ import annotations

from collections.abc import Callable, Hashable

import numpy as np
import onnx_ir as ir

from onnx_lathe.passes import files
from onnx_lathe.passes.quantize.builder import Builder
from onnx_lathe.passes.quantize.layers import constant
from onnx_lathe.passes.quantize.scheme import WeightScheme
from onnx_lathe.runtime.samples import Array


class Rewriter:
    """Changes what the nodes of one graph read.

    A repair knows a constant by the name of the value that a node read when it was planned. What it puts there has
    another name: so a repair that is made a second time finds that it was made.

    Args:
        graph: The main graph of a model.
        suffix: What the names of new constants end in.
    """

    def __init__(self, graph: ir.Graph, suffix: str) -> None:
        self.builder = Builder(graph, WeightScheme())
        self._graph = graph
        self._suffix = suffix
        self._made: dict[Hashable, ir.Value] = {}

    def swap(
        self, node: ir.Node, index: int, compute: Callable[[Array], Array], shape: tuple[int, ...], key: Hashable
    ) -> None:
        """Replace a constant input of ``node`` by what is computed from it while the model is written.

        Args:
            node: The reader; others keep reading the old constant.
            index: Which of its inputs.
            compute: Pure numpy: from the values as the reader sees them.
            shape: Of the result.
            key: What is computed. The same of the same values is stored once.
        """
        old = node.inputs[index]
        found = constant(old)
        assert old is not None, "a planned input is there"
        assert found is not None, f"{old.name} is a constant"
        source, arrange = found.tensor, found.arrange
        made = (id(source), found.perm, key)
        if made not in self._made:
            dtype = source.dtype.numpy()
            self._made[made] = self.builder.stored(
                f"{old.name}_{self._suffix}",
                lambda: compute(arrange(files.view(source).numpy())).astype(dtype, copy=False),
                source.dtype,
                shape,
            )
        node.replace_input_with(index, self._made[made])
        self.builder.drop_unused([old])

    def put(self, node: ir.Node, index: int, array: Array) -> None:
        """Give ``node`` new values as an input that it has or lacks."""
        if len(node.inputs) <= index:
            node.resize_inputs(index + 1)
        old = node.inputs[index]
        base = node.outputs[0].name if old is None else old.name
        node.replace_input_with(index, self.builder.constant(f"{base}_{self._suffix}", np.ascontiguousarray(array)))
        self.builder.drop_unused([old])

    def behind(self, value: ir.Value, operator: str, array: Array) -> ir.Value:
        """Insert an operator with a constant as its second operand behind ``value`` and return its result."""
        name = f"{value.name}_{self._suffix}"
        operand = self.builder.constant(f"{name}_operand", array)
        node = self.builder.op(operator, [value, operand], [(name, value.dtype or ir.DataType.FLOAT, value.shape)])
        producer = value.producer()
        if producer is None:
            self._graph.insert_before(self._graph[0], node)
        else:
            self._graph.insert_after(producer, node)
        return node.outputs[0]

    def take_over(self, value: ir.Value, operator: str, array: Array) -> None:
        """Insert such an operator in front of all readers of ``value``; its result takes the name of ``value``."""
        uses = list(value.uses())
        result = self.behind(value, operator, array)
        for node, index in uses:
            node.replace_input_with(index, result)
        for index, output in enumerate(self._graph.outputs):
            if output is value:
                self._graph.outputs[index] = result
        value.name, result.name = result.name, value.name


def nodes_of(graph: ir.Graph) -> dict[str, ir.Node]:
    """Return the nodes of ``graph`` by the name of their first result."""
    return {node.outputs[0].name or "": node for node in graph}


def reads(node: ir.Node | None, index: int, name: str) -> bool:
    """Say whether ``node`` still reads, as input ``index``, the value that it read when a repair was planned."""
    if node is None or len(node.inputs) <= index:
        return False
    value = node.inputs[index]
    return value is not None and value.name == name
