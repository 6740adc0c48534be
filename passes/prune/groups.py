"""Coupled channels: what must be cut together.

Every entry along every axis of every tensor is a *slot*. Operators tie slots to one another (`rules`): a Conv ties
entry ``o`` of its weight's axis 0 to entry ``o`` of its result's axis 1. Slots tied directly or through others are one
*channel*, the smallest thing that can be cut; the transitive closure is DepGraph's (Fang et al. 2023,
arXiv:2301.12900, section 3.2). A slot that an operator needs for another purpose is *held*, and its whole channel with
it. Channels that lie in the same axes of the same weights form a *group*: they are alternatives of one another.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from enum import Enum

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from onnx_lathe.passes.edit import Refusal
from onnx_lathe.runtime.samples import Array

Axis = tuple[str, int]
"""An axis of the value of that name."""
Indices = NDArray[np.int64]


class Role(Enum):
    """What a weight's axis does for the channels along it."""

    PRODUCES = "produces"
    """Each entry makes one channel (rows of a Conv, columns of a MatMul)."""
    CONSUMES = "consumes"
    """The entries are summed over: the channel ends here."""
    SCALES = "scales"
    """Each entry is multiplied with its channel (BatchNormalization, depthwise Conv)."""
    CARRIES = "carries"
    """Each entry belongs to its channel in another way (biases, statistics)."""


@dataclass(frozen=True)
class Member:
    """An axis of an initializer along which a group's channels lie."""

    initializer: str
    axis: int
    role: Role


@dataclass(frozen=True)
class Group:
    """Channels that lie in the same axes of the same weights.

    Attributes:
        name: The initializer that makes the channels.
        channels: Their numbers, in the order of that initializer.
        members: Every axis of a weight along which they lie.
    """

    name: str
    channels: Indices
    members: tuple[Member, ...]


@dataclass(frozen=True, eq=False)
class Consumer:
    """A node that sums over channels with a weight.

    Attributes:
        node: The node.
        data: The value that brings the channels.
        data_axis: Its axis that is summed over.
        weight: The initializer summed with.
        axis: Its axis that is summed over.
    """

    node: ir.Node
    data: ir.Value
    data_axis: int
    weight: ir.Value
    axis: int


@dataclass(frozen=True)
class Literal:
    """A number that a node is told, that says how long an axis is, and must change with it.

    Attributes:
        output: The first result of the node.
        place: Where the number stands among those that the node is told (see `literals`).
        value: The value whose axis it describes.
        axis: That axis.
    """

    output: str
    place: tuple[int, int]
    value: str
    axis: int


@dataclass(frozen=True)
class Coupling:
    """Everything that was found out about a graph.

    Attributes:
        groups: What can be cut.
        refused: What cannot, and why.
        consumers: The nodes that sum over channels with a weight.
        literals: Numbers that follow an axis.
        attributes: The first results of nodes whose attribute ``group`` follows axis 1 of an input, and that input.
        axes: The channel of each entry of every axis whose length is known.
    """

    groups: tuple[Group, ...]
    refused: tuple[Refusal, ...]
    consumers: tuple[Consumer, ...]
    literals: tuple[Literal, ...]
    attributes: tuple[tuple[str, str], ...]
    axes: dict[Axis, Indices]


