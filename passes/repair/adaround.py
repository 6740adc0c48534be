"""Rounding that is learned, layer by layer: the file gets float weights that lie on the levels to come (AdaRound).

A quantization that follows, with the same options, finds exactly the levels that were learned. Each layer learns by
itself, from what it reads in the float network: some thousand rows of the samples, as their Gram matrix.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass as plain_dataclass
from typing import Annotated, Any, ClassVar

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray
from pydantic import Field
from pydantic.dataclasses import dataclass

from onnx_lathe.passes.edit import Edit, Refusal
from onnx_lathe.passes.oracle import Tolerance
from onnx_lathe.passes.prune.reconstruct import patches
from onnx_lathe.passes.quantize import params
from onnx_lathe.passes.quantize.layers import Layer, constant, label, refusal, result_name
from onnx_lathe.passes.quantize.numeric import same_pads
from onnx_lathe.passes.quantize.scheme import WeightScheme
from onnx_lathe.passes.repair.kernels import Form, kernels
from onnx_lathe.passes.repair.pairs import form_of
from onnx_lathe.passes.repair.rewriter import Rewriter, nodes_of, reads
from onnx_lathe.passes.repair.rounding import gram, levels_of, round_up
from onnx_lathe.passes.repair.statistics import input_name
from onnx_lathe.passes.repair.target import BeforeRounding, multiplied
from onnx_lathe.passes.request import Score
from onnx_lathe.passes.taps import BATCH, check_finite, need_samples, portions, tap
from onnx_lathe.runtime.errors import PassSpecError, UnsupportedModelError
from onnx_lathe.runtime.samples import Array, Samples

ROWS = 8_192
"""Rows of what a layer reads, drawn evenly from all batches."""
MAX_COLUMNS = 8_192
"""Wider layers are left alone: their Gram matrix alone would take more than half a gigabyte."""
PORTION_BYTES = 2**29
"""Gram matrices in memory at once; layers beyond that wait for another run over the samples."""


@dataclass(frozen=True)
class RoundWeights(BeforeRounding):
    """Learn whether to round each weight up or down, by the outputs of its layer (AdaRound); needs samples.

    Give it the options of the quantization that follows.

    Attributes:
        iterations: Steps of learning.
        layers: Names of nodes; where any are given, the others are left to the nearest rounding.
    """

    name: ClassVar[str] = "round-weights"

    iterations: Annotated[int, Field(ge=1)] = 500
    layers: tuple[str, ...] = ()

    def plan(self, model: ir.Model, samples: Samples | None, score: Score | None) -> WeightsRounded:
        """Learn the rounding of each layer.

        Raises:
            UnsupportedModelError: The model is quantized already or has nothing to quantize, a weight is not finite, or
                no layer has anything to gain.
            SamplesError: There are no samples, or they do not fit.
            PassSpecError: ``layers`` or ``exclude`` names an unknown node.
        """
        del score
        layers, refused = self.rounded_layers(model)
        able: list[Layer] = []
        for layer in self._chosen(layers):
            columns = _columns(layer)
            if columns > MAX_COLUMNS:
                refused.append(refusal(layer.node, f"an output sums {columns} inputs, more than {MAX_COLUMNS}"))
            else:
                able.append(layer)
        samples = need_samples(self.name, samples, "from which the outputs of each layer are computed")
        scheme = self.scheme()
        rounded: list[Rounding] = []
        for layer, moments in _moments(model, able, samples):
            rounding = _learn(layer, moments, scheme, self.iterations)
            if rounding is None:
                refused.append(refusal(layer.node, "rounding to nearest is as good"))
            else:
                rounded.append(rounding)
        if not rounded:
            raise UnsupportedModelError(
                self.name,
                got="no layer that a learned rounding makes better",
                expected="weights between the levels, and inputs that depend on each other",
                mend="Leave the pass out.",
            )
        return WeightsRounded(scheme, tuple(rounded), tuple(refused))

    def _chosen(self, layers: Sequence[Layer]) -> Sequence[Layer]:
        names = [label(layer.node) for layer in layers]
        for name in self.layers:
            if name not in names:
                near = difflib.get_close_matches(name, names, n=1)
                raise PassSpecError(
                    "option layers",
                    got=repr(name),
                    expected="the name of a node that quantization rounds",
                    mend=f"Did you mean {near[0]!r}?" if near else "`lathe inspect` shows the nodes.",
                )
        return [layer for layer, name in zip(layers, names, strict=True) if not self.layers or name in self.layers]


@plain_dataclass(frozen=True, eq=False)
class Rounding:
    """How the weight of one layer is rounded.

    Attributes:
        layer: The result of the layer.
        source: The value it reads its weight from.
        form: The layout of the weight.
        alpha: The factor that a Gemm puts on it, which the new weight contains.
        scales: ``float32 [outputs]``, or ``[]`` for one scale a tensor.
        up: For each entry, as `onnx_lathe.passes.repair.kernels.kernels` orders them, a bit: whether it is rounded up.
        moved: Share of the entries that are not rounded to nearest.
        nearest_error: Squared error of the outputs with rounding to nearest, relative to their energy.
        error: The same with this rounding.
    """

    layer: str
    source: str
    form: Form
    alpha: float
    scales: NDArray[np.float32]
    up: NDArray[np.uint8]
    moved: float
    nearest_error: float
    error: float


@plain_dataclass(frozen=True, eq=False)
class WeightsRounded(Edit):
    """A plan of learned rounding.

    Attributes:
        weights: The levels.
        layers: How each weight is rounded.
        refusals: What is left to the nearest rounding or stays float, and why.
    """

    tolerance: ClassVar[Tolerance] = Tolerance(
        "the same weights, in a network that onnxruntime fuses and in one that it does not", relative=1e-4
    )

    weights: WeightScheme
    layers: tuple[Rounding, ...]
    refusals: tuple[Refusal, ...] = ()

    def describe(self) -> Mapping[str, Any]:
        """Return what learning gained, by layer."""
        return {
            "layers": [
                {
                    "layer": item.layer,
                    "moved": item.moved,
                    "nearest_error": item.nearest_error,
                    "error": item.error,
                }
                for item in self.layers
            ]
        }

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Round the weights that are still those of the plan."""
        nodes, rewriter = nodes_of(model.graph), Rewriter(model.graph, "rounded")
        modified = False
        for item in self.layers:
            node = nodes.get(item.layer)
            if node is not None and reads(node, 1, item.source):
                found = constant(node.inputs[1])
                assert found is not None, f"{item.source} was planned as a weight"
                rewriter.swap(node, 1, _rounder(item, self.weights.limit), found.shape, item.layer)
                node.attributes.pop("alpha", None)
                modified = True
        return ir.passes.PassResult(model, modified)

    def reference(self, model: ir.Model) -> None:
        """Round the same weights at once, as the formula says, and not while they are written."""
        nodes, rewriter = nodes_of(model.graph), Rewriter(model.graph, "plain")
        for item in self.layers:
            node = nodes[item.layer]
            found = constant(node.inputs[1])
            assert found is not None, f"{item.source} was planned as a weight"
            weight = found.arrange(found.tensor.numpy()) * np.float32(item.alpha)
            parts = kernels(weight, item.form)
            scales = item.scales.reshape(item.form.groups, -1, 1, 1) if item.scales.ndim else item.scales
            up = np.unpackbits(item.up, count=weight.size).reshape(parts.shape)
            steps = np.floor(parts / scales) + up
            rounded = np.minimum(np.maximum(steps, -self.weights.limit), self.weights.limit) * scales
            whole = np.empty(found.shape, np.float32)
            kernels(whole, item.form)[...] = rounded
            rewriter.put(node, 1, whole)
            node.attributes.pop("alpha", None)


