"""Products of one tensor with several weights as one product, and a Split.

The queries, keys and values of attention, and the gate and the rest of a gated layer, are products that read the same
tensor. With their weights side by side it is read, packed and rounded once:
``x [A B C] = [x A, x B, x C]``.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from dataclasses import dataclass as plain_dataclass
from typing import Any, ClassVar

import numpy as np
import onnx_ir as ir
from pydantic.dataclasses import dataclass

from onnx_lathe.passes.edit import Edit, Refusal
from onnx_lathe.passes.fuse.stretch import name, take_over
from onnx_lathe.passes.oracle import Tolerance
from onnx_lathe.passes.quantize.builder import Builder
from onnx_lathe.passes.quantize.layers import Constant, constant, integer, label, only_reader
from onnx_lathe.passes.quantize.scheme import WeightScheme
from onnx_lathe.passes.request import Request, Score
from onnx_lathe.runtime.errors import UnsupportedModelError
from onnx_lathe.runtime.samples import Array, Samples

_LEAST_OPSET = 13
"""The first opset in which Split takes its sizes as an input."""


@dataclass(frozen=True)
class MergeProjections(Request):
    """Merge products that read one tensor, such as queries, keys and values, into one product and a Split."""

    name: ClassVar[str] = "merge-projections"

    def plan(self, model: ir.Model, samples: Samples | None, score: Score | None) -> MergedProjections:
        """Find the products that read the same tensor.

        Raises:
            UnsupportedModelError: No two do, or the opset is under 13.
        """
        del samples, score
        opset = model.opset_imports.get("", 1)
        if opset < _LEAST_OPSET:
            raise UnsupportedModelError(
                self.name,
                got=f"opset {opset}",
                expected=f"opset {_LEAST_OPSET} or later",
                mend="Export the model again with opset_version=20, or convert it with onnx.version_converter.",
            )
        groups, refusals = _find(model.graph)
        if not groups:
            reasons = Counter(refusal.reason for refusal in refusals)
            listed = "; ".join(f"{count} x {reason}" for reason, count in reasons.items())
            raise UnsupportedModelError(
                self.name,
                got="no two products with constant weights that read one tensor" + (f" ({listed})" if listed else ""),
                expected="a MatMul or Gemm beside another of the same tensor",
                mend="Leave the pass out.",
            )
        return MergedProjections(groups, refusals)


@plain_dataclass(frozen=True)
class Projection:
    """One product.

    Attributes:
        product: The result of the MatMul or Gemm.
        weight: What it multiplies by.
        result: What takes its place: the product, or the sum with a bias behind it.
        bias: The bias; empty without one.
        width: The number of its output channels.
    """

    product: str
    weight: str
    result: str
    bias: str
    width: int


@plain_dataclass(frozen=True)
class MergedProjections(Edit):
    """Products that become one, group by group.

    Attributes:
        groups: The products of each group, in the order of the graph.
        refusals: Products that stay, and why.
    """

    tolerance: ClassVar[Tolerance] = Tolerance(
        "The same products, summed in the order that onnxruntime takes for the wider one: 2e-6 between its own orders.",
        relative=1e-4,
    )

    groups: tuple[tuple[Projection, ...], ...]
    refusals: tuple[Refusal, ...] = ()

    def describe(self) -> Mapping[str, Any]:
        """Return the plan as JSON."""
        return {"groups": [list(map(asdict, group)) for group in self.groups]}

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Merge the groups that are as they were planned."""
        builder = Builder(model.graph, WeightScheme())
        values = {name(value): value for node in model.graph for value in node.outputs}
        modified = False
        for group in self.groups:
            if all(_is_as_planned(values.get(each.product), each) for each in group):
                _merge(model.graph, builder, [_Product(values[each.product], values[each.result]) for each in group])
                modified = True
        return ir.passes.PassResult(model, modified)


class _Product:
    """A product in the graph, with its constants.

    Args:
        product: The result of the MatMul or Gemm.
        result: The product, or the sum with a bias behind it.
    """

    def __init__(self, product: ir.Value, result: ir.Value) -> None:
        node = product.producer()
        assert node is not None, "a product is computed"
        weight = constant(node.inputs[1])
        assert weight is not None, "its weight is constant"
        self.node, self.weight, self.result = node, weight, result
        self.transposed = bool(integer(node, "transB", 0))
        self.width = weight.shape[0 if self.transposed else 1]
        self.bias = _bias(node, product, result)

    def columns(self) -> Array:
        """Return the weight, ``[inputs, width]``."""
        return self.weight.read().T if self.transposed else self.weight.read()

    def shift(self) -> Array:
        """Return the bias, ``[width]``; zeros where there is none."""
        dtype = self.weight.tensor.dtype.numpy()
        if self.bias is None:
            return np.zeros(self.width, dtype)
        return np.broadcast_to(self.bias.read().reshape(-1), (self.width,))


def _find(graph: ir.Graph) -> tuple[tuple[tuple[Projection, ...], ...], tuple[Refusal, ...]]:
    """Return the groups of products that can become one, and which cannot."""
    groups: dict[tuple[object, ...], list[Projection]] = {}
    refused: list[Refusal] = []
    for node in graph:
        if node.op_type not in ("MatMul", "Gemm") or node.domain != "" or constant(node.inputs[0]) is not None:
            continue
        weight = constant(node.inputs[1])
        reason = "its weight is computed" if weight is None else _reason(node, weight)
        if weight is None or reason is not None:
            if _has_sibling(node):
                refused.append(Refusal(label(node), node.op_type, reason or ""))
            continue
        key = (node.inputs[0], node.op_type, weight.tensor.dtype)
        groups.setdefault(key, []).append(_projection(node))
    return tuple(tuple(group) for group in groups.values() if len(group) > 1), tuple(refused)


