"""Bias correction: what rounded weights shift in the mean of each output is taken back by its bias.

Nagel et al., "Data-Free Quantization Through Weight Equalization and Bias Correction" (2019, arXiv:1906.04721), section
4.2: ``b -= (W_hat - W) E[x]``. The expectation is taken on samples, layer by layer, in a network whose weights are all
rounded and whose biases are corrected as far as the last round found: the first round sees the shifts of earlier
layers, the second no more than what is left of them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass as plain_dataclass
from typing import Annotated, Any, ClassVar

import numpy as np
import onnx_ir as ir
from pydantic import Field
from pydantic.dataclasses import dataclass

from onnx_lathe.passes.edit import Edit, Refusal
from onnx_lathe.passes.oracle import Tolerance
from onnx_lathe.passes.quantize import params
from onnx_lathe.passes.quantize.layers import Layer, constant, only_reader, read_layer, result_name
from onnx_lathe.passes.quantize.scheme import WeightScheme
from onnx_lathe.passes.repair.kernels import Vector, mean_response
from onnx_lathe.passes.repair.pairs import form_of
from onnx_lathe.passes.repair.rewriter import Rewriter, nodes_of
from onnx_lathe.passes.repair.statistics import input_statistics
from onnx_lathe.passes.repair.target import BeforeRounding, multiplied, nearest
from onnx_lathe.passes.request import Score
from onnx_lathe.passes.taps import need_samples
from onnx_lathe.runtime.errors import UnsupportedModelError
from onnx_lathe.runtime.samples import Samples

_SUFFIX = "corrected"


@dataclass(frozen=True)
class CorrectBiases(BeforeRounding):
    """Shift biases by what rounded weights will shift the mean of each output; needs samples, before quantization.

    Give it the options of the quantization that follows. A layer without a bias gets one.

    Attributes:
        rounds: Times that the network runs over the samples, each time with the biases that the last one found.
    """

    name: ClassVar[str] = "correct-biases"

    rounds: Annotated[int, Field(ge=1)] = 2

    def plan(self, model: ir.Model, samples: Samples | None, score: Score | None) -> BiasesCorrected:
        """Run the samples through the network with rounded weights and read the means.

        Raises:
            UnsupportedModelError: The model is quantized already or has nothing to quantize, a weight is not finite, or
                rounding shifts no mean.
            SamplesError: There are no samples, or they do not fit.
            PassSpecError: ``exclude`` names an unknown node.
        """
        del score
        layers, refused = self.rounded_layers(model)
        samples = need_samples(self.name, samples, "from which the mean of each input channel is read")
        scheme = self.scheme()
        shifts = {layer.node: np.zeros(layer.channels) for layer in layers}
        for _ in range(self.rounds):
            statistics = input_statistics(_rounded(model, layers, scheme, shifts), layers, samples)
            shifts = {layer.node: _shift(layer, scheme, statistics[layer.node].mean) for layer in layers}
        moved = [layer for layer in layers if shifts[layer.node].any()]
        if not moved:
            raise UnsupportedModelError(
                self.name,
                got="weights whose rounding shifts no mean",
                expected="weights that rounding changes",
                mend="Leave the pass out: the weights are on their grid already.",
            )
        return BiasesCorrected(tuple(_correction(layer, shifts[layer.node]) for layer in moved), tuple(refused))


@plain_dataclass(frozen=True, eq=False)
class Correction:
    """What happens to the bias of one layer.

    Attributes:
        layer: The result of the layer.
        node: The first result of the node that adds the bias: the layer, or the Add behind a MatMul.
        index: As which input it reads the bias.
        source: The value it reads; None where there is none yet.
        shift: What each output gains, ``[channels]``.
    """

    layer: str
    node: str
    index: int
    source: str | None
    shift: Vector


@plain_dataclass(frozen=True, eq=False)
class BiasesCorrected(Edit):
    """A plan of shifted biases.

    Attributes:
        corrections: What each output gains.
        refusals: What stays float, and why.
    """

    tolerance: ClassVar[Tolerance] = Tolerance(
        "the same sums, with the shift added before or after the bias, through a whole network in float32",
        relative=1e-4,
    )

    corrections: tuple[Correction, ...]
    refusals: tuple[Refusal, ...] = ()

    def describe(self) -> Mapping[str, Any]:
        """Return how far the outputs of each layer are shifted."""
        return {
            "corrections": [
                {
                    "layer": item.layer,
                    "new_bias": item.source is None,
                    "largest": float(np.abs(item.shift).max()),
                    "root_mean_square": float(np.sqrt(np.square(item.shift).mean())),
                }
                for item in self.corrections
            ]
        }

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Shift the biases that are still those of the plan, and add those that lack."""
        nodes, rewriter = nodes_of(model.graph), Rewriter(model.graph, _SUFFIX)
        modified = False
        for item in self.corrections:
            node = nodes.get(item.node)
            if node is None or not _is_planned(node, item):
                continue
            if node.op_type == "Add":
                _shift_addend(rewriter, node, item)
            elif node.op_type == "MatMul":
                _add_behind(rewriter, node, item.shift)
            else:
                layer = read_layer(node)
                assert isinstance(layer, Layer), f"{item.layer} was planned as a layer"
                _shift_bias(rewriter, layer, item.shift)
            modified = True
        return ir.passes.PassResult(model, modified)

    def reference(self, model: ir.Model) -> None:
        """Add the shift to the result of each layer, as a node of its own."""
        nodes, rewriter = nodes_of(model.graph), Rewriter(model.graph, "shifted")
        for item in self.corrections:
            _add_behind(rewriter, nodes[item.layer], item.shift)