def _rounder(item: Rounding, limit: int) -> Callable[[Array], Array]:
    """Return what makes the rounded weight of the float one."""

    def compute(weight: Array) -> Array:
        parts = kernels(weight * np.float32(item.alpha), item.form)
        scales = _by_output(item.scales, item.form)
        up = np.unpackbits(item.up, count=weight.size).reshape(parts.shape).astype(np.bool_)
        rounded = np.empty(weight.shape, weight.dtype)
        kernels(rounded, item.form)[...] = levels_of(parts, scales, up, limit) * scales
        return rounded

    return compute


def _by_output(scales: NDArray[np.float32], form: Form) -> Array:
    """Return scales to broadcast against what `kernels` returns."""
    return scales.reshape(form.groups, -1, 1, 1) if scales.ndim else scales.reshape(1, 1, 1, 1)


def _learn(layer: Layer, moments: NDArray[np.float64], scheme: WeightScheme, iterations: int) -> Rounding | None:
    """Return how to round the weight of ``layer``; None where nothing beats rounding to nearest.

    Args:
        layer: The layer.
        moments: ``X'X`` of each group, ``[groups, columns, columns]``.
        scheme: How weights will be rounded.
        iterations: Steps of learning.
    """
    weight, form = multiplied(layer), form_of(layer)
    scales = params.weight_scales(weight, layer.axis, scheme)
    parts = kernels(weight, form)
    matrix, steps = parts.reshape(*parts.shape[:2], -1), _by_output(scales, form)[..., 0]
    learned = round_up(matrix, steps, moments, scheme.limit, iterations)
    square = np.square(steps[..., 0].astype(np.float64))
    nearest_error, error, energy = (
        float((part * square).sum()) for part in (learned.nearest_error, learned.error, learned.energy)
    )
    if not error < nearest_error:
        return None
    source = layer.node.inputs[1]
    assert source is not None, "a layer has a weight"
    return Rounding(
        layer=result_name(layer.node),
        source=source.name or "",
        form=form,
        alpha=layer.alpha,
        scales=scales,
        up=np.packbits(learned.up),
        moved=learned.moved / weight.size,
        nearest_error=nearest_error / energy,
        error=error / energy,
    )


