"""The search: build the candidates, drop what loses accuracy, measure the rest, confirm the winner, certify it.

Decisions fall on the select part of the data; the certify part is looked at once, for the winner alone. Every step is a
stage (`onnx_lathe.converter.stages`): a search that was interrupted goes on where it stopped.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from onnx_lathe.benchmarks.evaluation import Evaluation
from onnx_lathe.benchmarks.limits import ModelRoofline
from onnx_lathe.benchmarks.measure import FINAL, SCREEN, Effort, measure
from onnx_lathe.benchmarks.peaks import measure_peaks
from onnx_lathe.benchmarks.result import Certificate, Comparison, Measurement
from onnx_lathe.benchmarks.subject import Subject
from onnx_lathe.converter.compile.certify import Judge
from onnx_lathe.converter.compile.mixed import mixed_candidates
from onnx_lathe.converter.compile.space import Candidate, unfit
from onnx_lathe.converter.compile.task import Dims, Found, Rung, Task, Tried
from onnx_lathe.converter.progress import Progress
from onnx_lathe.converter.roofline import roofline
from onnx_lathe.converter.stages import model_digest, run_stage, stage_name
from onnx_lathe.converter.workload import batch_to_time, plain_subject
from onnx_lathe.passes import registry
from onnx_lathe.passes import run as passes_run
from onnx_lathe.passes.run import Applied
from onnx_lathe.runtime import tensors
from onnx_lathe.runtime.errors import ModelFileError, OracleError, UnsupportedModelError

_PASSES_CODE = ("onnx_lathe.passes", "onnx_lathe.runtime")
_MEASURE_CODE = ("onnx_lathe.benchmarks", "onnx_lathe.runtime")
_ROOFLINE_CODE = ("onnx_lathe.benchmarks", "onnx_lathe.converter.roofline", "onnx_lathe.runtime")
_SCREEN_SHARE = 0.4
"""Share of the time budget that the screening may take; the rest confirms the winner."""


def search(task: Task, progress: Progress) -> Found:
    """Find the fastest candidate that keeps its accuracy; the original where none does."""
    tried = _without_twins([_build(task, candidate, progress) for candidate in task.candidates])
    tried, metric = _judge_on_select(task, tried, progress)
    tried = _screen(task, tried, progress)
    leader = max((item for item in tried if item.refusal is None), key=_gain, default=None)
    measurements = _measure_final(task, leader, progress)
    certificates, evaluation = _certify(task, leader, progress)
    refusal = _final_refusal(task, leader, measurements, certificates)
    tried = [_conclude(item, leader, refusal) for item in tried]
    winner = next((item for item in tried if item.refusal is None), None)
    reason = _praise(task, winner, measurements, certificates) if winner else (refusal or "No candidate was left.")
    rooflines = _rooflines(task, leader, progress)
    return Found(winner, leader, reason, tried, metric, certificates, measurements, evaluation, rooflines)


def _build(task: Task, candidate: Candidate, progress: Progress) -> Tried:
    if not candidate.passes:
        return Tried(candidate, model=candidate.base)
    if reason := unfit(candidate, task.provider):
        return Tried(candidate, refusal=reason)
    progress(0, 1, f"apply {candidate.passes}")
    requests = registry.parse(candidate.passes)
    calibrate = task.parts.calibrate if task.parts else None

    def make(folder: Path) -> tuple[Applied, ...]:
        return passes_run.apply(candidate.base, requests, folder / "model.onnx", samples=calibrate)

    depends = {
        "model": model_digest(candidate.base),
        "passes": registry.spell(requests),
        "samples": calibrate.digest() if calibrate else None,
    }
    name = stage_name("apply", candidate.name)
    try:
        stage = run_stage(task.folder, name, depends, _PASSES_CODE, make, tuple[Applied, ...])
    except (UnsupportedModelError, OracleError, ModelFileError) as error:
        return Tried(candidate, refusal=str(error))
    if not any(applied.changed for applied in stage.value):
        return Tried(candidate, refusal="The passes change nothing in this graph.", applied=stage.value)
    return Tried(candidate, model=stage.folder / "model.onnx", applied=stage.value)


def _without_twins(tried: Sequence[Tried]) -> list[Tried]:
    """Refuse every candidate whose file an earlier one has too: it would win or lose by chance."""
    names: dict[str, str] = {}
    kept: list[Tried] = []
    for item in tried:
        if item.model is None:
            kept.append(item)
            continue
        first = names.setdefault(model_digest(item.model), item.candidate.name)
        twin = first != item.candidate.name
        kept.append(replace(item, refusal=f"It is the same graph as {first}.") if twin else item)
    return kept


def _judge_on_select(task: Task, tried: Sequence[Tried], progress: Progress) -> tuple[list[Tried], str | None]:
    """Refuse what loses too much, and add mixed forms where all of a kind do."""
    if task.parts is None:
        return list(tried), None
    judge = Judge(task.original, task.parts.select, task.metric, task.max_drop, task.provider, task.threads)
    judged = _judge_each(task, tried, judge, progress)
    mixed = [_build(task, candidate, progress) for candidate in mixed_candidates(task, judged, judge, progress)]
    return judged + _judge_each(task, mixed, judge, progress), judge.metric


def _judge_each(task: Task, tried: Sequence[Tried], judge: Judge, progress: Progress) -> list[Tried]:
    judged: list[Tried] = []
    for number, item in enumerate(tried):
        if item.refusal is not None or item.model is None:
            judged.append(item)
            continue
        progress(number, len(tried), f"judge {item.candidate.name}")
        certificate = judge.certificate(judge.outputs(item.model))
        refusal = None
        if certificate.drop > task.max_drop:
            refusal = (
                f"It loses {100 * certificate.drop:.2f} points of {certificate.metric} on the select part; "
                f"{100 * task.max_drop:g} are allowed."
            )
        judged.append(replace(item, certificate=certificate, refusal=refusal))
    return judged


def _screen(task: Task, tried: Sequence[Tried], progress: Progress) -> list[Tried]:
    racing = [item for item in tried if item.refusal is None and item.model is not None]
    if not racing:
        return list(tried)
    rungs = [Rung(item.candidate.name, item.model) for item in racing]
    measurements = _measure(task, "screen", rungs, SCREEN, _SCREEN_SHARE, progress)
    speeds = {rung.name: [measurement.speed(rung.name).speed.value for measurement in measurements] for rung in rungs}
    screened: list[Tried] = []
    for item in tried:
        name = item.candidate.name
        if item.refusal is not None or name not in speeds:
            screened.append(item)
            continue
        slow = min(speeds[name])
        refusal = f"It is not faster than the original: {slow:.2f}x in the screening." if slow <= 1.0 else None
        screened.append(replace(item, speed=speeds[name], refusal=refusal))
    return screened


def _gain(item: Tried) -> float:
    """Return the geometric mean of the speeds over the shapes."""
    return math.exp(sum(math.log(speed) for speed in item.speed) / len(item.speed)) if item.speed else 0.0


def _measure_final(task: Task, leader: Tried | None, progress: Progress) -> Sequence[Measurement]:
    rungs = list(task.rungs)
    if leader is not None and leader.candidate.name not in {rung.name for rung in rungs}:
        rungs.append(Rung(leader.candidate.name, leader.model))
    return _measure(task, "measure", rungs, FINAL, 1.0 - _SCREEN_SHARE, progress)


def _measure(
    task: Task, stage_name: str, rungs: Sequence[Rung], effort: Effort, share: float, progress: Progress
) -> Sequence[Measurement]:
    """Measure the original and ``rungs`` at each shape, as one stage."""
    rungs = [Rung(task.original_name, task.original), *rungs]
    budget = task.time_budget * share / len(task.dims)

    def make(folder: Path) -> tuple[Measurement, ...]:
        done: list[Measurement] = []
        samples = task.parts.select if task.parts else None
        for number, dims in enumerate(task.dims):
            feeds = folder / f"feeds-{number}.npz"
            tensors.save_npz(feeds, batch_to_time(task.original, samples, dims))
            subjects = [_subject(task, rung, feeds) for rung in rungs]
            done.append(
                measure(
                    subjects,
                    replace(
                        effort,
                        time_budget=min(budget, effort.time_budget),
                        most_time=min(budget, effort.most_time),
                    ),
                    lambda text, part: progress(int(100 * part), 100, text),
                )
            )
        return tuple(done)

    depends = {
        "rungs": [[rung.name, model_digest(rung.model) if rung.model else str(rung.subject)] for rung in rungs],
        "dims": [dict(dims) for dims in task.dims],
        "samples": task.parts.select.digest() if task.parts else None,
        "provider": task.provider,
        "threads": task.threads,
        "budget": budget,
    }
    return run_stage(task.folder, stage_name, depends, _MEASURE_CODE, make, tuple[Measurement, ...]).value


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
        feeds = batch_to_time(task.original, task.parts.select if task.parts else None, task.dims[0])
        return tuple(
            roofline(name, model, feeds, task.provider, task.threads, peaks=peaks) for name, model in models.items()
        )

    depends = {
        "models": [[name, model_digest(model)] for name, model in models.items()],
        "dims": dict(task.dims[0]),
        "samples": task.parts.select.digest() if task.parts else None,
        "threads": task.threads,
    }
    return run_stage(task.folder, "roofline", depends, _ROOFLINE_CODE, make, tuple[ModelRoofline, ...]).value


def _subject(task: Task, rung: Rung, feeds: Path) -> Subject:
    if rung.subject is not None:
        return replace(rung.subject, name=rung.name, arguments={**rung.subject.arguments, "feeds": str(feeds)})
    assert rung.model is not None, "a rung has a model or a subject"
    return plain_subject(rung.name, rung.model, feeds, task.provider, task.threads)


def _certify(task: Task, leader: Tried | None, progress: Progress) -> tuple[dict[str, Certificate], Evaluation | None]:
    """Judge the leader, the original and the rungs on the certify part; the leader beyond the metric too."""
    if task.parts is None:
        return {}, None
    judge = Judge(task.original, task.parts.certify, task.metric, task.max_drop, task.provider, task.threads)
    models = {task.original_name: task.original}
    models |= {rung.name: rung.model for rung in task.rungs if rung.model is not None}
    if leader is not None and leader.model is not None:
        models[leader.candidate.name] = leader.model
    certificates: dict[str, Certificate] = {}
    evaluation = None
    for number, (name, model) in enumerate(models.items()):
        progress(number, len(models), f"judge {name} on the certify part")
        outputs = judge.outputs(model)
        certificates[name] = judge.certificate(outputs)
        if leader is not None and name == leader.candidate.name:
            evaluation = judge.evaluation(outputs)
    return certificates, evaluation


def _final_refusal(
    task: Task,
    leader: Tried | None,
    measurements: Sequence[Measurement],
    certificates: dict[str, Certificate],
) -> str | None:
    """Return why the leader is not shipped after all; None where it is."""
    if leader is None:
        return "No candidate keeps its accuracy and is faster."
    name = leader.candidate.name
    for dims, measurement in zip(task.dims, measurements, strict=True):
        comparison = measurement.speed(name)
        if comparison.verdict != "faster":
            return (
                f"In fresh processes at {shape_text(dims)} it is not faster beyond noise: {_speed(comparison)}, "
                f"{comparison.reason}."
            )
    certificate = certificates.get(name)
    if certificate is not None and certificate.drop > task.max_drop:
        return (
            f"On the certify part it loses {100 * certificate.drop:.2f} points of {certificate.metric}; "
            f"{100 * task.max_drop:g} are allowed."
        )
    return None


def _conclude(item: Tried, leader: Tried | None, refusal: str | None) -> Tried:
    if item.refusal is not None or leader is None:
        return item
    if item.candidate == leader.candidate:
        return replace(item, refusal=refusal)
    return replace(
        item, refusal=f"{leader.candidate.name} is faster: {_gain(leader):.2f}x, this one {_gain(item):.2f}x."
    )


def _praise(
    task: Task, winner: Tried, measurements: Sequence[Measurement], certificates: dict[str, Certificate]
) -> str:
    name = winner.candidate.name
    speeds = ", ".join(
        f"{_speed(measurement.speed(name))} at {shape_text(dims)}"
        for dims, measurement in zip(task.dims, measurements, strict=True)
    )
    certificate = certificates.get(name)
    judged = "accuracy was not judged (no data), the rewrite is exact"
    if certificate is not None:
        state = "certified" if certificate.certified else "not certified"
        judged = (
            f"{certificate.metric} drops by {100 * certificate.drop:.2f} points, {state} within "
            f"{100 * task.max_drop:g} (95 % bound {100 * certificate.bound:.2f})"
        )
    return f"{name}: {speeds}; {judged}."


def shape_text(dims: Dims) -> str:
    """Return a shape in words, such as "batch 8, seq 128"."""
    return ", ".join(f"{name} {size}" for name, size in dims.items()) or "the model's own shape"


def _speed(comparison: Comparison) -> str:
    speed = comparison.speed
    return f"{speed.value:.2f}x [{speed.low:.2f}, {speed.high:.2f}] the speed of {comparison.against}"
