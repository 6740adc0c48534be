"""What earlier compilations to the same output found: kept beside the bundle, shown in the next one's report."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

from onnx_lathe.benchmarks import history
from onnx_lathe.benchmarks.result import Measurement
from onnx_lathe.benchmarks.suite import BenchedModel, Case, Conditions, Suite
from onnx_lathe.converter.compile.task import Found, Task
from onnx_lathe.runtime.bundle import file_digest
from onnx_lathe.runtime.errors import InputError
from onnx_lathe.runtime.facts import file_bytes
from onnx_lathe.runtime.providers import default_threads

FILE = "history.jsonl"
SHIPPED = "model.onnx"
"""What ships is followed under one name, whichever form it has."""


def remembered(task: Task, found: Found) -> tuple[tuple[Suite, ...], tuple[str, ...]]:
    """Add what a search found to the history of its output; return all of it, and what to warn of.

    Where all stages were skipped the models and their measurement are the last ones, and nothing is added. A history
    that cannot be read is left as it is, with a warning: it must not cost the bundle.
    """
    file = task.folder / FILE
    now = _suite(task, found)
    try:
        results = history.read(file) if file.exists() else ()
        past = tuple(result for result in results if isinstance(result, Suite))
        if past and replace(past[-1], taken=now.taken) == now:
            return past, ()
        history.append(file, now)
    except InputError as error:
        return (now,), (f"The history is not shown, and nothing was added to it: {error}",)
    return (*past, now), ()


def _suite(task: Task, found: Found) -> Suite:
    """Return the original and what ships as a result; raw samples lie in the bundle's report."""
    winner = found.winner
    name = winner.candidate.name if winner else task.original_name
    model = winner.model if winner and winner.model else task.original
    threads = task.threads or default_threads()
    cases = tuple(
        Case(Conditions(dict(dims), threads, task.provider), _shipped(measurement, name))
        for dims, measurement in zip(task.dims, found.measurements, strict=True)
    )
    models = (_model(task.original_name, task.original_name, task.original, found), _model(SHIPPED, name, model, found))
    return Suite(datetime.now(UTC).isoformat(timespec="seconds"), models, cases)


def _model(called: str, name: str, model: Path, found: Found) -> BenchedModel:
    certificate = found.certificates.get(name)
    judged = (certificate.candidate, certificate.metric) if certificate else (None, "")
    return BenchedModel(called, file_digest(model), file_bytes(model), *judged)


def _shipped(measurement: Measurement, name: str) -> Measurement:
    """Return a measurement of the original, its first, and of ``name`` as what shipped."""
    timings = (measurement.timings[0], replace(measurement.timing(name), name=SHIPPED))
    comparisons = tuple(replace(each, name=SHIPPED) for each in measurement.comparisons if each.name == name)
    return history.medians_only(replace(measurement, timings=timings, comparisons=comparisons))
