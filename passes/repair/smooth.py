"""SmoothQuant: outlying channels of activations move into weights, where each has room (Xiao et al. 2023).

The divisors go where they cost nothing: into the affine part of the normalization that the layers read, and into the
weights of a layer whose channels another reads through nothing but scaling (values into the output projection of
attention, a Relu between two layers). A normalization that others read too, the skip connection of BERT's encoders,
stays as it is, and its layers read it behind one Mul: a fold would need the same Mul on the skip connection.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass as plain_dataclass
from typing import Annotated, ClassVar, Literal

import numpy as np
import onnx_ir as ir
from pydantic import Field
from pydantic.dataclasses import dataclass

from onnx_lathe.passes.edit import Refusal
from onnx_lathe.passes.quantize.layers import (
    Layer,
    check_quantizable,
    constant,
    find_layers,
    not_finite,
    only_reader,
    refusal,
    result_name,
)
from onnx_lathe.passes.quantize.scheme import WeightScheme, exact_weight_bits
from onnx_lathe.passes.repair.equalize import LEAST_OPSET, OPERATORS
from onnx_lathe.passes.repair.kernels import Vector, kernels, largest_by_input
from onnx_lathe.passes.repair.pairs import Pair, Track, Way, find_pairs, form_of, readers_of, trace_use
from onnx_lathe.passes.repair.rescale import Rescaled, ScaledBranch, Scaling, Step
from onnx_lathe.passes.repair.shapes import Shapes
from onnx_lathe.passes.repair.smoothing import rounding_error, smoothing
from onnx_lathe.passes.repair.statistics import ChannelStatistics, input_statistics
from onnx_lathe.passes.request import Request, Score
from onnx_lathe.passes.taps import need_samples
from onnx_lathe.runtime import providers
from onnx_lathe.runtime.errors import UnsupportedModelError
from onnx_lathe.runtime.samples import Array, Samples

_AFFINE: Mapping[str, tuple[int, ...]] = {
    "LayerNormalization": (1, 2),
    "RMSNormalization": (1,),
    "SimplifiedLayerNormalization": (1,),
    "SkipLayerNormalization": (2, 3),
    "SkipSimplifiedLayerNormalization": (2,),
}
"""Normalizations, and as which inputs they read their scale and their shift."""
GRID = (0.3, 0.4, 0.5, 0.6, 0.7, 0.8)
"""The numbers that a search tries: beyond, single layers gain on the samples and whole networks lose (seen: 0.4 dB)."""
ROWS = 256
"""About how many rows of what a layer reads a search computes with."""

Place = tuple[ir.Node, int]
"""A node and one of its inputs."""


@dataclass(frozen=True)
class Smooth(Request):
    """Move outlying channels of activations into weights before rounding (SmoothQuant); needs samples.

    Attributes:
        alpha: How much moves, in 0..1; "search" takes for each place the number of 0.3 .. 0.8 with the least output
            error of its layers with rounded weights and inputs, and leaves alone what none makes better.
        insert: Whether a normalization that others read too gets a Mul before its layers; else they are left alone.
        exclude: Names of nodes to leave alone.
    """

    name: ClassVar[str] = "smooth"

    alpha: Annotated[float, Field(ge=0.0, le=1.0)] | Literal["search"] = 0.5
    insert: bool = True
    exclude: tuple[str, ...] = ()

    def plan(self, model: ir.Model, samples: Samples | None, score: Score | None) -> Rescaled:
        """Find the places, run the samples and choose the divisors.

        Raises:
            UnsupportedModelError: The model is quantized already, a weight is not finite, or nothing can be smoothed.
            SamplesError: There are no samples, or they do not fit.
            PassSpecError: ``exclude`` names an unknown node.
        """
        del score
        check_quantizable(model, self.name, LEAST_OPSET)
        layers, refused = find_layers(model, OPERATORS, self.exclude)
        places, left = _find(model, layers, insert=self.insert)
        refused += left
        if not places:
            raise self._nothing(refused)
        samples = need_samples(self.name, samples, "from which the largest value of each channel is read")
        readers = [way.layer for place in places for way in place.ways]
        statistics = input_statistics(model, readers, samples, ROWS if self.alpha == "search" else 0)
        scaling, branches, steps = Scaling(), list[ScaledBranch](), list[Step]()
        for place in places:
            chosen = _choose(place, statistics, self.alpha)
            if chosen is None:
                refused.append(refusal(place.maker, "no smoothing lowers the output error of its readers"))
                continue
            alpha, s = chosen
            branches += _apply(place, s, scaling)
            read_by = tuple(result_name(way.layer.node) for way in place.ways)
            how = "multiplied" if place.branch else "folded"
            steps.append(Step(result_name(place.maker), read_by, how, float(s.min()), float(s.max()), alpha))
        if not steps:
            raise self._nothing(refused)
        return Rescaled(
            suffix="smoothed",
            steps=tuple(steps),
            weights=scaling.weights(),
            constants=tuple(scaling.constants),
            branches=tuple(branches),
            refusals=tuple(refused),
        )

    def _nothing(self, refused: Sequence[Refusal]) -> UnsupportedModelError:
        reasons = sorted({item.reason for item in refused})
        return UnsupportedModelError(
            self.name,
            got="nothing to smooth" + (f": {'; '.join(reasons)}" if reasons else ""),
            expected="a normalization, or a layer, whose channels a Gemm or MatMul with a constant weight reads",
            mend="Leave the pass out.",
        )


@plain_dataclass(frozen=True, eq=False)
class _Place:
    """Where channels can be divided.

    Attributes:
        maker: The node that makes the channels.
        channels: How many there are.
        ways: To the layers that read them.
        pair: Where the maker is a layer.
        affine: Where it is a normalization: the constants to divide.
        branch: Where others read it too: the readers that get it divided.
    """

    maker: ir.Node
    channels: int
    ways: tuple[Way, ...]
    pair: Pair | None = None
    affine: tuple[Place, ...] = ()
    branch: tuple[Place, ...] = ()


def _find(model: ir.Model, layers: Sequence[Layer], *, insert: bool) -> tuple[list[_Place], list[Refusal]]:
    """Return where channels can be divided, and what is left alone with the reason."""
    shapes = Shapes(model)
    by_node = {layer.node: layer for layer in layers}
    places: list[_Place] = []
    refused: list[Refusal] = []
    # What a layer reads is divided once, where it is first made.
    taken: set[ir.Node] = set()
    for node, affine, channels in _normalizations(model.graph):
        found = _readers(node.outputs[0], channels, by_node, shapes)
        readers = {way.layer.node for _, way in found}
        if not readers or not taken.isdisjoint(readers):
            continue
        taken |= readers
        all_of_them = len(found) == len(readers_of(node.outputs[0])) and not node.outputs[0].is_graph_output()
        ways = tuple(way for _, way in found)
        if all_of_them:
            places.append(_Place(node, channels, ways, affine=affine))
        elif insert:
            places.append(_Place(node, channels, ways, branch=tuple(use for use, _ in found)))
        else:
            refused.append(refusal(node, "others read it too, and the option insert is off"))
    pairs, _ = find_pairs(model, layers, shapes)
    products = [pair for pair in pairs if pair.way.layer.node not in taken and pair.way.layer.node.op_type != "Conv"]
    places += [_Place(pair.first.node, pair.first.channels, (pair.way,), pair=pair) for pair in products]
    return places, refused


def _readers(
    value: ir.Value, channels: int, layers: Mapping[ir.Node, Layer], shapes: Shapes
) -> list[tuple[Place, Way]]:
    """Return the uses of ``value`` that lead to a Gemm or MatMul, and the ways; of several to one layer the first.

    A layer that gets ``value`` times a function of it needs one of them divided, not both.
    """
    track = Track((-1,), np.arange(channels))
    found: dict[ir.Node, tuple[Place, Way]] = {}
    for node, index in readers_of(value):
        way = trace_use(node, index, track, layers, shapes)
        if isinstance(way, Way) and way.layer.node.op_type != "Conv":
            found.setdefault(way.layer.node, ((node, index), way))
    return list(found.values())


def _normalizations(graph: ir.Graph) -> Iterator[tuple[ir.Node, tuple[Place, ...], int]]:
    """Yield each node that writes normalized channels, the constants that scale and shift them, and how many."""
    for node in graph:
        indices = _AFFINE.get(node.op_type, ())
        affine = tuple(
            (node, index) for index in indices if index < len(node.inputs) and node.inputs[index] is not None
        )
        if not indices and node.domain == "":
            affine = _decomposed(node)
        sizes = [_vector(place) for place in affine]
        if sizes and sizes[0] is not None and all(size == sizes[0] for size in sizes):
            yield node, affine, sizes[0]


def _decomposed(node: ir.Node) -> tuple[Place, ...]:
    """Return the constants of ``x * scale + shift`` or ``x * scale``, as older opsets spell a normalization's end."""
    scale = _constant_operand(node) if node.op_type == "Mul" else None
    if scale is not None:
        reader = only_reader(node.outputs[0])
        shifts = reader is not None and reader.op_type == "Add" and _constant_operand(reader) is not None
        return () if shifts else (scale,)
    shift = _constant_operand(node) if node.op_type == "Add" else None
    product = None if shift is None else node.inputs[1 - shift[1]]
    multiply = None if product is None else product.producer()
    if (
        shift is None
        or product is None
        or multiply is None
        or multiply.op_type != "Mul"
        or only_reader(product) is None
    ):
        return ()
    scale = _constant_operand(multiply)
    return () if scale is None else (scale, shift)


