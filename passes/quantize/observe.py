"""What values a network computes on calibration samples."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from concurrent.futures import Executor, ThreadPoolExecutor
from contextvars import ContextVar

import onnx_ir as ir

from onnx_lathe.passes.quantize.histogram import Extremes
from onnx_lathe.passes.taps import BATCH, feeds_of, not_finite_on, portions, sizes, tap
from onnx_lathe.runtime import providers
from onnx_lathe.runtime.samples import Array, Samples

MEMORY = 512
"""Megabytes (10^6 bytes) that the observed values of one run may take, where nothing else is asked."""
COUNTED = 2**23
"""About how many elements of a value are counted in all, evenly over the samples: more tell nothing new."""
_COPIES = 2
"""How often a value is in memory: onnxruntime copies what it returns."""

Progress = Callable[[int, int, str], None]
"""Called with what is done, of how much, and what is going on."""


def _silent(done: int, total: int, text: str) -> None:
    del done, total, text


progress: ContextVar[Progress] = ContextVar("progress", default=_silent)
"""Told after each batch; who wants to show it sets it around the call."""


def observe(model: ir.Model, seen: Mapping[str, Extremes], samples: Samples, *, memory: int = MEMORY) -> None:
    """Take what values are as ``model`` runs on ``samples`` into ``seen``.

    The ends are those of all values. Of a value with more than `COUNTED` elements in all, every k-th element of each
    sample is counted. Neither depends on how the samples are cut into batches.

    Args:
        model: The graph.
        seen: What to keep of each value of the main graph, by its name: a `Histogram`, or where the least and the
            largest are enough `Extremes`, which take a tenth of the time.
        samples: What to run.
        memory: Megabytes that the observed values of one run may take: where it is needed batches are smaller, and then
            there are several passes over the samples.

    Raises:
        SamplesError: The samples do not fit the model, or a value is not finite on them.
    """
    nbytes = {name: _COPIES * size for name, size in sizes(model, list(seen), samples).items()}
    batch, groups = schedule(nbytes, memory * 10**6)
    counts = [len(next(iter(feeds.values()))) for feeds in feeds_of(model, samples, batch)]
    enough = max(1, COUNTED // len(samples))
    report, done = progress.get(), 0
    with ThreadPoolExecutor(providers.default_threads()) as pool:
        for group in groups:
            for number, values in enumerate(tap(model, group, samples, batch)):
                parts = {name: _part(array, counts[number], enough) for name, array in values.items()}
                _take_in(pool, seen, values, parts, f"{samples.source}, batch {number} of {batch} samples")
                done += 1
                report(done, len(groups) * len(counts), "observe values")


def schedule(nbytes: Mapping[str, int], budget: int) -> tuple[int, list[list[str]]]:
    """Return how many samples to run together, and the values to observe in each pass over them.

    Args:
        nbytes: The bytes of each value in a run of one sample.
        budget: The bytes that the values of one run may take; a value that alone takes more has a pass for itself.
    """
    total = sum(nbytes.values())
    if total <= budget:
        return (min(BATCH, budget // total) if total else BATCH), [list(nbytes)]
    return 1, list(portions(nbytes, nbytes.__getitem__, budget))


def _part(array: Array, samples: int, enough: int) -> Array:
    """Return every k-th element of each sample, so that about ``enough`` are left, whatever the batch.

    The step is odd: along rows of an even length it meets every column. What is not arranged by samples is left whole.
    """
    step = array.size // (samples * enough) | 1
    if step == 1 or array.shape[:1] != (samples,):
        return array
    return array.reshape(samples, -1)[:, ::step]


def _take_in(
    pool: Executor, seen: Mapping[str, Extremes], values: Mapping[str, Array], parts: Mapping[str, Array], run: str
) -> None:
    def update(name: str) -> bool:
        return seen[name].update(values[name], parts[name])

    for name, finite in zip(values, pool.map(update, values), strict=True):
        if not finite:
            raise not_finite_on(f"{run}: value {name!r}")
