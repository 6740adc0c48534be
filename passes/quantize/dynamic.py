"""Dynamic quantization: int8 weights, and inputs that are rounded as the model runs, so that no samples are needed.

``y = (x_q - zero_point) W_q * (x_scale * w_scale) + bias``, spelled as DynamicQuantizeLinear, MatMulInteger, Cast, Mul
and Add in the order that onnxruntime fuses to DynamicQuantizeMatMul, or to MatMulIntegerToFloat where several layers
read one value.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass as plain_dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray
from pydantic.dataclasses import dataclass

from onnx_lathe.passes.edit import Edit, Refusal
from onnx_lathe.passes.oracle import QUANTIZED_DB, Check, Tolerance
from onnx_lathe.passes.quantize import params
from onnx_lathe.passes.quantize.builder import Builder
from onnx_lathe.passes.quantize.check import check_operators, check_parts
from onnx_lathe.passes.quantize.check_constants import check_constants
from onnx_lathe.passes.quantize.grid import GridFit, fit_to_grid
from onnx_lathe.passes.quantize.layers import (
    Layer,
    check_quantizable,
    find_layers,
    is_quantized,
    nothing_to_quantize,
    read_layer,
    refusal,
    result_name,
)
from onnx_lathe.passes.quantize.scheme import WeightExponent, WeightScheme, exact_weight_bits
from onnx_lathe.passes.quantize.tables import find_tables, is_table, replace_table, table_names
from onnx_lathe.passes.request import Request, Score
from onnx_lathe.runtime import providers
from onnx_lathe.runtime.samples import Feeds, Samples

LEAST_OPSET = 11
"""The first opset with DynamicQuantizeLinear."""


@dataclass(frozen=True)
class QuantizeDynamic(Request):
    """Round weights to int8, and what the layers read as the model runs; needs no samples.

    A Conv gets smaller by this and not faster: onnxruntime's ConvInteger takes 1.1 to 2 times as long as float.

    Attributes:
        per_channel: Whether each output channel of a weight has its own scale.
        power_of_two: Whether the scales of weights are powers of two; those of inputs follow them as the model runs.
        weight_exponent: The step of every weight is 2 to this power instead of one that is read from the weights, which
            are rounded by ``round(w / 2^k) 2^k``; entries beyond the 8 bits are clamped.
        weight_bits: 8, or 7 for CPUs whose 8-bit products saturate; None decides by the CPU at hand.
        operators: The types of layers to quantize; Gather stands for lookups in large tables (embeddings), which
            become int8 with a scale a row, whatever the other options.
        exclude: Names of nodes to leave in float.
    """

    name: ClassVar[str] = "quantize-dynamic"

    per_channel: bool = True
    power_of_two: bool = False
    weight_exponent: WeightExponent | None = None
    weight_bits: Literal[7, 8] | None = None
    operators: tuple[Literal["Conv", "Gemm", "MatMul", "Gather"], ...] = ("Conv", "Gemm", "MatMul", "Gather")
    exclude: tuple[str, ...] = ()

    def plan(self, model: ir.Model, samples: Samples | None, score: Score | None) -> IntegerProducts:
        """Choose the layers.

        Raises:
            UnsupportedModelError: The model is quantized already, too old, or has nothing to quantize.
            PassSpecError: ``exclude`` names an unknown node.
        """
        del samples, score
        check_quantizable(model, self.name, LEAST_OPSET)
        layers, refused = find_layers(model, self.operators, self.exclude, nested=True)
        refused += [refusal(layer.node, layer.lone_reason) for layer in layers if layer.lone_reason is not None]
        bits = self.weight_bits or exact_weight_bits(providers.cpu_class())
        per_channel = self.per_channel and self.weight_exponent is None
        weights = WeightScheme(bits, per_channel, self.power_of_two, self.weight_exponent)
        layers, fits, empty = fit_to_grid([layer for layer in layers if layer.lone_reason is None], weights)
        refused += empty
        tables, small = find_tables(model.graph, self.exclude) if "Gather" in self.operators else ([], [])
        refused += small
        chosen = tuple(result_name(layer.node) for layer in layers)
        if not chosen and not tables:
            raise nothing_to_quantize(self.name, refused)
        return IntegerProducts(weights, chosen, tuple(refused), fits, table_names(tables))


@plain_dataclass(frozen=True)
class IntegerProducts(Edit):
    """A plan of dynamic quantization.

    Attributes:
        weights: How weights are rounded.
        layers: The results of the operators that become integer products.
        refusals: What stays float, and why.
        fits: How the weights lie on a grid that was given; empty where it is fitted to them.
        tables: The results of the lookups whose tables become int8 rows.
    """

    tolerance: ClassVar[Tolerance] = Tolerance(
        "The same integer products, fused and not: a sum in another order moves an input by one level here and there.",
        sqnr_db=QUANTIZED_DB,
    )

    weights: WeightScheme
    layers: tuple[str, ...]
    refusals: tuple[Refusal, ...] = ()
    fits: tuple[GridFit, ...] = ()
    tables: tuple[str, ...] = ()

    def describe(self) -> Mapping[str, Any]:
        """Return the plan as JSON."""
        return {
            "weights": dataclasses.asdict(self.weights),
            "layers": list(self.layers),
            "tables": list(self.tables),
            "fits": [dataclasses.asdict(fit) for fit in self.fits],
        }

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Replace the layers by integer products; values that several of them read are rounded once."""
        if is_quantized(model):
            return ir.passes.PassResult(model, False)
        graph = model.graph
        builder = Builder(graph, self.weights)
        nodes = {result_name(node): node for node in graph.all_nodes()}
        tables = [nodes[name] for name in self.tables if is_table(nodes.get(name))]
        if not self.layers and not tables:
            return ir.passes.PassResult(model, False)
        rounded: dict[ir.Value, ir.Node] = {}
        for name in self.layers:
            layer = read_layer(nodes[name])
            assert isinstance(layer, Layer), f"{name} was planned as a layer"
            source = layer.node.inputs[0]
            assert source is not None, "a layer has an input"
            if source not in rounded:
                rounded[source] = _dynamic_quantize(builder, source)
            _replace(builder, layer, rounded[source])
        for node in tables:
            replace_table(builder, graph, node)
        return ir.passes.PassResult(model, True)

    def reference(self, model: ir.Model) -> None:
        """Make the same integer products: run unoptimized, operator by operator."""
        self.call(model)

    def check(self, before: Path, after: Path, feeds: Feeds) -> Sequence[Check]:
        """Compare the whole graph with the unfused one, integer operators with numpy, levels with the float values."""
        whole = super().check(before, after, feeds)
        return (*whole, *check_operators(after, feeds), *self._check_constants(before, after))

    def check_parts(self, before: Path, after: Path) -> Sequence[Check]:
        """Compare some integer operators, each run alone, with numpy, and levels with the float values."""
        return (*check_parts(after), *self._check_constants(before, after))

    def _check_constants(self, before: Path, after: Path) -> Sequence[Check]:
        return check_constants(before, after, self.layers, self.tables, self.weights.limit)


