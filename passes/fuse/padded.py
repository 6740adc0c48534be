"""What padding can change: a proof, from the graph, that no token depends on what stands in padded places.

Each value is followed through the graph with three facts: where it may hold anything (*dirty*: at the padded places of
a token axis), what it is known to hold there (*masked*: a mask is 0, a bias made of it so low that its exponential is
0), and what a mask holds elsewhere. A Softmax over keys that are low where they are padded, and a product with weights
that are 0 there, make a value clean again; anything else that joins tokens ends the proof.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import onnx_ir as ir

from onnx_lathe.passes.fuse.demand import ELEMENTWISE, NORMALIZATIONS
from onnx_lathe.passes.fuse.probe import Probe, apply_operator
from onnx_lathe.passes.fuse.stretch import name
from onnx_lathe.passes.fuse.tokens import Region, reduced_axes
from onnx_lathe.runtime.samples import Array

LOWEST = -1e4
"""A bias of this or less leaves a key no weight: exp(-1e4) is 0 in every float type, whatever the scores are."""

Place = tuple[int, int]
"""A batch axis and a token axis, as their strides in the flattened value: they survive every Reshape."""
Held = float | Literal["low", "unknown"]
"""What a value holds at padded places: a number, something so low that its exponential is 0, or anything."""

_INFINITE = (math.inf, -math.inf)
"""What 0 makes no number of."""
_SAME_ORDER = frozenset({"Reshape", "Flatten", "Squeeze", "Unsqueeze"})
_MOVES = _SAME_ORDER | {"Transpose", "Expand", "Slice", "Gather", "GatherND", "GatherElements", "Split", "Tile"}
_NEEDS_NO_VALUE = frozenset({"Shape", "Size", "ConstantOfShape"})


class TokensMixedError(Exception):
    """The proof ends: a node joins tokens in a way that padding could change."""

    def __init__(self, node: ir.Node, reason: str) -> None:
        super().__init__(f"{node.op_type} {node.name or name(node.outputs[0])!r} {reason}")


@dataclass(frozen=True)
class State:
    """What is known of a value.

    Attributes:
        dirty: The places at which it may hold anything where they are padded.
        masked: What it holds there, where that is known.
        real: What it holds at all other places, where that is one number.
        low: Whether it may be as low as `LOWEST` at places that are not padded.
    """

    dirty: frozenset[Place] = frozenset()
    masked: Mapping[Place, Held] | None = None
    real: float | None = None
    low: bool = False

    def at(self, place: Place) -> Held:
        """Return what the value holds at a padded place; a constant holds the same everywhere."""
        if self.masked:
            return self.masked.get(place, "unknown")
        return "unknown" if self.real is None else self.real

    @property
    def places(self) -> set[Place]:
        """Every place that something is known of."""
        return {*self.dirty, *(self.masked or {})}


CLEAN = State()


def extents_axis(shape: Sequence[int], stride: int, extent: int) -> int | None:
    """Return the axis of ``shape`` that holds the index ``(flat // stride) % extent``; None where it spans several."""
    inner = 1
    for axis in reversed(range(len(shape))):
        if stride >= inner and stride * extent <= inner * shape[axis]:
            return axis
        inner *= shape[axis]
    return None


class Proof:
    """Follows the values of a graph.

    Args:
        model: The graph.
        known: Its shapes and constants.
        mask: The input that is 0 where a token is padding, ``[batch, tokens]``.
        region: The nodes whose rows for padded tokens may hold anything; None to find what follows from the mask.

    Attributes:
        states: What is known, by name.

    Raises:
        TokensMixedError: Padding could change a token.
    """

    def __init__(self, model: ir.Model, known: Probe, mask: str, region: Region | None = None) -> None:
        self._model, self._known = model, known
        self._batch, self._tokens = known.shapes[mask]
        self._opset = model.opset_imports.get("", 1)
        self._inside = set() if region is None else set(region.nodes)
        self._entries = set() if region is None else {border.name for border in region.entries}
        self._first_is_right = True
        self.states: dict[str, State] = {mask: State(masked={(self._tokens, 1): 0.0}, real=1.0)}
        for node in model.graph:
            self._visit(node)

    def row_place(self, value: ir.Value) -> Place:
        """Return the place of a value ``[batch, tokens, ...]`` or ``[batch * tokens, ...]``."""
        inner = math.prod(self._known.shapes[name(value)]) // (self._batch * self._tokens)
        return self._tokens * inner, inner

    def state(self, value: ir.Value | None) -> State:
        """Return what is known of a value."""
        found = self.states.get(name(value))
        if found is not None:
            return found
        array = self._known.constant(value)
        if array is None or not array.size or array.dtype.kind not in "fiub":
            return CLEAN
        first = float(array.flat[0])
        return State(real=first if bool((array == array.flat[0]).all()) else None, low=float(array.min()) <= LOWEST)

    def _visit(self, node: ir.Node) -> None:
        if name(node.outputs[0]) in self._inside:
            for value in node.inputs:
                if value is not None and name(value) in self._entries:
                    in_order = self.state(value).dirty <= {self.row_place(value)}
                    self._refuse(not in_order, node, "reads tokens in another order")
            for value in node.outputs:
                self._set(value, State(frozenset({self.row_place(value)})))
            return
        if name(node.outputs[0]) in self._known.constants:
            return
        for value, state in zip(node.outputs, self._transferred(node), strict=True):
            self._set(value, state)

    def _set(self, value: ir.Value, state: State) -> None:
        if state != CLEAN:
            self.states[name(value)] = state
        for use in value.uses() if state.dirty else ():
            if use.node.graph is not self._model.graph:
                raise TokensMixedError(use.node, "reads tokens inside of a branch or loop")

    def _transferred(self, node: ir.Node) -> list[State]:
        states = [self.state(value) for value in node.inputs]
        every = len(node.outputs)
        if node.op_type in ELEMENTWISE and node.domain in ("", "com.microsoft"):
            return [self._elementwise(node, states)]
        if node.op_type in _NEEDS_NO_VALUE or (node.domain == "" and not any(state.places for state in states)):
            moved = node.op_type in _MOVES and bool(states) and states[0].low
            return [State(low=moved)] * every
        rules = {
            **dict.fromkeys(_MOVES, self._moved),
            **dict.fromkeys(NORMALIZATIONS, self._normalized),
            "Softmax": self._softmax,
            "MatMul": self._product,
            "Concat": self._joined,
        }
        rule = rules.get(node.op_type) or (self._reduced if node.op_type.startswith("Reduce") else None)
        if rule is not None and (node.domain == "" or node.op_type in NORMALIZATIONS):
            return rule(node, states)
        self._refuse(any(state.dirty for state in states), node)
        return [CLEAN] * every

    def _refuse(self, dirty: bool, node: ir.Node, reason: str = "joins tokens without regard to the mask") -> None:
        if dirty:
            raise TokensMixedError(node, reason)

    def _shape(self, value: ir.Value | None, node: ir.Node) -> tuple[int, ...]:
        shape = self._known.shape(value)
        if shape is None:
            raise TokensMixedError(node, "has a value of unknown shape")
        return shape

    def _axes(self, shape: Sequence[int], place: Place) -> tuple[int, int] | None:
        """Return the axes of batch and tokens, where each lies in one."""
        batch = extents_axis(shape, place[0], self._batch)
        token = extents_axis(shape, place[1], self._tokens)
        return None if batch is None or token is None else (batch, token)

    def _carried(self, place: Place, before: Sequence[int], after: Sequence[int]) -> Place | None:
        """Return a place after the axes of ``before`` became, aligned at the last, those of ``after``."""
        axes = self._axes(before, place)
        if axes is None:
            return None
        shift = len(after) - len(before)
        batch, token = (
            stride // math.prod(before[axis + 1 :]) * math.prod(after[axis + shift + 1 :])
            for stride, axis in zip(place, axes, strict=True)
        )
        return batch, token

    def _aligned(self, value: ir.Value | None, state: State, result: Sequence[int], node: ir.Node) -> State:
        """Return the state of an operand after it is broadcast to ``result``."""
        if not state.places:
            return state
        shape = self._shape(value, node)
        to = {place: self._carried(place, shape, result) for place in state.places}
        self._refuse(any(to[place] is None for place in state.dirty), node)
        dirty = frozenset(new for place in state.dirty if (new := to[place]) is not None)
        masked = {new: held for place, held in (state.masked or {}).items() if (new := to[place]) is not None}
        return replace(state, dirty=dirty, masked=masked, real=state.real if len(masked) == len(to) else None)

    def _elementwise(self, node: ir.Node, given: Sequence[State]) -> State:
        if not any(state.places for state in given):
            return State(low=any(state.low for state in given))
        result = self._shape(node.outputs[0], node)
        states = [self._aligned(*pair, result, node) for pair in zip(node.inputs, given, strict=True)]
        places = {place for state in states for place in state.places}
        held: dict[Place, Held] = {place: self._held(node, [state.at(place) for state in states]) for place in places}
        masked: dict[Place, Held] = {place: each for place, each in held.items() if each != "unknown"}
        dirty = {place for state in states for place in state.dirty}
        dirty -= {place for place, each in masked.items() if isinstance(each, float)}
        real = None
        if not dirty and len(places) == 1 and all(state.real is not None for state in states):
            computed = self._held(node, [state.real if state.real is not None else "unknown" for state in states])
            real = computed if isinstance(computed, float) and masked else None
        return State(frozenset(dirty), masked, real, self._low(node, states, real))

    def _low(self, node: ir.Node, states: Sequence[State], real: float | None) -> bool:
        if real is not None:
            return real <= LOWEST
        if node.op_type == "Where" and states[0].real is not None:
            return states[1 if states[0].real else 2].low
        # Of a mask only what it says of real tokens counts here.
        return any(state.low if state.real is None or not state.masked else state.real <= LOWEST for state in states)

    def _held(self, node: ir.Node, held: Sequence[Held]) -> Held:
        """Return what an operator makes of what its operands hold."""
        operator = node.op_type
        low = [each == "low" or (isinstance(each, float) and each <= LOWEST) for each in held]
        if operator == "Where" and held[0] != "unknown":
            return held[1 if held[0] else 2]
        if operator == "Where":
            return held[1] if held[1] == held[2] else "unknown"
        if operator == "And" and 0.0 in held:
            return 0.0
        if operator == "Mul" and 0.0 in held and "low" not in held and not any(each in _INFINITE for each in held):
            return 0.0
        if operator == "Or" and 1.0 in held:
            return 1.0
        if all(isinstance(each, float) for each in held) and node.domain == "":
            return self._computed(node, held)
        if operator == "Add" or operator == "Min":
            return "low" if any(low) else "unknown"
        if operator == "Sub":
            return "low" if low[0] and held[1] != "low" else "unknown"
        return "low" if operator in ("Max", "Cast", "Identity") and all(low) else "unknown"

    def _computed(self, node: ir.Node, held: Sequence[Held]) -> Held:
        types = [self._known.dtypes.get(name(value)) for value in node.inputs]
        if any(dtype is None for dtype in types):
            return "unknown"
        operands = [np.array(each, dtype.numpy()) for each, dtype in zip(held, types, strict=True) if dtype is not None]
        number = float(apply_operator(node, operands, self._opset)[0].reshape(-1)[0])
        return "unknown" if math.isnan(number) else number

    def _moved(self, node: ir.Node, states: Sequence[State]) -> list[State]:
        state = states[0]
        self._refuse(any(each.dirty for each in states[1:]), node)
        if node.op_type in _SAME_ORDER:
            return [state] * len(node.outputs)
        rest = [self._known.constant(value) for value in node.inputs[1:]]
        if any(array is None and value is not None for array, value in zip(rest, node.inputs[1:], strict=True)):
            self._refuse(bool(state.dirty), node, "takes tokens at places that the inputs say")
            return [CLEAN] * len(node.outputs)
        to = {place: self._places_moved(node, place, rest) for place in state.places}
        return [self._at_new_places(node, state, {each: to[each][i] for each in to}) for i in range(len(node.outputs))]

    def _at_new_places(self, node: ir.Node, state: State, to: Mapping[Place, Place | None]) -> State:
        dirty: set[Place] = set()
        masked: dict[Place, Held] = {}
        for place, new in to.items():
            first = new is not None and new[1] == 0 and new[0] > 0
            if place in state.dirty:
                self._refuse(new is None or (not first and 0 in new), node)
                self._refuse(
                    first and not self._first_is_right,
                    node,
                    "takes the first token, which padding may stand before, after an attention that hides keys of "
                    "its own accord",
                )
            if new is not None and 0 not in new:
                dirty |= {new} if place in state.dirty else set()
                masked |= {new: state.masked[place]} if state.masked and place in state.masked else {}
        return State(frozenset(dirty), masked, state.real if len(masked) == len(to) else None, state.low)

    def _places_moved(self, node: ir.Node, place: Place, rest: Sequence[Array | None]) -> list[Place | None]:
        """Return where a place is in each output, seen by moving the indices themselves; a stride of 0: at index 0."""
        shape = self._shape(node.inputs[0], node)
        numbers = np.arange(math.prod(shape)).reshape(shape)
        found: list[list[int | None]] = []
        for stride, extent in zip(place, (self._batch, self._tokens), strict=True):
            moved = apply_operator(node, [numbers // stride % extent, *rest], self._opset)
            found.append([_stride(indices.reshape(-1), extent) for indices in moved])
        return [None if one is None or other is None else (one, other) for one, other in zip(*found, strict=True)]

    def _normalized(self, node: ir.Node, states: Sequence[State]) -> list[State]:
        shape = self._shape(node.inputs[0], node)
        axis = node.attributes.get_int("axis", -1) % len(shape)
        across = [place for place in states[0].dirty if max(self._axes(shape, place) or (axis, axis)) >= axis]
        self._refuse(bool(across) or any(state.dirty for state in states[1:]), node)
        return [State(states[0].dirty), *[CLEAN] * (len(node.outputs) - 1)]

    def _softmax(self, node: ir.Node, states: Sequence[State]) -> list[State]:
        shape, state = self._shape(node.inputs[0], node), states[0]
        axis = node.attributes.get_int("axis", -1 if self._opset >= 13 else 1) % len(shape)
        self._refuse(bool(state.dirty) and self._opset < 13 and axis != len(shape) - 1, node)
        dirty: set[Place] = set()
        masked: dict[Place, Held] = {}
        for place in state.places:
            axes = self._axes(shape, place)
            if axes is not None and axis not in axes:
                dirty |= {place} & state.dirty
                continue
            held = state.at(place)
            hidden = held == "low" or (isinstance(held, float) and held <= LOWEST)
            whole = axes is not None and axes[0] != axis and shape[axis] == self._tokens
            self._refuse(place in state.dirty and not (hidden and whole), node)
            if hidden and whole:
                masked[place] = 0.0
                self._first_is_right &= not state.low
        return [State(frozenset(dirty), masked)]

    def _product(self, node: ir.Node, states: Sequence[State]) -> list[State]:
        result = self._shape(node.outputs[0], node)
        shapes = [self._shape(value, node) for value in node.inputs]
        self._refuse(any(len(shape) < 2 for shape in shapes), node)
        dirty: set[Place] = set()
        summed: list[dict[Place, tuple[bool, Held]]] = [{}, {}]
        for side, (shape, state) in enumerate(zip(shapes, states, strict=True)):
            contracted = len(shape) - 1 - side
            for place in state.places:
                axes, new = self._axes(shape, place), self._carried(place, shape, result)
                self._refuse(place in state.dirty and (axes is None or axes[0] == contracted), node)
                if axes is not None and axes[1] == contracted:
                    # Both operands number what is summed alike, and their first axes are those of the result.
                    inner = math.prod(shape[contracted + 1 :])
                    first = (new or place)[0] // math.prod(result[axes[0] + len(result) - len(shape) + 1 :])
                    key = (first * 2**20 + axes[0] + len(result) - len(shape), place[1] // inner)
                    summed[side][key] = (place in state.dirty, state.at(place))
                elif place in state.dirty and new is not None:
                    dirty.add(new)
        for one, other in (summed, summed[::-1]):
            unweighted = [key for key, (is_dirty, _) in one.items() if is_dirty and other.get(key, (0, ""))[1] != 0.0]
            self._refuse(bool(unweighted), node)
        return [State(frozenset(dirty))]

    def _joined(self, node: ir.Node, states: Sequence[State]) -> list[State]:
        result = self._shape(node.outputs[0], node)
        axis = node.attributes.get_int("axis", 0) % len(result)
        dirty: set[Place] = set()
        for value, state in zip(node.inputs, states, strict=True):
            shape = self._shape(value, node)
            for place in state.dirty:
                axes, new = self._axes(shape, place), self._carried(place, shape, result)
                self._refuse(axes is None or new is None or axis in axes, node)
                dirty |= {new} if new is not None else set()
        return [State(frozenset(dirty))]

    def _reduced(self, node: ir.Node, states: Sequence[State]) -> list[State]:
        if not states[0].dirty:
            return [CLEAN] * len(node.outputs)
        shape, result = self._shape(node.inputs[0], node), self._shape(node.outputs[0], node)
        over = {axis % len(shape) for axis in reduced_axes(node, self._known) or []}
        self._refuse(not over, node)
        inner = [1 if axis in over else size for axis, size in enumerate(shape)]
        assert math.prod(inner) == math.prod(result), "a reduction leaves its other axes"
        dirty: set[Place] = set()
        for place in states[0].dirty:
            found, new = self._axes(shape, place), self._carried(place, shape, inner)
            self._refuse(found is None or new is None or bool(over & set(found)), node)
            dirty |= {new} if new is not None else set()
        return [State(frozenset(dirty))]


def _stride(indices: Array, extent: int) -> int | None:
    """Return s where ``indices`` is ``(flat // s) % extent``; 0 where all are 0, None where they are something else."""
    if not indices.any():
        return 0
    stride = int(np.argmax(indices != 0))
    if stride == 0:
        return None
    same = np.array_equal(indices, np.arange(indices.size) // stride % extent)
    return stride if same else None
