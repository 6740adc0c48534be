"""What two forms of a model differ in, node by node and weight by weight; values of weights are never compared.

Passes rename nodes and tensors, and nodes may have no name at all. So nodes are paired by the surest sign that they
have in common, each sign only among those that a surer one left over: by name, by the tensors that they write, by the
tensors that they read, by operator and place. Operators that compute the same in another form (MatMul, MatMulInteger)
count as one kind. Each step takes time linear in the number of nodes.
"""

from __future__ import annotations

from collections import Counter, defaultdict, deque
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import onnx
from onnx import AttributeProto, NodeProto, TensorProto

from onnx_lathe.runtime import loading

_KINDS = {
    **dict.fromkeys(("Gemm", "FusedMatMul", "FusedGemm", "MatMulInteger", "MatMulIntegerToFloat"), "MatMul"),
    **dict.fromkeys(("MatMulNBits", "QLinearMatMul", "QGemm", "DynamicQuantizeMatMul"), "MatMul"),
    **dict.fromkeys(("FusedConv", "ConvInteger", "QLinearConv"), "Conv"),
    "SkipLayerNormalization": "LayerNormalization",
}
"""The operator that another is a form of."""

_FORMS_OF_A_TENSOR = {"DequantizeLinear", "QuantizeLinear", "Cast", "Transpose", "Identity", "Reshape"}
"""Operators behind which the weight of a node may lie."""
_MOST_STEPS = 8
_SMALL = 64
"""Elements of a tensor in an attribute up to which its values count."""


@dataclass(frozen=True)
class NodeChange:
    """Nodes to which the same happened.

    Attributes:
        before: Their operator before; None where they were added.
        after: Their operator after; None where they were removed.
        changes: What else changed of those that were kept, as phrases such as "attribute pads" or
            "reads DequantizeLinear" (for an input).
        nodes: Their names, in the graph's order, those before where there are any; operator and number where a node
            has no name.
    """

    before: str | None
    after: str | None
    changes: tuple[str, ...]
    nodes: tuple[str, ...]


@dataclass(frozen=True)
class StoredForm:
    """How a weight is stored: ONNX's name of its type in lower case, its dimensions, and the bytes of its values."""

    dtype: str
    shape: tuple[int, ...]
    nbytes: int


@dataclass(frozen=True)
class WeightChange:
    """Weights (initializers and constants) to which the same happened.

    Attributes:
        before: How each was stored; None where they are new.
        after: How each is stored; None where they are gone.
        names: Their names, those before where there are any.
    """

    before: StoredForm | None
    after: StoredForm | None
    names: tuple[str, ...]


@dataclass(frozen=True)
class GraphDifference:
    """What two forms of a model differ in.

    Attributes:
        before: What the first is called.
        after: What the second is called.
        operators_before: Number of nodes by operator type, at any depth, the most frequent first.
        operators_after: Those of the second.
        nodes: What happened to nodes, by what happened, the most nodes first.
        nodes_kept: How many nodes are as they were.
        weights: What happened to weights, by what happened, the most bytes first.
        weights_kept: How many have their type and shape as before; their values may differ.
        weight_bytes_before: Bytes of all weights.
        weight_bytes_after: Those of the second.
    """

    before: str
    after: str
    operators_before: Mapping[str, int]
    operators_after: Mapping[str, int]
    nodes: tuple[NodeChange, ...]
    nodes_kept: int
    weights: tuple[WeightChange, ...]
    weights_kept: int
    weight_bytes_before: int
    weight_bytes_after: int

    @property
    def empty(self) -> bool:
        """Whether nothing differs."""
        return not self.nodes and not self.weights


def difference(before: Path, after: Path, names: tuple[str, str] = ("before", "after")) -> GraphDifference:
    """Return what the model at ``after`` differs in from the one at ``before``; weights beside them are not loaded.

    Args:
        before: An ``.onnx`` file.
        after: Another form of it.
        names: What the two are called.

    Raises:
        ModelFileError: One is not a sound model (`onnx_lathe.runtime.loading`).
        ExternalDataError: Weights beside one are not where they must be.
    """
    first, second = _Side(before), _Side(after)
    pairs = _pair_nodes(first, second)
    node_changes = _node_changes(first, second, pairs)
    weight_changes = _weight_changes(first, second, _pair_weights(first, second, pairs))
    return GraphDifference(
        before=names[0],
        after=names[1],
        operators_before=first.operators(),
        operators_after=second.operators(),
        nodes=_grouped_nodes(node_changes),
        nodes_kept=len(first.nodes) - sum(change[0] is not None for change, _ in node_changes),
        weights=_grouped_weights(weight_changes),
        weights_kept=len(first.weights) - sum(change[0] is not None for change, _ in weight_changes),
        weight_bytes_before=sum(form.nbytes for form in first.weights.values()),
        weight_bytes_after=sum(form.nbytes for form in second.weights.values()),
    )


