"""Folding what exporters write around attention: masks, guards, shapes and scales that cost at every call.

A rule is a function that says what a node's result may be replaced by. Each keeps the values, but for scales, which
round at another place.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass as plain_dataclass
from typing import Any, ClassVar

import numpy as np
import onnx_ir as ir
from onnx_ir.passes import common
from pydantic.dataclasses import dataclass

from onnx_lathe.passes.additions import add_initializer
from onnx_lathe.passes.edit import Edit, Refusal
from onnx_lathe.passes.fuse.guards import guard_against_nan, guard_by_value, guarded_scores
from onnx_lathe.passes.fuse.heads import HEADS_FIRST, producer, turned_in_batch
from onnx_lathe.passes.fuse.intervals import interval
from onnx_lathe.passes.fuse.probe import Probe
from onnx_lathe.passes.fuse.scales import fold_scales
from onnx_lathe.passes.fuse.scores import empty_row
from onnx_lathe.passes.fuse.stretch import name
from onnx_lathe.passes.fuse.typed import typed
from onnx_lathe.passes.oracle import Tolerance
from onnx_lathe.passes.request import Request, Score
from onnx_lathe.runtime.errors import UnsupportedModelError
from onnx_lathe.runtime.samples import Samples

_BROADCAST = frozenset({"Add", "Sub", "Mul", "Div", "And", "Or", "Not", "Where", "Cast", "Identity"})
"""Operators that broadcast their inputs to each other, element by element."""
_MOST_SHRUNK = 64
"""Values that an Expand may be taken out of at once."""
_RANDOM = frozenset({"Bernoulli", "Dropout", "RandomNormalLike", "RandomUniformLike"})
"""Two draws of one of these are not the same value."""


@dataclass(frozen=True)
class FoldMasks(Request):
    """Fold what exporters leave around attention: masks, guards against NaN, shapes and scales.

    Guards are removed only where no row of scores can be masked to minus infinity whole.
    """

    name: ClassVar[str] = "fold-masks"

    def plan(self, model: ir.Model, samples: Samples | None, score: Score | None) -> MasksFolded:
        """Try the rules on a copy of the graph.

        Raises:
            UnsupportedModelError: None of them finds anything.
        """
        del samples, score
        trial = model.clone()
        counts = fold(trial)
        if not counts:
            raise UnsupportedModelError(
                self.name,
                got="no mask, guard, shape or scale of attention that can be folded",
                expected="attention as torch exports it: product, mask, Softmax, product",
                mend="Leave the pass out.",
            )
        with typed(trial):
            return MasksFolded(tuple(sorted(counts.items())), tuple(_guards_left(trial)))


@plain_dataclass(frozen=True)
class MasksFolded(Edit):
    """The rules applied until none finds anything.

    Attributes:
        counts: How often each rule applies.
        refusals: The guards that stay.
    """

    tolerance: ClassVar[Tolerance] = Tolerance(
        "One rounding of a scale moves from the scores to the weights: 4e-7 seen on 6 layers.", relative=1e-5
    )

    counts: tuple[tuple[str, int], ...]
    refusals: tuple[Refusal, ...] = ()

    def describe(self) -> Mapping[str, Any]:
        """Return how often each rule applies."""
        return dict(self.counts)

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Apply the rules."""
        return ir.passes.PassResult(model, modified=bool(fold(model)))


def fold(model: ir.Model) -> Counter[str]:
    """Apply every rule to the main graph of ``model`` until none changes anything; return how often each did."""
    counts: Counter[str] = Counter()
    found: Counter[str] | None = None
    while found is None or found:
        with typed(model) as facts:
            found = _round(model.graph, facts)
            if found:
                common.RemoveUnusedNodesPass()(model)
        counts += found
    counts += fold_scales(model)
    if counts:
        if not any(node.op_type in _RANDOM for node in model.graph.all_nodes()):
            common.CommonSubexpressionEliminationPass()(model)
        common.RemoveUnusedNodesPass()(model)
    return counts


