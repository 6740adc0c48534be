"""Results of ``lathe bench`` made by hand, alone and under load."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from onnx_lathe.benchmarks.limits import ModelRoofline, OperatorShare
from onnx_lathe.benchmarks.load_suite import LoadCase, LoadResult, LoadSuite
from onnx_lathe.benchmarks.load_verdict import compare_loads
from onnx_lathe.benchmarks.queueing import LatencyBound, Responses, Run, respond
from onnx_lathe.benchmarks.result import Interval, Measurement, Timing
from onnx_lathe.benchmarks.scenarios import MaxRate, OfflineResult, ServerResult, Throughput, Traffic
from onnx_lathe.benchmarks.suite import BenchedModel, Case, Conditions, Suite
from onnx_lathe.benchmarks.verdict import compare

MACHINE: Mapping[str, Any] = {"cpu": "a CPU", "cores": [0, 1], "load": 0.1}
STEADY = (0.01,) * 9


def timing(name: str, seconds: float, processes: int = 10, spread: float = 0.001) -> Timing:
    """A model that takes ``seconds``, its processes apart by ``spread`` (a share) in all."""
    steps = [seconds * (1 + spread * (number / max(1, processes - 1) - 0.5)) for number in range(processes)]
    blocks = tuple(((step,) * 3,) * 4 for step in steps)
    return Timing(name, blocks, Interval(seconds, min(steps), max(steps)), None, 1 << 26, 0.05, 0.2)


def roofline(name: str, **seconds: float) -> ModelRoofline:
    """A model whose operators take so long."""
    shares = tuple(
        OperatorShare(kind.lower(), kind, 10, 10, took, took / 2, "memory") for kind, took in seconds.items()
    )
    return ModelRoofline(name, shares, 1e9, 4e9, 1e9, 1)


def suite(
    taken: str,
    seconds: Mapping[str, float],
    *,
    spread: float = 0.001,
    canary: Sequence[float] = STEADY,
    environment: Mapping[str, Any] = MACHINE,
    rooflines: tuple[ModelRoofline, ...] = (),
    threads: int = 1,
) -> Suite:
    """A result with one case."""
    timings = tuple(timing(name, took, spread=spread) for name, took in seconds.items())
    measurement = Measurement(timings, compare(timings, canary), tuple(canary), environment)
    case = Case(Conditions({"batch": 8}, threads, "cpu"), measurement, rooflines)
    models = tuple(BenchedModel(name, "0" * 64, 1000) for name in seconds)
    return Suite(taken, models, (case,))


def rebuilt(result: Suite) -> Suite:
    """The same result of another file under the same name."""
    return replace(result, models=tuple(replace(model, sha256="1" * 64) for model in result.models))


def offline(ratio: float = 0.5) -> OfflineResult:
    """B takes ``ratio`` of A's time; A's processes scatter by 2 %."""
    scatter = (0.99, 1.0, 1.01, 0.995, 1.005)
    a = tuple(((100, 0.1 * part), (100, 0.1)) * 2 for part in scatter)
    b = tuple(((100, 0.1 * ratio),) * 4 for _ in scatter)
    subjects = tuple(
        Throughput(name, blocks, Interval(1e4, 9e3, 1.1e4), 1 << 26, 0.05) for name, blocks in (("a", a), ("b", b))
    )
    comparisons = compare([subject.timing() for subject in subjects], STEADY)
    return OfflineResult(2, 8, subjects, comparisons, STEADY, MACHINE)


def server() -> ServerResult:
    """B takes half of A's time under the same arrivals, which neither queues for."""
    subjects = (_responses("a", 0.002), _responses("b", 0.001))
    return ServerResult(10.0, Traffic(), subjects, compare_loads(subjects, STEADY), STEADY, MACHINE)


def _responses(name: str, seconds: float) -> Responses:
    schedules = [tuple(0.1 * query + 0.001 * run for query in range(200)) for run in range(6)]
    runs = [
        Run(arrivals, arrivals, tuple(arrival + seconds for arrival in arrivals), (), 1 << 26, 0.05)
        for arrivals in schedules
        for _ in range(2)
    ]
    return respond(name, runs, 1, bound=LatencyBound(0.1))


def highest_rates() -> tuple[MaxRate, ...]:
    """No rate keeps the bound."""
    return (MaxRate(None, 5.0, offline(), (server(),)),)


def under(taken: str, *results: LoadResult) -> LoadSuite:
    """A result under load with a case for each of ``results``."""
    cases = tuple(LoadCase(Conditions({"batch": 8}, 1, "cpu"), result) for result in results)
    return LoadSuite(taken, "server", tuple(BenchedModel(name, "0" * 64, 1000) for name in "ab"), cases)
