"""The oracle of what is stored: int8 weights and tables, as the file has them, within half a step of the float ones."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import onnx_ir as ir

from onnx_lathe.passes import files
from onnx_lathe.passes.oracle import Check
from onnx_lathe.passes.quantize import params
from onnx_lathe.passes.quantize.layers import Layer, constant, read_layer, result_name
from onnx_lathe.passes.quantize.numeric import Wide
from onnx_lathe.runtime.samples import Array

MOST_CONSTANTS = 16
"""Of more layers and tables about as many are compared, evenly spread."""
ROWS = 256
"""Rows of each that are compared: enough to see every scale of a layer whose channels run along the other axis."""
_PRODUCTS = ("Conv", "ConvInteger", "Gemm", "MatMul", "MatMulInteger")
HALF = 0.501
"""Half a step, and what float32 rounds on the way."""


def check_constants(
    before: Path, after: Path, layers: Sequence[str], tables: Sequence[str], limit: int
) -> Sequence[Check]:
    """Compare levels in the file at ``after`` with what they stand for in the one at ``before``.

    Args:
        before: The float model.
        after: The quantized one.
        layers: The results of layers whose weights were rounded.
        tables: The results of lookups whose tables were.
        limit: The largest level of a weight: what lies beyond is clamped.
    """
    chosen = [*layers, *tables][:: max(1, -(-(len(layers) + len(tables)) // MOST_CONSTANTS))]
    if not chosen:
        return ()
    old, new = (_by_result(files.load(path)) for path in (before, after))
    worst, where = 0.0, "every constant"
    for name in chosen:
        steps = _table_steps(old[name], new[name]) if name in tables else _layer_steps(old[name], new[name], limit)
        steps = math.inf if math.isnan(steps) else steps
        if steps > worst:
            worst, where = steps, name
    scope = f"{len(chosen)} of {len(layers) + len(tables)} weights and tables"
    return (Check("stored levels against the float values", scope, worst, HALF, "steps", where),)


def _by_result(model: ir.Model) -> Mapping[str, ir.Node]:
    return {result_name(node): node for node in model.graph.all_nodes()}


def _layer_steps(old: ir.Node, new: ir.Node, limit: int) -> float:
    layer = read_layer(old)
    assert isinstance(layer, Layer), "what was planned is a layer"
    rows = slice(0, ROWS)
    values = layer.weight.read()[rows].astype(np.float64) * layer.alpha
    levels, scales = _integers(new, rows, transposed=layer.node.op_type == "Gemm" and layer.axis == 0)
    along = params.along(scales.reshape(-1) if scales.size > 1 else scales.reshape(()), layer.axis, values.ndim)
    if layer.axis == 0 and along.ndim:
        along = along[rows]
    exact = np.clip(values / along, -limit, limit)
    return float(np.abs(levels - exact).max(initial=0.0))


def _integers(node: ir.Node, rows: slice, *, transposed: bool) -> tuple[Wide, Wide]:
    """Return levels of a layer's weight, without their zero point, and all scales.

    Args:
        node: What writes the layer's result now.
        rows: Those of the layer's weight that are wanted.
        transposed: Whether the layer's weight has its outputs first, which a MatMulInteger has last.
    """
    factors: ir.Value | None = None
    # Behind a layer stand its scaling and bias, and where its result is an output the rounding of that.
    while node.op_type not in _PRODUCTS:
        if node.op_type == "Mul":
            factors = node.inputs[1]
        node = _producer(node.inputs[0])
    if node.op_type in ("MatMulInteger", "ConvInteger"):
        stored, zero_point = _array(node.inputs[1]), _array(node.inputs[3]).astype(np.float64)
        levels = (stored.T if transposed else stored)[rows].astype(np.float64) - zero_point
        return levels, _array(_producer(factors).inputs[1]).astype(np.float64)
    dequantize = _producer(node.inputs[1])
    return _array(dequantize.inputs[0])[rows].astype(np.float64), _array(dequantize.inputs[1]).astype(np.float64)


def _table_steps(old: ir.Node, new: ir.Node) -> float:
    rows = slice(0, ROWS)
    levels, scales = (_array(_producer(value).inputs[0])[rows].astype(np.float64) for value in _lookups(new))
    return float(np.abs(levels - _array(old.inputs[0])[rows].astype(np.float64) / scales).max(initial=0.0))


def _lookups(product: ir.Node) -> tuple[ir.Value | None, ir.Value | None]:
    """Return the levels and the scales that were looked up, as `onnx_lathe.passes.quantize.tables` spells it."""
    return _producer(product.inputs[0]).inputs[0], product.inputs[1]


def _producer(value: ir.Value | None) -> ir.Node:
    node = None if value is None else value.producer()
    assert node is not None, "integer products are computed"
    return node


def _array(value: ir.Value | None) -> Array:
    found = constant(value)
    assert found is not None, "levels and scales are constants"
    return found.read()
