"""What a request decided: a frozen plan that changes a graph, and the oracle that says whether it did so rightly."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import onnx_ir as ir

from onnx_lathe.passes.oracle import Check, Tolerance, check_outputs
from onnx_lathe.runtime.samples import Feeds


@dataclass(frozen=True)
class Refusal:
    """Something that a pass left alone, and why.

    Attributes:
        node: The name of the node (or tensor).
        operator: Its operator type.
        reason: Why, as a phrase.
    """

    node: str
    operator: str
    reason: str


class Edit(ir.passes.InPlacePass, ABC):
    """A plan that changes a graph in place. Frozen, printable, and JSON by `describe`. It decides nothing.

    Applying an edit twice changes nothing the second time.
    """

    tolerance: ClassVar[Tolerance]
    """How near the edited graph must come to its reference."""

    @abstractmethod
    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Change ``model`` and say whether its serialized form differs."""

    refusals: tuple[Refusal, ...] = ()
    """What is left alone, and why; a plan that leaves anything alone has a field of this name."""

    @property
    def refused(self) -> Sequence[Refusal]:
        """What was left alone, and why."""
        return self.refusals

    def describe(self) -> Mapping[str, Any]:
        """Return the plan as a JSON-able value: names and numbers, no weights."""
        return {}

    def reference(self, model: ir.Model) -> None:
        """Turn the original graph into one whose outputs the edited graph must have.

        An exact rewrite leaves it alone. Pruning zeroes what the consumers would have read; quantization inserts the
        same rounding, which onnxruntime then runs unfused.
        """
        del model

    def check(self, before: Path, after: Path, feeds: Feeds) -> Sequence[Check]:
        """Compare the edited file with its oracle on one batch; override to add an oracle of another shape."""
        return (check_outputs(before, after, feeds, self.tolerance, self.reference),)

    def check_parts(self, before: Path, after: Path) -> Sequence[Check] | None:
        """Compare single operators of an edited file that is too large to be run whole, on random inputs.

        None where the edit has no such oracle: the whole model is then run after all.
        """
        del before, after
        return None
