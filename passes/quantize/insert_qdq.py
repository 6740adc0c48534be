"""The edit of static quantization: pairs of QuantizeLinear and DequantizeLinear, which onnxruntime fuses."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from onnx_lathe.passes.edit import Edit, Refusal
from onnx_lathe.passes.oracle import QUANTIZED_DB, Check, Tolerance
from onnx_lathe.passes.quantize import params
from onnx_lathe.passes.quantize.builder import Builder
from onnx_lathe.passes.quantize.check import check_operators, check_parts
from onnx_lathe.passes.quantize.check_constants import check_constants
from onnx_lathe.passes.quantize.grid import GridFit
from onnx_lathe.passes.quantize.layers import Layer, constant, is_quantized, read_layer, result_name
from onnx_lathe.passes.quantize.plan import PlannedLayer
from onnx_lathe.passes.quantize.scheme import Affine, WeightScheme
from onnx_lathe.passes.quantize.tables import is_table, replace_table
from onnx_lathe.runtime.samples import Feeds


@dataclass(frozen=True)
class RoundedValue:
    """A value that gets a QuantizeLinear and a DequantizeLinear.

    Attributes:
        name: The value.
        affine: Its levels.
        by_all: Whether every reader reads it rounded, or only those that the plan names.
    """

    name: str
    affine: Affine
    by_all: bool


@dataclass(frozen=True)
class InsertQDQ(Edit):
    """A plan of static quantization.

    Attributes:
        weights: How weights are rounded.
        layers: The operators whose weights are rounded.
        readers: The results of all operators that read rounded values.
        values: The values that are rounded.
        fences: The results of layers behind which an identity stands that onnxruntime does not look through.
        refusals: What stays float, and why.
        fits: How the weights lie on a grid that was given; empty where it is fitted to them.
        tables: The results of the lookups whose tables become int8 rows.
    """

    tolerance: ClassVar[Tolerance] = Tolerance(
        "The same rounded graph, fused and not: sums in another order move a value by one level here and there.",
        sqnr_db=QUANTIZED_DB,
    )

    weights: WeightScheme
    layers: tuple[PlannedLayer, ...]
    readers: tuple[str, ...]
    values: tuple[RoundedValue, ...]
    fences: tuple[str, ...] = ()
    refusals: tuple[Refusal, ...] = ()
    fits: tuple[GridFit, ...] = ()
    tables: tuple[str, ...] = ()

    def describe(self) -> Mapping[str, Any]:
        """Return the plan as JSON."""
        return {
            "weights": dataclasses.asdict(self.weights),
            "layers": [dataclasses.asdict(layer) for layer in self.layers],
            "readers": list(self.readers),
            "values": [dataclasses.asdict(value) for value in self.values],
            "fences": list(self.fences),
            "tables": list(self.tables),
            "fits": [dataclasses.asdict(fit) for fit in self.fits],
        }

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Insert the pairs; weights become int8, biases int32."""
        if is_quantized(model):
            return ir.passes.PassResult(model, False)
        graph = model.graph
        builder = Builder(graph, self.weights)
        nodes = {result_name(node): node for node in graph}
        scales = {value.name: value.affine.scale for value in self.values}
        tables = [nodes[name] for name in self.tables if is_table(nodes.get(name))]
        if not self.layers and not tables:
            return ir.passes.PassResult(model, False)
        for node in tables:
            replace_table(builder, graph, node)
        for planned in self.layers:
            _round_constants(builder, planned, nodes, scales)
        results = {value.name: value for node in graph for value in node.outputs}
        results |= {value.name: value for value in graph.inputs}
        readers = {nodes[name] for name in self.readers}
        for rounded in self.values:
            _round_value(builder, graph, results[rounded.name], rounded, readers)
        for name in self.fences:
            _fence(builder, graph, results[name])
        return ir.passes.PassResult(model, True)

    def reference(self, model: ir.Model) -> None:
        """Insert the same pairs: run unoptimized, each operator computes in float between them."""
        self.call(model)

    def check(self, before: Path, after: Path, feeds: Feeds) -> Sequence[Check]:
        """Compare the whole graph with the unfused one, integer operators with numpy, levels with the float values."""
        whole = super().check(before, after, feeds)
        return (*whole, *check_operators(after, feeds), *self._check_constants(before, after))

    def check_parts(self, before: Path, after: Path) -> Sequence[Check]:
        """Compare some integer operators, each run alone, with numpy, and levels with the float values."""
        return (*check_parts(after), *self._check_constants(before, after))

    def _check_constants(self, before: Path, after: Path) -> Sequence[Check]:
        return check_constants(before, after, [layer.result for layer in self.layers], self.tables, self.weights.limit)


