"""A model's dimensions at one size that tells them apart, and what is constant there.

Exporters compute the shape of a Reshape in a dozen nodes, and symbolic inference loses its way in them. Here every
symbolic dimension of an input gets a prime of its own that divides nothing else in the model: each shape is then a row
of numbers, and a number says which dimensions it is made of.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx
import onnx.reference
import onnx_ir as ir

from onnx_lathe.passes.fuse.demand import ELEMENTWISE
from onnx_lathe.passes.fuse.stretch import name
from onnx_lathe.runtime.samples import Array

LARGEST = 2**20
"""Elements of a constant that is computed or read."""
_PRIMES = tuple(
    number for number in range(11, 400) if all(number % divisor for divisor in range(2, math.isqrt(number) + 1))
)
"""Sizes of symbolic dimensions: small, for tables of positions end somewhere; none divides the size of a head."""
_SAME_SHAPE = ELEMENTWISE | {"SimplifiedLayerNormalization", "BiasGelu", "RotaryEmbedding"}
"""Operators without an onnx schema whose result has the shape of their first input."""
_RANDOM = ("RandomNormal", "RandomUniform", "RandomNormalLike", "RandomUniformLike", "Multinomial", "Bernoulli")


@dataclass(frozen=True)
class Probe:
    """What is known of the values of a graph, by name.

    Attributes:
        shapes: Dimensions at the chosen sizes.
        dtypes: Element types.
        constants: Values at these sizes, those that follow from the shapes of inputs included.
        fixed: What depends on no input, not even on its shape.
        symbolic: The sizes that stand for symbolic dimensions.
    """

    shapes: Mapping[str, tuple[int, ...]]
    dtypes: Mapping[str, ir.DataType]
    constants: Mapping[str, Array]
    fixed: frozenset[str]
    symbolic: frozenset[int]

    def shape(self, value: ir.Value | None) -> tuple[int, ...] | None:
        """Return the dimensions of a value; None where they are not known."""
        return self.shapes.get(name(value))

    def constant(self, value: ir.Value | None) -> Array | None:
        """Return a value that is the same in every run of this size; None where it is none."""
        return self.constants.get(name(value))

    def is_fixed(self, value: ir.Value | None) -> bool:
        """Say whether a value is the same in every run, whatever the inputs and their sizes."""
        return name(value) in self.fixed


def probe(model: ir.Model, least: int = 0) -> Probe:
    """Infer the shapes and constants of the main graph; what cannot be inferred is left out.

    Args:
        model: The model.
        least: The smallest size of a symbolic dimension that is not the first.
    """
    walk = _Walk(model, least)
    for node in model.graph:
        walk.visit(node)
    return Probe(walk.shapes, walk.dtypes, walk.constants, frozenset(walk.fixed), frozenset(walk.sizes.values()))


def apply_operator(node: ir.Node, inputs: Sequence[Array | None], opset: int) -> list[Array]:
    """Return what one operator makes of arrays, as onnx's reference does."""
    if node.op_type == "GatherElements" and inputs[0] is not None and inputs[1] is not None:
        # onnx's own takes 32 rows at most
        return [np.take_along_axis(inputs[0], inputs[1], node.attributes.get_int("axis", 0))]
    proto = ir.to_proto(node)
    assert isinstance(proto, onnx.NodeProto), "a node is written as one"
    given = {each: array for each, array in zip(proto.input, inputs, strict=True) if array is not None}
    graph = onnx.helper.make_graph(
        [proto],
        "operator",
        [onnx.helper.make_value_info(each, onnx.TypeProto()) for each in given],
        [onnx.helper.make_value_info(each, onnx.TypeProto()) for each in proto.output if each],
    )
    whole = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", opset)])
    with np.errstate(all="ignore"):
        found = onnx.reference.ReferenceEvaluator(whole).run(None, given)
    return [np.asarray(each) for each in found]


