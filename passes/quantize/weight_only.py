"""Weight-only quantization: weights of 8 or 4 bits in blocks, multiplied by MatMulNBits; activations stay float.

What is gained is memory and, where few rows are multiplied at a time (a decoder that writes token by token), the time
that reading the weights takes. ``accuracy_level = 4`` lets onnxruntime round each block of the input to int8 as it
multiplies; without it 8 bits are tens of times slower than float.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass as plain_dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import onnx_ir as ir
from pydantic.dataclasses import dataclass

from onnx_lathe.passes.edit import Edit, Refusal
from onnx_lathe.passes.oracle import QUANTIZED_DB, Check, Tolerance
from onnx_lathe.passes.quantize import streamed
from onnx_lathe.passes.quantize.blockwise import (
    BlockBits,
    BlockScheme,
    BlockSize,
    half_quadratic_grid,
    nearest_grid,
)
from onnx_lathe.passes.quantize.builder import Builder
from onnx_lathe.passes.quantize.check_blocks import DOMAIN, check_products, check_weights
from onnx_lathe.passes.quantize.fitted import Shelf, fit_to_samples
from onnx_lathe.passes.quantize.layers import (
    Layer,
    check_quantizable,
    constant,
    find_layers,
    is_quantized,
    not_finite,
    nothing_to_quantize,
    only_reader,
    read_layer,
    refusal,
    result_name,
)
from onnx_lathe.passes.quantize.packing import Together, pack
from onnx_lathe.passes.quantize.scheme import WeightScheme
from onnx_lathe.passes.request import Request, Score
from onnx_lathe.passes.taps import need_samples
from onnx_lathe.runtime.samples import Array, Feeds, Samples

LEAST_OPSET = 7
"""The first opset whose Gemm broadcasts its bias by itself."""
ACCURACY_LEVEL = 4
"""MatMulNBits may round its input to int8, a block at a time."""
_AFTER_HEAD = frozenset(
    {
        *("Cast", "Flatten", "Identity", "LogSoftmax", "Reshape", "Sigmoid", "Softmax", "Squeeze", "Tanh", "Transpose"),
        "Unsqueeze",
    }
)
"""Operators between a head and the output of the graph, beside arithmetic with a constant."""
_WITH_CONSTANT = frozenset({"Add", "Div", "Mul", "Sub"})

Method = Literal["rtn", "hqq", "gptq"]


@dataclass(frozen=True)
class QuantizeWeights(Request):
    """Round weights of MatMul and Gemm to 8 or 4 bits in blocks, and nothing else; needs no samples but for GPTQ.

    Attributes:
        bits: Of a weight. 8 bits lose next to nothing; 4 take half the memory.
        block: Inputs that share a scale. Measured on a CPU with VNNI: 128 is up to 1.5 times as fast as 32, and 256
            hardly faster; the smaller, the nearer to the float weights.
        method: "rtn" rounds each weight to the nearest level; "hqq" fits the levels of each block so that outliers do
            not decide, without data; "gptq" rounds so that the outputs on the samples change least.
        symmetric: Whether all blocks have the middle level as their zero point.
        power_of_two: Whether scales are powers of two.
        activation_order: Whether "gptq" rounds inputs of large energy first.
        head_bits: Of the weights of the last projection, whose result is an output of the graph.
        operators: The types of layers to quantize.
        exclude: Names of nodes to leave in float.
    """

    name: ClassVar[str] = "quantize-weights"

    bits: BlockBits = 8
    block: BlockSize = 128
    method: Method = "rtn"
    symmetric: bool = False
    power_of_two: bool = False
    activation_order: bool = False
    head_bits: BlockBits = 8
    operators: tuple[Literal["Gemm", "MatMul"], ...] = ("Gemm", "MatMul")
    exclude: tuple[str, ...] = ()

    def plan(self, model: ir.Model, samples: Samples | None, score: Score | None) -> BlockProducts:
        """Choose the layers and their bits, and for GPTQ their levels.

        Raises:
            UnsupportedModelError: The model is quantized already, too old, has nothing to quantize, or a weight that is
                not finite.
            SamplesError: GPTQ has no samples, or they do not fit.
            PassSpecError: ``exclude`` names an unknown node.
        """
        del score
        check_quantizable(model, self.name, LEAST_OPSET)
        needs_samples = self.method == "gptq"
        layers, refused = find_layers(model, self.operators, self.exclude, nested=not needs_samples)
        layers, short = _of_a_block(layers, self.block)
        refused += short
        if not layers:
            raise nothing_to_quantize(self.name, refused)
        for layer in layers:
            if not np.isfinite(streamed.largest_magnitudes(layer.weight.tensor, layer.stored_axis)).all():
                raise not_finite(layer)
        schemes = {result_name(layer.node): self._scheme(layer.node, model.graph) for layer in layers}
        shelf = None
        if needs_samples:
            purpose = "on which GPTQ keeps the outputs"
            samples = need_samples(self.name, samples, purpose, ", or use method=hqq, which needs none")
            shelf = fit_to_samples(model, layers, schemes, samples, by_activation=self.activation_order)
        planned = tuple(BlockLayer(name, scheme) for name, scheme in schemes.items())
        return BlockProducts(self.method, planned, tuple(refused), shelf)

    def _scheme(self, node: ir.Node, graph: ir.Graph) -> BlockScheme:
        bits = self.head_bits if _is_head(node, graph) else self.bits
        return BlockScheme(bits, self.block, self.symmetric, self.power_of_two)


@plain_dataclass(frozen=True)
class BlockLayer:
    """A layer that becomes a MatMulNBits.

    Attributes:
        result: The result of the operator, by which it is known.
        scheme: How its weight is rounded.
    """

    result: str
    scheme: BlockScheme


@plain_dataclass(frozen=True)
class BlockProducts(Edit):
    """A plan of weight-only quantization.

    Attributes:
        method: How levels are chosen.
        layers: The layers that become MatMulNBits.
        refusals: What stays float, and why.
        shelf: The weights that GPTQ fitted to samples; None for the other methods.
    """

    tolerance: ClassVar[Tolerance] = Tolerance(
        "The same products, fused and not: a sum in another order moves an input by one level here and there.",
        sqnr_db=QUANTIZED_DB,
    )

    method: Method
    layers: tuple[BlockLayer, ...]
    refusals: tuple[Refusal, ...] = ()
    shelf: Shelf | None = dataclasses.field(default=None, repr=False, compare=False)

    def describe(self) -> Mapping[str, Any]:
        """Return the plan as JSON."""
        return {"method": self.method, "layers": [dataclasses.asdict(layer) for layer in self.layers]}

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Put a MatMulNBits in the place of each layer; layers that share a weight share its levels."""
        if is_quantized(model):
            return ir.passes.PassResult(model, False)
        builder = Builder(model.graph, WeightScheme())
        stored: dict[tuple[object, ...], Sequence[ir.Value]] = {}
        for layer, scheme in self._read(model):
            key = self._key(layer, scheme)
            if key not in stored:
                stored[key] = _store(builder, layer, scheme, self._together(layer, scheme))
            _replace(builder, layer, scheme, stored[key])
        model.opset_imports.setdefault(DOMAIN, 1)
        return ir.passes.PassResult(model, True)

    def reference(self, model: ir.Model) -> None:
        """Make the same products: run unoptimized. Float ones would differ as an outlying input rounds its block."""
        self.call(model)

    def check(self, before: Path, after: Path, feeds: Feeds) -> Sequence[Check]:
        """Compare the whole graph with the unfused one, and what `check_parts` does."""
        return (*super().check(before, after, feeds), *self.check_parts(before, after))

    def check_parts(self, before: Path, after: Path) -> Sequence[Check]:
        """Compare some products, each run alone, with numpy, and their weights with those before."""
        return (check_products(after), check_weights(before, after))

    def _read(self, model: ir.Model) -> list[tuple[Layer, BlockScheme]]:
        nodes = {result_name(node): node for node in model.graph.all_nodes()}
        found: list[tuple[Layer, BlockScheme]] = []
        for planned in self.layers:
            layer = read_layer(nodes[planned.result])
            assert isinstance(layer, Layer), f"{planned.result} was planned as a layer"
            found.append((layer, planned.scheme))
        return found

    def _key(self, layer: Layer, scheme: BlockScheme) -> tuple[object, ...]:
        """Return what makes two layers' levels the same; those of GPTQ depend on what a layer reads."""
        reader = result_name(layer.node) if self.shelf is not None else None
        return (id(layer.weight.tensor), layer.stored_axis, layer.alpha, scheme, reader)

    def _together(self, layer: Layer, scheme: BlockScheme) -> Together:
        """Return levels, scales and zero points, which are computed while the model is written."""
        name, alpha, shelf = result_name(layer.node), np.float32(layer.alpha), self.shelf
        tensor, axis = layer.weight.tensor, layer.stored_axis
        find_grid = half_quadratic_grid if self.method == "hqq" else nearest_grid

        def compute() -> Sequence[Array]:
            found = pack(tensor, axis, scheme, find_grid) if shelf is None else shelf.read(name)
            return found.levels, found.scales * alpha, found.zeros

        return Together(compute)


