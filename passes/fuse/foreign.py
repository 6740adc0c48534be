"""Optimizers of others as requests: what they make of a graph is checked as our own edits are."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar, Literal

import onnx_ir as ir
from onnx import ModelProto
from onnxscript.optimizer import optimize
from onnxscript.rewriter.ort_fusions import optimize_for_ort
from pydantic import NonNegativeInt
from pydantic.dataclasses import dataclass

from onnx_lathe.passes import files
from onnx_lathe.passes.cleanup.snapshot import Snapshot
from onnx_lathe.passes.edit import Edit
from onnx_lathe.passes.oracle import Check, Tolerance
from onnx_lathe.passes.request import Score, SelfPlanned
from onnx_lathe.runtime import foreign
from onnx_lathe.runtime.errors import ModelFileError, UnsupportedModelError
from onnx_lathe.runtime.samples import Feeds, Samples

ROUNDS = 4
"""Times that an optimizer runs until it changes nothing: its rules uncover work for those before them."""
WHOLE_BYTES = 2**31 - 2**27
"""Weights that an optimizer gets inside one protobuf message, which ends at 2 GiB."""


class _Foreign(SelfPlanned, ABC):
    """Runs a foreign optimizer until nothing changes; inputs and outputs keep names, types, dimensions and order."""

    tolerance: ClassVar[Tolerance] = Tolerance(
        "Exact rewrites by their authors' word; operators for whole attentions sum in another order.", relative=1e-4
    )

    def plan(self, model: ir.Model, samples: Samples | None, score: Score | None) -> Edit:
        """Return the request itself, once it worked on a copy, which shares the weights.

        Raises:
            UnsupportedModelError: The optimizer fails on this model, or changes nothing.
        """
        del samples, score
        if not self.call(model.clone()).modified:
            raise UnsupportedModelError(
                self.name,
                got="a model in which the optimizer finds nothing",
                expected="something that its rules know",
                mend="Leave the pass out for this model.",
            )
        return self

    @abstractmethod
    def optimize(self, model: ir.Model) -> None:
        """Run the optimizer once, in place."""

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Optimize ``model``.

        Raises:
            UnsupportedModelError: The optimizer fails on this model, or changes its inputs or outputs.
        """
        before = state = Snapshot.of(model)
        signature = _signature(model)
        for _ in range(ROUNDS):
            self.optimize(model)
            for node in model.graph.all_nodes():
                model.opset_imports.setdefault(node.domain, 1)  # some fusions forget to say whose operators theirs are
            last, state = state, Snapshot.of(model)
            if state.same(last):
                break
        if [name for name, *_ in _signature(model)] != [name for name, *_ in signature]:
            raise UnsupportedModelError(
                self.name,
                got="other inputs or outputs than before",
                expected="the same names in the same order",
                mend="Leave the pass out for this model.",
            )
        for value, (_, type_, shape) in zip((*model.graph.inputs, *model.graph.outputs), signature, strict=True):
            value.type, value.shape = type_, shape
        return ir.passes.PassResult(model, modified=not before.same(Snapshot.of(model)))

    def check(self, before: Path, after: Path, feeds: Feeds) -> Sequence[Check]:
        """Compare with the model as it was.

        Raises:
            UnsupportedModelError: onnxruntime refuses what the optimizer made.
        """
        try:
            return super().check(before, after, feeds)
        except ModelFileError as error:
            raise UnsupportedModelError(
                self.name,
                got=f"{error.got} of what the optimizer made",
                expected="a graph that runs",
                mend="Leave the pass out for this model.",
            ) from error


def _signature(model: ir.Model) -> list[tuple[str | None, ir.TypeProtocol | None, ir.Shape | None]]:
    return [(value.name, value.type, value.shape) for value in (*model.graph.inputs, *model.graph.outputs)]


@dataclass(frozen=True)
class OptimizeOnnxscript(_Foreign):
    """Run onnxscript's optimizer: its common rules, or all fusions that it has for onnxruntime.

    Attributes:
        rules: "onnxruntime" fuses attention, normalizations and activations to onnxruntime's operators; "common" folds
            constants and removes what does nothing.
    """

    name: ClassVar[str] = "optimize-onnxscript"
    tool: ClassVar[str | None] = "onnxscript"

    rules: Literal["onnxruntime", "common"] = "onnxruntime"

    def optimize(self, model: ir.Model) -> None:
        """Run the rules; weights stay lazy."""
        try:
            if self.rules == "common":
                optimize(model)
            else:
                optimize_for_ort(model)
        except Exception as error:
            raise UnsupportedModelError(
                self.name,
                got=f"{type(error).__name__} in onnxscript: {error.__cause__ or error}",
                expected="a graph that it can optimize",
                mend="Leave the pass out for this model.",
            ) from error


@dataclass(frozen=True)
class OptimizeOnnxruntime(_Foreign):
    """Run the fusions of onnxruntime.transformers, which know a model by its type; the weights are read.

    Attributes:
        model_type: Whose fusions.
        heads: The number of attention heads; 0 to find it in the graph.
        hidden: The width of the tokens; 0 to find it in the graph.
    """

    name: ClassVar[str] = "optimize-onnxruntime"
    tool: ClassVar[str | None] = "onnxruntime"

    model_type: Literal["bert", "bert_tf", "gpt2", "bart", "t5", "vit", "swin", "clip", "conformer", "phi"] = "bert"
    heads: NonNegativeInt = 0
    hidden: NonNegativeInt = 0

    def optimize(self, model: ir.Model) -> None:
        """Run the fusions on the graph with its weights in memory."""
        weights = [value.const_value for graph in model.graphs() for value in graph.initializers.values()]
        total = sum(tensor.nbytes for tensor in weights if tensor is not None)
        if total > WHOLE_BYTES:
            raise UnsupportedModelError(
                self.name,
                got=f"{total / 2**30:.1f} GiB of weights",
                expected="at most what fits one protobuf message, 2 GiB: onnxruntime's optimizer holds the whole model",
                mend="Leave the pass out; optimize-onnxscript leaves weights in their file.",
            )
        optimized = ir.from_proto(foreign.optimize_transformer(_whole(model), self.model_type, self.heads, self.hidden))
        model.graph = optimized.graph  # which holds the opsets
        model.functions.clear()
        model.functions.update(optimized.functions)


def _whole(model: ir.Model) -> ModelProto:
    """Return a model with its weights inside the graph."""
    copy = model.clone()
    for graph in copy.graphs():
        for value in graph.initializers.values():
            tensor = value.const_value
            if isinstance(tensor, ir.ExternalTensor):
                value.const_value = ir.Tensor(files.view(tensor).numpy(), dtype=tensor.dtype, name=tensor.name)
    return ir.to_proto(copy)
