"""What values a network computes on calibration samples."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from concurrent.futures import Executor, ThreadPoolExecutor
from contextvars import ContextVar

import onnx_ir as ir

from onnx_lathe.passes.quantize.histogram import Extremes
from onnx_lathe.passes.taps import feeds_of, sizes, tap
from onnx_lathe.runtime import providers
from onnx_lathe.runtime.errors import SamplesError
from onnx_lathe.runtime.samples import Array, Samples

BATCH = 8
"""The most samples in one calibration run."""
MEMORY = 512
"""Megabytes (10^6 bytes) that the observed values of one run may take, where nothing else is asked."""
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
    total = len(groups) * sum(1 for _ in feeds_of(model, samples, batch))
    report = progress.get()
    runs = ((number, values) for group in groups for number, values in enumerate(tap(model, group, samples, batch)))
    with ThreadPoolExecutor(providers.default_threads()) as pool:
        for done, (number, values) in enumerate(runs, 1):
            _take_in(pool, seen, values, f"batch {number} of {batch} samples", samples.source)
            report(done, total, "observe values")


def schedule(nbytes: Mapping[str, int], budget: int) -> tuple[int, list[list[str]]]:
    """Return how many samples to run together, and the values to observe in each pass over them.

    Args:
        nbytes: The bytes of each value in a run of one sample.
        budget: The bytes that the values of one run may take; a value that alone takes more has a pass for itself.
    """
    total = sum(nbytes.values())
    if total <= budget:
        return (min(BATCH, budget // total) if total else BATCH), [list(nbytes)]
    groups: list[list[str]] = [[]]
    used = 0
    for name, size in nbytes.items():
        if groups[-1] and used + size > budget:
            groups.append([])
            used = 0
        groups[-1].append(name)
        used += size
    return 1, groups


def _take_in(pool: Executor, seen: Mapping[str, Extremes], values: Mapping[str, Array], run: str, source: str) -> None:
    def update(name: str) -> bool:
        return seen[name].update(values[name])

    for name, finite in zip(values, pool.map(update, values), strict=True):
        if not finite:
            raise SamplesError(
                f"{source}: value {name!r}",
                got=f"NaN or infinity as the network runs on {run}",
                expected="finite values",
                mend="Check that the samples are prepared as in training and that the float model is sound.",
            )