class _Walk:
    def __init__(self, model: ir.Model, least: int) -> None:
        self._opset = model.opset_imports.get("", 1)
        self._types: dict[str, onnx.TypeProto] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.dtypes: dict[str, ir.DataType] = {}
        self.constants: dict[str, Array] = {}
        self.fixed: set[str] = {""}
        self.sizes: dict[str, int] = {}
        for value in model.graph.initializers.values():
            self._initializer(value)
        first, other = _sizes(model, 0), _sizes(model, least)
        for value in model.graph.inputs:
            if value.name not in self.shapes and value.shape is not None and value.dtype is not None:
                dims = [
                    self._size(dim, f"{value.name}.{axis}", other if axis else first)
                    for axis, dim in enumerate(value.shape)
                ]
                self._known(value, onnx.helper.make_tensor_type_proto(int(value.dtype), dims))

    def visit(self, node: ir.Node) -> None:
        """Infer what a node makes."""
        if any(value is not None and value.name == "" for value in node.inputs) or node.op_type in _RANDOM:
            return
        if any(each.type in (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS) for each in node.attributes.values()):
            return
        if all(name(value) in self.fixed for value in node.inputs):
            self.fixed |= {name(value) for value in node.outputs}
        if node.op_type == "Shape" and node.domain == "":
            self._shape(node)
        elif node.domain == "" and all(value is None or name(value) in self.constants for value in node.inputs):
            self._compute(node)
        if not all(name(value) in self.shapes for value in node.outputs):
            self._infer(node)

    def _initializer(self, value: ir.Value) -> None:
        if value.const_value is None or value.dtype is None:
            return
        dims = [int(dim) for dim in value.const_value.shape.numpy()]
        self.fixed.add(name(value))
        self._known(value, onnx.helper.make_tensor_type_proto(int(value.dtype), dims))
        if math.prod(dims) <= LARGEST and value.dtype != ir.DataType.STRING:
            self.constants[name(value)] = value.const_value.numpy()

    def _size(self, dim: int | ir.SymbolicDim, unnamed: str, free: Iterator[int]) -> int:
        if isinstance(dim, int):
            return dim
        key = dim.value or unnamed
        if key not in self.sizes:
            self.sizes[key] = next(size for size in free if size not in self.sizes.values())
        return self.sizes[key]

    def _known(self, value: ir.Value, kind: onnx.TypeProto) -> None:
        self._types[name(value)] = kind
        self.dtypes[name(value)] = ir.DataType(kind.tensor_type.elem_type)
        dims = kind.tensor_type.shape.dim
        if kind.tensor_type.HasField("shape") and all(dim.HasField("dim_value") for dim in dims):
            self.shapes[name(value)] = tuple(dim.dim_value for dim in dims)

    def _shape(self, node: ir.Node) -> None:
        shape = self.shapes.get(name(node.inputs[0]))
        if shape is not None:
            start = node.attributes.get_int("start", 0)
            end = node.attributes.get_int("end", len(shape))
            self._array(node.outputs[0], np.array(shape[start:end], np.int64))

    def _compute(self, node: ir.Node) -> None:
        types = self._inferred(node)
        sizes = [math.prod(dim.dim_value for dim in kind.tensor_type.shape.dim) for kind in types.values()]
        if max(sizes, default=0) > LARGEST:
            return
        inputs = [None if value is None else self.constants[name(value)] for value in node.inputs]
        try:
            computed = apply_operator(node, inputs, self._opset)
        except (IndexError, ValueError, RuntimeError, TypeError):
            return  # a table, of positions for instance, ends before this size: the model cannot run at it
        for value, array in zip(node.outputs, computed, strict=False):
            self._array(value, array)

    def _array(self, value: ir.Value, array: Array) -> None:
        self.constants[name(value)] = array
        kind = onnx.helper.make_tensor_type_proto(onnx.helper.np_dtype_to_tensor_dtype(array.dtype), array.shape)
        self._known(value, kind)

    def _infer(self, node: ir.Node) -> None:
        if node.domain == "":
            for value in node.outputs:
                if name(value) in (types := self._inferred(node)):
                    self._known(value, types[name(value)])
        elif node.op_type in _SAME_SHAPE and name(node.inputs[0]) in self._types:
            self._known(node.outputs[0], self._types[name(node.inputs[0])])

    def _inferred(self, node: ir.Node) -> Mapping[str, onnx.TypeProto]:
        given = {name(value) for value in node.inputs if value is not None}
        if not onnx.defs.has(node.op_type, self._opset, "") or not given <= set(self._types):
            return {}
        proto = ir.to_proto(node)
        assert isinstance(proto, onnx.NodeProto), "a node is written as one"
        small = {
            each: self.constants[each] for each in given if each in self.constants and self.constants[each].ndim < 2
        }
        try:
            return onnx.shape_inference.infer_node_outputs(
                onnx.defs.get_schema(node.op_type, self._opset, ""),
                proto,
                {each: self._types[each] for each in given},
                {each: onnx.numpy_helper.from_array(array, each) for each, array in small.items() if array.size <= 64},
                opset_imports=[onnx.helper.make_opsetid("", self._opset)],
            )
        except onnx.shape_inference.InferenceError:
            return {}  # operands that do not fit each other at this size


def _sizes(model: ir.Model, least: int) -> Iterator[int]:
    """Yield primes that divide no size and no small whole number of a model."""
    numbers: set[int] = set()
    for value in model.graph.initializers.values():
        tensor = value.const_value
        if tensor is not None:
            numbers |= {int(dim) for dim in tensor.shape.numpy()}
            if tensor.dtype.is_integer() and tensor.size <= 64:
                numbers |= {abs(int(number)) for number in tensor.numpy().flat}
    for value in model.graph.inputs:
        numbers |= {dim for dim in value.shape or () if isinstance(dim, int)}
    for prime in _PRIMES:
        if prime >= least and all(number == 0 or number % prime for number in numbers):
            yield prime
