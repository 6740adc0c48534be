"""The oracle of single MatMulNBits: each, as onnxruntime runs it, near numpy, and its weight near the float one."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from onnx_lathe.passes import files
from onnx_lathe.passes.oracle import Check
from onnx_lathe.passes.quantize.blockwise import BlockScheme, Floats
from onnx_lathe.passes.quantize.check_alone import run_alone
from onnx_lathe.passes.quantize.layers import Layer, integer, read_layer, result_name
from onnx_lathe.passes.quantize.packing import Packed, columns
from onnx_lathe.passes.quantize.params import MIN_SCALE
from onnx_lathe.runtime.parity import sqnr_db
from onnx_lathe.runtime.samples import Array

DOMAIN = "com.microsoft"
MOST_PARTS = 8
"""Of more products about as many are checked, evenly spread."""
MOST_OUTPUTS = 64
"""Of more outputs of a product about as many are compared, evenly spread."""
ROWS = 4
"""Rows of the random inputs of a product."""
PRODUCT_DB = 30.0
"""Normal inputs that are rounded to int8 by blocks leave 43 to 56 dB; a wrong level or zero point leaves few."""
WEIGHT_DB = 3.0
"""4 bits leave some 20 dB and at worst 10; a sign, an order or a scale that is wrong leaves none."""


def check_products(after: Path) -> Check:
    """Run some products of the model at ``after`` alone, on normal inputs, against numpy in float64."""
    model = files.load(after)
    products = _products(model)
    ratios = {result_name(node): _product_db(model, node) for node in _chosen(products)}
    return _worst("products against numpy", ratios, len(products), PRODUCT_DB)


def check_weights(before: Path, after: Path) -> Check:
    """Compare some weights of the model at ``after``, and their biases, with those at ``before``."""
    products = _products(files.load(after))
    nodes = {result_name(node): node for node in files.load(before).graph.all_nodes()}
    ratios: dict[str, float] = {}
    for node in _chosen(products):
        layer = read_layer(nodes[result_name(node)])
        assert isinstance(layer, Layer), "a product was a layer"
        ratios[result_name(node)] = _weight_db(layer, node) if _has_bias_of(layer, node) else float("-inf")
    return _worst("rounded weights against the float ones", ratios, len(products), WEIGHT_DB)


def _worst(what: str, ratios: Mapping[str, float], count: int, limit: float) -> Check:
    where = min(ratios, key=lambda name: ratios[name])
    return Check(what, f"{len(ratios)} of {count} products", ratios[where], limit, "dB", where)


def _products(model: ir.Model) -> list[ir.Node]:
    return [node for node in model.graph.all_nodes() if node.op_type == "MatMulNBits" and node.domain == DOMAIN]


def _chosen(products: list[ir.Node]) -> list[ir.Node]:
    return products[:: max(1, -(-len(products) // MOST_PARTS))]


def _product_db(model: ir.Model, node: ir.Node) -> float:
    inputs, outputs = integer(node, "K", 0), _some_outputs(node)
    x = np.random.default_rng(0).standard_normal((ROWS, inputs), np.float32)
    want = x.astype(np.float64) @ _weight(node, outputs).T.astype(np.float64)
    if len(node.inputs) > 5:
        want += _stored(node, 5)[outputs]
    got = _product_of(model, node, x)[:, outputs]
    return float("inf") if np.array_equal(got, want) else sqnr_db(want, got)


def _weight_db(layer: Layer, node: ir.Node) -> float:
    """Return how near weights are, but for a step of the least scale: no level tells them apart below it.

    The nearest level is half a step away; GPTQ, which makes up for the errors of other weights, takes the next too.
    """
    outputs = _some_outputs(node)
    want = _columns_of(layer, outputs).astype(np.float64) * layer.alpha
    error = _weight(node, outputs) - want
    blur = MIN_SCALE * abs(layer.alpha)
    return sqnr_db(want, want + (error - np.clip(error, -blur, blur)))


def _has_bias_of(layer: Layer, node: ir.Node) -> bool:
    bias = layer.bias_values()
    if bias is None or len(node.inputs) < 6:
        return bias is None and len(node.inputs) < 6
    return np.array_equal(_stored(node, 5), bias, equal_nan=True)


def _product_of(model: ir.Model, node: ir.Node, x: Floats) -> Floats:
    """Return what onnxruntime makes of ``x`` by ``node``."""
    data = ir.Value(name="x", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape(x.shape))
    weights = [
        None if value is None else ir.Value(name=value.name, const_value=value.const_value) for value in node.inputs
    ]
    result = ir.Value(name="y", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape((len(x), integer(node, "N", 0))))
    alone = ir.Node(DOMAIN, "MatMulNBits", [data, *weights[1:]], node.attributes.values(), outputs=[result])
    initializers = [value for value in weights[1:] if value is not None]
    graph = ir.Graph(
        [data], [result], nodes=[alone], initializers=initializers, opset_imports=model.opset_imports, name="alone"
    )
    return run_alone(graph, model, {"x": x})["y"]


def _some_outputs(node: ir.Node) -> NDArray[np.int64]:
    count = integer(node, "N", 0)
    return np.unique(np.linspace(0, count - 1, min(count, MOST_OUTPUTS)).astype(np.int64))


def _weight(node: ir.Node, outputs: NDArray[np.int64]) -> Floats:
    """Return the real weights of some outputs, ``[outputs, inputs]``."""
    bits = integer(node, "bits", 4)
    assert bits in (4, 8), "the pass makes no others"
    scheme = BlockScheme(bits, integer(node, "block_size", 0))
    inputs, scales = integer(node, "K", 0), _stored(node, 2)[outputs]
    if len(node.inputs) > 3 and node.inputs[3] is not None:
        zeros = _stored(node, 3)[outputs]
    else:
        middle = scheme.middle if bits == 8 else scheme.middle * 17
        zeros = np.full((len(outputs), scheme.bytes_of(scheme.blocks(inputs))), middle, np.uint8)
    every = np.arange(len(outputs))
    return Packed(_stored(node, 1)[outputs], scales, zeros).rows(every, scheme, inputs)


def _columns_of(layer: Layer, outputs: NDArray[np.int64]) -> Floats:
    """Return the float weights of some outputs, ``[outputs, inputs]``."""
    if layer.stored_axis == 0:
        found = [columns(layer.weight.tensor, 0, output, output + 1) for output in outputs.tolist()]
        return np.concatenate(found, axis=1).T
    parts = [rows[:, outputs] for _, rows in files.rows(layer.weight.tensor, 0, layer.weight.tensor.shape.numpy()[0])]
    return np.concatenate(parts).T


def _stored(node: ir.Node, index: int) -> Array:
    value = node.inputs[index]
    assert value is not None, "the pass gives what is asked for here"
    assert value.const_value is not None, "weights are constants"
    return files.view(value.const_value).numpy()
