"""Several models at several shapes and numbers of threads: one result, with one verdict a case and model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

from onnx_lathe.benchmarks.limits import ModelRoofline
from onnx_lathe.benchmarks.result import Interval, Measurement
from onnx_lathe.benchmarks.schema import Versioned
from onnx_lathe.benchmarks.verdict import compare_all


@dataclass(frozen=True)
class BenchedModel:
    """A model that was measured.

    Attributes:
        name: As the user spelled it, and as the timings call it.
        sha256: Of the model file, without the weights beside it.
        file_bytes: Of the model file and the weights beside it.
        accuracy: What it was judged by, on 0..1; None where it was not judged.
        metric: The name of that; empty where it was not judged.
    """

    name: str
    sha256: str
    file_bytes: int
    accuracy: Interval | None = None
    metric: str = ""


@dataclass(frozen=True)
class Conditions:
    """Under what models are run.

    Attributes:
        dims: Sizes of symbolic dimensions; what is not there is 1 or 16.
        threads: Of each session.
        provider: Where the models run.
    """

    dims: Mapping[str, int]
    threads: int
    provider: str

    @property
    def title(self) -> str:
        """The conditions in words."""
        sizes = [f"{name} {size}" for name, size in self.dims.items()] or ["default shape"]
        return ", ".join([*sizes, f"{self.threads} thread{'s' if self.threads > 1 else ''}", self.provider])


@dataclass(frozen=True)
class Case:
    """All models under one set of conditions.

    Attributes:
        conditions: Shape, threads and provider.
        measurement: What was measured.
        rooflines: How near each model's operators come to the machine's limits, from a run of its own under the
            profiler; empty where it was not asked for.
    """

    conditions: Conditions
    measurement: Measurement
    rooflines: tuple[ModelRoofline, ...] = ()

    @property
    def title(self) -> str:
        """The conditions in words."""
        return self.conditions.title

    def roofline(self, name: str) -> ModelRoofline | None:
        """Return the roofline of the model called ``name``."""
        return next((roofline for roofline in self.rooflines if roofline.name == name), None)


@dataclass(frozen=True)
class Suite(Versioned):
    """Everything that one ``lathe bench`` found, raw samples included.

    Attributes:
        taken: When, in UTC (ISO 8601).
        models: In the order of the command; each is compared with the first.
        cases: In order.
    """

    SCHEMA: ClassVar[str] = "onnx-lathe/bench/2"
    REMEDY: ClassVar[str] = "Measure again, with `lathe bench -o`."

    taken: str
    models: tuple[BenchedModel, ...]
    cases: tuple[Case, ...]

    def model(self, name: str) -> BenchedModel:
        """Return the model called ``name``."""
        return next(model for model in self.models if model.name == name)


def judged_together(cases: Sequence[Case]) -> tuple[Case, ...]:
    """Return the cases with verdicts that are adjusted (Holm) for there being several cases."""
    runs = [(case.measurement.timings, case.measurement.canary) for case in cases]
    return tuple(
        replace(case, measurement=replace(case.measurement, comparisons=comparisons))
        for case, comparisons in zip(cases, compare_all(runs), strict=True)
    )
