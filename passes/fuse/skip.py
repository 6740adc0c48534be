"""Keeping a skip connection and the LayerNormalization after it apart.

onnxruntime fuses an Add and the LayerNormalization that reads it to SkipLayerNormalization, which on CPUs takes two to
four times as long as the two. With a Reshape between them that moves nothing it does not find them, in any session and
without an option.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass as plain_dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import ShapeInferencePass
from pydantic.dataclasses import dataclass

from onnx_lathe.passes.additions import add_initializer
from onnx_lathe.passes.edit import Edit
from onnx_lathe.passes.oracle import Check, Tolerance, compare
from onnx_lathe.passes.request import Request, Score
from onnx_lathe.runtime.errors import UnsupportedModelError
from onnx_lathe.runtime.samples import Feeds, Samples
from onnx_lathe.runtime.session import Session

_FUSED_RANK = 3
"""onnxruntime fuses tensors ``[batch, tokens, hidden]`` alone."""
_DECOMPOSED = {"ReduceMean", "Sub"}
"""What reads the input of a LayerNormalization that an opset before 17 spells out."""


@dataclass(frozen=True)
class KeepSkipApart(Request):
    """Keep onnxruntime from fusing skip connections into LayerNormalization, which is slower on CPUs."""

    name: ClassVar[str] = "keep-skip-apart"

    def plan(self, model: ir.Model, samples: Samples | None, score: Score | None) -> SkipsApart:
        """Find the skip connections.

        Raises:
            UnsupportedModelError: There is none that onnxruntime would fuse.
        """
        del samples, score
        shaped = model.clone()
        ShapeInferencePass(check_type=False, strict_mode=False)(shaped)
        skips = tuple(skip.name or "" for skip in _skips(shaped.graph))
        if not skips:
            raise UnsupportedModelError(
                self.name,
                got="no Add of two computed tensors [batch, tokens, hidden] that a LayerNormalization reads",
                expected="a skip connection that onnxruntime would fuse",
                mend="Leave the pass out.",
            )
        return SkipsApart(skips)


@plain_dataclass(frozen=True)
class SkipsApart(Edit):
    """A Reshape to the same shape between each skip connection and its normalization.

    Attributes:
        skips: The results of the Adds.
    """

    tolerance: ClassVar[Tolerance] = Tolerance("A Reshape moves no value: every bit is the same.", relative=0.0)

    skips: tuple[str, ...]

    def describe(self) -> Mapping[str, Any]:
        """Return the plan as JSON."""
        return {"skips": list(self.skips)}

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Insert the Reshapes that are not there yet."""
        values = {node.outputs[0].name: node.outputs[0] for node in model.graph if node.op_type == "Add"}
        found = [values[name] for name in self.skips if name in values and _normalizations(values[name])]
        for value in found:
            _keep_apart(model.graph, value)
        return ir.passes.PassResult(model, modified=bool(found))

    def check(self, before: Path, after: Path, feeds: Feeds) -> Sequence[Check]:
        """Compare both graphs as they are written: onnxruntime's own fusions round differently."""
        want, got = (Session(path, optimize=False).run(feeds) for path in (before, after))
        return (compare(got, want, self.tolerance),)


def _skips(graph: ir.Graph) -> Iterator[ir.Value]:
    """Yield the result of each Add of two computed tensors that a LayerNormalization reads."""
    for node in graph:
        if node.op_type != "Add" or node.domain != "":
            continue
        result = node.outputs[0]
        computed = all(operand is not None and operand.const_value is None for operand in node.inputs)
        ranks = {None if value is None or value.shape is None else len(value.shape) for value in (*node.inputs, result)}
        if computed and ranks == {_FUSED_RANK} and _normalizations(result):
            yield result


def _normalizations(value: ir.Value) -> list[ir.Node]:
    """Return the nodes that normalize ``value``: each LayerNormalization, or what an opset before 17 spells it with."""
    readers = [node for node, index in value.uses() if index == 0]
    decomposed = [node for node in readers if node.op_type in _DECOMPOSED]
    whole = [node for node in readers if node.op_type == "LayerNormalization"]
    return whole + (decomposed if {node.op_type for node in decomposed} >= _DECOMPOSED else [])


def _keep_apart(graph: ir.Graph, skip: ir.Value) -> None:
    add = skip.producer()
    assert add is not None, "a skip connection is the result of an Add"
    # 0 copies a dimension: the shape is a constant, whatever the sizes are.
    copied = ir.Tensor(np.zeros(_FUSED_RANK, np.int64), name=f"{skip.name}.same")
    shape = add_initializer(graph, copied)
    normalizations = _normalizations(skip)
    reshape = ir.node("Reshape", [skip, shape], name=f"{skip.name}.apart")
    apart = reshape.outputs[0]
    apart.name, apart.type, apart.shape = f"{skip.name}.apart", skip.type, skip.shape
    graph.insert_after(add, reshape)
    for node in normalizations:
        node.replace_input_with(0, apart)
