"""Normalizations as one operator, with the skip connection before them or without.

LayerNormalization (Ba et al. 2016, arXiv:1607.06450): ``(x - mean) / sqrt(variance + epsilon) * scale + shift`` over
the last axis; RMSNormalization (Zhang and Sennrich 2019, arXiv:1910.07467): ``x / sqrt(mean(x^2) + epsilon) * scale``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from dataclasses import dataclass as plain_dataclass
from typing import Any, ClassVar, Literal

import numpy as np
import onnx_ir as ir
from pydantic.dataclasses import dataclass

from onnx_lathe.passes.edit import Edit, Refusal
from onnx_lathe.passes.fuse.activations import MICROSOFT
from onnx_lathe.passes.fuse.normalizations import Normalization, find_normalizations, is_as_found
from onnx_lathe.passes.fuse.stretch import put_in_place, shaped, take_over, values_of
from onnx_lathe.passes.oracle import Tolerance
from onnx_lathe.passes.quantize.builder import Builder
from onnx_lathe.passes.quantize.layers import constant
from onnx_lathe.passes.quantize.scheme import WeightScheme
from onnx_lathe.passes.request import Request, Score
from onnx_lathe.runtime.errors import UnsupportedModelError
from onnx_lathe.runtime.samples import Samples

Form = Literal["plain", "simplified", "skip"]

_LAYER_OPSET, _RMS_OPSET = 17, 23
"""The first opsets with LayerNormalization and with RMSNormalization."""


@dataclass(frozen=True)
class FuseNormalization(Request):
    """Write each normalization as one operator, with the skip connection before it or without.

    Attributes:
        form: "plain": ONNX's LayerNormalization and RMSNormalization, skip connections apart. "simplified": the latter
            as onnxruntime's SimplifiedLayerNormalization, which any opset has. "skip": as simplified, and where an Add
            of two equal shapes stands before it, onnxruntime's operators for both together.
    """

    name: ClassVar[str] = "fuse-normalization"

    form: Form = "plain"

    def plan(self, model: ir.Model, samples: Samples | None, score: Score | None) -> FusedNormalizations:
        """Find the normalizations that are not in this form yet.

        Raises:
            UnsupportedModelError: There is none.
        """
        del samples, score
        opset = model.opset_imports.get("", 1)
        planned: list[Normalization] = []
        refusals: list[Refusal] = []
        for found in find_normalizations(shaped(model), with_skip=self.form == "skip"):
            operator = _operator(found, self.form)
            reason = found.reason or _opset_reason(operator, opset)
            if operator == found.operator:
                continue
            if reason is not None:
                refusals.append(Refusal(found.result, found.operator, reason))
            else:
                planned.append(found)
        if not planned:
            reasons = "; ".join(sorted({refusal.reason for refusal in refusals}))
            raise UnsupportedModelError(
                self.name,
                got=f"no normalization that the form {self.form!r} would change{reasons and f' ({reasons})'}",
                expected="a LayerNormalization or RMSNormalization over the last axis in another form",
                mend="Leave the pass out.",
            )
        return FusedNormalizations(self.form, tuple(planned), tuple(refusals))


@plain_dataclass(frozen=True)
class FusedNormalizations(Edit):
    """Normalizations that get another operator.

    Attributes:
        form: Which.
        normalizations: As they are before.
        refusals: What stays, and why.
    """

    tolerance: ClassVar[Tolerance] = Tolerance(
        "The same sums in another order: statistics of a few hundred float32 numbers, each layer once.", relative=1e-4
    )

    form: Form
    normalizations: tuple[Normalization, ...]
    refusals: tuple[Refusal, ...] = ()

    def describe(self) -> Mapping[str, Any]:
        """Return the plan as JSON."""
        return {"form": self.form, "normalizations": list(map(asdict, self.normalizations))}

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Fuse the normalizations that are as they were planned."""
        builder = Builder(model.graph, WeightScheme())
        modified = False
        for found in self.normalizations:
            values = values_of(model.graph)
            if not is_as_found(found, values.get(found.result)):
                continue
            operator = _operator(found, self.form)
            if operator.startswith(MICROSOFT):
                _put_with_skip(builder, model.graph, found, operator, values)
                model.opset_imports.setdefault(MICROSOFT, 1)
            elif found.skip is not None:
                _put_apart(builder, model.graph, found, operator, values)
            else:
                _put(builder, found, operator, values)
            modified = True
        return ir.passes.PassResult(model, modified)


