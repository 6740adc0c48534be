"""What a report says: plain frozen values, whole without the code that made them, and JSON.

Figures that a `Measurement` or a `Certificate` holds are not repeated: a rung finds its own there by its name.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar, Literal

from pydantic import ConfigDict

from onnx_lathe.benchmarks.evaluation import Evaluation
from onnx_lathe.benchmarks.limits import ModelRoofline
from onnx_lathe.benchmarks.result import Certificate, Comparison, Interval, Measurement
from onnx_lathe.benchmarks.schema import Versioned
from onnx_lathe.benchmarks.suite import Suite
from onnx_lathe.runtime.difference import GraphDifference

Status = Literal["certified", "uncertified", "exact", "original kept"]
"""Of what ships: its drop is certified within the budget; it is not; it is an exact rewrite, accuracy not judged; it is
the original, unchanged."""

Figure = Literal["parameters", "MACs", "file", "accuracy", "latency"]
"""A figure of a rung that may be missing."""


@dataclass(frozen=True)
class Rung:
    """A row of the ladder: one network in one form.

    Attributes:
        name: As the certificates and measurements call it.
        note: What it is, as a phrase.
        chosen: Whether it is what ships.
        parameters: Number of weights; None where unknown.
        file_bytes: Bytes of the model file and of the weights beside it.
        operators: Number of nodes by operator type; empty where unknown.
        missing: Why a figure is not there, as a phrase, by figure.
        executed: Number of nodes by operator type in the graph that onnxruntime makes of it; empty where unknown.
    """

    name: str
    note: str = ""
    chosen: bool = False
    parameters: int | None = None
    file_bytes: int | None = None
    operators: Mapping[str, int] = field(default_factory=dict[str, int])
    missing: Mapping[Figure, str] = field(default_factory=dict[Figure, str])
    executed: Mapping[str, int] = field(default_factory=dict[str, int])


@dataclass(frozen=True)
class MeasuredShape:
    """Everything that was measured at one input shape.

    Attributes:
        name: The shape, such as "batch 32".
        measurement: The run; its first subject is what the others' speed refers to.
        macs: Multiply-accumulate operations of one call, by rung.
        comparisons: Between particular rungs, besides each against the first.
    """

    name: str
    measurement: Measurement
    macs: Mapping[str, int] = field(default_factory=dict[str, int])
    comparisons: tuple[Comparison, ...] = ()


@dataclass(frozen=True)
class DistillationScore:
    """What distilling gained on one part of the data.

    Attributes:
        part: The part, such as "select".
        teacher: The teacher's metric on 0..1; None where it was not judged there.
        alone: The student's, trained on the labels alone.
        distilled: The student's, trained from the teacher.
    """

    part: str
    teacher: Interval | None
    alone: Interval
    distilled: Interval


@dataclass(frozen=True)
class Curve:
    """How a network was trained.

    Attributes:
        name: The network.
        losses: Mean training loss of each epoch.
        scores: The metric on 0..1 after each epoch.
        scored_on: The part of the data that the scores come from.
    """

    name: str
    losses: tuple[float, ...]
    scores: tuple[float, ...]
    scored_on: str


@dataclass(frozen=True)
class CandidateResult:
    """What became of a form that was tried.

    Attributes:
        name: The form.
        status: "kept" ships; "refused" was made and judged, and lost; "failed" could not be made.
        reason: Why.
        speed: How many times as fast as the reference in the screening, at each shape; empty where not measured.
        drop: Of the metric (0..1) on the part that candidates are chosen on; None where not judged.
        against: The form that it is a step from; None for one that the search began with.
        step: How many times as fast as that form, over all shapes; None where that was not measured.
        seconds: What its last pass took, checks included; None where it was not made.
        on_front: Whether no other form is both faster and nearer to the original.
        whole: Whether its speed is that of the whole network; else of two of its blocks.
    """

    name: str
    status: Literal["kept", "refused", "failed"]
    reason: str
    speed: tuple[float, ...] = ()
    drop: float | None = None
    against: str | None = None
    step: Interval | None = None
    seconds: float | None = None
    on_front: bool = False
    whole: bool = True


@dataclass(frozen=True)
class LeftAlone:
    """A node (or tensor) that a pass did not touch: its name, its operator type, and why."""

    node: str
    operator: str
    reason: str


@dataclass(frozen=True)
class OracleCheck:
    """One comparison of an edited graph with the graph that says what it must compute.

    Attributes:
        what: What was compared with what.
        scope: "whole model", or which part of it was run.
        measured: The worst figure found.
        limit: The limit in the same unit.
        unit: "relative error", "steps" (both at most the limit) or "dB" (at least the limit).
        where: The output or node of that figure.
    """

    what: str
    scope: str
    measured: float
    limit: float
    unit: str
    where: str


@dataclass(frozen=True)
class AppliedEdit:
    """What one pass did.

    Attributes:
        target: The rung or candidate that it made.
        request: The pass with its options, as on the command line.
        changed: Whether the graph differs afterwards.
        seconds: Planning, editing, writing and checking together.
        left_alone: What was not touched.
        checks: The comparisons with its oracle; empty where nothing changed.
    """

    target: str
    request: str
    changed: bool
    seconds: float
    left_alone: tuple[LeftAlone, ...] = ()
    checks: tuple[OracleCheck, ...] = ()


@dataclass(frozen=True)
class Report(Versioned):
    """The whole report.

    Attributes:
        title: What it is about.
        status: Of what ships.
        verdict: What ships and what it gained, in a sentence or two.
        reason: Why that status.
        rungs: The ladder, from where it starts to what ships.
        original: The rung that accuracy was judged against.
        metric: The name of the metric; None where accuracy was not judged.
        certificates: How each rung compares with the original on data that nothing was chosen on, by rung.
        evaluation: What else differs between the original and what ships, on the same data; None where that is
            not known.
        shapes: The measurements; empty where nothing was measured.
        distillation: What distilling gained; empty where nothing was distilled.
        curves: Of each network that was trained.
        candidates: Every form tried, in order.
        edits: What each pass did, in order.
        difference: What the graph that ships differs in from the one that its passes started from; None where the
            original ships.
        rooflines: How near the operators of models that were profiled came to the machine's limits.
        history: What was found here before and now, the oldest first; fewer than two are no history.
        method: How it was measured, a sentence each, besides what the measurements themselves tell.
        warnings: What the reader must know before relying on a figure.
        command: What makes this report again.
    """

    SCHEMA: ClassVar[str] = "onnx-lathe/report/2"
    REMEDY: ClassVar[str] = "Make the report again."

    # A comparison in dB is infinite where two graphs agree to the bit, and JSON has no infinity.
    __pydantic_config__ = ConfigDict(ser_json_inf_nan="strings")

    title: str
    status: Status
    verdict: str
    reason: str
    rungs: tuple[Rung, ...]
    original: str
    metric: str | None = None
    certificates: Mapping[str, Certificate] = field(default_factory=dict[str, Certificate])
    evaluation: Evaluation | None = None
    shapes: tuple[MeasuredShape, ...] = ()
    distillation: tuple[DistillationScore, ...] = ()
    curves: tuple[Curve, ...] = ()
    candidates: tuple[CandidateResult, ...] = ()
    edits: tuple[AppliedEdit, ...] = ()
    difference: GraphDifference | None = None
    rooflines: tuple[ModelRoofline, ...] = ()
    history: tuple[Suite, ...] = ()
    method: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()
    command: str = ""

    @property
    def chosen(self) -> Rung | None:
        """The rung that ships; None where no rung is marked."""
        return next((rung for rung in self.rungs if rung.chosen), None)
