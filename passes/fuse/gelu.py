"""Gelu and its relatives in one spelling, whichever the exporter chose.

Hendrycks and Gimpel 2016 (arXiv:1606.08415): ``gelu(x) = x Phi(x) = x (1 + erf(x / sqrt(2))) / 2``, with two
approximations, ``x (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3))) / 2`` and ``x sigmoid(1.702 x)``. SiLU is
``x sigmoid(x)``.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from dataclasses import dataclass as plain_dataclass
from typing import Any, ClassVar, Literal

import numpy as np
import onnx_ir as ir
from pydantic.dataclasses import dataclass

from onnx_lathe.passes.edit import Edit, Refusal
from onnx_lathe.passes.fuse.activations import (
    MICROSOFT,
    QUICK_FACTOR,
    TANH_FACTORS,
    Activation,
    Function,
    curve,
    find_activations,
    is_as_found,
    largest_difference,
)
from onnx_lathe.passes.fuse.stretch import name, put_in_place, shaped, values_of
from onnx_lathe.passes.oracle import Tolerance
from onnx_lathe.passes.quantize.builder import Builder
from onnx_lathe.passes.quantize.scheme import WeightScheme
from onnx_lathe.passes.request import Request, Score
from onnx_lathe.runtime.errors import UnsupportedModelError
from onnx_lathe.runtime.samples import Samples

Form = Literal["fused", "erf", "fast", "quick"]

_STANDARD_OPSET = 20
"""The first opset with Gelu."""
_TARGETS: Mapping[Form, Function] = {"erf": "erf", "fast": "tanh", "quick": "sigmoid"}


@dataclass(frozen=True)
class Gelu(Request):
    """Write every Gelu, and SiLU where it fits, in one form; fast and quick approximate what is exact.

    Attributes:
        form: "fused": one operator for each function. "erf": the exact Gelu in elementary operators. "fast": the
            approximation by tanh, up to 4.8e-4 from the exact one. "quick": that by a sigmoid, up to 2.1e-2 from it.
    """

    name: ClassVar[str] = "gelu"

    form: Form = "fused"

    def plan(self, model: ir.Model, samples: Samples | None, score: Score | None) -> GeluForm:
        """Find the activations that are not in this form yet.

        Raises:
            UnsupportedModelError: There is none.
        """
        del samples, score
        opset = model.opset_imports.get("", 1)
        planned: list[Activation] = []
        refusals: list[Refusal] = []
        for found in find_activations(shaped(model)):
            reason = _reason(found, self.form)
            if reason is not None:
                refusals.append(Refusal(found.result, found.operator, reason))
            elif found.bias or found.operator != _operator(found, self.form, opset):
                planned.append(found)
        if not planned:
            reasons = "; ".join(sorted({refusal.reason for refusal in refusals}))
            raise UnsupportedModelError(
                self.name,
                got=f"no activation that the form {self.form!r} would change{reasons and f' ({reasons})'}",
                expected="a Gelu, one of its approximations or a SiLU in another form",
                mend="Leave the pass out.",
            )
        return GeluForm(self.form, tuple(planned), tuple(refusals))


@plain_dataclass(frozen=True)
class GeluForm(Edit):
    """Activations that get another spelling.

    Attributes:
        form: The spelling.
        activations: As they are before.
        refusals: What stays, and why.
    """

    tolerance: ClassVar[Tolerance] = Tolerance(
        "One function in another order of roundings; where the plan asks for an approximation, the reference computes "
        "that one in elementary operators.",
        relative=1e-4,
    )

    form: Form
    activations: tuple[Activation, ...]
    refusals: tuple[Refusal, ...] = ()

    def describe(self) -> Mapping[str, Any]:
        """Return the plan as JSON, with the largest difference between a function before and after."""
        away = [
            largest_difference(curve(each.function, each.factor), curve(*self._target(each)))
            for each in self.activations
        ]
        return {"form": self.form, "largest_difference": max(away), "activations": list(map(asdict, self.activations))}

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Spell the activations that are as they were planned."""
        opset = model.opset_imports.get("", 1)
        modified = False
        for activation, spelling in self._spellings(model):
            function, factor = self._target(activation)
            operator = _operator(activation, self.form, opset)
            if operator == "Mul":
                spelling.spell(function, factor)
            else:
                spelling.fuse(operator, function, factor)
            modified = True
        if modified and any(node.domain == MICROSOFT for node in model.graph):
            model.opset_imports.setdefault(MICROSOFT, 1)
        return ir.passes.PassResult(model, modified)

    def reference(self, model: ir.Model) -> None:
        """Put approximations, in elementary operators, where the plan approximates."""
        for activation, spelling in self._spellings(model):
            if self._target(activation)[0] != activation.function:
                spelling.spell(*self._target(activation))

    def _spellings(self, model: ir.Model) -> Iterator[tuple[Activation, _Spelling]]:
        """Yield the activations that are as they were planned, each with what writes it anew."""
        values = values_of(model.graph)
        builder = Builder(model.graph, WeightScheme())
        for activation in self.activations:
            if is_as_found(activation, values.get(activation.result)):
                yield activation, _Spelling(builder, activation, values)

    def _target(self, activation: Activation) -> tuple[Function, float]:
        """Return the function, and the factor of a sigmoid, that an activation gets."""
        function = _TARGETS.get(self.form, activation.function)
        return function, (activation.factor or QUICK_FACTOR) if function == "sigmoid" else 0.0


