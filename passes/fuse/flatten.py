"""Tokens as rows: token-wise parts of a network on ``[batch * tokens, hidden]``.

onnxruntime then makes one Gemm of a product and its bias, and does not find the skip connections that it would fuse to
SkipLayerNormalization, which takes three dimensions alone and on CPUs is slower than its parts.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from dataclasses import dataclass as plain_dataclass
from typing import Any, ClassVar

import numpy as np
import onnx_ir as ir
from pydantic.dataclasses import dataclass

from onnx_lathe.passes.edit import Edit
from onnx_lathe.passes.fuse.probe import Probe, probe
from onnx_lathe.passes.fuse.stretch import name, values_of
from onnx_lathe.passes.fuse.tokens import Border, Region, find_region, is_rewritten, leads, rewrite
from onnx_lathe.passes.oracle import Tolerance
from onnx_lathe.passes.quantize.builder import Builder
from onnx_lathe.passes.quantize.scheme import WeightScheme
from onnx_lathe.passes.request import Request, Score
from onnx_lathe.runtime.errors import UnsupportedModelError
from onnx_lathe.runtime.samples import Samples

_FLAT = 2
"""The rank of ``[batch * tokens, hidden]``."""
SUFFIX = "_unflattened"
"""What the nodes end in that give a value its third dimension back."""


@dataclass(frozen=True)
class FlattenTokens(Request):
    """Compute what treats each token by itself on [batch * tokens, hidden], without its third dimension."""

    name: ClassVar[str] = "flatten-tokens"

    def plan(self, model: ir.Model, samples: Samples | None, score: Score | None) -> TokensFlattened:
        """Find the token-wise regions.

        Raises:
            UnsupportedModelError: There is none with a linear layer on ``[batch, tokens, hidden]``.
        """
        del samples, score
        known = probe(model)
        planned: list[FlatRegion] = []
        for lead in leads(model, known):
            region = find_region(model, known, lead)
            source = None if region is None else _source(model, known, lead, region)
            if region is not None and source is not None:
                planned.append(FlatRegion(region, source))
        if not planned:
            raise UnsupportedModelError(
                self.name,
                got="no product of tokens [batch, tokens, hidden] and a constant weight",
                expected="linear layers on tokens",
                mend="Leave the pass out.",
            )
        return TokensFlattened(tuple(planned))


@plain_dataclass(frozen=True)
class FlatRegion:
    """A region, and where its dimensions are to be read.

    Attributes:
        region: The nodes.
        source: A value ``[batch, tokens, ...]`` that is there before the region.
    """

    region: Region
    source: str


@plain_dataclass(frozen=True)
class TokensFlattened(Edit):
    """Regions without a third dimension.

    Attributes:
        regions: One for each pair of first dimensions.
    """

    tolerance: ClassVar[Tolerance] = Tolerance(
        "The same products and sums; onnxruntime adds a bias inside of the product, in another order (seen: 1e-6).",
        relative=1e-5,
    )

    regions: tuple[FlatRegion, ...]

    def describe(self) -> Mapping[str, Any]:
        """Return the plan as JSON."""
        return {"regions": [asdict(each) for each in self.regions]}

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Flatten the regions that are as they were planned."""
        planned = [each for each in self.regions if not is_rewritten(model, each.region, SUFFIX)]
        builder = Builder(model.graph, WeightScheme())
        for each in planned:
            flat = _Flat(builder, values_of(model.graph)[each.source])
            rewrite(model, each.region, builder, flat.enter, flat.leave, SUFFIX)
        return ir.passes.PassResult(model, modified=bool(planned))


class _Flat:
    """The borders of a flattened region: Reshapes, which move nothing."""

    def __init__(self, builder: Builder, source: ir.Value) -> None:
        self._builder = builder
        self._source = source
        self._shapes: dict[int, ir.Value] = {}
        self._lead: ir.Value | None = None

    def enter(self, value: ir.Value, border: Border) -> tuple[list[ir.Node], ir.Value]:
        """Return the rows of ``value``."""
        if border.rank == _FLAT:
            return [], value
        shape = self._builder.constant("rows_shape", np.array([-1, border.hidden], np.int64))
        node = ir.node("Reshape", [value, shape], name=self._builder.free(f"{border.name}_flattened"))
        rows = node.outputs[0]
        rows.name, rows.type = self._builder.free(f"{border.name}_flat"), value.type
        return [node], rows

    def leave(self, rows: ir.Value, border: Border) -> tuple[list[ir.Node], ir.Value]:
        """Return the form of three dimensions of ``rows``."""
        made: list[ir.Node] = []
        if border.rank == _FLAT:
            made.append(self._node("Identity", rows))
        else:
            if border.hidden not in self._shapes:
                made += self._shape(border.hidden)
            made.append(self._node("Reshape", rows, self._shapes[border.hidden]))
        return made, made[-1].outputs[0]

    def _shape(self, hidden: int) -> list[ir.Node]:
        made: list[ir.Node] = []
        if self._lead is None:
            dims = self._node("Shape", self._source)
            lead = self._node("Gather", dims.outputs[0], self._numbers("lead_axes", 0, 1))
            self._lead = lead.outputs[0]
            made += [dims, lead]
        whole = self._node("Concat", self._lead, self._numbers("hidden", hidden), axis=0)
        self._shapes[hidden] = whole.outputs[0]
        return [*made, whole]

    def _numbers(self, called: str, *numbers: int) -> ir.Value:
        return self._builder.constant(called, np.array(numbers, np.int64))

    def _node(self, operator: str, *inputs: ir.Value, **attributes: int) -> ir.Node:
        base = f"{name(inputs[0])}_{operator.lower()}"
        node = ir.node(operator, inputs, attributes, name=self._builder.free(f"{base}_node"))
        node.outputs[0].name = self._builder.free(base)
        return node


def _source(model: ir.Model, known: Probe, lead: tuple[int, int], region: Region) -> str | None:
    """Return a value that starts with the dimensions ``lead`` and is there before the region."""
    entries = [border.name for border in region.entries[:1] if border.rank != _FLAT]
    inputs = (name(value) for value in model.graph.inputs if (known.shape(value) or ())[:2] == lead)
    return next(iter((*inputs, *entries)), None)