def _dynamic_quantize(builder: Builder, source: ir.Value) -> ir.Node:
    """Insert a DynamicQuantizeLinear behind ``source``; what is computed outside a loop is rounded once."""
    results = [
        (f"{source.name}_quantized", ir.DataType.UINT8, source.shape),
        (f"{source.name}_scale", ir.DataType.FLOAT, ir.Shape(())),
        (f"{source.name}_zero_point", ir.DataType.UINT8, ir.Shape(())),
    ]
    node = builder.op("DynamicQuantizeLinear", [source], results)
    producer, graph = source.producer(), source.graph
    assert graph is not None, "a value that is computed on belongs to a graph"
    if producer is None:
        graph.insert_before(graph[0], node)
    else:
        graph.insert_after(producer, node)
    return node


def _replace(builder: Builder, layer: Layer, rounded: ir.Node) -> None:
    """Put an integer product, its scaling and its bias in the place of ``layer``."""
    node, (levels, scale, zero_point) = layer.node, rounded.outputs
    result, rank = node.outputs[0], len(layer.weight.shape)
    is_conv = node.op_type == "Conv"

    def by_channel(vector: NDArray[np.float32]) -> NDArray[np.float32]:
        return params.along(vector, 1, rank) if is_conv else vector

    def op(
        operator: str,
        inputs: Sequence[ir.Value],
        suffix: str,
        dtype: ir.DataType = ir.DataType.FLOAT,
        **attributes: int,
    ) -> ir.Node:
        return builder.op(operator, inputs, [(f"{result.name}_{suffix}", dtype, None)], attributes)

    scales, bias = builder.scales(layer), layer.bias_values()
    # ConvInteger multiplies the weight from the left, where onnxruntime takes 4 times as long for int8 as for uint8,
    # and has one zero point for the whole weight.
    weight = builder.weight(layer, scales, transposed=not is_conv and layer.axis == 0, unsigned=is_conv)
    factors = builder.constant(f"{weight.name}_scale", by_channel(scales))
    level_of_zero = np.asarray(params.UNSIGNED_ZERO, np.uint8) if is_conv else np.zeros((), np.int8)
    zero = builder.constant(f"{weight.name}_zero_point", level_of_zero)
    operator = "ConvInteger" if is_conv else "MatMulInteger"
    product = op(operator, [levels, weight, zero_point, zero], "sums", ir.DataType.INT32)
    if is_conv:
        product.attributes.update(node.attributes)
    cast = op("Cast", [product.outputs[0]], "sums_float", to=ir.DataType.FLOAT)
    both = op("Mul", [scale, factors], "scales")
    made = [product, cast, both, op("Mul", [cast.outputs[0], both.outputs[0]], "scaled")]
    if bias is not None:
        addend = builder.constant(f"{result.name}_bias", by_channel(bias))
        made.append(op("Add", [made[-1].outputs[0], addend], "biased"))
    inputs = list(node.inputs[1:])
    assert node.graph is not None, "a layer is in a graph"
    ir.convenience.replace_nodes_and_values(node.graph, node, [node], made, [result], [made[-1].outputs[0]])
    builder.drop_unused(inputs)
