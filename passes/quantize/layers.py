"""The operators with a constant weight that integer kernels run, and why one stays in float."""

from __future__ import annotations

import difflib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from onnx_lathe.passes import files
from onnx_lathe.passes.edit import Refusal
from onnx_lathe.runtime.errors import PassSpecError, UnsupportedModelError
from onnx_lathe.runtime.samples import Array

_QUANTIZED_OPERATORS = frozenset(
    {
        *("QuantizeLinear", "DequantizeLinear", "DynamicQuantizeLinear", "MatMulInteger", "ConvInteger"),
        *("QGemm", "QAttention", "QMoE", "DynamicQuantizeMatMul", "DynamicQuantizeLSTM", "MatMulIntegerToFloat"),
        *("MatMulNBits", "GatherBlockQuantized"),
    }
)
"""Operators that only a quantized graph has, beside those whose names begin with QLinear."""
_WEIGHTED_OPERATORS = ("Conv", "ConvTranspose", "Gemm", "MatMul", "Einsum", "LSTM", "GRU", "RNN")
"""Operators that a reader of the report expects to see quantized, or refused with a reason."""
_LEAST_GROUP = 8
"""Input channels of a group below which a grouped Conv is faster in float (4: by half; depthwise is another kernel)."""
_LEAST_LONE_GROUP = 32
"""Input channels of a group below which a grouped Conv between float operators does not earn its rounding."""
_LEAST_LONE_INPUT = 8
"""Input channels below which a Conv between float operators does not earn it (measured: 3 take 1.3 times as long)."""

NOT_OBSERVED = "it is inside a subgraph, where values are not observed: quantize-dynamic reaches it, and needs none"
"""Why layers inside If, Loop and Scan are left alone by passes that need samples."""
_HALF = (ir.DataType.FLOAT16, ir.DataType.BFLOAT16)


@dataclass(frozen=True)
class Constant:
    """A value that is the same in every run.

    Attributes:
        tensor: The stored values, perhaps lazy.
        perm: The permutation of a Transpose between the stored values and their reader; None without one.
    """

    tensor: ir.TensorProtocol
    perm: tuple[int, ...] | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """The dimensions as the reader sees them."""
        stored = tuple(int(dim) for dim in self.tensor.shape.numpy())
        return stored if self.perm is None else tuple(stored[axis] for axis in self.perm)

    def read(self) -> Array:
        """Return the values as the reader sees them, mapped for this once where they lie in a file."""
        return self.arrange(files.view(self.tensor).numpy())

    def arrange(self, stored: Array) -> Array:
        """Return the stored values as the reader sees them."""
        return stored if self.perm is None else stored.transpose(self.perm)


@dataclass(frozen=True)
class Layer:
    """A Conv, Gemm or MatMul with a constant weight.

    Attributes:
        node: The operator.
        weight: Its weight.
        bias: Its own bias, for Conv and Gemm; None where it has none.
    """

    node: ir.Node
    weight: Constant
    bias: Constant | None

    @property
    def axis(self) -> int:
        """The axis of the weight that runs over output channels."""
        if self.node.op_type == "Conv":
            return 0
        return 0 if integer(self.node, "transB", 0) else 1

    @property
    def stored_axis(self) -> int:
        """The same axis of the weight as it is stored."""
        return self.axis if self.weight.perm is None else self.weight.perm[self.axis]

    @property
    def channels(self) -> int:
        """The number of output channels."""
        return self.weight.shape[self.axis]

    @property
    def lone_reason(self) -> str | None:
        """Why the layer is faster in float between float operators; None where integers pay anyhow."""
        if self.node.op_type != "Conv":
            return None
        inputs = self.weight.shape[1]
        if inputs >= (_LEAST_LONE_GROUP if self.is_grouped else _LEAST_LONE_INPUT):
            return None
        channels = f"{inputs} input channel{'s' if inputs > 1 else ''}{' a group' if self.is_grouped else ''}"
        kind = "is depthwise" if _is_depthwise(self) else f"has {channels}"
        return f"it {kind} and stands between float operators: float is faster"

    @property
    def is_grouped(self) -> bool:
        """Whether the channels of a Conv are in groups, each of which sees itself alone."""
        return integer(self.node, "group", 1) > 1

    @property
    def alpha(self) -> float:
        """The factor that a Gemm puts on the product."""
        return _real(self.node, "alpha", 1.0)

    def bias_values(self) -> NDArray[np.float32] | None:
        """Return the bias, ``float32 [channels]``, with the factor that a Gemm puts on it."""
        if self.bias is None:
            return None
        values = self.bias.arrange(self.bias.tensor.numpy()).reshape(-1) * np.float32(_real(self.node, "beta", 1.0))
        return np.broadcast_to(values, (self.channels,)).astype(np.float32)


