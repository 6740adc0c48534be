"""What a user spells: a pass with its options, before anything is decided.

A request is a frozen dataclass whose fields are the options. ``Prune(ratio=0.3)``, the text ``prune{ratio=0.3}`` and
the JSON ``{"pass": "prune", "ratio": 0.3}`` are the same thing (`onnx_lathe.passes.registry` translates).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import ClassVar

import onnx_ir as ir

from onnx_lathe.passes.edit import Edit
from onnx_lathe.runtime.samples import Samples

Score = Callable[[Path], float]
"""Judges a model file: the metric on 0..1, higher is better. Given by the caller; passes measure nothing themselves."""


class Request(ABC):
    """Base of every request. Subclasses are frozen pydantic dataclasses: options are checked however spelled."""

    name: ClassVar[str]
    """The name on the command line, in kebab case."""
    tool: ClassVar[str | None] = None
    """Whose optimizer the pass runs; None for what is made here."""

    @property
    def maker(self) -> str:
        """What to name where the pass did what it must not."""
        return f"the pass {self.name}" + (f", which runs the optimizer of {self.tool}" if self.tool else "")

    @abstractmethod
    def plan(self, model: ir.Model, samples: Samples | None, score: Score | None) -> Edit:
        """Decide what to do to ``model``, which is not changed.

        Args:
            model: The graph, its weights lazy.
            samples: Calibration data, where the user gave any.
            score: Judges a candidate file, where the caller can.

        Returns:
            The whole decision, as an edit that decides nothing more.

        Raises:
            UnsupportedModelError: Nothing can be done to this model, and why.
            SamplesError: The request needs samples and there are none, or they do not fit the model.
        """


class SelfPlanned(Request, Edit, ABC):
    """A request that needs neither data nor decisions, and so is its own edit."""

    def plan(self, model: ir.Model, samples: Samples | None, score: Score | None) -> Edit:
        """Return the request itself."""
        del model, samples, score
        return self
