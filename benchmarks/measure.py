"""Latency of several subjects, interleaved in fresh processes, each compared with the first.

One process of a run: every subject gets a fresh worker; the workers take turns, A B C C B A in a round, the
next round starting one subject later. Only one works at a time, after the threads of the one before have gone
to sleep, and the canary sings before each block. So whatever changes slowly in the machine meets all subjects
alike.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace

import numpy as np

from onnx_lathe.benchmarks import canary, environment
from onnx_lathe.benchmarks.process import Worker
from onnx_lathe.benchmarks.result import Comparison, Interval, Measurement, Timing
from onnx_lathe.benchmarks.stats import hodges_lehmann, least_samples, mean_interval, percentile
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
LEAST_ROUNDS = RETIRE_ROUNDS = 3
"""Over all processes: six pairs are the least that give an interval by signed ranks."""


@dataclass(frozen=True)
class Effort:
    """How much to measure.

    Attributes:
        processes: Fresh workers of each subject, one after the other; fewer (but 3) where the time budget ends.
        rounds: Rounds in each process at least, two blocks of each subject in a round; at least 3 over all processes.
        block_seconds: Length of a block: as many calls as fit when warm, at least one and at most 2,000.
        time_budget: Seconds: each process has its share of them to fill with rounds, and no more processes than 3 are
            begun after them.
        most_rounds: Rounds in each process at most, where the time budget has room for more than ``rounds``.
        most_time: Seconds that may be taken in all where a verdict is inconclusive when the time budget ends: more
            fresh processes are then measured, and the verdict is given once more, over all. 0.0 for no second look.
        retire: A subject that after `RETIRE_ROUNDS` rounds of a process takes over so many times what the fastest one
            takes is measured no further; where that is the first, nothing is. 0.0 measures all to the end; else there
            is one process.
        apart: Whether only one subject lives at a time, for what does not fit the memory side by side. Pairs are then
            as far apart as a worker takes to start, and what changes meanwhile widens the interval over processes.
        timeout: Seconds that one step of a worker (importing, preparing, warming up, a block) may take.

    Raises:
        InputError: A value is out of range.
    """

    processes: int
    rounds: int
    block_seconds: float
    time_budget: float
    timeout: float = 300.0
    most_rounds: int = 0
    most_time: float = 0.0
    retire: float = 0.0
    apart: bool = False

    @property
    def looks(self) -> tuple[tuple[int, float], ...]:
        """The most processes and seconds at each look; the second is taken where the first does not tell."""
        first = (self.processes, self.time_budget)
        if self.most_time <= self.time_budget:
            return (first,)
        share = self.most_time / self.time_budget if self.time_budget else 1.0
        return (first, (round(self.processes * share), self.most_time))

    def __post_init__(self) -> None:
        if self.retire and not (self.retire > 1.0 and self.processes == 1):
            raise InputError(
                "effort: retire",
                got=f"{self.retire:g} in {self.processes} processes",
                expected="0, or over 1 in one process",
                mend="Measure all to the end.",
            )
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
FINAL = Effort(processes=10, rounds=2, block_seconds=0.05, time_budget=25.0, most_rounds=50, most_time=75.0)
"""For a verdict: ten processes where they start quickly, three at least; three times as many where they do not tell."""


@dataclass
class _Record:
    """What is seen of one subject, while it is being seen."""

    calls: int = 0
    """In a block; the same in all processes."""
    blocks: list[tuple[tuple[float, ...], ...]] = field(default_factory=list[tuple[tuple[float, ...], ...]])
    start_seconds: list[float] = field(default_factory=list[float])
    cold_start_seconds: list[float] = field(default_factory=list[float])
    peak_memory: list[int] = field(default_factory=list[int])

    def timing(self, name: str) -> Timing:
        values = [value for process in self.blocks for block in process for value in block]
        return Timing(
            name,
            blocks=tuple(self.blocks),
            p50=_median(values, self.blocks),
            p90=_counted(values, 0.9),
            p95=_counted(values, 0.95),
            p99=_counted(values, 0.99),
            p999=_counted(values, 0.999),
            peak_memory=max(self.peak_memory),
            start_seconds=float(np.median(self.start_seconds)),
            cold_start_seconds=float(np.median(self.cold_start_seconds)),
        )


def _counted(values: Sequence[float], quantile: float) -> Interval | None:
    """Return a percentile where there are enough values for it to be worth printing."""
    return percentile(values, quantile) if len(values) >= least_samples(quantile) else None


def _median(values: Sequence[float], processes: Sequence[Sequence[Sequence[float]]]) -> Interval:
    """Return the median with the wider of its intervals over values and over processes, which differ in layout."""
    # One that was retired may have too few values for order statistics: those are about alike, so ranks do.
    over_values = percentile(values, 0.5) if len(values) >= least_samples(0.5) else hodges_lehmann(values)
    medians = [float(np.median(np.concatenate(blocks))) for blocks in processes]
    if len(medians) < 2:
        return over_values
    over_processes = hodges_lehmann(medians) if len(medians) >= 6 else mean_interval(medians)
    # Blocks disturbed in one process alone may leave the median of all outside the interval over processes.
    low, high = (min(over_values.low, over_processes.low), max(over_values.high, over_processes.high))
    return Interval(over_values.value, max(0.0, low), high)


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
    check_subjects(subjects)
    described = environment.describe()
    records = {subject.name: _Record() for subject in subjects}
    songs: list[float] = []
    rounds: int | None = None
    began = time.monotonic()
    timings: tuple[Timing, ...] = ()
    comparisons: tuple[Comparison, ...] = ()
    number = 0
    for most, budget in effort.looks:
        while number < most and not (number >= LEAST_PROCESSES and _ends(number, began) > budget):
            turn = number % len(subjects)
            order = [*subjects[turn:], *subjects[:turn]]
            run = _run_apart if effort.apart else _run_process
            rounds = run(order, effort, rounds, records, songs, _within(on_progress, number, most))
            number += 1
        timings = tuple(records[subject.name].timing(subject.name) for subject in subjects)
        comparisons = compare(timings, songs)
        if all(comparison.verdict != "inconclusive" for comparison in comparisons):
            break
    on_progress("measured", 1.0)
    return Measurement(timings, comparisons, tuple(songs), described)


def _ends(number: int, began: float) -> float:
    """Return the seconds that one process more than ``number`` would take in all."""
    return (time.monotonic() - began) * (number + 1) / number


def check_subjects(subjects: Sequence[Subject]) -> None:
    """Refuse to measure nothing, or two subjects that nothing tells apart.

    Raises:
        MeasurementError: There is no subject.
        InputError: Two have the same name.
    """
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


def _within(on_progress: OnProgress, number: int, most: int) -> OnProgress:
    """Return what reports the progress within one process."""
    return lambda what, share: on_progress(f"process {number + 1} of up to {most}: {what}", (number + share) / most)


def _run_apart(
    subjects: Sequence[Subject],
    effort: Effort,
    rounds: int | None,
    records: Mapping[str, _Record],
    songs: list[float],
    on_progress: OnProgress,
) -> int:
    """Do what `_run_process` does with one worker at a time; all do as many rounds as the first."""
    count = len(subjects)
    alone = replace(effort, time_budget=effort.time_budget / count)
    done = rounds
    for number, subject in enumerate(subjects):
        done = _run_process([subject], alone, done, records, songs, _part(on_progress, number, count))
    assert done is not None, "there is a subject"
    return done


def _part(on_progress: OnProgress, number: int, count: int) -> OnProgress:
    """Return what reports the progress of one of ``count`` equal parts."""
    return lambda what, share: on_progress(what, (number + share) / count)


def _run_process(
    subjects: Sequence[Subject],
    effort: Effort,
    rounds: int | None,
    records: Mapping[str, _Record],
    songs: list[float],
    on_progress: OnProgress,
) -> int:
    """Measure all subjects in one fresh worker each, and add what was seen to ``records`` and ``songs``.

    Args:
        subjects: In the order of the first round.
        effort: How much to measure.
        rounds: How many; None for as many as fit the share of the time budget that a process has.
        records: By the subject's name.
        songs: Of the canary.
        on_progress: Told of this process alone.

    Returns:
        How many rounds there were.
    """
    began = time.monotonic()
    with ExitStack() as stack:
        workers: dict[str, Worker] = {}
        for subject in subjects:
            on_progress(f"starting {subject.name}", 0.0)
            # One after the other, so that none starts in the shadow of another.
            worker = workers[subject.name] = stack.enter_context(Worker(subject, effort.timeout))
            records[subject.name].start_seconds.append(worker.prepare())
            records[subject.name].cold_start_seconds.append(worker.first_call())
        for name, worker in workers.items():
            on_progress(f"warming up {name}", 0.0)
            fitting = round(effort.block_seconds / worker.warm_up())
            records[name].calls = records[name].calls or min(MOST_CALLS, max(1, fitting))
        blocks: dict[str, list[tuple[float, ...]]] = {name: [] for name in workers}
        until = began + effort.time_budget / effort.processes
        running: Mapping[str, Worker] = workers
        reference = next(iter(records))
        warm, done = time.monotonic(), 0
        most = rounds or effort.most_rounds
        while done < (rounds or effort.rounds) or (done < most and not rounds and _fits(done + 1, done, warm, until)):
            on_progress("measuring", done / (rounds or effort.rounds))
            if effort.retire and done == RETIRE_ROUNDS:
                running = _not_retired(running, blocks, effort.retire)
                if reference not in running:
                    break
            _run_round(done, running, effort, records, blocks, songs)
            done += 1
        songs.append(canary.sing())
        for name, worker in workers.items():
            records[name].blocks.append(tuple(blocks[name]))
            records[name].peak_memory.append(worker.peak_memory())
    return done


def _not_retired(
    running: Mapping[str, Worker], blocks: Mapping[str, Sequence[Sequence[float]]], most: float
) -> Mapping[str, Worker]:
    """Return the workers whose subjects take at most ``most`` times what the fastest one takes."""
    seconds = {name: float(np.median([np.median(block) for block in blocks[name]])) for name in running}
    fastest = min(seconds.values())
    return {name: worker for name, worker in running.items() if seconds[name] <= most * fastest}


def _fits(wanted: int, done: int, began: float, until: float) -> bool:
    """Return whether so many rounds end in time, where so many were done since they began."""
    return began + (time.monotonic() - began) * wanted / done <= until


def _run_round(
    number: int,
    workers: Mapping[str, Worker],
    effort: Effort,
    records: Mapping[str, _Record],
    blocks: Mapping[str, list[tuple[float, ...]]],
    songs: list[float],
) -> None:
    """Run two blocks of each subject, there and back."""
    names = list(workers)
    turn = number % len(names)
    forth = [*names[turn:], *names[:turn]]
    for name in (*forth, *forth[::-1]):
        songs.append(canary.sing())
        blocks[name].append(workers[name].block(records[name].calls, PATIENCE * effort.block_seconds))
