"""``lathe bench``: models measured side by side, alone or under load."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, replace
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

from onnx_lathe.benchmarks import environment, load_suite, suite
from onnx_lathe.benchmarks.gate import check_covers
from onnx_lathe.benchmarks.limits import ModelRoofline
from onnx_lathe.benchmarks.load_suite import LoadCase, LoadResult, LoadSuite, Scenario
from onnx_lathe.benchmarks.measure import FINAL, SCREEN, measure
from onnx_lathe.benchmarks.peaks import measure_peaks
from onnx_lathe.benchmarks.queueing import LatencyBound
from onnx_lathe.benchmarks.scenarios import Traffic, max_rate, measure_offline, measure_server
from onnx_lathe.benchmarks.subject import Subject
from onnx_lathe.benchmarks.suite import BenchedModel, Case, Conditions, Suite
from onnx_lathe.converter.progress import Progress, silent
from onnx_lathe.converter.roofline import roofline
from onnx_lathe.converter.stages import locked, model_digest, run_stage
from onnx_lathe.converter.workload import Workload, plain_subject
from onnx_lathe.runtime import tensors
from onnx_lathe.runtime.bundle import file_digest, model_file
from onnx_lathe.runtime.errors import InputError
from onnx_lathe.runtime.facts import file_bytes

LONGER = 3.0
"""How many times its time budget a measurement may take in all where it does not tell before."""

_CODE = (
    *("onnx_lathe.benchmarks", "onnx_lathe.runtime", "onnx_lathe.converter.bench", "onnx_lathe.converter.roofline"),
    "onnx_lathe.converter.workload",
)

T = TypeVar("T")


def bench(
    models: Sequence[Path],
    workload: Workload,
    *,
    time_budget: float = 30.0,
    profiled: bool = True,
    baseline: Suite | None = None,
    work: Path | None = None,
    progress: Progress = silent,
) -> Suite:
    """Measure ``models`` interleaved in fresh processes, through plain sessions; each is compared with the first.

    Args:
        models: ``.onnx`` files or bundles that take the same inputs.
        workload: The shapes and the sessions.
        time_budget: Seconds for each shape and number of threads; up to three times as many where a verdict is
            inconclusive then.
        profiled: Whether each model is also profiled, to tell how near its operators come to the machine's limits.
        baseline: An earlier result that must hold every model and every case.
        work: Where cases are kept, so that a run that was interrupted goes on; None to keep none.
        progress: Told what is being done.

    Returns:
        Every shape with every number of threads.

    Raises:
        ProviderError: The provider is not there.
        InputError: The baseline lacks a model or a case: before anything is measured.
        BundleError: Another run is at work in ``work``.
        MeasurementError: A model could not be run.
    """
    effort = replace(FINAL, time_budget=time_budget, most_time=LONGER * time_budget)
    peaks = cache(measure_peaks)

    def make(conditions: Conditions, feeds: Path) -> Case:
        measurement = measure(_subjects(models, conditions, feeds), effort, _told(progress))
        found: list[ModelRoofline] = []
        for model in models if profiled else ():
            progress(100, 100, f"profiling {model}")
            arrays, reached = tensors.load_npz(feeds), peaks(conditions.threads)
            found.append(roofline(str(model), model, arrays, conditions.provider, conditions.threads, peaks=reached))
        return Case(conditions, measurement, tuple(found))

    def check(conditions: Sequence[Conditions]) -> None:
        if baseline is not None:
            check_covers(baseline, [str(model) for model in models], conditions)

    options = {"effort": asdict(effort), "profiled": profiled}
    cases = _each_case(models, workload, options, work, Case, make, progress, check)
    return Suite(_now(), _benched(models), suite.judged_together(cases))


def bench_offline(
    models: Sequence[Path],
    workload: Workload,
    *,
    streams: int = 1,
    work: Path | None = None,
    progress: Progress = silent,
) -> LoadSuite:
    """Measure the throughput of ``models`` with all queries there from the start; each is compared with the first.

    Args:
        models: As in `bench`, like the others.
        workload: The shapes and the sessions.
        streams: How many queries are served at a time, by one session.
        work: Where cases are kept.
        progress: Told what is being done.

    Raises:
        ProviderError: The provider is not there.
        BundleError: Another run is at work in ``work``.
        MeasurementError: A model could not be run.
    """
    effort = replace(FINAL, processes=5)

    def make(conditions: Conditions, feeds: Path) -> LoadCase:
        found = measure_offline(
            _subjects(models, conditions, feeds),
            effort,
            streams=streams,
            samples_per_query=_samples(feeds),
            on_progress=_told(progress),
        )
        return LoadCase(conditions, found)

    options = {"effort": asdict(effort), "streams": streams}
    return _loaded("offline", models, workload, options, work, make, progress)


def bench_server(
    models: Sequence[Path],
    workload: Workload,
    *,
    streams: int = 1,
    rate: float | None = None,
    bound: LatencyBound | None = None,
    seed: int = 0,
    work: Path | None = None,
    progress: Progress = silent,
) -> LoadSuite:
    """Measure latencies under queries that arrive at random, from the time at which each was to arrive.

    Args:
        models: As in `bench`, like the others.
        workload: The shapes and the sessions.
        streams: How many queries are served at a time, by one session.
        rate: Queries per second; None to find the highest that keeps the bound.
        bound: The latency that a percentile must keep.
        seed: Fixes the arrivals.
        work: Where cases are kept.
        progress: Told what is being done.

    Returns:
        For each shape and number of threads all models at the rate, or the highest rate of each model.

    Raises:
        ProviderError: The provider is not there.
        BundleError: Another run is at work in ``work``.
        MeasurementError: A model could not be run.
        InputError: There is neither a rate nor a bound.
    """
    traffic = Traffic(streams=streams, seed=seed)
    serve = _server(rate, bound, traffic, _told(progress))

    def make(conditions: Conditions, feeds: Path) -> LoadCase:
        return LoadCase(conditions, serve(_subjects(models, conditions, feeds)))

    options = {"traffic": asdict(traffic), "rate": rate, "bound": None if bound is None else asdict(bound)}
    return _loaded("server", models, workload, options, work, make, progress)


def _server(
    rate: float | None, bound: LatencyBound | None, traffic: Traffic, told: Callable[[str, float], None]
) -> Callable[[Sequence[Subject]], LoadResult]:
    """Return what measures all subjects at the rate, or else the highest rate of each that keeps the bound."""
    if rate is not None:
        return lambda subjects: measure_server(subjects, rate, traffic, bound, told)
    if bound is not None:
        return lambda subjects: tuple(max_rate(each, bound, traffic, SCREEN, told) for each in subjects)
    raise InputError(
        "--rate",
        got="no rate and no bound of the latency",
        expected="one of them",
        mend="Add --rate QUERIES_PER_SECOND, or --latency-bound MILLISECONDS to find the highest rate within it.",
    )


def _loaded(
    scenario: Scenario,
    models: Sequence[Path],
    workload: Workload,
    options: Mapping[str, Any],
    work: Path | None,
    make: Callable[[Conditions, Path], LoadCase],
    progress: Progress,
) -> LoadSuite:
    cases = _each_case(models, workload, {"scenario": scenario, **options}, work, LoadCase, make, progress)
    return LoadSuite(_now(), scenario, _benched(models), load_suite.judged_together(cases))


def _each_case(
    models: Sequence[Path],
    workload: Workload,
    options: Mapping[str, Any],
    work: Path | None,
    kind: type[T],
    make: Callable[[Conditions, Path], T],
    progress: Progress,
    check: Callable[[Sequence[Conditions]], None] = lambda conditions: None,
) -> list[T]:
    """Make every case, or take what an earlier run left in ``work`` of the same models, inputs and environment.

    Args:
        models: The models.
        workload: The shapes and the sessions.
        options: What else a case depends on, JSON-able.
        work: Where cases are kept; None to keep none.
        kind: What a case is.
        make: Measures the models under some conditions on the inputs of a file.
        progress: Told of a case that is taken from an earlier run.
        check: Refuses the conditions of all cases before the first is made.
    """
    with workload.cases(model_file(models[0])) as cases, locked(work) if work else nullcontext():
        check([conditions for conditions, _ in cases])
        if work is None:
            return [make(*case) for case in cases]
        depends = {
            "options": options,
            "environment": environment.lasting(environment.describe()),
            "models": [[str(model), model_digest(model_file(model))] for model in models],
        }
        made: list[T] = []
        for number, (conditions, feeds) in enumerate(cases):
            key = {**depends, "conditions": asdict(conditions), "feeds": file_digest(feeds)}
            stage = run_stage(work, f"case-{number}", key, _CODE, lambda _, case=(conditions, feeds): make(*case), kind)
            if stage.skipped:
                progress(1, 1, f"{conditions.title}: measured before")
            made.append(stage.value)
        return made


def _samples(feeds: Path) -> int:
    """Return the number of samples in a batch; one where the first input is a scalar or there is none."""
    first = next(iter(tensors.load_npz(feeds).values()), None)
    return len(first) if first is not None and first.ndim else 1


def _benched(models: Sequence[Path]) -> tuple[BenchedModel, ...]:
    files = [(str(model), model_file(model)) for model in models]
    return tuple(BenchedModel(name, file_digest(file), file_bytes(file)) for name, file in files)


def _subjects(models: Sequence[Path], case: Conditions, feeds: Path) -> list[Subject]:
    return [plain_subject(str(model), model_file(model), feeds, case.provider, case.threads) for model in models]


def _told(progress: Progress) -> Callable[[str, float], None]:
    return lambda text, share: progress(int(100 * share), 100, text)


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