class _Side:
    """One of the two models, as lists and tables."""

    def __init__(self, path: Path) -> None:
        model = loading.read_graph(path)
        self.nodes: Sequence[NodeProto] = list(loading.nodes(model))
        self.weights = {name: _form(tensor) for name, tensor in loading.constants(model)}
        self.inputs = {value.name for graph in loading.graphs(model.graph) for value in graph.input} - set(self.weights)
        self.makers = {name: node for node in self.nodes for name in node.output if name}

    def operators(self) -> dict[str, int]:
        return dict(Counter(node.op_type for node in self.nodes).most_common())

    def label(self, index: int) -> str:
        """Return the name of a node; its operator and number where it has none."""
        return self.nodes[index].name or f"{self.nodes[index].op_type} {index}"

    def weight(self, name: str) -> str | None:
        """Return the weight that a tensor is another form of, such as the integers behind a DequantizeLinear."""
        for _ in range(_MOST_STEPS):
            if name in self.weights:
                return name
            maker = self.makers.get(name)
            if maker is None or maker.op_type not in _FORMS_OF_A_TENSOR or not maker.input:
                return None
            name = maker.input[0]
        return None

    def origin(self, name: str) -> str:
        """Return where a tensor comes from, in words."""
        if not name:
            return "nothing"
        if name in self.weights:
            return "a weight"
        return self.makers[name].op_type if name in self.makers else "an input"


def _pair_nodes(before: _Side, after: _Side) -> dict[int, int]:
    """Return the place after of each node that is in both, by its place before."""
    pairs: dict[int, int] = {}
    for sign in (_name_and_operator, _outputs_and_operator, _name_and_kind, _outputs_and_kind):
        _join(pairs, _signs(before, sign), _signs(after, sign))
    _join_by_inputs(before, after, pairs)
    for operator in (_operator, _kind):
        _join(pairs, *_places(before, after, pairs, operator))
    for sign in (_name, _outputs):
        _join(pairs, _signs(before, sign), _signs(after, sign))
    return pairs


def _join(pairs: dict[int, int], before: Sequence[Hashable], after: Sequence[Hashable]) -> None:
    """Pair those of equal sign that are not paired yet, in order; no sign (None) is equal to none."""
    taken = set(pairs.values())
    waiting: dict[Hashable, deque[int]] = defaultdict(deque)
    for index, sign in enumerate(after):
        if sign is not None and index not in taken:
            waiting[sign].append(index)
    for index, sign in enumerate(before):
        if sign is not None and index not in pairs and waiting.get(sign):
            pairs[index] = waiting[sign].popleft()


def _join_by_inputs(before: _Side, after: _Side, pairs: dict[int, int]) -> None:
    """Pair nodes of one operator that read the same tensors, however they and their outputs are called."""
    taken = set(pairs.values())
    waiting: dict[Hashable, deque[int]] = defaultdict(deque)
    for index, node in enumerate(after.nodes):
        if index not in taken and any(node.input):
            waiting[node.op_type, tuple(node.input)].append(index)
    tensors: dict[str, str] = {}
    for index, node in enumerate(before.nodes):
        sign = (node.op_type, tuple(tensors.get(name, name) for name in node.input))
        if index not in pairs and waiting.get(sign):
            pairs[index] = waiting[sign].popleft()
        if index in pairs:
            tensors.update(zip(node.output, after.nodes[pairs[index]].output, strict=False))


def _places(
    before: _Side, after: _Side, pairs: Mapping[int, int], operator: Callable[[NodeProto], Hashable]
) -> tuple[list[Hashable], list[Hashable]]:
    """Return where each node stands, on both sides: behind which node that has a partner, and its operator."""
    partners = {partner: index for index, partner in pairs.items()}
    return (
        list(_behind(before.nodes, {index: index for index in pairs}, operator)),
        list(_behind(after.nodes, partners, operator)),
    )


def _behind(
    nodes: Sequence[NodeProto], known: Mapping[int, int], operator: Callable[[NodeProto], Hashable]
) -> Iterator[Hashable]:
    last = -1
    for index, node in enumerate(nodes):
        last = known.get(index, last)
        yield last, operator(node)


def _signs(side: _Side, sign: Callable[[NodeProto], Hashable]) -> list[Hashable]:
    return [sign(node) for node in side.nodes]


def _operator(node: NodeProto) -> Hashable:
    return node.op_type


def _kind(node: NodeProto) -> Hashable:
    return _KINDS.get(node.op_type, node.op_type)


def _name(node: NodeProto) -> Hashable:
    return node.name or None


def _outputs(node: NodeProto) -> Hashable:
    return next(filter(None, node.output), None)


def _name_and_operator(node: NodeProto) -> Hashable:
    return (node.name, node.op_type) if node.name else None


def _name_and_kind(node: NodeProto) -> Hashable:
    return (node.name, _kind(node)) if node.name else None


def _outputs_and_operator(node: NodeProto) -> Hashable:
    return (_outputs(node), node.op_type)


def _outputs_and_kind(node: NodeProto) -> Hashable:
    return (_outputs(node), _kind(node))


_Change = tuple[str | None, str | None, tuple[str, ...]]


