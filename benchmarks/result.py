"""What a measurement found: immutable, JSON-able, with raw samples and the environment.

Vocabulary: a *value* is the latency of one call; a *block* some values in a row of one subject; a *process* a
fresh worker; a *run* everything that one `measure` did.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal, Self, cast

from pydantic import TypeAdapter, ValidationError

from onnx_lathe.runtime.errors import InputError

SCHEMA = "onnx-lathe/measurement/1"

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
        peak_memory: Peak resident bytes of the worker process, imports included (the largest of its processes).
        start_seconds: Time to prepare the subject in a fresh process, imports excluded (median of its processes).
    """

    name: str
    blocks: tuple[tuple[tuple[float, ...], ...], ...]
    p50: Interval
    p90: Interval | None
    peak_memory: int
    start_seconds: float


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
class Measurement:
    """One interleaved run over several subjects.

    Attributes:
        timings: By order of the subjects.
        comparisons: Each subject against the first.
        canary: Seconds of a fixed kernel in each round: how steady the machine was.
        environment: CPU, memory, versions, load (`onnx_lathe.benchmarks.environment`).
    """

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

    def to_json(self) -> str:
        """Return the measurement as JSON with its schema and version; `from_json` reads it."""
        return json.dumps({"schema": SCHEMA, **asdict(self)}, allow_nan=False)

    @classmethod
    def from_json(cls, text: str, source: str = "measurement") -> Self:
        """Read what `to_json` wrote.

        Args:
            text: The JSON.
            source: Where it comes from, for messages.

        Raises:
            InputError: It is not JSON, of another schema, or lacks something.
        """
        try:
            content: Any = json.loads(text)
        except json.JSONDecodeError as error:
            raise _unreadable(source, f"no JSON ({error})") from None
        schema = cast("dict[str, Any]", content).pop("schema", None) if isinstance(content, dict) else None
        if schema != SCHEMA:
            raise _unreadable(source, f"schema {schema!r}")
        try:
            return TypeAdapter(cls).validate_python(content)
        except ValidationError as error:
            first = error.errors()[0]
            place = ".".join(str(part) for part in first["loc"])
            raise _unreadable(source, f"{place}: {first['msg']}") from None


def _unreadable(source: str, got: str) -> InputError:
    return InputError(source, got=got, expected=f"a measurement of schema {SCHEMA!r}", mend="Measure again.")


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
