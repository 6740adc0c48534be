"""Between which numbers a value lies, whatever the inputs are: what is proven of masks before they are folded.

``Where(padding, 0, -3.4e38)`` lies within finite bounds, so no row of scores can be masked to minus infinity whole;
``Range(0, n) >= 0`` is true for every ``n``. Both follow from the operators alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

LARGEST_READ = 2**22
"""Elements of a constant that is read for its least and greatest number."""
_DEPTH = 64
"""Operators that are looked through."""
_LARGEST = {ir.DataType.FLOAT16: 65504.0, ir.DataType.BFLOAT16: 3.3895e38, ir.DataType.DOUBLE: math.inf}
"""The largest number of types other than float32; no bound of a double is looked for beyond its own."""
_INTEGERS = (ir.DataType.INT64, ir.DataType.INT32, ir.DataType.INT8, ir.DataType.UINT8)
_MOVES = frozenset(
    {"Identity", "Expand", "Unsqueeze", "Squeeze", "Reshape", "Transpose", "Flatten", "Tile", "Slice", "Gather"}
    | {"GatherND", "GatherElements"}
)
"""Operators whose result holds numbers of their first input alone."""


@dataclass(frozen=True)
class Interval:
    """All of a tensor's elements lie in ``low .. high`` and none is NaN; booleans are 0 and 1.

    Attributes:
        low: The lower bound, perhaps minus infinity.
        high: The upper bound, perhaps infinity.
    """

    low: float
    high: float

    @property
    def finite(self) -> bool:
        """Whether no element can be infinite."""
        return math.isfinite(self.low) and math.isfinite(self.high)

    @property
    def only(self) -> float | None:
        """The number that every element is; None where they may differ."""
        return self.low if self.low == self.high else None

    def joined(self, other: Interval) -> Interval:
        """Return the bounds of what may lie in either."""
        return Interval(min(self.low, other.low), max(self.high, other.high))


_TRUTH = Interval(0.0, 1.0)


def interval(value: ir.Value | None) -> Interval | None:
    """Return the bounds of a value of any element type but strings; None where the operators say nothing."""
    return _Bounds().of(value, _DEPTH)


class _Bounds:
    """Bounds of values that were asked for, each worked out once."""

    def __init__(self) -> None:
        self._known: dict[ir.Value, Interval | None] = {}

    def of(self, value: ir.Value | None, depth: int) -> Interval | None:
        if value is None or depth == 0:
            return None
        if value not in self._known:
            self._known[value] = self._find(value, depth)
        return self._known[value]

    def _find(self, value: ir.Value, depth: int) -> Interval | None:
        tensor = None if value.is_graph_input() else ir.convenience.get_const_tensor(value)
        if tensor is not None:
            return _of_constant(tensor)
        node = value.producer()
        found = None if node is None or node.domain != "" else self._of_node(node, depth - 1)
        return _of_type(value.dtype) if found is None else _rounded(found, value.dtype)

    def _of_node(self, node: ir.Node, depth: int) -> Interval | None:
        operator = node.op_type
        if operator in _MOVES:
            return self.of(node.inputs[0], depth)
        if operator == "Shape":
            return Interval(0.0, float(np.iinfo(np.int64).max))
        if operator == "ConstantOfShape":
            given = node.attributes.get("value")
            return Interval(0.0, 0.0) if given is None else _of_constant(given.as_tensor())
        rule = _RULES.get(operator)
        if rule is None and operator not in ("Cast", "Where", "Range"):
            return None
        inputs = [self.of(value, depth) for value in node.inputs]
        if operator == "Cast":
            return _cast(inputs[0], ir.DataType(node.attributes.get_int("to", 0)))
        if operator in ("Where", "Range"):
            return (_where if operator == "Where" else _range)(inputs)
        known = [each for each in inputs if each is not None]
        return rule(known) if rule is not None and known and len(known) == len(inputs) else None


def _of_type(dtype: ir.DataType | None) -> Interval | None:
    if dtype == ir.DataType.BOOL:
        return _TRUTH
    if dtype is not None and dtype in _INTEGERS:
        limits = np.iinfo(dtype.numpy())
        return Interval(float(limits.min), float(limits.max))
    return None


def _of_constant(tensor: ir.TensorProtocol) -> Interval | None:
    if tensor.dtype.is_string() or not 0 < tensor.size <= LARGEST_READ:
        return None
    array = tensor.numpy()
    low, high = float(array.min()), float(array.max())
    return None if math.isnan(low) or math.isnan(high) else Interval(low, high)


def _rounded(found: Interval, dtype: ir.DataType | None) -> Interval | None:
    """Return bounds as the element type can hold them: what is too large for it becomes infinite."""
    if dtype is not None and not dtype.is_floating_point():
        limits = _of_type(dtype)
        wraps = limits is not None and (found.low < limits.low or found.high > limits.high)
        return limits if wraps else found
    limit = float(np.finfo(np.float32).max) if dtype is None else _LARGEST.get(dtype, float(np.finfo(np.float32).max))
    low, high = found.low, found.high
    return Interval(low if low >= -limit else -math.inf, high if high <= limit else math.inf)


def _cast(source: Interval | None, kind: ir.DataType) -> Interval | None:
    if source is None:
        return None
    if kind == ir.DataType.BOOL:
        certain = source.low > 0 or source.high < 0
        return Interval(float(certain), 0.0 if source.only == 0.0 else 1.0)
    if kind.is_floating_point():
        return source
    return Interval(math.trunc(source.low), math.trunc(source.high)) if source.finite else None


def _where(inputs: Sequence[Interval | None]) -> Interval | None:
    condition, yes, no = inputs
    if condition is not None and condition.only is not None:
        return yes if condition.only else no
    return None if yes is None or no is None else yes.joined(no)


def _range(inputs: Sequence[Interval | None]) -> Interval | None:
    start, limit, step = inputs
    if start is None or limit is None or step is None or step.low <= 0:
        return None
    return Interval(start.low, max(start.high, limit.high))


def _sum(inputs: Sequence[Interval]) -> Interval | None:
    low, high = sum(each.low for each in inputs), sum(each.high for each in inputs)
    mixed = any(each.low == -math.inf for each in inputs) and any(each.high == math.inf for each in inputs)
    return None if mixed else Interval(low, high)


def _negated(source: Interval) -> Interval:
    return Interval(-source.high, -source.low)


def _difference(inputs: Sequence[Interval]) -> Interval | None:
    return _sum((inputs[0], _negated(inputs[1])))


def _product(inputs: Sequence[Interval]) -> Interval | None:
    one, other = inputs
    if not one.finite or not other.finite:
        return None
    corners = [first * second for first in (one.low, one.high) for second in (other.low, other.high)]
    return Interval(min(corners), max(corners))


def _truth(certain: bool, impossible: bool) -> Interval:
    return Interval(float(certain), float(not impossible))


def _joined(inputs: Sequence[Interval]) -> Interval:
    return Interval(min(each.low for each in inputs), max(each.high for each in inputs))


def _abs(inputs: Sequence[Interval]) -> Interval:
    (source,) = inputs
    least = 0.0 if source.low <= 0 <= source.high else min(abs(source.low), abs(source.high))
    return Interval(least, max(abs(source.low), abs(source.high)))


_RULES: Mapping[str, Callable[[Sequence[Interval]], Interval | None]] = {
    "Add": _sum,
    "Sub": _difference,
    "Mul": _product,
    "Neg": lambda inputs: _negated(inputs[0]),
    "Abs": _abs,
    "Concat": _joined,
    "Min": lambda inputs: Interval(min(each.low for each in inputs), min(each.high for each in inputs)),
    "Max": lambda inputs: Interval(max(each.low for each in inputs), max(each.high for each in inputs)),
    "And": lambda inputs: Interval(min(each.low for each in inputs), min(each.high for each in inputs)),
    "Or": lambda inputs: Interval(max(each.low for each in inputs), max(each.high for each in inputs)),
    "Not": lambda inputs: Interval(1.0 - inputs[0].high, 1.0 - inputs[0].low),
    "GreaterOrEqual": lambda inputs: _truth(inputs[0].low >= inputs[1].high, inputs[0].high < inputs[1].low),
    "Greater": lambda inputs: _truth(inputs[0].low > inputs[1].high, inputs[0].high <= inputs[1].low),
    "LessOrEqual": lambda inputs: _truth(inputs[0].high <= inputs[1].low, inputs[0].low > inputs[1].high),
    "Less": lambda inputs: _truth(inputs[0].high < inputs[1].low, inputs[0].low >= inputs[1].high),
    "IsNaN": lambda _: Interval(0.0, 0.0),
}