def _constant_operand(node: ir.Node) -> Place | None:
    return next(((node, index) for index, value in enumerate(node.inputs) if constant(value) is not None), None)


def _vector(place: Place) -> int | None:
    """Return the length of a constant that has one number a channel, along its last axis; None for another."""
    found = constant(place[0].inputs[place[1]])
    shape = () if found is None else found.shape
    return shape[-1] if shape and shape[-1] > 1 and max(shape[:-1], default=1) == 1 else None


def _choose(
    place: _Place, statistics: Mapping[ir.Node, ChannelStatistics], alpha: float | Literal["search"]
) -> tuple[float, Vector] | None:
    """Return alpha and the divisors, ``[channels]``; None where a search finds nothing better than none."""
    inputs, weights = np.zeros(place.channels), np.zeros(place.channels)
    for way in place.ways:
        np.maximum.at(inputs, way.channels, statistics[way.layer.node].largest)
        np.maximum.at(weights, way.channels, _largest(way.layer))
    if alpha != "search":
        return alpha, smoothing(inputs, weights, alpha)
    candidates = {number: smoothing(inputs, weights, number) for number in GRID}
    errors = dict.fromkeys(GRID, 0.0)
    unchanged = 0.0
    scheme = WeightScheme(exact_weight_bits(providers.cpu_class()))
    for way in place.ways:
        weight, seen = _matrix(way.layer), statistics[way.layer.node]
        rows = seen.rows()
        unchanged += rounding_error(rows, weight, seen.low, seen.high, np.ones(len(weight)), scheme)
        for number, s in candidates.items():
            errors[number] += rounding_error(rows, weight, seen.low, seen.high, s[way.channels], scheme)
    best = min(GRID, key=lambda number: errors[number])
    return (best, candidates[best]) if errors[best] < unchanged else None


def _apply(place: _Place, s: Vector, scaling: Scaling) -> list[ScaledBranch]:
    """Add the factors of a place to ``scaling``, and return what needs a Mul."""
    if place.pair is not None:
        scaling.pair(place.pair, s)
        return []
    for node, index in place.affine:
        scaling.multiply(node, index, 1.0 / s)
    for way in place.ways:
        scaling.arrive(way, s)
    readers = tuple((result_name(node), index) for node, index in place.branch)
    return [ScaledBranch(place.maker.outputs[0].name or "", readers, 1.0 / s)] if readers else []


def _largest(layer: Layer) -> Vector:
    """Return ``max|W_j|`` of each input of a layer, ``[inputs]``."""
    weight = layer.weight.read()
    largest = largest_by_input(weight, form_of(layer), np.full(layer.channels, abs(layer.alpha)))
    if not np.isfinite(largest).all():
        raise not_finite(layer)
    return largest


def _matrix(layer: Layer) -> Array:
    """Return what a Gemm or MatMul multiplies by, ``[inputs, outputs]``."""
    weight = layer.weight.read()
    return kernels(weight, form_of(layer))[0, :, :, 0].T * layer.alpha