Rule = Callable[[ir.Node, Probe], "ir.Value | ir.Node | None"]
"""Returns what the result of a node may be replaced by: a value that is there, or a new node; None to leave it."""


def _round(graph: ir.Graph, facts: Probe) -> Counter[str]:
    """Apply every rule wherever it fits, or up to the first change of a value's dimensions: they are not known then."""
    counts: Counter[str] = Counter()
    for rule in _RULES:
        for node in tuple(graph):
            if node.graph is None or node.domain != "" or len(node.outputs) != 1 or node.outputs[0].is_graph_output():
                continue
            old, new = node.outputs[0], rule(node, facts)
            if new is None or not old.uses():
                continue
            counts[rule.__name__.removeprefix("_").replace("_", " ")] += 1
            if isinstance(new, ir.Node):
                graph.insert_before(node, new)
                new, shrunk = _renamed(old, new.outputs[0]), False
            else:
                shrunk = facts.shape(new) != facts.shape(old)
            old.replace_all_uses_with(new)
            if shrunk:
                return counts
    return counts


def _renamed(old: ir.Value, new: ir.Value) -> ir.Value:
    """Return ``new`` under the name of ``old``, by which its dimensions are known."""
    new.type, new.shape = old.type, old.shape
    new.name, old.name = old.name, f"{old.name}.before"
    return new


def _guards_left(model: ir.Model) -> Iterator[Refusal]:
    for node in model.graph:
        guarded = guarded_scores(node)
        if guarded is not None:
            yield Refusal(name(node.outputs[0]), "Where", empty_row(*guarded) or "it is a result of the model")


def _certain_mask(node: ir.Node, facts: Probe) -> ir.Value | None:
    """``And(x, true)`` and ``x + 0`` are ``x``, and ``Where(true, x, y)`` is ``x``."""
    if node.op_type == "Where":
        chosen = interval(node.inputs[0])
        certain = None if chosen is None else chosen.only
        return None if certain is None else _instead(node.inputs[1 if certain else 2], node, facts)
    neutral = {"And": 1.0, "Or": 0.0, "Add": 0.0}.get(node.op_type)
    if neutral is None:
        return None
    for kept, other in (node.inputs, node.inputs[::-1]):
        bounds = interval(other)
        # Only what is computed is looked for: cleanup removes constants.
        if bounds is not None and bounds.only == neutral and _instead(kept, node, facts) is not None:
            return kept
    return None


def _idle_expand_or_reshape(node: ir.Node, facts: Probe) -> ir.Value | None:
    """``Expand`` or ``Reshape`` to the dimensions that are there."""
    if node.op_type not in ("Expand", "Reshape"):
        return None
    tensor = None if node.inputs[1] is None else ir.convenience.get_const_tensor(node.inputs[1])
    # One that copies every dimension was put there: keep-skip-apart keeps a fusion away by it.
    on_purpose = node.op_type == "Reshape" and tensor is not None and not np.any(tensor.numpy())
    return None if on_purpose else _same(node.inputs[0], node, facts)


def _early_expand(node: ir.Node, facts: Probe) -> ir.Value | None:
    """An ``Expand`` before operators that broadcast anyhow, down to one whose other operand has the dimensions."""
    return _instead(node.inputs[0], node, facts) if node.op_type == "Expand" else None


def _may_shrink(value: ir.Value, facts: Probe) -> bool:
    """Say whether all that reads a value computes the same where its repeated dimensions are 1."""
    shrunk, seen = {value}, 0
    while seen != len(shrunk):
        seen = len(shrunk)
        for reader in {use.node for each in shrunk for use in each.uses()}:
            result = facts.shape(reader.outputs[0])
            others = [facts.shape(other) for other in reader.inputs if other is not None and other not in shrunk]
            if reader.op_type not in _BROADCAST or reader.domain != "" or result is None or None in others:
                return False
            if result not in others:
                if reader.outputs[0].is_graph_output() or seen > _MOST_SHRUNK:
                    return False
                shrunk.add(reader.outputs[0])
    return True


