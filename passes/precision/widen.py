"""From half precision to float32: what a CPU computes in anyway, and what integer kernels start from.

A CPU provider has next to no kernels for float16 and none for bfloat16: onnxruntime puts a Cast before and after
nearly every operator. Inputs and outputs keep their types: a Cast stands right behind each input and before each
output.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import ClassVar

import numpy as np
import onnx_ir as ir
from pydantic.dataclasses import dataclass

from onnx_lathe.passes import files
from onnx_lathe.passes.edit import Edit
from onnx_lathe.passes.oracle import Check, Tolerance, check_outputs
from onnx_lathe.passes.request import Score, SelfPlanned
from onnx_lathe.runtime.errors import UnsupportedModelError
from onnx_lathe.runtime.samples import Feeds, Samples

HALVES = frozenset({ir.DataType.FLOAT16, ir.DataType.BFLOAT16})
_TYPE_ATTRIBUTES = ("to", "dtype", "output_dtype", "stash_type")
"""Attributes that name an element type."""


@dataclass(frozen=True)
class Widen(SelfPlanned):
    """Compute in float32 what is in float16 or bfloat16; the weights take twice the space until they are quantized."""

    name: ClassVar[str] = "widen"
    tolerance: ClassVar[Tolerance] = Tolerance(
        "The same arithmetic in a wider type: the difference is what half precision rounded before, which the oracle "
        "allows for; a bfloat16 model, which no CPU runs, is compared with its wide form, run operator by operator.",
        relative=1e-4,
    )

    def plan(self, model: ir.Model, samples: Samples | None, score: Score | None) -> Edit:
        """Return the request itself.

        Raises:
            UnsupportedModelError: Nothing in the model is in half precision, or an input or output is a sequence of it.
        """
        del samples, score
        for value in (*model.graph.inputs, *model.graph.outputs):
            if value.dtype in HALVES and not isinstance(value.type, ir.TensorType):
                raise UnsupportedModelError(
                    f"{self.name}: {value.name!r}",
                    got=f"an input or output of type {value.type}",
                    expected="tensors where the model meets its caller: nothing casts a sequence",
                    mend="Export the model with one tensor for each.",
                )
        if not is_half(model):
            raise UnsupportedModelError(
                self.name,
                got="a model that computes nothing in float16 or bfloat16",
                expected="weights or values in half precision",
                mend="Leave the pass out.",
            )
        return self

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Widen weights, constants and types everywhere, and cast at the inputs and outputs of the graph."""
        if not is_half(model):
            return ir.passes.PassResult(model, False)
        borders = [value for value in (*model.graph.inputs, *model.graph.outputs) if value.dtype in HALVES]
        names = _Names(model)
        for value in _inner_values(model):
            assert value.type is not None, "its elements are known to be half"
            value.type = _float_like(value.type)
        for value in _inner_weights(model):
            assert value.const_value is not None, "a weight has a tensor"
            value.const_value, value.type = _widened(value.const_value), ir.TensorType(ir.DataType.FLOAT)
        for node in _nodes(model):
            if not _is_border(node):
                _widen_attributes(node)
        for value in borders:
            if value.is_graph_input() or value.is_initializer():
                _cast_behind(model.graph, value, names)
            elif not _is_border(value.producer()):
                _cast_before(model.graph, value, names)
        return ir.passes.PassResult(model, True)

    def check(self, before: Path, after: Path, feeds: Feeds) -> Sequence[Check]:
        """Compare with the model as it was; where onnxruntime cannot run that, with the same edit unoptimized."""
        types = {value.dtype for value in _inner_weights(files.load(before))}
        runs = ir.DataType.BFLOAT16 not in types
        return (check_outputs(before, after, feeds, self.tolerance, self.reference if runs else self._apply),)

    def _apply(self, model: ir.Model) -> None:
        self.call(model)


def is_half(model: ir.Model) -> bool:
    """Say whether weights, constants or values inside ``model`` are in half precision."""
    return (
        any(True for _ in _inner_weights(model))
        or any(True for _ in _inner_values(model))
        or any(_has_half_attribute(node) for node in _nodes(model) if not _is_border(node))
        or any(
            _is_computed_half(value) or _is_read_half(value) for value in (*model.graph.inputs, *model.graph.outputs)
        )
    )


def _is_computed_half(value: ir.Value) -> bool:
    producer = value.producer()
    return value.dtype in HALVES and producer is not None and not _is_border(producer)


def _is_read_half(value: ir.Value) -> bool:
    return value.dtype in HALVES and any(use.node.op_type != "Cast" for use in value.uses())