def _of_a_block(layers: Sequence[Layer], block: int) -> tuple[list[Layer], list[Refusal]]:
    able: list[Layer] = []
    refused: list[Refusal] = []
    for layer in layers:
        inputs, _ = _sizes(layer)
        if inputs < block:
            refused.append(refusal(layer.node, f"it has {inputs} inputs, fewer than a block of {block}"))
        else:
            able.append(layer)
    return able, refused


def _sizes(layer: Layer) -> tuple[int, int]:
    """Return how many inputs and outputs a layer has."""
    return layer.weight.shape[1 - layer.axis], layer.channels


def _is_head(node: ir.Node, graph: ir.Graph) -> bool:
    """Say whether the result of ``node`` is an output of ``graph``, but for a bias, a change of shape or a softmax."""
    value = node.outputs[0]
    while value not in graph.outputs:
        reader = only_reader(value)
        if reader is None or reader.domain != "":
            return False
        is_affine = reader.op_type in _WITH_CONSTANT and any(
            constant(other) is not None for other in reader.inputs if other is not value
        )
        if not is_affine and reader.op_type not in _AFTER_HEAD:
            return False
        value = reader.outputs[0]
    return True


def _store(builder: Builder, layer: Layer, scheme: BlockScheme, together: Together) -> Sequence[ir.Value]:
    """Add levels, scales and, where they differ from the middle, zero points."""
    inputs, outputs = _sizes(layer)
    blocks, name = scheme.blocks(inputs), layer.weight.tensor.name
    parts = [
        (f"{name}_levels", ir.DataType.UINT8, (outputs, blocks, scheme.bytes_of(scheme.size))),
        (f"{name}_scales", ir.DataType.FLOAT, (outputs, blocks)),
        (f"{name}_zero_points", ir.DataType.UINT8, (outputs, scheme.bytes_of(blocks))),
    ]
    return [
        builder.stored(called, partial(together.take, index), dtype, shape)
        for index, (called, dtype, shape) in enumerate(parts[: 2 if scheme.symmetric else 3])
    ]


def _replace(builder: Builder, layer: Layer, scheme: BlockScheme, stored: Sequence[ir.Value]) -> None:
    """Put a MatMulNBits in the place of ``layer``."""
    node, (inputs, outputs), bias = layer.node, _sizes(layer), layer.bias_values()
    operands = [node.inputs[0], *stored]
    if bias is not None:
        absent = [None] * (5 - len(operands))
        operands += [*absent, builder.constant(f"{result_name(node)}_bias", bias)]
    result = node.outputs[0]
    attributes = {
        "K": inputs,
        "N": outputs,
        "bits": scheme.bits,
        "block_size": scheme.size,
        "accuracy_level": ACCURACY_LEVEL,
    }
    made = ir.Node(
        DOMAIN,
        "MatMulNBits",
        operands,
        ir.convenience.convert_attributes(attributes),
        outputs=[ir.Value(name=result.name, type=ir.TensorType(ir.DataType.FLOAT), shape=result.shape)],
        name=node.name,
    )
    replaced = list(node.inputs[1:])
    assert node.graph is not None, "a layer is in a graph"
    ir.convenience.replace_nodes_and_values(node.graph, node, [node], [made], [result], list(made.outputs))
    builder.drop_unused(replaced)
