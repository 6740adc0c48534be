"""What a measurement found: immutable, JSON-able, with raw samples and the environment.

Vocabulary: a *value* is the latency of one call; a *block* some values in a row of one subject; a *process* a
fresh worker; a *run* everything that one `measure` did.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from onnx_lathe.benchmarks.schema import Versioned

Verdict = Literal["faster", "slower", "no difference", "inconclusive"]


@dataclass(frozen=True)
class Interval:
    """An estimate with its two-sided 95 % interval (``low <= value <= high``)."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Timing:
    """What was seen of one subject.

    Attributes:
        name: The subject.
        blocks: Latencies in seconds, ``blocks[process][block][value]``.
        p50: Median latency in seconds, interval by order statistics.
        p90: 90th percentile in seconds; None where there are fewer values than it needs (64).
        p95: 95th (130).
        p99: 99th (662).
        p999: 99.9th (6,636).
        peak_memory: Peak resident bytes of the worker process, imports included (the largest of its processes).
        start_seconds: Time to prepare the subject in a fresh process, imports excluded: to create its session
            (median of its processes).
        cold_start_seconds: From the start of the process to the end of the first call (median; None where it was not
            seen).
    """

    name: str
    blocks: tuple[tuple[tuple[float, ...], ...], ...]
    p50: Interval
    p90: Interval | None
    peak_memory: int
    start_seconds: float
    cold_start_seconds: float | None = None
    p95: Interval | None = None
    p99: Interval | None = None
    p999: Interval | None = None


@dataclass(frozen=True)
class Comparison:
    """How fast a subject is against another, from paired blocks of one interleaved run.

    Attributes:
        name: The subject judged.
        against: The subject it is compared with.
        speed: Ratio of latencies ``against / name``: 2 means twice as fast. Hodges-Lehmann estimate over block pairs.
        verdict: In words: "faster" and "slower" lie beyond noise; "inconclusive" where the machine was not steady.
        reason: Why that verdict.
    """

    name: str
    against: str
    speed: Interval
    verdict: Verdict
    reason: str


@dataclass(frozen=True)
class Measurement(Versioned):
    """One interleaved run over several subjects.

    Attributes:
        timings: By order of the subjects.
        comparisons: Each subject against the first.
        canary: Seconds of a fixed kernel before each block: how steady the machine was.
        environment: CPU, memory, versions, load (`onnx_lathe.benchmarks.environment`).
    """

    SCHEMA: ClassVar[str] = "onnx-lathe/measurement/2"

    timings: tuple[Timing, ...]
    comparisons: tuple[Comparison, ...]
    canary: tuple[float, ...]
    environment: Mapping[str, Any]

    def timing(self, name: str) -> Timing:
        """Return the timing of the subject called ``name``."""
        return next(timing for timing in self.timings if timing.name == name)

    def speed(self, name: str) -> Comparison:
        """Return the comparison of the subject called ``name`` with the first."""
        return next(comparison for comparison in self.comparisons if comparison.name == name)


@dataclass(frozen=True)
class Certificate:
    """How much worse a candidate is than the original on the same samples.

    Attributes:
        metric: What was judged, such as "accuracy" or "argmax_agreement".
        original: The original's metric on 0..1 with its interval.
        candidate: The candidate's.
        drop: ``metric(original) - metric(candidate)``, paired by sample.
        bound: One-sided 95 % upper bound of the drop.
        max_drop: The budget.
        samples: How many samples were judged.
        needed: How many samples would be needed to certify this budget at the drop found (None: none would
            do).
        losses: Samples that the original had right and the candidate wrong (None where the metric has no
            right and wrong).
        gains: The reverse.
        method: How the bound was computed.
    """

    metric: str
    original: Interval
    candidate: Interval
    drop: float
    bound: float
    max_drop: float
    samples: int
    needed: int | None
    losses: int | None
    gains: int | None
    method: str

    @property
    def certified(self) -> bool:
        """Whether the bound is within the budget."""
        return self.bound <= self.max_drop
