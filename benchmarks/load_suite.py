"""Several models under load at several shapes and numbers of threads: one result, as `onnx_lathe.benchmarks.suite`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

from onnx_lathe.benchmarks.load_verdict import Contest, contests, labelled
from onnx_lathe.benchmarks.result import Comparison
from onnx_lathe.benchmarks.scenarios import MaxRate, OfflineResult, ServerResult
from onnx_lathe.benchmarks.schema import Versioned
from onnx_lathe.benchmarks.suite import BenchedModel, Conditions
from onnx_lathe.benchmarks.verdict import compare_all

Scenario = Literal["offline", "server"]
LoadResult = OfflineResult | ServerResult | tuple[MaxRate, ...]
"""Throughput, latencies at one rate, or the highest rate of each model."""


@dataclass(frozen=True)
class LoadCase:
    """All models under one set of conditions.

    Attributes:
        conditions: Shape, threads and provider.
        result: What was measured.
    """

    conditions: Conditions
    result: LoadResult


@dataclass(frozen=True)
class LoadSuite(Versioned):
    """Everything that one ``lathe bench --scenario`` found, raw times included.

    Attributes:
        taken: When, in UTC (ISO 8601).
        scenario: How queries came.
        models: In the order of the command; each is compared with the first.
        cases: In order.
    """

    SCHEMA: ClassVar[str] = "onnx-lathe/load/1"
    REMEDY: ClassVar[str] = "Measure again, with `lathe bench --scenario -o`."

    taken: str
    scenario: Scenario
    models: tuple[BenchedModel, ...]
    cases: tuple[LoadCase, ...]


def judged_together(cases: Sequence[LoadCase]) -> tuple[LoadCase, ...]:
    """Return the cases with verdicts that are adjusted (Holm) for there being several cases."""
    judged = iter(compare_all([contest for case in cases for _, contest in _contests(case.result)]))
    return tuple(
        replace(case, result=_with_verdicts(case.result, [next(judged) for _ in _contests(case.result)]))
        for case in cases
    )


def _contests(result: LoadResult) -> list[tuple[float, Contest]]:
    if isinstance(result, OfflineResult):
        return [(0.5, ([subject.timing() for subject in result.subjects], result.canary))]
    return contests(result.subjects, result.canary) if isinstance(result, ServerResult) else []


def _with_verdicts(result: LoadResult, judged: Sequence[tuple[Comparison, ...]]) -> LoadResult:
    if isinstance(result, OfflineResult):
        return replace(result, comparisons=judged[0])
    if isinstance(result, ServerResult):
        return replace(result, comparisons=labelled([quantile for quantile, _ in _contests(result)], judged))
    return result
