"""Measuring forms side by side: short heats that rank them, and the final that gives a verdict."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import psutil

from onnx_lathe.benchmarks.measure import LEAST_PROCESSES, Effort, measure
from onnx_lathe.benchmarks.result import Interval, Measurement
from onnx_lathe.benchmarks.subject import Subject
from onnx_lathe.converter.compile.clock import Clock
from onnx_lathe.converter.compile.task import Rung, Task
from onnx_lathe.converter.progress import Progress
from onnx_lathe.converter.stages import model_digest
from onnx_lathe.converter.workload import batches_to_time, plain_subject
from onnx_lathe.runtime import cgroups, memory, tensors
from onnx_lathe.runtime.errors import MeasurementError
from onnx_lathe.runtime.facts import file_bytes

HEAT = Effort(processes=1, rounds=3, most_rounds=6, block_seconds=0.02, time_budget=10.0, retire=1.5)
"""To drop what is clearly slower: one to three seconds a subject, unless a single call takes long."""
_HEAT_BATCHES = 2
"""Of data as they come, that a heat runs."""
_CODE = ("onnx_lathe.benchmarks", "onnx_lathe.runtime", "onnx_lathe.converter.compile.race")
_GROWN = 2.0
"""A model takes up to so many times its file's bytes as it runs: its weights are also packed for the kernels."""
_MEMORY_SHARE = 0.6
"""Of the free memory that models which run side by side may take together."""


@dataclass(frozen=True)
class Runner:
    """A form in a heat.

    Attributes:
        name: How it is called.
        model: Its file.
        digest: Of the file and the weights beside it.
    """

    name: str
    model: Path
    digest: str


class Race:
    """Runs heats.

    Args:
        task: Shapes, provider, threads and cache.
        original: What a heat without a leader compares with.
        clock: Heats are not begun that would end after the search's share of it.
        progress: Told what is done.

    Attributes:
        failed: Why forms could not be measured, by name.
    """

    def __init__(self, task: Task, original: Path, clock: Clock, progress: Progress) -> None:
        self._task = task
        self._original = Runner(task.original_name, original, model_digest(original))
        self._clock = clock
        self._progress = progress
        self._seconds_each = 0.0
        self.failed: dict[str, str] = {}

    def heat(
        self, runners: Sequence[Runner], share: float, *, leader: Runner | None = None, effort: Effort = HEAT
    ) -> dict[str, tuple[Interval, ...]]:
        """Measure forms beside the original or the leader, in groups that fit the memory.

        Args:
            runners: The most promising first: what time does not suffice for is left out.
            share: Of the time budget that may be spent when the last group ends.
            leader: The form to compare with; None for the original.
            effort: How much to measure.

        Returns:
            By name of those that could be measured, how many times as fast they are at each shape.
        """
        laps: dict[str, tuple[Interval, ...]] = {}
        room, rest = self._room(), list(runners)
        while rest:
            size = min(room, self._fitting(share))
            if size < 1:
                break
            laps |= self._group(leader, rest[:size], effort)
            rest = rest[size:]
        return laps

    def _fitting(self, share: float) -> int:
        """Return how many forms there is time for, beside what they are compared with."""
        left = self._clock.left(share)
        if not self._seconds_each or math.isinf(left):
            return sys.maxsize
        return int(left / self._seconds_each) - 1

    def _group(
        self, leader: Runner | None, runners: Sequence[Runner], effort: Effort
    ) -> dict[str, tuple[Interval, ...]]:
        began = time.monotonic()
        # Beside a leader the original need not run, which may take many times as long.
        first, task = leader or self._original, self._task
        if leader is not None:
            task = replace(task, original_name=leader.name, not_at_home=None)
        try:
            rungs = [Rung(each.name, each.model) for each in runners]
            digests = [each.digest for each in (first, *runners)]
            found = side_by_side(task, "heat", first.model, rungs, digests, effort, self._progress)
        except MeasurementError as error:
            if error.where not in [each.name for each in (*runners, *([leader] if leader else []))]:
                raise
            self.failed[error.where] = str(error)
            if leader is not None and error.where == leader.name:
                return {}
            rest = [each for each in runners if each.name != error.where]
            return self._group(leader, rest, effort) if rest else {}
        self._seconds_each = (time.monotonic() - began) / (1 + len(runners))
        return {each.name: tuple(measurement.speed(each.name).speed for measurement in found) for each in runners}

    def _room(self) -> int:
        """Return how many models may be in a heat beside what they are compared with."""
        each = max(1.0, _GROWN * file_bytes(self._original.model))
        return max(1, int(_memory() / each) - 1)


