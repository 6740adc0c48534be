"""The oracle of single operators: each integer operator, as onnxruntime runs it, within one step of numpy.

The edited model runs once, fused, with the operands and results of its integer operators as further outputs; numpy then
computes each result from the very operands that onnxruntime had, so that errors do not add up over the graph.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx_ir as ir

from onnx_lathe.passes import files
from onnx_lathe.passes.oracle import Check
from onnx_lathe.passes.quantize import numeric, params
from onnx_lathe.passes.quantize.check_alone import run_alone
from onnx_lathe.passes.quantize.layers import constant, integer, label, only_reader
from onnx_lathe.passes.quantize.numeric import Wide
from onnx_lathe.passes.taps import expose
from onnx_lathe.runtime.samples import Array, Feeds
from onnx_lathe.runtime.session import Session

MOST_PARTS = 8
"""Operators that are checked where the model is too large to be run whole."""
PART_ROWS = 4
"""Rows, and pixels along each side, of the random inputs of a lone operator."""
MOST_OUTPUTS = 512
"""Of more outputs of a dynamic product about as many are compared, evenly spread."""
MOST_OPERATORS = 32
"""Of more integer operators, about as many are checked, evenly spread."""


def check_operators(after: Path, feeds: Feeds) -> Sequence[Check]:
    """Run the quantized model at ``after`` and compare its integer operators, where there are any, with numpy.

    A step is one level of a result that is rounded, and for a float result the effect of one level of the input.
    """
    model = files.load(after)
    cases = list(_cases(model.graph))
    chosen = cases[:: max(1, -(-len(cases) // MOST_OPERATORS))]
    read = _read(model, [value for case in chosen for value in (*case.sources, case.result)], feeds)
    return _worst([(case, case.steps(read)) for case in chosen], len(cases))


def check_parts(after: Path) -> Sequence[Check]:
    """Run some integer operators of the quantized model at ``after`` alone, on random inputs, against numpy."""
    model = files.load(after)
    cases = [case for case in _cases(model.graph) if all(_shape(case.node, value) for value in case.sources)]
    chosen = cases[:: max(1, -(-len(cases) // MOST_PARTS))]
    return _worst([(case, case.steps(_on_random_operands(model, case))) for case in chosen], len(cases))


def _worst(found: Sequence[tuple[_Case, float]], count: int) -> Sequence[Check]:
    if not found:
        return ()
    worst, where = 0.0, "every operator"
    for case, steps in found:
        distance = math.inf if math.isnan(steps) else steps
        if distance > worst:
            worst, where = distance, label(case.node)
    scope = f"{len(found)} of {count} integer operators"
    return (Check("integer operators against numpy", scope, worst, 1.0, "steps", where),)


def _on_random_operands(model: ir.Model, case: _Case) -> dict[str, Array]:
    """Return random operands of an operator and what onnxruntime makes of them, by name."""
    rng = np.random.default_rng(0)
    feeds: dict[str, Array] = {}
    for value in case.sources:
        shape = _shape(case.node, value)
        assert shape is not None, "operators whose shapes are not known are left out"
        if value.dtype == ir.DataType.UINT8:
            feeds[value.name or ""] = rng.integers(0, 256, shape, np.uint8)
        else:
            feeds[value.name or ""] = rng.standard_normal(shape, np.float32)
    graph = ir.convenience.extract(model.graph, case.sources, [case.result])
    for value in (*graph.inputs, *graph.outputs):
        value.shape = None
    for value, tensor in zip(graph.inputs, feeds.values(), strict=True):
        value.type, value.shape = ir.TensorType(ir.DataType.from_numpy(tensor.dtype)), ir.Shape(tensor.shape)
    return feeds | run_alone(graph, model, feeds)


def _shape(node: ir.Node, value: ir.Value) -> tuple[int, ...] | None:
    """Return dimensions that an operand of ``node`` may have, small where they are free; None where none are known."""
    weight = _weight_shape(node)
    rank = None if value.shape is None else len(value.shape)
    if weight is None:
        if value.shape is None:
            return None
        return tuple(dim if isinstance(dim, int) else PART_ROWS for dim in value.shape)
    if node.op_type in ("Conv", "ConvInteger"):
        dilations = _integers(node, "dilations", [1] * (len(weight) - 2))
        space = [(k - 1) * d + PART_ROWS for k, d in zip(weight[2:], dilations, strict=True)]
        return (1, weight[1] * integer(node, "group", 1), *space)
    features = weight[1 if integer(node, "transB", 0) else 0]
    return (*[1] * ((rank or 2) - 2), PART_ROWS, features)


def _read(model: ir.Model, values: Sequence[ir.Value], feeds: Feeds) -> dict[str, Array]:
    """Run ``model`` once and return what ``values`` are, by name."""
    given = {name: np.asarray(array) for name, array in feeds.items()}
    if not values:
        return given
    names = dict.fromkeys(value.name or "" for value in values if value.name not in given)
    with tempfile.TemporaryDirectory(prefix="lathe-check-") as folder:
        target = Path(folder) / "model.onnx"
        files.save(expose(model, list(names)), target)
        return given | Session(target).run(feeds)


@dataclass(frozen=True)
class _Operand:
    """A DequantizeLinear in front of an operator."""

    levels: ir.Value
    scale: Array
    zero_point: Array
    axis: int

    def read(self, read: Mapping[str, Array]) -> Wide:
        """Return the operand as real numbers."""
        stored = self.levels.const_value
        levels = read[self.levels.name or ""] if stored is None else stored.numpy()
        scale = params.along(self.scale, self.axis, levels.ndim)
        return numeric.dequantize(levels, scale, params.along(self.zero_point, self.axis, levels.ndim))


@dataclass(frozen=True)
class _StaticCase:
    """An operator whose operands are rounded, with what the same kernel does after it: bias, activation, rounding."""

    node: ir.Node
    operands: Sequence[_Operand]
    tail: Sequence[ir.Node]

    @property
    def sources(self) -> Sequence[ir.Value]:
        """The operands that are not constant, as integers."""
        return [operand.levels for operand in self.operands if operand.levels.const_value is None]

    @property
    def result(self) -> ir.Value:
        """What the operator's kernel writes."""
        return (self.tail[-1] if self.tail else self.node).outputs[0]

    def steps(self, read: Mapping[str, Array]) -> float:
        """Return the largest difference from numpy."""
        x, *rest = (operand.read(read) for operand in self.operands)
        want = _compute(self.node, x, rest)
        got = read[self.result.name or ""]
        for node in self.tail:
            if node.op_type == "QuantizeLinear":
                levels = numeric.quantize(want, _constant(node.inputs[1]), _constant(node.inputs[2]))
                return float(np.abs(levels - got.astype(np.int64)).max(initial=0))
            want = _follow(node, want, read)
        return _largest_ratio(got - want, float(self.operands[0].scale) * _effect(self.node, rest[0]))


