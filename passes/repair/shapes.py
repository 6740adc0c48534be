"""Shapes of a graph's values at one size of its inputs, where each dimension is a number."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import count

import onnx_ir as ir
from onnx_ir.passes.common import ShapeInferencePass

_FIRST_SIZE = 31
"""Sizes of symbolic dimensions are the primes from here on: no product of other dimensions is one of them."""


class Shapes:
    """Shapes as onnx infers them where symbolic dimensions of the inputs are different prime numbers.

    So lengths that a graph computes from other lengths are known too, as long as it computes no values from them.
    """

    def __init__(self, model: ir.Model) -> None:
        self._model = model
        self._inferred: Mapping[str, ir.Shape | None] | None = None

    def of(self, value: ir.Value | None) -> list[int | None] | None:
        """Return the dimensions of ``value``, None for one that is not known; None where the rank is not known."""
        shape = None if value is None else value.shape
        if value is not None and (shape is None or not shape.is_static()):
            shape = self._infer().get(value.name or "") or shape
        return None if shape is None else [dim if isinstance(dim, int) else None for dim in shape.dims]

    def _infer(self) -> Mapping[str, ir.Shape | None]:
        if self._inferred is None:
            model = self._model.clone()
            _give_sizes(model.graph)
            ShapeInferencePass(check_type=False, strict_mode=False)(model)
            values = [*model.graph.inputs, *(value for node in model.graph for value in node.outputs)]
            self._inferred = {value.name or "": value.shape for value in values}
        return self._inferred


def _give_sizes(graph: ir.Graph) -> None:
    """Give symbolic dimensions of the inputs numbers, the same for the same name or, without one, the same axis."""
    sizes: dict[str | int, int] = {}
    primes = (number for number in count(_FIRST_SIZE) if all(number % divisor for divisor in range(2, number)))
    for value in graph.inputs:
        if value.shape is None:
            continue
        dims: list[int] = []
        for axis, dim in enumerate(value.shape.dims):
            if isinstance(dim, int):
                dims.append(dim)
                continue
            key = axis if dim.value is None else dim.value
            if key not in sizes:
                sizes[key] = next(primes)
            dims.append(sizes[key])
        value.shape = ir.Shape(dims)
    for node in graph:
        for value in node.outputs:
            value.shape = None
