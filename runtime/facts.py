"""What a graph is and what it needs, read without running it: parameters, bytes, operators, multiply-accumulates."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import numpy as np
import onnx
import onnx.inliner
from onnx import GraphProto, ModelProto, NodeProto, TensorProto

from onnx_lathe.runtime import loading, tensors
from onnx_lathe.runtime.shapes import Shape, infer_types, is_complete, shape_of
from onnx_lathe.runtime.tensors import TensorSpec

_SECOND_FACTOR = {
    **dict.fromkeys(("Conv", "FusedConv", "ConvTranspose", "ConvInteger"), 1),
    **dict.fromkeys(("Gemm", "MatMul", "FusedMatMul", "MatMulInteger", "MatMulNBits"), 1),
    **dict.fromkeys(("QLinearConv", "QLinearMatMul", "QGemm"), 3),
}
"""Operators whose multiply-accumulates are counted, and which input is the weight or second factor."""

_NOT_COUNTED = {
    *("Attention", "MultiHeadAttention", "GroupQueryAttention", "QAttention"),
    *("LSTM", "GRU", "RNN", "Einsum", "DeformConv", "If", "Loop", "Scan"),
}
"""Operators that multiply much and are not counted: their number is unknown, not zero."""

_QUANTIZATION_INPUTS = {
    **dict.fromkeys(("QuantizeLinear", "DequantizeLinear"), (1, 2)),
    **dict.fromkeys(("MatMulInteger", "ConvInteger", "MatMulNBits"), (2, 3)),
    **dict.fromkeys(("QLinearMatMul", "QLinearConv"), (1, 2, 4, 5, 6, 7)),
    "QGemm": (1, 2, 4, 5, 7, 8),
}
"""Inputs that are scales and zero points: they describe parameters and are none."""

_NOT_WEIGHTS = {TensorProto.INT64, TensorProto.UINT64, TensorProto.BOOL, TensorProto.STRING}
"""Types of constants that are shapes, indices, masks and text."""

_VALUE_FIELDS = (*loading.VALUE_FIELDS, "external_data", "data_location")


@dataclass(frozen=True)
class NodeFacts:
    """What one node of the main graph needs.

    Attributes:
        name: Its name; its operator and place where it has none.
        op_type: Its operator.
        macs: Multiply-accumulates of a convolution or matrix product, 0 for others, None where unknown.
        weight_bytes: Bytes of the constants that it reads, as stored: INT8 behind a DequantizeLinear is INT8.
        activation_bytes: Bytes of the other tensors that it reads and writes, as stored; None where a shape is
            unknown. A QuantizeLinear or DequantizeLinear that belongs to a neighbour moves none of its own.
        dtype: In what it computes: the stored type of its operands where all come out of a DequantizeLinear,
            else the type of its first input; "" where unknown.
        summed: Products that each element of its result sums; 0 where it has no multiply-accumulates, None where
            unknown.
        reads: The activations that it reads, as stored, each once; the keys of `GraphFacts.activations`.
        writes: Those that it writes.
    """

    name: str
    op_type: str
    macs: int | None
    weight_bytes: int
    activation_bytes: int | None
    dtype: str
    summed: int | None
    reads: tuple[str, ...]
    writes: tuple[str, ...]


@dataclass(frozen=True)
class GraphFacts:
    """What a model needs.

    Attributes:
        parameters: Elements of its weights: constants of floats and of integers under 64 bits that are no
            scalars, at any depth, without the scales and zero points of quantization.
        file_bytes: Bytes of the file and of the weight files beside it.
        opset: Version of ONNX's own operators.
        operators: How often each operator type occurs, subgraphs included, the most frequent first.
        macs: Multiply-accumulates of one run at ``dims`` in convolutions and matrix products of the main graph;
            None where one of them is unknown.
        nodes: The nodes of the main graph, in order.
        weights: Bytes of the constants by element type, the most first; those of subgraphs included.
        activations: Bytes of each tensor that the nodes exchange, None where its shape is unknown.
        inputs: What a run needs.
        outputs: What it returns.
        dims: The sizes of symbolic dimensions that ``macs``, ``nodes`` and ``activations`` hold for.
    """

    parameters: int
    file_bytes: int
    opset: int
    operators: Mapping[str, int]
    macs: int | None
    nodes: tuple[NodeFacts, ...]
    weights: Mapping[str, int]
    activations: Mapping[str, int | None]
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    dims: Mapping[str, int]


def read_facts(path: Path, dims: Mapping[str, int] | None = None) -> GraphFacts:
    """Read the facts of a model; weights beside it are not loaded.

    Args:
        path: An ``.onnx`` file.
        dims: Sizes of symbolic dimensions; for the others 1 on the first axis and
            `onnx_lathe.runtime.tensors.OTHER_SIZE` elsewhere.

    Raises:
        ModelFileError: The file is not a sound model (`onnx_lathe.runtime.loading`).
        TensorError: ``dims`` names a dimension that the model does not have.
    """
    model = loading.read_graph(path)
    inputs, outputs = tensors.input_specs(model, str(path)), tensors.output_specs(model, str(path))
    sizes = tensors.bind_dims(inputs, dims, batch=1)
    stored_bytes = _file_bytes(path, model)
    _drop_large_values(path, model)
    if model.functions:
        model = onnx.inliner.inline_local_functions(model)
    parameters, weights = _parameters(model), _weights(model)
    values = _Values(str(path), model, sizes)
    nodes = tuple(values.facts(node, number) for number, node in enumerate(model.graph.node))
    macs = [node.macs for node in nodes]
    return GraphFacts(
        parameters=parameters,
        file_bytes=stored_bytes,
        opset=next((entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx")), 0),
        operators=dict(Counter(node.op_type for node in loading.nodes(model)).most_common()),
        macs=None if None in macs else sum(filter(None, macs)),
        nodes=nodes,
        weights=weights,
        activations={name: values.size(name) for node in nodes for name in (*node.reads, *node.writes)},
        inputs=inputs,
        outputs=outputs,
        dims=sizes,
    )


class _Values:
    """The tensors of a main graph."""

    def __init__(self, where: str, model: ModelProto, sizes: Mapping[str, int]) -> None:
        self._types = infer_types(where, model, sizes)
        self._constants = dict(loading.constants(model))
        self._stored = _stored(model.graph)

    def facts(self, node: NodeProto, number: int) -> NodeFacts:
        """Return the facts of one node, the ``number``-th of the graph."""
        read, written = self._moved(node, node.input), self._moved(node, node.output)
        moved = list(dict.fromkeys((*read, *written)))
        activations = [self.size(name) for name in moved if name not in self._constants]
        result, summed = self._products(node)
        return NodeFacts(
            name=node.name or f"{node.op_type}_{number}",
            op_type=node.op_type,
            macs=math.prod((*result, summed)) if is_complete(result) and summed is not None else None,
            weight_bytes=sum(self.size(name) or 0 for name in moved if name in self._constants),
            activation_bytes=None if None in activations else sum(filter(None, activations)),
            dtype=self._dtype(node),
            summed=summed,
            reads=tuple(name for name in read if name not in self._constants),
            writes=tuple(name for name in written if name not in self._constants),
        )

    def size(self, name: str) -> int | None:
        """Return the bytes of a tensor; None where its shape or type is unknown."""
        shape, kind = self._shape(name), self._type(name)
        return loading.byte_size(math.prod(shape), kind) if kind and is_complete(shape) else None

    def _products(self, node: NodeProto) -> tuple[Shape | None, int | None]:
        """Return the shape of what a convolution or matrix product computes, and the products that an element sums."""
        if node.op_type in _NOT_COUNTED:
            return None, None
        if node.op_type not in _SECOND_FACTOR:
            return (), 0
        first, second = (self._shape(node.input[place]) for place in (0, _SECOND_FACTOR[node.op_type]))
        result = self._shape(node.output[0])
        if node.op_type == "MatMulNBits":
            result, summed = first, (_attribute(node, "N"),)
        elif node.op_type == "ConvTranspose":  # each element of the input reaches one patch of each output channel
            result, summed = first, second and second[1:]
        elif "Conv" in node.op_type:  # the weight is [channels out, channels in / groups, kernel ...]
            summed = second and second[1:]
        else:
            summed = first and (first[-2 if _attribute(node, "transA") else -1],)
        return result, math.prod(summed) if is_complete(summed) else None

    def _moved(self, node: NodeProto, names: Iterable[str]) -> list[str]:
        """Return those of a node's inputs or outputs that it moves, each once, in the form in which they are stored."""
        if node.op_type in ("QuantizeLinear", "DequantizeLinear") and (
            node.input[0] in self._stored or node.output[0] in self._stored
        ):
            return []
        return list(dict.fromkeys(self._stored.get(name, name) for name in names if name))

    def _dtype(self, node: NodeProto) -> str:
        operands = [node.input[0], node.input[_SECOND_FACTOR.get(node.op_type, 0)]] if node.input else []
        if all(name in self._stored for name in operands):
            operands = [self._stored[name] for name in operands]
        kind = self._type(operands[0]) if operands else TensorProto.UNDEFINED
        return _dtype_name(kind)

    def _type(self, name: str) -> int:
        if name in self._constants:
            return self._constants[name].data_type
        return self._types[name].elem_type if name in self._types else TensorProto.UNDEFINED

    def _shape(self, name: str) -> Shape | None:
        if name in self._constants:
            return tuple(self._constants[name].dims)
        return shape_of(self._types.get(name))


