"""Attention as one operator: which form pays depends on the shape, so each can be asked for and measured.

``multi-head`` is com.microsoft.MultiHeadAttention, ``packed`` com.microsoft.Attention with the weights of queries, keys
and values merged, ``standard`` Attention of ONNX's operator set 23.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass as plain_dataclass
from typing import Any, ClassVar, Literal

import onnx_ir as ir
from onnx_ir.passes import common
from pydantic.dataclasses import dataclass

from onnx_lathe.passes.edit import Edit, Refusal
from onnx_lathe.passes.fuse.attention_nodes import (
    STANDARD_OPSET,
    Writer,
    multi_head,
    packed,
    standard,
    why_not_standard,
)
from onnx_lathe.passes.fuse.heads import Site, site
from onnx_lathe.passes.fuse.probe import Probe
from onnx_lathe.passes.fuse.projections import projections
from onnx_lathe.passes.fuse.stretch import name
from onnx_lathe.passes.fuse.typed import typed
from onnx_lathe.passes.oracle import Tolerance
from onnx_lathe.passes.request import Request, Score
from onnx_lathe.runtime.errors import UnsupportedModelError
from onnx_lathe.runtime.samples import Samples

Form = Literal["multi-head", "packed", "standard"]


@dataclass(frozen=True)
class FuseAttention(Request):
    """Let one operator compute attention: products, mask, Softmax and the Transposes around them.

    Attributes:
        form: ``multi-head``, ``packed`` (weights of queries, keys and values merged) or ``standard`` (ONNX's own).
    """

    name: ClassVar[str] = "fuse-attention"

    form: Form = "multi-head"

    def plan(self, model: ir.Model, samples: Samples | None, score: Score | None) -> AttentionFused:
        """Find the attentions that the operator can compute.

        Raises:
            UnsupportedModelError: There is none, or the operator set is too old.
        """
        del samples, score
        _check_opset(model, self.form)
        fused, refusals = list[str](), list[Refusal]()
        with typed(model) as facts:
            for softmax, found in _sites(model.graph, facts):
                reason = found if isinstance(found, str) else _why_not(found, facts, self.form)
                if reason is None:
                    fused.append(name(softmax.outputs[0]))
                else:
                    refusals.append(Refusal(softmax.name or name(softmax.outputs[0]), "Softmax", reason))
        if not fused:
            raise UnsupportedModelError(
                f"{self.name}{{form={self.form}}}",
                got="; ".join(sorted({refusal.reason for refusal in refusals})) or "no Softmax at all",
                expected="attention: the product of queries and keys, a Softmax, and a product with values",
                mend="Leave the pass out, or run cleanup and fold-masks before it.",
            )
        return AttentionFused(self.form, tuple(fused), tuple(refusals))


@plain_dataclass(frozen=True)
class AttentionFused(Edit):
    """The attentions that become one operator each.

    Attributes:
        form: Which operator.
        softmaxes: The results of their Softmaxes.
        refusals: What is left alone.
    """

    tolerance: ClassVar[Tolerance] = Tolerance(
        "Sums of products in another order, and onnxruntime's fused Softmax: 2e-6 seen on 6 layers.", relative=1e-4
    )

    form: Form
    softmaxes: tuple[str, ...]
    refusals: tuple[Refusal, ...] = ()

    def describe(self) -> Mapping[str, Any]:
        """Return the plan as JSON."""
        return {"form": self.form, "softmaxes": list(self.softmaxes)}

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Write the operators."""
        write = {"multi-head": multi_head, "packed": packed, "standard": standard}[self.form]
        changed = False
        with typed(model) as facts:
            writer = Writer(model.graph, facts)
            for softmax, found in _sites(model.graph, facts):
                if name(softmax.outputs[0]) in self.softmaxes and not isinstance(found, str):
                    write(writer, found)
                    changed = True
        if changed:
            if self.form == "standard":
                model.opset_imports[""] = max(STANDARD_OPSET, model.opset_imports[""])
            else:
                model.opset_imports["com.microsoft"] = 1
            common.RemoveUnusedNodesPass()(model)
        return ir.passes.PassResult(model, modified=changed)


def _sites(graph: ir.Graph, facts: Probe) -> Iterator[tuple[ir.Node, Site | str]]:
    """Yield each Softmax with the attention around it, or why there is none."""
    for node in tuple(graph):
        if node.op_type == "Softmax" and node.domain == "":
            yield node, site(node, facts)


def _why_not(found: Site, facts: Probe, form: Form) -> str | None:
    if found.softmax.outputs[0].dtype != ir.DataType.FLOAT:
        return "onnxruntime's operator for CPUs takes single precision"
    if form == "standard":
        return why_not_standard(found, facts)
    wide = [value.name for value in found.terms if len(facts.shape(value) or ()) not in range(5)]
    unknown = [value.name for value in found.terms if facts.shape(value) is None]
    if wide or unknown:
        return f"the dimensions of its mask {(wide or unknown)[0]!r} are not known"
    if any((facts.shape(value) or (1,))[-1:] != (found.key.dims[2],) for value in found.terms):
        return "its mask is not over the keys"
    made = projections(found, facts) if form == "packed" else None
    return made if isinstance(made, str) else None


def _check_opset(model: ir.Model, form: Form) -> None:
    version = model.opset_imports.get("", 0)
    least = 20 if form == "standard" else 13
    groups = form == "standard" and version == 20
    groups = groups and any(node.op_type == "GroupNormalization" for node in model.graph.all_nodes())
    if version < least or groups:
        raise UnsupportedModelError(
            f"fuse-attention{{form={form}}}",
            got=f"operator set {version}{' with GroupNormalization, which set 21 changed' if groups else ''}",
            expected=f"operator set {21 if groups else least} or newer",
            mend="Export the model at a newer operator set" + (", or take form=multi-head." if least > 13 else "."),
        )
