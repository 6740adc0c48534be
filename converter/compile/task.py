"""What a search is asked for, and what it finds."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from onnx_lathe.benchmarks.evaluation import Evaluation
from onnx_lathe.benchmarks.limits import ModelRoofline
from onnx_lathe.benchmarks.result import Certificate, Interval, Measurement
from onnx_lathe.benchmarks.subject import Subject
from onnx_lathe.converter.compile.cache import Cache
from onnx_lathe.converter.compile.forms import Axis, Candidate
from onnx_lathe.converter.workload import Dims, as_they_come
from onnx_lathe.passes.run import Applied
from onnx_lathe.runtime.samples import Samples

CPU = "cpu"
"""The provider that every onnxruntime has, and that runs every model."""


@dataclass(frozen=True)
class Parts:
    """The data, cut so that nothing is judged on what it was fitted to.

    Attributes:
        calibrate: What quantization and pruning see.
        select: What candidates are chosen on.
        certify: What decides over the chosen one, once.
    """

    calibrate: Samples
    select: Samples
    certify: Samples

    @cached_property
    def calibrate_digest(self) -> str:
        """The digest of what is calibrated on."""
        return self.calibrate.digest()


@dataclass(frozen=True)
class Rung:
    """Something judged and measured beside original and winner, for the report.

    Attributes:
        name: How the report calls it.
        model: Its ``.onnx`` file; None for what does not run on onnxruntime.
        subject: How to start it, where it is not an ``.onnx`` file; its argument ``feeds`` is filled in: a file, or a
            list of several that one call runs in turn.
        provider: Where it runs; None for where the task's models do.
    """

    name: str
    model: Path | None = None
    subject: Subject | None = None
    provider: str | None = None


@dataclass(frozen=True)
class Task:
    """What to search for.

    Attributes:
        original: What candidates are judged against and must be faster than.
        original_name: How the report calls it.
        candidates: The forms to begin with.
        axes: Along which the best of them are varied, in the order of their passes; none where only these are tried.
        visited: The names of the axes to vary, in turn.
        parts: The data; None where there is none, and then candidates must be exact.
        metric: A metric of `onnx_lathe.benchmarks.accuracy`; None for the one that fits the data.
        max_drop: How much of the metric (0..1) may be lost.
        dims: The shapes to be fast at; an empty one is that of the data as they come.
        weights: How much each of them counts; all alike where there are none.
        measured: What is run to measure, in its own batches; the select part where there is nothing else.
        provider: Where the models run.
        threads: Threads of a session; None for all allowed cores.
        time_budget: Seconds that the search may take in all: exploring up to `WHOLE_SHARE` of them, and confirming what
            that leaves; neither cuts short a pass at work, or the three fresh processes of the first form to confirm.
        rungs: What else the final measurement takes in.
        pick: The form to ship whatever is faster; None for the fastest.
        folder: Where what belongs to the output is kept.
        cache_folder: Where what is made and measured is kept; in ``folder`` where none is named.
        not_at_home: Why ``provider`` does not run the original, whose answers and times are then those of the CPU; None
            where it does.
    """

    original: Path
    candidates: Sequence[Candidate]
    parts: Parts | None
    metric: str | None
    max_drop: float
    dims: Sequence[Dims]
    provider: str
    threads: int | None
    time_budget: float
    folder: Path
    original_name: str = "original"
    rungs: Sequence[Rung] = field(default_factory=tuple[Rung, ...])
    axes: Sequence[Axis] = ()
    visited: Sequence[str] = ()
    weights: Sequence[float] = ()
    measured: Samples | None = None
    pick: str | None = None
    cache_folder: Path | None = None
    not_at_home: str | None = None

    @property
    def home(self) -> str:
        """Where the original runs."""
        return self.provider if self.not_at_home is None else CPU

    @property
    def cache(self) -> Cache:
        """What is made and measured for it."""
        return Cache(self.cache_folder or self.folder / "cache")

    @property
    def notes(self) -> tuple[str, ...]:
        """What is to be known of where the models run."""
        if self.not_at_home is None:
            return ()
        return (
            f"Forms run on {self.provider}; the {self.original_name} does not, and was judged and timed as plain "
            f"onnxruntime runs it on the CPU. {self.not_at_home}",
        )

    @property
    def samples(self) -> Samples | None:
        """What is run to measure; None for random values."""
        return self.measured or (self.parts.select if self.parts else None)

    @cached_property
    def samples_digest(self) -> str | None:
        """The digest of what is run to measure; None for random values."""
        return self.samples.digest() if self.samples else None

    def shape_name(self, dims: Dims) -> str:
        """Return a shape in words, such as "batch 8, seq 128"."""
        if dims:
            return ", ".join(f"{name} {size}" for name, size in dims.items())
        batches = as_they_come(self.samples)
        return f"{len(batches)} batches of the data as they come" if len(batches) > 1 else "the model's own shape"

    def mean_speed(self, speeds: Sequence[Interval]) -> Interval:
        """Return the geometric mean of the speeds at each shape, by weight, with its interval.

        The shapes are measured one after the other, so that their errors are independent and add in squares.
        """
        weights = self.weights or [1.0] * len(speeds)
        shares = [weight / sum(weights) for weight in weights]
        parts = [[math.log(part) for part in (each.value, each.low, each.high)] for each in speeds]
        centre = sum(share * part[0] for share, part in zip(shares, parts, strict=True))
        below, above = (
            math.sqrt(sum((share * (part[side] - part[0])) ** 2 for share, part in zip(shares, parts, strict=True)))
            for side in (1, 2)
        )
        return Interval(math.exp(centre), math.exp(centre - below), math.exp(centre + above))


@dataclass(frozen=True)
class Tried:
    """What became of a candidate.

    Attributes:
        candidate: The form.
        refusal: Why it is not shipped; None for the winner (and, during the search, for those still in the race).
        model: Its file, where it was made whole.
        applied: What each pass did, where it was made whole.
        certificate: How it compares with the original on the select part.
        speed: How many times as fast as the original, at each shape, in the screening.
        whole: Whether that was measured on whole networks; else on two of their blocks.
        against: The form that it differs from along one axis; None for one that the search began with.
        step: How many times as fast as that one, over all shapes.
        seconds: What it took to make it, without what another form made before.
    """

    candidate: Candidate
    refusal: str | None = None
    model: Path | None = None
    applied: Sequence[Applied] = ()
    certificate: Certificate | None = None
    speed: Sequence[Interval] = ()
    whole: bool = True
    against: str | None = None
    step: Interval | None = None
    seconds: float | None = None


@dataclass(frozen=True)
class Found:
    """What a search found.

    Attributes:
        winner: The candidate to ship; None where the original is.
        leader: The candidate that went into the final measurement: the winner, or what came nearest; None where none
            was left.
        reason: Why that one.
        tried: Every candidate, in the order in which they were tried.
        metric: The name of the metric; None where there was no data.
        certificates: Original, rungs and leader on the certify part, by name; empty where there was no data.
        measurements: The final measurement at each shape: original, rungs and leader.
        evaluation: What else differs between original and leader on the certify part; None where there was no data or
            no leader.
        rooflines: How near the original and the leader come to what the machine could do; empty off the CPU.
        notes: What is to be known of the search, a sentence each.
    """

    winner: Tried | None
    leader: Tried | None
    reason: str
    tried: Sequence[Tried]
    metric: str | None
    certificates: Mapping[str, Certificate]
    measurements: Sequence[Measurement]
    evaluation: Evaluation | None = None
    rooflines: Sequence[ModelRoofline] = ()
    notes: Sequence[str] = ()


def shipped_provider(task: Task, found: Found) -> str:
    """Return where what ships runs: a form where it was measured, the original where that runs."""
    return task.provider if found.winner else task.home
