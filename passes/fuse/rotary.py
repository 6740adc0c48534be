"""Rotary positions as one operator: com.microsoft.RotaryEmbedding.

``x * cos + concat(-x2, x1) * sin`` over the halves ``x1, x2`` of each head (RoFormer, arXiv 2104.09864, rotating
halves). The operator takes tokens before their heads are split, so that none is transposed for it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass as plain_dataclass
from typing import Any, ClassVar

import numpy as np
import onnx_ir as ir
from onnx_ir.passes import common
from pydantic.dataclasses import dataclass

from onnx_lathe.passes.edit import Edit, Refusal
from onnx_lathe.passes.fuse.attention_nodes import CONTRIB, Writer
from onnx_lathe.passes.fuse.heads import HEADS_FIRST, Heads, heads_of, producer
from onnx_lathe.passes.fuse.probe import Probe
from onnx_lathe.passes.fuse.stretch import name
from onnx_lathe.passes.fuse.typed import typed
from onnx_lathe.passes.oracle import Tolerance
from onnx_lathe.passes.request import Request, Score
from onnx_lathe.runtime.errors import UnsupportedModelError
from onnx_lathe.runtime.samples import Samples

_ELEMENTWISE = ("Cos", "Sin", "Cast", "Mul", "Unsqueeze", "Identity")
_LEAST_OPSET = 13
"""The operator set from which Unsqueeze and Squeeze take their axes as an input."""


@dataclass(frozen=True)
class FuseRotary(Request):
    """Let one operator rotate queries and keys by their positions."""

    name: ClassVar[str] = "fuse-rotary"

    def plan(self, model: ir.Model, samples: Samples | None, score: Score | None) -> RotaryFused:
        """Find the rotations.

        Raises:
            UnsupportedModelError: There is none that the operator can compute.
        """
        del samples, score
        fused, refusals = list[str](), list[Refusal]()
        with typed(model) as facts:
            for add, found in _rotations(model.graph, facts):
                if isinstance(found, str):
                    refusals.append(Refusal(add.name or name(add.outputs[0]), "Add", found))
                else:
                    fused.append(name(add.outputs[0]))
        if not fused or model.opset_imports.get("", 0) < _LEAST_OPSET:
            reasons = "; ".join(sorted({refusal.reason for refusal in refusals}))
            raise UnsupportedModelError(
                self.name,
                got=reasons or "no rotation of halves of heads",
                expected="x * cos + concat(-x2, x1) * sin of [batch, heads, tokens, size], operator set 13",
                mend="Leave the pass out.",
            )
        return RotaryFused(tuple(fused), tuple(refusals))


@plain_dataclass(frozen=True)
class RotaryFused(Edit):
    """The rotations that become one operator each.

    Attributes:
        results: What they compute.
        refusals: What is left alone.
    """

    tolerance: ClassVar[Tolerance] = Tolerance("The same products and sums: 2e-7 seen on 2 layers.", relative=1e-5)

    results: tuple[str, ...]
    refusals: tuple[Refusal, ...] = ()

    def describe(self) -> Mapping[str, Any]:
        """Return the plan as JSON."""
        return {"results": list(self.results)}

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Write the operators."""
        changed = False
        with typed(model) as facts:
            writer = Writer(model.graph, facts)
            for add, found in _rotations(model.graph, facts):
                if name(add.outputs[0]) in self.results and not isinstance(found, str):
                    _write(writer, add, found)
                    changed = True
        if changed:
            model.opset_imports[CONTRIB] = 1
            common.RemoveUnusedNodesPass()(model)
        return ir.passes.PassResult(model, modified=changed)


@plain_dataclass(frozen=True, eq=False)
class _Rotation:
    """``source`` rotated by angles whose cosines and sines are ``[1, 1, tokens, size]``, both halves of size alike."""

    source: Heads
    cosine: ir.Value
    sine: ir.Value


def _rotations(graph: ir.Graph, facts: Probe) -> Iterator[tuple[ir.Node, _Rotation | str]]:
    for node in tuple(graph):
        if node.op_type != "Add" or node.domain != "":
            continue
        for first, second in (node.inputs, node.inputs[::-1]):
            found = _rotation(producer(first, "Mul"), producer(second, "Mul"), facts)
            if found is not None:
                result = node.outputs[0].is_graph_output()
                yield node, "what is rotated is a result of the model" if result else found
                break


