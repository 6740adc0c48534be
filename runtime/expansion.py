"""Sizes that a graph asks for: nodes that make much of nothing, and dimensions whose product overflows.

A few bytes of constants can ask for terabytes (a Tile by a million, a ConstantOfShape of 2^40). What a graph spells out
by constants is bounded here before anything runs; what it computes from its inputs is bounded by the memory limit of
the process alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np
from onnx import AttributeProto, GraphProto, ModelProto, NodeProto, TensorProto, ValueInfoProto, numpy_helper

from onnx_lathe.runtime.errors import ModelFileError

MAX_ELEMENTS = 2**31
"""The most elements that constants may ask one tensor to have: 8 GiB of float32."""
MAX_NODES = 1_000_000
"""The most nodes that a graph may have once its functions are written out: a model of 2 billion has some 10,000."""

MAX_CALLS = 100
"""The deepest that functions may call each other."""

_NUMBERS = (TensorProto.INT64, TensorProto.INT32, TensorProto.FLOAT, TensorProto.DOUBLE)
_SMALL = 1024
"""Elements of the largest constant that is read: shapes, repeats and pads are short."""


def check_sizes(where: str, model: ModelProto) -> None:
    """Check the sizes that a graph declares and those that its constants ask for.

    Raises:
        ModelFileError: A declared shape has more than 2^63 elements, a node makes more than `MAX_ELEMENTS` of
            constants, or functions call themselves or come to more than `MAX_NODES`.
    """
    _check_calls(where, model)
    _check_graph(where, model.graph, {})
    for function in model.functions:
        _check_nodes(where, function.node, {})


def _check_calls(where: str, model: ModelProto) -> None:
    """Check what functions come to: thirty that each call the next one twice are a billion nodes."""
    bodies = {(function.domain, function.name, function.overload): function.node for function in model.functions}
    sizes: dict[tuple[str, str, str], int] = {}

    def size(nodes: Iterable[NodeProto], callers: tuple[tuple[str, str, str], ...]) -> int:
        total = 0
        if len(callers) > MAX_CALLS:
            raise _hostile(where, f"functions that call each other {len(callers)} deep", f"at most {MAX_CALLS}")
        for node in nodes:
            key = (node.domain, node.op_type, node.overload)
            if key in callers:
                raise _hostile(f"{where}: function {node.op_type!r}", "a function that calls itself", "none that does")
            if key in bodies and key not in sizes:
                sizes[key] = size(bodies[key], (*callers, key))
            total += sizes.get(key, 1)
            for item in node.attribute:
                for graph in (item.g,) if item.HasField("g") else item.graphs:
                    total += size(graph.node, callers)
        return total

    if bodies and (total := size(model.graph.node, ())) > MAX_NODES:
        raise _hostile(where, f"functions that come to {total} nodes", f"at most {MAX_NODES}")


def _hostile(where: str, got: str, expected: str) -> ModelFileError:
    mend = "The file is corrupt or hostile: get it again from a source that you trust."
    return ModelFileError(where, got=got, expected=expected, mend=mend)


def _check_graph(where: str, graph: GraphProto, outer: Mapping[str, list[int]]) -> None:
    for value in (*graph.input, *graph.output, *graph.value_info):
        _check_declared(where, value)
    _check_nodes(where, graph.node, {**outer, **dict(_integers((t.name, t) for t in graph.initializer))})


def _check_nodes(where: str, nodes: Sequence[NodeProto], known: dict[str, list[int]]) -> None:
    for node in nodes:
        if node.op_type == "Constant":
            values = ((node.output[0], item.t) for item in node.attribute if item.HasField("t"))
            known.update(_integers(values))
            known.update((node.output[0], found) for item in node.attribute if (found := _spelled(item)))
        count = _ASKS[node.op_type](node, known) if node.op_type in _ASKS and node.domain in ("", "ai.onnx") else 0
        if count > MAX_ELEMENTS:
            asked = f"constants that ask for {count} elements"
            limit = f"at most {MAX_ELEMENTS} in one tensor"
            raise _hostile(f"{where}: node {node.name!r} ({node.op_type})", asked, limit)
        for item in node.attribute:
            for graph in (item.g,) if item.HasField("g") else item.graphs:
                _check_graph(where, graph, known)


def _check_declared(where: str, value: ValueInfoProto) -> None:
    dims = [dim.dim_value for dim in value.type.tensor_type.shape.dim if dim.HasField("dim_value")]
    if any(dim < 0 for dim in dims) or math.prod(dims) >= 2**63:
        limit = "none negative, under 2^63 elements in all"
        raise _hostile(f"{where}: {value.name!r}", f"dimensions {dims[:8]}", limit)


def _integers(tensors: Iterable[tuple[str, TensorProto]]) -> Iterable[tuple[str, list[int]]]:
    """Yield name and values, cut to whole ones, of each short constant of numbers that lies in the graph."""
    for name, tensor in tensors:
        inline = tensor.data_location != TensorProto.EXTERNAL and len(tensor.dims) <= 1
        if inline and tensor.data_type in _NUMBERS and math.prod(tensor.dims) <= _SMALL:
            numbers: list[float] = np.ravel(numpy_helper.to_array(tensor)).tolist()
            yield name, [int(number) for number in numbers if math.isfinite(number)]


def _spelled(item: AttributeProto) -> list[int]:
    """Return the numbers, cut to whole ones, that an attribute of a Constant spells out."""
    numbers: Mapping[str, Iterable[float]] = {
        "value_int": (item.i,),
        "value_ints": item.ints,
        "value_float": (item.f,),
        "value_floats": item.floats,
    }
    return [int(number) for number in numbers.get(item.name, ()) if math.isfinite(number)]


def _resized(node: NodeProto, known: Mapping[str, list[int]]) -> int:
    """Return the sizes of a Resize, or its scales: the least that its result is larger than its input by."""
    return max((math.prod(map(abs, known.get(name, []))) for name in node.input[1:]), default=0)


def _product(index: int) -> Callable[[NodeProto, Mapping[str, list[int]]], int]:
    """Return what multiplies the numbers of a node's constant input: the size of its result, or a bound from below."""

    def ask(node: NodeProto, known: Mapping[str, list[int]]) -> int:
        numbers = known.get(node.input[index], []) if len(node.input) > index else []
        return math.prod(abs(number) for number in numbers if number != -1) if 0 not in numbers else 0

    return ask


