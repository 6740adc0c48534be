"""What stands between the product of queries and keys and its Softmax: masks, factors, and guards after it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from onnx_lathe.passes.fuse.intervals import interval

_WIDE = (ir.DataType.FLOAT, ir.DataType.DOUBLE)
"""Types in which the lowest number and a score do not overflow together: a score is far below its rounding."""

_RANK = 4
"""Dimensions of scores, ``[batch, heads, queries, keys]``."""


@dataclass(frozen=True, eq=False)
class Scores:
    """The input of a Softmax over keys, taken apart: ``factor * (query @ key) + the terms``.

    Attributes:
        product: The MatMul of queries and keys.
        terms: What is added, such as masks and biases of positions.
        factor: By what the product is multiplied.
        steps: The nodes that add and multiply, the last one first.
    """

    product: ir.Node
    terms: tuple[ir.Value, ...]
    factor: float
    steps: tuple[ir.Node, ...]


def scores(softmax: ir.Node) -> Scores | str:
    """Take the input of a Softmax apart; where it is no masked product of two computed tensors, say why."""
    value, terms, factor, steps = softmax.inputs[0], list[ir.Value](), 1.0, list[ir.Node]()
    while value is not None:
        node = value.producer()
        if node is None or node.domain != "":
            break
        if is_product(node):
            return Scores(node, tuple(terms), factor, tuple(steps))
        scaled = scale(node)
        if scaled is not None:
            value, factor = scaled[0], factor * scaled[1]
        elif node.op_type == "Add" and factor == 1.0:
            inner = [_leads_to_product(operand) for operand in node.inputs]
            if sum(inner) != 1:
                break
            value, term = node.inputs[inner.index(True)], node.inputs[inner.index(False)]
            assert term is not None, "an Add has two operands"
            terms.append(term)
        else:
            return f"{node.op_type} stands between its scores and its Softmax"
        steps.append(node)
    return "its input is no masked product of queries and keys"


def is_product(node: ir.Node) -> bool:
    """Say whether a node is a MatMul of two computed tensors."""
    computed = all(value is not None and ir.convenience.get_const_tensor(value) is None for value in node.inputs)
    return node.op_type == "MatMul" and node.domain == "" and computed


def scale(node: ir.Node | None) -> tuple[ir.Value, float] | None:
    """Return what a node multiplies (or divides) by one number, and the factor."""
    if node is None or node.domain != "" or node.op_type not in ("Mul", "Div"):
        return None
    first, second = node.inputs
    number = scalar(second)
    if first is not None and number:
        return first, number if node.op_type == "Mul" else 1.0 / number
    number = scalar(first)
    return (second, number) if second is not None and number and node.op_type == "Mul" else None


def scalar(value: ir.Value | None) -> float | None:
    """Return the only element of a constant."""
    tensor = None if value is None or value.is_graph_input() else ir.convenience.get_const_tensor(value)
    # More dimensions than scores have would add some to them.
    single = tensor is not None and tensor.size == 1 and len(tensor.shape) <= _RANK
    return float(tensor.numpy().flat[0]) if tensor is not None and single else None


def guard(softmax: ir.Node) -> ir.Value | None:
    """Return ``Where(IsNaN(p), 0, p)`` of the result ``p`` of a Softmax, where that is all that reads it."""
    readers = {use.node for use in softmax.outputs[0].uses()}
    where = next((node for node in readers if node.op_type == "Where" and node.domain == ""), None)
    if where is None or len(readers) != 2 or softmax.outputs[0].is_graph_output():
        return None
    condition, zero, kept = where.inputs
    test = None if condition is None else condition.producer()
    tests = test is not None and test.op_type == "IsNaN" and test.inputs[0] is softmax.outputs[0]
    return where.outputs[0] if tests and scalar(zero) == 0.0 and kept is softmax.outputs[0] else None


def empty_row(softmax: ir.Node, found: Scores) -> str | None:
    """Say why a row of scores may be minus infinity whole (its Softmax is then not a number); None where none can be.

    The product itself is taken as finite: an overflow in it is garbage with a guard as without.
    """
    if softmax.inputs[0] is None or softmax.inputs[0].dtype not in _WIDE:
        return "in half precision a mask and a score may overflow together"
    return may_mask_whole(found.terms)


def may_mask_whole(terms: Sequence[ir.Value], offset: float = 0.0) -> str | None:
    """Say why masks added up in float32, and ``offset`` with them, may be minus infinity; None where they cannot be.

    Two that are finite alone are not where both are the lowest number.
    """
    lowest = offset
    for term in terms:
        bounds = interval(term)
        if bounds is None or not bounds.finite:
            return f"a row may be masked whole to minus infinity: nothing bounds {term.name!r}"
        lowest += min(0.0, bounds.low)
    with np.errstate(over="ignore"):
        overflows = not np.isfinite(np.float32(lowest))
    names = ", ".join(repr(term.name) for term in terms)
    return f"a row may be masked whole to minus infinity: the sum of {names} overflows" if overflows else None


def _leads_to_product(value: ir.Value | None, depth: int = 12) -> bool:
    node = None if value is None else value.producer()
    if node is None or node.domain != "" or depth == 0:
        return False
    if is_product(node):
        return True
    scaled = scale(node)
    if scaled is not None:
        return _leads_to_product(scaled[0], depth - 1)
    return node.op_type == "Add" and any(_leads_to_product(operand, depth - 1) for operand in node.inputs)