def _inner_values(model: ir.Model) -> Iterator[ir.Value]:
    """Yield the half values that are neither inputs nor outputs of the model."""
    for graph in (*model.graphs(), *(function.graph for function in model.functions.values())):
        for value in (*graph.inputs, *(output for node in graph for output in node.outputs)):
            is_border = graph is model.graph and (value.is_graph_input() or value.is_graph_output())
            if value.dtype in HALVES and not is_border:
                yield value


def _inner_weights(model: ir.Model) -> Iterator[ir.Value]:
    for graph in model.graphs():
        for value in graph.initializers.values():
            tensor = value.const_value
            is_border = value.is_graph_input() or value.is_graph_output()
            if tensor is not None and tensor.dtype in HALVES and not is_border:
                yield value


def _nodes(model: ir.Model) -> Iterator[ir.Node]:
    yield from model.graph.all_nodes()
    for function in model.functions.values():
        yield from function.all_nodes()


def _is_border(node: ir.Node | None) -> bool:
    """Say whether ``node`` casts to a half output of the model, and does nothing else."""
    if node is None or node.op_type != "Cast" or node.domain != "":
        return False
    value = node.outputs[0]
    return value.is_graph_output() and value.dtype in HALVES and not value.uses()


def _has_half_attribute(node: ir.Node) -> bool:
    return any(_half_tensor(each) is not None or _names_half(each) for each in node.attributes.values())


def _widen_attributes(node: ir.Node) -> None:
    for name, attribute in list(node.attributes.items()):
        tensor = _half_tensor(attribute)
        if tensor is not None:
            node.attributes[name] = ir.AttrTensor(name, _widened(tensor))
        elif _names_half(attribute):
            node.attributes[name] = ir.AttrInt64(name, ir.DataType.FLOAT)


def _half_tensor(attribute: ir.Attr) -> ir.TensorProtocol | None:
    if attribute.is_ref() or attribute.type != ir.AttributeType.TENSOR:
        return None
    tensor = attribute.as_tensor()
    return tensor if tensor.dtype in HALVES else None


def _names_half(attribute: ir.Attr) -> bool:
    if attribute.is_ref() or attribute.type != ir.AttributeType.INT or attribute.name not in _TYPE_ATTRIBUTES:
        return False
    return attribute.as_int() in HALVES


def _widened(tensor: ir.TensorProtocol) -> ir.TensorProtocol:
    to_float = partial(np.asarray, dtype=np.float32)
    return files.lazy(tensor.name or "", tensor, to_float, ir.DataType.FLOAT, tuple(tensor.shape.numpy()))


def _float_like(half: ir.TypeProtocol) -> ir.TypeProtocol:
    """Return a type of float32 that is built as one of halves is."""
    if isinstance(half, ir.SequenceType):
        return ir.SequenceType(_float_like(half.elem_type))
    if isinstance(half, ir.OptionalType):
        return ir.OptionalType(_float_like(half.elem_type))
    return type(half)(ir.DataType.FLOAT) if isinstance(half, ir.TensorType | ir.SparseTensorType) else half


class _Names:
    """Names that are not taken in a model."""

    def __init__(self, model: ir.Model) -> None:
        self._taken: set[str | None] = set()
        for graph in model.graphs():
            self._taken |= set(graph.initializers) | {value.name for value in graph.inputs}
            self._taken |= {item.name for node in graph for item in (node, *node.outputs)}

    def free(self, name: str) -> str:
        """Return ``name``, with a number behind it where it is taken, and take it."""
        numbered = (f"{name}_{number}" for number in itertools.count(1))
        found = next(each for each in itertools.chain([name], numbered) if each not in self._taken)
        self._taken.add(found)
        return found


def _cast_behind(graph: ir.Graph, value: ir.Value, names: _Names) -> None:
    """Let every node read ``value``, an input or a weight that is an output too, through a Cast to float32."""
    readers = list(value.uses())
    if not readers:
        return
    cast = _cast(value, names.free(f"{value.name}_wide"), ir.DataType.FLOAT, names)
    for node, index in readers:
        node.replace_input_with(index, cast.outputs[0])
    graph.insert_before(graph[0], cast)


def _cast_before(graph: ir.Graph, value: ir.Value, names: _Names) -> None:
    """Write ``value``, an output, by a Cast from what was computed."""
    name, half, index = value.name, value.dtype, graph.outputs.index(value)
    assert half is not None, "it is known to be half"
    value.name, value.type = names.free(f"{name}_wide"), ir.TensorType(ir.DataType.FLOAT)
    cast = _cast(value, name or "", half, names)
    graph.outputs[index] = cast.outputs[0]
    graph.append(cast)


def _cast(value: ir.Value, name: str, to: ir.DataType, names: _Names) -> ir.Node:
    result = ir.Value(name=name, type=ir.TensorType(to), shape=value.shape)
    return ir.Node("", "Cast", [value], [ir.AttrInt64("to", to)], outputs=[result], name=names.free(f"{name}_cast"))
