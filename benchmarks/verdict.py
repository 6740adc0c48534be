"""From paired blocks to a verdict: is one subject faster than another, and is that more than noise?

A pair is a block of the reference and the block of the other subject in the same half of the same round, a
fraction of a second apart. Its difference is ``log(median of the reference's block / median of the
other's)``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from onnx_lathe.benchmarks.canary import MAX_DRIFT, drift
from onnx_lathe.benchmarks.result import Comparison, Interval, Timing, Verdict
from onnx_lathe.benchmarks.stats import beyond_p_value, centre, hodges_lehmann, holm, mean_beyond_p_value, mean_interval

LEAST_NOISE = 0.01
"""A difference under 1 % is never called one: alignment and address layout alone give as much."""
AGREEING = 0.8
"""The share of the fresh processes that must show a difference, for it to have recurred."""
EQUAL = 0.03
"""An interval within this share of 1 means "no difference"; a wider one that holds 1 is inconclusive."""
SIGNIFICANT = 0.01
"""A difference is claimed at 1 %, though its interval is of 95 %: a machine that differs from process to process by
more than the margin gives 1 in 100 false verdicts at 5 % (docs/studies/coverage.md)."""

Pairs = NDArray[np.float64]
"""Differences, ``float64 [processes, blocks]``, positive where the subject judged is the faster one."""


@dataclass(frozen=True)
class _Evidence:
    """What one comparison rests on, all in logarithms."""

    interval: Interval
    processes: Sequence[float]
    p_value: float


@dataclass(frozen=True)
class _Margin:
    """What a difference must exceed, as a logarithm, and where that comes from."""

    size: float
    steady: bool

    def __str__(self) -> str:
        source = "the noise" if self.steady else "the drift of a fixed kernel on this unsteady machine"
        return f"{source}, {np.expm1(self.size):.1%}"


def compare(timings: Sequence[Timing], canary: Sequence[float]) -> tuple[Comparison, ...]:
    """Compare every subject with the first; as `compare_all` does for a single run."""
    return compare_all([(timings, canary)])[0]


def compare_all(runs: Sequence[tuple[Sequence[Timing], Sequence[float]]]) -> list[tuple[Comparison, ...]]:
    """Compare every subject of each run with the first of that run.

    "faster" and "slower" are said where the interval lies beyond the margin, so do the tests over pairs (signed ranks)
    and over processes (Student's) at 1 %, adjusted for the number of subjects in all runs (Holm), and four of five
    processes show the same direction. The margin is what
    the reference differs from itself. Where the canary drifted over 5 %, a difference within that drift is
    inconclusive, and that there is none is never said.

    Args:
        runs: The timings of each interleaved run (two blocks a round, three rounds or more in all) and the seconds of
            its canary, in order.
    """
    margins = [_margin(timings[0], drift(canary)) for timings, canary in runs]
    evidence = [
        [_weigh(_differences(timings[0], other), margin) for other in timings[1:]]
        for (timings, _), margin in zip(runs, margins, strict=True)
    ]
    adjusted = iter(holm([each.p_value for run in evidence for each in run]))
    return [
        tuple(
            Comparison(other.name, timings[0].name, _exponential(each.interval), *_judge(each, next(adjusted), margin))
            for other, each in zip(timings[1:], run, strict=True)
        )
        for (timings, _), margin, run in zip(runs, margins, evidence, strict=True)
    ]


def noise_floor(timing: Timing) -> float:
    """Return the difference that a subject shows against itself, as a logarithm; at least 1 %.

    The Hodges-Lehmann estimate between its first and second block of each round: the same code, at two times.
    """
    medians = _medians(timing)
    against_itself = np.log(medians[:, 0::2] / medians[:, 1::2]).ravel()
    return max(float(np.log1p(LEAST_NOISE)), abs(centre(against_itself)))


def _margin(reference: Timing, drifted: float) -> _Margin:
    noise, drift_size = noise_floor(reference), float(np.log1p(drifted))
    return _Margin(noise, True) if drifted <= MAX_DRIFT else _Margin(max(noise, drift_size), False)


def _differences(reference: Timing, other: Timing) -> Pairs:
    """Return the differences of the blocks that both have: one that was retired has none of the later rounds."""
    one, two = _medians(reference), _medians(other)
    common = min(one.shape[1], two.shape[1])
    return np.log(one[:, :common] / two[:, :common])


def _weigh(pairs: Pairs, margin: _Margin) -> _Evidence:
    """Estimate over all pairs; the interval is the wider of that over pairs and that over processes.

    Blocks of one process share its address layout, so they are not independent: their interval alone would be
    too narrow. Under six processes the signed ranks give no 95 % interval, and Student's stands in; they give no
    p-value as small as Holm asks for even in ten, so the test over processes is always Student's.
    """
    over_pairs = hodges_lehmann(pairs.ravel())
    processes = [float(np.median(process)) for process in pairs]
    low, high = over_pairs.low, over_pairs.high
    p_value = beyond_p_value(pairs.ravel(), margin.size)
    if len(processes) > 1:
        over_processes = hodges_lehmann(processes) if len(processes) >= 6 else mean_interval(processes)
        low, high = min(low, over_processes.low), max(high, over_processes.high)
        p_value = max(p_value, mean_beyond_p_value(processes, margin.size))
    return _Evidence(Interval(over_pairs.value, low, high), processes, p_value)


def _judge(evidence: _Evidence, p_value: float, margin: _Margin) -> tuple[Verdict, str]:
    interval, count = evidence.interval, len(evidence.processes)
    if interval.low <= margin.size and interval.high >= -margin.size:
        if not margin.steady:
            return "inconclusive", f"not beyond {margin}"
        if max(-interval.low, interval.high) <= np.log1p(EQUAL):
            return "no difference", f"not beyond {margin}"
        return "inconclusive", f"the interval reaches both into {margin}, and beyond {EQUAL:.0%}"
    if p_value > SIGNIFICANT:
        return (
            "inconclusive",
            f"too few processes, or too unlike each other, for so many subjects (adjusted p = {p_value:.2g})",
        )
    sign = 1.0 if interval.value > 0 else -1.0
    agreeing = sum(sign * process > 0.0 for process in evidence.processes)
    if agreeing < AGREEING * count:
        return "inconclusive", f"seen in only {agreeing} of {count} fresh processes"
    where = f"{agreeing} of {count} fresh processes" if count > 1 else "one process, not confirmed in fresh ones"
    return "faster" if sign > 0 else "slower", f"beyond {margin}, in {where}"


def _medians(timing: Timing) -> NDArray[np.float64]:
    return np.array([[np.median(block) for block in process] for process in timing.blocks])


def _exponential(interval: Interval) -> Interval:
    return Interval(*(float(np.exp(part)) for part in (interval.value, interval.low, interval.high)))
