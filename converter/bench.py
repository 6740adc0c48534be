"""``lathe bench``: models measured side by side."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from rich.table import Table

from onnx_lathe.benchmarks.measure import FINAL, measure
from onnx_lathe.benchmarks.result import Interval, Measurement
from onnx_lathe.benchmarks.subject import Subject
from onnx_lathe.converter.data.files import load_samples
from onnx_lathe.converter.progress import Progress
from onnx_lathe.runtime import providers, tensors
from onnx_lathe.runtime.bundle import model_file
from onnx_lathe.runtime.samples import Samples


def bench(
    models: Sequence[Path],
    *,
    dims: Sequence[Mapping[str, int]] = (),
    data: Path | Samples | None = None,
    provider: str = "cpu",
    threads: int | None = None,
    time_budget: float = 30.0,
    progress: Progress,
) -> list[tuple[Mapping[str, int], Measurement]]:
    """Measure ``models`` interleaved in fresh processes, through plain sessions; each is compared with the first.

    Args:
        models: ``.onnx`` files or bundles that take the same inputs.
        dims: The shapes to measure at; one default shape where there are none.
        data: Samples to run instead of random values; then only a batch size is taken from ``dims``.
        provider: Where the models run.
        threads: Threads of a session; None for all allowed cores.
        time_budget: Seconds for each shape.
        progress: Told what is being done.

    Returns:
        Each shape with what was measured there.

    Raises:
        ProviderError: The provider is not there.
        MeasurementError: A model could not be run.
    """
    providers.resolve(provider)
    files = [model_file(model) for model in models]
    samples = load_samples(data) if isinstance(data, Path) else data
    done: list[tuple[Mapping[str, int], Measurement]] = []
    with tempfile.TemporaryDirectory(prefix="lathe-bench-") as folder:
        for number, shape in enumerate(dims or [{}]):
            feeds = Path(folder) / f"feeds-{number}.npz"
            tensors.save_npz(feeds, batch_to_time(files[0], samples, shape))
            subjects = [
                plain_subject(str(model), file, feeds, provider, threads)
                for model, file in zip(models, files, strict=True)
            ]
            effort = replace(FINAL, time_budget=time_budget)
            done.append((shape, measure(subjects, effort, lambda text, part: progress(int(100 * part), 100, text))))
    return done


def plain_subject(name: str, model: Path, feeds: Path, provider: str, threads: int | None) -> Subject:
    """Return how to start a model in a plain onnxruntime session."""
    arguments = {"model": str(model), "feeds": str(feeds), "provider": provider, "threads": threads}
    return Subject(name, "onnx_lathe.runtime.session:start_plain", arguments)


def batch_to_time(model: Path, samples: Samples | None, dims: Mapping[str, int]) -> tensors.Feeds:
    """Return one batch: samples where no more than the batch size is asked for, else random values of the shape."""
    if samples is not None and len(dims) <= 1:
        return tensors.first_batch(model, samples, next(iter(dims.values()), 1))
    return tensors.random_feeds(model, dims)


def table(dims: Mapping[str, int], measurement: Measurement) -> Table:
    """Return a measurement as a table for the terminal."""
    title = ", ".join(f"{name} {size}" for name, size in dims.items()) or "default shape"
    result = Table(title=title, caption="latency of one call with its 95 % interval; speed against the first model")
    for heading in ("model", "p50", "p90", "peak memory", "start", "speed", "verdict"):
        result.add_column(heading)
    verdicts = {comparison.name: comparison for comparison in measurement.comparisons}
    for timing in measurement.timings:
        comparison = verdicts.get(timing.name)
        result.add_row(
            timing.name,
            _milliseconds(timing.p50),
            _milliseconds(timing.p90) if timing.p90 else "—",
            f"{timing.peak_memory / 2**20:.0f} MiB",
            f"{timing.start_seconds:.2f} s",
            f"{comparison.speed.value:.2f}x [{comparison.speed.low:.2f}, {comparison.speed.high:.2f}]"
            if comparison
            else "1",
            comparison.verdict if comparison else "",
        )
    return result


def reasons(measurement: Measurement) -> list[str]:
    """Return why each verdict is what it is, a line each."""
    return [f"{each.name}: {each.verdict}, {each.reason}" for each in measurement.comparisons]


def _milliseconds(interval: Interval) -> str:
    return f"{1e3 * interval.value:.3f} ms [{1e3 * interval.low:.3f}, {1e3 * interval.high:.3f}]"
