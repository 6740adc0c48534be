"""Removing what exporters leave behind, without changing what a model computes."""

from __future__ import annotations

from typing import ClassVar

import onnx_ir as ir
from onnx_ir.passes import common
from onnxscript.optimizer._constant_folding import FoldConstantsPass
from onnxscript.rewriter import RewritePass
from pydantic.dataclasses import dataclass

from onnx_lathe.passes.cleanup.rules import RULES
from onnx_lathe.passes.cleanup.shapes import fix_reshapes
from onnx_lathe.passes.cleanup.snapshot import Snapshot
from onnx_lathe.passes.cleanup.weights import fold_transposes, merge_duplicates
from onnx_lathe.passes.oracle import Tolerance
from onnx_lathe.passes.request import SelfPlanned
from onnx_lathe.runtime.errors import UnsupportedModelError

FOLDED_ELEMENTS = 1024
"""Constants of more elements are not folded: results could be larger than what they are computed from."""
ROUNDS = 8
"""Rounds until nothing changes; each one may uncover work for the next. Two or three are usual."""


@dataclass(frozen=True)
class Cleanup(SelfPlanned):
    """Remove no-ops, dead and repeated nodes, unused and repeated weights, and exporters' metadata.

    Constants are folded where they are small; BatchNormalization goes into the Conv, ConvTranspose or Gemm before it;
    functions are inlined. Inputs and outputs keep their names, types, dimensions and order.
    """

    name: ClassVar[str] = "cleanup"
    tolerance: ClassVar[Tolerance] = Tolerance(
        "onnxruntime's own optimizations differ by 2e-6 on a 6-layer encoder, and folded weights round once more",
        relative=1e-4,
    )

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Clean up ``model``; weights are read only where they change or may be equal to others.

        Raises:
            UnsupportedModelError: Constant folding fails on an operator of this model.
        """
        before = Snapshot.of(model)
        signature = [(value.name, value.type, value.shape) for value in model.graph.outputs]
        _prepare(model)
        state = before
        for _ in range(ROUNDS):
            _round(model)
            last, state = state, Snapshot.of(model)
            if state.same(last):
                break
        _strip(model)
        common.NameFixPass()(model)
        for value, (name, type_, shape) in zip(model.graph.outputs, signature, strict=True):
            value.name, value.type, value.shape = name, type_, shape
        return ir.passes.PassResult(model, modified=not before.same(Snapshot.of(model)))


def _prepare(model: ir.Model) -> None:
    if model.ir_version < 4:
        # Before version 4 every initializer had to be listed as an input, and none could be replaced by the user.
        common.RemoveInitializersFromInputsPass()(model)
        model.ir_version = 4
    common.InlinePass(criteria=lambda function: _can_inline(function, model))(model)
    common.RemoveUnusedFunctionsPass()(model)
    common.NameFixPass()(model)


def _can_inline(function: ir.Function, model: ir.Model) -> bool:
    same = all(model.opset_imports.get(key, version) == version for key, version in function.opset_imports.items())
    graphs = (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS)
    return same and not any(attribute.type in graphs for attribute in function.attributes.values())


def _round(model: ir.Model) -> None:
    operators = {node.op_type for node in ir.traversal.RecursiveGraphIterator(model.graph)}
    # The pass writes Split and Unsqueeze as of operator set 18 in place of these.
    if model.opset_imports.get("", 1) >= 18 or operators.isdisjoint(("SplitToSequence", "ConcatFromSequence")):
        _fold_constants(model)
    RewritePass(RULES)(model)
    common.RemoveUnusedNodesPass()(model)
    common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
    common.LiftSubgraphInitializersToMainGraphPass()(model)
    fix_reshapes(model)
    fold_transposes(model)
    merge_duplicates(model)
    # The pass takes two draws of one of these for the same.
    if operators.isdisjoint(("Bernoulli", "Dropout")):
        common.CommonSubexpressionEliminationPass()(model)
    common.RemoveUnusedNodesPass()(model)
    common.RemoveUnusedFunctionsPass()(model)
    common.RemoveUnusedOpsetsPass()(model)


def _fold_constants(model: ir.Model) -> None:
    fold = FoldConstantsPass(
        shape_inference=True,
        input_size_limit=FOLDED_ELEMENTS,
        output_size_limit=FOLDED_ELEMENTS,
        should_fold=_should_fold,
    )
    try:
        fold(model)
    except RuntimeError as error:
        raise UnsupportedModelError(
            "cleanup",
            got=f"a graph that onnxscript cannot fold the constants of: {error} ({error.__cause__})",
            expected="a graph that it can",
            mend="Leave cleanup out for this model.",
        ) from error


def _should_fold(node: ir.Node) -> bool | None:
    """Leave out what must stay random, and transposed weights, which `fold_transposes` keeps lazy."""
    return False if node.op_type in ("Bernoulli", "Transpose") else None


def _strip(model: ir.Model) -> None:
    """Remove doc strings, and the metadata in which exporters put stack traces with paths of their machine."""
    common.ClearMetadataAndDocStringPass()(model)
    for graph in (model.graph, *model.graph.subgraphs()):
        graph.doc_string = None
        graph.metadata_props.clear()
        results = [value for node in graph for value in node.outputs]
        for value in (*graph.inputs, *graph.initializers.values(), *results):
            value.doc_string = None
            value.metadata_props.clear()