def _shape(node: NodeProto, known: Mapping[str, list[int]]) -> int:
    del known
    return max((math.prod(item.ints) for item in node.attribute if item.name == "shape"), default=0)


def _pads(node: NodeProto, known: Mapping[str, list[int]]) -> int:
    pads = known.get(node.input[1], []) if len(node.input) > 1 else []
    return max((abs(pad) for pad in pads), default=0)


def _range(node: NodeProto, known: Mapping[str, list[int]]) -> int:
    start, limit, step = (known.get(name, [0])[0] if known.get(name) else None for name in node.input[:3])
    if start is None or limit is None or not step:
        return 0
    return max(0, -(-(limit - start) // step))


_ASKS: Mapping[str, Callable[[NodeProto, Mapping[str, list[int]]], int]] = {
    "ConstantOfShape": _product(0),
    "Expand": _product(1),
    "Tile": _product(1),
    "Reshape": _product(1),
    "OneHot": _product(1),
    "Pad": _pads,
    "Range": _range,
    "Resize": _resized,
    "Upsample": _resized,
    **dict.fromkeys(("HannWindow", "HammingWindow", "BlackmanWindow"), _product(0)),
    "RandomNormal": _shape,
    "RandomUniform": _shape,
}
"""How many elements a node makes at least, by what its constants say."""
