"""Cross-layer equalization: neighbouring layers share the width of each channel, so that one scale a tensor fits all.

Nagel et al., "Data-Free Quantization Through Weight Equalization and Bias Correction" (2019, arXiv:1906.04721), section
4.1: ``s_i = sqrt(r1_i r2_i) / r2_i`` with ``r1_i`` the range of output channel i of a layer and ``r2_i`` that of input
channel i of the next; ``W1, b1 /= s``, ``W2 *= s``. Layers in a row are gone over until nothing moves.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import numpy as np
import onnx_ir as ir
from pydantic.dataclasses import dataclass

from onnx_lathe.passes.quantize.layers import Layer, check_quantizable, find_layers, not_finite, result_name
from onnx_lathe.passes.repair.kernels import Vector, largest_by_input, largest_by_output
from onnx_lathe.passes.repair.pairs import Pair, find_pairs, form_of, inputs_count
from onnx_lathe.passes.repair.rescale import Rescaled, Scaling, Step
from onnx_lathe.passes.repair.shapes import Shapes
from onnx_lathe.passes.request import Request, Score
from onnx_lathe.runtime.errors import UnsupportedModelError
from onnx_lathe.runtime.samples import Samples

OPERATORS = ("Conv", "Gemm", "MatMul")
LEAST_OPSET = 7
"""The first opset whose operators broadcast as numpy does."""
ROUNDS = 40
"""Times at most that all pairs are gone over: in a long row of layers a change travels one layer a round."""
STILL = 0.01
"""How little, relative, a round must change for it to be the last; what moves less in all is left alone."""


@dataclass(frozen=True)
class Equalize(Request):
    """Equalize the channels of neighbouring layers, exactly and without data, before rounding with one scale a tensor.

    Attributes:
        exclude: Names of nodes to leave alone.
    """

    name: ClassVar[str] = "equalize"

    exclude: tuple[str, ...] = ()

    def plan(self, model: ir.Model, samples: Samples | None, score: Score | None) -> Rescaled:
        """Find the pairs and their factors.

        Raises:
            UnsupportedModelError: The model is quantized already, a weight is not finite, or no two layers can share.
            PassSpecError: ``exclude`` names an unknown node.
        """
        del samples, score
        check_quantizable(model, self.name, LEAST_OPSET)
        layers, refused = find_layers(model, OPERATORS, self.exclude)
        pairs, lone = find_pairs(model, layers, Shapes(model))
        divisors = equalized(pairs)
        moved = [(pair, s) for pair, s in zip(pairs, divisors, strict=True) if np.abs(np.log(s)).max() > STILL]
        if not moved:
            reasons = sorted({refusal.reason for refusal in lone})
            raise UnsupportedModelError(
                self.name,
                got="no pair of layers to equalize" + (f": {'; '.join(reasons)}" if reasons else ""),
                expected="a Conv, Gemm or MatMul whose result another reads alone, through Relu or the like",
                mend="Leave the pass out; per_channel=true serves such layers.",
            )
        scaling = Scaling()
        for pair, s in moved:
            scaling.pair(pair, s)
        return Rescaled(
            suffix="equalized",
            steps=tuple(
                Step(result_name(pair.first.node), (result_name(pair.way.layer.node),), "folded", *_ends(s))
                for pair, s in moved
            ),
            weights=scaling.weights(),
            constants=tuple(scaling.constants),
            refusals=(*refused, *lone),
        )


def equalized(pairs: Sequence[Pair]) -> list[Vector]:
    """Return what the channels between the layers of each pair are divided by, ``[channels]``.

    Raises:
        UnsupportedModelError: A weight is not finite.
    """
    layers = {layer.node: layer for pair in pairs for layer in (pair.first, pair.way.layer)}
    outputs = {node: np.ones(layer.channels) for node, layer in layers.items()}
    inputs = {node: np.ones(inputs_count(layer)) for node, layer in layers.items()}
    total = [np.ones(pair.first.channels) for pair in pairs]
    for _ in range(ROUNDS):
        largest = 0.0
        for number, pair in enumerate(pairs):
            first, second = pair.first.node, pair.way.layer.node
            made = _by_output(pair.first, inputs[first]) * outputs[first]
            read = np.zeros(pair.first.channels)
            np.maximum.at(read, pair.way.channels, _by_input(pair.way.layer, outputs[second]) * inputs[second])
            # A channel that nothing makes or reads has no width to share.
            used = (made > 0.0) & (read > 0.0)
            s = np.sqrt(np.divide(made, read, out=np.ones_like(made), where=used))
            outputs[first] /= s
            inputs[second] *= s[pair.way.channels]
            total[number] *= s
            largest = max(largest, float(np.abs(np.log(s)).max()))
        if largest < STILL:
            break
    return total


def _by_output(layer: Layer, factors: Vector) -> Vector:
    weight = layer.weight.read()
    return _finite(layer, largest_by_output(weight, form_of(layer), factors))


def _by_input(layer: Layer, factors: Vector) -> Vector:
    weight = layer.weight.read()
    return _finite(layer, largest_by_input(weight, form_of(layer), factors))


def _finite(layer: Layer, largest: Vector) -> Vector:
    if not np.isfinite(largest).all():
        raise not_finite(layer)
    return largest


def _ends(divisors: Vector) -> tuple[float, float]:
    return float(divisors.min()), float(divisors.max())