def label(node: ir.Node) -> str:
    """Return what messages call a node."""
    return node.name or result_name(node)


def refusal(node: ir.Node, reason: str) -> Refusal:
    """Return the statement that ``node`` stays float for ``reason``."""
    return Refusal(label(node), node.op_type, reason)


def result_name(node: ir.Node) -> str:
    """Return the name of a node's first result, by which plans know the node: unlike its own name it is unique."""
    return node.outputs[0].name or ""


def only_reader(value: ir.Value) -> ir.Node | None:
    """Return the node that reads ``value`` where there is exactly one and the value is no output of the graph."""
    uses = list(value.uses())
    return uses[0].node if len(uses) == 1 and not value.is_graph_output() else None


def constant(value: ir.Value | None) -> Constant | None:
    """Return the constant behind ``value``: an initializer, a Constant node, or a Transpose of one; None without."""
    if value is None or value.is_graph_input():
        return None
    node = value.producer()
    if node is not None and node.op_type == "Transpose" and node.domain == "":
        source = constant(node.inputs[0])
        if source is None or source.perm is not None:
            return None
        rank = len(source.shape)
        perm = node.attributes.get("perm")
        return Constant(source.tensor, tuple(perm.as_ints()) if perm else tuple(reversed(range(rank))))
    tensor = ir.convenience.get_const_tensor(value)
    return None if tensor is None else Constant(tensor)


def integer(node: ir.Node, name: str, default: int) -> int:
    """Return an attribute of ``node`` that is one integer."""
    attribute = node.attributes.get(name)
    return default if attribute is None else attribute.as_int()


def read_layer(node: ir.Node) -> Layer | str:
    """Return ``node`` with its constants, or the reason why no integer kernel runs it well."""
    data, weight_value = node.inputs[0], node.inputs[1]
    if constant(data) is not None:
        return "its weight is the left operand" if node.op_type == "MatMul" else "its input is constant"
    weight = constant(weight_value)
    if weight is None:
        if weight_value is not None and weight_value.is_initializer():
            return "its weight is also an input of the graph"
        return "both of its operands are computed" if node.op_type == "MatMul" else "its weight is computed"
    if weight.tensor.dtype != ir.DataType.FLOAT:
        return f"its weight is {not_float(weight.tensor.dtype)}"
    if 0 in weight.shape:
        return "its weight is empty"
    bias_value = node.inputs[2] if len(node.inputs) > 2 else None
    layer = Layer(node, weight, constant(bias_value))
    if bias_value is not None and layer.bias is None:
        return "its bias is computed"
    reason = _conv_reason(layer) if node.op_type == "Conv" else _product_reason(layer)
    return reason or layer


def not_float(dtype: ir.DataType) -> str:
    """Return what is said of a constant of another type than float32, and how to mend it where that can be."""
    return f"{dtype.name}, not FLOAT{': run widen first' if dtype in _HALF else ''}"


def find_layers(
    model: ir.Model, operators: Sequence[str], exclude: Sequence[str], *, nested: bool = False
) -> tuple[list[Layer], list[Refusal]]:
    """Return the layers to quantize, in order, and what stays float with the reason.

    Args:
        model: The graph.
        operators: Types of operators to quantize.
        exclude: Names of nodes to leave alone.
        nested: Whether layers inside If, Loop and Scan are wanted too. A result whose name another graph has as well is
            left alone: plans know nodes by their results.

    Raises:
        PassSpecError: ``exclude`` names a node that is not there.
    """
    _check_exclude(model, exclude)
    layers: list[Layer] = []
    refused: list[Refusal] = []
    names = Counter(result_name(node) for node, _ in _nodes(model))
    for node, place in _nodes(model):
        if node.op_type not in _WEIGHTED_OPERATORS or node.domain != "":
            continue
        if place == "function":
            found: Layer | str = "it is inside a function: run cleanup first, which puts its nodes in its place"
        elif place == "subgraph" and not nested:
            found = NOT_OBSERVED
        elif place == "subgraph" and names[result_name(node)] > 1:
            found = "another subgraph has a result of the same name"
        elif node.op_type not in ("Conv", "Gemm", "MatMul"):
            found = "there is no integer kernel for it"
        elif node.op_type not in operators:
            found = "its type is left out by the option operators"
        elif label(node) in exclude:
            found = "it is left out by the option exclude"
        else:
            found = read_layer(node)
        if isinstance(found, str):
            refused.append(refusal(node, found))
        else:
            layers.append(found)
    return layers, refused


