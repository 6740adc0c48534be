"""How nodes behave whose data is transposed: which do the same in any layout, and what must be turned with it.

``Transpose(x, perm)`` has as its axis ``i`` the axis ``perm[i]`` of ``x``. A node that computes element by element
gives the same whether its data is transposed before it or after it; one with an axis does so when the axis is renamed.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import onnx_ir as ir

from onnx_lathe.passes.quantize.builder import Builder
from onnx_lathe.passes.quantize.layers import constant, integer

Perm = tuple[int, ...]

_ONE_OPERAND = frozenset(
    {
        *("Relu", "LeakyRelu", "Elu", "Selu", "Celu", "ThresholdedRelu", "Clip", "HardSigmoid", "HardSwish", "Mish"),
        *("Sigmoid", "Tanh", "Softplus", "Softsign", "Gelu", "Erf", "Exp", "Log", "Sqrt", "Reciprocal", "Neg", "Abs"),
        *("Floor", "Ceil", "Round", "Sign", "Not", "Cast", "Identity", "IsNaN", "QuantizeLinear", "DequantizeLinear"),
    }
)
_MANY_OPERANDS = frozenset(
    {
        *("Add", "Sub", "Mul", "Div", "Pow", "Min", "Max", "Sum", "Mean", "Where", "PRelu", "Mod"),
        *("Equal", "Less", "LessOrEqual", "Greater", "GreaterOrEqual", "And", "Or", "Xor"),
    }
)
_WITH_AXIS = frozenset({"Concat", "Softmax", "LogSoftmax", "Split"})
_REDUCING = frozenset({"ReduceMean", "ReduceSum", "ReduceMax", "ReduceMin"})


def perm_of(node: ir.Node | None) -> Perm | None:
    """Return the permutation of a Transpose of the main domain; None of what is none, or does not write it out."""
    if node is None or node.op_type != "Transpose" or node.domain != "" or "perm" not in node.attributes:
        return None
    return tuple(node.attributes["perm"].as_ints())


def inverse(perm: Perm) -> Perm:
    """Return the permutation that turns back what ``perm`` turned."""
    return tuple(int(axis) for axis in np.argsort(perm))


def after(first: Perm, second: Perm) -> Perm:
    """Return the permutation that ``second`` after ``first`` is."""
    return tuple(first[axis] for axis in second)


def is_identity(perm: Perm) -> bool:
    """Say whether a permutation moves nothing."""
    return perm == tuple(range(len(perm)))


def operands(node: ir.Node) -> list[tuple[int, ir.Value]]:
    """Return the inputs of a node that have its layout, each with its number."""
    every = node.op_type in _MANY_OPERANDS or node.op_type == "Concat"
    inputs = node.inputs if every else node.inputs[:1]
    return [(index, value) for index, value in enumerate(inputs) if value is not None]


def computed(node: ir.Node) -> list[ir.Value]:
    """Return those of `operands` that are not constants."""
    return [value for _, value in operands(node) if constant(value) is None]


def is_free(node: ir.Node, rank: int, opset: int) -> bool:
    """Say whether a node gives the same in any layout of its data, which has ``rank`` axes."""
    if node.domain != "" or not _has_free_type(node, opset):
        return False
    for _, value in operands(node):
        found = constant(value)
        if found is not None and len(found.shape) > rank:
            return False
        if found is None and (value.shape is None or len(value.shape) != rank):
            return False
    return True


def _has_free_type(node: ir.Node, opset: int) -> bool:
    if node.op_type in ("QuantizeLinear", "DequantizeLinear"):
        return all(_is_scalar(value) for value in node.inputs[1:])
    if node.op_type in ("Softmax", "LogSoftmax"):
        return opset >= 13  # before, all axes from that one on were one
    if node.op_type in _REDUCING:
        return integer(node, "keepdims", 1) == 1 and axes_of(node) is not None
    return node.op_type in _ONE_OPERAND | _MANY_OPERANDS | _WITH_AXIS


def _is_scalar(value: ir.Value | None) -> bool:
    found = constant(value)
    return value is None or (found is not None and int(np.prod(found.shape)) == 1)


def axes_of(node: ir.Node) -> list[int] | None:
    """Return the axes that a node reduces; None where they are computed, or are all."""
    given = node.attributes.get("axes")
    if given is not None:
        return list(given.as_ints())
    axes = node.inputs[1] if len(node.inputs) > 1 else None
    tensor = None if axes is None else ir.convenience.get_const_tensor(axes)
    return None if tensor is None or tensor.size == 0 else [int(axis) for axis in tensor.numpy().flat]


def rename_axes(node: ir.Node, perm: Perm, builder: Builder) -> None:
    """Let a node work on the axes of ``x`` where it worked on those of ``Transpose(x, perm)``."""
    if node.op_type in _WITH_AXIS:
        default = 0 if node.op_type == "Split" else -1
        node.attributes["axis"] = ir.AttrInt64("axis", perm[integer(node, "axis", default)])
    if node.op_type in _REDUCING:
        axes = sorted(perm[axis] for axis in axes_of(node) or ())
        if "axes" in node.attributes:
            node.attributes["axes"] = ir.AttrInt64s("axes", axes)
        else:
            name = f"{node.outputs[0].name}_axes"
            node.replace_input_with(1, builder.constant(name, np.array(axes, np.int64)))


class Turner:
    """Gives values of one layout in another.

    Args:
        graph: The main graph.
        builder: Adds to it.
        perm: The values are ``Transpose(x, perm)``, and ``x`` is wanted.
    """

    def __init__(self, graph: ir.Graph, builder: Builder, perm: Perm) -> None:
        self._graph, self._builder, self._perm = graph, builder, perm
        self._turned: dict[ir.Value, ir.Value] = {}

    def before(self, value: ir.Value) -> ir.Value:
        """Return ``x``: what a Transpose reads, a constant turned as it is written, or what a new Transpose makes."""
        if value not in self._turned:
            self._turned[value] = self._turn(value)
        return self._turned[value]

    def after(self, value: ir.Value) -> ir.Node:
        """Return a Transpose of ``value`` by the permutation, right behind it."""
        return self._transpose(value, self._perm)

    def _turn(self, value: ir.Value) -> ir.Value:
        producer = value.producer()
        if producer is not None and perm_of(producer) == self._perm and producer.inputs[0] is not None:
            return producer.inputs[0]
        found = constant(value)
        if found is None:
            return self._transpose(value, inverse(self._perm)).outputs[0]
        if int(np.prod(found.shape)) == 1:
            return value
        shape = (1,) * (len(self._perm) - len(found.shape)) + found.shape
        back = inverse(self._perm)
        return self._builder.stored(
            f"{value.name}_turned",
            lambda: found.read().reshape(shape).transpose(back),
            found.tensor.dtype,
            tuple(shape[axis] for axis in back),
        )

    def _transpose(self, value: ir.Value, perm: Perm) -> ir.Node:
        shape = None if value.shape is None else permuted(value.shape, perm)
        name = self._builder.free(f"{value.name}_turned")
        made = ir.Value(name=name, type=value.type, shape=shape)
        node = ir.node(
            "Transpose", [value], {"perm": list(perm)}, outputs=[made], name=self._builder.free(f"{name}_node")
        )
        producer = value.producer()
        if producer is None:
            self._graph.insert_before(self._graph[0], node)
        else:
            self._graph.insert_after(producer, node)
        return node


def permuted(shape: ir.Shape, perm: Iterable[int]) -> ir.Shape:
    """Return the dimensions of a transposed value."""
    return ir.Shape([shape[axis] for axis in perm])