def _operator(found: Normalization, form: Form) -> str:
    """Return the operator that a normalization gets in ``form``."""
    if form == "skip" and found.skip is not None:
        return f"{MICROSOFT}.Skip{'' if found.kind == 'layer' else 'Simplified'}LayerNormalization"
    if found.kind == "layer":
        return "LayerNormalization"
    return "RMSNormalization" if form == "plain" else "SimplifiedLayerNormalization"


def _opset_reason(operator: str, opset: int) -> str | None:
    least = {"LayerNormalization": _LAYER_OPSET, "RMSNormalization": _RMS_OPSET}.get(operator, 1)
    return None if opset >= least else f"{operator} needs opset {least}, and the model has {opset}"


def _put(builder: Builder, found: Normalization, operator: str, values: Mapping[str, ir.Value]) -> None:
    """Write one operator in the place of what computes the result."""
    put_in_place(values[found.result], [_node(builder, found, operator, values[found.source], values)])


def _put_apart(
    builder: Builder, graph: ir.Graph, found: Normalization, operator: str, values: Mapping[str, ir.Value]
) -> None:
    """Write a sum and its normalization as operators of their own in the place of one for both."""
    assert found.skip is not None, "the operator has a skip connection"
    result = values[found.result]
    both = result.producer()
    assert both is not None, "a normalization is computed"
    total, nodes = values[found.skip[0]], list[ir.Node]()
    for summand in filter(None, (found.bias, found.skip[1])):
        sums = [(f"{found.result}_sum", ir.DataType.FLOAT, result.shape)]
        nodes.append(builder.op("Add", [total, values[summand]], sums))
        total = nodes[-1].outputs[0]
    nodes.append(_node(builder, found, operator, total, values))
    graph.insert_before(both, nodes)
    if found.source:
        take_over(values[found.source], total)
    take_over(result, nodes[-1].outputs[0])


def _node(
    builder: Builder, found: Normalization, operator: str, source: ir.Value, values: Mapping[str, ir.Value]
) -> ir.Node:
    """Return the operator that normalizes ``source``."""
    made = ir.Value(name=builder.free(f"{found.result}_normalized"))
    attributes = {"axis": -1, "epsilon": found.epsilon, "stash_type": 1}
    operands = [source, *_parameters(builder, found, values)]
    return ir.node(operator, operands, attributes, outputs=[made], name=builder.free(f"{found.result}_{operator}"))


def _put_with_skip(
    builder: Builder, graph: ir.Graph, found: Normalization, operator: str, values: Mapping[str, ir.Value]
) -> None:
    """Write the sum and its normalization as one operator, where the sum stands."""
    assert found.skip is not None, "the operator has a skip connection"
    total, result = values[found.source], values[found.result]
    add = total.producer()
    assert add is not None, "a skip connection is the result of an Add"
    operands = [values[name] for name in found.skip] + _parameters(builder, found, values)
    made = [ir.Value(name=builder.free(f"{found.result}_normalized")), ir.Value(name=""), ir.Value(name="")]
    made.append(ir.Value(name=builder.free(f"{found.source}_sum")))
    node = ir.node(
        operator.rpartition(".")[2],
        operands,
        {"epsilon": found.epsilon},
        domain=MICROSOFT,
        outputs=made,
        name=builder.free(f"{found.result}_{found.kind}_skip"),
    )
    graph.insert_before(add, node)
    take_over(result, made[0])
    if total.uses() or total.is_graph_output():
        take_over(total, made[3])
    else:
        node.resize_outputs(1)


def _parameters(builder: Builder, found: Normalization, values: Mapping[str, ir.Value]) -> list[ir.Value]:
    """Return scale and shift as vectors; an absent shift is left out."""
    width = found.width
    if found.scale:
        scale = _vector(builder, values[found.scale])
    else:
        scale = builder.constant(f"{found.result}_ones", np.ones(width, np.float32))
    return [scale] + ([_vector(builder, values[found.shift])] if found.shift else [])


def _vector(builder: Builder, value: ir.Value) -> ir.Value:
    """Return a constant as an initializer, which stands before every node, without axes of size 1 before its last."""
    found = constant(value)
    if found is None or (value.producer() is None and len(found.shape) == 1):
        return value
    return builder.constant(f"{value.name}_vector", found.read().reshape(-1))
