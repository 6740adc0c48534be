"""The cut itself: a frozen plan that shrinks weights, and the graph whose outputs it must keep."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import onnx_ir as ir

from onnx_lathe.passes import files
from onnx_lathe.passes.edit import Edit, Refusal
from onnx_lathe.passes.oracle import Check, Tolerance
from onnx_lathe.passes.prune import literals
from onnx_lathe.passes.prune.groups import Member, tensor_of
from onnx_lathe.passes.prune.literals import Place
from onnx_lathe.runtime.errors import UnsupportedModelError
from onnx_lathe.runtime.samples import Array, Feeds

Kept = Mapping[str, Mapping[int, tuple[int, ...]]]
"""For each value by name and each of its axes that is cut, the entries that stay, ascending."""

ROUNDING = 1e-9
"""What two equal shares of energy may differ by."""


@dataclass(frozen=True)
class PrunedGroup:
    """What happens to one group of channels.

    Attributes:
        name: The initializer that makes them.
        total: How many there were.
        kept: How many stay.
        members: The axes of weights that are cut together.
    """

    name: str
    total: int
    kept: int
    members: tuple[Member, ...]


@dataclass(frozen=True)
class Refit:
    """How well new weights of a consumer do, as shares of the energy of its outputs on the calibration data.

    Attributes:
        weight: The consumer's weight.
        cut_error: Squared error after the cut alone, once a bias has taken the means.
        error: Squared error with the new weights.
    """

    weight: str
    cut_error: float
    error: float


@dataclass(frozen=True, eq=False)
class PruneEdit(Edit):
    """A structured cut: weights lose whole rows, columns and kernels, and the graph what they computed.

    Attributes:
        groups: What is cut, group by group.
        kept: The entries that stay along each cut axis of each initializer, by the original's names and numbering.
        consumed: For each weight that sums over cut channels, those axes.
        shapes: The dimensions, before the cut, of every initializer that changes.
        dims: The new lengths of cut axes of intermediate values.
        lengths: Lengths that nodes are told, by their first result and place (see `literals`).
        attributes: New values of the attribute ``group`` of depthwise Convs, by their first result.
        new_values: Weights and biases after least squares, already cut, by initializer.
        refits: What least squares gained.
        refusals: What was left alone, and why.
    """

    tolerance: ClassVar[Tolerance] = Tolerance(
        "the same products summed in another order, through a whole network in float32", relative=1e-4
    )

    groups: tuple[PrunedGroup, ...]
    kept: Kept
    consumed: Mapping[str, tuple[int, ...]]
    shapes: Mapping[str, tuple[int, ...]]
    dims: Mapping[str, Mapping[int, int]]
    lengths: Mapping[str, Mapping[Place, int]]
    attributes: Mapping[str, int]
    new_values: Mapping[str, Array] = field(default_factory=dict[str, Array], repr=False)
    refits: tuple[Refit, ...] = ()
    refusals: tuple[Refusal, ...] = ()

    def describe(self) -> Mapping[str, Any]:
        """Return the groups with their members, and what least squares gained."""
        return {
            "groups": [
                {
                    "name": group.name,
                    "channels": group.total,
                    "kept": group.kept,
                    "members": [
                        {"initializer": member.initializer, "axis": member.axis, "role": member.role.value}
                        for member in group.members
                    ],
                }
                for group in self.groups
            ],
            "reconstructed": [
                {"initializer": refit.weight, "cut_error": refit.cut_error, "error": refit.error}
                for refit in self.refits
            ],
        }

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Cut ``model``, or leave it where it has been cut already.

        Raises:
            UnsupportedModelError: This is not the model that the cut was planned for.
        """
        if self._is_cut(model.graph):
            return ir.passes.PassResult(model, modified=False)
        for name in self.shapes:
            value = model.graph.initializers[name]
            value.const_value = self._cut(name, tensor_of(value))
            value.shape = ir.Shape(self._shape_after(name))
        nodes = {node.outputs[0].name: node for node in model.graph if node.outputs}
        for output, lengths in self.lengths.items():
            literals.write(model.graph, nodes[output], lengths)
        for output, groups in self.attributes.items():
            nodes[output].attributes.add(ir.AttrInt64("group", groups))
        for value in (value for node in model.graph for value in node.outputs):
            shorter = self.dims.get(value.name or "")
            if shorter is not None and value.shape is not None:
                value.shape = ir.Shape([shorter.get(axis, dim) for axis, dim in enumerate(value.shape.dims)])
        return ir.passes.PassResult(model, modified=True)

    def reference(self, model: ir.Model) -> None:
        """Zero what the consumers read of removed channels; where least squares gave new weights, put them there."""
        for name in self.shapes:
            value = model.graph.initializers[name]
            tensor = tensor_of(value)
            value.const_value = files.lazy(name, tensor, partial(self._uncut, name), tensor.dtype, self.shapes[name])

    def check(self, before: Path, after: Path, feeds: Feeds) -> Sequence[Check]:
        """Compare with the reference, and see that least squares did not lose on the data that it was given."""
        checks = super().check(before, after, feeds)
        if not self.refits:
            return checks
        worst = max(self.refits, key=lambda refit: refit.error - refit.cut_error)
        fit = Check(
            what="error of a consumer after least squares against the error after the cut alone",
            scope="by consumer, on the calibration data",
            measured=worst.error,
            limit=worst.cut_error + ROUNDING,
            unit="relative error",
            where=worst.weight,
        )
        return (*checks, fit)

    def _is_cut(self, graph: ir.Graph) -> bool:
        found = {
            name: tuple(tensor_of(graph.initializers[name]).shape.numpy())
            for name in self.shapes
            if name in graph.initializers
        }
        after = {name: self._shape_after(name) for name in self.kept}
        if all(found.get(name) == shape for name, shape in after.items()):
            return True
        if found == dict(self.shapes):
            return False
        wrong = next(name for name in self.shapes if found.get(name) != self.shapes[name])
        raise UnsupportedModelError(
            f"initializer {wrong!r}",
            got=f"dimensions {found.get(wrong, 'of nothing: it is not there')}",
            expected=f"{self.shapes[wrong]}, as in the model that the cut was planned for",
            mend="Plan the cut for this model.",
        )

    def _shape_after(self, name: str) -> tuple[int, ...]:
        axes = self.kept.get(name, {})
        return tuple(len(axes[axis]) if axis in axes else length for axis, length in enumerate(self.shapes[name]))

    def _cut(self, name: str, tensor: ir.TensorProtocol) -> ir.TensorProtocol:
        """Return what stays of an initializer, or its new values, without reading it yet."""
        if name in self.new_values:
            return ir.Tensor(self.new_values[name], dtype=tensor.dtype, name=name)
        return files.lazy(
            name, tensor, partial(_take, axes=self.kept.get(name, {})), tensor.dtype, self._shape_after(name)
        )

    def _uncut(self, name: str, array: Array) -> Array:
        """Return what an initializer of the uncut graph must be for its outputs to be those of the cut one."""
        full = array.copy()
        for axis in self.consumed.get(name, ()):
            length: int = array.shape[axis]
            removed = np.setdiff1d(np.arange(length), self.kept[name][axis])
            np.moveaxis(full, axis, 0)[removed] = 0
        if name in self.new_values:
            axes = self.kept.get(name, {})
            stay = [axes.get(axis, range(length)) for axis, length in enumerate(array.shape)]
            full[np.ix_(*stay)] = self.new_values[name]
        return full


def _take(array: Array, axes: Mapping[int, tuple[int, ...]]) -> Array:
    for axis, stay in axes.items():
        array = array.take(stay, axis=axis)
    return array