def _moments(model: ir.Model, layers: Sequence[Layer], samples: Samples) -> Iterator[tuple[Layer, NDArray[np.float64]]]:
    """Yield each layer with ``X'X`` of each group of its inputs, ``[groups, columns, columns]``.

    Raises:
        SamplesError: The samples do not fit the model.
    """
    limit = math.ceil(ROWS / sum(1 for _ in samples.iter_batches(BATCH)))
    for portion in portions(layers, _moment_bytes, PORTION_BYTES):
        generator = np.random.default_rng(0)
        names = list(dict.fromkeys(input_name(layer) for layer in portion))
        sums: dict[ir.Node, NDArray[np.float64]] = {}
        for values in tap(model, names, samples, BATCH):
            for layer in portion:
                rows = _rows(layer, values[input_name(layer)], limit, generator)
                found = gram(rows, form_of(layer).groups)
                check_finite(found, input_name(layer), samples)
                sums[layer.node] = sums[layer.node] + found if layer.node in sums else found
        yield from ((layer, sums[layer.node]) for layer in portion)


def _moment_bytes(layer: Layer) -> int:
    return 8 * form_of(layer).groups * _columns(layer) ** 2


def _rows(layer: Layer, data: Array, limit: int, generator: np.random.Generator) -> Array:
    """Return what a layer multiplies with its weight, ``[rows, groups * columns]``, at most ``limit`` rows."""
    if layer.node.op_type != "Conv":
        rows = data.reshape(-1, data.shape[-1])
        return rows if len(rows) <= limit else rows[generator.choice(len(rows), limit, replace=False)]
    attributes, kernel = layer.node.attributes, layer.weight.shape[2:]
    ones = (1,) * len(kernel)
    strides, dilations = attributes.get_ints("strides", ones), attributes.get_ints("dilations", ones)
    pads = list(attributes.get_ints("pads", (0,) * 2 * len(kernel)))
    automatic = attributes.get_string("auto_pad", "NOTSET")
    if automatic.startswith("SAME"):
        pads = same_pads(data.shape[2:], kernel, strides, dilations, upper=automatic == "SAME_UPPER")
    return patches(data, kernel, strides, pads, dilations, limit, generator)


def _columns(layer: Layer) -> int:
    """Return how many products one output sums."""
    return math.prod(layer.weight.shape) // layer.channels
