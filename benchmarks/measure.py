"""Latency of several subjects, interleaved in fresh processes, each compared with the first.

One process of a run: every subject gets a fresh worker; the workers take turns, A B C C B A in a round, the
next round starting one subject later. Only one works at a time, after the threads of the one before have gone
to sleep, and the canary sings before each half of a round. So whatever changes slowly in the machine meets
all subjects alike.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field

import numpy as np

from onnx_lathe.benchmarks import canary, environment
from onnx_lathe.benchmarks.process import Worker
from onnx_lathe.benchmarks.result import Measurement, Timing
from onnx_lathe.benchmarks.stats import least_samples, percentile
from onnx_lathe.benchmarks.subject import Subject
from onnx_lathe.benchmarks.verdict import compare
from onnx_lathe.runtime.errors import InputError, MeasurementError

OnProgress = Callable[[str, float], None]
"""Told what is being done, and the share of the work that is done already."""

MOST_CALLS = 2000
"""In a block, so that a call of microseconds does not fill the memory."""
PATIENCE = 5
"""A disturbed block is cut off at so many times its length."""
LEAST_PROCESSES = 3
"""With fewer, no interval over processes is worth having."""
LEAST_ROUNDS = 6
"""Over all processes: 12 blocks give a median its interval, 6 rounds the reference's noise against itself."""


@dataclass(frozen=True)
class Effort:
    """How much to measure.

    Attributes:
        processes: Fresh workers of each subject, one after the other; fewer (but 3) where the time budget ends.
        rounds: Rounds in each process, two blocks of each subject in a round; at least 6 over all processes.
        block_seconds: Length of a block: as many calls as fit when warm, at least one and at most 2,000.
        time_budget: Seconds after which no more processes are begun than 3.
        timeout: Seconds that one step of a worker (importing, preparing, warming up, a block) may take.

    Raises:
        InputError: A value is out of range.
    """

    processes: int
    rounds: int
    block_seconds: float
    time_budget: float
    timeout: float = 300.0

    def __post_init__(self) -> None:
        for name, got, least in (
            ("processes", self.processes, 1),
            ("rounds over all processes", self.rounds * min(self.processes, LEAST_PROCESSES), LEAST_ROUNDS),
            ("block_seconds", self.block_seconds, 0.001),
            ("time_budget", self.time_budget, 0.0),
            ("timeout", self.timeout, 0.001),
        ):
            if not got >= least:
                raise InputError(
                    f"effort: {name}", got=f"{got:g}", expected=f"at least {least:g}", mend="Measure more."
                )


SCREEN = Effort(processes=1, rounds=6, block_seconds=0.05, time_budget=10.0)
"""To rank candidates: one or two seconds a subject, nothing confirmed in fresh processes."""
FINAL = Effort(processes=10, rounds=2, block_seconds=0.1, time_budget=25.0)
"""For a verdict: ten processes where they start quickly, three at least."""


@dataclass
class _Record:
    """What is seen of one subject, while it is being seen."""

    calls: int = 0
    """In a block; the same in all processes."""
    blocks: list[tuple[tuple[float, ...], ...]] = field(default_factory=list[tuple[tuple[float, ...], ...]])
    start_seconds: list[float] = field(default_factory=list[float])
    peak_memory: list[int] = field(default_factory=list[int])

    def timing(self, name: str) -> Timing:
        values = [value for process in self.blocks for block in process for value in block]
        return Timing(
            name,
            blocks=tuple(self.blocks),
            p50=percentile(values, 0.5),
            p90=percentile(values, 0.9) if len(values) >= least_samples(0.9) else None,
            peak_memory=max(self.peak_memory),
            start_seconds=float(np.median(self.start_seconds)),
        )


def _ignore(what: str, share: float) -> None:
    del what, share


def measure(subjects: Sequence[Subject], effort: Effort, on_progress: OnProgress = _ignore) -> Measurement:
    """Measure ``subjects`` side by side and compare each with the first.

    Args:
        subjects: One or more, of different names; the first is the reference.
        effort: `SCREEN`, `FINAL` or another.
        on_progress: Told what is being done, and the share done on 0..1.

    Raises:
        MeasurementError: There is no subject, or one could not be started or run: with what its process said last.
        InputError: Two subjects have the same name.
    """
    _check(subjects)
    described = environment.describe()
    records = {subject.name: _Record() for subject in subjects}
    songs: list[float] = []
    began = time.monotonic()
    for number in range(effort.processes):
        elapsed = time.monotonic() - began
        if number >= LEAST_PROCESSES and elapsed * (number + 1) / number > effort.time_budget:
            break
        turn = number % len(subjects)
        _run_process([*subjects[turn:], *subjects[:turn]], effort, records, songs, _within(on_progress, number, effort))
    on_progress("measured", 1.0)
    timings = tuple(records[subject.name].timing(subject.name) for subject in subjects)
    return Measurement(timings, compare(timings, songs), tuple(songs), described)


def _check(subjects: Sequence[Subject]) -> None:
    names = [subject.name for subject in subjects]
    if not names:
        raise MeasurementError("measurement", got="no subject", expected="at least one", mend="Name what to measure.")
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise InputError(
            "measurement",
            got=f"two subjects called {twice[0]!r}",
            expected="a name of its own for each",
            mend="Rename one of them.",
        )


def _within(on_progress: OnProgress, number: int, effort: Effort) -> OnProgress:
    """Return what reports the progress within one process."""
    return lambda what, share: on_progress(
        f"process {number + 1} of up to {effort.processes}: {what}", (number + share) / effort.processes
    )


def _run_process(
    subjects: Sequence[Subject],
    effort: Effort,
    records: Mapping[str, _Record],
    songs: list[float],
    on_progress: OnProgress,
) -> None:
    """Measure all subjects in one fresh worker each, and add what was seen to ``records`` and ``songs``."""
    on_progress("starting", 0.0)
    with ExitStack() as stack:
        workers = {subject.name: stack.enter_context(Worker(subject, effort.timeout)) for subject in subjects}
        starts = {name: worker.prepare() for name, worker in workers.items()}
        for name, worker in workers.items():
            on_progress(f"warming up {name}", 0.0)
            seconds = worker.warm_up()
            fitting = min(MOST_CALLS, max(1, round(effort.block_seconds / seconds)))
            records[name].calls = records[name].calls or fitting
        names = list(workers)
        blocks: dict[str, list[tuple[float, ...]]] = {name: [] for name in names}
        for number in range(effort.rounds):
            turn = number % len(names)
            forth = [*names[turn:], *names[:turn]]
            for half, order in enumerate((forth, forth[::-1])):
                songs.append(canary.sing())
                for name in order:
                    on_progress(name, (number + half / 2) / effort.rounds)
                    blocks[name].append(workers[name].block(records[name].calls, PATIENCE * effort.block_seconds))
        songs.append(canary.sing())
        for name, worker in workers.items():
            records[name].blocks.append(tuple(blocks[name]))
            records[name].start_seconds.append(starts[name])
            records[name].peak_memory.append(worker.peak_memory())
