"""What a search is asked for, and what it finds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from onnx_lathe.benchmarks.evaluation import Evaluation
from onnx_lathe.benchmarks.limits import ModelRoofline
from onnx_lathe.benchmarks.result import Certificate, Measurement
from onnx_lathe.benchmarks.subject import Subject
from onnx_lathe.converter.compile.space import Candidate
from onnx_lathe.passes.run import Applied
from onnx_lathe.runtime.samples import Samples

Dims = Mapping[str, int]
"""Sizes of symbolic dimensions, such as ``{"batch": 8, "seq": 128}``."""


@dataclass(frozen=True)
class Parts:
    """The data, cut so that nothing is judged on what it was fitted to.

    Attributes:
        calibrate: What quantization and pruning see.
        select: What candidates are chosen on.
        certify: What the chosen one is judged on, once.
    """

    calibrate: Samples
    select: Samples
    certify: Samples


@dataclass(frozen=True)
class Rung:
    """Something judged and measured beside original and winner, for the report.

    Attributes:
        name: How the report calls it.
        model: Its ``.onnx`` file; None for what does not run on onnxruntime.
        subject: How to start it, where it is not an ``.onnx`` file; its argument ``feeds`` is filled in.
    """

    name: str
    model: Path | None = None
    subject: Subject | None = None


@dataclass(frozen=True)
class Task:
    """What to search for.

    Attributes:
        original: What candidates are judged against and must be faster than.
        original_name: How the report calls it.
        candidates: The forms to try.
        parts: The data; None where there is none, and then candidates must be exact.
        metric: A metric of `onnx_lathe.benchmarks.accuracy`; None for the one that fits the data.
        max_drop: How much of the metric (0..1) may be lost.
        dims: The shapes to be fast at; all count alike.
        provider: Where the models run.
        threads: Threads of a session; None for all allowed cores.
        time_budget: Seconds that measuring may take in all.
        rungs: What else the final measurement takes in.
        folder: Where stages keep their results.
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


@dataclass(frozen=True)
class Tried:
    """What became of a candidate.

    Attributes:
        candidate: The form.
        refusal: Why it is not shipped; None for the winner (and, during the search, for those still in the race).
        model: Its file, where it could be made.
        applied: What each pass did.
        certificate: How it compares with the original on the select part.
        speed: How many times as fast as the original, at each shape, in the screening.
    """

    candidate: Candidate
    refusal: str | None = None
    model: Path | None = None
    applied: Sequence[Applied] = ()
    certificate: Certificate | None = None
    speed: Sequence[float] = ()


@dataclass(frozen=True)
class Found:
    """What a search found.

    Attributes:
        winner: The candidate to ship; None where the original is.
        leader: The candidate that went into the final measurement: the winner, or what came nearest; None where none
            was left.
        reason: Why that one.
        tried: Every candidate, in the order of the task.
        metric: The name of the metric; None where there was no data.
        certificates: Original, rungs and leader on the certify part, by name; empty where there was no data.
        measurements: The final measurement at each shape: original, rungs and leader.
        evaluation: What else differs between original and leader on the certify part; None where there was no data or
            no leader.
        rooflines: How near the original and the leader come to what the machine could do; empty off the CPU.
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