def _node_changes(before: _Side, after: _Side, pairs: Mapping[int, int]) -> list[tuple[_Change, str]]:
    """Return what happened to each node that is not as it was, with its name."""
    tensors: dict[str, str] = {}
    for index, partner in pairs.items():
        tensors.update(zip(before.nodes[index].output, after.nodes[partner].output, strict=False))
    changes: list[tuple[_Change, str]] = []
    for index, node in enumerate(before.nodes):
        if index not in pairs:
            changes.append(((node.op_type, None, ()), before.label(index)))
            continue
        other = after.nodes[pairs[index]]
        same = node.op_type == other.op_type
        found = (*_attributes_changed(node, other), *_inputs_changed(node, other, after, tensors)) if same else ()
        if found or not same:
            changes.append(((node.op_type, other.op_type, found), before.label(index)))
    taken = set(pairs.values())
    added = (index for index in range(len(after.nodes)) if index not in taken)
    changes.extend(((None, after.nodes[index].op_type, ()), after.label(index)) for index in added)
    return changes


def _attributes_changed(before: NodeProto, after: NodeProto) -> Iterator[str]:
    first, second = ({item.name: _value(item) for item in node.attribute} for node in (before, after))
    if first == second:
        return
    default = _defaults(before.domain, before.op_type)
    for name in sorted(first.keys() | second.keys()):
        if first.get(name, default.get(name)) != second.get(name, default.get(name)):
            yield f"attribute {name}"


@cache
def _defaults(domain: str, operator: str) -> Mapping[str, Hashable]:
    """Return the values of an operator's attributes where a node does not give them; empty for one unknown to onnx."""
    if not onnx.defs.has(operator, domain):
        return {}
    schema = onnx.defs.get_schema(operator, domain)
    return {name: _value(each.default_value) for name, each in schema.attributes.items() if each.default_value.name}


def _value(attribute: AttributeProto) -> Hashable:
    """Return what is compared of an attribute; the nodes of graphs inside it are compared one by one."""
    if attribute.type in (AttributeProto.GRAPH, AttributeProto.GRAPHS):
        return attribute.type
    if attribute.type == AttributeProto.TENSOR:
        tensor = attribute.t
        small = loading.elements(tensor) <= _SMALL and tensor.HasField("raw_data")
        return tensor.data_type, tuple(tensor.dims), tensor.raw_data if small else b""
    return attribute.SerializeToString(deterministic=True)


def _inputs_changed(before: NodeProto, after: NodeProto, side: _Side, tensors: Mapping[str, str]) -> list[str]:
    """Say where the inputs come from that are not the same tensors as before; ``tensors`` maps names."""
    new = [
        name
        for place, name in enumerate(after.input)
        if place >= len(before.input) or name not in (before.input[place], tensors.get(before.input[place]))
    ]
    phrases = sorted({f"reads {side.origin(name)}" for name in new})
    return [*phrases, *(["reads fewer inputs"] if len(after.input) < len(before.input) else [])]


def _pair_weights(before: _Side, after: _Side, pairs: Mapping[int, int]) -> dict[str, str]:
    """Return the name after of each weight that is in both: the same, or that which the same node reads there."""
    same = {name: name for name in before.weights if name in after.weights}
    taken = set(same.values())
    for index, partner in pairs.items():
        for read, reads in zip(before.nodes[index].input, after.nodes[partner].input, strict=False):
            old, new = before.weight(read), after.weight(reads)
            if old and new and old not in same and new not in taken:
                same[old] = new
                taken.add(new)
    return same


_Forms = tuple[StoredForm | None, StoredForm | None]


def _weight_changes(before: _Side, after: _Side, same: Mapping[str, str]) -> list[tuple[_Forms, str]]:
    """Return the forms of each weight that is not stored as it was, with its name."""
    changes: list[tuple[_Forms, str]] = []
    for name, form in before.weights.items():
        other = after.weights[same[name]] if name in same else None
        if other != form:
            changes.append(((form, other), name))
    taken = set(same.values())
    return [*changes, *(((None, form), name) for name, form in after.weights.items() if name not in taken)]


def _grouped_nodes(changes: Iterable[tuple[_Change, str]]) -> tuple[NodeChange, ...]:
    groups: dict[_Change, list[str]] = defaultdict(list)
    for change, name in changes:
        groups[change].append(name)
    ordered = sorted(groups.items(), key=lambda item: -len(item[1]))
    return tuple(NodeChange(*change, tuple(names)) for change, names in ordered)


def _grouped_weights(changes: Iterable[tuple[_Forms, str]]) -> tuple[WeightChange, ...]:
    groups: dict[_Forms, list[str]] = defaultdict(list)
    for forms, name in changes:
        groups[forms].append(name)
    grouped = (WeightChange(*forms, tuple(names)) for forms, names in groups.items())
    return tuple(sorted(grouped, key=lambda group: -_bytes(group)))


def _bytes(group: WeightChange) -> int:
    return len(group.names) * max(form.nbytes for form in (group.before, group.after) if form is not None)


def _form(tensor: TensorProto) -> StoredForm:
    dtype = TensorProto.DataType.Name(tensor.data_type).lower()
    return StoredForm(dtype, tuple(tensor.dims), loading.nbytes(tensor))
