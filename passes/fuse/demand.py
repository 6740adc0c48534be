"""Which positions of each value are read: what a selection at the end asks of everything before it, node by node."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import cast

import numpy as np
import onnx_ir as ir

LAST = int(np.iinfo(np.int64).max)
"""The end of a Slice that reaches to the end of its axis."""
_LAST_AT_LEAST = int(np.iinfo(np.int32).max)
"""From here on exporters mean `LAST`."""


@dataclass(frozen=True)
class Selection:
    """Some consecutive positions along an axis.

    Attributes:
        axis: Counted from the front.
        start: The first one; below 0 counted from the end.
        count: How many.
    """

    axis: int
    start: int
    count: int

    @property
    def stop(self) -> int:
        """The position behind the last one, as a Slice takes it."""
        return LAST if self.start + self.count == 0 else self.start + self.count


Asked = Selection | None
"""What is asked of a value; None for all of it."""

_SOFTMAX_OVER_ONE_AXIS = 13
"""Softmax of older operator sets runs over all axes from its ``axis`` on."""
_ARITHMETIC = (
    "Add",
    "Sub",
    "Mul",
    "Div",
    "Pow",
    "Max",
    "Min",
    "Sqrt",
    "Reciprocal",
    "Neg",
    "Abs",
    "Exp",
    "Log",
    "Sin",
    "Cos",
    "Cast",
    "Clip",
    "Identity",
)
_LOGIC = ("Where", "And", "Or", "Not", "Equal", "Less", "LessOrEqual", "Greater", "GreaterOrEqual", "IsNaN", "IsInf")
_ACTIVATIONS = (
    "Relu",
    "LeakyRelu",
    "Elu",
    "Gelu",
    "FastGelu",
    "QuickGelu",
    "Erf",
    "Tanh",
    "Sigmoid",
    "HardSigmoid",
    "HardSwish",
    "Mish",
    "Softplus",
    "Swish",
)
ELEMENTWISE = frozenset((*_ARITHMETIC, *_LOGIC, *_ACTIVATIONS))
"""Operators whose every result depends on the elements at its own place, operands broadcast."""
NORMALIZATIONS = frozenset({"LayerNormalization", "RMSNormalization", "SimplifiedLayerNormalization"})
"""Operators that normalize the last axes, from the attribute ``axis`` on."""


def selected(node: ir.Node) -> Asked:
    """Return what of its first input a Gather or Slice reads, where that is known and consecutive."""
    data = node.inputs[0] if node.inputs else None
    if node.domain != "" or data is None or data.shape is None:
        return None
    rank = len(data.shape)
    if node.op_type == "Gather":
        positions = _whole_numbers(node.inputs[1])
        if positions is None or positions.size != 1:
            return None
        return Selection(_attribute(node, "axis", 0) % rank, int(positions.reshape(())), 1)
    if node.op_type == "Slice":
        return _sliced(node, data.shape)
    return None


def _sliced(node: ir.Node, shape: ir.Shape) -> Asked:
    given = [_whole_numbers(value) for value in node.inputs[1:]]
    if len(given) < 3 or any(each is None or each.size != 1 for each in given):
        return None
    start, stop, axis, *step = (int(each.reshape(())) for each in given if each is not None)
    axis %= len(shape)
    size = shape[axis]
    if any(each != 1 for each in step):
        return None
    if start < 0 and (stop >= _LAST_AT_LEAST or stop == size):
        known = not isinstance(size, int) or -start <= size
        return Selection(axis, start, -start) if known else None
    if isinstance(size, int) and 0 <= start < stop <= size:
        return Selection(axis, start, stop - start)
    return None


def asked_of_inputs(node: ir.Node, asked: Selection) -> Sequence[Asked] | None:
    """Return what a node needs of each input where only ``asked`` of its one output is read; None where all of them."""
    if node.op_type in ELEMENTWISE and node.domain in ("", "com.microsoft"):
        return _broadcast(node, asked)
    rule = _RULES.get(node.op_type)
    return rule(node, asked) if rule is not None and (node.domain == "" or node.op_type in NORMALIZATIONS) else None


def _broadcast(node: ir.Node, asked: Selection) -> Sequence[Asked] | None:
    return _aligned(node.inputs, node.outputs[0], asked)


def _aligned(inputs: Sequence[ir.Value | None], output: ir.Value, asked: Selection) -> Sequence[Asked] | None:
    """Return what is asked of operands that are broadcast to ``output``, aligned at their last axes."""
    if output.shape is None:
        return None
    found: list[Asked] = []
    for value in inputs:
        if value is None:
            found.append(None)
            continue
        if value.shape is None:
            return None
        axis = asked.axis - (len(output.shape) - len(value.shape))
        if axis < 0 or value.shape[axis] == 1:
            found.append(None)
        elif value.shape[axis] == output.shape[asked.axis] and _known(value.shape[axis]):
            found.append(replace(asked, axis=axis))
        else:
            return None
    return found


def _normalized(node: ir.Node, asked: Selection) -> Sequence[Asked] | None:
    shape = node.outputs[0].shape
    if shape is None or asked.axis >= _attribute(node, "axis", -1) % len(shape):
        return None
    return [asked, *[None] * (len(node.inputs) - 1)]


def _softmax(node: ir.Node, asked: Selection) -> Sequence[Asked] | None:
    shape = node.outputs[0].shape
    if shape is None:
        return None
    if node.graph is None or node.graph.opset_imports.get("", 1) < _SOFTMAX_OVER_ONE_AXIS:
        return [asked] if asked.axis < _attribute(node, "axis", 1) % len(shape) else None
    return [asked] if asked.axis != _attribute(node, "axis", -1) % len(shape) else None


def _product(node: ir.Node, asked: Selection) -> Sequence[Asked] | None:
    left, right = node.inputs
    shape = node.outputs[0].shape
    if left is None or right is None or shape is None or left.shape is None or right.shape is None:
        return None
    if min(len(left.shape), len(right.shape)) < 2:
        return None
    rows = len(shape) - 2
    if asked.axis == rows:
        return [replace(asked, axis=len(left.shape) - 2), None]
    return _aligned(node.inputs, node.outputs[0], asked) if asked.axis < rows else None


def _gemm(node: ir.Node, asked: Selection) -> Sequence[Asked] | None:
    if asked.axis != 0 or _attribute(node, "transA", 0):
        return None
    bias = _aligned(node.inputs[2:], node.outputs[0], asked)
    return None if bias is None else [asked, None, *bias]


def _transposed(node: ir.Node, asked: Selection) -> Sequence[Asked] | None:
    order = node.attributes.get("perm")
    return None if order is None else [replace(asked, axis=order.as_ints()[asked.axis])]


def _reshaped(node: ir.Node, asked: Selection) -> Sequence[Asked] | None:
    """Return what is asked before a Reshape to a known shape that leaves the axis whole.

    It does where it and all axes before it stay, or where as many elements follow it as before.
    """
    before, after = (None if value is None else value.shape for value in (node.inputs[0], node.outputs[0]))
    sizes, axis = _whole_numbers(node.inputs[1]), asked.axis
    if before is None or after is None or sizes is None:
        return None
    if not _known(after[axis]):
        return None
    if all(_known(dim) for dim in after[: axis + 1]) and list(before[: axis + 1]) == list(after[: axis + 1]):
        return [asked, None]
    following = _elements(after[axis + 1 :])
    for old in range(len(before)):
        copied = old != axis and sizes[axis] == 0
        whole = before[old] == after[axis] and _elements(before[old + 1 :]) == following
        if following is not None and whole and not copied:
            return [replace(asked, axis=old), None]
    return None


def _unsqueezed(node: ir.Node, asked: Selection) -> Sequence[Asked] | None:
    axes, shape = _axes(node), node.outputs[0].shape
    if axes is None or shape is None:
        return None
    new = {axis % len(shape) for axis in axes}
    if asked.axis in new:
        return None
    return [replace(asked, axis=asked.axis - sum(axis < asked.axis for axis in new)), *[None] * (len(node.inputs) - 1)]


def _split(node: ir.Node, asked: Selection) -> Sequence[Asked] | None:
    return [asked, *[None] * (len(node.inputs) - 1)] if asked.axis != _own_axis(node) else None


def _concatenated(node: ir.Node, asked: Selection) -> Sequence[Asked] | None:
    if asked.axis == _own_axis(node):
        return None
    found = _broadcast(node, asked)
    return None if found is None or None in found else found


def _sliced_elsewhere(node: ir.Node, asked: Selection) -> Sequence[Asked] | None:
    axes = _whole_numbers(node.inputs[3]) if len(node.inputs) > 3 else None
    shape = node.outputs[0].shape
    if axes is None or shape is None or asked.axis in {int(axis) % len(shape) for axis in axes.reshape(-1)}:
        return None
    return [asked, *[None] * (len(node.inputs) - 1)]


def _reduced(node: ir.Node, asked: Selection) -> Sequence[Asked] | None:
    axes, shape = _axes(node), node.outputs[0].shape
    if axes is None or shape is None or not _attribute(node, "keepdims", 1):
        return None
    if asked.axis in {axis % len(shape) for axis in axes}:
        return None
    return [asked, *[None] * (len(node.inputs) - 1)]


_RULES: Mapping[str, Callable[[ir.Node, Selection], Sequence[Asked] | None]] = {
    **dict.fromkeys(NORMALIZATIONS, _normalized),
    "Softmax": _softmax,
    "MatMul": _product,
    "Gemm": _gemm,
    "Transpose": _transposed,
    "Reshape": _reshaped,
    "Unsqueeze": _unsqueezed,
    "Split": _split,
    "Concat": _concatenated,
    "Slice": _sliced_elsewhere,
    "ReduceMean": _reduced,
    "ReduceSum": _reduced,
}


def _known(dim: int | ir.SymbolicDim) -> bool:
    """Say whether a dimension has a size or a name: two without a name are not known to be the same."""
    return isinstance(dim, int) or dim.value is not None


def _elements(dims: Sequence[int | ir.SymbolicDim]) -> int | None:
    return math.prod(cast("Sequence[int]", dims)) if all(isinstance(dim, int) for dim in dims) else None


def _axes(node: ir.Node) -> list[int] | None:
    if len(node.inputs) > 1:
        values = _whole_numbers(node.inputs[1])
        return None if values is None else [int(value) for value in values.reshape(-1)]
    return list(node.attributes["axes"].as_ints()) if "axes" in node.attributes else None


def _own_axis(node: ir.Node) -> int:
    shape = node.outputs[0].shape
    return _attribute(node, "axis", 0) % (1 if shape is None else len(shape))


def _attribute(node: ir.Node, name: str, default: int) -> int:
    return node.attributes[name].as_int() if name in node.attributes else default


def _whole_numbers(value: ir.Value | None) -> np.ndarray | None:
    tensor = None if value is None else value.const_value
    return None if tensor is None or not tensor.dtype.is_integer() else tensor.numpy()
