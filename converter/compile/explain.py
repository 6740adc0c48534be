"""From what a search found to its report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from onnx_lathe.benchmarks.report.model import (
    AppliedEdit,
    CandidateResult,
    Curve,
    DistillationScore,
    LeftAlone,
    MeasuredShape,
    OracleCheck,
    Report,
    Rung,
    Status,
)
from onnx_lathe.benchmarks.result import Comparison, Measurement
from onnx_lathe.benchmarks.verdict import compare
from onnx_lathe.converter.compile.front import front
from onnx_lathe.converter.compile.task import Found, Task, Tried
from onnx_lathe.converter.workload import Dims
from onnx_lathe.passes.run import Applied
from onnx_lathe.runtime.difference import GraphDifference, difference
from onnx_lathe.runtime.facts import read_facts
from onnx_lathe.runtime.profile import optimized_operators

_EXECUTED_UP_TO = 500_000_000
"""Bytes of a model up to which onnxruntime writes down its optimized graph, weights and all, to count its nodes."""


@dataclass(frozen=True)
class Story:
    """What a report tells besides the search.

    Attributes:
        title: What it is about.
        command: What makes it again.
        curves: How networks were trained.
        distillation: What distilling gained.
        edits: What passes did before the search.
        notes: What a rung is, by its name.
        source: The rung whose graph the passes changed into what ships; None for the original.
        manifest: What else the bundle's manifest records.
    """

    title: str
    command: str
    curves: tuple[Curve, ...] = ()
    distillation: tuple[DistillationScore, ...] = ()
    edits: tuple[AppliedEdit, ...] = ()
    notes: Mapping[str, str] = field(default_factory=dict[str, str])
    source: str | None = None
    manifest: Mapping[str, Any] = field(default_factory=dict[str, Any])


def explain(task: Task, found: Found, story: Story) -> Report:
    """Return the report of a finished search."""
    rungs = _rungs(task, found, story)
    names = [rung.name for rung in rungs]
    return Report(
        title=story.title,
        status=_status(found),
        verdict=_verdict(task, found),
        reason=_reason(found),
        rungs=rungs,
        original=task.original_name,
        metric=found.metric,
        certificates={name: found.certificates[name] for name in names if name in found.certificates},
        evaluation=found.evaluation if found.winner else None,
        shapes=tuple(
            _shape(task, found, dims, measurement)
            for dims, measurement in zip(task.dims, found.measurements, strict=True)
        ),
        distillation=story.distillation,
        curves=story.curves,
        candidates=_candidates(task, found),
        edits=(
            *story.edits,
            *(edit for item in _explained(found) for edit in edits(item.candidate.name, item.applied)),
        ),
        difference=_difference(task, found, story),
        rooflines=tuple(found.rooflines),
        method=(*_method(task), *found.notes),
        warnings=_warnings(found),
        command=story.command,
    )


def edits(target: str, applied: Sequence[Applied]) -> tuple[AppliedEdit, ...]:
    """Return what passes did to make ``target``, as the report tells it."""
    return tuple(
        AppliedEdit(
            target=target,
            request=step.request,
            changed=step.changed,
            seconds=step.seconds,
            left_alone=tuple(LeftAlone(**asdict(refusal)) for refusal in step.refused),
            checks=tuple(OracleCheck(**asdict(check)) for check in step.checks),
        )
        for step in applied
    )


def _models(task: Task, found: Found) -> dict[str, Path | None]:
    """Return the model of each rung by name, in the order of the ladder; None for what is no ONNX file."""
    outside = {rung.name: rung.model for rung in task.rungs if rung.model is None}
    inside = {rung.name: rung.model for rung in task.rungs if rung.model is not None}
    leader = {found.leader.candidate.name: found.leader.model} if found.leader else {}
    return {**outside, task.original_name: task.original, **inside, **leader}


def _rungs(task: Task, found: Found, story: Story) -> tuple[Rung, ...]:
    chosen = found.winner.candidate.name if found.winner else task.original_name
    rungs: list[Rung] = []
    for name, model in _models(task, found).items():
        note = story.notes.get(name, "")
        if model is None:
            missing = "not an ONNX file"
            rungs.append(Rung(name, note, missing={"file": missing, "accuracy": "that of the same network in ONNX"}))
            continue
        facts = read_facts(model)
        rung = Rung(name, note, name == chosen, facts.parameters, facts.file_bytes, dict(facts.operators))
        if name in (task.original_name, chosen) and task.provider == "cpu" and facts.file_bytes <= _EXECUTED_UP_TO:
            rung = replace(rung, executed=dict(optimized_operators(model, task.provider, task.threads)))
        rungs.append(rung)
    return tuple(rungs)


def _difference(task: Task, found: Found, story: Story) -> GraphDifference | None:
    """Return what ships differs in from the model that passes started from; None where the original ships."""
    if found.winner is None or found.winner.model is None:
        return None
    source = story.source or task.original_name
    model = _models(task, found)[source]
    assert model is not None, "passes start from an ONNX file"
    return difference(model, found.winner.model, (source, found.winner.candidate.name))


def _shape(task: Task, found: Found, dims: Dims, measurement: Measurement) -> MeasuredShape:
    models = {name: model for name, model in _models(task, found).items() if model is not None}
    macs = {name: read_facts(model, dims).macs for name, model in models.items()}
    return MeasuredShape(
        name=task.shape_name(dims),
        measurement=measurement,
        macs={name: count for name, count in macs.items() if count is not None},
        comparisons=_against_base(found.leader, models, measurement),
    )


def _against_base(leader: Tried | None, models: Mapping[str, Path], measurement: Measurement) -> tuple[Comparison, ...]:
    """Compare the leader with the model that its passes started from, where both were measured."""
    if leader is None:
        return ()
    base = next((name for name, model in models.items() if model == leader.candidate.base), None)
    if base is None or base in (leader.candidate.name, measurement.timings[0].name):
        return ()
    pair = (measurement.timing(base), measurement.timing(leader.candidate.name))
    return compare(pair, measurement.canary)


def _status(found: Found) -> Status:
    if found.winner is None:
        return "original kept"
    certificate = found.certificates.get(found.winner.candidate.name)
    if certificate is None:
        return "exact"
    return "certified" if certificate.certified else "uncertified"


def _verdict(task: Task, found: Found) -> str:
    if found.winner is None:
        return f"model.onnx is the {task.original_name}, unchanged: nothing that was tried pays on this machine."
    return f"model.onnx is {found.reason}"


def _reason(found: Found) -> str:
    """Return why the status is what it is, where the verdict does not say it already."""
    if found.winner is None:
        return found.reason
    certificate = found.certificates.get(found.winner.candidate.name)
    if certificate is None or certificate.certified:
        return ""
    needed = f"about {certificate.needed:,} samples" if certificate.needed else "a larger budget"
    return (
        f"The drop of {certificate.metric} is not certified within {100 * certificate.max_drop:g} points: its "
        f"95 % bound is {100 * certificate.bound:.2f} with {certificate.samples} samples, the part of the data that is "
        f"kept for this; it would take {needed} there."
    )


def _explained(found: Found) -> list[Tried]:
    """Return the forms whose passes are told one by one: the leader, and what could not be made."""
    leader = found.leader.candidate.name if found.leader else None
    return [item for item in found.tried if item.candidate.name == leader or not (item.speed or item.model)]


def _candidates(task: Task, found: Found) -> tuple[CandidateResult, ...]:
    points = {item.candidate.name for item in front(task, found.tried)}
    return tuple(_candidate(task, item, item.candidate.name in points) for item in found.tried)


def _candidate(task: Task, item: Tried, on_front: bool) -> CandidateResult:
    made = bool(item.model or item.speed or item.certificate)
    praise = "Picked by hand." if task.pick is not None else "The fastest that keeps its accuracy."
    return CandidateResult(
        name=item.candidate.name,
        status="kept" if item.refusal is None else "refused" if made else "failed",
        reason=item.refusal or praise,
        speed=tuple(each.value for each in item.speed),
        drop=item.certificate.drop if item.certificate else None,
        against=item.against,
        step=item.step,
        seconds=item.seconds,
        on_front=on_front,
        whole=item.whole,
    )


def _method(task: Task) -> tuple[str, ...]:
    threads = f"{task.threads} threads" if task.threads else "as many threads as the process may use cores"
    sentences = [f"Models run in plain onnxruntime sessions on {task.provider} with {threads} and default options."]
    if task.parts is not None:
        parts = task.parts
        sentences.append(
            f"{len(parts.calibrate)} samples calibrated, {len(parts.select)} chose between candidates, and "
            f"{len(parts.certify)} others judged what is shown here."
        )
    else:
        sentences.append("There was no data: only exact rewrites were tried, and accuracy was not judged.")
    return tuple(sentences)


def _warnings(found: Found) -> tuple[str, ...]:
    unsteady = [
        comparison
        for measurement in found.measurements
        for comparison in measurement.comparisons
        if comparison.verdict == "inconclusive"
    ]
    return tuple(f"{each.name} against {each.against}: inconclusive, {each.reason}." for each in unsteady)
