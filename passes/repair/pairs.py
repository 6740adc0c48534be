"""Pairs of layers between which a channel can be scaled: what one makes is what the other reads, times a number.

``f(x / s) = f(x) / s`` for ``s > 0`` holds for every operator on the way: it is positively homogeneous and does not mix
channels. The channels are followed through activations, gates, pools, reshapes, transposes and splits, and through the
product of attention weights and values, which is linear in each channel of the values.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from onnx_lathe.passes.edit import Refusal
from onnx_lathe.passes.prune import literals
from onnx_lathe.passes.quantize.layers import Layer, constant, integer, refusal, result_name
from onnx_lathe.passes.repair.kernels import Form, inputs_of
from onnx_lathe.passes.repair.shapes import Shapes

_ELEMENTWISE = frozenset({"Abs", "Identity", "LeakyRelu", "Neg", "PRelu", "Relu"})
_POOLS = frozenset({"AveragePool", "MaxPool", "GlobalAveragePool", "GlobalMaxPool"})
_RESHAPES = frozenset({"Flatten", "Reshape", "Squeeze", "Unsqueeze"})
_SUMS = frozenset({"ReduceMean", "ReduceMax", "ReduceSum"})

Channels = NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Track:
    """Where in a value the channels of a layer lie.

    Attributes:
        axes: Axes that run over them, counted from the end, ascending.
        channels: The channel of each entry along these axes, one dimension for each.
    """

    axes: tuple[int, ...]
    channels: Channels

    def aligned(self) -> Channels:
        """Return the channels shaped to broadcast against the value."""
        shape = [1] * -self.axes[0]
        for axis, length in zip(self.axes, self.channels.shape, strict=True):
            shape[axis] = length
        return self.channels.reshape(shape)


@dataclass(frozen=True, eq=False)
class Offset:
    """A constant that is added on the way and must be scaled too.

    Attributes:
        node: The Add.
        index: Which of its inputs.
        channels: The channel of each entry, to broadcast against it.
    """

    node: ir.Node
    index: int
    channels: Channels


@dataclass(frozen=True, eq=False)
class Way:
    """A way from a value to the layer that reads it.

    Attributes:
        layer: That layer.
        channels: For each of its inputs, the channel of the value, ``[inputs]``.
        offsets: The constants that are added on the way.
    """

    layer: Layer
    channels: Channels
    offsets: tuple[Offset, ...] = ()


@dataclass(frozen=True, eq=False)
class Pair:
    """A layer and the way from its result to the next.

    Attributes:
        first: The layer.
        way: To the other layer.
    """

    first: Layer
    way: Way


def form_of(layer: Layer) -> Form:
    """Return how the weight of ``layer`` is laid out."""
    return Form(integer(layer.node, "group", 1) if layer.node.op_type == "Conv" else 1, layer.axis == 1)


def inputs_count(layer: Layer) -> int:
    """Return how many input channels ``layer`` has."""
    return inputs_of(layer.weight.shape, form_of(layer))


def find_pairs(model: ir.Model, layers: Sequence[Layer], shapes: Shapes) -> tuple[list[Pair], list[Refusal]]:
    """Return the pairs among ``layers``, in order, and for each layer that begins none the reason.

    No two pairs end in one layer: of the factors of a product one is scaled.

    Args:
        model: The graph.
        layers: Layers of its main graph.
        shapes: Of its values.
    """
    by_node = {layer.node: layer for layer in layers}
    pairs: dict[ir.Node, Pair] = {}
    refused: list[Refusal] = []
    for layer in layers:
        way = trace(layer.node.outputs[0], begin(layer), by_node, shapes)
        if isinstance(way, str):
            refused.append(refusal(layer.node, way))
        elif way.layer.node in pairs:
            reason = f"{result_name(way.layer.node)!r} reads a product with what another layer makes"
            refused.append(refusal(layer.node, reason))
        else:
            pairs[way.layer.node] = Pair(layer, way)
    return list(pairs.values()), refused


def begin(layer: Layer) -> Track:
    """Return where the channels of ``layer`` lie in its result."""
    axis = 1 - len(layer.weight.shape) if layer.node.op_type == "Conv" else -1
    return Track((axis,), np.arange(layer.channels))


def trace(value: ir.Value, track: Track, layers: Mapping[ir.Node, Layer], shapes: Shapes) -> Way | str:
    """Return the way from ``value`` to the one layer that reads it, or the reason why there is none."""
    if value.is_graph_output():
        return f"{value.name!r} is an output of the graph"
    readers = readers_of(value)
    if len(readers) != 1:
        return f"{value.name!r} has {len(readers)} readers"
    return trace_use(*readers[0], track, layers, shapes)


def trace_use(node: ir.Node, index: int, track: Track, layers: Mapping[ir.Node, Layer], shapes: Shapes) -> Way | str:
    """Return the way through ``node``, which reads the channels as input ``index``, as `trace` does."""
    if node in layers and index == 0:
        return _arrive(layers[node], track)
    if node.op_type in ("Add", "Sub") and constant(node.inputs[1 - index]) is not None:
        way = trace(node.outputs[0], track, layers, shapes)
        offset = Offset(node, 1 - index, track.aligned())
        return way if isinstance(way, str) else replace(way, offsets=(offset, *way.offsets))
    results = _split(node, track, shapes) if node.op_type == "Split" else []
    moved = _step(node, index, track, shapes)
    if moved is not None:
        results = [(node.outputs[0], moved)]
    ways = [trace(result, behind, layers, shapes) for result, behind in results]
    refused = ways[-1] if ways else _lost(node)
    return next((way for way in ways if isinstance(way, Way)), refused)


def _lost(node: ir.Node) -> str:
    """Return why no factor passes through ``node``."""
    reason = f"{node.op_type} does not pass a factor on to each channel of its result"
    if node.op_type != "Clip":
        return reason
    # Nagel et al. put a Relu in the place of Relu6, which computes something else wherever a value is above 6.
    return f"{reason}: its bound is one number, and a Relu instead of it would change what the network computes"


def readers_of(value: ir.Value) -> list[tuple[ir.Node, int]]:
    """Return the nodes that read what is in ``value``, not its shape alone, and as which input."""
    return [(use.node, use.idx) for use in value.uses() if use.node.op_type not in ("Shape", "Size")]


def _arrive(layer: Layer, track: Track) -> Way | str:
    if track.axes != begin(layer).axes or track.channels.size != inputs_count(layer):
        return f"{result_name(layer.node)!r} does not sum over its channels"
    return Way(layer, track.channels)


def _step(node: ir.Node, index: int, track: Track, shapes: Shapes) -> Track | None:
    """Return where the channels lie behind ``node``, which reads them as input ``index``; None where they are lost."""
    if node.domain != "" or any(output.uses() or output.is_graph_output() for output in node.outputs[1:]):
        return None
    operator = node.op_type
    if operator == "Mul" or (operator == "Div" and index == 0):
        return track
    if operator == "MatMul":
        ranks = [len(shapes.of(value) or ()) for value in node.inputs]
        if min(ranks) < 2:
            # A vector is given an axis, which the result loses again: axes do not stay where they are.
            return None
        # The summed axis of the other operand's partner: the last of the left one, the last but one of the right one.
        return track if (-1, -2)[index] not in track.axes else None
    if index != 0:
        return None
    if operator in _ELEMENTWISE or operator == "Expand" or (operator == "Dropout" and len(node.inputs) < 3):
        return track
    if operator in _POOLS:
        return track if track.axes == (_channel_axis(node, shapes),) else None
    if operator == "Transpose":
        return _transposed(node, track)
    if operator in _SUMS:
        return _reduced(node, track, shapes)
    return _reshaped(node, track, shapes) if operator in _RESHAPES else None


def _split(node: ir.Node, track: Track, shapes: Shapes) -> list[tuple[ir.Value, Track]]:
    """Return the results of a Split along an axis of channels, each with its own; nothing for another Split."""
    shape, axis = shapes.of(node.inputs[0]), integer(node, "axis", 0)
    axis = axis if axis < 0 or shape is None else axis - len(shape)
    if axis not in track.axes or node.domain != "":
        return []
    place = track.axes.index(axis)
    sizes = _split_sizes(node, track.channels.shape[place])
    parts = np.split(track.channels, np.cumsum(sizes)[:-1], axis=place)
    return [(result, Track(track.axes, part)) for result, part in zip(node.outputs, parts, strict=True)]


def _split_sizes(node: ir.Node, length: int) -> list[int]:
    """Return the lengths of the results of a Split, as an input or an attribute tells, else as even as can be."""
    given = constant(node.inputs[1]) if len(node.inputs) > 1 else None
    attribute = node.attributes.get("split")
    if given is not None:
        return [int(size) for size in given.tensor.numpy()]
    if attribute is not None:
        return list(attribute.as_ints())
    part = -(-length // len(node.outputs))
    return [min(part, length - part * number) for number in range(len(node.outputs))]


def _channel_axis(node: ir.Node, shapes: Shapes) -> int | None:
    """Return the axis of the channels of a pool, counted from the end."""
    sizes = node.attributes.get("kernel_shape")
    if sizes is not None:
        return -len(sizes.as_ints()) - 1
    shape = shapes.of(node.inputs[0])
    return None if shape is None else 1 - len(shape)


def _transposed(node: ir.Node, track: Track) -> Track | None:
    order = node.attributes.get("perm")
    if order is None:
        return None
    perm = list(order.as_ints())
    places = [perm.index(axis + len(perm)) - len(perm) for axis in track.axes]
    ascending = sorted(range(len(places)), key=lambda number: places[number])
    return Track(tuple(places[number] for number in ascending), track.channels.transpose(ascending))


def _reduced(node: ir.Node, track: Track, shapes: Shapes) -> Track | None:
    """Return the track behind a sum over other axes."""
    shape, axes = shapes.of(node.inputs[0]), _reduced_axes(node)
    if shape is None or not axes:
        return None
    summed = {axis % len(shape) - len(shape) for axis in axes}
    if not summed.isdisjoint(track.axes):
        return None
    if integer(node, "keepdims", 1):
        return track
    return Track(tuple(axis + sum(gone > axis for gone in summed) for axis in track.axes), track.channels)


def _reduced_axes(node: ir.Node) -> list[int]:
    """Return the axes that a sum runs over, as an attribute or an input tells; none where it is not known."""
    attribute = node.attributes.get("axes")
    if attribute is not None:
        return list(attribute.as_ints())
    given = constant(node.inputs[1]) if len(node.inputs) > 1 else None
    return [] if given is None else [int(axis) for axis in given.tensor.numpy()]


def _reshaped(node: ir.Node, track: Track, shapes: Shapes) -> Track | None:
    """Return the track behind a reshape of the axes from the first tracked one to the last axis of all.

    What lies before these axes keeps its place: entries are in row-major order.
    """
    window, lengths = _window(track, shapes.of(node.inputs[0])), _lengths(node, shapes)
    tail: list[int] = []
    for length in reversed(lengths if window is not None else []):
        if length is None:
            return None
        tail.insert(0, length)
        if window is not None and math.prod(tail) == window.size:
            return _track(window.reshape(tail))
    return None


def _window(track: Track, shape: Sequence[int | None] | None) -> Channels | None:
    """Return the channel of each entry along all axes from the first tracked one to the last."""
    aligned = track.aligned()
    lengths: list[int] = []
    for axis in range(track.axes[0], 0):
        known = None if shape is None or len(shape) < -axis else shape[axis]
        length = aligned.shape[axis] if axis in track.axes else known
        if length is None:
            return None
        lengths.append(length)
    return np.broadcast_to(aligned, lengths)


def _track(channels: Channels) -> Track:
    """Return the track of the last axes of a value: those along which the channel changes."""
    rank = channels.ndim
    kept = [axis for axis in range(rank) if (channels != channels.take([0], axis)).any()] or [rank - 1]
    others = tuple(0 if axis not in kept else slice(None) for axis in range(rank))
    return Track(tuple(axis - rank for axis in kept), channels[others])


def _lengths(node: ir.Node, shapes: Shapes) -> list[int | None]:
    """Return the lengths of the result of a reshape: as the node is told them, else as they are inferred."""
    inferred = shapes.of(node.outputs[0])
    told = literals.read(node) if node.op_type == "Reshape" else []
    if not told:
        return inferred or []
    numbers = [length.number if length.number is not None and length.number > 0 else None for length in told]
    if inferred is None or len(inferred) != len(numbers):
        return numbers
    return [number or other for number, other in zip(numbers, inferred, strict=True)]