class _Spelling:
    """Writes one activation anew."""

    def __init__(self, builder: Builder, activation: Activation, values: dict[str, ir.Value]) -> None:
        self._builder = builder
        self._values = values
        self._result = values[activation.result]
        self._nodes: list[ir.Node] = []
        self._source = values[activation.source]
        if activation.bias:
            self._source = self._op("Add", self._source, values[activation.bias])

    def fuse(self, operator: str, function: Function, factor: float) -> None:
        """Write one operator."""
        domain, _, op_type = operator.rpartition(".")
        attributes: dict[str, str | float] = {}
        if operator == "Gelu" and function == "tanh":
            attributes["approximate"] = "tanh"
        if op_type == "QuickGelu":
            attributes["alpha"] = factor
        self._op(op_type, self._source, attributes=attributes, domain=domain)
        self._put()

    def spell(self, function: Function, factor: float) -> None:
        """Write elementary operators."""
        x = self._source
        if function == "sigmoid":
            self._op("Mul", x, self._op("Sigmoid", self._op("Mul", x, factor)))
        else:
            inner = self._op("Div", x, math.sqrt(2.0)) if function == "erf" else self._tanh_argument(x)
            share = self._op("Add", self._op("Erf" if function == "erf" else "Tanh", inner), 1.0)
            self._op("Mul", self._op("Mul", x, share), 0.5)
        self._put()

    def _put(self) -> None:
        # Another activation may read this one: the name is now that of another value.
        self._values[name(self._result)] = self._nodes[-1].outputs[0]
        put_in_place(self._result, self._nodes)

    def _tanh_argument(self, x: ir.Value) -> ir.Value:
        outer, inner = TANH_FACTORS
        cube = self._op("Mul", self._op("Mul", x, x), x)
        return self._op("Mul", self._op("Add", x, self._op("Mul", cube, inner)), outer)

    def _op(
        self,
        operator: str,
        *operands: ir.Value | float,
        attributes: Mapping[str, str | float] | None = None,
        domain: str = "",
    ) -> ir.Value:
        base = f"{self._result.name}_{operator}"
        inputs = [each if isinstance(each, ir.Value) else self._constant(base, each) for each in operands]
        made = ir.Value(name=self._builder.free(base), type=self._result.type, shape=self._result.shape)
        self._nodes.append(
            ir.node(
                operator, inputs, attributes, domain=domain, outputs=[made], name=self._builder.free(f"{base}_node")
            )
        )
        return made

    def _constant(self, base: str, number: float) -> ir.Value:
        return self._builder.constant(f"{base}_operand", np.array(number, np.float32))


def _operator(activation: Activation, form: Form, opset: int) -> str:
    """Return the operator that makes the result of an activation in ``form``."""
    if form == "erf":
        return "Mul"
    function = _TARGETS.get(form, activation.function)
    if function == "sigmoid":
        return f"{MICROSOFT}.QuickGelu"
    if form == "fused" and opset >= _STANDARD_OPSET:
        return "Gelu"
    return f"{MICROSOFT}.{'Gelu' if function == 'erf' else 'FastGelu'}"


def _reason(activation: Activation, form: Form) -> str | None:
    """Return why an activation stays as it is; None where it can be written in ``form``."""
    if activation.dtype != "FLOAT":
        return f"its elements are {activation.dtype or 'of an unknown type'}: only those of FLOAT are rewritten"
    if activation.function == "sigmoid" and form in ("erf", "fast"):
        return "it is x sigmoid(a x), not an approximation of Gelu in this form"
    if activation.function == "tanh" and form == "erf":
        return "it is the approximation by tanh, which is another function"
    return None
