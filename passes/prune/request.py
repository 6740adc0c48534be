"""Structured pruning as a user asks for it."""

from __future__ import annotations

from typing import Annotated, ClassVar

import onnx_ir as ir
from pydantic import Field
from pydantic.dataclasses import dataclass

from onnx_lathe.passes.edit import Edit
from onnx_lathe.passes.prune.plan import plan
from onnx_lathe.passes.prune.score import Importance
from onnx_lathe.passes.request import Request, Score
from onnx_lathe.runtime.samples import Samples


@dataclass(frozen=True)
class Prune(Request):
    """Cut whole channels, neurons and heads out of a model, so that its tensors and its arithmetic shrink.

    Attributes:
        ratio: Share of each group of channels to remove; "std" has none.
        multiple: What stays is rounded up to a multiple of this many entries, which the kernels want: narrower or odd
            widths lose more time than they save.
        importance: "magnitude" keeps the largest weights, "fluctuation" what changes the consumers most on the
            samples, "interaction" what the consumers' results on the samples are made of; "auto" is "fluctuation"
            where there are samples. "std" removes, however many they are, the channels whose weights have a root mean
            square under ``threshold`` standard deviations of their layer's.
        threshold: Of "std".
        reconstruct: Where there are samples, fit the consumers' weights to what they computed before.
    """

    name: ClassVar[str] = "prune"

    ratio: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.3
    multiple: Annotated[int, Field(ge=1)] = 16
    importance: Importance = "auto"
    threshold: Annotated[float, Field(gt=0.0)] = 0.75
    reconstruct: bool = True

    def plan(self, model: ir.Model, samples: Samples | None, score: Score | None) -> Edit:
        """Decide which channels go."""
        del score
        return plan(
            model,
            samples,
            ratio=self.ratio,
            multiple=self.multiple,
            importance=self.importance,
            threshold=self.threshold,
            reconstruct=self.reconstruct,
        )
