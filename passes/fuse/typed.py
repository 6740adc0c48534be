"""Element types that a graph does not state, lent to it while rules read them."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager

import onnx_ir as ir

from onnx_lathe.passes.fuse.probe import Probe, probe
from onnx_lathe.passes.fuse.stretch import name, shaped, values_of


@contextmanager
def typed(model: ir.Model) -> Generator[Probe]:
    """Give the values of the main graph the element types that onnx infers, and take them back at the end.

    Exporters may leave them out, and what a rule can prove of a mask depends on them. Yields the dimensions as well.
    """
    copy = shaped(model)
    known = values_of(copy.graph)
    lent = [value for node in model.graph for value in node.outputs if value.type is None and name(value) in known]
    for value in lent:
        value.type = known[name(value)].type
    try:
        yield probe(copy)
    finally:
        for value in lent:
            value.type = None
