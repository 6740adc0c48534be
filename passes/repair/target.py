"""What a later quantization will round, for repairs that must know: its options, its layers, its levels."""

from __future__ import annotations

from abc import ABC
from collections.abc import Callable
from typing import Literal

import numpy as np
import onnx_ir as ir
from pydantic.dataclasses import dataclass

from onnx_lathe.passes.edit import Refusal
from onnx_lathe.passes.quantize import params
from onnx_lathe.passes.quantize.grid import fit_to_grid
from onnx_lathe.passes.quantize.layers import Layer, check_quantizable, find_layers, not_finite, nothing_to_quantize
from onnx_lathe.passes.quantize.plan import place
from onnx_lathe.passes.quantize.scheme import WeightExponent, WeightScheme, exact_weight_bits
from onnx_lathe.passes.quantize.streamed import largest_magnitudes
from onnx_lathe.passes.repair.equalize import LEAST_OPSET
from onnx_lathe.passes.request import Request
from onnx_lathe.runtime import providers
from onnx_lathe.runtime.samples import Array


@dataclass(frozen=True)
class BeforeRounding(Request, ABC):
    """A repair for the weights that quantize-static, with the same options, will round.

    Attributes:
        per_channel: Whether each output channel of a weight has its own scale.
        power_of_two: Whether scales are powers of two (fixed point).
        weight_exponent: The step of every weight is 2 to this power.
        weight_bits: 8, or 7 for CPUs whose 8-bit products saturate; None decides by the CPU at hand.
        operators: The types of layers to quantize.
        exclude: Names of nodes to leave alone.
    """

    per_channel: bool = True
    power_of_two: bool = False
    weight_exponent: WeightExponent | None = None
    weight_bits: Literal[7, 8] | None = None
    operators: tuple[Literal["Conv", "Gemm", "MatMul"], ...] = ("Conv", "Gemm", "MatMul")
    exclude: tuple[str, ...] = ()

    def scheme(self) -> WeightScheme:
        """Return how weights will be rounded."""
        bits = self.weight_bits or exact_weight_bits(providers.cpu_class())
        per_channel = self.per_channel and self.weight_exponent is None
        return WeightScheme(bits, per_channel, self.power_of_two, self.weight_exponent)

    def rounded_layers(self, model: ir.Model) -> tuple[list[Layer], list[Refusal]]:
        """Return the layers that will run in integers, and what stays float with the reason.

        Raises:
            UnsupportedModelError: The model is quantized already or has nothing to quantize, or a weight is not finite.
            PassSpecError: ``exclude`` names an unknown node.
        """
        check_quantizable(model, self.name, LEAST_OPSET)
        layers, refused = find_layers(model, self.operators, self.exclude)
        for layer in layers:
            if not np.isfinite(largest_magnitudes(layer.weight.tensor, layer.stored_axis)).all():
                raise not_finite(layer)
        layers, _, empty = fit_to_grid(layers, self.scheme())
        placement = place(model, layers, free_scales=not self.power_of_two)
        refused += [*empty, *placement.refused]
        planned = {layer.result for layer in placement.layers}
        layers = [layer for layer in layers if layer.node.outputs[0].name in planned]
        if not layers:
            raise nothing_to_quantize(self.name, refused)
        return layers, refused


def multiplied(layer: Layer) -> Array:
    """Return what a layer multiplies by, as its operator reads it, with the factor of a Gemm."""
    weight = layer.weight.read()
    return weight if layer.alpha == 1.0 else weight * np.float32(layer.alpha)


def nearest(layer: Layer, scheme: WeightScheme) -> Callable[[Array], Array]:
    """Return what makes, of a layer's weight as its operator reads it, the nearest levels as real numbers."""
    axis, alpha = layer.axis, np.float32(layer.alpha)

    def compute(weight: Array) -> Array:
        scales = params.weight_scales(weight * alpha, axis, scheme)
        levels = params.quantize_weight(weight * alpha, scales, axis, scheme)
        return levels * params.along(scales, axis, weight.ndim)

    return compute