def _round_constants(
    builder: Builder, planned: PlannedLayer, nodes: Mapping[str, ir.Node], scales: Mapping[str, float]
) -> None:
    """Put the weight and the bias of a layer behind a DequantizeLinear."""
    node = nodes[planned.result]
    layer = read_layer(node)
    assert isinstance(layer, Layer), f"{planned.result} was planned as a layer"
    data = node.inputs[0]
    assert data is not None, "a layer has an input"
    input_scale = scales[data.name or ""]
    bias, bias_reader, bias_index = _bias(layer, planned, nodes)
    floor = 0.0 if bias is None else params.bias_floor(bias, input_scale)
    weight_scales = builder.scales(layer, floor)
    replaced = [node.inputs[1]]
    levels = builder.weight(layer, weight_scales)
    node.replace_input_with(1, _dequantized(builder, node, levels, weight_scales, layer.axis))
    if bias is not None:
        replaced.append(bias_reader.inputs[bias_index])
        bias_scales = params.bias_scales(input_scale, weight_scales)
        levels = builder.constant(f"{result_name(bias_reader)}_bias", params.quantize_bias(bias, bias_scales))
        bias_reader.replace_input_with(bias_index, _dequantized(builder, node, levels, bias_scales, 0))
    for name in ("alpha", "beta"):
        node.attributes.pop(name, None)
    if planned.as_gemm:
        node.op_type = "Gemm"
    builder.drop_unused(replaced)


def _bias(
    layer: Layer, planned: PlannedLayer, nodes: Mapping[str, ir.Node]
) -> tuple[NDArray[np.float32] | None, ir.Node, int]:
    """Return the bias of a layer (``float32 [channels]``), the node that reads it, and as which input."""
    if planned.bias_add is None:
        return layer.bias_values(), layer.node, 2
    add = nodes[planned.bias_add]
    index = 1 if add.inputs[0] is layer.node.outputs[0] else 0
    return dataclasses.replace(layer, bias=constant(add.inputs[index])).bias_values(), add, index


def _dequantized(builder: Builder, node: ir.Node, levels: ir.Value, scales: NDArray[np.float32], axis: int) -> ir.Value:
    """Return ``levels`` (a constant) behind a DequantizeLinear that is inserted before ``node``."""
    zeros = np.zeros(scales.shape, np.int8 if levels.dtype == ir.DataType.INT8 else np.int32)
    scale = builder.constant(f"{levels.name}_scale", scales)
    zero_point = builder.constant(f"{levels.name}_zero_point", zeros)
    result = (f"{levels.name}_dequantized", ir.DataType.FLOAT, levels.shape)
    dequantize = builder.op("DequantizeLinear", [levels, scale, zero_point], [result], {"axis": axis})
    assert node.graph is not None, "a planned node is in a graph"
    node.graph.insert_before(node, dequantize)
    return dequantize.outputs[0]


def _round_value(
    builder: Builder, graph: ir.Graph, value: ir.Value, rounded: RoundedValue, readers: set[ir.Node]
) -> None:
    """Put a QuantizeLinear and a DequantizeLinear between ``value`` and its readers."""
    uses = list(value.uses())
    name, affine = rounded.name, rounded.affine
    scale = builder.constant(f"{name}_scale", np.asarray(affine.scale, np.float32))
    zero_point = builder.constant(f"{name}_zero_point", np.asarray(affine.zero_point, np.uint8))
    quantized = (f"{name}_quantized", ir.DataType.UINT8, value.shape)
    quantize = builder.op("QuantizeLinear", [value, scale, zero_point], [quantized])
    levels = quantize.outputs[0]
    result = (f"{name}_dequantized", ir.DataType.FLOAT, value.shape)
    dequantize = builder.op("DequantizeLinear", [levels, scale, zero_point], [result])
    producer = value.producer()
    if producer is None:
        graph.insert_before(graph[0], [quantize, dequantize])
    else:
        graph.insert_after(producer, [quantize, dequantize])
    for use in uses:
        if rounded.by_all or use.node in readers:
            use.node.replace_input_with(use.idx, dequantize.outputs[0])
    if rounded.by_all and value.is_graph_output():
        _take_over_output(builder, graph, value, dequantize.outputs[0])


def _fence(builder: Builder, graph: ir.Graph, value: ir.Value) -> None:
    """Put an identity between ``value`` and its readers that onnxruntime takes for an activation."""
    uses = list(value.uses())
    result = (f"{value.name}_fenced", ir.DataType.FLOAT, value.shape)
    fence = builder.op("LeakyRelu", [value], [result], {"alpha": 1.0})
    producer = value.producer()
    assert producer is not None, "a float layer computes the value"
    graph.insert_after(producer, fence)
    for use in uses:
        use.node.replace_input_with(use.idx, fence.outputs[0])


def _take_over_output(builder: Builder, graph: ir.Graph, value: ir.Value, rounded: ir.Value) -> None:
    """Make ``rounded`` the output of the graph that ``value`` was, under the same name."""
    name = value.name or ""
    for index, output in enumerate(graph.outputs):
        if output is value:
            graph.outputs[index] = rounded
    value.name = builder.free(f"{name}_float")
    rounded.name = name