def _reason(node: ir.Node, weight: Constant) -> str | None:
    """Return why a product with a constant weight stays as it is."""
    if len(weight.shape) != 2:
        return f"its weight has {len(weight.shape)} dimensions, not 2"
    if weight.tensor.dtype not in (ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.DOUBLE):
        return f"its weight is {weight.tensor.dtype.name}"
    if any(len(list(value.uses())) > 1 or value.is_graph_output() for value in _stored(node.inputs[1])):
        return "its weight is read elsewhere too, and would be stored twice"
    if node.op_type == "Gemm":
        factors = {node.attributes.get_float(factor, 1.0) for factor in ("alpha", "beta")}
        if factors != {1.0} or integer(node, "transA", 0):
            return "it has factors or a transposed input"
        if len(node.inputs) > 2 and node.inputs[2] is not None and not _is_vector(node.inputs[2], _width(node)):
            return "its bias is not one constant number a channel"
    return None


def _stored(value: ir.Value | None) -> Iterator[ir.Value]:
    """Yield a constant, and what a Transpose makes it of."""
    while value is not None:
        yield value
        node = value.producer()
        value = None if node is None or not node.inputs else node.inputs[0]


def _has_sibling(node: ir.Node) -> bool:
    data = node.inputs[0]
    products = [] if data is None else [use for use in data.uses() if use.idx == 0 and use.node.op_type == node.op_type]
    return len(products) > 1


def _projection(node: ir.Node) -> Projection:
    product = node.outputs[0]
    result, bias = product, node.inputs[2] if len(node.inputs) > 2 else None
    reader = only_reader(product)
    if node.op_type == "MatMul" and reader is not None and reader.op_type == "Add" and reader.domain == "":
        other = reader.inputs[1] if reader.inputs[0] is product else reader.inputs[0]
        if _is_vector(other, _width(node)):
            result, bias = reader.outputs[0], other
    return Projection(name(product), name(node.inputs[1]), name(result), name(bias), _width(node))


def _width(node: ir.Node) -> int:
    weight = constant(node.inputs[1])
    assert weight is not None, "the weight of a product is constant"
    return weight.shape[0 if integer(node, "transB", 0) else 1]


def _is_vector(value: ir.Value | None, width: int) -> bool:
    """Say whether ``value`` is one constant number a channel, or one for all."""
    found = constant(value)
    return found is not None and len(found.shape) <= 1 and found.shape in ((), (1,), (width,))


def _bias(node: ir.Node, product: ir.Value, result: ir.Value) -> Constant | None:
    if result is product:
        return constant(node.inputs[2]) if len(node.inputs) > 2 else None
    add = result.producer()
    assert add is not None, "a sum is computed"
    return constant(add.inputs[1] if add.inputs[0] is product else add.inputs[0])


def _is_as_planned(product: ir.Value | None, projection: Projection) -> bool:
    node = None if product is None else product.producer()
    return node is not None and node.op_type in ("MatMul", "Gemm") and name(node.inputs[1]) == projection.weight


def _merge(graph: ir.Graph, builder: Builder, products: Sequence[_Product]) -> None:
    """Put one product and a Split where the first of ``products`` stands."""
    first = products[0].node
    results = [product.result for product in products]
    nodes = list(_merged(builder, products))
    graph.insert_before(first, nodes)
    for old, new in zip(results, nodes[-1].outputs, strict=True):
        take_over(old, new)


def _merged(builder: Builder, products: Sequence[_Product]) -> Iterator[ir.Node]:
    first = products[0]
    dtype, widths = first.weight.tensor.dtype, [product.width for product in products]
    base = f"{name(first.node.outputs[0])}_merged"
    inputs, total = first.weight.shape[1 if first.transposed else 0], sum(widths)

    def columns() -> Array:
        return np.concatenate([product.columns() for product in products], axis=1)

    def shifts() -> Array:
        return np.concatenate([product.shift() for product in products])

    weight = builder.stored(f"{base}_weight", columns, dtype, (inputs, total))
    operands = [first.node.inputs[0], weight]
    shifted = any(product.bias is not None for product in products)
    shift = builder.stored(f"{base}_bias", shifts, dtype, (total,)) if shifted else None
    if first.node.op_type == "Gemm" and shift is not None:
        operands.append(shift)
    shape = _wide(first.node.outputs[0].shape, total)
    product = builder.op(first.node.op_type, operands, [(base, dtype, shape)])
    yield product
    whole = product.outputs[0]
    if first.node.op_type == "MatMul" and shift is not None:
        add = builder.op("Add", [whole, shift], [(f"{base}_shifted", dtype, shape)])
        yield add
        whole = add.outputs[0]
    sizes = builder.constant(f"{base}_widths", np.array(widths, np.int64))
    results = [(f"{base}_{index}", dtype, None) for index in range(len(products))]
    yield builder.op("Split", [whole, sizes], results, {"axis": -1})


def _wide(shape: ir.Shape | None, width: int) -> ir.Shape | None:
    return None if shape is None else ir.Shape([*list(shape)[:-1], width])
