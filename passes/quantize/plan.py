"""Where integers go: which values are rounded, and which operators then run in integers on onnxruntime's CPU provider.

The rules, all by structure:

1. A layer (Conv, Gemm, MatMul with a constant weight) reads rounded values. A Conv has an integer kernel only where its
   result is rounded too. A Gemm or MatMul writes float unless every reader wants rounded values: in transformers
   attention, LayerNormalization, Gelu and the residual path stay float.
2. A Relu, or a Clip from zero, behind a kernel costs nothing: rounding its result with zero point 0 does its work. So
   does the upper bound of a Clip, where scales are free to follow it.
3. An Add whose operands are both rounded (the residual path between Convs) runs in integers and rounds its result.
4. A MaxPool, Reshape, Transpose, Concat ... between rounded values moves integers, with one scale on all sides; only
   what a Clip bounds keeps its own scale before a Concat, which then rescales it.
5. A pooling by average between rounded values runs in integers.
6. A depthwise Conv or one with small groups runs in integers only where a kernel writes its input in integers; one with
   few input channels, such as the first of a network, also where a kernel reads its result in integers (a float Conv
   there would change the layout of what follows). Between float operators they do not earn the rounding.
7. Everything else stays float and reads float.
8. A fence, an identity that onnxruntime does not look through, stands behind a float layer that reads and writes
   rounded values: onnxruntime would round its weight by itself, one scale a tensor (WeightBiasQuantization). And it
   stands between an integer Gemm or MatMul and a Relu or Clip with one float reader: onnxruntime looks for a rounding
   behind the activation, finds none, and would run the layer in float.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass

import onnx_ir as ir
from onnx_ir.passes.common import ShapeInferencePass

from onnx_lathe.passes.edit import Refusal
from onnx_lathe.passes.quantize.layers import Layer, constant, only_reader, refusal, result_name

_MOVES = frozenset(
    {
        *("Concat", "Flatten", "Gather", "Identity", "MaxPool", "Reshape", "Resize"),
        *("Slice", "Split", "Squeeze", "Transpose", "Unsqueeze"),
    }
)
"""Operators that move values and compute none."""
_POOLS = frozenset({"AveragePool", "GlobalAveragePool"})
_ROUNDED_BY_ONNXRUNTIME = frozenset({"Conv", "ConvTranspose", "Gemm"})
"""Operators whose float weights onnxruntime rounds by itself."""


@dataclass(frozen=True)
class PlannedLayer:
    """A layer that runs in integers.

    Attributes:
        result: The name of the node's result.
        bias_add: The name of the result of the Add of a bias that onnxruntime fuses with a MatMul to a Gemm: the bias
            must then be int32, or the Gemm runs in float. None otherwise.
        as_gemm: Whether a MatMul becomes a Gemm, because onnxruntime would fuse it with an Add of something else to a
            Gemm in float.
    """

    result: str
    bias_add: str | None = None
    as_gemm: bool = False


@dataclass(frozen=True)
class Placement:
    """Which values are rounded, and who reads them rounded.

    Attributes:
        layers: The layers that run in integers.
        readers: The results of all nodes that read rounded values.
        values: The values to round; True where all readers read them rounded, because a kernel writes integers.
        groups: Values that must have one scale and zero point.
        fences: The results of layers behind which a fence stands.
        refused: Layers that stay float after all, and why.
    """

    layers: tuple[PlannedLayer, ...]
    readers: tuple[str, ...]
    values: Mapping[str, bool]
    groups: tuple[tuple[str, ...], ...]
    fences: tuple[str, ...]
    refused: tuple[Refusal, ...]


def place(model: ir.Model, layers: Sequence[Layer], *, free_scales: bool = True, lone: bool = False) -> Placement:
    """Return where integers go when ``layers`` run in integers.

    Args:
        model: The graph.
        layers: The layers to run in integers, in the order of the graph.
        free_scales: Whether scales may be any number, so that the largest level is the largest value.
        lone: Whether also those run in integers that do not earn it between float operators (against rule 6).
    """
    absorbed = {node for node in model.graph if _is_absorbed(node, free_scales)}
    plans = {layer.node: plan for layer, plan in zip(layers, _plan_layers(model, layers), strict=True)}
    waiting = {} if lone else {layer.node: layer for layer in layers if layer.lone_reason is not None}
    while True:
        spread = _Spread(model.graph, {node: plan for node, plan in plans.items() if node not in waiting}, absorbed)
        joined = [node for node, layer in waiting.items() if spread.joins(layer, waiting.keys())]
        if not joined:
            break
        for node in joined:
            del waiting[node]
    return Placement(
        layers=tuple(plan for node, plan in plans.items() if node not in waiting),
        readers=tuple(result_name(node) for node in model.graph if node in spread.readers),
        values={_name(value): spread.written_in_integers(value) for value in spread.rounded},
        groups=_merge([_name(value) for value in spread.moved(node)] for node in spread.readers if _is_move(node)),
        fences=tuple(_name(value) for value in spread.fences()),
        refused=tuple(refusal(node, layer.lone_reason or "") for node, layer in waiting.items()),
    )


class _Spread:
    """The rules, spread over a graph until nothing changes.

    Attributes:
        readers: The nodes that read rounded values.
        rounded: The values that are rounded.
    """

    def __init__(self, graph: ir.Graph, layers: Mapping[ir.Node, PlannedLayer], absorbed: Set[ir.Node]) -> None:
        self._graph = graph
        self._layers = layers
        self._absorbed = absorbed
        self.readers: dict[ir.Node, None] = dict.fromkeys(layers)
        self.rounded: dict[ir.Value, None] = {}
        for node in layers:
            self.rounded[_data(node)[0]] = None
            if node.op_type == "Conv":
                self.rounded[self._result(node)] = None
        self._writers = {self._result(node): node for node in layers}
        before = -1
        while before != len(self.readers):
            before = len(self.readers)
            self._include_adds()
            self._include_moves_and_pools()

    def written_in_integers(self, value: ir.Value) -> bool:
        """Say whether a kernel writes ``value`` in integers, so that every reader must take it rounded."""
        writer = self._writers.get(value)
        if writer is None or writer.op_type not in ("Gemm", "MatMul"):
            return writer is not None
        return not value.is_graph_output() and all(use.node in self.readers for use in value.uses())

    def joins(self, layer: Layer, lone: Set[ir.Node]) -> bool:
        """Say whether a layer that does not pay between float operators stands beside integer ones (rule 6).

        Args:
            layer: The layer.
            lone: All layers of which this is asked.
        """
        if self._comes_in_integers(_data(layer.node)[0]):
            return True
        return not layer.is_grouped and self._goes_into_integers(self._result(layer.node), lone)

    def moved(self, node: ir.Node) -> list[ir.Value]:
        """Return the values on the sides of a node that moves them, which must have one scale."""
        sources = _data(node)
        if node.op_type == "Concat":
            sources = [value for value in sources if not _is_bounded(value)]
        return [*sources, *self._used_results(node)]

    def fences(self) -> list[ir.Value]:
        """Return the results of layers behind which a fence must stand."""
        return [*self._fences_of_float_layers(), *self._fences_of_integer_layers()]

    def _fences_of_float_layers(self) -> Iterator[ir.Value]:
        """Yield the results of float layers that read and, behind an activation, write rounded values."""
        for value in self.rounded:
            node = value.producer()
            if node is not None and node in self._absorbed:
                value = _data(node)[0]
                node = value.producer()
            layer = _layer_behind(node)
            if layer is None or layer in self.readers or constant(layer.inputs[1]) is None:
                continue
            if self.written_in_integers(_data(layer)[0]):
                yield value

    def _fences_of_integer_layers(self) -> Iterator[ir.Value]:
        """Yield the float results of integer layers that an activation with one float reader reads."""
        for node in self._layers:
            value = self._sum(node)
            activation = only_reader(value)
            if value in self.rounded or activation is None or activation.op_type not in ("Relu", "Clip"):
                continue
            result = activation.outputs[0]
            if only_reader(result) is not None and result not in self.rounded:
                yield value

    def _comes_in_integers(self, value: ir.Value) -> bool:
        """Say whether ``value`` is written in integers, or moved from values that are."""
        if self.written_in_integers(value):
            return True
        node = value.producer()
        return node is not None and _is_move(node) and all(self._comes_in_integers(source) for source in _data(node))

    def _goes_into_integers(self, value: ir.Value, lone: Set[ir.Node]) -> bool:
        """Say whether ``value`` is rounded for a reader, or moved or convolved by a lone layer into values that are."""
        if value in self.rounded:
            return True
        readers = [use.node for use in value.uses() if _is_move(use.node) or use.node in lone]
        return any(self._goes_into_integers(result, lone) for node in readers for result in self._used_results(node))

    def _include_adds(self) -> None:
        for node in self._graph:
            if node.op_type == "Add" and node.domain == "" and self._are_rounded(_data(node)):
                self._include(node, [self._result(node)])

    def _include_moves_and_pools(self) -> None:
        for node in reversed(self._graph):
            if (_is_move(node) or _is_pool(node)) and self._are_rounded(self._used_results(node)):
                sources = _data(node)
                if all(self._can_be_rounded(value) for value in sources):
                    self._include(node, sources)

    def _include(self, node: ir.Node, values: Iterable[ir.Value]) -> None:
        self.readers[node] = None
        self.rounded |= dict.fromkeys(values)
        self._writers |= dict.fromkeys(self._used_results(node), node)

    def _are_rounded(self, values: Sequence[ir.Value]) -> bool:
        return bool(values) and all(value in self.rounded for value in values)

    def _can_be_rounded(self, value: ir.Value) -> bool:
        """Say whether ``value`` is rounded already, or moved or pooled from values that are."""
        if value in self.rounded:
            return True
        node = value.producer()
        if node is None or not (_is_move(node) or _is_pool(node)):
            return False
        return all(self._can_be_rounded(source) for source in _data(node))

    def _used_results(self, node: ir.Node) -> list[ir.Value]:
        if not _is_move(node):
            return [self._result(node)]
        return [value for value in node.outputs if value.uses() or value.is_graph_output()]

    def _sum(self, node: ir.Node) -> ir.Value:
        """Return the result of ``node``, behind its bias."""
        value = node.outputs[0]
        plan = self._layers.get(node)
        return value if plan is None or plan.bias_add is None else next(iter(value.uses())).node.outputs[0]

    def _result(self, node: ir.Node) -> ir.Value:
        """Return what the kernel of ``node`` writes: the value behind its bias and an activation that is absorbed."""
        value = self._sum(node)
        reader = only_reader(value)
        return reader.outputs[0] if reader is not None and reader in self._absorbed else value


def _plan_layers(model: ir.Model, layers: Sequence[Layer]) -> list[PlannedLayer]:
    shapes = _Shapes(model)
    planned: list[PlannedLayer] = []
    for layer in layers:
        result, add = result_name(layer.node), only_reader(layer.node.outputs[0])
        if layer.node.op_type != "MatMul" or add is None or add.op_type != "Add" or not shapes.fuse(layer.node):
            planned.append(PlannedLayer(result))
        elif _is_bias(add, layer):
            planned.append(PlannedLayer(result, bias_add=result_name(add)))
        else:
            planned.append(PlannedLayer(result, as_gemm=shapes.rank(layer.node) == 2))
    return planned


class _Shapes:
    """Shapes as the file gives them, or else as onnx infers them, as onnxruntime does."""

    def __init__(self, model: ir.Model) -> None:
        self._model = model
        self._inferred: Mapping[str, ir.Shape | None] | None = None

    def rank(self, node: ir.Node) -> int | None:
        """Return the rank of a node's first input, where it is known."""
        shape = self._shape(node.inputs[0])
        return None if shape is None else len(shape)

    def fuse(self, node: ir.Node) -> bool:
        """Say whether onnxruntime fuses a MatMul with an Add: its input has two dimensions, or only known ones."""
        shape = self._shape(node.inputs[0])
        return shape is not None and (len(shape) == 2 or (len(shape) > 2 and shape.is_static()))

    def _shape(self, value: ir.Value | None) -> ir.Shape | None:
        if value is None or value.shape is not None:
            return None if value is None else value.shape
        if self._inferred is None:
            model = self._model.clone()
            ShapeInferencePass()(model)
            self._inferred = {_name(result): result.shape for node in model.graph for result in node.outputs}
        return self._inferred.get(_name(value))


