"""One node, as the rules of `onnx_lathe.passes.prune.rules` see it."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir

from onnx_lathe.passes.edit import Refusal
from onnx_lathe.passes.prune.groups import Consumer, Indices, Literal, Role, Slots, constant_of, dims, is_weight
from onnx_lathe.runtime.samples import Array


@dataclass(frozen=True, eq=False)
class Operand:
    """A value at one place of a node: the same value at two places is two operands."""

    value: ir.Value

    @property
    def dims(self) -> tuple[int | ir.SymbolicDim, ...]:
        """The dimensions; none where the rank is not known."""
        return tuple(dims(self.value))

    @property
    def rank(self) -> int:
        """The number of dimensions; 0 also where it is not known."""
        return len(self.dims)

    @property
    def is_weight(self) -> bool:
        """Whether this is an initializer that the user of the model cannot replace."""
        return is_weight(self.value)


@dataclass
class Site:
    """A node with its operands, and which of their axes its rule has settled."""

    node: ir.Node
    slots: Slots
    opset: int
    inputs: list[Operand | None] = field(init=False)
    outputs: list[Operand] = field(init=False)
    settled: set[tuple[Operand, int]] = field(init=False, default_factory=set[tuple[Operand, int]])

    def __post_init__(self) -> None:
        self.inputs = [None if value is None else Operand(value) for value in self.node.inputs]
        self.outputs = [Operand(value) for value in self.node.outputs]

    @property
    def out(self) -> Operand:
        """The first result."""
        return self.outputs[0]

    def input(self, index: int) -> Operand | None:
        """Return the input at ``index``, or None where the node has none there."""
        return self.inputs[index] if index < len(self.inputs) else None

    def constant(self, index: int) -> Array | None:
        """Return the value of the input at ``index`` where it is a constant."""
        operand = self.input(index)
        return None if operand is None else constant_of(operand.value)

    def ints(self, attribute: str, index: int) -> tuple[int, ...] | None:
        """Return integers that older operator sets keep in ``attribute`` and newer ones in the input at ``index``."""
        listed = self.node.attributes.get_ints(attribute, None)
        if listed is not None:
            return tuple(listed)
        constant = self.constant(index)
        return None if constant is None else tuple(int(item) for item in np.ravel(constant))

    def tie(
        self,
        left: Operand,
        left_axis: int,
        right: Operand,
        right_axis: int,
        *,
        left_at: Indices | None = None,
        right_at: Indices | None = None,
        role: Role = Role.CARRIES,
    ) -> None:
        """Make entries along two axes one channel each.

        Args:
            left: One operand.
            left_axis: Its axis.
            right: The other operand.
            right_axis: Its axis.
            left_at: Which entries of ``left``, repeated as needed; all where not given.
            right_at: The entries of ``right`` that belong to them.
            role: What the axis does, for the operand that is a weight.
        """
        ours, theirs = self.slots.of(left.value, left_axis), self.slots.of(right.value, right_axis)
        if ours is None and theirs is None:
            return
        if ours is None or theirs is None:
            refusal = self.refusal("an axis is as long as another whose length is not known")
            self.slots.hold(left.value, [left_axis], refusal)
            self.slots.hold(right.value, [right_axis], refusal)
            return
        ours = ours if left_at is None else ours[left_at]
        theirs = theirs if right_at is None else theirs[right_at]
        if len(ours) != len(theirs):
            return
        self.slots.ties.append((ours, theirs))
        self.settled |= {(left, left_axis), (right, right_axis)}
        self.slots.give_role(left.value, left_axis, role)
        self.slots.give_role(right.value, right_axis, role)

    def consume(self, data: Operand, data_axis: int, weight: Operand, weight_axis: int) -> None:
        """Let the node sum over an axis with a weight: the channels along it end here."""
        self.tie(data, data_axis, weight, weight_axis, role=Role.CONSUMES)
        if (weight, weight_axis) in self.settled:
            self.slots.consumers.append(Consumer(self.node, data.value, data_axis, weight.value, weight_axis))

    def free(self, operand: Operand, axis: int) -> None:
        """Say that the node takes any length along ``axis`` and ties it to nothing."""
        self.settled.add((operand, axis))

    def follow(self, place: tuple[int, int], operand: Operand, axis: int) -> None:
        """Let the number at ``place`` of those that the node is told follow ``axis`` of a result."""
        self.slots.literals.append(Literal(self.out.value.name or "", place, operand.value.name or "", axis))

    def refusal(self, reason: str) -> Refusal:
        """Return a refusal that names this node."""
        return Refusal(self.node.name or self.out.value.name or "", self.node.op_type, reason)

    def hold_rest(self, reason: str) -> None:
        """Hold every axis that the rule has not settled."""
        refusal = self.refusal(reason)
        for operand in (*self.inputs, *self.outputs):
            if operand is not None:
                rest = [axis for axis in range(operand.rank) if (operand, axis) not in self.settled]
                self.slots.hold(operand.value, rest, refusal)
