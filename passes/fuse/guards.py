"""Guards against rows of scores that are masked whole: torch writes ``Where(IsNaN(p), 0, p)`` after each Softmax.

The guard costs two passes over ``[batch, heads, queries, keys]``. It is idle where no mask is minus infinity. Where one
is, by key alone, the values of a sentence without any key are multiplied by 0 instead: ``[batch, keys, heads * size]``.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from onnx_lathe.passes.additions import add_initializer
from onnx_lathe.passes.fuse.heads import producer
from onnx_lathe.passes.fuse.intervals import interval
from onnx_lathe.passes.fuse.probe import Probe
from onnx_lathe.passes.fuse.scores import Scores, empty_row, guard, may_mask_whole, scalar, scores
from onnx_lathe.passes.fuse.stretch import name

_LOWEST = float(np.finfo(np.float32).min)
_SQUEEZE_BY_INPUT = 13
"""The operator set from which Squeeze takes its axes as an input."""
_AXES_AS_INPUT = 18
"""The operator set from which ReduceMax takes its axes as an input."""


def guarded_scores(node: ir.Node) -> tuple[ir.Node, Scores] | None:
    """Return the Softmax that a node guards, and its scores taken apart; None where it is no such guard."""
    kept = node.inputs[2] if node.op_type == "Where" and node.domain == "" else None
    softmax = producer(kept, "Softmax")
    if softmax is None or guard(softmax) is not node.outputs[0]:
        return None
    found = scores(softmax)
    return None if isinstance(found, str) else (softmax, found)


def guard_against_nan(node: ir.Node, facts: Probe) -> ir.Value | None:
    """``Where(IsNaN(p), 0, p)`` is ``p`` where no row of scores can be masked whole."""
    del facts
    guarded = guarded_scores(node)
    return guarded[0].outputs[0] if guarded is not None and empty_row(*guarded) is None else None


def guard_by_value(node: ir.Node, facts: Probe) -> ir.Value | None:
    """Let a sentence without keys have values of 0, and its mask the lowest number: every probability stays finite."""
    guarded = guarded_scores(node)
    if guarded is None or guarded[0].outputs[0].dtype != ir.DataType.FLOAT:
        return None
    softmax, found = guarded
    infinite = [term for term in found.terms if (bounds := interval(term)) is None or not bounds.finite]
    mask = producer(infinite[0], "Where") if len(infinite) == 1 else None
    values = _values(node.outputs[0], facts)
    shape = facts.shape(found.product.outputs[0])
    over_keys = softmax.attributes.get_int("axis", 0) in (-1, 3)
    if mask is None or values is None or shape is None or len(shape) != 4 or not over_keys:
        return None
    flags, zero, low = mask.inputs
    by_key = facts.shape(flags) == facts.shape(infinite[0]) == (shape[0], 1, 1, shape[3])
    if flags is None or not by_key or scalar(zero) != 0.0 or scalar(low) != -np.inf:
        return None
    others = [term for term in found.terms if term is not infinite[0]]
    if may_mask_whole(others, offset=_LOWEST) is not None:
        return None
    graph = node.graph
    assert isinstance(graph, ir.Graph), "rules are applied to the main graph"
    if graph.opset_imports.get("", 1) < _SQUEEZE_BY_INPUT:
        return None
    _finite_mask(graph, softmax, found, mask)
    _silence(graph, values, flags)
    graph.sort()
    return softmax.outputs[0]


def _values(probabilities: ir.Value, facts: Probe) -> ir.Node | None:
    """Return the Reshape that splits the heads of values, ``[batch, keys, heads * size]``, for this product alone."""
    uses = tuple(probabilities.uses())
    if len(uses) != 1 or uses[0].node.op_type != "MatMul" or uses[0].idx != 0:
        return None
    turned = uses[0].node.inputs[1]
    turn = producer(turned, "Transpose")
    split = None if turn is None else producer(turn.inputs[0], "Reshape")
    if turn is None or split is None or turned is None or len(turned.uses()) != 1 or len(split.outputs[0].uses()) != 1:
        return None
    source, shape = facts.shape(split.inputs[0]), facts.shape(split.outputs[0])
    fits = source is not None and shape is not None and len(source) == 3 and len(shape) == 4 and source[:2] == shape[:2]
    return split if fits and list(turn.attributes.get_ints("perm", ())) == [0, 2, 1, 3] else None


def _finite_mask(graph: ir.Graph, softmax: ir.Node, found: Scores, mask: ir.Node) -> None:
    add = next(step for step in found.steps if mask.outputs[0] in step.inputs)
    label = f"{name(softmax.outputs[0])}.lowest"
    lowest = _constant(graph, label, np.array(_LOWEST, np.float32))
    where = ir.node("Where", [mask.inputs[0], mask.inputs[1], lowest], name=f"{label}.mask")
    _describe(where.outputs[0], f"{label}.mask", mask.outputs[0])
    graph.insert_before(add, where)
    add.replace_input_with(list(add.inputs).index(mask.outputs[0]), where.outputs[0])


def _silence(graph: ir.Graph, split: ir.Node, flags: ir.Value) -> None:
    """Multiply values by 1 where a sentence has any key, else by 0."""
    source = split.inputs[0]
    assert source is not None, "a Reshape reads something"
    label = f"{name(split.outputs[0])}.any"
    axes = _constant(graph, f"{label}.axes", np.array([-1], np.int64))
    first = _constant(graph, f"{label}.heads", np.array([1], np.int64))
    numbers = ir.node("Cast", [flags], {"to": int(ir.DataType.FLOAT)}, name=f"{label}.numbers")
    if graph.opset_imports.get("", 1) >= _AXES_AS_INPUT:
        most = ir.node("ReduceMax", [numbers.outputs[0], axes], {"keepdims": 1}, name=f"{label}.most")
    else:
        most = ir.node("ReduceMax", [numbers.outputs[0]], {"keepdims": 1, "axes": [-1]}, name=f"{label}.most")
    flat = ir.node("Squeeze", [most.outputs[0], first], name=f"{label}.flat")
    product = ir.node("Mul", [source, flat.outputs[0]], name=label)
    for node in (numbers, most, flat):
        node.outputs[0].name, node.outputs[0].type = node.name, ir.TensorType(ir.DataType.FLOAT)
    _describe(product.outputs[0], label, source)
    graph.insert_before(split, [numbers, most, flat, product])
    split.replace_input_with(0, product.outputs[0])


def _describe(value: ir.Value, label: str, like: ir.Value) -> None:
    value.name, value.type, value.shape = label, like.type, like.shape


def _constant(graph: ir.Graph, label: str, array: NDArray[np.float32] | NDArray[np.int64]) -> ir.Value:
    return add_initializer(graph, ir.Tensor(array, name=label))