def is_quantized(model: ir.Model) -> bool:
    """Say whether any operator of ``model`` is one that only a quantized graph has."""
    operators = {node.op_type for node, _ in _nodes(model)}
    return not operators.isdisjoint(_QUANTIZED_OPERATORS) or any(name.startswith("QLinear") for name in operators)


def check_quantizable(model: ir.Model, name: str, least_opset: int) -> None:
    """Raise UnsupportedModelError where ``model`` is quantized already or its opset is under ``least_opset``.

    Args:
        model: The graph.
        name: The pass, for messages.
        least_opset: The first opset with the operators that the pass inserts.
    """
    if is_quantized(model):
        raise UnsupportedModelError(
            name,
            got="a model that is already quantized",
            expected="a float model",
            mend="Give the model from before quantization.",
        )
    opset = model.opset_imports.get("", 0)
    if opset < least_opset:
        raise UnsupportedModelError(
            name,
            got=f"opset {opset}",
            expected=f"opset {least_opset} or later",
            mend="Export the model again with opset_version=20, or convert it with onnx.version_converter.",
        )


def nothing_to_quantize(name: str, refused: Sequence[Refusal]) -> UnsupportedModelError:
    """Return the error for a model of which every operator stays float."""
    reasons = Counter(f"{refusal.operator}: {refusal.reason}" for refusal in refused)
    listed = "; ".join(f"{count} x {reason}" for reason, count in reasons.most_common())
    return UnsupportedModelError(
        name,
        got=f"no operator to quantize ({listed or 'no Conv, Gemm or MatMul at all'})",
        expected="a Conv, Gemm or MatMul with a constant weight that an integer kernel runs",
        mend="Run cleanup first where a constant is computed; otherwise this model stays float.",
    )


def not_finite(layer: Layer) -> UnsupportedModelError:
    """Return the error for a weight with NaN or infinity in it."""
    return UnsupportedModelError(
        f"weight {layer.weight.tensor.name!r}",
        got="NaN or infinity in it",
        expected="finite values",
        mend="Check the training that made it.",
    )


def _nodes(model: ir.Model) -> Iterator[tuple[ir.Node, Literal["main", "subgraph", "function"]]]:
    """Yield every node, and where it is."""
    for node in model.graph.all_nodes():
        yield node, "main" if node.graph is model.graph else "subgraph"
    for function in model.functions.values():
        for node in function.all_nodes():
            yield node, "function"


def _check_exclude(model: ir.Model, exclude: Sequence[str]) -> None:
    names = [label(node) for node in model.graph.all_nodes()]
    for name in exclude:
        if name not in names:
            near = difflib.get_close_matches(name, names, n=1)
            raise PassSpecError(
                "option exclude",
                got=repr(name),
                expected="the name of a node of the graph",
                mend=f"Did you mean {near[0]!r}?" if near else "`lathe inspect` shows the nodes.",
            )


def _conv_reason(layer: Layer) -> str | None:
    inputs = layer.weight.shape[1]
    if layer.is_grouped and inputs < _LEAST_GROUP and not _is_depthwise(layer):
        return f"its groups are small ({inputs} channels): float is faster"
    if any(use.node.op_type == "BatchNormalization" for use in layer.node.outputs[0].uses()):
        return "a BatchNormalization follows: run cleanup first, which folds it"
    return None


def _is_depthwise(layer: Layer) -> bool:
    return layer.is_grouped and layer.weight.shape[1] == 1


def _product_reason(layer: Layer) -> str | None:
    if len(layer.weight.shape) != 2:
        return f"its weight has {len(layer.weight.shape)} dimensions, not 2"
    if layer.node.op_type == "MatMul":
        return None
    if integer(layer.node, "transA", 0):
        return "its input is transposed"
    if layer.alpha == 0.0:
        return "its factor alpha is 0"
    if layer.bias is not None and layer.bias.shape not in ((layer.channels,), (1, layer.channels), (), (1,), (1, 1)):
        return f"its bias has the shape {list(layer.bias.shape)}, not one value a channel"
    return None


def _real(node: ir.Node, name: str, default: float) -> float:
    attribute = node.attributes.get(name)
    return default if attribute is None else attribute.as_float()
