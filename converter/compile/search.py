"""The search: explore the forms, confirm the fastest in fresh processes, certify it.

Decisions fall on the select part of the data; the certify part is looked at once, for the leader alone. Every step is a
stage of the cache: a search that was interrupted goes on where it stopped, and one that ended is not made again.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from onnx_lathe.benchmarks.evaluation import Evaluation
from onnx_lathe.benchmarks.limits import ModelRoofline
from onnx_lathe.benchmarks.measure import FINAL
from onnx_lathe.benchmarks.peaks import measure_peaks
from onnx_lathe.benchmarks.result import Certificate, Comparison, Measurement
from onnx_lathe.benchmarks.verdict import EQUAL
from onnx_lathe.converter.compile.arena import arena, random_answer
from onnx_lathe.converter.compile.build import build
from onnx_lathe.converter.compile.certify import Judge, judged
from onnx_lathe.converter.compile.clock import Clock
from onnx_lathe.converter.compile.explore import LEAST_STEP, Explored, Explorer, gain
from onnx_lathe.converter.compile.front import pick
from onnx_lathe.converter.compile.race import side_by_side
from onnx_lathe.converter.compile.task import Found, Rung, Task, Tried
from onnx_lathe.converter.progress import Progress
from onnx_lathe.converter.roofline import roofline
from onnx_lathe.converter.stages import model_digest
from onnx_lathe.converter.workload import batches_to_time
from onnx_lathe.runtime.errors import MeasurementError

_CODE = ("onnx_lathe.passes", "onnx_lathe.runtime", "onnx_lathe.benchmarks", "onnx_lathe.converter")
_ROOFLINE_CODE = ("onnx_lathe.benchmarks", "onnx_lathe.converter.roofline", "onnx_lathe.runtime")
_FINAL_SHARE = 0.4
"""Share of the time budget that the final measurement may take."""


@dataclass(frozen=True)
class Final:
    """What the leader was seen to do in fresh processes and on the certify part.

    Attributes:
        measurements: At each shape.
        certificates: By name.
        evaluation: Of the leader; None where there is no data.
        refusal: Why it could not even be measured; None where it was.
    """

    measurements: Sequence[Measurement]
    certificates: Mapping[str, Certificate]
    evaluation: Evaluation | None = None
    refusal: str | None = None


def search(task: Task, progress: Progress) -> Found:
    """Find the fastest candidate that keeps its accuracy; the original where none does.

    Raises:
        LatheError: The original itself cannot be run, or not on these inputs.
        InputError: The form to pick is none of those that were tried.
    """
    explored = _explored(task, progress)
    tried = list(explored.tried)
    leader = _leader(task, explored, progress)
    final = _final(task, leader, progress)
    refusal = _final_refusal(task, leader, final)
    if leader is not None:
        tried = [leader if item.candidate.name == leader.candidate.name else item for item in tried]
    tried = [_conclude(task, item, leader, refusal) for item in tried]
    winner = next((item for item in tried if leader and item.candidate == leader.candidate and not item.refusal), None)
    why_none = " ".join((refusal or "No candidate was left.", *explored.notes))
    reason = _praise(task, winner, final) if winner else why_none
    metric = next((each.metric for each in final.certificates.values()), None)
    return Found(
        winner,
        leader,
        reason,
        tried,
        metric,
        final.certificates,
        final.measurements,
        final.evaluation,
        _rooflines(task, leader, progress),
        explored.notes,
    )


def _explored(task: Task, progress: Progress) -> Explored:
    """Return what the exploration finds, or what it found before."""
    clock = Clock(task.time_budget if task.axes else math.inf)

    def make(folder: Path) -> Explored:
        del folder
        if doubt := random_answer(task):
            return Explored((), notes=(doubt,))
        where = arena(task)
        found = Explorer(task, where.model, clock, progress).run()
        return replace(found, notes=(*found.notes, *where.notes))

    parts = task.parts
    depends = {
        "original": model_digest(task.original),
        "candidates": [[each.name, model_digest(each.base), each.passes] for each in task.candidates],
        "axes": [str(axis) for axis in task.axes],
        "visited": list(task.visited),
        "parts": [each.digest() for each in (parts.calibrate, parts.select)] if parts else None,
        "measured": task.samples_digest,
        "metric": task.metric,
        "max_drop": task.max_drop,
        "dims": [dict(dims) for dims in task.dims],
        "weights": list(task.weights),
        "provider": task.provider,
        "threads": task.threads,
        "time_budget": task.time_budget,
    }
    return task.cache.stage("search", task.original_name, depends, _CODE, make, Explored).value


def _leader(task: Task, explored: Explored, progress: Progress) -> Tried | None:
    """Return the form to confirm, made whole, even where the cache has dropped it since."""
    name = next(iter(explored.finalists), None) if task.pick is None else pick(task, explored.tried)
    if name is None:
        return None
    tried = next(item for item in explored.tried if item.candidate.name == name)
    if tried.model is not None and tried.model.is_file():
        return tried
    built = build(task, tried.candidate, progress)
    return replace(tried, model=built.model, applied=built.applied, refusal=built.refusal)


def _final(task: Task, leader: Tried | None, progress: Progress) -> Final:
    """Measure and certify the original, the rungs and the leader."""
    rungs = list(task.rungs)
    if leader is not None and leader.model and leader.candidate.name not in {rung.name for rung in rungs}:
        rungs.append(Rung(leader.candidate.name, leader.model))
    try:
        measurements = _measure(task, rungs, progress)
    except MeasurementError as error:
        if leader is None or error.where != leader.candidate.name or rungs == list(task.rungs):
            raise
        return replace(_final(task, None, progress), refusal=f"It could not be measured: {error}")
    if task.parts is None:
        return Final(measurements, {})
    judge = Judge(task.original, task.parts.certify, task.metric, task.max_drop, task.provider, task.threads)
    certificates: dict[str, Certificate] = {}
    evaluation = None
    for rung in (Rung(task.original_name, task.original), *rungs):
        if rung.model is None:
            continue
        beyond = leader is not None and rung.name == leader.candidate.name
        found = judged(task, judge, rung.name, rung.model, progress, beyond=beyond)
        certificates[rung.name] = found.certificate
        evaluation = found.evaluation or evaluation
    return Final(measurements, certificates, evaluation)


def _measure(task: Task, rungs: Sequence[Rung], progress: Progress) -> Sequence[Measurement]:
    budget = task.time_budget * _FINAL_SHARE / len(task.dims)
    effort = replace(FINAL, time_budget=min(budget, FINAL.time_budget), most_time=min(budget, FINAL.most_time))
    digests = [model_digest(rung.model) if rung.model else str(rung.subject) for rung in rungs]
    digests = [model_digest(task.original), *digests]
    return side_by_side(task, "measure", task.original, rungs, digests, effort, progress)


def _rooflines(task: Task, leader: Tried | None, progress: Progress) -> Sequence[ModelRoofline]:
    """Return how near the original and the leader come to what the machine could do at the first shape."""
    models = {task.original_name: task.original}
    if leader is not None and leader.model is not None:
        models[leader.candidate.name] = leader.model
    if task.provider != "cpu":
        return ()

    def make(folder: Path) -> tuple[ModelRoofline, ...]:
        del folder
        progress(0, 1, "profile")
        peaks = measure_peaks(task.threads)
        feeds = batches_to_time(task.original, task.samples, task.dims[0])[0]
        return tuple(
            roofline(name, model, feeds, task.provider, task.threads, peaks=peaks) for name, model in models.items()
        )

    depends = {
        "models": [[name, model_digest(model)] for name, model in models.items()],
        "dims": dict(task.dims[0]),
        "samples": task.samples_digest,
        "threads": task.threads,
    }
    name = task.original_name
    return task.cache.stage("roofline", name, depends, _ROOFLINE_CODE, make, tuple[ModelRoofline, ...]).value


def _final_refusal(task: Task, leader: Tried | None, final: Final) -> str | None:
    """Return why the leader is not shipped after all; None where it is."""
    if leader is None:
        return "No candidate keeps its accuracy and is faster."
    if leader.model is None or final.refusal:
        return final.refusal or leader.refusal
    name = leader.candidate.name
    if task.pick is not None:
        return None
    comparisons = [measurement.speed(name) for measurement in final.measurements]
    for dims, comparison in zip(task.dims, comparisons, strict=True):
        doubtful = comparison.verdict == "inconclusive" and comparison.speed.low < 1.0 - EQUAL
        if comparison.verdict == "slower" or doubtful:
            return (
                f"In fresh processes at {task.shape_name(dims)} it may be slower: {_speed(comparison)}, "
                f"{comparison.reason}."
            )
    mean = task.mean_speed([comparison.speed for comparison in comparisons])
    if mean.low < LEAST_STEP or all(comparison.verdict != "faster" for comparison in comparisons):
        where = "; ".join(
            f"at {task.shape_name(dims)} {_speed(comparison)}, {comparison.reason}"
            for dims, comparison in zip(task.dims, comparisons, strict=True)
        )
        return f"In fresh processes it is not faster beyond noise: {where}."
    certificate = final.certificates.get(name)
    if certificate is not None and certificate.drop > task.max_drop:
        return (
            f"On the certify part it loses {100 * certificate.drop:.2f} points of {certificate.metric}; "
            f"{100 * task.max_drop:g} are allowed."
        )
    return None


def _conclude(task: Task, item: Tried, leader: Tried | None, refusal: str | None) -> Tried:
    if leader is not None and item.candidate == leader.candidate:
        return replace(item, refusal=refusal)
    if item.refusal is not None:
        return item
    if leader is None:
        return replace(item, refusal=refusal)
    if task.pick is not None:
        return replace(item, refusal=f"{leader.candidate.name} was picked.")
    return replace(
        item,
        refusal=f"{leader.candidate.name} is faster: {gain(task, leader.speed):.2f}x, "
        f"this one {gain(task, item.speed):.2f}x.",
    )


def _praise(task: Task, winner: Tried, final: Final) -> str:
    name = winner.candidate.name
    speeds = ", ".join(
        f"{_speed(measurement.speed(name))} at {task.shape_name(dims)}"
        for dims, measurement in zip(task.dims, final.measurements, strict=True)
    )
    certificate = final.certificates.get(name)
    judged = "accuracy was not judged (no data), the rewrite is exact"
    if certificate is not None:
        state = "certified" if certificate.certified else "not certified"
        judged = (
            f"{certificate.metric} drops by {100 * certificate.drop:.2f} points, {state} within "
            f"{100 * task.max_drop:g} (95 % bound {100 * certificate.bound:.2f})"
        )
    picked = "; picked by hand" if task.pick is not None else ""
    return f"{name}: {speeds}; {judged}{picked}."


def _speed(comparison: Comparison) -> str:
    speed = comparison.speed
    return f"{speed.value:.2f}x [{speed.low:.2f}, {speed.high:.2f}] the speed of {comparison.against}"
