"""Static quantization: ranges from calibration samples, integers from operator to operator."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, ClassVar, Literal

import onnx_ir as ir
from pydantic import Field
from pydantic.dataclasses import dataclass

from onnx_lathe.passes.quantize import params
from onnx_lathe.passes.quantize.grid import fit_to_grid
from onnx_lathe.passes.quantize.histogram import Histogram
from onnx_lathe.passes.quantize.insert_qdq import InsertQDQ, RoundedValue
from onnx_lathe.passes.quantize.layers import check_quantizable, find_layers, nothing_to_quantize
from onnx_lathe.passes.quantize.observe import observe
from onnx_lathe.passes.quantize.plan import Placement, place
from onnx_lathe.passes.quantize.scheme import Affine, WeightExponent, WeightScheme, exact_weight_bits
from onnx_lathe.passes.request import Request, Score
from onnx_lathe.runtime import providers
from onnx_lathe.runtime.errors import SamplesError
from onnx_lathe.runtime.samples import Samples

LEAST_OPSET = 13
"""The first opset whose DequantizeLinear takes a scale a channel."""


@dataclass(frozen=True)
class QuantizeStatic(Request):
    """Round weights to int8 and what the layers read to uint8, with ranges from calibration samples.

    Attributes:
        ranges: How a range is chosen: "minmax" covers all values seen; "percentile" leaves out the outermost; "mse" has
            the least squared error; "kl" changes the distribution least.
        percentile: The percent of values that "percentile" keeps.
        per_channel: Whether each output channel of a weight has its own scale.
        power_of_two: Whether scales are powers of two (fixed point).
        weight_exponent: The step of every weight is 2 to this power instead of one that is read from the weights, which
            are rounded by ``round(w / 2^k) 2^k``; entries beyond the 8 bits are clamped.
        weight_bits: 8, or 7 for CPUs whose 8-bit products saturate; None decides by the CPU at hand.
        operators: The types of layers to quantize.
        exclude: Names of nodes to leave in float.
    """

    name: ClassVar[str] = "quantize-static"

    ranges: Literal["minmax", "percentile", "mse", "kl"] = "minmax"
    percentile: Annotated[float, Field(gt=0.0, le=100.0)] = 99.99
    per_channel: bool = True
    power_of_two: bool = False
    weight_exponent: WeightExponent | None = None
    weight_bits: Literal[7, 8] | None = None
    operators: tuple[Literal["Conv", "Gemm", "MatMul"], ...] = ("Conv", "Gemm", "MatMul")
    exclude: tuple[str, ...] = ()

    def plan(self, model: ir.Model, samples: Samples | None, score: Score | None) -> InsertQDQ:
        """Place the integers, run the samples and choose the ranges.

        Raises:
            UnsupportedModelError: The model is quantized already, too old, or has nothing to quantize.
            SamplesError: There are no samples, or they do not fit.
            PassSpecError: ``exclude`` names an unknown node.
        """
        del score
        check_quantizable(model, self.name, LEAST_OPSET)
        layers, refused = find_layers(model, self.operators, self.exclude)
        bits = self.weight_bits or exact_weight_bits(providers.cpu_class())
        per_channel = self.per_channel and self.weight_exponent is None
        weights = WeightScheme(bits, per_channel, self.power_of_two, self.weight_exponent)
        layers, fits, empty = fit_to_grid(layers, weights)
        refused += empty
        placement = place(model, layers, free_scales=not self.power_of_two)
        refused += placement.refused
        if not placement.layers:
            raise nothing_to_quantize(self.name, refused)
        if samples is None:
            raise SamplesError(
                self.name,
                got="no samples",
                expected="calibration samples, from which the ranges of values are read",
                mend="Give some hundred typical samples with --data, or use quantize-dynamic, which needs none.",
            )
        planned = {layer.result for layer in placement.layers}
        affine = self._affine(placement, observe(model, list(placement.values), samples))
        return InsertQDQ(
            weights=weights,
            layers=placement.layers,
            readers=placement.readers,
            values=tuple(RoundedValue(name, affine[name], by_all) for name, by_all in placement.values.items()),
            fences=placement.fences,
            refusals=tuple(refused),
            fits=tuple(fit for fit in fits if fit.layer in planned),
        )

    def _affine(self, placement: Placement, histograms: Mapping[str, Histogram]) -> dict[str, Affine]:
        """Return the levels of each value; values that must agree get the union of their ranges."""
        chosen = {
            name: params.choose_range(histogram, self.ranges, self.percentile) for name, histogram in histograms.items()
        }
        for group in placement.groups:
            lows, highs = zip(*(chosen[name] for name in group), strict=True)
            chosen |= dict.fromkeys(group, (min(lows), max(highs)))
        return {
            name: params.activation(low, high, power_of_two=self.power_of_two) for name, (low, high) in chosen.items()
        }
