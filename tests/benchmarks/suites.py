"""Results of ``lathe bench`` made by hand."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from onnx_lathe.benchmarks.limits import ModelRoofline, OperatorShare
from onnx_lathe.benchmarks.result import Interval, Measurement, Timing
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