def _is_bias(add: ir.Node, layer: Layer) -> bool:
    """Say whether ``add`` adds one constant a channel."""
    others = [constant(value) for value in add.inputs if value is not layer.node.outputs[0]]
    return len(others) == 1 and others[0] is not None and others[0].shape in ((layer.channels,), (1, layer.channels))


def _layer_behind(node: ir.Node | None) -> ir.Node | None:
    """Return the layer whose float weight onnxruntime would round: ``node``, or the MatMul to which it adds a bias."""
    if node is None or node.op_type in _ROUNDED_BY_ONNXRUNTIME:
        return node
    if node.op_type != "Add":
        return None
    producers = [value.producer() for value in _data(node)]
    return next((producer for producer in producers if producer is not None and producer.op_type == "MatMul"), None)


def _is_absorbed(node: ir.Node, free_scales: bool) -> bool:
    """Say whether rounding does what an activation does: a Relu, or a Clip from zero."""
    if node.op_type != "Clip":
        return node.op_type == "Relu"
    low, high = (*node.inputs, None, None)[1:3]
    least = constant(low)
    if least is None or least.tensor.numpy().item() != 0.0:
        return False
    return high is None or (free_scales and constant(high) is not None)


def _is_bounded(value: ir.Value) -> bool:
    """Say whether ``value`` comes from a Clip, perhaps moved: its scale must not grow with that of another value."""
    node = value.producer()
    if node is None:
        return False
    return node.op_type == "Clip" or (_is_move(node) and any(_is_bounded(source) for source in _data(node)))


def _is_move(node: ir.Node) -> bool:
    if node.op_type not in _MOVES or node.domain != "":
        return False
    mode = node.attributes.get("mode")
    return node.op_type != "Resize" or mode is None or mode.as_string() == "nearest"


def _is_pool(node: ir.Node) -> bool:
    return node.op_type in _POOLS and node.domain == ""


def _data(node: ir.Node) -> list[ir.Value]:
    """Return the operands whose values are computed on: not shapes, indices, weights or bounds."""
    count = len(node.inputs) if node.op_type in ("Concat", "Add") else 1
    return [value for value in node.inputs[:count] if value is not None]


def _name(value: ir.Value) -> str:
    return value.name or ""


def _merge(links: Iterable[Sequence[str]]) -> tuple[tuple[str, ...], ...]:
    """Return the connected components of ``links``."""
    groups: list[list[str]] = []
    for link in links:
        touched = [group for group in groups if not set(group).isdisjoint(link)]
        groups = [group for group in groups if group not in touched]
        groups.append(list(dict.fromkeys([*(name for group in touched for name in group), *link])))
    return tuple(tuple(group) for group in groups)