@dataclass(frozen=True)
class _DynamicCase:
    """A MatMulInteger or ConvInteger between a DynamicQuantizeLinear and the product with the scales."""

    node: ir.Node
    source: ir.Value
    weight_scale: ir.Value
    result: ir.Value

    @property
    def sources(self) -> Sequence[ir.Value]:
        """The float input."""
        return [self.source]

    def steps(self, read: Mapping[str, Array]) -> float:
        """Return the largest difference from numpy."""
        levels, scale, zero_point = numeric.dynamic_quantize(read[self.source.name or ""])
        stored, scales, got = _constant(self.node.inputs[1]), _constant(self.weight_scale), read[self.result.name or ""]
        if self.node.op_type == "MatMulInteger":
            outputs = _some(stored.shape[1])
            stored, got = stored[:, outputs], got[..., outputs]
            scales = scales.reshape(-1)[outputs] if scales.size > 1 else scales
        weight = stored.astype(np.float64) - float(_constant(self.node.inputs[3]))
        factors = float(scale) * scales.astype(np.float64)
        want = _compute(self.node, levels.astype(np.float64) - float(zero_point), [weight]) * factors
        return _largest_ratio(got - want, factors * _effect(self.node, weight))


_Case = _StaticCase | _DynamicCase
_WITHOUT_WEIGHT = ("Add", "GlobalAveragePool")


def _cases(graph: ir.Graph) -> Iterator[_Case]:
    for node in graph:
        if node.op_type in ("MatMulInteger", "ConvInteger"):
            yield _dynamic_case(node)
        elif node.op_type in ("Conv", "Gemm", "MatMul", "Add", "GlobalAveragePool"):
            operands = [_operand(value) for value in node.inputs if value is not None]
            rounded = [operand for operand in operands if operand is not None]
            # The bias of a MatMul is the one rounded operand of an Add, which belongs to the MatMul.
            tail = _tail(node)
            # A sum or a pooling whose result is not rounded reads what a neighbour rounded, and computes in float.
            if len(rounded) == len(operands) and (tail or node.op_type not in _WITHOUT_WEIGHT):
                yield _StaticCase(node, rounded, tail)


def _operand(value: ir.Value | None) -> _Operand | None:
    node = None if value is None else value.producer()
    if node is None or node.op_type != "DequantizeLinear":
        return None
    levels, scale, zero_point = node.inputs
    assert levels is not None, "a DequantizeLinear has an input"
    return _Operand(levels, _constant(scale), _constant(zero_point), integer(node, "axis", 1))


def _tail(node: ir.Node) -> list[ir.Node]:
    """Return what the kernel of ``node`` does after it; an activation only where the result is rounded."""
    tail: list[ir.Node] = []
    reader = only_reader(node.outputs[0])
    if reader is not None and node.op_type == "MatMul" and _bias(reader) is not None:
        tail.append(reader)
        reader = only_reader(reader.outputs[0])
    activation = [reader] if reader is not None and reader.op_type in ("Relu", "Clip") else []
    if activation:
        reader = only_reader(activation[0].outputs[0])
    if reader is not None and reader.op_type == "QuantizeLinear":
        tail += [*activation, reader]
    return tail


