"""Where a graph normalizes the last axis: as one operator, or spelled in elementary ones."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import product
from typing import Literal

import numpy as np
import onnx_ir as ir

from onnx_lathe.passes.fuse.activations import MICROSOFT, operator_of
from onnx_lathe.passes.fuse.stretch import Reals, Stretch, name, stretches
from onnx_lathe.passes.quantize.layers import constant

Kind = Literal["layer", "rms"]

OPERATORS: Mapping[str, Kind] = {
    "LayerNormalization": "layer",
    "RMSNormalization": "rms",
    "SimplifiedLayerNormalization": "rms",
}
"""What one operator normalizes. The last is onnxruntime's, in ONNX's domain by mistake."""

SKIPS: Mapping[str, Kind] = {
    f"{MICROSOFT}.SkipLayerNormalization": "layer",
    f"{MICROSOFT}.SkipSimplifiedLayerNormalization": "rms",
}
"""What one operator of onnxruntime adds up and normalizes; its fourth result is the sum."""

_SAME = 1e-5
"""Largest difference between a stretch and the normalization that it is, relative to the row: constants are float32."""
_LARGEST_EPSILON = 0.1
_SKIP_RANKS = (2, 3)
_DEFAULT_EPSILON, _DEFAULT_SKIP_EPSILON = 1e-5, 1e-12
_SUM = 3


@dataclass(frozen=True)
class Normalization:
    """One normalization of a graph.

    Attributes:
        source: The value that is normalized; empty where an operator adds it up and does not give it out.
        result: What comes out.
        kind: With the mean taken off ("layer") or without ("rms").
        epsilon: What is added to the variance, or to the mean square.
        scale: What the result is multiplied by; empty for 1.
        shift: What is added then; empty for 0.
        width: The size of the last axis; 0 where it is not known.
        operator: The operator that makes the result now.
        reads: What that operator reads.
        skip: The two summands of ``source`` where it is a skip connection and was asked for, or one operator does both.
        bias: What that operator adds as well; empty for nothing.
        reason: Why it cannot be written in another way; None where it can.
    """

    source: str
    result: str
    kind: Kind
    epsilon: float
    scale: str
    shift: str
    width: int
    operator: str
    reads: tuple[str, ...]
    skip: tuple[str, str] | None = None
    bias: str = ""
    reason: str | None = None


def find_normalizations(model: ir.Model, *, with_skip: bool) -> Iterator[Normalization]:
    """Yield the normalizations of the main graph, in order.

    Args:
        model: With its types inferred.
        with_skip: Whether the summands of a skip connection before one are wanted; without, operators that add up
            and normalize are found.
    """
    inside: set[ir.Node] = set()
    for node in model.graph:
        if operator_of(node) in OPERATORS:
            source, found, parameters = node.inputs[0], _whole(node), list(node.inputs[1:])
        elif operator_of(node) in SKIPS and not with_skip:
            source, found, parameters = node.inputs[0], _with_sum(node), list[ir.Value | None]()
        elif node.op_type == "ReduceMean" and node.domain == "" and node not in inside:
            source, found, nodes = _first_spelled(node)
            inside.update(nodes)
            parameters = list[ir.Value | None]()  # constants, all of them
        else:
            continue
        if found is None or source is None:
            continue
        # The two together stand where the sum stood, before what may compute a scale.
        if with_skip and all(value is None or constant(value) is not None for value in parameters):
            found = _with_skip(found, source)
        yield replace(found, reason=_reason(found, source))


def is_as_found(normalization: Normalization, result: ir.Value | None) -> bool:
    """Say whether ``result`` is still made by the operator that was found."""
    node = None if result is None else result.producer()
    if node is None:
        return False
    return (operator_of(node), tuple(map(name, node.inputs))) == (normalization.operator, normalization.reads)


def _reason(found: Normalization, source: ir.Value) -> str | None:
    if source.dtype == ir.DataType.FLOAT:
        return None if found.scale or found.width else "the size of its last axis is not known"
    return f"its elements are {'of an unknown type' if source.dtype is None else source.dtype.name}, not FLOAT"


def _whole(node: ir.Node) -> Normalization | None:
    """Return the normalization that one operator is, where it is over the last axis and its statistics are not read."""
    source = node.inputs[0]
    axis = node.attributes.get_int("axis", -1)
    rank = None if source is None or source.shape is None else len(source.shape)
    if source is None or (axis != -1 and (rank is None or axis != rank - 1)):
        return None
    if any(value.uses() or value.is_graph_output() for value in node.outputs[1:]):
        return None
    return Normalization(
        source=name(source),
        result=name(node.outputs[0]),
        kind=OPERATORS[operator_of(node)],
        epsilon=node.attributes.get_float("epsilon", _DEFAULT_EPSILON),
        scale=name(node.inputs[1]),
        shift=name(node.inputs[2]) if len(node.inputs) > 2 else "",
        width=_width(source),
        operator=operator_of(node),
        reads=tuple(map(name, node.inputs)),
    )


def _with_sum(node: ir.Node) -> Normalization | None:
    """Return the normalization of an operator that adds up first, where its statistics are not read."""
    kind = SKIPS[operator_of(node)]
    if any(value.uses() or value.is_graph_output() for value in node.outputs[1:_SUM]):
        return None
    names = [name(value) for value in node.inputs] + [""] * 3
    shift, bias = (names[3], names[4]) if kind == "layer" else ("", names[3])
    return Normalization(
        source=name(node.outputs[_SUM]) if len(node.outputs) > _SUM else "",
        result=name(node.outputs[0]),
        kind=kind,
        epsilon=node.attributes.get_float("epsilon", _DEFAULT_SKIP_EPSILON),
        scale=names[2],
        shift=shift,
        width=0,
        operator=operator_of(node),
        reads=tuple(map(name, node.inputs)),
        skip=(names[0], names[1]),
        bias=bias,
    )


def _first_spelled(node: ir.Node) -> tuple[ir.Value | None, Normalization | None, tuple[ir.Node, ...]]:
    """Return what the longest normalization that ``node`` is in reads, the normalization, and its nodes."""
    for stretch in stretches(node):
        found = _spelled(stretch)
        if found is not None:
            return stretch.source, found, stretch.nodes
    return None, None, ()


def _spelled(stretch: Stretch) -> Normalization | None:
    """Return the normalization that a stretch computes; None where it computes something else."""
    constants = stretch.constants
    vectors = {value: array for value, array in constants.items() if array.size > 1}
    widths = {array.size for array in vectors.values()} or {_width(stretch.source)}
    if len(widths) > 1 or any(array.shape[-1] != array.size for array in vectors.values()) or len(vectors) > 2:
        return None
    width = widths.pop()
    if stretch.may_widen(1) or _width(stretch.source) not in (0, width):
        return None
    rows = _rows(width or 8)
    got = stretch.run(rows)
    if got.shape != rows.shape:
        return None
    scalars = {float(array.reshape(-1)[0]) for array in constants.values() if array.size == 1}
    small = [number for number in scalars if 0.0 < number < _LARGEST_EPSILON]
    kinds: tuple[Kind, ...] = ("layer", "rms")
    for kind, epsilon in product(kinds, small):
        normal = _normalized(rows, kind, epsilon)
        shifts = (None, *vectors) if kind == "layer" else (None,)
        for scale, shift in product((None, *vectors), shifts):
            want = normal * (1.0 if scale is None else vectors[scale]) + (0.0 if shift is None else vectors[shift])
            away = np.abs(got - want).max(axis=-1) / (np.abs(want).max(axis=-1) + 1e-30)
            if away.max() < _SAME:
                return _found(stretch, kind, epsilon, scale, shift, width)
    return None


def _found(
    stretch: Stretch, kind: Kind, epsilon: float, scale: ir.Value | None, shift: ir.Value | None, width: int
) -> Normalization:
    node = stretch.result.producer()
    assert node is not None, "the result of a stretch is computed"
    return Normalization(
        source=name(stretch.source),
        result=name(stretch.result),
        kind=kind,
        epsilon=epsilon,
        scale=name(scale),
        shift=name(shift),
        width=width,
        operator=operator_of(node),
        reads=tuple(map(name, node.inputs)),
    )


def _rows(width: int) -> Reals:
    """Return rows that tell normalizations apart: with and without a mean, large, and small beside any epsilon."""
    spreads = np.array([1.0, 30.0, 0.03, 1e-3, 1e-5, 1e-6])[:, None]
    means = np.array([0.0, 10.0, -0.05, 5e-4, 1e-5, 0.0])[:, None]
    return np.random.default_rng(0).normal(size=(len(spreads), width)) * spreads + means


def _normalized(rows: Reals, kind: Kind, epsilon: float) -> Reals:
    centred = rows - rows.mean(axis=-1, keepdims=True) if kind == "layer" else rows
    return centred / np.sqrt(np.mean(centred**2, axis=-1, keepdims=True) + epsilon)


def _width(value: ir.Value) -> int:
    last = None if value.shape is None or len(value.shape) == 0 else value.shape[-1]
    return last if isinstance(last, int) else 0


def _with_skip(found: Normalization, source: ir.Value) -> Normalization:
    """Add the summands of the skip connection that ``source`` is; without change where it is none."""
    add = source.producer()
    if add is None or add.op_type != "Add" or add.domain != "":
        return found
    one, other = add.inputs
    if one is None or other is None or any(value.const_value is not None for value in (one, other)):
        return found
    shapes = [value.shape for value in (one, other, source)]
    known = [None if shape is None else tuple(str(dim) for dim in shape) for shape in shapes]
    if known[0] is None or len(known[0]) not in _SKIP_RANKS or "None" in known[0] or len(set(known)) > 1:
        return found
    return replace(found, skip=(name(one), name(other)))
