"""Simulated runs: two subjects timed as `measure` times them, on machines that are noisy in a known way.

All effects are added in logarithms, so the true ratio of latencies is exactly the one asked for.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from onnx_lathe.benchmarks.result import Interval, Timing

Vector = NDArray[np.float64]

CALLS = 10
"""In a block of `FINAL`, 0.05 seconds."""
BASE = 0.005
"""Latency of the reference in seconds; no verdict depends on it."""


@dataclass(frozen=True)
class Machine:
    """How a machine is noisy, as standard deviations or sizes of log latency.

    Attributes:
        name: For tables.
        processes: Fresh processes of each subject.
        rounds: Rounds in each, two blocks of a subject in a round.
        process: Between processes of one subject: address layout, threads on other cores.
        block: Between blocks of one process.
        memory: Correlation of a block's deviation with that of the block before it in the same process.
        call: Between calls of one block.
        spikes: Share of calls that are up to many times as slow (Pareto, shape 1.5: of infinite variance).
        disturbed: Share of blocks that a neighbour slows by a fifth.
        slope: Linear drift of the whole machine from the first block to the last, which the canary sees: two thirds
            of it, between the middles of its first and last third.
        step: Sudden drift in the middle of the run, which it sees as well.
    """

    name: str
    processes: int = 10
    rounds: int = 4
    process: float = 0.003
    block: float = 0.003
    memory: float = 0.0
    call: float = 0.02
    spikes: float = 0.0
    disturbed: float = 0.0
    slope: float = 0.0
    step: float = 0.0


QUIET = Machine("quiet")
MACHINES = (
    QUIET,
    Machine("quiet, 3 processes", processes=3),
    Machine("quiet, 1 process (screen)", processes=1, rounds=6, process=0.0),
    Machine("processes differ by 1 %", process=0.01),
    Machine("processes differ by 1 %, 3 processes", processes=3, process=0.01),
    Machine("processes differ by 3 %", process=0.03),
    Machine("blocks 2 %, autocorrelated 0.9", block=0.02, memory=0.9),
    Machine("drifts by 5 %", slope=0.05, process=0.01),
    Machine("4 % slower from the middle on", step=0.04, process=0.01),
    Machine("drifts by 10 %", slope=0.1, process=0.01),
    Machine("10 % slower from the middle on", step=0.1, process=0.01),
    Machine("heavy-tailed calls", spikes=0.1, process=0.005, call=0.05),
    Machine("heavy tails, 10 % of blocks disturbed", spikes=0.1, disturbed=0.1, process=0.005),
)


def simulate(machine: Machine, speed: float, rng: np.random.Generator) -> tuple[tuple[Timing, Timing], Sequence[float]]:
    """Return the timings of a reference and of a subject ``speed`` times as fast, and the canary's seconds."""
    processes, blocks = machine.processes, 2 * machine.rounds
    halves = processes * blocks
    time = (np.arange(2 * halves) + 0.5) / (2 * halves)
    drift = machine.slope * time + machine.step * (time >= 0.5)
    # Which half of a round its subject goes first in changes with the half, the round and the process.
    process, block = np.divmod(np.arange(halves), blocks)
    second = (process + block // 2 + block % 2) % 2
    positions = 2 * np.arange(halves)
    subjects = ((second, 1.0), (1 - second, speed))
    timings = [
        _timing(name, BASE / ratio * _noise(machine, drift[positions + turn], rng))
        for name, (turn, ratio) in zip("ab", subjects, strict=True)
    ]
    canary = np.exp(drift + rng.normal(0.0, 0.003, len(drift)))
    return (timings[0], timings[1]), canary.tolist()


def _noise(machine: Machine, drift: Vector, rng: np.random.Generator) -> Vector:
    """Return the factors of latency of one subject, ``float64 [processes, blocks, calls]``."""
    shape = (machine.processes, 2 * machine.rounds)
    log = drift.reshape(shape) + rng.normal(0.0, machine.process, (machine.processes, 1))
    log += _autocorrelated(machine.block, machine.memory, shape, rng)
    log += np.log(1.2) * (rng.random(shape) < machine.disturbed)
    calls = (*shape, CALLS)
    factors = np.exp(log[..., None] + rng.normal(0.0, machine.call, calls))
    return factors * np.where(rng.random(calls) < machine.spikes, 1.0 + rng.pareto(1.5, calls), 1.0)


def _autocorrelated(size: float, memory: float, shape: tuple[int, int], rng: np.random.Generator) -> Vector:
    """Return a stationary first-order autoregression along the last axis, of standard deviation ``size``."""
    values = rng.normal(0.0, size, shape)
    for index in range(1, shape[1]):
        values[:, index] = memory * values[:, index - 1] + np.sqrt(1.0 - memory**2) * values[:, index]
    return values


def _timing(name: str, values: Vector) -> Timing:
    blocks = tuple(tuple(tuple(block) for block in process) for process in values.tolist())
    return Timing(name, blocks, Interval(BASE, BASE, BASE), None, 0, 0.0)