def _bias(node: ir.Node) -> _Operand | None:
    """Return the constant that ``node`` adds behind a DequantizeLinear, if it does."""
    operands = [_operand(value) for value in node.inputs] if node.op_type == "Add" else []
    return next((operand for operand in operands if operand and operand.levels.const_value is not None), None)


def _follow(node: ir.Node, x: Wide, read: Mapping[str, Array]) -> Wide:
    """Return what a bias or an activation makes of ``x``."""
    if node.op_type == "Relu":
        return np.maximum(x, 0.0)
    if node.op_type == "Clip":
        low, high = (None if value is None else _constant(value) for value in (*node.inputs, None)[1:3])
        return np.asarray(np.clip(x, low, high))
    bias = _bias(node)
    assert bias is not None, "an Add in the tail is a bias"
    return x + bias.read(read)


def _dynamic_case(node: ir.Node) -> _DynamicCase:
    levels = node.inputs[0]
    quantize = None if levels is None else levels.producer()
    cast = only_reader(node.outputs[0])
    product = None if cast is None else only_reader(cast.outputs[0])
    factors = None if product is None else product.inputs[1]
    scaling = None if factors is None else factors.producer()
    source = None if quantize is None else quantize.inputs[0]
    weight_scale = None if scaling is None else scaling.inputs[1]
    assert source is not None, "an integer product reads a value that was rounded"
    assert weight_scale is not None, "an integer product is multiplied by both scales"
    assert product is not None, "an integer product is multiplied by both scales"
    return _DynamicCase(node, source, weight_scale, product.outputs[0])


def _compute(node: ir.Node, x: Wide, rest: Sequence[Wide]) -> Wide:
    """Return what ``node`` makes of ``x`` and its further operands: a weight and a bias, or the other summand."""
    if node.op_type == "GlobalAveragePool":
        return x.mean(axis=tuple(range(2, x.ndim)), keepdims=True)
    if node.op_type == "Add":
        return x + rest[0]
    if node.op_type in ("Conv", "ConvInteger"):
        result = _convolve(node, x, rest[0])
        return result if len(rest) == 1 else result + params.along(rest[1], 1, result.ndim)
    result = x @ (rest[0].T if integer(node, "transB", 0) else rest[0])
    return result if len(rest) == 1 else result + rest[1]


def _convolve(node: ir.Node, x: Wide, weight: Wide) -> Wide:
    rank, kernel = weight.ndim - 2, weight.shape[2:]
    strides = _integers(node, "strides", [1] * rank)
    dilations = _integers(node, "dilations", [1] * rank)
    pads = _integers(node, "pads", [0] * (2 * rank))
    auto = node.attributes.get("auto_pad")
    if auto is not None and auto.as_string().startswith("SAME"):
        upper = auto.as_string() == "SAME_UPPER"
        pads = numeric.same_pads(x.shape[2:], kernel, strides, dilations, upper=upper)
    return numeric.convolve(x, weight, integer(node, "group", 1), strides, pads, dilations)


def _effect(node: ir.Node, weight: Wide) -> Wide:
    """Return how far one level of the input, at most, moves each output channel, to broadcast against a result."""
    is_conv = node.op_type in ("Conv", "ConvInteger")
    axis = 0 if is_conv or integer(node, "transB", 0) else 1
    effect = np.abs(weight).max(axis=tuple(i for i in range(weight.ndim) if i != axis))
    # In a channel of zeros any step will do: its result is its bias.
    effect[effect == 0.0] = effect.max() or 1.0
    return params.along(effect, 1, weight.ndim) if is_conv else effect


def _some(outputs: int) -> slice:
    """Return which outputs of a layer are compared."""
    return slice(None, None, max(1, -(-outputs // MOST_OUTPUTS)))


def _largest_ratio(difference: Wide, step: Wide) -> float:
    return float((np.abs(difference) / step).max(initial=0.0))


def _constant(value: ir.Value | None) -> Array:
    found = constant(value)
    assert found is not None, "scales, zero points, weights and bounds are constants"
    return found.arrange(found.tensor.numpy())


def _integers(node: ir.Node, name: str, default: list[int]) -> list[int]:
    attribute = node.attributes.get(name)
    return default if attribute is None else list(attribute.as_ints())


def _weight_shape(node: ir.Node) -> tuple[int, ...] | None:
    """Return the dimensions of the constant operand of ``node``, behind a DequantizeLinear or not; None without."""
    if len(node.inputs) < 2:
        return None
    operand = _operand(node.inputs[1])
    found = constant(node.inputs[1] if operand is None else operand.levels)
    return None if found is None else found.shape
