"""Does an edited graph compute what it must? The comparison that every edit passes as it runs."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import onnx_ir as ir

from onnx_lathe.passes import files
from onnx_lathe.runtime.parity import relative_error, sqnr_db
from onnx_lathe.runtime.samples import Array, Feeds
from onnx_lathe.runtime.session import Session

STEP = {ir.DataType.FLOAT16: 2.0**-10, ir.DataType.BFLOAT16: 2.0**-7}
"""Distance of 1 to the next number, relative, of the types that are narrower than the float32 of the tolerances."""
HALF_STEPS = 16
"""Steps that roundings at other places may come to in a network (seen: half a step after two layers)."""
LEVELS_DB = 30.0
"""SQNR of a model that rounds as it runs against the same with another order of sums (seen: 44 dB)."""
QUANTIZED_DB = 12.0
"""The same for a model that a pass has just made to round. Each level that tips is a new rounding error: layers on end
they may differ as much as either does from the float model (seen: 19 dB). Single operators are compared with numpy
beside it; how much the model loses is for data to judge."""


@dataclass(frozen=True)
class Tolerance:
    """How near two sets of outputs must be, and why that near.

    Attributes:
        reason: Why this limit.
        relative: Limit of ``max|got - want| / max|want|`` for each output.
        sqnr_db: Where given, the least signal-to-quantization-noise ratio of each output in dB, instead.
    """

    reason: str
    relative: float = 0.0
    sqnr_db: float | None = None


@dataclass(frozen=True)
class Check:
    """One comparison of an edited graph with its oracle.

    Attributes:
        what: What was compared with what.
        scope: "whole model", or which part of it was run.
        measured: The figure found, of the worst output or node.
        limit: The limit in the same unit.
        unit: "relative error", "steps" (both at most the limit) or "dB" (at least the limit).
        where: The output or node of that figure.
    """

    what: str
    scope: str
    measured: float
    limit: float
    unit: str
    where: str

    @property
    def passed(self) -> bool:
        """Whether the limit was kept; a figure that is not a number never passes."""
        return self.measured >= self.limit if self.unit == "dB" else self.measured <= self.limit


def check_outputs(
    before: Path, after: Path, feeds: Feeds, tolerance: Tolerance, reference: Callable[[ir.Model], None]
) -> Check:
    """Run the edited file as users run it, and its reference with onnxruntime's optimizations off, and compare.

    Args:
        before: The model before the edit.
        after: The model after it.
        feeds: One batch, by input name.
        tolerance: The limit.
        reference: Turns the model before the edit into the one whose outputs the edited model must have.
    """
    with tempfile.TemporaryDirectory(prefix="lathe-oracle-") as folder:
        target = Path(folder) / "reference.onnx"
        model = files.load(before)
        limit = _widened(tolerance, model)
        reference(model)
        files.save(model, target)
        want = Session(target, optimize=False).run(feeds)
    got = Session(after).run(feeds)
    return compare(got, want, limit)


def _widened(tolerance: Tolerance, model: ir.Model) -> Tolerance:
    """Return a tolerance that two forms of a model can keep which round at other places as it runs.

    In half precision a share of a step; where inputs of integer products are rounded by what they are, a level here and
    there.
    """
    if any(node.op_type == "DynamicQuantizeLinear" for node in model.graph.all_nodes()):
        return replace(tolerance, sqnr_db=min(tolerance.sqnr_db or LEVELS_DB, LEVELS_DB))
    step = max((STEP.get(value.dtype, 0.0) for value in model.graph.initializers.values() if value.dtype), default=0.0)
    return replace(tolerance, relative=max(tolerance.relative, HALF_STEPS * step))


def compare(got: Mapping[str, Array], want: Mapping[str, Array], tolerance: Tolerance) -> Check:
    """Compare two sets of outputs by name and return the worst figure."""
    what, scope = "edited graph against its reference graph", "whole model"
    if tolerance.sqnr_db is not None:
        # Rounding may tip a decision (an index, a flag): only what is continuous has a ratio.
        continuous = [name for name in want if want[name].dtype.kind == "f"]
        ratios = {name: sqnr_db(want[name], got[name]) for name in continuous} or {"no float output": float("inf")}
        worst = min(ratios, key=lambda name: ratios[name])
        return Check(what, scope, ratios[worst], tolerance.sqnr_db, "dB", worst)
    errors = {name: relative_error(want[name], got[name]) for name in want}
    worst = max(errors, key=lambda name: errors[name])
    return Check(what, scope, errors[worst], tolerance.relative, "relative error", worst)