def _rounded(
    model: ir.Model, layers: Sequence[Layer], scheme: WeightScheme, shifts: Mapping[ir.Node, Vector]
) -> ir.Model:
    """Return a copy of ``model`` with rounded weights and shifted results; every value keeps its name."""
    copy = model.clone()
    nodes, rewriter = nodes_of(copy.graph), Rewriter(copy.graph, "rounded")
    for layer in layers:
        node = nodes[result_name(layer.node)]
        key = (scheme, layer.axis, layer.alpha)
        rewriter.swap(node, 1, nearest(layer, scheme), layer.weight.shape, key)
        node.attributes.pop("alpha", None)
        _add_behind(rewriter, node, shifts[layer.node])
    return copy


def _shift(layer: Layer, scheme: WeightScheme, means: Vector) -> Vector:
    """Return ``-(W_hat - W) E[x]``, ``[channels]``."""
    weight = multiplied(layer)
    scales = params.weight_scales(weight, layer.axis, scheme)
    levels = params.quantize_weight(weight, scales, layer.axis, scheme)
    difference = weight - levels * params.along(scales, layer.axis, weight.ndim)
    return mean_response(difference, form_of(layer), means)


def _correction(layer: Layer, shift: Vector) -> Correction:
    """Return where the bias of a layer is added."""
    name, node = result_name(layer.node), layer.node
    if node.op_type != "MatMul":
        return Correction(name, name, 2, _bias_name(node, 2), shift)
    add = only_reader(node.outputs[0])
    if add is not None and add.op_type == "Add" and add.domain == "" and add.graph is node.graph:
        index = 1 if add.inputs[0] is node.outputs[0] else 0
        if constant(add.inputs[index]) is not None:
            return Correction(name, result_name(add), index, _bias_name(add, index), shift)
    return Correction(name, name, 2, None, shift)


def _is_planned(node: ir.Node, item: Correction) -> bool:
    """Say whether ``node`` still adds the bias that it added when the correction was planned."""
    is_add = node.op_type == "Add"
    return is_add == (item.node != item.layer) and _bias_name(node, item.index) == item.source


def _bias_name(node: ir.Node, index: int) -> str | None:
    value = node.inputs[index] if index < len(node.inputs) else None
    return None if value is None else value.name


def _shift_addend(rewriter: Rewriter, add: ir.Node, item: Correction) -> None:
    found = constant(add.inputs[item.index])
    assert found is not None, f"{item.source} was planned as a constant"
    values = found.arrange(found.tensor.numpy())
    rewriter.put(add, item.index, (values + item.shift).astype(values.dtype))


def _shift_bias(rewriter: Rewriter, layer: Layer, shift: Vector) -> None:
    """Give a Conv or Gemm its bias, with the factor that a Gemm puts on it, and the shift."""
    bias = layer.bias_values()
    values = shift if bias is None else bias + shift
    layer.node.attributes.pop("beta", None)
    rewriter.put(layer.node, 2, values.astype(np.float32))


def _add_behind(rewriter: Rewriter, node: ir.Node, shift: Vector) -> None:
    """Add a shift to the result of a layer; the sum takes the name of the result and its readers."""
    vector = shift.astype(np.float32)
    if node.op_type == "Conv":
        weight = constant(node.inputs[1])
        assert weight is not None, "a layer has a constant weight"
        vector = vector.reshape(-1, *[1] * (len(weight.shape) - 2))
    rewriter.take_over(node.outputs[0], "Add", vector)