def side_by_side(
    task: Task,
    kind: str,
    original: Path,
    rungs: Sequence[Rung],
    digests: Sequence[str],
    effort: Effort,
    progress: Progress,
) -> tuple[Measurement, ...]:
    """Measure ``original`` and ``rungs`` in turn at each shape, as one stage; one at a time where memory is short.

    Args:
        task: Shapes, provider, threads and cache.
        kind: The name of the stage.
        original: The first subject, where the task's original runs.
        rungs: The others.
        digests: Of the models of all, in order; what identifies a rung that is none.
        effort: How much to measure at each shape.
        progress: Told how far it is.

    Raises:
        MeasurementError: A model could not be run; its name is the error's ``where``.
    """
    rungs = [Rung(task.original_name, original, provider=task.home), *rungs]

    def make(folder: Path) -> tuple[Measurement, ...]:
        done: list[Measurement] = []
        # A model that was judged in this process would stand beside those that are measured.
        memory.give_back()
        # Here, not in the key: how much memory is free changes from run to run.
        able = effort if _fit(rungs) else _apart(effort)
        for number in range(len(task.dims)):
            feeds = write_feeds(task, original, number, folder, most=_HEAT_BATCHES if effort == HEAT else None)
            subjects = [_subject(task, rung, feeds) for rung in rungs]
            done.append(measure(subjects, able, lambda text, part: progress(int(100 * part), 100, text)))
            for path in feeds:
                path.unlink()
        return tuple(done)

    depends = {
        "rungs": [[rung.name, digest] for rung, digest in zip(rungs, digests, strict=True)],
        "dims": [dict(dims) for dims in task.dims],
        "samples": task.samples_digest,
        "provider": task.provider,
        "home": task.home,
        "threads": task.threads,
        "effort": str(effort),
    }
    return task.cache.stage(kind, task.original_name, depends, _CODE, make, tuple[Measurement, ...]).value


def _fit(rungs: Sequence[Rung]) -> bool:
    """Say whether the models of all may be in memory together; what is no model is not counted."""
    return _GROWN * sum(file_bytes(rung.model) for rung in rungs if rung.model is not None) <= _memory()


def _memory() -> float:
    """Return the bytes that models which run side by side may take: of what is free, or of what a container allows."""
    return _MEMORY_SHARE * min(psutil.virtual_memory().available, *cgroups.memory_limits(), math.inf)


def _apart(effort: Effort) -> Effort:
    """Return an effort for models that run one at a time: over three processes, for one has no interval then."""
    if effort.processes > 1:
        return replace(effort, apart=True)
    return replace(effort, apart=True, processes=LEAST_PROCESSES, rounds=1, most_rounds=0, retire=0.0)


def write_feeds(task: Task, model: Path, shape: int, folder: Path, most: int | None = None) -> list[Path]:
    """Write what one call runs at a shape of the task, ``most`` batches of it spread over all; return the files."""
    batches = batches_to_time(model, task.samples, task.dims[shape])
    batches = batches[:: -(-len(batches) // (most or len(batches)))]
    files = [folder / f"feeds-{shape}-{number}.npz" for number in range(len(batches))]
    for file, batch in zip(files, batches, strict=True):
        tensors.save_npz(file, batch)
    return files


def _subject(task: Task, rung: Rung, feeds: Sequence[Path]) -> Subject:
    if rung.subject is not None:
        files = [str(path) for path in feeds]
        arguments = {**rung.subject.arguments, "feeds": files if len(files) > 1 else files[0]}
        return replace(rung.subject, name=rung.name, arguments=arguments)
    assert rung.model is not None, "a rung has a model or a subject"
    return plain_subject(rung.name, rung.model, feeds, rung.provider or task.provider, task.threads)