def file_bytes(path: Path) -> int:
    """Return the bytes of a model file and of the weight files beside it."""
    return _file_bytes(path, loading.read_skeleton(path))


def _file_bytes(path: Path, model: ModelProto) -> int:
    return sum(file.stat().st_size for file in (path, *loading.weight_files(path, model)))


def _drop_large_values(path: Path, model: ModelProto) -> None:
    """Spare shape inference the large constants: it takes at most 2 GiB, and only small ones hold shapes."""
    for tensor in loading.tensors(model):
        if loading.nbytes(tensor) > loading.SMALL_TENSOR_BYTES:
            for field in _VALUE_FIELDS:
                tensor.ClearField(field)
        elif loading.is_external(tensor):
            loading.make_inline(path, tensor)


def _parameters(model: ModelProto) -> int:
    described: set[str] = set()
    packed: dict[str, int] = {}
    for node in loading.nodes(model):
        places = _QUANTIZATION_INPUTS.get(node.op_type, ())
        described.update(node.input[place] for place in places if place < len(node.input))
        if node.op_type == "MatMulNBits":
            packed[node.input[1]] = _attribute(node, "K") * _attribute(node, "N")
    return sum(
        packed.get(name, loading.elements(tensor))
        for name, tensor in loading.constants(model)
        if tensor.dims and tensor.data_type not in _NOT_WEIGHTS and name not in described
    )


