"""Static quantization: ranges from calibration samples, integers from operator to operator."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping
from dataclasses import dataclass as plain_dataclass
from pathlib import Path
from typing import Annotated, ClassVar, Literal

import onnx_ir as ir
from pydantic import Field
from pydantic.dataclasses import dataclass

from onnx_lathe.passes.edit import Refusal
from onnx_lathe.passes.quantize import params, ranges_file
from onnx_lathe.passes.quantize.grid import GridFit, fit_to_grid
from onnx_lathe.passes.quantize.histogram import Extremes, Histogram
from onnx_lathe.passes.quantize.insert_qdq import InsertQDQ, RoundedValue
from onnx_lathe.passes.quantize.layers import (
    Layer,
    check_quantizable,
    find_layers,
    nothing_to_quantize,
    result_name,
)
from onnx_lathe.passes.quantize.observe import MEMORY, observe
from onnx_lathe.passes.quantize.plan import Placement, place
from onnx_lathe.passes.quantize.scheme import Affine, WeightExponent, WeightScheme, exact_weight_bits
from onnx_lathe.passes.quantize.tables import find_tables, table_names
from onnx_lathe.passes.request import Request, Score
from onnx_lathe.passes.taps import need_samples
from onnx_lathe.runtime import providers
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
        operators: The types of layers to quantize; Gather stands for lookups in large tables (embeddings), which
            become int8 with a scale a row, whatever the other options.
        exclude: Names of nodes to leave in float.
        memory: Megabytes (10^6 bytes) that the values observed in one run may take.
        ranges_file: A JSON file of ranges: where it is there they are read from it and no samples are needed, else it
            is written. It can be edited. A file whose ranges were chosen in another way than ``ranges`` asks for is
            refused; the default takes all.
    """

    name: ClassVar[str] = "quantize-static"

    ranges: Literal["minmax", "percentile", "mse", "kl"] = "minmax"
    percentile: Annotated[float, Field(gt=0.0, le=100.0)] = 99.99
    per_channel: bool = True
    power_of_two: bool = False
    weight_exponent: WeightExponent | None = None
    weight_bits: Literal[7, 8] | None = None
    operators: tuple[Literal["Conv", "Gemm", "MatMul", "Gather"], ...] = ("Conv", "Gemm", "MatMul", "Gather")
    exclude: tuple[str, ...] = ()
    memory: Annotated[int, Field(ge=1)] = MEMORY
    ranges_file: str | None = None

    def plan(self, model: ir.Model, samples: Samples | None, score: Score | None) -> InsertQDQ:
        """Place the integers, run the samples and choose the ranges.

        Raises:
            UnsupportedModelError: The model is quantized already, too old, or has nothing to quantize.
            SamplesError: There are no samples, or they do not fit.
            PassSpecError: ``exclude`` names an unknown node.
            InputError: The file of ranges does not fit the model, or was made in another way than is asked for.
        """
        del score
        able = self._find(model)
        placement = self._place(model, able)
        ranges = self._ranges(model, placement.values, samples)
        return dataclasses.replace(self._edit(able, placement, ranges), tables=able.tables)

    def plan_each(self, model: ir.Model, samples: Samples | None) -> dict[str, InsertQDQ]:
        """Return for each layer and table that `plan` rounds a plan that rounds it alone, by its result.

        A layer that stands between float operators then may be one that does not earn its rounding there.

        Raises:
            LatheError: As of `plan`.
        """
        able = self._find(model)
        together = self._place(model, able)
        planned = {layer.result for layer in together.layers}
        alone = {
            result_name(layer.node): place(model, [layer], free_scales=not self.power_of_two, lone=True)
            for layer in able.layers
            if result_name(layer.node) in planned
        }
        # Those of `plan` too: a file of ranges then serves both.
        names = dict.fromkeys(name for placement in (together, *alone.values()) for name in placement.values)
        ranges = self._ranges(model, names, samples)
        tables = {name: InsertQDQ(able.weights, (), (), (), tables=(name,)) for name in able.tables}
        return {result: self._edit(able, placement, ranges) for result, placement in alone.items()} | tables

    def _find(self, model: ir.Model) -> _Able:
        """Return the layers that integers can hold."""
        check_quantizable(model, self.name, LEAST_OPSET)
        layers, refused = find_layers(model, self.operators, self.exclude)
        bits = self.weight_bits or exact_weight_bits(providers.cpu_class())
        per_channel = self.per_channel and self.weight_exponent is None
        weights = WeightScheme(bits, per_channel, self.power_of_two, self.weight_exponent)
        layers, fits, empty = fit_to_grid(layers, weights)
        tables, left = find_tables(model.graph, self.exclude) if "Gather" in self.operators else ([], [])
        return _Able(weights, tuple(layers), fits, (*refused, *empty, *left), table_names(tables))

    def _place(self, model: ir.Model, able: _Able) -> Placement:
        placement = place(model, able.layers, free_scales=not self.power_of_two)
        if not placement.layers:
            raise nothing_to_quantize(self.name, (*able.refused, *placement.refused))
        return placement

    def _ranges(self, model: ir.Model, names: Collection[str], samples: Samples | None) -> dict[str, params.Range]:
        """Return the range of each value: from the file where there is one, else observed, and then written there."""
        path = None if self.ranges_file is None else Path(self.ranges_file)
        if path is not None and path.exists():
            asked = None if self.ranges == "minmax" else self._method
            return ranges_file.read(path, _value_names(model), names, asked)
        purpose = "from which the ranges of values are read" + (f" where {path} is not there" if path else "")
        samples = need_samples(self.name, samples, purpose, ", or use quantize-dynamic, which needs none")
        kind = Extremes if self.ranges == "minmax" else Histogram
        seen: dict[str, Extremes] = {name: kind() for name in names}
        observe(model, seen, samples, memory=self.memory)
        chosen = {name: params.choose_range(values, self.ranges, self.percentile) for name, values in seen.items()}
        if path is not None:
            ranges_file.write(self._as_file(chosen, seen, len(samples)), path)
        return chosen

    @property
    def _method(self) -> str:
        return f"percentile {self.percentile:g}" if self.ranges == "percentile" else self.ranges

    def _as_file(
        self, chosen: Mapping[str, params.Range], seen: Mapping[str, Extremes], samples: int
    ) -> ranges_file.Ranges:
        values = {
            name: ranges_file.ValueRange(low, high, *(seen[name].ends or (None, None)))
            for name, (low, high) in chosen.items()
        }
        return ranges_file.Ranges(self._method, samples, values)

    def _edit(self, able: _Able, placement: Placement, ranges: Mapping[str, params.Range]) -> InsertQDQ:
        planned = {layer.result for layer in placement.layers}
        affine = self._affine(placement, ranges)
        return InsertQDQ(
            weights=able.weights,
            layers=placement.layers,
            readers=placement.readers,
            values=tuple(RoundedValue(name, affine[name], by_all) for name, by_all in placement.values.items()),
            fences=placement.fences,
            refusals=(*able.refused, *placement.refused),
            fits=tuple(fit for fit in able.fits if fit.layer in planned),
        )

    def _affine(self, placement: Placement, ranges: Mapping[str, params.Range]) -> dict[str, Affine]:
        """Return the levels of each value; values that must agree get the union of their ranges."""
        chosen = {name: ranges[name] for name in placement.values}
        for group in placement.groups:
            lows, highs = zip(*(chosen[name] for name in group), strict=True)
            chosen |= dict.fromkeys(group, (min(lows), max(highs)))
        return {
            name: params.activation(low, high, power_of_two=self.power_of_two) for name, (low, high) in chosen.items()
        }


@plain_dataclass(frozen=True)
class _Able:
    """The layers and tables that integers can hold, how their weights are rounded, and what stays float."""

    weights: WeightScheme
    layers: tuple[Layer, ...]
    fits: tuple[GridFit, ...]
    refused: tuple[Refusal, ...]
    tables: tuple[str, ...]


def _value_names(model: ir.Model) -> set[str]:
    values = [*model.graph.inputs, *(value for node in model.graph for value in node.outputs)]
    return {value.name or "" for value in values}