def _rotation(plain: ir.Node | None, turned: ir.Node | None, facts: Probe) -> _Rotation | str | None:
    """Return the rotation that adds these two products; None where they are none, and why where it does not fit."""
    if plain is None or turned is None:
        return None
    for swapped, sine in (turned.inputs, turned.inputs[::-1]):
        source = _half_turned(producer(swapped, "Concat"), facts)
        if source is None or sine is None or source not in plain.inputs:
            continue
        cosine = plain.inputs[1 - list(plain.inputs).index(source)]
        heads = heads_of(source, facts)
        if heads is None or cosine is None or heads.split is None:
            return "what is rotated is not of heads [batch, heads, tokens, size] that a Transpose makes of tokens"
        _, _, tokens, size = heads.dims
        if any(facts.shape(angles) != (1, 1, tokens, size) for angles in (cosine, sine)):
            return "its angles differ from sample to sample"
        if not _halves_alike(cosine, facts) or not _halves_alike(sine, facts):
            return "the halves of its angles are not known to be alike"
        if heads.whole is None or heads.whole.dtype != ir.DataType.FLOAT:
            return "onnxruntime's operator for CPUs takes single precision"
        return _Rotation(heads, cosine, sine)
    return None


def _half_turned(concat: ir.Node | None, facts: Probe) -> ir.Value | None:
    """Return ``x`` of ``concat(-x2, x1)`` along the last axis."""
    if concat is None or len(concat.inputs) != 2 or concat.attributes.get_int("axis", 0) not in (-1, 3):
        return None
    negated = producer(concat.inputs[0], "Neg")
    upper = None if negated is None else producer(negated.inputs[0], "Slice")
    lower = producer(concat.inputs[1], "Slice")
    source = None if lower is None else lower.inputs[0]
    dims = facts.shape(source)
    if upper is None or lower is None or upper.inputs[0] is not source or dims is None or len(dims) != 4:
        return None
    half = dims[3] // 2
    fits = _taken(lower, facts, dims[3]) == (0, half) and _taken(upper, facts, dims[3]) == (half, dims[3])
    return source if fits and dims[3] == 2 * half else None


def _taken(node: ir.Node, facts: Probe, size: int) -> tuple[int, int] | None:
    """Return from where to where a Slice takes of the last of four axes."""
    arrays = [facts.constant(value) for value in node.inputs[1:]]
    numbers = [int(array.flat[0]) for array in arrays if array is not None and array.size == 1]
    if len(numbers) != len(node.inputs) - 1 or len(numbers) < 3:
        return None
    start, stop, axis, step = (*numbers, 1)[:4]
    return (start, min(stop, size)) if axis in (-1, 3) and step == 1 and start >= 0 and stop > 0 else None


def _halves_alike(value: ir.Value, facts: Probe) -> bool:
    """Say whether both halves of the last axis hold the same numbers, as operators that work by element show."""
    array = None if not facts.is_fixed(value) else facts.constant(value)
    if array is not None:
        first, second = np.split(array, 2, axis=-1)
        return bool(np.array_equal(first, second))
    node = value.producer()
    if node is None or node.domain != "":
        return False
    if node.op_type == "Concat":
        return len(node.inputs) == 2 and node.inputs[0] is node.inputs[1] and _joins_last(node, facts)
    if node.op_type not in _ELEMENTWISE or node.inputs[0] is None:
        return False
    factor = facts.shape(node.inputs[1]) if node.op_type == "Mul" else ()
    if factor is None or factor[-1:] not in ((), (1,)):
        return False
    dims, source = facts.shape(value), facts.shape(node.inputs[0])
    return dims is not None and source is not None and dims[-1] == source[-1] and _halves_alike(node.inputs[0], facts)


def _joins_last(node: ir.Node, facts: Probe) -> bool:
    dims = facts.shape(node.outputs[0])
    return dims is not None and node.attributes.get_int("axis", 0) in (-1, len(dims) - 1)


def _write(writer: Writer, add: ir.Node, found: _Rotation) -> None:
    _, number, _, size = found.source.dims
    half = size // 2
    caches = [
        writer.once(
            add,
            "Squeeze",
            [
                writer.once(add, "Slice", [angles, writer.numbers(0), writer.numbers(half), writer.numbers(3)], {}),
                writer.numbers(0, 1),
            ],
            {},
        )
        for angles in (found.cosine, found.sine)
    ]
    tokens = writer.tokens(add, found.source)
    rotated = writer.add(add, "RotaryEmbedding", [tokens, writer.numbers(0), *caches], {"num_heads": number}, CONTRIB)
    rotated.type, rotated.shape = tokens.type, tokens.shape
    split = writer.add(add, "Reshape", [rotated, writer.numbers(0, 0, number, size)], {})
    whole = writer.add(add, "Transpose", [split], {"perm": HEADS_FIRST})
    old = add.outputs[0]
    split.type, whole.type, whole.shape = old.type, old.type, old.shape
    old.replace_all_uses_with(whole)
