"""Shapes of every value of a graph, once the symbolic dimensions of its inputs have sizes."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, TypeGuard

import numpy as np
import onnx
import onnx.shape_inference
from onnx import GraphProto, ModelProto, NodeProto, TensorProto, TypeProto, ValueInfoProto

from onnx_lathe.runtime import loading
from onnx_lathe.runtime.errors import ModelFileError
from onnx_lathe.runtime.samples import Array

_SHAPE_ARITHMETIC = {
    *("Add", "Sub", "Mul", "Div", "Mod", "Neg", "Abs", "Min", "Max", "Floor", "Ceil", "ReduceProd", "ReduceSum"),
    *("Cast", "Concat", "Gather", "Identity", "Reshape", "Slice", "Split", "Squeeze", "Unsqueeze", "Where"),
    *("Constant", "Equal", "Greater", "GreaterOrEqual", "Less", "LessOrEqual", "Not", "And", "Or"),
}
"""Operators that shapes are computed with; none makes its result much larger than its inputs."""

Shape = tuple[int | None, ...]


def infer_types(where: str, model: ModelProto, sizes: Mapping[str, int]) -> dict[str, TypeProto.Tensor]:
    """Return element type and shape of each value of the main graph, as far as they can be known.

    onnx infers shapes but follows only part of the arithmetic that models do with them. Where some stay unknown, that
    arithmetic is computed here with onnx's reference operators, its results become constants, and inference is
    repeated until it finds no more.

    Args:
        where: The model, for messages.
        model: The graph; constants over `loading.SMALL_TENSOR_BYTES` need no values. It is changed: symbolic
            dimensions are bound, and shapes declared inside the graph that depend on others are forgotten.
        sizes: Sizes of symbolic dimensions by name.

    Raises:
        ModelFileError: onnx refuses the graph.
    """
    for value in (*model.graph.input, *model.graph.output, *model.graph.value_info):
        _bind(value, sizes)
    small = filter(_is_small, model.graph.initializer)
    known: dict[str, Array] = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in small}
    while True:
        try:
            model = onnx.shape_inference.infer_shapes(model, data_prop=True)
        except onnx.shape_inference.InferenceError as error:
            raise ModelFileError(
                where,
                got=f"a graph that onnx refuses: {error}",
                expected="a sound graph",
                mend="Export the model again.",
            ) from None
        types = _types(model.graph)
        found = {} if _is_finished(model.graph, types) else _evaluate(model, types, known)
        if not found:
            return types
        known |= found
        _make_constant(model.graph, found)


def shape_of(declared: TypeProto.Tensor | None) -> Shape | None:
    """Return a shape: None where not even the number of dimensions is known, None for an unknown dimension."""
    if declared is None or not declared.HasField("shape"):
        return None
    return tuple(dim.dim_value if dim.HasField("dim_value") else None for dim in declared.shape.dim)


def is_complete(shape: Shape | None) -> TypeGuard[tuple[int, ...]]:
    """Say whether every dimension is known."""
    return shape is not None and None not in shape


def _bind(value: ValueInfoProto, sizes: Mapping[str, int]) -> None:
    for dim in value.type.tensor_type.shape.dim:
        name = dim.dim_param
        if name:
            dim.Clear()
        if name in sizes:
            dim.dim_value = sizes[name]


def _types(graph: GraphProto) -> dict[str, TypeProto.Tensor]:
    types = {value.name: value.type.tensor_type for value in (*graph.input, *graph.value_info, *graph.output)}
    for tensor in graph.initializer:
        types[tensor.name] = onnx.helper.make_tensor_type_proto(tensor.data_type, list(tensor.dims)).tensor_type
    return types


def _is_finished(graph: GraphProto, types: Mapping[str, TypeProto.Tensor]) -> bool:
    return all(is_complete(shape_of(types.get(name))) for node in graph.node for name in node.output if name)


def _evaluate(model: ModelProto, types: Mapping[str, TypeProto.Tensor], known: Mapping[str, Array]) -> dict[str, Array]:
    """Return the small values that follow from ``known`` and from the shapes of ``types``, without ``known`` itself."""
    values = dict(known)
    for node in model.graph.node:
        if node.domain not in ("", "ai.onnx"):
            continue
        if node.op_type in ("Shape", "Size"):
            shape = shape_of(types.get(node.input[0]))
            results = _measure(node, shape) if is_complete(shape) else {}
        elif node.op_type in _SHAPE_ARITHMETIC and all(name in values for name in node.input if name):
            results = _run(model, node, {name: values[name] for name in node.input if name})
        else:
            continue
        values |= {name: value for name, value in results.items() if value.nbytes <= loading.SMALL_TENSOR_BYTES}
    return {name: value for name, value in values.items() if name not in known}


def _measure(node: NodeProto, shape: tuple[int, ...]) -> dict[str, Array]:
    """Return the result of a Shape or Size of a tensor of that shape."""
    if node.op_type == "Size":
        return {node.output[0]: np.asarray(math.prod(shape), np.int64)}
    bounds = {attribute.name: attribute.i for attribute in node.attribute}
    return {node.output[0]: np.asarray(shape[bounds.get("start") : bounds.get("end")], np.int64)}


def _run(model: ModelProto, node: NodeProto, inputs: Mapping[str, Array]) -> dict[str, Array]:
    """Run one node by onnx's reference implementation; a node that it cannot run yields nothing and stays unknown."""
    # Imported here because it takes half a second and most graphs are inferred without it.
    from onnx.reference import ReferenceEvaluator

    names = [name for name in node.output if name]
    graph = onnx.helper.make_graph(
        [node],
        "node",
        [onnx.helper.make_empty_tensor_value_info(name) for name in inputs],
        [onnx.helper.make_empty_tensor_value_info(name) for name in names],
    )
    single = onnx.helper.make_model(graph, opset_imports=model.opset_import, ir_version=model.ir_version)
    try:
        with np.errstate(all="ignore"):
            evaluator: Any = ReferenceEvaluator(single)
            results = evaluator.run(None, dict(inputs))
    except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError):
        return {}
    return {name: np.asarray(result) for name, result in zip(names, results, strict=True)}


def _make_constant(graph: GraphProto, found: Mapping[str, Array]) -> None:
    """Put the values in ``found`` into the graph in place of the nodes that compute them."""
    kept = [node for node in graph.node if not found.keys() >= set(filter(None, node.output))]
    computed = {name for node in graph.node for name in node.output} - {name for node in kept for name in node.output}
    del graph.node[:]
    graph.node.extend(kept)
    graph.initializer.extend(
        onnx.numpy_helper.from_array(value, name) for name, value in found.items() if name in computed
    )


def _is_small(tensor: TensorProto) -> bool:
    return tensor.data_type != TensorProto.STRING and loading.nbytes(tensor) <= loading.SMALL_TENSOR_BYTES