@dataclass
class Slots:
    """The slots of a graph, what ties them and what holds them, as the rules find it."""

    starts: dict[Axis, tuple[int, int]] = field(default_factory=dict[Axis, tuple[int, int]])
    total: int = 0
    ties: list[tuple[Indices, Indices]] = field(default_factory=list[tuple[Indices, Indices]])
    holds: list[tuple[Indices, Refusal]] = field(default_factory=list[tuple[Indices, Refusal]])
    members: dict[Member, None] = field(default_factory=dict[Member, None])
    consumers: list[Consumer] = field(default_factory=list[Consumer])
    literals: list[Literal] = field(default_factory=list[Literal])
    attributes: list[tuple[str, str]] = field(default_factory=list[tuple[str, str]])

    def of(self, value: ir.Value, axis: int) -> Indices | None:
        """Return the slots along ``axis`` of ``value``, or None where its length is not known."""
        key = (value.name or "", axis)
        if key not in self.starts:
            length = dims(value)[axis]
            if not isinstance(length, int):
                return None
            self.starts[key] = (self.total, length)
            self.total += length
        start, length = self.starts[key]
        return np.arange(start, start + length)

    def hold(self, value: ir.Value, axes: Iterable[int], refusal: Refusal) -> None:
        """Let nothing along ``axes`` of ``value`` be cut."""
        for axis in axes:
            slots = self.of(value, axis)
            if slots is not None:
                self.holds.append((slots, refusal))

    def give_role(self, weight: ir.Value, axis: int, role: Role) -> None:
        """Remember what ``axis`` does, where ``weight`` is an initializer."""
        if is_weight(weight):
            self.members[Member(weight.name or "", axis, role)] = None


def dims(value: ir.Value) -> Sequence[int | ir.SymbolicDim]:
    """Return the dimensions of ``value``; none where its rank is not known."""
    return () if value.shape is None else value.shape.dims


def is_weight(value: ir.Value) -> bool:
    """Whether ``value`` is an initializer that the user of the model cannot replace."""
    return value.is_initializer() and value.const_value is not None and not value.is_graph_input()


def constant_of(value: ir.Value) -> Array | None:
    """Return what ``value`` is where that is fixed: a weight, or the result of a Constant node."""
    if value.is_graph_input():
        return None
    tensor = ir.convenience.get_const_tensor(value)
    return None if tensor is None else tensor.numpy()


def tensor_of(value: ir.Value) -> ir.TensorProtocol:
    """Return the tensor of an initializer."""
    tensor = value.const_value
    assert tensor is not None, f"{value.name} is no initializer"
    return tensor


def solve(slots: Slots) -> Coupling:
    """Close the ties and sort the channels into groups."""
    left = np.concatenate([tie[0] for tie in slots.ties] or [np.empty(0, np.int64)])
    right = np.concatenate([tie[1] for tie in slots.ties] or [np.empty(0, np.int64)])
    matrix = coo_array((np.ones(len(left), np.int8), (left, right)), shape=(slots.total, slots.total))
    count, channel = connected_components(matrix, directed=False)
    channel = channel.astype(np.int64)
    axes = {key: channel[start : start + length] for key, (start, length) in slots.starts.items()}

    holder = np.full(count, len(slots.holds), dtype=np.int64)
    for number, (held, _) in enumerate(slots.holds):
        np.minimum.at(holder, channel[held], number)
    groups, refused = _sort(slots, axes, holder)
    return Coupling(groups, refused, tuple(slots.consumers), tuple(slots.literals), tuple(slots.attributes), axes)


def _sort(slots: Slots, axes: dict[Axis, Indices], holder: Indices) -> tuple[tuple[Group, ...], tuple[Refusal, ...]]:
    """Return the groups of the free channels, and one refusal for each weight whose channels are held."""
    members_of: dict[int, list[Member]] = {}
    for member in slots.members:
        for channel in dict.fromkeys(axes[member.initializer, member.axis].tolist()):
            members_of.setdefault(channel, []).append(member)

    alike: dict[tuple[Member, ...], list[int]] = {}
    refused: dict[Refusal, None] = {}
    for channel, members in members_of.items():
        maker = next((member for member in members if member.role is Role.PRODUCES), None)
        if maker is None:
            continue
        if holder[channel] < len(slots.holds):
            cause = slots.holds[int(holder[channel])][1]
            refused[Refusal(cause.node, cause.operator, f"{maker.initializer}: {cause.reason}")] = None
        elif any(member.role is Role.CONSUMES for member in members):
            alike.setdefault(tuple(members), []).append(channel)

    groups = tuple(
        Group(
            name=next(member.initializer for member in members if member.role is Role.PRODUCES),
            channels=np.asarray(channels, dtype=np.int64),
            members=members,
        )
        for members, channels in alike.items()
    )
    return groups, tuple(refused)
