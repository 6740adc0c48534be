"""``lathe bench``: models measured side by side, alone or under load."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

from onnx_lathe.benchmarks import environment, history
from onnx_lathe.benchmarks.gate import Gate, check_environment, gate_measured, gate_recorded
from onnx_lathe.benchmarks.limits import ModelRoofline
from onnx_lathe.benchmarks.measure import FINAL, SCREEN, measure
from onnx_lathe.benchmarks.peaks import Peaks, measure_peaks
from onnx_lathe.benchmarks.queueing import LatencyBound
from onnx_lathe.benchmarks.report.history import history_document, history_plots
from onnx_lathe.benchmarks.report.render import render_page
from onnx_lathe.benchmarks.scenarios import (
    MaxRate,
    OfflineResult,
    ServerResult,
    Traffic,
    max_rate,
    measure_offline,
    measure_server,
)
from onnx_lathe.benchmarks.subject import Subject
from onnx_lathe.benchmarks.suite import BenchedModel, Case, Conditions, Suite, judged_together
from onnx_lathe.converter.data.files import load_samples
from onnx_lathe.converter.progress import Progress
from onnx_lathe.converter.roofline import roofline
from onnx_lathe.runtime import loading, providers, tensors
from onnx_lathe.runtime.bundle import file_digest, model_file
from onnx_lathe.runtime.errors import InputError
from onnx_lathe.runtime.facts import file_bytes
from onnx_lathe.runtime.samples import Samples
from onnx_lathe.runtime.staged import staged

LONGER = 3.0
"""How many times its time budget a measurement may take in all where it does not tell before."""


def bench(
    models: Sequence[Path],
    *,
    dims: Sequence[Mapping[str, int]] = (),
    data: Path | Samples | None = None,
    provider: str = "cpu",
    threads: Sequence[int] = (),
    time_budget: float = 30.0,
    profiled: bool = True,
    progress: Progress,
) -> Suite:
    """Measure ``models`` interleaved in fresh processes, through plain sessions; each is compared with the first.

    Args:
        models: ``.onnx`` files or bundles that take the same inputs.
        dims: The shapes to measure at; one default shape where there are none.
        data: Samples to run instead of random values; then only a batch size is taken from ``dims``.
        provider: Where the models run.
        threads: Numbers of threads of a session to measure with; all allowed cores where there are none.
        time_budget: Seconds for each shape and number of threads; up to three times as many where a verdict is
            inconclusive then.
        profiled: Whether each model is also run under the profiler, to tell how near its operators come to what the
            machine could do.
        progress: Told what is being done.

    Returns:
        Every shape with every number of threads.

    Raises:
        ProviderError: The provider is not there.
        MeasurementError: A model could not be run.
    """
    files = [model_file(model) for model in models]
    effort = replace(FINAL, time_budget=time_budget, most_time=LONGER * time_budget)
    peaks: dict[int, Peaks] = {}
    cases: list[Case] = []
    for case, feeds in _conditions(files[0], dims, data, provider, threads):
        measurement = measure(_subjects(models, case, feeds), effort, _told(progress))
        rooflines: list[ModelRoofline] = []
        for model, file in zip(models, files, strict=True) if profiled else ():
            progress(100, 100, f"profiling {model}")
            if case.threads not in peaks:
                peaks[case.threads] = measure_peaks(case.threads)
            arrays, found = tensors.load_npz(feeds), peaks[case.threads]
            rooflines.append(roofline(str(model), file, arrays, case.provider, case.threads, peaks=found))
        cases.append(Case(case, measurement, tuple(rooflines)))
    described = tuple(
        BenchedModel(str(model), file_digest(file), file_bytes(file)) for model, file in zip(models, files, strict=True)
    )
    return Suite(datetime.now(UTC).isoformat(timespec="seconds"), described, judged_together(cases))


def bench_offline(
    models: Sequence[Path],
    *,
    dims: Sequence[Mapping[str, int]] = (),
    data: Path | Samples | None = None,
    provider: str = "cpu",
    threads: Sequence[int] = (),
    streams: int = 1,
    progress: Progress,
) -> list[tuple[Conditions, OfflineResult]]:
    """Measure the throughput of ``models`` with all queries there from the start; each is compared with the first.

    Args:
        models: As in `bench`, like the others.
        dims: The shapes.
        data: Samples to run.
        provider: Where the models run.
        threads: Of a session.
        streams: How many queries are served at a time, by one session.
        progress: Told what is being done.

    Raises:
        ProviderError: The provider is not there.
        MeasurementError: A model could not be run.
    """
    done: list[tuple[Conditions, OfflineResult]] = []
    for case, feeds in _conditions(model_file(models[0]), dims, data, provider, threads):
        first = next(iter(tensors.load_npz(feeds).values()))
        samples = len(first) if first.ndim else 1
        subjects = _subjects(models, case, feeds)
        effort = replace(FINAL, processes=5)
        result = measure_offline(
            subjects, effort, streams=streams, samples_per_query=samples, on_progress=_told(progress)
        )
        done.append((case, result))
    return done


def bench_server(
    models: Sequence[Path],
    *,
    dims: Sequence[Mapping[str, int]] = (),
    data: Path | Samples | None = None,
    provider: str = "cpu",
    threads: Sequence[int] = (),
    streams: int = 1,
    rate: float | None = None,
    bound: LatencyBound | None = None,
    seed: int = 0,
    progress: Progress,
) -> list[tuple[Conditions, ServerResult | list[MaxRate]]]:
    """Measure latencies under queries that arrive at random, from the time at which each was to arrive.

    Args:
        models: As in `bench`, like the others.
        dims: The shapes.
        data: Samples to run.
        provider: Where the models run.
        threads: Of a session.
        streams: How many queries are served at a time, by one session.
        rate: Queries per second; None to find the highest that keeps the bound.
        bound: The latency that a percentile must keep.
        seed: Fixes the arrivals.
        progress: Told what is being done.

    Returns:
        For each shape and number of threads all models at the rate, or the highest rate of each model.

    Raises:
        ProviderError: The provider is not there.
        MeasurementError: A model could not be run.
        InputError: There is neither a rate nor a bound.
    """
    if rate is None and bound is None:
        raise InputError(
            "--rate",
            got="no rate and no bound of the latency",
            expected="one of them",
            mend="Add --rate QUERIES_PER_SECOND, or --latency-bound MILLISECONDS to find the highest rate within it.",
        )
    traffic = Traffic(streams=streams, seed=seed)
    done: list[tuple[Conditions, ServerResult | list[MaxRate]]] = []
    for case, feeds in _conditions(model_file(models[0]), dims, data, provider, threads):
        subjects = _subjects(models, case, feeds)
        if rate is not None:
            done.append((case, measure_server(subjects, rate, traffic, bound, _told(progress))))
        elif bound is not None:
            done.append((case, [max_rate(each, bound, traffic, SCREEN, _told(progress)) for each in subjects]))
    return done


def read_baseline(file: Path, *, across_environments: bool = False) -> Suite | None:
    """Return an earlier result; None where ``file`` is a model or a bundle.

    Raises:
        InputError: It is missing, no result, of another schema, or of another environment.
    """
    if file.suffix != ".json":
        return None
    try:
        baseline = Suite.from_json(file.read_text(encoding="utf-8"), str(file))
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(
            str(file),
            got=getattr(error, "strerror", None) or "no text",
            expected="a result that `lathe bench -o` wrote, or a model",
            mend="Name another file.",
        ) from None
    if not across_environments:
        check_environment(baseline, environment.describe())
    return baseline


def gate(suite: Suite, baseline: Suite | None, limit: float, *, across_environments: bool = False) -> tuple[Gate, ...]:
    """Judge every model against an earlier result, or without one against the first model of the same run.

    Raises:
        InputError: The environments differ, or the baseline lacks a model or a case.
    """
    if baseline is None:
        return gate_measured(suite, limit)
    return gate_recorded(baseline, suite, limit, anywhere=across_environments)


def check_outputs(output: Path | None, append: Path | None) -> None:
    """Refuse to overwrite a result, and to measure for a history that cannot be appended to.

    Raises:
        InputError: The file is there, or the history cannot be written or was cut short.
    """
    if output is not None and output.exists():
        raise InputError(
            str(output),
            got="a file that is there already",
            expected="a new one: results are never overwritten",
            mend="Name another, or use --append.",
        )
    if append is not None:
        history.check(append)


def save(suite: Suite, output: Path | None, append: Path | None) -> None:
    """Write a result to a file of its own, to the end of a history, or both.

    Raises:
        InputError: The history cannot be appended to.
        OutputError: The file cannot be written.
    """
    check_outputs(output, None)
    if output is not None:
        with staged(output) as file:
            file.write_text(suite.to_json() + "\n", encoding="utf-8")
    if append is not None:
        history.append(append, suite)


def write_history(file: Path, output: Path | None) -> tuple[Suite, ...]:
    """Read a history and write it as a page.

    Raises:
        InputError: The history is missing, empty or corrupted.
        OutputError: The page cannot be written.
    """
    suites = history.read(file)
    if output is not None:
        page = render_page(history_document(str(file), suites), history_plots(suites))
        with staged(output) as target:
            target.write_text(page, encoding="utf-8")
    return suites


def plain_subject(name: str, model: Path, feeds: Path, provider: str, threads: int | None) -> Subject:
    """Return how to start a model in a plain onnxruntime session."""
    arguments = {"model": str(model), "feeds": str(feeds), "provider": provider, "threads": threads}
    return Subject(name, "onnx_lathe.runtime.session:start_plain", arguments)


def batch_to_time(model: Path, samples: Samples | None, dims: Mapping[str, int]) -> tensors.Feeds:
    """Return one batch: samples where no more than the batch size is asked for, else random values of the shape."""
    if samples is not None and len(dims) <= 1:
        return tensors.first_batch(model, samples, next(iter(dims.values()), 1))
    return tensors.random_feeds(model, dims)


def _subjects(models: Sequence[Path], case: Conditions, feeds: Path) -> list[Subject]:
    return [plain_subject(str(model), model_file(model), feeds, case.provider, case.threads) for model in models]


def _told(progress: Progress) -> Callable[[str, float], None]:
    return lambda text, share: progress(int(100 * share), 100, text)


def _conditions(
    model: Path,
    dims: Sequence[Mapping[str, int]],
    data: Path | Samples | None,
    provider: str,
    threads: Sequence[int],
) -> Generator[tuple[Conditions, Path]]:
    """Yield every shape with every number of threads, and the file of the inputs to run."""
    providers.resolve(provider)
    samples = load_samples(data) if isinstance(data, Path) else data
    specs = tensors.input_specs(loading.read_graph(model), str(model))
    with _folder() as folder:
        for number, shape in enumerate(dims or [{}]):
            feeds = folder / f"feeds-{number}.npz"
            sizes = shape if samples is not None else tensors.bind_dims(specs, shape, batch=1)
            tensors.save_npz(feeds, batch_to_time(model, samples, sizes))
            for count in dict.fromkeys(threads or [providers.default_threads()]):
                yield Conditions(sizes, count, provider), feeds


@contextmanager
def _folder() -> Generator[Path]:
    with tempfile.TemporaryDirectory(prefix="lathe-bench-") as folder:
        yield Path(folder)