def _weights(model: ModelProto) -> dict[str, int]:
    sizes: Counter[str] = Counter()
    for _, tensor in loading.constants(model):
        sizes[_dtype_name(tensor.data_type)] += loading.nbytes(tensor)
    return dict(sizes.most_common())


def _stored(graph: GraphProto) -> dict[str, str]:
    """Return the integers that are stored for each tensor that lies between a node and its (de)quantization alone."""
    readers = Counter(chain.from_iterable(node.input for node in graph.node))
    readers.update(value.name for value in graph.output)
    made = set(chain.from_iterable(node.output for node in graph.node))
    found: dict[str, str] = {}
    for node in graph.node:
        if node.op_type == "DequantizeLinear":
            found[node.output[0]] = node.input[0]
        elif node.op_type == "QuantizeLinear" and node.input[0] in made and readers[node.input[0]] == 1:
            found[node.input[0]] = node.output[0]
    return found


def _dtype_name(kind: int) -> str:
    """Return numpy's name of an ONNX type, "" for the undefined one."""
    return np.dtype(onnx.helper.tensor_dtype_to_np_dtype(kind)).name if kind else ""


def _attribute(node: NodeProto, name: str) -> int:
    """Return an integer attribute, 0 where it is not set."""
    return next((attribute.i for attribute in node.attribute if attribute.name == name), 0)