def _gather_of_every_element(node: ir.Node, facts: Probe) -> ir.Node | None:
    """``GatherND`` by the numbers ``0 .. n-1`` along each axis is a ``Reshape``: torch writes masks so."""
    if node.op_type != "GatherND" or node.attributes.get_int("batch_dims", 0) != 0:
        return None
    data, result = facts.shape(node.inputs[0]), facts.shape(node.outputs[0])
    indices = node.inputs[1].producer() if node.inputs[1] is not None else None
    if data is None or result is None or indices is None or indices.op_type != "Concat":
        return None
    if len(indices.inputs) != len(data) or indices.attributes.get_int("axis", 0) not in (-1, len(result)):
        return None
    axes = [_counting_axis(value, size, facts) for value, size in zip(indices.inputs, data, strict=True)]
    kept = [axis for axis in axes if axis is not None]
    if len(kept) != len(data) or kept != sorted(set(kept)) or [result[axis] for axis in kept] != list(data):
        return None
    others = [axis for axis in range(len(result)) if axis not in kept]
    if any(result[axis] != 1 for axis in others):
        return None
    axes_value = _vector(node, others)
    return ir.node("Unsqueeze", [node.inputs[0], axes_value], name=f"{name(node.outputs[0])}.unsqueeze")


def _counting_axis(value: ir.Value | None, size: int, facts: Probe) -> int | None:
    """Return the axis along which a value counts ``0 .. size-1``, repeated along the others; the last is one of 1."""
    shape = facts.shape(value)
    node = None if value is None else value.producer()
    while node is not None and node.op_type in ("Unsqueeze", "Expand", "Identity"):
        value = node.inputs[0]
        node = None if value is None else value.producer()
    if node is None or node.op_type != "Range" or shape is None or facts.shape(value) != (size,):
        return None
    start, _, step = (facts.constant(each) for each in node.inputs)
    counts = start is not None and step is not None and int(start) == 0 and int(step) == 1
    # A size that two axes have would not say which of them counts.
    places = [axis for axis, dim in enumerate(shape[:-1]) if dim == size]
    return places[0] if counts and len(places) == 1 and shape[-1] == 1 else None


def _turned_key(node: ir.Node, facts: Probe) -> ir.Node | None:
    """Heads merged into the batch, turned and split again: torch turns keys so. A ``Transpose`` does it at once."""
    whole = turned_in_batch(node.outputs[0], facts)
    if whole is None:
        return None
    split = producer(whole, "Transpose")
    label = f"{name(node.outputs[0])}.turn"
    if split is not None and list(split.attributes.get_ints("perm", ())) == HEADS_FIRST:
        return ir.node("Transpose", [split.inputs[0]], {"perm": [0, 2, 3, 1]}, name=label)
    return ir.node("Transpose", [whole], {"perm": [0, 1, 3, 2]}, name=label)


def _same(value: ir.Value | None, node: ir.Node, facts: Probe) -> ir.Value | None:
    """Return ``value`` where it has the dimensions of the result of ``node``."""
    shape = facts.shape(value)
    return value if shape is not None and shape == facts.shape(node.outputs[0]) else None


def _instead(value: ir.Value | None, node: ir.Node, facts: Probe) -> ir.Value | None:
    """Return ``value`` where it can stand for the result of ``node``, whose dimensions it has or repeats along."""
    shape, result = facts.shape(value), facts.shape(node.outputs[0])
    if shape is None or result is None or len(shape) != len(result):
        return None
    return value if shape == result or _may_shrink(node.outputs[0], facts) else None


def _vector(node: ir.Node, numbers: Sequence[int]) -> ir.Value:
    """Add a vector of whole numbers to the graph of ``node``."""
    tensor = ir.Tensor(np.asarray(numbers, np.int64), name=f"{name(node.outputs[0])}.axes")
    assert isinstance(node.graph, ir.Graph), "rules are applied to the main graph"
    return add_initializer(node.graph, tensor)


_RULES: Sequence[Rule] = (
    _certain_mask,
    _idle_expand_or_reshape,
    _early_expand,
    _gather_of_every_element,
    _turned_key,
    guard_against_nan,
    guard_by_value,
)
